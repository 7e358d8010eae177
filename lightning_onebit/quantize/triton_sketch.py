# mypy: disallow-untyped-defs=False
"""The sketch of preconditioned gradients on GPUs: one launch per bucket, whatever it consists of.

One program works on a few neighbouring blocks, row by row of 251 elements, so that a column is a bucket of the sketch. It
adds up in registers, and to memory where a tensor ends: by atomic additions of integers, whose order leaves no trace.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_onebit.quantize import tensor_sketch
from lightning_onebit.quantize.memory import BucketMemory, StepInputs
from lightning_onebit.quantize.tensor_sketch import TensorSketch
from lightning_onebit.quantize.triton_blocks import clamp, divide, ordered_sum
from lightning_onebit.quantize.triton_tables import (
    BLOCK_COLUMNS,
    EPS,
    GRADIENT,
    KAPPA,
    NUMEL,
    OFFSET,
    PARAMETER,
    SLOT,
    START,
    STEP_COLUMNS,
    TRITON_DTYPES,
    block_kernel,
    launch,
    param_dtype,
    tables_of,
)
from lightning_onebit.quantize.triton_variance import decode_logarithm

WIDTH = tl.constexpr(tensor_sketch.WIDTH)
COLUMNS = tl.constexpr(triton.next_power_of_2(tensor_sketch.WIDTH))
ROWS = tl.constexpr(8)
"""Of a tile, which has as many elements as the tile of a block of 2048."""
ROWS_PER_SEGMENT = tl.constexpr(tensor_sketch.ROWS_PER_SEGMENT)
DRAWS_PER_SEGMENT = tl.constexpr(tensor_sketch.DRAWS_PER_SEGMENT)
VALUE_UNITS = tl.constexpr(2.0**tensor_sketch.VALUE_BITS)
SQUARE_UNITS = tl.constexpr(2.0**tensor_sketch.SQUARE_BITS)
BLOCKS_PER_PROGRAM = 8
"""So that there are 251 atomic additions for 16384 elements. Not measured."""


def sketch_tensors_(memory: BucketMemory, index: int, step: StepInputs, sketch: TensorSketch) -> None:
    """As the reference. Reads on the device which parameters are active."""
    tables = tables_of(memory)
    if not tables.has(step):
        tables.update_(step)
    first, last = memory.share_blocks
    launch(
        _sketch_tensors_kernel, -(-(last - first) // BLOCKS_PER_PROGRAM), memory,
        tables.blocks, tables.addresses, tables.numbers, step.flags, step.share_gradients.get(index),
        memory.rms, memory.rms_code, memory.rms_scale,
        sketch.values, sketch.sums, sketch.signs, sketch.first_segment_on_device, sketch.draws_on_device,
        first, last, memory.share_flat.start, len(sketch.numels), BLOCKS_PER_PROGRAM,
        PARAM_DTYPE=param_dtype(tables, step), ERROR_DTYPE=TRITON_DTYPES[memory.dtype],
    )  # fmt: skip


@block_kernel(("first_block", "last_block", "share_start", "tensors", "blocks_per_program"))
def _sketch_tensors_kernel(
    blocks, addresses, numbers, flags, share_gradient, rms, rms_code, rms_scale, values, sums, signs, first_segment, draws,
    first_block, last_block, share_start, tensors, blocks_per_program,
    PARAM_DTYPE: tl.constexpr, ERROR_DTYPE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    first = first_block + tl.program_id(0) * blocks_per_program
    last = tl.minimum(first + blocks_per_program, last_block)
    column = tl.arange(0, COLUMNS)
    sketch = tl.zeros([COLUMNS], tl.int64)
    for number in range(first, last):
        block = tl.cast(number, tl.int64)
        row = blocks + block * BLOCK_COLUMNS
        parameter = tl.load(row + PARAMETER)
        sketch += _sketch_of_block(
            addresses, numbers, flags, share_gradient, rms, rms_code, rms_scale, sums, signs, first_segment, draws,
            share_start, tensors, block, row, parameter, column, PARAM_DTYPE, ERROR_DTYPE,
        )  # fmt: skip
        next_row = blocks + tl.minimum(block + 1, last - 1) * BLOCK_COLUMNS
        if (number + 1 == last) | (tl.load(next_row + PARAMETER) != parameter):
            tl.atomic_add(values + parameter * WIDTH + column, sketch, mask=column < WIDTH, sem="relaxed")
            sketch = tl.zeros([COLUMNS], tl.int64)


@triton.jit
def _sketch_of_block(
    addresses, numbers, flags, share_gradient, rms, rms_code, rms_scale, sums, signs, first_segment, draws,
    share_start, tensors, block, row, parameter, column, PARAM_DTYPE: tl.constexpr, ERROR_DTYPE: tl.constexpr,
):  # fmt: skip
    """A block's own sketch, int64 ``[COLUMNS]``; its sums are added to those of its tensor."""
    step_row = tl.load(row + SLOT) * STEP_COLUMNS
    numel, start, offset = tl.load(row + NUMEL).to(tl.int32), tl.load(row + START), tl.load(row + OFFSET)
    address = tl.load(addresses + step_row + GRADIENT)
    kappa = tl.load(numbers + step_row + KAPPA).to(ERROR_DTYPE)
    eps = tl.load(numbers + step_row + EPS).to(ERROR_DTYPE)
    takes_part = tl.load(flags + 1 + parameter) != 0
    if share_gradient is None:
        takes_part = takes_part & (address != 0)

    sketch = tl.zeros([COLUMNS], tl.int64)
    squares = tl.zeros([ROWS, COLUMNS], tl.float64)
    live, clamped = tl.zeros([ROWS, COLUMNS], tl.int32), tl.zeros([ROWS, COLUMNS], tl.int32)
    if takes_part:
        first_row = start // WIDTH
        lead = (start - first_row * WIDTH).to(tl.int32)  # columns of the first row that belong to the block before
        for beyond in range(0, (lead + numel + WIDTH - 1) // WIDTH, ROWS):
            row_here = beyond + tl.arange(0, ROWS)
            element = row_here[:, None] * WIDTH + column[None, :] - lead
            exists = (column[None, :] < WIDTH) & (element >= 0) & (element < numel)
            if share_gradient is None:
                gradient = tl.load(address.to(tl.pointer_type(PARAM_DTYPE)) + start + element, mask=exists, other=0.0)
            else:
                gradient = tl.load(share_gradient + (offset - share_start) + element, mask=exists, other=0.0)
            if rms_code is not None:
                codes = tl.load(rms_code + offset + element, mask=exists, other=0)
                d = decode_logarithm(codes.to(tl.int32), tl.load(rms_scale + block)).to(ERROR_DTYPE)
            else:
                d = tl.load(rms + offset + element, mask=exists, other=0.0)
            alive = d > 0
            a = clamp(tl.where(alive, divide(gradient.to(ERROR_DTYPE), tl.where(alive, d + eps, 1.0)), 0.0), kappa)
            a = tl.where(a == a, a, 0.0)  # a step with NaN does not count

            vector_row = first_row + row_here
            segment = vector_row // ROWS_PER_SEGMENT
            row_of_segment = vector_row - segment * ROWS_PER_SEGMENT
            draw = draws + (tl.load(first_segment + parameter) + segment) * DRAWS_PER_SEGMENT
            is_there = row_here * WIDTH - lead < numel
            place = tl.load(draw, mask=is_there, other=0) + row_of_segment * WIDTH
            row_bit = (tl.load(draw + 1 + row_of_segment // 64, mask=is_there, other=0) >> (row_of_segment % 64)) & 1
            sign = tl.load(signs + place[:, None] + column[None, :], mask=exists, other=0).to(tl.int64)
            sign *= (row_bit * 2 - 1)[:, None]
            sketch += tl.sum((a * VALUE_UNITS).to(tl.int64) * sign, axis=0)
            squares += a.to(tl.float64) * a.to(tl.float64)
            live += alive.to(tl.int32)
            clamped += (alive & (tl.abs(a) >= kappa)).to(tl.int32)
        total = ordered_sum(squares)
        whole = tl.floor(total)
        tl.atomic_add(sums + parameter, whole.to(tl.int64), sem="relaxed")
        tl.atomic_add(sums + tensors + parameter, ((total - whole) * SQUARE_UNITS + 0.5).to(tl.int64), sem="relaxed")
        tl.atomic_add(sums + 2 * tensors + parameter, tl.sum(tl.sum(live, axis=1), axis=0).to(tl.int64), sem="relaxed")
        tl.atomic_add(sums + 3 * tensors + parameter, tl.sum(tl.sum(clamped, axis=1), axis=0).to(tl.int64), sem="relaxed")
    return sketch
