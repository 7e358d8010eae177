"""The sign quantizer: the reference against a naive float64 model, the CPU codec against the reference."""

import math
import tracemalloc
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_onebit.engine.momentum import LocalMomentum, square_root_
from lightning_onebit.quantize.encoded import Encoded
from torch.profiler import ProfilerActivity, profile

from lightning_onebit.config import CompressionConfig
from lightning_onebit.quantize import make_codec
from lightning_onebit.quantize.cpu import CpuCodec
from lightning_onebit.quantize.reference import ReferenceCodec

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


def empty_message(codec, numel, live=None):
    """An ``Encoded`` full of garbage; ``live`` is a bool array."""
    return Encoded(
        signs=torch.full((-(-numel // 8),), 0xA5, dtype=torch.uint8),
        scales=torch.full((-(-numel // codec.block_size),), math.nan),
        live=None if live is None else packed(live),
    )


def encode(codec, values, live=None):
    """Signs, scales and residual of ``values``, which stay as they are; ``live`` is a bool array."""
    residual, encoded = values.clone(), empty_message(codec, values.numel(), live)
    codec.encode_(residual, encoded)
    return encoded.signs, encoded.scales, residual


def decode(codec, numel, dtype, signs, scales, factor=1.0, live=None):
    out = torch.full((numel,), math.nan, dtype=dtype)
    codec.decode_(out, Encoded(signs, scales, None if live is None else packed(live)), factor)
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
            codec.encode_(values, Encoded(signs, scales, None if live is None else packed(live)))
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
        codec.encode_(part, Encoded(signs, scales, None if live is None else packed(live[start:end])))
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


# ---- whole steps


def random_momentum(numel, dtype=torch.float32, second_moment="same"):
    """Adam's, with a second moment of ``dtype`` or of another, or none."""
    gradient = random_values(numel, dtype, seed=100)
    gradient[::97] *= 1e4  # reaches the clamp
    if second_moment is None:
        return LocalMomentum(gradient=gradient, second_moment=None, decay=0.9, weight=0.1, kappa=31.6)
    moment = random_values(numel, dtype, seed=101).square()
    moment[5::50] = 0.0
    moment = moment if second_moment == "same" else moment.to(second_moment)
    return LocalMomentum(gradient=gradient, second_moment=moment, decay=0.9, weight=0.1, eps=1e-8, kappa=31.6)


def random_message(codec, numel, live=None, seed=0):
    """What a rank may have sent, a block of zeros included."""
    scales = random_values(-(-numel // codec.block_size), seed=200 + seed).abs()
    scales[1::3] = 0.0
    return empty_message(codec, numel, live)._replace(signs=packed(random_mask(numel, seed=200 + seed)), scales=scales)


def worker_step(kind, block_size, numel, dtype=torch.float32, second_moment="same", masks=(None, None)):
    """Codec and arguments of the ``..._momentum_`` methods: error, previous, momentum, sent."""
    codec = codec_of(kind, block_size, dtype=dtype)
    error = random_values(numel, dtype, seed=102)
    previous, sent = random_message(codec, numel, masks[0]), empty_message(codec, numel, masks[1])
    return codec, error, previous, random_momentum(numel, dtype, second_moment), sent


def server_step(kind, block_size, numel, dtype=torch.float32, ranks=3, live=None):
    """Codec and arguments of the ``..._mean_`` methods: error, received, served."""
    codec = codec_of(kind, block_size, dtype=dtype)
    received = [random_message(codec, numel, live, seed=rank) for rank in range(ranks)]
    return codec, random_values(numel, dtype, seed=103), received, empty_message(codec, numel, live)


def some_woken(numel):
    """Masks of the previous and of this step: an element may wake up in between, and a few go back to sleep."""
    before = random_mask(numel, seed=1)
    now = before | random_mask(numel, seed=2)
    now[3::7] = False
    return before, now


def as_bytes(*tensors):
    return [tensor.numpy().tobytes() for tensor in tensors]


def momentum_values(error, previous, momentum, block_size):
    """error + decay * u + weight * clamp(g / D), in float64."""
    numel = error.numel()
    signs = np.where(unpacked(previous.signs, numel), 1.0, -1.0)
    if previous.live is not None:
        signs *= unpacked(previous.live, numel)
    u = signs * previous.scales.double().numpy().repeat(block_size)[:numel]
    gradient = momentum.gradient.double().numpy()
    if momentum.second_moment is not None:
        denominator = np.sqrt(momentum.second_moment.double().numpy()) + momentum.eps
        gradient = gradient / denominator
    gradient = np.clip(gradient, -momentum.kappa, momentum.kappa)
    return error.double().numpy() + momentum.decay * u + momentum.weight * gradient


def mean_values(error, received, block_size):
    """error + mean of what was received, in float64."""
    numel, q = error.numel(), 0.0
    for each in received:
        signs = np.where(unpacked(each.signs, numel), 1.0, -1.0)
        if each.live is not None:
            signs *= unpacked(each.live, numel)
        q = q + signs * each.scales.double().numpy().repeat(block_size)[:numel]
    return error.double().numpy() + q / len(received)


def assert_quantized(codec, dtype, values, message, new_error):
    """``message`` and ``new_error`` are what quantizing ``values`` (float64) gives, to rounding."""
    numel = len(values)
    tolerance = 200 * torch.finfo(dtype).eps
    live = None if message.live is None else unpacked(message.live, numel)
    bits, scales, _ = model(torch.from_numpy(values), codec.block_size, codec.scale, live)
    clear = np.abs(values) > tolerance
    assert np.array_equal(unpacked(message.signs, numel)[clear], bits[clear])
    np.testing.assert_allclose(message.scales.double().numpy(), scales, rtol=tolerance + 1e-6, atol=0)
    q = decode(codec, numel, dtype, *message[:2], live=live).double().numpy()
    np.testing.assert_allclose(q + new_error.double().numpy(), values, rtol=tolerance, atol=tolerance)


every_second_moment = pytest.mark.parametrize("second_moment", ["same", torch.float32, torch.bfloat16, None], ids=str)
every_number_of_ranks = pytest.mark.parametrize("ranks", [1, 2, 5])
every_mask = pytest.mark.parametrize("masked", [False, True], ids=["all live", "some dead"])


@every_codec
@every_dtype
@every_second_moment
@every_mask
def test_worker_step_agrees_with_the_model(kind, dtype, second_moment, masked):
    for block_size, numel in ((8, 13), (64, 768), (2048, 5_003)):
        masks = some_woken(numel) if masked else (None, None)
        codec, error, previous, momentum, sent = worker_step(kind, block_size, numel, dtype, second_moment, masks)
        values = momentum_values(error, previous, momentum, block_size)
        codec.encode_momentum_(error, error, previous, momentum, sent)
        assert_quantized(codec, dtype, values, sent, error)


@every_codec
@every_dtype
@every_number_of_ranks
@every_mask
def test_server_step_agrees_with_the_model(kind, dtype, ranks, masked):
    for block_size, numel in ((8, 13), (64, 768), (2048, 5_003)):
        live = random_mask(numel) if masked else None
        codec, error, received, served = server_step(kind, block_size, numel, dtype, ranks, live)
        values = mean_values(error, received, block_size)
        codec.encode_mean_(error, error, received, served)
        served_bits = unpacked(served.signs, numel)
        if live is not None:  # of dead elements the wake-up calls are checked elsewhere
            served_bits = np.where(live, served_bits, values != 0)
        assert_quantized(codec, dtype, values, served._replace(signs=packed(served_bits)), error)


@every_codec
@every_dtype
@every_second_moment
@every_mask
@pytest.mark.parametrize("numel", SIZES)
def test_worker_step_is_the_same_in_place_and_settled_later(kind, dtype, second_moment, masked, numel):
    masks = some_woken(numel) if masked else (None, None)
    codec, error, previous, momentum, sent = worker_step(kind, 2048, numel, dtype, second_moment, masks)
    arguments = (error, previous.signs, previous.scales, momentum.gradient)
    before = as_bytes(*arguments)
    out = torch.full_like(error, math.nan)
    codec.encode_momentum_(out, error, previous, momentum, sent)
    assert as_bytes(*arguments) == before
    settled, in_place, sent_in_place = error.clone(), error, empty_message(codec, numel, masks[1])
    codec.settle_momentum_(settled, previous, momentum, sent)
    codec.encode_momentum_(in_place, in_place, previous, momentum, sent_in_place)
    assert as_bytes(settled) == as_bytes(in_place) == as_bytes(out)
    assert as_bytes(*sent_in_place[:2]) == as_bytes(*sent[:2])


@every_codec
@every_dtype
@every_number_of_ranks
@every_mask
@pytest.mark.parametrize("numel", SIZES)
def test_server_step_is_the_same_in_place_and_settled_later(kind, dtype, ranks, masked, numel):
    live = random_mask(numel) if masked else None
    codec, error, received, served = server_step(kind, 2048, numel, dtype, ranks, live)
    before = as_bytes(error, *(part for each in received for part in each[:2]))
    out = torch.full_like(error, math.nan)
    codec.encode_mean_(out, error, received, served)
    assert as_bytes(error, *(part for each in received for part in each[:2])) == before
    settled, in_place, served_in_place = error.clone(), error, empty_message(codec, numel, live)
    codec.settle_mean_(settled, received, served)
    codec.encode_mean_(in_place, in_place, received, served_in_place)
    assert as_bytes(settled) == as_bytes(in_place) == as_bytes(out)
    assert as_bytes(*served_in_place[:2]) == as_bytes(*served[:2])


@every_block_size
@every_dtype
@every_second_moment
@every_mask
def test_cpu_worker_step_has_the_bits_of_the_reference(block_size, dtype, second_moment, masked):
    for numel in SIZES:
        masks = some_woken(numel) if masked else (None, None)
        expected, got = (worker_step(kind, block_size, numel, dtype, second_moment, masks) for kind in ("reference", "cpu"))
        for codec, error, *rest in (expected, got):
            codec.encode_momentum_(error, error, *rest)
        assert torch.equal(got[-1].signs, expected[-1].signs)
        torch.testing.assert_close(got[-1].scales, expected[-1].scales, rtol=1e-6, atol=0)
        _, error, *arguments = worker_step("reference", block_size, numel, dtype, second_moment, masks)
        codec_of("reference", block_size, dtype=dtype).settle_momentum_(error, *arguments[:-1], got[-1])
        assert as_bytes(got[1]) == as_bytes(error)


@every_block_size
@every_dtype
@every_number_of_ranks
@every_mask
def test_cpu_server_step_has_the_bits_of_the_reference(block_size, dtype, ranks, masked):
    for numel in SIZES:
        live = random_mask(numel) if masked else None
        expected, got = (server_step(kind, block_size, numel, dtype, ranks, live) for kind in ("reference", "cpu"))
        for codec, error, *rest in (expected, got):
            codec.encode_mean_(error, error, *rest)
        assert torch.equal(got[-1].signs, expected[-1].signs)
        torch.testing.assert_close(got[-1].scales, expected[-1].scales, rtol=1e-6, atol=0)
        _, error, received, _ = server_step("reference", block_size, numel, dtype, ranks, live)
        codec_of("reference", block_size, dtype=dtype).settle_mean_(error, received, got[-1])
        assert as_bytes(got[1]) == as_bytes(error)


@every_codec
@every_dtype
def test_zeros_keep_their_bits_in_whole_steps(kind, dtype):
    """The sign of a zero decides nothing, but has to be the same in every codec and after every way through a step."""
    signed_zeros = torch.tensor([0.0, -0.0] * 8, dtype=dtype)
    no_news = LocalMomentum(
        gradient=signed_zeros, second_moment=signed_zeros.abs(), decay=0.9, weight=0.1, eps=1e-8, kappa=9.0
    )
    for live in (None, np.arange(16) % 3 > 0):
        for signs in (np.ones(16), np.zeros(16), np.arange(16) % 2):
            errors = []
            for each in ("reference", kind):
                codec = codec_of(each, 8, dtype=dtype)
                silent = empty_message(codec, 16, live)._replace(signs=packed(signs), scales=torch.zeros(2))
                worker, server, sent = signed_zeros.clone(), signed_zeros.clone(), empty_message(codec, 16, live)
                codec.encode_momentum_(worker, worker, silent, no_news, sent)
                codec.encode_mean_(server, server, [silent, sent], served := empty_message(codec, 16, live))
                errors.append(as_bytes(worker, server, sent.signs, sent.scales, served.signs, served.scales))
            assert errors[0] == errors[1]


@every_codec
@every_dtype
def test_wake_up_calls_of_all_ranks_are_passed_on(kind, dtype):
    live = np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 0], dtype=bool)
    codec, _, received, served = server_step(kind, 8, 10, dtype, ranks=2, live=live)
    received[0].signs.copy_(packed([1, 0, 1, 0, 1, 0, 0, 0, 1, 0]))
    received[1].signs.copy_(packed([1, 0, 0, 1, 1, 1, 0, 0, 1, 0]))
    error = torch.zeros(10, dtype=dtype)
    error[6] = -3.0  # one's own value is a call as well
    codec.encode_mean_(error, error, received, served)
    assert unpacked(served.signs, 10)[~live].tolist() == [True, True, True, False, False]
    assert not unpacked(served.signs, 16)[10:].any()
    assert error[~live].tolist() == [0.0, 0.0, -3.0, 0.0, 0.0]


@every_codec
def test_non_finite_gradients_leave_the_error_to_be_taken_back(kind):
    codec, error, previous, momentum, sent = worker_step(kind, 64, 300)
    momentum.gradient[200] = math.nan
    before = as_bytes(error, *sent[:2])
    with pytest.raises(FloatingPointError, match="infinite or NaN"):
        codec.encode_momentum_(torch.empty_like(error), error, previous, momentum, sent)
    assert as_bytes(error, *sent[:2]) == before


def whole_steps_in_parts(kind, block_size, numel, dtype, masked, cuts):
    """One worker step and one server step, called between ``cuts``: the bytes of all that they write."""
    masks = some_woken(numel) if masked else (None, None)
    codec, error, previous, momentum, sent = worker_step(kind, block_size, numel, dtype, masks=masks)
    _, server_error, received, served = server_step(kind, block_size, numel, dtype, live=masks[1])
    for start, end in zip([0, *cuts], [*cuts, numel], strict=True):
        signs, blocks = slice(start // 8, -(-end // 8)), slice(start // block_size, -(-end // block_size))
        previous_part, sent_part, served_part, *received_parts = (
            Encoded(each.signs[signs], each.scales[blocks], None if each.live is None else each.live[signs])
            for each in (previous, sent, served, *received)
        )
        part = replace(momentum, gradient=momentum.gradient[start:end], second_moment=momentum.second_moment[start:end])
        codec.encode_momentum_(error[start:end], error[start:end], previous_part, part, sent_part)
        codec.encode_mean_(server_error[start:end], server_error[start:end], received_parts, served_part)
    return as_bytes(error, server_error, *sent[:2], *served[:2])


@every_codec
@every_dtype
@every_mask
def test_whole_steps_do_not_depend_on_how_a_parameter_is_cut(kind, dtype, masked):
    numel, block_size = 3_001, 64
    whole = whole_steps_in_parts(kind, block_size, numel, dtype, masked, cuts=[])
    for cuts in (range(block_size, numel, block_size), [64], [1024, 2112], [2944]):
        parts = whole_steps_in_parts(kind, block_size, numel, dtype, masked, cuts)
        assert parts == whole, f"results depend on the cuts at {list(cuts)}"


@every_codec
@every_dtype
@pytest.mark.usefixtures("two_threads")
def test_whole_steps_do_not_depend_on_cuts_on_two_threads(kind, dtype):
    whole, parts = (whole_steps_in_parts(kind, 2048, MOST_NUMEL, dtype, False, cuts) for cuts in ([], [2048]))
    assert parts == whole


def test_square_roots_are_correctly_rounded():
    values = torch.from_numpy(np.arange(2.0, 2.1, 2.0**-22, dtype=np.float32))
    square_root_(values, out=(roots := torch.empty_like(values)))
    assert np.array_equal(roots.numpy(), np.sqrt(values.numpy().astype(np.float64)).astype(np.float32))


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
    """A closure that makes every kind of step on one segment, on buffers made beforehand; called once already."""
    codec = CpuCodec(block_size=2048, max_numel=MOST_NUMEL, dtype=torch.float32)
    live = random_mask(MOST_NUMEL) if masked else None
    values, out, error, scratch = (random_values(MOST_NUMEL, seed=seed) for seed in range(4))
    encoded, sent, served = (empty_message(codec, MOST_NUMEL, live) for _ in range(3))
    momentum = random_momentum(MOST_NUMEL)
    codec.encode_(out, encoded)

    def call():
        if zero_block:
            values[:2048] = 0.0
        codec.encode_(values, encoded)
        codec.decode_(out, encoded, 0.5)
        codec.add_decoded_(out, encoded, 0.5)
        codec.encode_momentum_(scratch, error, encoded, momentum, sent)
        codec.settle_momentum_(error, encoded, momentum, sent)
        codec.encode_mean_(scratch, error, [encoded, sent], served)
        codec.settle_mean_(error, [encoded, sent], served)

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
