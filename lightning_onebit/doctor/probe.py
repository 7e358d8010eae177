"""What the network and the device of these ranks do, measured. Every rank makes the same calls in the same order."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_onebit.comm.groups import new_groups
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.topology import Topology
from lightning_onebit.doctor.cost_model import CODE_BYTES, FLOAT_BYTES, SIGN_BYTES, Network, onebit_buckets, processor_factor

KIBIBYTE = 1024
ALL_REDUCE_BYTES = [256.0, *(KIBIBYTE * x for x in (16.0, 256.0, 2048.0, 8192.0, 26624.0))]
MESSAGE_BYTES = [256.0, *(KIBIBYTE * x for x in (16.0, 256.0, 2048.0))]
PAIR_BYTES = (64.0, KIBIBYTE * 512.0)
LONGEST_CALL_SECONDS = 0.6
"""A call that takes longer is the last, the largest, of its kind."""
LARGEST_NODES_IN_PAIRS = 4


@dataclass(frozen=True)
class Curve:
    """Seconds of a collective between and beyond the sizes that were measured: straight lines."""

    points: tuple[tuple[float, float], ...]
    """Bytes and seconds, the smallest first; at least two."""

    def __call__(self, nbytes: float) -> float:
        (x0, y0), *rest = self.points
        if nbytes <= x0:
            return y0
        for x1, y1 in rest:
            if nbytes <= x1 or (x1, y1) == self.points[-1]:
                return max(y0, y0 + (y1 - y0) * (nbytes - x0) / (x1 - x0))
            x0, y0 = x1, y1
        return y0

    @property
    def seconds_per_byte(self) -> float:
        """Of the largest messages: between the last two points; at least that of the largest alone, halved."""
        (x0, y0), (x1, y1) = self.points[-2:]
        return max((y1 - y0) / (x1 - x0), 0.5 * y1 / x1)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two ranks that send to each other at the same time."""

    ranks: tuple[int, int]
    same_node: bool
    latency_seconds: float
    bits_per_second: float


@dataclass(frozen=True, kw_only=True)
class NetworkProbe:
    """What was measured of the network."""

    network: Network
    curves: dict[str, Curve]
    pairs: list[Pair]
    contention: float
    """How many times as long the processor's work took when all ranks worked at once: the wall clock's over its own."""

    def document(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "bits_per_second": self.network.bits_per_second,
            "latency_seconds": self.network.latency_seconds,
            "processor_share": self.network.processor_share,
            "contention": self.contention,
            "pairs": [asdict(pair) for pair in self.pairs],
            "seconds_by_bytes": {name: list(map(list, curve.points)) for name, curve in self.curves.items()},
        }


class NetworkTimer:
    """Times collectives: from when all ranks are there, until the last one is done."""

    def __init__(self, communicator: Communicator, device: torch.device) -> None:
        self.communicator, self.device = communicator, device
        self._signal = torch.zeros(1, device=device)

    def together(self) -> None:
        """Wait for all ranks."""
        self.communicator.all_reduce_max_(self._signal)
        self._synchronize()

    def median(self, call: Callable[[], object]) -> tuple[float, float]:
        """Median seconds of a call, of the slowest rank, and the processor's seconds of a rank, on the mean. Collective."""
        times: list[tuple[float, float]] = []
        begin = time.perf_counter()
        for _ in range(8):
            self.together()
            start, processor = time.perf_counter(), time.process_time()
            call()
            self._synchronize()
            times.append((time.perf_counter() - start, time.process_time() - processor))
            # All ranks stop alike: the slowest one's clock decides.
            spent = torch.tensor([time.perf_counter() - begin], dtype=torch.float64, device=self.device)
            self.communicator.all_reduce_max_(spent)
            if len(times) >= 3 and float(spent) > LONGEST_CALL_SECONDS:
                break
        timed = times[1:]
        wall = torch.tensor([each[0] for each in timed], dtype=torch.float64, device=self.device)
        self.communicator.all_reduce_max_(wall)
        used = torch.tensor([statistics.median(each[1] for each in timed)], dtype=torch.float64, device=self.device)
        self.communicator.all_reduce_sum_(used)
        return float(wall.median()), float(used) / self.communicator.world_size

    def curve(
        self, sizes: Sequence[float], prepare: Callable[[float], tuple[float, Callable[[], object]]]
    ) -> tuple[Curve, float]:
        """Measured at ``sizes``, until a call takes too long; and the processor's share of the largest. Collective.

        Args:
            sizes: bytes, wanted.
            prepare: from these, the bytes that it will be, and a call.
        """
        points: dict[float, float] = {}
        share = 0.0
        for size in sorted(set(sizes)):
            nbytes, call = prepare(size)
            seconds, used = self.median(call)
            points[nbytes], share = seconds, used / seconds
            if seconds > LONGEST_CALL_SECONDS and len(points) >= 2:
                break
        return Curve(tuple(sorted(points.items()))), share

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def probe_network(
    topology: Topology, device: torch.device, *, numel: float | None, tensors: int, cores: float | None
) -> NetworkProbe:
    """Measure the network of the default process group. Collective.

    Args:
        topology: of all ranks.
        device: of this rank.
        numel: parameters of the model, whose messages are measured; ``None``: a few usual sizes.
        tensors: of the model.
        cores: processor cores that all ranks share; ``None``: as many as they need.
    """
    communicator = Communicator(waits=False)  # nobody is to watch, as that takes time
    timer, n = NetworkTimer(communicator, device), communicator.world_size
    reduce_bytes, message_bytes = list(ALL_REDUCE_BYTES), list(MESSAGE_BYTES)
    if numel is not None:
        bucket = onebit_buckets(numel)[0]
        message_bytes = [256.0, bucket * SIGN_BYTES / topology.local_world_size, bucket * SIGN_BYTES, bucket * CODE_BYTES]
        largest = FLOAT_BYTES * numel
        reduce_bytes = [*(size for size in reduce_bytes if size < largest), max(512.0, min(largest, reduce_bytes[-1]))]
        reduce_bytes.append(max(512.0, FLOAT_BYTES * tensors))

    curves: dict[str, Curve] = {}
    curves["all_reduce"], share = timer.curve(reduce_bytes, lambda size: _all_reduce(communicator, size, device))
    curves["all_to_all"], _ = timer.curve(message_bytes, lambda size: _all_to_all(communicator, size, device))
    curves["all_gather"], _ = timer.curve(message_bytes, lambda size: _all_gather(communicator, size, device))
    if topology.num_nodes > 1 and not topology.is_flat:
        groups = new_groups(topology, None)
        assert groups.node is not None
        members = {"peers": groups.peers, "node": groups.node}
        for place, members_of in members.items():
            sizes = message_bytes if place == "peers" else [*message_bytes, FLOAT_BYTES * 1024 * KIBIBYTE]
            curves[f"{place}_all_to_all"], _ = timer.curve(sizes, lambda s, c=members_of: _all_to_all(c, s, device))  # type: ignore[misc]
            curves[f"{place}_all_gather"], _ = timer.curve(sizes, lambda s, c=members_of: _all_gather(c, s, device))  # type: ignore[misc]
        groups.destroy()
    factor = processor_factor(n, cores)
    network = Network(
        nodes=topology.num_nodes,
        devices=topology.local_world_size,
        bits_per_second=8 * 2 * (n - 1) / n / curves["all_reduce"].seconds_per_byte,
        latency_seconds=curves["all_reduce"].points[0][1] / (2 * (n - 1)),
        processor_share=0.0 if cores is None or device.type == "cuda" else min(1.0, share * factor),
        **curves,
    )
    pairs = [_pair(timer, topology, other, device) for other in _others(topology)]
    return NetworkProbe(network=network, curves=curves, pairs=pairs, contention=_contention(timer))


