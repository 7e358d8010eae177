"""What a training step takes under each way to average gradients: plain numbers in, seconds out.

The notation of the equations: n ranks, N nodes of L devices, P parameters, F and B the seconds of forward and backward.

**A dense step** (Li et al., PyTorch Distributed, VLDB 2020). Gradients become ready in the reverse order of the parameters,
in proportion to their elements. They travel in buckets (1 MiB, then 25 MiB), each as soon as it is full and the one before
it has arrived::

    end_k = max(F + B ready_k, end_(k-1)) + T_allreduce(bytes_k)
    step  = max(F + B, end_last) + 3 copies + hidden processor time + Adam

**A 16-bit hook**: half the bytes, and two conversions. **PowerSGD** of rank r (Vogels et al. 2019) with one bucket:
everything begins when backward has ended; two all-reduces, of r rows and r columns per matrix, take the place of one of P.

**1 bit** (1-bit Adam, arXiv 2102.02888, and this package's ``engine/optimizer.py``). A bucket of b elements is encoded by
the training thread, and exchanged by another, one after the other, while the next one is encoded::

    sent_k = F + B + encode (k + 1)          (on a GPU F + B ready_k + encode (k + 1): exchanges start during backward)
    end_k  = max(sent_k, end_(k-1)) + T_alltoall(b 1.016 / 8) + serve + T_allgather(b 1.016 / 8)
    step   = apply after the last end_k + (refresh of 1.002 bytes per element) / 64 + sketch / 16

It replaces Adam's update. Nodes that average first add an all-to-all of b floats inside the node, and encode 1 / L.

**Shared cores.** What the processor does takes ``processor_factor = max(1, ranks / cores)`` times as long; hidden
behind backward is only the part of an exchange that is no work for these cores.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lightning_onebit.config import CompressionConfig
from lightning_onebit.refresh_schedule import LONGEST_INTERVAL, SKETCH_STEPS, STEPS_PER_INTERVAL, is_refresh_due

FLOAT_BYTES, HALF_BYTES = 4.0, 2.0
SCALE_BYTES = 4.0 / 2048
SIGN_BYTES = 1.0 / 8 + SCALE_BYTES
"""Per element and direction: one bit, and a float32 for each block of 2048."""
CODE_BYTES = 1.0 + SCALE_BYTES
"""Of a renewed second moment."""
SKETCH_BYTES = 251 * 4.0
"""Per tensor."""
MEBIBYTE = 1024.0 * 1024.0
FIRST_BUCKET_BYTES, BUCKET_BYTES = 1.0 * MEBIBYTE, 25.0 * MEBIBYTE
"""torch's defaults."""
BUCKET_COPIES = 3
"""Gradients are copied into DDP's bucket, divided by n there, and copied back."""
ONEBIT_COPIES = 3
"""Gradients pass through DDP's bucket unchanged, and are looked at: is any infinite?"""
ONEBIT_DENSE_STEPS = 20
"""The default criterion's first; it may take up to 35."""
POWERSGD_DENSE_STEPS = 1000
"""torch's default, ``start_powerSGD_iter``."""
POWERSGD_RANK = 2
STEADY_STEP = STEPS_PER_INTERVAL * LONGEST_INTERVAL
"""From here on second moments are renewed at every 64th step."""

Seconds = Callable[[float], float]
"""Of a collective, by the bytes of the whole buffer of one rank."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained. Seconds are those of a device that has its cores to itself."""

    numels: tuple[float, ...]
    """Elements of each trained tensor, in the order of ``module.parameters()``."""
    forward_seconds: float
    backward_seconds: float
    factor_numel: float = 0.0
    """Rows + columns of all matrices: elements of PowerSGD's factors of rank 1."""
    vector_numel: float = 0.0
    """Elements of all other tensors, which PowerSGD sends as they are."""
    steps: int = 10_000
    """Of the whole run, its dense beginning included."""

    @functools.cached_property
    def numel(self) -> float:
        return sum(self.numels)


