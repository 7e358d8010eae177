"""What error feedback holds when a compressed phase ends waits, on each rank its own, for the next one: other buckets, other
parameters and, by way of checkpoints, other ranks."""

import pytest
import torch
from nodes import freeze, take_step, warmed_up
from test_engine import gradient, make_params
from test_nodes import AFTER, TWO_BY_TWO, WARMUP_STEPS, on_threads, outliers
from thread_ranks import run_threads
from torch import nn

from lightning_onebit.checkpoint.parts import Parts
from lightning_onebit.checkpoint.state import PartContent, load_waiting_errors
from lightning_onebit.comm.topology import Topology
from lightning_onebit.engine.ranges import ElementRange, WaitingErrors, first_places
from lightning_onebit.methods import parameters_of

SHAPES = [(37, 11), (5,), (0, 3), (300,), ()]
SMALL = {"block_size": 16, "bucket_cap_mb": 0.001}  # of 262 elements: many buckets, and chunks that change


def start(ranks, dtype=torch.float64, kind=torch.optim.Adam):
    return warmed_up(kind(make_params(dtype, SHAPES), lr=1e-2), ranks, gradient, steps=WARMUP_STEPS)


def compressed_for_a_while(communicator, groups, optimizer, steps=5, **config):
    compressed = freeze(optimizer, groups, communicator=communicator, **(SMALL | config))
    for step in range(AFTER, AFTER + steps):
        take_step(optimizer, compressed, communicator.rank, step, outliers)
    return compressed


def by_parameter(optimizer, ranges):
    """Dense, of each parameter, zero where there is nothing."""
    dense = {p: torch.zeros(p.numel(), dtype=torch.float64) for p in parameters_of(optimizer)}
    for p, place in first_places(optimizer).items():
        for each in ranges:
            first, last = max(place, each.start), min(place + p.numel(), each.stop)
            if first < last:
                dense[p][first - place : last - place] += each.values[first - each.start : last - each.start]
    return dense


NODES = [(2, 1), (3, 1), TWO_BY_TWO]


@pytest.mark.parametrize("nodes", NODES)
def test_errors_wait_and_are_handed_over_to_other_buckets(nodes):
    """A parameter before and one behind the others are new, so that places, buckets and the chunks of all ranks change.

    What the state is given back as, is that of the state dict; parameters do not move.
    """

    def fn(communicator, groups):
        optimizer = start(communicator.world_size)
        old = parameters_of(optimizer)
        compressed = compressed_for_a_while(communicator, groups, optimizer)
        owed, own = compressed.state.outstanding(), by_parameter(optimizer, compressed.state.worker_errors())
        x, saved = [p.detach().clone() for p in old], optimizer.state_dict()["state"]

        waiting = compressed.state.waiting_errors()
        compressed.give_back_()
        assert all(torch.equal(a, b) for a, b in zip(x, old, strict=True))
        for i, p in enumerate(old):
            assert all(torch.equal(optimizer.state[p][name], saved[i][name]) for name in ("step", "exp_avg", "exp_avg_sq"))
        numel, n = sum(p.numel() for p in old), communicator.world_size
        assert waiting.nbytes <= 8 * (numel / groups.topology.local_world_size + numel / n + 200)

        first, last = (nn.Parameter(p.detach().double()) for p in make_params(torch.float64, [(70,), (41,)]))
        optimizer.param_groups[0]["params"].insert(0, first)
        optimizer.add_param_group({"params": [last]})
        for step in range(AFTER + 5, AFTER + 8):
            for index, p in enumerate(parameters_of(optimizer)):
                p.grad = sum(gradient(rank, step, index, p.shape) for rank in range(n)) / n
            optimizer.step()

        def frozen():
            return freeze(optimizer, groups, communicator=communicator, block_size=32, bucket_cap_mb=0.001)

        momenta = {p: optimizer.state[p]["exp_avg"].clone() for p in parameters_of(optimizer)}
        state = {p: {k: v.clone() for k, v in e.items()} for p, e in optimizer.state.items()}
        bare = frozen()
        before, own_before = bare.state.outstanding(), by_parameter(optimizer, bare.state.worker_errors())
        bare.close()
        optimizer.state.update(state)
        compressed = frozen()
        assert compressed.state.take_over_errors_(waiting) == []
        after, own_after = compressed.state.outstanding(), by_parameter(optimizer, compressed.state.worker_errors())
        assert all(momenta[p].any() for p in old if p.numel())
        for p in parameters_of(optimizer):
            expected = before[p] + owed.get(p, torch.zeros_like(p))
            assert torch.allclose(after[p], expected, rtol=1e-12, atol=1e-12)
            if p not in owed:
                assert torch.equal(own_after[p], own_before[p])
            elif groups.topology.is_flat:  # each rank has its own
                assert torch.allclose(own_after[p], own_before[p] + own[p], rtol=1e-12, atol=1e-12)
        assert max(owed[p].abs().max() for p in old if p.numel()) > 0.1
        return [owed[p] for p in old], compressed.step()

    outcomes = on_threads(nodes, fn)
    assert all(torch.equal(a, b) for owed, _ in outcomes for a, b in zip(owed, outcomes[0][0], strict=True))


