"""The compressed all-reduce: an all-to-all of signs, an average on the serving rank, an all-gather of signs."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from lightning_onebit.comm.error_feedback import ErrorFeedbackBuffers, ServedSegment
from lightning_onebit.comm.groups import ExchangeGroups, flat_groups
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.config import CompressionConfig, Scale
from lightning_onebit.engine.flat import all_within
from lightning_onebit.engine.momentum import LARGEST_VALUE
from lightning_onebit.quantize import Codec, make_codec, segment_numel
from lightning_onebit.quantize.encoded import Encoded
from lightning_onebit.quantize.layout import BucketLayout, plan_buckets


class CompressedBucket:
    """One bucket's exchange: steps 2 to 5 of the algorithm (1-bit Adam, arXiv 2102.02888, algorithm 1).

    In each round the caller encodes into :meth:`sent` what this rank has to say about its shard, calls :meth:`exchange_`
    once on all ranks, and then :meth:`accept_`, from when on :meth:`result` is the new average. Where rounds are
    revocable, one that was exchanged with ``keep=False`` and not accepted has not happened.

    Args:
        layout: places of blocks and bytes.
        groups: the ranks that take part.
        codec: the quantizer of the server, used by the thread that calls :meth:`exchange_`.
        scratch: memory of that thread for one segment, of ``dtype``, shared by all buckets; only for exchanges with
            ``keep=False``.
        revocable: whether rounds may be taken back; takes another bit per element.
        dtype: dtype of errors and results, float32 or float64.
        device: where they live.
    """

    def __init__(
        self,
        layout: BucketLayout,
        groups: ExchangeGroups,
        codec: Codec,
        scratch: Tensor,
        *,
        revocable: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.groups = groups
        self.buffers = ErrorFeedbackBuffers(layout, groups.topology, revocable=revocable, dtype=dtype, device=device)
        self.live: list[Tensor | None] = [None] * len(layout.segments)
        """Per segment, bit set where an element takes part in its block (see
        :class:`~lightning_onebit.quantize.reference.ReferenceCodec`); ``None`` if all do. The same on all ranks."""
        self._codec = codec
        self._scratch = scratch
        self._current = 0
        self._live_then = list(self.live)

    def sent(self, index: int) -> Encoded:
        """The outgoing message's part for a segment of the shard."""
        return self.buffers.worker[index].sent.among(self.live[index])

    def result(self, index: int) -> Encoded:
        """The last accepted average of a segment, with the elements that were live then; the same on all ranks."""
        return self.buffers.result_segments[self._current][index].among(self._live_then[index])

    def exchange_(self, skip: Container[int] = (), *, keep: bool = True) -> None:
        """Steps 3 to 5: send, average and quantize the own chunk, gather everybody's.

        Args:
            skip: indices of the segments that sit out this round, the same on all ranks: their errors are untouched.
            keep: whether server errors are updated at once. Otherwise they are untouched until :meth:`settle_server_`.
        """
        buffers, groups = self.buffers, self.groups
        with record_function("onebit::all_to_all"):
            groups.peers.all_to_all_(buffers.received, buffers.sent)
        with record_function("onebit::serve"):
            for served in buffers.server:
                if served.index in skip:
                    _copy_(served.served, self.result(served.index))
            for served in self._served(skip):
                error = served.server_error
                out = error if keep else self._scratch[: error.numel()]
                self._codec.encode_mean_(out, error, served.received, served.served)
        with record_function("onebit::all_gather"):
            result = buffers.results[self._next]
            if groups.node is None:
                groups.peers.all_gather_(result, buffers.served)
            else:
                assert buffers.shard_result is not None
                groups.peers.all_gather_(buffers.shard_result, buffers.served)
                groups.node.all_gather_(result, buffers.shard_result)

    def settle_server_(self, codec: Codec, skip: Container[int] = ()) -> None:
        """Update the server errors after an exchange with ``keep=False``, with the codec of the calling thread."""
        for served in self._served(skip):
            codec.settle_mean_(served.server_error, served.received, served.served)

    def accept_(self, skip: Container[int] = ()) -> None:
        """Make the average that was exchanged the last one; segments that sat out keep theirs."""
        old, new = (self.buffers.result_segments[which] for which in (self._current, self._next))
        for index in range(len(self.live)):
            if index not in skip:
                self._live_then[index] = self.live[index]
            elif self._next != self._current:
                _copy_(new[index], old[index])
        self._current = self._next

    def restore_(self, index: int, signs: Tensor, scales: Tensor, live: Tensor | None) -> None:
        """Make an average of an earlier run the last accepted one of a segment, with the elements that were live then."""
        self._live_then[index] = live
        _copy_(self.result(index), Encoded(signs=signs, scales=scales))

    @property
    def _next(self) -> int:
        return (self._current + 1) % len(self.buffers.results)

    def _served(self, skip: Container[int]) -> Iterator[ServedSegment]:
        for served in self.buffers.server:
            if served.index in skip:
                continue
            live = self.live[served.index]
            if live is not None:
                served = replace(
                    served,
                    received=tuple(each._replace(live=live) for each in served.received),
                    served=served.served._replace(live=live),
                )
            yield served


