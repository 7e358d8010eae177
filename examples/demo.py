"""Train the same small GPT twice on two CPU processes: with ``strategy="ddp"``, then with ``strategy="onebit_ddp"``.

    python examples/demo.py

It ends with a table, and with a picture of the loss curves in the output folder. Each training is a process of its own, in
which this script runs again with ``--strategy``; all that happens there is :func:`fit`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from gpt_stdlib import GPT, StdlibSources
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

import lightning_onebit  # registers "onebit_ddp"
from lightning_onebit import CommMonitor, OneBitDDPStrategy, Phase, PhaseSwitch, VarianceStability
from lightning_onebit.comm.stats import ring_all_reduce_nbytes

STRATEGIES = ("ddp", "onebit_ddp")
RANKS = 2
VALIDATIONS = 10
MEGABYTE = 1_000_000
UNTIMED_STEPS = 10
"""The first steps of a run allocate and fill caches: they are left out of the step time."""


# One training, in a process of its own


def fit(strategy: str, settings: argparse.Namespace) -> None:
    """Train with one strategy and write down what happened. Only the strategy, and what watches it, differs."""
    # Text in memory needs no worker processes to load it; the other one is between Lightning and torch.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=r".*isinstance.treespec, LeafSpec")

    pl.seed_everything(settings.seed, workers=True, verbose=False)
    model = GPT(context=settings.context, d_model=settings.d_model, lr=settings.lr)
    data = StdlibSources(
        context=settings.context, batch_size=settings.batch_size, validation_windows=settings.validation_windows
    )
    recorder = Recorder(strategy, settings)
    watchers = [CommMonitor(), PhaseSwitch(criterion(settings.steps))] if strategy == "onebit_ddp" else []

    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=RANKS,
        max_steps=settings.steps,
        limit_train_batches=settings.steps,  # one epoch, so one progress bar, is the whole run
        val_check_interval=settings.steps // VALIDATIONS,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        logger=CSVLogger(settings.output, name=strategy),
        callbacks=[recorder, TQDMProgressBar(refresh_rate=5), *watchers],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    if trainer.is_global_zero:
        recorder.record.save(settings.output)


def criterion(steps: int) -> VarianceStability:
    """When to switch: the defaults, but in a run of less than 67 steps after 30% of it."""
    return VarianceStability() if steps >= 67 else VarianceStability(min_steps=0.1, max_steps=0.3)


@dataclass(kw_only=True)
class Record:
    """What rank 0 saw of one training; kept as OUTPUT/STRATEGY.json."""

    strategy: str
    settings: dict[str, float]
    versions: dict[str, str]
    parameters: int = 0
    train_losses: list[float] = field(default_factory=list)
    """Of rank 0's half of each batch, nats per word; one entry per step, as in the lists below."""
    step_seconds: list[float] = field(default_factory=list)
    """Forward, backward with its communication, and optimizer step; neither data loading nor callbacks."""
    compressed: list[bool] = field(default_factory=list)
    """Whether the step was in the compressed phase."""
    bytes_sent: list[int] = field(default_factory=list)
    """By rank 0 since the start, after each step. Under ddp, which does not count: ``dense_bytes_per_step`` each."""
    dense_bytes_per_step: int = 0
    """What each rank sends when float32 gradients are averaged by a ring all-reduce; from the number of parameters."""
    verdict: str = ""
    """Why the warm-up ended, or did not, in the words of the criterion."""
    validations: list[tuple[int, float]] = field(default_factory=list)
    """Step, and mean loss over the validation windows of both ranks, nats per word."""

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.strategy}.json").write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, strategy: str) -> Record:
        return cls(**json.loads((folder / f"{strategy}.json").read_text(encoding="utf-8")))

    def steps_in(self, *, compressed: bool) -> int:
        return self.compressed.count(compressed)

    def bytes_per_step(self, *, compressed: bool) -> float:
        """Mean over the steps of a phase; NaN if there are none."""
        each = [after - before for before, after in zip([0, *self.bytes_sent], self.bytes_sent, strict=False)]
        return statistics.fmean(
            [n for n, phase in zip(each, self.compressed, strict=True) if phase == compressed] or [math.nan]
        )

    def median_step_seconds(self, *, compressed: bool) -> float:
        """NaN if there are no such steps."""
        timed = list(zip(self.step_seconds, self.compressed, strict=True))[UNTIMED_STEPS:]
        return statistics.median([seconds for seconds, phase in timed if phase == compressed] or [math.nan])

    def final_train_loss(self, steps: int) -> float:
        """Mean over the last ``steps``: that of a single step is noise."""
        return statistics.fmean(self.train_losses[-steps:])


