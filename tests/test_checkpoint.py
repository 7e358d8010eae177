"""Checkpoints of both phases: what they hold, and what a run does that resumes from them."""

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from ranks import run_trainers
from trainers import Classifier, fit, same_params

from lightning_onebit import FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch, VarianceStability
from lightning_onebit.checkpoint import CHECKPOINT_KEY
from lightning_onebit.optim import parameters_of

WARMUP, COMPRESSED = Phase.WARMUP, Phase.COMPRESSED
BATCHES = 30
FREEZE = 10


class Stepwise(Classifier):
    """Data by step: Lightning does not fast-forward a loader when it resumes within an epoch."""

    def training_step(self, batch, batch_idx):
        return super().training_step(self.batch(batch_idx), batch_idx)

    def batch(self, batch_idx):
        generator = torch.Generator().manual_seed(1000 * self.global_rank + batch_idx)
        x = torch.randn(8, 12, generator=generator)
        return x, x.argmax(1) % 5


class SaveAt(pl.Callback):
    """Saves after a number of batches, on all ranks, and keeps what the strategy had outstanding."""

    def __init__(self, path, batch):
        self.path, self.batch, self.outstanding = path, batch, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.batch:
            trainer.save_checkpoint(self.path)
            compressed = getattr(trainer.strategy, "_compressed", None)
            if compressed:
                self.outstanding = list(compressed[trainer.optimizers[0]].outstanding().values())


def run(world_size, **kwargs):
    callbacks = [PhaseSwitch(FixedStep(FREEZE)), *kwargs.pop("callbacks", [])]
    return fit("onebit_ddp", world_size, batches=BATCHES, callbacks=callbacks, model=Stepwise(), **kwargs)


def test_the_criterion_goes_on_with_its_history(tmp_path):
    """The moment of the switch depends on it."""
    path = tmp_path / "warmup.ckpt"

    def switch():
        return PhaseSwitch(VarianceStability(tolerance=0.9, window=8, patience=2, min_steps=0, max_steps=None))

    def fn(rank):
        options = {"strategy": "onebit_ddp", "world_size": 2, "batches": BATCHES}
        full = fit(callbacks=[switch(), SaveAt(path, 7)], model=Stepwise(), **options)[1]
        resumed = fit(callbacks=[switch()], model=Stepwise(), ckpt_path=path, **options)[1]
        assert COMPRESSED in full.phases
        assert resumed.phases == full.phases[7:]
        assert same_params(resumed.params, full.params[7:])

    run_trainers(2, fn)


class Late(Stepwise):
    """Feature 0 is zero until after the freeze, and so are the gradients of its weights: late coordinates."""

    def batch(self, batch_idx):
        x, y = super().batch(batch_idx)
        x[:, 0] *= batch_idx >= FREEZE + 4
        return x, y


def everything(strategy):
    """All that a compressed step reads and writes, on this rank."""
    state = []
    for optimizer, compressed in strategy._compressed.items():
        state += [run.values for run in (*compressed.worker_errors(), *compressed.server_errors())]
        state += [value for p in parameters_of(optimizer) for value in optimizer.state[p].values()]
        for pipeline in compressed._pipelines:
            for bucket in pipeline._buckets:
                state += [each for index in range(len(bucket.live)) for each in bucket.result(index)]
                state += bucket.live
    return [torch.tensor(()) if each is None else each.clone() for each in state]


