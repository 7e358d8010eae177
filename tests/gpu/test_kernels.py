"""The Triton kernels of a whole bucket against the reference: on the GPU where there is one, else in Triton's interpreter.

The reference runs on the CPU. Scales are sums in float64 rounded to float32, so that they are equal as well, whatever the
order of additions: everything is compared bit by bit.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from buckets import (
    ADAM,
    CPU,
    assert_same,
    assert_same_bits,
    copy_of_memory,
    copy_of_step,
    exists,
    randn,
    random_layouts,
    random_memory,
    random_step,
    refresh_,
    refresh_numbers,
    seeded,
)

from lightning_onebit.coefficients import Coefficients
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.clipping import NormSketch
from lightning_onebit.flat import flat_view
from lightning_onebit.quantize.reference import ReferenceKernels, pack_bits, unpack_bits
from lightning_onebit.quantize.tensor_sketch import SEGMENT_NUMEL, TensorSketch

pytest.importorskip("triton", minversion="3.4")  # before, its interpreter lacks an operation
from interpreter import patch_once
from work_counter import NoKernel, replace_kernels

from lightning_onebit.quantize import (
    make_kernels,
    triton_check,
    triton_gradients,
    triton_sketch,
    triton_tables,
    triton_variance,
)
from lightning_onebit.quantize import triton as triton_kernels
from lightning_onebit.quantize.triton import TritonKernels
from lightning_onebit.quantize.triton_gradients import add_parts_, draw_sketch, gather_, scale_, sketch_
from lightning_onebit.quantize.triton_tables import count_launches, tables_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
each_scale = pytest.mark.parametrize("scale", ["l2", "l1"])
each_space = pytest.mark.parametrize("space", ["update", "momentum"])
each_commit = pytest.mark.parametrize("early", [True, False], ids=["at once", "late"])

LARGEST = torch.finfo(torch.float32).max
SGD = Coefficients(beta=0.9, weight=1.0, step_size=0.1)
MIXED = [
    ADAM,
    ADAM._replace(coupled_decay=0.01),
    ADAM._replace(sign=-1.0, shrink=0.99),
    ADAM._replace(beta=0.8, weight=0.3, kappa=3.0, eps=1e-3, step_size=3e-3),
]
NUMELS = [1, 7, 0, 8, 9, 63, 64, 65, 150]
"""Around a byte and a block of 64."""


@pytest.fixture(autouse=True)
def fast_interpreter(monkeypatch):
    if DEVICE.type == "cpu":
        patch_once(monkeypatch)


def errors_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def run_step(kernels, memory, step, *, early, index=0):
    """A whole step of a rank; peers are those that ``memory.received`` comes from. It is served its own share, too."""
    kernels.encode_(memory, index, step, commit=early)
    kernels.serve_(memory, step, commit=early)
    memory.turn_results_()
    kernels.apply_(memory, index, step, commit=not early)


def assert_equals_reference(memory, step, *, early=True, apart_from=(), **settings):
    """A step by the kernels has the reference's bits. Returns what it left behind, on the CPU."""
    actual, expected = ((copy_of_memory(memory, d), copy_of_step(step, d)) for d in (DEVICE, CPU))
    run_step(TritonKernels(**settings), *actual, early=early)
    run_step(ReferenceKernels(**settings), *expected, early=early)
    assert_same(actual, expected, apart_from=apart_from)
    return tuple(copy(each) for copy, each in zip((copy_of_memory, copy_of_step), actual, strict=True))


# ---- whole steps


@pytest.mark.parametrize(
    ("dtype", "scale", "space", "early"),
    [
        (torch.float32, "l2", "update", False),
        (torch.float32, "l1", "momentum", False),
        (torch.float32, "l1", "update", True),
        (torch.float32, "l2", "momentum", True),
        (torch.bfloat16, "l2", "update", False),
        (torch.bfloat16, "l1", "momentum", True),
        (torch.float64, "l1", "update", False),
        (torch.float64, "l2", "momentum", True),
    ],
    ids=str,
)
def test_a_step(dtype, scale, space, early):
    [layout] = random_layouts(NUMELS)
    memory = random_memory(layout, masked=early, chunk=int(early), dtype=errors_dtype(dtype))
    step = random_step(NUMELS, dtype=dtype, sits_out=[3, 7], missing=[4])
    after = assert_equals_reference(memory, step, early=early, scale=scale, space=space)
    assert not torch.equal(after[0].error, memory.error)
    assert not torch.equal(after[1].params[8], step.params[8])
    assert_same_bits(after[1].params[7], step.params[7])


@pytest.mark.parametrize("block_size", [8, 24, 2048])
@each_commit
def test_block_sizes(block_size, early):
    numels = [block_size - 1, block_size, block_size + 1, 2 * block_size + 5, 1]
    [layout] = random_layouts(numels, block_size=block_size, num_chunks=2)
    memory = random_memory(layout, masked=not early, seed=1)
    assert_equals_reference(memory, random_step(numels, seed=1), early=early)


def test_the_largest_block():
    [layout] = random_layouts([16384 + 13], block_size=16384, num_chunks=1)
    assert_equals_reference(random_memory(layout), random_step([16384 + 13]))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
@each_commit
def test_ranks(ranks, early):
    numels = [130, 5, 70]
    [layout] = random_layouts(numels, num_chunks=ranks)
    memory = random_memory(layout, chunk=ranks - 1, masked=True, seed=ranks)
    assert_equals_reference(memory, random_step(numels, seed=ranks), early=early, scale="l1")


