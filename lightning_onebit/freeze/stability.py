"""The criterion that decides: end the warm-up where the second moment predicts the gradients well enough.

Its numbers come from replayed runs (benchmarks/results/criterion.txt).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_onebit.arguments import is_number
from lightning_onebit.config import VarianceRefresh
from lightning_onebit.freeze.criteria import Criterion, Observation, Plan, Ratio, Verdict, as_steps, is_whole
from lightning_onebit.refresh_schedule import refresh_interval

RENEWED_MIN_STEPS, RENEWED_MAX_STEPS = 20, 35
RENEWED_FRACTION, LONGEST_FRACTION = 0.02, 0.3
RENEWED_TOLERANCE, FROZEN_TOLERANCE = 0.015, 0.3
RENEWED_WINDOW = 5
FROZEN_WINDOW = 0.05
"""Of the run. Growth is seen from one window to the next, if it is seen at all."""
OBSERVATIONS_PER_WINDOW = 20
LARGEST_FACTOR = 3.0
"""Without refreshes, how far the rho of a single tensor may be from 1, beyond its noise: 1.7 in what divides."""


@dataclass(frozen=True, kw_only=True)
class VarianceStability(Criterion):
    """End the warm-up once the second moment predicts the next gradients well enough for what is done with it.

    With refreshes a rough one will do, as it is soon renewed: over the last few steps, the mean of (g / D)^2 over all
    elements must not let D change by more than ``tolerance`` from one refresh to the next. Between 20 and 35 steps.

    Without, it is kept for good. The mean over all elements of how far each tensor's rho is from 1, up or down, must be
    within ``tolerance``, no tensor may be off by more than 1.7 in D beyond its noise, rho must not move away from 1 from one
    window to the next, and the learning rate must not rise; all of it at several observations in a row.

    A run without any second moment starts compressed.
    """

    judges_second_moment = True

    tolerance: float | None = None
    """Largest expected change of D = sqrt(v). > 0. ``None``: 0.015 from one refresh to the
    next; without refreshes 0.3."""
    window: int | None = None
    """Steps over which ratios are averaged. ``None``: 5; without refreshes a twentieth of the run, or 1 / (1 - beta2) / 10
    if its length is unknown, and 20 at least."""
    patience: int = 3
    """Observations in a row that must pass; there are twenty in a window. With refreshes one will do. >= 1."""
    min_steps: int | float | None = None
    """Shortest warm-up, in optimizer steps, or as a fraction of the run if a float below 1.
    ``None``: 20 steps with refreshes; without, two windows."""
    max_steps: int | float | Literal["auto"] | None = "auto"
    """Longest warm-up, likewise, but not shorter than the shortest: then it ends as things are, without refreshes with a
    warning. ``None``: wait for ever. A fraction has no effect on a run of unknown length. ``"auto"``: with refreshes 2% of
    the run, 20 steps at least and 35 at most; without 30%."""

    def __post_init__(self) -> None:
        """Refuse what no run could use, with the value and the remedy: ``TypeError`` or ``ValueError``."""
        if self.tolerance is not None:
            text = (
                f"Invalid tolerance: {self.tolerance!r}. Must be a number > 0, or None for {RENEWED_TOLERANCE} with and"
                f" {FROZEN_TOLERANCE} without refreshes."
            )
            if not is_number(self.tolerance):
                raise TypeError(text)
            if not self.tolerance > 0:
                raise ValueError(text)
        if self.window is not None:
            _check_count("window", self.window, ", or None: 5, and without refreshes a twentieth of the run")
        _check_count("patience", self.patience, ": observations in a row, each a twentieth of the window after the last")
        lengths: dict[str, Any] = {"min_steps": self.min_steps, "max_steps": self.max_steps}
        for name, steps in lengths.items():
            if steps is None or (name == "max_steps" and isinstance(steps, str) and steps == "auto"):
                continue
            or_auto = ", 'auto', or None to wait for ever" if name == "max_steps" else ", or None for the default"
            text = (
                f"Invalid {name}: {steps!r}. Must be an integer number of optimizer steps >= 1, a fraction of the run"
                f" between 0 and 1{or_auto}."
            )
            if not is_number(steps):
                raise TypeError(text)
            if not (0 <= steps < 1 or (steps >= 1 and is_whole(steps))):
                raise ValueError(text)
        if self.max_steps == 0:
            raise ValueError("Invalid max_steps: 0. Must be > 0, or None to wait for ever.")
        shortest, longest = self.min_steps or 0, self.max_steps
        # A number of steps and a share of a run cannot be compared yet.
        if isinstance(longest, (int, float)) and (longest < 1) == (shortest < 1) and shortest > longest:
            raise ValueError(
                f"Invalid min_steps: {self.min_steps}. Must not be more than max_steps={self.max_steps}."
                " HINT: lower min_steps or raise max_steps."
            )

    def plan(self, *, total_steps: float, beta2: float, refresh: VarianceRefresh = "auto") -> Plan:
        window = self.window
        if window is None and refresh is not None:
            window = RENEWED_WINDOW
        elif window is None:
            known = math.isfinite(total_steps)
            window = max(20, round(FROZEN_WINDOW * total_steps if known else 0.1 / (1.0 - beta2)))
        max_steps, remarks = self._longest(total_steps, refresh), self._remarks_on_length(total_steps, refresh)
        if self.min_steps is not None:
            min_steps = as_steps(self.min_steps, total_steps, otherwise=0)
        else:
            min_steps = RENEWED_MIN_STEPS if refresh is not None else 2 * window
            if self.max_steps is not None and self.max_steps != "auto" and self.max_steps >= 1:
                min_steps = min(min_steps, max_steps)
        max_steps = max(max_steps, min_steps)
        if min_steps >= total_steps:
            remarks.append(
                f"This run of {total_steps:.0f} optimizer steps is not longer than its shortest warm-up of {min_steps:.0f}"
                " steps: nothing will be compressed. HINT: set min_steps, or use FixedStep(n)."
            )
        every = max(1, window // OBSERVATIONS_PER_WINDOW)
        tolerance = self.tolerance
        if tolerance is None:
            tolerance = FROZEN_TOLERANCE if refresh is None else RENEWED_TOLERANCE
        return Plan(
            every=every,
            start=0 if refresh is None else max(0, int(min_steps) - window + 1),
            window=window,
            min_steps=int(min_steps),
            max_steps=max_steps,
            history=window if refresh is not None else 2 * window + (self.patience - 1) * every,
            tolerance=tolerance,
            beta2=beta2,
            refresh=refresh,
            shares=tuple(self._shares(refresh).values()),
            remarks=tuple(remarks),
        )

    def _longest(self, total_steps: float, refresh: VarianceRefresh) -> float:
        """``max_steps`` in steps, infinite if there is no such number."""
        longest = self.max_steps
        if longest is None:
            return math.inf
        if longest == "auto" and refresh is not None:
            return max(RENEWED_MIN_STEPS, math.ceil(min(RENEWED_FRACTION * total_steps, RENEWED_MAX_STEPS)))
        return as_steps(LONGEST_FRACTION if longest == "auto" else longest, total_steps, otherwise=math.inf)

    def _shares(self, refresh: VarianceRefresh) -> dict[str, str]:
        """Settings that are shares of the run, by name, with their values. With refreshes "auto" is 35 steps at most."""
        shares = {}
        for name, value in (("min_steps", self.min_steps), ("max_steps", self.max_steps)):
            if value == "auto" and refresh is None:
                shares[name] = f"{name}='auto' ({LONGEST_FRACTION:.0%} of the run)"
            elif value is not None and value != "auto" and 0 < value < 1:
                shares[name] = f"{name}={value}"
        return shares

    def _remarks_on_length(self, total_steps: float, refresh: VarianceRefresh) -> list[str]:
        """What to know of settings that have no effect, as the length of the run is not known."""
        if math.isfinite(total_steps):
            return []
        effects = {
            "min_steps": "the warm-up may be as short as the criterion finds",
            "max_steps": "the warm-up may last for ever",
        }
        return [
            f"The length of the run is not known, so {share}, a fraction of it, has no effect: {effects[name]}."
            f" HINT: make {name} a number of steps, or use FixedStep(n)."
            for name, share in self._shares(refresh).items()
        ]

    def judge(self, history: Sequence[Observation], plan: Plan) -> Verdict:
        now = history[-1].step
        if now < plan.min_steps:
            return Verdict(freeze=False, reason=f"min_steps={plan.min_steps} is not reached")
        bad = next((name for name, ratio in history[-1].ratios.items() if not math.isfinite(ratio.mean)), None)
        if bad is not None:
            return Verdict(freeze=False, reason=f"the gradient or the second moment of {bad!r} is infinite or NaN")
        verdict = self._judge_frozen(history, plan) if plan.refresh is None else self._judge_renewed(history, plan)
        if verdict.freeze or now < plan.max_steps:
            return verdict
        return Verdict(
            freeze=True,
            forced=True,
            reason=f"max_steps is reached at step {now} although the second moment may still move: {verdict.reason}",
            seen=verdict.seen,
        )

    def _judge_renewed(self, history: Sequence[Observation], plan: Plan) -> Verdict:
        now = history[-1].step
        window = [o for o in history if o.step > now - plan.window]
        totals = [mean for o in window if math.isfinite(mean := mean_ratio(o.ratios.values()))]
        if len(window) < min(2, plan.window):
            return Verdict(freeze=False, reason=f"only {len(window)} steps have been seen")
        if not totals:
            return Verdict(freeze=True, reason="no parameter has a second moment that matters")
        rho, noise = statistics.fmean(totals), _noise(totals)
        interval = refresh_interval(plan.refresh, now)  # at most: the first refresh may come before
        share = share_of_new(interval, now, plan.beta2)
        # What may be noise is not counted: the next refresh is near.
        excess = math.copysign(max(0.0, abs(rho - 1.0) - noise), rho - 1.0)
        change = abs(math.sqrt(max(0.0, 1.0 + excess * share)) - 1.0)
        worst, name = _farthest(window)
        return Verdict(
            freeze=change <= plan.tolerance,
            reason=f"in steps {window[0].step} to {now}, (g / D)^2 was {rho:.3g} +- {noise:.2g} in the mean over all"
            f" elements ({name!r}, which contributes most: {worst:.3g}), so D will change by {change:.1%} in the {interval}"
            f" steps between refreshes ({plan.tolerance:.1%} allowed)",
            seen=f"rho {rho:.3g}",
        )

    def _judge_frozen(self, history: Sequence[Observation], plan: Plan) -> Verdict:
        verdict = Verdict(freeze=False, reason="nothing was seen")
        for position in range(len(history) - 1, len(history) - 1 - self.patience, -1):
            until = history[: max(0, position + 1)]
            if not until or until[0].step > until[-1].step - 2 * plan.window + plan.every:
                return Verdict(freeze=False, reason=f"only {history[-1].step} steps have been seen")
            passed = self._judge_window([o for o in until if o.step > until[-1].step - 2 * plan.window], plan)
            if not passed.freeze:
                return passed
            if position == len(history) - 1:
                verdict = passed
        return verdict

    def _judge_window(self, past: Sequence[Observation], plan: Plan) -> Verdict:
        """The verdict by two windows, of which the second ends with the last observation."""
        now, now_rate = past[-1].step, past[-1].learning_rate
        before = [o for o in past if o.step <= now - plan.window]
        window = [o for o in past if o.step > now - plan.window]
        if len(past) > 1 and now_rate > past[-2].learning_rate:
            return Verdict(freeze=False, reason=f"the learning rate was still rising at step {now}")
        deviation, noise = mean_deviation(window, plan.beta2)
        earlier, noise_before = mean_deviation(before, plan.beta2)
        tensors = {name: tensor_ratio(window, name, plan.beta2) for name in window[-1].ratios}
        off = {
            name: abs(math.log(max(rho, 1e-30))) - 2.0 * noise / max(rho, 1e-30) for name, (rho, noise) in tensors.items()
        }
        name = max(off, key=lambda name: off[name], default="")
        rho, noise_of_tensor = tensors.get(name, (1.0, 0.0))
        change = math.expm1(deviation / 2.0)
        text = (
            f"in steps {window[0].step} to {now}, (g / D)^2 was off by a factor of {math.exp(deviation):.3g} in the mean"
            f" over all elements (before, {math.exp(earlier):.3g}; farthest: {name!r}, {rho:.3g} +- {noise_of_tensor:.2g}),"
            f" so D by {change:.1%} ({plan.tolerance:.1%} allowed)"
        )
        seen = f"D off {change:.0%}"
        if not change <= plan.tolerance:
            return Verdict(freeze=False, reason=text, seen=seen)
        if not off.get(name, 0.0) <= math.log(LARGEST_FACTOR):
            too_far = f"{name!r} is off by more than a factor of {LARGEST_FACTOR:g}: {text}"
            return Verdict(freeze=False, reason=too_far, seen=seen)
        if deviation > earlier + math.hypot(noise, noise_before):
            return Verdict(freeze=False, reason=f"the second moment moves: {text}", seen=seen)
        return Verdict(freeze=True, reason=text, seen=seen)


def _check_count(name: str, value: Any, of_what: str) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``value`` is a whole number >= 1."""
    text = f"Invalid {name}: {value!r}. Must be an integer >= 1{of_what}."
    if not is_number(value):
        raise TypeError(text)
    if 0 < value < 1:
        raise ValueError(f"{text} A fraction of the run is none. HINT: multiply it by the number of steps.")
    if not is_whole(value) or value < 1:
        raise ValueError(text)


