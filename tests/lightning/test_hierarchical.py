"""The hierarchical exchange: nodes average their gradients, then each rank of a node exchanges signs about its share.

Two yardsticks: the float64 model, whose workers are nodes with mean gradients, and the flat exchange of the same means,
from which it must not differ in a single bit.
"""

import functools
import math
import os
import random
import time
import warnings
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from ranks import run_ranks, run_trainers
from test_checkpoint import SaveAt, Stepwise
from test_engine import (
    COLUMNS,
    ROWS,
    WARMUP_STEPS,
    assert_close,
    embedding_gradient,
    gradient,
    make_optimizer,
    make_params,
    params_of,
    tensor_bytes,
    train_model,
)
from torch import nn
from trainers import CLASSES, FEATURES, fit, same_params

from lightning_onebit import FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch
from lightning_onebit.comm.compressed_allreduce import CompressedBucket
from lightning_onebit.comm.exchanger import Lane
from lightning_onebit.comm.groups import flat_groups, new_groups
from lightning_onebit.comm.hierarchical import NodeAverage
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.topology import Topology
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine import frozen
from lightning_onebit.engine.optimizer import CompressedOptimizer

TWO_BY_TWO, THREE_BY_TWO, TWO_BY_THREE = (2, 2), (3, 2), (2, 3)
BLOCK_SIZE = 8
AFTER = WARMUP_STEPS  # the first compressed step


def on_nodes(nodes, fn, *args):
    """Call ``fn(groups, *args)`` on all ranks of ``nodes``, (number of nodes, ranks of each); results in rank order."""
    num_nodes, local_world_size = nodes

    def on_rank(rank):
        node_rank, local_rank = divmod(rank, local_world_size)
        topology = Topology(
            num_nodes=num_nodes, node_rank=node_rank, local_world_size=local_world_size, local_rank=local_rank
        )
        return fn(new_groups(topology, timedelta(seconds=30)), *args)

    return run_ranks(num_nodes * local_world_size, on_rank, num_nodes=num_nodes)


def mean(grads):
    """As a node averages: scaled first, then summed in rank order; ``None`` counts as zero, unless there is nothing else."""
    present = [grad for grad in grads if grad is not None]
    if not present:
        return None
    grads = [torch.zeros_like(present[0]) if grad is None else grad for grad in grads]
    return functools.reduce(torch.add, [grad * (1.0 / len(grads)) for grad in grads])


def node_means(gradient, local_world_size):
    """Gradients of nodes, from gradients of ranks."""

    def fn(node, step, index, shape, dtype=torch.float64):
        ranks = range(node * local_world_size, (node + 1) * local_world_size)
        return mean([gradient(rank, step, index, shape, dtype) for rank in ranks])

    return fn


def outliers(rank, step, index, shape, dtype=torch.float64):
    """After the freeze, one coordinate of every second rank is far beyond the clamp, also averaged with others."""
    grad = gradient(rank, step, index, shape, dtype)
    if step >= AFTER and rank % 2 and grad.numel():
        grad.view(-1)[(7 * step + 13 * rank) % grad.numel()] *= 300
    return grad


def warmed_up(optimizer, world_size, gradient):
    for step in range(WARMUP_STEPS):
        for index, p in enumerate(params_of(optimizer)):
            p.grad = mean([gradient(rank, step, index, p.shape, p.dtype) for rank in range(world_size)])
        optimizer.step()
    return optimizer


def freeze(optimizer, groups, *, communicator=None, lane=None, overlap=False, **config):
    config = CompressionConfig(**{"block_size": BLOCK_SIZE, **config})
    communicator = communicator or Communicator()
    return CompressedOptimizer(optimizer, config, communicator, {}, groups=groups, lane=lane, overlap=overlap)


def take_step(optimizer, compressed, rank, step, gradient=outliers, *, overlap=False):
    """One compressed step; with ``overlap``, gradients come in an order that differs between ranks, and some unannounced."""
    params = params_of(optimizer)
    for p in params:
        p.grad = None
    chance = random.Random(1000 * step + rank)
    for index in chance.sample(range(len(params)), len(params)):
        p = params[index]
        p.grad = gradient(rank, step, index, p.shape, p.dtype)
        if overlap and chance.random() < 0.9:
            compressed.gradients_ready([p])
    return compressed.step()


