"""The 8-bit logarithm: roots of the second moment as one byte each, and one float32 scale per block.

The bits of a positive float32, read as an integer, are 2^23 times a piecewise linear logarithm to base 2, but for a constant
(Mitchell 1962): exact at powers of two, linear between them. So a step of the code is an addition of integers, the same on
every device; there is no exponential whose last bit could differ::

    code    = max(1, 255 - round((bits(scale) - bits(x)) / LOG_STEP))   for x > 0, and 0 for x = 0
    decoded = value of bits(scale) - (255 - code) LOG_STEP, at least the smallest normal float32; 0 for code 0

``scale`` is the largest x of the block. The 255 codes of positive numbers are 254 steps apart, over 24 octaves; what is
smaller takes the lowest code. Within these octaves, a decoded x is off by at most 4.7% (half a step, just above a power of
two), and by 2.0% in the root mean square over all x, where exact logarithms would be off by 3.3% and 1.9%.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FLOAT32_MANTISSA_BITS = 23
OCTAVES = 24
LARGEST_CODE = 255
LOG_STEP = math.ceil(OCTAVES * 2**FLOAT32_MANTISSA_BITS / (LARGEST_CODE - 1))
"""Between neighbouring codes, in units of the last place of a float32."""
SMALLEST_NORMAL_BITS = 1 << FLOAT32_MANTISSA_BITS
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def encode_logarithm(x: Tensor, scale: Tensor) -> Tensor:
    """Codes of ``x``, uint8, of its shape.

    Args:
        x: float32, finite, at least 0.
        scale: float32, that of each element's block: no smaller than ``x``. Broadcast with it.
    """
    codes = bits_of(scale) - bits_of(x)
    codes.add_(LOG_STEP // 2).floor_divide_(LOG_STEP).neg_().add_(LARGEST_CODE).clamp_(min=1)
    return codes.to(torch.uint8).mul_(x > 0)


def decode_logarithm(codes: Tensor, scale: Tensor) -> Tensor:
    """Inverse of :func:`encode_logarithm`: float32."""
    bits = codes.to(torch.int32).sub_(LARGEST_CODE).mul_(LOG_STEP).add_(bits_of(scale))
    return bits.clamp_(min=SMALLEST_NORMAL_BITS).view(torch.float32).masked_fill_(codes == 0, 0.0)


def bits_of(x: Tensor) -> Tensor:
    """The bits of a contiguous float32 tensor, as int32; the same memory."""
    return x.view(torch.int32)


def root_as_float32(v: Tensor) -> Tensor:
    """``sqrt(v)``, a new float32 tensor. What is too large for float32 becomes the largest one."""
    root = torch.empty_like(v)
    square_root_(v, out=root)
    return root.clamp_(max=LARGEST_FLOAT32).float()


def square_root_(values: Tensor, out: Tensor) -> None:
    """The correctly rounded root of ``values``, to ``out`` of the same dtype.

    torch's on a CPU is MKL's: it rounds a quarter of the numbers in [2, 4) the other way, perhaps others on another
    processor.
    """
    if values.device.type == "cpu":
        np.sqrt(values.numpy(), out=out.numpy())
    else:
        torch.sqrt(values, out=out)


def largest_of_blocks(x: Tensor, padded: NDArray[np.int64]) -> Tensor:
    """Scales, ``[blocks]``: the largest ``x`` of each block, 0 for a block of zeros.

    Args:
        x: at least 0, ``[elements]``.
        padded: elements of each block, one after the other in ``x``; at least one.
    """
    if x.device.type == "cpu":
        starts = np.cumsum(padded) - padded
        return torch.from_numpy(np.maximum.reduceat(x.numpy(), starts)) if len(starts) else x.new_empty(0)
    return torch.segment_reduce(x, "max", lengths=torch.from_numpy(padded).to(x.device))
