"""Blocks, chunks, buckets and bytes: integers only, so the properties are checked exactly on many layouts."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_onebit.comm.topology import Topology
from lightning_onebit.quantize.layout import (
    SCALE_NBYTES,
    SMALL_NUMEL,
    SPAN_NUMEL,
    BucketLayout,
    num_blocks,
    plan_buckets,
    sign_nbytes,
)


class Case(NamedTuple):
    """Arguments of plan_buckets."""

    numels: list[int]
    block_size: int
    num_chunks: int
    bucket_numel: int

    def plan(self) -> list[BucketLayout]:
        return plan_buckets(
            self.numels, block_size=self.block_size, num_chunks=self.num_chunks, bucket_numel=self.bucket_numel
        )


class Block(NamedTuple):
    parameter: int
    start: int
    numel: int


numels = st.lists(st.one_of(st.sampled_from([0, 1, 7, 8, 9, 64]), st.integers(0, 3000)), max_size=12)
cases = st.builds(
    Case,
    numels=numels,
    block_size=st.sampled_from([8, 16, 64, 256]),
    num_chunks=st.integers(1, 5),
    bucket_numel=st.integers(1, 8000),
)
on_many_layouts = settings(max_examples=60, deadline=None)


def blocks_of(*layouts: BucketLayout) -> list[Block]:
    return [
        Block(*(int(number) for number in block))
        for layout in layouts
        for block in zip(layout.parameter, layout.start, layout.numel, strict=True)
    ]


def blocks_of_chunk(layout: BucketLayout, chunk: int) -> range:
    return range(*layout.blocks_of(range(chunk, chunk + 1)))


def encoded_nbytes(numel: int, block_size: int) -> int:
    """Signs and scales of one parameter in messages, without padding."""
    return sign_nbytes(numel) + SCALE_NBYTES * num_blocks(numel, block_size)


def padded(numel: int) -> int:
    return -(-numel // 8) * 8


def nbytes_of_chunks(layout: BucketLayout) -> list[int]:
    """Bytes of every chunk before padding at its end."""
    return [
        sum(4 + -(-int(layout.numel[block]) // 8) for block in blocks_of_chunk(layout, chunk))
        for chunk in range(layout.num_chunks)
    ]


@pytest.mark.parametrize(
    ("numel", "block_size", "blocks", "signs"),
    [
        (0, 2048, 0, 0),
        (1, 2048, 1, 1),
        (8, 8, 1, 1),
        (9, 8, 2, 2),
        (64, 2048, 1, 8),
        (2048, 2048, 1, 256),
        (2049, 2048, 2, 257),
        (16384, 16384, 1, 2048),
        (2**33, 2048, 2**22, 2**30),
    ],
)
def test_integer_functions_on_known_sizes(numel, block_size, blocks, signs):
    assert num_blocks(numel, block_size) == blocks
    assert sign_nbytes(numel) == signs


@on_many_layouts
@given(cases)
def test_every_element_is_in_exactly_one_block_and_in_order(case):
    expected = [
        Block(p, start, min(case.block_size, numel - start))
        for p, numel in enumerate(case.numels)
        for start in range(0, numel, case.block_size)
    ]
    assert blocks_of(*case.plan()) == expected


@on_many_layouts
@given(cases, st.integers(1, 5), st.integers(1, 8000))
def test_blocks_are_the_same_for_any_number_of_ranks_and_size_of_buckets(case, num_chunks, bucket_numel):
    other = case._replace(num_chunks=num_chunks, bucket_numel=bucket_numel)
    assert blocks_of(*case.plan()) == blocks_of(*other.plan())


@on_many_layouts
@given(cases)
def test_memory_holds_the_blocks_end_to_end_with_padding_only_after_the_last_of_a_parameter(case):
    for layout in case.plan():
        place, exists = 0, []
        for block, offset in zip(blocks_of(layout), layout.offset, strict=False):
            assert offset == place
            assert offset % 8 == 0
            gap = padded(block.numel) - block.numel
            assert not gap or block.start + block.numel == case.numels[block.parameter]
            exists += [True] * block.numel + [False] * gap
            place += padded(block.numel)
        assert layout.flat_numel == layout.offset[-1] == place > 0
        assert layout.exists().tolist() == exists


@on_many_layouts
@given(cases)
def test_chunks_are_neighbouring_blocks_in_rank_order(case):
    for layout in case.plan():
        assert layout.num_chunks == case.num_chunks
        joined = [block for chunk in range(case.num_chunks) for block in blocks_of_chunk(layout, chunk)]
        assert joined == list(range(layout.num_blocks))
        for chunk in range(case.num_chunks):
            own = range(chunk, chunk + 1)
            assert layout.flat_numel_of(own) == sum(padded(int(layout.numel[b])) for b in blocks_of_chunk(layout, chunk))


@on_many_layouts
@given(cases, st.integers(1, 4), st.integers(1, 4))
def test_shares_cut_the_bucket_in_the_order_of_local_ranks(case, num_nodes, local_world_size):
    """Any node cuts it alike, so the parts of one message to all its ranks lie side by side, and so do their answers."""
    for layout in case._replace(num_chunks=num_nodes * local_world_size).plan():
        for node in range(num_nodes):
            ranks = [
                Topology(num_nodes=num_nodes, node_rank=node, local_world_size=local_world_size, local_rank=local)
                for local in range(local_world_size)
            ]
            bounds = [layout.flat_of(rank.share) for rank in ranks]
            assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
            assert bounds[-1][1] == layout.flat_numel
            assert all(rank.chunk in rank.share for rank in ranks)


@on_many_layouts
@given(cases)
def test_bytes_of_scales_and_signs_are_disjoint_and_inside_the_message_of_their_chunk(case):
    for layout in case.plan():
        ranges = []
        for chunk in range(case.num_chunks):
            for block in blocks_of_chunk(layout, chunk):
                scale, sign = int(layout.scale_byte[block]), int(layout.sign_byte[block])
                for start, stop in ((scale, scale + 4), (sign, sign + -(-int(layout.numel[block]) // 8))):
                    assert chunk * layout.chunk_nbytes <= start < stop <= (chunk + 1) * layout.chunk_nbytes
                    ranges.append((start, stop))
        assert all(stop <= next_start for (_, stop), (next_start, _) in pairwise(sorted(ranges)))


@on_many_layouts
@given(cases)
def test_scales_are_aligned_come_first_and_both_are_in_the_order_of_blocks(case):
    for layout in case.plan():
        assert layout.chunk_nbytes % 8 == 0
        for chunk in range(case.num_chunks):
            own = list(blocks_of_chunk(layout, chunk))
            first = chunk * layout.chunk_nbytes
            assert layout.scale_byte[own].tolist() == [first + 4 * i for i in range(len(own))]
            signs = np.cumsum([first + 4 * len(own), *(-(-layout.numel[own] // 8)).tolist()])[: len(own)]
            assert layout.sign_byte[own].tolist() == signs.tolist()


@on_many_layouts
@given(cases)
def test_codes_of_second_moments_travel_in_the_same_layout_with_a_byte_per_element(case):
    for layout in case.plan():
        wire, used = layout.codes, []
        for chunk in range(case.num_chunks):
            place = chunk * wire.chunk_nbytes
            own = blocks_of_chunk(layout, chunk)
            for block in own:
                assert wire.scale_byte[block] == place
                place += 4
            for block in own:
                assert wire.element_byte[block] == place
                place += padded(int(layout.numel[block]))
            used.append(place - chunk * wire.chunk_nbytes)
        assert wire.chunk_nbytes == -(-max(used) // 8) * 8
        assert wire.message_nbytes == case.num_chunks * wire.chunk_nbytes


@on_many_layouts
@given(cases)
def test_the_largest_chunk_fills_its_message_up_to_alignment(case):
    for layout in case.plan():
        assert 0 <= layout.chunk_nbytes - max(nbytes_of_chunks(layout)) < 8
        assert layout.message_nbytes == case.num_chunks * layout.chunk_nbytes


@on_many_layouts
@given(cases)
def test_chunks_are_balanced_in_bytes_to_about_one_block(case):
    for layout in case.plan():
        used = nbytes_of_chunks(layout)
        assert max(used) <= sum(used) / case.num_chunks + encoded_nbytes(case.block_size, case.block_size)


@pytest.mark.parametrize("num_chunks", [2, 3, 4, 5])
def test_many_tiny_parameters_are_balanced_to_one_of_them(num_chunks):
    (layout,) = plan_buckets([64] * 2001, block_size=2048, num_chunks=num_chunks, bucket_numel=10**6)
    used = nbytes_of_chunks(layout)
    assert max(used) <= sum(used) / num_chunks + encoded_nbytes(64, 2048)
    assert min(used) >= sum(used) / num_chunks - encoded_nbytes(64, 2048)


def test_large_and_tiny_parameters_together_are_balanced():
    (layout,) = plan_buckets([64] * 1000 + [10**6] + [1] * 1000, block_size=2048, num_chunks=4, bucket_numel=10**7)
    used = nbytes_of_chunks(layout)
    assert max(used) <= sum(used) / 4 + encoded_nbytes(2048, 2048)


@on_many_layouts
@given(cases)
def test_buckets_are_no_larger_than_asked_and_as_full_as_blocks_allow(case):
    layouts = case.plan()
    capacity = max(case.bucket_numel, case.block_size)
    assert all(layout.numel.sum() <= capacity for layout in layouts)
    for layout, following in pairwise(layouts):
        assert layout.numel.sum() + following.numel[0] > case.bucket_numel


@on_many_layouts
@given(cases)
def test_neighbouring_blocks_of_a_parameter_are_found(case):
    for layout in case.plan():
        parts = layout.parameter_blocks()
        assert [block for _, first, last in parts for block in range(first, last)] == list(range(layout.num_blocks))
        chunk_of = [chunk for chunk in range(case.num_chunks) for _ in blocks_of_chunk(layout, chunk)]
        keys = [{(int(layout.parameter[b]), chunk_of[b]) for b in range(first, last)} for _, first, last in parts]
        assert all(len(key) == 1 for key in keys)
        assert all(a != b for a, b in pairwise(keys))  # none could be longer
        assert [p for p, _, _ in parts] == [next(iter(key))[0] for key in keys]


# Spans: what a CPU works on in one call

spanned = st.lists(
    st.one_of(
        st.integers(1, 40),
        st.sampled_from([SMALL_NUMEL, SMALL_NUMEL + 1, SPAN_NUMEL, SPAN_NUMEL + 1]),
        st.integers(SMALL_NUMEL, 3 * SPAN_NUMEL),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(spanned, st.sampled_from([8, 2048, 16384]), st.integers(1, 3), st.integers(1, 3))
@example([SMALL_NUMEL] * 40, 2048, 1, 1)  # small ones, but more than a span holds
def test_spans_cover_all_blocks_and_join_only_small_parameters(numels, block_size, ranks, first_chunk):
    layouts = plan_buckets(numels, block_size=block_size, num_chunks=ranks, bucket_numel=10**6)
    for layout in layouts:
        chunks = range(min(first_chunk, ranks) - 1, ranks)
        chunk_of = {block: chunk for chunk in chunks for block in blocks_of_chunk(layout, chunk)}
        spans = layout.spans(chunks, numels)
        assert [block for span in spans for block in range(span.first, span.last)] == list(chunk_of)
        for span in spans:
            blocks = range(span.first, span.last)
            assert len({chunk_of[block] for block in blocks}) == 1
            assert span.parameters == tuple(dict.fromkeys(int(layout.parameter[block]) for block in blocks))
            assert layout.offset[span.last] - layout.offset[span.first] <= max(SPAN_NUMEL, block_size)
            assert span.is_packed == (numels[span.parameters[0]] <= SMALL_NUMEL)
            if len(span.parameters) > 1:
                assert all(numels[p] <= SMALL_NUMEL for p in span.parameters)
        for span, after in pairwise(spans):  # none could be longer
            both = {*span.parameters, *after.parameters}
            numel = int(layout.offset[after.first + 1] - layout.offset[span.first])
            assert (
                chunk_of[span.first] != chunk_of[after.first]
                or numel > SPAN_NUMEL
                or any(numels[p] > SMALL_NUMEL for p in both)
            )


# Edges


@pytest.mark.parametrize("numels", [[], [0], [0, 0, 0]])
def test_nothing_to_send_needs_no_bucket(numels):
    assert plan_buckets(numels, block_size=8, num_chunks=3, bucket_numel=100) == []


def test_empty_parameters_leave_no_trace_but_keep_the_numbering():
    blocks = blocks_of(*plan_buckets([0, 5, 0, 0, 20, 0], block_size=8, num_chunks=2, bucket_numel=1000))
    assert blocks == [(1, 0, 5), (4, 0, 8), (4, 8, 8), (4, 16, 4)]


@pytest.mark.parametrize("num_chunks", [2, 3, 4, 5])
def test_with_fewer_blocks_than_ranks_some_chunks_are_empty(num_chunks):
    (layout,) = plan_buckets([8], block_size=8, num_chunks=num_chunks, bucket_numel=100)
    sizes = [len(blocks_of_chunk(layout, chunk)) for chunk in range(num_chunks)]
    assert sorted(sizes) == [0] * (num_chunks - 1) + [1]
    assert layout.chunk_nbytes == 8  # one scale, one byte of signs, three of padding
    assert layout.message_nbytes == num_chunks * 8


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 4, 5])
def test_wire_cost_is_1_016_bits_per_element(num_chunks):
    numels = [50_257 * 768, 768, 768 * 2304, 2304, 768 * 768, 768, 768 * 3072, 3072, 3072 * 768, 768]
    layouts = plan_buckets(numels, block_size=2048, num_chunks=num_chunks, bucket_numel=25 * 2**20 // 4)
    bits_per_element = 8 * sum(layout.message_nbytes for layout in layouts) / sum(numels)
    assert bits_per_element == pytest.approx(1 + 32 / 2048, abs=5e-4)


@pytest.mark.parametrize("block_size", [0, -8, 7, 12, 2047])
def test_invalid_block_size_names_value_and_domain(block_size):
    with pytest.raises(ValueError, match=rf"{block_size}.*positive multiple of 8"):
        plan_buckets([100], block_size=block_size, num_chunks=2, bucket_numel=100)