def state_of(optimizer):
    """Copies of the parameters, and of what a stock optimizer would have in its state."""
    state = [value.clone() for entry in optimizer.state_dict()["state"].values() for _, value in sorted(entry.items())]
    return [p.detach().clone() for p in params_of(optimizer)] + state


def train(groups, make, gradient=outliers, *, warm=None, steps=30, overlap=False, **options):
    """:func:`state_of` after every compressed step, whether it counted, and what is outstanding in the end."""
    world_size = dist.get_world_size()
    optimizer = warmed_up(make(), world_size, warm or gradient)
    compressed = freeze(optimizer, groups, overlap=overlap, **options)
    history, counted = [], []
    for step in range(AFTER, AFTER + steps):
        counted.append(take_step(optimizer, compressed, groups.topology.rank, step, gradient, overlap=overlap))
        history.append(state_of(optimizer))
    errors = compressed.outstanding()
    compressed.close()
    return history, counted, [errors[p] for p in params_of(optimizer)]


def all_equal(tensors, expected):
    return all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def assert_same(outcome, expected):
    """Bit for bit."""
    for step, (tensors, expected_tensors) in enumerate(zip(outcome[0], expected[0], strict=True)):
        assert all_equal(tensors, expected_tensors), f"at step {step}"
    assert outcome[1] == expected[1]
    assert all_equal(outcome[2], expected[2])


# Against the model


@pytest.mark.parametrize(
    ("nodes", "kind", "space"),
    [
        (TWO_BY_TWO, torch.optim.Adam, "update"),
        (TWO_BY_TWO, torch.optim.AdamW, "momentum"),
        (THREE_BY_TWO, torch.optim.Adam, "momentum"),
        (THREE_BY_TWO, torch.optim.AdamW, "update"),
        (TWO_BY_THREE, torch.optim.Adam, "update"),
    ],
)
def test_50_steps_equal_the_float64_model_of_nodes(nodes, kind, space):
    """Workers are nodes, with the means of their gradients: clamped, and decayed, after the mean."""
    config = {"space": space, "block_size": 64}
    outcomes = on_nodes(nodes, lambda groups: train(groups, lambda: make_optimizer(kind, torch.float64), steps=50, **config))
    num_nodes, local_world_size = nodes
    expected = train_model(kind, num_nodes, gradient=node_means(outliers, local_world_size), **config)
    assert_close([tensors[: len(expected[0])] for tensors in outcomes[0][0]], expected, rtol=1e-4)


# Against the flat exchange of node means (invariants 3, 5 and 6)


def some_missing(rank, step, index, shape, dtype):
    """On one rank, on all, on a whole node, and on all until after the freeze; an unused parameter at last."""
    missing = [
        rank == 1,
        step >= AFTER and step % 3 == 0,
        rank < 2,
        step < AFTER + 5,
        True,
    ]
    return None if missing[index] else outliers(rank, step, index, shape, dtype)


def some_nonfinite(rank, step, index, shape, dtype):
    grad = outliers(rank, step, index, shape, dtype)
    if (rank, step, index) in {(3, AFTER + 4, 2), (0, AFTER + 9, 0)}:
        grad.view(-1)[-2] = math.inf if rank else math.nan
    return grad


def seen(rank, step):
    """Rows that never come, and rows that come first after the freeze, each on one rank of one node."""
    late = {3: [4, 5, 20], 1: [5, 30]}.get(rank, [])
    return [0, 1, 2, 3, 6] + (late if step >= AFTER + 4 + rank else [])


def with_shapes(*shapes):
    return lambda: torch.optim.Adam(make_params(torch.float32, shapes), lr=1e-2, weight_decay=0.0)


def two_dtypes():
    """And one parameter that is not contiguous."""
    singles, doubles = make_params(torch.float32, [(12, 3), (5,)]), make_params(torch.float64, [(9, 4), ()])
    doubles[0] = nn.Parameter(doubles[0].detach().t().contiguous().t())
    return torch.optim.AdamW([singles[0], doubles[0], singles[1], doubles[1]], lr=1e-2)


