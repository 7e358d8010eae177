"""Blocks, chunks, buckets and bytes: integers only, so the properties are checked exactly on many layouts."""

from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_onebit.comm.topology import Topology
from lightning_onebit.quantize.layout import (
    BucketLayout,
    Segment,
    encoded_nbytes,
    num_blocks,
    plan_buckets,
    sign_nbytes,
)


class Case(NamedTuple):
    """Arguments of plan_buckets."""

    numels: list[int]
    block_size: int
    world_size: int
    bucket_numel: int
    segment_numel: int

    def plan(self) -> list[BucketLayout]:
        return plan_buckets(
            self.numels,
            block_size=self.block_size,
            world_size=self.world_size,
            bucket_numel=self.bucket_numel,
            segment_numel=self.segment_numel,
        )


numels = st.lists(st.one_of(st.sampled_from([0, 1, 7, 8, 9, 64]), st.integers(0, 3000)), max_size=12)
cases = st.builds(
    Case,
    numels=numels,
    block_size=st.sampled_from([8, 16, 64, 256]),
    world_size=st.integers(1, 5),
    bucket_numel=st.integers(1, 8000),
    segment_numel=st.integers(1, 1000),
)
on_many_layouts = settings(max_examples=60, deadline=None)


def segments_of(layouts: list[BucketLayout]) -> list[Segment]:
    return [segment for layout in layouts for segment in layout.segments]