def share_of_new(new_steps: int, steps: int, beta2: float) -> float:
    """How much of v_hat after ``steps + new_steps`` steps comes from the ``new_steps`` last gradients."""
    return (1.0 - beta2**new_steps) / (1.0 - beta2 ** (steps + new_steps))


def effective_samples(steps: int, beta2: float) -> float:
    """How many equally weighted gradients scatter as much as the v of ``steps``: 1 / sum of the squared weights."""
    decayed = beta2**steps
    return (1.0 - decayed) * (1.0 + beta2) / ((1.0 - beta2) * (1.0 + decayed))


def mean_ratio(ratios: Iterable[Ratio]) -> float:
    """rho over all elements; NaN if there are none."""
    ratios = list(ratios)
    numel = sum(ratio.numel for ratio in ratios)
    return sum(ratio.numel * ratio.mean for ratio in ratios) / numel if numel else math.nan


def tensor_ratio(window: Sequence[Observation], name: str, beta2: float) -> tuple[float, float]:
    """rho of one tensor in the mean over a window, and its noise (one standard deviation).

    The noise has three parts: the scatter of rho from step to step; that of ``numel`` squared Gaussian gradients, for a
    window too short to show it; and that of the v behind them, an average of so many effective samples.
    """
    ratios = [o.ratios[name] for o in window if name in o.ratios]
    last, n = ratios[-1], len(ratios)
    sampling = 2.0 / last.numel * (1.0 / n + 1.0 / effective_samples(last.steps, beta2))
    return statistics.fmean(r.mean for r in ratios), math.hypot(_noise([r.mean for r in ratios]), math.sqrt(sampling))


