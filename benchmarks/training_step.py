"""Step time of a GPT's training over links of several rates, side by side: dense DDP, torch's compression hooks, 1 bit.

    python benchmarks/training_step.py --nodes 4 --rates 200mbit 1gbit unshaped --out benchmarks/results/training_step.json

Every competitor is the same LightningModule with the same stock AdamW in a Lightning Trainer; only the strategy differs.
Each training is short and runs in fresh processes, one per node; competitors take turns, so that a change of the machine's
mood meets all of them. What is timed is a batch on rank 0, from ``on_train_batch_start`` to ``on_train_batch_end``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lab import LOOPBACK, LabError, Loopback, NetworkLab, check_requirements, exit_on_sigterm, make_lab, sent_bytes
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.strategy import Strategy
from report import SHARED_CORES, Spread, describe, environment, save, size, table
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_onebit import FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch
from lightning_onebit.refresh_schedule import SKETCH_STEPS, is_refresh_due

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from gpt_stdlib import GPT

WARMUP_STEPS = 2
"""Dense steps of onebit and PowerSGD before they compress; not timed."""
POWERSGD_RANK = 2
OVERLAPPED_BUCKET_MB = 4
NEVER_HERE = 1_000_000
"""An interval between renewals that is longer than any training of this script."""
RUN, SWITCH = 1000, 20
TABLE_NOTES = (
    "step: median and quartiles over the timed steps of rank 0 in all repetitions",
    "sent: by one node per step, mean over the nodes, as counted on its link with TCP, IP and Ethernet headers;"
    " on loopback payload only: the strategy's own count, or what the algorithm sends",
    f"by default, a run that switches at step {SWITCH} renews its second moment"
    f" {sum(is_refresh_due(step, 'auto') for step in range(SWITCH + 1, RUN + 1))} times until step {RUN}, and sketches"
    f" gradients {SKETCH_STEPS + RUN // SKETCH_STEPS - (SWITCH + SKETCH_STEPS) // SKETCH_STEPS} times: in"
    f" {SKETCH_STEPS} steps, then in one in {SKETCH_STEPS}",
)


# Competitors


class HookedDDPStrategy(DDPStrategy):
    """DDP with a communication hook also where Lightning does not register it: on CPU."""

    def __init__(self, make_state: Callable[[], object], hook: Callable[..., Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._make_state, self._hook = make_state, hook

    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(self._make_state(), self._hook)


class WaitingDDPStrategy(HookedDDPStrategy):
    """Ranks train by themselves but wait for each other after every backward."""

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        dist.all_reduce(torch.zeros(1))


def powersgd_state(dense_steps: int = WARMUP_STEPS) -> PowerSGDState:
    return PowerSGDState(
        process_group=None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=max(2, dense_steps)
    )


def no_state() -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Competitor:
    """A strategy, and what it sends per step where no link counts it."""

    label: str
    strategy: Callable[[timedelta], Strategy]
    """From the time after which a collective fails."""
    bytes_per_element: float | None = None
    """Payload of its ring all-reduce; None if it is not one."""


COMPETITORS: dict[str, Competitor] = {
    # The ceiling: every rank trains on its own gradients.
    "none": Competitor(
        label="no communication",
        strategy=lambda timeout: HookedDDPStrategy(no_state, noop_hook, timeout=timeout),
        bytes_per_element=0,
    ),
    # What any synchronous training pays: the time until the slowest rank has its gradients.
    "waiting": Competitor(
        label="no communication, but waiting for all",
        strategy=lambda timeout: WaitingDDPStrategy(no_state, noop_hook, timeout=timeout),
        bytes_per_element=0,
    ),
    "ddp": Competitor(label="DDP, fp32", strategy=lambda timeout: DDPStrategy(timeout=timeout), bytes_per_element=4),
    "fp16": Competitor(
        label="DDP, fp16_compress_hook",
        strategy=lambda timeout: HookedDDPStrategy(no_state, fp16_compress_hook, timeout=timeout),
        bytes_per_element=2,
    ),
    "powersgd": Competitor(
        label=f"DDP, PowerSGD hook, rank {POWERSGD_RANK}",
        strategy=lambda timeout: HookedDDPStrategy(powersgd_state, powerSGD_hook, timeout=timeout),
    ),
    # With one bucket there is nothing that could be out of order.
    "powersgd-1-bucket": Competitor(
        label=f"PowerSGD hook, rank {POWERSGD_RANK}, one bucket",
        strategy=lambda timeout: HookedDDPStrategy(powersgd_state, powerSGD_hook, timeout=timeout, bucket_cap_mb=1 << 20),
    ),
    "onebit": Competitor(
        label="onebit_ddp, deferred", strategy=lambda timeout: OneBitDDPStrategy(overlap=False, timeout=timeout)
    ),
    # What renewing costs: with "auto" there are many renewals within so few steps.
    "onebit-frozen": Competitor(
        label="onebit_ddp, never renewed",
        strategy=lambda timeout: OneBitDDPStrategy(overlap=False, variance_refresh=None, timeout=timeout),
    ),
    "onebit-between": Competitor(
        label="onebit_ddp, between renewals",
        strategy=lambda timeout: OneBitDDPStrategy(overlap=False, variance_refresh=NEVER_HERE, timeout=timeout),
    ),
    "onebit-renewing": Competitor(
        label="onebit_ddp, renewed at every step",
        strategy=lambda timeout: OneBitDDPStrategy(overlap=False, variance_refresh=1, timeout=timeout),
    ),
    # DDP says that gradients are ready bucket by bucket: of its own size, 25 MiB, there is only one.
    "onebit-overlapped": Competitor(
        label=f"onebit_ddp, overlapped, {OVERLAPPED_BUCKET_MB} MiB buckets",
        strategy=lambda timeout: OneBitDDPStrategy(overlap=True, bucket_cap_mb=OVERLAPPED_BUCKET_MB, timeout=timeout),
    ),
}


# One training, on one node


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one rank saw of the timed steps of one training."""

    parameters: int
    step_seconds: list[float]
    link_bytes_per_step: float | None
    """Sent through the node's link; None on loopback."""
    payload_bytes_per_step: float | None
    """By the strategy's own count; None if it does not count."""


