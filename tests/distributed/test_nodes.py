"""The hierarchical exchange: nodes average their gradients, then each rank of a node exchanges signs about its share.

Two yardsticks: the float64 model, whose workers are nodes with mean gradients, and the flat exchange of the same means,
from which it must not differ in a single bit. With a Trainer: tests/lightning/test_hierarchical.py. Ranks are threads; one
test has forked ones, on gloo, with the process groups of the product.
"""

import functools
import math

import pytest
import torch
import torch.distributed as dist
from buckets import exists
from nodes import freeze, mean, on_nodes, take_step, warmed_up
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
from thread_ranks import exchange_groups, run_threads
from torch import nn

from lightning_onebit.comm.exchanger import ThreadExchanger
from lightning_onebit.comm.hierarchical import NodeAverage
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.stats import ring_all_reduce_nbytes
from lightning_onebit.engine import optimizer as engine
from lightning_onebit.engine.variance import REFRESH_STEPS
from lightning_onebit.quantize.layout import plan_buckets
from lightning_onebit.quantize.memory import BucketMemory

TWO_BY_TWO, THREE_BY_TWO, TWO_BY_THREE = (2, 2), (3, 2), (2, 3)
AFTER = WARMUP_STEPS  # the first compressed step


def on_threads(nodes, fn, *args):
    """Call ``fn(communicator, groups, *args)`` on all ranks of ``nodes``, (number of nodes, ranks of each)."""
    num_nodes, local_world_size = nodes

    def on_rank(communicator):
        return fn(communicator, exchange_groups(communicator, local_world_size), *args)

    return run_threads(num_nodes * local_world_size, on_rank)


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


def params_now(optimizer):
    return [p.detach().clone() for p in params_of(optimizer)]


def state_of(optimizer):
    """Copies of the parameters, and of what a stock optimizer would have in its state."""
    state = [value.clone() for entry in optimizer.state_dict()["state"].values() for _, value in sorted(entry.items())]
    return params_now(optimizer) + state


def train(communicator, groups, make, gradient=outliers, *, warm=None, steps=30, overlap=False, **options):
    """Parameters after every step, at some :func:`state_of`; whether each counted; what is outstanding in the end.

    ``warm``: gradients and number of the ranks of the warm-up, if others than those of the compressed steps.
    """
    warm_gradient, warm_ranks = warm or (gradient, communicator.world_size)
    optimizer = warmed_up(make(), warm_ranks, warm_gradient, steps=WARMUP_STEPS)
    compressed = freeze(optimizer, groups, communicator=communicator, overlap=overlap, **options)
    history, counted = [], []
    for step in range(AFTER, AFTER + steps):
        counted.append(take_step(optimizer, compressed, communicator.rank, step, gradient, overlap=overlap))
        # All of it now and then, for time.
        history.append(state_of(optimizer) if step % 4 == 0 or step == AFTER + steps - 1 else params_now(optimizer))
    errors = compressed.state.outstanding()
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


def assert_equal_to_the_model(history, nodes, kind, **config):
    num_nodes, local_world_size = nodes
    expected = train_model(kind, num_nodes, gradient=node_means(outliers, local_world_size), **config)
    assert_close([tensors[: len(expected[0])] for tensors in history], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("nodes", "kind", "space"),
    [
        (TWO_BY_TWO, torch.optim.AdamW, "momentum"),
        (THREE_BY_TWO, torch.optim.Adam, "momentum"),
        (THREE_BY_TWO, torch.optim.AdamW, "update"),
        (TWO_BY_THREE, torch.optim.Adam, "update"),
    ],
)
def test_50_steps_equal_the_float64_model_of_nodes(nodes, kind, space):
    """Workers are nodes, with the means of their gradients: clamped, and decayed, after the mean."""
    config = {"space": space, "block_size": 64}
    make = functools.partial(make_optimizer, kind, torch.float64)
    outcomes = on_threads(nodes, lambda *ranks: train(*ranks, make, steps=50, **config))
    assert_equal_to_the_model(outcomes[0][0], nodes, kind, **config)


