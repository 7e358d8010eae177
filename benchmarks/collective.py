"""The compressed all-reduce by itself, beside gloo's dense one and, if it is installed, DeepSpeed's compressed one.

    python benchmarks/collective.py --nodes 2 4 --rates loopback 200mbit 1gbit --out benchmarks/results/collective.json

All of them average the same vectors in the same processes, in turns; what is timed begins at a barrier and ends on the
slowest rank. DeepSpeed up to 0.19.6 has ``CompressedBackend``, made for accelerators with a kernel that packs bits. It is
run here with numpy's ``packbits`` in that kernel's place, and with its scales as vectors of one element, as gloo refuses
0-d ones.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lab import LOOPBACK, LabError, NetworkLab, check_requirements, exit_on_sigterm, make_lab, sent_bytes
from report import SHARED_CORES, Spread, describe, environment, save, size, table
from torch import Tensor

from lightning_onebit import ErrorFeedback, compressed_all_reduce

AllReduce = Callable[[Tensor], object]
"""Replaces the tensor by the sum or the mean over the ranks."""

DENSE, ONEBIT, DEEPSPEED = "dense", "onebit", "deepspeed"
LABELS = {
    DENSE: "gloo all_reduce, fp32",
    ONEBIT: "compressed_all_reduce",
    DEEPSPEED: "DeepSpeed CompressedBackend, numpy packing",
}
UNTIMED_CALLS = 2
NOTES = (
    SHARED_CORES,
    "time: of one call, slowest rank; median and quartiles over the calls",
    "sent: by one node per call, mean over the nodes, as counted on its link with all headers; not counted on loopback",
)


# Competitors


def all_reduces(numel: int, with_deepspeed: bool) -> dict[str, AllReduce]:
    """The competitors on this rank, each with its own state for vectors of ``numel`` elements."""
    error_feedback = ErrorFeedback(torch.empty(numel))
    competitors: dict[str, AllReduce] = {
        DENSE: dist.all_reduce,
        ONEBIT: lambda tensor: compressed_all_reduce(tensor, error_feedback),
    }
    if with_deepspeed:
        competitors[DEEPSPEED] = deepspeed_all_reduce(numel)
    return competitors


def deepspeed_all_reduce(numel: int) -> AllReduce:
    """DeepSpeed's ``CompressedBackend.compressed_allreduce`` on CPU; see the module's docstring."""
    compressed = deepspeed_module()

    class GlooCollectives:
        """What the module calls ``dist``."""

        all_to_all_single = staticmethod(dist.all_to_all_single)

        @staticmethod
        def all_gather(received: list[Tensor], sent: Tensor, group: dist.ProcessGroup) -> None:
            dist.all_gather(received, sent.reshape(1) if sent.ndim == 0 else sent, group=group)

    base: Any = compressed.CompressedBackend

    class NumpyBackend(base):
        """Bits as its kernel packs them: 1 where the sign bit is not set."""

        def __init__(self) -> None:
            self.world_group = dist.group.WORLD
            self.size, self.rank = dist.get_world_size(), dist.get_rank()

        def pack(self, buffer: Tensor, size: int) -> Tensor:
            return torch.from_numpy(np.packbits(~np.signbit(buffer.numpy()))).reshape(size, -1)

        def unpack(self, buffer: Tensor, size: int, dtype: torch.dtype) -> Tensor:
            bits = torch.from_numpy(np.unpackbits(buffer.numpy()))
            return bits.to(dtype).sub_(0.5).mul_(2.0).reshape(size, -1)

    compressed.dist = GlooCollectives()
    backend = NumpyBackend()
    # As its optimizer does it: whole bytes for every rank.
    padded_numel = -(-numel // (8 * backend.size)) * 8 * backend.size
    worker_error, server_error = torch.zeros(padded_numel), torch.zeros(padded_numel // backend.size)
    return lambda tensor: backend.compressed_allreduce(tensor, worker_error, server_error, backend.rank)


def deepspeed_module() -> Any:
    """The module of its ``CompressedBackend``; None if it is not installed, or a release without it."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        return importlib.import_module("deepspeed.runtime.comm.compressed")
    except ImportError:
        return None


# Measuring