@dataclass(frozen=True, kw_only=True)
class DeviceSpeeds:
    """Seconds per element of the model, of a device that has its cores to itself, for this number of ranks."""

    copy: float
    cast: float
    """To 16 bits and back."""
    adam: float
    powersgd: float
    """Both products, orthogonalization, product of the factors, error."""
    encode: float
    serve: float
    """For 1/n of the elements, averaged over all."""
    apply: float
    refresh_encode: float
    refresh_serve: float
    refresh_apply: float


@dataclass(frozen=True, kw_only=True)
class Network:
    """Seconds of collectives between these ranks, all of them at once."""

    nodes: int
    devices: int
    """Of each node."""
    bits_per_second: float
    """Of the narrowest link of a ring through all ranks, payload."""
    latency_seconds: float
    all_reduce: Seconds
    all_to_all: Seconds
    all_gather: Seconds
    peers_all_to_all: Seconds | None = None
    """Between the devices of the same local rank, all local ranks at once. ``None``: one node, or one device each."""
    peers_all_gather: Seconds | None = None
    node_all_to_all: Seconds | None = None
    node_all_gather: Seconds | None = None
    processor_share: float = 0.0
    """Of an all-reduce's seconds, those that the cores of the training work on it."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices

    @property
    def is_hierarchical(self) -> bool:
        return self.nodes > 1 and self.devices > 1

    def with_bandwidth(self, factor: float) -> Network:
        """The same with ``factor`` times the bandwidth between nodes (of one node: inside it); latencies stay."""
        names = ["all_reduce", "all_to_all", "all_gather", "peers_all_to_all", "peers_all_gather"]
        scaled: dict[str, Any] = {name: _faster(f, factor) for name in names if (f := getattr(self, name)) is not None}
        return replace(self, bits_per_second=self.bits_per_second * factor, **scaled)


def _faster(seconds: Seconds, factor: float) -> Seconds:
    latency = seconds(0.0)
    return lambda nbytes: latency + (seconds(nbytes) - latency) / factor


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one way to average gradients."""

    name: str
    label: str
    step_seconds: float
    """Late in the run, when it compresses; renewals of second moments spread over the steps."""
    dense_steps: int
    """At the beginning, before it compresses."""
    mean_step_seconds: float
    """Over the whole run."""
    sent_bytes: float
    """By a rank in a step, payload."""
    speedup: float
    """Of the whole run, over DDP."""
    refresh_seconds: float
    """What one renewal of second moments adds to its step."""
    sketch_seconds: float
    """Likewise a sketch."""


def predict(
    job: Job, speeds: DeviceSpeeds, network: Network, *, cores: float | None = None, overlaps: bool
) -> list[Prediction]:
    """Predictions for every way that applies here, DDP first.

    Args:
        job: what is trained.
        speeds: of each rank's device.
        network: between the ranks.
        cores: processor cores that all ranks share; ``None``: as many as they need.
        overlaps: whether compressed exchanges start during backward (``overlap="auto"``: on a GPU).
    """
    factor = processor_factor(network.ranks, cores)
    ring, numel = 2 * (network.ranks - 1) / network.ranks, job.numel
    dense = dense_step(job, speeds, network, factor)
    half = dense_step(job, speeds, network, factor, element_bytes=HALF_BYTES)
    powersgd = powersgd_step(job, speeds, network, factor)
    factors = POWERSGD_RANK * job.factor_numel + job.vector_numel

    def prediction(
        name: str, label: str, step: float, sent: float, dense_steps: int = 0, refresh: float = 0.0, sketch: float = 0.0
    ) -> Prediction:
        first = min(dense_steps, job.steps)
        step += sketch / SKETCH_STEPS
        total = first * dense + (job.steps - first) * step + refreshes(first, job.steps) * refresh
        return Prediction(
            name=name,
            label=label,
            step_seconds=step + refresh / LONGEST_INTERVAL,
            dense_steps=dense_steps,
            mean_step_seconds=total / job.steps,
            sent_bytes=sent,
            speedup=dense * job.steps / total,
            refresh_seconds=refresh,
            sketch_seconds=sketch,
        )

    predictions = [
        prediction("ddp", "DDP, fp32", dense, ring * FLOAT_BYTES * numel),
        prediction("16bit", "DDP, 16-bit hook", half, ring * HALF_BYTES * numel),
        prediction(
            "powersgd", f"DDP, PowerSGD rank {POWERSGD_RANK}", powersgd, ring * FLOAT_BYTES * factors, POWERSGD_DENSE_STEPS
        ),
    ]
    sketch = sketch_seconds(job, speeds, network, factor)
    for hierarchical in (False, True) if network.is_hierarchical else (False,):
        step = onebit_step(job, speeds, network, factor, overlaps=overlaps, hierarchical=hierarchical)
        refresh = refresh_seconds(job, speeds, network, factor, hierarchical=hierarchical)
        members, share = (network.nodes, numel / network.devices) if hierarchical else (network.ranks, numel)
        sent = 2 * (members - 1) / members * share * (SIGN_BYTES + CODE_BYTES / LONGEST_INTERVAL)
        name, label = ("onebit_hierarchical", "onebit_ddp, hierarchical") if hierarchical else ("onebit", "onebit_ddp")
        predictions.append(prediction(name, label, step, sent, ONEBIT_DENSE_STEPS, refresh, sketch))
    return predictions


