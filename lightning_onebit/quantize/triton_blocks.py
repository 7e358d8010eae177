# mypy: disallow-untyped-defs=False
"""Operations on one block, of which Triton's kernels are made.

Tiles: ``[BYTES, 8]`` of elements, where a row is eight neighbours whose bits make one byte; ``[BYTES]`` of bytes. The tile
is the block padded to a power of two.

What decides a bit, and therefore what must not be left to a compiler:

* The arithmetic is that of the reference, operation by operation: quotients and roots rounded to nearest, and no
  fused multiply-add (``enable_fp_fusion=False``). Given equal scales, errors are equal bit for bit.
* A block's sum is taken in float64, where no square of a float32 over- or underflows, and in an order that is
  written down: neighbours are added to neighbours. Otherwise the order would follow from how the compiler lays a tile
  out, hence from alignment and masks. A scale is the true one rounded to float32, within a relative 6e-8, and the same
  bits for every layout, every GPU, and Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_onebit.config import MAX_BLOCK_SIZE

LEVELS = tl.constexpr(MAX_BLOCK_SIZE.bit_length() - 1)
"""Of additions, in the sum of the largest block."""
ALIGNMENT = tl.constexpr(16)
"""Bytes of the largest load. Flat memory begins at a multiple of it, as all that torch allocates, and so does each block in
it. Parameters and gradients may not, where they are views: that is found out from their addresses."""


@triton.jit
def tile(numel, BYTES: tl.constexpr):
    """Of a block of ``numel`` elements: rows; elements; which elements exist, and which rows."""
    byte = tl.arange(0, BYTES)
    element = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    return byte, element, element < numel, byte * 8 < numel


@triton.jit
def load_flat(memory, place, element, byte_exists):
    """A block from ``place`` on in flat memory, where padding exists as well."""
    mask = tl.broadcast_to(byte_exists[:, None], element.shape)
    return tl.load(tl.multiple_of(memory + place, ALIGNMENT) + element, mask=mask, other=0.0)


@triton.jit
def store_flat(memory, place, element, exists, byte_exists, values):
    """Write a block, and zeros as its padding."""
    mask = tl.broadcast_to(byte_exists[:, None], element.shape)
    tl.store(tl.multiple_of(memory + place, ALIGNMENT) + element, tl.where(exists, values, 0.0), mask=mask)


@triton.jit
def load_at(address, start, numel, element, exists, byte_exists, DTYPE: tl.constexpr):
    """A block from element ``start`` on of the tensor at ``address``; zeros if that is 0."""
    first = address.to(tl.pointer_type(DTYPE)) + start
    if (address % ALIGNMENT == 0) & (numel % 8 == 0):
        mask = tl.broadcast_to((byte_exists & (address != 0))[:, None], element.shape)
        values = tl.load(tl.multiple_of(first, ALIGNMENT) + element, mask=mask, other=0.0)
    else:
        values = tl.load(first + element, mask=exists & (address != 0), other=0.0)
    return values


@triton.jit
def store_at(address, start, numel, element, exists, byte_exists, values, DTYPE: tl.constexpr):
    """Write a block from element ``start`` on of the tensor at ``address``."""
    first = address.to(tl.pointer_type(DTYPE)) + start
    if (address % ALIGNMENT == 0) & (numel % 8 == 0):
        mask = tl.broadcast_to(byte_exists[:, None], element.shape)
        tl.store(tl.multiple_of(first, ALIGNMENT) + element, values, mask=mask)
    else:
        tl.store(first + element, values, mask=exists)


@triton.jit
def unpack(packed):
    """Bits of ``packed``, least significant first."""
    return ((packed.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def pack(bits):
    """Inverse of :func:`unpack`: uint8."""
    return tl.sum(bits.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)


@triton.jit
def load_live(live, place, byte, exists, byte_exists):
    """Which elements take part in the block whose first element is number ``place`` of flat memory."""
    if live is None:
        return exists
    else:
        return unpack(tl.load(live + place // 8 + byte, mask=byte_exists, other=0)) & exists


@triton.jit
def load_message(messages, sign, scale, byte, byte_exists):
    """Bits of a block as uint8 ``[BYTES]``, and its float32 scale."""
    packed = tl.load(messages + sign + byte, mask=byte_exists, other=0)
    return packed, tl.load(messages.to(tl.pointer_type(tl.float32)) + scale)


@triton.jit
def store_message(messages, sign, scale, byte, byte_exists, packed, value):
    """Inverse of :func:`load_message`."""
    tl.store(messages + sign + byte, packed, mask=byte_exists)
    tl.store(messages.to(tl.pointer_type(tl.float32)) + scale, value)


@triton.jit
def quantize(c, alive, L1: tl.constexpr, gain):
    """C: bits and float32 scale of a block, that of C times ``gain``."""
    counted = tl.where(alive, c, 0.0).to(tl.float64)
    total = ordered_sum(tl.abs(counted) if L1 else counted * counted)
    size = tl.sum(tl.sum(alive.to(tl.int32), axis=1), axis=0)
    mean = total / tl.maximum(size, 1).to(tl.float64)
    return alive & (c >= 0), ((mean if L1 else tl.sqrt(mean)) * gain).to(tl.float32)


@triton.jit
def ordered_sum(values):
    """Sum of all elements: neighbours first, then neighbouring pairs, ... A sum of two has only one order."""
    for _ in tl.static_range(LEVELS):
        if values.numel > 1:
            values = tl.sum(tl.reshape(values, (values.numel // 2, 2)), axis=1)
    return tl.sum(values, axis=0)


@triton.jit
def decode(bits, magnitude, alive):
    """``magnitude`` with the sign of each bit; -0.0 where not alive."""
    # Triton's `-x` is 0 - x, and its constant -0.0 is 0.0: only products keep the sign of a zero.
    return tl.where(alive, magnitude, 0.0) * tl.where(bits & alive, 1.0, -1.0)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def clamp(x, bound):
    """``x`` within ``+-bound``; NaN stays NaN."""
    x = tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def divide(x, y):
    """Rounded to nearest, which ``/`` of float32 is not."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def square_root(x):
    """Rounded to nearest, which ``tl.sqrt`` of float32 is not."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """``x``, rounded to nearest even among the numbers of ``DTYPE``; then the conversion to it is exact."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300 - Triton does not know it the other way round
        # Written out, as Triton's interpreter truncates.
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    elif DTYPE == tl.float16:  # noqa: SIM300
        return x.to(tl.float16).to(x.dtype)
    else:
        return x
