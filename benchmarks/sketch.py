"""How exactly a sketch gives the norm of the mean gradient, and what it costs.

    python benchmarks/sketch.py --out benchmarks/results/sketch.txt

For gradients of several kinds, dimensions d, sketch sizes k and numbers of workers n: every worker sketches its own
gradient, the sketches are averaged, and the norm is compared with that of the mean gradient. That is what clipping by norm
does in the compressed phase: an error of the norm is one of the clipping coefficient. Errors are relative, over many seeds.
The promise is sqrt(2 / k) / 2 for their root mean square; up to d = k a sketch is exact.

For comparison stands what each worker could do by itself, with the norm of its own gradient: how many times that is too
large.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from report import Spread, describe, environment, save, table
from torch import Tensor

from lightning_onebit.engine.clipping import SKETCH_NUMEL, NormSketch

SIGNAL = 0.3
"""Size of what all workers' gradients have in common, where the noise of each is 1."""

CPU = torch.device("cpu")


def noise(numel: int, generator: torch.Generator) -> Tensor:
    return torch.randn(numel, generator=generator)


def heavy_tail(numel: int, generator: torch.Generator) -> Tensor:
    return torch.randn(numel, generator=generator).pow_(3)


def layer(numel: int, generator: torch.Generator) -> Tensor:
    """Rank 1: derivatives of a ReLU layer's outputs times its inputs, of which nine in ten are zero. 1000 inputs."""
    inputs = torch.randn(1000, generator=generator) * (torch.rand(1000, generator=generator) < 0.1)
    return torch.outer(torch.randn(numel // 1000, generator=generator).relu_(), inputs).view(-1)


KINDS: dict[str, Callable[[int, torch.Generator], Tensor]] = {"noise": noise, "heavy tail": heavy_tail, "layer": layer}


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    kind: str
    numel: int
    sketch_numel: int
    workers: int
    local_norm_ratio: float
    """Root mean square of the workers' norms over the norm of their mean."""
    rms_error: float
    largest_error: float
    promised_rms_error: float
    seconds: Spread
    """To sketch one worker's gradient, on one core."""


def measure(kind: str, numel: int, workers: int, sketch_numels: list[int], seeds: int) -> list[Accuracy]:
    """Of the same gradients for each size of the sketch."""
    generator = torch.Generator().manual_seed(numel + workers)
    common = KINDS[kind](numel, generator).mul_(SIGNAL)
    gradients = [KINDS[kind](numel, generator).add_(common) for _ in range(workers)]
    exact = torch.linalg.vector_norm(sum(gradients, torch.zeros(numel)).div_(workers), dtype=torch.float64).item()
    squared_local = sum(torch.linalg.vector_norm(g, dtype=torch.float64).item() ** 2 for g in gradients) / workers
    results = []
    for sketch_numel in sketch_numels:
        errors, seconds = [], []
        for seed in range(seeds):
            mean = torch.zeros(sketch_numel)
            for gradient in gradients:
                start = time.perf_counter()
                sketch = NormSketch(seed, device=CPU, numel=sketch_numel)
                sketch.add_([gradient], [numel])
                seconds.append(time.perf_counter() - start)
                mean.add_(sketch.buckets, alpha=1 / workers)
            errors.append(torch.linalg.vector_norm(mean).item() / exact - 1)
        results.append(
            Accuracy(
                kind=kind,
                numel=numel,
                sketch_numel=sketch_numel,
                workers=workers,
                local_norm_ratio=math.sqrt(squared_local) / exact,
                rms_error=math.sqrt(sum(e * e for e in errors) / seeds),
                largest_error=max(map(abs, errors)),
                promised_rms_error=math.sqrt(2 / sketch_numel) / 2,
                seconds=Spread.of(seconds),
            )
        )
    return results


def main() -> None:
    settings = parse_arguments()
    facts = environment()
    torch.set_num_threads(1)
    results = [
        accuracy
        for kind in KINDS
        for numel in settings.numels
        for workers in settings.workers
        for accuracy in measure(kind, numel, workers, settings.sketch_numels, settings.seeds)
    ]
    header = (
        "gradient",
        "d",
        "n",
        "local / mean norm",
        "k",
        "rms error",
        "largest",
        "promised rms",
        "ms, one worker",
    )
    rows = [
        (
            r.kind,
            f"{r.numel:.0e}".replace("e+0", "e"),
            f"{r.workers}",
            f"{r.local_norm_ratio:.2f}",
            f"{r.sketch_numel}",
            f"{r.rms_error:.2%}",
            f"{r.largest_error:.2%}",
            f"{r.promised_rms_error:.2%}",
            r.seconds.milliseconds(),
        )
        for r in results
    ]
    text = "\n\n".join([describe(facts), f"relative errors over {settings.seeds} seeds", table(header, rows)])
    print(text)
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(text + "\n", encoding="utf-8")
        save(settings.out.with_suffix(".json"), {"environment": facts, "results": results})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python benchmarks/sketch.py"
    )
    parser.add_argument(
        "--numels", nargs="+", type=int, default=[10_000, 100_000, 1_000_000, 10_000_000], help="d (default: %(default)s)"
    )
    parser.add_argument(
        "--sketch-numels", nargs="+", type=int, default=[1024, 4096, SKETCH_NUMEL], help="k (default: %(default)s)"
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 8], help="n (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, and the numbers beside it as .json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