def processor_factor(ranks: float, cores: float | None) -> float:
    """How many times as long the processor takes where ``ranks`` share ``cores``; 1 where they have enough."""
    return 1.0 if cores is None else max(1.0, ranks / cores)


def compute_seconds(job: Job, speeds: DeviceSpeeds, factor: float = 1.0) -> float:
    """Seconds of a step without communication: forward, backward, Adam."""
    return factor * (job.forward_seconds + job.backward_seconds + speeds.adam * job.numel)


@functools.lru_cache(maxsize=16)
def ddp_buckets(numels: tuple[float, ...]) -> list[tuple[float, float]]:
    """DDP's buckets in their order: elements, and the share of backward after which they are ready.

    A tensor that reaches the bucket's size is its last (torch's ``compute_bucket_assignment_by_size``).
    """
    buckets: list[tuple[float, float]] = []
    total, done, numel = sum(numels), 0.0, 0.0
    for each in reversed(numels):
        numel, done = numel + each, done + each
        if FLOAT_BYTES * numel >= (BUCKET_BYTES if buckets else FIRST_BUCKET_BYTES):
            buckets.append((numel, done / total))
            numel = 0.0
    if numel:
        buckets.append((numel, 1.0))
    return buckets


def dense_step(
    job: Job, speeds: DeviceSpeeds, network: Network, factor: float = 1.0, *, element_bytes: float = FLOAT_BYTES
) -> float:
    """Seconds of a step of DDP, or with a hook that sends ``element_bytes`` per element."""
    forward, backward = factor * job.forward_seconds, factor * job.backward_seconds
    per_element = BUCKET_COPIES * speeds.copy + (speeds.cast if element_bytes < FLOAT_BYTES else 0.0)
    local = factor * (per_element + speeds.adam) * job.numel
    if network.ranks == 1:
        return forward + backward + factor * speeds.adam * job.numel
    end = exchanged = 0.0
    for numel, ready in ddp_buckets(job.numels):
        seconds = network.all_reduce(element_bytes * numel)
        end = max(forward + ready * backward, end) + seconds
        exchanged += seconds
    exposed = max(0.0, end - forward - backward)
    return forward + backward + exposed + network.processor_share * (exchanged - exposed) + local


def powersgd_step(job: Job, speeds: DeviceSpeeds, network: Network, factor: float = 1.0) -> float:
    """Seconds of a step of torch's PowerSGD hook with one bucket: on gloo several buckets of it get mixed up."""
    if network.ranks == 1:
        return compute_seconds(job, speeds, factor)
    local = factor * (BUCKET_COPIES * speeds.copy + speeds.powersgd + speeds.adam) * job.numel
    half_of_factors = FLOAT_BYTES * POWERSGD_RANK * job.factor_numel / 2
    exchanged = 2 * network.all_reduce(half_of_factors) + network.all_reduce(FLOAT_BYTES * job.vector_numel)
    return factor * (job.forward_seconds + job.backward_seconds) + exchanged + local


