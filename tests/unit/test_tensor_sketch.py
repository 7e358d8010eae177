"""The sketch of gradients over D, tensor by tensor: what it estimates, and the kernel for CPUs against the reference."""

import math

import numpy as np
import pytest
import torch
from buckets import ADAM, CPU, copy_of_memory, randn, random_layouts, random_memory, random_step
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_onebit.quantize.cpu import CpuKernels
from lightning_onebit.quantize.reference import ReferenceKernels
from lightning_onebit.quantize.tensor_sketch import (
    SEGMENT_NUMEL,
    VALUE_BITS,
    WIDTH,
    TensorSketch,
    draw_segments,
    random_signs,
    splitmix64,
    used_columns,
)

UNCLAMPED = ADAM._replace(kappa=1e6, eps=0.0)
NUMELS = [1, 7, 0, 8, 250, 251, 252, 3000, 150]


def bucket(numels, *, bucket_numel=2**40, block_size=64, seed=0, **settings):
    layouts = random_layouts(numels, block_size=block_size, bucket_numel=bucket_numel)
    return [random_memory(layout, renews=True, seed=seed + i, **settings) for i, layout in enumerate(layouts)]


def ones_as_d(memories):
    """D = 1, live everywhere: a is the gradient."""
    for memory in memories:
        memory.set_rms_(torch.ones(memory.layout.flat_numel))
    return memories


def step_of(gradients, coefficients=UNCLAMPED):
    step = random_step([g.numel() for g in gradients], coefficients=coefficients)
    step.gradients = list(gradients)
    return step


def kernels_of(name, memory):
    if name == "reference":
        return ReferenceKernels()
    return CpuKernels(block_size=memory.layout.block_size, dtype=memory.dtype)


def sketched(memories, step, *, kernels="cpu", seed=3, keys=None):
    numels = [p.numel() for p in step.params]
    kernels = kernels_of(kernels, memories[0])
    keys = np.cumsum([0, *numels[:-1]]) if keys is None else keys
    sketch = TensorSketch(seed, keys, numels, dtype=kernels.sketch_dtype, device=CPU)
    for index, memory in enumerate(memories):
        kernels.sketch_tensors_(memory, index, step, sketch)
    return sketch


def message(sketch):
    return sketch.message(used_columns(sketch.numels, CPU))


def estimate(sketches):
    columns = used_columns(sketches[0].numels, CPU)
    return sketches[0].estimate(torch.stack([each.message(columns) for each in sketches]).mean(0), columns)


# ---- the signs


def test_what_is_drawn_is_written_down():
    """Known numbers of splitmix64 from its first state on (Vigna's code: seed 0 gives 0xe220a8397b1dcdaf)."""
    assert splitmix64(np.uint64(0)).tolist() == [0xE220A8397B1DCDAF]
    numels = np.array([0, 1, SEGMENT_NUMEL, SEGMENT_NUMEL + 1])
    first, draws = draw_segments(5, [0, 0, 1, SEGMENT_NUMEL + 1], numels)
    assert first.tolist() == [0, 0, 1, 2]
    assert len(draws) == 4
    assert ((draws[:, 0] >= 0) & (draws[:, 0] < SEGMENT_NUMEL)).all()
    assert len(np.unique(draws[:, 1:])) == draws[:, 1:].size
    alone = draw_segments(5, [SEGMENT_NUMEL + 1], numels[3:])[1]
    assert alone.tolist() == draws[2:].tolist()


def test_signs_are_balanced_and_others_with_another_seed():
    signs = random_signs(1, 100_001)
    assert set(signs.tolist()) == {-1, 1}
    assert len(signs) == 100_001
    assert abs(int(signs.astype(np.int64).sum())) < 4 * math.sqrt(len(signs))
    agree = (signs == random_signs(2, len(signs))).mean()
    assert abs(agree - 0.5) < 0.01


# ---- what is estimated


