"""Speed-ups that were published, beside what the model says of their settings; and a table for common ones.

Backward takes 4 operations per parameter and token (Kaplan et al. 2020), at 40% of the device's peak in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_onebit.doctor.cost_model import HALF_BYTES, compute_seconds, dense_step, onebit_step
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
    nodes: int
    devices: int
    bandwidth: float
    params: float
    tokens: float
    """Of one device and step."""
    peak: float
    """Operations per second of a device."""
    reported: float
    against: str
    modelled: Callable[[Setting], tuple[float, float]]
    """Speed-ups by the model: of a step that compresses, of the whole run."""
    why: str
    """What explains the difference."""

    def setting(self, computing: float = 1.0) -> Setting:
        """With ``computing`` times the seconds of forward and backward."""
        is_a100 = self.peak == A100
        inside = NVLINK_A100 if is_a100 else NVLINK_V100
        links = Links(nodes=self.nodes, devices=self.devices, bandwidth=self.bandwidth, node_bandwidth=inside)
        return Setting(
            job=job_of(self.params, computing * backward_seconds(self.params, self.tokens, self.peak)),
            speeds=speeds_of_memory(A100_MEMORY if is_a100 else V100_MEMORY, self.nodes * self.devices),
            network=network_of(links),
        )


def onebit_adam(warmup: float) -> Callable[[Setting], tuple[float, float]]:
    """Flat, all of it after backward, against 16-bit gradients; ``warmup`` of the run's steps are such ones."""

    def speedups(s: Setting) -> tuple[float, float]:
        dense, step = _fp16_adam(s), onebit_step(s.job, s.speeds, s.network)
        return dense / step, dense / (warmup * dense + (1 - warmup) * step)

    return speedups


def zero_one_adam(s: Setting) -> tuple[float, float]:
    """A share of the rounds and no dense warm-up, against whole runs of 1-bit Adam; a step: those without a round count."""
    dense, step = _fp16_adam(s), onebit_step(s.job, s.speeds, s.network)
    theirs = BERT_WARMUP * dense + (1 - BERT_WARMUP) * step
    ours = ZERO_ONE_ROUNDS * step + (1 - ZERO_ONE_ROUNDS) * compute_seconds(s.job, s.speeds)
    return step / ours, theirs / ours


def birder(s: Setting) -> tuple[float, float]:
    """Inside nodes first, during backward, no dense warm-up, against DDP in fp32."""
    step = onebit_step(s.job, s.speeds, s.network, overlaps=True, hierarchical=True)
    speedup = dense_step(s.job, s.speeds, s.network) / step
    return speedup, speedup


def _fp16_adam(s: Setting) -> float:
    return dense_step(s.job, s.speeds, s.network, element_bytes=HALF_BYTES)


BERT_WARMUP, SQUAD_WARMUP = 0.15, 0.20
"""Dense share of the steps: DeepSpeed advised 15 to 25%."""
ZERO_ONE_ROUNDS = 1 - 0.54
"""Of its steps, those that communicate (arXiv 2202.06009: 54% fewer rounds)."""

SETTINGS = (
    Published(
        name="1-bit Adam, BERT-Large",
        nodes=64, devices=4, bandwidth=4.1e9, params=BERT_LARGE, tokens=16 * 128, peak=V100,
        reported=3.3, against="fp16 Adam", modelled=onebit_adam(BERT_WARMUP),
        why="between a compressed step and a whole run with 15% dense steps. Batch of 16 x 128 words.",
    ),
    Published(
        name="1-bit Adam, SQuAD",
        nodes=64, devices=4, bandwidth=4.1e9, params=BERT_LARGE, tokens=3 * 384, peak=V100,
        reported=2.9, against="fp16 Adam", modelled=onebit_adam(SQUAD_WARMUP),
        why="likewise, with 20% dense. 3 x 384 words are assumed. Theirs sends tensor by tensor, four collectives each,"
        " which the model does not know.",
    ),
    Published(
        name="0/1 Adam, BERT-Large",
        nodes=32, devices=4, bandwidth=4.1e9, params=BERT_LARGE, tokens=16 * 128, peak=V100,
        reported=2.0, against="1-bit Adam", modelled=zero_one_adam,
        why="between steps of both, of which 0/1 Adam leaves out 54% of the rounds, and whole runs, of which 15% are dense"
        " with 1-bit Adam. This package has no steps without a round.",
    ),
    Published(
        name="Birder, BERT-Base",
        nodes=8, devices=8, bandwidth=10e9, params=BERT_BASE, tokens=32 * 384, peak=A100,
        reported=6.3, against="fp32 DDP", modelled=birder,
        why="the batch is not known (32 x 384 words are assumed), nor what TCP left of 10 Gbit/s; the shorter the step,"
        " the more either counts.",
    ),
)  # fmt: skip


def published_table() -> str:
    """The settings, the reported speed-ups and the model's."""
    header = ("", "network", "against", "reported", "model: step", "whole run", "with twice the computing")
    rows: list[Sequence[str]] = [header]
    for each in SETTINGS:
        network = f"{each.nodes} x {each.devices}, {each.bandwidth / 1e9:g} Gbit/s"
        step, whole = each.modelled(each.setting())
        slower = each.modelled(each.setting(2.0))
        cells = (f"{each.reported:.1f}x", f"{step:.1f}x", f"{whole:.1f}x", f"{slower[0]:.1f}x, {slower[1]:.1f}x")
        rows.append((each.name, network, each.against, *cells))
    notes = "\n".join(f"{each.name}: {each.why}" for each in SETTINGS)
    return f"{aligned(rows)}\n\n{notes}\n\n{ASSUMPTIONS}"


ASSUMPTIONS = (
    "Assumed: backward of 4 operations per parameter and token at 40% of the device's peak in 16 bits (V100 125, A100 312"
    " Tflop/s), forward half of it; elementwise kernels at half of the memory's bandwidth; latency 50 us."
)


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
