"""The sign quantizer: the reference against a naive float64 model, the CPU codec against the reference."""

import math
import tracemalloc
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from lightning_onebit.codec import make_codec
from lightning_onebit.codec.cpu import CpuCodec
from lightning_onebit.codec.reference import ReferenceCodec
from lightning_onebit.config import CompressionConfig

BLOCK_SIZES = [8, 64, 2048, 16384]
MOST_NUMEL = 65536
SIZES = [1, 13, 2048, 40_001]
SMALLEST_FLOAT32 = 2.0**-149

every_codec = pytest.mark.parametrize("kind", ["reference", "cpu"])
every_scale = pytest.mark.parametrize("scale", ["l2", "l1"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
every_block_size = pytest.mark.parametrize("block_size", BLOCK_SIZES)


@cache
def codec_of(kind, block_size, scale="l2", dtype=torch.float32):
    """One codec for all tests, so that each call finds the workspace as others left it."""
    if kind == "reference":
        return ReferenceCodec(block_size=block_size, scale=scale)
    return CpuCodec(block_size=block_size, scale=scale, max_numel=MOST_NUMEL, dtype=dtype)


def random_values(numel, dtype=torch.float32, seed=0):
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_mask(numel, seed=0):
    return np.random.default_rng(seed).random(numel) < 0.7


def packed(bits):
    return torch.from_numpy(np.packbits(np.asarray(bits, dtype=bool), bitorder="little"))


def unpacked(signs, numel):
    return np.unpackbits(signs.numpy(), bitorder="little")[:numel].astype(bool)


def encode(codec, values, live=None):
    """Signs, scales and residual of ``values``, which stay as they are; ``live`` is a bool array."""
    residual = values.clone()
    signs = torch.full((-(-values.numel() // 8),), 0xA5, dtype=torch.uint8)
    scales = torch.full((-(-values.numel() // codec.block_size),), math.nan)
    codec.encode_(residual, signs, scales, live=None if live is None else packed(live))
    return signs, scales, residual


def decode(codec, numel, dtype, signs, scales, factor=1.0, live=None):
    out = torch.full((numel,), math.nan, dtype=dtype)
    codec.decode_(out, signs, scales, factor, live=None if live is None else packed(live))
    return out


def model(values, block_size, scale, live=None):
    """Bits, scales and decoded values by the definition, block by block in Python floats."""
    values = values.double().numpy()
    live = np.ones(len(values), dtype=bool) if live is None else live
    bits = np.where(live, values >= 0, values != 0)
    scales, decoded = [], np.zeros(len(values))
    for start in range(0, len(values), block_size):
        block = slice(start, start + block_size)
        counted = values[block][live[block]].tolist()
        size = max(len(counted), 1)
        scales.append(math.hypot(*counted) / math.sqrt(size) if scale == "l2" else math.fsum(map(abs, counted)) / size)
        decoded[block] = np.where(live[block], np.where(bits[block], scales[-1], -scales[-1]), 0.0)
    return bits, np.array(scales), decoded


def assert_agrees_with_model(codec, scale, values, live=None):
    signs, scales, residual = encode(codec, values, live)
    decoded = decode(codec, values.numel(), values.dtype, signs, scales, live=live)
    bits, expected_scales, expected_decoded = model(values, codec.block_size, scale, live)

    assert torch.equal(signs, packed(bits))
    # torch sums the norm in the dtype of the values, in four lanes or more: so many roundings.
    rtol = 1e-6 + torch.finfo(values.dtype).eps / 2 * codec.block_size / 4
    tolerance = {"rtol": rtol, "atol": 2 * SMALLEST_FLOAT32}
    np.testing.assert_allclose(scales.double().numpy(), expected_scales, **tolerance)
    np.testing.assert_allclose(decoded.double().numpy(), expected_decoded, **tolerance)
    assert_conserved(values, decoded, residual)


def assert_conserved(values, decoded, residual):
    """c == q + delta, to one rounding of the subtraction."""
    c, q, delta = (t.double().numpy() for t in (values, decoded, residual))
    rounding = torch.finfo(values.dtype).eps * (np.abs(c) + np.abs(q))
    assert np.all(np.abs(c - (q + delta)) <= rounding)


# ---- the definition


@every_codec
@every_block_size
@every_scale
@every_dtype
def test_random_values_agree_with_the_model(kind, block_size, scale, dtype):
    for numel in (1, block_size, block_size + 1, 2 * block_size - 1):
        assert_agrees_with_model(codec_of(kind, block_size, scale, dtype), scale, random_values(numel, dtype))


@every_codec
@every_block_size
@every_scale
@every_dtype
def test_dead_elements_agree_with_the_model(kind, block_size, scale, dtype):
    values = random_values(2 * block_size + 5, dtype)
    values[:3] = torch.tensor([0.0, -0.0, -1e-45])
    live = random_mask(values.numel())
    live[:3] = False
    assert_agrees_with_model(codec_of(kind, block_size, scale, dtype), scale, values, live)


@every_codec
@every_scale
def test_a_block_by_hand(kind, scale):
    codec = codec_of(kind, 8, scale)
    signs, scales, residual = encode(codec, torch.tensor([3.0, -4.0, 0.0, -0.0, 0.0, 0.0, 0.0, 0.0, 2.0]))
    first = 5 / math.sqrt(8) if scale == "l2" else 7 / 8
    assert signs.tolist() == [0b11111101, 0b1]
    assert scales.tolist() == pytest.approx([first, 2.0])
    assert residual.tolist() == pytest.approx([3 - first, first - 4, *[-first] * 6, 0.0])


@every_codec
@every_block_size
def test_no_elements_is_no_work(kind, block_size):
    codec = codec_of(kind, block_size)
    signs, scales, residual = encode(codec, torch.empty(0))
    assert (signs.numel(), scales.numel(), residual.numel()) == (0, 0, 0)
    assert decode(codec, 0, torch.float32, signs, scales).numel() == 0


@every_codec
@every_scale
@every_dtype
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_have_scale_zero_and_come_back_as_zeros(kind, scale, dtype, zero):
    codec = codec_of(kind, 64, scale, dtype)
    values = torch.full((150,), zero, dtype=dtype)
    signs, scales, residual = encode(codec, values)
    assert unpacked(signs, 150).all()  # -0.0 counts as >= 0
    assert torch.equal(scales, torch.zeros(3))
    assert torch.equal(residual, torch.zeros_like(values))
    assert torch.equal(decode(codec, 150, dtype, signs, scales), torch.zeros_like(values))


@every_codec
@every_scale
@every_dtype
@every_block_size
def test_scale_neither_overflows_nor_underflows(kind, scale, dtype, block_size):
    codec = codec_of(kind, block_size, scale, dtype)
    signs = random_values(block_size + 3, dtype).sign()
    for magnitude in (1e30, 1e-30, 1e-38, 1e-41, SMALLEST_FLOAT32):
        values = magnitude * signs
        assert_agrees_with_model(codec, scale, values)
        assert encode(codec, values)[1].tolist() == pytest.approx([magnitude] * 2, rel=1e-3)


@every_codec
@every_scale
def test_one_call_holds_blocks_of_very_different_size(kind, scale):
    magnitudes = torch.tensor([1e30, 1.0, 1e-30, 0.0, 1e-42, 1e20]).repeat_interleave(64)
    assert_agrees_with_model(codec_of(kind, 64, scale), scale, magnitudes * random_values(magnitudes.numel()))


@every_codec
@every_scale
@every_dtype
@pytest.mark.parametrize("block_size", [8, 2048])
def test_scale_of_the_largest_float32_values_is_finite(kind, scale, dtype, block_size):
    values = torch.full((block_size,), torch.finfo(torch.float32).max, dtype=dtype)
    values[::2] *= -1
    _, scales, residual = encode(codec_of(kind, block_size, scale, dtype), values)
    assert torch.isfinite(scales).all()
    assert torch.isfinite(residual).all()


@every_codec
def test_float64_values_beyond_the_float32_scale_do_not_poison_the_residual(kind):
    values = torch.full((8,), 1e39, dtype=torch.float64)
    try:
        _, _, residual = encode(codec_of(kind, 8, dtype=torch.float64), values)
    except FloatingPointError:
        return
    assert torch.isfinite(residual).all()


@every_codec
@every_scale
@every_dtype
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_values_are_refused_and_nothing_is_modified(kind, scale, dtype, bad):
    codec = codec_of(kind, 64, scale, dtype)
    bad_is_live, bad_is_dead = np.ones(130, dtype=bool), np.zeros(130, dtype=bool)
    for position, live in product((0, 100, 129), (None, bad_is_live, bad_is_dead)):
        values = random_values(130, dtype)
        values[position] = bad
        signs, scales = torch.full((17,), 0xA5, dtype=torch.uint8), torch.full((3,), 7.0)
        before = [tensor.numpy().tobytes() for tensor in (values, signs, scales)]
        with pytest.raises(FloatingPointError, match="infinite or NaN"):
            codec.encode_(values, signs, scales, live=None if live is None else packed(live))
        assert [tensor.numpy().tobytes() for tensor in (values, signs, scales)] == before


# ---- dead elements


@every_codec
@every_scale
@every_dtype
def test_dead_elements_neither_count_nor_change(kind, scale, dtype):
    codec = codec_of(kind, 8, scale, dtype)
    values = torch.tensor([3.0, 1e30, -4.0, -1e-45, 3.0, 0.0, -4.0, -0.0], dtype=dtype)
    live = np.array([1, 0, 1, 0, 1, 0, 1, 0], dtype=bool)
    signs, scales, residual = encode(codec, values, live)
    alone = encode(codec, values[live])[1]
    assert scales.tolist() == pytest.approx(alone.tolist())
    assert decode(codec, 8, dtype, signs, scales, live=live)[~live].tolist() == [0.0] * 4
    assert torch.equal(residual[~live], values[~live])
    assert unpacked(signs, 8)[~live].tolist() == [True, True, False, False]  # wake-up: the value is not zero


@every_codec
@every_scale
def test_an_all_dead_block_beside_live_ones_sends_nothing(kind, scale):
    codec = codec_of(kind, 64, scale)
    values = random_values(3 * 64 + 10)
    live = np.ones(values.numel(), dtype=bool)
    live[64:128] = live[192:] = False
    signs, scales, residual = encode(codec, values, live)
    assert (scales == 0).tolist() == [False, True, False, True]
    assert torch.equal(residual[~live], values[~live])
    assert not decode(codec, values.numel(), torch.float32, signs, scales, live=live)[~live].any()
    assert unpacked(signs, values.numel())[~live].all()
    assert_agrees_with_model(codec, scale, values, live)


@every_codec
def test_dead_elements_stay_zero_whatever_was_received_for_them(kind):
    codec = codec_of(kind, 8)
    live = np.array([1, 0, 0, 1, 1, 1, 1, 1, 0], dtype=bool)
    out = decode(codec, 9, torch.float32, packed(np.ones(9)), torch.tensor([2.0, 3.0]), live=live)
    assert out.tolist() == [2.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.0]


@every_codec
@every_block_size
def test_a_mask_of_ones_changes_no_bit(kind, block_size):
    codec = codec_of(kind, block_size)
    values = random_values(2 * block_size + 5)
    with_mask = encode(codec, values, np.ones(values.numel(), dtype=bool))
    for a, b in zip(with_mask, encode(codec, values), strict=True):
        assert torch.equal(a, b)


# ---- properties over arbitrary values

special = st.sampled_from([0.0, -0.0, SMALLEST_FLOAT32, -SMALLEST_FLOAT32, 1e-38, 1e-30, 1e30, -1e30, 1.0, -1.0])
finite = st.floats(-(2.0**99), 2.0**99, width=32)
elements = st.lists(st.tuples(st.one_of(finite, special, st.floats(-2, 2, width=32)), st.booleans()), max_size=70)
on_many_values = settings(max_examples=60, deadline=None)


@every_codec
@every_scale
@every_dtype
@on_many_values
@given(elements=elements, masked=st.booleans(), block_size=st.sampled_from([8, 64]))
def test_values_are_what_is_sent_plus_what_is_kept(kind, scale, dtype, elements, masked, block_size):
    values = torch.tensor([value for value, _ in elements], dtype=dtype)
    live = np.array([alive for _, alive in elements], dtype=bool) if masked else None
    assert_agrees_with_model(codec_of(kind, block_size, scale, dtype), scale, values, live)


# ---- the CPU codec against the reference


@every_block_size
@every_scale
@every_dtype
@pytest.mark.parametrize("masked", [False, True])
def test_cpu_codec_sends_the_bits_of_the_reference(block_size, scale, dtype, masked):
    reference, cpu = (codec_of(kind, block_size, scale, dtype) for kind in ("reference", "cpu"))
    for numel in SIZES:
        values = random_values(numel, dtype, seed=1)
        live = random_mask(numel) if masked else None
        signs, scales, residual = encode(cpu, values, live)
        expected_signs, expected_scales, _ = encode(reference, values, live)
        assert torch.equal(signs, expected_signs)
        torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
        sent = decode(reference, numel, dtype, signs, scales, live=live)
        assert torch.equal(residual, values - sent)


@every_block_size
@every_dtype
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("factor", [1.0, -0.37])
def test_cpu_codec_decodes_as_the_reference_does(block_size, dtype, masked, factor):
    reference, cpu = (codec_of(kind, block_size, dtype=dtype) for kind in ("reference", "cpu"))
    for numel in SIZES:
        signs = packed(random_mask(numel, seed=2))
        scales = random_values(-(-numel // block_size)).abs()
        scales[1::2] = 0.0
        live = random_mask(numel, seed=3) if masked else None
        out = decode(cpu, numel, dtype, signs, scales, factor, live)
        assert torch.equal(out, decode(reference, numel, dtype, signs, scales, factor, live))


@every_codec
@every_dtype
def test_factor_multiplies_what_is_decoded(kind, dtype):
    codec = codec_of(kind, 8, dtype=dtype)
    out = decode(codec, 9, dtype, torch.tensor([0b00000101, 0b0], dtype=torch.uint8), torch.tensor([2.0, 8.0]), -0.25)
    assert out.tolist() == [-0.5, 0.5, -0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 2.0]


@every_block_size
@every_dtype
@every_scale
def test_dispatch_gives_a_codec_that_takes_a_whole_segment(block_size, dtype, scale):
    config = CompressionConfig(block_size=block_size, scale=scale)
    codec = make_codec(config, device=torch.device("cpu"), dtype=dtype)
    assert codec.name == "cpu"
    values = random_values(MOST_NUMEL, dtype)
    signs, scales, _ = encode(codec, values)
    assert torch.equal(signs, packed(values.numpy() >= 0))
    assert scales.numel() == MOST_NUMEL // block_size


def test_dispatch_falls_back_to_the_reference_on_other_devices():
    codec = make_codec(CompressionConfig(), device=torch.device("meta"), dtype=torch.float32)
    assert isinstance(codec, ReferenceCodec)


# ---- block locality


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def encode_in_parts(codec, values, cuts, live, alignment):
    """Encode between ``cuts``, each part at another alignment; the bytes of signs, scales and residual joined."""
    joined = [b"", b"", b""]
    for start, end in zip([0, *cuts], [*cuts, values.numel()], strict=True):
        part = torch.empty(end - start + alignment, dtype=values.dtype)[alignment:]
        part.copy_(values[start:end])
        blocks, sign_bytes = -(-part.numel() // codec.block_size), -(-part.numel() // 8)
        scales = torch.empty(blocks + alignment)[alignment:]
        signs = torch.empty(sign_bytes + alignment, dtype=torch.uint8)[alignment:]
        codec.encode_(part, signs, scales, live=None if live is None else packed(live[start:end]))
        joined = [old + new.numpy().tobytes() for old, new in zip(joined, (signs, scales, part), strict=True)]
        alignment = (alignment + 1) % 8
    return joined


def assert_block_local(codec, values, live=None, cuts=None):
    """Compare one call with calls split at all, the first, or the last block boundary, or at ``cuts`` only."""
    whole = encode_in_parts(codec, values, [], live, alignment=0)
    boundaries = list(range(codec.block_size, values.numel(), codec.block_size))
    splits = [boundaries, boundaries[:1], boundaries[-1:], []] if cuts is None else [cuts]
    for alignment, split in enumerate(splits, start=1):
        parts = encode_in_parts(codec, values, split, live, alignment)
        for what, ours, expected in zip(("signs", "scales", "residual"), parts, whole, strict=True):
            assert ours == expected, f"{what} depend on the split at {split}"


@every_codec
@every_scale
@every_dtype
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_do_not_see_each_other(kind, scale, dtype, masked):
    for block_size, numel in ((8, 500), (64, 3_001), (2048, 40_001), (16384, 3 * 16384 + 5)):
        live = random_mask(numel) if masked else None
        assert_block_local(codec_of(kind, block_size, scale, dtype), random_values(numel, dtype), live)


@every_codec
@every_scale
@every_dtype
@pytest.mark.parametrize("block_size", [2048, 16384])
@pytest.mark.usefixtures("two_threads")
def test_blocks_do_not_see_each_other_on_two_threads(kind, scale, dtype, block_size):
    """Above 32768 elements torch spreads work over its threads."""
    assert_block_local(codec_of(kind, block_size, scale, dtype), random_values(MOST_NUMEL, dtype), cuts=[block_size])


@every_codec
@every_scale
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e30])
def test_blocks_do_not_see_an_extreme_one_beside_them(kind, scale, magnitude):
    values = random_values(9 * 64 + 5)
    values[3 * 64 : 4 * 64] *= magnitude
    assert_block_local(codec_of(kind, 64, scale), values)


@every_codec
@every_scale
def test_blocks_do_not_see_a_dead_one_beside_them(kind, scale):
    live = np.ones(9 * 64 + 5, dtype=bool)
    live[3 * 64 : 4 * 64] = False
    assert_block_local(codec_of(kind, 64, scale), random_values(live.size), live)


# ---- error feedback


@every_codec
@every_scale
@every_dtype
def test_what_was_sent_plus_the_residual_is_what_came_in(kind, scale, dtype):
    numel, rounds = 500, 50
    codec = codec_of(kind, 64, scale, dtype)
    live = random_mask(numel)
    buffer = torch.zeros(numel, dtype=dtype)
    inputs, sent = np.zeros(numel), np.zeros(numel)
    for step in range(rounds):
        values = random_values(numel, dtype, seed=step)
        inputs += values.double().numpy()
        buffer.add_(values)
        signs, scales, buffer = encode(codec, buffer, live)
        sent += decode(codec, numel, dtype, signs, scales, live=live).double().numpy()
    assert not sent[~live].any()
    np.testing.assert_allclose(sent + buffer.double().numpy(), inputs, rtol=0, atol=rounds * torch.finfo(dtype).eps * 20)


# ---- memory


def steady_state(masked, zero_block):
    """A closure that encodes and decodes one segment on buffers made beforehand, called once already."""
    codec = CpuCodec(block_size=2048, max_numel=MOST_NUMEL, dtype=torch.float32)
    values, out = random_values(MOST_NUMEL), torch.empty(MOST_NUMEL)
    signs, scales = torch.empty(MOST_NUMEL // 8, dtype=torch.uint8), torch.empty(MOST_NUMEL // 2048)
    live = packed(random_mask(MOST_NUMEL)) if masked else None

    def call():
        if zero_block:
            values[:2048] = 0.0
        codec.encode_(values, signs, scales, live=live)
        codec.decode_(out, signs, scales, 0.5, live=live)

    call()
    return call


every_segment = pytest.mark.parametrize(
    ("masked", "zero_block"), [(False, False), (True, False), (False, True)], ids=["all live", "some dead", "a zero block"]
)


@every_segment
def test_cpu_codec_makes_no_numpy_array_of_the_size_of_the_data(masked, zero_block):
    call = steady_state(masked, zero_block)
    tracemalloc.start()
    try:
        call()
        _, peak_nbytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_nbytes < MOST_NUMEL / 4


@every_segment
def test_cpu_codec_makes_no_tensor_of_the_size_of_the_data(masked, zero_block):
    call = steady_state(masked, zero_block)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    nbytes, operation = max((event.self_cpu_memory_usage, event.name) for event in recorded.events())
    assert nbytes > 0  # scales are allocated: the profiler does see memory
    assert nbytes < MOST_NUMEL / 4, operation