def _copy_(target: Encoded, source: Encoded) -> None:
    target.signs.copy_(source.signs)
    target.scales.copy_(source.scales)


class ErrorFeedback:
    """State of :func:`compressed_all_reduce` for one tensor: create once, pass at every call.

    Args:
        tensor: a tensor of the shape, dtype and device that will be reduced; only these are used.
        group: process group; ``None`` for the default one.
        block_size: elements per scale, a multiple of 8.
        scale: ``"l2"`` or ``"l1"``.
        bucket_cap_mb: size of one exchange, in MiB of float32; ``None``: by the tensor's size. Changes messages, not
            results.

    Raises:
        TypeError: if the tensor is not real floating point.
        ValueError: if an argument is outside its domain.
    """

    def __init__(
        self,
        tensor: Tensor,
        *,
        group: dist.ProcessGroup | None = None,
        block_size: int = 2048,
        scale: Scale = "l2",
        bucket_cap_mb: float | None = None,
    ) -> None:
        if not tensor.is_floating_point():
            raise TypeError(f"Cannot compress a tensor of dtype {tensor.dtype}. Must be real floating point.")
        config = CompressionConfig(block_size=block_size, scale=scale, bucket_cap_mb=bucket_cap_mb)
        self.communicator = Communicator(group)
        self.shape, self.dtype, self.device = tensor.shape, error_dtype(tensor.dtype), tensor.device
        self.codec = make_codec(config, device=self.device, dtype=self.dtype)
        groups = flat_groups(self.communicator)
        nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        layouts = plan_buckets(
            [tensor.numel()],
            block_size=block_size,
            world_size=self.communicator.world_size,
            bucket_numel=config.bucket_numel(tensor.numel()),
            segment_numel=segment_numel(self.device),
        )
        self.buckets = [
            CompressedBucket(layout, groups, self.codec, nothing, revocable=False, dtype=self.dtype, device=self.device)
            for layout in layouts
        ]

    @property
    def worker_error(self) -> Tensor:
        """What this rank has not sent yet: a copy, of the tensor's shape."""
        parts = [bucket.buffers.worker_error for bucket in self.buckets]
        return torch.cat(parts).view(self.shape) if parts else torch.zeros(self.shape, dtype=self.dtype)

    @property
    def server_error(self) -> Tensor:
        """What this rank as a server has not passed on yet: a copy of the tensor's shape, zero where others serve."""
        error = torch.zeros(self.shape.numel(), dtype=self.dtype, device=self.device)
        for bucket, start in zip(self.buckets, bucket_starts([b.layout for b in self.buckets]), strict=True):
            for served in bucket.buffers.server:
                segment = bucket.layout.segments[served.index]
                error[start + segment.offset :][: segment.numel] = served.server_error
        return error.view(self.shape)


