"""Ranks as threads: the same results as forked ranks on gloo, and failures that name their cause."""

import time

import pytest
import torch
from ranks import run_ranks
from thread_ranks import exchange_groups, run_threads
from torch import nn

from lightning_onebit import ErrorFeedback, compressed_all_reduce
from lightning_onebit.comm.groups import new_groups
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.topology import Topology
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine import optimizer as engine
from lightning_onebit.engine.optimizer import CompressedOptimizer

WORLD_SIZE, WARMUP_STEPS, STEPS = 3, 6, 24
SHAPES = [(37, 11), (5,), (), (300,)]
ROWS, COLUMNS, ROWS_AT_FIRST, FIRST_LATE_STEP = 40, 12, 10, 9
"""An embedding: its later rows come after the warm-up, one on one rank after the other."""


def values(rank, step, index, shape):
    generator = torch.Generator().manual_seed(10_000 * step + 100 * index + rank)
    return (torch.randn(shape, generator=generator) + 0.3) * (1 + index)


def gradients(rank, step):
    """Other ones on every rank, of all parameters; the embedding's last."""
    embedding = values(rank, step, len(SHAPES), (ROWS, COLUMNS))
    embedding[ROWS_AT_FIRST:] = 0
    if step >= FIRST_LATE_STEP and step % WORLD_SIZE == rank:
        row = ROWS_AT_FIRST + step % 10  # each comes again, on another rank
        embedding[row] = values(rank, step, len(SHAPES) + 1, COLUMNS)
    return [*(values(rank, step, index, shape) for index, shape in enumerate(SHAPES)), embedding]


def warmed_up(world_size, kind=torch.optim.Adam):
    """What every rank has after the dense steps: parameters, and their optimizer."""
    params = [nn.Parameter(values(0, 999, index, shape)) for index, shape in enumerate([*SHAPES, (ROWS, COLUMNS)])]
    optimizer = kind(params, lr=1e-2)
    for step in range(WARMUP_STEPS):
        everybodys = [gradients(rank, step) for rank in range(world_size)]
        for p, *grads in zip(params, *everybodys, strict=True):
            p.grad = sum(grads).div(world_size)
        optimizer.step()
    return params, optimizer


def errors_of(compressed):
    """This rank's errors of worker and server, whatever their layout."""
    return [each.values.clone() for each in [*compressed.state.worker_errors(), *compressed.state.server_errors()]]


def compressed_run(communicator, groups=None, **config):
    """Parameters after each step, then errors of worker and server and everything that is outstanding."""
    params, optimizer = warmed_up(communicator.world_size)
    config = CompressionConfig(block_size=64, **config)
    compressed = CompressedOptimizer(optimizer, config, communicator, {}, groups=groups)
    trace = []
    for step in range(WARMUP_STEPS, WARMUP_STEPS + STEPS):
        for p, grad in zip(params, gradients(communicator.rank, step), strict=True):
            p.grad = grad
        assert compressed.step()
        trace.extend(p.detach().clone() for p in params)
    state = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
    outstanding = list(compressed.state.outstanding().values())
    counters = communicator.counters if groups is None else groups.peers.counters
    return (
        trace + errors_of(compressed) + state,
        outstanding,
        (counters.collectives, counters.bytes_sent, counters.bytes_received),
    )


@pytest.mark.parametrize("config", [{}, {"bucket_cap_mb": 0.001}, {"space": "momentum", "scale": "l1"}])
def test_compressed_steps_are_bitwise_those_of_gloo(config, monkeypatch):
    monkeypatch.setattr(engine, "REFRESH_STEPS", 8)
    forked = run_ranks(WORLD_SIZE, lambda rank: compressed_run(Communicator(), **config))
    threads = run_threads(WORLD_SIZE, lambda communicator: compressed_run(communicator, **config))
    for (exact, outstanding, counted), (expected, expected_outstanding, expected_counts) in zip(
        threads, forked, strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(exact, expected, strict=True))
        # A dense mean of three in an order that gloo chooses.
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(outstanding, expected_outstanding, strict=True))
        assert counted == expected_counts
    embedding, initial = threads[0][0][STEPS * (len(SHAPES) + 1) - 1], warmed_up(WORLD_SIZE)[0][-1]
    assert (embedding[ROWS_AT_FIRST:] != initial[ROWS_AT_FIRST:]).any()  # else no row came late
    assert any(not torch.equal(a, b) for a, b in zip(threads[0][0], threads[1][0], strict=True))  # of the worker errors


