"""What a compressed optimizer holds of a training, for checkpoints, another compressed phase, and other numbers of ranks.

Three kinds, told apart by who knows them: ``stock_state`` is what a stock optimizer would hold, ``shared_state`` what all
ranks know beside it, and each rank's own are ranges of elements: errors, and second moments where these go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.comm.groups import ExchangeGroups
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.engine.bucket_state import BucketState
from lightning_onebit.engine.parameter_set import ParameterSet
from lightning_onebit.engine.ranges import ElementRange, WaitingErrors
from lightning_onebit.flat import unflatten_like
from lightning_onebit.methods import parameters_of


class CompressedState:
    """Of all parameters of an optimizer, what :class:`~lightning_onebit.engine.bucket_state.BucketState` tells of buckets.

    Args:
        optimizer: whose state it was.
        sets: its parameters; late coordinates of theirs are replaced by :meth:`restore_`.
        communicator: the ranks that train together.
        groups: the same ranks, as they exchange.
    """

    def __init__(
        self, optimizer: Optimizer, sets: Sequence[ParameterSet], communicator: Communicator, groups: ExchangeGroups
    ) -> None:
        self._optimizer, self._sets, self._communicator, self._groups = optimizer, sets, communicator, groups
        self._states = [BucketState(each.buckets) for each in sets]

    def stock_state(
        self, saved: Mapping[Tensor, Mapping[str, Tensor]] | None = None, *, block_size: int = 0
    ) -> dict[Tensor, dict[str, Any]]:
        """By parameter, what a stock optimizer would hold now, on the CPU if the parameters are on a GPU.

        Args:
            saved: with D of this :meth:`shared_state`, whose blocks had ``block_size`` elements, instead of its own.
            block_size: see there.
        """
        stock = {}
        for each, state in zip(self._sets, self._states, strict=True):
            params, rms_of = each.buckets.params, None
            if saved is not None:
                rms_of = partial(state.saved_rms, {i: saved[p] for i, p in enumerate(params)}, block_size)
            stock.update({params[i]: entry for i, entry in state.stock_state(rms_of).items()})
        return stock

    def worker_errors(self) -> list[ElementRange]:
        """This rank's worker errors. With one rank, which has none: u."""
        return [each for state in self._states for each in state.worker_errors()]

    def server_errors(self) -> list[ElementRange]:
        """The server errors of what this rank serves."""
        return [each for state in self._states for each in state.server_errors()]

    def second_moments(self) -> list[ElementRange]:
        """v_i of this rank, where second moments go on."""
        return [each for state in self._states for each in state.second_moments()]

    def second_moment_residuals(self) -> list[ElementRange]:
        """What this rank's chunks have not passed on of v."""
        return [each for state in self._states for each in state.second_moment_residuals()]

    def collected(self) -> list[ElementRange]:
        """v_i of this rank as far as it is collected for a refresh that was asked for."""
        return [each for state in self._states for each in state.collected()]

    def add_collected_(self, collected: Sequence[ElementRange]) -> None:
        """Take over that of an earlier run. After :meth:`restore_`."""
        for state in self._states:
            state.add_collected_(collected)

    def collect_anew_(self) -> None:
        """If second moments are being collected, begin with zero again: not all ranks have what they had."""
        for each in self._sets:
            if each.buckets.is_collecting:
                each.buckets.collect_()

    def add_second_moments_(self, second_moments: Sequence[ElementRange], residuals: Sequence[ElementRange]) -> None:
        """Add those of an earlier run, in the same places. After :meth:`restore_`, which sets them to zero."""
        for state in self._states:
            state.add_second_moments_(second_moments, residuals)

    def complete_second_moments_(self) -> None:
        """After all of these were added: where none was told, v_i begins as v."""
        for state in self._states:
            state.complete_second_moments_()

    def late_second_moments(self) -> tuple[Tensor, Tensor]:
        """v_i of late coordinates: places as of a :class:`ElementRange`, int64, rising, and float64 copies, on the CPU."""
        found = [late.second_moments() for each in self._sets for late in each.late]
        places = torch.cat([torch.zeros(0, dtype=torch.int64), *(places for places, _ in found)])
        values = torch.cat([torch.zeros(0, dtype=torch.float64), *(values for _, values in found)])
        order = places.argsort()
        return places[order], values[order]

    def add_late_second_moments_(self, places: Tensor, values: Tensor) -> None:
        """Add those of an earlier run, where coordinates are late here. After :meth:`restore_`, which sets them to zero."""
        for each in self._sets:
            for late in each.late:
                late.add_second_moments_(places, values)

    def shared_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Per parameter, what all ranks know and a stock state dict does not tell exactly."""
        shared: dict[Tensor, dict[str, Tensor]] = {}
        for each, state in zip(self._sets, self._states, strict=True):
            for i, entry in state.shared_state().items():
                shared[each.buckets.params[i]] = entry
                if each.is_sketched or each.buckets.renews:
                    entry["gradient_statistics"] = each.statistics.statistics_of(i)
            late = [(i, entry) for late in each.late for i, entry in late.shared_state().items()]
            for i in {i for i, _ in late}:  # which may be in several buckets, the last elements first
                entries = [entry for j, entry in late if j == i]
                order = torch.cat([entry["late"] for entry in entries]).argsort()
                joined = {name: torch.cat([entry[name] for entry in entries])[order] for name in entries[0]}
                shared[each.buckets.params[i]].update(joined)
        return shared

    def restore_(self, shared: Mapping[Tensor, Mapping[str, Tensor]], *, block_size: int) -> None:
        """See :meth:`CompressedOptimizer.restore_`, by which it is called."""
        for each, state in zip(self._sets, self._states, strict=True):
            by_index = {i: shared[p] for i, p in enumerate(each.buckets.params)}
            state.restore_(by_index, block_size=block_size)
            if each.is_sketched or each.buckets.renews:
                each.statistics.restore_(by_index)
            each.late = each.find_late()
            for late in each.late:
                late.restore_(by_index)

    @torch.no_grad()
    def add_errors_(self, worker: Sequence[ElementRange], server: Sequence[ElementRange]) -> None:
        """Add errors of an earlier run to those that this rank has in the same places.

        A single rank, which has none, applies them at once.
        """
        for state in self._states:
            state.add_errors_(worker, server)

    def add_momentum_(self, momentum: Sequence[ElementRange]) -> None:
        """Take over :meth:`worker_errors` of a single rank, on a single rank."""
        for state in self._states:
            state.add_momentum_(momentum)

    def replicated_state(self) -> Iterator[tuple[Tensor, str, Iterable[Tensor]]]:
        """Parameter by parameter, tensors that must be the same on all ranks; to be read one by one before the next step."""
        for each, state in zip(self._sets, self._states, strict=True):
            yield from state.replicated_state()
            for late in each.late:
                for i, entry in late.shared_state().items():
                    yield each.buckets.params[i], "second moment", entry.values()

    def waiting_errors(self) -> WaitingErrors:
        """Both errors of this rank, for another compressed phase. A single rank has none."""
        places = {p: place for each in self._sets for p, place in zip(each.buckets.params, each.buckets.places, strict=True)}
        if self._communicator.world_size == 1:
            return WaitingErrors(places)
        return WaitingErrors(places, self.worker_errors(), self.server_errors())

    @torch.no_grad()
    def take_over_errors_(self, waiting: WaitingErrors) -> list[Tensor]:
        """Add the errors of an earlier compressed phase to those that this one begins with. Collective.

        Buckets and chunks may be others. A single rank, which has no errors, applies them at once.

        Returns:
            Parameters that are not compressed here, so that what this rank had of theirs is dropped.
        """
        worker, server = waiting.ranges(self._optimizer)
        for state in self._states:
            state.take_over_errors_(worker, server, self._communicator, self._groups)
        return waiting.lost({p for each in self._sets for p in each.buckets.params})

    @torch.no_grad()
    def outstanding(self) -> dict[Tensor, Tensor]:
        """Per parameter, what has not been applied yet: mean worker error plus server error. Collective.

        In the space that is communicated, float32 or float64, shape of the parameter, the same on all ranks. Zero where
        nothing was ever quantized (one rank).
        """
        return {
            each.buckets.params[i]: unflatten_like(error, each.buckets.params[i])
            for each, state in zip(self._sets, self._states, strict=True)
            for i, error in state.outstanding(self._communicator.all_reduce_mean_).items()
        }

    def give_back_(self) -> None:
        """Put into ``optimizer.state`` what a stock optimizer would hold now; the rest is in :meth:`waiting_errors`."""
        for state in self._states:
            state.give_back_()
        stock = self._optimizer.state
        for p in parameters_of(self._optimizer):  # in the order of a state dict that was never taken apart
            if p in stock:
                stock[p] = stock.pop(p)
