"""Where everything lies: blocks, chunks, buckets and bytes, as integers only.

Terms, from small to large:

block
    Up to ``block_size`` neighbouring elements of one parameter that share a scale. Only the last block of a
    parameter is short. A block starts on a byte of its own.
segment
    A run of whole blocks of one parameter, short enough to stay in cache while it is worked on.
chunk
    The blocks of a bucket that one rank averages for everybody. On a flat network rank r serves chunk r.
shard
    The chunks of a bucket that ranks with one local rank serve: each rank compresses its shard. On a flat network
    that is the bucket.
bucket
    The blocks that travel in one exchange.

One message carries one chunk. Its bytes, in this order::

    scales   float32 x blocks of the chunk, in block order
    signs    one bit per element, least significant bit first, each segment starting on a byte
    padding  zeros, so that all chunks of a bucket have ``chunk_nbytes`` bytes

Nothing here influences a result, only its place: every block is quantized by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_onebit.comm.topology import Topology

SCALE_NBYTES = 4
MESSAGE_ALIGNMENT = 8
SEGMENT_NUMEL = 262144
"""Elements per segment (1 MiB of float32): the working set stays in cache, the overhead of calls is amortized.

A worker step of 32M elements on one core with segments of 32768 / 65536 / 131072 / 262144 / 524288: 1.3 / 1.6 / 1.9 / 2.1 /
2.2 GB/s of gradient.
"""
CUDA_SEGMENT_NUMEL = 16777216
"""The same on a GPU (64 MiB), which keeps nothing in cache: here what counts is that a launch has enough to do."""


def num_blocks(numel: int, block_size: int) -> int:
    """Number of blocks in ``numel`` elements of one parameter."""
    return -(-numel // block_size)


def sign_nbytes(numel: int) -> int:
    """Bytes of the sign bits of ``numel`` elements."""
    return -(-numel // 8)


def encoded_nbytes(numel: int, block_size: int) -> int:
    """Bytes of ``numel`` elements of one parameter on the wire: signs and scales, without padding."""
    return sign_nbytes(numel) + SCALE_NBYTES * num_blocks(numel, block_size)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of whole blocks of one parameter inside one chunk. All fields count elements or bytes."""

    parameter: int
    """Index of the parameter, in the order given to :func:`plan_buckets`."""
    start: int
    """First element in the flattened parameter."""
    numel: int
    chunk: int
    """Place of the chunk in the message buffer; who serves it is a matter of topology."""
    offset: int
    """First element in the bucket."""
    blocks: int
    scales_offset: int
    """First byte of the scales in the bucket's ``world_size * chunk_nbytes`` message buffer."""
    signs_offset: int
    """First byte of the signs in the same buffer."""

    @property
    def scales_end(self) -> int:
        return self.scales_offset + SCALE_NBYTES * self.blocks

    @property
    def signs_end(self) -> int:
        return self.signs_offset + sign_nbytes(self.numel)