def test_on_gloo_50_steps_equal_the_float64_model_and_groups_are_where_they_are_counted():
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
        make = functools.partial(make_optimizer, torch.optim.Adam, torch.float64)
        return train(Communicator(), groups, make, steps=50, block_size=64)

    outcomes = on_nodes(THREE_BY_TWO, fn)
    assert all(all_equal(outcome[0][-1], outcomes[0][0][-1]) for outcome in outcomes)
    assert_equal_to_the_model(outcomes[0][0], THREE_BY_TWO, torch.optim.Adam, block_size=64)


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
    "nothing": (with_shapes((0,)), outliers),
}


VARIANTS = {
    "update": {"variance_refresh": None},
    "momentum": {"space": "momentum", "variance_refresh": None},
    "renewed": {"variance_refresh": 4},
}


@pytest.mark.parametrize(
    ("nodes", "scenario", "variant"),
    [
        (TWO_BY_TWO, "outliers and decay", "update"),
        (TWO_BY_THREE, "outliers and decay", "renewed"),
        (TWO_BY_TWO, "missing gradients", "renewed"),
        (TWO_BY_TWO, "non-finite gradients", "renewed"),
        (TWO_BY_TWO, "dead and late rows", "renewed"),
        (TWO_BY_TWO, "two dtypes", "renewed"),
        (THREE_BY_TWO, "fewer blocks than ranks", "renewed"),
        (TWO_BY_TWO, "nothing", "renewed"),
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
        (TWO_BY_TWO, "nothing", "update"),
    ],
)
def test_deferred_and_overlapped_equal_the_flat_exchange_of_node_means(nodes, scenario, variant, monkeypatch):
    """With one rank per node that holds the mean, in one bucket; here in several, in a thread. Renewed, frozen, or in
    momentum space."""
    monkeypatch.setattr(engine, "REFRESH_STEPS", 8)
    make, gradients = SCENARIOS[scenario]
    num_nodes, local_world_size = nodes
    steps = 16 if scenario == "dead and late rows" else 12  # the last ones with what the second refresh has changed
    warm = gradients, num_nodes * local_world_size
    options = {"warm": warm, "steps": steps, **VARIANTS[variant]}

    def flat(communicator, groups):
        return train(communicator, groups, make, node_means(gradients, local_world_size), **options)

    def hierarchical(communicator, groups):
        exchanger, several = ThreadExchanger(), {**options, "bucket_cap_mb": 0.001}
        try:
            for overlap in (False, True):
                yield train(communicator, groups, make, gradients, overlap=overlap, exchanger=exchanger, **several)
        finally:
            exchanger.close()

    flat = on_threads((num_nodes, 1), flat)[0]
    outcomes = on_threads(nodes, lambda *ranks: list(hierarchical(*ranks)))
    expected = outcomes[0][0]
    assert flat[1] == [scenario != "non-finite gradients" or step not in (4, 9) for step in range(steps)]
    assert_same((flat[0], flat[1], []), (expected[0], expected[1], []))
    for error, expected_error in zip(flat[2], expected[2], strict=True):
        assert torch.allclose(error, expected_error, atol=1e-5)
    for deferred, overlapped in outcomes:
        assert_same(deferred, expected)
        assert_same(overlapped, expected)
    if scenario == "dead and late rows":
        changed = (expected[0][-1][0] != expected[0][0][0]).any(dim=1)
        assert changed.nonzero().ravel().tolist() == [0, 1, 2, 3, 4, 5, 6, 20, 30]


def test_bfloat16_ranks_agree_bitwise_after_every_step():
    """Their errors, and the means inside a node, are float32."""
    make = functools.partial(make_optimizer, torch.optim.AdamW, torch.bfloat16)

    def fn(*ranks):
        return [train(*ranks, make, steps=8, bucket_cap_mb=0.001, overlap=overlap) for overlap in (False, True)]

    outcomes = on_threads(TWO_BY_THREE, fn)
    expected = outcomes[0][0]
    for deferred, overlapped in outcomes:
        assert_same(deferred, expected)
        assert_same(overlapped, expected)
    first, last = expected[0][0], expected[0][-1]
    assert first[0].dtype is torch.bfloat16
    assert not any(torch.equal(a, b) for a, b in zip(first[:4], last[:4], strict=True))


