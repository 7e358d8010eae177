"""How long calls take on one device, as if it had its cores to itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

UNTIMED, TIMED = 2, 7
LONGEST_SECONDS = 3.0
"""For one measurement; at least three repetitions."""


class Clock:
    """Medians over repetitions. On a CPU with one thread, time of the processor: what else shares the core does not count.

    Args:
        device: where the calls work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counts_processor_time = device.type == "cpu" and torch.get_num_threads() == 1

    def now(self) -> float:
        """Seconds, when all that was launched is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.counts_processor_time else time.perf_counter()

    def median(self, call: Callable[[], object]) -> float:
        """Seconds of a call."""
        return self.medians([call])[0]

    def medians(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Seconds of each of ``calls``, which are made in turn."""
        times: list[list[float]] = [[] for _ in calls]
        begin = time.perf_counter()
        for repetition in range(UNTIMED + TIMED):
            for call, seconds in zip(calls, times, strict=True):
                start = self.now()
                call()
                seconds.append(self.now() - start)
            if repetition >= UNTIMED and len(times[0]) >= UNTIMED + 3 and time.perf_counter() - begin > LONGEST_SECONDS:
                break
        return [statistics.median(seconds[UNTIMED:]) for seconds in times]
