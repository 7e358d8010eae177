"""A picture of one compressed step: what the training thread and the exchange thread do when, deferred and overlapped.

    python benchmarks/profile_step.py --nodes 4 --rate 200mbit --out benchmarks/results/profile_step.txt

torch.profiler records rank 0, all threads; the names are those of the package's ``record_function`` ranges. The step that is
shown is the one of median duration; the table gives the median of every range over all profiled steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lab import LOOPBACK, LabError, check_requirements, exit_on_sigterm, make_lab
from report import SHARED_CORES, describe, environment, save, table
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function
from training_step import WARMUP_STEPS, add_model_arguments, make_model, random_words

from lightning_onebit import FixedStep, OneBitDDPStrategy, PhaseSwitch

FORWARD, BACKWARD, STEP = "forward", "backward", "step"
MODES = {"deferred": False, "overlapped": True}
NAMES = (
    FORWARD, BACKWARD, "onebit::agree", "onebit::encode", "onebit::wait", "onebit::apply", "onebit::sketch",
    "onebit::refresh", "onebit::all_to_all", "onebit::serve", "onebit::all_gather",
)  # fmt: skip
NOTES = (
    SHARED_CORES,
    "forward, backward: of the training thread, apart from what it encodes in between;"
    " wait: the training thread has nothing to do until an exchange is complete",
    "all_to_all, serve and all_gather are in the exchange thread; the others in the training thread",
)


@dataclass(frozen=True, kw_only=True)
class Range:
    """Something that a thread did. Seconds since the start of the step."""

    name: str
    in_training_thread: bool
    start: float
    end: float


class Profiler(pl.Callback):
    """Profiles the last ``steps`` batches."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.profiles: list[profile] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx >= trainer.max_steps - self.steps:
            config = _ExperimentalConfig(profile_all_threads=True)
            self.profiles.append(profile(activities=[ProfilerActivity.CPU], experimental_config=config, acc_events=True))
            self.profiles[-1].start()
            self._enter(STEP, FORWARD)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        if self.profiles:
            self._ranges.pop().__exit__(None, None, None)
            self._enter(BACKWARD)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.profiles:
            while self._ranges:
                self._ranges.pop().__exit__(None, None, None)
            self.profiles[-1].stop()

    def _enter(self, *names: str) -> None:
        self._ranges = getattr(self, "_ranges", [])
        for name in names:
            self._ranges.append(record_function(name))
            self._ranges[-1].__enter__()


def ranges_of(recorded: profile) -> list[Range]:
    """The named ranges of one step."""
    events = [event for event in recorded.events() if event.name in (*NAMES, STEP)]
    (step,) = (event for event in events if event.name == STEP)
    agree = next(event for event in events if event.name == "onebit::agree")
    ranges = []
    for event in events:
        if event.name != STEP:
            # The range of backward is left open until the end of the batch: it ends where the optimizer begins.
            end = agree.time_range.start if event.name == BACKWARD else event.time_range.end
            start, end = ((t - step.time_range.start) / 1e6 for t in (event.time_range.start, end))
            ranges.append(Range(name=event.name, in_training_thread=event.thread == step.thread, start=start, end=end))
    end = (step.time_range.end - step.time_range.start) / 1e6
    return [*ranges, Range(name=STEP, in_training_thread=True, start=0.0, end=end)]


def train(overlap: bool, settings: argparse.Namespace) -> list[list[Range]]:
    """Train on one node and profile; runs on every node. The ranges of every profiled step."""
    torch.set_num_threads(1)
    steps = settings.untimed_steps + settings.steps
    profiler = Profiler(settings.steps)
    strategy = OneBitDDPStrategy(
        overlap=overlap, bucket_cap_mb=settings.bucket_cap_mb, timeout=timedelta(seconds=settings.timeout / 2)
    )
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        num_nodes=settings.nodes,
        max_steps=steps,
        callbacks=[profiler, PhaseSwitch(criterion=FixedStep(WARMUP_STEPS))],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(make_model(settings), random_words(settings, steps))
    return [ranges_of(recorded) for recorded in profiler.profiles]


