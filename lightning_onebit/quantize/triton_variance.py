# mypy: disallow-untyped-defs=False
"""The renewal of the second moment on GPUs: one launch per bucket each to code, to average and to take over.

One program works on one block, as in :mod:`lightning_onebit.quantize.triton`, and nothing waits for the GPU. All arithmetic
on codes is that of integers.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from lightning_onebit import coefficients
from lightning_onebit.coefficients import RefreshNumbers
from lightning_onebit.quantize import logarithm
from lightning_onebit.quantize.layout import SCALE_NBYTES
from lightning_onebit.quantize.memory import BucketMemory, Messages
from lightning_onebit.quantize.triton_blocks import (
    decode,
    divide,
    load_flat,
    load_live,
    load_message,
    square_root,
    store_flat,
    tile,
    unpack,
)
from lightning_onebit.quantize.triton_tables import (
    BLOCK_COLUMNS,
    NUMEL,
    OFFSET,
    SCALE,
    SIGN,
    SLOT,
    SQUARE_DECAY,
    block_kernel,
    launch,
    square_factors,
    tables_of,
)

LOG_STEP = tl.constexpr(logarithm.LOG_STEP)
LARGEST_RESCALING = tl.constexpr(coefficients.LARGEST_RESCALING)
LARGEST_CODE = tl.constexpr(logarithm.LARGEST_CODE)
SMALLEST_NORMAL_BITS = tl.constexpr(logarithm.SMALLEST_NORMAL_BITS)
LARGEST_FLOAT32 = tl.constexpr(logarithm.LARGEST_FLOAT32)
LARGEST_FLOAT64 = tl.constexpr(float(np.finfo(np.float64).max))
SCALE_BYTES = tl.constexpr(SCALE_NBYTES)


def encode_variance_(memory: BucketMemory, messages: Messages, correction: NDArray[np.float64]) -> None:
    """As the reference."""
    tables = tables_of(memory)
    first, last = memory.share_blocks
    launch(
        _encode_variance_kernel, last - first, memory,
        tables.blocks, tables.code_places, tables.by_member(correction), memory.second_moment, messages.sent,
        first, memory.share_flat.start, memory.share.start * messages.wire.chunk_nbytes,
    )  # fmt: skip


def serve_variance_(memory: BucketMemory, messages: Messages) -> None:
    """As the reference."""
    assert memory.chunk is not None
    tables, ranks = tables_of(memory), len(memory.share)
    first, last = memory.chunk_blocks
    launch(
        _serve_variance_kernel, last - first, memory,
        tables.blocks, tables.code_places, memory.second_moment_residual, messages.received, messages.served,
        first, memory.chunk_flat.start, memory.chunk * messages.wire.chunk_nbytes,
        ranks, messages.wire.chunk_nbytes, 1 / ranks,
    )  # fmt: skip


def apply_variance_(memory: BucketMemory, messages: Messages | None, numbers: RefreshNumbers) -> None:
    """As the reference."""
    assert messages is not None
    tables = tables_of(memory)
    launch(
        _apply_variance_kernel, memory.layout.num_blocks, memory,
        tables.blocks, tables.code_places, tables.by_member(np.stack(numbers, axis=1)),
        memory.second_moment, memory.error, memory.rms_code, memory.rms_scale, memory.result, memory.live_before,
        messages.sent, messages.result,
        *memory.share_blocks, memory.share_flat.start, memory.share.start * messages.wire.chunk_nbytes,
    )  # fmt: skip


PLACES = (
    "first_block", "share_first", "share_last", "share_start", "share_byte", "chunk_start", "chunk_byte", "ranks",
    "chunk_nbytes",
)  # fmt: skip


@block_kernel(PLACES)
def _encode_variance_kernel(
    blocks, code_places, corrections, second_moment, sent, first_block, share_start, share_byte, BYTES: tl.constexpr
):  # fmt: skip
    row, numel, offset, scale, code = _place(blocks, code_places, first_block + tl.program_id(0))
    _, element, _, byte_exists = tile(numel, BYTES)
    correction = tl.load(corrections + tl.load(row + SLOT))
    codes, value = _code(_corrected(second_moment, offset - share_start, correction, element, byte_exists))
    _store_message(sent, scale - share_byte // SCALE_BYTES, code - share_byte, element, byte_exists, codes, value)


@block_kernel(PLACES)
def _serve_variance_kernel(
    blocks, code_places, residual, received, served, first_block, chunk_start, chunk_byte, ranks, chunk_nbytes,
    weight: tl.float64, BYTES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = residual.dtype.element_ty
    _, numel, offset, scale, code = _place(blocks, code_places, first_block + tl.program_id(0))
    _, element, exists, byte_exists = tile(numel, BYTES)
    scale_here, code_here = scale - chunk_byte // SCALE_BYTES, code - chunk_byte
    mean = tl.zeros(element.shape, dtype)
    for _ in range(ranks):
        mean += _load_square(received, scale_here, code_here, element, byte_exists, dtype) * tl.full((), weight, dtype)
        received += chunk_nbytes
    c = _bounded(mean + load_flat(residual, offset - chunk_start, element, byte_exists), mean)
    codes, value = _code(c)
    _store_message(served, scale_here, code_here, element, byte_exists, codes, value)
    coded = decode_logarithm(codes, value).to(dtype)
    store_flat(residual, offset - chunk_start, element, exists, byte_exists, c - coded * coded)


@block_kernel(PLACES)
def _apply_variance_kernel(
    blocks, code_places, numbers, second_moment, error, rms_code, rms_scale, average, live_before, sent, result,
    share_first, share_last, share_start, share_byte, BYTES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = second_moment.dtype.element_ty
    block = tl.program_id(0)
    row, numel, offset, scale, code = _place(blocks, code_places, block)
    byte, element, exists, byte_exists = tile(numel, BYTES)
    codes, value = _load_message(result, scale, code, element, byte_exists)
    if (block >= share_first) & (block < share_last):
        place = offset - share_start
        own_numbers = numbers + 3 * tl.load(row + SLOT)
        correction, beta = tl.load(own_numbers), tl.load(own_numbers + 1).to(dtype)
        eps = tl.load(own_numbers + 2).to(dtype)
        rms = decode_logarithm(codes, value).to(dtype)

        renewed = rms * rms
        v_hat = _corrected(second_moment, place, correction, element, byte_exists)
        own = _load_square(sent, scale - share_byte // SCALE_BYTES, code - share_byte, element, byte_exists, dtype)
        v_hat = _bounded(v_hat - own + renewed, renewed)
        v = divide(v_hat, tl.zeros(element.shape, dtype) + correction.to(dtype))
        store_flat(second_moment, place, element, exists, byte_exists, v)

        # error = error + beta u (min(D_old / D_new, 1.25) - 1)
        old = load_decoded_rms(rms_code, rms_scale, block, offset, element, byte_exists).to(dtype)
        has_both = (old > 0) & (rms > 0)
        rescaling = tl.minimum(divide(old + eps, tl.where(has_both, rms + eps, 1.0)), LARGEST_RESCALING)
        packed, scale_of_u = load_message(average, tl.load(row + SIGN), tl.load(row + SCALE), byte, byte_exists)
        alive_before = load_live(live_before, offset, byte, exists, byte_exists)
        u = decode(unpack(packed), scale_of_u.to(dtype) * beta, alive_before)
        owed = u * tl.where(has_both, rescaling - 1.0, 0.0)
        e = load_flat(error, place, element, byte_exists)
        store_flat(error, place, element, exists, byte_exists, e + owed)
    tl.debug_barrier()  # all of the block have read the old scale
    mask = tl.broadcast_to(byte_exists[:, None], element.shape)
    tl.store(tl.multiple_of(rms_code + offset, 8) + element, codes.to(tl.uint8), mask=mask)
    tl.store(rms_scale + block, value)


@triton.jit
def load_decoded_rms(rms_code, rms_scale, block, offset, element, byte_exists):
    """sqrt(v_hat) of a block, float32, from D's code."""
    mask = tl.broadcast_to(byte_exists[:, None], element.shape)
    codes = tl.load(tl.multiple_of(rms_code + offset, 8) + element, mask=mask, other=0)
    return decode_logarithm(codes, tl.load(rms_scale + block))