def compressed_all_reduce(
    tensor: Tensor,
    error_feedback: ErrorFeedback | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    block_size: int = 2048,
    scale: Scale = "l2",
) -> Tensor:
    """Average a tensor over the ranks, sending one bit per element and one scale per block.

    All ranks get the same bits. What quantization leaves out is kept in ``error_feedback`` and sent by later calls, so the
    sum over calls follows the exact one; without it that part is lost.

    Args:
        tensor: float16, bfloat16, float32 or float64, any shape, the same on all ranks. Overwritten by the average.
        error_feedback: state kept between calls, made for this tensor; it also fixes group, block size and scale.
        group: process group; ``None`` for the default one.
        block_size: elements per scale, a multiple of 8.
        scale: ``"l2"`` (root mean square of a block) or ``"l1"`` (mean absolute value).

    Returns:
        ``tensor``.

    Raises:
        FloatingPointError: on all ranks, if a value is infinite or NaN on any, or beyond 1e30, which could overflow
            together with what was left out before; nothing has been changed then.
        ValueError: on all ranks, if the number of elements differs between ranks; and if ``error_feedback`` does
            not fit the tensor.
    """
    if error_feedback is None:
        error_feedback = ErrorFeedback(tensor, group=group, block_size=block_size, scale=scale)
    elif group is not None and group is not error_feedback.communicator.group:
        raise ValueError("`group` differs from that of `error_feedback`. HINT: pass it to `ErrorFeedback` only.")
    if error_feedback.shape != tensor.shape:
        raise ValueError(
            f"The error feedback was made for shape {tuple(error_feedback.shape)}, not {tuple(tensor.shape)}."
            " HINT: keep one `ErrorFeedback` per tensor."
        )
    if error_feedback.dtype != error_dtype(tensor.dtype):
        raise ValueError(
            f"The error feedback was made for errors of {error_feedback.dtype}, but {tensor.dtype} needs"
            f" {error_dtype(tensor.dtype)}. HINT: create `ErrorFeedback` from a tensor of the same dtype."
        )
    _check_agreement(tensor, error_feedback.communicator)

    flat = tensor.reshape(-1)
    buckets, codec = error_feedback.buckets, error_feedback.codec
    starts = bucket_starts([bucket.layout for bucket in buckets])
    for bucket, start in zip(buckets, starts, strict=True):
        parts = [flat[start + segment.offset :][: segment.numel] for segment in bucket.layout.segments]
        for index, worker in bucket.buffers.worker.items():
            codec.encode_(worker.worker_error.add_(parts[index]), bucket.sent(index))
        bucket.exchange_()
        bucket.accept_()
        for index, part in enumerate(parts):
            decoded = part if part.dtype == error_feedback.dtype else torch.empty_like(part, dtype=error_feedback.dtype)
            codec.decode_(decoded, bucket.result(index))
            if decoded is not part:
                part.copy_(decoded)
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))
    return tensor


def error_dtype(dtype: torch.dtype) -> torch.dtype:
    """Errors are kept in float32, or in float64 for float64 tensors: half precision would lose them."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bucket_starts(layouts: Sequence[BucketLayout]) -> list[int]:
    """First element of each bucket when the buckets are laid end to end."""
    starts, start = [], 0
    for layout in layouts:
        starts.append(start)
        start += layout.numel
    return starts


def _check_agreement(tensor: Tensor, communicator: Communicator) -> None:
    """Fail on all ranks alike, before anything is exchanged or changed."""
    numel = tensor.numel()
    fits = all_within([tensor], LARGEST_VALUE)
    facts = torch.tensor([not fits, numel, -numel], dtype=torch.int64, device=tensor.device)
    communicator.all_reduce_max_(facts)
    some_do_not_fit, largest, minus_smallest = facts.tolist()
    if largest != -minus_smallest:
        raise ValueError(
            f"The ranks passed different numbers of elements: from {-minus_smallest} to {largest},"
            f" {numel} on rank {communicator.rank}. All must be equal."
        )
    if some_do_not_fit:
        raise FloatingPointError(
            f"The tensor holds infinite or NaN values, or values beyond {LARGEST_VALUE:g}, on"
            f" {'another rank' if fits else 'this rank'}. Nothing was exchanged. HINT: leave this call out on all ranks, or"
            " scale the tensor down."
        )
