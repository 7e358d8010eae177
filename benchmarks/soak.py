"""Soak: a small model for many compressed steps. Memory, file descriptors and threads must stay flat, losses finite.

    python benchmarks/soak.py --out benchmarks/results/soak.txt

A Trainer per rank, on loopback, with what an ordinary run has: PhaseSwitch, CommMonitor and a CSV logger, the divergence
guard, validation at the end of each epoch, and a checkpoint every so many steps of which the last two are kept. Every so
many steps each rank counts, after collecting garbage and returning free memory to the kernel: its resident memory, Python's
allocated blocks, file descriptors, threads (as the kernel has them), and the entries of the checkpoint folder.

The first quarter is for caches to fill. Over the rest, memory and blocks are judged by the slope of Theil and Sen, the
median of the slopes between any two samples: a few jumps of the allocator do not move it, a leak at every step, or at
every checkpoint, does. Descriptors, threads and checkpoints may not be more, by the median, in the last quarter than in the
second. The exit status is 1 if something grows, a run fails, a loss is infinite or NaN, or the ranks end with different
parameters.

``--strategies onebit_ddp ddp`` runs stock DDP as well, by the same measure, to tell whose growth it is.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from array import array
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from datetime import timedelta
from itertools import combinations
from pathlib import Path

import lightning.pytorch as pl
import torch
from lab import LabError, Loopback, exit_on_sigterm
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from report import describe, environment, save, table
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_onebit import CommMonitor, FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch

WARMUP_STEPS = 100
FEATURES, WIDTH, CLASSES, BATCH_SIZE = 32, 128, 10, 16
KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class Sample:
    """What one rank holds between two batches."""

    step: float
    rss_kib: float
    blocks: float
    """Python's allocated memory blocks: nearly one per object."""
    descriptors: float
    threads: float
    checkpoints: float
    """Entries of the folder, before this step's one is written."""


@dataclass(kw_only=True)
class Outcome:
    """What one rank has to say at the end."""

    samples: list[Sample] = field(default_factory=list)
    compressed_steps: int = 0
    losses: int = 0
    nonfinite_losses: int = 0
    first_loss: float = math.nan
    last_loss: float = math.nan
    parameters: str = ""
    """Their SHA-256."""
    seconds: float = 0.0


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, CLASSES)
        )

    def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(self.layers(x), y)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Gauge(pl.Callback):
    """Samples, and looks at every loss."""

    def __init__(self, every: int, checkpoints: Path) -> None:
        self.every = every
        self.checkpoints = checkpoints
        self.outcome = Outcome()
        self._numbers = array("d")  # no objects of its own among those that it counts

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: dict[str, torch.Tensor], *_: object
    ) -> None:
        loss, outcome = outputs["loss"].item(), self.outcome
        outcome.losses += 1
        outcome.nonfinite_losses += not math.isfinite(loss)
        outcome.first_loss = loss if outcome.losses == 1 else outcome.first_loss
        outcome.last_loss = loss
        if trainer.global_step % self.every == 0:
            self._numbers.extend(astuple(take_sample(trainer.global_step, self.checkpoints)))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.outcome.samples = [
            Sample(*numbers) for numbers in zip(*[iter(self._numbers)] * len(fields(Sample)), strict=True)
        ]


def take_sample(step: int, checkpoints: Path) -> Sample:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(
        step=step,
        rss_kib=resident_pages * os.sysconf("SC_PAGE_SIZE") / 1024,
        blocks=sys.getallocatedblocks(),
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        checkpoints=len(os.listdir(checkpoints)) if checkpoints.exists() else 0,
    )


