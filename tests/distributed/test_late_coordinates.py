"""D of coordinates whose first gradient comes after the freeze, against the second moment of the mean gradient."""

import pytest
import torch
from thread_ranks import run_threads

from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.optimizer import CompressedOptimizer

NUMEL, EARLY, BETA2, WARMUP_STEPS, STEPS = 256, 128, 0.98, 10, 192


def late_rms(communicator, common_share):
    """sqrt(v_hat) of the late half over that of the true mean gradient, whose ranks have ``common_share`` in common."""
    p = torch.nn.Parameter(torch.zeros(NUMEL))
    optimizer = torch.optim.Adam([p], lr=1e-3, betas=(0.9, BETA2))

    def gradient(step):
        common = torch.randn(NUMEL, generator=torch.Generator().manual_seed(1000 * step))
        own = torch.randn(NUMEL, generator=torch.Generator().manual_seed(1000 * step + 100 + communicator.rank))
        mixed = common_share**0.5 * common + (1 - common_share) ** 0.5 * own
        return torch.where((torch.arange(NUMEL) < EARLY) | (step >= WARMUP_STEPS), mixed, 0.0)

    for step in range(WARMUP_STEPS):
        p.grad = gradient(step)
        communicator.all_reduce_mean_(p.grad)
        optimizer.step()
    compressed = CompressedOptimizer(optimizer, CompressionConfig(block_size=64, variance_refresh=None), communicator, {})
    true_v = torch.zeros(NUMEL)
    for step in range(WARMUP_STEPS, STEPS):
        p.grad = gradient(step)
        mean = p.grad.clone()
        communicator.all_reduce_mean_(mean)
        true_v.mul_(BETA2).addcmul_(mean, mean, value=1 - BETA2)
        compressed.step()
    v = optimizer.state_dict()["state"][0]["exp_avg_sq"]
    return float((v[EARLY:] / true_v[EARLY:]).sqrt().median())


@pytest.mark.parametrize(("world_size", "common_share"), [(2, 0.0), (2, 0.2), (8, 0.0), (8, 1.0)])
def test_late_coordinates_get_the_second_moment_of_the_mean_gradient(world_size, common_share):
    """With r = 1 / n always it would be 0.35 at 8 ranks with all in common; with r = 1, 2.8 with nothing in common."""
    assert run_threads(world_size, late_rms, common_share)[0] == pytest.approx(1.0, abs=0.1)