@pytest.mark.parametrize(
    ("scenario", "smallest_mb", "variant"),
    [
        ("missing gradients", 1e-6, "update"),
        ("dead and late rows", 0.0003, "update"),
        ("dead and late rows", 0.0003, "renewed"),
    ],
)
def test_result_does_not_depend_on_buckets(scenario, smallest_mb, variant, monkeypatch):
    """The refreshes of late coordinates included, which learn about a tensor from all of its buckets."""
    monkeypatch.setattr(engine, "REFRESH_STEPS", 8)
    make, gradients = SCENARIOS[scenario]

    def fn(*ranks):
        caps = (None, smallest_mb)
        options = {"steps": 16, **VARIANTS[variant]}
        return [train(*ranks, make, gradients, bucket_cap_mb=bucket_cap_mb, **options) for bucket_cap_mb in caps]

    for (history, _, outstanding), (other_history, _, other_outstanding) in on_threads(TWO_BY_TWO, fn):
        assert all(map(all_equal, other_history, history))
        # Which ranks an element's errors are on, and so the order of this sum over all ranks, depends on buckets.
        assert all(map(torch.allclose, other_outstanding, outstanding))


# The mean inside a node


def test_a_node_averages_in_rank_order_without_overflow():
    """Each rank gets its share of what the mean is by definition; also where the sum is beyond float32."""
    values = [torch.tensor([1.0, 3e38, 0.1]), torch.tensor([1e8, 3e38, 0.2]), torch.tensor([-1e8, 2e38, 0.7])]

    def fn(communicator, groups):
        topology = groups.topology
        (layout,) = plan_buckets([96, 3], block_size=8, num_chunks=6, bucket_numel=1000)
        memory = BucketMemory(
            layout,
            share=topology.share,
            chunk=topology.chunk,
            has_rms=False,
            keeps_before=False,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        average, element = NodeAverage([memory], groups), exists(layout)
        average.flat_gradient(memory).zero_()[element] = values[topology.local_rank].repeat(33)
        out = torch.full_like(memory.error, math.nan)
        average.average_(out, memory)
        return out[element[memory.share_flat]]

    outcomes = on_threads(TWO_BY_THREE, fn)
    for node in (outcomes[:3], outcomes[3:]):
        assert torch.equal(torch.cat(node), mean(values).repeat(33))
    assert torch.isfinite(outcomes[0]).all()


# Bytes


def count_bytes(communicator, groups, numel, block_size, steps=2):
    """Per step, with two buckets: to other nodes, inside the node, and what all ranks agree on."""
    optimizer = warmed_up(with_shapes((numel,))(), 1, gradient, steps=WARMUP_STEPS)
    options = {"block_size": block_size, "bucket_cap_mb": numel / 2 * 4 / 2**20}
    compressed = freeze(optimizer, groups, communicator=communicator, **options)
    for step in range(steps):
        take_step(optimizer, compressed, communicator.rank, AFTER + step, gradient)
    sent, within = groups.peers.counters.bytes_sent, communicator.counters.bytes_within_node
    assert groups.peers.counters.bytes_received == sent
    assert within == groups.peers.counters.bytes_within_node == 0
    for inside in filter(None, (groups.node, groups.averaging)):
        assert inside.counters.bytes_sent == inside.counters.bytes_received == 0
        within += inside.counters.bytes_within_node
    return sent / steps, within / steps, communicator.counters.bytes_sent / steps


@pytest.mark.parametrize("nodes", [TWO_BY_TWO, TWO_BY_THREE])
def test_bytes_between_nodes_are_an_lth_of_the_flat_exchange(nodes):
    """Exactly so, with as many blocks in every chunk."""
    num_nodes, local_world_size = nodes
    world_size, block_size = num_nodes * local_world_size, 64
    numel = world_size * block_size * 20
    encoded_nbytes = numel // 8 + 4 * numel // block_size

    flat = on_threads((world_size, 1), count_bytes, numel, block_size)
    hierarchical = on_threads(nodes, count_bytes, numel, block_size)
    for (flat_sent, flat_within, flat_agreement), (sent, within, agreement) in zip(flat, hierarchical, strict=True):
        assert flat_sent == 2 * (world_size - 1) * encoded_nbytes / world_size
        assert flat_within == 0
        flat_between_nodes = flat_sent * (world_size - local_world_size) / (world_size - 1)
        assert sent == flat_between_nodes / local_world_size
        to_others = (local_world_size - 1) / local_world_size
        assert within == to_others * 4 * numel + to_others * encoded_nbytes
        # int32: whether it counts, the parameter's, a digest twice, whether to refresh, and two requests
        assert agreement == flat_agreement == ring_all_reduce_nbytes(4 * 7, world_size)


# Invariants, by themselves


@pytest.mark.parametrize(("space", "overlap"), [("update", False), ("update", True), ("momentum", False)])
def test_dead_rows_stay_bitwise_and_late_ones_start_on_all_ranks_after_the_same_refresh(space, overlap):
    """They come on rank 3 alone, whose share holds row 35, but neither 4 nor 5."""
    late = [4, 5, 35]

    def fn(communicator, groups):
        optimizer = with_shapes((ROWS, COLUMNS))()
        (x,) = params_of(optimizer)
        with torch.no_grad():
            x[9, 0] = -0.0
        gradient = embedding_gradient(lambda rank, step: [0, 1, 2, 3] + (late if rank == 3 and step >= AFTER + 3 else []))
        initial = x.detach().clone()
        warmed_up(optimizer, 4, gradient, steps=WARMUP_STEPS)
        before = x.detach().clone()
        options = {"block_size": 64, "space": space, "overlap": overlap}
        compressed = freeze(optimizer, groups, communicator=communicator, **options)
        started = []
        for step in range(AFTER, REFRESH_STEPS + 2):
            take_step(optimizer, compressed, communicator.rank, step, gradient, overlap=overlap)
            started.append((x.detach() != before)[late].flatten())
        changed = (x.detach().view(torch.int32) != initial.view(torch.int32)).any(dim=1)
        assert changed.nonzero().ravel().tolist() == [0, 1, 2, 3, *late]
        return torch.stack(started), x.detach()

    outcomes = on_threads(TWO_BY_TWO, fn)
    assert all(all_equal(outcome, outcomes[0]) for outcome in outcomes)
    started = outcomes[0][0]
    assert not started[REFRESH_STEPS - AFTER - 1].any()  # the step that refreshes
    assert started[REFRESH_STEPS - AFTER].all()


@pytest.mark.parametrize(("bad", "overlap"), [(math.inf, False), (math.nan, False), (math.nan, True)])
def test_a_nonfinite_gradient_on_one_rank_leaves_everything_as_it_was(bad, overlap):
    def poisoned(rank, step, index, shape, dtype):
        grad = gradient(rank, step, index, shape, dtype)
        if rank == 1 and index == 2:
            grad[17] = bad
        return grad

    def fn(communicator, groups):
        optimizer, rank = make_optimizer(torch.optim.AdamW, torch.float32), communicator.rank
        warmed_up(optimizer, 4, gradient, steps=WARMUP_STEPS)
        options = {"bucket_cap_mb": 0.001, "overlap": overlap}
        compressed = freeze(optimizer, groups, communicator=communicator, **options)
        for step in range(AFTER, AFTER + 3):
            assert take_step(optimizer, compressed, rank, step, gradient, overlap=overlap)

        def everything():
            errors = [each.values.clone() for each in [*compressed.state.worker_errors(), *compressed.state.server_errors()]]
            return [*state_of(optimizer), *errors, *compressed.state.outstanding().values()]

        before = everything()
        assert not take_step(optimizer, compressed, rank, AFTER + 3, poisoned, overlap=overlap)
        assert all_equal(everything(), before)
        assert take_step(optimizer, compressed, rank, AFTER + 4, gradient, overlap=overlap)
        assert not all_equal(everything(), before)

    on_threads(TWO_BY_TWO, fn)


@pytest.mark.parametrize(("nodes", "space"), [(THREE_BY_TWO, "update"), (TWO_BY_TWO, "momentum")])
def test_telescoping_identity(nodes, space):
    """Applied updates + errors = what exact frozen Adam has applied, with nodes as workers: see test_engine's."""
    steps, lr = 20, 1e-3
    num_nodes, local_world_size = nodes

    def fn(communicator, groups):
        x = nn.Parameter(torch.zeros(40, 5, dtype=torch.float64))
        optimizer = torch.optim.Adam([x], lr=lr, betas=(0.0, 0.999))
        warmed_up(optimizer, communicator.world_size, gradient, steps=WARMUP_STEPS)
        exact = x.detach().clone()
        D = (optimizer.state[x]["exp_avg_sq"] / (1 - 0.999**WARMUP_STEPS)).sqrt() + 1e-8
        compressed = freeze(optimizer, groups, communicator=communicator, block_size=32, space=space)
        kappa = num_nodes / math.sqrt(1 - 0.999) if space == "update" else math.inf
        gradients = outliers if space == "update" else gradient  # in momentum space, what is cut off after them is lost
        means = node_means(gradients, local_world_size)
        for step in range(AFTER, AFTER + steps):
            grads = [means(node, step, 0, x.shape) for node in range(num_nodes)]
            exact -= lr * sum((g / D).clamp(-kappa, kappa) for g in grads) / num_nodes
            take_step(optimizer, compressed, communicator.rank, step, gradients)
        outstanding = compressed.state.outstanding()[x]
        assert outstanding.abs().max() > 0.1  # else nothing would be proved
        assert torch.allclose(x.detach() - lr * (outstanding if space == "update" else outstanding / D), exact, atol=1e-9)
        return outstanding

    outcomes = on_threads(nodes, fn)
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)