def mean_deviation(window: Sequence[Observation], beta2: float) -> tuple[float, float]:
    """The mean over all elements of |log rho_T|, rho_T over the window, and its noise."""
    if not window:
        return math.inf, 0.0
    weighted, noises, total = 0.0, [], 0
    for name, last in window[-1].ratios.items():
        rho, noise = tensor_ratio(window, name, beta2)
        weighted += last.numel * abs(math.log(max(rho, 1e-30)))
        noises.append(last.numel * noise / max(rho, 1e-30))
        total += last.numel
    # Tensors share the batch, so their noises may add up.
    return (weighted / total, sum(noises) / total) if total else (0.0, 0.0)


def _farthest(window: Sequence[Observation]) -> tuple[float, str]:
    """rho over the window, and the name, of the tensor that contributes most to a mean other than 1."""
    means: dict[str, float] = {}
    for name in window[-1].ratios:
        means[name] = statistics.fmean(o.ratios[name].mean for o in window if name in o.ratios)
    numels = {name: ratio.numel for name, ratio in window[-1].ratios.items()}
    name = max(means, key=lambda name: numels[name] * abs(means[name] - 1.0), default="")
    return means.get(name, 1.0), name


def _noise(values: Sequence[float]) -> float:
    """Standard error of the mean, 0 for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
