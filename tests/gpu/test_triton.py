"""The Triton codec against the reference: on the GPU where there is one, else in Triton's interpreter.

The reference runs on the CPU, and is given the square root that it should have: rounded to nearest.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_onebit.engine.momentum import LocalMomentum
from lightning_onebit.quantize.encoded import Encoded

from lightning_onebit.config import CompressionConfig
from lightning_onebit.flat import flat_view
from lightning_onebit.quantize import OLDEST_TRITON, make_codec, segment_numel
from lightning_onebit.quantize.layout import CUDA_SEGMENT_NUMEL, SEGMENT_NUMEL
from lightning_onebit.quantize.reference import ReferenceCodec, pack_bits, unpack_bits

pytest.importorskip("triton", minversion=".".join(map(str, OLDEST_TRITON)))
from lightning_onebit.quantize.triton import TritonCodec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")

SHAPES = [(8, 1), (8, 13), (24, 61), (64, 150), (2048, 2048), (2048, 5001), (16384, 13), (16384, 20_000)]
"""Block size and numel: no block of it whole, one, several; the last one short, or not."""

DECAY, WEIGHT, EPS, KAPPA = 0.9, 0.1, 1e-8, 31.6
GUARD = 32

each_device = pytest.mark.parametrize("device", [DEVICE], ids=["compiled" if DEVICE == "cuda" else "interpreted"])
each_scale = pytest.mark.parametrize("scale", ["l2", "l1"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
each_shape = pytest.mark.parametrize(("block_size", "numel"), SHAPES)
each_masked = pytest.mark.parametrize("masked", [False, True], ids=["all live", "some dead"])


class RoundedMomentum(LocalMomentum):
    """Torch's own square root, where it comes from MKL, is off by a last place for a fifth of all float32 numbers."""

    def add_gradient_(self, target, workspace):
        if self.second_moment is None:
            super().add_gradient_(target, workspace)
            return
        root = torch.from_numpy(np.sqrt(self.second_moment.to(target.dtype).numpy()))
        target.add_((self.gradient / (root + self.eps)).clamp(-self.kappa, self.kappa) * self.weight)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_values(numel, dtype=torch.float32, seed=0):
    return torch.randn(numel, generator=seeded(seed), dtype=torch.float64).to(dtype)


def random_live(numel, seed=7):
    return pack_bits(torch.rand(numel, generator=seeded(seed)) < 0.7)


