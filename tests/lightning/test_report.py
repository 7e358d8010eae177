"""What a run says of itself: the report at its end, measured seconds, advice, and what is timed for it."""

import itertools
import re
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric import Fabric
from ranks import run_ranks, run_trainers
from test_strategy import Messages
from trainers import Classifier, adam, data, fit, same_params

from lightning_onebit import (
    FixedStep,
    OneBitDDPFabricStrategy,
    OneBitDDPStrategy,
    Phase,
    PhaseSwitch,
    VarianceStability,
)
from lightning_onebit.comm.stats import CommStats, PhaseCounters
from lightning_onebit.config import MEBIBYTE, CompressionConfig
from lightning_onebit.lightning import baseline, dense_comparison
from lightning_onebit.lightning.dense_comparison import DenseComparison
from lightning_onebit.lightning.report import no_steps, step_time
from lightning_onebit.lightning.report import report as report_at_the_end

DENSE_STEPS = 12


class Sleeps(Classifier):
    """Takes so long in either phase, and a second more for the first step of each."""

    def __init__(self, *, dense, compressed, first=0.0):
        super().__init__(hidden=128)
        self.seconds = {Phase.WARMUP: dense, Phase.COMPRESSED: compressed}
        self.first = first

    def training_step(self, batch, batch_idx):
        time.sleep(self.seconds[self.trainer.strategy.phase] + self.first * (batch_idx in (0, DENSE_STEPS)))
        return super().training_step(batch, batch_idx)


def report_of(model, *, criterion=None, batches=30, **options):
    with Messages() as messages, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callbacks = [PhaseSwitch(criterion or FixedStep(DENSE_STEPS))]
        trainer, recorder = fit(OneBitDDPStrategy(), 2, batches=batches, callbacks=callbacks, model=model, **options)
    advice = [text for w in caught if "compressed steps: " in (text := str(w.message))]
    return trainer, recorder, [text for text in messages.texts if "what this run sent" in text], advice


def test_the_report_tells_bytes_and_seconds_by_phase_and_a_slow_first_step_changes_nothing():
    def fn(rank):
        trainer, _, reports, _ = report_of(Sleeps(dense=0.15, compressed=0.02, first=0.5))
        return reports, trainer.strategy.report(), trainer.strategy.comm_stats

    (reports, text, stats), (of_other, *_) = run_trainers(2, fn)
    assert not of_other
    assert stats[Phase.WARMUP].baseline_bytes_sent == 0
    assert len(reports) == 1
    assert reports[0].endswith(text)
    header, warmup, compressed, whole, *said = text.splitlines()
    assert header.split()[:2] == ["steps", "MiB"]
    for line, name, counters in (
        (warmup, "warmup", stats[Phase.WARMUP]),
        (compressed, "compressed", stats[Phase.COMPRESSED]),
        (whole.replace("in all", "all"), "all", stats),
    ):
        words = line.split()
        dense = counters.dense_equivalent_bytes / MEBIBYTE
        assert words[:2] == [name, str(counters.steps)]
        assert words[2:5] == [f"{counters.bytes_sent / MEBIBYTE:.1f}", f"{dense:.1f}", f"{dense / 2:.1f}"]
    assert [stats[phase].steps for phase in Phase] == [DENSE_STEPS, 30 - DENSE_STEPS]
    medians = [float(line.split()[5]) for line in (warmup, compressed)]
    assert 150 < medians[0] < 490  # of the first steps, 650 and 520
    assert 20 < medians[1] < 400
    assert (
        said[0] == f"Compressed after optimizer step {DENSE_STEPS}: {DENSE_STEPS} of {DENSE_STEPS} warm-up steps are done."
    )
    assert f"{stats.dense_equivalent_bytes / stats.bytes_sent:.1f} times fewer bytes" in said[1]
    speedup = float(said[2].removeprefix("Speed-up: ").split(",")[0])
    assert speedup == pytest.approx(medians[0] / medians[1], rel=0.01)


