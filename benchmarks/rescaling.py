"""How far u may grow at a refresh: what that gives where gradients shrink, and does where there are none any more.

    python benchmarks/rescaling.py --out benchmarks/results/rescaling.txt

At a refresh the momentum m = u D is kept, so u is multiplied by D_old / D_new. But u is what came out of a quantizer: plus
or minus the scale of its block, also where the momentum is nothing. There a growing u is noise that grows. The package's own
engine, on ranks that are threads, with several bounds of D_old / D_new; the truth is Adam on the mean gradient.

One tensor has rows of four kinds, in turn, so that all are in the same blocks. *Steady*: on each rank noise of standard
deviation 1 and a drift of 0.2. *Shrinking*: the same times (1 + step / 20)^-1/2. *Stopped*: steady until step 30, then no
gradient at all. *Rare*: a gradient near 1 at every 200th step, on one rank. Of steady and shrinking rows the displacement
since the switch, projected on Adam's, over Adam's. Of stopped rows the root mean square of the displacement since step 100,
in learning rates, and that of steady rows for comparison. Of rare rows the displacement over Adam's: the mean of all rows,
and the smallest and largest of one row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from unittest import mock

import torch
from report import describe, environment, save, table
from torch import Tensor, nn

from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.quantize import cpu_variance

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from thread_ranks import run_threads

WARMUP_STEPS, EARLY_STEPS, STEPS = 20, 100, 1000
STOPS_AT, RARE_EVERY = 30, 200
ROWS, COLUMNS = 32, 64
KINDS = ("steady", "shrinking", "stopped", "rare")
BOUNDS = (4.0, 1.25, 1.1, 1.0)
SETTINGS = ((0.95, 2), (0.95, 8), (0.98, 8), (0.999, 2), (0.999, 8))
"""beta2 and ranks."""
SEEDS = (0, 1, 2)

History = dict[int, Tensor]
"""The parameter, ``[4 * 32, 64]``, after some steps."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """By seed, what the table explains."""

    beta2: float
    ranks: int
    bound: float
    steady: list[float]
    shrinking_early: list[float]
    shrinking: list[float]
    stopped_moved: list[float]
    stopped_moved_by_adam: list[float]
    steady_moved: list[float]
    rare: list[list[float]]
    """And by row."""


def gradient(rank: int, ranks: int, step: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 * seed + 7_919 * step + rank)
    g = torch.randn(len(KINDS) * ROWS, COLUMNS, generator=generator) + 0.2
    _, shrinking, stopped, rare = (g[kind :: len(KINDS)] for kind in range(len(KINDS)))
    shrinking /= (1 + step / 20) ** 0.5
    stopped *= step < STOPS_AT
    number = step + 37 * torch.arange(ROWS)  # rows have theirs at different steps, on one rank after the other
    is_mine = (number % RARE_EVERY == 0) & ((number // RARE_EVERY + torch.arange(ROWS)) % ranks == rank)
    rare.copy_((0.3 * rare + 1) * is_mine[:, None])
    return g


def mean_gradient(ranks: int, step: int, seed: int) -> Tensor:
    return torch.stack([gradient(rank, ranks, step, seed) for rank in range(ranks)]).mean(0)


def history(seed: int, beta2: float, ranks: int, communicator: Communicator | None = None) -> History:
    """Of Adam on the mean gradient; with a communicator, from the end of the warm-up on compressed, on this rank."""
    x = nn.Parameter(torch.zeros(len(KINDS) * ROWS, COLUMNS))
    optimizer = torch.optim.Adam([x], lr=1.0, betas=(0.9, beta2))
    step_ = optimizer.step
    kept = {}
    for step in range(STEPS + 1):
        if step in (0, WARMUP_STEPS, EARLY_STEPS, STEPS):
            kept[step] = x.detach().clone()
        if communicator is not None and step == WARMUP_STEPS:
            step_ = CompressedOptimizer(optimizer, CompressionConfig(), communicator, {}).step
        if communicator is not None and step >= WARMUP_STEPS:
            x.grad = gradient(communicator.rank, ranks, step, seed)
        else:
            x.grad = mean_gradient(ranks, step, seed)
        step_()
    return kept


def moved(kept: History, kind: str, first: int, last: int) -> Tensor:
    """Displacement of the rows of a kind between two steps."""
    return (kept[last] - kept[first])[KINDS.index(kind) :: len(KINDS)]


def measure(beta2: float, ranks: int) -> Iterator[Outcome]:
    adams = [history(seed, beta2, ranks) for seed in SEEDS]
    for bound in BOUNDS:
        with mock.patch.object(cpu_variance, "LARGEST_RESCALING", bound):
            ours = [
                run_threads(ranks, lambda communicator, seed=seed: history(seed, beta2, ranks, communicator), timeout=600)[0]
                for seed in SEEDS
            ]
        pairs = list(zip(ours, adams, strict=True))

        def projected(kind: str, last: int, pairs: list[tuple[History, History]] = pairs) -> list[float]:
            both = [(moved(h, kind, WARMUP_STEPS, last), moved(a, kind, WARMUP_STEPS, last)) for h, a in pairs]
            return [float((own * true).sum() / true.square().sum()) for own, true in both]

        def size(histories: list[History], kind: str) -> list[float]:
            return [float(moved(h, kind, EARLY_STEPS, STEPS).square().mean().sqrt()) for h in histories]

        yield Outcome(
            beta2=beta2,
            ranks=ranks,
            bound=bound,
            steady=projected("steady", STEPS),
            shrinking_early=projected("shrinking", EARLY_STEPS),
            shrinking=projected("shrinking", STEPS),
            stopped_moved=size(ours, "stopped"),
            stopped_moved_by_adam=size(adams, "stopped"),
            steady_moved=size(ours, "steady"),
            rare=[(moved(h, "rare", 0, STEPS).mean(1) / moved(a, "rare", 0, STEPS).mean(1)).tolist() for h, a in pairs],
        )


def shown(values: list[float], digits: int = 2) -> str:
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("rescaling.txt"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    about, outcomes = environment(), []
    for beta2, ranks in SETTINGS:
        for outcome in measure(beta2, ranks):
            print(outcome.beta2, outcome.ranks, outcome.bound, flush=True)
            outcomes.append(outcome)
    header = (
        *("beta2, ranks", "bound", "steady", "shrinking, to step 100", "shrinking"),
        *("stopped moved", "by Adam", "steady moved", "rare", "rare, a row"),
    )
    lines = []
    for o in outcomes:
        by_row = [ratio for of_seed in o.rare for ratio in of_seed]
        cells = [f"{o.beta2}, {o.ranks}", f"{o.bound:g}", shown(o.steady), shown(o.shrinking_early), shown(o.shrinking)]
        cells += [shown(o.stopped_moved, 1), shown(o.stopped_moved_by_adam), shown(o.steady_moved, 1)]
        cells += [shown([mean(of_seed) for of_seed in o.rare]), f"{min(by_row):.2f} to {max(by_row):.2f}"]
        lines.append(cells)
    explained = (__doc__ or "").split("\n\n", 2)[2].strip()
    seeds = f"Mean of {len(SEEDS)} seeds (smallest to largest)."
    text = f"{describe(about)}\n\n{explained} {seeds}\n\n{table(header, lines)}\n"
    out.write_text(text, encoding="utf-8")
    print(text)
    save(out.with_suffix(".json"), {"environment": about, "outcomes": outcomes})


if __name__ == "__main__":
    main()