@each_space
@each_commit
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_of_parameter_groups(space, early, dtype):
    """Maximized, with decay of both kinds, or not; each parameter with its own numbers."""
    numels = [70, 9, 20, 64]
    [layout] = random_layouts(numels)
    step = random_step(numels, dtype=dtype, coefficients=MIXED)
    step.params[1][3] = math.inf  # does not get into the errors
    step.params[1][4] = math.nan
    after, _ = assert_equals_reference(random_memory(layout), step, early=early, space=space)
    assert torch.isfinite(after.error).all()


@each_commit
def test_sgd_without_d_that_looks_ahead(early):
    numels = [70, 9, 20]
    [layout] = random_layouts(numels)
    memory = random_memory(layout, has_rms=False, masked=True)
    step = random_step(numels, coefficients=[SGD, SGD._replace(nesterov=0.9), SGD._replace(nesterov=0.5, shrink=0.9)])
    assert_equals_reference(memory, step, early=early)


@each_commit
@pytest.mark.parametrize("gathered", [False, True], ids=["gradients", "mean gradients"])
def test_a_share_of_the_bucket(early, gathered):
    """Hierarchical: this rank compresses chunks 2 and 3 of 6, and serves chunk 3."""
    numels = [200, 5, 130, 70, 300]
    [layout] = random_layouts(numels, num_chunks=6)
    memory = random_memory(layout, share=range(2, 4), chunk=3, masked=True, seed=2)
    step = random_step(numels, sits_out=[3], missing=[1], seed=2)
    if gathered:
        flat = randn(layout.flat_numel_of(memory.share), 3, torch.float32)
        step.share_gradients[5] = torch.where(exists(layout)[memory.share_flat], flat, 0.0)
    actual, expected = ((copy_of_memory(memory, d), copy_of_step(step, d)) for d in (DEVICE, CPU))
    run_step(TritonKernels(), *actual, early=early, index=5)
    run_step(ReferenceKernels(), *expected, early=early, index=5)
    assert_same(actual, expected)
    if not early and gathered:
        step.share_gradients[5][7] = math.nan
        step = copy_of_step(step, DEVICE)
        TritonKernels().encode_(copy_of_memory(memory, DEVICE), 5, step, commit=False)
        assert step.flags[0] == 1


def test_several_buckets_of_one_step():
    """Parameters lie in two buckets each; one table of numbers for all."""
    numels = [100, 3, 100, 90]
    layouts = random_layouts(numels, block_size=8, bucket_numel=80)
    assert len(layouts) > 3
    steps = [copy_of_step(random_step(numels, coefficients=MIXED), d) for d in (DEVICE, CPU)]
    for index, layout in enumerate(layouts):
        memory = random_memory(layout, seed=index)
        memories = [copy_of_memory(memory, d) for d in (DEVICE, CPU)]
        for kernels, *arguments in zip((TritonKernels(), ReferenceKernels()), memories, steps, strict=True):
            run_step(kernels, *arguments, early=True, index=index)
        assert_same(*zip(memories, steps, strict=True))


def test_errors_committed_at_once_or_late_are_the_same():
    numels = [70, 9, 150]
    [layout] = random_layouts(numels)
    memory = random_memory(layout, masked=True)
    step = random_step(numels, sits_out=[1], coefficients=ADAM._replace(coupled_decay=0.1))
    outcomes = []
    for early in (True, False):
        outcomes.append((copy_of_memory(memory, DEVICE), copy_of_step(step, DEVICE)))
        run_step(TritonKernels(), *outcomes[-1], early=early)
    for name in ("error", "server_error", "sent"):
        assert_same_bits(getattr(outcomes[0][0], name), getattr(outcomes[1][0], name), name)
    for one, other in zip(outcomes[0][1].params, outcomes[1][1].params, strict=True):
        assert_same_bits(one, other)


# ---- the second moment


RENEWED = [n._replace(square_decay=0.9 + 0.02 * p, root_r=0.3 + 0.2 * p) for p, n in enumerate(MIXED)]


@pytest.mark.parametrize(
    ("dtype", "early"),
    [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False), (torch.float64, True), (torch.float64, False)],
    ids=str,
)
def test_a_step_with_d_as_its_code_renews_the_second_moment(dtype, early):
    """With decay that enters the gradient and without, elements that are not live, and parameters that sit out."""
    for coefficients in (RENEWED * 3, ADAM._replace(square_decay=0.9, root_r=0.7)):
        coefficients = coefficients[: len(NUMELS)] if isinstance(coefficients, list) else coefficients
        [layout] = random_layouts(NUMELS)
        memory = random_memory(layout, masked=True, chunk=int(early), renews=True, dtype=errors_dtype(dtype))
        step = random_step(NUMELS, dtype=dtype, sits_out=[3, 7], missing=[4], coefficients=coefficients)
        step.params[8][3] = math.inf  # does not get into v
        after, _ = assert_equals_reference(memory, step, early=early)
        assert not torch.equal(after.second_moment, memory.second_moment)
        assert torch.isfinite(after.second_moment).all()


