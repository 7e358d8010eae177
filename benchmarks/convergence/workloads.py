"""What is trained: a model, the loss of each rank at each step, and a held-out loss. No optimizer, no communication.

The ranks have the same parameters all the time, so one model serves them all: their gradients are computed one after the
other on it.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.convergence import models
from benchmarks.convergence.data import Digits, Rows, frechet_distance, generator, text

VOCABULARY, CONTEXT = 1000, 32
GAN_NOISE = 16


@dataclass
class Part:
    """Parameters with an optimizer of their own, and their loss."""

    params: list[nn.Parameter]
    loss: Callable[[int, int], Tensor]
    """Of (step, rank)."""


@dataclass
class Task:
    """One seed of a workload. ``parts`` step in turn."""

    model: nn.Module
    parts: list[Part]
    evaluate: Callable[[], float]
    """The held-out loss; lower is better."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    name: str
    make: Callable[[int, int, int], Task]
    """Of (seed, batch size of a rank, steps)."""
    steps: int
    batch_size: int
    """Of each rank, at 4 ranks; with others the global batch stays the same."""
    lr: float
    lr_warmup: float = 0.05
    """Share of the run."""
    lr_end: float = 0.1
    """The last learning rate over the largest; a cosine leads there."""
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    """Decoupled: AdamW if it is not zero."""
    note: str = field(default="", compare=False)

    def lr_factor(self, step: int, steps: int) -> float:
        warmup = max(1, round(self.lr_warmup * steps))
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return self.lr_end + (1 - self.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))


def _single(model: nn.Module, loss: Callable[[int, int], Tensor], evaluate: Callable[[], float]) -> Task:
    return Task(model, [Part(list(model.parameters()), loss)], evaluate)


def _mean_of(losses: Iterable[Tensor]) -> float:
    return float(torch.stack(list(losses)).mean())


def gpt(seed: int, size: int, steps: int) -> Task:
    torch.manual_seed(seed)
    data, model = text(VOCABULARY), models.Words(VOCABULARY, CONTEXT, 64, 2, causal=True)

    def loss_of(windows: Tensor) -> Tensor:
        return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    @torch.no_grad()
    def evaluate() -> float:
        return _mean_of(loss_of(part) for part in data.held_out_windows(512, CONTEXT + 1).split(64))

    return _single(model, lambda step, rank: loss_of(data.windows(seed, step, rank, size, CONTEXT + 1)), evaluate)


def masked_lm(seed: int, size: int, steps: int) -> Task:
    torch.manual_seed(seed)
    data, model = text(VOCABULARY), models.Words(VOCABULARY, CONTEXT, 64, 2, causal=False)

    def loss_of(windows: Tensor, g: torch.Generator) -> Tensor:
        masked = torch.rand(windows.shape, generator=g) < 0.2
        logits = model(windows.masked_fill(masked, data.mask_id))
        return F.cross_entropy(logits[masked], windows[masked])

    def loss(step: int, rank: int) -> Tensor:
        return loss_of(data.windows(seed, step, rank, size, CONTEXT), generator(seed, step, rank + 500))

    @torch.no_grad()
    def evaluate() -> float:
        g = torch.Generator().manual_seed(0)
        return _mean_of(loss_of(part, g) for part in data.held_out_windows(1024, CONTEXT).split(64))

    return _single(model, loss, evaluate)


def _classifier(
    model: nn.Module,
    digits: Digits,
    size: int,
    scale: Callable[[int], float] = lambda step: 1.0,
    largest_label: Callable[[int], int] = lambda step: 9,
) -> Task:
    def loss(step: int, rank: int) -> Tensor:
        x, y = digits.batch(step, rank, size, largest_label=largest_label(step))
        return scale(step) * F.cross_entropy(model(x), y)

    @torch.no_grad()
    def evaluate() -> float:
        return float(F.cross_entropy(model(digits.held_out_x), digits.held_out_y))

    return _single(model, loss, evaluate)


def cnn(seed: int, size: int, steps: int) -> Task:
    torch.manual_seed(seed)
    return _classifier(models.cnn(), Digits(seed, 0.3), size)


def vit(seed: int, size: int, steps: int) -> Task:
    torch.manual_seed(seed)
    return _classifier(models.ViT(), Digits(seed, 0.1, shift=0), size)


def rising(seed: int, size: int, steps: int) -> Task:
    torch.manual_seed(seed)
    return _classifier(models.ViT(), Digits(seed, 0.1, shift=0), size, scale=lambda step: 16.0 ** (step / steps))


def appearing(seed: int, size: int, steps: int) -> Task:
    torch.manual_seed(seed)
    return _classifier(
        models.ViT(), Digits(seed, 0.1, shift=0), size, largest_label=lambda step: 4 if step < steps // 2 else 9
    )


