"""Optimizers in the compressed phase. A new method is one module here and one entry in :data:`METHODS`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.methods.adam import AdamMethod, AdamWMethod
from lightning_onebit.methods.base import Method
from lightning_onebit.methods.sgd import SGDMethod

METHODS: tuple[Method, ...] = (AdamMethod(), AdamWMethod(), SGDMethod())


def method_for(optimizer: Optimizer) -> Method:
    """The method that continues ``optimizer`` in the compressed phase.

    Raises:
        ValueError: if there is none, or if an option of the optimizer is not supported.
    """
    for method in METHODS:
        if type(optimizer) in method.optimizer_types:
            for index, group in enumerate(optimizer.param_groups):
                if group["differentiable"]:
                    raise ValueError(
                        f"differentiable=True (parameter group {index}) is not supported: gradients cannot flow through"
                        " signs. Use differentiable=False."
                    )
                method.check(group, index)
            return method
    supported = ", ".join(
        f"{kind.__module__.rsplit('.', 1)[0]}.{kind.__name__}" for method in METHODS for kind in method.optimizer_types
    )
    kind = type(optimizer)
    raise ValueError(
        f"The optimizer {kind.__module__}.{kind.__qualname__} cannot be compressed. Supported are exactly: {supported}"
        " (not their subclasses). HINT: use one of these, or strategy='ddp'."
    )


def needs_warmup(optimizer: Optimizer) -> bool:
    """Whether there is a second moment, which must have settled before it can be frozen."""
    return method_for(optimizer).has_second_moment


def counted_steps(optimizer: Optimizer) -> int | None:
    """Steps that the stock state of ``optimizer`` tells of; ``None`` if it never does."""
    method = method_for(optimizer)
    states = optimizer.state.values()
    return max(map(method.steps_done, states), default=0) if method.counts_steps else None


def hyperparameters(optimizer: Optimizer) -> dict[str, str]:
    """What the ranks must agree on, by name: the values in the parameter groups, as a schedule has set them last."""
    return {
        f"{type(optimizer).__name__}, group {index}, {name}": _text(value)
        for index, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if isinstance(value, (bool, int, float, str, tuple)) or (isinstance(value, Tensor) and value.numel() == 1)
    }


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    return repr(value.item()) if isinstance(value, Tensor) else repr(value)


def parameters_of(*optimizers: Optimizer) -> list[Tensor]:
    """All parameters, in order."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
