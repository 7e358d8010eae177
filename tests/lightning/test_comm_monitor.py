"""What CommMonitor logs, by which step and to whom, what it shows in progress bars, and its picture."""

import csv
import importlib.util
import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from ranks import run_trainers
from trainers import Classifier, fit

from lightning_onebit import CommMonitor, FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch, VarianceStability
from lightning_onebit.comm.stats import PhaseCounters
from lightning_onebit.config import MEBIBYTE
from lightning_onebit.consistency.agreement import RanksDisagree
from lightning_onebit.lightning.callbacks import comm_monitor, monitor_plot

FREEZE = 12
PHASES = ("warmup", "compressed")


class Rows(pl.loggers.CSVLogger):
    """Keeps what is logged, and by which step."""

    def __init__(self, path):
        super().__init__(path)
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


class WithoutStep(pl.loggers.Logger):
    """Takes no step, and nothing but scalars."""

    name, version = "without", 0

    def __init__(self):
        self.rows = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics):
        assert all(isinstance(value, float) for value in metrics.values())
        self.rows.append(metrics)


class Silent(Classifier):
    """Logs nothing, as Lightning itself insists on a step."""

    def log(self, *args, **kwargs):
        pass


def ours(rows):
    return [(step, metrics) for step, metrics in rows if "onebit/sent_mib" in metrics]


