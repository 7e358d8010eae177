"""The renewal of the second moment: its code; the reference against a model in Python; kernels for CPUs against it."""

import math
import struct

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
)

from lightning_onebit.quantize.cpu import CpuKernels
from lightning_onebit.quantize.exact import ExactKernels
from lightning_onebit.quantize.layout import SMALL_NUMEL, SPAN_NUMEL
from lightning_onebit.quantize.logarithm import LOG_STEP, decode_logarithm, encode_logarithm
from lightning_onebit.quantize.memory import BucketMemory
from lightning_onebit.quantize.reference import ReferenceKernels, pack_bits, unpack_bits

SMALL = [5, 300, 1, 17, 0, 200, 64, 100]
"""They share spans."""
MIXED = [40, SMALL_NUMEL + 3, 7, 300, 9]
"""The second has spans of its own."""
LARGE = [SPAN_NUMEL + 3 * 2048 + 5]
"""Two spans, the last block short."""
RENEWED = ADAM._replace(square_decay=0.99, root_r=0.7)
OTHER_R = [RENEWED._replace(root_r=0.3 + 0.1 * p) for p in range(7)]

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
every_kind = pytest.mark.parametrize("kind", ["reference", "cpu"])


def kernels_of(kind, block_size, dtype=torch.float32):
    return CpuKernels(block_size=block_size, dtype=dtype) if kind == "cpu" else ReferenceKernels()


# The code


def bits(x):
    return struct.unpack("<i", struct.pack("<f", x))[0]