@dataclass(frozen=True, kw_only=True)
class BucketLayout:
    """Places of one bucket's elements in memory and of its blocks on the wire."""

    segments: tuple[Segment, ...]
    """In element order, hence also grouped by chunk."""
    numel: int
    world_size: int
    """Number of chunks."""
    chunk_nbytes: int
    """Bytes of one message, the same for every pair of ranks."""

    @property
    def message_nbytes(self) -> int:
        """Bytes of the messages of all chunks."""
        return self.world_size * self.chunk_nbytes

    def chunk(self, chunk: int) -> tuple[Segment, ...]:
        """Segments of one chunk; may be empty when there are fewer blocks than ranks."""
        return tuple(segment for segment in self.segments if segment.chunk == chunk)

    def shard(self, topology: Topology) -> tuple[Segment, ...]:
        """Segments of a rank's shard: all of them on a flat network."""
        return tuple(segment for segment in self.segments if segment.chunk in topology.shard)

    def shard_numel(self, topology: Topology) -> int:
        """Elements of a rank's shard."""
        return sum(segment.numel for segment in self.shard(topology))

    def shard_numels(self, topology: Topology) -> list[int]:
        """Elements of the shards of all ranks of a node, in their order."""
        return [self.shard_numel(replace(topology, local_rank=r)) for r in range(topology.local_world_size)]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Neighbouring elements of one parameter, starting at a block."""

    parameter: int
    start: int
    numel: int


def plan_buckets(
    numels: Sequence[int],
    *,
    block_size: int,
    world_size: int,
    bucket_numel: int,
    segment_numel: int = SEGMENT_NUMEL,
) -> list[BucketLayout]:
    """Cut parameters into buckets, chunks and segments.

    Args:
        numels: elements of each parameter, in the order in which they shall travel; zeros are allowed.
        block_size: elements per block, a multiple of 8.
        world_size: number of ranks.
        bucket_numel: most elements of one bucket, rounded down to whole blocks but at least one block.
        segment_numel: most elements of one segment, rounded down likewise.
    """
    if block_size <= 0 or block_size % 8:
        raise ValueError(f"Invalid block_size: {block_size}. Must be a positive multiple of 8.")
    segment_numel = max(block_size, segment_numel // block_size * block_size)
    return [
        _plan_bucket(runs, block_size, world_size, segment_numel) for runs in _fill_buckets(numels, block_size, bucket_numel)
    ]


def _fill_buckets(numels: Sequence[int], block_size: int, bucket_numel: int) -> list[list[_Run]]:
    """Distribute the parameters in order, splitting them only between blocks."""
    buckets: list[list[_Run]] = []
    room = 0
    for parameter, numel in enumerate(numels):
        start = 0
        while start < numel:
            remaining = numel - start
            take = min(remaining, room // block_size * block_size) if remaining > room else remaining
            if take == 0 or not buckets:
                buckets.append([])
                room = max(bucket_numel, block_size)
                continue
            buckets[-1].append(_Run(parameter=parameter, start=start, numel=take))
            start += take
            room -= take
    return buckets


def _plan_bucket(runs: list[_Run], block_size: int, world_size: int, segment_numel: int) -> BucketLayout:
    chunks = _split_chunks(runs, block_size, world_size)
    sizes = [sum(encoded_nbytes(run.numel, block_size) for run in chunk) for chunk in chunks]
    chunk_nbytes = -(-max(sizes) // MESSAGE_ALIGNMENT) * MESSAGE_ALIGNMENT

    segments: list[Segment] = []
    offset = 0
    for rank, chunk in enumerate(chunks):
        scales_offset = rank * chunk_nbytes
        signs_offset = scales_offset + SCALE_NBYTES * sum(num_blocks(run.numel, block_size) for run in chunk)
        for run in chunk:
            for start in range(run.start, run.start + run.numel, segment_numel):
                numel = min(segment_numel, run.start + run.numel - start)
                segment = Segment(
                    parameter=run.parameter,
                    start=start,
                    numel=numel,
                    chunk=rank,
                    offset=offset,
                    blocks=num_blocks(numel, block_size),
                    scales_offset=scales_offset,
                    signs_offset=signs_offset,
                )
                segments.append(segment)
                offset += numel
                scales_offset = segment.scales_end
                signs_offset = segment.signs_end
    return BucketLayout(segments=tuple(segments), numel=offset, world_size=world_size, chunk_nbytes=chunk_nbytes)


def _split_chunks(runs: list[_Run], block_size: int, world_size: int) -> list[list[_Run]]:
    """Give every rank neighbouring blocks that make about 1/world_size of the encoded bytes."""
    total = sum(encoded_nbytes(run.numel, block_size) for run in runs)
    chunks: list[list[_Run]] = [[] for _ in range(world_size)]
    rank = 0
    position = 0  # bytes before the next block
    for run in runs:
        start, end = run.start, run.start + run.numel
        while start < end:
            if rank == world_size - 1:
                take = end - start
            else:
                # A block belongs to the rank in whose share its middle byte lies.
                share_end = (rank + 1) * total / world_size
                block_nbytes = encoded_nbytes(min(block_size, end - start), block_size)
                fitting = int((share_end - position) / block_nbytes + 0.5)
                if fitting <= 0:
                    rank += 1
                    continue
                take = min(end - start, fitting * block_size)
            chunks[rank].append(_Run(parameter=run.parameter, start=start, numel=take))
            position += encoded_nbytes(take, block_size)
            start += take
    return chunks
