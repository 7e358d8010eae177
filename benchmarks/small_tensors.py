"""Time of a training step of a model of many small tensors: DDP with Adam, and compressed, in turn.

    python benchmarks/small_tensors.py [--tensors 400] [--param-groups 1] [--rounds 5]

Two ranks on one machine, gloo on an unshaped link: what counts is the work around the exchange, not its bytes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from report import environment
from torch import nn
from torch.multiprocessing import start_processes

from lightning_onebit import FixedStep, OneBitDDPFabricStrategy

WIDTH, BATCH, WARMUP_STEPS, STEPS = 64, 8, 8, 30


def train(rank: int, arguments: argparse.Namespace, port: int, queue) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE="2", NODE_RANK="0", OMP_NUM_THREADS="1")
    ours = OneBitDDPFabricStrategy(criterion=FixedStep(WARMUP_STEPS // 2))
    loops = {"ddp": make_loop("ddp", arguments), "onebit_ddp": make_loop(ours, arguments)}
    for loop in loops.values():
        for _ in range(WARMUP_STEPS):
            loop()
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(arguments.rounds):
        for name, loop in loops.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(STEPS):
                loop()
            dist.barrier()
            times[name].append((time.perf_counter() - start) / STEPS * 1000)
    assert ours.phase.name == "COMPRESSED"
    if rank == 0:
        queue.put(times)
    dist.barrier()
    os._exit(0)


def make_loop(strategy, arguments: argparse.Namespace):
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(arguments.tensors // 2)))
    params = list(model.parameters())
    size = -(-len(params) // arguments.param_groups)
    groups = [{"params": params[i : i + size]} for i in range(0, len(params), size)]
    model, optimizer = fabric.setup(model, torch.optim.Adam(groups, lr=1e-4))
    generator = torch.Generator().manual_seed(fabric.global_rank)

    def loop() -> None:
        x = torch.randn(BATCH, WIDTH, generator=generator)
        optimizer.zero_grad()
        fabric.backward((model(x) - x).square().mean())
        optimizer.step()

    return loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=400)
    parser.add_argument("--param-groups", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    context = start_processes(train, (arguments, 29_517, queue), nprocs=2, join=False, start_method="spawn")
    times = queue.get()
    context.join()
    print(environment())
    print(f"{arguments.tensors} tensors in {arguments.param_groups} parameter groups, 2 ranks, {STEPS} steps a round")
    for name, values in times.items():
        print(
            f"{name:<12} median {statistics.median(values):6.1f} ms per step   from {min(values):.1f} to {max(values):.1f}"
        )
    ratios = [b / a for a, b in zip(times["ddp"], times["onebit_ddp"], strict=True)]
    print(f"ratio        median {statistics.median(ratios):6.2f}                from {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