def train(strategy: str, settings: argparse.Namespace, folder: Path) -> Outcome:
    """One training; runs on every rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank, steps = int(os.environ["RANK"]), WARMUP_STEPS + settings.steps
    gauge = Gauge(settings.every, folder / "checkpoints")
    checkpoint = ModelCheckpoint(
        folder / "checkpoints",
        monitor="step",  # the last ones
        mode="max",
        save_top_k=KEPT_CHECKPOINTS,
        every_n_train_steps=settings.checkpoint_every,
        save_on_train_epoch_end=False,
    )
    ours: list[pl.Callback] = [PhaseSwitch(criterion=FixedStep(WARMUP_STEPS)), CommMonitor(every_n_steps=50)]
    onebit = OneBitDDPStrategy(timeout=timedelta(seconds=60), bucket_cap_mb=0.05)  # two buckets
    trainer = pl.Trainer(
        strategy=onebit if strategy == "onebit_ddp" else strategy,
        accelerator="cpu",
        devices=1,
        num_nodes=settings.ranks,
        max_steps=steps,
        callbacks=[*(ours if strategy == "onebit_ddp" else []), gauge, checkpoint],
        logger=CSVLogger(folder, name="log"),
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train_data, validation_data = (make_data(16 * batches, seed=seed + rank) for batches, seed in ((500, 0), (10, 100)))
    model, start = Classifier(), time.perf_counter()
    trainer.fit(model, train_data, validation_data)
    outcome = gauge.outcome
    outcome.seconds = time.perf_counter() - start
    if strategy == "onebit_ddp":
        outcome.compressed_steps = onebit.comm_stats[Phase.COMPRESSED].steps
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().numpy().tobytes())
    outcome.parameters = digest.hexdigest()
    return outcome


def make_data(examples: int, seed: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, FEATURES, generator=generator)
    teacher = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(examples, CLASSES, generator=generator)
    return DataLoader(TensorDataset(x, (x @ teacher + noise).argmax(1)), BATCH_SIZE, shuffle=True)


# Judgement


def slope_per_1000_steps(steps: Sequence[float], values: Sequence[float]) -> float:
    """Theil and Sen's: the median of the slopes between any two points."""
    points = list(zip(steps, values, strict=True))
    return 1000 * statistics.median((b - a) / (t - s) for (s, a), (t, b) in combinations(points, 2))


def complaints(samples: Sequence[Sample], *, memory_bound_kib: float, blocks_bound: float) -> list[str]:
    """What has grown; of at least eight samples, in order."""
    quarter = len(samples) // 4
    settled = samples[quarter:]
    steps = [sample.step for sample in settled]
    found = []
    for name, unit, bound in (("rss_kib", "KiB", memory_bound_kib), ("blocks", "blocks", blocks_bound)):
        slope = slope_per_1000_steps(steps, [getattr(sample, name) for sample in settled])
        if slope > bound:
            found.append(f"memory grows by {slope:.1f} {unit} per 1000 steps; allowed are {bound:g}")
    for name in ("descriptors", "threads", "checkpoints"):
        before, after = (
            statistics.median(getattr(sample, name) for sample in part) for part in (settled[:quarter], settled[-quarter:])
        )
        if after > before:
            found.append(f"{name} grow from {before:g} to {after:g}")
    return found


def judge(strategy: str, outcomes: Sequence[Outcome], settings: argparse.Namespace) -> list[str]:
    """Everything that is wrong with a run."""
    found = []
    for rank, outcome in enumerate(outcomes):
        bounds = {"memory_bound_kib": settings.memory_bound, "blocks_bound": settings.blocks_bound}
        found += [f"rank {rank}: {text}" for text in complaints(outcome.samples, **bounds)]
        if outcome.nonfinite_losses or outcome.losses != WARMUP_STEPS + settings.steps:
            found.append(f"rank {rank}: of {outcome.losses} losses, {outcome.nonfinite_losses} are infinite or NaN")
        if strategy == "onebit_ddp" and outcome.compressed_steps < settings.steps:
            found.append(f"rank {rank}: only {outcome.compressed_steps} compressed steps")
    if len({outcome.parameters for outcome in outcomes}) > 1:
        found.append("the ranks end with different parameters")
    return found


