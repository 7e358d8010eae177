"""The sign quantizer for GPUs: every call is one kernel, which reads and writes each element once.

One program works on one block, as a tile ``[bytes, 8]``: a row is eight neighbouring elements, whose bits make one
byte. The tile is the block padded to a power of two; elements that do not exist are dead there and are not stored.

What decides a bit, and therefore what must not be left to a compiler:

* The arithmetic is that of the reference, operation by operation: quotients and roots rounded to nearest, and no
  fused multiply-add (``enable_fp_fusion=False``). Given equal scales, errors are equal bit for bit. (On CPUs torch may
  take its square root from MKL, which rounds about a fifth of all float32 numbers the wrong way: compare on one device.)
* A block's sum is taken in float64, where no square of a float32 over- or underflows, and in an order that is
  written down: neighbours are added to neighbours. Otherwise the order would follow from how the compiler lays a tile
  out, hence from alignment and masks, hence from how parameters were cut. A scale is the true one rounded to float32,
  within a relative 6e-8 (what else lies between it and the reference's is the reference's own rounding), and the same
  bits for every layout, every GPU, and Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_onebit.config import MAX_BLOCK_SIZE, Scale
from lightning_onebit.engine.momentum import LocalMomentum
from lightning_onebit.quantize.encoded import Encoded
from lightning_onebit.quantize.layout import num_blocks

LEVELS = tl.constexpr(MAX_BLOCK_SIZE.bit_length() - 1)
"""Of additions, in the sum of the largest block."""

ELEMENTS_PER_WARP = 512
MAX_WARPS = 16


class TritonCodec:
    """:class:`~lightning_onebit.quantize.reference.ReferenceCodec` on CUDA tensors, without memory of its own.

    No call waits for the GPU, so nobody looks at what was computed: ``FloatingPointError`` is never raised. A block with
    a value that is not finite gets a scale that is not finite either, and so does one whose scale is beyond float32; what
    is decoded from it is infinite or NaN. Whether gradients are finite is for the caller to find out, before.

    Args:
        block_size: elements per block, a multiple of 8, at most 16384.
        scale: ``"l2"`` or ``"l1"``.
    """

    name = "triton"

    def __init__(self, *, block_size: int, scale: Scale = "l2") -> None:
        self.block_size = block_size
        self.scale: Scale = scale
        padded = triton.next_power_of_2(block_size)
        self._tile = {"BLOCK_SIZE": block_size, "BYTES": padded // 8}
        num_warps = min(max(padded // ELEMENTS_PER_WARP, 1), MAX_WARPS)
        self._options = {"num_warps": num_warps, "enable_fp_fusion": False}

    def encode_(self, values: Tensor, encoded: Encoded) -> None:
        self._launch(_encode_kernel, values, *encoded, L1=self.scale == "l1")

    def decode_(self, out: Tensor, encoded: Encoded, factor: float = 1.0) -> None:
        self._launch(_decode_kernel, out, *encoded, factor, ADD=False)

    def add_decoded_(self, target: Tensor, encoded: Encoded, factor: float = 1.0) -> None:
        self._launch(_decode_kernel, target, *encoded, factor, ADD=True)

    def encode_momentum_(
        self, out: Tensor, error: Tensor, previous: Encoded, momentum: LocalMomentum, sent: Encoded
    ) -> None:
        self._momentum(out, error, previous, momentum, sent, settle=False)

    def settle_momentum_(self, error: Tensor, previous: Encoded, momentum: LocalMomentum, sent: Encoded) -> None:
        self._momentum(error, error, previous, momentum, sent, settle=True)

    def encode_mean_(self, out: Tensor, error: Tensor, received: Sequence[Encoded], served: Encoded) -> None:
        """As the reference; ``received`` and ``served`` share their ``live``."""
        self._mean(out, error, received, served, settle=False)

    def settle_mean_(self, error: Tensor, received: Sequence[Encoded], served: Encoded) -> None:
        """As the reference; ``received`` and ``served`` share their ``live``."""
        self._mean(error, error, received, served, settle=True)

    def _momentum(
        self, out: Tensor, error: Tensor, previous: Encoded, momentum: LocalMomentum, sent: Encoded, *, settle: bool
    ) -> None:
        m = momentum
        terms = (m.gradient, m.second_moment, m.decay, m.weight, m.eps, m.kappa)
        self._launch(_momentum_kernel, out, error, *previous, *terms, *sent, L1=self.scale == "l1", SETTLE=settle)

    def _mean(self, out: Tensor, error: Tensor, received: Sequence[Encoded], served: Encoded, *, settle: bool) -> None:
        assert all(_same_memory(each.live, served.live) for each in received)
        messages = (
            *_evenly_spaced([each.signs for each in received]),
            *_evenly_spaced([each.scales for each in received]),
            len(received),
            1.0 / len(received),
        )
        self._launch(_mean_kernel, out, error, *messages, *served, L1=self.scale == "l1", SETTLE=settle)

    def _launch(self, kernel: Any, out: Tensor, *arguments: Any, **constants: bool) -> None:
        numel = out.numel()
        if numel == 0:
            return
        # Triton launches on the current device, and a thread that the caller started has device 0.
        with torch.cuda.device_of(out):
            grid = (num_blocks(numel, self.block_size),)
            kernel[grid](out, numel, *arguments, **constants, **self._tile, **self._options)


def _same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.data_ptr() == b.data_ptr())


def _evenly_spaced(tensors: Sequence[Tensor]) -> tuple[Tensor, int]:
    """A tensor that starts where the first does, and the elements from each to the next.

    Parts of one message buffer are evenly spaced; others are copied. A table of addresses would have to be sent to the
    GPU, and the processor would wait for that.
    """
    steps = {after.data_ptr() - before.data_ptr() for before, after in pairwise(tensors)} or {0}
    if len(steps) > 1:
        copied = torch.stack(tuple(tensors))
        return copied, copied.stride(0)
    return tensors[0], steps.pop() // tensors[0].element_size()


# ---- kernels: `out` [numel], `numel`, then what the method of the same name takes
#
# Nothing is known about how bits and scales are aligned, so there is one compiled kernel for all of their places.
# Python numbers arrive as float64, and are rounded to the dtype of the values as torch does it.

PLACES = (
    "signs", "scales", "live", "previous_signs", "previous_scales", "previous_live", "received_signs", "received_scales",
)  # fmt: skip
block_kernel = triton.jit(do_not_specialize=["signs_step", "scales_step", "count"], do_not_specialize_on_alignment=PLACES)


@block_kernel
def _encode_kernel(
    out, numel, signs, scales, live,
    L1: tl.constexpr, BLOCK_SIZE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    block, element, exists, byte, byte_exists = _place(numel, BLOCK_SIZE, BYTES)
    alive = _alive(live, exists, byte, byte_exists)
    values = tl.load(out + element, mask=exists, other=0.0)
    bits, scale = _quantize(values, alive, L1)
    tl.store(signs + byte, _pack(bits), mask=byte_exists)
    tl.store(scales + block, scale)
    tl.store(out + element, values + _decoded(bits, scale, alive, -1.0, values.dtype), mask=exists)


@block_kernel
def _decode_kernel(
    out, numel, signs, scales, live, factor: tl.float64,
    ADD: tl.constexpr, BLOCK_SIZE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    block, element, exists, byte, byte_exists = _place(numel, BLOCK_SIZE, BYTES)
    alive = _alive(live, exists, byte, byte_exists)
    bits = _load_bits(signs, byte, byte_exists)
    decoded = _decoded(bits, tl.load(scales + block), alive, factor, out.dtype.element_ty)
    if ADD:
        decoded = tl.load(out + element, mask=exists, other=0.0) + decoded
    tl.store(out + element, decoded, mask=exists)


@block_kernel
def _momentum_kernel(
    out, numel, error, previous_signs, previous_scales, previous_live,
    gradient, second_moment, decay: tl.float64, weight: tl.float64, eps: tl.float64, kappa: tl.float64,
    signs, scales, live,
    L1: tl.constexpr, SETTLE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out.dtype.element_ty
    block, element, exists, byte, byte_exists = _place(numel, BLOCK_SIZE, BYTES)

    values = tl.load(error + element, mask=exists, other=0.0)
    previous_bits = _load_bits(previous_signs, byte, byte_exists)
    previously_alive = _alive(previous_live, exists, byte, byte_exists)
    values += _decoded(previous_bits, tl.load(previous_scales + block), previously_alive, decay, dtype)
    term = tl.load(gradient + element, mask=exists, other=0.0)
    if second_moment is not None:
        # 1 where there is none: without eps, 0 / 0 would be NaN.
        moment = tl.load(second_moment + element, mask=exists, other=1.0).to(dtype)
        term = _divide(term, _sqrt(moment) + tl.full((), eps, dtype))
    bound = tl.full((), kappa, dtype)
    term = tl.maximum(term, -bound, propagate_nan=tl.PropagateNan.ALL)
    term = tl.minimum(term, bound, propagate_nan=tl.PropagateNan.ALL)
    values += term * tl.full((), weight, dtype)

    alive = _alive(live, exists, byte, byte_exists)
    if SETTLE:
        bits = _load_bits(signs, byte, byte_exists)
        scale = tl.load(scales + block)
    else:
        bits, scale = _quantize(values, alive, L1)
        tl.store(signs + byte, _pack(bits), mask=byte_exists)
        tl.store(scales + block, scale)
    tl.store(out + element, values + _decoded(bits, scale, alive, -1.0, dtype), mask=exists)


@block_kernel
def _mean_kernel(
    out, numel, error, received_signs, signs_step, received_scales, scales_step, count, weight: tl.float64,
    signs, scales, live,
    L1: tl.constexpr, SETTLE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out.dtype.element_ty
    block, element, exists, byte, byte_exists = _place(numel, BLOCK_SIZE, BYTES)
    alive = _alive(live, exists, byte, byte_exists)

    values = tl.load(error + element, mask=exists, other=0.0)
    calls = tl.full((BYTES,), 0, tl.int32)
    for _ in range(count):
        packed = tl.load(received_signs + byte, mask=byte_exists, other=0).to(tl.int32)
        values += _decoded(_unpack(packed), tl.load(received_scales + block), alive, weight, dtype)
        calls |= packed
        received_signs += signs_step
        received_scales += scales_step

    if SETTLE:
        bits = _load_bits(signs, byte, byte_exists)
        scale = tl.load(scales + block)
    else:
        bits, scale = _quantize(values, alive, L1)
        if live is not None:
            bits |= _unpack(calls) & exists & ~alive
        tl.store(signs + byte, _pack(bits), mask=byte_exists)
        tl.store(scales + block, scale)
    tl.store(out + element, values + _decoded(bits, scale, alive, -1.0, dtype), mask=exists)


# ---- what they share. Tiles: [BYTES, 8] of elements, [BYTES] of bytes


@triton.jit
def _place(numel, BLOCK_SIZE: tl.constexpr, BYTES: tl.constexpr):
    """This program's block; places and existence of its elements, and of its bytes. Places are int64."""
    block = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, BYTES), tl.arange(0, 8)
    element = row[:, None] * 8 + column[None, :]
    size = tl.minimum(numel - block * BLOCK_SIZE, BLOCK_SIZE).to(tl.int32)
    return block, block * BLOCK_SIZE + element, element < size, block * (BLOCK_SIZE // 8) + row, row * 8 < size


@triton.jit
def _unpack(packed):
    """Bits of ``packed``, least significant first."""
    return ((packed.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def _pack(bits):
    """Inverse of :func:`_unpack`: uint8."""
    return tl.sum(bits.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)


@triton.jit
def _load_bits(packed, byte, byte_exists):
    return _unpack(tl.load(packed + byte, mask=byte_exists, other=0))


@triton.jit
def _alive(live, exists, byte, byte_exists):
    """Which elements take part in the block."""
    if live is None:
        return exists
    else:
        return _load_bits(live, byte, byte_exists) & exists


@triton.jit
def _quantize(values, alive, L1: tl.constexpr):
    """Bits and float32 scale of a block; elements that do not exist have value 0 and are not alive."""
    # A product, not a choice: a dead element that is not finite must not go unnoticed.
    counted = (values * alive.to(values.dtype)).to(tl.float64)
    total = _sum(tl.abs(counted) if L1 else counted * counted)
    mean = total / tl.maximum(tl.sum(tl.sum(alive.to(tl.int32), axis=1), axis=0), 1).to(tl.float64)
    scale = (mean if L1 else tl.sqrt(mean)).to(tl.float32)
    return tl.where(alive, values >= 0, values != 0), scale


@triton.jit
def _sum(tile):
    """Sum of all elements: neighbours first, then neighbouring pairs, ... A sum of two has only one order."""
    for _ in tl.static_range(LEVELS):
        if tile.numel > 1:
            tile = tl.sum(tl.reshape(tile, (tile.numel // 2, 2)), axis=1)
    return tl.sum(tile, axis=0)


@triton.jit
def _decoded(bits, scale, alive, factor, dtype: tl.constexpr):
    """``factor * scale`` with its sign, in ``dtype``; -0.0 where not alive."""
    # Triton's `-x` is 0 - x, and its constant -0.0 is 0.0: only products keep the sign of a zero.
    magnitude = scale.to(dtype) * tl.full((), factor, dtype)
    return tl.where(alive, magnitude, 0.0) * tl.where(bits & alive, 1.0, -1.0)


@triton.jit
def _sqrt(x):
    """Rounded to nearest, which ``tl.sqrt`` of float32 is not."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _divide(x, y):
    """Rounded to nearest, which ``/`` of float32 is not."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)
