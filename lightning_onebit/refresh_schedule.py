"""When a frozen second moment is renewed: numbers of optimizer steps, for those who renew it and for those who judge it."""

from __future__ import annotations

from functools import cache

from lightning_onebit.config import VarianceRefresh

LONGEST_INTERVAL = 64
"""Steps between refreshes at last, by "auto": 1/8 bit per element and step."""
STEPS_PER_INTERVAL = 8
"""While v still moves fast, an old D is what is wrong with the updates, not v_i: on a small ViT they went 1.19 times as far
as Adam's with an interval of a fourth of the steps so far, 1.12 times with an eighth (docs/quality.md)."""
COLLECTING_STEPS = 16
"""Steps that a refresh is made of where it was asked for and no second moment goes on."""
SKETCH_STEPS = 16
"""Steps between estimates of how alike the ranks' gradients are, and of how well D fits them."""


def refresh_interval(every: VarianceRefresh, step: int) -> int:
    """Steps from a refresh at the end of optimizer step number ``step`` to the next: by "auto", max(1, min(64, step / 8)).

    Raises:
        ValueError: if there are no refreshes.
    """
    if every is None:
        raise ValueError("Invalid variance_refresh: None. Without refreshes there is no interval between them.")
    return max(1, min(LONGEST_INTERVAL, step // STEPS_PER_INTERVAL)) if every == "auto" else every


def longest_interval(every: VarianceRefresh) -> int:
    """Steps between refreshes late in a run."""
    return refresh_interval(every, STEPS_PER_INTERVAL * LONGEST_INTERVAL)


def is_refresh_due(step: int, every: VarianceRefresh) -> bool:
    """Whether D is renewed at the end of optimizer step number ``step``.

    With "auto", the first refresh is at step 1, and each is followed by the next after :func:`refresh_interval` steps:
    always the same ones, whenever the run has switched, so that there is nothing to remember.
    """
    if every is None:
        return False
    if every != "auto":
        return step % every == 0
    first = _first_refreshes()
    return step in first or (step > max(first) and (step - max(first)) % LONGEST_INTERVAL == 0)


@cache
def _first_refreshes() -> tuple[int, ...]:
    """By "auto", the steps of refreshes up to the first after which the interval is the longest."""
    due = [1]
    while (interval := refresh_interval("auto", due[-1])) < LONGEST_INTERVAL:
        due.append(due[-1] + interval)
    return tuple(due)