VECTORS = {
    "noise": randn(20 * WIDTH, 1, torch.float32),
    "heavy tail": randn(20 * WIDTH, 2, torch.float32).pow(3),
    "all alike": torch.ones(20 * WIDTH),
    "the same column of rows of 256": torch.eye(256)[3].repeat(300) + 1e-3,
    "two segments": torch.ones(2 * SEGMENT_NUMEL + 77),
    "segments that are alike": randn(SEGMENT_NUMEL, 5, torch.float32).repeat(2),
}


@pytest.mark.parametrize("kind", VECTORS)
def test_unbiased_and_of_the_promised_deviation(kind):
    vector, trials = VECTORS[kind], 60
    memories, step = ones_as_d(bucket([vector.numel()], block_size=2048)), step_of([vector])
    squares = torch.stack([estimate([sketched(memories, step, seed=seed)])[0, 0] for seed in range(trials)]).double()
    relative = squares / vector.double().square().sum()
    promised = math.sqrt(2 / WIDTH)
    assert abs(relative.mean() - 1) < 5 * promised / math.sqrt(trials)
    assert relative.std() < 1.35 * promised


@settings(max_examples=25, deadline=None)
@given(st.integers(1, WIDTH), st.integers(0, 2**31), st.sampled_from(["cpu", "reference"]))
def test_exact_up_to_251_elements(numel, seed, kernels):
    vector = randn(numel, seed, torch.float32)
    sketch = sketched(ones_as_d(bucket([numel])), step_of([vector]), kernels=kernels, seed=seed)
    of_mean, squares, live, clamped = estimate([sketch])[:, 0].tolist()
    assert of_mean == pytest.approx(float(vector.double().square().sum()), rel=1e-6)
    assert squares == pytest.approx(of_mean, rel=1e-6)
    assert (live, clamped) == (numel, 0)
    assert len(message(sketch)) == numel + 3


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_the_mean_of_ranks_is_that_of_their_sketches(kernels):
    common = randn(5000, 1, torch.float32)
    ranks = [common + randn(5000, 10 + rank, torch.float32) for rank in range(8)]
    memories = ones_as_d(bucket([5000]))
    found = estimate([sketched(memories, step_of([g]), kernels=kernels) for g in ranks])[:, 0]
    assert found[0] == pytest.approx(float(torch.stack(ranks).mean(0).square().sum()), rel=0.35)
    assert found[1] == pytest.approx(float(torch.stack(ranks).square().sum(dim=1).mean()), rel=1e-5)
    assert found[1] > 1.5 * found[0]


# ---- the kernel for CPUs


def assert_close(actual, expected):
    """To the truncation of the reference's integers."""
    values, sums = expected.values.double() * 2.0**-VALUE_BITS, expected.sums.double()
    elements = torch.from_numpy(expected.numels)[:, None] / WIDTH + 2
    assert ((actual.values - values).abs() <= elements * 2.0**-VALUE_BITS + 1e-14 * values.abs()).all()
    squares = sums[0] + sums[1] * 2.0**-38
    assert torch.allclose(actual.sums[0] + actual.sums[1], squares, rtol=1e-12, atol=1e-8)
    assert actual.sums[2:].tolist() == expected.sums[2:].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("block_size", [64, 2048])
def test_equals_the_reference(dtype, block_size):
    """Elements that are not live, or clamped; padding; parameters that sit out, without a gradient, without elements."""
    numels = [*NUMELS, 70_001, 40_000]
    coefficients = [ADAM._replace(kappa=3.0 + p, eps=1e-3 * (p % 3)) for p in range(len(numels))]
    step = random_step(numels, dtype=dtype, coefficients=coefficients, sits_out=[3], missing=[4])
    errors = torch.float64 if dtype == torch.float64 else torch.float32
    memories = bucket(numels, block_size=block_size, masked=True, dtype=errors)
    actual, expected = (sketched(memories, step, kernels=kernels) for kernels in ("cpu", "reference"))
    assert_close(actual, expected)
    assert not actual.values[[2, 3, 4]].any()
    assert not actual.sums[:, [2, 3, 4]].any()
    live = sum(int((memory.rms_code != 0).sum()) for memory in memories)
    assert actual.sums[2].sum() == live - sum(numels[p] for p in (3, 4)) + _not_live(memories, (3, 4))
    assert 0 < actual.sums[3].sum() < live


