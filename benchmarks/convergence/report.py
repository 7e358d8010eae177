"""Tables and curves from lines of results: differences to Adam with the same seed, in units of Adam's spread over seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.convergence.methods import BY_WARMUP, CORE, FURTHER, METHODS, WARMUPS
from benchmarks.convergence.training import EVALUATIONS
from benchmarks.report import describe, environment, table

Line = dict[str, Any]
HALF = EVALUATIONS // 2
"""Points of a curve that lie in the second half of a run."""


def write_report(lines: Sequence[Line], results: Path) -> str:
    """Write a .txt and, where matplotlib is installed, a .png beside ``results``; return the text.

    Trainings that diverged are told, and left out of all means.
    """
    versions = {**environment("scikit-learn"), "command": "python -m benchmarks.convergence report"}
    parts = [describe(versions), EXPLANATION]
    diverged = [line for line in lines if line["loss"] is None]
    lines = [line for line in lines if line["loss"] is not None]
    for line in diverged:
        where = f"{line['workload']}, {line['method']}, seed {line['seed']}"
        parts.append(f"Diverged: {where}, {_words(*_setting(line))}, at step {line['diverged_at']}.")
    for setting, group in _groups(lines).items():
        parts.append(f"## {_words(*setting)}\n\n{_summary(group)}\n\n{_details(group)}")
    parts.append(f"## Each method at its own best learning rate\n\n{_at_own_best(lines)}")
    parts.append(f"## Length of the warm-up\n\n{_by_warmup(next(iter(_groups(lines).values())))}")
    text = "\n\n".join(parts) + "\n"
    results.with_suffix(".txt").write_text(text, encoding="utf-8")
    _draw(lines, results.with_suffix(".png"))
    return text


EXPLANATION = """\
Held-out loss (DCGAN: Frechet distance of pixels), minus Adam's with the same seed, in its own units and, after the slash, in
standard deviations of Adam's loss over the seeds (of three seeds at least); in brackets the standard deviation of the
difference over the seeds, and their number. Mean of the last half: of the losses in the second half of the run. Bytes: of
the whole run, per rank, against dense float32 DDP, as counted by the library (payload). Speed: the displacement, projected
on what Adam would have moved on the same gradients; 1 is right, and more acts as a larger learning rate. v: quartiles of
sqrt(v / v_true) at the end, v_true the second moment of the mean gradient. `exact` is one rank that gets the mean gradient:
no bytes."""


def _groups(lines: Sequence[Line]) -> dict[tuple[Any, ...], list[Line]]:
    """Lines that may be compared: of the same ranks, steps, beta2, and learning rates."""
    usual: dict[str, int] = {}
    for line in lines:
        usual[line["workload"]] = min(line["steps"], usual.get(line["workload"], line["steps"]))
    groups = defaultdict(list)
    for line in lines:
        groups[_setting(line, usual[line["workload"]])].append(line)
    return dict(sorted(groups.items(), key=lambda item: (len(item[1]) * -1, str(item[0]))))


def _setting(line: Line, usual_steps: int | None = None) -> tuple[Any, ...]:
    """Ranks, steps if they are not as usual, beta2, and what is done to the learning rate."""
    steps = line["steps"] if line["steps"] != usual_steps else None
    return line["ranks"], steps, line["beta2"], line["lr_scale"], line.get("lr_end")


def _words(ranks: int, steps: int | None, beta2: float | None, lr_scale: float, lr_end: float | None) -> str:
    changes = [f"{ranks} ranks"]
    changes += [f"{steps} steps"] if steps is not None else []
    changes += [f"beta2 {beta2}"] if beta2 is not None else []
    changes += [f"learning rate x {lr_scale:g}"] if lr_scale != 1 else []
    changes += [f"learning rate falls to {lr_end:g} of the largest"] if lr_end is not None else []
    return ", ".join(changes)


def _by_seed(group: Sequence[Line], workload: str, method: str) -> dict[int, Line]:
    return {line["seed"]: line for line in group if line["workload"] == workload and line["method"] == method}


def _names(group: Sequence[Line], of: str) -> list[str]:
    return list(dict.fromkeys(line[of] for line in group))


def _methods(group: Sequence[Line]) -> list[str]:
    there = set(_names(group, "method"))
    return [name for name in METHODS if name in there]


def _sd(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def _differences(group: Sequence[Line], workload: str, method: str) -> list[float]:
    adam = _by_seed(group, workload, "adam")
    own = _by_seed(group, workload, method)
    return [own[seed]["loss"] - adam[seed]["loss"] for seed in sorted(own.keys() & adam.keys())]


def _summary(group: Sequence[Line]) -> str:
    """Workloads down, methods across."""
    methods = [name for name in _methods(group) if name in CORE + FURTHER and name != "adam"]
    rows = []
    for workload in _names(group, "workload"):
        adam = [line["loss"] for line in _by_seed(group, workload, "adam").values()]
        if not adam:
            continue
        spread = _sd(adam)
        row = [workload, f"{statistics.mean(adam):.4f} ({spread:.4f}; {len(adam)})"]
        for method in methods:
            differences = _differences(group, workload, method)
            if differences:
                mean = statistics.mean(differences)
                in_units = f"{mean / spread:+.1f}" if len(adam) >= 3 else "-"  # two seeds tell no spread
                row.append(f"{mean:+.4f} ({_sd(differences):.4f}; {len(differences)}) / {in_units}")
            else:
                row.append("-")
        rows.append(row)
    return table(["workload", "adam (sd; seeds)", *methods], rows)


def _by_warmup(group: Sequence[Line]) -> str:
    """Workloads down, lengths of the warm-up across, with refreshes and without: seed 0, minus Adam's loss."""
    rows = []
    for workload in _names(group, "workload"):
        spread = _sd([line["loss"] for line in _by_seed(group, workload, "adam").values()])
        for kind, methods in BY_WARMUP.items():
            lines = [_by_seed(group, workload, name).get(0) for name in methods]
            if any(line is not None and name not in CORE for name, line in zip(methods, lines, strict=True)):
                adam = _by_seed(group, workload, "adam")[0]["loss"]
                cells = ["-" if line is None else f"{line['loss'] - adam:+.4f}" for line in lines]
                rows.append([f"{workload} ({spread:.4f})", kind, *cells])
    return "Seed 0 alone, minus Adam's; in brackets Adam's sd over the seeds.\n\n" + table(["workload", "v", *WARMUPS], rows)


