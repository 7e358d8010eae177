"""A network written down: seconds of collectives from latencies and bandwidths, by the equations of textbooks.

    ring all-reduce       2 (n - 1) alpha + 2 (n - 1) / n S / bandwidth      Patarasuk and Yuan, 2009
    double binary tree    2 log2(n) alpha + 2 S / bandwidth                  Sanders, Speck and Traeff, 2009; NCCL
    all-to-all            alpha + (n - 1) g + (n - 1) / n S / bandwidth      LogGP: Alexandrov et al., 1995
    all-gather            the same; each node's link carries it once, as a ring passes on what it got

S bytes of a rank's whole buffer, alpha the latency of a message, g what a further one of the same sender costs. Between
nodes the ``devices`` of one share its link: in an all-to-all among all n ranks each sends to all others by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_onebit.doctor.cost_model import DeviceSpeeds, Network, Seconds

BITS = 8.0
MEMORY_EFFICIENCY = 0.5
"""Of a device's memory bandwidth, what elementwise kernels are taken to reach. Not measured on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """Nodes and what joins them. Bandwidths are bits per second of payload, as one connection moves them."""

    nodes: int
    devices: int = 1
    bandwidth: float
    """Of a node's link, each direction by itself."""
    latency: float = 50e-6
    node_bandwidth: float = 100e9
    """Between the devices of one node; the default is PCIe 4.0 x16 without NVLink, at 12.5 GB/s."""
    node_latency: float = 10e-6
    message: float = 5e-6
    """g"""


def network_of(links: Links) -> Network:
    """Collectives on ``links``."""
    nodes, devices = links.nodes, links.devices
    ranks = nodes * devices
    wide, inside = BITS / links.bandwidth, BITS / links.node_bandwidth
    narrowest = max(wide if nodes > 1 else 0.0, inside if devices > 1 else 0.0)
    latency = links.latency if nodes > 1 else links.node_latency

    def all_reduce(nbytes: float) -> float:
        if ranks == 1:
            return 0.0
        ring = 2 * (ranks - 1) * latency + 2 * (ranks - 1) / ranks * nbytes * narrowest
        hops = math.ceil(math.log2(nodes)) * links.latency + (devices - 1) * links.node_latency
        return min(ring, 2 * hops + 2 * nbytes * narrowest)

    def all_to_all(nbytes: float) -> float:
        if ranks == 1:
            return 0.0
        leaving = devices * (ranks - devices) / ranks * nbytes * wide
        staying = (devices - 1) / ranks * nbytes * inside
        return latency + (ranks - 1) * links.message + max(leaving, staying)

    def all_gather(nbytes: float) -> float:
        if ranks == 1:
            return 0.0
        return latency + (ranks - 1) * links.message + (ranks - 1) / ranks * nbytes * narrowest

    def exchange(members: int, alpha: float, seconds_per_byte: float) -> Seconds:
        return lambda nbytes: alpha + (members - 1) * links.message + (members - 1) / members * nbytes * seconds_per_byte

    between, within = exchange(nodes, links.latency, devices * wide), exchange(devices, links.node_latency, inside)
    is_hierarchical = nodes > 1 and devices > 1
    return Network(
        nodes=nodes,
        devices=devices,
        bits_per_second=links.bandwidth if nodes > 1 else links.node_bandwidth,
        latency_seconds=latency,
        all_reduce=all_reduce,
        all_to_all=all_to_all,
        all_gather=all_gather,
        peers_all_to_all=between if is_hierarchical else None,
        peers_all_gather=between if is_hierarchical else None,
        node_all_to_all=within if is_hierarchical else None,
        node_all_gather=within if is_hierarchical else None,
    )


def speeds_of_memory(bytes_per_second: float, ranks: int) -> DeviceSpeeds:
    """Of a device whose memory bounds everything: bytes per element that must be read or written, over what it reaches.

    The bytes are those of ``benchmarks/kernels.py``.
    """
    per_byte = 1.0 / (MEMORY_EFFICIENCY * bytes_per_second)
    return DeviceSpeeds(
        copy=8 * per_byte,
        cast=12 * per_byte,  # read float32, write 16 bits; and back
        adam=28 * per_byte,  # gradient; parameter and both moments in and out
        powersgd=44 * per_byte,  # add the error, keep the sum, three products, subtract
        encode=21.25 * per_byte,
        serve=(8 + (ranks + 1) / 8) / ranks * per_byte,
        apply=8.125 * per_byte,
        refresh_encode=5 * per_byte,
        refresh_serve=(8 + ranks + 1) / ranks * per_byte,
        refresh_apply=11 * per_byte,
    )