def test_what_does_not_pay_is_said_during_the_run_and_at_its_end_with_what_to_do():
    def fn(rank):
        trainer, _, _, advice = report_of(Sleeps(dense=0.01, compressed=0.05))
        return trainer.strategy.report(), advice

    (text, advice), (of_other, none) = run_trainers(2, fn)
    for report in (text, of_other):
        *_, said = report.splitlines()
        assert said.startswith("Speed-up: none. Steps are ")
        assert "stay with strategy='ddp' here" in said
    assert not none
    assert len(advice) == 1
    assert advice[0].startswith("OneBitDDPStrategy: after the first 11 compressed steps: Speed-up: none. Steps are ")
    assert "stay with strategy='ddp' here" in advice[0]


class SlowExchange:
    """A dense exchange seems to take so many seconds, the first one a second more."""

    def __init__(self, monkeypatch, seconds):
        exchange = baseline._exchange

        def slow(*args):
            self.calls += 1
            exchange(*args)
            return seconds + (self.calls == 1)

        self.calls = 0
        monkeypatch.setattr(baseline, "_exchange", slow)


@pytest.mark.parametrize(
    ("configure", "criterion", "pays"),
    [(adam, FixedStep(9), True), (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), VarianceStability(), False)],
    ids=["short warm-up", "begins compressed"],
)
def test_with_too_few_dense_steps_dense_exchanges_are_timed_and_nothing_else_changes(
    monkeypatch, configure, criterion, pays
):
    def fn(rank):
        def model(**seconds):
            model = Sleeps(**seconds)
            model.configure = configure
            return model

        exchange = SlowExchange(monkeypatch, 0.2 if pays else 0.0)
        slow = model(dense=0.01, compressed=0.02, first=0.5)
        trainer, recorder, _, advice = report_of(slow, criterion=criterion)
        assert exchange.calls == 4
        monkeypatch.setattr(dense_comparison, "time_dense_exchanges", lambda *_, **__: None)
        without, other, _, _ = report_of(model(dense=0.0, compressed=0.0), criterion=criterion)
        assert same_params(recorder.params, other.params)
        numel = sum(p.numel() for p in slow.parameters())
        return trainer.strategy.report(), trainer.strategy.comm_stats, without.strategy.comm_stats, numel, advice

    (*first, advice), (*second, none) = run_trainers(2, fn)
    for text, stats, without, numel in (first, second):
        timed = stats[Phase.WARMUP].baseline_bytes_sent
        assert timed == 4 * 4 * numel  # two ranks: each sends as much as there is
        assert stats[Phase.WARMUP].bytes_sent == without[Phase.WARMUP].bytes_sent + timed
        assert stats[Phase.COMPRESSED].bytes_sent == without[Phase.COMPRESSED].bytes_sent
        *_, bytes_timed, _, _, said = text.splitlines()
        assert bytes_timed == f"In warm-up's row are {timed / MEBIBYTE:.1f} MiB by which dense exchanges were timed."
        if pays:
            most, least = (float(said.split(f"at {which} ")[1].split(",")[0].split(":")[0]) for which in ("most", "least"))
            assert 1.5 < least < most < 15
            assert most < least + 1.0  # neither the first step nor the first exchange, a second longer, is in it
            assert "estimated, as the warm-up had fewer than 11 steps here. A compressed step took " in said
            assert "a dense exchange of the gradients 200.0 ms (median of 3, 200.0-200.0)" in said
        else:
            slower = r"(no faster than|\d+\.\d\d times as slow as) dense ones would be at most, by an estimate: "
            assert re.search(f"Speed-up: none. Steps are {slower}", said)
    assert len(advice) == (not pays)
    assert not none


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_dense_exchanges_send_what_the_warmup_would(precision, width):
    """Of float64, which is narrowed as well; several buckets of it, the last one short. Zeros: nothing is changed."""

    def fn(rank):
        gradients = [torch.full((300_000,), 1.0 + rank), torch.full((50_000,), 2.0 + rank, dtype=torch.float64)]
        counters = PhaseCounters()
        options = {"bucket_cap_mb": 0.5, "precision": precision}
        exchange = baseline.time_dense_exchanges(gradients, torch.device("cpu"), counters, **options)
        assert all(bool((g == g.flatten()[0]).all()) and float(g[0]) == i + 1 + rank for i, g in enumerate(gradients))
        return exchange, counters

    for exchange, counters in run_ranks(2, fn):
        assert exchange.bytes_sent == 300_000 * width + 50_000 * (8 if precision == "fp32" else 2)
        assert counters.bytes_sent == counters.bytes_received == counters.baseline_bytes_sent == 4 * exchange.bytes_sent
        assert counters.collectives == 4 * (3 + 1)
        assert counters.seconds_waited == 0
        assert len(exchange.seconds) == 3


