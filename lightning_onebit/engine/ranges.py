"""Elements of an optimizer's parameters by their place among all of them: errors that fit any buckets, chunks and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.methods import parameters_of


def first_places(optimizer: Optimizer) -> dict[Tensor, int]:
    """Place of each parameter's first element where all are laid end to end: last parameter first, as they travel."""
    places, place = {}, 0
    for p in reversed(parameters_of(optimizer)):
        places[p] = place
        place += p.numel()
    return places


class ElementRange(NamedTuple):
    """Neighbouring elements, where all parameters of an optimizer are laid end to end (see :func:`first_places`)."""

    start: int
    values: Tensor
    """``[numel]``"""

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()


def add_ranges_(targets: Sequence[ElementRange], sources: Sequence[ElementRange]) -> None:
    """Add ``sources`` to ``targets``, in place, where both have elements; in the targets' dtype."""
    ordered = sorted(sources, key=lambda each: each.start)
    first = 0
    for target in sorted(targets, key=lambda each: each.start):
        while first < len(ordered) and ordered[first].stop <= target.start:
            first += 1
        for source in ordered[first:]:
            if source.start >= target.stop:
                break
            start, stop = max(target.start, source.start), min(target.stop, source.stop)
            if start < stop:
                own = target.values[start - target.start : stop - target.start]
                own.add_(source.values[start - source.start : stop - source.start].to(own))
