"""A run as a whole, against Adam on the mean gradient: it must go where Adam goes, and would not if a part were left out.

Losses hide a wrong scale, which acts as a learning rate. So displacements are compared, in training that noise dominates, on
16 ranks that are threads. Gradients grow, a few are large and common to all ranks, and sizes span orders of magnitude.
"""

import math

import pytest
import torch
from thread_ranks import run_threads
from torch import nn

from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.optimizer import CompressedOptimizer

RANKS, NUMEL, LARGE = 16, 1024, 16
WARMUP_STEPS, STEPS, SETTLED = 20, 160, 60
LR, BETAS = 1e-3, (0.9, 0.95)
DRIFT = 0.25
"""What all ranks' gradients have in common, over the standard deviation of their mean."""


def noise(*key):
    seed = 0
    for number in key:
        seed = 1009 * seed + number + 1
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))


SIGN = torch.where(noise(0) < 0, -1.0, 1.0)
SIZE = noise(1).mul(1.5).exp()
SIZE[:LARGE] = 300.0


def gradient(rank, step):
    """Of size 1 to 16 as time goes on."""
    g = noise(2, rank, step)
    g[:LARGE] = noise(3, step)[:LARGE]  # the same on all ranks
    return SIZE * 16.0 ** (step / STEPS) * (g + SIGN * DRIFT / math.sqrt(RANKS))


def start():
    p = nn.Parameter(torch.zeros(NUMEL))
    return p, torch.optim.Adam([p], lr=LR, betas=BETAS)


def mean_gradients():
    return [sum(gradient(rank, step) for rank in range(RANKS)) / RANKS for step in range(STEPS)]


@pytest.fixture(scope="module")
def means():
    return mean_gradients()


@pytest.fixture(scope="module")
def of_adam(means):
    """Its displacement from the step SETTLED on."""
    p, optimizer = start()
    for step, g in enumerate(means):
        if step == SETTLED:
            before = p.detach().clone()
        p.grad = g
        optimizer.step()
    return p.detach() - before


def displacement(means, after_step=lambda optimizer: None, **config):
    def fn(communicator):
        p, optimizer = start()
        compressed = None
        for step in range(STEPS):
            if step == SETTLED:
                before = p.detach().clone()
            if step < WARMUP_STEPS:
                p.grad = means[step]
                optimizer.step()
                continue
            if compressed is None:
                settings = CompressionConfig(**{"block_size": 256, **config})
                compressed = CompressedOptimizer(optimizer, settings, communicator, {})
            p.grad = gradient(communicator.rank, step)
            compressed.step()
            after_step(compressed)
        return p.detach() - before

    first, *others = run_threads(RANKS, fn, timeout=110)
    assert all(torch.equal(first, other) for other in others)
    return first


def speeds(moved, of_adam):
    """Along what each coordinate drifts, in Adam's: of all, and of the tenth with the smallest gradients."""
    small = SIZE.quantile(0.1) >= SIZE
    return [(SIGN * moved)[part].sum().item() / (SIGN * of_adam)[part].sum().item() for part in (SIZE < 300, small)]
