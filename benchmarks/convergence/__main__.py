"""Does training with this library end where Adam ends? Trains small models on data that comes with Python, and reports.

    python -m benchmarks.convergence run                          # the core: 11 workloads, 5 methods, seeds 0 to 2, 4 ranks
    python -m benchmarks.convergence run --set further            # on two workloads: other methods, ranks, beta2; see `list`
    python -m benchmarks.convergence run --set warmups            # other lengths of the warm-up
    python -m benchmarks.convergence run --workloads gpt --methods adam renewed --seeds 0 --ranks 16 --beta2 0.95
    python -m benchmarks.convergence report                       # tables, and curves as PNG where matplotlib is
    python -m benchmarks.convergence list

`run` appends a line of JSON per training to --results; what is there already is not done again, so it can be stopped and
started. Run from the root of the repository. The core takes about an hour of two cores, of which nothing else uses any.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from benchmarks.convergence.methods import BY_WARMUP, CORE, FURTHER, METHODS  # noqa: E402
from benchmarks.convergence.report import write_report  # noqa: E402
from benchmarks.convergence.training import Setting, train  # noqa: E402
from benchmarks.convergence.workloads import WORKLOADS  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "convergence.jsonl"
SEEDS = (0, 1, 2)
TWO = ("gpt", "vit")
"""The workloads of the further settings."""
ONE_SEED = ("renewed45", "renewed_u", "renewed_4", "renewed_4_u")
"""Further methods that were told apart by the displacement: no spread of losses is needed."""


def core() -> Iterator[Setting]:
    for seed, workload, method in itertools.product(SEEDS, WORKLOADS, CORE):
        yield Setting(workload=workload, method=method, seed=seed)


def further() -> Iterator[Setting]:
    """On two workloads: other methods, all of them with other learning rates, too; the default with more ranks, another
    beta2, other decays; a long run."""
    for seed, workload in itertools.product(SEEDS, TWO):
        for method in FURTHER:
            if seed == SEEDS[0] or method not in ONE_SEED:
                yield Setting(workload=workload, method=method, seed=seed)
        for method, lr_scale in itertools.product((*CORE, *FURTHER), (0.5, 2.0)):
            if method not in ONE_SEED:
                yield Setting(workload=workload, method=method, seed=seed, lr_scale=lr_scale)
        for method, ranks in itertools.product(("adam", "renewed"), (16, 32)):
            yield Setting(workload=workload, method=method, seed=seed, ranks=ranks)
        for method in ("adam", "renewed", "exact"):
            yield Setting(workload=workload, method=method, seed=seed, beta2=0.95)
        for method, lr_end in itertools.product(("adam", "renewed", "frozen15"), (0.0, 1.0)):
            yield Setting(workload=workload, method=method, seed=seed, lr_end=lr_end)
    for method, seed in (*itertools.product(("adam", "renewed"), (0, 1)), ("exact", 0), ("frozen15", 0)):
        yield Setting(workload="vit", method=method, seed=seed, steps=5000)


def warmups() -> Iterator[Setting]:
    """Other lengths of the warm-up, with refreshes and without, one seed."""
    for workload, methods in itertools.product(WORKLOADS, BY_WARMUP.values()):
        for method in methods:
            yield Setting(workload=workload, method=method, seed=SEEDS[0])


SETS = {"core": core, "further": further, "warmups": warmups}


def chosen(arguments: argparse.Namespace) -> Iterator[Setting]:
    if arguments.set is not None:
        settings: Iterator[Setting] = SETS[arguments.set]()
    elif (
        any((arguments.ranks, arguments.steps, arguments.beta2, arguments.lr_scale, arguments.methods))
        or arguments.lr_end is not None
    ):
        settings = (
            Setting(
                workload=workload,
                method=method,
                seed=seed,
                ranks=arguments.ranks or 4,
                steps=arguments.steps,
                beta2=arguments.beta2,
                lr_scale=arguments.lr_scale or 1.0,
                lr_end=arguments.lr_end,
            )
            for seed, workload, method in itertools.product(
                arguments.seeds or SEEDS, arguments.workloads or WORKLOADS, arguments.methods or CORE
            )
        )
    else:
        settings = core()
    for setting in settings:
        if arguments.workloads and setting.workload not in arguments.workloads:
            continue
        if arguments.methods and setting.method not in arguments.methods:
            continue
        if arguments.seeds is None or setting.seed in arguments.seeds:
            yield setting


def key(line: dict[str, object]) -> tuple[object, ...]:
    """What is the same in two lines about the same training."""
    return tuple(line.get(name) for name in ("workload", "method", "seed", "ranks", "steps", "beta2", "lr_scale", "lr_end"))


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    done = {key(line) for line in read(arguments.results)}
    for setting in chosen(arguments):
        if key({**vars(setting), "steps": setting.of_workload().steps}) in done:
            continue
        line = train(setting)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        with arguments.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{setting}: loss {line['loss']}, {line['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "report", "list"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="a .jsonl; the report goes beside it")
    parser.add_argument("--set", choices=list(SETS))
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--beta2", type=float)
    parser.add_argument("--lr-scale", type=float)
    parser.add_argument("--lr-end", type=float, help="the last learning rate over the largest")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments)
    elif arguments.command == "report":
        print(write_report(read(arguments.results), arguments.results))
    else:
        for workload in WORKLOADS.values():
            print(f"{workload.name}: {workload.steps} steps, lr {workload.lr}, {workload.note}")
        for method in METHODS.values():
            print(f"{method.name}: {method.text}")


if __name__ == "__main__":
    main()
