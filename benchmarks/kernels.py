"""Speed of the three local parts of a compressed step, on one core, against the memory bandwidth.

    python benchmarks/kernels.py --out benchmarks/results/kernels.txt

encode  steps 1 and 2: divide by D, clamp, momentum, error, norm, signs, residual
serve   step 4: decode n messages, average, error, norm, signs, residual, for 1/n of the elements
apply   step 6: decode and add to the parameter
renewed  step 1 and 2 where D is a code, and v_i is updated; the same where 1/8 of the elements of each block is not live
refresh  what is exchanged every 64 steps to renew D: code v_i; average n codes; take the result over

Each is one call of the kernels for CPUs, for a bucket of one large tensor or of 400 small ones. Its time is that of the
processor, so that what else runs on the machine counts little. Rates are of float32: 4 bytes per element. The roofline is
the traffic with main memory that cannot be avoided, over the measured bandwidth of a copy. (A copy also loads what it
overwrites: what works in place can do better than 100%.) On a GPU: benchmarks/gpu.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import Spread, describe, environment, save, table

from lightning_onebit.coefficients import Coefficients, RefreshNumbers
from lightning_onebit.config import CompressionConfig
from lightning_onebit.quantize import Kernels, make_kernels
from lightning_onebit.quantize.layout import plan_buckets
from lightning_onebit.quantize.memory import BucketMemory, StepInputs

FLOAT32_BYTES = 4
MESSAGE_BYTES = FLOAT32_BYTES / 32
"""Bytes per element of reading or writing a message; scales are negligible."""
CODE_BYTES = 1
NUMBERS = Coefficients(beta=0.9, weight=0.1, kappa=31.6, eps=1e-8, step_size=1e-3, square_decay=0.999)


def traffic_bytes(ranks: int) -> dict[str, float]:
    """By part, bytes per element that have to be read or written."""
    refreshed = FLOAT32_BYTES + CODE_BYTES
    return {
        "encode": 4 * FLOAT32_BYTES + 2 * MESSAGE_BYTES,  # gradient, D, error in, error out; u, message
        # gradient, error in and out, v_i in and out; the code of D; u, message
        "encode, renewed": 5 * FLOAT32_BYTES + CODE_BYTES + 2 * MESSAGE_BYTES,
        "encode, renewed, 1/8 not live": 5 * FLOAT32_BYTES + CODE_BYTES + 2 * MESSAGE_BYTES,
        "refresh, encode": refreshed,  # v_i; message
        "refresh, serve": 2 * FLOAT32_BYTES + (ranks + 1) * CODE_BYTES,  # residual in and out; per element of the chunk
        "refresh, apply": 2 * FLOAT32_BYTES + 3 * CODE_BYTES,  # v_i in and out; both messages, the code of D
        "serve": 2 * FLOAT32_BYTES + (ranks + 1) * MESSAGE_BYTES,  # error in, error out; per element of the chunk
        "apply": 2 * FLOAT32_BYTES + MESSAGE_BYTES,  # parameter in, parameter out
    }


def calls(numels: list[int], ranks: int) -> dict[str, tuple[int, Callable[[], None]]]:
    """By part: elements, and a call."""
    cpu, config = torch.device("cpu"), CompressionConfig()
    kernels = make_kernels(config, device=cpu, dtype=torch.float32)
    [layout] = plan_buckets(numels, block_size=config.block_size, num_chunks=ranks, bucket_numel=sum(numels))
    memory = BucketMemory(
        layout, share=range(ranks), chunk=0, has_rms=True, keeps_before=False, dtype=torch.float32, device=cpu
    )
    assert memory.rms is not None
    memory.rms.uniform_(0.5, 1.0)
    for messages in (memory.result, memory.received):
        messages.fill_(0x3F)  # as scales 0.75: no subnormal numbers, which take longer
    step = StepInputs(
        params=[torch.randn(numel) for numel in numels],
        gradients=[torch.randn(numel) for numel in numels],
        numbers=np.array([NUMBERS] * len(numels), dtype=np.float64),
        flags=torch.tensor([0] + [1] * len(numels), dtype=torch.int32),
        active=np.ones(len(numels), dtype=bool),
    )
    return {
        "encode": (sum(numels), lambda: kernels.encode_(memory, 0, step, commit=True)),
        "serve": (len(memory.server_error), lambda: kernels.serve_(memory, step, commit=True)),
        "apply": (sum(numels), lambda: kernels.apply_(memory, 0, step, commit=False)),
        **renewed_calls(memory, step, kernels),
    }


def renewed_calls(memory: BucketMemory, step: StepInputs, kernels: Kernels) -> dict[str, tuple[int, Callable[[], None]]]:
    """The same where the second moment is renewed: each tensor has its own r."""
    layout, numbers = memory.layout, step.numbers.copy()
    renewed = BucketMemory(
        layout, share=memory.share, chunk=0, has_rms=True, keeps_before=False, renews=True, dtype=memory.dtype,
        device=memory.device,
    )  # fmt: skip
    renewed.set_rms_(torch.empty(layout.flat_numel).uniform_(0.5, 1.0))
    assert renewed.second_moment is not None
    renewed.second_moment.uniform_(0.5, 1.0)
    renewed.result.fill_(0x3F)
    numbers[:, Coefficients._fields.index("root_r")] = np.linspace(0.5, 1.0, len(numbers))
    step = replace(step, numbers=numbers)
    messages, correction = renewed.variance_messages(), np.full(len(numbers), 1.5)
    taken_over = RefreshNumbers(correction, np.full(len(numbers), 0.9), np.full(len(numbers), 1e-8))
    messages.received.fill_(0x3F)
    messages.result.fill_(0x3F)
    numel, chunk_numel = int(layout.numel.sum()), len(renewed.server_error)

    def encode_masked() -> None:
        renewed.live = renewed.live_before = masks
        kernels.encode_(renewed, 0, step, commit=True)
        renewed.live = renewed.live_before = None

    masks = torch.full((layout.flat_numel // 8,), 0x7F, dtype=torch.uint8)
    return {
        "encode, renewed": (numel, lambda: kernels.encode_(renewed, 0, step, commit=True)),
        "encode, renewed, 1/8 not live": (numel, encode_masked),
        "refresh, encode": (numel, lambda: kernels.encode_variance_(renewed, messages, correction)),
        "refresh, serve": (chunk_numel, lambda: kernels.serve_variance_(renewed, messages)),
        "refresh, apply": (numel, lambda: kernels.apply_variance_(renewed, messages, taken_over)),
    }


def seconds(call: Callable[[], object], repetitions: int) -> list[float]:
    times = []
    for _ in range(repetitions + 2):
        start = time.thread_time()  # of the processor: what else runs on the machine does not count
        call()
        times.append(time.thread_time() - start)
    return times[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=32_000_000, help="parameters (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=4, help="ranks that are pretended (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the table to this file, and the numbers beside it as .json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    versions = environment()
    source, target = torch.randn(arguments.numel), torch.empty(arguments.numel)
    copy = statistics.median(seconds(lambda: target.copy_(source), arguments.repetitions))
    bandwidth = 2 * FLOAT32_BYTES * arguments.numel / copy
    results: dict[str, Any] = {"environment": versions, "copy_bytes_per_second": bandwidth}
    rows = []
    for title, numels in {"one tensor": [arguments.numel], "400 tensors": [arguments.numel // 4000] * 400}.items():
        for part, (numel, call) in calls(numels, arguments.ranks).items():
            rate = Spread.of([FLOAT32_BYTES * numel / s / 1e9 for s in seconds(call, arguments.repetitions)])
            roofline = bandwidth / traffic_bytes(arguments.ranks)[part] * FLOAT32_BYTES / 1e9
            spread = f"{rate.lower_quartile:.2f}-{rate.upper_quartile:.2f}"
            rows.append(
                (f"{part}, {title}", f"{rate.median:.2f}", spread, f"{roofline:.2f}", f"{rate.median / roofline:.0%}")
            )
            results[f"{part}, {title}"] = {"gigabytes_per_second": rate, "roofline_gigabytes_per_second": roofline}
    header = ("part", "GB/s of gradient, median", "quartiles", "roofline", "reached")
    text = (
        f"{describe(versions)}\ncopy bandwidth, read + write: {bandwidth / 1e9:.1f} GB/s\n\n"
        f"{arguments.numel} elements in one tensor, {arguments.numel // 4000 * 400} in 400; {arguments.ranks} ranks:\n\n"
        f"{table(header, rows)}\n"
    )
    print(text)
    if arguments.out is not None:
        save(arguments.out.with_suffix(".json"), results)
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