def code_by_definition(x, scale):
    return 0 if x == 0 else max(1, 255 - (bits(scale) - bits(x) + LOG_STEP // 2) // LOG_STEP)


def decoded_by_definition(code, scale):
    if code == 0:
        return 0.0
    return struct.unpack("<f", struct.pack("<i", max(bits(scale) - (255 - code) * LOG_STEP, 1 << 23)))[0]


@pytest.mark.parametrize("scale", [1.0, 1.3, 1.99999, 3e-30, 3.4e38])
def test_a_decoded_number_is_off_by_half_a_step_at_most(scale):
    """What the module's docstring says: 4.7%, and 2.0% in the root mean square, over 24 octaves."""
    scale = torch.tensor(scale)
    x = torch.logspace(0, -24, 400_001, base=2, dtype=torch.float64).mul(scale.double()).float().clamp(max=scale)
    codes = encode_logarithm(x, scale.expand(x.shape).contiguous())
    off = decode_logarithm(codes, scale.expand(x.shape).contiguous()).double() / x.double() - 1
    assert (codes.min(), codes.max()) == (1, 255)
    assert 0.045 < off.abs().max() < 0.0473
    assert off.square().mean().sqrt() == pytest.approx(0.020, abs=2e-4)
    step = 24 / 254 * torch.linspace(-0.5, 0.5, 10_001, dtype=torch.float64)
    assert off.square().mean().sqrt() < 1.06 * (2**step - 1).square().mean().sqrt()


def test_what_is_out_of_reach():
    x = torch.tensor([0.0, 2.0**-149, 1e-38, 1e-20, 2.0**-24, 1.0])
    codes = encode_logarithm(x, torch.ones(6))
    assert codes.tolist() == [0, 1, 1, 1, 1, 255]
    assert decode_logarithm(codes, torch.ones(6)).tolist() == pytest.approx([0, *[2.0**-24] * 4, 1.0], rel=0.05)
    small = torch.full((6,), 2.0**-120)  # what would be subnormal is not
    assert decode_logarithm(codes, small).tolist()[1:5] == [2.0**-126] * 4


@every_dtype
def test_d_is_set_and_read_as_its_code(dtype):
    [layout] = random_layouts([100, 9], block_size=16)
    memory = BucketMemory(
        layout, share=range(2), chunk=0, has_rms=True, keeps_before=False, renews=True, dtype=dtype, device=CPU
    )
    rms = torch.where(exists(layout), randn(layout.flat_numel, 0, dtype).abs() + 0.01, 0.0)
    rms[16:32] = 0.0
    rms[32] = 1e300 if dtype == torch.float64 else 3e38
    memory.set_rms_(rms)
    decoded = memory.decoded_rms((0, layout.num_blocks))
    assert decoded.dtype == dtype
    assert not decoded[16:32].any()
    assert decoded[32] == pytest.approx(min(float(rms[32]), 3.4028235e38))
    assert (decoded[33:48] == decoded[32] * 2.0**-24).all() or (decoded[33:48] > 1e30).all()  # the lowest code
    there = rms[48:] > 0
    torch.testing.assert_close(decoded[48:][there], rms[48:][there], rtol=0.0473, atol=0)
    assert not decoded[48:][~there].any()
    assert_same_bits(memory.decoded_rms((3, 6)), decoded[layout.offset[3] : layout.offset[6]])


# The reference against a model in Python's numbers


class Model:
    """All ranks' second moments of one block, in float64."""

    def __init__(self, v, residual):
        self.v, self.residual = [list(each) for each in v], list(residual)

    @staticmethod
    def code(squares):
        roots = [float(np.float32(min(math.sqrt(square), 3.4028234663852886e38))) for square in squares]
        scale = max(roots)
        return [decoded_by_definition(code_by_definition(root, scale), scale) if scale else 0.0 for root in roots]

    def refresh(self, correction):
        own = [[root**2 for root in self.code([v * correction for v in each])] for each in self.v]
        means = []
        for j in range(len(self.residual)):
            mean = sum(each[j] * (1 / len(own)) for each in own)
            means.append(min(max(mean + self.residual[j], mean / 2), 2 * mean))
        renewed = [root**2 for root in self.code(means)]
        self.residual = [mean - square for mean, square in zip(means, renewed, strict=True)]
        for i, each in enumerate(self.v):
            for j, new in enumerate(renewed):
                each[j] = min(max(each[j] * correction - own[i][j] + new, new / 2), 2 * new) / correction
        return [math.sqrt(square) for square in renewed]


def memories_of(layout, ranks, dtype, num_nodes=None, seed=0, dead=()):
    num_nodes = num_nodes or ranks
    memories = []
    for rank in range(ranks):
        first = rank // num_nodes * num_nodes
        memory = random_memory(
            layout, share=range(first, first + num_nodes), chunk=rank, renews=True, dtype=dtype, seed=seed
        )
        v = randn(layout.flat_numel, 17 + seed + rank % num_nodes, dtype).square()
        v[::7] *= 1e-9
        v[::11] *= 1e9
        v[::13] = 0.0 if rank % num_nodes else 1e-3
        v[40:56] = 0.0
        if rank in dead:
            v.zero_()
        memory.second_moment.copy_(torch.where(exists(layout), v, 0.0)[memory.share_flat])
        memories.append(memory)
    return memories


@every_dtype
@pytest.mark.parametrize(("ranks", "dead"), [(2, ()), (3, (1,)), (4, (0, 1, 2))])
@pytest.mark.parametrize("block_size", [8, 64])
def test_a_refresh_is_that_of_the_model(dtype, ranks, dead, block_size):
    """Blocks of zeros, very small and large numbers, ranks without any gradient; several refreshes, t going on."""
    numels = [130, 9, 1, 64]
    [layout] = random_layouts(numels, block_size=block_size, num_chunks=ranks)
    memories = memories_of(layout, ranks, dtype, dead=dead)
    residual = torch.cat([memory.second_moment_residual for memory in memories])
    blocks = []
    for start, numel in zip(layout.offset[:-1], layout.numel, strict=True):
        part = slice(start, start + numel)
        blocks.append((part, Model([m.second_moment[part].tolist() for m in memories], residual[part].tolist())))
    by_parameter = np.array([3.0, 1.0, 1.5, 20.0])
    for shrink in (1.0, 0.9, 0.8):
        correction = by_parameter**shrink
        refresh_(ReferenceKernels(), memories, correction)
        for memory in memories[1:]:
            assert_same_bits(memory.rms_code, memories[0].rms_code)
            assert_same_bits(memory.rms_scale, memories[0].rms_scale)
        decoded = memories[0].decoded_rms((0, layout.num_blocks))
        for (part, model), p in zip(blocks, layout.parameter, strict=True):
            expected = torch.tensor(model.refresh(correction[p]), dtype=dtype)
            # In float32 a root may lie on the other side of a boundary between two codes.
            tolerance = 1e-12 if dtype == torch.float64 else 0.11
            torch.testing.assert_close(decoded[part], expected, rtol=tolerance, atol=0)
            if dtype == torch.float64:
                for memory, v in zip(memories, model.v, strict=True):
                    torch.testing.assert_close(memory.second_moment[part], torch.tensor(v, dtype=dtype), rtol=1e-9, atol=0)
            else:
                assert ((decoded[part] - expected).abs() > 1e-5 * expected).float().mean() < 0.15
        assert not decoded[~exists(layout)].any()
    assert not decoded[exists(layout)].all()  # those of blocks of zeros


@every_kind
@every_dtype
@pytest.mark.parametrize("numels", [[130, 9, 64], [3000]], ids=str)
def test_a_refresh_keeps_the_momentum(kind, dtype, numels):
    """u D: beta u is added at the next step, and what the new D makes of it is owed to that; u grows by a quarter
    at most, as it is noise where there is no momentum."""
    [layout] = random_layouts(numels, block_size=64, num_chunks=2)
    memories = [random_memory(layout, chunk=rank, masked=True, renews=True, dtype=dtype) for rank in range(2)]
    kernels, numbers = kernels_of(kind, 64, dtype), refresh_numbers(np.full(len(numels), 1.5))
    parameter_of = torch.from_numpy(layout.parameter)[memories[0].block_of((0, layout.num_blocks))]
    beta, eps = (torch.from_numpy(each)[parameter_of] for each in (numbers.beta, numbers.eps))
    whole = (0, layout.num_blocks)
    before = [(memory.error.double().clone(), memory.decoded_rms(whole).double()) for memory in memories]
    refresh_(kernels, memories, numbers.correction)
    for memory, (error, old) in zip(memories, before, strict=True):
        new = memory.decoded_rms(whole).double()
        u = ReferenceKernels().decode(memory, memory.result, 0, whole, memory.live_before).double()
        has_both = (old > 0) & (new > 0)
        rescaling = torch.where(has_both, (old + eps) / (new + eps), 1.0)
        assert rescaling.max() > 1.25
        assert rescaling.min() < 0.25
        owed = beta * u * (rescaling.clamp(max=1.25) - 1)
        assert ((owed != 0) == (has_both & (u != 0) & (rescaling != 1))).all()
        torch.testing.assert_close(memory.error.double(), error + owed, rtol=1e-5, atol=1e-6)


@every_kind
@every_dtype
def test_huge_and_vanishing_moments_stay_finite(kind, dtype):
    """A v that was infinite would stay so for ever; one that is gone on all ranks is 0."""
    numels, largest = [64, 64], torch.finfo(dtype).max
    [layout] = random_layouts(numels, block_size=16)
    memories = memories_of(layout, 2, dtype)
    for memory in memories:
        memory.second_moment[:16] = largest
        memory.second_moment_residual.fill_(largest / 2)
        memory.second_moment[16:32] = torch.finfo(dtype).tiny / 1e6
        memory.second_moment[64:] = 0.0
        memory.second_moment_residual[-1] = -largest
    for _ in range(3):
        refresh_(kernels_of(kind, 16, dtype), memories, np.array([2.0, 1.0]))
        for memory in memories:
            for tensor in (memory.second_moment, memory.second_moment_residual, memory.decoded_rms((0, layout.num_blocks))):
                assert torch.isfinite(tensor).all()
            assert not memory.second_moment[64:].any()
            assert not memory.rms_code[64:].any()
    step = random_step(numels, dtype=dtype, coefficients=RENEWED)
    step.gradients[0].fill_(100 * math.sqrt(largest))
    memories[0].second_moment[:16] = largest
    kernels_of(kind, 16, dtype).encode_(memories[0], 0, step, commit=True)
    assert (memories[0].second_moment[:16] == largest).all()


@every_dtype
@every_kind
def test_a_step_moves_v_towards_the_square_of_the_gradient(kind, dtype):
    numels = [40, 9, SMALL_NUMEL + 5]
    [layout] = random_layouts(numels, block_size=16)
    memory = random_memory(layout, renews=True, dtype=dtype, masked=True)
    numbers = [
        RENEWED._replace(root_r=0.5, sign=-1.0, coupled_decay=0.1),
        RENEWED._replace(square_decay=0.5),
        RENEWED._replace(coupled_decay=0.3),
    ]
    step = random_step(numels, dtype=dtype, coefficients=numbers, missing=[1])
    step.params[0][3], step.params[0][4] = math.inf, math.nan  # do not get into v
    expected = memory.second_moment.clone().double()
    for p, start, numel, offset in zip(layout.parameter, layout.start, layout.numel, layout.offset, strict=False):
        n, part = numbers[p], slice(start, start + numel)
        g = step.gradients[p][part].double() if step.gradients[p] is not None else torch.zeros(int(numel)).double()
        x = (n.coupled_decay * step.params[p][part].double()).nan_to_num(0.0, 0.0, 0.0)
        place = slice(offset, offset + numel)
        a = n.root_r * n.sign * g + x
        expected[place] = n.square_decay * expected[place] + (1 - n.square_decay) * a.square()
    kernels_of(kind, 16, dtype).encode_(memory, 0, step, commit=True)
    rtol = 1e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(memory.second_moment.double(), expected, rtol=rtol, atol=rtol * 1e-5)
    assert not memory.second_moment[~exists(layout)].any()


# Kernels for CPUs: the reference's bits


CASES = {
    "adam": {"coefficients": RENEWED},
    "float64": {"coefficients": RENEWED, "dtype": torch.float64},
    "bfloat16 parameters": {"coefficients": RENEWED, "param_dtype": torch.bfloat16},
    "decay, maximize": {"coefficients": RENEWED._replace(coupled_decay=0.1, sign=-1.0, shrink=0.99)},
    "bfloat16, decay": {"coefficients": RENEWED._replace(coupled_decay=0.1), "param_dtype": torch.bfloat16},
    "numbers differ": {
        "coefficients": [
            RENEWED,
            RENEWED._replace(root_r=0.31, square_decay=0.9),
            RENEWED._replace(root_r=1.0, eps=1e-3, coupled_decay=0.1),
        ]
    },
    "r differs": {"coefficients": [RENEWED._replace(root_r=0.3 + 0.1 * p) for p in range(7)]},
    "r differs, float64": {
        "coefficients": [RENEWED._replace(root_r=0.3 + 0.1 * p) for p in range(7)],
        "dtype": torch.float64,
    },
}


def make_case(numels, *, block_size, masked=True, share=None, sits_out=(), missing=(), seed=0, **case):
    dtype = case.get("dtype", torch.float32)
    [layout] = random_layouts(numels, block_size=block_size, num_chunks=2)
    memory = random_memory(layout, share=share, masked=masked, renews=True, dtype=dtype, seed=seed)
    numbers = case.get("coefficients", RENEWED)
    if isinstance(numbers, list):
        numbers = [numbers[p % len(numbers)] for p in range(len(numels))]
    step = random_step(
        numels, dtype=case.get("param_dtype", dtype), coefficients=numbers, sits_out=sits_out, missing=missing, seed=seed
    )
    return memory, step, ReferenceKernels(), CpuKernels(block_size=block_size, dtype=dtype)


def copies(memory, step):
    return copy_of_memory(memory), copy_of_step(step)


def assert_worker_steps_are_equal(memory, step, reference, cpu):
    """Steps 1 and 2, committed at once and late."""
    before = memory.second_moment.clone()
    for late in (False, True):
        ours, expected = copies(memory, step), copies(memory, step)
        cpu.encode_(ours[0], 0, ours[1], commit=not late)
        if late:
            assert_same_bits(ours[0].second_moment, before)
            cpu.serve_(ours[0], ours[1], commit=False)
            ours[0].turn_results_()
            expected[0].turn_results_()
            cpu.apply_(ours[0], 0, ours[1], commit=True)
        expected[0].sent.copy_(ours[0].sent)
        if late:
            expected[0].served.copy_(ours[0].served)
            reference.apply_(expected[0], 0, expected[1], commit=True)
        else:
            reference._commit_worker_(expected[0], 0, expected[1])
        assert_same(ours, expected)
    assert not torch.equal(ours[0].second_moment, before)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("numels", "block_size"), [(SMALL, 8), (SMALL, 64), (MIXED, 2048)], ids=str)
def test_a_step_is_that_of_the_reference(case, numels, block_size):
    memory, step, *kernels = make_case(numels, block_size=block_size, missing=(2,), sits_out=(1, 3), **CASES[case])
    assert_worker_steps_are_equal(memory, step, *kernels)


@pytest.mark.parametrize("block_size", [2048, 16384])
@every_dtype
def test_a_step_of_a_large_parameter_is_that_of_the_reference(block_size, dtype):
    memory, step, *kernels = make_case(LARGE, block_size=block_size, masked=False, dtype=dtype)
    memory.rms_code.clamp_(min=1).mul_(exists(memory.layout))
    assert_worker_steps_are_equal(memory, step, *kernels)


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 63, 64, 65, 127, 129])
@pytest.mark.parametrize("is_packed", [True, False])
def test_all_tails(numel, is_packed):
    numels = [3, numel, 5] if is_packed else [SMALL_NUMEL + numel]
    memory, step, *kernels = make_case(numels, block_size=64)
    assert_worker_steps_are_equal(memory, step, *kernels)
    assert_refreshes_are_equal(random_layouts(numels, num_chunks=2)[0], 2)