def _all_reduce(communicator: Communicator, size: float, device: torch.device) -> tuple[float, Callable[[], object]]:
    tensor = torch.zeros(max(1, int(size / FLOAT_BYTES)), device=device)
    return float(tensor.nbytes), lambda: communicator.all_reduce_sum_(tensor)


def _all_to_all(communicator: Communicator, size: float, device: torch.device) -> tuple[float, Callable[[], object]]:
    sent = _bytes(communicator, size, device)
    received = torch.empty_like(sent)
    return float(sent.nbytes), lambda: communicator.all_to_all_(received, sent)


def _all_gather(communicator: Communicator, size: float, device: torch.device) -> tuple[float, Callable[[], object]]:
    gathered = _bytes(communicator, size, device)
    part = torch.zeros(gathered.numel() // communicator.world_size, dtype=torch.uint8, device=device)
    return float(gathered.nbytes), lambda: communicator.all_gather_(gathered, part)


def _bytes(communicator: Communicator, size: float, device: torch.device) -> Tensor:
    """As many as asked for, a multiple of the number of ranks."""
    n = communicator.world_size
    return torch.zeros(n * max(1, math.ceil(size / n)), dtype=torch.uint8, device=device)


def _others(topology: Topology) -> list[int]:
    """Ranks with which rank 0 makes pairs: the next one of its node, and the first ones of some other nodes."""
    devices = topology.local_world_size
    nodes = range(1, min(topology.num_nodes, LARGEST_NODES_IN_PAIRS))
    return [*([1] if devices > 1 else []), *(node * devices for node in nodes)]


def _pair(timer: NetworkTimer, topology: Topology, other: int, device: torch.device) -> Pair:
    """Rank 0 and ``other`` send to each other; all others have nothing to send."""
    communicator = timer.communicator
    partner = {0: other, other: 0}.get(communicator.rank)
    seconds = []
    for size in PAIR_BYTES:
        numels = [int(size) if rank == partner else 0 for rank in range(communicator.world_size)]
        sent = torch.zeros(sum(numels), dtype=torch.uint8, device=device)
        received = torch.empty_like(sent)

        def call(received: Tensor = received, sent: Tensor = sent, numels: list[int] = numels) -> None:
            communicator.all_to_all_(received, sent, received_numels=numels, sent_numels=numels)

        seconds.append(timer.median(call)[0])
    per_byte = max(seconds[1] - seconds[0], 0.05 * seconds[1]) / (PAIR_BYTES[1] - PAIR_BYTES[0])
    return Pair(
        ranks=(0, other),
        same_node=other < topology.local_world_size,
        latency_seconds=seconds[0],
        bits_per_second=8 / per_byte,
    )


def _contention(timer: NetworkTimer) -> float:
    """How much longer than the processor's own time its work takes when all ranks work at once."""
    x = torch.randn(256, 256)

    def work() -> None:
        for _ in range(60):
            torch.mm(x, x)

    work()
    timer.together()
    wall, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < 0.2:
        work()
    ratio = (time.perf_counter() - wall) / max(1e-9, time.process_time() - used) * torch.get_num_threads()
    mean = torch.tensor([ratio], dtype=torch.float64, device=timer.device)
    timer.communicator.all_reduce_sum_(mean)
    return max(1.0, float(mean) / timer.communicator.world_size)