def test_errors_can_be_added():
    def fn(communicator, groups):
        def start():
            optimizer = make_optimizer(torch.optim.Adam, torch.float64)
            warmed_up(optimizer, 4, gradient, steps=WARMUP_STEPS)
            return optimizer, freeze(optimizer, groups, communicator=communicator, bucket_cap_mb=0.001)

        optimizer, compressed = start()
        for step in range(AFTER, AFTER + 5):
            take_step(optimizer, compressed, communicator.rank, step, outliers)
        params, saved = params_of(optimizer), compressed.state.outstanding()

        other_optimizer, other = start()
        before = other.state.outstanding()
        errors = dict(zip(params_of(other_optimizer), (saved[p] for p in params), strict=True))
        other.state.add_errors_(compressed.state.worker_errors(), compressed.state.server_errors())
        for p, error in other.state.outstanding().items():
            assert torch.allclose(error, before[p] + errors[p], rtol=1e-12)
        return state_of(optimizer)

    outcomes = on_threads(TWO_BY_TWO, fn)
    assert all(all_equal(outcome, outcomes[0]) for outcome in outcomes)


def test_clipping_uses_one_coefficient_on_all_ranks():
    def fn(communicator, groups):
        optimizer = warmed_up(make_optimizer(torch.optim.Adam, torch.float32), 4, gradient, steps=WARMUP_STEPS)
        compressed = freeze(optimizer, groups, communicator=communicator)
        params = params_of(optimizer)
        for index, p in enumerate(params):
            p.grad = gradient(communicator.rank, AFTER, index, p.shape, p.dtype)
        before = params[2].grad.clone()
        norm = compressed.clip_grad_norm_(0.5)
        return norm, (params[2].grad / before).mean()

    norms, coefficients = zip(*on_threads(TWO_BY_TWO, fn), strict=True)
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
    """Invariant 9, as in test_engine, as the mean of the ranks, whose shares are alike; buckets of one size, as workspaces
    grow with them."""
    bucket_numel = 2**16

    def fn(communicator, groups):
        def state_bytes(numel):
            p = nn.Parameter(torch.zeros(numel))
            optimizer = torch.optim.Adam([p])
            p.grad = torch.ones(numel)
            optimizer.step()
            options = {"block_size": 2048, "bucket_cap_mb": bucket_numel * 4 / 2**20}
            compressed = freeze(optimizer, groups, communicator=communicator, **options)
            compressed.step()
            assert len(compressed._queue) == numel / bucket_numel
            together = torch.zeros(1)
            communicator.all_reduce_max_(together)
            nbytes = tensor_bytes() if communicator.rank == 0 else 0
            communicator.all_reduce_max_(together)  # until then, all ranks keep theirs
            return nbytes - 4 * 8 * numel  # without parameter and gradient

        small, large = 2 * bucket_numel, 6 * bucket_numel
        first = state_bytes(small)
        return (state_bytes(large) - first) / (large - small) / 4

    # D, error of half of it, server error of a quarter; and the bound
    assert 4 + 4 / 2 + 4 / 4 < on_threads(TWO_BY_TWO, fn)[0] <= (8 + 4 / 4) * 1.05
