"""After the switch: whether the second moment still fits the gradients, and when that is worth a warning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lightning_onebit.refresh_schedule import SKETCH_STEPS

LARGEST_RATIO = 4.0
"""A rho beyond it, or below its inverse, is drift: gradients twice, or half, as large as D says. Seen: docs/faults.md."""
ESTIMATES_IN_A_ROW = 4
"""Estimates, one each 16 steps, in which a tensor must be beyond."""
SMALLEST_SHARE = 0.01
"""Of the elements, or of the squared update: tensors with less in both are not looked at."""
LARGEST_CLAMPED_SHARE = 0.02
"""Of the elements of a tensor."""
LARGEST_ERROR_OVER_UPDATE = 10.0
"""Norm of a rank's worker error over that of the update, where it is logged."""
SPOKEN_OF_AGAIN = 2.0
"""There is another warning where drift is so many times that of the last one."""


class Drift(NamedTuple):
    """How well D fits the gradients of one tensor. The same on all ranks."""

    ratio: float
    """rho: mean square, per element, of the mean gradient over D; 1 where D fits. Average of the last estimates: 4, or
    1 / (64 (1 - beta2)) if that is more."""
    clamped: float
    """Share of elements at which a rank's g / D was clamped: averaged over the ranks, and as rho."""
    share: float
    """Of the tensor in all of its optimizer's: of the elements, or of the squared update, whichever is more."""
    last_ratio: float
    """rho by the last estimate alone. NaN after a checkpoint was loaded, until the next one."""
    estimates: int
    """How many there were so far."""

    @property
    def is_considered(self) -> bool:
        """Whether the tensor matters, and anything is known of it."""
        return self.estimates > 0 and self.share >= SMALLEST_SHARE


class DriftWatch:
    """Says when drift is worth a warning: floats in, sentences out."""

    def __init__(self) -> None:
        self._last_step = 0
        self._seen: dict[str, int] = {}
        self._beyond: dict[str, tuple[int, int, bool]] = {}
        """Tensors beyond the bound: in how many estimates in a row, since which step, and whether above."""
        self._first: dict[str, float] = {}
        self._spoken_of = self._spoken_of_clamped = 0.0

    def is_due(self, step: int) -> bool:
        """Whether there may be a new estimate after optimizer step number ``step``. To be asked after every step."""
        before, self._last_step = self._last_step, step
        return step // SKETCH_STEPS != before // SKETCH_STEPS

    def observe(self, step: int, drifts: Mapping[str, Drift], *, is_frozen: bool) -> list[str]:
        """Take in estimates; return what to warn of, mostly nothing.

        A tensor is beyond the bound if both its last rho and the average are, on the same side: so neither one odd batch
        counts, nor the noise of a small tensor. Below, also in comparison to the first rho after the switch: where eps is
        most of D, rho is small from the beginning.

        Args:
            step: number of the last optimizer step.
            drifts: by name.
            is_frozen: whether D is never renewed. Otherwise only clamped elements are warned of.
        """
        for name, drift in drifts.items():
            if drift.estimates == self._seen.get(name, 0):
                continue
            self._seen[name] = drift.estimates
            first = min(1.0, self._first.setdefault(name, drift.ratio))
            above = min(drift.ratio, drift.last_ratio) > LARGEST_RATIO
            below = max(drift.ratio, drift.last_ratio) < first / LARGEST_RATIO
            in_a_row, since, was_above = self._beyond.get(name, (0, step, above))
            if above or below:
                self._beyond[name] = (in_a_row + 1, since, above) if above == was_above else (1, step, above)
            else:
                self._beyond.pop(name, None)
        warnings = [self._of_ratio(drifts) if is_frozen else "", self._of_clamped(drifts, is_frozen=is_frozen)]
        return [warning for warning in warnings if warning]

    def _of_ratio(self, drifts: Mapping[str, Drift]) -> str:
        far = {
            name: max(drift.ratio, 1.0 / max(drift.ratio, 1e-30))
            for name, drift in drifts.items()
            if drift.is_considered and self._beyond.get(name, (0,))[0] >= ESTIMATES_IN_A_ROW
        }
        if not far or max(far.values()) < SPOKEN_OF_AGAIN * self._spoken_of:
            return ""
        name = max(far, key=lambda name: (far[name], name))
        self._spoken_of = far[name]
        drift, (_, since, above) = drifts[name], self._beyond[name]
        others = f" ({len(far) - 1} more tensors likewise)" if len(far) > 1 else ""
        return (
            f"the second moment is frozen, and gradients no longer fit it. Those of {name!r}{others} are"
            f" {drift.ratio**0.5:.2g} times as large as it says: the mean of (gradient / D)^2 is {drift.ratio:.3g} instead"
            f" of 1, and beyond {'4' if above else '1/4'} at all estimates since step {since}. So its steps are"
            f" {'larger' if above else 'smaller'} than Adam's by that factor. HINT: strategy.refresh_variance()"
            " renews the second moment once, in update space; variance_refresh='auto' does so now and then, and a checkpoint"
            " of this run can be resumed with it."
        )

    def _of_clamped(self, drifts: Mapping[str, Drift], *, is_frozen: bool) -> str:
        clamped = {
            name: drift.clamped
            for name, drift in drifts.items()
            if drift.is_considered and drift.estimates >= ESTIMATES_IN_A_ROW and drift.clamped > LARGEST_CLAMPED_SHARE
        }
        if not clamped or max(clamped.values()) < SPOKEN_OF_AGAIN * self._spoken_of_clamped:
            return ""
        name = max(clamped, key=lambda name: (clamped[name], name))
        self._spoken_of_clamped = clamped[name]
        hint = "variance_refresh='auto' renews the second moment" if is_frozen else "clip gradients, or warm up for longer"
        return (
            f"{clamped[name]:.2g} of the elements of {name!r} have gradients so far beyond the second moment that they are"
            f" clamped, on average over the ranks (more than {LARGEST_CLAMPED_SHARE:g} is unusual): there, steps are smaller"
            f" than gradients ask for. HINT: {hint}."
        )


def extremes(drifts: Mapping[str, Drift]) -> dict[str, float]:
    """Of tensors that matter, the largest and smallest rho, and the largest clamped share; empty if there are none."""
    considered = [drift for drift in drifts.values() if drift.is_considered]
    if not considered:
        return {}
    return {
        "drift_max": max(drift.ratio for drift in considered),
        "drift_min": min(drift.ratio for drift in considered),
        "clamped_share": max(drift.clamped for drift in considered),
    }
