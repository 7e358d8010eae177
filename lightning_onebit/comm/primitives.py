"""The only callers of torch.distributed collectives. Each one counts the bytes that it sends and the time it takes.

Differences between torch versions are settled here and nowhere else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_onebit.comm.stats import PhaseCounters, ring_all_reduce_nbytes
from lightning_onebit.comm.watch import watched

# Renamed in torch 2.13.
_all_gather_single = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor

_COUNTING = threading.Lock()
"""Held where counters change: the training thread and that of the exchanges have the same ones."""


class Communicator:
    """Collectives of one process group. Every rank must make the same calls in the same order.

    Without an initialized process group, or with one rank, each collective is the copy it amounts to.

    Args:
        group: the process group; ``None`` for the default one.
        waits: whether the calling thread has nothing else to do meanwhile, so that the time counts as waited.
        within_node: whether all members are on one node, so that bytes do not count as sent to the network.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, waits: bool = True, within_node: bool = False) -> None:
        self.group = group
        self.waits = waits
        self.within_node = within_node
        initialized = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = 0, 1
        if isinstance(group, dist.ProcessGroup):
            self.rank, self.world_size = group.rank(), group.size()
        elif initialized:
            self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("This process does not belong to the process group. HINT: call on member ranks only.")
        self.counters = PhaseCounters()

    def all_to_all_(
        self,
        received: Tensor,
        sent: Tensor,
        *,
        received_numels: list[int] | None = None,
        sent_numels: list[int] | None = None,
    ) -> None:
        """Part r of ``sent`` goes to rank r; part r of ``received`` comes from rank r.

        Args:
            received: overwritten.
            sent: only read.
            received_numels: elements of each part, if they are not all the same.
            sent_numels: likewise.
        """
        if self.world_size == 1:
            received.copy_(sent)
            return
        kept = sent_numels[self.rank] if sent_numels is not None else sent.numel() // self.world_size
        with self._counting("all_to_all", (sent.numel() - kept) * sent.element_size()):
            call = partial(dist.all_to_all_single, received, sent, received_numels, sent_numels, group=self.group)
            self._carry_out("all_to_all", sent, call)

    def all_gather_(self, gathered: Tensor, part: Tensor) -> None:
        """Part r of ``gathered [world_size * k]`` becomes ``part [k]`` of rank r."""
        if self.world_size == 1:
            gathered.copy_(part)
            return
        with self._counting("all_gather", part.nbytes * (self.world_size - 1)):
            self._carry_out("all_gather", part, partial(_all_gather_single, gathered, part, group=self.group))

    def all_reduce_max_(self, tensor: Tensor) -> None:
        """Elementwise maximum over the ranks, in place."""
        self._all_reduce_(tensor, dist.ReduceOp.MAX)

    def all_reduce_sum_(self, tensor: Tensor) -> None:
        """Elementwise sum over the ranks, in place. Of integers: exact."""
        self._all_reduce_(tensor, dist.ReduceOp.SUM)

    def all_reduce_mean_(self, tensor: Tensor, *, dtype: torch.dtype | None = None) -> None:
        """Elementwise mean over the ranks, in place; bitwise what DDP computes (it scales first, then sums).

        Args:
            tensor: overwritten.
            dtype: what the numbers travel and are summed as; ``None``: as they are.
        """
        if self.world_size == 1:
            return
        message = tensor.mul_(1.0 / self.world_size).to(dtype or tensor.dtype)
        self._all_reduce_(message, dist.ReduceOp.SUM)
        if message is not tensor:
            tensor.copy_(message)

    def ordered_mean(self, values: Tensor, add: Callable[[Tensor, Tensor], None] | None = None) -> Tensor:
        """Elementwise mean over the ranks, ``[numel]``, a new tensor: the same bits wherever an element lies in ``values``.

        A library's sum depends on the place in the message. Here every rank adds up its part in the order of the ranks.

        Args:
            values: ``[numel]``.
            add: ``add(out, parts)`` with ``out = sum_r parts[r]``, in the order of r, in one launch. torch takes one
                for each rank.
        """
        n, numel = self.world_size, values.numel()
        if n == 1 or not numel:
            return values.clone()
        size = -(-numel // n)
        sent = values.new_zeros(n * size)
        sent[:numel] = values
        received = torch.empty_like(sent)
        self.all_to_all_(received, sent.mul_(1.0 / n))
        total, parts = values.new_empty(size), received.view(n, size)
        if add is not None:
            add(total, parts)
        else:
            total.copy_(parts[0])
            for part in parts[1:]:
                total.add_(part)
        gathered = torch.empty_like(sent)
        self.all_gather_(gathered, total)
        return gathered[:numel]

    def all_reduce_mean_future(self, tensor: Tensor, *, dtype: torch.dtype | None = None) -> torch.futures.Future[Tensor]:
        """:meth:`all_reduce_mean_`, not waited for; the future holds ``tensor``."""
        if self.world_size == 1:
            return completed_future(tensor)
        message = tensor.mul_(1.0 / self.world_size).to(dtype or tensor.dtype)
        sent = ring_all_reduce_nbytes(message.nbytes, self.world_size)
        self._count(sent, seconds=0.0)
        work = dist.all_reduce(message, group=self.group, async_op=True)
        assert work is not None

        def result(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            with _named("all_reduce", sent):
                received = future.value()[0]
            return received if message is tensor else tensor.copy_(received)

        return work.get_future().then(result)

    def broadcast_int(self, value: int, *, source: int = 0, device: torch.device) -> int:
        """The ``value`` of rank ``source`` of the group, on all ranks."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=device)
        with self._counting("broadcast", tensor.nbytes if self.rank == source else 0):
            self._carry_out("broadcast", tensor, partial(dist.broadcast, tensor, group=self.group, group_src=source))
        return int(tensor)

    def _all_reduce_(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        if self.world_size == 1:
            return
        with self._counting("all_reduce", ring_all_reduce_nbytes(tensor.nbytes, self.world_size)):
            self._carry_out("all_reduce", tensor, partial(dist.all_reduce, tensor, operation, group=self.group))

    def _carry_out(self, collective: str, tensor: Tensor, call: Callable[..., Any]) -> None:
        """On the default group, have it watched whether all ranks come to the same collectives."""
        if self.group is None and self.waits:
            watched(collective, tensor, call)
        else:
            call()

    @contextmanager
    def _counting(self, collective: str, nbytes: int) -> Iterator[None]:
        start = time.perf_counter()
        with _named(collective, nbytes):
            yield
        self._count(nbytes, time.perf_counter() - start)

    def _count(self, nbytes: int, seconds: float) -> None:
        with _COUNTING:
            self.counters.collectives += 1
            # Every collective used here is symmetric: a rank receives as much as it sends.
            if self.within_node:
                self.counters.bytes_within_node += nbytes
            else:
                self.counters.bytes_sent += nbytes
                self.counters.bytes_received += nbytes
            if self.waits:
                self.counters.seconds_waited += seconds
                self.counters.seconds_exchanging += seconds


@contextmanager
def _named(collective: str, nbytes: int) -> Iterator[None]:
    """Have a failure say of which collective it is; libraries name a line of their sources."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{collective}, of which this rank sends {nbytes} bytes: {error}") from error


def new_group(timeout: timedelta | None, ranks: list[int]) -> dist.ProcessGroup:
    """A process group of ``ranks`` with the backend of the default one. Collective over all ranks, members or not."""
    return dist.new_group(ranks, timeout=timeout)


def destroy_group(group: dist.ProcessGroup | None) -> None:
    """End a process group, unless the default one, and so all others, has ended before."""
    if group is not None and dist.is_initialized():
        dist.destroy_process_group(group)


def completed_future(tensor: Tensor) -> torch.futures.Future[Tensor]:
    """A future that already holds ``tensor``."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(tensor)
    return future
