"""The memory in which the codec for CPUs works, and views of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_onebit.config import Scale
from lightning_onebit.quantize.layout import num_blocks, sign_nbytes
from lightning_onebit.quantize.reference import scale_divisors

# Eight bytes of value 0 or 1, read as one little-endian integer and multiplied by this, have their
# eight bits in the top byte, the first byte's bit lowest: sum over j of 2^(7 + 7j).
GATHER_BITS = np.uint64(0x0102040810204080)
TOP_BYTE = np.uint64(56)


class Memory:
    """Allocated once, for segments of up to ``numel`` elements of ``dtype``."""

    def __init__(self, numel: int, *, block_size: int, scale: Scale, dtype: torch.dtype) -> None:
        nbytes, blocks = sign_nbytes(numel), num_blocks(numel, block_size)
        self.block_size = block_size
        self.scale: Scale = scale
        self.reals = torch.empty(8 * nbytes, dtype=dtype)
        self.mask = torch.empty(8 * nbytes, dtype=dtype)
        self.bits = np.zeros(8 * nbytes, dtype=bool)
        self.words = np.empty(nbytes, dtype=np.uint64)
        self.norms = torch.empty(blocks, dtype=dtype)
        self.factors = torch.empty(blocks, dtype=dtype)
        self._cuts: dict[int, Workspace] = {}

    def cut(self, numel: int) -> Workspace:
        """For segments of ``numel`` elements. Kept, as making it takes longer than the whole work on 1000 elements."""
        workspace = self._cuts.get(numel)
        if workspace is None:
            workspace = self._cuts[numel] = Workspace(self, numel)
        return workspace


class Workspace:
    """The same memory for every segment of ``numel`` elements, seen as the calls of torch and numpy want to have it."""

    def __init__(self, memory: Memory, numel: int) -> None:
        nbytes, blocks = sign_nbytes(numel), num_blocks(numel, memory.block_size)
        self._block_size = memory.block_size
        self._rest = numel % memory.block_size
        self._whole = numel - self._rest

        self.reals = memory.reals[:numel]
        """Signs as +-1, or whatever is needed of the size of the segment."""
        self.reals_array = self.reals.numpy()
        self.real_rows = self.rows(self.reals)
        self.real_bytes = memory.reals[: 8 * nbytes].numpy().reshape(nbytes, 8)

        self.mask = memory.mask[:numel]
        """1 where an element is live, else 0."""
        self.mask_rows = self.rows(self.mask)
        self.mask_bytes = memory.mask[: 8 * nbytes].numpy().reshape(nbytes, 8)

        self.bits = memory.bits[:numel]
        self._padding = memory.bits[numel : 8 * nbytes]
        self._bits_by_eight = memory.bits[: 8 * nbytes].view(np.uint64)

        self._words = memory.words[:nbytes]
        self.indices = self._words.view(np.intp)
        """Bytes of packed bits, one in each word, as ``take`` wants them."""
        self.bytes = self._words.view(np.uint8)[::8]
        """The same memory."""

        norms, factors = memory.norms[:blocks], memory.factors[:blocks]
        self.norms, self.norm_parts = norms, self.split_blocks(norms)
        self.factors, self.factor_columns = factors.numpy(), self.split_blocks(factors[:, None])
        sizes = torch.full_like(norms, self._block_size)
        if self._rest:
            sizes[-1] = self._rest
        self.divisors = scale_divisors(sizes, memory.scale)
        """What norms are divided by where all elements are live."""

    def rows(self, values: Tensor) -> Sequence[Tensor]:
        """``values`` as ``[blocks, block_size]`` and the short last block as ``[1, rest]``, where there are any."""
        if not self._rest:
            return (values.view(-1, self._block_size),)
        if not self._whole:
            return (values.view(1, -1),)
        whole, rest = values.split_with_sizes((self._whole, self._rest))
        return whole.view(-1, self._block_size), rest.view(1, -1)

    def split_blocks(self, per_block: Tensor) -> Sequence[Tensor]:
        """``per_block [blocks, ...]`` in the parts of :meth:`rows`."""
        if not (self._rest and self._whole):
            return (per_block,)
        return per_block[:-1], per_block[-1:]

    def pack_bits(self) -> None:
        """Make :attr:`indices` of :attr:`bits`."""
        self._padding[:] = False
        np.multiply(self._bits_by_eight, GATHER_BITS, out=self._words)
        np.right_shift(self._words, TOP_BYTE, out=self._words)
