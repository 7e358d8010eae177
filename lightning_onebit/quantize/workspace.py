"""The memory in which the kernels for CPUs work, and views of it for spans of every shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_onebit.config import Scale
from lightning_onebit.quantize.layout import BITS_PER_BYTE, sign_nbytes

# Eight bytes of value 0 or 1, read as one little-endian integer and multiplied by this, have their
# eight bits in the top byte, the first byte's bit lowest: sum over j of 2^(7 + 7j).
GATHER_BITS = np.uint64(0x0102040810204080)
TOP_BYTE = np.uint64(56)

BITS_OF_BYTE = (np.arange(256)[:, None] >> np.arange(8)) & 1
"""``[256, 8]``: the bits of each value of a byte, least significant first."""
MASKS_OF_BYTE = {dtype: np.negative(BITS_OF_BYTE).astype(dtype) for dtype in (np.dtype(np.int32), np.dtype(np.int64))}
"""The same with all bits of an integer set, or none."""


@dataclass(frozen=True)
class SpanShape:
    """Blocks that are worked on in one call, as sizes only: spans of one shape share their views of the workspace."""

    block_size: int
    numel: int
    """Elements in flat memory: without the padding of the last block, if the span is not packed."""
    numels: tuple[int, ...] | None
    """Of a packed span, the elements of each block; ``None``: all blocks are whole, but perhaps the last."""

    @property
    def num_blocks(self) -> int:
        return -(-self.numel // self.block_size) if self.numels is None else len(self.numels)

    @cached_property
    def elements_of_block(self) -> NDArray[np.intp]:
        """Of each block, its elements in the span: in a packed one, with padding."""
        if self.numels is not None:
            return np.array([BITS_PER_BYTE * sign_nbytes(numel) for numel in self.numels], dtype=np.intp)
        sizes = np.full(self.num_blocks, self.block_size, dtype=np.intp)
        sizes[-1] = self.numel - (len(sizes) - 1) * self.block_size
        return sizes

    @cached_property
    def block_starts(self) -> NDArray[np.intp]:
        """First element of each block in the span."""
        return np.cumsum(self.elements_of_block) - self.elements_of_block

    @cached_property
    def gaps(self) -> NDArray[np.intp]:
        """Of a packed span, places of the padding."""
        assert self.numels is not None
        inside = np.zeros(self.numel, dtype=bool)
        for start, numel in zip(self.block_starts, self.numels, strict=True):
            inside[start : start + numel] = True
        return np.flatnonzero(~inside)

    @cached_property
    def inside(self) -> Tensor:
        """uint8 ``[bytes]``: bit set where there is an element, and no padding."""
        bits = np.ones(self.numel, dtype=bool)
        if self.numels is not None:
            bits[self.gaps] = False
        return torch.from_numpy(np.packbits(bits, bitorder="little"))


class Memory:
    """Allocated once, for spans of up to ``numel`` elements and ``blocks`` blocks, of ``dtype``."""

    def __init__(self, numel: int, blocks: int, *, scale: Scale, dtype: torch.dtype) -> None:
        nbytes = sign_nbytes(numel)
        self.scale: Scale = scale
        self.reals = torch.empty(8 * nbytes, dtype=dtype)
        self.mask = torch.empty(8 * nbytes, dtype=torch.int32 if dtype == torch.float32 else torch.int64)
        self.values = torch.empty(8 * nbytes, dtype=dtype)
        """For the caller: a gradient, a move."""
        self.out = torch.empty(8 * nbytes, dtype=dtype)
        """Likewise: an error that must not be written yet."""
        self.ints = self.reals.view(torch.int32) if dtype == torch.float32 else torch.empty(8 * nbytes, dtype=torch.int32)
        self.bits = np.zeros(8 * nbytes, dtype=bool)
        self.words = np.empty(nbytes, dtype=np.uint64)
        self.norms = torch.empty(blocks, dtype=dtype)
        self.factors = torch.empty(blocks, dtype=dtype)
        self.lowest = torch.empty(blocks, dtype=torch.int32)
        self.masked: NDArray[np.uint8] | None = None
        """The bits of which :attr:`mask` is."""
        self._views: dict[SpanShape, Workspace] = {}

    def cut(self, shape: SpanShape) -> Workspace:
        """Views for spans of ``shape``. Kept, as making them takes longer than the whole work on 1000 elements."""
        workspace = self._views.get(shape)
        if workspace is None:
            workspace = self._views[shape] = Workspace(self, shape)
        return workspace


class Workspace:
    """The same memory for every span of one shape, seen as the calls of torch and numpy want to have it."""

    def __init__(self, memory: Memory, shape: SpanShape) -> None:
        numel, blocks = shape.numel, shape.num_blocks
        nbytes = sign_nbytes(numel)
        self.shape, self._memory = shape, memory
        self._rest = numel % shape.block_size
        self._whole = numel - self._rest

        self.reals = memory.reals[:numel]
        """Signs as +-1, or whatever is needed of the size of the span."""
        self.reals_array = self.reals.numpy()
        self.real_bytes = memory.reals[: 8 * nbytes].numpy().reshape(nbytes, 8)
        self.mask = memory.mask[:numel]
        """Integers of the size of reals: all bits set where an element is live, else none."""
        self._mask_array = self.mask.numpy()
        self._mask_by_eight = memory.mask[: 8 * nbytes].numpy().reshape(nbytes, 8)
        self._reals_as_integers = self.reals_array.view(self._mask_array.dtype)
        self.values, self.out = memory.values[:numel], memory.out[:numel]
        self.out_array = self.out.numpy()
        self.ints = memory.ints[:numel]
        """int32; where reals are float32, the same memory."""
        self.ints_array = self.ints.numpy()
        self.floats = self.ints.view(torch.float32)
        """The same memory."""

        self.bits = memory.bits[:numel]
        self._padding = memory.bits[numel : 8 * nbytes]
        self._bits_by_eight = memory.bits[: 8 * nbytes].view(np.uint64)
        self._words = memory.words[:nbytes]
        self.indices = self._words.view(np.intp)
        """Bytes of packed bits, one in each word, as ``take`` wants them."""
        self.bytes = self._words.view(np.uint8)[::8]
        """The same memory."""

        self.norms = memory.norms[:blocks]
        self.norms_array = self.norms.numpy()
        factors, lowest = memory.factors[:blocks], memory.lowest[:blocks]
        self.factors = factors.numpy()
        self.lowest = lowest.numpy()
        """int32 ``[blocks]``: the bits of the smallest number that a block's codes of D can say."""
        if shape.numels is None:
            self.real_rows, self.int_rows = self.rows(self.reals), self.rows(self.ints)
            self.norm_parts, self.factor_columns = self.split_blocks(self.norms), self.split_blocks(factors[:, None])
            self.lowest_columns = self.split_blocks(lowest[:, None])
            sizes = torch.full_like(self.norms, shape.block_size)
            if self._rest:
                sizes[-1] = self._rest
        else:
            sizes = torch.tensor(shape.numels).to(self.norms)
        self.divisors = scale_divisors(sizes, memory.scale).numpy()
        """What norms are divided by where all elements are live."""

    def rows(self, values: Tensor) -> Sequence[Tensor]:
        """``values`` as ``[blocks, block_size]`` and the short last block as ``[1, rest]``, where there are any."""
        if not self._rest:
            return (values.view(-1, self.shape.block_size),)
        if not self._whole:
            return (values.view(1, -1),)
        whole, rest = values.split_with_sizes((self._whole, self._rest))
        return whole.view(-1, self.shape.block_size), rest.view(1, -1)

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

    def expand_mask(self, live: NDArray[np.uint8]) -> None:
        """Make :attr:`mask` of bits, unless it is that of this very array. Overwrites :attr:`indices`."""
        if self._memory.masked is not live:
            self.indices[:] = live
            MASKS_OF_BYTE[self._mask_array.dtype].take(self.indices, axis=0, out=self._mask_by_eight, mode="clip")
            self._memory.masked = live

    def put_live(self, values: Tensor, live: NDArray[np.uint8]) -> Tensor:
        """Put ``values`` into :attr:`reals`; where an element is not live, 0.0, also for NaN."""
        self.expand_mask(live)
        np.bitwise_and(values.numpy().view(self._mask_array.dtype), self._mask_array, out=self._reals_as_integers)
        return self.reals


def scale_divisors(sizes: Tensor, scale: Scale) -> Tensor:
    """What the norms of blocks are divided by of whose elements ``sizes [blocks]`` count, at least 1."""
    return sizes.sqrt() if scale == "l2" else sizes