def _not_live(memories, parameters):
    """Elements of parameters that are not live."""
    found = 0
    for memory in memories:
        of_block = memory.block_of((0, memory.layout.num_blocks))
        element = torch.from_numpy(memory.layout.exists()) & torch.isin(
            torch.from_numpy(memory.layout.parameter)[of_block], torch.tensor(parameters)
        )
        found += int((element & (memory.rms_code == 0)).sum())
    return found


def test_the_mean_of_a_node_takes_the_place_of_gradients():
    """Of this rank's share, whether it has a gradient or not."""
    numels = [300, 5, 130, 700]
    [layout] = random_layouts(numels, num_chunks=6)
    memory = random_memory(layout, share=range(2, 4), chunk=3, masked=True, renews=True)
    step = random_step(numels, missing=[0, 2])
    shared = randn(layout.flat_numel_of(memory.share), 3, torch.float32)
    step.share_gradients[0] = torch.where(torch.from_numpy(layout.exists())[memory.share_flat], shared, 0.0)
    actual, expected = (sketched([memory], step, kernels=kernels) for kernels in ("cpu", "reference"))
    assert_close(actual, expected)
    assert expected.sums[2].sum() == (memory.rms_code[memory.share_flat] != 0).sum()


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_how_parameters_are_cut_and_ordered_makes_no_difference(kernels):
    numels = [3000, 20, 70_001, 251]
    gradients = [randn(numel, i, torch.float32) for i, numel in enumerate(numels)]
    whole = message(sketched(ones_as_d(bucket(numels)), step_of(gradients), kernels=kernels, keys=[1, 2, 3, 4]))
    for bucket_numel in (1000, 40_000):
        memories = ones_as_d(bucket(numels, bucket_numel=bucket_numel))
        assert len(memories) > 1
        parts = sketched(memories, step_of(gradients), kernels=kernels, keys=[1, 2, 3, 4])
        assert torch.equal(message(parts), whole)
        backwards = TensorSketch(3, [1, 2, 3, 4], numels, dtype=parts.numbers.dtype, device=CPU)
        for index, memory in reversed(list(enumerate(memories))):
            kernels_of(kernels, memory).sketch_tensors_(memory, index, step_of(gradients), backwards)
        assert torch.equal(message(backwards), whole)
    reordered = sketched(ones_as_d(bucket(numels[::-1])), step_of(gradients[::-1]), kernels=kernels, keys=[4, 3, 2, 1])
    expected = sketched(ones_as_d(bucket(numels)), step_of(gradients), kernels=kernels, keys=[1, 2, 3, 4])
    assert torch.equal(reordered.values.flip(0).float(), expected.values.float())


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_nothing_but_the_sketch_is_written(kernels):
    memories, step = bucket(NUMELS), random_step(NUMELS)
    before, gradients = copy_of_memory(memories[0]), [g.clone() for g in step.gradients]
    sketched(memories, step, kernels=kernels)
    assert torch.equal(before.error, memories[0].error)
    assert torch.equal(before.rms_code, memories[0].rms_code)
    assert all(torch.equal(a, b) for a, b in zip(gradients, step.gradients, strict=True))


def test_small_numbers_are_not_lost_in_fixed_point():
    """a of 1e-5 and of 1000 in one tensor; of 1e-5 alone."""
    for vector in (torch.full((3000,), 1e-5), torch.cat([torch.full((3000,), 1e-5), torch.full((9,), 1000.0)])):
        memories, step = ones_as_d(bucket([vector.numel()])), step_of([vector])
        fixed, floating = (estimate([sketched(memories, step, kernels=k)])[:2] for k in ("reference", "cpu"))
        assert torch.allclose(fixed, floating, rtol=1e-3, atol=0.0)
