"""What a run says at its end: what it sent and how long its steps took, by phase, beside what plain DDP would have.

Seconds are this process's, between the ends of optimizer steps: loading data, forward, backward and exchange. In the
warm-up they are those of plain DDP, on this very network, model and hardware: so what compression gains is measured.
"""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_onebit.comm.stats import CommStats
from lightning_onebit.config import MEBIBYTE
from lightning_onebit.lightning.baseline import DenseExchange
from lightning_onebit.phase import Phase

UNTIMED_STEPS = 3
"""At the beginning of a phase, steps that are not timed: buckets are made, memory is allocated."""
FEWEST_STEPS = 8
"""Timed, from which on a median is told."""
FEWEST_ENDS = UNTIMED_STEPS + FEWEST_STEPS
"""Of steps, from which on a median is told."""
STEPS_KEPT = 2000
"""Of each phase, the ends of the last so many."""
WORTH_SAYING = 1.02
"""Steps that are less than 2% faster or slower take as long."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: median and quartiles."""

    lower: float
    median: float
    upper: float


def no_steps() -> dict[Phase, deque[float]]:
    """By phase, when the last optimizer steps ended, in seconds of ``time.perf_counter``: to be appended to."""
    return {phase: deque(maxlen=STEPS_KEPT) for phase in Phase}


def step_time(ends: Sequence[float]) -> StepTime | None:
    """Of steps that ended then, the first ones left out. ``None`` if too few are left to tell.

    A pause, for validation say, is one long step among many, of which median and quartiles take no notice.
    """
    timed = list(ends)[UNTIMED_STEPS - 1 :]
    seconds = [end - begin for begin, end in itertools.pairwise(timed)]
    return StepTime(*statistics.quantiles(seconds, n=4)) if len(seconds) >= FEWEST_STEPS else None


