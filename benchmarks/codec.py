"""Speed of the three local parts of a compressed step, on one core, against the memory bandwidth.

    python benchmarks/codec.py --out benchmarks/results/codec.txt

worker  steps 1 and 2: divide by D, clamp, momentum, error, norm, signs, residual
server  step 4: decode n messages, average, error, norm, signs, residual, for 1/n of the elements
apply   step 6: decode and add to the parameter

The collectives are replaced by copies in memory. Rates are of float32 gradient: 4 bytes per element. The roofline is the
traffic with main memory that cannot be avoided, over the measured bandwidth of a copy, for arrays far larger than caches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import Spread, describe, environment, save, table
from torch import Tensor, nn

from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine import CompressedOptimizer

FLOAT32_BYTES = 4
BITS = 2 * FLOAT32_BYTES / 32
"""Bytes per element of reading one and writing another sign message; scales are negligible."""

TRAFFIC_BYTES = {
    "worker": 4 * FLOAT32_BYTES + BITS,  # gradient, v, error in, error out
    "server": 2 * FLOAT32_BYTES + BITS,  # error in, error out; per element of the chunk
    "apply": 2 * FLOAT32_BYTES + BITS / 2,  # parameter in, parameter out
}


class CopyingCommunicator(Communicator):
    """Stands for ``world_size`` ranks that all send what this one sends."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size

    def all_to_all_(self, received: Tensor, sent: Tensor) -> None:
        received.copy_(sent[: sent.numel() // self.world_size].repeat(self.world_size))

    def all_gather_(self, gathered: Tensor, part: Tensor) -> None:
        gathered.copy_(part.repeat(self.world_size))

    def all_reduce_max_(self, tensor: Tensor) -> None:
        pass


def measure(numel: int, world_size: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each part, per repetition."""
    param = nn.Parameter(torch.randn(numel))
    optimizer = torch.optim.Adam([param])
    for _ in range(3):
        param.grad = torch.randn(numel)
        optimizer.step()
    compressed = CompressedOptimizer(optimizer, CompressionConfig(), CopyingCommunicator(world_size), {})
    (pipeline,) = compressed._pipelines
    parts: dict[str, list[float]] = {"worker": [], "server": [], "apply": []}

    def timed(part: str, original: Callable[..., None]) -> Callable[..., None]:
        def call(*args: object) -> None:
            start = time.perf_counter()
            original(*args)
            parts[part][-1] += time.perf_counter() - start

        return call

    pipeline._encode_ = timed("worker", pipeline._encode_)  # type: ignore[method-assign]
    pipeline._apply_ = timed("apply", pipeline._apply_)  # type: ignore[method-assign]
    for bucket in pipeline._buckets:
        bucket._serve_ = timed("server", bucket._serve_)  # type: ignore[method-assign]
    for _ in range(repetitions + 2):
        for seconds in parts.values():
            seconds.append(0.0)
        param.grad = torch.randn(numel)
        compressed.step()
    return {part: seconds[2:] for part, seconds in parts.items()}


def copy_bandwidth(numel: int, repetitions: int) -> list[float]:
    """Bytes per second, read and written, of a copy of float32."""
    source, target = torch.randn(numel), torch.empty(numel)
    rates = []
    for _ in range(repetitions + 2):
        start = time.perf_counter()
        target.copy_(source)
        rates.append(2 * FLOAT32_BYTES * numel / (time.perf_counter() - start))
    return rates[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=32_000_000, help="parameters (default: %(default)s)")
    parser.add_argument("--world-size", type=int, default=4, help="ranks that are pretended (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the table to this file, and the numbers beside it as .json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    facts = environment()
    bandwidth = statistics.median(copy_bandwidth(arguments.numel, arguments.repetitions))
    rows, results = [], {"environment": facts, "copy_bytes_per_second": bandwidth}
    for part, times in measure(arguments.numel, arguments.world_size, arguments.repetitions).items():
        share = 1 / arguments.world_size if part == "server" else 1.0
        rate = Spread.of([FLOAT32_BYTES * arguments.numel * share / seconds / 1e9 for seconds in times])
        roofline = bandwidth / TRAFFIC_BYTES[part] * FLOAT32_BYTES / 1e9
        spread = f"{rate.lower_quartile:.2f}-{rate.upper_quartile:.2f}"
        rows.append((part, f"{rate.median:.2f}", spread, f"{roofline:.2f}", f"{rate.median / roofline:.0%}"))
        results[part] = {"gigabytes_per_second": rate, "roofline_gigabytes_per_second": roofline}
    header = ("part", "GB/s of gradient, median", "quartiles", "roofline", "reached")
    text = f"{describe(facts)}\ncopy bandwidth, read + write: {bandwidth / 1e9:.1f} GB/s\n\n{table(header, rows)}\n"
    print(text)
    if arguments.out is not None:
        save(arguments.out.with_suffix(".json"), results)
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
