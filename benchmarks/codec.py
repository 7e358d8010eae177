"""Speed of the three local parts of a compressed step, on one core, against the memory bandwidth.

    python benchmarks/codec.py --out benchmarks/results/codec.txt

worker  steps 1 and 2: divide by D, clamp, momentum, error, norm, signs, residual
server  step 4: decode n messages, average, error, norm, signs, residual, for 1/n of the elements
apply   step 6: decode and add to the parameter

Each is one method of the codec, called for segment after segment of a large parameter. Rates are of float32: 4 bytes per
element. The roofline is the traffic with main memory that cannot be avoided, over the measured bandwidth of a copy, for
arrays far larger than caches. (A copy also loads what it overwrites: what works in place can do better than 100%.) A second
table has the time of one call for small parameters and for one segment, whose data stay in cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_onebit.engine.momentum import LocalMomentum
from lightning_onebit.quantize.encoded import Encoded
from report import Spread, describe, environment, save, table

from lightning_onebit.config import CompressionConfig
from lightning_onebit.quantize import Codec, make_codec
from lightning_onebit.quantize.layout import SEGMENT_NUMEL, num_blocks, sign_nbytes

FLOAT32_BYTES = 4
BLOCK_SIZE = CompressionConfig().block_size

MESSAGE_BYTES = FLOAT32_BYTES / 32
"""Bytes per element of reading or writing a message; scales are negligible."""

SMALL_NUMELS = (64, 768, 3072, SEGMENT_NUMEL)

Calls = list[Callable[[], None]]


def traffic_bytes(part: str, world_size: int) -> float:
    """Bytes per element that have to be read or written."""
    return {
        "worker": 4 * FLOAT32_BYTES + 2 * MESSAGE_BYTES,  # gradient, v, error in, error out; u, message
        "server": 2 * FLOAT32_BYTES + (world_size + 1) * MESSAGE_BYTES,  # error in, error out; per element of the chunk
        "apply": 2 * FLOAT32_BYTES + MESSAGE_BYTES,  # parameter in, parameter out
    }[part]


def random_message(numel: int) -> Encoded:
    signs = torch.randint(256, (sign_nbytes(numel),), dtype=torch.uint8)
    return Encoded(signs, torch.rand(num_blocks(numel, BLOCK_SIZE)))


def segments(numel: int) -> Iterator[slice]:
    for start in range(0, numel, SEGMENT_NUMEL):
        yield slice(start, min(start + SEGMENT_NUMEL, numel))


def cut(message: Encoded, elements: slice) -> Encoded:
    """The part of a message that belongs to a segment."""
    signs = message.signs[elements.start // 8 : sign_nbytes(elements.stop)]
    return Encoded(signs, message.scales[elements.start // BLOCK_SIZE : num_blocks(elements.stop, BLOCK_SIZE)])


def worker_calls(codec: Codec, numel: int) -> Calls:
    gradient, second_moment = torch.randn(numel), torch.rand(numel)
    error, previous, sent = torch.randn(numel), random_message(numel), random_message(numel)
    calls: Calls = []
    for s in segments(numel):
        momentum = LocalMomentum(
            gradient=gradient[s], second_moment=second_moment[s], decay=0.9, weight=0.1, eps=1e-8, kappa=31.6
        )
        part = error[s]
        calls.append(partial(codec.encode_momentum_, part, part, cut(previous, s), momentum, cut(sent, s)))
    return calls


def server_calls(codec: Codec, numel: int, world_size: int) -> Calls:
    error, served = torch.randn(numel), random_message(numel)
    messages = [random_message(numel) for _ in range(world_size)]
    calls: Calls = []
    for s in segments(numel):
        part = error[s]
        calls.append(partial(codec.encode_mean_, part, part, [cut(each, s) for each in messages], cut(served, s)))
    return calls


def apply_calls(codec: Codec, numel: int) -> Calls:
    param, result = torch.randn(numel), random_message(numel)
    return [partial(codec.add_decoded_, param[s], cut(result, s), -1e-3) for s in segments(numel)]


def all_calls(codec: Codec, numel: int, chunk_numel: int, world_size: int) -> dict[str, Calls]:
    return {
        "worker": worker_calls(codec, numel),
        "server": server_calls(codec, chunk_numel, world_size),
        "apply": apply_calls(codec, numel),
    }


def measure(parts: dict[str, Calls], repetitions: int, rounds: int = 1) -> dict[str, list[float]]:
    """Seconds of one round of each part's calls, per repetition."""
    seconds: dict[str, list[float]] = {part: [] for part in parts}
    for _ in range(repetitions + 2):
        for part, calls in parts.items():
            start = time.perf_counter()
            for _ in range(rounds):
                for call in calls:
                    call()
            seconds[part].append((time.perf_counter() - start) / rounds)
    return {part: times[2:] for part, times in seconds.items()}


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
    parser.add_argument("--out", type=Path, help="write the tables to this file, and the numbers beside it as .json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    facts = environment()
    codec = make_codec(CompressionConfig(), device=torch.device("cpu"), dtype=torch.float32)
    bandwidth = statistics.median(copy_bandwidth(arguments.numel, arguments.repetitions))
    results: dict[str, Any] = {"environment": facts, "copy_bytes_per_second": bandwidth, "segment_numel": SEGMENT_NUMEL}

    chunk_numel = -(-arguments.numel // arguments.world_size)
    large = all_calls(codec, arguments.numel, chunk_numel, arguments.world_size)
    rows = []
    for part, times in measure(large, arguments.repetitions).items():
        numel = chunk_numel if part == "server" else arguments.numel
        rate = Spread.of([FLOAT32_BYTES * numel / seconds / 1e9 for seconds in times])
        roofline = bandwidth / traffic_bytes(part, arguments.world_size) * FLOAT32_BYTES / 1e9
        spread = f"{rate.lower_quartile:.2f}-{rate.upper_quartile:.2f}"
        rows.append((part, f"{rate.median:.2f}", spread, f"{roofline:.2f}", f"{rate.median / roofline:.0%}"))
        results[part] = {"gigabytes_per_second": rate, "roofline_gigabytes_per_second": roofline}
    del large
    rates = table(("part", "GB/s of gradient, median", "quartiles", "roofline", "reached"), rows)

    call_rows, results["seconds_per_call"] = [], {}
    for numel in SMALL_NUMELS:
        parts = all_calls(codec, numel, numel, arguments.world_size)
        rounds = max(1, 2**20 // (numel + 4096))  # a few milliseconds, far above the resolution of the clock
        calls = {part: Spread.of(t) for part, t in measure(parts, arguments.repetitions, rounds).items()}
        call_rows.append((str(numel), *(f"{1e6 * t.median:.1f} [{1e6 * t.lower_quartile:.1f}]" for t in calls.values())))
        results["seconds_per_call"][numel] = calls
    microseconds = table(("elements", *(f"{part}, us" for part in parts)), call_rows)

    text = (
        f"{describe(facts)}\ncopy bandwidth, read + write: {bandwidth / 1e9:.1f} GB/s\n\n"
        f"{arguments.numel} elements, in segments of {SEGMENT_NUMEL}, {arguments.world_size} ranks:\n\n{rates}\n\n"
        f"One call, median [lower quartile]:\n\n{microseconds}\n"
    )
    print(text)
    if arguments.out is not None:
        save(arguments.out.with_suffix(".json"), results)
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