SCENARIOS = {
    "outliers and decay": (lambda: make_optimizer(torch.optim.Adam, torch.float32), outliers),
    "missing gradients": (with_shapes((37, 5), (5,), (30,), (20,), (9,)), some_missing),
    "non-finite gradients": (lambda: make_optimizer(torch.optim.AdamW, torch.float32), some_nonfinite),
    "dead and late rows": (with_shapes((ROWS, COLUMNS)), embedding_gradient(seen)),
    "two dtypes": (two_dtypes, outliers),
    "fewer blocks than ranks": (with_shapes((0, 3), (7,), (), (0,)), outliers),
    "a single number": (with_shapes(()), outliers),
    "nothing": (with_shapes((0,)), outliers),
}


@pytest.mark.parametrize(
    ("nodes", "scenario", "space"),
    [
        (TWO_BY_TWO, "outliers and decay", "update"),
        (TWO_BY_TWO, "outliers and decay", "momentum"),
        (TWO_BY_THREE, "outliers and decay", "update"),
        (TWO_BY_TWO, "missing gradients", "update"),
        (THREE_BY_TWO, "missing gradients", "momentum"),
        (TWO_BY_TWO, "non-finite gradients", "update"),
        (TWO_BY_TWO, "dead and late rows", "update"),
        (TWO_BY_TWO, "dead and late rows", "momentum"),
        (TWO_BY_TWO, "two dtypes", "update"),
        (TWO_BY_TWO, "fewer blocks than ranks", "update"),
        (THREE_BY_TWO, "fewer blocks than ranks", "momentum"),
        (TWO_BY_TWO, "a single number", "update"),
        (TWO_BY_TWO, "nothing", "update"),
    ],
)
def test_deferred_and_overlapped_equal_the_flat_exchange_of_node_means(nodes, scenario, space):
    """With one rank per node that holds the mean, in one bucket; here in several, in a thread."""
    make, gradients = SCENARIOS[scenario]
    num_nodes, local_world_size = nodes
    steps = 30 if scenario == "outliers and decay" and nodes is TWO_BY_TWO else 12

    def fn(groups):
        few = dist.new_group(list(range(num_nodes)))
        options = {"warm": gradients, "space": space, "steps": steps}
        flat = None
        if dist.get_rank() < num_nodes:
            communicator = Communicator(few)
            means = node_means(gradients, local_world_size)
            flat = train(flat_groups(communicator), make, means, communicator=communicator, **options)
        lane = Lane()
        options.update(bucket_cap_mb=0.001, lane=lane)
        deferred, overlapped = (train(groups, make, gradients, overlap=overlap, **options) for overlap in (False, True))
        lane.close()
        return flat, deferred, overlapped

    outcomes = on_nodes(nodes, fn)
    flat, expected = outcomes[0][:2]
    assert flat[1] == [scenario != "non-finite gradients" or step not in (4, 9) for step in range(steps)]
    assert_same((flat[0], flat[1], []), (expected[0], expected[1], []))
    for error, expected_error in zip(flat[2], expected[2], strict=True):
        assert torch.allclose(error, expected_error, atol=1e-5)
    for _, deferred, overlapped in outcomes:
        assert_same(deferred, expected)
        assert_same(overlapped, expected)


@pytest.mark.parametrize("nodes", [TWO_BY_TWO, TWO_BY_THREE])
def test_bfloat16_ranks_agree_bitwise_after_every_step(nodes):
    """Their errors, and the means inside a node, are float32."""
    make = functools.partial(make_optimizer, torch.optim.AdamW, torch.bfloat16)

    def fn(groups):
        return [train(groups, make, steps=8, bucket_cap_mb=0.001, overlap=overlap) for overlap in (False, True)]

    outcomes = on_nodes(nodes, fn)
    expected = outcomes[0][0]
    for deferred, overlapped in outcomes:
        assert_same(deferred, expected)
        assert_same(overlapped, expected)
    first, last = expected[0][0], expected[0][-1]
    assert first[0].dtype is torch.bfloat16
    assert not any(torch.equal(a, b) for a, b in zip(first[:4], last[:4], strict=True))


