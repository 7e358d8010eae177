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
from lightning_onebit.phase import Phase

UNTIMED_STEPS = 3
"""At the beginning of a phase, steps that are not timed: buckets are made, memory is allocated."""
FEWEST_STEPS = 8
"""Timed, from which on a median is told."""
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
    switches: Sequence[tuple[int, str]],
    *,
    warmup: str,
    earlier_steps: int,
) -> str:
    """A table of the phases, and what it says: bytes saved, time saved, when and why the run switched, what to do.

    Args:
        stats: what rank 0 sent since the run, or what was resumed of it, began.
        ends: by phase, when its steps ended.
        switches: optimizer steps after which it began to compress, and why; the reason may be empty.
        warmup: what a warm-up is, in words.
        earlier_steps: made before the run was resumed, and in none of these.
    """
    times = {phase: step_time(ends[phase]) for phase in Phase}
    rows = [("", "steps", "MiB sent", "DDP float32", "DDP 16 bits", "ms a step [quartiles]")]
    for phase in Phase:
        counters = stats[phase]
        if counters.steps:
            sent, dense = counters.bytes_sent, counters.dense_equivalent_bytes
            rows.append((phase.name.lower(), str(counters.steps), *_mebibytes(sent, dense), _milliseconds(times[phase])))
    rows.append(("in all", str(stats.steps), *_mebibytes(stats.bytes_sent, stats.dense_equivalent_bytes), ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if earlier_steps:
        lines.append(f"That is since the run was resumed; {earlier_steps} steps before are not in it.")
    for step, why in switches:
        lines.append(f"Compressed after optimizer step {step}{f': {why}' if why else ''}.")
    if stats[Phase.COMPRESSED].steps:
        lines += [_bytes_saved(stats), _time_saved(stats, times, warmup)]
    return "\n".join(lines)


def _mebibytes(sent: int, dense: int) -> tuple[str, str, str]:
    return f"{sent / MEBIBYTE:.1f}", f"{dense / MEBIBYTE:.1f}", f"{dense / 2 / MEBIBYTE:.1f}"


def _milliseconds(seconds: StepTime | None) -> str:
    if seconds is None:
        return f"not told: fewer than {UNTIMED_STEPS + FEWEST_STEPS} steps"
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


def _time_saved(stats: CommStats, times: Mapping[Phase, StepTime | None], warmup: str) -> str:
    """The speed-up, measured, or that it is not; and what to do if there is none."""
    dense, compressed, counters = times[Phase.WARMUP], times[Phase.COMPRESSED], stats[Phase.COMPRESSED]
    if dense is None or compressed is None:
        which = "warm-up" if dense is None else "compressed phase"
        return (
            f"Speed-up: not measured, as the {which} had fewer than {UNTIMED_STEPS + FEWEST_STEPS} steps here. HINT:"
            " PhaseSwitch(criterion=FixedStep(n)) makes n dense steps first."
        )
    speedup, waited = dense.median / compressed.median, counters.seconds_waited / counters.steps
    numbers = (
        f"a compressed step took {1000 * compressed.median:.1f} ms, {1000 * waited:.1f} of them waiting for exchanges, one"
        f" of {warmup} {1000 * dense.median:.1f} ms"
    )
    if speedup >= WORTH_SAYING:
        return f"Speed-up: {speedup:.2f}, as {numbers}."
    slower = "no faster" if speedup * WORTH_SAYING > 1 else f"{1 / speedup:.2f} times as slow"
    return (
        f"Speed-up: none. Steps are {slower}: {numbers}. HINT: the network is not what limits this job: stay with"
        " strategy='ddp' here, or accumulate fewer gradients per step, or use more nodes."
    )
