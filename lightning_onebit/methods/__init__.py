"""Optimizers in the compressed phase. A new method is one module here and one entry in :data:`METHODS`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.methods.adam import AdamMethod, AdamWMethod
from lightning_onebit.methods.base import Method
from lightning_onebit.methods.sgd import SGDMethod

METHODS: tuple[Method, ...] = (AdamMethod(), AdamWMethod(), SGDMethod())
_METHOD_OF = {kind: method for method in METHODS for kind in method.optimizer_types}
_ARGUMENTS = {kind: tuple(inspect.signature(kind).parameters) for kind in _METHOD_OF}
"""Whose values a stock optimizer keeps in its parameter groups."""


def method_for(optimizer: Optimizer) -> Method:
    """The method that continues ``optimizer`` in the compressed phase.

    Raises:
        ValueError: if there is none, or if an option of the optimizer is not supported.
    """
    cls = type(optimizer)
    stock, changed = _stock_type(cls)  # type: ignore[arg-type]
    if stock is not None and not changed:
        for index, group in enumerate(optimizer.param_groups):
            if group["differentiable"]:
                raise ValueError(
                    f"differentiable=True (parameter group {index}) is not supported: gradients cannot flow through signs."
                    " Use differentiable=False."
                )
            _METHOD_OF[stock].check(group, index)
        return _METHOD_OF[stock]
    supported = ", ".join(f"{kind.__module__.rsplit('.', 1)[0]}.{kind.__name__}" for kind in _METHOD_OF)
    reason = (
        "a compressed step applies the update itself, and knows the formulas of other optimizers only"
        if stock is None
        else f"it has {changed} of its own, instead of that of {stock.__name__}, which a compressed step would not call"
    )
    raise ValueError(
        f"The optimizer {cls.__module__}.{cls.__qualname__} cannot be compressed: {reason}. Supported are {supported}, and"
        " subclasses that leave `step` as it is. HINT: use one of these, or strategy='ddp'."
    )


@cache
def _stock_type(cls: Any) -> tuple[type[Optimizer] | None, str]:
    """The nearest class above ``cls``, or itself, that a method continues; what of its step ``cls`` has changed, if any."""
    stock = next((kind for kind in cls.__mro__ if kind in _METHOD_OF), None)
    names = ("step", "_init_group") if stock is not None else ()
    changed = [name for name in names if _unhooked(getattr(cls, name)) is not _unhooked(getattr(stock, name))]
    return stock, " and ".join(f"`{name}`" for name in changed)


def _unhooked(function: Any) -> Any:
    """Without the wrapper for step hooks, which torch puts around the ``step`` of a class when it is first used."""
    return function.__wrapped__ if getattr(function, "hooked", False) else function


def needs_warmup(optimizer: Optimizer) -> bool:
    """Whether there is a second moment, which must have settled before it can be frozen."""
    return method_for(optimizer).has_second_moment


def counted_steps(optimizer: Optimizer) -> int | None:
    """Steps that the stock state of ``optimizer`` tells of; ``None`` if it never does."""
    method = method_for(optimizer)
    states = optimizer.state.values()
    return max(map(method.steps_done, states), default=0) if method.counts_steps else None


def hyperparameters(optimizer: Optimizer) -> dict[str, str]:
    """What the ranks must agree on, by name: the values that a step uses, as a schedule has set them last, as text."""
    return {
        f"{type(optimizer).__name__}, group {index}, {name}": _text(value) for index, name, value in used_values(optimizer)
    }


def used_values(optimizer: Optimizer) -> Iterator[tuple[int, str, Any]]:
    """Of each parameter group, by number, the names and values that a step uses: not what users keep there beside them."""
    stock, changed = _stock_type(type(optimizer))  # type: ignore[arg-type]
    used = optimizer.defaults if stock is None or changed else _ARGUMENTS[stock]
    for index, group in enumerate(optimizer.param_groups):
        for name in used:
            value = group.get(name)
            if isinstance(value, (bool, int, float, str, tuple)):
                yield index, name, value
            elif isinstance(value, Tensor) and value.numel() == 1:
                yield index, name, value.item()


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    return repr(value.item()) if isinstance(value, Tensor) else repr(value)  # betas may be tensors


def parameters_of(*optimizers: Optimizer) -> list[Tensor]:
    """All parameters, in order."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
