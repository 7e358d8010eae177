"""The sign quantizer for CPUs: vectorized passes over a segment that fits in cache, on memory allocated once.

Each pass is one torch or numpy call of about 30 GB/s in cache; nothing of the size of the data is allocated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_onebit.codec.layout import sign_nbytes
from lightning_onebit.codec.reference import block_norms, scales_from_norms
from lightning_onebit.config import Scale

# Eight bytes of value 0 or 1, read as one little-endian integer and multiplied by this, have their
# eight bits in the top byte, the first byte's bit lowest: sum over j of 2^(7 + 7j).
GATHER_BITS = np.uint64(0x0102040810204080)
TOP_BYTE = slice(7, None, 8)

BYTE_BITS = (np.arange(256)[:, None] >> np.arange(8)) & 1  # [256, 8]: the bits of each byte value


class CpuCodec:
    """:class:`~lightning_onebit.codec.reference.ReferenceCodec`, fast. Not thread-safe: it owns its workspace.

    Args:
        block_size: elements per block, a multiple of 8.
        scale: ``"l2"`` or ``"l1"``.
        max_numel: most elements of one call.
        dtype: dtype of values, float32 or float64.
    """

    name = "cpu"

    def __init__(self, *, block_size: int, scale: Scale = "l2", max_numel: int, dtype: torch.dtype) -> None:
        self.block_size = block_size
        self.scale: Scale = scale
        padded = sign_nbytes(max_numel) * 8
        real = torch.empty(0, dtype=dtype).numpy().dtype
        self._signs_of_byte = np.where(BYTE_BITS, 1, -1).astype(real)
        self._mask_of_byte = BYTE_BITS.astype(real)
        self._bits = np.zeros(padded, dtype=bool)
        self._bit_words = self._bits.view(np.uint64)
        self._words = np.empty_like(self._bit_words)
        self._quantized = torch.empty(padded, dtype=dtype)
        self._mask = torch.empty(padded, dtype=dtype)

    def encode_(self, values: Tensor, signs: Tensor, scales: Tensor, live: Tensor | None = None) -> None:
        """See :meth:`ReferenceCodec.encode_`."""
        numel = values.numel()
        if numel == 0:
            return
        quantized = self._quantized[:numel]
        if live is None:
            scales.copy_(self._block_scales(values, None))
        else:
            mask = self._expand(self._mask_of_byte, live, self._mask)[:numel]
            scales.copy_(self._block_scales(torch.mul(values, mask, out=quantized), mask))

        bits = self._bits[: sign_nbytes(numel) * 8]
        bits[numel:] = False
        np.greater_equal(values.numpy(), 0, out=bits[:numel])
        if live is not None:
            np.copyto(bits[:numel], values.numpy() != 0, where=mask.numpy() == 0)
        words = self._words[: signs.numel()]
        np.multiply(self._bit_words[: signs.numel()], GATHER_BITS, out=words)
        np.copyto(signs.numpy(), words.view(np.uint8)[TOP_BYTE])

        self.decode_(quantized, signs, scales, live=live)
        values.sub_(quantized)

    def decode_(self, out: Tensor, signs: Tensor, scales: Tensor, factor: float = 1.0, live: Tensor | None = None) -> None:
        """See :meth:`ReferenceCodec.decode_`."""
        numel = out.numel()
        # A short last byte has no room in `out`: decode through the workspace then.
        target = out if numel % 8 == 0 else self._quantized
        decoded = self._expand(self._signs_of_byte, signs, target)[:numel]
        factors = scales.to(out.dtype) * factor
        for rows, row_factors in zip(self._rows(decoded), self._split(factors, numel), strict=True):
            rows.mul_(row_factors[:, None])
        if live is not None:
            decoded.masked_fill_(self._expand(self._mask_of_byte, live, self._mask)[:numel] == 0, -0.0)
        if decoded.data_ptr() != out.data_ptr():
            out.copy_(decoded)

    def _block_scales(self, values: Tensor, mask: Tensor | None) -> Tensor:
        """Scales of all blocks; ``mask`` is 1 where an element counts, and ``values`` 0 where it does not."""
        rows = self._rows(values)
        if mask is None:
            sizes = [row.new_full((row.shape[0],), row.shape[1]) for row in rows]
        else:
            sizes = [row.sum(dim=1) for row in self._rows(mask)]
        return torch.cat(
            [
                scales_from_norms(block_norms(row, self.scale), size, self.scale)
                for row, size in zip(rows, sizes, strict=True)
            ]
        )

    def _rows(self, values: Tensor) -> list[Tensor]:
        """``values`` as ``[blocks, block_size]`` and the short last block as ``[1, rest]``, where there are any."""
        whole = values.numel() // self.block_size * self.block_size
        rows = values[:whole].view(-1, self.block_size), values[None, whole:]
        return [row for row in rows if row.numel()]

    def _split(self, per_block: Tensor, numel: int) -> list[Tensor]:
        """Cut a tensor with one entry per block as :meth:`_rows` cuts the values."""
        whole = numel // self.block_size
        return [part for part in (per_block[:whole], per_block[whole:]) if part.numel()]

    @staticmethod
    def _expand(table: np.ndarray[Any, Any], packed: Tensor, out: Tensor) -> Tensor:
        """Replace every byte by its row of ``table [256, 8]``; returns the part of ``out`` that was written."""
        numel = packed.numel() * 8
        np.take(table, packed.numpy(), axis=0, out=out.numpy()[:numel].reshape(-1, 8), mode="clip")
        return out[:numel]