@triton.jit
def renew_second_moment(
    second_moment, place, numbers, step_row, gradient, decay, element, exists, byte_exists, COUPLED: tl.constexpr
):  # fmt: skip
    """``v_i = min(square_decay v_i + (square_factor g_i + square_root_weight decay)^2, largest finite)``."""
    dtype: tl.constexpr = second_moment.dtype.element_ty
    factor, root_weight = square_factors(numbers, step_row)
    term = gradient.to(dtype) * factor.to(dtype)
    if COUPLED:
        term += decay * root_weight.to(dtype)
    v = load_flat(second_moment, place, element, byte_exists) * tl.load(numbers + step_row + SQUARE_DECAY).to(dtype)
    store_flat(second_moment, place, element, exists, byte_exists, _finite(v + term * term))


@triton.jit
def decode_logarithm(codes, scale):
    """What codes decode to: float32."""
    bits = scale.to(tl.int32, bitcast=True) + (codes.to(tl.int32) - LARGEST_CODE) * LOG_STEP
    return tl.where(codes > 0, tl.maximum(bits, SMALLEST_NORMAL_BITS).to(tl.float32, bitcast=True), 0.0)


@triton.jit
def _code(v):
    """Codes and scale of ``sqrt(v)``. The bits of positive numbers are in the order of the numbers."""
    root = square_root(v)
    x = tl.minimum(root, LARGEST_FLOAT32).to(tl.float32).to(tl.int32, bitcast=True)
    largest = tl.max(tl.max(x, axis=1), axis=0)
    steps = (largest - x + LOG_STEP // 2) // LOG_STEP
    codes = tl.maximum(-steps + LARGEST_CODE, 1)
    return tl.where(x > 0, codes, 0), largest.to(tl.float32, bitcast=True)


@triton.jit
def _bounded(v, agreed):
    """``v`` within ``[agreed / 2, 2 agreed]``, and finite."""
    return tl.minimum(tl.maximum(v, agreed * 0.5), _finite(agreed * 2.0))


@triton.jit
def _finite(v):
    """``v``, at most the largest finite number."""
    if v.dtype == tl.float64:
        return tl.minimum(v, tl.full((), LARGEST_FLOAT64, tl.float64))
    else:
        return tl.minimum(v, LARGEST_FLOAT32)


@triton.jit
def _corrected(second_moment, place, correction, element, byte_exists):
    """v_hat_i."""
    dtype: tl.constexpr = second_moment.dtype.element_ty
    return _finite(load_flat(second_moment, place, element, byte_exists) * correction.to(dtype))


@triton.jit
def _place(blocks, code_places, block):
    """A block's row in its table; elements; the first in memory; the places of its scale and of its codes in messages."""
    block = block.to(tl.int64)
    row = blocks + block * BLOCK_COLUMNS
    scale, code = tl.load(code_places + 2 * block), tl.load(code_places + 2 * block + 1)
    return row, tl.load(row + NUMEL).to(tl.int32), tl.load(row + OFFSET), scale, code


@triton.jit
def _load_message(messages, scale, code, element, byte_exists):
    """Codes of a block as int32, and its float32 scale."""
    mask = tl.broadcast_to(byte_exists[:, None], element.shape)
    codes = tl.load(messages + code + element, mask=mask, other=0)
    return codes.to(tl.int32), tl.load(messages.to(tl.pointer_type(tl.float32)) + scale)


@triton.jit
def _store_message(messages, scale, code, element, byte_exists, codes, value):
    """Inverse of :func:`_load_message`."""
    mask = tl.broadcast_to(byte_exists[:, None], element.shape)
    tl.store(messages + code + element, codes.to(tl.uint8), mask=mask)
    tl.store(messages.to(tl.pointer_type(tl.float32)) + scale, value)


@triton.jit
def _load_square(messages, scale, code, element, byte_exists, DTYPE: tl.constexpr):
    """Squares of what a message decodes to."""
    codes, value = _load_message(messages, scale, code, element, byte_exists)
    root = decode_logarithm(codes, value).to(DTYPE)
    return root * root