def random_encoded(numel, block_size, live=None, seed=1):
    """Any bits and scales, a zero scale among them; bits after the last element are zero, as they always are."""
    scales = torch.rand(-(-numel // block_size), generator=seeded(seed)) + 0.1
    scales[1::3] = 0.0
    return Encoded(pack_bits(torch.rand(numel, generator=seeded(seed + 1)) < 0.5), scales, live)


def random_momentum(numel, dtype, moment_dtype, seed=2):
    """Some gradients are clamped, some second moments zero."""
    gradient, moment = random_values(numel, dtype, seed), None
    gradient[3::29] *= 1e3  # is clamped without a second moment as well
    if moment_dtype is not None:
        moment = random_values(numel, torch.float64, seed + 1).square()
        moment[::5] *= 1e-8
        moment[::11] = 0.0
        gradient[::22] = 0.0
        moment = moment.to(moment_dtype)
    return RoundedMomentum(
        gradient=gradient,
        second_moment=moment,
        decay=DECAY,
        weight=WEIGHT,
        eps=EPS,
        kappa=KAPPA,
    )


def moved(momentum, device):
    moment = momentum.second_moment
    return LocalMomentum(
        gradient=momentum.gradient.to(device, copy=True),
        second_moment=None if moment is None else moment.to(device, copy=True),
        decay=momentum.decay,
        weight=momentum.weight,
        eps=momentum.eps,
        kappa=momentum.kappa,
    )


def placed(encoded, device):
    return Encoded(*(None if part is None else part.to(device, copy=True) for part in encoded))


class Receiver:
    """An encoded segment to write to, in the middle of memory that nobody may touch, at an odd place."""

    def __init__(self, numel, block_size, device, live=None):
        nbytes, blocks = -(-numel // 8), -(-numel // block_size)
        self._bytes = torch.full((nbytes + 2 * GUARD + 1,), 0xA5, dtype=torch.uint8, device=device)
        self._scales = torch.full((blocks + 2 * GUARD + 1,), 7.0, device=device)
        self._nbytes, self._blocks = nbytes, blocks
        self.encoded = Encoded(
            self._bytes[GUARD + 1 : GUARD + 1 + nbytes],
            self._scales[GUARD + 1 : GUARD + 1 + blocks],
            None if live is None else live.to(device, copy=True),
        )

    def take(self):
        """What was written, on the CPU."""
        for memory, filling, size in ((self._bytes, 0xA5, self._nbytes), (self._scales, 7.0, self._blocks)):
            around = torch.cat([memory[: GUARD + 1], memory[GUARD + 1 + size :]])
            assert (around == filling).all(), "written outside of signs or scales"
        return placed(self.encoded, "cpu")


def guarded(values, device):
    """A copy of ``values`` in the middle of memory, and a check that what lies around it is as it was."""
    memory = torch.full((values.numel() + 2 * GUARD,), 7.0, dtype=values.dtype, device=device)
    inside = memory[GUARD : GUARD + values.numel()].copy_(values)

    def check():
        assert (torch.cat([memory[:GUARD], memory[GUARD + values.numel() :]]) == 7.0).all(), "written outside of values"

    return inside, check


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    a, b = (tensor.cpu().numpy().view(f"u{tensor.element_size()}") for tensor in (actual, expected))
    different = np.flatnonzero(a != b)[:5]
    assert not different.size, (different, actual.cpu()[different], expected.cpu()[different])


def expected_scales(values, block_size, scale, live=None):
    """By the definition, in the order of additions that the kernels promise: the same bits, wherever they run."""
    values = values.double().numpy()
    alive = np.ones(len(values), dtype=bool) if live is None else unpack_bits(live, len(values)).numpy()
    scales = []
    for start in range(0, len(values), block_size):
        block, counted = values[start : start + block_size], alive[start : start + block_size]
        terms = np.zeros(1 << (block_size - 1).bit_length())
        terms[: len(block)] = (np.abs(block) if scale == "l1" else block * block) * counted
        while len(terms) > 1:
            terms = terms[::2] + terms[1::2]
        mean = terms[0] / max(counted.sum(), 1)
        scales.append(mean if scale == "l1" else math.sqrt(mean))
    return torch.tensor(scales, dtype=torch.float64).float()


def assert_encodes(encode, values, block_size, scale, device, live=None):
    """``encode(receiver's encoded)`` quantizes ``values``: bits as the reference, scales as promised and near it."""
    receiver = Receiver(values.numel(), block_size, device, live)
    encode(receiver.encoded)
    sent = receiver.take()
    expected = Receiver(values.numel(), block_size, "cpu", live)
    ReferenceCodec(block_size=block_size, scale=scale).encode_(values.clone(), expected.encoded)
    assert_same_bits(sent.signs, expected.encoded.signs)
    assert_same_bits(sent.scales, expected_scales(values, block_size, scale, live))
    # The reference rounds after each of the additions that it does in one lane.
    rtol = 1e-6 + torch.finfo(values.dtype).eps / 2 * block_size / 4
    torch.testing.assert_close(sent.scales, expected.encoded.scales, rtol=rtol, atol=2.0**-148)
    return sent


def codecs(block_size, scale="l2"):
    return TritonCodec(block_size=block_size, scale=scale), ReferenceCodec(block_size=block_size, scale=scale)


# ---- encode and decode


@each_device
@each_dtype
@each_scale
@each_masked
@each_shape
def test_encode(device, dtype, scale, masked, block_size, numel):
    triton, reference = codecs(block_size, scale)
    values = random_values(numel, dtype)
    values[::7] = 0.0
    values[1::7] = -0.0
    live = random_live(numel) if masked else None
    residual, check = guarded(values, device)

    sent = assert_encodes(lambda encoded: triton.encode_(residual, encoded), values, block_size, scale, device, live)
    check()
    reference.add_decoded_(values, sent, -1.0)
    assert_same_bits(residual, values)


@each_device
@each_masked
@each_shape
@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1.0), (torch.float32, -0.37), (torch.float64, -0.37)], ids=str
)
def test_decode_and_add(device, dtype, masked, block_size, numel, factor):
    triton, reference = codecs(block_size)
    encoded = random_encoded(numel, block_size, random_live(numel) if masked else None)
    values = random_values(numel, dtype)
    values[::3] = -0.0  # stays -0.0 where an element is dead

    for method in ("decode_", "add_decoded_"):
        out, check = guarded(values, device)
        getattr(triton, method)(out, placed(encoded, device), factor)
        check()
        expected = values.clone()
        getattr(reference, method)(expected, encoded, factor)
        assert_same_bits(out, expected)