def test_result_depends_neither_on_buckets_nor_on_segments(monkeypatch):
    plan = frozen.plan_buckets

    def fn(groups):
        outcomes = []
        for bucket_cap_mb, segment_numel in [(None, 2**18), (1e-6, 2**18), (0.0003, 16), (0.0005, 2**18), (None, 24)]:
            monkeypatch.setattr(frozen, "plan_buckets", functools.partial(plan, segment_numel=segment_numel))
            make = with_shapes((37, 5), (5,), (30,), ())
            outcomes.append(train(groups, make, steps=6, bucket_cap_mb=bucket_cap_mb))
        history, _, outstanding = outcomes[0]
        for other_history, _, other_outstanding in outcomes[1:]:
            assert all(map(all_equal, other_history, history))
            # The bits of this sum over all ranks are those of gloo.
            assert all(map(torch.allclose, other_outstanding, outstanding))

    on_nodes(TWO_BY_TWO, fn)


# The mean inside a node


def test_a_node_averages_in_rank_order_without_overflow():
    """Each rank gets its shard of what the mean is by definition; also where the sum is beyond float32."""
    values = [torch.tensor([1.0, 3e38, 0.1]), torch.tensor([1e8, 3e38, 0.2]), torch.tensor([-1e8, 2e38, 0.7])]

    def fn(groups):
        (layout,) = frozen.plan_buckets([96, 3], block_size=8, world_size=6, bucket_numel=1000)
        average = NodeAverage([layout], groups, dtype=torch.float32, device=torch.device("cpu"))
        local_rank = groups.topology.local_rank
        grads = {0: values[local_rank].repeat(32), 1: None if local_rank == 1 else values[local_rank]}
        out = torch.full((layout.shard_numel(groups.topology),), math.nan)
        average.average_(out, layout, grads)
        return out

    expected = mean(values).repeat(32), mean([values[0], torch.zeros(3), values[2]])
    outcomes = on_nodes(TWO_BY_THREE, fn)
    for node in (outcomes[:3], outcomes[3:]):
        assert torch.equal(torch.cat(node), torch.cat(expected))
    assert torch.isfinite(outcomes[0]).all()


# Bytes


def count_bytes(groups, numel, block_size, steps=2):
    """Per step, with two buckets: to other nodes, inside the node, and in the agreement of all ranks on finite gradients."""
    optimizer = warmed_up(with_shapes((numel,))(), 1, gradient)
    compressed = freeze(optimizer, groups, block_size=block_size, bucket_cap_mb=numel / 2 * 4 / 2**20)
    for step in range(steps):
        take_step(optimizer, compressed, groups.topology.rank, step)
    sent, within = groups.peers.counters.bytes_sent, compressed.communicator.counters.bytes_within_node
    assert within == groups.peers.counters.bytes_within_node == 0
    for communicator in filter(None, (groups.node, groups.averaging)):
        assert communicator.counters.bytes_sent == communicator.counters.bytes_received == 0
        within += communicator.counters.bytes_within_node
    return sent / steps, within / steps, compressed.communicator.counters.bytes_sent / steps


@pytest.mark.parametrize("nodes", [TWO_BY_TWO, TWO_BY_THREE])
def test_bytes_between_nodes_are_an_lth_of_the_flat_exchange(nodes):
    """Exactly so, with as many blocks in every chunk."""
    num_nodes, local_world_size = nodes
    world_size, block_size = num_nodes * local_world_size, 64
    numel = world_size * block_size * 20
    encoded_nbytes = numel // 8 + 4 * numel // block_size

    flat = on_nodes((world_size, 1), count_bytes, numel, block_size)
    hierarchical = on_nodes(nodes, count_bytes, numel, block_size)
    for (flat_sent, flat_within, flat_agreement), (sent, within, agreement) in zip(flat, hierarchical, strict=True):
        assert flat_sent == 2 * (world_size - 1) * encoded_nbytes / world_size
        assert flat_within == 0
        flat_between_nodes = flat_sent * (world_size - local_world_size) / (world_size - 1)
        assert sent == flat_between_nodes / local_world_size
        to_others = (local_world_size - 1) / local_world_size
        assert within == to_others * 4 * numel + to_others * encoded_nbytes
        assert agreement == flat_agreement < 32  # four integers


