"""1-bit SGD against SGD on a small CNN: held-out loss with error feedback and without, seed by seed.

    python benchmarks/sgd_convergence.py --out benchmarks/results/sgd_convergence.txt

Handwritten digits (scikit-learn's ``load_digits``, 8 x 8 pixels), a third held out; the others are shifted by up to one
pixel and get Gaussian noise. 4 ranks, threads of this process (tests/support/thread_ranks.py), each with its own samples;
what they run is the library's own code. Everything but the communication is the same in all competitors: initial weights,
samples, noise, learning rates. A seed draws all of these.

* **SGD**: ``torch.optim.SGD`` on the mean gradient, as under DDP.
* **1-bit SGD**: the library, compressed from the first step on.
* **No error feedback**: the same, with worker and server errors set to zero after each step.

"Displacement" is ||x_T - x_0|| over that of SGD: a wrong scale would act as another learning rate, and show here first.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from report import describe, environment, save, table
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from thread_ranks import run_threads  # noqa: E402

from lightning_onebit.config import CompressionConfig  # noqa: E402
from lightning_onebit.engine.optimizer import CompressedOptimizer  # noqa: E402

RANKS = 4
BEYOND_USE = 1e6
"""A loss, or a displacement, that is larger, or NaN, is called diverged."""
SGD, ONE_BIT, NO_FEEDBACK = "SGD", "1-bit SGD", "no error feedback"
COMPETITORS = (SGD, ONE_BIT, NO_FEEDBACK)
LARGEST_SHIFT = 1
EVALUATION_NOISES = 8
"""Held-out images are shown so many times, with the same noises to all: a smoother loss."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int
    batch_size: int
    """Of each rank."""
    lr: float
    momentum: float
    noise: float
    """Standard deviation of what is added to pixels between 0 and 1."""
    block_size: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    seed: int
    competitor: str
    loss: float
    accuracy: float
    distance: float
    """||x_T - x_0||"""
    seconds: float