def rows_of(strategy: str, outcomes: Sequence[Outcome]) -> list[list[str]]:
    rows = []
    for rank, outcome in enumerate(outcomes):
        samples = outcome.samples
        settled = samples[len(samples) // 4 :]
        steps = [sample.step for sample in settled]
        rss, blocks = ([float(getattr(s, name)) for s in settled] for name in ("rss_kib", "blocks"))
        rows.append(
            [
                f"{strategy}, rank {rank}",
                f"{samples[0].rss_kib / 1024:.1f}, {settled[0].rss_kib / 1024:.1f}, {samples[-1].rss_kib / 1024:.1f}",
                f"{max(rss) - min(rss):.0f}",
                f"{slope_per_1000_steps(steps, rss):+.2f}",
                f"{slope_per_1000_steps(steps, blocks):+.2f}",
                *(
                    f"{min(values):.0f}-{max(values):.0f}"
                    for values in ([getattr(s, n) for s in settled] for n in ("descriptors", "threads", "checkpoints"))
                ),
                f"{outcome.first_loss:.3f}, {outcome.last_loss:.3f}",
                f"{1000 * outcome.seconds / outcome.losses:.2f}",
            ]
        )
    return rows


HEADER = (
    "run",
    "RSS in MiB: first, after a quarter, last",
    "range, KiB",
    "KiB / 1000 steps",
    "blocks / 1000 steps",
    "descriptors",
    "threads",
    "checkpoints",
    "loss: first, last",
    "ms per step",
)


def main() -> int:
    settings = parse_arguments()
    exit_on_sigterm()
    facts = environment()
    rows, found, results = [], [], {}
    try:
        for strategy in settings.strategies:
            with Loopback(nodes=settings.ranks) as network, tempfile.TemporaryDirectory() as folder:
                outcomes = network.call(train, strategy, settings, Path(folder), timeout_seconds=settings.timeout)
            rows += rows_of(strategy, outcomes)
            found += [f"{strategy}, {text}" for text in judge(strategy, outcomes, settings)]
            results[strategy] = [replace(outcome, samples=outcome.samples[::10]) for outcome in outcomes]
    except LabError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    text = "\n\n".join(
        [
            describe(facts),
            f"{settings.ranks} ranks, {WARMUP_STEPS} steps of warm-up and {settings.steps} more (onebit_ddp: compressed), a"
            f" sample every {settings.every} steps, a checkpoint every {settings.checkpoint_every}, of which"
            f" {KEPT_CHECKPOINTS} are kept.\nSlopes (Theil-Sen) and ranges are those of the last three quarters. Allowed:"
            f" {settings.memory_bound:g} KiB and {settings.blocks_bound:g} blocks per 1000 steps.",
            table(HEADER, rows),
            "\n".join(["FAILED:", *found])
            if found
            else "Passed: flat, all losses finite, the same parameters on all ranks.",
        ]
    )
    print(text)
    if settings.out is not None:
        settings.out.write_text(text + "\n", encoding="utf-8")
        save(settings.out.with_suffix(".json"), {"environment": facts, "complaints": found, "results": results})
    return 1 if found else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python benchmarks/soak.py"
    )
    parser.add_argument("--steps", type=int, default=20000, help="after the warm-up (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="on loopback (default: %(default)s)")
    parser.add_argument("--strategies", nargs="+", choices=["onebit_ddp", "ddp"], default=["onebit_ddp"])
    parser.add_argument("--every", type=int, default=100, help="steps between samples (default: %(default)s)")
    parser.add_argument("--checkpoint-every", type=int, default=250, help="steps (default: %(default)s)")
    parser.add_argument(
        "--memory-bound", type=float, default=32.0, metavar="KIB", help="per 1000 steps (default: %(default)s)"
    )
    parser.add_argument(
        "--blocks-bound", type=float, default=20.0, metavar="N", help="Python's, per 1000 steps (default: %(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=3600.0, metavar="S", help="of each run (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the table there, and every tenth sample beside it as .json"
    )
    settings = parser.parse_args()
    if settings.steps < 8 * settings.every:
        parser.error(f"--steps {settings.steps} are too few for eight samples, one every {settings.every} steps")
    return settings


if __name__ == "__main__":
    sys.exit(main())