def onebit_step(
    job: Job,
    speeds: DeviceSpeeds,
    network: Network,
    factor: float = 1.0,
    *,
    overlaps: bool = False,
    hierarchical: bool = False,
) -> float:
    """Seconds of a compressed step without refresh or sketch."""
    forward, backward = factor * job.forward_seconds, factor * job.backward_seconds
    if network.ranks == 1:
        return compute_seconds(job, speeds, factor)
    local = factor * ONEBIT_COPIES * speeds.copy * job.numel
    agree = network.all_reduce(FLOAT_BYTES * len(job.numels))
    sent, end, ready, ends = forward + backward + local + agree, 0.0, 0.0, []
    if overlaps:
        sent = forward + local
    for numel in onebit_buckets(job.numel):
        share = numel / job.numel
        ready += share
        if hierarchical:
            assert network.node_all_to_all is not None
            # Average in the node: copy to flat memory, exchange, add L parts of 1/L.
            sent += network.node_all_to_all(FLOAT_BYTES * numel) + factor * 3 * speeds.copy * numel
        sent += factor * speeds.encode * numel / (network.devices if hierarchical else 1)
        if overlaps:
            sent += share * backward  # the device does one after the other: backward of the bucket, then encode
        end = max(sent, end) + exchange_seconds(network, SIGN_BYTES * numel, hierarchical=hierarchical)
        end += factor * speeds.serve * numel
        ends.append(end)
    done = sent + (agree if overlaps else 0.0)
    for numel, end in zip(onebit_buckets(job.numel), ends, strict=True):
        done = max(done, end) + factor * speeds.apply * numel
    return done


def sketch_seconds(job: Job, speeds: DeviceSpeeds, network: Network, factor: float = 1.0) -> float:
    """What a sketch adds to a step: a pass over all gradients, taken to be as long as encoding, and an all-reduce."""
    if network.ranks == 1:
        return 0.0
    return factor * speeds.encode * job.numel + network.all_reduce(SKETCH_BYTES * len(job.numels))


def refresh_seconds(
    job: Job, speeds: DeviceSpeeds, network: Network, factor: float = 1.0, *, hierarchical: bool = False
) -> float:
    """What a refresh of the second moment adds to a step: bucket by bucket, nothing meanwhile."""
    if network.ranks == 1:
        return 0.0
    encode = speeds.refresh_encode / (network.devices if hierarchical else 1)
    local = factor * (encode + speeds.refresh_serve + speeds.refresh_apply) * job.numel
    buckets = onebit_buckets(job.numel)
    return local + sum(exchange_seconds(network, CODE_BYTES * numel, hierarchical=hierarchical) for numel in buckets)


def exchange_seconds(network: Network, nbytes: float, *, hierarchical: bool = False) -> float:
    """An all-to-all and an all-gather of ``nbytes``, those of a whole bucket."""
    if not hierarchical:
        return network.all_to_all(nbytes) + network.all_gather(nbytes)
    assert network.peers_all_to_all is not None
    assert network.peers_all_gather is not None
    assert network.node_all_gather is not None
    share = nbytes / network.devices
    return network.peers_all_to_all(share) + network.peers_all_gather(share) + network.node_all_gather(nbytes)


@functools.lru_cache(maxsize=16)
def onebit_buckets(numel: float) -> list[float]:
    """Elements of this package's buckets, by its default."""
    largest = float(CompressionConfig().bucket_numel(int(numel)))
    count = max(1, -int(-numel // largest))
    return [min(largest, numel - i * largest) for i in range(count)]


@functools.lru_cache(maxsize=16)
def refreshes(first: int, last: int) -> int:
    """Renewals of the second moment after optimizer steps ``first + 1`` to ``last``, by the default schedule."""
    begin = max(first, STEADY_STEP)
    early = sum(is_refresh_due(step, "auto") for step in range(first + 1, min(begin, last) + 1))
    due = next(step for step in range(begin + 1, begin + LONGEST_INTERVAL + 1) if is_refresh_due(step, "auto"))
    return early + max(0, (last - due) // LONGEST_INTERVAL + 1)


def bandwidths(low: float, high: float, count: int) -> Iterator[float]:
    """``count`` numbers from ``low`` to ``high``, each the same multiple of the one before."""
    ratio = (high / low) ** (1.0 / (count - 1))
    return itertools.accumulate(itertools.repeat(ratio, count - 1), lambda a, b: a * b, initial=low)
