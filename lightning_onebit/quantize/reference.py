"""The sign quantizer in plain torch, written to be read.

Every other codec does the same with other instructions: the bits are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_onebit.config import Scale
from lightning_onebit.engine.momentum import LocalMomentum
from lightning_onebit.quantize.encoded import Encoded

SMALLEST_SAFE_NORM, LARGEST_SAFE_NORM = 1e-15, 1e15
"""Between these a float32 norm loses nothing to under- or overflow of the squares."""

ORDERS: dict[Scale, int] = {"l2": 2, "l1": 1}

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

    All tensors are one-dimensional and contiguous: ``values``, ``out``, ``error`` and ``target`` float32 or float64
    ``[numel]``, where element 0 starts a block. Arguments that a method ends in an underscore for are written: ``values``,
    ``out``, ``error``, ``target``, and signs and scales of ``encoded``, ``sent`` and ``served``.

    **Whole steps.** The ``encode_...`` methods of worker and server leave the new error in ``out``, which is ``error``
    itself, unless the step may yet have to be taken back: then it is scratch, and the ``settle_...`` method computes the
    same error from the message that was sent. Both ways lead to the same bits.
    """

    name = "reference"

    def __init__(self, *, block_size: int, scale: Scale = "l2") -> None:
        self.block_size = block_size
        self.scale: Scale = scale

    def encode_(self, values: Tensor, encoded: Encoded) -> None:
        """Quantize ``values``, leaving the quantization error behind: ``values == q + error`` (to rounding).

        Args:
            values: what to send; overwritten by the error.
            encoded: receives signs and scales.

        Raises:
            FloatingPointError: if a value is not finite, or a scale is beyond float32. Nothing has been modified then.
        """
        numel = values.numel()
        if numel == 0:
            return
        signs, scales, live = encoded
        live_mask = torch.ones_like(values, dtype=torch.bool) if live is None else unpack_bits(live, numel)
        padding = (0, -numel % self.block_size)
        rows = torch.nn.functional.pad(values * live_mask, padding).view(-1, self.block_size)
        sizes = torch.nn.functional.pad(live_mask, padding).view(-1, self.block_size).sum(dim=1)
        divisors = scale_divisors(sizes.clamp(min=1).to(values.dtype), self.scale)
        scales.copy_(block_scales(rows, divisors, self.scale))
        signs.copy_(pack_bits(torch.where(live_mask, values >= 0, values != 0)))
        self.add_decoded_(values, encoded, -1.0)

    def decode_(self, out: Tensor, encoded: Encoded, factor: float = 1.0) -> None:
        """Write ``factor * q`` to ``out``; dead elements become -0.0, which added to anything leaves its bits alone."""
        signs, scales, live = encoded
        numel = out.numel()
        bits = unpack_bits(signs, numel)
        element_scales = (scales.to(out.dtype) * factor).repeat_interleave(self.block_size)[:numel]
        out.copy_(torch.where(bits, element_scales, -element_scales))
        if live is not None:
            out.masked_fill_(~unpack_bits(live, numel), -0.0)

    def add_decoded_(self, target: Tensor, encoded: Encoded, factor: float = 1.0) -> None:
        """Add ``factor * q`` to ``target``, the same bits as :meth:`decode_` and an addition."""
        decoded = torch.empty_like(target)
        self.decode_(decoded, encoded, factor)
        target.add_(decoded)

    def encode_momentum_(
        self, out: Tensor, error: Tensor, previous: Encoded, momentum: LocalMomentum, sent: Encoded
    ) -> None:
        """Steps 1 and 2, on a worker: quantize ``error + momentum`` into ``sent``; the new error goes to ``out``.

        Args:
            out: where the new error goes, ``error`` or scratch.
            error: the worker error.
            previous: u, the last average, with the elements that were live then.
            momentum: what is added to the error.
            sent: receives signs and scales.

        Raises:
            FloatingPointError: as :meth:`encode_`; ``out`` has been modified then.
        """
        self._add_momentum_(out, error, previous, momentum)
        self.encode_(out, sent)

    def settle_momentum_(self, error: Tensor, previous: Encoded, momentum: LocalMomentum, sent: Encoded) -> None:
        """The new worker error, in place, when :meth:`encode_momentum_` has already filled ``sent``."""
        self._add_momentum_(error, error, previous, momentum)
        self.add_decoded_(error, sent, -1.0)

    def encode_mean_(self, out: Tensor, error: Tensor, received: Sequence[Encoded], served: Encoded) -> None:
        """Step 4, on a server: quantize the mean of ``received`` plus ``error`` into ``served``.

        Args:
            out: where the new server error goes, ``error`` or scratch.
            error: the server error.
            received: one from each rank, in rank order, so that the result does not depend on who serves.
            served: receives signs and scales. Wake-up calls of all ranks are passed on.
        """
        self._add_mean_(out, error, received)
        self.encode_(out, served)
        if served.live is not None:
            for each in received:
                served.signs.bitwise_or_(each.signs & ~served.live)

    def settle_mean_(self, error: Tensor, received: Sequence[Encoded], served: Encoded) -> None:
        """The new server error, in place, when :meth:`encode_mean_` has already filled ``served``."""
        self._add_mean_(error, error, received)
        self.add_decoded_(error, served, -1.0)

    def _add_momentum_(self, out: Tensor, error: Tensor, previous: Encoded, momentum: LocalMomentum) -> None:
        if out is not error:
            out.copy_(error)
        self.add_decoded_(out, previous, momentum.decay)
        momentum.add_gradient_(out, workspace=torch.empty_like(out))

    def _add_mean_(self, out: Tensor, error: Tensor, received: Sequence[Encoded]) -> None:
        if out is not error:
            out.copy_(error)
        for each in received:
            self.add_decoded_(out, each, 1 / len(received))