def mebibytes(nbytes):
    """But for a few bytes: ranks agree once more when the last row is written."""
    return pytest.approx(nbytes / MEBIBYTE, abs=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rows_are_lightnings_own_and_tell_what_was_sent_received_and_hidden_by_phase(tmp_path, accumulate):
    """28 steps in 4 epochs of 7, an entry each 10: those of Lightning, and one for the rest."""

    def fn(rank):
        logger = Rows(tmp_path / str(rank))
        callbacks = [PhaseSwitch(FixedStep(FREEZE)), CommMonitor()]
        options = {"max_epochs": 4, "log_every_n_steps": 10, "accumulate_grad_batches": accumulate, "logger": logger}
        trainer, _ = fit("onebit_ddp", 2, batches=7 * accumulate, callbacks=callbacks, **options)
        return logger.rows, trainer.strategy.comm_stats

    results = run_trainers(2, fn)
    for rows, stats in results:
        steps = [step for step, metrics in rows if "train_loss" in metrics]
        rows = ours(rows)
        assert sorted({*steps, 27}) == [step for step, _ in rows] == [9, 19, 27]

        def total(name, rows=rows):
            return sum(metrics.get(f"onebit/{name}", 0.0) for _, metrics in rows)

        warmup, compressed = stats[Phase.WARMUP], stats[Phase.COMPRESSED]
        assert total("sent_mib") == mebibytes(stats.bytes_sent)
        assert total("received_mib") == mebibytes(stats.bytes_received)
        assert total("dense_equivalent_mib") == 2 * total("dense_equivalent_16bit_mib")
        assert total("dense_equivalent_mib") == mebibytes(stats.dense_equivalent_bytes)
        assert total("refresh_mib") == mebibytes(stats.refresh_bytes_sent)
        assert total("sketch_mib") == mebibytes(stats.sketch_bytes_sent)
        assert total("dense_mib") == mebibytes(warmup.dense_bytes_sent)
        assert min(stats.refresh_bytes_sent, stats.sketch_bytes_sent, warmup.dense_bytes_sent) > 0
        assert warmup.dense_bytes_sent == warmup.dense_equivalent_bytes
        assert compressed.dense_bytes_sent == warmup.baseline_bytes_sent == 0
        kinds = sum(total(f"{kind}_mib") for kind in ("sign", "refresh", "sketch", "dense"))
        assert kinds == mebibytes(stats.bytes_sent - warmup.sign_bytes_sent)
        assert 0 < total("sign_mib") < compressed.bytes_sent / MEBIBYTE
        assert 0 < total("seconds_waited") <= stats.seconds_waited  # the ranks agree once more at the end
        *first, last = [metrics for _, metrics in rows]
        assert "onebit/share_hidden" not in first[0]
        assert 0 <= last["onebit/share_hidden"] < 1
        assert all(metrics["onebit/step_seconds"] > 0 for _, metrics in rows)
        for phase in Phase:
            counters, prefix = stats[phase], f"onebit/{phase.value}/total_"
            assert last[f"{prefix}steps"] == counters.steps
            assert last[f"{prefix}sent_mib"] == mebibytes(counters.bytes_sent)
            assert last[f"{prefix}received_mib"] == mebibytes(counters.bytes_received)
            assert last[f"{prefix}dense_equivalent_16bit_mib"] == mebibytes(counters.dense_equivalent_bytes / 2)
            assert 0 <= last[f"{prefix}seconds_waited"] <= counters.seconds_waited
        waited = sum(last[f"onebit/{phase}/total_seconds_waited"] for phase in PHASES)
        assert waited == pytest.approx(total("seconds_waited"))
        seconds = sum(last[f"onebit/{phase}/total_seconds"] for phase in PHASES)
        in_rows = sum(10 * metrics["onebit/step_seconds"] for metrics in first) + 8 * last["onebit/step_seconds"]
        assert in_rows / 2 < seconds <= in_rows  # which go on to the end of training
    # Of all ranks: the same on both, and what each says of itself put together.
    for (_, one), (_, other) in zip(*(ours(rows) for rows, _ in results), strict=True):
        both = one["onebit/all_ranks/sent_mib"], other["onebit/all_ranks/sent_mib"]
        assert both[0] == both[1] == pytest.approx(one["onebit/sent_mib"] + other["onebit/sent_mib"])
        longest = max(one["onebit/seconds_waited"], other["onebit/seconds_waited"])
        for each in (one, other):
            assert each["onebit/all_ranks/longest_wait_seconds"] == pytest.approx(longest)


def test_seconds_belong_to_the_phase_of_their_step(tmp_path, monkeypatch):
    """Whichever callback comes first, and although one entry covers both phases. By a clock that training steps move."""
    now = 0.0

    class Takes(Classifier):
        def training_step(self, batch, batch_idx):
            nonlocal now
            now += 4.0 if self.trainer.strategy.phase is Phase.WARMUP else 1.0
            return super().training_step(batch, batch_idx)

    def fn(rank):
        monkeypatch.setattr(comm_monitor, "time", SimpleNamespace(perf_counter=lambda: now))
        logger = Rows(tmp_path / str(rank))
        fit("onebit_ddp", 2, callbacks=[CommMonitor(), PhaseSwitch(FixedStep(3))], model=Takes(), logger=logger)
        return ours(logger.rows)

    for rows in run_trainers(2, fn):
        ((_, metrics),) = rows
        assert metrics["onebit/warmup/total_steps"] == 3
        assert metrics["onebit/warmup/total_seconds"] == 3 * 4.0
        assert metrics["onebit/compressed/total_seconds"] == metrics["onebit/compressed/total_steps"] > 0


def test_totals_go_on_after_a_resume(tmp_path):
    def fn(rank):
        def go(epochs, ckpt_path=None):
            logger = Rows(tmp_path / str(rank))
            callbacks = [PhaseSwitch(FixedStep(FREEZE)), CommMonitor(4)]
            trainer, _ = fit(
                "onebit_ddp", 2, batches=10, callbacks=callbacks, max_epochs=epochs, logger=logger, ckpt_path=ckpt_path
            )
            return trainer, [metrics for _, metrics in ours(logger.rows)]

        trainer, first = go(2)
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        resumed, again = go(3, tmp_path / "model.ckpt")
        return first[-1], again, trainer.strategy.report(), resumed.strategy.report()

    for last, again, report, resumed_report in run_trainers(2, fn):
        assert "resumed" not in report
        assert "since the run was resumed; 20 steps before are not in it" in resumed_report
        for kind in ("sent", "received", "dense_equivalent"):
            total = last[f"onebit/total_{kind}_mib"] + sum(metrics[f"onebit/{kind}_mib"] for metrics in again)
            assert again[-1][f"onebit/total_{kind}_mib"] == pytest.approx(total, abs=1e-4)
            assert total > last[f"onebit/total_{kind}_mib"] + 0.01
        assert [again[-1][f"onebit/{phase}/total_steps"] for phase in PHASES] == [FREEZE, 30 - FREEZE]
        # Those of rank 0: a checkpoint has its alone.
        assert again[-1]["onebit/warmup/total_seconds"] == pytest.approx(last["onebit/warmup/total_seconds"], rel=0.3)
        assert again[-1]["onebit/compressed/total_seconds"] > last["onebit/compressed/total_seconds"]


def test_any_logger_will_do_also_one_that_takes_no_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

    def fn(rank):
        without = WithoutStep()
        board = pl.loggers.TensorBoardLogger(tmp_path, name="board", version="")
        loggers = [pl.loggers.CSVLogger(tmp_path, name="", version=""), without, board]
        callbacks = [CommMonitor(5), PhaseSwitch(FixedStep(7))]
        fit("onebit_ddp", 2, callbacks=callbacks, model=Silent(), logger=loggers)
        return without.rows

    for rank, rows in enumerate(run_trainers(2, fn)):
        assert [row["step"] for row in rows] == [4, 9]
        if rank == 0:
            with (tmp_path / "metrics.csv").open() as file:
                written = list(csv.DictReader(file))
            assert [row["step"] for row in written] == ["4", "9"]
            for row, same in zip(rows, written, strict=True):
                for name in ("onebit/sent_mib", "onebit/compressed/total_sent_mib", "onebit/all_ranks/sent_mib"):
                    assert float(same[name] or math.nan) == pytest.approx(row.get(name, math.nan), nan_ok=True)
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.step for event in board.Scalars("onebit/sent_mib")] == [4, 9]


