"""Steps that are skipped because a gradient is infinite or NaN: said without flooding, and not for ever."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_onebit.consistency.agreement import NAMES_SHOWN, listed_ranks

Found: TypeAlias = Mapping[Tensor, Sequence[int]]
"""Parameters whose gradients are not finite, and on which ranks; on none in particular if they are averaged."""

LARGEST_SCALE_THAT_COUNTS = 1.0
"""A loss scaler finds its scale by skipping steps, and halves it with each. Where losses are not scaled up any more, a
gradient that is not finite is no overflow of float16 that a smaller scale could help against, as a rule: only then do
skipped steps count."""


def check_max_skipped_steps(value: int | None) -> int | None:
    """The limit, or ``None`` if there is to be none.

    Raises:
        ValueError: if it is not an integer >= 0 or ``None``.
    """
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(
            f"Invalid max_skipped_steps: {value!r}. Must be an integer >= 1, or None (or 0): steps may be skipped for ever."
        )
    return value or None


class SkippedSteps:
    """The skipped steps of one optimizer. All ranks skip together, so all count alike.

    Args:
        limit: how many consecutive ones end the run; ``None``: none do.
        optimizer: what to call the optimizer.
    """

    def __init__(self, limit: int | None, optimizer: str) -> None:
        self.total = 0
        self._limit = limit
        self._optimizer = optimizer
        self._streak = 0
        self._counted = 0
        self._streaks = 0
        self._announced = False

    def made(self) -> None:
        """A step was made: the streak is over."""
        if self._announced and self._streak > 1:
            rank_zero_info(f"Gradients are finite again: training goes on after {self._streak} skipped steps.")
        self._streak = self._counted = 0
        self._announced = False

    def skipped(self, find: Callable[[], Found], names: Mapping[Tensor, str], *, scale: float | None) -> None:
        """A step was skipped. Collective.

        Args:
            find: tells whose gradients they were; called on all ranks, or on none.
            names: parameter names for messages.
            scale: the loss scale from now on; ``None`` without a scaler.

        Raises:
            FloatingPointError: on all ranks, after ``limit`` consecutive ones.
        """
        self.total += 1
        self._streak += 1
        self._streaks += self._streak == 1
        self._counted += scale is None or scale <= LARGEST_SCALE_THAT_COUNTS
        if self._counted == self._limit:
            self._give_up(find(), names, scale)
        # A scaler skips all the time, and silently under DDP. Others speak up at streaks 1, 2, 4, 8, ...
        if scale is None and self._streak == 1 and self._streaks & (self._streaks - 1) == 0:
            self._announced = True
            before = f" (streak number {self._streaks})" if self._streaks > 1 else ""
            where = _listed(find(), names)
            rank_zero_warn(f"A gradient was infinite or NaN, so all ranks skip this step{before}{where}.")

    def _give_up(self, found: Found, names: Mapping[Tensor, str], scale: float | None) -> None:
        scaled = "" if scale is None else f", though the loss scale is down to {scale:g}"
        raise FloatingPointError(
            f"The last {self._streak} steps of {self._optimizer} were skipped by all ranks, because gradients were infinite"
            f" or NaN{scaled}{_listed(found, names)}. Parameters and state are as they were before the first of them. HINT:"
            " Trainer(detect_anomaly=True) finds where it begins; resume from an earlier checkpoint with a smaller learning"
            f" rate or with gradient clipping. max_skipped_steps={self._limit} steps in a row may be skipped; None: any"
            " number."
        )


def _listed(found: Found, names: Mapping[Tensor, str]) -> str:
    """The first few parameters, each with its ranks, after a colon."""
    if not found:
        return ""
    shown = [
        names.get(p, f"one of shape {tuple(p.shape)}") + (f" on {listed_ranks(ranks)}" if ranks else "")
        for p, ranks in list(found.items())[:NAMES_SHOWN]
    ]
    more = f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""
    return f": {', '.join(shown)}{more}"
