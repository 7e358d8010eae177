"""Speed-ups that were published, beside what the model says of their settings; and a table for common ones.

Backward takes 4 operations per parameter and token (Kaplan et al. 2020), at 40% of the device's peak in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_onebit.doctor.cost_model import HALF_BYTES, Job, dense_step, onebit_step
from lightning_onebit.doctor.links import Links, network_of, speeds_of_memory
from lightning_onebit.doctor.simulate import Setting, job_of
from lightning_onebit.doctor.text import aligned, best_of

PEAK_SHARE = 0.4
V100, A100 = 125e12, 312e12
V100_MEMORY, A100_MEMORY = 0.9e12, 2.0e12
NVLINK_V100, NVLINK_A100 = 8 * 130e9, 8 * 230e9
"""Bits per second of payload in an all-reduce inside a node, about."""
BERT_BASE, BERT_LARGE = 110e6, 340e6


def backward_seconds(params: float, tokens: float, peak: float) -> float:
    """Of one device and step."""
    return 4 * params * tokens / (PEAK_SHARE * peak)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A setting and what was reported of it."""

    name: str
    links: Links
    job: Job
    memory: float
    reported: float
    against: str
    modelled: Callable[[Published], float]
    """Speed-up by the model."""
    why: str
    """What explains the difference."""

    @property
    def setting(self) -> Setting:
        ranks = self.links.nodes * self.links.devices
        return Setting(job=self.job, speeds=speeds_of_memory(self.memory, ranks), network=network_of(self.links))


def over_half(published: Published) -> float:
    """A compressed step, flat, after backward, against one of 16-bit gradients: 1-bit Adam against fp16 Adam."""
    s = published.setting
    return dense_step(s.job, s.speeds, s.network, element_bytes=HALF_BYTES) / onebit_step(s.job, s.speeds, s.network)


def over_full(published: Published) -> float:
    """A compressed step that averages inside nodes first, overlapped, against DDP in fp32."""
    s = published.setting
    return dense_step(s.job, s.speeds, s.network) / onebit_step(s.job, s.speeds, s.network, overlaps=True, hierarchical=True)


ONEBIT_ADAM_WARMUP = 0.15
"""Of its steps, dense, for BERT-Large (arXiv 2102.02888: 15 to 25%)."""
ZERO_ONE_ROUNDS = 1 - 0.54
"""Of its steps, those that communicate (arXiv 2202.06009: 54% fewer rounds)."""


def zero_one(published: Published) -> float:
    """0/1 Adam (no dense warm-up, a share of the rounds) against whole runs of 1-bit Adam."""
    s = published.setting
    dense, compressed = (
        dense_step(s.job, s.speeds, s.network, element_bytes=HALF_BYTES),
        onebit_step(s.job, s.speeds, s.network),
    )
    local = s.job.forward_seconds + s.job.backward_seconds + s.speeds.adam * s.job.numel
    theirs = ONEBIT_ADAM_WARMUP * dense + (1 - ONEBIT_ADAM_WARMUP) * compressed
    return theirs / (ZERO_ONE_ROUNDS * compressed + (1 - ZERO_ONE_ROUNDS) * local)


def _ethernet(nodes: int, devices: int = 4, bandwidth: float = 4.1e9, inside: float = NVLINK_V100) -> Links:
    return Links(nodes=nodes, devices=devices, bandwidth=bandwidth, latency=50e-6, node_bandwidth=inside)


SETTINGS = (
    Published(
        name="1-bit Adam, BERT-Large, 256 V100",
        links=_ethernet(64),
        job=job_of(BERT_LARGE, backward_seconds(BERT_LARGE, 16 * 128, V100)),
        memory=V100_MEMORY,
        reported=3.3,
        against="fp16 Adam",
        modelled=over_half,
        why="Batch 16 x 128 words per GPU. Theirs sends tensor by tensor by way of the host, four collectives each.",
    ),
    Published(
        name="1-bit Adam, SQuAD, 256 V100",
        links=_ethernet(64),
        job=job_of(BERT_LARGE, backward_seconds(BERT_LARGE, 3 * 384, V100)),
        memory=V100_MEMORY,
        reported=2.9,
        against="fp16 Adam",
        modelled=over_half,
        why="3 x 384 words per GPU are assumed: less computing, more to gain, of which their host path keeps more.",
    ),
    Published(
        name="0/1 Adam, BERT-Large, 128 V100",
        links=_ethernet(32),
        job=job_of(BERT_LARGE, backward_seconds(BERT_LARGE, 16 * 128, V100)),
        memory=V100_MEMORY,
        reported=2.0,
        against="1-bit Adam",
        modelled=zero_one,
        why="Whole runs: 15% of 1-bit Adam's steps are dense, 0/1 Adam communicates in 46% of its own. Not in this package.",
    ),
    Published(
        name="Birder, BERT-Base, 64 A100",
        links=_ethernet(8, 8, 10e9, NVLINK_A100),
        job=job_of(BERT_BASE, backward_seconds(BERT_BASE, 32 * 384, A100)),
        memory=A100_MEMORY,
        reported=6.3,
        against="fp32 DDP",
        modelled=over_full,
        why="Hierarchical, overlapped, 10 Gbit/s taken in full by both; 32 x 384 words per GPU are assumed.",
    ),
)


