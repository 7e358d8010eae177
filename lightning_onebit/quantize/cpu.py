"""The sign quantizer for CPUs: vectorized passes over a segment that fits in cache, on memory allocated once.

Each pass is one torch or numpy call, whichever is faster: for 65536 elements of float32 on one core (Zen 4) from 3 us (in
place) to 24 us (square root). On a small segment the calls themselves are what counts, 0.3 us (numpy) to 2 us (torch with a
Python number): hence few of them, and views kept from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_onebit.config import Scale
from lightning_onebit.engine.momentum import LocalMomentum
from lightning_onebit.quantize.encoded import Encoded
from lightning_onebit.quantize.reference import ORDERS, ReferenceCodec, all_safe, block_scales, scale_divisors
from lightning_onebit.quantize.workspace import Memory, Workspace

BYTE_BITS = (np.arange(256)[:, None] >> np.arange(8)) & 1  # [256, 8]: the bits of each byte value


class CpuCodec(ReferenceCodec):
    """:class:`~lightning_onebit.quantize.reference.ReferenceCodec`, fast. Not thread-safe: it owns its workspace.

    Args:
        block_size: elements per block, a multiple of 8.
        scale: ``"l2"`` or ``"l1"``.
        max_numel: most elements of one call.
        dtype: dtype of values, float32 or float64.
    """

    name = "cpu"

    def __init__(self, *, block_size: int, scale: Scale = "l2", max_numel: int, dtype: torch.dtype) -> None:
        super().__init__(block_size=block_size, scale=scale)
        self._memory = Memory(max_numel, block_size=block_size, scale=scale, dtype=dtype)
        self._real = torch.empty(0, dtype=dtype).numpy().dtype
        self._signs_of_byte = np.where(BYTE_BITS, 1, -1).astype(self._real)
        self._mask_of_byte = BYTE_BITS.astype(self._real)

    @override
    def encode_(self, values: Tensor, encoded: Encoded) -> None:
        if values.numel() == 0:
            return
        work = self._memory.cut(values.numel())
        rows = work.rows(values)
        if encoded.live is None:
            self._measure_(encoded, rows, work.divisors, work)
            np.greater_equal(values.numpy(), 0, out=work.bits)
            work.pack_bits()
            encoded.signs_array[:] = work.indices
            np.negative(encoded.scales_array, out=work.factors)
            self._signs_of_byte.take(work.indices, axis=0, out=work.real_bytes, mode="clip")
        else:
            self._expand_mask(encoded.live, work)
            sizes = torch.cat([part.sum(dim=1) for part in work.mask_rows]).clamp_(min=1)
            counted = torch.mul(values, work.mask, out=work.reals)
            self._measure_(encoded, work.real_rows, scale_divisors(sizes, self.scale), work)
            # Dead elements, zero here, get a bit, which stays where there is a value.
            np.greater_equal(counted.numpy(), 0, out=work.bits)
            work.pack_bits()
            encoded.signs_array[:] = work.indices
            np.not_equal(values.numpy(), 0, out=work.bits)
            work.pack_bits()
            np.bitwise_or(work.bytes, encoded.live.numpy(), out=work.bytes)
            np.bitwise_and(work.bytes, encoded.signs_array, out=encoded.signs_array)
            self._load(encoded, -1.0, work)
        self._add_product_(rows, rows, work)

    @override
    def decode_(self, out: Tensor, encoded: Encoded, factor: float = 1.0) -> None:
        if out.numel() == 0:
            return
        work = self._memory.cut(out.numel())
        self._load(encoded, factor, work)
        for rows, signs, factors in zip(work.rows(out), work.real_rows, work.factor_columns, strict=True):
            torch.mul(signs, factors, out=rows)

    @override
    def add_decoded_(self, target: Tensor, encoded: Encoded, factor: float = 1.0) -> None:
        if target.numel() == 0:
            return
        work = self._memory.cut(target.numel())
        rows = work.rows(target)
        self._load(encoded, factor, work)
        self._add_product_(rows, rows, work)

    @override
    def _add_momentum_(self, out: Tensor, error: Tensor, previous: Encoded, momentum: LocalMomentum) -> None:
        work = self._memory.cut(out.numel())
        out_rows = work.rows(out)
        self._load(previous, momentum.decay, work)
        self._add_product_(out_rows, out_rows if out is error else work.rows(error), work)
        # As `momentum.add_gradient_`, whose calls cost more.
        term, array = work.reals, work.reals_array
        if momentum.second_moment is None:
            torch.clamp(momentum.gradient, -momentum.kappa, momentum.kappa, out=term)
        else:
            moment = momentum.second_moment
            np.sqrt(moment.numpy() if moment.dtype == term.dtype else term.copy_(moment).numpy(), out=array)
            np.add(array, momentum.eps, out=array)
            torch.div(momentum.gradient, term, out=term).clamp_(-momentum.kappa, momentum.kappa)
        np.multiply(array, momentum.weight, out=array)
        out.add_(term)

    @override
    def _add_mean_(self, out: Tensor, error: Tensor, received: Sequence[Encoded]) -> None:
        work = self._memory.cut(out.numel())
        out_rows = work.rows(out)
        rows = out_rows if out is error else work.rows(error)
        for each in received:
            self._load(each, 1 / len(received), work)
            self._add_product_(out_rows, rows, work)
            rows = out_rows

    def _load(self, encoded: Encoded, factor: float, work: Workspace) -> None:
        """Put signs and ``factor * scales`` into the workspace, such that the product of a dead element is -0.0."""
        np.multiply(encoded.scales_array, factor, out=work.factors, dtype=self._real)
        if encoded.live is None:
            # `take` would make a copy of this type itself, and allocate it.
            work.indices[:] = encoded.signs_array
            self._signs_of_byte.take(work.indices, axis=0, out=work.real_bytes, mode="clip")
        else:
            self._expand_mask(encoded.live, work)
            # Dead elements get the sign that, times the zero of the mask and the factor, gives -0.0.
            if factor < 0:
                np.invert(work.bytes, out=work.bytes)
                np.bitwise_or(work.bytes, encoded.signs_array, out=work.bytes)
            else:
                np.bitwise_and(work.bytes, encoded.signs_array, out=work.bytes)
            self._signs_of_byte.take(work.indices, axis=0, out=work.real_bytes, mode="clip")
            work.reals.mul_(work.mask)

    def _expand_mask(self, live: Tensor, work: Workspace) -> None:
        """Put 1 where an element is live and 0 elsewhere into the workspace, and the bytes of ``live``."""
        work.indices[:] = live.numpy()
        self._mask_of_byte.take(work.indices, axis=0, out=work.mask_bytes, mode="clip")

    def _add_product_(self, out_rows: Sequence[Tensor], rows: Sequence[Tensor], work: Workspace) -> None:
        """``out = rows + factors * signs``. The product is exact: it makes no difference whether it is rounded first."""
        for out, each, signs, factors in zip(out_rows, rows, work.real_rows, work.factor_columns, strict=True):
            torch.addcmul(each, signs, factors, out=out)

    def _measure_(self, encoded: Encoded, rows: Sequence[Tensor], divisors: Tensor, work: Workspace) -> None:
        """Scales of all blocks, of values that are 0 where they do not count."""
        for part, norms in zip(rows, work.norm_parts, strict=True):
            torch.linalg.vector_norm(part, ORDERS[self.scale], dim=1, out=norms)
        if all_safe(work.norms):
            torch.div(work.norms, divisors, out=encoded.scales)
        else:
            parts = zip(rows, work.split_blocks(divisors), strict=True)
            encoded.scales.copy_(torch.cat([block_scales(*part, self.scale) for part in parts]))
