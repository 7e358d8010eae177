"""Optimizers in the compressed phase. A new method is one module here and one entry in :data:`METHODS`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.optim.adam import FrozenAdam
from lightning_onebit.optim.method import CompressedMethod

METHODS: tuple[type[CompressedMethod[Any]], ...] = (FrozenAdam,)


def method_for(optimizer: Optimizer) -> type[CompressedMethod[Any]]:
    """The method that continues ``optimizer`` in the compressed phase.

    Raises:
        ValueError: if there is none, or if an option of the optimizer is not supported.
    """
    for method in METHODS:
        if type(optimizer) in method.optimizer_types:
            method.validate(optimizer)
            return method
    supported = ", ".join(
        f"{kind.__module__.rsplit('.', 1)[0]}.{kind.__name__}" for method in METHODS for kind in method.optimizer_types
    )
    kind = type(optimizer)
    raise ValueError(
        f"The optimizer {kind.__module__}.{kind.__qualname__} cannot be compressed. Supported are exactly: {supported}"
        " (not their subclasses). HINT: use one of these, or strategy='ddp'."
    )


def parameters_of(*optimizers: Optimizer) -> list[Tensor]:
    """All parameters, in order."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