class Recorder(pl.Callback):
    """Fills in a :class:`Record`."""

    def __init__(self, strategy: str, settings: argparse.Namespace) -> None:
        self.record = Record(
            strategy=strategy,
            settings={name: value for name, value in vars(settings).items() if isinstance(value, int | float)},
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "lightning": pl.__version__,
                "lightning_onebit": lightning_onebit.__version__,
            },
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        record = self.record
        record.parameters = sum(p.numel() for p in pl_module.parameters())
        record.dense_bytes_per_step = ring_all_reduce_nbytes(4 * record.parameters, trainer.world_size)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        strategy = trainer.strategy
        self.record.compressed.append(isinstance(strategy, OneBitDDPStrategy) and strategy.phase is Phase.COMPRESSED)
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        record, strategy = self.record, trainer.strategy
        record.step_seconds.append(time.perf_counter() - self._start)
        record.train_losses.append(outputs["loss"].item())
        if isinstance(strategy, OneBitDDPStrategy):
            record.bytes_sent.append(strategy.comm_stats.bytes_sent)
        else:
            record.bytes_sent.append(record.dense_bytes_per_step * len(record.train_losses))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, PhaseSwitch) and callback.verdict is not None:
                self.record.verdict = callback.verdict.reason

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.record.validations.append((trainer.global_step, trainer.callback_metrics["val_loss"].item()))


# Both trainings


def run(settings: argparse.Namespace) -> tuple[Record, Record]:
    """One training after the other, each in a new process."""
    # One thread per rank: more would get in each other's way where there are two cores.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    for number, strategy in enumerate(STRATEGIES, start=1):
        print(f'\n[{number}/{len(STRATEGIES)}] strategy="{strategy}": {settings.steps} steps', flush=True)
        command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--strategy", strategy]
        status = subprocess.run(command, env=environment).returncode
        if status != 0:
            sys.exit(f"Training with strategy={strategy!r} ended with exit status {status}: see the messages above.")
    dense, onebit = (Record.load(settings.output, strategy) for strategy in STRATEGIES)
    return dense, onebit


# What they show