def cnn(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


class Digits:
    """Images ``[n, 1, 8, 8]`` between 0 and 1, and labels."""

    def __init__(self, seed: int, noise: float) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        y = torch.tensor(labels)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        held_out = len(x) // 3
        self.noise, self.seed = noise, seed
        self.held_out = x[order[:held_out]], y[order[:held_out]]
        self.x, self.y = x[order[held_out:]], y[order[held_out:]]

    def batch(self, step: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
        """The same for all competitors."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1009 + rank)
        chosen = torch.randint(len(self.x), (size,), generator=generator)
        padded = F.pad(self.x[chosen], [LARGEST_SHIFT] * 4)
        # By image and dimension, where the 8 x 8 pixels begin.
        first = torch.randint(2 * LARGEST_SHIFT + 1, (2, size, 1), generator=generator) + torch.arange(8)
        moved = padded[torch.arange(size)[:, None, None], 0, first[0, :, :, None], first[1, :, None, :]][:, None]
        return moved + self.noise * torch.randn(moved.shape, generator=generator), self.y[chosen]

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Held-out loss and accuracy."""
        x, y = self.held_out
        generator = torch.Generator().manual_seed(self.seed)
        losses, hits = [], []
        with torch.no_grad():
            for _ in range(EVALUATION_NOISES):
                logits = model(x + self.noise * torch.randn(x.shape, generator=generator))
                losses.append(float(F.cross_entropy(logits, y)))
                hits.append(float((logits.argmax(1) == y).float().mean()))
        return statistics.mean(losses), statistics.mean(hits)


def learning_rate(step: int, settings: Settings) -> float:
    """Constant for two thirds of the run, then down to a twentieth in a straight line."""
    left = (settings.steps - step) / (settings.steps / 3)
    return settings.lr * min(1.0, max(0.05, left))


def drop_errors_(compressed: CompressedOptimizer) -> None:
    """What error feedback would send later is lost. In the flat memory itself: what checkpoints read may be copies."""
    for each in compressed._sets:
        for memory in each.buckets.memories:
            memory.error.zero_()
            memory.server_error.zero_()
    assert not any(
        bool(error.values.any()) for error in (*compressed.state.worker_errors(), *compressed.state.server_errors())
    )


def train(competitor: str, seed: int, settings: Settings) -> Outcome:
    """One training on all ranks."""
    digits, initial = Digits(seed, settings.noise), cnn(seed)
    start = time.perf_counter()

    def on_rank(communicator: Any) -> nn.Module:
        model = copy.deepcopy(initial)
        optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)
        compressed = None
        if competitor != SGD:
            config = CompressionConfig(block_size=settings.block_size)
            compressed = CompressedOptimizer(optimizer, config, communicator, {})
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            x, y = digits.batch(step, communicator.rank, settings.batch_size)
            loss = F.cross_entropy(model(x), y)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient
            if compressed is None:
                for p in model.parameters():
                    communicator.all_reduce_mean_(p.grad)
                optimizer.step()
            else:
                compressed.step()
                if competitor == NO_FEEDBACK:
                    drop_errors_(compressed)
        return model

    model = run_threads(RANKS, on_rank, timeout=600)[0]
    loss, accuracy = digits.evaluate(model)
    moved = [a.detach() - b.detach() for a, b in zip(model.parameters(), initial.parameters(), strict=True)]
    distance = float(torch.cat([each.flatten() for each in moved]).norm())
    seconds = time.perf_counter() - start
    return Outcome(
        seed=seed, competitor=competitor, loss=loss, accuracy=accuracy, distance=distance, seconds=round(seconds, 1)
    )


def report(outcomes: list[Outcome], settings: Settings, seeds: list[int]) -> str:
    by = {(o.competitor, o.seed): o for o in outcomes}
    spread = statistics.stdev([by[SGD, seed].loss for seed in seeds])

    def mean_and_sd(values: list[float], digits: int) -> str:
        if not all(abs(value) < BEYOND_USE for value in values):
            return "diverged"
        return f"{statistics.mean(values):.{digits}f} ({statistics.stdev(values):.{digits}f})"

    def in_spreads(above: list[float]) -> str:
        return f"{statistics.mean(above) / spread:+.2f}" if all(abs(value) < BEYOND_USE for value in above) else "diverged"

    rows, conclusions = [], []
    for competitor in COMPETITORS:
        each = [by[competitor, seed] for seed in seeds]
        above = [o.loss - by[SGD, o.seed].loss for o in each]
        moved = [o.distance / by[SGD, o.seed].distance for o in each]
        rows.append(
            [
                competitor,
                mean_and_sd([o.loss for o in each], 4),
                " ".join(f"{value:+.4f}" if abs(value) < BEYOND_USE else "diverged" for value in above)
                if competitor != SGD
                else "-",
                in_spreads(above) if competitor != SGD else "-",
                mean_and_sd([100 * o.accuracy for o in each], 2),
                mean_and_sd(moved, 3) if competitor != SGD else "1",
            ]
        )
        if competitor != SGD:
            conclusions.append(f"{competitor}: {in_spreads(above)}")
    header = ["", "held-out loss", "above SGD, by seed", "in sd of SGD", "accuracy %", "displacement"]
    numbers = ", ".join(f"{name} {value}" for name, value in asdict(settings).items())
    return (
        f"{RANKS} ranks, seeds {seeds}: {numbers}. {sum(p.numel() for p in cnn(0).parameters()):,} parameters.\n"
        "Mean over the seeds, in brackets their standard deviation.\n\n"
        f"{table(header, rows)}\n\n"
        f"Above SGD's mean loss, in standard deviations of SGD's over seeds ({spread:.4f}): {'; '.join(conclusions)}."
        f"\nSeconds in all, on cores shared with other work: {sum(o.seconds for o in outcomes):.0f}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a .txt; a .json goes beside it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--block-size", type=int, default=2048)
    arguments = parser.parse_args()
    versions = environment("scikit-learn")
    settings = Settings(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        momentum=arguments.momentum,
        noise=arguments.noise,
        block_size=arguments.block_size,
    )
    torch.set_num_threads(1)
    outcomes = []
    for seed in arguments.seeds:
        for competitor in COMPETITORS:
            outcomes.append(train(competitor, seed, settings))
            print(outcomes[-1], flush=True)
    text = f"{describe(versions)}\n\n{report(outcomes, settings, arguments.seeds)}"
    print(text)
    if arguments.out is not None:
        save(arguments.out.with_suffix(".json"), {"environment": versions, "settings": settings, "outcomes": outcomes})
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
