"""Train a DCGAN on scikit-learn's handwritten digits, on two CPU processes: two optimizers, both compressed.

    python examples/dcgan_digits.py --picture digits.png

A GAN has an optimizer for each network, and they step in turn, which Lightning leaves to the module: manual optimization.
The strategy compresses the gradients of each when it steps. The authors of 1-bit Adam (arXiv 2102.02888) trained a DCGAN
as well, with the first fifth of the run as warm-up (as remembered: the published text was not at hand).
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_onebit import FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch  # registers "onebit_ddp"

RANKS = 2
NOISE = 32
MEGABYTE = 1_000_000
STRATEGIES = ("ddp", "onebit_ddp")


# Data


def digits() -> tuple[Tensor, Tensor]:
    """Images ``[n, 1, 8, 8]`` between -1 and 1: four fifths to train on, one to compare with."""
    images = torch.from_numpy(load_digits().images).float().div(8.0).sub(1.0).unsqueeze(1)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    held_out = len(images) // 5
    return images[held_out:], images[:held_out]


def distance(first: Tensor, second: Tensor) -> float:
    """How far apart two sets of images are: the Frechet distance of two normal distributions in pixel space.

    As the usual FID, but with pixels for features, which for 64 of them is enough. 0 for the same distribution.
    """
    first, second = (images.flatten(1).double() for images in (first, second))
    covariances = first.T.cov(), second.T.cov()
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    between_means = (first.mean(0) - second.mean(0)).square().sum()
    return float(between_means + covariances[0].trace() + covariances[1].trace() - 2 * roots)


# The module: nothing in it knows of compression


class DCGAN(pl.LightningModule):
    """Radford et al. 2015 (arXiv 1511.06434), for images of 8 x 8 pixels."""

    def __init__(self, width: int, lr: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lr = lr
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(NOISE, 2 * width, 4, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 1, 3, padding=1),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 4),
            nn.Flatten(),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, std=0.05)

    def on_train_start(self) -> None:
        # The ranks share a seed, but not their noise.
        self.noise = torch.Generator().manual_seed(torch.initial_seed() + self.global_rank)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        (real,) = batch
        for_generator, for_discriminator = self.optimizers()
        fake = self.generator(torch.randn(len(real), NOISE, 1, 1, generator=self.noise).to(self.device))

        with self.toggled_optimizer(for_discriminator):
            loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake.detach())).mean()
            for_discriminator.zero_grad()
            self.manual_backward(loss)
            for_discriminator.step()

        with self.toggled_optimizer(for_generator):
            generator_loss = F.softplus(-self.discriminator(fake)).mean()
            for_generator.zero_grad()
            self.manual_backward(generator_loss)
            for_generator.step()

        return {"discriminator": loss.detach(), "generator": generator_loss.detach()}

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), lr=self.lr, betas=(0.5, 0.999)) for network in networks], []

    @torch.no_grad()
    def generate(self, number: int) -> Tensor:
        """The same ones of the noise at every call, ``[number, 1, 8, 8]``."""
        noise = torch.randn(number, NOISE, 1, 1, generator=torch.Generator().manual_seed(1))
        self.generator.eval()
        images = self.generator(noise.to(self.device)).cpu()
        self.generator.train()
        return images


# Training


class Progress(pl.Callback):
    """Keeps the losses of this rank and how good the images are, and prints ten lines on the way."""

    def __init__(self, settings: argparse.Namespace, held_out: Tensor) -> None:
        self.every = max(1, settings.steps // 10)
        self.held_out = held_out
        self.losses: list[dict[str, float]] = []
        self.distances: list[float] = []
        self.switched_after: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: DCGAN) -> None:
        self.distances.append(distance(pl_module.generate(1000), self.held_out))
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: DCGAN, outputs: Any, *_: Any) -> None:
        self.losses.append({name: float(loss) for name, loss in outputs.items()})
        step, strategy = len(self.losses), trainer.strategy
        compressed = isinstance(strategy, OneBitDDPStrategy) and strategy.phase is Phase.COMPRESSED
        if compressed and self.switched_after is None:
            self.switched_after = step
        if step % self.every == 0 and trainer.is_global_zero:
            self.distances.append(distance(pl_module.generate(1000), self.held_out))
            losses = ", ".join(f"{name} {loss:.3f}" for name, loss in self.losses[-1].items())
            phase = "compressed" if compressed else "dense"
            print(f"step {step:5d}  {phase:10}  losses: {losses}; distance {self.distances[-1]:.2f}", flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: DCGAN) -> None:
        self.seconds = time.perf_counter() - self.start


def train(settings: argparse.Namespace) -> None:
    # Images in memory need no worker processes to load them; the others are between Lightning, torch and DDP.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=r".*isinstance.treespec, LeafSpec")

    pl.seed_everything(settings.seed, workers=True, verbose=False)
    images, held_out = digits()
    model = DCGAN(settings.width, settings.lr)
    loader = DataLoader(TensorDataset(images), batch_size=settings.batch_size, shuffle=True, drop_last=True)
    progress = Progress(settings, held_out)
    strategy, switch = settings.strategy, []
    # As for every GAN under DDP: each backward leaves one network's parameters out.
    if strategy == "onebit_ddp":
        # With a frozen second moment two of three such trainings ended nearer to Adam's: docs/quality.md
        strategy = OneBitDDPStrategy(find_unused_parameters=True, variance_refresh=None)
        switch = [PhaseSwitch(FixedStep(max(1, settings.steps // 5)))]
    else:
        strategy = f"{strategy}_find_unused_parameters_true"
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=RANKS,
        max_epochs=-1,
        max_steps=2 * settings.steps,  # Lightning counts the steps of both optimizers
        callbacks=[*switch, progress],  # in this order: progress sees the phase that comes next
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, loader)
    if trainer.is_global_zero:
        print(f"\n{table(trainer, progress, distance(images, held_out))}")
        if settings.picture is not None:
            draw(model.generate(80), images, settings.picture)
            print(f"\nGenerated digits, below real ones: {settings.picture}")


# What came of it


def table(trainer: pl.Trainer, progress: Progress, best: float) -> str:
    steps = len(progress.losses)
    last = progress.losses[-max(1, steps // 10) :]
    means = {name: sum(losses[name] for losses in last) / len(last) for name in last[0]}
    rows = [
        ("steps of each optimizer", f"{steps}"),
        *((f"{name}'s loss, mean of the last {len(last)} steps", f"{mean:.3f}") for name, mean in means.items()),
        ("distance of generated from held-out digits [1]: at the start", f"{progress.distances[0]:.2f}"),
        ("  at the end", f"{progress.distances[-1]:.2f}"),
        ("  of digits it was trained on, for comparison", f"{best:.2f}"),
        ("time for training", f"{progress.seconds:.0f} s"),
    ]
    strategy = trainer.strategy
    if isinstance(strategy, OneBitDDPStrategy):
        stats, compressed = strategy.comm_stats, strategy.comm_stats[Phase.COMPRESSED]
        switched = f"after step {progress.switched_after}" if progress.switched_after else "never"
        rows += [
            ("switch to the compressed phase", switched),
            ("sent per rank [2]", f"{stats.bytes_sent / MEGABYTE:.1f} MB"),
            ("  ddp would have sent [3]", f"{stats.dense_equivalent_bytes / MEGABYTE:.1f} MB"),
            ("sent per rank in the compressed phase", f"{compressed.bytes_sent / MEGABYTE:.1f} MB"),
            ("  times less than ddp", f"{stats.compression_ratio:.1f}"),
        ]
    width = max(len(label) for label, _ in rows)
    return "\n".join([*(f"{label:{width}}  {value:>12}" for label, value in rows), "", NOTES])


NOTES = """\
[1] Frechet distance in pixel space, between 1000 generated digits and 359 held-out ones. A GAN's losses do not tell how good
    it is: both networks only play against each other.
