"""The thread that exchanges: order, failures, and that it changes no result."""

import threading
import time

import pytest
import torch
from ranks import run_ranks, run_trainers
from test_engine import WARMUP_STEPS, compressed_steps, make_optimizer, params_of, warm_up
from trainers import fit

from lightning_onebit import FixedStep, PhaseSwitch
from lightning_onebit.comm.groups import new_groups
from lightning_onebit.comm.lane import InlineLane, Lane
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine import CompressedOptimizer
from lightning_onebit.topology import Topology


@pytest.fixture
def lane():
    lane = Lane()
    yield lane
    lane.close()
    assert not lane._thread.is_alive()


def test_works_in_order_and_in_another_thread(lane):
    done = []

    def work(i):
        time.sleep(0.01 * (3 - i))
        done.append((i, threading.current_thread().name))

    tickets = [lane.submit(lambda i=i: work(i)) for i in range(3)]
    tickets[-1].wait()
    assert done == [(i, "onebit-lane") for i in range(3)]
    assert all(ticket.done() for ticket in tickets)


def test_a_failure_reaches_the_waiting_thread_and_all_later_work_fails_with_it(lane):
    done = []

    def fail():
        raise OSError("the cable is unplugged")

    tickets = [lane.submit(work) for work in (lambda: done.append(1), fail, lambda: done.append(2))]
    tickets[0].wait()
    for ticket in tickets[1:]:
        with pytest.raises(RuntimeError, match="the cable is unplugged") as info:
            ticket.wait()
        assert isinstance(info.value.__cause__, OSError)
    assert done == [1]


def test_inline_lane_has_done_it_when_it_returns():
    done = []
    ticket = InlineLane().submit(lambda: done.append(1))
    assert done == [1]
    assert ticket.done()

    def fail():
        raise ValueError("no")

    with pytest.raises(RuntimeError, match="no"):
        InlineLane().submit(fail).wait()


@pytest.mark.parametrize("bucket_cap_mb", [0.0005, 0.002, None])
@pytest.mark.parametrize("space", ["update", "momentum"])
def test_the_thread_changes_no_bit(bucket_cap_mb, space):
    def fn(rank, threaded):
        optimizer = make_optimizer(torch.optim.AdamW, torch.float32)
        warm_up(optimizer, WARMUP_STEPS, 3)
        config = CompressionConfig(block_size=8, bucket_cap_mb=bucket_cap_mb, space=space)
        lane = Lane() if threaded else InlineLane()
        groups = new_groups(Topology(num_nodes=3, node_rank=rank), None) if threaded else None
        compressed = CompressedOptimizer(optimizer, config, Communicator(), {}, groups=groups, lane=lane)
        history = []
        for _ in compressed_steps(optimizer, compressed, rank, range(WARMUP_STEPS, WARMUP_STEPS + 30)):
            history.append([p.detach().clone() for p in params_of(optimizer)])
        lane.close()
        return history

    for threaded, inline in zip(run_ranks(3, fn, True), run_ranks(3, fn, False), strict=True):
        for a, b in zip(threaded, inline, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_no_thread_is_left_after_a_fit():
    def fn(rank):
        fit("onebit_ddp", 2, callbacks=[PhaseSwitch(FixedStep(3))])
        assert "onebit-lane" not in [thread.name for thread in threading.enumerate()]

    run_trainers(2, fn)
