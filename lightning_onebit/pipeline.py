"""Gradients into errors, errors onto the wire, averages into parameters: one bucket after the other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function

from lightning_onebit.codec import make_codec
from lightning_onebit.codec.layout import SEGMENT_NUMEL, plan_buckets
from lightning_onebit.codec.reference import pack_bits, unpack_bits
from lightning_onebit.comm.allreduce import CompressedBucket
from lightning_onebit.comm.lane import InlineLane, Lane, Ticket
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.config import CompressionConfig
from lightning_onebit.flat import flat_gradient, flat_view, unflatten_like
from lightning_onebit.optim.method import CompressedMethod


@dataclass(frozen=True)
class _Piece:
    """One segment as a pipeline walks over it."""

    bucket: CompressedBucket
    index: int
    parameter: int
    start: int
    numel: int

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.numel]

    @property
    def error(self) -> Tensor:
        return self.bucket.buffers.segments[self.index].worker_error


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What a step works on, by parameter: flat tensors, and numbers that are ``None`` if the parameter sits out."""

    coefficients: Sequence[Any]
    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    variances: Sequence[Tensor]


class Pipeline:
    """The parameters of one dtype and device: frozen, cut into buckets, stepped bucket by bucket."""

    def __init__(
        self,
        optimizer: Optimizer,
        placed: Sequence[tuple[dict[str, Any], Tensor]],
        method_type: type[CompressedMethod[Any]],
        config: CompressionConfig,
        communicator: Communicator,
        exchanges: Communicator,
        lane: InlineLane | Lane,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.optimizer = optimizer
        self.parameters = [p for _, p in placed]
        self.device = device
        self._dtype = dtype
        self._communicator = communicator
        self._lane = lane
        self._quantized = communicator.world_size > 1
        if not self._quantized:  # the space of what is quantized decides nothing: take the one that is bounded
            config = replace(config, space="update")
        segment_numel = max(SEGMENT_NUMEL, config.block_size)
        self._method = method_type(optimizer, config, segment_numel=segment_numel, dtype=dtype, device=device)
        self._decoded = torch.empty(segment_numel, dtype=dtype, device=device)
        self._group_of = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}

        # One for each thread: a codec owns its workspace.
        codec, server_codec = (make_codec(config, device=device, dtype=dtype) for _ in range(2))
        scratch = torch.empty(segment_numel, dtype=dtype, device=device)
        layouts = plan_buckets(
            [p.numel() for p in self.parameters],
            block_size=config.block_size,
            world_size=communicator.world_size,
            bucket_numel=config.bucket_numel(sum(p.numel() for p in self.parameters)),
        )
        for p in self.parameters:
            self._method.freeze_(p, self._group(p))
        self._buckets: list[CompressedBucket] = []
        self._pieces: list[list[_Piece]] = []
        for layout in layouts:
            # Bucket by bucket, as the momentum's memory is freed: no second copy of all of it.
            bucket = CompressedBucket(layout, exchanges, codec, server_codec, scratch, dtype=dtype, device=device)
            pieces = [_Piece(bucket, i, s.parameter, s.start, s.numel) for i, s in enumerate(layout.segments)]
            self._buckets.append(bucket)
            self._pieces.append(pieces)
            for piece in pieces:
                self._take_momentum(piece)
                p = self.parameters[piece.parameter]
                if piece.start + piece.numel == p.numel():
                    del optimizer.state[p]["exp_avg"]
        for p in self.parameters:
            optimizer.state[p].pop("exp_avg", None)  # of empty parameters, which have no segment

    def step(self, active: Sequence[bool]) -> None:
        params = [flat_view(p) for p in self.parameters]
        coefficients = []
        for p, is_active in zip(self.parameters, active, strict=True):
            if is_active:
                self._method.count_step_(p)
            coefficients.append(self._method.coefficients(p, self._group(p)) if is_active else None)
        step = _Step(
            coefficients=coefficients,
            params=params,
            grads=[flat_gradient(p) for p in self.parameters],
            variances=[self._variance(p) for p in self.parameters],
        )
        if not self._quantized:
            for pieces in self._pieces:
                self._encode_(pieces, step)
                self._apply_(pieces, step)
            return

        # Bucket k is encoded, and bucket j < k applied, while the lane exchanges those in between.
        tickets: list[Ticket] = []
        applied = 0
        for bucket, pieces in zip(self._buckets, self._pieces, strict=True):
            self._encode_(pieces, step)
            skip = {piece.index for piece in pieces if coefficients[piece.parameter] is None}
            tickets.append(self._lane.submit(partial(bucket.exchange_, skip)))
            while applied < len(tickets) and tickets[applied].done():
                self._finish_(tickets, applied, step)
                applied += 1
        for index in range(applied, len(tickets)):
            self._finish_(tickets, index, step)

    def _finish_(self, tickets: Sequence[Ticket], index: int, step: _Step) -> None:
        start = time.perf_counter()
        with record_function("onebit::wait"):
            tickets[index].wait()
        self._communicator.counters.seconds_waited += time.perf_counter() - start
        self._apply_(self._pieces[index], step)

    def _encode_(self, pieces: Sequence[_Piece], step: _Step) -> None:
        """Steps 1 and 2: add the local momentum to the error and quantize it."""
        with record_function("onebit::encode"):
            for piece in pieces:
                index = piece.parameter
                c, grad = step.coefficients[index], step.grads[index]
                if c is None:
                    continue
                variance = piece.of(step.variances[index])
                self._add_momentum_(piece, self._method.momentum_decay(c))
                self._wake_(piece, variance)
                local = None if grad is None else piece.of(grad)
                self._method.add_gradient_(piece.error, local, piece.of(step.params[index]), variance, c)
                if self._quantized:
                    piece.bucket.encode_segment_(piece.index)

    def _apply_(self, pieces: Sequence[_Piece], step: _Step) -> None:
        """Step 6."""
        with record_function("onebit::apply"):
            for piece in pieces:
                c = step.coefficients[piece.parameter]
                if c is None:
                    continue
                param, factor = piece.of(step.params[piece.parameter]), self._method.direction_factor(c)
                self._method.decay_(param, c)
                if self._quantized and self._method.only_adds and param.dtype == self._dtype:
                    piece.bucket.add_result_(piece.index, param, factor)
                else:
                    variance = piece.of(step.variances[piece.parameter])
                    self._method.apply_(param, self._direction(piece, factor), variance, c)

    def outstanding(self) -> dict[Tensor, Tensor]:
        errors = {p: torch.zeros(p.numel(), dtype=self._dtype, device=self.device) for p in self.parameters}
        if self._quantized:
            for bucket, pieces in zip(self._buckets, self._pieces, strict=True):
                total = bucket.buffers.worker_error.clone()
                for served in bucket.buffers.chunk:
                    # Times n: the mean over the ranks, of whom only this one has it, is the server error itself.
                    part = total[served.segment.offset : served.segment.offset + served.segment.numel]
                    part.add_(served.server_error, alpha=self._communicator.world_size)
                self._communicator.all_reduce_mean_(total)
                for piece in pieces:
                    offset = bucket.layout.segments[piece.index].offset
                    part = total[offset : offset + piece.numel]
                    piece.of(errors[self.parameters[piece.parameter]]).copy_(part)
        return {p: unflatten_like(error, p) for p, error in errors.items()}

    def add_outstanding_(self, errors: Mapping[Tensor, Tensor]) -> None:
        if not self._quantized:
            self._apply_outstanding_(errors)
            return
        flat = [flat_view(errors[p]) if p in errors else None for p in self.parameters]
        for piece in self._all_pieces():
            error = flat[piece.parameter]
            if error is not None:
                piece.error.add_(piece.of(error).to(piece.error.dtype))

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
        for piece in self._all_pieces():
            self._wake_(piece, piece.of(self._variance(self.parameters[piece.parameter])))
        self._apply_outstanding_(outstanding)
        for p in self.parameters:
            self.optimizer.state[p].update(stock[p])

    def _apply_outstanding_(self, errors: Mapping[Tensor, Tensor]) -> None:
        for piece in self._all_pieces():
            p = self.parameters[piece.parameter]
            if p in errors:
                coefficients = self._method.coefficients(p, self._group(p))
                direction = self._decoded[: piece.numel].copy_(piece.of(flat_view(errors[p])))
                direction.mul_(self._method.direction_factor(coefficients))
                self._method.apply_(piece.of(flat_view(p)), direction, piece.of(self._variance(p)), coefficients)

    def _take_momentum(self, piece: _Piece) -> None:
        """Step t = T_w. The first compressed step adds beta1 u and a zero error: put beta1 u in the error's place.

        So the momentum needs no dense copy. A single rank keeps u itself there, for it has no error.
        """
        p = self.parameters[piece.parameter]
        group, state = self._group(p), self.optimizer.state[p]
        variance = piece.of(self._variance(p))
        error = piece.error
        self._method.momentum_(error, piece.of(flat_view(state["exp_avg"])), variance, group)
        dead = self._method.dead(variance)
        if dead.any():
            error.masked_fill_(dead, 0.0)
            piece.bucket.live[piece.index] = pack_bits(~dead)
        if self._quantized:
            error.mul_(self._method.momentum_decay(self._method.coefficients(p, group)))

    def _add_momentum_(self, piece: _Piece, decay: float) -> None:
        """The first term of step 1: decay times the last average, on top of the error."""
        if self._quantized:
            piece.bucket.add_result_(piece.index, piece.error, decay)
        else:
            piece.error.mul_(decay)

    def _wake_(self, piece: _Piece, variance: Tensor) -> None:
        """Let coordinates live whose wake-up call, from whichever rank, came with the last result."""
        live = piece.bucket.live[piece.index]
        if live is None:
            return
        calls = piece.bucket.buffers.segments[piece.index].result.signs if self._quantized else pack_bits(piece.error != 0)
        woken_bits = calls & ~live
        if woken_bits.any():
            self._method.wake_(variance, unpack_bits(woken_bits, piece.numel))
            live |= woken_bits
            if unpack_bits(live, piece.numel).all():
                piece.bucket.live[piece.index] = None

    def _direction(self, piece: _Piece, factor: float) -> Tensor:
        """The average u of the last step, times ``factor``."""
        decoded = self._decoded[: piece.numel]
        if self._quantized:
            piece.bucket.decode_result_(piece.index, decoded, factor)
        else:
            torch.mul(piece.error, factor, out=decoded)
        return decoded

    def _variance(self, p: Tensor) -> Tensor:
        return flat_view(self.optimizer.state[p]["exp_avg_sq"])

    def _group(self, p: Tensor) -> dict[str, Any]:
        # Looked up anew: `load_state_dict` replaces the groups.
        return self.optimizer.param_groups[self._group_of[p]]

    def _all_pieces(self) -> list[_Piece]:
        return [piece for pieces in self._pieces for piece in pieces]
