"""How long a dense exchange of the gradients takes here: what compression is compared with where no dense steps were timed.

So it is in a run that is resumed compressed, or begins so (SGD), or whose warm-up is shorter than a median needs. What is
sent are zeros, in the sizes, dtype and number of DDP's all-reduces, on its process group; no gradient, parameter or random
number is touched.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.stats import PhaseCounters
from lightning_onebit.comm.watch import passing
from lightning_onebit.config import MEBIBYTE, WarmupPrecision

TIMED_EXCHANGES = 3
"""After one that is not timed: connections are made, and ranks come at different times."""
IN_FLIGHT = 2
"""All-reduces on their way at a time: as many as gloo has threads for."""
DDP_BUCKET_MIB = 25
"""DDP's default for the size of its buckets."""


@dataclass(frozen=True)
class DenseExchange:
    """Seconds of the exchanges that were timed, on this rank, and what each of them sent."""

    seconds: tuple[float, ...]
    bytes_sent: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def time_dense_exchanges(
    gradients: Iterable[Tensor],
    device: torch.device,
    counters: PhaseCounters,
    *,
    bucket_cap_mb: float | None,
    precision: WarmupPrecision,
) -> DenseExchange:
    """All-reduce buffers as large as ``gradients`` a few times, and time it. Collective, on the training thread.

    At most ``IN_FLIGHT`` buckets of memory are taken, and given back.

    Args:
        gradients: of these sizes and dtypes; parameters will do. Only looked at.
        device: where the buffers are.
        counters: where bytes are counted, as sent and as ``baseline_bytes_sent``; time is not.
        bucket_cap_mb: largest size of a bucket, MiB; ``None``: DDP's default.
        precision: what gradients travel as in warm-up.
    """
    communicator = Communicator()
    numels: Counter[torch.dtype] = Counter()
    for gradient in gradients:
        numels[gradient.dtype] += gradient.numel()
    ordered = sorted(numels.items(), key=lambda item: str(item[0]))  # the same order on all ranks
    cap_nbytes = int((bucket_cap_mb or DDP_BUCKET_MIB) * MEBIBYTE)
    seconds = []
    for number in range(1 + TIMED_EXCHANGES):
        passing("a dense exchange that is timed")
        seconds.append(sum(_exchange(communicator, n, dtype, device, cap_nbytes, precision) for dtype, n in ordered))
        if number == 0:
            seconds.clear()
    sent = communicator.counters
    counters.bytes_sent += sent.bytes_sent
    counters.bytes_received += sent.bytes_received
    counters.baseline_bytes_sent += sent.bytes_sent
    counters.collectives += sent.collectives
    return DenseExchange(tuple(seconds), sent.bytes_sent // (1 + TIMED_EXCHANGES))


def _exchange(
    communicator: Communicator,
    numel: int,
    dtype: torch.dtype,
    device: torch.device,
    cap_nbytes: int,
    precision: WarmupPrecision,
) -> float:
    """Seconds to average ``numel`` zeros, bucket by bucket."""
    bucket_numel = max(1, cap_nbytes // dtype.itemsize)
    narrows = precision == "bf16" and dtype.is_floating_point and dtype.itemsize > torch.bfloat16.itemsize
    buffers = [torch.zeros(min(bucket_numel, numel), dtype=dtype, device=device) for _ in range(IN_FLIGHT)]
    in_flight: list[torch.futures.Future[Tensor]] = []
    _complete(device)
    start = time.perf_counter()
    for number, begin in enumerate(range(0, numel, bucket_numel)):
        if len(in_flight) == IN_FLIGHT:
            in_flight.pop(0).wait()  # its buffer is the next one's
        buffer = buffers[number % IN_FLIGHT][: numel - begin]
        in_flight.append(communicator.all_reduce_mean_future(buffer, dtype=torch.bfloat16 if narrows else None))
    for future in in_flight:
        future.wait()
    _complete(device)
    return time.perf_counter() - start


def _complete(device: torch.device) -> None:
    """Wait for what was launched: on a GPU only then a clock of the host tells anything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
