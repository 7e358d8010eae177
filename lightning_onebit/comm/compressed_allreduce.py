"""The compressed all-reduce: an all-to-all of messages, an average on the serving rank, an all-gather of its message."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from lightning_onebit.coefficients import LARGEST_VALUE, Coefficients
from lightning_onebit.comm.groups import ExchangeGroups, flat_groups
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.config import CompressionConfig, Scale
from lightning_onebit.flat import all_within
from lightning_onebit.quantize import make_kernels
from lightning_onebit.quantize.layout import plan_buckets
from lightning_onebit.quantize.memory import BucketMemory, Messages, StepInputs, error_dtype


def exchange_(messages: Messages, groups: ExchangeGroups, serve: Callable[[], object]) -> None:
    """Steps 3 to 5 of the algorithm for one bucket: from ``sent`` of all ranks to ``result``. Collective.

    Args:
        messages: those of the bucket's signs, a :class:`BucketMemory`, or of its second moment, with ``sent`` written;
            ``received``, ``served``, ``share_result`` and ``result`` are written.
        groups: the ranks that take part.
        serve: step 4, from ``received`` to ``served``: a kernel's, bound to its arguments. A thread needs its own kernels.
    """
    with record_function("onebit::all_to_all"):  # step 3: every rank is the server of its own chunk
        groups.peers.all_to_all_(messages.received, messages.sent)
    with record_function("onebit::serve"):  # step 4
        serve()
    with record_function("onebit::all_gather"):  # step 5: the same result on all ranks, bit for bit
        result = messages.result_before
        if groups.node is None:
            groups.peers.all_gather_(result, messages.served)
        else:
            groups.peers.all_gather_(messages.share_result, messages.served)
            groups.node.all_gather_(result, messages.share_result)
    messages.turn_results_()


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
        _check_dtype(tensor)
        config = CompressionConfig(block_size=block_size, scale=scale, bucket_cap_mb=bucket_cap_mb)
        self.communicator = Communicator(group)
        self.shape, self.dtype, self.device = tensor.shape, error_dtype(tensor.dtype), tensor.device
        self.groups = flat_groups(self.communicator)
        self.kernels = make_kernels(config, device=self.device, dtype=self.dtype)
        ranks = self.communicator.world_size
        layouts = plan_buckets(
            [tensor.numel()],
            block_size=block_size,
            num_chunks=ranks,
            bucket_numel=config.bucket_numel(tensor.numel()),
        )
        self.buckets = [
            BucketMemory(
                layout,
                share=range(ranks),
                chunk=self.communicator.rank,
                has_rms=False,
                keeps_before=False,
                dtype=self.dtype,
                device=self.device,
                parameter_numels=[tensor.numel()],
            )
            for layout in layouts
        ]

    @property
    def worker_error(self) -> Tensor:
        """What this rank has not sent yet: a copy, of the tensor's shape."""
        error = torch.zeros(self.shape.numel(), dtype=self.dtype, device=self.device)
        for memory in self.buckets:
            start, numel = int(memory.layout.start[0]), int(memory.layout.numel.sum())
            error[start : start + numel] = memory.error[:numel]
        return error.view(self.shape)

    @property
    def server_error(self) -> Tensor:
        """What this rank as a server has not passed on yet: a copy of the tensor's shape, zero where others serve."""
        error = torch.zeros(self.shape.numel(), dtype=self.dtype, device=self.device)
        for memory in self.buckets:
            first, last = memory.chunk_blocks
            if first < last:
                start, numel = int(memory.layout.start[first]), int(memory.layout.numel[first:last].sum())
                error[start : start + numel] = memory.server_error[:numel]
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
        tensor: float16, bfloat16, float32 or float64, any shape, the same on all ranks; may be a parameter. Overwritten by
            the average.
        error_feedback: state kept between calls, made for this tensor; it also fixes group, block size and scale.
        group: process group; ``None`` for the default one.
        block_size: elements per scale, a multiple of 8.
        scale: ``"l2"`` (root mean square of a block) or ``"l1"`` (mean absolute value).

    Returns:
        ``tensor``.

    Raises:
        TypeError: if the tensor is not real floating point.
        FloatingPointError: on all ranks, if a value is infinite or NaN on any, or beyond 1e30, which could overflow
            together with what was left out before; nothing has been changed then.
        ValueError: on all ranks, if the number of elements differs between ranks; and if ``error_feedback`` does
            not fit the tensor, or elements of the tensor share memory.
    """
    _check_dtype(tensor)
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
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(
            f"Elements of the tensor share memory (shape {tuple(tensor.shape)}, strides {tensor.stride()}), so it cannot be"
            " overwritten by the average. HINT: pass `tensor.contiguous()`, and keep what it is."
        )
    _check_agreement(tensor, error_feedback.communicator)

    # The tensor is both what is sent and, replaced by the average, what step 6 writes: x = 0 x + u.
    flat = tensor.detach().reshape(-1)
    step = StepInputs(
        params=[flat],
        gradients=[flat],
        numbers=np.array([Coefficients(beta=0.0, weight=1.0, shrink=0.0, step_size=-1.0)]),
        flags=torch.tensor([0, 1], dtype=torch.int32, device=tensor.device),
        active=np.array([True]),
    )
    for index, memory in enumerate(error_feedback.buckets):
        error_feedback.kernels.encode_(memory, index, step, commit=True)
        exchange_(memory, error_feedback.groups, partial(error_feedback.kernels.serve_, memory, step, commit=True))
        error_feedback.kernels.apply_(memory, index, step, commit=False)
    if flat.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(flat.view(tensor.shape))
    return tensor


def _check_dtype(tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"Cannot compress a tensor of dtype {tensor.dtype}. Must be real floating point.")


def _check_agreement(tensor: Tensor, communicator: Communicator) -> None:
    """Fail on all ranks alike, before anything is exchanged or changed."""
    numel = tensor.numel()
    fits = all_within([tensor.detach()], LARGEST_VALUE)
    claims = torch.tensor([not fits, numel, -numel], dtype=torch.int64, device=tensor.device)
    communicator.all_reduce_max_(claims)
    some_do_not_fit, largest, minus_smallest = claims.tolist()
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
