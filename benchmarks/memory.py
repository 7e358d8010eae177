"""Memory per parameter, measured: one run's dense Adam phase beside its compressed phase.

    python benchmarks/memory.py --nodes 2 4 --out benchmarks/results/memory.txt

On CPU what is measured is the resident memory of rank 0 between two batches, as the kernel counts it, after returning
free memory to it; with ``--accelerator cuda`` what torch has allocated. Two sizes of the model are run, and the difference
over the difference in parameters is what a parameter takes: parameter, gradient, DDP's bucket, state. The bound is
what dense Adam takes plus, for n ranks, 8 / n + 1 bytes (without refreshes, 4 / n), plus 5%.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lab import LabError, Loopback, exit_on_sigterm
from report import describe, environment, save, table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_onebit import FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch

WARMUP_STEPS = 3
COMPRESSED_STEPS = 3
WIDTH = 1024
MODES = {
    "deferred": {"overlap": False},
    "overlapped": {"overlap": True},
    "deferred, gradient_as_bucket_view": {"overlap": False, "gradient_as_bucket_view": True},
    "deferred, variance_refresh=None": {"overlap": False, "variance_refresh": None},
}


class Layers(pl.LightningModule):
    """Square layers: all its memory grows with the number of parameters; activations hardly count."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


class Gauge(pl.Callback):
    """Notes the memory at the end of the last batch of each phase."""

    def __init__(self) -> None:
        self.nbytes: dict[Phase, int] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(trainer.strategy, OneBitDDPStrategy)
        self.nbytes[trainer.strategy.phase] = used_bytes(pl_module.device)


def used_bytes(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True)
class Usage:
    parameters: int
    dense_bytes: int
    compressed_bytes: int


def train(layers: int, options: dict[str, Any], nodes: int, accelerator: str) -> Usage:
    """One short training; runs on every node."""
    torch.set_num_threads(1)
    model, gauge = Layers(layers), Gauge()
    trainer = pl.Trainer(
        strategy=OneBitDDPStrategy(timeout=timedelta(seconds=60), **options),
        accelerator=accelerator,
        devices=1,
        num_nodes=nodes,
        max_steps=WARMUP_STEPS + COMPRESSED_STEPS,
        # The gauge first: at the end of the last dense batch, before the switch.
        callbacks=[gauge, PhaseSwitch(criterion=FixedStep(WARMUP_STEPS))],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    generator = torch.Generator().manual_seed(1 + int(os.environ["RANK"]))
    batches = torch.randn(WARMUP_STEPS + COMPRESSED_STEPS, WIDTH, generator=generator)
    trainer.fit(model, DataLoader(TensorDataset(batches), batch_size=1))
    return Usage(
        parameters=sum(p.numel() for p in model.parameters()),
        dense_bytes=gauge.nbytes[Phase.WARMUP],
        compressed_bytes=gauge.nbytes[Phase.COMPRESSED],
    )


def run(layers: int, options: dict[str, Any], nodes: int, settings: argparse.Namespace) -> Usage:
    """:func:`train` on all nodes; what rank 0 saw."""
    with Loopback(nodes=nodes) as network:
        usages: list[Usage] = network.call(
            train, layers, options, nodes, settings.accelerator, timeout_seconds=settings.timeout
        )
    return usages[0]


def main() -> int:
    settings = parse_arguments()
    exit_on_sigterm()
    facts = environment()
    rows, results = [], []
    try:
        for nodes in settings.nodes:
            for mode, options in MODES.items():
                small, large = (run(layers, options, nodes, settings) for layers in settings.layers)
                parameters = large.parameters - small.parameters
                dense = (large.dense_bytes - small.dense_bytes) / parameters
                compressed = (large.compressed_bytes - small.compressed_bytes) / parameters
                more = 8 / nodes + 1 if options.get("variance_refresh", "auto") else 4 / nodes
                bound = (dense + more) * 1.05
                rows.append((f"{nodes}", mode, f"{dense:.2f}", f"{compressed:.2f}", f"{bound:.2f}"))
                results.append(
                    {
                        "ranks": nodes,
                        "mode": mode,
                        "dense": dense,
                        "compressed": compressed,
                        "bound": bound,
                        "of": [small, large],
                    }
                )
    except LabError as error:
        print(f"memory: {error}", file=sys.stderr)
        return 1
    header = ("ranks", "compressed phase", "dense Adam, bytes/parameter", "compressed, bytes/parameter", "bound")
    what = "torch.cuda.memory_allocated" if settings.accelerator == "cuda" else "resident memory"
    text = "\n\n".join([describe(facts), f"{what} of rank 0, per parameter", table(header, rows)])
    print(text)
    if settings.out is not None:
        settings.out.write_text(text + "\n", encoding="utf-8")
        save(settings.out.with_suffix(".json"), {"environment": facts, "results": results})
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python benchmarks/memory.py"
    )
    parser.add_argument("--nodes", nargs="+", type=int, default=[2, 4], help="ranks, on loopback (default: %(default)s)")
    parser.add_argument(
        "--layers",
        nargs=2,
        type=int,
        default=[20, 60],
        help="sizes of the model, in million parameters (default: %(default)s)",
    )
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=180.0, metavar="S", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, and the numbers beside it as .json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