def test_errors_of_parameters_that_are_gone_are_lost_and_those_are_named():
    def fn(communicator):
        optimizer = start(2)
        compressed = compressed_for_a_while(communicator, None, optimizer)
        owed = compressed.state.outstanding()
        waiting = compressed.state.waiting_errors()
        compressed.give_back_()
        params = optimizer.param_groups[0]["params"]
        gone = params.pop(1)
        optimizer.state.pop(gone)
        before = freeze(optimizer, None, communicator=communicator, **SMALL)
        beginning = before.state.outstanding()
        lost = before.state.take_over_errors_(waiting)
        assert len(lost) == 1
        assert lost[0] is gone
        for p, error in before.state.outstanding().items():
            assert torch.allclose(error, beginning[p] + owed[p], rtol=1e-12, atol=1e-12)

    run_threads(2, fn)


def test_a_single_rank_has_none_and_applies_what_others_had():
    optimizer = start(1)
    compressed = freeze(optimizer, None, **SMALL)
    params, places = parameters_of(optimizer), first_places(optimizer)
    assert compressed.state.waiting_errors().ranges(optimizer) == ([], [])
    x = [p.detach().clone() for p in params]
    error = torch.full((params[0].numel(),), 0.5, dtype=torch.float64)
    compressed.state.take_over_errors_(WaitingErrors(places, [ElementRange(places[params[0]], error)]))
    step_size = 1e-2 / (1 - 0.9**WARMUP_STEPS)
    assert torch.allclose(params[0], x[0] - step_size * 0.5, rtol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(params[1:], x[1:], strict=True))


def header(nodes, save_id="0" * 16):
    return {"world_size": nodes[0] * nodes[1], "local_world_size": nodes[1], "save_id": save_id}


@pytest.mark.parametrize(
    ("old", "new"),
    [((4, 1), (4, 1)), ((4, 1), (2, 1)), ((2, 1), (3, 1)), ((4, 2), (2, 2)), ((2, 2), (3, 1)), ((3, 1), (2, 2))],
)
def test_waiting_errors_of_a_checkpoint_fit_other_ranks(old, new, tmp_path):
    """The mean worker error and the server errors are the same afterwards, and no rank keeps more than its share."""
    parts = Parts(tmp_path / "model.ckpt")

    def save(communicator, groups):
        optimizer = start(communicator.world_size)
        compressed = compressed_for_a_while(communicator, groups, optimizer)
        owed = list(compressed.state.outstanding().values())
        content = PartContent()
        content.add_waiting_errors(optimizer, compressed.state.waiting_errors())
        parts.write("0" * 16, communicator.rank, content.meta, content.arrays)
        return owed

    def resume(communicator, groups):
        optimizer = start(2)
        compressed = freeze(optimizer, groups, communicator=communicator, block_size=32)
        before = list(compressed.state.outstanding().values())
        errors, problems = load_waiting_errors([optimizer], [0], header(old), parts, groups.topology)
        assert not problems
        compressed.state.take_over_errors_(errors[optimizer])
        return [a - b for a, b in zip(compressed.state.outstanding().values(), before, strict=True)], errors[
            optimizer
        ].nbytes

    owed = on_threads(old, save)[0]
    outcomes = on_threads(new, resume)
    assert max(error.abs().max() for error in owed if error.numel()) > 0.1
    numel = sum(error.numel() for error in owed)
    for taken, nbytes in outcomes:
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(taken, owed, strict=True))
        assert (
            nbytes
            <= 8 * numel * (1 / new[1] + max(1, -(-old[0] * old[1] // (new[0] * new[1]))) / (old[0] * old[1])) + 8 * 400
        )


def test_a_part_that_is_missing_is_said_and_the_others_are_used(tmp_path):
    parts, optimizer = Parts(tmp_path / "model.ckpt"), start(2)
    places = first_places(optimizer)
    content = PartContent()
    content.add_waiting_errors(optimizer, WaitingErrors(places, [ElementRange(3, torch.ones(9))]))
    parts.write("0" * 16, 1, content.meta, content.arrays)
    topology = Topology(num_nodes=1, node_rank=0)
    errors, problems = load_waiting_errors([optimizer], [0], header((2, 1)), parts, topology)
    assert problems == {0: "missing"}
    (worker,), server = errors[optimizer].ranges(optimizer)
    assert (worker.start, worker.values.tolist(), server) == (3, [0.5] * 9, [])
    # Of other parameters than those that were saved.
    other = torch.optim.Adam(make_params(torch.float64, SHAPES[:-1]))
    assert load_waiting_errors([other], [0], header((2, 1)), parts, topology)[1][1] == "of another checkpoint"