def test_groups_are_where_they_are_counted():
    """Peers are each on another node, and only they; the other groups stay inside."""

    def fn(groups):
        node_of = [rank // 2 for rank in range(6)]
        peers = dist.get_process_group_ranks(groups.peers.group)
        assert [node_of[rank] for rank in peers] == [0, 1, 2]
        assert peers == groups.topology.peers
        for communicator in (groups.node, groups.averaging):
            members = dist.get_process_group_ranks(communicator.group)
            assert members == groups.topology.node
            assert {node_of[rank] for rank in members} == {groups.topology.node_rank}
            assert communicator.within_node
        assert groups.node.group is not groups.averaging.group  # two threads
        assert not groups.peers.within_node

    on_nodes(THREE_BY_TWO, fn)


# Invariants, by themselves


@pytest.mark.parametrize("space", ["update", "momentum"])
@pytest.mark.parametrize("overlap", [False, True])
def test_dead_rows_stay_bitwise_and_late_ones_start_on_all_ranks_in_the_same_step(space, overlap):
    """They come on rank 3 alone, whose shard holds row 35, but neither 4 nor 5."""

    def fn(groups):
        optimizer = with_shapes((ROWS, COLUMNS))()
        (x,) = params_of(optimizer)
        with torch.no_grad():
            x[9, 0] = -0.0
        late = [4, 5, 35]
        gradient = embedding_gradient(lambda rank, step: [0, 1, 2, 3] + (late if rank == 3 and step >= AFTER + 3 else []))
        initial = x.detach().clone()
        warmed_up(optimizer, 4, gradient)
        frozen = x.detach().clone()
        compressed = freeze(optimizer, groups, block_size=64, space=space, overlap=overlap)
        started = []
        for step in range(AFTER, AFTER + 12):
            take_step(optimizer, compressed, groups.topology.rank, step, gradient, overlap=overlap)
            started.append((x.detach() != frozen)[late].flatten())
        changed = (x.detach().view(torch.int32) != initial.view(torch.int32)).any(dim=1)
        assert changed.nonzero().ravel().tolist() == [0, 1, 2, 3, *late]
        return torch.stack(started)

    outcomes = on_nodes(TWO_BY_TWO, fn)
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)
    assert not outcomes[0][:3].any()
    assert outcomes[0][5].all()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_nonfinite_gradient_on_one_rank_leaves_everything_as_it_was(overlap, bad):
    def fn(groups):
        optimizer = make_optimizer(torch.optim.AdamW, torch.float32)
        warmed_up(optimizer, 4, gradient)
        compressed = freeze(optimizer, groups, bucket_cap_mb=0.001, overlap=overlap)
        rank = groups.topology.rank

        def poisoned(rank, step, index, shape, dtype):
            grad = gradient(rank, step, index, shape, dtype)
            if rank == 1 and index == 2:
                grad[17] = bad
            return grad

        for step in range(AFTER, AFTER + 3):
            assert take_step(optimizer, compressed, rank, step, overlap=overlap)

        def everything():
            return [*state_of(optimizer), *compressed.outstanding().values()]

        before = everything()
        assert not take_step(optimizer, compressed, rank, AFTER + 3, poisoned, overlap=overlap)
        assert all_equal(everything(), before)
        assert take_step(optimizer, compressed, rank, AFTER + 4, overlap=overlap)
        assert not all_equal(everything(), before)

    on_nodes(TWO_BY_TWO, fn)