def test_where_nothing_was_measured_nothing_is_told():
    """In a run that ends too soon, in warm-up, and with several optimizers: nothing is timed there."""

    class Two(Classifier):
        def __init__(self):
            super().__init__(lambda m: [torch.optim.SGD(part.parameters(), lr=0.1) for part in (m.body, m.head)])
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def fn(rank):
        reports = []
        for model, criterion, batches in (
            (Classifier(), FixedStep(9), 18),
            (Classifier(), FixedStep(9), 5),
            (Two(), VarianceStability(), 20),
        ):
            trainer, _, _, advice = report_of(model, criterion=criterion, batches=batches)
            assert not advice
            assert trainer.strategy.comm_stats[Phase.WARMUP].baseline_bytes_sent == 0
            reports.append(trainer.strategy.report())
        return reports

    for short, never, several in run_trainers(2, fn):
        assert "not measured, as the warm-up had fewer than 11 steps" in short
        assert "Speed-up" not in never
        assert "Compressed after" not in never
        assert "not measured, as the warm-up had fewer than 11 steps" in several


def test_the_first_steps_of_a_phase_are_not_timed_and_a_pause_is_one_among_many():
    assert step_time([0, 50, 60, *(61 + i for i in range(7))]) is None
    assert step_time([0, 50, 60, *(61 + i for i in range(8))]).median == 1
    assert step_time([0, 50, 60, *(61 + i for i in range(8)), 500, *(502 + i for i in range(8))]).median == 1


@pytest.mark.parametrize(
    ("dense", "compressed", "warns"),
    [
        ([1.0] * 12, [1.0] * 12, True),
        ([1.0] * 12, [0.8] * 4 + [1.1] * 4 + [1.4] * 4, False),  # the quickest quarter of the steps counts
        ([0.8] * 5 + [1.0] * 7, [0.9] * 12, False),  # beside the median of dense ones
    ],
)
def test_the_first_compressed_steps_are_warned_of_unless_the_quickest_beat_dense_ones(dense, compressed, warns):
    ends = {
        phase: list(itertools.accumulate([0.0, 50.0, 10.0, *seconds]))
        for phase, seconds in ((Phase.WARMUP, dense), (Phase.COMPRESSED, compressed))
    }
    steps = SimpleNamespace(ends=ends, waits=ends, made={"optimizer": 30}, phase=Phase.COMPRESSED)
    comparison = DenseComparison(steps, CommStats(), CompressionConfig())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        comparison.warn_if_no_faster([], torch.device("cpu"), of="Strategy")
    assert ["after the first 11 compressed steps: Speed-up: none" in str(w.message) for w in caught] == [True] * warns


def test_a_run_that_sent_more_than_plain_ddp_is_told_so():
    stats = CommStats()
    counters = stats[Phase.COMPRESSED]
    counters.steps, counters.bytes_sent, counters.dense_equivalent_bytes = 5, 300, 100
    text = report_at_the_end(stats, no_steps(), no_steps(), [], exchange=None, warmup="plain DDP", earlier_steps=0)
    assert "In all 3.0 times the bytes of DDP with float32 gradients: there is little to compress." in text


def test_fabric_reports_when_asked():
    def fn(rank):
        strategy = OneBitDDPFabricStrategy(criterion=FixedStep(DENSE_STEPS))
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        module = Classifier()
        model, optimizer = fabric.setup(module, adam(module))
        model.mark_forward_method("training_step")
        module.log = lambda *_: None
        for index, batch in enumerate(data(30)):
            fabric.backward(model.training_step(batch, index))
            optimizer.step()
            optimizer.zero_grad()
        text = strategy.report()
        strategy.teardown()
        return text

    for text in run_trainers(2, fn):
        lines = text.splitlines()
        assert lines[1].split()[:2] == ["warmup", str(DENSE_STEPS)]
        assert lines[2].split()[:2] == ["compressed", str(30 - DENSE_STEPS)]
        assert any(line.startswith("Speed-up: ") for line in lines)
