"""Without Lightning's Trainer or Fabric: a training loop on `torch.distributed`, compressed in two ways.

    torchrun --nproc-per-node 2 examples/plain_torch.py
    torchrun --nproc-per-node 2 examples/plain_torch.py --compress optimizer

`gradients`: :func:`compressed_all_reduce` takes the place of the all-reduce of gradients, and any optimizer steps by the
mean that it leaves there. `optimizer`: 1-bit Adam. After some dense steps the engine of the strategies steps the optimizer;
it compresses momentum instead of gradients, which Adam needs (its second moment would be that of the quantized gradients).
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_onebit import ErrorFeedback, compressed_all_reduce
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.optimizer import CompressedOptimizer

FEATURES, BATCH_SIZE = 64, 32
WARMUP_STEPS = 20


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Another one on each rank and at each step."""
    generator = torch.Generator().manual_seed(1_000_003 * dist.get_rank() + step)
    x = torch.randn(BATCH_SIZE, FEATURES, generator=generator)
    return x, x[:, :4].sum(1, keepdim=True).tanh()


def backward(model: nn.Module, step: int) -> Tensor:
    """The gradients of this rank's batch, in ``p.grad``; returns the loss."""
    x, y = batch(step)
    model.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss.detach()


def train_with_compressed_gradients(model: nn.Module, steps: int) -> list[Tensor]:
    """1-bit SGD as in Seide et al. 2014. One `ErrorFeedback` per gradient holds what signs have left out."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    errors = [(p, ErrorFeedback(p)) for p in model.parameters()]
    losses = []
    for step in range(steps):
        losses.append(backward(model, step))
        for p, error in errors:
            compressed_all_reduce(p.grad, error)  # in place: the mean over the ranks, the same bits on each
        optimizer.step()
    return losses


def train_with_compressed_optimizer(model: nn.Module, steps: int) -> list[Tensor]:
    """1-bit Adam (arXiv 2102.02888). The engine is no public name: it may change between versions."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    communicator = Communicator()
    compressed = None
    losses = []
    for step in range(steps):
        losses.append(backward(model, step))
        if step < WARMUP_STEPS:
            for p in model.parameters():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
            optimizer.step()
            continue
        if compressed is None:
            communicator.counters.bytes_sent = 0
            names = {p: name for name, p in model.named_parameters()}
            compressed = CompressedOptimizer(optimizer, CompressionConfig(), communicator, names)
        compressed.step()  # from the gradients of this rank: the ranks send signs to each other in here
    if compressed is not None:
        compressed.give_back_()  # the optimizer's state is its own again
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--compress", choices=["gradients", "optimizer"], default="gradients")
    parser.add_argument("--steps", type=int, default=300)
    settings = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same parameters on every rank
    model = nn.Sequential(nn.Linear(FEATURES, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    train = train_with_compressed_gradients if settings.compress == "gradients" else train_with_compressed_optimizer
    losses = train(model, settings.steps)

    total = sum(p.detach().double().sum() for p in model.parameters())
    print(f"rank {dist.get_rank()}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; sum of parameters {total!s}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