def measure(numel: int, calls: int, with_deepspeed: bool, timeout_seconds: float) -> dict[str, dict[str, list[float]]]:
    """Time all competitors; runs on every node.

    Returns:
        By competitor: ``seconds`` and ``sent_bytes`` (empty on loopback) of every call, on this rank.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds))
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    values = torch.randn(numel, generator=generator)
    tensor = torch.empty_like(values)
    competitors = all_reduces(numel, with_deepspeed)
    results: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "sent_bytes": []} for name in competitors}
    for call in range(UNTIMED_CALLS + calls):
        names = list(competitors)
        start = call % len(names)
        for name in [*names[start:], *names[:start]]:
            tensor.copy_(values)
            dist.barrier()
            sent_before = sent_bytes()
            dist.barrier()
            begin = time.perf_counter()
            competitors[name](tensor)
            seconds = time.perf_counter() - begin
            dist.barrier()
            sent_after = sent_bytes()
            if call >= UNTIMED_CALLS:
                results[name]["seconds"].append(seconds)
                if sent_before is not None and sent_after is not None:
                    results[name]["sent_bytes"].append(sent_after - sent_before)
    return results


def summary(rate: str, nodes: int, numel: int, by_rank: list[dict[str, dict[str, list[float]]]]) -> list[dict[str, Any]]:
    """One entry per competitor, ready for JSON."""
    slowest = {name: [max(s) for s in zip(*(r[name]["seconds"] for r in by_rank), strict=True)] for name in by_rank[0]}
    medians = {name: Spread.of(seconds).median for name, seconds in slowest.items()}
    entries = []
    for name, seconds in slowest.items():
        sent = [nbytes for rank in by_rank for nbytes in rank[name]["sent_bytes"]]
        entries.append(
            {
                "rate": rate,
                "nodes": nodes,
                "numel": numel,
                "competitor": name,
                "label": LABELS[name],
                "seconds": Spread.of(seconds),
                "sent_bytes_per_call": sum(sent) / len(sent) if sent else None,
                "speedup_over_dense": medians[DENSE] / medians[name],
                "seconds_of_calls": seconds,
            }
        )
    return entries


def as_table(entries: list[dict[str, Any]]) -> str:
    header = ["", "link", "nodes", "elements", "time, ms [quartiles]", "sent/call", "speed-up over dense"]
    rows = [
        [
            entry["label"],
            entry["rate"],
            str(entry["nodes"]),
            f"{entry['numel'] / 1e6:g} M",
            entry["seconds"].milliseconds(),
            "-" if entry["sent_bytes_per_call"] is None else size(entry["sent_bytes_per_call"]),
            f"{entry['speedup_over_dense']:.2f}x",
        ]
        for entry in entries
    ]
    return table(header, rows)


def main() -> int:
    settings = parse_arguments()
    exit_on_sigterm()
    with_deepspeed = deepspeed_module() is not None
    document: dict[str, Any] = {
        "environment": environment("deepspeed"),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()},
        "notes": NOTES,
        "links": {},
        "results": [],
    }
    print(describe(document["environment"]))
    if not with_deepspeed:
        print("DeepSpeed's CompressedBackend is not measured: no deepspeed <= 0.19.6 is installed.", flush=True)
    try:
        if set(settings.rates) - {LOOPBACK}:
            check_requirements()
        # All at once, so that a mistake in the last rate does not wait for the others.
        labs = [(rate, nodes, make_lab(nodes=nodes, rate=rate)) for rate in settings.rates for nodes in settings.nodes]
        for rate, nodes, network in labs:
            with network:
                if isinstance(network, NetworkLab):
                    document["links"][rate] = {
                        "tcp_bits_per_second": network.throughput_bits_per_second(),
                        "congestion_control": network.congestion_control(),
                    }
                for numel in settings.sizes:
                    arguments = (numel, settings.calls, with_deepspeed, settings.timeout)
                    by_rank = network.call(measure, *arguments, timeout_seconds=settings.timeout)
                    document["results"] += summary(rate, nodes, numel, by_rank)
                    print(f"{rate}, {nodes} nodes, {numel} elements: done", flush=True)
    except (LabError, ValueError) as error:
        print(f"collective: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if settings.out is not None:
        save(settings.out, document)
    print("\n" + "\n\n".join([as_table(document["results"]), *NOTES]))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/collective.py",
        description="Time and bytes of one compressed all-reduce, beside a dense one and DeepSpeed's, in one run."
        " Rates other than loopback need root and iproute2 (see lab.py).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--nodes", nargs="+", type=int, default=[2, 4], metavar="N", help="nodes, one process each")
    parser.add_argument(
        "--rates",
        nargs="+",
        default=["loopback"],
        metavar="RATE",
        help="of each node's link: loopback, which needs no root, or 200mbit, 1gbit, ..., unshaped",
    )
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[1_000_000, 8_400_000], metavar="NUMEL", help="float32 elements per vector"
    )
    parser.add_argument("--calls", type=int, default=15, help="timed calls of each competitor")
    parser.add_argument("--timeout", type=float, default=180.0, metavar="S", help="for one link, node count and size")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results there as JSON")
    settings = parser.parse_args()
    if settings.calls < 1 or min(settings.nodes) < 2 or min(settings.sizes) < 1:
        parser.error("--calls and --sizes must be at least 1, --nodes at least 2")
    return settings


if __name__ == "__main__":
    sys.exit(main())
