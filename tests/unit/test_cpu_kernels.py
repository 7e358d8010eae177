"""The sign quantizer: the reference against the definition in Python's numbers, and the kernels for CPUs against it."""

import math
import tracemalloc

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
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from lightning_onebit.coefficients import Coefficients
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.buckets import square_root_
from lightning_onebit.quantize import make_kernels
from lightning_onebit.quantize.cpu import CpuKernels
from lightning_onebit.quantize.layout import SMALL_NUMEL, SPAN_NUMEL
from lightning_onebit.quantize.memory import BucketMemory, StepInputs
from lightning_onebit.quantize.reference import ReferenceKernels, pack_bits, unpack_bits

SMALL = [5, 300, 1, 17, 0, 200, 64, 100]
"""They share spans."""
MIXED = [40, SMALL_NUMEL + 3, 7, 300, 9]
"""The second has spans of its own."""
LARGE = [SPAN_NUMEL + 3 * 2048 + 5]
"""Two spans, the last block short."""

NESTEROV = ADAM._replace(nesterov=0.9, kappa=1e30)
DECAYED = ADAM._replace(shrink=0.99, coupled_decay=0.1, sign=-1.0)
SGD = Coefficients(beta=0.9, weight=1.0, step_size=0.1, nesterov=0.9, coupled_decay=1e-3)