@each_device
@each_scale
@each_dtype
def test_blocks_of_very_different_size(device, scale, dtype):
    magnitudes = [1e38, 1e30, 1.0, 1e-30, 1e-38, 1e-42, 2.0**-149, 0.0, -0.0]
    values = torch.tensor(magnitudes, dtype=dtype).repeat_interleave(24) * random_values(24 * 9, dtype).sign()
    residual = values.to(device, copy=True)
    codec = codecs(24, scale)[0]
    sent = assert_encodes(lambda encoded: codec.encode_(residual, encoded), values, 24, scale, device)
    torch.testing.assert_close(sent.scales, torch.tensor(magnitudes), rtol=1e-6, atol=0)
    assert torch.isfinite(residual).all()


@each_device
@each_scale
@each_dtype
def test_the_largest_float32_has_a_scale(device, scale, dtype):
    values = torch.full((2048,), torch.finfo(torch.float32).max, dtype=dtype)
    values[::2] *= -1
    residual = values.to(device, copy=True)
    codec = codecs(2048, scale)[0]
    sent = assert_encodes(lambda encoded: codec.encode_(residual, encoded), values, 2048, scale, device)
    assert sent.scales.tolist() == [torch.finfo(torch.float32).max]
    assert not residual.any()


@each_device
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("masked", [False, True], ids=["live", "dead"])
def test_a_value_that_is_not_finite_is_not_silent(device, bad, masked):
    values = random_values(64)
    values[20] = bad
    bits = torch.ones(64, dtype=torch.bool)
    bits[20] = not masked
    receiver = Receiver(64, 16, device, pack_bits(bits))
    residual = values.to(device, copy=True)
    codecs(16)[0].encode_(residual, receiver.encoded)
    assert torch.isfinite(receiver.take().scales).tolist() == [True, False, True, True]
    assert torch.isfinite(residual.view(4, 16)[[0, 2, 3]]).all()


@each_device
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_gradient_that_is_not_a_number_is_not_clamped_away(device):
    momentum = random_momentum(16, torch.float32, torch.float32)
    momentum.gradient[3] = math.nan
    receiver = Receiver(16, 16, device)
    error = torch.zeros(16, device=device)
    previous = placed(random_encoded(16, 16), device)
    codecs(16)[0].encode_momentum_(error, error, previous, moved(momentum, device), receiver.encoded)
    assert receiver.take().scales.isnan().all()
    assert error.isnan().all()


@each_device
@each_scale
def test_a_block_without_live_elements_has_scale_zero(device, scale):
    values = random_values(20)
    residual = values.to(device, copy=True)
    live = pack_bits(torch.arange(20) >= 8)
    codec = codecs(8, scale)[0]
    sent = assert_encodes(lambda encoded: codec.encode_(residual, encoded), values, 8, scale, device, live)
    assert (sent.scales == 0).tolist() == [True, False, False]
    assert_same_bits(residual[:8], values[:8])