@pytest.mark.parametrize(("nodes", "space"), [(THREE_BY_TWO, "update"), (TWO_BY_TWO, "momentum")])
def test_telescoping_identity(nodes, space):
    """Applied updates + errors = what exact frozen Adam has applied, with nodes as workers: see test_engine's."""
    steps, lr = 20, 1e-3
    num_nodes, local_world_size = nodes

    def fn(groups):
        x = nn.Parameter(torch.zeros(40, 5, dtype=torch.float64))
        optimizer = torch.optim.Adam([x], lr=lr, betas=(0.0, 0.999))
        warmed_up(optimizer, num_nodes * local_world_size, gradient)
        exact = x.detach().clone()
        D = (optimizer.state[x]["exp_avg_sq"] / (1 - 0.999**WARMUP_STEPS)).sqrt() + 1e-8
        compressed = freeze(optimizer, groups, block_size=32, space=space)
        kappa = 1 / math.sqrt(1 - 0.999) if space == "update" else math.inf
        means = node_means(outliers, local_world_size)
        for step in range(AFTER, AFTER + steps):
            grads = [means(node, step, 0, x.shape) for node in range(num_nodes)]
            exact -= lr * sum((g / D).clamp(-kappa, kappa) for g in grads) / num_nodes
            take_step(optimizer, compressed, groups.topology.rank, step)
        outstanding = compressed.outstanding()[x]
        assert outstanding.abs().max() > 0.1  # else nothing would be proved
        assert torch.allclose(x.detach() - lr * (outstanding if space == "update" else outstanding / D), exact, atol=1e-9)
        return outstanding

    outcomes = on_nodes(nodes, fn)
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)


def test_errors_can_be_taken_over_and_are_applied_when_thawing():
    def fn(groups):
        def start():
            optimizer = make_optimizer(torch.optim.Adam, torch.float64)
            return warmed_up(optimizer, 4, gradient), freeze(optimizer, groups, bucket_cap_mb=0.001)

        optimizer, compressed = start()
        for step in range(AFTER, AFTER + 5):
            take_step(optimizer, compressed, groups.topology.rank, step)
        params, saved = params_of(optimizer), compressed.outstanding()

        other_optimizer, other = start()
        before = other.outstanding()
        errors = dict(zip(params_of(other_optimizer), (saved[p] for p in params), strict=True))
        other.add_errors_(compressed.worker_errors(), compressed.server_errors())
        for p, error in other.outstanding().items():
            assert torch.allclose(error, before[p] + errors[p], rtol=1e-12)

        x = [p.detach().clone() for p in params]
        compressed.thaw_()
        for p, before in zip(params, x, strict=True):
            (group,) = [group for group in optimizer.param_groups if any(p is q for q in group["params"])]
            step_size = group["lr"] / (1 - group["betas"][0] ** float(optimizer.state[p]["step"]))
            assert torch.allclose(p.detach(), before - step_size * saved[p], rtol=1e-12)
        return state_of(optimizer)

    outcomes = on_nodes(TWO_BY_TWO, fn)
    assert all(all_equal(outcome, outcomes[0]) for outcome in outcomes)


def test_clipping_uses_one_coefficient_on_all_ranks():
    def fn(groups):
        optimizer = warmed_up(make_optimizer(torch.optim.Adam, torch.float32), 4, gradient)
        compressed = freeze(optimizer, groups)
        params = params_of(optimizer)
        for index, p in enumerate(params):
            p.grad = gradient(groups.topology.rank, AFTER, index, p.shape, p.dtype)
        before = params[2].grad.clone()
        norm = compressed.clip_grad_norm_(0.5)
        return norm, (params[2].grad / before).mean()

    norms, coefficients = zip(*on_nodes(TWO_BY_TWO, fn), strict=True)
    means = [
        mean([gradient(rank, AFTER, index, shape, torch.float32) for rank in range(4)])
        for index, shape in enumerate([(37, 11), (5,), (300,), ()])
    ]
    expected = torch.cat([g.ravel() for g in means]).norm()
    assert len({float(norm) for norm in norms}) == 1
    assert float(norms[0]) == pytest.approx(float(expected), rel=0.05)
    for coefficient in coefficients:
        assert float(coefficient) == pytest.approx(0.5 / float(norms[0]), rel=1e-4)


