"""Gradients into errors, errors onto the wire, averages into parameters: one bucket after the other."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from lightning_onebit.comm.exchanger import AnyLane, Ticket
from lightning_onebit.comm.groups import ExchangeGroups
from lightning_onebit.comm.hierarchical import NodeAverage
from lightning_onebit.engine.flat import all_finite, flat_gradient, flat_view
from lightning_onebit.engine.frozen import FrozenParameters, Piece
from lightning_onebit.engine.momentum import LocalMomentum
from lightning_onebit.quantize.reference import pack_bits, unpack_bits


class _Operand(NamedTuple):
    """What a step reads and writes of one parameter: flat tensors ``[numel]``, and its numbers."""

    coefficients: Any
    """``None`` if the parameter sits out."""
    param: Tensor
    grad: Tensor | None
    variance: Tensor


class Pipeline(FrozenParameters):
    """Frozen parameters, stepped bucket by bucket.

    A step takes one of two ways, with the same result. **Deferred**: :meth:`step` alone, when all gradients are known to
    be finite. **Overlapped**: :meth:`anticipate_` for every bucket in turn, as soon as its gradients are there, and then
    :meth:`step`, or :meth:`take_back` if a gradient is infinite or NaN on some rank: until then nothing has changed
    but messages.

    Args:
        groups: as :class:`~lightning_onebit.engine.frozen.FrozenParameters`, also for those not named here.
        lane: where exchanges are carried out.
        overlap: whether buckets are anticipated.
        dtype: likewise.
        device: likewise.
        **frozen: likewise.
    """

    def __init__(
        self,
        *,
        groups: ExchangeGroups,
        lane: AnyLane,
        overlap: bool,
        dtype: torch.dtype,
        device: torch.device,
        **frozen: Any,
    ) -> None:
        super().__init__(groups=groups, revocable=overlap, dtype=dtype, device=device, **frozen)
        self._lane = lane
        self._node_average: NodeAverage | None = None
        self._shard_gradients: list[Tensor] = []
        if not groups.topology.is_flat:
            self._node_average = NodeAverage([bucket.layout for bucket in self._buckets], groups, dtype=dtype, device=device)
            # Overlapped, they are needed once more when the step is settled; deferred, only until the bucket is encoded.
            shards = [bucket.buffers.worker_error.numel() for bucket in self._buckets]
            memory = torch.empty(sum(shards) if overlap else max(shards, default=0), dtype=dtype, device=device)
            self._shard_gradients = list(memory.split(shards)) if overlap else [memory[:numel] for numel in shards]
        self._tickets: list[Ticket] = []
        self._all_finite = True

    @property
    def bucket_parameters(self) -> list[set[Tensor]]:
        """For each bucket, the parameters of which it holds elements."""
        return [{self.parameters[piece.parameter] for piece in pieces} for pieces in self._pieces]

    @property
    def all_finite(self) -> bool:
        """Whether the gradients of all buckets anticipated so far are finite, on this rank."""
        return self._all_finite

    def anticipate_(self) -> None:
        """Send the next bucket before it is known whether the step will count: errors stay as they are."""
        index = len(self._tickets)
        operands = self._operands({piece.parameter for piece in self._pieces[index]})
        self._average_(index, operands)
        if all_finite([gradient for gradient in self._gradients(index, operands) if gradient is not None]):
            self._encode_(index, operands, keep=False)
        else:
            self._all_finite = False  # all ranks will learn it, and disregard whatever the message holds
        self._tickets.append(self._lane.submit(partial(self._buckets[index].exchange_, keep=False)))

    def take_back(self) -> None:
        """The step does not count: forget what was anticipated, once it has arrived."""
        tickets, self._tickets, self._all_finite = self._tickets, [], True
        for ticket in tickets:
            self._wait(ticket)

    def step(self, active: Sequence[bool]) -> None:
        """Steps 1 to 6 of the algorithm; parameters that are not ``active`` sit out."""
        for p, is_active in zip(self.parameters, active, strict=True):
            if is_active:
                self._method.count_step_(p)
        operands = self._operands(range(len(self.parameters)), active)
        if self._tickets:
            assert len(self._tickets) == len(self._buckets)
            tickets, self._tickets, self._all_finite = self._tickets, [], True
            for index, ticket in enumerate(tickets):
                self._wait(ticket)
                self._settle_(index, operands)
                self._finish_(index, operands)
            return

        # Bucket k is encoded, and bucket j < k applied, while the lane exchanges those in between.
        tickets, finished = [], 0
        for index, bucket in enumerate(self._buckets):
            self._average_(index, operands)
            self._encode_(index, operands, keep=True)
            if not self._quantized:
                self._finish_(index, operands)
                continue
            tickets.append(self._lane.submit(partial(bucket.exchange_, self._sitting_out(index, operands))))
            while finished < len(tickets) and tickets[finished].done():
                self._wait(tickets[finished])
                self._finish_(finished, operands)
                finished += 1
        for index in range(finished, len(tickets)):
            self._wait(tickets[index])
            self._finish_(index, operands)

    def _operands(self, parameters: Iterable[int], active: Sequence[bool] | None = None) -> dict[int, _Operand]:
        operands = {}
        for index in parameters:
            p = self.parameters[index]
            sits_out = active is not None and not active[index]
            operands[index] = _Operand(
                coefficients=None if sits_out else self._method.coefficients(p, self._group(p)),
                param=flat_view(p),
                grad=flat_gradient(p),
                variance=self._variance(p),
            )
        return operands

    def _sitting_out(self, index: int, operands: Mapping[int, _Operand]) -> set[int]:
        return {piece.index for piece in self._pieces[index] if operands[piece.parameter].coefficients is None}

    def _average_(self, index: int, operands: Mapping[int, _Operand]) -> None:
        """Before step 1, where nodes have several devices: the mean gradient of this node, for this rank's shard."""
        if self._node_average is not None:
            with record_function("onebit::node_average"):
                grads = {parameter: operand.grad for parameter, operand in operands.items()}
                self._node_average.average_(self._shard_gradients[index], self._buckets[index].layout, grads)

    def _gradients(self, index: int, operands: Mapping[int, _Operand]) -> list[Tensor | None]:
        """By piece, the gradient that this rank has to quantize; ``None`` for zero."""
        gradients = []
        for piece in self._pieces[index]:
            grad = operands[piece.parameter].grad
            if self._node_average is None:
                gradients.append(None if grad is None else piece.of(grad))
            elif piece.error is None:
                gradients.append(None)
            else:
                gradients.append(self._shard_gradients[index][piece.shard_offset :][: piece.numel])
        return gradients

    def _encode_(self, index: int, operands: Mapping[int, _Operand], *, keep: bool) -> None:
        """Steps 1 and 2: add the local momentum to the error and quantize it; errors change only if ``keep``."""
        bucket = self._buckets[index]
        with record_function("onebit::encode"):
            for piece, error, momentum in self._momenta(index, operands, keep=keep):
                if self._quantized:
                    out = error if keep else self._scratch[: piece.numel]
                    self._codec.encode_momentum_(out, error, bucket.result(piece.index), momentum, bucket.sent(piece.index))
                else:
                    momentum.add_gradient_(error.mul_(momentum.decay), self._scratch[: piece.numel])

    def _settle_(self, index: int, operands: Mapping[int, _Operand]) -> None:
        """What was left open when the bucket was sent: the errors, of worker and server."""
        bucket = self._buckets[index]
        with record_function("onebit::settle"):
            for piece, error, momentum in self._momenta(index, operands, keep=True):
                self._codec.settle_momentum_(error, bucket.result(piece.index), momentum, bucket.sent(piece.index))
            bucket.settle_server_(self._codec, self._sitting_out(index, operands))

    def _momenta(
        self, index: int, operands: Mapping[int, _Operand], *, keep: bool
    ) -> Iterator[tuple[Piece, Tensor, LocalMomentum]]:
        """The pieces of this rank's shard that do not sit out, each with its error and what is to be added to that."""
        for piece, gradient in zip(self._pieces[index], self._gradients(index, operands), strict=True):
            c, param, _, variance = operands[piece.parameter]
            if piece.error is not None and c is not None:
                momentum = self._method.local_momentum(gradient, piece.of(param), piece.of(variance), c, keep=keep)
                yield piece, piece.error, momentum

    def _wait(self, ticket: Ticket) -> None:
        start = time.perf_counter()
        with record_function("onebit::wait"):
            ticket.wait()
        self._communicator.counters.seconds_waited += time.perf_counter() - start

    def _finish_(self, index: int, operands: Mapping[int, _Operand]) -> None:
        """Step 6, and what the new average means for the next step."""
        bucket = self._buckets[index]
        if self._quantized:
            bucket.accept_(self._sitting_out(index, operands))
        with record_function("onebit::apply"):
            for piece in self._pieces[index]:
                c, param, _, variance = operands[piece.parameter]
                if c is None:
                    continue
                param, variance = piece.of(param), piece.of(variance)
                factor = self._method.direction_factor(c)
                self._method.decay_(param, c)
                if self._quantized and self._method.only_adds and param.dtype == self._dtype:
                    self._codec.add_decoded_(param, bucket.result(piece.index), factor)
                else:
                    self._method.apply_(param, self._direction(piece, factor), variance, c)
                self._wake_(piece, variance)

    def _wake_(self, piece: Piece, variance: Tensor) -> None:
        """Let coordinates live from the next step on whose wake-up call, from whichever rank, came with the average."""
        live = piece.bucket.live[piece.index]
        if live is None:
            return
        if self._quantized:
            calls = piece.bucket.result(piece.index).signs
        else:
            assert piece.error is not None
            calls = pack_bits(piece.error != 0)
        woken_bits = calls & ~live
        if woken_bits.any():
            self._method.wake_(variance, unpack_bits(woken_bits, piece.numel))
            live = live | woken_bits
            piece.bucket.live[piece.index] = None if unpack_bits(live, piece.numel).all() else live