def report(
    stats: CommStats,
    ends: Mapping[Phase, Sequence[float]],
    waits: Mapping[Phase, Sequence[float]],
    switches: Sequence[tuple[int, str]],
    *,
    exchange: DenseExchange | None,
    warmup: str,
    earlier_steps: int,
) -> str:
    """A table of the phases, and what it says: bytes saved, time saved, when and why the run switched, what to do.

    Args:
        stats: what rank 0 sent since the run, or what was resumed of it, began.
        ends: by phase, when its steps ended.
        waits: by phase, seconds waited for exchanges by then.
        switches: optimizer steps after which it began to compress, and why; the reason may be empty.
        exchange: dense exchanges of the gradients, where they were timed.
        warmup: what a warm-up is, in words.
        earlier_steps: made before the run was resumed, and in none of these.
    """
    times = {phase: step_time(ends[phase]) for phase in Phase}
    rows = [("", "steps", "MiB sent", "DDP float32", "DDP 16 bits", "ms a step [quartiles]")]
    for phase in Phase:
        counters = stats[phase]
        if counters.steps or counters.baseline_bytes_sent:
            sent, dense = counters.bytes_sent, counters.dense_equivalent_bytes
            rows.append((phase.name.lower(), str(counters.steps), *_mebibytes(sent, dense), _milliseconds(times[phase])))
    rows.append(("in all", str(stats.steps), *_mebibytes(stats.bytes_sent, stats.dense_equivalent_bytes), ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if baseline := sum(stats[phase].baseline_bytes_sent for phase in Phase):
        lines.append(f"In warm-up's row are {baseline / MEBIBYTE:.1f} MiB by which dense exchanges were timed.")
    if earlier_steps:
        lines.append(f"That is since the run was resumed; {earlier_steps} steps before are not in it.")
    for step, why in switches:
        lines.append(f"Compressed after optimizer step {step}{f': {why}' if why else ''}.")
    if stats[Phase.COMPRESSED].steps:
        lines += [_bytes_saved(stats), gain(ends, waits, exchange, warmup=warmup).text]
    return "\n".join(lines)


def _mebibytes(sent: int, dense: int) -> tuple[str, str, str]:
    return f"{sent / MEBIBYTE:.1f}", f"{dense / MEBIBYTE:.1f}", f"{dense / 2 / MEBIBYTE:.1f}"


def _milliseconds(seconds: StepTime | None) -> str:
    if seconds is None:
        return f"not told: fewer than {FEWEST_ENDS} steps"
    return f"{1000 * seconds.median:.1f} [{1000 * seconds.lower:.1f}-{1000 * seconds.upper:.1f}]"


def _bytes_saved(stats: CommStats) -> str:
    ratio = stats.dense_equivalent_bytes / max(1, stats.bytes_sent)
    compressed = stats[Phase.COMPRESSED]
    shares = [
        f"{part} {nbytes / max(1, compressed.bytes_sent):.0%}"
        for part, nbytes in (
            ("renewed second moments", compressed.refresh_bytes_sent),
            ("sketches of norms", compressed.sketch_bytes_sent),
        )
        if nbytes
    ]
    rest = f" (of the compressed phase's bytes: {', '.join(shares)}; the rest signs)" if shares else ""
    if ratio < 1:
        return f"In all {1 / ratio:.1f} times the bytes of DDP with float32 gradients: there is little to compress{rest}."
    than = f"than DDP with float32 gradients, {ratio / 2:.1f} than with 16 bits"
    return f"In all {ratio:.1f} times fewer bytes {than}{rest}."


@dataclass(frozen=True)
class Gain:
    """What compression brings in time, and in words."""

    text: str
    quick_steps: float | None
    """Dense over compressed step time, of the quickest quarter of the compressed steps; ``None``: not known."""


def gain(
    ends: Mapping[Phase, Sequence[float]],
    waits: Mapping[Phase, Sequence[float]],
    exchange: DenseExchange | None,
    *,
    warmup: str,
) -> Gain:
    """The speed-up: measured in steps, or bounded by dense exchanges that were timed, or not told; and what to do if none.

    A dense step takes at most what a compressed one does without waiting, and its whole exchange; at least its exchange.

    Args:
        ends: by phase, when its steps ended.
        waits: by phase, seconds waited for exchanges by then.
        exchange: of the gradients, densely, where that was timed.
        warmup: what a warm-up is, in words.
    """
    dense, compressed = step_time(ends[Phase.WARMUP]), step_time(ends[Phase.COMPRESSED])
    if compressed is None or (dense is None and exchange is None):
        which = "warm-up" if dense is None else "compressed phase"
        return Gain(
            f"Speed-up: not measured, as the {which} had fewer than {FEWEST_ENDS} steps here. HINT:"
            " PhaseSwitch(criterion=FixedStep(n)) makes n dense steps first.",
            None,
        )
    waited = step_time(waits[Phase.COMPRESSED])
    assert waited is not None
    numbers = (
        f"a compressed step took {1000 * compressed.median:.1f} ms, {1000 * waited.median:.1f} of them waiting for exchanges"
    )
    if dense is not None:
        speedup, quick = dense.median / compressed.median, dense.median / compressed.lower
        numbers = f"{numbers}, one of {warmup} {1000 * dense.median:.1f} ms"
        told = f"Speed-up: {speedup:.2f}, as {numbers}."
    else:
        assert exchange is not None
        computing = max(0.0, compressed.median - waited.median)
        speedup = (computing + exchange.median) / compressed.median
        quick = (max(0.0, compressed.lower - waited.median) + exchange.median) / compressed.lower
        least = exchange.median / compressed.median
        numbers = (
            f"{numbers}, and a dense exchange of the gradients {1000 * exchange.median:.1f} ms (median of"
            f" {len(exchange.seconds)}, {1000 * min(exchange.seconds):.1f}-{1000 * max(exchange.seconds):.1f})"
        )
        told = (
            f"Speed-up: at most {speedup:.2f}{f', at least {least:.2f}' if least >= WORTH_SAYING else ''}: estimated, as the"
            f" warm-up had fewer than {FEWEST_ENDS} steps here. {numbers[0].upper()}{numbers[1:]}, of which DDP hides some"
            " behind backward; at most: nothing."
        )
    if speedup >= WORTH_SAYING:
        return Gain(told, quick)
    slower, than = ("no faster", "than") if speedup * WORTH_SAYING > 1 else (f"{1 / speedup:.2f} times as slow", "as")
    estimated = "" if dense is not None else f" {than} dense ones would be at most, by an estimate"
    return Gain(
        f"Speed-up: none. Steps are {slower}{estimated}: {numbers}. HINT: the network is not what limits this job: stay with"
        " strategy='ddp' here, or accumulate fewer gradients per step, or use more nodes.",
        quick,
    )
