"""Elements of an optimizer's parameters by their place among all of them: errors that fit any buckets, chunks and ranks."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
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


def merged(ranges: Iterable[ElementRange]) -> list[ElementRange]:
    """Neighbours, where one ends at which the next begins, made one. On the CPU, so that a GPU needs no memory for them;
    those of a CPU without a neighbour stay as they are."""
    found: list[tuple[int, list[Tensor]]] = []
    stop = -1
    for each in ranges:
        if each.start == stop:
            found[-1][1].append(each.values.cpu())
        else:
            found.append((each.start, [each.values.cpu()]))
        stop = each.stop
    return [ElementRange(start, values[0] if len(values) == 1 else torch.cat(values)) for start, values in found]


class WaitingErrors:
    """What error feedback held of an optimizer when its compressed phase ended: displacements owed, kept for the next one.

    By parameter, so that it does not matter which others come or go meanwhile. Each rank has its own worker errors, and the
    server errors of what it served: 4 + 4 / n bytes per parameter, in update space or in momentum space, as they were.

    Args:
        places: of each parameter's first element, for the ranges (see :func:`first_places`).
        worker: this rank's worker errors; moved to their parameter's device, and not copied if they are there.
        server: its server errors, likewise.
    """

    def __init__(
        self, places: Mapping[Tensor, int], worker: Sequence[ElementRange] = (), server: Sequence[ElementRange] = ()
    ) -> None:
        self._worker, self._server = _by_parameter(places, worker), _by_parameter(places, server)

    def ranges(self, optimizer: Optimizer) -> tuple[list[ElementRange], list[ElementRange]]:
        """Worker and server errors where the optimizer's parameters lie now; of those that it no longer has, none."""
        places = sorted(first_places(optimizer).items(), key=lambda each: each[1])
        worker, server = (
            merged(ElementRange(place + e.start, e.values) for p, place in places for e in errors.get(p, ()))
            for errors in (self._worker, self._server)
        )
        return worker, server

    def lost(self, kept: Collection[Tensor]) -> list[Tensor]:
        """Parameters of which something waits on this rank, but for ``kept``."""
        both = dict.fromkeys([*self._worker, *self._server])
        errors = {p: [*self._worker.get(p, ()), *self._server.get(p, ())] for p in both if p not in kept}
        return [p for p, ranges in errors.items() if any(bool(each.values.any()) for each in ranges)]

    @property
    def nbytes(self) -> int:
        """Bytes that this rank keeps."""
        return sum(e.values.nbytes for errors in (self._worker, self._server) for each in errors.values() for e in each)


def _by_parameter(places: Mapping[Tensor, int], ranges: Sequence[ElementRange]) -> dict[Tensor, list[ElementRange]]:
    """``ranges`` cut where parameters begin; counted from there."""
    order = sorted(places.items(), key=lambda each: each[1])
    starts = [place for _, place in order]
    found = defaultdict(list)
    for each in sorted(ranges, key=lambda each: each.start):
        for p, place in order[max(0, bisect_right(starts, each.start) - 1) : bisect_right(starts, each.stop - 1)]:
            start, stop = max(each.start, place), min(each.stop, place + p.numel())
            if start < stop:
                values = each.values[start - each.start : stop - each.start].to(p.device)
                found[p].append(ElementRange(start - place, values))
    return dict(found)