def block_scales(rows: Tensor, divisors: Tensor, scale: Scale) -> Tensor:
    """Scale of each row of ``rows [rows, columns]``: ``||c||_2 / sqrt(size)`` or ``||c||_1 / size``.

    Each row by itself: one with values whose squares under- or overflow is computed in another way, and does not
    change the rounding of the others.

    Args:
        rows: the blocks, zero where an element does not count.
        divisors: :func:`scale_divisors`, ``[rows]``.
        scale: ``"l2"`` or ``"l1"``.

    Raises:
        FloatingPointError: if a value is not finite, or a scale is beyond float32.
    """
    order = ORDERS[scale]
    norms = torch.linalg.vector_norm(rows, order, dim=1)
    if all_safe(norms):
        return norms.div_(divisors)

    magnitudes = torch.linalg.vector_norm(rows, float("inf"), dim=1)
    unsafe = (magnitudes > 0) & ~((norms > SMALLEST_SAFE_NORM) & (norms < LARGEST_SAFE_NORM))
    result = norms / divisors
    for row in unsafe.nonzero().flatten().tolist():
        result[row] = torch.linalg.vector_norm(rows[row] / magnitudes[row], order) / divisors[row] * magnitudes[row]
    if not torch.isfinite(magnitudes).all() or not torch.isfinite(result.float()).all():
        raise FloatingPointError(
            "Cannot quantize infinite or NaN values, or values beyond float32. HINT: a non-finite gradient has to be skipped"
            " on all ranks before compression, or it would stay in the error feedback for ever."
        )
    return result


def scale_divisors(sizes: Tensor, scale: Scale) -> Tensor:
    """What the norms of blocks are divided by of whose elements ``sizes [blocks]`` count, at least 1."""
    return sizes.sqrt() if scale == "l2" else sizes


def all_safe(norms: Tensor) -> bool:
    """Whether none of the sums of squares has under- or overflowed; not so for a block of zeros either."""
    smallest, largest = torch.aminmax(norms)
    return float(smallest) > SMALLEST_SAFE_NORM and float(largest) < LARGEST_SAFE_NORM


def pack_bits(bits: Tensor) -> Tensor:
    """Pack ``bool [numel]`` into ``uint8 [ceil(numel / 8)]``, least significant bit first."""
    weights = torch.tensor(BIT_WEIGHTS, dtype=torch.uint8, device=bits.device)
    padded = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (padded * weights).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """Inverse of :func:`pack_bits`: ``bool [numel]``."""
    weights = torch.tensor(BIT_WEIGHTS, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] & weights).ne(0).view(-1)[:numel]
