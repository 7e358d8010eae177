"""The sketch of preconditioned gradients in plain torch: what every other implementation has to compute."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_onebit.coefficients import Coefficients
from lightning_onebit.quantize.memory import BucketMemory, StepInputs
from lightning_onebit.quantize.tensor_sketch import (
    ROWS_PER_SEGMENT,
    SEGMENT_NUMEL,
    SQUARE_BITS,
    VALUE_BITS,
    WIDTH,
    TensorSketch,
)


def sketch_tensors_(memory: BucketMemory, index: int, step: StepInputs, sketch: TensorSketch, gradient: Tensor) -> None:
    """Add ``a = clamp(g / D, +-kappa)`` of this rank's share of a bucket to the sketches of its tensors, and to their sums.

    Where an element is not live, a is 0, and it does not count. What has no gradient, or sits out, adds nothing. Integer
    sums are equal bit by bit in all implementations, but for sums of squares, made of float64 sums of blocks in any order.

    Args:
        memory: the bucket; only read. It has a D.
        index: of the bucket, for ``step.share_gradients``.
        step: gradients, ``kappa`` and ``eps``, and which parameters are active; only read.
        sketch: of all tensors; ``numbers`` are added to. Its tensors are numbered as the step's parameters.
        gradient: g of the share, in the dtype of errors, as ``ReferenceKernels`` has it.
    """
    layout, (first, last) = memory.layout, memory.share_blocks
    block_of = memory.block_of((first, last))
    parameter, start, offset, numel = (
        torch.from_numpy(each[first:last]).to(memory.device)
        for each in (layout.parameter, layout.start, layout.offset, layout.numel)
    )
    element = torch.arange(len(gradient), device=memory.device) + (memory.share_flat.start - offset[block_of])
    exists, p, place = element < numel[block_of], parameter[block_of], start[block_of] + element
    present = [index in step.share_gradients or each is not None for each in step.gradients]
    takes_part = torch.tensor(present, device=memory.device) & step.is_active
    rms = memory.decoded_rms((first, last))
    live = exists & takes_part[p] & (rms > 0)

    n = Coefficients(*torch.from_numpy(step.numbers).to(memory.device, memory.dtype).unbind(1))  # type: ignore[arg-type]
    eps, kappa = n.eps[p], n.kappa[p]  # type: ignore[index]
    a = torch.where(live, gradient / torch.where(live, rms + eps, 1.0), 0.0).clamp(-kappa, kappa)

    segment = torch.where(exists, sketch.first_segment_on_device[p] + place // SEGMENT_NUMEL, 0)
    draws, row = sketch.draws_on_device, place // WIDTH % ROWS_PER_SEGMENT
    signs = sketch.signs[draws[segment, 0] + place % SEGMENT_NUMEL].long()
    row_signs = (draws[segment, 1 + row // 64] >> row % 64) % 2 * 2 - 1
    fixed = (a * 2.0**VALUE_BITS).long()
    sketch.values.view(-1).index_add_(0, p * WIDTH + place % WIDTH, fixed * signs * row_signs)

    squares = torch.zeros(last - first, dtype=torch.float64, device=memory.device)
    squares.index_add_(0, block_of, a.double().square())
    whole = squares.floor()
    sketch.sums[0].index_add_(0, parameter, whole.long())
    sketch.sums[1].index_add_(0, parameter, ((squares - whole) * 2.0**SQUARE_BITS + 0.5).long())
    sketch.sums[2].index_add_(0, p, live.long())
    sketch.sums[3].index_add_(0, p, (live & (a.abs() >= kappa)).long())