@pytest.mark.parametrize("numels", [SMALL, MIXED], ids=str)
def test_averages_of_a_node_take_the_place_of_gradients(numels):
    memory, step, *kernels = make_case(numels, block_size=64, share=range(1))
    step.share_gradients[0] = torch.where(exists(memory.layout)[memory.share_flat], randn(len(memory.error), 5), 0.0).float()
    step.gradients = [None] * len(numels)
    assert_worker_steps_are_equal(memory, step, *kernels)


def assert_refreshes_are_equal(layout, ranks, *, dtype=torch.float32, num_nodes=None, dead=(), magnitude=1.0):
    memories = memories_of(layout, ranks, dtype, num_nodes, dead=dead)
    for memory in memories:
        memory.second_moment.mul_(magnitude)
        memory.second_moment_residual.mul_(magnitude)
    correction = 1 + np.arange(int(layout.parameter.max()) + 1) / 3
    outcomes = []
    for kernels in (CpuKernels(block_size=layout.block_size, dtype=dtype), ReferenceKernels()):
        own = [copy_of_memory(memory) for memory in memories]
        for shrink in (1.0, 0.5):
            messages = refresh_(kernels, own, correction**shrink, num_nodes)
        outcomes.append((own, messages))
    for ours, expected, one, other in zip(*(each for pair in zip(*outcomes, strict=True) for each in pair), strict=True):
        for name in ("error", "second_moment", "second_moment_residual", "rms_code", "rms_scale"):
            assert_same_bits(getattr(ours, name), getattr(expected, name), name)
        for name in ("sent", "served", "result"):
            assert_same_bits(getattr(one, name), getattr(other, name), name)


