"""`resume_warmup()` keeps what error feedback has not applied yet, also in checkpoints, for the next compressed phase.

On the engine alone, with other buckets, parameters and ranks: tests/distributed/test_handing_over.py.
"""

import lightning.pytorch as pl
import pytest
import torch
from ranks import run_trainers
from test_checkpoint import SaveAt, Stepwise, same_bits
from test_fabric import Loop
from test_fabric import ours as fabric_strategy
from test_strategy import Messages
from torch import nn
from trainers import fit, same_params

from lightning_onebit import FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.methods import parameters_of

WARMUP, COMPRESSED = Phase.WARMUP, Phase.COMPRESSED
BACK, AGAIN = 8, 12
"""After so many batches the warm-up is resumed, and ends again."""


def owed(optimizer, waiting):
    """Mean worker error plus server error of all ranks, one tensor per parameter. Collective."""
    worker, server = waiting.ranges(optimizer)
    total = torch.zeros(sum(p.numel() for p in parameters_of(optimizer)))
    for ranges, factor in ((worker, 1), (server, Communicator().world_size)):
        for each in ranges:
            total[each.start : each.stop] += factor * each.values
    Communicator().all_reduce_mean_(total)
    return total


class ThereAndBack(pl.Callback):
    """Notes what is owed before the warm-up is resumed, and what waits then and when the run begins."""

    def __init__(self, back=BACK, again=AGAIN):
        self.back, self.again, self.at_start = back, again, None

    def on_train_start(self, trainer, pl_module):
        waiting = trainer.strategy._phases.waiting_errors
        self.at_start = [owed(optimizer, errors) for optimizer, errors in waiting.items()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        strategy = trainer.strategy
        if batch_idx + 1 == self.back:
            self.before = [owed(o, c.state.waiting_errors()) for o, c in strategy._phases.compressed.items()]
            x = [p.detach().clone() for p in pl_module.parameters()]
            strategy.resume_warmup()
            assert all(torch.equal(a, b) for a, b in zip(pl_module.parameters(), x, strict=True))
            self.waiting = [owed(o, errors) for o, errors in strategy._phases.waiting_errors.items()]
            assert "errors_wait=True" in repr(strategy)
        if batch_idx + 1 == self.again:
            strategy.freeze_variance()


def adam_and_sgd(module):
    return [
        torch.optim.Adam(module.body.parameters(), lr=1e-2),
        torch.optim.SGD(module.head.parameters(), lr=0.1, momentum=0.9),
    ]


class Two(Stepwise):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


def run(world_size, *callbacks, model=Stepwise, strategy=None, batches=18, **kwargs):
    callbacks = [PhaseSwitch(FixedStep(4)), *callbacks]
    strategy = OneBitDDPStrategy(**{"block_size": 64, "bucket_cap_mb": 0.001, **(strategy or {})})
    return fit(strategy, world_size, batches=batches, model=model(), callbacks=callbacks, **kwargs)


@pytest.mark.parametrize(
    ("world_size", "num_nodes", "model", "strategy"),
    [
        (2, 1, Stepwise, {}),
        (3, 1, Stepwise, {"space": "momentum"}),
        (4, 2, Stepwise, {}),
        (2, 1, lambda: Two(adam_and_sgd), {}),
    ],
)
def test_errors_wait_in_warmup_and_in_its_checkpoints(tmp_path, world_size, num_nodes, model, strategy):
    """Resumed before, at and after the second freeze, the run is bitwise the uninterrupted one."""

    def fn(rank):
        options = {"model": model, "strategy": strategy, "num_nodes": num_nodes}
        saves = [SaveAt(tmp_path / f"{k}.ckpt", k) for k in (BACK, BACK + 2, AGAIN, AGAIN + 1)]
        there_and_back = ThereAndBack()
        with Messages() as messages:
            trainer, full = run(world_size, there_and_back, *saves, **options)
        assert messages.count("waits for the next compressed phase") == (rank == 0)
        assert full.phases[BACK - 1 : AGAIN + 1] == [WARMUP] * (AGAIN - BACK) + [COMPRESSED] * 2
        assert "errors_wait" not in repr(trainer.strategy)
        assert len(there_and_back.waiting) == (2 if model is not Stepwise and strategy == {} and world_size == 2 else 1)
        for before, waiting in zip(there_and_back.before, there_and_back.waiting, strict=True):
            assert before.abs().max() > 0
            assert same_bits(before, waiting)
        for k in (BACK, BACK + 2, AGAIN, AGAIN + 1):
            again = ThereAndBack(back=0)
            resumed = run(world_size, again, ckpt_path=tmp_path / f"{k}.ckpt", **options)[1]
            assert resumed.phases == full.phases[k:], k
            assert same_params(resumed.params, full.params[k:]), k
            waits = k <= AGAIN
            assert len(again.at_start) == (len(there_and_back.waiting) if waits else 0)
            assert all(map(same_bits, again.at_start, there_and_back.waiting if waits else []))
        checkpoint = torch.load(tmp_path / f"{BACK}.ckpt", weights_only=True)["lightning_onebit"]
        assert (checkpoint["phase"], checkpoint["errors_wait"]) == ("WARMUP", True)
        return full.params

    outcomes = run_trainers(world_size, fn, num_nodes=num_nodes)
    assert all(same_params(params, outcomes[0]) for params in outcomes)


def test_what_waits_fits_another_number_of_ranks(tmp_path):
    path = tmp_path / "warmup.ckpt"

    def first(rank):
        there_and_back = ThereAndBack()
        run(3, there_and_back, SaveAt(path, BACK + 1))
        return there_and_back.waiting[0]

    def second(rank):
        again = ThereAndBack(back=0)
        recorder = run(2, again, ckpt_path=path)[1]
        assert recorder.phases[0] is WARMUP
        assert recorder.phases[-1] is COMPRESSED
        with Messages() as messages:  # which means nothing there
            other = ThereAndBack(back=0)
            run(2, other, ckpt_path=path, strategy={"space": "momentum"})
        assert other.at_start == []
        assert messages.count("quantized in another space") == (rank == 0)
        return again.at_start[0]

    before = run_trainers(3, first)
    after = run_trainers(2, second)
    assert before[0].abs().max() > 0.1
    assert all(torch.allclose(each, before[0], rtol=1e-5, atol=1e-7) for each in after)


class Unfreezes(Stepwise):
    """A layer trains from the tenth batch on, in front and behind in the optimizer; a parameter leaves it after that."""

    def __init__(self):
        super().__init__()
        self.late = nn.Linear(16, 16)
        self.late.requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def on_train_batch_start(self, batch, batch_idx):
        optimizer = self.trainer.optimizers[0]
        if batch_idx == 9:
            (compressed,) = self.trainer.strategy._phases.compressed.values()
            self.before = {p: error.clone() for p, error in compressed.state.outstanding().items()}
            self.late.requires_grad_(True)
            optimizer.param_groups[0]["params"].insert(0, self.late.weight)
            optimizer.param_groups[0]["params"].append(self.late.bias)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        optimizer, strategy = self.trainer.optimizers[0], self.trainer.strategy
        if batch_idx == 11:
            assert strategy.phase is WARMUP
            params = optimizer.param_groups[0]["params"]
            total = owed(optimizer, strategy._phases.waiting_errors[optimizer])
            places = strategy._phases.waiting_errors[optimizer]._worker.keys()
            assert set(places) <= set(self.before)
            assert total.norm() == pytest.approx(
                torch.cat([e.view(-1) for e in self.before.values()]).norm().item(), rel=1e-5
            )
            params[:] = [p for p in params if p is not self.head.bias]
            optimizer.state.pop(self.head.bias)
            self.head.bias.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = self.batch(batch_idx)
        return nn.functional.cross_entropy(self.head(self.late(self.body(x))), y)


def test_parameters_that_come_and_go_meanwhile():
    def fn(rank):
        with Messages() as messages:
            recorder = run(2, model=Unfreezes, strategy={"find_unused_parameters": True})[1]
        assert recorder.phases[8:10] == [COMPRESSED, WARMUP]
        assert recorder.phases[-1] is COMPRESSED
        said = "what error feedback has not applied yet of 'head.bias' is dropped, as Adam no longer trains it"
        assert messages.count(said) == (rank == 0)
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


class Drops(pl.Callback):
    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["optimizer_states"][0]["state"].clear()


def test_errors_wait_where_state_is_missing(tmp_path):
    """Reset in the run, and dropped from a checkpoint of the compressed phase."""
    path = tmp_path / "compressed.ckpt"

    class Clears(ThereAndBack):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 7:
                trainer.save_checkpoint(path)
                self.before = [owed(o, c.state.waiting_errors()) for o, c in trainer.strategy._phases.compressed.items()]
                trainer.optimizers[0].state.clear()
            if batch_idx == 8:
                assert trainer.strategy.phase is WARMUP
                self.waiting = [owed(o, errors) for o, errors in trainer.strategy._phases.waiting_errors.items()]

    def fn(rank):
        clears, loads = Clears(), ThereAndBack(back=0, again=0)
        run(2, clears, batches=10)
        run(2, loads, Drops(), ckpt_path=path)
        for each in (clears.waiting, loads.at_start):
            assert len(each) == 1
            assert clears.before[0].any()
            assert same_bits(each[0], clears.before[0])

    run_trainers(2, fn)


def test_a_single_process_has_none_that_could_wait_where_state_is_missing(tmp_path):
    """What its part of a checkpoint has in the place of errors is u."""
    path = tmp_path / "compressed.ckpt"

    def fn(rank):
        loads = ThereAndBack(back=0, again=0)
        run(1, ThereAndBack(back=0, again=4), SaveAt(path, 6), batches=8)
        _, recorder = run(1, loads, Drops(), ckpt_path=path, batches=8)
        assert recorder.phases == [WARMUP] * 2
        assert loads.at_start == []

    run_trainers(1, fn)


def test_errors_wait_under_fabric(tmp_path):
    def fn(rank):
        loop = Loop(fabric_strategy(block_size=16)).run(9)
        (compressed,) = loop.strategy._phases.compressed.values()
        before = owed(loop.strategy.optimizers[0], compressed.state.waiting_errors())
        loop.strategy.resume_warmup()
        assert "errors_wait=True" in repr(loop.strategy)
        loop.run(11)
        loop.fabric.save(tmp_path / "warmup.ckpt", {"model": loop.model, "optimizer": loop.optimizer})
        loop.strategy.freeze_variance()
        loop.run(16)
        resumed = Loop(fabric_strategy(block_size=16))
        resumed.fabric.load(tmp_path / "warmup.ckpt", {"model": resumed.model, "optimizer": resumed.optimizer})
        (waiting,) = resumed.strategy._phases.waiting_errors.values()
        assert before.any()
        assert same_bits(owed(resumed.strategy.optimizers[0], waiting), before)
        resumed.batch = 11
        resumed.strategy.freeze_variance()
        assert same_params(resumed.run(16).params, loop.params[11:])
        resumed.fabric.load(tmp_path / "warmup.ckpt", {"model": resumed.model, "optimizer": resumed.optimizer})
        assert resumed.strategy._phases.waiting_errors
        loop.strategy.teardown()
        resumed.strategy.teardown()

    run_trainers(2, fn)
