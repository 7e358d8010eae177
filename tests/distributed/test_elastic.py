"""Another number of ranks in the renewed compressed phase, 1 to 16 as threads: 200 steps later nothing is left of the old.

Checkpoints go through the functions of the product, without a Trainer; with one: tests/lightning/test_hierarchical.py.
"""

import math

import pytest
import torch
from test_many_ranks import BETA1, LR, Start, compressed, make_step, noise
from thread_ranks import run_threads

from lightning_onebit.checkpoint.parts import Parts
from lightning_onebit.checkpoint.state import PartContent, load_errors, restore, shared_state
from lightning_onebit.comm.topology import Topology
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.optimizer import CompressedOptimizer

OLD, SAVE_ID = 4, "0" * 16
NUMEL, WARMUP_STEPS, OLD_STEPS = 3072, 100, 60
BEGIN, ADAPTED, STEPS = 140, 200, 240
"""After the restart: when the other run begins to compress, and between which steps displacements are taken."""
SIGN = torch.where(noise(NUMEL, 0) < 0, -1.0, 1.0)


def drift(ranks):
    """What all ranks' gradients have in common: a fifth of the standard deviation of their mean."""
    return 0.2 / math.sqrt(ranks) * SIGN


def gradients(ranks, rank, step, num_tensors):
    common = drift(ranks)
    return [common + noise(NUMEL, 2, ranks, step, index, rank) for index in range(num_tensors)]


def means(ranks, steps, num_tensors):
    """Of steps before the restart, for a dense optimizer."""
    for step in steps:
        each = (noise(NUMEL, 1, ranks, step, index) for index in range(num_tensors))
        yield [drift(ranks) + values / math.sqrt(ranks) for values in each]


def start(ranks, steps, beta2s):
    groups = [{"x": torch.zeros(NUMEL), "lr": LR, "betas": (BETA1, beta2)} for beta2 in beta2s]
    return Start(groups, means(ranks, range(steps), len(beta2s)))


def dense(ranges):
    """The values of all elements, in their order."""
    return torch.cat([each.values for each in sorted(ranges, key=lambda each: each.start)])


def save(path, beta2s):
    """A checkpoint of four ranks: parts, what else all ranks know, and v_i of each."""
    parts, begin = Parts(path), start(OLD, WARMUP_STEPS, beta2s)

    def fn(communicator):
        params, optimizer = compressed(begin, communicator, variance_refresh="auto")
        for step in range(OLD_STEPS):
            make_step(params, optimizer, gradients(OLD, communicator.rank, step, len(beta2s)))
        content = PartContent()
        content.add_optimizer(optimizer)
        parts.write(SAVE_ID, communicator.rank, content.meta, content.arrays)
        return shared_state([optimizer]), optimizer.optimizer.state_dict(), dense(optimizer.state.second_moments())

    outcomes = run_threads(OLD, fn)
    shared, stock, _ = outcomes[0]
    header = {"world_size": OLD, "local_world_size": 1, "save_id": SAVE_ID, "block_size": CompressionConfig().block_size}
    return parts, header, shared, stock, [v for *_, v in outcomes]


@pytest.mark.parametrize(("ranks", "beta2s"), [(2, (0.95, 0.98)), (16, (0.95,)), (1, (0.95, 0.98))])
def test_displacement_is_that_of_a_run_with_as_many_ranks_from_the_start(tmp_path, ranks, beta2s):
    """Within 3%, 200 steps after a restart: beta2 is so small that v has forgotten the old noise by then. (With 0.98 it has
    not from 4 to 16 ranks, where v falls to a fourth: 0.964, as D is up to 45 steps old, 3 * 0.98^160 = 0.12.)

    Both runs have the same gradients from the restart on, N(drift_j, 1) on each rank. The estimator is the ratio of the
    displacements along the drift, and the standard error that of their difference (see test_many_ranks.py).
    """
    parts, header, shared, stock, old_v = save(tmp_path / "model.ckpt", beta2s)
    begin = start(ranks, WARMUP_STEPS + OLD_STEPS + BEGIN, beta2s)

    def resumed(communicator):
        params, optimizer = begin.copy()
        optimizer.load_state_dict(stock)
        for p in params:
            p.data.zero_()
        own = CompressedOptimizer(optimizer, CompressionConfig(variance_refresh="auto"), communicator, {})
        restore([own], shared, block_size=header["block_size"])
        topology = Topology(num_nodes=ranks, node_rank=communicator.rank)
        assert not load_errors([own], [0], header, parts, topology)
        r = own._sets[0].statistics.root_r[::-1] ** 2  # the last parameter comes first
        old_r = torch.stack([shared[0][str(i)]["gradient_statistics"][0] for i in range(len(params))])
        s = (old_r - 1 / OLD) / (1 - 1 / OLD)
        assert torch.allclose(torch.from_numpy(r), s.clamp(min=0) * (1 - 1 / ranks) + 1 / ranks, rtol=1e-5)
        return params, own

    def fn(communicator):
        runs, before = [resumed(communicator)], []
        v = dense(runs[0][1].state.second_moments())
        for step in range(STEPS):
            if step == BEGIN:
                runs.append(compressed(begin, communicator, variance_refresh="auto"))
            if step == ADAPTED:
                before = [[p.detach().clone() for p in params] for params, _ in runs]
            grads = gradients(ranks, communicator.rank, 1000 + step, len(beta2s))
            for params, optimizer in runs:
                make_step(params, optimizer, grads)
        ends = [[p.detach() for p in params] for params, _ in runs]
        return *([b - a for a, b in zip(*each, strict=True)] for each in zip(before, ends, strict=True)), v

    (resumed_moves, moves, _), *others = outcomes = run_threads(ranks, fn, timeout=110)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other[0], resumed_moves, strict=True))
    assert torch.allclose(sum(v for *_, v in outcomes) / ranks, sum(old_v) / OLD, rtol=1e-5)
    ratios, failed = [], False
    for beta2, ours, expected in zip(beta2s, resumed_moves, moves, strict=True):
        ours, expected = -SIGN * ours, -SIGN * expected
        ratio = (ours.sum() / expected.sum()).item()
        standard_error = ((ours - ratio * expected).std() / math.sqrt(NUMEL) / expected.mean().abs()).item()
        ratios.append(f"{beta2}: {ratio:.4f} +- {standard_error:.4f}")
        assert expected.mean() > 0
        failed |= abs(ratio - 1) > 0.03 or standard_error > 0.0075
    assert not failed, ratios
