"""Where everything lies: blocks, chunks, buckets and bytes, as integers only.

Terms, from small to large:

block
    Up to ``block_size`` neighbouring elements of one parameter that share a scale. Only the last block of a
    parameter is short.
span
    Neighbouring blocks of one chunk that a CPU works on in one call: of one large parameter, or of several small ones.
chunk
    The blocks of a bucket that one rank averages for everybody. On a flat network rank r serves chunk r.
share
    The chunks of a bucket that ranks with one local rank serve: each rank compresses its share. On a flat network
    that is the bucket.
bucket
    The blocks that travel in one exchange.

**Memory.** Everything that belongs to a bucket (errors, D, bits) lies flat, block after block, each block from a multiple of
8 elements on. Up to 7 elements of padding after a block are zero in memory, and no part of the block.

**Wire.** One message carries one chunk. Its bytes, in this order::

    scales    float32 x blocks of the chunk, in block order
    elements  signs: one bit per element, in the order of memory, least significant bit first; 0 for padding
              codes of the second moment: one byte per element, in the order of memory; 0 for padding
    padding   so that all chunks of a bucket have ``chunk_nbytes`` bytes

Nothing here influences a result, only its place: every block is quantized by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

SCALE_NBYTES = 4
MESSAGE_ALIGNMENT = 8
BITS_PER_BYTE = 8
SPAN_NUMEL = 262144
"""Most elements of a span (1 MiB of float32): the working set stays in cache, the overhead of calls is amortized.

A worker step of 32M elements on one core with spans of 32768 / 65536 / 131072 / 262144 / 524288: 1.3 / 1.6 / 1.9 / 2.1 /
2.2 GB/s of gradient.
"""
SMALL_NUMEL = 16384
"""Parameters of up to so many elements share spans: alone, the calls would take longer than the work."""

Integers = NDArray[np.int64]


def num_blocks(numel: int, block_size: int) -> int:
    """Number of blocks in ``numel`` elements of one parameter."""
    return -(-numel // block_size)


def sign_nbytes(numel: int) -> int:
    """Bytes of the sign bits of ``numel`` elements."""
    return -(-numel // BITS_PER_BYTE)


@dataclass(frozen=True)
class Span:
    """Blocks ``[first, last)`` of a bucket, all of one chunk."""

    first: int
    last: int
    parameters: tuple[int, ...]
    """Whose blocks they are, in order."""
    is_packed: bool
    """Whether its parameters are small: then a block's scale is computed in the way that suits those."""


@dataclass(frozen=True, eq=False)
class Wire:
    """Places of one bucket's blocks in the messages of all its chunks, one message after the other."""

    bits_per_element: int
    chunk_nbytes: int
    """Bytes of one message, the same for every pair of ranks."""
    message_nbytes: int
    """Bytes of the messages of all chunks."""
    scale_byte: Integers
    """First byte of each block's scale, ``[blocks]``."""
    element_byte: Integers
    """First byte of each block's elements, ``[blocks]``."""

    def element_nbytes(self, flat_numel: int) -> int:
        """Bytes of ``flat_numel`` elements of memory, padding included: a multiple of 8."""
        return flat_numel * self.bits_per_element // BITS_PER_BYTE


