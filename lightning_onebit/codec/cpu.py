"""The sign quantizer for CPUs: vectorized passes over a segment that fits in cache, on memory allocated once.

Each pass is one torch or numpy call of about 30 GB/s in cache; nothing of the size of the data is allocated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_onebit.codec.encoded import Encoded
from lightning_onebit.codec.layout import sign_nbytes
from lightning_onebit.codec.reference import ReferenceCodec, block_scales
from lightning_onebit.config import Scale

# Eight bytes of value 0 or 1, read as one little-endian integer and multiplied by this, have their
# eight bits in the top byte, the first byte's bit lowest: sum over j of 2^(7 + 7j).
GATHER_BITS = np.uint64(0x0102040810204080)
TOP_BYTE = slice(7, None, 8)

BYTE_BITS = (np.arange(256)[:, None] >> np.arange(8)) & 1  # [256, 8]: the bits of each byte value


class CpuCodec(ReferenceCodec):
    """:class:`~lightning_onebit.codec.reference.ReferenceCodec`, fast. Not thread-safe: it owns its workspace.

    Args:
        block_size: elements per block, a multiple of 8.
        scale: ``"l2"`` or ``"l1"``.
        max_numel: most elements of one call.
        dtype: dtype of values, float32 or float64.
    """

    name = "cpu"

    def __init__(self, *, block_size: int, scale: Scale = "l2", max_numel: int, dtype: torch.dtype) -> None:
        super().__init__(block_size=block_size, scale=scale)
        padded = sign_nbytes(max_numel) * 8
        real = torch.empty(0, dtype=dtype).numpy().dtype
        self._signs_of_byte = np.where(BYTE_BITS, 1, -1).astype(real)
        self._mask_of_byte = BYTE_BITS.astype(real)
        self._bytes = np.empty(padded // 8, dtype=np.intp)
        self._bits = np.zeros(padded, dtype=bool)
        self._words = np.empty(padded // 8, dtype=np.uint64)
        self._nonzero = np.empty(padded, dtype=bool)
        self._dead = np.empty(padded, dtype=bool)
        self._decoded = torch.empty(padded, dtype=dtype)
        self._mask = torch.empty(padded, dtype=dtype)
        self._sum = torch.empty(padded, dtype=dtype)

    @override
    def encode_(self, values: Tensor, encoded: Encoded) -> None:
        signs, scales, live = encoded
        numel = values.numel()
        if numel == 0:
            return
        array = values.numpy()
        bits = self._bits[: signs.numel() * 8]
        if live is None:
            scales.copy_(self._scales(values))
            np.greater_equal(array, 0, out=bits[:numel])
        else:
            mask = self._expand(self._mask_of_byte, live, self._mask)[:numel]
            counted = torch.mul(values, mask, out=self._decoded[:numel])
            scales.copy_(self._scales(counted, mask))
            np.greater_equal(array, 0, out=bits[:numel])
            dead = np.equal(mask.numpy(), 0, out=self._dead[:numel])
            np.copyto(bits[:numel], np.not_equal(array, 0, out=self._nonzero[:numel]), where=dead)
        bits[numel:] = False
        words = np.multiply(bits.view(np.uint64), GATHER_BITS, out=self._words[: signs.numel()])
        np.copyto(signs.numpy(), words.view(np.uint8)[TOP_BYTE])
        self.add_decoded_(values, encoded, -1.0)

    @override
    def decode_(self, out: Tensor, encoded: Encoded, factor: float = 1.0) -> None:
        signs, scales, live = encoded
        numel = out.numel()
        if numel == 0:
            return
        # A short last byte has no room in `out`: decode through the workspace then.
        target = out if numel % 8 == 0 else self._decoded
        decoded = self._expand(self._signs_of_byte, signs, target)[:numel]
        factors = (scales.to(self._decoded.dtype) * factor)[:, None]
        for rows, blocks in self._rows(decoded):
            rows.mul_(factors[blocks])
        if live is not None:
            mask = self._expand(self._mask_of_byte, live, self._mask)[:numel]
            dead = np.equal(mask.numpy(), 0, out=self._dead[:numel])
            decoded.masked_fill_(torch.from_numpy(dead), -0.0)
        if decoded.data_ptr() != out.data_ptr():
            out.copy_(decoded)

    @override
    def add_decoded_(self, target: Tensor, encoded: Encoded, factor: float = 1.0) -> None:
        signs, scales, live = encoded
        numel = target.numel()
        if numel == 0:
            return
        decoded = self._decoded[:numel]
        if live is not None:
            self.decode_(decoded, encoded, factor)
            target.add_(decoded)
            return
        self._expand(self._signs_of_byte, signs, self._decoded)
        factors = (scales.to(self._decoded.dtype) * factor)[:, None]
        for (rows, blocks), (sign_rows, _) in zip(self._rows(target), self._rows(decoded), strict=True):
            # The product is exact, so whether it is fused with the addition makes no difference.
            rows.addcmul_(sign_rows, factors[blocks])

    @override
    def _workspace(self, like: Tensor) -> Tensor:
        return self._decoded[: like.numel()]

    @override
    def _sum_workspace(self, like: Tensor) -> Tensor:
        return self._sum[: like.numel()]

    def _scales(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scales of all blocks; where ``mask`` is 0, ``values`` are 0 and do not count."""
        if mask is None:
            parts = [block_scales(rows, float(rows.shape[1]), self.scale) for rows, _ in self._rows(values)]
        else:
            parts = [
                block_scales(rows, mask_rows.sum(dim=1).clamp_(min=1), self.scale)
                for (rows, _), (mask_rows, _) in zip(self._rows(values), self._rows(mask), strict=True)
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rows(self, values: Tensor) -> list[tuple[Tensor, slice]]:
        """``values`` as ``[blocks, block_size]`` and the short last block as ``[1, rest]``, where there are any.

        Each with the slice that picks its blocks from a tensor with one entry per block.
        """
        numel, block_size = values.numel(), self.block_size
        blocks = numel // block_size
        whole = blocks * block_size
        if whole == numel:
            return [(values.view(blocks, block_size), slice(None))]
        tail = (values[None, whole:], slice(blocks, None))
        return [tail] if blocks == 0 else [(values[:whole].view(blocks, block_size), slice(blocks)), tail]

    def _expand(self, table: np.ndarray[Any, Any], packed: Tensor, out: Tensor) -> Tensor:
        """Replace every byte by its row of ``table [256, 8]``; returns the part of ``out`` that was written."""
        nbytes = packed.numel()
        # `take` would make a copy of this type itself, and allocate it.
        indices = self._bytes[:nbytes]
        np.copyto(indices, packed.numpy())
        table.take(indices, axis=0, out=out.numpy()[: nbytes * 8].reshape(nbytes, 8), mode="clip")
        return out[: nbytes * 8]
