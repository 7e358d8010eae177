"""Random buckets and steps for tests of kernels: one rank's memory in the middle of training, and copies of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from lightning_onebit.coefficients import Coefficients, RefreshNumbers
from lightning_onebit.quantize.layout import plan_buckets
from lightning_onebit.quantize.memory import BucketMemory, StepInputs
from lightning_onebit.quantize.reference import ReferenceKernels, pack_bits

CPU = torch.device("cpu")
ADAM = Coefficients(beta=0.9, weight=0.1, kappa=31.6, eps=1e-8, step_size=1e-2, largest_move=2e-2)
TENSORS = (
    "error", "server_error", "rms", "live", "live_before", "sent", "received", "served", "share_result", "rms_code",
    "rms_scale", "second_moment", "second_moment_residual",
)  # fmt: skip


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(numel, seed, dtype=torch.float64):
    return torch.randn(numel, generator=seeded(seed), dtype=torch.float64).to(dtype)


def exists(layout):
    """Which elements of flat memory are no padding."""
    mask = torch.zeros(layout.flat_numel, dtype=torch.bool)
    for offset, numel in zip(layout.offset[:-1], layout.numel, strict=True):
        mask[offset : offset + numel] = True
    return mask


def random_layouts(numels, *, block_size=64, num_chunks=2, bucket_numel=2**40):
    return plan_buckets(numels, block_size=block_size, num_chunks=num_chunks, bucket_numel=bucket_numel)


def random_memory(
    layout,
    *,
    share=None,
    chunk=0,
    masked=False,
    has_rms=True,
    keeps_before=True,
    renews=False,
    dtype=torch.float32,
    seed=0,
):
    """The memory of one rank, on the CPU: errors, D, masks, what was received, and averages are random."""
    share = range(layout.num_chunks) if share is None else share
    memory = BucketMemory(
        layout,
        share=share,
        chunk=chunk,
        has_rms=has_rms,
        keeps_before=keeps_before,
        dtype=dtype,
        device=CPU,
        renews=renews,
    )
    element = exists(layout)
    masks = [element, element]
    if masked:
        masks = [element & (torch.rand(layout.flat_numel, generator=seeded(seed + s)) < 0.7) for s in (7, 8)]
        memory.live, memory.live_before = map(pack_bits, masks)
    live, live_before = masks
    memory.error.copy_(torch.where(element[memory.share_flat], randn(len(memory.error), seed + 1, dtype), 0.0)).mul_(0.1)
    if memory.has_rms:
        rms = randn(layout.flat_numel, seed + 2, dtype).abs()
        rms[::5] *= 1e-4  # clamped
        rms[::11] = 0.0 if memory.rms is not None else 1e-12  # a code of 0 is not live
        memory.set_rms_(torch.where(live, rms, 0.0))
    if memory.second_moment is not None:
        v = randn(len(memory.second_moment), seed + 4, dtype).square()
        v[::5] *= 1e-12
        v[::3] = 0.0
        memory.second_moment.copy_(torch.where(element[memory.share_flat], v, 0.0))
    if memory.second_moment_residual is not None:
        residual = randn(len(memory.second_moment_residual), seed + 5, dtype)
        memory.second_moment_residual.copy_(torch.where(element[memory.chunk_flat], residual, 0.0)).mul_(0.1)
    whole = (0, layout.num_blocks)
    for number, result in enumerate(memory.results):
        random_message_(memory, result, 0, whole, live_before if number else live, seed + 10 + number)
    random_message_(memory, memory.result, 0, whole, live_before, seed + 10)
    if chunk is not None:
        values = randn(len(memory.server_error), seed + 3, dtype)
        memory.server_error.copy_(torch.where(element[memory.chunk_flat], values, 0.0)).mul_(0.1)
        for number, message in enumerate(memory.received.view(len(share), -1)):
            random_message_(memory, message, chunk, memory.chunk_blocks, live, seed + 20 + number)
    return memory


def random_message_(memory, messages, first_chunk, blocks, live, seed):
    """Any bits and scales, a zero scale among them."""
    start, stop = (int(memory.layout.offset[block]) for block in blocks)
    bits = (torch.rand(stop - start, generator=seeded(seed)) < 0.5) & live[start:stop]
    scales = torch.rand(blocks[1] - blocks[0], generator=seeded(seed + 1)) + 0.1
    scales[1::7] = 0.0
    ReferenceKernels()._write(memory, messages, first_chunk, blocks, bits, scales)


def random_step(numels, *, dtype=torch.float32, coefficients=ADAM, sits_out=(), missing=(), seed=0):
    """Parameters, gradients and numbers on the CPU.

    Args:
        numels: elements of each parameter.
        dtype: of all of them.
        coefficients: of all parameters, or a list by parameter.
        sits_out: parameters that are not active.
        missing: parameters without a gradient.
        seed: of what is random.
    """
    rows = [coefficients] * len(numels) if isinstance(coefficients, Coefficients) else coefficients
    flags = torch.ones(1 + len(numels), dtype=torch.int32)
    flags[0] = 0
    flags[[1 + p for p in sits_out]] = 0
    params, gradients = ([randn(n, 1000 * seed + p + s, dtype) for p, n in enumerate(numels)] for s in (100, 500))
    for gradient in gradients:
        gradient[3::29] *= 1e3  # is clamped without D as well
        gradient[::7] = 0.0
    return StepInputs(
        params=params,
        gradients=[None if p in missing else gradient for p, gradient in enumerate(gradients)],
        numbers=np.array(rows, dtype=np.float64).reshape(len(numels), len(Coefficients._fields)),
        flags=flags,
    )


def copy_of_memory(memory, device=CPU):
    other = BucketMemory(
        memory.layout,
        share=memory.share,
        chunk=memory.chunk,
        has_rms=memory.has_rms,
        renews=memory.second_moment is not None,
        keeps_before=len(memory.results) == 2,
        dtype=memory.dtype,
        device=device,
    )
    for name in TENSORS:
        setattr(other, name, _copy(getattr(memory, name), device))
    other.results = [_copy(result, device) for result in memory.results]
    return other


def copy_of_step(step, device=CPU):
    return dataclasses.replace(
        step,
        params=[_copy(param, device) for param in step.params],
        gradients=[_copy(gradient, device) for gradient in step.gradients],
        numbers=step.numbers.copy(),
        flags=_copy(step.flags, device),
        share_gradients={index: _copy(each, device) for index, each in step.share_gradients.items()},
    )


def _copy(tensor, device):
    return None if tensor is None else tensor.to(device, copy=True)


def assert_same_bits(actual, expected, name=""):
    """Tensors hold the same bits; any NaN is like any other."""
    assert actual.dtype == expected.dtype
    actual, expected = actual.cpu().flatten(), expected.cpu().flatten()
    a, b = (tensor.view(torch.uint8).view(-1, tensor.element_size()) for tensor in (actual, expected))
    different = (a != b).any(dim=1) & ~(actual.isnan() & expected.isnan())
    if different.any():
        first = different.nonzero().flatten()[:5]
        shown = [tensor[first].tolist() for tensor in (actual, expected)]
        raise AssertionError(f"{name} differs at {first.tolist()}: {shown[0]} instead of {shown[1]}")


def assert_same(actual, expected, *, apart_from=()):
    """Two pairs of memory and step hold the same bits."""
    for name in TENSORS:
        if name not in apart_from and getattr(expected[0], name) is not None:
            assert_same_bits(getattr(actual[0], name), getattr(expected[0], name), name)
    for number, (one, other) in enumerate(zip(actual[0].results, expected[0].results, strict=True)):
        assert_same_bits(one, other, f"results[{number}]")
    for p, (one, other) in enumerate(zip(actual[1].params, expected[1].params, strict=True)):
        assert_same_bits(one, other, f"parameter {p}")
    for p, (one, other) in enumerate(zip(actual[1].gradients, expected[1].gradients, strict=True)):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same_bits(one, other, f"gradient {p}")
    assert actual[1].flags.tolist() == expected[1].flags.tolist()


def refresh_(kernels, memories, correction, num_nodes=None):
    """Renew D of one bucket on all ranks, flat or of nodes, which exchange by copying; returns their messages."""
    num_nodes = num_nodes or len(memories)
    messages = [memory.variance_messages() for memory in memories]
    for memory, each in zip(memories, messages, strict=True):
        kernels.encode_variance_(memory, each, correction)
    for rank, each in enumerate(messages):
        first = rank // num_nodes * num_nodes
        for node in range(num_nodes):
            each.received.view(num_nodes, -1)[node] = messages[first + node].sent.view(num_nodes, -1)[rank - first]
    for memory, each in zip(memories, messages, strict=True):
        kernels.serve_variance_(memory, each)
    result = torch.cat([each.served for each in messages])
    for memory, each in zip(memories, messages, strict=True):
        each.result.copy_(result)
        kernels.apply_variance_(memory, each, refresh_numbers(correction))
    return messages


def refresh_numbers(correction):
    """With betas and eps that differ."""
    number = np.arange(len(correction))
    return RefreshNumbers(np.asarray(correction), 0.9 - 0.1 * (number % 3), 1e-8 * (1.0 + number % 2))