@pytest.mark.parametrize("block_size", [8, 24, 64, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_refresh(block_size, dtype):
    """Of a rank that receives its own message twice, with moments of all sizes, and blocks of zeros."""
    numels = [1, block_size - 1, block_size, 2 * block_size + 5]
    [layout] = random_layouts(numels, block_size=block_size)
    memory = random_memory(layout, renews=True, masked=True, dtype=dtype)
    memory.second_moment[: block_size // 2] *= 1e-30
    memory.second_moment[-block_size:] *= 0.0
    memory.second_moment[8] = torch.finfo(dtype).max
    outcomes = []
    for kernels, device in ((TritonKernels(), DEVICE), (ReferenceKernels(), CPU)):
        own = copy_of_memory(memory, device)
        for correction in (3.0, 1.2):
            messages = own.variance_messages()
            kernels.encode_variance_(own, messages, np.array([correction, 1.0, 2.0, 1.5]))
            messages.received.copy_(messages.sent[: messages.wire.chunk_nbytes].repeat(2))
            kernels.serve_variance_(own, messages)
            messages.result.copy_(messages.sent)
            messages.result[: messages.wire.chunk_nbytes] = messages.served
            kernels.apply_variance_(own, messages, refresh_numbers([correction, 1.0, 2.0, 1.5]))
        outcomes.append((own, messages))
    (own, messages), (expected, expected_messages) = outcomes
    for name in ("sent", "served", "result"):
        assert_same_bits(getattr(messages, name), getattr(expected_messages, name), name)
    for name in ("error", "second_moment", "second_moment_residual", "rms_code", "rms_scale"):
        assert_same_bits(getattr(own, name), getattr(expected, name), name)
    assert not torch.equal(own.rms_code.cpu(), memory.rms_code)


def test_a_refresh_of_a_share_of_the_bucket():
    """Hierarchical: two nodes of three ranks."""
    numels = [200, 5, 130, 70, 300]
    [layout] = random_layouts(numels, num_chunks=6)
    outcomes = []
    for kernels, device in ((TritonKernels(), DEVICE), (ReferenceKernels(), CPU)):
        memories = []
        for rank in range(6):
            first = rank // 2 * 2
            memory = random_memory(layout, share=range(first, first + 2), chunk=rank, renews=True, seed=rank)
            memories.append(copy_of_memory(memory, device))
        refresh_(kernels, memories, np.linspace(1.0, 2.0, 5), num_nodes=2)
        outcomes.append(memories)
    for own, expected in zip(*outcomes, strict=True):
        for name in ("error", "second_moment", "second_moment_residual", "rms_code", "rms_scale"):
            assert_same_bits(getattr(own, name), getattr(expected, name), name)


# ---- steps that do not count


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@each_dtype
def test_a_gradient_that_is_not_finite_leaves_nothing_behind(bad, dtype):
    [layout] = random_layouts([70, 9])
    memory = random_memory(layout, renews=True, dtype=errors_dtype(dtype))
    step = random_step([70, 9], dtype=dtype)
    step.gradients[1][8] = bad
    memory_there, step_there = copy_of_memory(memory, DEVICE), copy_of_step(step, DEVICE)
    TritonKernels().encode_(memory_there, 0, step_there, commit=False)
    assert step_there.flags.tolist() == [1, 1, 1]
    TritonKernels().serve_(memory_there, step_there, commit=False)
    TritonKernels().apply_(memory_there, 0, step_there, commit=True)
    step.flags[0] = 1
    assert_same((memory_there, step_there), (memory, step), apart_from=("sent", "served"))


@each_commit
def test_a_block_with_a_bad_gradient_is_bad_and_no_other(early):
    [layout] = random_layouts([64, 70], num_chunks=1)
    memory, step = random_memory(layout), random_step([64, 70])
    step.gradients[1][3] = math.nan
    memory, step = copy_of_memory(memory, DEVICE), copy_of_step(step, DEVICE)
    TritonKernels().encode_(memory, 0, step, commit=early)
    scales = memory.encoded(memory.sent, 0, memory.share_blocks).scales
    assert torch.isfinite(scales).tolist() == [True, False, True]
    assert torch.isfinite(memory.error).all() == (not early)
    assert torch.isfinite(memory.error[:64]).all()
    assert step.flags[0] == (not early)


def test_a_value_that_is_not_finite_in_a_dead_element_is_noticed():
    [layout] = random_layouts([64], num_chunks=1)
    memory, step = random_memory(layout), random_step([64])
    memory.live = memory.live_before = pack_bits(torch.arange(64) != 20)
    step.gradients[0][20] = math.inf
    step_there = copy_of_step(step, DEVICE)
    TritonKernels().encode_(copy_of_memory(memory, DEVICE), 0, step_there, commit=False)
    assert step_there.flags[0] == 1


# ---- scales


def encoded_by(kernels, memory, step):
    memory, step = copy_of_memory(memory, DEVICE), copy_of_step(step, DEVICE)
    kernels.encode_(memory, 0, step, commit=True)
    return memory, memory.encoded(memory.sent, 0, memory.share_blocks)


def memory_of(values, block_size):
    """Whose c is ``values``: gradients with weight 1, nothing else; and its step."""
    [layout] = random_layouts([len(values)], block_size=block_size, num_chunks=1)
    memory = random_memory(layout, has_rms=False, dtype=errors_dtype(values.dtype))
    memory.error.zero_()
    step = random_step([len(values)], dtype=values.dtype, coefficients=Coefficients(beta=0.0, weight=1.0, kappa=LARGEST))
    step.gradients[0].copy_(values)
    return memory, step


@each_scale
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_blocks_of_very_different_size(scale, dtype):
    magnitudes = [1e38, 1e30, 1.0, 1e-30, 1e-38, 1e-42, 2.0**-149, 0.0, -0.0]
    values = torch.tensor(magnitudes, dtype=dtype).repeat_interleave(24) * randn(24 * 9, 0, dtype).sign()
    memory, sent = encoded_by(TritonKernels(scale=scale), *memory_of(values, 24))
    torch.testing.assert_close(sent.scales.cpu(), torch.tensor(magnitudes), rtol=1e-6, atol=0)
    assert torch.isfinite(memory.error).all()


@each_scale
def test_the_largest_float32_has_a_scale(scale):
    values = torch.full((2048,), LARGEST)
    values[::2] *= -1
    memory, sent = encoded_by(TritonKernels(scale=scale), *memory_of(values, 2048))
    assert sent.scales.tolist() == [LARGEST]
    assert not memory.error.any()


def test_the_order_of_additions_is_part_of_the_kernel():
    # Half a last place of float32, and two units that are too small to count unless they meet each other first.
    values = torch.zeros(6, 2048, dtype=torch.float64)
    for seed, block in enumerate(values):
        places = torch.randperm(2048, generator=seeded(seed))[:3] if seed else torch.tensor([0, 128, 192])
        block[places] = torch.tensor([1 + 2.0**-24, 2.0**-53, 2.0**-53], dtype=torch.float64)
    _, sent = encoded_by(TritonKernels(scale="l1"), *memory_of(values.view(-1), 2048))
    expected = []
    for block in values.numpy():
        terms = block
        while len(terms) > 1:
            terms = terms[::2] + terms[1::2]
        expected.append(np.float32(terms[0] / 2048))
    assert sent.scales.tolist() == [float(each) for each in expected]
    assert len(set(expected)) == 2


@each_scale
def test_a_block_without_live_elements_has_scale_zero(scale):
    memory, step = memory_of(randn(20, 0, torch.float32), 8)
    bits = torch.arange(24) >= 8
    memory.live = pack_bits(bits & exists(memory.layout))
    before = step.gradients[0].clone()
    memory, sent = encoded_by(TritonKernels(scale=scale), memory, step)
    assert (sent.scales == 0).tolist() == [True, False, False]
    assert not unpack_bits(sent.signs.cpu())[:8].any()
    assert_same_bits(memory.error[:8], before[:8])


def test_padding_sends_no_bit_and_stays_zero():
    memory, step = memory_of(torch.ones(13), 8)
    memory, sent = encoded_by(TritonKernels(), memory, step)
    assert sent.signs.tolist() == [0b11111111, 0b11111]
    assert not memory.error[13:].any()


@each_dtype
def test_addresses_need_not_be_aligned_and_nothing_beside_them_is_written(dtype):
    """Parameters and gradients are views in the middle of memory, each at another place."""
    numels = [64, 16, 9, 70]
    [layout] = random_layouts(numels)
    memory, step = random_memory(layout, dtype=errors_dtype(dtype)), random_step(numels, dtype=dtype)
    results = []
    for shift in (0, 1, 3):
        there, buffers = copy_of_step(step, DEVICE), []
        for tensors in (there.params, there.gradients):
            for p, tensor in enumerate(tensors):
                buffers.append(torch.full((len(tensor) + 64,), 7.0, dtype=dtype, device=DEVICE))
                tensors[p] = buffers[-1][32 + shift : 32 + shift + len(tensor)].copy_(tensor)
        memory_there = copy_of_memory(memory, DEVICE)
        run_step(TritonKernels(), memory_there, there, early=True)
        scale_(memory_there, there, torch.full((), 0.5, device=DEVICE))
        for buffer, numel in zip(buffers, 2 * numels, strict=True):
            assert (torch.cat([buffer[: 32 + shift], buffer[32 + shift + numel :]]) == 7.0).all()
        results.append((memory_there, there))
    for other in results[1:]:
        assert_same(other, results[0])


@each_scale
@pytest.mark.parametrize("masked", [False, True], ids=["all live", "some dead"])
def test_a_block_does_not_depend_on_how_its_parameter_was_cut(scale, masked):
    """Into buckets and chunks: bits, scales and errors of a step are the same."""
    numel = 5 * 64 + 33
    step = copy_of_step(random_step([numel]), DEVICE)
    results = []
    for bucket_numel, num_chunks in ((numel, 1), (2 * 64, 1), (3 * 64, 2)):
        whole = random_memory(random_layouts([numel], num_chunks=1)[0], masked=masked)
        encoded = []
        for layout in random_layouts([numel], bucket_numel=bucket_numel, num_chunks=num_chunks):
            memory = random_memory(layout, masked=masked)
            memory.result.zero_()
            first = int(layout.start[0])
            part = slice(first, first + layout.flat_numel)
            memory.error.copy_(whole.error[part])
            memory.rms.copy_(whole.rms[part])
            if masked:
                memory.live.copy_(whole.live[first // 8 : part.stop // 8])
                memory.live_before = None
            memory = copy_of_memory(memory, DEVICE)
            TritonKernels(scale=scale).encode_(memory, 0, step, commit=True)
            encoded.append([memory.error])
            for chunk in range(num_chunks):
                sent = memory.encoded(memory.sent, 0, layout.blocks_of(range(chunk, chunk + 1)))
                encoded.append([sent.signs, sent.scales])
        results.append([
            torch.cat([each[0] for each in encoded if len(each) == 1]),
            torch.cat([each[0] for each in encoded if len(each) == 2]),
            torch.cat([each[1] for each in encoded if len(each) == 2]),
        ])  # fmt: skip
    for other in results[1:]:
        for one, expected in zip(other, results[0], strict=True):
            assert_same_bits(one, expected)


def test_parameters_that_are_not_contiguous():
    """They come as flat views in the order of their memory."""
    numels = [120]
    [layout] = random_layouts(numels)
    step = random_step(numels)
    shaped = [
        torch.empty(2, 3, 4, 5, device=DEVICE).to(memory_format=torch.channels_last).copy_(flat.view(2, 3, 4, 5))
        for flat in (step.params[0], step.gradients[0])
    ]
    there = copy_of_step(step, DEVICE)
    there.params, there.gradients = ([flat_view(tensor)] for tensor in shaped)
    assert not shaped[0].is_contiguous()
    step.params, step.gradients = ([flat_view(tensor).cpu().clone()] for tensor in shaped)
    memory = random_memory(layout)
    memory_there = copy_of_memory(memory, DEVICE)
    run_step(TritonKernels(), memory_there, there, early=True)
    run_step(ReferenceKernels(), memory, step, early=True)
    assert_same((memory_there, there), (memory, step))
    assert_same_bits(flat_view(shaped[0]), step.params[0])


def test_parameters_of_several_dtypes_are_refused():
    [layout] = random_layouts([9, 9])
    step = copy_of_step(random_step([9, 9]), DEVICE)
    step.gradients[1] = step.gradients[1].bfloat16()
    with pytest.raises(AssertionError):
        TritonKernels().encode_(copy_of_memory(random_memory(layout), DEVICE), 0, step, commit=False)


# ---- launches, and copies to the device


@pytest.fixture
def no_kernels(monkeypatch):
    return replace_kernels(monkeypatch)


@pytest.mark.parametrize("tensors", [4, 400, 4000])
@pytest.mark.parametrize("ranks", [2, 32])
def test_one_launch_each_whatever_the_number_of_tensors(no_kernels, tensors, ranks):
    numels = [16000 // tensors] * tensors
    layouts = random_layouts(numels, block_size=16, num_chunks=ranks, bucket_numel=6000)
    assert len(layouts) == 3
    step = copy_of_step(random_step(numels), DEVICE)
    draws = draw_sketch(0, total_numel=sum(numels), numel=64, rows_per_draw=32, device=DEVICE)
    places = np.cumsum([0, *numels[:-1]])
    tensors_sketch = TensorSketch(0, places.tolist(), numels, dtype=TritonKernels().sketch_dtype, device=DEVICE)
    with count_launches() as counted:
        for index, layout in enumerate(layouts):
            memory = copy_of_memory(random_memory(layout, chunk=1, renews=True), DEVICE)
            run_step(TritonKernels(), memory, step, early=False, index=index)
            TritonKernels().sketch_tensors_(memory, index, step, tensors_sketch)
            messages, correction = memory.variance_messages(), np.ones(len(numels))
            TritonKernels().encode_variance_(memory, messages, correction)
            TritonKernels().serve_variance_(memory, messages)
            TritonKernels().apply_variance_(memory, messages, refresh_numbers(correction))
            gather_(torch.zeros(layout.flat_numel, device=DEVICE), memory, step)
            scale_(memory, step, torch.ones((), device=DEVICE))
            sketch_(torch.zeros(4, 64, device=DEVICE), memory, step, draws, places)
            add_parts_(torch.zeros(64, device=DEVICE), torch.zeros(ranks, 64, device=DEVICE), memory)
    assert counted == {name: len(layouts) for name in no_kernels}
    assert {kernel.launches for kernel in no_kernels.values()} == {len(layouts)}


def test_launches_of_real_kernels_are_counted():
    [layout] = random_layouts([70, 9, 1])
    memory, step = (random_memory(layout), random_step([70, 9, 1]))
    memory, step = copy_of_memory(memory, DEVICE), copy_of_step(step, DEVICE)
    with count_launches() as counted:
        run_step(TritonKernels(), memory, step, early=True)
    run_step(TritonKernels(), memory, step, early=True)
    assert counted == {"_encode_kernel": 1, "_serve_kernel": 1, "_apply_kernel": 1}


def test_what_a_step_brings_is_sent_once_per_bucket_and_step(monkeypatch, no_kernels):
    sent = []
    monkeypatch.setattr(triton_tables, "send_", lambda target, values: sent.append(values.copy()))
    [layout] = random_layouts([70, 9])
    memory = copy_of_memory(random_memory(layout), DEVICE)
    step = copy_of_step(random_step([70, 9]), DEVICE)
    tables_of(memory)
    assert len(sent) == 1  # the block table
    gather_(torch.zeros(layout.flat_numel, device=DEVICE), memory, step)
    run_step(TritonKernels(), memory, step, early=False)
    assert len(sent) == 2
    step.numbers[1, 0] = 0.5  # another step, in the same object
    step.gradients[1] = step.gradients[1].clone()
    run_step(TritonKernels(), memory, step, early=False)
    assert len(sent) == 3
    assert sent[-1][1, 0] == step.gradients[1].data_ptr()


def test_places_are_sent_again_only_if_they_are_others():
    memory = copy_of_memory(random_memory(random_layouts([5, 9])[0]), DEVICE)
    first = tables_of(memory).places(np.array([0, 5]))
    assert tables_of(memory).places(np.array([0, 5])) is first
    assert tables_of(memory).places(np.array([0, 6])).tolist() == [0, 6]


def test_a_chunk_without_blocks_is_no_launch():
    [layout] = random_layouts([9], num_chunks=5)
    empty = next(c for c in range(5) if layout.first_block[c] == layout.first_block[c + 1])
    memory, step = random_memory(layout, chunk=empty), random_step([9])
    with count_launches() as counted:
        assert_equals_reference(memory, step)
    assert "_serve_kernel" not in counted


# ---- gradients


@each_dtype
@pytest.mark.parametrize("factor", [1.0, 0.37])
def test_gather(dtype, factor):
    [layout] = random_layouts(NUMELS)
    memory = copy_of_memory(random_memory(layout, dtype=errors_dtype(dtype)), DEVICE)
    step = random_step(NUMELS, dtype=dtype, missing=[4])
    flat = torch.full((layout.flat_numel,), math.nan, dtype=memory.dtype, device=DEVICE)
    gather_(flat, memory, copy_of_step(step, DEVICE), factor)
    expected = ReferenceKernels()._flat(random_memory(layout, dtype=memory.dtype), (0, layout.num_blocks), step.gradients)
    assert_same_bits(
        torch.where(exists(layout), flat.cpu(), math.nan), torch.where(exists(layout), expected * factor, math.nan)
    )
    assert not flat.cpu()[~exists(layout)].any()


@each_dtype
def test_scale(dtype):
    layouts = random_layouts(NUMELS, bucket_numel=200)
    step = random_step(NUMELS, dtype=dtype, missing=[4], sits_out=[5])
    there, coefficient = copy_of_step(step, DEVICE), torch.tensor(0.3712, dtype=errors_dtype(dtype))
    for layout in layouts:
        scale_(copy_of_memory(random_memory(layout), DEVICE), there, coefficient.to(DEVICE))
    for gradient, actual in zip(step.gradients, there.gradients, strict=True):
        if gradient is not None:
            assert_same_bits(actual, (gradient.to(coefficient.dtype) * coefficient).to(dtype))


@pytest.mark.parametrize(
    ("dtype", "programs"),
    [(torch.float32, 1), (torch.float32, 3), (torch.float32, 100), (torch.bfloat16, 3), (torch.float64, 3)],
    ids=str,
)
def test_sketch(dtype, programs):
    """Blocks that lie in two rows, and rows of two draws."""
    k, numels = 32, [100, 7, 0, 64, 500]
    step = random_step(numels, dtype=dtype, missing=[3])
    expected = NormSketch(5, device=CPU, numel=k)
    expected.add_(step.gradients, numels)
    there, places = copy_of_step(step, DEVICE), np.cumsum([0, *numels[:-1]])
    draws = draw_sketch(5, total_numel=sum(numels), numel=k, rows_per_draw=k // 2, device=DEVICE)
    assert len(draws.signs) == 2

    def sketched():
        partial = torch.zeros(programs, k, device=DEVICE)
        for layout in random_layouts(numels, bucket_numel=300, block_size=24):
            sketch_(partial, copy_of_memory(random_memory(layout), DEVICE), there, draws, places)
        return partial

    partial = sketched()
    torch.testing.assert_close(partial.sum(dim=0).cpu(), expected.buckets, rtol=1e-5, atol=1e-3)
    if (dtype, programs) == (torch.float32, 3):
        assert_same_bits(sketched(), partial)


# ---- the check at first use

VARIANCE_KERNELS = ("encode_variance", "serve_variance", "apply_variance")


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr(triton_check, "_checked", {})


def test_the_check_passes_and_is_made_once(unchecked):
    with count_launches() as counted:
        triton_check.check_kernels(DEVICE)
        made = dict(counted)
        triton_check.check_kernels(DEVICE)
    assert counted == made
    assert set(made) == {
        "_encode_kernel",
        "_serve_kernel",
        "_apply_kernel",
        "_gather_kernel",
        "_scale_kernel",
        "_sketch_kernel",
        "_add_parts_kernel",
        "_encode_variance_kernel",
        "_serve_variance_kernel",
        "_apply_variance_kernel",
        "_sketch_tensors_kernel",
    }


@pytest.mark.parametrize(
    "name",
    ["encode", "serve", "apply", "gather", "scale", "sketch", "add_parts", "sketch_tensors", *VARIANCE_KERNELS],
)
def test_the_check_names_the_kernel_that_computes_nothing(unchecked, monkeypatch, name):
    module = triton_kernels if name in ("encode", "serve", "apply") else triton_gradients
    module = triton_variance if name in VARIANCE_KERNELS else module
    module = triton_sketch if name == "sketch_tensors" else module
    monkeypatch.setattr(module, f"_{name}_kernel", NoKernel(name))
    for _ in range(2):  # the verdict is kept
        with pytest.raises(triton_check.KernelMismatchError, match=f"Triton's kernel '{name}' .* on {DEVICE}"):
            triton_check.check_kernels(DEVICE)


def test_a_triton_that_computes_something_else_is_not_used_and_it_is_said(unchecked, monkeypatch):
    monkeypatch.setattr(triton_kernels, "_serve_kernel", NoKernel("serve"))
    # As where there is a GPU; the check itself runs here.
    monkeypatch.setattr(triton_check, "check_kernels", lambda device, check=triton_check.check_kernels: check(DEVICE))
    with pytest.warns(UserWarning, match="'serve' differs from the reference"):
        kernels = make_kernels(CompressionConfig(), device=torch.device("cuda"), dtype=torch.float32)
    assert kernels.name == "reference"


def test_a_check_that_found_no_memory_decides_nothing(unchecked, monkeypatch):
    """Neither that Triton is wrong here, nor, the next time, that it is right."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(triton_check, "check_kernels", lambda device, check=triton_check.check_kernels: check(DEVICE))
    for place, name in ((triton_kernels.TritonKernels, "serve_"), (triton_check, "_bucket")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            for _ in range(2):
                with pytest.raises(torch.OutOfMemoryError):
                    make_kernels(CompressionConfig(), device=torch.device("cuda"), dtype=torch.float32)
    monkeypatch.setattr(triton_kernels, "_serve_kernel", NoKernel("serve"))
    with pytest.warns(UserWarning, match="'serve' differs from the reference"):
        assert make_kernels(CompressionConfig(), device=torch.device("cuda"), dtype=torch.float32).name == "reference"


def test_the_kernels_are_used_where_they_pass(monkeypatch):
    monkeypatch.setattr(triton_check, "check_kernels", lambda device: None)
    kernels = make_kernels(CompressionConfig(scale="l1"), device=torch.device("cuda"), dtype=torch.float32)
    assert (kernels.name, kernels.scale, kernels.reads_flags_on_device) == ("triton", "l1", True)


# ---- on a GPU only


@needs_gpu
def test_places_are_not_limited_to_32_bits():
    numel = 2**31 + 16384 + 13
    if torch.cuda.mem_get_info()[0] < 13 * numel:
        pytest.skip("needs 28 GB of GPU memory")
    [layout] = random_layouts([numel], block_size=16384, num_chunks=1)
    memory = random_memory_on_gpu(layout)
    step = random_step([1])
    step.params = [torch.zeros(numel, device=DEVICE)]
    step.gradients, step.flags = [None], step.flags.to(DEVICE)
    last = memory.encoded(memory.result, 0, (layout.num_blocks - 1, layout.num_blocks))
    last.signs[-1] = 0b10101
    last.scales.fill_(3.0)
    TritonKernels().apply_(memory, 0, step, commit=False)
    moved = np.float32(3.0) * np.float32(-1e-2)
    assert step.params[0][-5:].tolist() == [moved, -moved, moved, -moved, moved]


def random_memory_on_gpu(layout):
    from lightning_onebit.quantize.memory import BucketMemory

    return BucketMemory(
        layout, share=range(1), chunk=0, has_rms=False, keeps_before=False, dtype=torch.float32, device=DEVICE
    )


@needs_gpu
def test_no_call_waits_for_the_gpu():
    numels = [5001, 70]
    layouts = random_layouts(numels, block_size=2048)
    memory = copy_of_memory(random_memory(layouts[0], masked=True), DEVICE)
    step = copy_of_step(random_step(numels), DEVICE)
    flat, coefficient = torch.zeros(layouts[0].flat_numel, device=DEVICE), torch.ones((), device=DEVICE)
    partial = torch.zeros(8, 4096, device=DEVICE)
    renewing = copy_of_memory(random_memory(layouts[0], renews=True), DEVICE)
    messages, correction = renewing.variance_messages(), np.ones(len(numels))
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for early in (True, False):
            run_step(TritonKernels(), memory, step, early=early)
        draws = draw_sketch(0, total_numel=sum(numels), numel=4096, rows_per_draw=256, device=DEVICE)
        gather_(flat, memory, step)
        scale_(memory, step, coefficient)
        sketch_(partial, memory, step, draws, np.array([0, 5001]))
        run_step(TritonKernels(), renewing, step, early=False)
        TritonKernels().encode_variance_(renewing, messages, correction)
        TritonKernels().serve_variance_(renewing, messages)
        TritonKernels().apply_variance_(renewing, messages, refresh_numbers(correction))
    finally:
        torch.cuda.set_sync_debug_mode(before)


@needs_gpu
def test_the_table_of_a_step_is_not_overwritten_while_it_is_being_sent():
    """Many steps are queued behind one that takes long; each finds its own numbers."""
    [layout] = random_layouts([64], num_chunks=1)
    memory = copy_of_memory(random_memory(layout), DEVICE)
    moved = []
    torch.cuda._sleep(500_000_000)
    for number in range(200):
        step = random_step([64])
        step.params, step.gradients = [torch.zeros(64, device=DEVICE)], [torch.zeros(64, device=DEVICE)]
        step.flags = torch.ones(2, dtype=torch.int32).to(DEVICE, non_blocking=True)
        step.numbers[:, Coefficients._fields.index("step_size")] = number
        TritonKernels().encode_(memory, 0, step, commit=False)
        TritonKernels().apply_(memory, 0, step, commit=False)
        moved.append(step.params[0])
    largest = torch.stack(moved).abs().amax(dim=1)
    scale = memory.encoded(memory.result, 0, memory.share_blocks).scales[0]
    assert_same_bits(largest, scale * torch.arange(200, device=DEVICE, dtype=torch.float32))


# ---- sketches of tensors


def sketched(memories, step, *, device, seed=3):
    """Of all buckets of a step, in any order: by the kernels on the GPU, by the reference on the CPU."""
    kernels = ReferenceKernels() if device == "reference" else TritonKernels()
    where = CPU if device == "reference" else DEVICE
    numels = [p.numel() for p in step.params]
    keys = np.cumsum([0, *numels[:-1]])
    sketch, step = TensorSketch(seed, keys, numels, dtype=kernels.sketch_dtype, device=where), copy_of_step(step, where)
    for index, memory in memories:
        kernels.sketch_tensors_(copy_of_memory(memory, where), index, step, sketch)
    return sketch


def assert_same_sketch(actual, expected):
    """Bit for bit, but for sums of squares, float64 over a block: to the rounding of 16384 additions."""
    assert_same_bits(actual.values, expected.values, "values")
    assert_same_bits(actual.sums[2:], expected.sums[2:], "counts")
    one, other = (each.sums[0].cpu() * 2**38 + each.sums[1].cpu() for each in (actual, expected))
    assert ((one - other).abs() <= 16384 * 2.0**-53 * other + 2 + other.ne(0)).all()


@each_dtype
def test_sketches_of_tensors(dtype):
    """Of blocks that cross rows of 251, and that are larger; some elements are not live, some are clamped."""
    coefficients = [ADAM._replace(kappa=3.0 + p, eps=1e-3 * (p % 3)) for p in range(len(NUMELS))]
    for block_size, numels in ((64, NUMELS), (2048, [*NUMELS[:-2], 5000, 251])):
        [layout] = random_layouts(numels, block_size=block_size)
        memory = random_memory(layout, masked=True, renews=True, dtype=errors_dtype(dtype))
        step = random_step(numels, dtype=dtype, sits_out=[3], missing=[4], coefficients=coefficients)
        actual, expected = (sketched([(0, memory)], step, device=device) for device in ("here", "reference"))
        assert_same_sketch(actual, expected)
        assert not actual.values[[2, 3, 4]].any()
        assert actual.sums[3].any()
        assert actual.sums[2, 5] == (memory.rms_code[slice(*flat_of(layout, 5))] != 0).sum()


def flat_of(layout, parameter):
    own = np.flatnonzero(layout.parameter == parameter)
    return int(layout.offset[own[0]]), int(layout.offset[own[-1] + 1])


def test_sketches_of_tensors_with_d_as_it_is():
    """As of a single rank, where D is not coded."""
    [layout] = random_layouts([300, 9])
    memory = random_memory(layout, masked=True)
    step = random_step([300, 9])
    assert_same_sketch(*(sketched([(0, memory)], step, device=device) for device in ("here", "reference")))


def test_sketches_of_tensors_reach_beyond_a_segment():
    numels = [2 * SEGMENT_NUMEL + 77, 30]
    [layout] = random_layouts(numels, block_size=16384)
    memory = random_memory(layout, masked=True, renews=True)
    assert_same_sketch(*(sketched([(0, memory)], random_step(numels), device=device) for device in ("here", "reference")))


def test_sketches_of_tensors_of_node_means():
    """Of this rank's share only; also of what has no gradient on this rank."""
    numels = [200, 5, 130, 70, 300]
    [layout] = random_layouts(numels, num_chunks=6)
    memory = random_memory(layout, share=range(2, 4), chunk=3, masked=True, renews=True, seed=2)
    step = random_step(numels, sits_out=[3], missing=[1, 2], seed=2)
    flat = randn(layout.flat_numel_of(memory.share), 3, torch.float32)
    step.share_gradients[5] = torch.where(exists(layout)[memory.share_flat], flat, 0.0)
    actual, expected = (sketched([(5, memory)], step, device=device) for device in ("here", "reference"))
    assert_same_sketch(actual, expected)
    assert actual.sums[2].any()


def test_sketches_do_not_show_how_tensors_are_cut_into_buckets_nor_their_order():
    numels = [1000, 3, 700, 90]
    step, found = random_step(numels), []
    for bucket_numel in (2**40, 300):
        layouts = random_layouts(numels, block_size=64, bucket_numel=bucket_numel)
        memories = [(i, random_memory(layout, renews=True)) for i, layout in enumerate(layouts)]
        for _, memory in memories:
            memory.set_rms_(torch.ones(memory.layout.flat_numel))
        found.append(sketched(memories, step, device="here").numbers)
        found.append(sketched(memories[::-1], step, device="here").numbers)
    assert len(memories) > 4
    for each in found[1:]:
        assert_same_bits(each, found[0])


# ---- what is compiled, which needs no GPU


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only")
def test_compiled_kernels_round_to_nearest_and_never_fuse(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).parents[1] / "support" / "compile_bucket_kernels.py"
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=110)
    assert run.returncode == 0, run.stderr
    kernels = json.loads(run.stdout.splitlines()[-1])
    names = {"encode", "serve", "apply", "gather", "scale", "sketch", "apply renewed", "serve_variance renewed"}
    names.add("sketch_tensors renewed")
    assert names <= set(kernels)
    for name, found in kernels.items():
        for forbidden in ("fma", "approx", "ftz", "full", "ld.local", "st.local"):
            assert not found[forbidden], (name, forbidden)
        if name.startswith("sketch_tensors"):  # rows of 251 elements; integers are added up
            assert found["atom"] == found["atom.global.gpu.relaxed.add"] > 0
            continue
        assert not found["atom"], name
        assert found["ld.global.v4" if "float64" not in name else "global.v2.b64"], name
    for wanted in ("div.rn.f32", "min.NaN.f32", "max.NaN.f32", "sqrt.rn.f64", "div.rn.f64"):
        assert kernels["encode"][wanted], wanted
    assert kernels["apply"]["div.rn.f32"]
    assert kernels["encode_variance renewed"]["sqrt.rn.f32"]
    assert kernels["apply_variance renewed"]["div.rn.f32"]
    assert not kernels["encode float64"]["div.rn.f32"]
