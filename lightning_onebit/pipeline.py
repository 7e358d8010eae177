"""Gradients into errors, errors onto the wire, averages into parameters: one bucket after the other."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function

from lightning_onebit.codec import make_codec, segment_numel
from lightning_onebit.codec.layout import plan_buckets
from lightning_onebit.codec.reference import pack_bits, unpack_bits
from lightning_onebit.comm.allreduce import CompressedBucket
from lightning_onebit.comm.groups import ExchangeGroups
from lightning_onebit.comm.hierarchical import NodeAverage
from lightning_onebit.comm.lane import AnyLane, Ticket
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.config import CompressionConfig
from lightning_onebit.flat import all_finite, flat_gradient, flat_view, unflatten_like
from lightning_onebit.momentum import LocalMomentum
from lightning_onebit.optim.method import CompressedMethod


@dataclass(frozen=True)
class _Piece:
    """One segment as a pipeline walks over it."""

    bucket: CompressedBucket
    index: int
    parameter: int
    start: int
    numel: int
    error: Tensor | None
    """The worker error; ``None`` if the segment belongs to another rank's shard."""
    shard_offset: int
    """Place in the shard, if it belongs to this one's."""

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.numel]


class _Operand(NamedTuple):
    """What a step reads and writes of one parameter: flat tensors ``[numel]``, and its numbers."""

    coefficients: Any
    """``None`` if the parameter sits out."""
    param: Tensor
    grad: Tensor | None
    variance: Tensor


