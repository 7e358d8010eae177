"""When to end the warm-up: criteria as pure functions of numbers, without tensors, clocks or ranks.

The question is whether the second moment v *predicts the next gradients*. For a parameter tensor T and one step,

    rho_T = mean over T of min(a^2, kappa^2),   a = g_bar / D,   D from before g_bar entered it,

is 1 if it does, whatever its trend. v moves towards rho_T v: after K more steps like this one it is, with w_K its share
of new gradients, 1 + (rho_T - 1) w_K of what it is now. So rho says how wrong a v will be that is kept for K steps.

The 1-bit Adam paper (arXiv 2102.02888, section 7.1 as remembered; its text was not at hand) freezes once
||v_t||_1 / ||v_{t - Delta}||_1 >= 0.96, with Delta = 1 / (1 - beta2), after the learning-rate warm-up, and so lets a
growing v pass at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_onebit.arguments import check_steps, is_number
from lightning_onebit.config import VarianceRefresh


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How one step's gradient of a tensor compares with the second moment of the step before."""

    mean: float
    """rho_T: mean of min((g / D)^2, kappa^2)."""
    numel: int
    """Elements that have a second moment to compare with, sampled ones counting for all."""
    steps: int
    """Gradients behind that second moment."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a criterion sees of one optimizer step."""

    step: int
    """Optimizer steps made so far."""
    ratios: Mapping[str, Ratio]
    """Of each parameter tensor with a second moment, by name."""
    learning_rate: float
    """The largest of all parameter groups."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a criterion says, and why, in words for the log."""

    freeze: bool
    reason: str
    forced: bool = False
    """The second moment was not found good enough, but the warm-up has reached its longest allowed length."""
    seen: str = ""
    """What was judged, in a few characters, for a progress bar."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A criterion's settings in optimizer steps, for a run of known length.

    Raises:
        TypeError, ValueError: if ``every`` is not a whole number >= 1.
    """

    every: int
    """Steps between observations."""
    start: int = 0
    """First step to observe."""
    window: int = 0
    """Steps whose ratios are averaged."""
    min_steps: int = 0
    max_steps: float = math.inf
    history: int = 0
    """Steps for which observations have to be kept."""
    shares: tuple[str, ...] = ()
    """Settings that were taken as a share of the run: they are wrong if it ends before."""
    tolerance: float = 0.0
    beta2: float = 0.0
    refresh: VarianceRefresh = None
    """When the second moment is renewed after the warm-up; ``None``: never."""
    measures: bool = True
    """Whether observations need ratios, which cost a little."""
    remarks: tuple[str, ...] = ()
    """What the user should know, such as a shortened window."""

    def __post_init__(self) -> None:
        check_steps("every of a Plan", self.every)

    def observes(self, step: int, previous: int | None = None) -> bool:
        """Whether the criterion wants to see ``step``, if ``previous`` was the last one that it could see.

        Manual optimization may step several times between two batches; ``None`` is for the step before.
        """
        previous = step - 1 if previous is None else previous
        return step >= self.start and (step // self.every > previous // self.every or step >= self.max_steps)


class Criterion(ABC):
    """Decides from a history of observations whether the warm-up is over."""

    judges_second_moment: ClassVar[bool] = False
    """Whether there is nothing to judge where no optimizer has a second moment (SGD): the run starts compressed then."""

    @abstractmethod
    def plan(self, *, total_steps: float, beta2: float, refresh: VarianceRefresh = "auto") -> Plan:
        """The settings for a run.

        Args:
            total_steps: its optimizer steps, ``inf`` if unknown.
            beta2: of the slowest second moment.
            refresh: when the second moment is renewed after the warm-up; ``None``: never.
        """

    @abstractmethod
    def judge(self, history: Sequence[Observation], plan: Plan) -> Verdict:
        """The verdict after the last observation of ``history`` (ascending steps, at least one)."""


HINT_ON_LENGTH = "20 to 35 steps are enough with refreshes, without them about 15% of the run"


@dataclass(frozen=True)
class FixedStep(Criterion):
    """Freeze after a fixed number of steps: DeepSpeed's ``freeze_step``.

    Args:
        n: the first n optimizer steps are warm-up, step n + 1 is compressed. At least 1.

    Raises:
        TypeError, ValueError: if ``n`` is not a whole number >= 1.
    """

    n: int

    def __post_init__(self) -> None:
        text = (
            f"Invalid number of warm-up steps: FixedStep({self.n!r}). Must be an integer >= 1: Adam has no second moment"
            " before its first step."
        )
        if not is_number(self.n):
            raise TypeError(f"{text} HINT: {HINT_ON_LENGTH}.")
        if 0 < self.n < 1:
            share = f"VarianceStability(min_steps={self.n}, max_steps={self.n})"
            raise ValueError(
                f"{text} A fraction of the run is none, as its length may be unknown. HINT: {share} takes one where it is"
                " known."
            )
        if not is_whole(self.n) or self.n < 1:
            raise ValueError(f"{text} HINT: {HINT_ON_LENGTH}.")
        object.__setattr__(self, "n", int(self.n))

    def plan(self, *, total_steps: float, beta2: float, refresh: VarianceRefresh = "auto") -> Plan:
        remarks: tuple[str, ...] = ()
        if self.n >= total_steps:
            remarks = (
                f"FixedStep({self.n}) does not end the warm-up within this run of {total_steps:.0f} optimizer steps:"
                " nothing will be compressed. HINT: use a smaller number.",
            )
        return Plan(every=1, start=self.n, max_steps=self.n, measures=False, remarks=remarks)

    def judge(self, history: Sequence[Observation], plan: Plan) -> Verdict:
        step = history[-1].step
        return Verdict(freeze=step >= self.n, reason=f"{min(step, self.n)} of {self.n} warm-up steps are done")


def is_whole(value: Any) -> bool:
    """Whether it is a number without a fraction, of any type; ``True`` is none."""
    return is_number(value) and math.isfinite(value) and value == int(value)


def as_steps(value: int | float, total_steps: float, *, otherwise: float) -> float:
    """A number of steps; a fraction is taken of ``total_steps``, and is ``otherwise`` if that is unknown."""
    if value == 0 or value >= 1:
        return value
    return math.ceil(value * total_steps) if math.isfinite(total_steps) else otherwise
