"""Drift in a Trainer: what is logged and warned of; a refresh that user code asks for."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from ranks import run_trainers
from test_strategy import Messages
from trainers import Classifier, fit

from lightning_onebit import CommMonitor, FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch

WARMUP_STEPS, GROWS_AT, STEPS = 12, 30, 100


class Growing(Classifier):
    """Its loss becomes 16 times as large."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (16.0 if self.trainer.global_step >= GROWS_AT else 1.0)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-4, betas=(0.9, 0.99))


class Quiet(Growing):
    def training_step(self, batch, batch_idx):
        return super(Growing, self).training_step(batch, batch_idx)


class Notes(DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        if "onebit/sent_mib" in metrics:
            self.rows.append((step, metrics))


class Refresh(pl.Callback):
    """Asks for a refresh, and notes v before and after."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        strategy = trainer.strategy
        if batch_idx + 1 == WARMUP_STEPS // 2:
            with pytest.raises(RuntimeError, match="in warm-up"):
                strategy.refresh_variance()
        if batch_idx + 1 == STEPS - 10:
            self.before = self.second_moment(trainer)
            strategy.refresh_variance()
            self.after = self.second_moment(trainer)
            strategy.check_ranks_agree()

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == STEPS - 5:
            with pytest.raises(RuntimeError, match="waiting for a step"):
                trainer.strategy.refresh_variance()

    @staticmethod
    def second_moment(trainer):
        state = trainer.optimizers[0].state_dict()["state"]
        return torch.cat([entry["exp_avg_sq"].flatten() for entry in state.values()])


def train(model, *callbacks, refresh=None):
    """Rows that were logged, and warnings of drift."""
    logger = Notes()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callbacks = [PhaseSwitch(FixedStep(WARMUP_STEPS)), CommMonitor(20), *callbacks]
        strategy = OneBitDDPStrategy(variance_refresh=refresh, block_size=64)
        trainer, _ = fit(strategy, 2, batches=STEPS, model=model, callbacks=callbacks, logger=logger)
    assert trainer.strategy.phase is Phase.COMPRESSED
    drift = trainer.strategy.variance_drift() or None
    said = [str(w.message) for w in caught if "second moment is frozen, and" in str(w.message)]
    return logger.rows, said, drift, trainer.strategy.comm_stats


def test_drift_is_logged_and_warned_of_once_with_names():
    def fn(rank):
        rows, said, *_ = train(Growing())
        _, said_in_quiet, *_ = train(Quiet())
        return rows, said, said_in_quiet

    (rows, said, quiet), (others_rows, others_said, _) = run_trainers(2, fn)
    assert len(said) == 1
    assert "PhaseSwitch: the second moment is frozen" in said[0]
    assert any(name in said[0] for name in ("'body.0.weight'", "'body.2.weight'", "'head.weight'", ".bias'"))
    assert "variance_refresh='auto'" in said[0]
    assert not others_said
    assert not quiet
    assert [step for step, _ in rows] == [19, 39, 59, 79, 99]
    first, *_, last = (metrics for _, metrics in rows)
    for name in ("drift_max", "drift_min", "clamped_share", "error_over_update", "refresh_mib", "sketch_mib"):
        assert f"onebit/{name}" in first, name
    assert 0.2 < first["onebit/drift_min"] <= first["onebit/drift_max"] < 5
    assert 50 < last["onebit/drift_min"] <= last["onebit/drift_max"] < 1000
    assert 0 < last["onebit/sketch_mib"] < last["onebit/sent_mib"]
    assert last["onebit/refresh_mib"] == 0
    assert 0.1 < last["onebit/error_over_update"] < 10
    assert "onebit/drift_max" not in others_rows[-1][1]


def test_with_refreshes_d_follows_and_a_refresh_can_be_asked_for():
    def fn(rank):
        refresh = Refresh()
        rows, said, _, stats = train(Growing(), refresh, refresh=80)
        assert not said
        for name in ("bytes_sent", "refresh_bytes_sent", "sketch_bytes_sent"):
            logged = {"bytes_sent": "sent", "refresh_bytes_sent": "refresh", "sketch_bytes_sent": "sketch"}[name]
            assert sum(m[f"onebit/{logged}_mib"] for _, m in rows) * 2**20 <= getattr(stats, name)
        assert sum(m["onebit/refresh_mib"] for _, m in rows) > 0
        return refresh.before, refresh.after

    (before, after), (others_before, others_after) = run_trainers(2, fn)
    assert torch.equal(before, others_before)
    assert torch.equal(after, others_after)
    assert not torch.equal(before, after)


def test_without_refreshes_one_that_is_asked_for_comes_after_16_steps():
    """Gradients have become 16 times as large after the freeze; the frozen second moment fits again then. In momentum space
    it is refused, with the reason."""

    class Ask(pl.Callback):
        def __init__(self):
            self.history = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx + 1 == GROWS_AT:
                trainer.strategy.refresh_variance()
                trainer.strategy.check_ranks_agree()
            if GROWS_AT <= batch_idx + 1 <= GROWS_AT + 17:
                (compressed,) = trainer.strategy._phases.compressed.values()
                rms = [m.rms.clone() for each in compressed._sets for m in each.buckets.memories]
                self.history.append(torch.cat(rms))

    class Refused(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx + 1 == WARMUP_STEPS + 1:
                with pytest.raises(RuntimeError, match=r"space='momentum', where .* change their meaning.*space='update'"):
                    trainer.strategy.refresh_variance()

    def fn(rank):
        ask = Ask()
        with Messages() as messages:
            rows, _, _, stats = train(Growing(), ask)
        assert messages.count("collected from now on, and renews the frozen one after 16 optimizer steps") == (rank == 0)
        assert stats.refresh_bytes_sent > 0
        strategy = OneBitDDPStrategy(variance_refresh=None, space="momentum")
        fit(strategy, 2, batches=WARMUP_STEPS + 2, callbacks=[PhaseSwitch(FixedStep(WARMUP_STEPS)), Refused()])
        return ask.history, rows

    (history, rows), (others, _) = run_trainers(2, fn)
    assert all(torch.equal(a, b) for a, b in zip(history, others, strict=True))
    assert all(torch.equal(each, history[0]) for each in history[1:16])
    assert torch.equal(history[16], history[17])
    assert 10 < (history[16] / history[0]).nanmedian() < 25
    last = rows[-1][1]
    assert 0.3 < last["onebit/drift_min"] <= last["onebit/drift_max"] < 3  # 50 and more without


@pytest.mark.parametrize("ends_by", ["replaced state", "warm-up"])
def test_what_is_collected_is_over_with_the_state_that_it_was_for(ends_by):
    """Training goes on, alike on all ranks, and another refresh can be asked for."""

    class End(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            strategy, (optimizer,) = trainer.strategy, trainer.optimizers
            if batch_idx + 1 in (10, 25):
                strategy.refresh_variance()
            if batch_idx + 1 in (15, 40):
                (compressed,) = strategy._phases.compressed.values()
                assert compressed.is_collecting
            if batch_idx + 1 == 15:
                if ends_by == "warm-up":
                    strategy.resume_warmup()
                else:
                    optimizer.load_state_dict(optimizer.state_dict())
            if batch_idx + 1 == 20 and ends_by == "warm-up":
                strategy.freeze_variance()
            if batch_idx + 1 in (16, 24, 41):
                assert not any(c.is_collecting for c in strategy._phases.compressed.values())
            strategy.check_ranks_agree()

    def fn(rank):
        strategy = OneBitDDPStrategy(variance_refresh=None)
        return fit(strategy, 2, batches=45, callbacks=[PhaseSwitch(FixedStep(8)), End()])[1].params[-1]

    first, second = run_trainers(2, fn)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, second, strict=True))