def _at_own_best(lines: Sequence[Line]) -> str:
    """Mean losses by learning rate, of methods that were tried with several: at 4 ranks, else as usual."""
    scales = sorted({line["lr_scale"] for line in lines})
    losses = defaultdict(list)
    for (ranks, steps, beta2, lr_scale, lr_end), group in _groups(lines).items():
        if (ranks, steps, beta2, lr_end) == (4, None, None, None):
            for line in group:
                losses[line["workload"], line["method"], lr_scale].append(line["loss"])
    rows = []
    for workload in _names(lines, "workload"):
        for method in METHODS:
            means = {s: statistics.mean(each) for s in scales if len(each := losses[workload, method, s]) >= 3}
            if len(means) > 1:
                best = min(means, key=lambda scale: means[scale])
                cells = [f"{means[s]:.4f}{' <' if s == best else ''}" if s in means else "-" for s in scales]
                rows.append([workload, method, *cells])
    return "Means over three seeds or more; < marks the best.\n\n" + table(
        ["workload", "method", *(f"x {scale:g}" for scale in scales)], rows
    )


def _details(group: Sequence[Line]) -> str:
    rows = []
    for workload in _names(group, "workload"):
        for method in _methods(group):
            lines = list(_by_seed(group, workload, method).values())
            if not lines:
                continue
            sent = statistics.mean(line["bytes"] for line in lines)
            v = [statistics.mean(line["scatter"][0][i] for line in lines) for i in (1, 2, 3)]
            speeds = [statistics.mean(line["speed"][i] for line in lines) for i in range(len(lines[0]["speed"]))]
            rows.append(
                [
                    workload,
                    method,
                    " ".join(f"{line['loss']:.4f}" for line in lines),
                    " ".join(f"{statistics.mean(loss for _, loss in line['curve'][-HALF:]):.4f}" for line in lines),
                    f"1/{lines[0]['ddp_bytes'] / sent:.1f}" if sent else "-",
                    " ".join(f"{speed:.2f}" for speed in speeds),
                    " ".join(f"{each:.2f}" for each in v),
                    f"{statistics.mean(line['seconds'] for line in lines):.0f}",
                    "yes" if all(line["ranks_equal"] for line in lines) else "NO",
                ]
            )
    header = [
        "workload",
        "method",
        "losses by seed",
        "mean of the last half",
        "bytes",
        "speed",
        "v",
        "seconds",
        "ranks equal",
    ]
    return table(header, rows)


def _draw(lines: Sequence[Line], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("No curves: matplotlib is not installed.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    group = next(iter(_groups(lines).values()))
    workloads = _names(group, "workload")
    columns = min(4, len(workloads))
    rows = -(-len(workloads) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False)
    for axis in axes.flat[len(workloads) :]:
        axis.axis("off")
    palette, drawn = pyplot.get_cmap("tab20"), {}
    for axis, workload in zip(axes.flat, workloads, strict=False):
        seeds = len(_by_seed(group, workload, "adam"))
        for method in _methods(group):
            curves = [line["curve"] for line in _by_seed(group, workload, method).values()]
            if curves and len(curves) >= seeds:  # of other seeds, means are not to be compared
                means = [
                    statistics.mean(points) for points in zip(*([y for _, y in curve] for curve in curves), strict=True)
                ]
                color = drawn[method].get_color() if method in drawn else palette(len(drawn) % palette.N)
                (drawn[method],) = axis.plot([step for step, _ in curves[0]], means, color=color, linewidth=1)
        axis.set_title(workload, fontsize=9)
        axis.set_yscale("log")
        axis.tick_params(labelsize=7)
    figure.legend(drawn.values(), drawn, loc="lower right", fontsize=8, ncols=2)
    figure.suptitle("Held-out loss, mean over the seeds", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