@pytest.mark.parametrize(
    ("numels", "block_size", "ranks", "num_nodes"),
    [(SMALL, 8, 2, None), (SMALL, 64, 3, None), (SMALL, 64, 6, 3), (MIXED, 2048, 4, 2), (LARGE, 16384, 2, None)],
    ids=str,
)
@every_dtype
def test_a_refresh_is_that_of_the_reference(numels, block_size, ranks, num_nodes, dtype):
    """Flat, and on the shares of nodes; one rank without any gradient."""
    [layout] = random_layouts(numels, block_size=block_size, num_chunks=ranks)
    assert_refreshes_are_equal(layout, ranks, dtype=dtype, num_nodes=num_nodes, dead=(1,))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-38, 1e-44, 1e30, 3e38, 0.0])
@every_dtype
def test_refreshes_of_extreme_moments_are_equal(magnitude, dtype):
    [layout] = random_layouts(SMALL, block_size=64)
    assert_refreshes_are_equal(layout, 2, dtype=dtype, magnitude=magnitude)


# What must not happen


@every_kind
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_that_does_not_count_changes_no_second_moment(kind, bad):
    memory, step, *_ = make_case(SMALL, block_size=64)
    step.gradients[1][-1] = bad
    kernels, before = kernels_of(kind, 64), copies(memory, step)
    kernels.encode_(memory, 0, step, commit=False)
    assert step.flags[0] == 1
    kernels.serve_(memory, step, commit=False)
    memory.turn_results_()
    kernels.apply_(memory, 0, step, commit=True)
    memory.turn_results_()
    before[1].flags[0] = 1
    assert_same((memory, step), before, apart_from=("sent", "served"))


