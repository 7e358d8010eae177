"""Speed of each Triton kernel on one GPU, against a copy that moves as many bytes.

    python benchmarks/kernels.py --out benchmarks/results/kernels.txt

encode           quantize a tensor, leave the residual
decode, add      write an average, add it to a parameter (step 6)
momentum         steps 1 and 2: divide by D, clamp, momentum, error, scale, signs, residual
mean             step 4, of --world-size messages: average, error, scale, signs, residual
settle ...       the same with the message already known

Bytes are those that have to be read or written once, scales included. The time of a copy is that of ``Tensor.copy_``
reading half as many and writing as many. Tensors are far larger than caches; times are of CUDA events around one call.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from lightning_onebit.engine.momentum import LocalMomentum
from lightning_onebit.quantize.encoded import Encoded
from report import Spread, describe, environment, save, table
from torch import Tensor

from lightning_onebit.config import CompressionConfig
from lightning_onebit.quantize import Codec, make_codec
from lightning_onebit.quantize.layout import encoded_nbytes, num_blocks, sign_nbytes

WARM_UP = 5


def random_encoded(numel: int, block_size: int, device: torch.device) -> Encoded:
    return Encoded(
        torch.randint(0, 256, (sign_nbytes(numel),), dtype=torch.uint8, device=device),
        torch.rand(num_blocks(numel, block_size), device=device) * 1e-3,
    )


def messages(numel: int, block_size: int, count: int, device: torch.device) -> list[Encoded]:
    """As they arrive: rows of one buffer."""
    size = -(-encoded_nbytes(numel, block_size) // 8) * 8
    buffer = torch.zeros(count, size, dtype=torch.uint8, device=device)
    scales_nbytes = 4 * num_blocks(numel, block_size)
    received = []
    for row in buffer:
        message = random_encoded(numel, block_size, device)
        scales = row[:scales_nbytes].view(torch.float32).copy_(message.scales)
        received.append(Encoded(row[scales_nbytes : scales_nbytes + sign_nbytes(numel)].copy_(message.signs), scales))
    return received


def calls(
    codec: Codec, numel: int, block_size: int, world_size: int, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[int, Callable[[], None]]]:
    """By kernel: bytes that it has to move, and a call of it. Calls go on from what others left; no value matters."""
    tensors = {name: torch.randn(numel, dtype=dtype, device=device) for name in ("values", "error", "out", "gradient")}
    values, error, out = tensors["values"], tensors["error"], tensors["out"]
    momentum = LocalMomentum(
        gradient=tensors["gradient"],
        second_moment=torch.rand(numel, dtype=dtype, device=device),
        decay=0.9,
        weight=0.1,
        eps=1e-8,
        kappa=31.6,
    )
    previous, sent = (random_encoded(numel, block_size, device) for _ in range(2))
    received = messages(numel, block_size, world_size, device)
    tensor, message = dtype.itemsize * numel, encoded_nbytes(numel, block_size)
    return {
        "encode": (2 * tensor + message, lambda: codec.encode_(values, sent)),
        "decode": (tensor + message, lambda: codec.decode_(out, previous, 0.5)),
        "add": (2 * tensor + message, lambda: codec.add_decoded_(out, previous, 1e-3)),
        "momentum": (4 * tensor + 2 * message, lambda: codec.encode_momentum_(error, error, previous, momentum, sent)),
        "settle momentum": (4 * tensor + 2 * message, lambda: codec.settle_momentum_(error, previous, momentum, sent)),
        "mean": (2 * tensor + (world_size + 1) * message, lambda: codec.encode_mean_(error, error, received, sent)),
        "settle mean": (2 * tensor + (world_size + 1) * message, lambda: codec.settle_mean_(error, received, sent)),
    }


def copy_of(nbytes: int, device: torch.device) -> Callable[[], Tensor]:
    """A call that reads and writes ``nbytes`` in all."""
    source = torch.randint(0, 256, (nbytes // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def seconds(call: Callable[[], object], repetitions: int) -> list[float]:
    """Of each of ``repetitions`` calls, on the GPU."""
    for _ in range(WARM_UP):  # the first one compiles
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for start, end in events:  # none is waited for, so that the GPU always has the next call already
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in events]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=2**26, help="elements of one call (default: %(default)s)")
    parser.add_argument("--world-size", type=int, default=8, help="messages in a mean (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=2048, help="(default: %(default)s)")
    parser.add_argument("--scale", choices=("l2", "l1"), default="l2", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the table to this file, and the numbers beside it as .json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark measures GPU kernels, and torch.cuda.is_available() is False here.")

    device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, arguments.dtype)
    facts = environment("triton")
    facts["hardware"]["gpu"] = torch.cuda.get_device_name(device)
    config = CompressionConfig(block_size=arguments.block_size, scale=arguments.scale)
    codec = make_codec(config, device=device, dtype=dtype)
    if codec.name != "triton":
        raise SystemExit("Triton is not installed: without it, GPUs run plain torch, which is not measured here.")

    rows, results = [], {"environment": facts}
    arguments_of_calls = (arguments.numel, arguments.block_size, arguments.world_size, dtype, device)
    for name, (nbytes, call) in calls(codec, *arguments_of_calls).items():
        kernel, copy = (Spread.of(seconds(c, arguments.repetitions)) for c in (call, copy_of(nbytes, device)))
        reached = copy.median / kernel.median
        rate = f"{nbytes / kernel.median / 1e9:.0f}"
        per_element = f"{nbytes / arguments.numel:.2f}"
        rows.append((name, per_element, kernel.milliseconds(), copy.milliseconds(), rate, f"{reached:.0%}"))
        results[name] = {"nbytes": nbytes, "seconds": kernel, "copy_seconds": copy, "share_of_copy_bandwidth": reached}
    header = ("kernel", "bytes per element", "ms [quartiles]", "copy, ms [quartiles]", "GB/s", "of copy bandwidth")
    text = f"{describe(facts)}\n{facts['hardware']['gpu']}\n\n{table(header, rows)}\n"
    print(text)
    if arguments.out is not None:
        save(arguments.out.with_suffix(".json"), results)
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
