"""What CommMonitor costs: a GPT's training with and without it in turns, in one run.

    python benchmarks/monitor.py --out benchmarks/results/monitor.txt

Every other interval of steps goes by without CommMonitor, as if the Trainer had none; in the others it logs to a CSVLogger
at the last step. Each interval with it is compared with the mean of the two beside it, so that a slow drift of the machine
cancels. Also timed is what the callback itself takes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lab import LabError, Loopback, exit_on_sigterm
from report import SHARED_CORES, describe, environment, table
from training_step import WARMUP_STEPS, add_model_arguments, make_model, random_words

from lightning_onebit import CommMonitor, FixedStep, OneBitDDPStrategy, PhaseSwitch

LARGEST_SHARE = 0.01
"""Of a step, that the callback may cost."""


class InTurns(CommMonitor):
    """Does nothing in every other interval; notes how long each interval took, and this callback in it."""

    def __init__(self, every: int, untimed: int) -> None:
        super().__init__(every, progress_bar=True)
        self.untimed = untimed
        self.intervals: list[float] = []
        self.own: list[float] = []
        self._begin = self._taken = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        step = trainer.fit_loop.total_batch_idx - self.untimed
        start = time.perf_counter()
        if step < 0 or (step // self.every_n_steps) % 2:
            super().on_train_batch_end(trainer, pl_module, *args)
        now = time.perf_counter()
        self._taken += now - start
        if (step + 1) % self.every_n_steps == 0:
            if step >= 0:
                self.intervals.append(now - self._begin)
                self.own.append(self._taken)
            self._begin, self._taken = now, 0.0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """No last entry: it would be part of no interval."""


def train(settings: argparse.Namespace, folder: str) -> tuple[list[float], list[float]]:
    """Runs on every node. Seconds of each interval, without and with CommMonitor in turns, and of it in each."""
    torch.set_num_threads(1)
    untimed = settings.every * (1 + WARMUP_STEPS // settings.every)
    steps = untimed + settings.every * settings.intervals
    monitor = InTurns(settings.every, untimed)
    trainer = pl.Trainer(
        strategy=OneBitDDPStrategy(timeout=timedelta(seconds=60)),
        accelerator="cpu",
        devices=1,
        num_nodes=settings.nodes,
        max_steps=steps,
        callbacks=[PhaseSwitch(criterion=FixedStep(WARMUP_STEPS)), monitor],
        use_distributed_sampler=False,
        logger=pl.loggers.CSVLogger(folder),
        log_every_n_steps=settings.every,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(make_model(settings), random_words(settings, steps))
    return monitor.intervals, monitor.own


def main() -> int:
    settings = parse_arguments()
    exit_on_sigterm()
    found = environment()
    try:
        with tempfile.TemporaryDirectory() as folder, Loopback(nodes=settings.nodes) as network:
            (intervals, own), *_ = network.call(train, settings, folder, timeout_seconds=settings.timeout)
    except LabError as error:
        print(f"monitor: {error}", file=sys.stderr)
        return 1
    every = settings.every
    per_step = [1000 * seconds / every for seconds in intervals]
    differences = [
        with_it - (before + after) / 2
        for before, with_it, after in zip(per_step[0::2], per_step[1::2], per_step[2::2], strict=False)
    ]
    step = statistics.median(per_step[0::2])
    callback = [1000 * seconds / every for seconds in own[1::2]]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    rows = [
        ("a step without CommMonitor, ms", *quartiles(per_step[0::2])),
        ("a step with it, ms", *quartiles(per_step[1::2])),
        ("the difference to the steps before and after, ms", *quartiles(differences)),
        ("the callback alone, ms a step", *quartiles(callback)),
    ]
    mean = statistics.mean(differences)
    share = statistics.median(callback) / step
    said = (
        f"Mean difference: {mean:+.3f} +- {error:.3f} ms, that is {mean / step:+.2%} +- {error / step:.2%} of a step (one"
        f" standard error, {len(differences)} intervals of {every} steps). The callback alone: {share:.2%} of a step, the"
        f" waiting for the other ranks at an entry included: {'less' if share < LARGEST_SHARE else 'not less'} than 1%."
    )
    title = f"{settings.nodes} processes on loopback, logging every {every} steps"
    text = "\n\n".join(
        [describe(found), title, table(("", "median", "lower quartile", "upper quartile"), rows), said, SHARED_CORES]
    )
    print(text)
    if settings.out is not None:
        settings.out.write_text(text + "\n", encoding="utf-8")
    return 0 if share < LARGEST_SHARE else 1


def quartiles(values: list[float]) -> tuple[str, str, str]:
    lower, median, upper = statistics.quantiles(values, n=4)
    return f"{median:.3f}", f"{lower:.3f}", f"{upper:.3f}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python benchmarks/monitor.py"
    )
    parser.add_argument("--nodes", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--every", type=int, default=50, help="steps of an interval (default: %(default)s)")
    parser.add_argument("--intervals", type=int, default=21, help="an odd number (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there")
    add_model_arguments(parser)
    settings = parser.parse_args()
    if settings.intervals < 5 or settings.intervals % 2 == 0:
        parser.error("--intervals must be an odd number, 5 or more")
    return settings


if __name__ == "__main__":
    sys.exit(main())