def byte_ranges(segment: Segment, block_size: int) -> list[tuple[int, int]]:
    """Bytes of scales and of signs, from the numbers of elements rather than from the layout's own ends."""
    blocks = -(-segment.numel // block_size)
    return [
        (segment.scales_offset, segment.scales_offset + 4 * blocks),
        (segment.signs_offset, segment.signs_offset + -(-segment.numel // 8)),
    ]


def chunk_used_nbytes(layout: BucketLayout, block_size: int) -> list[int]:
    """Bytes of every chunk before padding."""
    return [sum(encoded_nbytes(s.numel, block_size) for s in layout.chunk(rank)) for rank in range(layout.world_size)]


@pytest.mark.parametrize(
    ("numel", "block_size", "blocks", "signs", "encoded"),
    [
        (0, 2048, 0, 0, 0),
        (1, 2048, 1, 1, 5),
        (8, 8, 1, 1, 5),
        (9, 8, 2, 2, 10),
        (64, 2048, 1, 8, 12),
        (2048, 2048, 1, 256, 260),
        (2049, 2048, 2, 257, 265),
        (16384, 16384, 1, 2048, 2052),
        (2**33, 2048, 2**22, 2**30, 2**30 + 2**24),
    ],
)
def test_integer_functions_on_known_sizes(numel, block_size, blocks, signs, encoded):
    assert num_blocks(numel, block_size) == blocks
    assert sign_nbytes(numel) == signs
    assert encoded_nbytes(numel, block_size) == encoded


@given(a=st.integers(0, 10**6), b=st.integers(0, 10**6), block_size=st.sampled_from([8, 64, 2048]))
def test_splitting_between_blocks_costs_no_bytes(a, b, block_size):
    whole = a // block_size * block_size
    assert encoded_nbytes(whole + b, block_size) == encoded_nbytes(whole, block_size) + encoded_nbytes(b, block_size)


@on_many_layouts
@given(cases)
def test_every_element_is_covered_once_and_in_order(case):
    covered = [(s.parameter, s.start, s.start + s.numel) for s in segments_of(case.plan())]
    expected_parameter_ends = dict.fromkeys(range(len(case.numels)), 0)
    assert covered == sorted(covered)
    for parameter, start, end in covered:
        assert start == expected_parameter_ends[parameter]
        assert end > start
        expected_parameter_ends[parameter] = end
    assert list(expected_parameter_ends.values()) == case.numels


@on_many_layouts
@given(cases)
def test_segments_are_runs_of_whole_blocks_of_one_parameter(case):
    for segment in segments_of(case.plan()):
        assert segment.start % case.block_size == 0
        reaches_the_end = segment.start + segment.numel == case.numels[segment.parameter]
        assert reaches_the_end or segment.numel % case.block_size == 0
        assert segment.blocks == -(-segment.numel // case.block_size)
        assert segment.numel <= max(case.block_size, case.segment_numel)


@on_many_layouts
@given(cases)
def test_offsets_lay_the_segments_end_to_end_in_the_bucket(case):
    for layout in case.plan():
        offset = 0
        for segment in layout.segments:
            assert segment.offset == offset
            offset += segment.numel
        assert layout.numel == offset > 0


@on_many_layouts
@given(cases)
def test_chunks_are_neighbouring_segments_in_rank_order(case):
    for layout in case.plan():
        chunks = [segment.chunk for segment in layout.segments]
        assert chunks == sorted(chunks)
        assert set(chunks) <= set(range(case.world_size))
        assert layout.world_size == case.world_size
        assert tuple(s for rank in range(case.world_size) for s in layout.chunk(rank)) == layout.segments


@on_many_layouts
@given(cases, st.integers(1, 4), st.integers(1, 4))
def test_shards_cut_the_bucket_in_the_order_of_local_ranks(case, num_nodes, local_world_size):
    """Any node cuts it alike, so the parts of one message to all its ranks lie side by side, and so do their answers."""
    for layout in case._replace(world_size=num_nodes * local_world_size).plan():
        for node in range(num_nodes):
            topologies = [
                Topology(num_nodes=num_nodes, node_rank=node, local_world_size=local_world_size, local_rank=local)
                for local in range(local_world_size)
            ]
            shards = [layout.shard(t) for t in topologies]
            assert tuple(segment for shard in shards for segment in shard) == layout.segments
            assert all(s.chunk in t.shard for shard, t in zip(shards, topologies, strict=True) for s in shard)
            numels = [sum(s.numel for s in shard) for shard in shards]
            assert [layout.shard_numel(t) for t in topologies] == numels
            assert all(layout.shard_numels(t) == numels for t in topologies)
            assert all(set(layout.chunk(t.chunk)) <= set(shard) for shard, t in zip(shards, topologies, strict=True))


@on_many_layouts
@given(cases)
def test_on_a_flat_network_the_shard_is_the_bucket(case):
    for layout in case.plan():
        for rank in range(case.world_size):
            topology = Topology(num_nodes=case.world_size, node_rank=rank)
            assert layout.shard(topology) == layout.segments
            assert layout.shard_numels(topology) == [layout.numel]


@on_many_layouts
@given(cases)
def test_byte_ranges_are_disjoint_and_inside_the_message_of_their_chunk(case):
    for layout in case.plan():
        ranges = []
        for segment in layout.segments:
            message_start = segment.chunk * layout.chunk_nbytes
            for start, end in byte_ranges(segment, case.block_size):
                assert message_start <= start < end <= message_start + layout.chunk_nbytes
                ranges.append((start, end))
            assert (segment.scales_end, segment.signs_end) == tuple(end for _, end in ranges[-2:])
        assert all(end <= next_start for (_, end), (next_start, _) in pairwise(sorted(ranges)))


@on_many_layouts
@given(cases)
def test_scales_are_aligned_and_precede_the_signs(case):
    for layout in case.plan():
        assert layout.chunk_nbytes % 4 == 0
        assert all(segment.scales_offset % 4 == 0 for segment in layout.segments)
        for rank in range(case.world_size):
            chunk = layout.chunk(rank)
            if chunk:
                assert chunk[0].scales_offset == rank * layout.chunk_nbytes
                assert max(s.scales_end for s in chunk) == min(s.signs_offset for s in chunk)


@on_many_layouts
@given(cases)
def test_the_largest_chunk_fills_its_message_up_to_alignment(case):
    for layout in case.plan():
        assert 0 <= layout.chunk_nbytes - max(chunk_used_nbytes(layout, case.block_size)) < 8
        assert layout.message_nbytes == case.world_size * layout.chunk_nbytes


@on_many_layouts
@given(cases)
def test_chunks_are_balanced_to_about_one_block(case):
    for layout in case.plan():
        used = chunk_used_nbytes(layout, case.block_size)
        assert max(used) <= sum(used) / case.world_size + encoded_nbytes(case.block_size, case.block_size)


@pytest.mark.parametrize("world_size", [2, 3, 4, 5])
def test_many_tiny_parameters_are_balanced_to_one_of_them(world_size):
    (layout,) = plan_buckets([64] * 2001, block_size=2048, world_size=world_size, bucket_numel=10**6)
    used = chunk_used_nbytes(layout, 2048)
    assert max(used) <= sum(used) / world_size + encoded_nbytes(64, 2048)
    assert min(used) >= sum(used) / world_size - encoded_nbytes(64, 2048)


def test_large_and_tiny_parameters_together_are_balanced():
    (layout,) = plan_buckets([64] * 1000 + [10**6] + [1] * 1000, block_size=2048, world_size=4, bucket_numel=10**7)
    used = chunk_used_nbytes(layout, 2048)
    assert max(used) <= sum(used) / 4 + encoded_nbytes(2048, 2048)


@on_many_layouts
@given(cases)
def test_buckets_are_no_larger_than_asked_and_as_full_as_blocks_allow(case):
    layouts = case.plan()
    capacity = max(case.bucket_numel, case.block_size)
    assert all(layout.numel <= capacity for layout in layouts)
    for layout, following in pairwise(layouts):
        next_block = min(case.block_size, following.segments[0].numel)
        assert layout.numel + next_block > capacity


@on_many_layouts
@given(cases, st.integers(1, 5), st.integers(1, 8000), st.integers(1, 1000))
def test_blocks_are_the_same_for_any_world_size_bucket_and_segment_size(case, world_size, bucket_numel, segment_numel):
    def blocks(layouts: list[BucketLayout]) -> list[tuple[int, int, int]]:
        return [
            (s.parameter, s.start + block * case.block_size, min(case.block_size, s.numel - block * case.block_size))
            for s in segments_of(layouts)
            for block in range(s.blocks)
        ]

    other = case._replace(world_size=world_size, bucket_numel=bucket_numel, segment_numel=segment_numel)
    assert blocks(case.plan()) == blocks(other.plan())


@pytest.mark.parametrize("numels", [[], [0], [0, 0, 0]])
def test_nothing_to_send_needs_no_bucket(numels):
    assert plan_buckets(numels, block_size=8, world_size=3, bucket_numel=100) == []


def test_empty_parameters_leave_no_trace_but_keep_the_numbering():
    layouts = plan_buckets([0, 5, 0, 0, 20, 0], block_size=8, world_size=2, bucket_numel=1000)
    assert {s.parameter for s in segments_of(layouts)} == {1, 4}
    assert all(s.numel for s in segments_of(layouts))


@pytest.mark.parametrize("world_size", [2, 3, 4, 5])
def test_with_fewer_blocks_than_ranks_some_chunks_are_empty(world_size):
    (layout,) = plan_buckets([8], block_size=8, world_size=world_size, bucket_numel=100)
    chunks = [layout.chunk(rank) for rank in range(world_size)]
    assert sum(chunk == () for chunk in chunks) == world_size - 1
    assert layout.chunk_nbytes == 8  # one scale, one byte of signs, three of padding
    assert layout.message_nbytes == world_size * 8


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_wire_cost_is_1_016_bits_per_element(world_size):
    numels = [50_257 * 768, 768, 768 * 2304, 2304, 768 * 768, 768, 768 * 3072, 3072, 3072 * 768, 768]
    layouts = plan_buckets(numels, block_size=2048, world_size=world_size, bucket_numel=25 * 2**20 // 4)
    bits_per_element = 8 * sum(layout.message_nbytes for layout in layouts) / sum(numels)
    assert bits_per_element == pytest.approx(1 + 32 / 2048, abs=5e-4)


@pytest.mark.parametrize("block_size", [0, -8, 7, 12, 2047])
def test_invalid_block_size_names_value_and_domain(block_size):
    with pytest.raises(ValueError, match=rf"{block_size}.*positive multiple of 8"):
        plan_buckets([100], block_size=block_size, world_size=2, bucket_numel=100)