@functools.cache
def _pretrained(seed: int) -> dict[str, Tensor]:
    """What a dense Adam makes of the digits 0 to 4 in 200 steps."""
    torch.manual_seed(seed)
    model, digits = models.ViT(), Digits(seed, 0.1, shift=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(200):
        x, y = digits.batch(step, 900, 32, largest_label=4)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return copy.deepcopy(model.state_dict())


def finetune(seed: int, size: int, steps: int) -> Task:
    state, model = _pretrained(seed), models.ViT()
    model.load_state_dict(state)
    return _classifier(model, Digits(seed, 0.1, shift=0), size)


def _vae(seed: int, size: int, divergence_weight: Callable[[int], float]) -> Task:
    torch.manual_seed(seed)
    model, digits = models.VAE(), Digits(seed, 0.0)

    def loss(step: int, rank: int) -> Tensor:
        x, _ = digits.batch(step, rank, size)
        noise = torch.randn(size, 8, generator=generator(seed, step, rank + 500))
        reconstruction, divergence = model(x.flatten(1), noise)
        return reconstruction.mean() + divergence_weight(step) * divergence.mean()

    @torch.no_grad()
    def evaluate() -> float:
        x = digits.held_out_x.flatten(1)
        reconstruction, divergence = model(x, torch.randn(len(x), 8, generator=torch.Generator().manual_seed(0)))
        return float(reconstruction.mean() + divergence.mean())

    return _single(model, loss, evaluate)


def vae(seed: int, size: int, steps: int) -> Task:
    return _vae(seed, size, lambda step: 1.0)


def vae_annealed(seed: int, size: int, steps: int) -> Task:
    return _vae(seed, size, lambda step: min(1.0, 2 * step / steps))


def dcgan(seed: int, size: int, steps: int) -> Task:
    torch.manual_seed(seed)
    networks, digits = models.dcgan(noise=GAN_NOISE), Digits(seed, 0.0)
    make, judge = networks["generator"], networks["discriminator"]

    def fake(step: int, rank: int) -> Tensor:
        return make(torch.randn(size, GAN_NOISE, 1, 1, generator=generator(seed, step, rank + 500)))

    def judge_loss(step: int, rank: int) -> Tensor:
        real = 2 * digits.batch(step, rank, size)[0] - 1
        with torch.no_grad():
            images = fake(step, rank)
        return F.softplus(-judge(real)).mean() + F.softplus(judge(images)).mean()

    def make_loss(step: int, rank: int) -> Tensor:
        return F.softplus(-judge(fake(step, rank))).mean()

    @torch.no_grad()
    def evaluate() -> float:
        noise = torch.randn(1024, GAN_NOISE, 1, 1, generator=torch.Generator().manual_seed(0))
        return frechet_distance(make(noise).flatten(1), 2 * digits.held_out_x.flatten(1) - 1)

    parts = [Part(list(judge.parameters()), judge_loss), Part(list(make.parameters()), make_loss)]
    return Task(networks, parts, evaluate)


def table(seed: int, size: int, steps: int) -> Task:
    torch.manual_seed(seed)
    rows, model = Rows(seed), models.Table(10, Rows.CATEGORIES)

    def loss(step: int, rank: int) -> Tensor:
        x, categories, y = rows.batch(step, rank, size)
        return F.smooth_l1_loss(model(x, categories), y, beta=0.5)

    @torch.no_grad()
    def evaluate() -> float:
        held_out = rows.held_out
        return float(F.smooth_l1_loss(model(rows.x[held_out], rows.categories[held_out]), rows.y[held_out], beta=0.5))

    return _single(model, loss, evaluate)


WORKLOADS = {
    each.name: each
    for each in (
        Workload(name="gpt", make=gpt, steps=400, batch_size=8, lr=3e-3, lr_warmup=0.125, weight_decay=0.01),
        Workload(name="masked_lm", make=masked_lm, steps=400, batch_size=8, lr=3e-3, lr_warmup=0.125, weight_decay=0.01),
        Workload(name="cnn", make=cnn, steps=300, batch_size=16, lr=3e-3, lr_warmup=0.03),
        Workload(name="vit", make=vit, steps=400, batch_size=16, lr=4e-3),
        Workload(name="vae", make=vae, steps=500, batch_size=32, lr=3e-3),
        Workload(name="dcgan", make=dcgan, steps=400, batch_size=16, lr=1e-3, lr_warmup=0.0, lr_end=1.0, beta1=0.5),
        Workload(name="table", make=table, steps=500, batch_size=32, lr=3e-3),
        Workload(name="finetune", make=finetune, steps=300, batch_size=16, lr=1e-3, lr_end=0.0),
        Workload(name="rising", make=rising, steps=400, batch_size=16, lr=4e-3, note="loss times 16^(step/steps)"),
        Workload(name="appearing", make=appearing, steps=400, batch_size=16, lr=4e-3, note="digits 5 to 9 from half way on"),
        Workload(name="vae_annealed", make=vae_annealed, steps=500, batch_size=32, lr=3e-3, note="KL weight rises to 1"),
    )
}