def table(dense: Record, onebit: Record) -> str:
    """The two runs side by side, with units, and how each number was obtained."""

    def row(label: str, unit: str, digits: int, left: float, right: float) -> tuple[str, str, str, str]:
        left_text, right_text = ("-" if math.isnan(value) else f"{value:,.{digits}f}" for value in (left, right))
        return label, left_text, right_text, unit

    none = math.nan
    last = max(1, min(50, len(dense.train_losses) // 10))
    sent_dense = onebit.bytes_per_step(compressed=False)
    sent_compressed = onebit.bytes_per_step(compressed=True)
    rows = [
        ("", dense.strategy, onebit.strategy, ""),
        row(
            f"training loss, mean of the last {last} steps",
            "nats/word [1]",
            3,
            dense.final_train_loss(last),
            onebit.final_train_loss(last),
        ),
        row("validation loss, at the end", "nats/word [1]", 3, dense.validations[-1][1], onebit.validations[-1][1]),
        row("steps, dense", "", 0, dense.steps_in(compressed=False), onebit.steps_in(compressed=False)),
        row("steps, compressed", "", 0, dense.steps_in(compressed=True), onebit.steps_in(compressed=True)),
        row("sent per dense step", "MB/rank [2]", 3, dense.dense_bytes_per_step / MEGABYTE, sent_dense / MEGABYTE),
        row("sent per compressed step", "MB/rank [3]", 3, none, sent_compressed / MEGABYTE),
        row("  times less than dense", "", 1, none, dense.dense_bytes_per_step / sent_compressed),
        row("sent in the whole run", "MB/rank [2,3]", 1, dense.bytes_sent[-1] / MEGABYTE, onebit.bytes_sent[-1] / MEGABYTE),
        row(
            "time per dense step, median",
            "ms [4]",
            1,
            1000 * dense.median_step_seconds(compressed=False),
            1000 * onebit.median_step_seconds(compressed=False),
        ),
        row("time per compressed step, median", "ms [4]", 1, none, 1000 * onebit.median_step_seconds(compressed=True)),
    ]
    widths = [max(len(cells[column]) for cells in rows) for column in range(4)]
    lines = [f"{a:{widths[0]}}   {b:>{widths[1]}}   {c:>{widths[2]}}   {d}".rstrip() for a, b, c, d in rows]
    lines.insert(1, "-" * (sum(widths) + 9))
    return "\n".join([*lines, "", describe_switch(onebit), NOTES])


def describe_switch(onebit: Record) -> str:
    steps, warmup = len(onebit.compressed), onebit.steps_in(compressed=False)
    what = "It never switched" if warmup == steps else f"It switched by itself after step {warmup} of {steps}"
    return f"{what}: {onebit.verdict}."


NOTES = """\
[1] measured; for training on rank 0's half of each batch. Both runs start alike and see the same batches in the same order.
[2] computed: 2 (n - 1) / n times the float32 gradients, what a ring all-reduce sends.
[3] counted by the strategy, as it hands bytes to torch.distributed; headers of the network come on top.
[4] measured: forward, backward, exchange and optimizer step.
Both processes are on this machine, where sending costs next to nothing and compressing costs time: look at the loss and at
the bytes, not at the speed. On a network that DDP waits for, fewer bytes are what makes a step faster."""


def draw(dense: Record, onebit: Record, path: Path) -> None:
    """Loss curves above, what was sent so far below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), dpi=150, layout="constrained")
    loss, sent = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    # The second run lies on top of the first one: the first is drawn wide and pale, to be seen below it.
    looks = (
        (dense, {"color": "#8db4e2", "linewidth": 5}, {"marker": "o", "markersize": 9}),
        (onebit, {"color": "#c8401a", "linewidth": 1.3}, {"marker": "D", "markersize": 4}),
    )
    steps = len(dense.train_losses)
    for record, line, marker in looks:
        at = range(1, steps + 1)
        loss.plot(at, smoothed(record.train_losses), label=f"{record.strategy}: training, smoothed", **line)
        validated = list(zip(*record.validations, strict=True))
        loss.plot(
            *validated,
            label=f"{record.strategy}: validation",
            color=line["color"],
            linestyle="none",
            clip_on=False,
            **marker,
        )
        megabytes = [nbytes / MEGABYTE for nbytes in record.bytes_sent]
        sent.plot(at, megabytes, **line)
        sent.annotate(f" {megabytes[-1]:,.0f} MB", (steps, megabytes[-1]), va="center", annotation_clip=False)
    loss.set_title(f"A GPT of {dense.parameters:,} parameters learns Python's standard library on {RANKS} processes")
    loss.set_ylabel("loss, nats per word")
    loss.set_ylim(top=dense.train_losses[steps // 50])  # the first fall would press all else together
    loss.legend(frameon=False, loc="upper right")
    sent.set_ylabel("sent per rank, MB")
    sent.set_ylim(bottom=0)
    sent.set_xlabel("optimizer step")
    sent.set_xlim(0, steps)
    for axes in (loss, sent):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    if onebit.steps_in(compressed=True):
        switch = onebit.steps_in(compressed=False)
        for axes in (loss, sent):
            axes.axvline(switch, color="#444444", linestyle="--", linewidth=1.2)
        loss.annotate(
            f"step {switch}: from here on\nsigns and block scales",
            (switch, 0.03),
            xycoords=loss.get_xaxis_transform(),
            xytext=(6, 0),
            textcoords="offset points",
            va="bottom",
            color="#444444",
        )
    figure.savefig(path)


def smoothed(losses: Sequence[float], window: int = 25) -> list[float]:
    """Mean over the last ``window`` steps, fewer at the start."""
    return [statistics.fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for loss.png, records and logs")
    parser.add_argument("--steps", type=int, default=800, help=f"optimizer steps of each run, a multiple of {VALIDATIONS}")
    parser.add_argument("--batch-size", type=int, default=8, help=f"windows per rank and step; there are {RANKS} ranks")
    parser.add_argument("--context", type=int, default=64, help="words per window")
    parser.add_argument("--validation-windows", type=int, default=512, help=f"for each of {VALIDATIONS} validations")
    parser.add_argument("--d-model", type=int, default=128, help="width of the GPT")
    parser.add_argument("--lr", type=float, default=3e-3, help="largest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and of the order of the text")
    parser.add_argument("--strategy", choices=STRATEGIES, help="train with this one only, without table and picture")
    settings = parser.parse_args(arguments)
    if settings.steps < VALIDATIONS or settings.steps % VALIDATIONS:
        parser.error(f"--steps {settings.steps} is not a multiple of {VALIDATIONS}, the number of validations.")
    return settings


def main() -> None:
    settings = parse_arguments()
    if settings.strategy:
        fit(settings.strategy, settings)
        return
    start = time.perf_counter()
    dense, onebit = run(settings)
    picture = settings.output / "loss.png"
    draw(dense, onebit, picture)
    print(f"\n{table(dense, onebit)}\n\nLoss curves: {picture}. Both runs took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
