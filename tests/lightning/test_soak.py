"""benchmarks/soak.py: that it passes what is flat, and sees what is not. The long run's result is committed there."""

import importlib
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_onebit import OneBitDDPStrategy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("soak")
    monkeypatch.setattr(module, "exit_on_sigterm", lambda: None)
    monkeypatch.setattr(module, "WARMUP_STEPS", 20)
    yield module
    for name in ("soak", "lab", "report"):
        sys.modules.pop(name, None)


def samples(soak, count=80, **growth):
    """What an allocator does: noise, and jumps of a MiB; and ``growth`` per sample, of 100 steps each."""
    noise = random.Random(0)
    flat = [
        soak.Sample(
            step=100 * i,
            rss_kib=300_000 + noise.gauss(0, 40) + 1024 * (i > 30) - 1024 * (i > 60) - 5000 * math.exp(-i / 5),
            blocks=200_000 + noise.randrange(50),
            descriptors=30 + noise.randrange(2),
            threads=9,
            checkpoints=2,
        )
        for i in range(count)
    ]
    return [replace(s, **{name: getattr(s, name) + each * i for name, each in growth.items()}) for i, s in enumerate(flat)]


def test_noise_and_jumps_are_no_growth(soak):
    assert soak.complaints(samples(soak), memory_bound_kib=32, blocks_bound=100) == []


@pytest.mark.parametrize(
    ("growth", "text"),
    [
        ({"rss_kib": 8}, "KiB per 1000 steps; allowed are 32"),  # 80 bytes per step
        ({"blocks": 20}, "blocks per 1000 steps; allowed are 100"),
        ({"descriptors": 0.1}, "descriptors grow"),
        ({"threads": 0.05}, "threads grow"),
        ({"checkpoints": 1}, "checkpoints grow"),
    ],
)
def test_growth_is_seen(soak, growth, text):
    [complaint] = soak.complaints(samples(soak, **growth), memory_bound_kib=32, blocks_bound=100)
    assert text in complaint


def run(soak, monkeypatch, capsys):
    command = "soak.py --steps 160 --every 20 --checkpoint-every 10 --memory-bound 20000 --blocks-bound 20000 --timeout 60"
    monkeypatch.setattr(sys, "argv", command.split())
    return soak.main(), capsys.readouterr().out


def test_a_short_run_passes(soak, monkeypatch, capsys):
    status, text = run(soak, monkeypatch, capsys)
    assert "Passed: flat, all losses finite" in text
    assert status == 0


def test_a_leak_a_nan_and_ranks_that_differ_are_failures(soak, monkeypatch, capsys):
    class Leaking(soak.Gauge):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            if trainer.global_rank == 1:
                if trainer.global_step % 20 == 0:
                    self.leaked = [*getattr(self, "leaked", []), open("/dev/null")]  # noqa: SIM115
                if trainer.global_step == trainer.max_steps:
                    next(pl_module.parameters()).data.add_(1)
                outputs = {"loss": outputs["loss"] * math.nan}
            super().on_train_batch_end(trainer, pl_module, outputs, *args)

    monkeypatch.setattr(soak, "Gauge", Leaking)
    monkeypatch.setattr(OneBitDDPStrategy, "check_ranks_agree", lambda self: None)
    status, text = run(soak, monkeypatch, capsys)
    assert status == 1
    assert "FAILED" in text
    assert "rank 1: descriptors grow" in text
    assert "rank 0: descriptors grow" not in text
    assert "rank 1: of 180 losses, 180 are infinite or NaN" in text
    assert "the ranks end with different parameters" in text


def test_a_failing_rank_is_a_failure(soak, monkeypatch, capsys):
    monkeypatch.setattr(soak.Classifier, "configure_optimizers", lambda self: 1 / 0)
    status, _ = run(soak, monkeypatch, capsys)
    assert status == 1