def published_table() -> str:
    """The settings, the reported speed-ups and the model's."""
    rows = [("setting", "network", "against", "reported", "model", "model / reported")]
    for each in SETTINGS:
        links, modelled = each.links, each.modelled(each)
        network = f"{links.nodes} x {links.devices}, {links.bandwidth / 1e9:g} Gbit/s"
        rows.append(
            (
                each.name,
                network,
                each.against,
                f"{each.reported:.1f}x",
                f"{modelled:.1f}x",
                f"{modelled / each.reported:.2f}",
            )
        )
    notes = "\n".join(f"{each.name}: {each.why}" for each in SETTINGS)
    return f"{aligned(rows)}\n\n{notes}"


@dataclass(frozen=True)
class Workload:
    """A column of the grid: trained parameters and backward on an A100."""

    name: str
    params: float
    backward: float


WORKLOADS = (
    Workload("ResNet-50, 64 images", 25.6e6, 2 * 2 * 4.1e9 * 64 / (PEAK_SHARE * A100)),  # 4.1 G multiply-adds
    Workload("BERT-Base, 4k words", BERT_BASE, backward_seconds(BERT_BASE, 4096, A100)),
    Workload("BERT-Large, 4k", BERT_LARGE, backward_seconds(BERT_LARGE, 4096, A100)),
    Workload("BERT-Large, 32k", BERT_LARGE, backward_seconds(BERT_LARGE, 32768, A100)),
    Workload("GPT 1.3 G, 8k", 1.3e9, backward_seconds(1.3e9, 8192, A100)),
    Workload("LoRA 20 M on 7 G, 4k", 20e6, backward_seconds(7e9, 4096, A100)),
)
NETWORKS = (
    ("2 workstations, 1 Gbit/s", Links(nodes=2, bandwidth=0.94e9)),
    ("2 workstations, 10 Gbit/s", Links(nodes=2, bandwidth=9.4e9)),
    ("4 nodes, 1 Gbit/s", Links(nodes=4, bandwidth=0.94e9)),
    ("4 nodes, 10 Gbit/s", Links(nodes=4, bandwidth=9.4e9)),
    ("4 nodes x 8 PCIe, 10 Gbit/s", Links(nodes=4, devices=8, bandwidth=9.4e9)),
    ("16 nodes x 4 NVLink, 10 Gbit/s", Links(nodes=16, devices=4, bandwidth=9.4e9, node_bandwidth=NVLINK_A100)),
    ("16 nodes x 4 NVLink, 25 Gbit/s", Links(nodes=16, devices=4, bandwidth=23.5e9, node_bandwidth=NVLINK_A100)),
    ("16 nodes x 8 NVLink, 100 Gbit/s", Links(nodes=16, devices=8, bandwidth=94e9, node_bandwidth=NVLINK_A100)),
    ("1 box, 8 GPUs, no NVLink", Links(nodes=1, devices=8, bandwidth=64e9, node_bandwidth=64e9)),  # 8 GB/s, through the host
    ("1 box, 8 GPUs, NVLink", Links(nodes=1, devices=8, bandwidth=NVLINK_A100, node_bandwidth=NVLINK_A100)),
)


def grid_table() -> str:
    """What is recommended, by network and model, and the speed-up of the whole run over fp32 DDP. Markdown."""
    header = ["network", *(w.name for w in WORKLOADS)]
    rows = []
    for name, links in NETWORKS:
        speeds, network = speeds_of_memory(A100_MEMORY, links.nodes * links.devices), network_of(links)
        cells = [
            best_of(Setting(job=job_of(w.params, w.backward), speeds=speeds, network=network).predictions) for w in WORKLOADS
        ]
        rows.append([name, *cells])
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