@dataclass(frozen=True, eq=False)
class BucketLayout:
    """Places of one bucket's blocks. Arrays are int64, ``[blocks]`` unless said otherwise."""

    block_size: int
    parameter: Integers
    """Index of the block's parameter, in the order given to :func:`plan_buckets`."""
    start: Integers
    """First element in the flattened parameter."""
    numel: Integers
    """Elements, without padding."""
    offset: Integers
    """First element in flat memory, ``[blocks + 1]``: the last one is the end of memory."""
    first_block: Integers
    """First block of each chunk, ``[chunks + 1]``. A chunk may be empty, where there are fewer blocks than ranks."""

    @property
    def num_blocks(self) -> int:
        return len(self.parameter)

    @property
    def num_chunks(self) -> int:
        return len(self.first_block) - 1

    @property
    def flat_numel(self) -> int:
        """Elements of the bucket's memory, padding included."""
        return int(self.offset[-1])

    @cached_property
    def signs(self) -> Wire:
        """How signs travel."""
        return self._wire(bits_per_element=1)

    @cached_property
    def codes(self) -> Wire:
        """How codes of the second moment travel."""
        return self._wire(bits_per_element=BITS_PER_BYTE)

    def _wire(self, *, bits_per_element: int) -> Wire:
        blocks = np.diff(self.first_block)
        first_byte = self.offset * bits_per_element // BITS_PER_BYTE
        used = SCALE_NBYTES * blocks + np.diff(first_byte[self.first_block])
        chunk_nbytes = -(-int(used.max()) // MESSAGE_ALIGNMENT) * MESSAGE_ALIGNMENT
        chunk = np.repeat(np.arange(self.num_chunks), blocks)
        first_block = self.first_block[chunk]
        return Wire(
            bits_per_element=bits_per_element,
            chunk_nbytes=chunk_nbytes,
            message_nbytes=self.num_chunks * chunk_nbytes,
            scale_byte=chunk * chunk_nbytes + SCALE_NBYTES * (np.arange(self.num_blocks) - first_block),
            element_byte=chunk * chunk_nbytes + SCALE_NBYTES * blocks[chunk] + first_byte[:-1] - first_byte[first_block],
        )

    def exists(self, blocks: tuple[int, int] | None = None) -> NDArray[np.bool_]:
        """Which elements of blocks [first, last), or of all flat memory, are no padding."""
        first, last = blocks or (0, self.num_blocks)
        start, stops = self.offset[first], self.offset[first:last] + self.numel[first:last]
        exists = np.ones(int(self.offset[last] - start), dtype=bool)
        for block in np.flatnonzero(stops < self.offset[first + 1 : last + 1]).tolist():  # few: the last of a parameter
            exists[stops[block] - start : self.offset[first + block + 1] - start] = False
        return exists

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of one message of signs."""
        return self.signs.chunk_nbytes

    @property
    def message_nbytes(self) -> int:
        """Bytes of the messages of signs of all chunks."""
        return self.signs.message_nbytes

    @property
    def scale_byte(self) -> Integers:
        """First byte of each block's scale among those."""
        return self.signs.scale_byte

    @property
    def sign_byte(self) -> Integers:
        """First byte of each block's signs among those."""
        return self.signs.element_byte

    def blocks_of(self, chunks: range) -> tuple[int, int]:
        """First block of neighbouring chunks, and the one after their last."""
        return int(self.first_block[chunks.start]), int(self.first_block[chunks.stop])

    def flat_of(self, chunks: range) -> tuple[int, int]:
        """First element of neighbouring chunks in flat memory, and the one after their last."""
        first, last = self.blocks_of(chunks)
        return int(self.offset[first]), int(self.offset[last])

    def flat_numel_of(self, chunks: range) -> int:
        """Elements of neighbouring chunks in flat memory."""
        start, stop = self.flat_of(chunks)
        return stop - start

    def parameter_blocks(self) -> list[tuple[int, int, int]]:
        """Neighbouring blocks of one parameter in one chunk: the parameter, the first block, the one after the last."""
        if not self.num_blocks:
            return []
        changes = np.flatnonzero(np.diff(self.parameter)) + 1
        bounds = np.unique(np.concatenate([[0], changes, self.first_block, [self.num_blocks]])).tolist()
        return [(int(self.parameter[first]), first, last) for first, last in pairwise(bounds)]

    def spans(self, chunks: range, parameter_numels: Sequence[int]) -> list[Span]:
        """The blocks of ``chunks`` in spans.

        A large parameter has spans of its own. Small ones share spans with small neighbours.

        Args:
            chunks: neighbouring chunks.
            parameter_numels: elements of each parameter.
        """
        most_blocks = max(1, SPAN_NUMEL // self.block_size)
        spans: list[Span] = []
        for chunk in chunks:
            first, last = (int(block) for block in self.first_block[chunk : chunk + 2])
            while first < last:
                p = int(self.parameter[first])
                packed = parameter_numels[p] <= SMALL_NUMEL
                end = first
                while end < last and (packed or end - first < most_blocks):
                    q = int(self.parameter[end])
                    fits = parameter_numels[q] <= SMALL_NUMEL and self.offset[end + 1] - self.offset[first] <= SPAN_NUMEL
                    if q != p and not (packed and fits):
                        break
                    end += 1
                members = tuple(dict.fromkeys(self.parameter[first:end].tolist()))
                spans.append(Span(first, end, members, packed))
                first = end
        return spans


def plan_buckets(numels: Sequence[int], *, block_size: int, num_chunks: int, bucket_numel: int) -> list[BucketLayout]:
    """Cut parameters into buckets, chunks and blocks.

    Args:
        numels: elements of each parameter, in the order in which they shall travel; zeros are allowed.
        block_size: elements per block, a multiple of 8.
        num_chunks: number of ranks that serve.
        bucket_numel: most elements of one bucket, rounded down to whole blocks but at least one block.
    """
    if block_size <= 0 or block_size % BITS_PER_BYTE:
        raise ValueError(f"Invalid block_size: {block_size}. Must be a positive multiple of {BITS_PER_BYTE}.")
    blocks = [num_blocks(numel, block_size) for numel in numels]
    parameter = np.repeat(np.arange(len(numels), dtype=np.int64), blocks)
    start = np.concatenate([np.arange(count, dtype=np.int64) * block_size for count in blocks] or [np.zeros(0, np.int64)])
    numel = np.minimum(np.asarray(numels, dtype=np.int64)[parameter] - start, block_size) if len(start) else start

    layouts, first = [], 0
    ends = np.cumsum(numel)
    while first < len(start):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + bucket_numel, side="right")))
        chosen = slice(first, last)
        layouts.append(_plan_bucket(parameter[chosen], start[chosen], numel[chosen], block_size, num_chunks))
        first = last
    return layouts


def _plan_bucket(parameter: Integers, start: Integers, numel: Integers, block_size: int, num_chunks: int) -> BucketLayout:
    padded = -(-numel // BITS_PER_BYTE) * BITS_PER_BYTE
    offset = np.concatenate([[0], np.cumsum(padded)])
    # Every rank gets neighbouring blocks that make about 1 / num_chunks of the bytes: that of the block's middle byte.
    nbytes = padded // BITS_PER_BYTE + SCALE_NBYTES
    middle = np.cumsum(nbytes) - nbytes / 2
    shares = np.arange(num_chunks + 1) * (nbytes.sum() / num_chunks)
    first_block = np.searchsorted(middle, shares)
    first_block[0], first_block[-1] = 0, len(numel)
    return BucketLayout(
        block_size=block_size,
        parameter=parameter,
        start=start,
        numel=numel,
        offset=offset,
        first_block=first_block,
    )