def test_memory_per_parameter():
    """Invariant 9, as in test_engine; buckets of one size, as workspaces grow with them."""

    def fn(groups):
        def state_bytes(numel):
            before = tensor_bytes()
            p = nn.Parameter(torch.zeros(numel))
            optimizer = torch.optim.Adam([p])
            p.grad = torch.ones(numel)
            optimizer.step()
            compressed = freeze(optimizer, groups, block_size=2048, bucket_cap_mb=0.5)
            compressed.step()
            return tensor_bytes() - before - 8 * numel  # without parameter and gradient

        small, large = 150_000, 300_000
        first = state_bytes(small)
        return (state_bytes(large) - first) / (large - small)

    assert max(on_nodes(TWO_BY_TWO, fn)) <= (8 + 4 / 4) * 1.05


# With a Trainer


class RoundRobin(LightningEnvironment):
    """A launcher that deals the ranks to two nodes in turn; so some are where they are supposed to be, and some not."""

    def global_rank(self):
        return int(os.environ["RANK"])

    def set_global_rank(self, rank):
        pass

    def world_size(self):
        return 4

    def set_world_size(self, size):
        pass

    def teardown(self):
        """Keep the environment variables, for another run."""

    def node_rank(self):
        return self.global_rank() % 2

    def local_rank(self):
        return self.global_rank() // 2


def run(world_size, *, batches=14, callbacks=(), **options):
    """A fit that is compressed from the fifth step on."""
    strategy = OneBitDDPStrategy(bucket_cap_mb=0.001, **options.pop("strategy", {}))
    callbacks = [PhaseSwitch(FixedStep(4)), *callbacks]
    return fit(strategy, world_size, batches=batches, callbacks=callbacks, **{"model": Stepwise(), **options})


