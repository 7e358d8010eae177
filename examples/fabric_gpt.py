"""The small GPT of the demo, trained by a loop of one's own with Fabric, on two CPU processes.

    python examples/fabric_gpt.py

Only the strategy is not as in any other Fabric script. Prints loss and bytes, and saves a checkpoint at the end.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from gpt_stdlib import GPT, StdlibSources
from lightning.fabric import Fabric, seed_everything

from lightning_onebit import OneBitDDPFabricStrategy, VarianceStability

MEGABYTE = 1_000_000


def main(settings: argparse.Namespace) -> None:
    # A fraction of the run only has a meaning if its length is known: Fabric does not know it, so it is said here. The
    # default criterion is for longer runs: with refreshes it has 20 dense steps at least.
    criterion = VarianceStability(min_steps=0.1, max_steps=0.3)
    strategy = OneBitDDPFabricStrategy(criterion=criterion, total_steps=settings.steps)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    seed_everything(1, verbose=False)

    sources = StdlibSources(batch_size=settings.batch_size)
    sources.setup("fit")
    batches = fabric.setup_dataloaders(sources.train_dataloader())
    gpt = GPT()
    model, optimizer = fabric.setup(gpt, torch.optim.AdamW(gpt.parameters(), lr=gpt.lr))
    model.mark_forward_method("loss")

    start = time.perf_counter()
    for step, batch in zip(range(1, settings.steps + 1), batches, strict=False):
        optimizer.zero_grad()
        loss = model.loss(batch)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)  # by the norm of the mean gradient, in both phases
        optimizer.step()

        if step % settings.print_every == 0:
            mean = fabric.all_reduce(loss.detach()).item()
            sent, dense = (
                b / MEGABYTE for b in (strategy.comm_stats.bytes_sent, strategy.comm_stats.dense_equivalent_bytes)
            )
            fabric.print(
                f"step {step} ({strategy.phase.name.lower()}): loss {mean:.3f}, {sent:.0f} MB sent per rank, DDP:"
                f" {dense:.0f} MB, {time.perf_counter() - start:.0f} s"
            )

    fabric.print(f"a compressed step sends {strategy.comm_stats.compression_ratio:.1f} times less; {strategy}")
    if settings.output:
        # All of `optimizer`, not its state dict: so the checkpoint holds phase and errors, and goes on where it stopped.
        fabric.save(settings.output, {"model": model, "optimizer": optimizer, "step": settings.steps})
    strategy.teardown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps, at least 20 (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows per rank and step (default: %(default)s)")
    parser.add_argument("--print-every", type=int, default=20)
    parser.add_argument("--output", default="", help="where to save a checkpoint (default: nowhere)")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per rank: more get in each other's way on two cores
    main(parser.parse_args())