def seconds_of(ranges: Sequence[Range]) -> dict[str, float]:
    """Total duration by name; what is encoded during backward is no part of backward."""
    totals: dict[str, float] = defaultdict(float)
    for r in ranges:
        totals[r.name] += r.end - r.start
    backward = next(r for r in ranges if r.name == BACKWARD)
    totals[BACKWARD] -= sum(r.end - r.start for r in ranges if r.name == "onebit::encode" and r.end <= backward.end)
    return totals


def median_step(steps: Sequence[list[Range]]) -> list[Range]:
    return sorted(steps, key=lambda ranges: seconds_of(ranges)[STEP])[len(steps) // 2]


def draw(steps: dict[str, list[Range]], title: str, path: Path) -> None:
    """One row per mode and thread, one colour per name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = dict(zip(NAMES, plt.get_cmap("tab10").colors, strict=True))
    figure, axes = plt.subplots(figsize=(11, 3.4), layout="constrained")
    rows = [(mode, in_training_thread) for mode in steps for in_training_thread in (True, False)]
    for row, (mode, in_training_thread) in enumerate(rows):
        for name in NAMES:
            bars = [
                (1000 * r.start, 1000 * (r.end - r.start))
                for r in steps[mode]
                if r.name == name and r.in_training_thread == in_training_thread
            ]
            axes.broken_barh(bars, (len(rows) - row - 0.4, 0.8), facecolors=colours[name])
    axes.set_yticks(range(len(rows), 0, -1), [f"{mode}\n{'training' if t else 'exchange'} thread" for mode, t in rows])
    axes.set_xlabel("ms since the start of the step")
    axes.set_title(title, loc="left", fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in NAMES]
    labels = [name.removeprefix("onebit::") for name in NAMES]
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    settings = parse_arguments()
    exit_on_sigterm()
    facts = environment("matplotlib")
    steps: dict[str, list[list[Range]]] = {}
    try:
        if settings.rate != LOOPBACK:
            check_requirements()
        with make_lab(nodes=settings.nodes, rate=settings.rate) as network:
            for mode, overlap in MODES.items():
                steps[mode], *_ = network.call(train, overlap, settings, timeout_seconds=settings.timeout)
    except LabError as error:
        print(f"profile_step: {error}", file=sys.stderr)
        return 1
    totals = {mode: [seconds_of(ranges) for ranges in profiled] for mode, profiled in steps.items()}
    medians = {
        mode: {name: statistics.median(total[name] for total in of_mode) for name in (STEP, *NAMES)}
        for mode, of_mode in totals.items()
    }
    rows = [
        (name.removeprefix("onebit::"), *(f"{1000 * medians[mode][name]:.1f}" for mode in MODES)) for name in (STEP, *NAMES)
    ]
    title = f"One compressed step on one of {settings.nodes} nodes, {settings.rate}"
    text = "\n\n".join([describe(facts), title, table(("range", *(f"{mode}, ms" for mode in MODES)), rows), *NOTES])
    print(text)
    if settings.out is not None:
        settings.out.write_text(text + "\n", encoding="utf-8")
        save(settings.out.with_suffix(".json"), {"environment": facts, "median_seconds": medians})
    if settings.picture is not None:
        draw({mode: median_step(profiled) for mode, profiled in steps.items()}, title, settings.picture)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python benchmarks/profile_step.py"
    )
    parser.add_argument("--nodes", type=int, default=4, help="nodes, with one process each (default: %(default)s)")
    parser.add_argument("--rate", default="200mbit", help="of each node's link, or loopback (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=7, help="profiled steps (default: %(default)s)")
    parser.add_argument("--untimed-steps", type=int, default=6, help="steps before them (default: %(default)s)")
    parser.add_argument("--bucket-cap-mb", type=float, default=4.0, help="size of buckets (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=180.0, metavar="S", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, and the numbers beside it as .json")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the picture there")
    add_model_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