@each_device
def test_elements_that_do_not_exist_send_no_bit(device):
    momentum = LocalMomentum(gradient=torch.ones(13), second_moment=torch.ones(13), decay=DECAY, weight=WEIGHT)
    error, receiver = torch.zeros(13, device=device), Receiver(13, 8, device)
    previous = placed(random_encoded(13, 8), device)._replace(scales=torch.zeros(2, device=device))
    codecs(8)[0].encode_momentum_(error, error, previous, moved(momentum, device), receiver.encoded)  # without eps: 0 / 0
    assert receiver.take().signs.tolist() == [0b11111111, 0b11111]


@each_device
def test_no_elements_is_no_work(device):
    codec = codecs(8)[0]
    empty, encoded = torch.empty(0, device=device), Receiver(0, 8, device).encoded
    momentum = LocalMomentum(gradient=empty, second_moment=None, decay=DECAY, weight=WEIGHT)
    codec.encode_(empty, encoded)
    codec.decode_(empty, encoded)
    codec.encode_momentum_(empty, empty, encoded, momentum, encoded)
    codec.encode_mean_(empty, empty, [encoded], encoded)


# ---- whole steps


@each_device
@each_masked
@each_shape
@pytest.mark.parametrize(
    ("dtype", "moment_dtype"),
    [
        (torch.float32, None),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_momentum(device, dtype, masked, block_size, numel, moment_dtype):
    scale = "l1" if numel % 2 else "l2"
    triton, reference = codecs(block_size, scale)
    error, momentum = random_values(numel, dtype), random_momentum(numel, dtype, moment_dtype)
    # What was live then need not be what is live now.
    previous = random_encoded(numel, block_size, random_live(numel, seed=8) if masked else None)
    live = random_live(numel) if masked else None
    values = error.clone()
    reference.add_decoded_(values, previous, momentum.decay)
    momentum.add_gradient_(values, torch.empty_like(values))

    arguments = (placed(previous, device), moved(momentum, device))
    in_place, check = guarded(error, device)
    sent = assert_encodes(
        lambda encoded: triton.encode_momentum_(in_place, in_place, *arguments, encoded),
        values, block_size, scale, device, live,
    )  # fmt: skip
    check()
    expected = error.clone()
    reference.settle_momentum_(expected, previous, momentum, sent)
    assert_same_bits(in_place, expected)

    kept, scratch, receiver = (
        error.to(device, copy=True),
        torch.full_like(in_place, math.nan),
        Receiver(numel, block_size, device, live),
    )
    triton.encode_momentum_(scratch, kept, *arguments, receiver.encoded)
    assert_same_bits(kept, error)
    assert_same_bits(scratch, expected)
    for one, other in zip(receiver.take()[:2], sent[:2], strict=True):
        assert_same_bits(one, other)

    triton.settle_momentum_(kept, *arguments, receiver.encoded)
    assert_same_bits(kept, expected)
    for one, other in zip(receiver.take()[:2], sent[:2], strict=True):
        assert_same_bits(one, other)
    assert_same_bits(arguments[1].gradient, momentum.gradient)
    assert_same_bits(arguments[0].signs, previous.signs)


def in_one_buffer(messages, gap):
    """Messages as they arrive: in one buffer, each ``gap`` bytes after the one before; ``None``: each somewhere."""
    if gap is None:
        return [Encoded(m.signs.clone(), m.scales.clone(), m.live) for m in messages]
    device = messages[0].signs.device
    blocks, nbytes = messages[0].scales.numel(), messages[0].signs.numel()
    size = -(-(4 * blocks + nbytes + gap) // 4) * 4
    buffer = torch.full((len(messages) * size,), 0xA5, dtype=torch.uint8, device=device)
    views = []
    for rank, message in enumerate(messages):
        part = buffer[rank * size : (rank + 1) * size]
        scales, signs = part[: 4 * blocks].view(torch.float32), part[4 * blocks : 4 * blocks + nbytes]
        views.append(Encoded(signs.copy_(message.signs), scales.copy_(message.scales), message.live))
    return views


@each_device
@each_masked
@each_shape
@pytest.mark.parametrize(
    ("dtype", "count"),
    [(torch.float32, 1), (torch.float32, 2), (torch.float32, 3), (torch.float32, 4), (torch.float64, 3)],
    ids=str,
)
def test_mean(device, dtype, masked, block_size, numel, count):
    scale = "l1" if count % 2 else "l2"
    triton, reference = codecs(block_size, scale)
    error, live = random_values(numel, dtype), random_live(numel) if masked else None
    received = [random_encoded(numel, block_size, live, seed=10 + rank) for rank in range(count)]
    there = None if live is None else live.to(device, copy=True)
    messages = [placed(each, device)._replace(live=there) for each in received]
    messages = in_one_buffer(messages, gap=None if count == 4 else 8 * count)

    expected, expected_served = error.clone(), Receiver(numel, block_size, "cpu", live)
    reference.encode_mean_(expected, expected, received, expected_served.encoded)

    in_place, check = guarded(error, device)
    receiver = Receiver(numel, block_size, device)
    served = receiver.encoded._replace(live=there)
    triton.encode_mean_(in_place, in_place, messages, served)
    check()
    sent = receiver.take()
    assert_same_bits(sent.signs, expected_served.encoded.signs)
    torch.testing.assert_close(sent.scales, expected_served.encoded.scales, rtol=1e-5, atol=0)
    expected = error.clone()
    reference.settle_mean_(expected, received, sent._replace(live=live))
    assert_same_bits(in_place, expected)

    kept, scratch = error.to(device, copy=True), torch.full_like(in_place, math.nan)
    receiver = Receiver(numel, block_size, device)
    served = receiver.encoded._replace(live=there)
    triton.encode_mean_(scratch, kept, messages, served)
    assert_same_bits(kept, error)
    assert_same_bits(scratch, expected)
    triton.settle_mean_(kept, messages, served)
    assert_same_bits(kept, expected)
    for one, other in zip(receiver.take()[:2], sent[:2], strict=True):
        assert_same_bits(one, other)


@each_device
def test_a_wake_up_call_of_any_rank_is_passed_on(device):
    live = pack_bits(torch.tensor([1, 0, 0, 0, 1, 1, 1, 1, 0], dtype=torch.bool)).to(device)
    scales = torch.ones(2, device=device)
    called = [Encoded(torch.tensor([bits, 0], dtype=torch.uint8, device=device), scales, live) for bits in (2, 0, 1, 4)]
    error = torch.zeros(9, device=device)
    error[8] = -1e-45
    receiver = Receiver(9, 8, device)
    codecs(8)[0].encode_mean_(error, error, called, receiver.encoded._replace(live=live))
    bits = unpack_bits(receiver.take().signs, 9)
    assert bits[[1, 2, 3, 8]].tolist() == [True, True, False, True]
    assert error[[1, 2, 3]].tolist() == [0.0, 0.0, 0.0]


@each_device
@pytest.mark.parametrize("order", ["reversed", "twice", "scattered"])
def test_messages_may_lie_anywhere(device, order):
    buffer = in_one_buffer([placed(random_encoded(61, 24, seed=seed), device) for seed in range(3)], gap=4)
    received = {
        "reversed": buffer[::-1],
        "twice": [buffer[0], buffer[0], buffer[0]],
        "scattered": [buffer[1], buffer[0], buffer[2]],
    }[order]
    error = random_values(61)
    expected = error.clone()
    receiver = Receiver(61, 24, device)
    out = error.to(device, copy=True)
    codecs(24)[0].encode_mean_(out, out, received, receiver.encoded)
    codecs(24)[1].settle_mean_(expected, [placed(each, "cpu") for each in received], receiver.take())
    assert_same_bits(out, expected)


@each_device
def test_momentum_agrees_with_torchs_own_square_root(device):
    momentum = random_momentum(150, torch.float32, torch.float32)
    momentum.second_moment.add_(0.1)  # so that a last place of the root stays a last place
    on_device = moved(momentum, device)
    error, sent = torch.zeros(150, device=device), random_encoded(150, 64)
    nothing = Encoded(sent.signs, torch.zeros(3))
    codecs(64)[0].settle_momentum_(error, placed(nothing, device), on_device, placed(nothing, device))
    expected = torch.zeros(150, device=device)
    on_device.add_gradient_(expected, torch.empty_like(expected))
    if device == "cuda":
        assert_same_bits(error, expected)
    else:
        torch.testing.assert_close(error, expected, rtol=3e-7, atol=0)


@each_device
def test_messages_of_other_live_elements_are_refused(device):
    message = placed(random_encoded(13, 8, random_live(13)), device)
    error, served = torch.zeros(13, device=device), message._replace(live=message.live.clone())
    for other in (served, message._replace(live=None)):
        with pytest.raises(AssertionError):
            codecs(8)[0].encode_mean_(error, error, [message], other)


# ---- block locality


@each_device
def test_the_order_of_additions_is_part_of_the_kernel(device):
    # Half a last place of float32, and two units that are too small to count unless they meet each other first.
    values = torch.zeros(20, 2048, dtype=torch.float64)
    for seed, block in enumerate(values):
        places = torch.randperm(2048, generator=seeded(seed))[:3] if seed else torch.tensor([0, 128, 192])
        block[places] = torch.tensor([1 + 2.0**-24, 2.0**-53, 2.0**-53], dtype=torch.float64)
    values = values.view(-1)
    residual = values.to(device, copy=True)
    codec = codecs(2048, "l1")[0]
    sent = assert_encodes(lambda encoded: codec.encode_(residual, encoded), values, 2048, "l1", device)
    assert set(sent.scales.tolist()) == {1 / 2048, (1 + 2.0**-23) / 2048}


@each_device
@each_scale
@each_masked
def test_a_block_does_not_depend_on_how_its_parameter_was_cut(device, scale, masked):
    numel, block_size = 5 * 2048 + 333, 2048
    codec = codecs(block_size, scale)[0]
    values, live = random_values(numel), None
    if masked:
        bits = torch.ones(numel, dtype=torch.bool)
        bits[3000] = False  # one block: the others are whole, with a mask or without one
        live = pack_bits(bits)

    def encode(start, end, offset, mask):
        out = torch.empty(end - start + offset, device=device)[offset:].copy_(values[start:end])
        receiver = Receiver(end - start, block_size, device, mask)
        codec.encode_(out, receiver.encoded)
        return [*receiver.take()[:2], out]

    whole = encode(0, numel, 0, live)
    for offset, cuts in enumerate([(0, 2048, 8192, numel), (0, 4096, 10240, numel), (0, 6144, numel)], start=1):
        parts = []
        for start, end in pairwise(cuts):
            mask = live[start // 8 : -(-end // 8)] if masked and start <= 3000 < end else None
            parts.append(encode(start, end, offset, mask))
        for one, joined in zip(whole, zip(*parts, strict=True), strict=True):
            assert_same_bits(one, torch.cat(joined))


@each_device
def test_parameters_that_are_not_contiguous(device):
    param = random_values(2 * 3 * 4 * 5).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    moment = torch.empty_like(param).copy_(random_values(120, seed=1).view(2, 3, 4, 5).square())
    gradient = torch.empty_like(param).copy_(random_values(120, seed=2).view(2, 3, 4, 5))
    triton, reference = codecs(64)
    previous, results = random_encoded(120, 64), []
    for codec, where, kind in ((triton, device, LocalMomentum), (reference, "cpu", RoundedMomentum)):
        there = [tensor.to(where, copy=True) for tensor in (param, gradient, moment)]
        assert not there[0].is_contiguous()
        momentum = kind(
            gradient=flat_view(there[1]), second_moment=flat_view(there[2]), decay=DECAY, weight=WEIGHT, eps=EPS, kappa=KAPPA
        )
        error = torch.zeros(120, device=where)
        codec.settle_momentum_(error, placed(previous, where), momentum, placed(previous, where))
        codec.add_decoded_(flat_view(there[0]), placed(previous, where), 0.5)
        results.append((error, there[0].contiguous().view(-1)))
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


# ---- on a GPU only


@needs_gpu
def test_places_are_not_limited_to_32_bits():
    numel, block_size = 2**31 + 16384 + 13, 16384
    if torch.cuda.mem_get_info()[0] < 6 * numel:
        pytest.skip("needs 13 GB of GPU memory")
    out = torch.zeros(numel, device="cuda")
    signs = torch.zeros(-(-numel // 8), dtype=torch.uint8, device="cuda")
    signs[-1] = 0b10101
    scales = torch.arange(-(-numel // block_size), device="cuda", dtype=torch.float32)
    codecs(block_size)[0].add_decoded_(out, Encoded(signs, scales))
    last = scales[-1].item()
    assert out[-5:].tolist() == [last, -last, last, -last, last]
    assert out[2**31].item() == -(2**31 // block_size)


@needs_gpu
def test_no_call_waits_for_the_gpu():
    codec = codecs(2048)[0]
    error, live = random_values(5001).cuda(), random_live(5001).cuda()
    encoded = placed(random_encoded(5001, 2048), "cuda")._replace(live=live)
    momentum = moved(random_momentum(5001, torch.float32, torch.float32), "cuda")
    scattered = [placed(random_encoded(5001, 2048, seed=seed), "cuda")._replace(live=live) for seed in (3, 4, 5)]
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        codec.encode_momentum_(error, error, encoded, momentum, encoded)
        codec.encode_mean_(error, error, scattered, encoded)
        codec.settle_mean_(error, scattered, encoded)
        codec.add_decoded_(error, encoded, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode(before)


# ---- what is compiled, which needs no GPU


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only")
def test_compiled_kernels_round_to_nearest_and_never_fuse(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).parents[1] / "support" / "compile_kernels.py"
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=110)
    assert run.returncode == 0, run.stderr
    kernels = json.loads(run.stdout.splitlines()[-1])
    assert set(kernels) == {"encode", "decode", "momentum", "momentum float64", "mean"}
    for name, found in kernels.items():
        for forbidden in ("fma", "approx", "ftz", "full"):
            assert not found[forbidden], (name, forbidden)
        assert found["ld.global.v4"] or name == "momentum float64", name
    for wanted in ("div.rn.f32", "sqrt.rn.f32", "min.NaN.f32", "max.NaN.f32"):
        assert kernels["momentum"][wanted], wanted
    assert kernels["encode"]["sqrt.rn.f64"]
    assert not kernels["momentum float64"]["div.rn.f32"]


# ---- dispatch


@pytest.mark.parametrize(("installed", "name"), [(True, "triton"), (False, "reference")])
def test_dispatch_on_a_gpu(monkeypatch, installed, name):
    if not installed:
        monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    codec = make_codec(CompressionConfig(scale="l1", block_size=64), device=torch.device("cuda", 1), dtype=torch.float32)
    assert (codec.name, codec.scale, codec.block_size) == (name, "l1", 64)


def test_an_old_triton_is_not_used_and_it_is_said(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "3.6.1+git")
    with pytest.warns(
        UserWarning, match=r"Triton 3.6.1\+git is installed, but the kernels are only known to be right from 3.7 on"
    ):
        codec = make_codec(CompressionConfig(), device=torch.device("cuda", 0), dtype=torch.float32)
    assert codec.name == "reference"


def test_segments_are_longer_on_a_gpu():
    assert segment_numel(torch.device("cuda", 3)) == CUDA_SEGMENT_NUMEL
    assert segment_numel(torch.device("cpu")) == SEGMENT_NUMEL < CUDA_SEGMENT_NUMEL