[2] counted by the strategy, as it hands bytes to torch.distributed.
[3] DDP sends the gradients of both networks at each of the two backwards of a batch, though a step needs only one's."""


def draw(generated: Tensor, real: Tensor, path: Path, columns: int = 20) -> None:
    """Two rows of real digits above the generated ones."""
    from matplotlib.figure import Figure

    images = torch.cat([real[: 2 * columns], generated])
    rows = len(images) // columns
    figure = Figure(figsize=(0.5 * columns, 0.5 * rows), dpi=100, layout="tight")
    axes = figure.subplots(rows, columns)
    for axis, image in zip(axes.flat, images, strict=True):
        axis.imshow(image[0], cmap="gray_r", vmin=-1, vmax=1)
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--strategy", choices=STRATEGIES, default="onebit_ddp", help="ddp: the same without compression")
    parser.add_argument("--steps", type=int, default=500, help="steps of each optimizer; a fifth of them is warm-up")
    parser.add_argument("--batch-size", type=int, default=64, help=f"images per rank and step; there are {RANKS} ranks")
    parser.add_argument("--width", type=int, default=64, help="channels of the last hidden layer, half of the one before")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate of both optimizers")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters, the batches and the noise")
    parser.add_argument("--picture", type=Path, help="where to draw generated digits")
    settings = parser.parse_args(arguments)
    if settings.steps < 1:
        parser.error(f"--steps {settings.steps} is less than 1.")
    return settings


def main() -> None:
    settings = parse_arguments()
    # One thread per rank: more would get in each other's way where there are two cores. Before the ranks are started.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    train(settings)


if __name__ == "__main__":
    main()