every_scale = pytest.mark.parametrize("scale", ["l2", "l1"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def cpu_kernels(block_size, scale="l2", space="update", dtype=torch.float32):
    return CpuKernels(scale=scale, space=space, block_size=block_size, dtype=dtype)


def kernels_of(kind, block_size, scale="l2", space="update", dtype=torch.float32):
    return cpu_kernels(block_size, scale, space, dtype) if kind == "cpu" else ReferenceKernels(scale=scale, space=space)


def scales_tolerance(dtype, block_size, numels):
    """The reference adds up in float64, the other in ``dtype``, in four lanes or more where blocks are rows."""
    lanes = 1 if min(numels) <= SMALL_NUMEL else 4
    return 2e-7 + torch.finfo(dtype).eps / 2 * min(block_size, max(numels)) / lanes


# The definition


def definition(values, live, scale):
    """Bits, scale and decoded values of one block."""
    counted = [value for value, counts in zip(values, live, strict=True) if counts]
    size = max(len(counted), 1)
    s = math.hypot(*counted) / math.sqrt(size) if scale == "l2" else math.fsum(map(abs, counted)) / size
    s = float(np.float32(s))
    bits = [bool(counts) and value >= 0 for value, counts in zip(values, live, strict=True)]
    return bits, s, [(s if bit else -s) if counts else 0.0 for bit, counts in zip(bits, live, strict=True)]


def quantized(kind, values, live=None, *, block_size=8, scale="l2", dtype=torch.float32):
    """Bits and scales of values of one parameter, and what is left, by a worker that has nothing else to add."""
    numel = len(values)
    (layout,) = random_layouts([numel], block_size=block_size, num_chunks=1)
    memory = BucketMemory(layout, share=range(1), chunk=0, has_rms=False, keeps_before=False, dtype=dtype, device=CPU)
    memory.error[:numel] = torch.as_tensor(values, dtype=dtype)
    if live is not None:
        mask = torch.zeros(layout.flat_numel, dtype=torch.bool)
        mask[:numel] = torch.as_tensor(live)
        memory.live = memory.live_before = pack_bits(mask)
    step = StepInputs(
        params=[torch.zeros(numel, dtype=dtype)],
        gradients=[None],
        numbers=np.array([Coefficients(beta=0.0, weight=1.0)]),
        flags=torch.tensor([0, 1], dtype=torch.int32),
    )
    kernels_of(kind, block_size, scale, dtype=dtype).encode_(memory, 0, step, commit=True)
    signs, scales = memory.encoded(memory.sent, 0, (0, layout.num_blocks))
    bits = np.unpackbits(signs.numpy(), bitorder="little").astype(bool)
    assert not bits[numel:].any()
    return bits[:numel].tolist(), scales.clone(), memory.error[:numel].clone()


def assert_is_the_definition(kind, values, live, **options):
    block_size, scale = options.get("block_size", 8), options.get("scale", "l2")
    dtype = options.get("dtype", torch.float32)
    values = torch.as_tensor(values, dtype=dtype).tolist()
    bits, scales, left = quantized(kind, values, live, **options)
    live = [True] * len(values) if live is None else live
    for block, start in enumerate(range(0, len(values), block_size)):
        part = slice(start, start + block_size)
        expected_bits, expected_scale, _ = definition(values[part], live[part], scale)
        assert bits[part] == expected_bits
        assert scales[block].item() == pytest.approx(expected_scale, rel=1e-6, abs=2 * 2.0**-149)
        for value, counts, bit, rest in zip(values[part], live[part], bits[part], left[part].tolist(), strict=True):
            q = scales[block].item() * (1 if bit else -1) if counts else 0.0
            # c == q + delta (invariant 4), to one rounding of the subtraction
            assert abs(value - (q + rest)) <= torch.finfo(dtype).eps * (abs(value) + abs(q))


special = st.sampled_from([0.0, -0.0, 2.0**-149, -(2.0**-149), 1e-38, 1e-30, 1e30, -1e30, 1.0, -1.0])
finite = st.one_of(st.floats(-(2.0**99), 2.0**99, width=32), special, st.floats(-2, 2, width=32))
some_values = st.lists(st.tuples(finite, st.booleans()), min_size=1, max_size=40)


@pytest.mark.parametrize("kind", ["reference", "cpu"])
@every_scale
@every_dtype
@settings(max_examples=25, deadline=None)
@given(elements=some_values, masked=st.booleans(), block_size=st.sampled_from([8, 16]))
def test_any_values_are_quantized_by_the_definition_and_nothing_is_lost(kind, scale, dtype, elements, masked, block_size):
    values, live = [value for value, _ in elements], [counts for _, counts in elements] if masked else None
    assert_is_the_definition(kind, values, live, block_size=block_size, scale=scale, dtype=dtype)


@pytest.mark.parametrize("kind", ["reference", "cpu"])
@every_scale
def test_a_block_by_hand(kind, scale):
    bits, scales, left = quantized(kind, [3.0, -4.0, 0.0, -0.0, 0.0, 0.0, 0.0, 0.0, 2.0], scale=scale)
    first = 5 / math.sqrt(8) if scale == "l2" else 7 / 8
    assert bits == [True, False, *[True] * 7]  # -0.0 counts as >= 0
    assert scales.tolist() == pytest.approx([first, 2.0])
    assert left.tolist() == pytest.approx([3 - first, first - 4, *[-first] * 6, 0.0])


@pytest.mark.parametrize("kind", ["reference", "cpu"])
@pytest.mark.parametrize("numel", [5, SMALL_NUMEL + 9])
@every_scale
@every_dtype
def test_blocks_of_very_different_magnitude_side_by_side(kind, numel, scale, dtype):
    """Neither over- nor underflow, in a span of its own and in a shared one."""
    block_size = 2048 if numel > SMALL_NUMEL else 8
    for magnitude in (1e30, 1e-30, 1e-38, 1e-41, 2.0**-149, 0.0):
        values = randn(numel, 1, dtype).sign().mul_(magnitude)
        values[: min(numel, block_size) // 2] *= 0
        if numel > block_size:
            values[block_size : 2 * block_size] = 1.0
        _, scales, left = quantized(kind, values, block_size=block_size, scale=scale, dtype=dtype)
        assert torch.isfinite(left).all()
        whole = scales[2:] if numel > block_size else scales[:0]
        assert whole.tolist() == pytest.approx([magnitude] * len(whole), rel=1e-3, abs=2.0**-149)
        if numel > block_size:
            assert scales[1].item() == pytest.approx(1.0, rel=1e-6)


def test_square_roots_are_correctly_rounded():
    values = torch.from_numpy(np.arange(2.0, 2.1, 2.0**-22, dtype=np.float32))
    square_root_(values, out=(roots := torch.empty_like(values)))
    assert np.array_equal(roots.numpy(), np.sqrt(values.numpy().astype(np.float64)).astype(np.float32))


@every_scale
def test_a_server_returns_scales_that_are_larger_by_half_of_beta(scale):
    betas = torch.tensor([0.9, 0.5, 0.0])
    coefficients = [ADAM._replace(beta=beta) for beta in betas.tolist()]
    memory, step, reference, _ = make_case(MIXED, block_size=64, masked=True, coefficients=coefficients, scale=scale)
    signs, scales = reference.quantize(reference.mean_received(memory), memory, memory.chunk_blocks)
    reference.serve_(memory, step, commit=True)
    served_signs, served_scales = reference._read(memory, memory.served, memory.chunk, memory.chunk_blocks)
    parameters = torch.from_numpy(memory.layout.parameter[slice(*memory.chunk_blocks)])
    assert_same_bits(served_signs, signs)
    torch.testing.assert_close(served_scales, scales * (1 + betas / 2)[parameters % len(betas)])


# One call after the other, against the reference: the same bits, given the same scales


CASES = {
    "adam": {},
    "momentum space": {"space": "momentum"},
    "l1": {"scale": "l1"},
    "float64": {"dtype": torch.float64},
    "bfloat16 parameters": {"param_dtype": torch.bfloat16},
    "bfloat16, momentum space, decay": {"param_dtype": torch.bfloat16, "space": "momentum", "coefficients": DECAYED},
    "decay, maximize": {"coefficients": DECAYED},
    "nesterov": {"coefficients": NESTEROV},
    "nesterov, momentum space": {"coefficients": NESTEROV, "space": "momentum"},
    "without D": {"coefficients": SGD, "has_rms": False},
    "without D, bfloat16": {"coefficients": SGD, "has_rms": False, "param_dtype": torch.bfloat16},
    "a learning rate of 0": {"coefficients": ADAM._replace(step_size=0.0)},
    "numbers differ": {"coefficients": [ADAM, DECAYED, ADAM._replace(step_size=0.0, eps=1e-3, beta=0.8, weight=0.2)]},
    "numbers differ, momentum space": {
        "coefficients": [DECAYED, ADAM._replace(kappa=1.0), ADAM._replace(eps=1e-3)],
        "space": "momentum",
    },
    "some look ahead": {"coefficients": [SGD, SGD._replace(nesterov=0.0)], "has_rms": False},
    "tiny": {"magnitude": 1e-38},
    "huge": {"magnitude": 1e30, "scale": "l1"},
}


def make_case(numels, *, block_size, masked, share=None, sits_out=(), missing=(), seed=0, **case):
    """Memory of the first of two ranks in the middle of training, a step, and both kernels."""
    dtype, space, scale = case.get("dtype", torch.float32), case.get("space", "update"), case.get("scale", "l2")
    (layout,) = random_layouts(numels, block_size=block_size, num_chunks=2)
    memory = random_memory(layout, share=share, masked=masked, has_rms=case.get("has_rms", True), dtype=dtype, seed=seed)
    numbers = case.get("coefficients", ADAM)
    if isinstance(numbers, list):
        numbers = [numbers[p % len(numbers)] for p in range(len(numels))]
    step = random_step(
        numels,
        dtype=case.get("param_dtype", dtype),
        coefficients=numbers,
        sits_out=sits_out,
        missing=missing,
        seed=seed,
    )
    magnitude = case.get("magnitude", 1.0)
    for values in (memory.error, memory.server_error, *(g for g in step.gradients if g is not None)):
        values.mul_(magnitude)
    if magnitude != 1.0:
        step.numbers[:, Coefficients._fields.index("kappa")] = 1e30
        if memory.rms is not None:
            memory.rms.copy_(torch.where(memory.rms > 0, 1.0, 0.0))
        memory.received.view(torch.uint8)[:] = 0  # scales of 0: what counts is the error
    return memory, step, ReferenceKernels(scale=scale, space=space), cpu_kernels(block_size, scale, space, dtype)


def copies(memory, step):
    return copy_of_memory(memory), copy_of_step(step)


def assert_same_message(reference, memory, step, actual, expected, chunk, blocks, rtol):
    """The same bits, and scales to rounding, of parameters that are active."""
    signs, scales = reference._read(memory, actual, chunk, blocks)
    expected_signs, expected_scales = reference._read(memory, expected, chunk, blocks)
    active = step.is_active[torch.from_numpy(memory.layout.parameter[slice(*blocks)])]
    different = (signs != expected_signs) & reference._by_element(memory, blocks, step.is_active)
    assert not different.any()
    torch.testing.assert_close(scales[active], expected_scales[active], rtol=rtol, atol=2 * 2.0**-149)


def assert_a_step_is_that_of_the_reference(memory, step, reference, cpu, rtol):
    # Steps 1 and 2
    ours, expected = copies(memory, step), copies(memory, step)
    cpu.encode_(ours[0], 0, ours[1], commit=True)
    reference.encode_(expected[0], 0, expected[1], commit=True)
    first = memory.share.start
    assert_same_message(reference, memory, step, ours[0].sent, expected[0].sent, first, memory.share_blocks, rtol)
    expected = copies(memory, step)
    expected[0].sent.copy_(ours[0].sent)
    reference._commit_worker_(expected[0], 0, expected[1])
    assert_same(ours, expected)
    # Step 4
    served = copies(*ours)
    cpu.serve_(ours[0], ours[1], commit=True)
    reference.serve_(served[0], served[1], commit=True)
    assert_same_message(reference, memory, step, ours[0].served, served[0].served, memory.chunk, memory.chunk_blocks, rtol)
    expected[0].served.copy_(ours[0].served)
    reference._commit_server_(expected[0], expected[1])
    assert_same(ours, expected)
    # Step 6
    cpu.apply_(ours[0], 0, ours[1], commit=False)
    reference.apply_(expected[0], 0, expected[1], commit=False)
    if step.numbers[:, Coefficients._fields.index("nesterov")].any():  # the product of two numbers is rounded or not
        for ours_x, x in zip(ours[1].params, expected[1].params, strict=True):
            torch.testing.assert_close(ours_x, x, rtol=2 * torch.finfo(x.dtype).eps, atol=2 * torch.finfo(x.dtype).eps)
            expected[1].params[:] = ours[1].params
    assert_same(ours, expected)


every_mask = pytest.mark.parametrize("masked", [False, True], ids=["all live", "some not live"])


@pytest.mark.parametrize("case", CASES)
@every_mask
@pytest.mark.parametrize(("numels", "block_size"), [(SMALL, 8), (SMALL, 64), (MIXED, 2048)], ids=str)
def test_a_step_is_that_of_the_reference(case, masked, numels, block_size):
    memory, step, reference, cpu = make_case(
        numels, block_size=block_size, masked=masked, missing=(2,), sits_out=(1, 3), **CASES[case]
    )
    assert_a_step_is_that_of_the_reference(memory, step, reference, cpu, scales_tolerance(memory.dtype, block_size, numels))


@every_mask
@pytest.mark.parametrize("block_size", [2048, 16384])
@every_dtype
def test_a_step_of_a_large_parameter_is_that_of_the_reference(masked, block_size, dtype):
    memory, step, reference, cpu = make_case(LARGE, block_size=block_size, masked=masked, dtype=dtype)
    assert len(memory.layout.spans(memory.share, LARGE)) >= 2
    assert_a_step_is_that_of_the_reference(memory, step, reference, cpu, scales_tolerance(dtype, block_size, LARGE))


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 63, 64, 65, 127, 129])
@pytest.mark.parametrize("is_packed", [True, False])
@every_mask
def test_all_tails(numel, is_packed, masked):
    """Of parameters that share spans, and of one with its own."""
    numels = [3, numel, 5] if is_packed else [SMALL_NUMEL + numel]
    memory, step, reference, cpu = make_case(numels, block_size=64, masked=masked)
    assert_a_step_is_that_of_the_reference(memory, step, reference, cpu, scales_tolerance(torch.float32, 64, numels))


@pytest.mark.parametrize("kind", ["reference", "cpu"])
@pytest.mark.parametrize("numels", [SMALL, MIXED], ids=str)
@every_mask
def test_whether_padding_is_called_live_makes_no_difference(kind, numels, masked):
    """Masks of a run that goes on and of one that was resumed differ there."""
    memory, step, *_ = make_case(numels, block_size=64, masked=masked)
    element, results = exists(memory.layout), []
    masks = [unpack_bits(each) if masked else element for each in (memory.live, memory.live_before)]
    for padding in (False, True):
        own, inputs = copies(memory, step)
        own.live, own.live_before = (pack_bits(torch.where(element, mask, padding)) for mask in masks)
        kernels = kernels_of(kind, 64)
        kernels.encode_(own, 0, inputs, commit=True)
        kernels.serve_(own, inputs, commit=True)
        kernels.apply_(own, 0, inputs, commit=False)
        results.append([own.error, own.server_error, own.sent, own.served, *inputs.params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["reference", "cpu"])
@pytest.mark.parametrize("coefficients", [ADAM, SGD, ADAM._replace(step_size=0.0)], ids=["adam", "nesterov", "no step"])
def test_not_even_the_sign_of_a_zero_that_is_not_live_changes(kind, coefficients):
    memory, step, *_ = make_case(MIXED, block_size=64, masked=True, coefficients=coefficients)
    memory.live_before = memory.live
    for param in step.params:
        param.fill_(-0.0)
    kernels_of(kind, 64).apply_(memory, 0, step, commit=False)
    live = unpack_bits(memory.live)
    parameter = memory.spread(torch.from_numpy(memory.layout.parameter), (0, memory.layout.num_blocks))
    for p, param in enumerate(step.params):
        still = param[~live[parameter == p][: len(param)]]
        assert len(still) > 0
        assert still.signbit().all()
        assert still.eq(0).all()


@pytest.mark.parametrize("space", ["update", "momentum"])
@every_mask
def test_without_eps_padding_is_not_divided_by_its_d_of_0(space, masked):
    memory, step, reference, cpu = make_case(
        MIXED, block_size=64, masked=masked, space=space, coefficients=ADAM._replace(eps=0.0)
    )
    live = exists(memory.layout) if memory.live is None else unpack_bits(memory.live)
    memory.rms.copy_(torch.where(live, memory.rms.clamp(min=0.1), 0.0))
    with np.errstate(all="raise"):
        assert_a_step_is_that_of_the_reference(memory, step, reference, cpu, scales_tolerance(torch.float32, 64, MIXED))


@pytest.mark.parametrize("numels", [SMALL, MIXED], ids=str)
def test_averages_of_a_node_take_the_place_of_gradients(numels):
    """On a share that is a part of the bucket."""
    memory, step, reference, cpu = make_case(numels, block_size=64, masked=True, share=range(1))
    step.share_gradients[0] = randn(len(memory.error), 5, memory.dtype)
    step.gradients = [None] * len(numels)
    assert_a_step_is_that_of_the_reference(memory, step, reference, cpu, scales_tolerance(torch.float32, 64, numels))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("kind", ["reference", "cpu"])
@pytest.mark.parametrize("numels", [SMALL, MIXED], ids=str)
def test_a_gradient_that_is_not_finite_is_noted_and_changes_no_error(bad, kind, numels):
    memory, step, *_ = make_case(numels, block_size=64, masked=False)
    kernels = kernels_of(kind, 64)
    kernels.encode_(memory, 0, step, commit=False)
    assert step.flags[0] == 0
    step.gradients[1][-1] = bad
    before = copies(memory, step)
    kernels.encode_(memory, 0, step, commit=False)
    assert step.flags[0] == 1
    before[1].flags[0] = 1
    assert_same((memory, step), before, apart_from=("sent",))
    kernels.apply_(memory, 0, step, commit=True)
    assert_same((memory, step), before, apart_from=("sent",))


def test_values_that_cannot_be_quantized_are_refused():
    memory, step, _, cpu = make_case(SMALL, block_size=64, masked=False)
    memory.error[3] = math.nan
    with pytest.raises(FloatingPointError, match="infinite or NaN"):
        cpu.encode_(memory, 0, step, commit=True)


def test_the_dispatch_gives_a_cpu_its_own_kernels_and_other_devices_the_reference():
    config = CompressionConfig(scale="l1", space="momentum")
    cpu = make_kernels(config, device=CPU, dtype=torch.float32)
    assert (cpu.name, cpu.scale, cpu.space) == ("cpu", "l1", "momentum")
    other = make_kernels(config, device=torch.device("meta"), dtype=torch.float32)
    assert isinstance(other, ReferenceKernels)
    assert (other.scale, other.space) == ("l1", "momentum")


# Whole steps of several ranks


class Ranks:
    """All ranks of a network, flat or of nodes, that exchange one list of parameters by copying."""

    def __init__(self, kind, numels, *, names=None, num_nodes=2, local_world_size=1, bucket_numel=2**40, **case):
        self.kind, self.numels, self.names = kind, numels, names or range(len(numels))
        self.num_nodes, self.world_size = num_nodes, num_nodes * local_world_size
        self.block_size, self.case = case.get("block_size", 64), case
        self.dtype, masked = case.get("dtype", torch.float32), case.get("masked", False)
        self.layouts = random_layouts(
            numels, block_size=self.block_size, num_chunks=self.world_size, bucket_numel=bucket_numel
        )
        settings = (self.block_size, case.get("scale", "l2"), case.get("space", "update"), self.dtype)
        self.kernels = kernels_of(kind, *settings)
        self.params = [[randn(n, 7 * name, case.get("param_dtype", self.dtype)) for n, name in self._named()]] * 1
        self.params += [[p.clone() for p in self.params[0]] for _ in range(self.world_size - 1)]
        self.memories = [[self._memory(layout, rank, masked) for layout in self.layouts] for rank in range(self.world_size)]

    def _named(self):
        return zip(self.numels, self.names, strict=True)

    def _memory(self, layout, rank, masked):
        first = rank // self.num_nodes * self.num_nodes
        memory = BucketMemory(
            layout,
            share=range(first, first + self.num_nodes),
            chunk=rank,
            has_rms=self.case.get("has_rms", True),
            keeps_before=True,
            dtype=self.dtype,
            device=CPU,
            parameter_numels=self.numels,
        )
        live = torch.zeros(layout.flat_numel, dtype=torch.bool)
        lives = [randn(n, 3 + 7 * name) > (-0.5 if masked else -math.inf) for n, name in self._named()]
        rmss = [randn(n, 2 + 7 * name, self.dtype).abs() + 0.1 for n, name in self._named()]
        for p, start, numel, offset in zip(layout.parameter, layout.start, layout.numel, layout.offset, strict=False):
            part, place = slice(start, start + numel), slice(offset, offset + numel)
            live[place] = lives[p][part]
            if memory.rms is not None:
                memory.rms[place] = rmss[p][part]
        if masked:
            memory.live = memory.live_before = pack_bits(live)
            if memory.rms is not None:
                memory.rms.mul_(live)
        return memory

    def step(self, t, *, late, sits_out=()):
        """One step of all ranks; parameters named in ``sits_out`` have no gradient anywhere."""
        rows = [self.case.get("coefficients", ADAM)] * len(self.numels)
        flags = torch.tensor([0, *(name not in sits_out for name in self.names)], dtype=torch.int32)
        steps = [
            StepInputs(
                params=self.params[rank],
                gradients=[
                    None
                    if name in sits_out
                    else randn(n, 1000 * t + 50 * rank + name, self.case.get("param_dtype", self.dtype))
                    for n, name in self._named()
                ],
                numbers=np.array(rows, dtype=np.float64),
                flags=flags.clone(),
            )
            for rank in range(self.world_size)
        ]
        for index in range(len(self.layouts)):
            memories = [each[index] for each in self.memories]
            for memory, step in zip(memories, steps, strict=True):
                self.kernels.encode_(memory, index, step, commit=not late)
            for rank, memory in enumerate(memories):
                first = rank // self.num_nodes * self.num_nodes
                for node in range(self.num_nodes):
                    sent = memories[first + node].sent.view(self.num_nodes, -1)
                    memory.received.view(self.num_nodes, -1)[node] = sent[rank - first]
            for memory, step in zip(memories, steps, strict=True):
                self.kernels.serve_(memory, step, commit=not late)
            result = torch.cat([memory.served for memory in memories])
            for memory, step in zip(memories, steps, strict=True):
                memory.result_before.copy_(result)
                memory.turn_results_()
                self.kernels.apply_(memory, index, step, commit=late)

    def errors(self, name):
        """Worker errors by rank and the whole server error of a parameter, each in its own order."""
        p = list(self.names).index(name)
        found = [torch.zeros(self.numels[p], dtype=self.dtype) for _ in range(self.world_size + 1)]
        for rank, memories in enumerate(self.memories):
            for memory in memories:
                layout = memory.layout
                for block in np.flatnonzero(layout.parameter == p):
                    start, numel, offset = (int(a[block]) for a in (layout.start, layout.numel, layout.offset))
                    for into, flat, values in (
                        (found[rank], memory.share_flat, memory.error),
                        (found[-1], memory.chunk_flat, memory.server_error),
                    ):
                        if flat.start <= offset < flat.stop:
                            into[start : start + numel] = values[offset - flat.start :][:numel]
        return found


WHOLE_STEPS = {
    "adam": {},
    "momentum space": {"space": "momentum", "masked": True},
    "l1, decay": {"scale": "l1", "coefficients": DECAYED, "masked": True},
    "bfloat16": {"param_dtype": torch.bfloat16},
    "nesterov": {"coefficients": NESTEROV, "masked": True},
    "without D": {"coefficients": SGD, "has_rms": False, "masked": True},
    "float64": {"dtype": torch.float64},
}


@pytest.mark.parametrize("case", WHOLE_STEPS)
@pytest.mark.parametrize("kind", ["reference", "cpu"])
def test_errors_written_late_are_those_written_at_once(kind, case):
    """Also where parameters sit out: nothing of theirs changes, and they keep their last average."""
    outcomes = []
    for late in (False, True):
        ranks = Ranks(kind, SMALL, num_nodes=2, local_world_size=1, **WHOLE_STEPS[case])
        for t, sits_out in enumerate([(), (1, 3), (), (0, 5)]):
            before = [ranks.params[0][p].clone() for p in sits_out], [ranks.errors(p) for p in sits_out]
            ranks.step(t, late=late, sits_out=sits_out)
            for p, x, errors in zip(sits_out, *before, strict=True):
                assert_same_bits(ranks.params[0][p], x)
                for error, previous in zip(ranks.errors(p), errors, strict=True):
                    assert_same_bits(error, previous)
        outcomes.append((ranks.params, [ranks.errors(p) for p in range(len(SMALL))], [m.result for m in ranks.memories[0]]))
    (params, errors, results), (late_params, late_errors, late_results) = outcomes
    for one, other in ((errors, late_errors), (params, late_params)):
        for a, b in zip(one, other, strict=True):
            for x, y in zip(a, b, strict=True):
                assert_same_bits(x, y)
    for x, y in zip(results, late_results, strict=True):
        assert_same_bits(x, y)
    for other in params[1:]:  # invariant 2
        for x, y in zip(other, params[0], strict=True):
            assert_same_bits(x, y)


@pytest.mark.parametrize("case", WHOLE_STEPS)
@pytest.mark.parametrize("numels", [[5, 300, 1, 17, 0, 200], [30, SMALL_NUMEL + 300, 70]], ids=str)
def test_a_parameter_gets_the_same_bits_alone_as_cut_into_buckets_beside_others(case, numels):
    """Invariant 3, of parameters that share spans, and of one that does not."""
    together, cut, reordered = (
        Ranks("cpu", [numels[p] for p in order], names=order, num_nodes=3, bucket_numel=numel, **WHOLE_STEPS[case])
        for order, numel in (
            (list(range(len(numels))), 2**40),
            (list(range(len(numels))), sum(numels) // 3),
            (list(range(len(numels)))[::-1], sum(numels) // 2),
        )
    )
    alone = {p: Ranks("cpu", [n], names=[p], num_nodes=3, **WHOLE_STEPS[case]) for p, n in enumerate(numels)}
    assert len(cut.layouts) > len(together.layouts)
    for t in range(2):
        for ranks in (together, cut, reordered, *alone.values()):
            ranks.step(t, late=t == 1)
    for ranks in (together, cut, reordered):
        for place, p in enumerate(ranks.names):
            assert_same_bits(ranks.params[0][place], alone[p].params[0][0], f"parameter {p}")
            for error, expected in zip(ranks.errors(p), alone[p].errors(p), strict=True):
                assert_same_bits(error, expected, f"error of parameter {p}")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_bits_do_not_depend_on_cuts_on_two_threads():
    """Above 32768 elements torch spreads work over its threads."""
    numel = 100_000
    outcomes = []
    for bucket_numel in (2**40, 20_000):
        ranks = Ranks("cpu", [numel], block_size=2048, bucket_numel=bucket_numel)
        ranks.step(0, late=False)
        outcomes.append([*ranks.params[0], *ranks.errors(0)])
    for other in outcomes[1:]:
        for x, y in zip(other, outcomes[0], strict=True):
            assert_same_bits(x, y)


@every_scale
def test_nothing_is_lost_over_many_steps(scale):
    """Invariant 4: with beta = 0 what was applied and what is held back is the sum of the mean gradients, where live."""
    plain = Coefficients(beta=0.0, weight=1.0, step_size=1.0)
    ranks = Ranks("cpu", SMALL, scale=scale, coefficients=plain, has_rms=False, dtype=torch.float64, num_nodes=3)
    initial = [p.clone() for p in ranks.params[0]]
    for t in range(30):
        ranks.step(t, late=t % 2 == 0)
    for p, numel in enumerate(SMALL):
        exact = sum(randn(numel, 1000 * t + 50 * rank + p) for t in range(30) for rank in range(3)) / 3
        *worker, server = ranks.errors(p)
        held_back = sum(worker) / 3 + server
        assert numel < 2 or held_back.abs().max() > 0.01
        assert torch.allclose(initial[p] - ranks.params[0][p] + held_back, exact, rtol=0, atol=1e-12)


# Memory


def steady_step(masked, zero_block):
    """A closure that makes a step on one large parameter, in both ways; called once already."""
    numels = [SPAN_NUMEL]
    memory, step, _, cpu = make_case(numels, block_size=2048, masked=masked)
    if zero_block:
        memory.error[:2048] = 0.0
        step.gradients[0][:2048] = 0.0

    def call():
        for late in (False, True):
            cpu.encode_(memory, 0, step, commit=not late)
            cpu.serve_(memory, step, commit=not late)
            cpu.apply_(memory, 0, step, commit=late)

    call()
    return call


every_kind_of_span = pytest.mark.parametrize(
    ("masked", "zero_block"), [(False, False), (True, False), (False, True)], ids=["all live", "some dead", "a zero block"]
)


@every_kind_of_span
def test_no_numpy_array_of_the_size_of_the_data_is_made(masked, zero_block):
    call = steady_step(masked, zero_block)
    tracemalloc.start()
    try:
        call()
        _, peak_nbytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_nbytes < SPAN_NUMEL / 4


@pytest.mark.parametrize("masked", [False, True])
def test_no_tensor_of_the_size_of_the_data_is_made(masked):
    call = steady_step(masked, False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    nbytes, operation = max((event.self_cpu_memory_usage, event.name) for event in recorded.events())
    assert nbytes > 0  # scales are allocated: the profiler does see memory
    assert nbytes < SPAN_NUMEL / (2 if masked else 4), operation  # of a mask, a byte for each element of a chunk