class Stopwatch(pl.Callback):
    """Times the last ``timed_steps`` batches and counts what was sent in them.

    Comes first among the callbacks, so that at either end of a batch others are not counted.
    """

    def __init__(self, timed_steps: int) -> None:
        self.timed_steps = timed_steps
        self.step_seconds: list[float] = []
        self.link_bytes: list[int | None] = []
        self.payload_bytes: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == trainer.max_steps - self.timed_steps:
            if isinstance(trainer.strategy, OneBitDDPStrategy) and trainer.strategy.phase is not Phase.COMPRESSED:
                raise RuntimeError(f"The strategy is still in {trainer.strategy.phase} at the first timed step.")
            self._count(trainer)
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.link_bytes:
            self.step_seconds.append(time.perf_counter() - self._start)
        if batch_idx == trainer.max_steps - 1:
            self._count(trainer)

    def _count(self, trainer: pl.Trainer) -> None:
        self.link_bytes.append(sent_bytes())
        if isinstance(trainer.strategy, OneBitDDPStrategy):
            self.payload_bytes.append(trainer.strategy.comm_stats.bytes_sent)


def train(name: str, settings: argparse.Namespace) -> Measurement:
    """Train with one competitor; runs on every node."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    model = make_model(settings)
    stopwatch = Stopwatch(settings.steps)
    strategy = COMPETITORS[name].strategy(timedelta(seconds=settings.timeout / 2))
    switch = [PhaseSwitch(criterion=FixedStep(WARMUP_STEPS))] if isinstance(strategy, OneBitDDPStrategy) else []
    steps = settings.untimed_steps + settings.steps
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        num_nodes=settings.nodes,
        max_steps=steps,
        callbacks=[stopwatch, *switch],
        use_distributed_sampler=False,  # every rank makes its own data
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, random_words(settings, steps))

    def per_step(counts: list[int] | list[int | None]) -> float | None:
        first, last = counts if len(counts) == 2 else (None, None)
        return None if first is None or last is None else (last - first) / settings.steps

    return Measurement(
        parameters=sum(p.numel() for p in model.parameters()),
        step_seconds=stopwatch.step_seconds,
        link_bytes_per_step=per_step(stopwatch.link_bytes),
        payload_bytes_per_step=per_step(stopwatch.payload_bytes),
    )


def make_model(settings: argparse.Namespace) -> GPT:
    return GPT(
        vocabulary_size=settings.vocabulary,
        context=settings.context,
        d_model=settings.d_model,
        layers=settings.layers,
        heads=settings.heads,
    )


def random_words(settings: argparse.Namespace, steps: int) -> DataLoader[tuple[Tensor, ...]]:
    """Batches for one rank, different on every rank: how long a step takes does not depend on what they say."""
    generator = torch.Generator().manual_seed(1 + int(os.environ["RANK"]))
    shape = (steps * settings.batch_size, settings.context + 1)
    words = torch.randint(settings.vocabulary, shape, generator=generator)
    return DataLoader(TensorDataset(words[:, :-1], words[:, 1:]), batch_size=settings.batch_size)


# All trainings


class Results:
    """Measurements of one rate by competitor; a competitor that failed is not tried again."""

    def __init__(self, rate: str, settings: argparse.Namespace) -> None:
        self.rate, self.settings = rate, settings
        self.link: dict[str, Any] = {}
        self.measurements: dict[str, list[list[Measurement]]] = {name: [] for name in settings.competitors}
        """Per competitor, per repetition, per rank."""
        self.failures: dict[str, str] = {}

    def measure(self, network: Loopback) -> None:
        if isinstance(network, NetworkLab):
            self.link = {
                "tcp_bits_per_second": network.throughput_bits_per_second(),
                "congestion_control": network.congestion_control(),
            }
            print(f"{self.rate}: one TCP connection moves {self.link['tcp_bits_per_second'] / 1e6:.1f} Mbit/s", flush=True)
        for repetition in range(self.settings.repetitions):
            names = self.settings.competitors
            start = repetition % len(names)
            for name in [*names[start:], *names[:start]]:
                if name not in self.failures:
                    self._measure_one(network, name, repetition)

    def _measure_one(self, network: Loopback, name: str, repetition: int) -> None:
        try:
            measurements: list[Measurement] = network.call(train, name, self.settings, timeout_seconds=self.settings.timeout)
        except LabError as error:
            self.failures[name] = str(error)
            print(f"{self.rate}: {name} failed: {last_line(str(error))}", flush=True)
            return
        self.measurements[name].append(measurements)
        spread = Spread.of(measurements[0].step_seconds)
        print(f"{self.rate}, repetition {repetition + 1}: {name} {spread.milliseconds()} ms", flush=True)

    def summary(self) -> list[dict[str, Any]]:
        """One entry per competitor, ready for JSON."""
        spreads = {name: self._spread(name) for name in self.measurements}
        return [
            {
                "rate": self.rate,
                "nodes": self.settings.nodes,
                "competitor": name,
                "label": COMPETITORS[name].label,
                "step_seconds": spread,
                "sent_bytes_per_step": self._sent_bytes(name),
                "sent_bytes_counted_by": "link" if self.link else "payload",
                "payload_bytes_per_step": self._mean(name, "payload_bytes_per_step"),
                "speedup_over_ddp": _quotient(spreads.get("ddp"), spread),
                "bytes_less_than_ddp": self._less_bytes(name),
                "ratio_to_no_communication": _quotient(spread, spreads.get("none")),
                "failure": self.failures.get(name),
                "step_seconds_of_rank_0": [repetition[0].step_seconds for repetition in self.measurements[name]],
            }
            for name, spread in spreads.items()
        ]

    def _spread(self, name: str) -> Spread | None:
        seconds = [s for repetition in self.measurements[name] for s in repetition[0].step_seconds]
        return Spread.of(seconds) if seconds and name not in self.failures else None

    def _mean(self, name: str, field: str) -> float | None:
        """Over ranks and repetitions; None if one of them did not count."""
        values = [getattr(measurement, field) for ranks in self.measurements[name] for measurement in ranks]
        return sum(values) / len(values) if values and None not in values else None

    def _sent_bytes(self, name: str) -> float | None:
        if not self.measurements.get(name):
            return None
        if self.link:
            return self._mean(name, "link_bytes_per_step")
        bytes_per_element = COMPETITORS[name].bytes_per_element
        if bytes_per_element is None:
            return self._mean(name, "payload_bytes_per_step")
        parameters = self.measurements[name][0][0].parameters
        return 2 * (self.settings.nodes - 1) / self.settings.nodes * bytes_per_element * parameters

    def _less_bytes(self, name: str) -> float | None:
        dense, own = self._sent_bytes("ddp"), self._sent_bytes(name)
        return dense / own if dense and own else None

    @property
    def parameters(self) -> int | None:
        return next((m[0][0].parameters for m in self.measurements.values() if m), None)


def _quotient(a: Spread | None, b: Spread | None) -> float | None:
    return a.median / b.median if a is not None and b is not None else None


def last_line(text: str) -> str:
    """Of a traceback: the error itself."""
    return text.strip().splitlines()[-1]


def as_table(entries: list[dict[str, Any]]) -> str:
    """The results of one rate for readers."""
    header = [
        "",
        "step, ms [quartiles]",
        "sent/step",
        "bytes: DDP / this",
        "speed-up over DDP",
        "/ no comm.",
    ]
    rows = []
    for entry in entries:
        spread: Spread | None = entry["step_seconds"]
        if spread is None:
            rows.append([entry["label"], "failed", *["-"] * 4])
            continue
        sent = entry["sent_bytes_per_step"]
        sends_nothing = entry["competitor"] in ("none", "waiting")
        factors = (None if sends_nothing else entry["bytes_less_than_ddp"], entry["speedup_over_ddp"])
        rows.append(
            [
                entry["label"],
                spread.milliseconds(),
                "-" if sent is None else size(sent),
                *("-" if factor is None else f"{factor:.2f}x" for factor in factors),
                "-" if entry["ratio_to_no_communication"] is None else f"{entry['ratio_to_no_communication']:.2f}",
            ]
        )
    return table(header, rows)


def main() -> int:
    settings = parse_arguments()
    exit_on_sigterm()
    document: dict[str, Any] = {
        "environment": environment(),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()},
        "warmup_steps": WARMUP_STEPS,
        "notes": [SHARED_CORES, *TABLE_NOTES],
        "links": {},
        "results": [],
    }
    print(describe(document["environment"]), flush=True)
    tables: list[str] = []
    try:
        if set(settings.rates) - {LOOPBACK}:
            check_requirements()
        # All at once, so that a mistake in the last rate does not wait for the others.
        networks = [make_lab(nodes=settings.nodes, rate=rate, delay=settings.delay) for rate in settings.rates]
        for rate, network in zip(settings.rates, networks, strict=True):
            results = Results(rate, settings)
            with network:
                results.measure(network)
            entries = results.summary()
            document["links"][rate] = results.link
            document["parameters"] = results.parameters
            document["results"] += entries
            if settings.out is not None:  # after every rate: what is measured is not lost
                save(settings.out, document)
            tables.append(f"{rate}, {settings.nodes} nodes, {results.parameters} parameters\n\n{as_table(entries)}")
            tables += [f"{name} failed at {rate}: {last_line(text)}" for name, text in results.failures.items()]
    except (LabError, ValueError) as error:
        print(f"training_step: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print("\n" + "\n\n".join([*tables, *document["notes"]]))
    return 0


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and its batches."""
    parser.add_argument("--d-model", type=int, default=256, help="width of the GPT")
    parser.add_argument("--layers", type=int, default=8, help="its blocks")
    parser.add_argument("--heads", type=int, default=8, help="attention heads per block")
    parser.add_argument("--vocabulary", type=int, default=3000, help="number of words")
    parser.add_argument("--context", type=int, default=64, help="words per window")
    parser.add_argument("--batch-size", type=int, default=4, help="windows per step and node")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/training_step.py",
        description="Step time and bytes of a GPT's training over links of several rates, for all competitors in one run."
        " Rates other than loopback need root and iproute2 (see lab.py).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--nodes", type=int, default=4, help="nodes, with one process each")
    parser.add_argument(
        "--rates",
        nargs="+",
        default=["100mbit", "200mbit", "1gbit", "10gbit", "unshaped"],
        metavar="RATE",
        help="of each node's link: 200mbit, 1gbit, ..., unshaped, or loopback, which needs no root",
    )
    parser.add_argument("--delay", help="from each node to the bridge, such as 1ms (needs the kernel's netem)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps per training")
    parser.add_argument("--untimed-steps", type=int, default=4, help="steps before them; more than the dense warm-up")
    parser.add_argument("--repetitions", type=int, default=3, help="trainings per competitor and rate, taken in turns")
    parser.add_argument("--competitors", nargs="+", choices=list(COMPETITORS), default=list(COMPETITORS), help="which")
    add_model_arguments(parser)
    parser.add_argument("--timeout", type=float, default=180.0, metavar="S", help="a training that takes longer has failed")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results there as JSON")
    settings = parser.parse_args()
    if settings.untimed_steps <= WARMUP_STEPS:
        parser.error(f"--untimed-steps {settings.untimed_steps}: must be more than the {WARMUP_STEPS} dense warm-up steps")
    if settings.steps < 1 or settings.repetitions < 1 or settings.nodes < 2:
        parser.error("--steps and --repetitions must be at least 1, --nodes at least 2")
    return settings


if __name__ == "__main__":
    sys.exit(main())
