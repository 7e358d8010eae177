"""How well D fits the gradients after the switch: against what it is, with refreshes and without; what that sends."""

import math

import pytest
import torch
from thread_ranks import exchange_groups, run_threads
from torch import nn

from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.quantize.layout import plan_buckets
from lightning_onebit.quantize.reference import pack_bits

SHAPES, WARMUP_STEPS = ((7, 20), (90,)), 48
BETA2, EPS = 0.99, 1e-8
KAPPA = (1 - BETA2) ** -0.5


def gradients(rank, step, scale):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def train(communicator, steps, growth, groups=None, **config):
    """The optimizer after ``steps`` compressed ones, of which those from the 20th on have gradients ``growth`` as large."""
    n, rank = communicator.world_size, communicator.rank
    params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = torch.optim.Adam(params, lr=1e-3, betas=(0.9, BETA2), eps=EPS)
    compressed, truth = None, []
    for step in range(WARMUP_STEPS + steps):
        of_ranks = [gradients(r, step, growth if step >= WARMUP_STEPS + 20 else 1.0) for r in range(n)]
        means = [sum(each) / n for each in zip(*of_ranks, strict=True)]
        for p, own, mean in zip(params, of_ranks[rank], means, strict=True):
            p.grad = mean if step < WARMUP_STEPS else own
        if step < WARMUP_STEPS:
            optimizer.step()
            continue
        if compressed is None:
            v_hat = [optimizer.state[p]["exp_avg_sq"] / (1 - BETA2**WARMUP_STEPS) for p in params]
            settings = CompressionConfig(block_size=64, **config)
            compressed = CompressedOptimizer(optimizer, settings, communicator, {}, groups=groups)
        compressed.step()
        if (step + 1) % 16 == 0:
            truth.append([])
            for number, v in enumerate(v_hat):
                a = [(each[number] / (v.sqrt() + EPS)).clamp(-KAPPA * n, KAPPA * n) for each in of_ranks]
                truth[-1].append(float((sum(a) / n).square().mean()))
    return compressed, params, truth


@pytest.mark.parametrize("config", [{}, {"space": "momentum"}], ids=["update", "momentum"])
def test_with_a_frozen_second_moment_drift_is_what_gradients_say(config):
    """Tensors of fewer than 251 elements are sketched without error."""

    def fn(communicator):
        compressed, params, truth = train(communicator, 96, 16.0, variance_refresh=None, **config)
        drift = compressed.variance_drift()
        return [drift[p] for p in params], truth

    (drift, truth), (other, _) = run_threads(2, fn)
    assert drift == other
    for number, each in enumerate(drift):
        values = [row[number] for row in truth]
        assert each.estimates == len(values) == 6
        assert each.last_ratio == pytest.approx(values[-1], rel=1e-4)
        assert 100 < each.last_ratio < 256  # 16^2, less what the clamp takes: |a_i| <= 20, of standard deviation 23
        average = 0.0
        for k, value in enumerate(values, 1):
            average += (value - average) / min(k, 4)
        assert each.ratio == pytest.approx(average, rel=1e-4)
    assert [each.share for each in drift] == pytest.approx([140 / 230, 90 / 230], abs=0.1)


def test_with_refreshes_it_stays_near_1():
    def fn(communicator):
        compressed, params, _ = train(communicator, 240, 16.0, variance_refresh="auto")
        drift = compressed.variance_drift()
        return [drift[p].last_ratio for p in params]

    for ratio in run_threads(2, fn)[0]:
        assert 0.7 < ratio < 1.5


def test_the_share_of_clamped_elements():
    """Of a gradient that is 10^5 times as large as D says, on one of two ranks at the last sketch."""

    def fn(communicator):
        growth = 1e5 if communicator.rank == 0 else 1.0
        compressed, params, _ = train(communicator, 32, growth, variance_refresh=None)
        return [compressed.variance_drift()[p].clamped for p in params]

    first, second = run_threads(2, fn)
    assert first == second
    # Nearly all of rank 0's, in one of two estimates (step 64 is before, step 80 after the growth).
    assert first == pytest.approx([0.25, 0.25], abs=0.01)