class Pipeline:
    """The parameters of one dtype and device: frozen, cut into buckets, stepped bucket by bucket.

    A step takes one of two ways, with the same result. **Deferred**: :meth:`step` alone, when all gradients are known to
    be finite. **Overlapped**: :meth:`anticipate_` for every bucket in turn, as soon as its gradients are there, and then
    :meth:`step`, or :meth:`take_back` if a gradient is infinite or NaN on some rank: until then nothing has changed
    but messages.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        placed: Sequence[tuple[dict[str, Any], Tensor]],
        method_type: type[CompressedMethod[Any]],
        config: CompressionConfig,
        communicator: Communicator,
        groups: ExchangeGroups,
        lane: AnyLane,
        *,
        overlap: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.optimizer = optimizer
        self.parameters = [p for _, p in placed]
        self.device = device
        self._dtype = dtype
        self._communicator = communicator
        self._topology = groups.topology
        self._lane = lane
        self._quantized = communicator.world_size > 1
        if not self._quantized:  # the space of what is quantized decides nothing: take the one that is bounded
            config = replace(config, space="update")
        layouts = plan_buckets(
            [p.numel() for p in self.parameters],
            block_size=config.block_size,
            world_size=communicator.world_size,
            bucket_numel=config.bucket_numel(sum(p.numel() for p in self.parameters)),
            segment_numel=segment_numel(device),
        )
        longest = max((segment.numel for layout in layouts for segment in layout.segments), default=0)
        self._method = method_type(optimizer, config, segment_numel=longest, dtype=dtype, device=device)
        self._scratch = torch.empty(longest, dtype=dtype, device=device)
        self._group_of = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}

        # One for each thread: a codec owns its workspace.
        self._codec, server_codec = (make_codec(config, device=device, dtype=dtype) for _ in range(2))
        server_scratch = torch.empty(longest, dtype=dtype, device=device)
        for p in self.parameters:
            self._method.freeze_(p, self._group(p))
        self._buckets: list[CompressedBucket] = []
        self._pieces: list[list[_Piece]] = []
        for layout in layouts:
            # Bucket by bucket, as the momentum's memory is freed: no second copy of all of it.
            bucket = CompressedBucket(
                layout, groups, server_codec, server_scratch, revocable=overlap, dtype=dtype, device=device
            )
            pieces = _pieces(bucket)
            self._buckets.append(bucket)
            self._pieces.append(pieces)
            for piece in pieces:
                self._take_momentum(piece)
                p = self.parameters[piece.parameter]
                if piece.start + piece.numel == p.numel():
                    del optimizer.state[p]["exp_avg"]
        for p in self.parameters:
            optimizer.state[p].pop("exp_avg", None)  # of empty parameters, which have no segment

        self._node_average: NodeAverage | None = None
        self._shard_gradients: list[Tensor] = []
        if not self._topology.is_flat:
            self._node_average = NodeAverage(layouts, groups, dtype=dtype, device=device)
            # Overlapped, they are needed once more when the step is settled; deferred, only until the bucket is encoded.
            shards = [bucket.buffers.worker_error.numel() for bucket in self._buckets]
            memory = torch.empty(sum(shards) if overlap else max(shards, default=0), dtype=dtype, device=device)
            self._shard_gradients = list(memory.split(shards)) if overlap else [memory[:numel] for numel in shards]
        self._tickets: list[Ticket] = []
        self._all_finite = True

    @property
    def codec_name(self) -> str:
        """Of the quantizer."""
        return self._codec.name

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
    ) -> Iterator[tuple[_Piece, Tensor, LocalMomentum]]:
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

    def outstanding(self) -> dict[Tensor, Tensor]:
        errors = {p: torch.zeros(p.numel(), dtype=self._dtype, device=self.device) for p in self.parameters}
        if self._quantized:
            for bucket, pieces in zip(self._buckets, self._pieces, strict=True):
                # Summed over all ranks: the mean of the nodes' worker errors, and the server error of the one that has it.
                total = torch.zeros(bucket.layout.numel, dtype=self._dtype, device=self.device)
                for index, worker in bucket.buffers.worker.items():
                    _part(total, bucket, index).copy_(worker.worker_error).mul_(self._topology.local_world_size)
                for served in bucket.buffers.server:
                    _part(total, bucket, served.index).add_(served.server_error, alpha=self._topology.world_size)
                self._communicator.all_reduce_mean_(total)
                for piece in pieces:
                    piece.of(errors[self.parameters[piece.parameter]]).copy_(_part(total, bucket, piece.index))
        return {p: unflatten_like(error, p) for p, error in errors.items()}

    def add_outstanding_(self, errors: Mapping[Tensor, Tensor]) -> None:
        if not self._quantized:
            self._apply_outstanding_(errors)
            return
        flat = [flat_view(errors[p]) if p in errors else None for p in self.parameters]
        for piece in self._all_pieces():
            outstanding = flat[piece.parameter]
            if outstanding is not None and piece.error is not None:
                piece.error.add_(piece.of(outstanding).to(self._dtype))

    def stock_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Per parameter, the entries of a stock optimizer's state that are held in another form while frozen."""
        stock = {}
        for p in self.parameters:
            frozen = self.optimizer.state[p]["exp_avg_sq"]
            stock[p] = {
                "exp_avg": torch.zeros_like(frozen, memory_format=torch.preserve_format),
                "exp_avg_sq": self._method.thawed(p, self._group(p)),
            }
        for piece in self._all_pieces():
            p = self.parameters[piece.parameter]
            self._method.exp_avg_(
                piece.of(flat_view(stock[p]["exp_avg"])),
                self._direction(piece, 1.0),
                piece.of(self._variance(p)),
                self._group(p),
            )
        return stock

    def thaw_(self, outstanding: Mapping[Tensor, Tensor]) -> None:
        stock = self.stock_state()
        self._apply_outstanding_(outstanding)
        for p in self.parameters:
            self.optimizer.state[p].update(stock[p])

    def _apply_outstanding_(self, errors: Mapping[Tensor, Tensor]) -> None:
        for piece in self._all_pieces():
            p = self.parameters[piece.parameter]
            if p in errors:
                coefficients = self._method.coefficients(p, self._group(p))
                direction = self._scratch[: piece.numel].copy_(piece.of(flat_view(errors[p])))
                direction.mul_(self._method.direction_factor(coefficients))
                self._method.apply_(piece.of(flat_view(p)), direction, piece.of(self._variance(p)), coefficients)

    def _take_momentum(self, piece: _Piece) -> None:
        """Step t = T_w. The first compressed step adds beta1 u and a zero error: put beta1 u in the error's place.

        So the momentum needs no dense copy. A single rank keeps u itself there, for it has no error.
        """
        p = self.parameters[piece.parameter]
        group, state = self._group(p), self.optimizer.state[p]
        variance = piece.of(self._variance(p))
        dead = self._method.dead(variance)
        if dead.any():
            piece.bucket.live[piece.index] = pack_bits(~dead)
        error = piece.error
        if error is None:
            return
        self._method.momentum_(error, piece.of(flat_view(state["exp_avg"])), variance, group)
        error.masked_fill_(dead, 0.0)
        if self._quantized:
            error.mul_(self._method.momentum_decay(self._method.coefficients(p, group)))

    def _wake_(self, piece: _Piece, variance: Tensor) -> None:
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

    def _direction(self, piece: _Piece, factor: float) -> Tensor:
        """The average u of the last step, times ``factor``."""
        direction = self._scratch[: piece.numel]
        if self._quantized:
            self._codec.decode_(direction, piece.bucket.result(piece.index), factor)
        else:
            assert piece.error is not None
            torch.mul(piece.error, factor, out=direction)
        return direction

    def _variance(self, p: Tensor) -> Tensor:
        return flat_view(self.optimizer.state[p]["exp_avg_sq"])

    def _group(self, p: Tensor) -> dict[str, Any]:
        # Looked up anew: `load_state_dict` replaces the groups.
        return self.optimizer.param_groups[self._group_of[p]]

    def _all_pieces(self) -> list[_Piece]:
        return [piece for pieces in self._pieces for piece in pieces]


def _pieces(bucket: CompressedBucket) -> list[_Piece]:
    pieces, shard_offset = [], 0
    for index, segment in enumerate(bucket.layout.segments):
        worker = bucket.buffers.worker.get(index)
        pieces.append(
            _Piece(
                bucket=bucket,
                index=index,
                parameter=segment.parameter,
                start=segment.start,
                numel=segment.numel,
                error=None if worker is None else worker.worker_error,
                shard_offset=shard_offset,
            )
        )
        shard_offset += 0 if worker is None else segment.numel
    return pieces


def _part(flat: Tensor, bucket: CompressedBucket, index: int) -> Tensor:
    """The elements of a segment in a tensor that holds those of its bucket."""
    segment = bucket.layout.segments[index]
    return flat[segment.offset : segment.offset + segment.numel]