class Shows:
    """Notes what a bar of Lightning's gets to show, batch by batch."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        super().on_train_batch_end(trainer, pl_module, *args)
        self.shown = [*getattr(self, "shown", []), self.get_metrics(trainer, pl_module)]


def test_bars_show_what_the_criterion_sees_and_then_the_saving():
    def fn(rank, base):
        bar = type("Bar", (Shows, base), {})()
        frozen = OneBitDDPStrategy(variance_refresh=None)  # in a model as small as this, refreshes are most of the bytes
        criteria = VarianceStability(max_steps=5, tolerance=1e-9, window=3, min_steps=3), FixedStep(5)
        shown = []
        for strategy, criterion in zip((OneBitDDPStrategy(), frozen), criteria, strict=True):
            callbacks = [CommMonitor(2), bar, PhaseSwitch(criterion)]
            fit(strategy, 2, callbacks=callbacks, enable_progress_bar=True)
            shown.append(bar.shown)
            bar.shown = []
        return shown

    for base in (pl.callbacks.TQDMProgressBar, pl.callbacks.RichProgressBar):
        (judged, fixed), _ = run_trainers(2, fn, base)
        assert fixed[0]["warmup"] == "by 5"
        words = [shown["warmup"] for shown in judged if "warmup" in shown]
        assert 4 <= len(words) <= 5
        assert any(word.startswith("rho ") and word.endswith(", by 5") for word in words)
        assert not any("less_sent" in shown for shown in judged[:4])
        for shown in (judged, fixed):
            assert "warmup" not in shown[-1]
        assert fixed[-1]["less_sent"] > 3


def test_one_picture_is_drawn_at_the_end(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def fn(rank):
        monitor = CommMonitor(3, plot=tmp_path / "new" / "run.png")
        save, drawn = monitor_plot.MonitorPlot.save, []

        def noted(plot):
            drawn.extend(plot.points)
            save(plot)

        monkeypatch.setattr(monitor_plot.MonitorPlot, "save", noted)
        fit("onebit_ddp", 2, callbacks=[monitor, PhaseSwitch(FixedStep(4))])
        return [tuple(vars(point).values()) for point in drawn]

    points, of_other = run_trainers(2, fn)
    assert not of_other
    steps, compressed, losses, sent, dense, seconds = zip(*points, strict=True)
    assert steps == (2, 5, 8, 9)
    assert compressed == (False, True, True, True)
    assert all(0 < loss < 5 for loss in losses[:3])
    assert math.isnan(losses[3])  # of the rest, when the batch is over
    assert sent[0] == pytest.approx(dense[0], rel=0.1)
    assert min(seconds) > 0
    assert (tmp_path / "new" / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("plot", "error", "message"),
    [
        (True, TypeError, "Invalid plot: True. Must be the path of a picture"),
        ("run", ValueError, "Invalid plot: 'run'"),
        ("run.xyz", ValueError, "Formats: .*png"),
        ("", ValueError, "Invalid plot: ''"),
    ],
)
def test_what_is_no_path_of_a_picture_is_refused(plot, error, message):
    pytest.importorskip("matplotlib")
    with pytest.raises(error, match=message):
        CommMonitor(plot=plot)


def test_what_is_no_switch_of_the_progress_bar_is_refused():
    with pytest.raises(TypeError, match=r"Invalid progress_bar: 'no'\. Must be True or False"):
        CommMonitor(progress_bar="no")


def test_without_matplotlib_a_picture_is_refused_at_once_and_one_that_cannot_be_written_is_warned_of(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    plot = monitor_plot.MonitorPlot(tmp_path / "file" / "run.png")
    plot.points.append(monitor_plot.Point(0, False, 1.0, 1.0, 1.0, 1.0))
    with pytest.warns(UserWarning, match="CommMonitor could not write plot="):
        plot.save()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs matplotlib, which is not installed"):
        CommMonitor(plot="run.png")


def test_what_was_hidden_and_what_were_signs():
    counters = PhaseCounters(seconds_waited=1.0, seconds_exchanging=4.0, bytes_sent=10, refresh_bytes_sent=2)
    more = counters + PhaseCounters(seconds_waited=1.0, seconds_exchanging=4.0, bytes_sent=10, sketch_bytes_sent=3)
    assert (counters.share_hidden, counters.sign_bytes_sent, more.share_hidden, more.sign_bytes_sent) == (0.75, 8, 0.75, 15)
    assert more - counters == PhaseCounters(seconds_waited=1.0, seconds_exchanging=4.0, bytes_sent=10, sketch_bytes_sent=3)
    assert math.isnan(PhaseCounters().share_hidden)
    assert PhaseCounters(seconds_waited=2.0, seconds_exchanging=1.0).share_hidden == 0


def test_a_rank_without_the_callback_is_told_of_before_any_waits_for_it():
    def fn(rank):
        with pytest.raises(RanksDisagree, match="entries of CommMonitor"):
            fit("onebit_ddp", 2, callbacks=[CommMonitor()] if rank == 0 else [])

    run_trainers(2, fn)
