"""What a compressed optimizer has to say: what it communicates, and how it applies the average. No communication."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.momentum import LocalMomentum

Coefficients = TypeVar("Coefficients")
"""The numbers of one step that are the same for all elements of a parameter."""


class CompressedMethod(ABC, Generic[Coefficients]):
    """The local arithmetic of one optimizer in the compressed phase, for any segment of any parameter.

    Arguments named after optimizer state are flat views of a segment, ``[numel]`` each: ``error`` and ``direction`` in
    the dtype of the error feedback (float32 or float64), ``param``, ``grad`` and ``exp_avg_sq`` in the parameter's.

    Args:
        optimizer: an optimizer that :meth:`validate` accepts.
        config: settings of the compression.
        segment_numel: most elements of a segment; sizes the workspace.
        dtype: dtype of the error feedback.
        device: device of the parameters.
    """

    optimizer_types: ClassVar[tuple[type[Optimizer], ...]]
    """Exactly these types are handled: a subclass may override anything."""

    def __init__(
        self,
        optimizer: Optimizer,
        config: CompressionConfig,
        *,
        segment_numel: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.optimizer = optimizer
        self.config = config
        self.dtype = dtype
        self._workspaces = [torch.empty(segment_numel, dtype=dtype, device=device) for _ in range(2)]

    @classmethod
    @abstractmethod
    def validate(cls, optimizer: Optimizer) -> None:
        """Raise ``ValueError`` if an option of the optimizer has no meaning here; says what to do instead."""

    @abstractmethod
    def freeze_(self, param: Tensor, group: Mapping[str, Any]) -> None:
        """Turn the parameter's warm-up state into frozen state, in place. The momentum is left as it is."""

    @abstractmethod
    def thawed(self, param: Tensor, group: Mapping[str, Any]) -> Tensor:
        """The second moment as a stock optimizer would hold it at the parameter's present step, a new tensor."""

    @abstractmethod
    def refrozen(self, exp_avg_sq: Tensor, param: Tensor, group: Mapping[str, Any]) -> Tensor:
        """What :meth:`freeze_` would make of a stock second moment at the parameter's present step, a new tensor."""

    @abstractmethod
    def shared(self, exp_avg_sq: Tensor) -> Tensor:
        """A frozen second moment as far as all ranks know the same; not to be changed."""

    @abstractmethod
    def private(self, exp_avg_sq: Tensor) -> Tensor:
        """Mask of the coordinates whose frozen second moment is this rank's own, negative, ``bool``."""

    @abstractmethod
    def count_step_(self, param: Tensor) -> None:
        """Advance the parameter's step."""

    @abstractmethod
    def coefficients(self, param: Tensor, group: Mapping[str, Any]) -> Coefficients:
        """The numbers of the parameter's present step, read anew from the group, as schedulers change them."""

    @abstractmethod
    def momentum_(self, out: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, group: Mapping[str, Any]) -> None:
        """Write u, the momentum in the space that is communicated, to ``out``."""

    @abstractmethod
    def exp_avg_(self, out: Tensor, direction: Tensor, exp_avg_sq: Tensor, group: Mapping[str, Any]) -> None:
        """Inverse of :meth:`momentum_`: write the optimizer's own momentum buffer to ``out``."""

    @abstractmethod
    def local_momentum(
        self, grad: Tensor | None, param: Tensor, exp_avg_sq: Tensor, coefficients: Coefficients, *, keep: bool
    ) -> LocalMomentum:
        """What this rank adds to its error in step 1. Valid until the next call; ``grad`` is not changed, ``None`` is zero.

        Args:
            grad: the local gradient.
            param: the parameter.
            exp_avg_sq: the second moment.
            coefficients: the numbers of this step.
            keep: whether what the method learns from this gradient is written to ``exp_avg_sq``: false as long as
                the step may have to be taken back.
        """

    @abstractmethod
    def momentum_decay(self, coefficients: Coefficients) -> float:
        """Factor of the previous average in the next value: beta1 in ``beta1 u + (1 - beta1) g``."""

    @abstractmethod
    def decay_(self, param: Tensor, coefficients: Coefficients) -> None:
        """Decoupled weight decay, in place, before :meth:`apply_`."""

    @abstractmethod
    def direction_factor(self, coefficients: Coefficients) -> float:
        """What the average is to be multiplied with before :meth:`apply_`."""

    @property
    @abstractmethod
    def only_adds(self) -> bool:
        """Whether all that :meth:`apply_` does is to add ``direction`` to ``param``."""

    @abstractmethod
    def apply_(self, param: Tensor, direction: Tensor, exp_avg_sq: Tensor, coefficients: Coefficients) -> None:
        """Update ``param`` in place with the scaled average ``direction``, which may be overwritten."""

    @abstractmethod
    def dead(self, exp_avg_sq: Tensor) -> Tensor:
        """Mask of the coordinates that never had a gradient on any rank, ``bool [numel]``: they must not move."""

    @abstractmethod
    def wake_(self, exp_avg_sq: Tensor, woken: Tensor) -> None:
        """Note in place, where ``woken``, that a first gradient has come: these are not dead any more."""

    def _workspace(self, index: int, numel: int) -> Tensor:
        return self._workspaces[index][:numel]
