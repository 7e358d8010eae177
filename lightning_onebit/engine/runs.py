"""Elements of an optimizer's parameters by their place among all of them: errors that fit any buckets, chunks and shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.methods import parameters_of


def offsets(optimizer: Optimizer) -> dict[Tensor, int]:
    """Place of each parameter's first element where all are laid end to end: last parameter first, as they travel."""
    places, place = {}, 0
    for p in reversed(parameters_of(optimizer)):
        places[p] = place
        place += p.numel()
    return places


class Run(NamedTuple):
    """Neighbouring elements, where all parameters of an optimizer are laid end to end (see :func:`offsets`).

    So runs fit whatever buckets, chunks and shards they are cut into later.
    """

    start: int
    values: Tensor
    """``[numel]``"""

    def overlap(self, other: Run) -> tuple[Tensor, Tensor]:
        """The elements of both that have the same place."""
        start = max(self.start, other.start)
        stop = min(self.start + len(self.values), other.start + len(other.values))
        first, second = (run.values[max(0, start - run.start) : max(0, stop - run.start)] for run in (self, other))
        return (first, second) if start < stop else (first[:0], second[:0])


def add_runs_(targets: Sequence[Run], runs: Sequence[Run]) -> None:
    """Add ``runs`` to ``targets``, in place, where both have elements; in the targets' dtype."""
    for target in targets:
        for run in runs:
            own, other = target.overlap(run)
            if own.numel():
                own.add_(other.to(own))