def test_compressed_all_reduce_is_bitwise_that_of_gloo():
    """On a group that is passed on: to be possible, ``Communicator`` has to ask the group itself for rank and size."""

    def fn(rank, group=None):
        state = ErrorFeedback(torch.empty(1009), group=group, block_size=64)
        results = [compressed_all_reduce(values(rank, step, 0, 1009), state) for step in range(8)]
        return [*results, state.worker_error, state.server_error]

    threads = run_threads(WORLD_SIZE, lambda communicator: fn(communicator.rank, communicator.group))
    for actual, expected in zip(threads, run_ranks(WORLD_SIZE, fn), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_hierarchical_steps_are_bitwise_those_of_gloo(monkeypatch):
    monkeypatch.setattr(engine, "REFRESH_STEPS", 8)
    world_size, local_world_size = 4, 2

    def forked(rank):
        node_rank, local_rank = divmod(rank, local_world_size)
        topology = Topology(num_nodes=2, node_rank=node_rank, local_world_size=local_world_size, local_rank=local_rank)
        return compressed_run(Communicator(), new_groups(topology, None))

    def threads(communicator):
        return compressed_run(communicator, exchange_groups(communicator, local_world_size))

    for actual, expected in zip(run_threads(world_size, threads), run_ranks(world_size, forked), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(actual[0], expected[0], strict=True))
        assert actual[2] == expected[2]


def every_collective(communicator):
    n, rank = communicator.world_size, communicator.rank
    gathered, received = torch.empty(n * 5), torch.empty(n * 2)
    communicator.all_gather_(gathered, values(rank, 0, 0, 5))
    communicator.all_to_all_(received, values(rank, 1, 0, n * 2))
    # Rank r sends r + s + 1 elements to rank s.
    numels = [rank + other + 1 for other in range(n)]
    uneven = torch.empty(sum(numels))
    communicator.all_to_all_(uneven, values(rank, 2, 0, sum(numels)), received_numels=numels, sent_numels=numels)
    largest = (100 * values(rank, 3, 0, 7)).to(torch.int32)
    communicator.all_reduce_max_(largest)
    number = torch.tensor(communicator.broadcast_int(10 + rank, source=1, device=torch.device("cpu")))
    mean, later = values(rank, 4, 0, 1000), values(rank, 5, 0, 1000)
    communicator.all_reduce_mean_(mean)
    future = communicator.all_reduce_mean_future(later)
    assert future.wait() is later
    counters = communicator.counters
    counted = [counters.collectives, counters.bytes_sent, counters.bytes_received, counters.bytes_within_node]
    return [gathered, received, uneven, largest, number], [mean, later], counted


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="there `broadcast` knows no groups but torch's own")
def test_each_collective_does_what_gloo_does():
    forked = run_ranks(WORLD_SIZE, lambda rank: every_collective(Communicator()))
    threads = run_threads(WORLD_SIZE, every_collective)
    for (exact, means, counted), (expected, expected_means, expected_counts) in zip(threads, forked, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(exact, expected, strict=True))
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(means, expected_means, strict=True))
        assert counted == expected_counts


def test_means_scale_first_and_then_add_in_rank_order():
    parts = [values(rank, 0, 0, 1000) for rank in range(WORLD_SIZE)]

    def fn(communicator):
        mean = parts[communicator.rank].clone()
        communicator.all_reduce_mean_(mean)
        return mean

    expected = parts[0] * (1 / 3) + parts[1] * (1 / 3) + parts[2] * (1 / 3)
    assert all(torch.equal(mean, expected) for mean in run_threads(WORLD_SIZE, fn))


def test_results_come_in_rank_order_and_groups_of_the_same_members_are_apart():
    def fn(communicator):
        members = [rank for rank in range(6) if rank % 2 == communicator.rank % 2]
        first, second = communicator.split(members), communicator.split(members, within_node=True)
        assert (first.rank, first.world_size) == (communicator.rank // 2, 3)
        gathered = torch.empty(3, dtype=torch.int64)
        second.all_gather_(gathered, torch.tensor([communicator.rank]))
        assert second.counters.bytes_within_node == 16
        assert not second.counters.bytes_sent
        assert not first.counters.collectives
        return gathered.tolist()

    assert run_threads(6, fn) == [[0, 2, 4], [1, 3, 5]] * 3
    with pytest.raises(ValueError, match="Rank 1 is not one of"):
        run_threads(2, lambda communicator: communicator.split([0]))


def test_an_exception_ends_all_ranks_and_is_the_one_that_the_caller_sees():
    def fn(communicator):
        communicator.all_reduce_max_(torch.zeros(3))
        if communicator.rank == 5:
            raise KeyError("the cause")
        communicator.split([0, 1, 2, 3, 4, 5, 6, 7]).all_reduce_max_(torch.zeros(3))

    start = time.monotonic()
    with pytest.raises(KeyError, match="the cause"):
        run_threads(8, fn)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("large", [2, 0])
def test_other_sizes_and_other_collectives_are_named_on_both_sides(large):
    def sizes(communicator):
        communicator.all_reduce_max_(torch.zeros(4 if communicator.rank == large else 3))

    with pytest.raises(RuntimeError, match=r"of 3 float32 .*of 4 float32|of 4 float32 .*of 3 float32"):
        run_threads(3, sizes)

    def kinds(communicator):
        if communicator.rank == large:
            communicator.all_gather_(torch.empty(3), torch.zeros(1))
        else:
            communicator.all_reduce_mean_(torch.zeros(1))

    with pytest.raises(RuntimeError, match=r"different collectives: .*all_(gather|reduce).* on rank .*all_(reduce|gather)"):
        run_threads(3, kinds)

    def parts(communicator):
        numels = [2, 2, 2] if communicator.rank != large else [1, 2, 3]
        communicator.all_to_all_(torch.empty(6), torch.zeros(6), received_numels=[2, 2, 2], sent_numels=numels)

    with pytest.raises(ValueError, match=f"expects 2 elements of rank {large}, but rank {large} sends 1"):
        run_threads(3, parts)


def test_a_rank_that_ends_early_or_hangs_is_named():
    def ends(communicator):
        if communicator.rank != 1:
            communicator.all_reduce_max_(torch.zeros(3))

    with pytest.raises(RuntimeError, match=r"all_reduce .* of 3 float32: ranks \[1\] have ended"):
        run_threads(3, ends)

    def hangs(communicator):
        if communicator.rank == 1:
            time.sleep(1.5)
        communicator.all_reduce_max_(torch.zeros(3))

    with pytest.raises(TimeoutError, match=r"ranks \[1\] did not call it|Ranks .* did not end within 0.5 s"):
        run_threads(3, hangs, timeout=0.5)
