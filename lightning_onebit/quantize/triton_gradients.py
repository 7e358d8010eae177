# mypy: disallow-untyped-defs=False
"""What is done to the gradients of a whole bucket on a GPU, in one launch each: gather, scale, sketch.

No call waits for the GPU. Each sends the step's addresses, unless they are there already.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from lightning_onebit.flat import send_
from lightning_onebit.quantize.memory import BucketMemory, StepInputs
from lightning_onebit.quantize.triton_blocks import load_at, rounded, store_at, store_flat, tile
from lightning_onebit.quantize.triton_tables import (
    BLOCK_COLUMNS,
    GRADIENT,
    NUMEL,
    OFFSET,
    SLOT,
    START,
    STEP_COLUMNS,
    block_kernel,
    is_aligned,
    launch,
    param_dtype,
    tables_of,
)


def gather_(flat: Tensor, memory: BucketMemory, step: StepInputs, factor: float = 1.0) -> None:
    """Copy the gradients of a bucket, times ``factor``, into its flat order: ``flat = factor g``.

    Args:
        flat: ``[flat_numel]``, in the dtype of the errors, from a multiple of 16 bytes on; all of it is written. Padding
            becomes 0, and so does what has no gradient.
        memory: the bucket.
        step: its gradients.
        factor: such as one over the ranks whose gradients are summed up next.
    """
    assert is_aligned(flat)
    tables = tables_of(memory)
    tables.update_(step)
    launch(
        _gather_kernel, memory.layout.num_blocks, memory, tables.blocks, tables.addresses, flat, factor,
        PARAM_DTYPE=param_dtype(tables, step),
    )  # fmt: skip


def scale_(memory: BucketMemory, step: StepInputs, coefficient: Tensor) -> None:
    """Multiply the gradients of a bucket in place by a number on the device.

    Args:
        memory: the bucket.
        step: its gradients are written, each rounded to its dtype once.
        coefficient: 0-d, floating point.
    """
    tables = tables_of(memory)
    tables.update_(step)
    launch(
        _scale_kernel, memory.layout.num_blocks, memory, tables.blocks, tables.addresses, coefficient,
        PARAM_DTYPE=param_dtype(tables, step),
    )  # fmt: skip


class SketchDraws(NamedTuple):
    """What is random in a :class:`~lightning_onebit.engine.clipping.NormSketch` with k buckets, for all rows of the vector.

    R rows make a draw. Element ``P`` lies in row ``r = P div k`` and goes to bucket ``b = (P + rotations[r]) mod k``, with
    the sign ``signs[r div R, (b + r mod R) mod k] * row_signs[r]``.
    """

    signs: Tensor
    """int8 ``[draws, k]``"""
    row_signs: Tensor
    """int8 ``[draws * R]``"""
    rotations: Tensor
    """int32 ``[draws * R]``"""


def draw_sketch(seed: int, *, total_numel: int, numel: int, rows_per_draw: int, device: torch.device) -> SketchDraws:
    """Draw what ``NormSketch(seed, numel=numel)`` draws, and send it to the device without waiting for it.

    Args:
        seed: the same on all ranks.
        total_numel: elements of all parameters.
        numel: k, the buckets of the sketch.
        rows_per_draw: R.
        device: where the gradients are.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = max(1, -(-total_numel // (numel * rows_per_draw)))
    signs, rotations = [], []
    for _ in range(draws):
        signs.append(torch.randint(0, 2, (numel + rows_per_draw,), generator=generator, dtype=torch.int8).mul_(2).sub_(1))
        rotations.append(torch.randint(0, numel, (rows_per_draw,), generator=generator))
    drawn = torch.stack(signs)
    parts = (drawn[:, :numel], drawn[:, numel:].flatten(), torch.cat(rotations).int())
    sent = SketchDraws(*(torch.empty(part.shape, dtype=part.dtype, device=device) for part in parts))
    for target, part in zip(sent, parts, strict=True):
        send_(target, part.contiguous().numpy())
    return sent


def sketch_(
    partial: Tensor, memory: BucketMemory, step: StepInputs, draws: SketchDraws, first_places: NDArray[np.int64]
) -> None:
    """Add a bucket to the random-sign sketch of all gradients (:class:`~lightning_onebit.engine.clipping.NormSketch`).

    Deterministic: each program adds its blocks one after the other into a row of its own.

    Args:
        partial: float32 ``[programs, k]``; added to. The sketch is its sum over rows.
        memory: the bucket.
        step: its gradients.
        draws: what is random, the same for all buckets of a step.
        first_places: int64 ``[parameters]``: place of each parameter's first element among all.
    """
    programs, k = partial.shape
    tables = tables_of(memory)
    tables.update_(step)
    num_blocks, rows_per_draw = memory.layout.num_blocks, draws.rotations.numel() // len(draws.signs)
    launch(
        _sketch_kernel, min(programs, num_blocks), memory, tables.blocks, tables.addresses,
        tables.places(first_places), partial, *draws, num_blocks, k, rows_per_draw, -(-memory.layout.block_size // k) + 1,
        PARAM_DTYPE=param_dtype(tables, step),
    )  # fmt: skip


def add_parts_(out: Tensor, parts: Tensor, memory: BucketMemory) -> None:
    """``out = sum_r parts[r]``, in the order of r: the same bits wherever an element lies.

    Args:
        out: ``[numel]``; all of it is written.
        parts: ``[ranks, numel]``, in the dtype of ``out``, contiguous.
        memory: the bucket; gives the size of a tile.
    """
    ranks, numel = parts.shape
    programs = -(-numel // memory.layout.block_size)
    launch(_add_parts_kernel, programs, memory, out, parts, ranks, numel, memory.layout.block_size)


INTEGERS = ("num_blocks", "k", "rows_per_draw", "rows", "ranks", "numel", "block_size")


@block_kernel(INTEGERS)
def _gather_kernel(
    blocks, addresses, flat, factor: tl.float64, PARAM_DTYPE: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    row, address, start, numel = _gradient(blocks, addresses, tl.program_id(0))
    _, element, exists, byte_exists = tile(numel, BYTES)
    dtype: tl.constexpr = flat.dtype.element_ty
    gradient = load_at(address, start, numel, element, exists, byte_exists, PARAM_DTYPE).to(dtype)
    store_flat(flat, tl.load(row + OFFSET), element, exists, byte_exists, gradient * tl.full((), factor, dtype))


@block_kernel(INTEGERS)
def _scale_kernel(blocks, addresses, coefficient, PARAM_DTYPE: tl.constexpr, BYTES: tl.constexpr):
    _, address, start, numel = _gradient(blocks, addresses, tl.program_id(0))
    _, element, exists, byte_exists = tile(numel, BYTES)
    if address != 0:
        gradient = load_at(address, start, numel, element, exists, byte_exists, PARAM_DTYPE)
        if PARAM_DTYPE == tl.float64:  # noqa: SIM300 - Triton does not know it the other way round
            scaled = gradient * tl.load(coefficient).to(tl.float64)
        else:
            scaled = rounded(gradient.to(tl.float32) * tl.load(coefficient).to(tl.float32), PARAM_DTYPE)
        store_at(address, start, numel, element, exists, byte_exists, scaled.to(PARAM_DTYPE), PARAM_DTYPE)


@block_kernel(INTEGERS)
def _sketch_kernel(
    blocks, addresses, first_places, partial, signs, row_signs, rotations, num_blocks, k, rows_per_draw, rows,
    PARAM_DTYPE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    own = partial + tl.program_id(0).to(tl.int64) * k
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        row, address, start, numel = _gradient(blocks, addresses, block)
        if address != 0:
            _, element, exists, byte_exists = tile(numel, BYTES)
            gradient = load_at(address, start, numel, element, exists, byte_exists, PARAM_DTYPE).to(tl.float32)
            place = tl.load(first_places + tl.load(row + SLOT)) + start
            first_row = place // k
            column = (place - first_row * k).to(tl.int32) + element
            # In one row no two elements share a bucket, but elements of two rows may: one row after the other.
            for beyond in range(rows):
                of_row = exists & (column >= beyond * k) & (column < (beyond + 1) * k)
                # A block that ends with its row may be the last one, and there is no row beyond.
                vector_row = first_row + beyond * tl.max(tl.max(of_row.to(tl.int32), axis=1), axis=0)
                bucket = (column - beyond * k + tl.load(rotations + vector_row)) % k
                draw = vector_row // rows_per_draw
                turn = (bucket + (vector_row - draw * rows_per_draw).to(tl.int32)) % k
                sign = tl.load(signs + draw * k + turn, mask=of_row, other=0) * tl.load(row_signs + vector_row)
                total = tl.load(own + bucket, mask=of_row, other=0.0)
                tl.store(own + bucket, total + gradient * sign.to(tl.float32), mask=of_row)
                tl.debug_barrier()  # before another thread adds to the same bucket


@block_kernel(INTEGERS)
def _add_parts_kernel(out, parts, ranks, numel, block_size, BYTES: tl.constexpr):
    _, element, exists, _ = tile(block_size, BYTES)
    place = tl.program_id(0).to(tl.int64) * block_size + element
    exists = exists & (place < numel)
    total = tl.load(parts + place, mask=exists, other=0.0)
    for _ in range(1, ranks):
        parts += numel
        total += tl.load(parts + place, mask=exists, other=0.0)
    tl.store(out + place, total, mask=exists)


@triton.jit
def _gradient(blocks, addresses, block):
    """Of a block: its row in the table, its gradient's address, first element in the gradient, elements."""
    row = blocks + tl.cast(block, tl.int64) * BLOCK_COLUMNS
    address = tl.load(addresses + tl.load(row + SLOT) * STEP_COLUMNS + GRADIENT)
    return row, address, tl.load(row + START), tl.load(row + NUMEL).to(tl.int32)
