"""What the divergence guard costs: speed of its checksum, and its share of a training step.

    python benchmarks/divergence.py --out benchmarks/results/divergence.txt

The first table has the checksum of one tensor on one core, beside a plain read (the largest of its memory's integers) and a
copy, which take turns with it. The second has trainings on loopback in which the ranks are compared after every step: the
median step, the median comparison, and what share of the time it takes if made once in the guard's default interval. Ranks
wait for each other before a comparison, so that it is not charged with what they would have waited later.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lab import LabError, Loopback, exit_on_sigterm
from report import Spread, describe, environment, save, size, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_onebit import DivergenceGuard, FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch
from lightning_onebit.consistency.checksum import Checksum

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from gpt_stdlib import GPT

SKIPPED_STEPS = 3
"""Of each phase: not timed."""
NUMELS = (100, 10_000, 1_000_000, 30_000_000)
WORDS = {"vocabulary_size": 3000, "context": 64}
BATCH_SIZE = 10
INTERVAL = DivergenceGuard().every_n_steps


class Perceptron(pl.LightningModule):
    """As small as models get: a step is mostly overhead."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(WORDS["vocabulary_size"], 2), nn.Flatten(), nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layers(batch[0]), batch[1][:, 0] % 10)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


MODELS: dict[str, Callable[[], pl.LightningModule]] = {
    "perceptron": Perceptron,
    "GPT, 2 layers of 128": lambda: GPT(**WORDS),
    "GPT, 6 layers of 288": lambda: GPT(**WORDS, d_model=288, layers=6, heads=6),
}


# The checksum by itself


@torch.no_grad()
def checksum_seconds(dtype: torch.dtype, numel: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of one call, by what was called."""
    tensor = torch.randn(numel).to(dtype)
    target, checksum = torch.empty_like(tensor), Checksum(tensor.device)
    calls: dict[str, Callable[[], Any]] = {
        "checksum": lambda: checksum.of([tensor]),
        "read": lambda: tensor.view(torch.int64).max() if numel % 4 == 0 else tensor.max(),
        "copy": lambda: target.copy_(tensor),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rounds = max(1, 100_000 // numel)
    for _ in range(repetitions + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(rounds):
                call()
            seconds[name].append((time.perf_counter() - start) / rounds)
    return {name: times[2:] for name, times in seconds.items()}


# In a training


@dataclass(kw_only=True)
class Times:
    """Of one rank, by phase."""

    parameters: int
    tensors: int
    steps: dict[Phase, list[float]] = field(default_factory=lambda: {phase: [] for phase in Phase})
    comparisons: dict[Phase, list[float]] = field(default_factory=lambda: {phase: [] for phase in Phase})


class Stopwatch(pl.Callback):
    """Comes first, before the switch: a batch belongs to the phase that it was trained in."""

    def __init__(self, times: Times) -> None:
        self.times = times

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, OneBitDDPStrategy)
        self.times.steps[strategy.phase].append(time.perf_counter() - self._start)
        dist.barrier()
        start = time.perf_counter()
        strategy.check_ranks_agree()
        self.times.comparisons[strategy.phase].append(time.perf_counter() - start)


def train(model_name: str, settings: argparse.Namespace) -> Times:
    """One short training; runs on every rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = MODELS[model_name]()
    steps = SKIPPED_STEPS + settings.steps
    times = Times(parameters=sum(p.numel() for p in model.parameters()), tensors=len(list(model.parameters())))
    trainer = pl.Trainer(
        strategy=OneBitDDPStrategy(timeout=timedelta(seconds=60)),
        accelerator="cpu",
        devices=1,
        num_nodes=settings.ranks,
        max_steps=2 * steps,
        callbacks=[Stopwatch(times), PhaseSwitch(criterion=FixedStep(steps)), DivergenceGuard(every_n_steps=None)],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    words = torch.randint(WORDS["vocabulary_size"], (2 * steps * BATCH_SIZE, WORDS["context"] + 1), generator=generator)
    trainer.fit(model, DataLoader(TensorDataset(words[:, :-1], words[:, 1:]), BATCH_SIZE))
    for per_phase in (times.steps, times.comparisons):
        for values in per_phase.values():
            del values[:SKIPPED_STEPS]
    return times


def main() -> int:
    settings = parse_arguments()
    exit_on_sigterm()
    facts = environment()
    results: dict[str, Any] = {"checksum": [], "training": []}
    training_rows = []
    assert INTERVAL is not None
    try:
        for name in MODELS:  # first, as it forks
            with Loopback(nodes=settings.ranks) as network:
                repetitions = [
                    network.call(train, name, settings, timeout_seconds=settings.timeout)[0]
                    for _ in range(settings.repetitions)
                ]
            for phase in Phase:
                step, comparison = (
                    Spread.of([second for times in repetitions for second in getattr(times, which)[phase]])
                    for which in ("steps", "comparisons")
                )
                share = comparison.median / INTERVAL / step.median
                first = repetitions[0]
                training_rows.append(
                    [
                        f"{name}, {phase.value}",
                        f"{first.parameters:,} in {first.tensors}",
                        step.milliseconds(),
                        comparison.milliseconds(),
                        f"{share:.3%}",
                    ]
                )
                results["training"].append(
                    {"model": name, "phase": phase.value, "step": step, "comparison": comparison, "share": share}
                )
    except LabError as error:
        print(f"divergence: {error}", file=sys.stderr)
        return 1

    torch.set_num_threads(1)
    checksum_rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for numel in NUMELS:
            nbytes = numel * dtype.itemsize
            spreads = {name: Spread.of(s) for name, s in checksum_seconds(dtype, numel, settings.calls).items()}
            checksum, read, copy = (spreads[name] for name in ("checksum", "read", "copy"))
            checksum_rows.append(
                [
                    f"{dtype}, {size(nbytes)}".removeprefix("torch."),
                    f"{1e6 * checksum.median:.0f} [{1e6 * checksum.lower_quartile:.0f}-{1e6 * checksum.upper_quartile:.0f}]",
                    *(f"{nbytes / spread.median / 1e9:.2f}" for spread in (checksum, read, copy)),
                    f"{checksum.median / read.median:.1f}",
                ]
            )
            results["checksum"].append({"dtype": str(dtype), "numel": numel, **spreads})

    text = "\n\n".join(
        [
            describe(facts),
            "One tensor, one core; median [quartiles], and GB/s of the tensor's memory:",
            table(("tensor", "checksum, us", "GB/s", "plain read, GB/s", "copy, GB/s", "times a read"), checksum_rows),
            f"{settings.ranks} ranks; ms, median [quartiles]; share: of one comparison every {INTERVAL} steps, the default:",
            table(("training", "parameters, tensors", "step", "comparison", "share of the time"), training_rows),
        ]
    )
    print(text)
    if settings.out is not None:
        settings.out.write_text(text + "\n", encoding="utf-8")
        save(settings.out.with_suffix(".json"), {"environment": facts, **results})
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python benchmarks/divergence.py"
    )
    parser.add_argument("--ranks", type=int, default=2, help="on loopback (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=15, help="timed in each phase (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="trainings of each model (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=31, help="of the checksum by itself (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="of a training (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the tables there, and the numbers beside it as .json"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
