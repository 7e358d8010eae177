"""Another ``step`` in an optimizer's place, for the duration of a call: the object stays, as schedulers are bound to it."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer


@contextmanager
def replaced_step(optimizer: Optimizer, step: Callable[[], None]) -> Iterator[None]:
    """Within, ``optimizer.step(closure)`` runs the closure and ``step``, between the user's step hooks."""

    def step_with_closure(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step()
        return loss

    previous = optimizer.__dict__.get("step")
    # The decorator runs the hooks, as for every torch optimizer.
    optimizer.step = types.MethodType(Optimizer.profile_hook_step(step_with_closure), optimizer)  # type: ignore[method-assign]
    optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers look at
    try:
        yield
    finally:
        if previous is None:
            del optimizer.step
        else:
            optimizer.step = previous  # type: ignore[method-assign]
