"""When to freeze the second moment: criteria as pure functions of numbers, without tensors, clocks or ranks.

The 1-bit Adam paper (arXiv 2102.02888, section 7.1 as remembered; its text was not at hand) freezes once
||v_t||_1 / ||v_{t - Delta}||_1 >= 0.96, with Delta = 1 / (1 - beta2), after the learning-rate warm-up. That ratio
lets a growing v pass at once, and starts from v_0 = 0. Here the test has two sides, v is bias-corrected, and every
tensor must pass by itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

OBSERVATIONS_PER_WINDOW = 10
DEFAULT_MIN_STEPS = 100
WINDOWS_PER_WARMUP = 4
"""A window is shortened so that at least this many fit into the longest warm-up allowed."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a criterion sees of one optimizer step."""

    step: int
    """Optimizer steps made so far."""
    variances: Mapping[str, float]
    """||v_hat||_1 of each parameter tensor, bias-corrected, by name."""
    learning_rate: float
    """The largest of all parameter groups."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a criterion says, and why, in words for the log."""

    freeze: bool
    reason: str
    forced: bool = False
    """The second moment was not found stable, but the warm-up has reached its longest allowed length."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A criterion's settings in optimizer steps, for a run of known length."""

    every: int
    """Steps between observations."""
    start: int = 0
    """First step to observe."""
    window: int = 0
    """Steps between the two second moments that are compared."""
    min_steps: int = 0
    max_steps: float = math.inf
    history: int = 0
    """Steps for which observations have to be kept."""
    remarks: tuple[str, ...] = ()
    """What the user should know, such as a shortened window."""

    def observes(self, step: int, previous: int | None = None) -> bool:
        """Whether the criterion wants to see ``step``, if ``previous`` was the last one that it could see.

        Manual optimization may step several times between two batches; ``None`` is for the step before.
        """
        previous = step - 1 if previous is None else previous
        return step >= self.start and (step // self.every > previous // self.every or step >= self.max_steps)


class Criterion(ABC):
    """Decides from a history of observations whether the second moment is to be frozen now."""

    judges_second_moment: ClassVar[bool] = False
    """Whether there is nothing to judge where no optimizer has a second moment (SGD): the run starts compressed then."""

    @abstractmethod
    def plan(self, *, total_steps: float, beta2: float) -> Plan:
        """The settings for a run of ``total_steps`` optimizer steps (``inf`` if unknown)."""

    @abstractmethod
    def judge(self, history: Sequence[Observation], plan: Plan) -> Verdict:
        """The verdict after the last observation of ``history`` (ascending steps, at least one)."""


@dataclass(frozen=True)
class FixedStep(Criterion):
    """Freeze after a fixed number of steps: DeepSpeed's ``freeze_step``.

    Args:
        n: the first n optimizer steps are warm-up, step n + 1 is compressed. At least 1.
    """

    n: int

    def __post_init__(self) -> None:
        if not _is_whole(self.n) or self.n < 1:
            raise ValueError(
                f"Invalid number of warm-up steps: FixedStep({self.n}). Must be an integer >= 1: Adam has no second moment"
                " before its first step. HINT: 15% to 25% of the run is a usual choice."
            )

    def plan(self, *, total_steps: float, beta2: float) -> Plan:
        remarks: tuple[str, ...] = ()
        if self.n >= total_steps:
            remarks = (
                f"FixedStep({self.n}) does not end the warm-up within this run of {total_steps:.0f} optimizer steps:"
                " nothing will be compressed. HINT: use a smaller number.",
            )
        return Plan(every=1, start=self.n, remarks=remarks)

    def judge(self, history: Sequence[Observation], plan: Plan) -> Verdict:
        step = history[-1].step
        return Verdict(freeze=step >= self.n, reason=f"{step} of {self.n} warm-up steps are done")


@dataclass(frozen=True, kw_only=True)
class VarianceStability(Criterion):
    """Freeze once the second moment of every parameter tensor has stopped changing.

    Compares v_hat, bias-corrected, with itself one window earlier, tensor by tensor: |ratio - 1| <= tolerance must hold
    for the one that changes most, at several observations in a row, while the learning rate does not rise. A run without
    any second moment starts compressed.
    """

    judges_second_moment = True

    tolerance: float = 0.04
    """Largest relative change of ||v_hat||_1 over one window. > 0."""
    window: int | None = None
    """Steps between the compared moments; ``None``: 1 / (1 - beta2), shortened for short runs."""
    patience: int = 3
    """Observations in a row that must pass; there are ten in a window. >= 1."""
    min_steps: int | float | None = None
    """Shortest warm-up, in optimizer steps, or as a fraction of the run if a float below 1.
    ``None``: 100 steps, or ``max_steps`` if that is less."""
    max_steps: int | float | None = 0.3
    """Longest warm-up, likewise, but not shorter than the shortest: then the moment is frozen as it is, with a warning.
    ``None``: wait for ever. A fraction has no effect on a run of unknown length."""

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise ValueError(f"Invalid tolerance: {self.tolerance}. Must be > 0; 0.04 is the default.")
        if self.window is not None and (not _is_whole(self.window) or self.window < 1):
            raise ValueError(f"Invalid window: {self.window}. Must be an integer >= 1, or None for 1 / (1 - beta2).")
        if not _is_whole(self.patience) or self.patience < 1:
            raise ValueError(f"Invalid patience: {self.patience}. Must be an integer >= 1.")
        for name, steps in (("min_steps", self.min_steps), ("max_steps", self.max_steps)):
            if steps is not None and not (0 <= steps < 1 or (steps >= 1 and _is_whole(steps))):
                raise ValueError(
                    f"Invalid {name}: {steps}. Must be an integer number of optimizer steps >= 1, or a fraction of the"
                    " run between 0 and 1."
                )
        if self.max_steps == 0:
            raise ValueError("Invalid max_steps: 0. Must be > 0, or None to wait for ever.")
        if self.max_steps is not None and self.max_steps >= 1 and (self.min_steps or 0) > self.max_steps:
            raise ValueError(
                f"Invalid min_steps: {self.min_steps}. Must not be more than max_steps={self.max_steps}."
                " HINT: lower min_steps or raise max_steps."
            )

    def plan(self, *, total_steps: float, beta2: float) -> Plan:
        max_steps = math.inf if self.max_steps is None else _as_steps(self.max_steps, total_steps, otherwise=math.inf)
        if self.min_steps is not None:
            min_steps = _as_steps(self.min_steps, total_steps, otherwise=0)
        elif self.max_steps is not None and self.max_steps >= 1:
            min_steps = min(DEFAULT_MIN_STEPS, max_steps)
        else:
            min_steps = DEFAULT_MIN_STEPS
        max_steps = max(max_steps, min_steps)
        remarks = []
        if self.max_steps is not None and math.isinf(max_steps):
            remarks.append(
                f"The length of the run is not known, so max_steps={self.max_steps}, a fraction of it, has no effect: the"
                " warm-up may last for ever. HINT: make max_steps a number of steps, or use FixedStep(n)."
            )
        if min_steps >= total_steps:
            remarks.append(
                f"This run of {total_steps:.0f} optimizer steps is not longer than its shortest warm-up of {min_steps:.0f}"
                " steps: nothing will be compressed. HINT: set min_steps, or use FixedStep(n)."
            )
        memory = round(1.0 / (1.0 - beta2))
        window = memory if self.window is None else int(self.window)
        longest = min(max_steps, total_steps)
        if self.window is None and window * WINDOWS_PER_WARMUP > longest:
            window = max(1, int(longest // WINDOWS_PER_WARMUP))
            remarks.append(
                f"The run is too short to compare second moments 1/(1 - beta2) = {memory} steps apart: comparing"
                f" {window} steps apart instead. HINT: set window and tolerance to judge by other numbers."
            )
        every = max(1, window // OBSERVATIONS_PER_WINDOW)
        return Plan(
            every=every,
            window=window,
            min_steps=int(min_steps),
            max_steps=max_steps,
            history=window + (self.patience + 1) * every,
            remarks=tuple(remarks),
        )

    def judge(self, history: Sequence[Observation], plan: Plan) -> Verdict:
        now = history[-1].step
        if now < plan.min_steps:
            return Verdict(freeze=False, reason=f"min_steps={plan.min_steps} is not reached")
        verdict = self._judge_stability(history, plan)
        if verdict.freeze or now < plan.max_steps:
            return verdict
        return Verdict(
            freeze=True,
            forced=True,
            reason=f"max_steps is reached at step {now} although the second moment is not stable: {verdict.reason}",
        )

    def _judge_stability(self, history: Sequence[Observation], plan: Plan) -> Verdict:
        steps = [observation.step for observation in history]
        largest, where = 0.0, ""
        for position in range(len(history) - 1, len(history) - 1 - self.patience, -1):
            past = bisect_right(steps, steps[position] - plan.window) - 1 if position >= 0 else -1
            if past < 0:
                return Verdict(freeze=False, reason=f"only {steps[-1]} steps have been seen")
            now, before = history[position], history[position - 1]
            if now.learning_rate > before.learning_rate:
                return Verdict(freeze=False, reason=f"the learning rate was still rising at step {now.step}")
            change, name = largest_change(history[past].variances, now.variances)
            if not change <= self.tolerance:
                return Verdict(
                    freeze=False,
                    reason=f"{name!r} changed by {change:.1%} in the {plan.window} steps before step {now.step}"
                    f" ({self.tolerance:.1%} allowed)",
                )
            if change >= largest:
                largest, where = change, name
        return Verdict(
            freeze=True,
            reason=f"no second moment changed by more than {largest:.1%} ({where!r}) in {plan.window} steps",
        )


def largest_change(old: Mapping[str, float], new: Mapping[str, float]) -> tuple[float, str]:
    """The largest |new / old - 1| and whose it is: a moving layer must not hide behind quiet or larger ones.

    Tensors that are zero in both have had no gradient and count as unchanged; new ones, and NaN, as infinitely changed.
    """
    changes = [(relative_change(old.get(name, 0.0), value), name) for name, value in new.items()]
    return max(changes, default=(0.0, ""))


def relative_change(old: float, new: float) -> float:
    """|new / old - 1|, with 0 / 0 unchanged; infinite where that is undefined."""
    if old == new == 0.0:
        return 0.0
    change = abs(new / old - 1.0) if old else math.inf
    return change if math.isfinite(change) else math.inf


def _is_whole(value: float) -> bool:
    return math.isfinite(value) and value == int(value)


def _as_steps(value: int | float, total_steps: float, *, otherwise: float) -> float:
    """A number of steps; a fraction is taken of ``total_steps``, and is ``otherwise`` if that is unknown."""
    if value == 0 or value >= 1:
        return value
    return math.ceil(value * total_steps) if math.isfinite(total_steps) else otherwise
