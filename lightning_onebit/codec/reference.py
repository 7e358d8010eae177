"""The sign quantizer in plain torch, written to be read.

Every other codec does the same with other instructions: the bits are equal bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_onebit.config import Scale

SMALLEST_SAFE_NORM, LARGEST_SAFE_NORM = 1e-15, 1e15
"""Between these a float32 norm loses nothing to under- or overflow of the squares."""

BIT_WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)


class ReferenceCodec:
    """One bit per element and one scale per block (Seide et al. 2014; 1-bit Adam, arXiv 2102.02888, section 4).

    The quantizer C maps a block c to ``+scale`` where ``c >= 0`` and ``-scale`` elsewhere, with
    ``scale = ||c||_2 / sqrt(size)`` (``"l2"``) or ``||c||_1 / size`` (``"l1"``). A block of zeros has scale 0.

    **Live and dead elements.** An element of which no rank has seen a gradient yet is *dead*: it is no part of
    its block (neither of norm nor of size) and decodes to exact zero. Its sign bit is then free, and carries a
    wake-up call: set where the value is not zero. The value itself stays in the residual, unsent.

    Args:
        block_size: elements per block, a multiple of 8.
        scale: ``"l2"`` or ``"l1"``.

    All tensors are one-dimensional and contiguous: ``values`` and ``out`` float32 or float64 ``[numel]``, where
    element 0 starts a block; ``signs`` and ``live`` uint8 ``[ceil(numel / 8)]``, least significant bit first;
    ``scales`` float32 ``[ceil(numel / block_size)]``.
    """

    name = "reference"

    def __init__(self, *, block_size: int, scale: Scale = "l2") -> None:
        self.block_size = block_size
        self.scale = scale

    def encode_(self, values: Tensor, signs: Tensor, scales: Tensor, live: Tensor | None = None) -> None:
        """Quantize ``values``, leaving the quantization error behind: ``values == q + error`` (to rounding).

        Args:
            values: what to send; overwritten by the error.
            signs: receives the sign bits.
            scales: receives the scales.
            live: bit set where an element takes part in its block; ``None`` if all do.

        Raises:
            FloatingPointError: if a value is not finite. Nothing has been modified then.
        """
        if values.numel() == 0:
            return
        live_mask = None if live is None else unpack_bits(live, values.numel())
        scales.copy_(self._block_scales(values, live_mask))
        bits = values >= 0
        if live_mask is not None:
            bits = torch.where(live_mask, bits, values != 0)
        signs.copy_(pack_bits(bits))
        quantized = torch.empty_like(values)
        self.decode_(quantized, signs, scales, live=live)
        values.sub_(quantized)

    def decode_(self, out: Tensor, signs: Tensor, scales: Tensor, factor: float = 1.0, live: Tensor | None = None) -> None:
        """Write ``factor * q`` to ``out``; dead elements become -0.0, which added to anything leaves its bits alone."""
        numel = out.numel()
        bits = unpack_bits(signs, numel)
        element_scales = (scales.to(out.dtype) * factor).repeat_interleave(self.block_size)[:numel]
        out.copy_(torch.where(bits, element_scales, -element_scales))
        if live is not None:
            out.masked_fill_(~unpack_bits(live, numel), -0.0)

    def _block_scales(self, values: Tensor, live_mask: Tensor | None) -> Tensor:
        padding = -values.numel() % self.block_size
        counted = torch.ones_like(values, dtype=torch.bool) if live_mask is None else live_mask
        blocks = torch.nn.functional.pad(values * counted, (0, padding)).view(-1, self.block_size)
        sizes = torch.nn.functional.pad(counted, (0, padding)).view(-1, self.block_size).sum(dim=1)
        return scales_from_norms(block_norms(blocks, self.scale), sizes, self.scale)


def block_norms(blocks: Tensor, scale: Scale) -> Tensor:
    """Norm of each row of ``blocks [rows, columns]``, safe from under- and overflow.

    Raises:
        FloatingPointError: if a value is not finite.
    """
    order = 2 if scale == "l2" else 1
    norms = torch.linalg.vector_norm(blocks, order, dim=1)
    smallest, largest = torch.aminmax(norms)
    if smallest > SMALLEST_SAFE_NORM and largest < LARGEST_SAFE_NORM:
        return norms
    largest_values = torch.linalg.vector_norm(blocks, float("inf"), dim=1)
    if not torch.isfinite(largest_values).all():
        raise FloatingPointError(
            "Cannot quantize infinite or NaN values. HINT: a non-finite gradient has to be skipped on all ranks"
            " before compression, or it would stay in the error feedback for ever."
        )
    nonzero = largest_values.clamp(min=torch.finfo(blocks.dtype).tiny)[:, None]
    return torch.linalg.vector_norm(blocks / nonzero, order, dim=1) * nonzero[:, 0]


def scales_from_norms(norms: Tensor, sizes: Tensor, scale: Scale) -> Tensor:
    """``||c||_2 / sqrt(size)`` or ``||c||_1 / size``; an empty (all dead) block has scale 0."""
    divisors = sizes.clamp(min=1).to(norms.dtype)
    return norms / (divisors.sqrt() if scale == "l2" else divisors)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack ``bool [numel]`` into ``uint8 [ceil(numel / 8)]``, least significant bit first."""
    weights = torch.tensor(BIT_WEIGHTS, dtype=torch.uint8, device=bits.device)
    padded = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (padded * weights).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """Inverse of :func:`pack_bits`: ``bool [numel]``."""
    weights = torch.tensor(BIT_WEIGHTS, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] & weights).ne(0).view(-1)[:numel]
