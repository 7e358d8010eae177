"""D of coordinates whose first gradient comes after the freeze, against the second moment of the mean gradient."""

import pytest
import torch
from thread_ranks import run_threads

from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.optimizer import CompressedOptimizer

NUMEL, EARLY, BETA2, WARMUP_STEPS, STEPS = 256, 128, 0.98, 10, 192
NEVER = 200
"""An element without any gradient, among late ones."""


def late_rms(communicator, common_share):
    """sqrt(v_hat) of the late half over that of the true mean gradient, whose ranks have ``common_share`` in common."""
    p = torch.nn.Parameter(torch.zeros(NUMEL))
    optimizer = torch.optim.Adam([p], lr=1e-3, betas=(0.9, BETA2))

    def gradient(step):
        common = torch.randn(NUMEL, generator=torch.Generator().manual_seed(1000 * step))
        own = torch.randn(NUMEL, generator=torch.Generator().manual_seed(1000 * step + 100 + communicator.rank))
        mixed = common_share**0.5 * common + (1 - common_share) ** 0.5 * own
        place = torch.arange(NUMEL)
        return torch.where((place < EARLY) | ((step >= WARMUP_STEPS) & (place != NEVER)), mixed, 0.0)

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
    assert v[NEVER] == 0
    return float((v[EARLY:] / true_v[EARLY:]).sqrt().nanmedian())


@pytest.mark.parametrize(("world_size", "common_share"), [(2, 0.0), (2, 0.2), (8, 0.0), (8, 1.0)])
def test_late_coordinates_get_the_second_moment_of_the_mean_gradient(world_size, common_share):
    """With r = 1 / n always it would be 0.35 at 8 ranks with all in common; with r = 1, 2.8 with nothing in common."""
    assert run_threads(world_size, late_rms, common_share)[0] == pytest.approx(1.0, abs=0.1)


def test_second_moments_of_a_parameter_that_sits_out_stay():
    def fn(communicator):
        late, other = params = [torch.nn.Parameter(torch.zeros(NUMEL)) for _ in range(2)]
        optimizer = torch.optim.Adam(params, lr=1e-3)
        late.grad, other.grad = (torch.arange(NUMEL) < EARLY).float(), torch.ones(NUMEL)
        optimizer.step()
        compressed = CompressedOptimizer(optimizer, CompressionConfig(variance_refresh=None), communicator, {})
        late.grad = torch.ones(NUMEL)
        compressed.step()
        places, before = compressed.state.late_second_moments()
        late.grad = None
        compressed.step()
        assert len(places) == NUMEL - EARLY
        assert torch.equal(compressed.state.late_second_moments()[1], before)

    run_threads(2, fn)


@pytest.mark.parametrize(("numerator", "share"), [(-0.5, 0.0), (0.5, 0.25), (3.0, 1.0)])
def test_what_ranks_have_in_common_is_a_share(numerator, share):
    """By the squares of a few steps it may be none."""
    p = torch.nn.Parameter(torch.zeros(NUMEL))
    optimizer = torch.optim.Adam([p])
    p.grad = torch.ones(NUMEL)
    optimizer.step()
    buckets = CompressedOptimizer(optimizer, CompressionConfig(), Communicator(), {})._sets[0].buckets
    buckets.common_share[:, 0] = torch.tensor([numerator, 2.0])
    assert buckets.common_share_of(0) == share
