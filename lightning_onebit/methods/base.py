"""What tells one optimizer from another in the compressed phase. A method knows numbers and stock state; it does not
communicate, and never sees a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.coefficients import Coefficients


class Method(ABC):
    """An optimizer as the formula of the compressed phase needs it: :class:`~lightning_onebit.coefficients.Coefficients`.

    ``group`` is a parameter group of the optimizer, read anew at every step, as schedulers change it; ``state`` is the stock
    state of one parameter, empty before its first step.
    """

    optimizer_types: ClassVar[tuple[type[Optimizer], ...]]
    """These types are handled, and subclasses that have the same `step`."""

    has_second_moment: ClassVar[bool]
    """Whether there is a D, which needs a warm-up before it can be frozen."""

    counts_steps: ClassVar[bool] = True
    """Whether the stock state tells how many steps were made."""

    def check(self, group: Mapping[str, Any], index: int) -> None:  # noqa: B027  # most have nothing to refuse
        """Raise ``ValueError`` if an option of parameter group ``index`` has no meaning here; says what to do instead."""

    @abstractmethod
    def coefficients(self, group: Mapping[str, Any], step: int, *, num_averaged: int) -> Coefficients:
        """The numbers of a parameter's step number ``step`` (from 1).

        Args:
            group: its parameter group.
            step: counted for the parameter, those of the warm-up included.
            num_averaged: gradients that are averaged after the clamp: ranks, or nodes where these average first.
        """

    @abstractmethod
    def steps_done(self, state: Mapping[str, Any]) -> int:
        """Steps that the stock state has seen."""

    @abstractmethod
    def momentum(self, state: Mapping[str, Any]) -> Tensor | None:
        """The stock momentum buffer m, not a copy; ``None`` if there is none yet."""

    def second_moment(self, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
        """v_hat, bias-corrected: a new tensor, or ``None`` if there is none (yet)."""
        return None

    def second_moment_decay(self, group: Mapping[str, Any]) -> float:
        """beta2."""
        return 0.0

    @abstractmethod
    def stock_state(
        self, momentum: Tensor, second_moment: Tensor | None, param: Tensor, group: Mapping[str, Any], step: int
    ) -> dict[str, Any]:
        """What a stock optimizer would hold of ``param`` after ``step`` steps.

        Args:
            momentum: m, float32 or float64, of the parameter's shape; may become part of the result.
            second_moment: v_hat, likewise; ``None`` without one.
            param: gives the dtype and device.
            group: its parameter group.
            step: steps made.
        """
