"""The hierarchical exchange with a Trainer: who has it, that it changes no result, checkpoints, failures.

The exchange itself: tests/distributed/test_nodes.py.
"""

import os
import time
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from ranks import run_trainers
from test_checkpoint import SaveAt
from torch import nn
from trainers import CLASSES, FEATURES, Stepwise, fit, same_params

from lightning_onebit import FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.topology import Topology
from lightning_onebit.engine import optimizer as engine


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


class Outstanding(pl.Callback):
    """Keeps what is outstanding when the run starts, if it starts compressed, and when it is saved after a batch."""

    def __init__(self, batch=None):
        self.batch = batch

    def look(self, trainer):
        assert trainer.strategy.phase is Phase.COMPRESSED
        (compressed,) = trainer.strategy._phases.compressed.values()
        self.errors = [error.clone() for error in compressed.state.outstanding().values()]

    def on_train_start(self, trainer, pl_module):
        if self.batch is None:
            self.look(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.batch:
            self.look(trainer)


def test_a_checkpoint_fits_any_topology(tmp_path):
    """Written on two nodes of two ranks; what is outstanding is the same on four flat ranks, on two, and on the same."""
    path = tmp_path / "compressed.ckpt"

    def resume(world_size, **options):
        look = Outstanding()
        trainer, recorder = run(world_size, callbacks=[look], ckpt_path=path, **options)
        assert set(recorder.phases) == {Phase.COMPRESSED}
        assert len(recorder.params) == 4
        return topology_of(trainer).is_flat, recorder.params, look.errors

    def write_and_resume(rank):
        look = Outstanding(10)
        written = run(4, num_nodes=2, callbacks=[look, SaveAt(path, 10)])[1].params
        nodes, flat = resume(4, num_nodes=2), resume(4, num_nodes=2, strategy={"hierarchical": False})
        assert same_params(nodes[1], written[10:])
        return look.errors, nodes, flat

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


def test_a_run_goes_on_with_fewer_nodes(tmp_path):
    """From four nodes of two ranks to two, with the second moments of four: what is outstanding stays."""
    path = tmp_path / "four.ckpt"

    def v_mean(trainer):
        (compressed,) = trainer.strategy._phases.compressed.values()
        total = torch.zeros(sum(p.numel() for p in trainer.strategy.lightning_module.parameters()))
        for each in compressed.state.second_moments():
            total[each.start : each.stop] += each.values
        Communicator().all_reduce_mean_(total)
        return 2 * total  # each rank has half of its node's

    class Look(Outstanding):
        def look(self, trainer):
            super().look(trainer)
            self.v = v_mean(trainer)

    def write(rank):
        look = Look(10)
        run(8, num_nodes=4, callbacks=[look, SaveAt(path, 10)])
        return look.errors, look.v

    def resume(rank):
        look = Look()
        trainer, recorder = run(4, num_nodes=2, callbacks=[look], ckpt_path=path)
        assert topology_of(trainer).num_nodes == 2
        assert set(recorder.phases) == {Phase.COMPRESSED}
        return recorder.params, look.errors, look.v

    (saved, v), *_ = run_trainers(8, write, num_nodes=4)
    outcomes = run_trainers(4, resume, num_nodes=2)
    assert max(error.abs().max() for error in saved) > 0.1
    for params, errors, new_v in outcomes:
        assert same_params(params, outcomes[0][0])
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(errors, saved, strict=True))
        assert torch.allclose(new_v, v, rtol=1e-5, atol=0)
        assert all(p.isfinite().all() for p in params[-1])


def test_an_exception_in_the_thread_of_one_rank_ends_all():
    """Also where the training thread waits for its node."""
    exchange, count = engine.exchange_, iter(range(10**6))

    def failing(memory, groups, *args, **kwargs):
        if next(count) == 3 and groups.topology.rank == 3:
            raise OSError("injected")
        exchange(memory, groups, *args, **kwargs)

    def fn(rank):
        engine.exchange_ = failing  # in a forked process
        started = time.monotonic()
        message = "injected" if rank == 3 else "Connection closed|Connection reset|A compressed exchange failed"
        with pytest.raises(RuntimeError, match=message):
            run(4, num_nodes=2)
        assert time.monotonic() - started < 30

    run_trainers(4, fn, num_nodes=2)