class ThereAndBack(pl.Callback):
    """Back to warm-up for two steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == 8:
            trainer.strategy.resume_warmup()
        if batch_idx + 1 == 10:
            trainer.strategy.freeze_variance()


def topology_of(trainer):
    return trainer.strategy._phases.topology


def test_auto_is_hierarchical_with_several_nodes_of_several_processes():
    def fn(rank):
        hierarchical = Topology(num_nodes=2, node_rank=rank // 2, local_world_size=2, local_rank=rank % 2)
        flat = Topology(num_nodes=4, node_rank=rank)
        params = {}
        for name, options, topology in [
            ("deferred", {"overlap": False}, hierarchical),
            ("overlapped", {"overlap": True, "hierarchical": True}, hierarchical),
            ("flat", {"hierarchical": False}, flat),
            ("clipped", {}, hierarchical),
            ("there and back", {}, hierarchical),
        ]:
            more = {"clipped": {"gradient_clip_val": 0.1}, "there and back": {"callbacks": [ThereAndBack()]}}
            trainer, recorder = run(4, num_nodes=2, strategy=options, **more.get(name, {}))
            assert topology_of(trainer) == topology
            assert recorder.phases[-1] is Phase.COMPRESSED
            stats = trainer.strategy.comm_stats
            assert stats[Phase.WARMUP].bytes_within_node == 0
            assert (stats[Phase.COMPRESSED].bytes_within_node > 0) == (topology is hierarchical)
            assert 0 < stats[Phase.COMPRESSED].bytes_sent == stats[Phase.COMPRESSED].bytes_received
            params[name] = recorder.params
        assert same_params(params["deferred"], params["overlapped"])
        assert same_params(params["deferred"][:4], params["flat"][:4])
        for name in ("flat", "clipped", "there and back"):
            assert not same_params(params["deferred"], params[name])
        return params

    outcomes = run_trainers(4, fn, num_nodes=2)
    for outcome in outcomes[1:]:
        assert all(same_params(outcome[name], outcomes[0][name]) for name in outcome)


class Branching(Stepwise):
    """One layer is used on some ranks at some steps, another one never."""

    def __init__(self):
        super().__init__()
        self.sometimes, self.never = nn.Linear(FEATURES, CLASSES), nn.Linear(3, 3)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if (self.trainer.global_step + self.global_rank) % 3 == 0:
            loss = loss + self.sometimes(batch[0]).square().mean()
        return loss


def test_overlap_where_ranks_of_a_node_use_different_layers():
    """A rank that averages during backward waits for one that has nothing to say."""

    def fn(rank):
        def train(overlap):
            options = {"overlap": overlap, "find_unused_parameters": True}
            return run(4, num_nodes=2, model=Branching(), strategy=options)[1].params

        deferred, overlapped = train(False), train(True)
        assert same_params(deferred, overlapped)
        return deferred

    outcomes = run_trainers(4, fn, num_nodes=2)
    assert all(same_params(outcome, outcomes[0]) for outcome in outcomes)


def test_ranks_not_numbered_node_by_node_stay_flat_or_are_refused_on_all_ranks():
    def fn(rank):
        placement = {"num_nodes": 2, "plugins": [RoundRobin()]}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer, recorder = run(4, batches=8, **placement)
        assert any("not numbered node by node" in str(w.message) for w in caught) == (rank == 0)
        assert topology_of(trainer) == Topology(num_nodes=4, node_rank=rank)
        with pytest.raises(ValueError, match=r"not numbered node by node.*HINT"):
            run(4, batches=8, strategy={"hierarchical": True}, **placement)
        return recorder.params

    outcomes = run_trainers(4, fn, num_nodes=2)
    assert all(same_params(outcome, outcomes[0]) for outcome in outcomes)


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_hierarchical_without_several_nodes_of_several_processes_warns_and_is_flat(num_nodes):
    def fn(rank):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer, _ = run(2, batches=6, num_nodes=num_nodes, strategy={"hierarchical": True})
        assert any("hierarchical=True has no effect" in str(w.message) for w in caught) == (rank == 0)
        assert topology_of(trainer).is_flat
        assert trainer.strategy.comm_stats.bytes_within_node == 0

    run_trainers(2, fn, num_nodes=num_nodes)


class Resumed(pl.Callback):
    """Keeps what is outstanding when the run starts."""

    def on_train_start(self, trainer, pl_module):
        assert trainer.strategy.phase is Phase.COMPRESSED
        self.outstanding = list(trainer.strategy._phases.compressed[trainer.optimizers[0]].outstanding().values())


def test_a_checkpoint_fits_any_topology(tmp_path):
    """Written on two nodes of two ranks; what is outstanding is the same on four flat ranks, on two, and on the same."""
    path = tmp_path / "compressed.ckpt"

    def resume(world_size, **options):
        look = Resumed()
        trainer, recorder = run(world_size, callbacks=[look], ckpt_path=path, **options)
        assert set(recorder.phases) == {Phase.COMPRESSED}
        assert len(recorder.params) == 4
        return topology_of(trainer).is_flat, recorder.params, look.outstanding

    def write_and_resume(rank):
        save = SaveAt(path, 10)
        run(4, num_nodes=2, callbacks=[save])
        dist.barrier()
        nodes, flat = resume(4, num_nodes=2), resume(4, num_nodes=2, strategy={"hierarchical": False})
        return save.outstanding, nodes, flat

    four = run_trainers(4, write_and_resume, num_nodes=2)
    two = run_trainers(2, lambda rank: resume(2))
    saved = four[0][0]
    runs = {"2x2": [o[1] for o in four], "4": [o[2] for o in four], "2": two}
    assert [outcomes[0][0] for outcomes in runs.values()] == [False, True, True]

    assert max(error.abs().max() for error in saved) > 0.1  # else nothing would be preserved
    for outcomes in runs.values():
        assert all(same_params(outcome[1], outcomes[0][1]) for outcome in outcomes)
        for error, before in zip(outcomes[0][2], saved, strict=True):
            assert torch.allclose(error, before, rtol=1e-6, atol=1e-7)


def test_an_exception_in_the_thread_of_one_rank_ends_all():
    """Also where the training thread waits for its node."""
    exchange, count = CompressedBucket.exchange_, iter(range(10**6))

    def failing(self, *args, **kwargs):
        if next(count) == 3 and self.groups.topology.rank == 3:
            raise OSError("injected")
        exchange(self, *args, **kwargs)

    def fn(rank):
        CompressedBucket.exchange_ = failing
        started = time.monotonic()
        message = "injected" if rank == 3 else "Connection closed|Connection reset|A compressed exchange failed"
        with pytest.raises(RuntimeError, match=message):
            run(4, num_nodes=2)
        assert time.monotonic() - started < 30

    run_trainers(4, fn, num_nodes=2)
