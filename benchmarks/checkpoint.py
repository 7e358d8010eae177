"""What a checkpoint takes, in bytes and seconds: plain DDP's beside one of the compressed phase, in turns.

    python benchmarks/checkpoint.py --nodes 2 4 --out benchmarks/results/checkpoint.txt

A model of square layers trains a few steps. Then the same Trainer saves and the next one resumes, several times; with
``strategy="ddp"`` and with ours, one after the other. Seconds are those of the slowest rank, from calling
``trainer.save_checkpoint`` until it returns (flushed to disk with ours; plain DDP does not flush), and of loading
everything but the model. All ranks share this machine's disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lab import LabError, Loopback, exit_on_sigterm
from lightning.pytorch.strategies import DDPStrategy
from memory import WIDTH, Layers
from report import Spread, describe, environment, save, table
from torch.utils.data import DataLoader, TensorDataset

from lightning_onebit import FixedStep, OneBitDDPStrategy, PhaseSwitch

STEPS, WARMUP_STEPS = 5, 2
STRATEGIES: dict[str, type[DDPStrategy]] = {"ddp": DDPStrategy, "onebit_ddp": OneBitDDPStrategy}


class Saving(pl.Callback):
    """Saves at the end, and notes the seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = 0.0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.barrier()
        start = time.perf_counter()
        trainer.save_checkpoint(self.path)
        self.seconds = time.perf_counter() - start


def timed_loading(kind: type[DDPStrategy], seconds: list[float]) -> type[DDPStrategy]:
    class Timed(kind):  # type: ignore[misc, valid-type]
        def load_optimizer_state_dict(self, checkpoint: Any) -> None:
            start = time.perf_counter()
            super().load_optimizer_state_dict(checkpoint)
            seconds.append(time.perf_counter() - start)

    return Timed


def trainer_of(kind: type[DDPStrategy], nodes: int, epochs: int, callbacks: list[pl.Callback]) -> pl.Trainer:
    if issubclass(kind, OneBitDDPStrategy):
        callbacks = [PhaseSwitch(criterion=FixedStep(WARMUP_STEPS)), *callbacks]
    return pl.Trainer(
        strategy=kind(timeout=timedelta(seconds=120)),
        accelerator="cpu",
        devices=1,
        num_nodes=nodes,
        max_epochs=epochs,
        callbacks=callbacks,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def save_and_resume(name: str, layers: int, nodes: int, folder: Path) -> tuple[float, float]:
    """Seconds to save, and to load what is not the model; runs on every node."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1 + int(os.environ["RANK"]))
    batches = DataLoader(TensorDataset(torch.randn(STEPS, WIDTH, generator=generator)), batch_size=1)
    saving, loading = Saving(folder / f"{name}.ckpt"), list[float]()
    trainer_of(STRATEGIES[name], nodes, 1, [saving]).fit(Layers(layers), batches)
    resumed = trainer_of(timed_loading(STRATEGIES[name], loading), nodes, 1, [])
    resumed.fit(Layers(layers), batches, ckpt_path=saving.path)
    return saving.seconds, loading[0]


def main() -> int:
    settings = parse_arguments()
    exit_on_sigterm()
    facts = environment()
    rows, results = [], []
    parameters = sum(p.numel() for p in Layers(settings.layers).parameters())
    try:
        for nodes in settings.nodes:
            seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in STRATEGIES}
            sizes: dict[str, tuple[int, list[int]]] = {}
            for _ in range(settings.repetitions):
                for name in STRATEGIES:
                    folder = Path(tempfile.mkdtemp(dir=settings.folder))
                    with Loopback(nodes=nodes) as network:
                        args = (save_and_resume, name, settings.layers, nodes, folder)
                        saves, loads = zip(*network.call(*args, timeout_seconds=settings.timeout), strict=True)
                    seconds[name].append((max(saves), max(loads)))
                    parts = [part.stat().st_size for part in folder.glob("*.onebit/*")]
                    sizes[name] = ((folder / f"{name}.ckpt").stat().st_size, parts)
                    shutil.rmtree(folder)
            for name in STRATEGIES:
                size, parts = sizes[name]
                saving, loading = (Spread.of(each) for each in zip(*seconds[name], strict=True))
                part = f"{max(parts) / parameters:.2f}" if parts else "-"
                row = (f"{nodes}", name, f"{size / parameters:.2f}", part, saving.milliseconds(), loading.milliseconds())
                rows.append(row)
                results.append(
                    {"ranks": nodes, "strategy": name, "ckpt_bytes": size, "part_bytes": parts, "seconds": seconds[name]}
                )
    except LabError as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        return 1
    header = ("ranks", "strategy", ".ckpt, bytes/parameter", "part of a rank, bytes/parameter", "save, ms", "load, ms")
    repeated = f"{settings.repetitions} repetitions, median [quartiles] of the slowest rank"
    about = f"{parameters:,} float32 parameters, Adam; {repeated}"
    text = "\n\n".join([describe(facts), about, table(header, rows)])
    print(text)
    if settings.out is not None:
        settings.out.write_text(text + "\n", encoding="utf-8")
        save(settings.out.with_suffix(".json"), {"environment": facts, "parameters": parameters, "results": results})
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python benchmarks/checkpoint.py"
    )
    parser.add_argument("--nodes", nargs="+", type=int, default=[2, 4], help="ranks, on loopback (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=50, help="million parameters (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to save (default: the folder for temporary files)")
    parser.add_argument("--timeout", type=float, default=180.0, metavar="S", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, and the numbers beside it as .json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