class Everything(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        self.state = everything(trainer.strategy)


def same_bits(first, second):
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def check_bitwise_resumes(rank, tmp_path, world_size, saves, make_model=Late, num_nodes=1, strategy=None, **kwargs):
    """One run that saves after some batches, and runs that resume there: parameters, phases and all state are the same."""
    options = {"world_size": world_size, "batches": BATCHES, "num_nodes": num_nodes, **kwargs}

    def run(callbacks=(), ckpt_path=None):
        last = Everything()
        own = OneBitDDPStrategy(**(strategy or {}))
        switch = PhaseSwitch(FixedStep(FREEZE))
        callbacks = [switch, last, *callbacks]
        _, recorder = fit(own, callbacks=callbacks, model=make_model(), ckpt_path=ckpt_path, **options)
        return recorder, last.state

    full, last = run([SaveAt(tmp_path / f"{k}.ckpt", k) for k in saves])
    assert len(last) > 10
    for k in saves:
        resumed, resumed_last = run(ckpt_path=tmp_path / f"{k}.ckpt")
        assert resumed.phases == full.phases[k:], k
        pairs = enumerate(zip(resumed.params, full.params[k:], strict=True), start=k)
        different = [batch for batch, (a, b) in pairs if not same_params([a], [b])]
        assert not different, (k, different)
        assert all(same_bits(a, b) for a, b in zip(resumed_last, last, strict=True)), k
    return full.params[-1]


SAVES = (3, FREEZE - 1, FREEZE, FREEZE + 1, FREEZE + 5, 20, BATCHES - 1)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("options", [{}, {"space": "momentum"}, {"overlap": True, "bucket_cap_mb": 0.002, "block_size": 64}])
def test_resuming_is_bitwise(tmp_path, world_size, options):
    """In both phases, across the switch, with several buckets, and with coordinates whose first gradient comes late."""
    results = run_trainers(world_size, check_bitwise_resumes, tmp_path, world_size, SAVES, Late, 1, options)
    assert all(same_params([result], [results[0]]) for result in results)


def test_checkpoint_is_an_ordinary_one(tmp_path):
    """It loads with torch's safe loader, into plain DDP with a stock Adam, and a plain one loads here."""
    path, dense_path = tmp_path / "compressed.ckpt", tmp_path / "dense.ckpt"

    def fn(rank):
        run(2, callbacks=[SaveAt(path, 20)])
        loaded = torch.load(path, weights_only=True)
        assert loaded[CHECKPOINT_KEY]["version"] == 1
        state = loaded["optimizer_states"][0]["state"]
        assert all(set(entry) == {"step", "exp_avg", "exp_avg_sq"} for entry in state.values())
        dense = fit("ddp", 2, batches=BATCHES, ckpt_path=path)[1]
        assert len(dense.params) == 10
        assert all(torch.isfinite(p).all() for p in dense.params[-1])

        fit("ddp", 2, batches=BATCHES, callbacks=[SaveAt(dense_path, 5)])
        trainer, recorder = run(2, ckpt_path=dense_path)
        assert trainer.strategy.optimizer_steps == BATCHES
        assert recorder.phases[:6] == [WARMUP] * 4 + [COMPRESSED] * 2

    run_trainers(2, fn)


def test_model_checkpoint_saves_and_a_weights_only_file_has_no_extra_state(tmp_path):
    def fn(rank):
        full = pl.callbacks.ModelCheckpoint(tmp_path / "full", every_n_train_steps=7, save_top_k=-1)
        small = pl.callbacks.ModelCheckpoint(tmp_path / "small", save_weights_only=True)
        run(2, callbacks=[full, small], enable_checkpointing=True)

    run_trainers(2, fn)
    saved = {path.name: torch.load(path, weights_only=True) for path in (tmp_path / "full").iterdir()}
    assert len(saved) == 4
    assert [CHECKPOINT_KEY in saved[name] for name in sorted(saved, key=lambda n: saved[n]["global_step"])] == [
        False,
        True,
        True,
        True,
    ]
    (small,) = (tmp_path / "small").iterdir()
    assert CHECKPOINT_KEY not in torch.load(small, weights_only=True)


def test_saving_after_an_exception_does_not_wait_for_the_other_ranks(tmp_path):
    path = tmp_path / "failed.ckpt"

    class SaveOnOneRank(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 20 and trainer.global_rank == 0:
                trainer.state.status = TrainerStatus.INTERRUPTED
                with pytest.warns(UserWarning, match="does not hold the errors"):
                    trainer.strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(), path)
                trainer.state.status = TrainerStatus.RUNNING

    def fn(rank):
        run(2, callbacks=[SaveOnOneRank()])
        assert set(run(2, ckpt_path=path)[1].phases) == {COMPRESSED}

    run_trainers(2, fn)


def test_foreign_version_is_refused(tmp_path):
    path = tmp_path / "compressed.ckpt"

    def fn(rank):
        run(2, callbacks=[SaveAt(path, 20)])
        if rank == 0:
            checkpoint = torch.load(path, weights_only=True)
            checkpoint[CHECKPOINT_KEY]["version"] = 99
            torch.save(checkpoint, path)
        torch.distributed.barrier()
        with pytest.raises(ValueError, match="version 99, but this is version 1"):
            run(2, ckpt_path=path)

    run_trainers(2, fn)


def test_schedulers_by_epoch_do_not_complain_after_a_resume(tmp_path):
    """The first step that a resumed run makes is a compressed one; the scheduler must notice it."""
    path = tmp_path / "compressed.ckpt"

    def configure(module):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def fn(rank):
        options = {"strategy": "onebit_ddp", "world_size": 2, "batches": BATCHES, "configure": configure}
        fit(callbacks=[PhaseSwitch(FixedStep(FREEZE)), SaveAt(path, 20)], **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
            trainer, recorder = fit(callbacks=[PhaseSwitch(FixedStep(FREEZE))], ckpt_path=path, **options)
        assert set(recorder.phases) == {COMPRESSED}
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3)

    run_trainers(2, fn)


def test_rolling_back_to_a_checkpoint_of_the_warmup_leaves_the_compressed_phase():
    """As the learning-rate finder does, which saves, trains and restores."""

    class RollBack(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx + 1 == 5:
                states = [optimizer.state_dict() for optimizer in trainer.optimizers]
                self.checkpoint = copy.deepcopy({"optimizer_states": states})
            if batch_idx + 1 == 20:
                assert trainer.strategy.phase is COMPRESSED
                trainer.strategy.load_optimizer_state_dict(self.checkpoint)
                assert trainer.strategy.phase is WARMUP
                assert trainer.strategy.optimizer_steps == 5
                state = trainer.optimizers[0].state_dict()["state"]
                for index, entry in self.checkpoint["optimizer_states"][0]["state"].items():
                    assert all(torch.equal(value, state[index][key]) for key, value in entry.items())

    def fn(rank):
        _, recorder = run(2, callbacks=[RollBack()])
        # Step 10 is reached again five batches later.
        assert recorder.phases[19:] == [WARMUP] * 5 + [COMPRESSED] * 6
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)