@every_kind
def test_a_parameter_that_sits_out_keeps_its_second_moment(kind):
    memory, step, *_ = make_case([70, 30], block_size=16, sits_out=[0])
    before = memory.second_moment.clone()
    kernels_of(kind, 16).encode_(memory, 0, step, commit=True)
    assert_same_bits(memory.second_moment[:72], before[:72])
    assert not torch.equal(memory.second_moment[72:], before[72:])


@every_kind
def test_dead_elements_have_a_second_moment_too(kind):
    """Their gradients gather in it, until a refresh."""
    memory, step, *_ = make_case([70, 30], block_size=16)
    live = unpack_bits(memory.live)
    memory.second_moment.zero_()
    kernels_of(kind, 16).encode_(memory, 0, step, commit=True)
    gathered = memory.second_moment[~live & exists(memory.layout)]
    assert (gathered > 0).float().mean() > 0.5


@every_kind
@pytest.mark.parametrize("numels", [[5, 300, 1, 17, 0, 200], [30, SMALL_NUMEL + 300, 70]], ids=str)
def test_a_refresh_does_not_depend_on_buckets_chunks_or_neighbours(kind, numels):
    """Invariant 3."""
    found = []
    for ranks, bucket_numel, num_nodes in ((2, 2**40, None), (2, sum(numels) // 3, None), (4, 2**40, 2)):
        layouts = random_layouts(numels, block_size=64, num_chunks=ranks, bucket_numel=bucket_numel)
        of_parameters = [[torch.zeros(numel) for numel in numels] for _ in range(3)]
        for layout in layouts:
            memories = memories_of(layout, ranks, torch.float32, num_nodes)
            for rank, memory in enumerate(memories):
                node = rank % (num_nodes or ranks)
                memory.second_moment_residual.zero_()
                copy_(memory, [randn(n, 7 * p + node).square().float() for p, n in enumerate(numels)], into_memory=True)
            refresh_(kernels_of(kind, 64), memories, 1 + np.arange(len(numels)) / 4, num_nodes)
            for values, memory in zip(of_parameters, (memories[0], memories[1], memories[-1]), strict=True):
                copy_(memory, values, into_memory=False)
            copy_(memories[0], of_parameters[2], into_memory=False, flat=memories[0].decoded_rms((0, layout.num_blocks)))
        found.append(of_parameters if num_nodes is None else [None, None, of_parameters[2]])
    for other in found[1:]:
        for ours, expected in zip(other, found[0], strict=True):
            for one, another in zip(ours or [], expected, strict=False):
                assert_same_bits(one, another)


def copy_(memory, values, *, into_memory, flat=None):
    """Second moments, or another flat tensor of the bucket, from or to tensors by parameter."""
    layout, own = memory.layout, memory.share_flat if flat is None else slice(0, memory.layout.flat_numel)
    flat = memory.second_moment if flat is None else flat
    for p, start, numel, offset in zip(layout.parameter, layout.start, layout.numel, layout.offset, strict=False):
        if own.start <= offset < own.stop:
            there, here = values[p][start : start + numel], flat[offset - own.start :][:numel]
            (here if into_memory else there).copy_(there if into_memory else here)


def keep_nothing(memory, messages, numbers):
    """A mutation: v_i becomes what was decoded."""
    ReferenceKernels().apply_variance_(memory, messages, numbers)
    flat = memory.decoded_rms((0, memory.layout.num_blocks))[memory.share_flat]
    memory.second_moment.copy_(flat.square() / float(numbers.correction[0]))


@pytest.mark.parametrize("factor", [0.25, 4.0])
@pytest.mark.parametrize(("kind", "ranks"), [("reference", 2), ("cpu", 2), ("cpu", 4), ("cpu", 16), ("mutation", 2)])
def test_the_rounding_does_not_stick(kind, ranks, factor):
    """Half of a block's gradients change after the freeze; 3,000 steps, a refresh at every 64th, beta2 = 0.999."""
    numel, decay, first_step = 128, 0.999, 1000
    [layout] = random_layouts([numel], block_size=numel, num_chunks=ranks)
    kernels = kernels_of("reference" if kind == "mutation" else kind, numel)
    if kind == "mutation":
        kernels.apply_variance_ = keep_nothing
    generator = torch.Generator().manual_seed(ranks)
    deviation = torch.exp2(torch.rand(numel, generator=generator) * 8 - 4)
    exact = deviation.square().double() * (1 - decay**first_step)
    memories = []
    for rank in range(ranks):
        memory = BucketMemory(
            layout,
            share=range(ranks),
            chunk=rank,
            has_rms=True,
            keeps_before=False,
            renews=True,
            dtype=torch.float32,
            device=CPU,
        )
        memory.set_rms_(deviation)
        memories.append(memory)
    v = exact.float().repeat(ranks, 1)
    changed = torch.arange(numel) % 2 == 0
    deviation[changed] *= factor
    for t in range(first_step + 1, first_step + 3001):
        squares = (torch.randn(ranks, numel, generator=generator) * deviation).square_()
        exact.mul_(decay).add_(squares.mean(dim=0).double(), alpha=1 - decay)
        v.mul_(decay).add_(squares, alpha=1 - decay)
        if t % 64 == 0 or t == first_step + 3000:
            for memory, of_rank in zip(memories, v, strict=True):
                memory.second_moment.copy_(of_rank)
            refresh_(kernels, memories, np.array([1 / (1 - decay**t)]))
            torch.stack([memory.second_moment for memory in memories], out=v)
    ratio = memories[0].decoded_rms((0, layout.num_blocks)).double() / (exact / (1 - decay**t)).sqrt()
    within = [bool(((ratio[half] - 1).abs() < 0.1).all()) for half in (changed, ~changed)]
    assert all(within) == (kind != "mutation"), (ratio.min(), ratio.max())


# One rank


@every_dtype
def test_one_rank_has_exactly_adams_second_moment(dtype):
    numels = [40, 9]
    [layout] = random_layouts(numels, block_size=16, num_chunks=1)
    memory = BucketMemory(
        layout, share=range(1), chunk=None, has_rms=True, keeps_before=False, renews=True, dtype=dtype, device=CPU
    )
    assert memory.rms is not None
    assert memory.rms_code is None
    memory.set_rms_(torch.where(exists(layout), 1.0, 0.0).to(dtype))
    memory.live = pack_bits(exists(layout))
    params = [torch.zeros(n, dtype=dtype, requires_grad=True) for n in numels]
    adam = torch.optim.Adam(params, lr=0.0, betas=(0.9, 0.99), weight_decay=0.1)
    kernels = ExactKernels()
    for t in range(1, 6):
        step = random_step(numels, dtype=dtype, coefficients=RENEWED._replace(root_r=1.0, coupled_decay=0.1), seed=t)
        step.active = np.ones(2, dtype=bool)
        step.numbers[:, 7] = 0.0  # no step
        step.params = [p.detach() for p in params]
        for p, gradient in zip(params, step.gradients, strict=True):
            p.grad = gradient.clone()
        kernels.encode_(memory, 0, step, commit=True)
        adam.step()
        kernels.apply_variance_(memory, None, refresh_numbers(np.full(2, 1 / (1 - 0.99**t))))
    for p, offset in zip(params, (0, 40), strict=True):
        v = adam.state[p]["exp_avg_sq"]
        torch.testing.assert_close(memory.second_moment[offset : offset + len(v)], v, rtol=1e-5, atol=0)
        rms = memory.decoded_rms((0, layout.num_blocks))[offset : offset + len(v)]
        torch.testing.assert_close(rms, (v / (1 - 0.99**5)).sqrt(), rtol=1e-5, atol=0)