def test_errors_over_updates():
    def fn(communicator):
        compressed, _, _ = train(communicator, 40, 1.0, variance_refresh=None)
        own = math.sqrt(sum(float(each.values.square().sum()) for each in compressed.state.worker_errors()))
        momentum = compressed.optimizer.state_dict()["state"]
        v_hat = [entry["exp_avg_sq"] / (1 - BETA2 ** float(entry["step"])) for entry in momentum.values()]
        update = [entry["exp_avg"] / (v.sqrt() + EPS) for entry, v in zip(momentum.values(), v_hat, strict=True)]
        return compressed.error_over_update(), own / math.sqrt(sum(float(u.square().sum()) for u in update))

    for ratio, expected in run_threads(2, fn):
        assert ratio == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("local_world_size", [1, 2])
def test_the_norm_of_an_update_of_which_some_elements_took_no_part(local_world_size):
    """Of each rank's share: of all of a bucket, or of a part of it; those of a node make up the bucket."""

    def fn(communicator):
        groups = exchange_groups(communicator, local_world_size) if local_world_size > 1 else None
        compressed, _, _ = train(communicator, 3, 1.0, groups, variance_refresh=None)
        (buckets,) = [each.buckets for each in compressed._sets]
        found = []
        for memory in buckets.memories:
            generator = torch.Generator().manual_seed(0)
            memory.live_before = pack_bits(torch.rand(memory.layout.flat_numel, generator=generator) < 0.3)
            decoded = buckets.last_average(memory)
            errors = float(memory.error.double().square().sum())
            squares = [float(each.double().square().sum()) for each in (decoded[memory.share_flat], decoded)]
            found.append((buckets.squared_norms(memory), errors, *squares))
        return found

    all_found = run_threads(2 * local_world_size, fn)
    for found in all_found:
        assert found
        for (of_error, of_update), errors, squares, _ in found:
            assert of_error == pytest.approx(errors, rel=1e-5)
            assert of_update == pytest.approx(squares, rel=1e-5)
            assert squares > 0
    for of_node in zip(*all_found[:local_world_size], strict=True):
        assert sum(norms[1] for norms, *_ in of_node) == pytest.approx(of_node[0][3], rel=1e-5)


@pytest.mark.parametrize("refresh", [None, 8])
def test_bytes_by_kind_add_up(refresh):
    """Signs are the same at every step; a sketch is an ordered mean of 230 numbers and 3 sums for each of two tensors."""

    def fn(communicator):
        compressed, _, _ = train(communicator, 40, 1.0, variance_refresh=refresh)
        counters = compressed.communicator.counters
        return counters.bytes_sent, counters.sketch_bytes_sent, counters.refresh_bytes_sent

    total, sketches, refreshes = run_threads(2, fn)[0]
    steps = range(WARMUP_STEPS + 1, WARMUP_STEPS + 41)
    sketched = [step for step in steps if step % 16 == 0 or (refresh and step <= WARMUP_STEPS + 16)]
    assert sketches == len(sketched) * 2 * 4 * (230 + 3 * 2) // 2
    of_signs, of_codes = (2 * nbytes for nbytes in part_nbytes())
    assert refreshes == (0 if refresh is None else len([step for step in steps if step % refresh == 0]) * of_codes)
    agreement = total - sketches - refreshes - 40 * of_signs
    assert 0 < agreement <= 40 * 200
    assert agreement % 40 == 0


def part_nbytes():
    """Of what one of two ranks sends of its bucket at once: of signs, and of codes."""
    (layout,) = plan_buckets([90, 140], block_size=64, num_chunks=2, bucket_numel=2**20)
    return layout.signs.chunk_nbytes, layout.codes.chunk_nbytes


def test_a_refresh_at_will():
    """D is the same on all ranks afterwards, and that of the gradients of now: with ``"auto"``, long before it is due."""

    def fn(communicator):
        compressed, _, _ = train(communicator, 60, 16.0, variance_refresh=1000)  # none is due
        before = [entry["exp_avg_sq"].mean() for entry in compressed.optimizer.state_dict()["state"].values()]
        compressed.refresh_variance_()
        v = [entry["exp_avg_sq"] for entry in compressed.optimizer.state_dict()["state"].values()]
        grown = [float(new.mean() / old) for new, old in zip(v, before, strict=True)]
        return grown, v, compressed.communicator.counters.refresh_bytes_sent

    (grown, v, sent), (_, other, _) = run_threads(2, fn)
    assert all(torch.equal(a, b) for a, b in zip(v, other, strict=True))
    # After 40 steps of gradients 16 times as large, of which v has 1 - 0.99^40 = 0.33 by weight: 1 + 0.33 * 255 / 0.38.
    for ratio in grown:
        assert 40 < ratio < 400
    assert sent == 2 * part_nbytes()[1]
