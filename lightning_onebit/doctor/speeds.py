"""How fast this device compresses, copies and steps Adam: this package's own kernels, on tensors as the model has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightning_onebit.coefficients import Coefficients, RefreshNumbers
from lightning_onebit.config import CompressionConfig
from lightning_onebit.doctor.clock import Clock
from lightning_onebit.doctor.cost_model import POWERSGD_RANK, DeviceSpeeds
from lightning_onebit.quantize import make_kernels
from lightning_onebit.quantize.layout import plan_buckets
from lightning_onebit.quantize.memory import BucketMemory, StepInputs

LARGEST_NUMEL = {"cpu": 2**23, "cuda": 2**26}
"""Elements that are measured; a larger model is taken to be more of the same."""
NUMBERS = Coefficients(beta=0.9, weight=0.1, kappa=31.6, eps=1e-8, step_size=1e-3, square_decay=0.999, root_r=0.5)


def measure_speeds(shapes: Sequence[Sequence[int]], ranks: int, clock: Clock) -> tuple[DeviceSpeeds, str]:
    """Seconds per element, and the name of the kernels. Not collective.

    Args:
        shapes: of the trained tensors.
        ranks: that exchange; at least two are pretended.
        clock: of this rank.
    """
    device, ranks = clock.device, max(2, ranks)
    shapes = _sample(shapes, LARGEST_NUMEL.get(device.type, 2**23))
    numels = [math.prod(shape) for shape in shapes]
    numel = sum(numels)
    config = CompressionConfig()
    kernels = make_kernels(config, device=device, dtype=torch.float32)
    [layout] = plan_buckets(numels, block_size=config.block_size, num_chunks=ranks, bucket_numel=numel)
    memory = BucketMemory(
        layout, share=range(ranks), chunk=0, has_rms=True, keeps_before=kernels.reads_flags_on_device, renews=True,
        dtype=torch.float32, device=device, parameter_numels=numels,
    )  # fmt: skip
    memory.set_rms_(torch.empty(layout.flat_numel, device=device).uniform_(0.5, 1.0))
    assert memory.second_moment is not None
    memory.second_moment.uniform_(0.5, 1.0)
    params, gradients = ([torch.randn(n, device=device) for n in numels] for _ in range(2))
    step = StepInputs(
        params=params,
        gradients=gradients,
        numbers=np.array([NUMBERS] * len(numels), dtype=np.float64),
        flags=torch.tensor([0] + [1] * len(numels), dtype=torch.int32, device=device),
        active=np.ones(len(numels), dtype=bool),
    )
    messages = memory.variance_messages()
    for each in (memory.result, memory.received, messages.received, messages.result):
        each.fill_(0x3F)  # as scales 0.75: no subnormal numbers, which take longer
    correction = np.full(len(numels), 1.5)
    taken_over = RefreshNumbers(correction, np.full(len(numels), 0.9), np.full(len(numels), 1e-8))
    commits_late = kernels.reads_flags_on_device
    seconds = clock.medians(
        [
            lambda: kernels.encode_(memory, 0, step, commit=not commits_late),
            lambda: kernels.serve_(memory, step, commit=not commits_late),
            lambda: kernels.apply_(memory, 0, step, commit=commits_late),
            lambda: kernels.encode_variance_(memory, messages, correction),
            lambda: kernels.serve_variance_(memory, messages),
            lambda: kernels.apply_variance_(memory, messages, taken_over),
        ]
    )
    encode, serve, apply, refresh_encode, refresh_serve, refresh_apply = (each / numel for each in seconds)
    copy, cast, adam, powersgd = (each / numel for each in _peers(params, gradients, shapes, clock))
    return (
        DeviceSpeeds(
            copy=copy, cast=cast, adam=adam, powersgd=powersgd, encode=encode, serve=serve, apply=apply,
            refresh_encode=refresh_encode, refresh_serve=refresh_serve, refresh_apply=refresh_apply,
        ),
        kernels.name,
    )  # fmt: skip


def slowest(speeds: DeviceSpeeds, exchange_max: Tensor) -> DeviceSpeeds:
    """``speeds`` with the numbers of ``exchange_max``, which a collective has made those of the slowest rank."""
    return replace(speeds, **dict(zip(vars(speeds), exchange_max.tolist(), strict=True)))


def _sample(shapes: Sequence[Sequence[int]], largest: int) -> list[tuple[int, ...]]:
    """The first of ``shapes``, as far as they have ``largest`` elements; of a single one that is larger, a part."""
    chosen: list[tuple[int, ...]] = []
    numel = 0
    for shape in shapes:
        size = math.prod(shape)
        if chosen and numel + size > largest:
            break
        if size:
            chosen.append(tuple(shape) if size <= largest else (largest // 1024, 1024))
            numel += size
    return chosen


def _peers(params: list[Tensor], gradients: list[Tensor], shapes: Sequence[tuple[int, ...]], clock: Clock) -> list[float]:
    """Seconds of what the alternatives do: a copy, to 16 bits and back, Adam, PowerSGD's products."""
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    flat = torch.cat(gradients)
    other = torch.empty_like(flat)
    matrices = [g.view(shape[0], -1) for g, shape in zip(gradients, shapes, strict=True) if len(shape) > 1]
    factors = [(torch.randn(m.shape[1], POWERSGD_RANK, device=m.device), torch.zeros_like(m)) for m in matrices]

    def powersgd() -> None:
        for matrix, (q, error) in zip(matrices, factors, strict=True):
            matrix.add_(error)
            error.copy_(matrix)
            p, _ = torch.linalg.qr(matrix @ q)
            torch.mm(matrix.t(), p, out=q)
            torch.mm(p, q.t(), out=matrix)
            error.sub_(matrix)

    return clock.medians([lambda: other.copy_(flat), lambda: other.copy_(flat.half().div_(2)), optimizer.step, powersgd])
