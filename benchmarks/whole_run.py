"""What a whole run sends, from its first dense step to its last: a GPT of 7.1 million parameters, 4 nodes.

    python benchmarks/whole_run.py --steps 1000 --marks 100 250 500 --out benchmarks/results/whole_run.txt
    python benchmarks/whole_run.py --steps 250 --rate 200mbit --batch-size 2 --context 64 --lr 1e-3 \\
        --against ddp fp16 powersgd --out benchmarks/results/whole_run_against.txt

Defaults throughout, with a DivergenceGuard: when to switch is the criterion's decision, on real text. Bytes are counted on
the links, with all headers; a step of DDP is counted in the same run, and sends the same at every step. By default windows
are few and short, as bytes do not depend on them: that says nothing of time, nor of the loss. With ``--against``, others
train as long, one after the other: time from the first batch to the last, held-out loss after it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lab import LOOPBACK, LabError, check_requirements, exit_on_sigterm, make_lab, sent_bytes
from lightning.pytorch.strategies import DDPStrategy
from report import SHARED_CORES, describe, environment, save, size, table
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import powerSGD_hook
from training_step import COMPETITORS, POWERSGD_RANK, HookedDDPStrategy, powersgd_state

from lightning_onebit import DivergenceGuard, OneBitDDPStrategy, Phase
from lightning_onebit.comm.stats import ring_all_reduce_nbytes
from lightning_onebit.config import FLOAT32_NBYTES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from gpt_stdlib import GPT, StdlibSources

DDP_STEPS = 10
LONG_RUN = 10_000
"""Steps of the run that the last interval of a shorter one is extended to: computed, not run."""
ONEBIT = "onebit_ddp"
LABELS = {
    "ddp": "DDP, fp32",
    "fp16": "DDP, fp16 hook",
    "powersgd": f"DDP, PowerSGD hook, rank {POWERSGD_RANK}, one bucket, 5% dense",
    ONEBIT: "onebit_ddp, defaults",
}


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One node after so many steps."""

    step: int
    link_bytes: int | None
    """``None`` on loopback."""
    payload_bytes: dict[str, int]
    dense_steps: int


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training, as one node saw it."""

    parameters: int
    marks: list[Mark]
    seconds: float
    """From before its first batch to the end of its last."""
    loss: float | None
    """On the held-out windows of all nodes after the last step; ``None`` if there was nothing to compare with."""


class Marks(pl.Callback):
    """Notes what was sent so far, and how long it took."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps
        self.marks: list[Mark] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.before = sent_bytes()
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step not in self.steps:
            return
        self.seconds = time.perf_counter() - self.start
        now, payload, dense_steps = sent_bytes(), {}, trainer.global_step
        if isinstance(trainer.strategy, OneBitDDPStrategy):
            warmup, compressed = (trainer.strategy.comm_stats[phase] for phase in (Phase.WARMUP, Phase.COMPRESSED))
            beside = compressed.refresh_bytes_sent + compressed.sketch_bytes_sent
            payload = {
                "dense": warmup.bytes_sent,
                "refreshes": compressed.refresh_bytes_sent,
                "sketches": compressed.sketch_bytes_sent,
                "signs": compressed.bytes_sent - beside,
            }
            dense_steps = warmup.steps
        sent = None if now is None or self.before is None else now - self.before
        self.marks.append(Mark(step=trainer.global_step, link_bytes=sent, payload_bytes=payload, dense_steps=dense_steps))
        if trainer.is_global_zero:
            print(f"step {trainer.global_step}", file=sys.stderr, flush=True)


def make_strategy(name: str, settings: argparse.Namespace) -> DDPStrategy:
    """Of one who takes part."""
    timeout = timedelta(seconds=settings.timeout)
    if name == ONEBIT:
        return OneBitDDPStrategy(timeout=timeout)
    if name == "powersgd":
        make_state = partial(powersgd_state, settings.steps // 20)  # 5%: as in the study of where training ends
        return HookedDDPStrategy(make_state, powerSGD_hook, timeout=timeout, bucket_cap_mb=1 << 20)
    strategy = COMPETITORS[name].strategy(timeout)
    assert isinstance(strategy, DDPStrategy)
    return strategy


def train(name: str, steps: int, settings: argparse.Namespace) -> Training:
    """Runs on every node."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    model = GPT(context=settings.context, d_model=settings.d_model, layers=settings.layers, lr=settings.lr)
    marks = Marks({steps, *(mark for mark in settings.marks if name == ONEBIT)})
    trainer = pl.Trainer(
        strategy=make_strategy(name, settings),
        accelerator="cpu",
        devices=1,
        num_nodes=settings.nodes,
        max_steps=steps,
        callbacks=[DivergenceGuard(), marks] if name == ONEBIT else [marks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if settings.against else 0,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
    )
    trainer.fit(model, datamodule=StdlibSources(context=settings.context, batch_size=settings.batch_size))
    loss = trainer.callback_metrics.get("val_loss")
    return Training(
        parameters=sum(p.numel() for p in model.parameters()),
        marks=marks.marks,
        seconds=marks.seconds,
        loss=None if loss is None else float(loss),
    )


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """DDP for a few steps, or all of them; the others; then the whole run. Ready for JSON."""
    trainings: dict[str, list[Training]] = {}
    with make_lab(nodes=settings.nodes, rate=settings.rate) as network:
        for name in ("ddp", *(name for name in settings.against if name != "ddp"), ONEBIT):
            steps = settings.steps if name in (*settings.against, ONEBIT) else DDP_STEPS
            trainings[name] = network.call(train, name, steps, settings, timeout_seconds=settings.timeout)
            print(f"{name}: {steps} steps in {_seconds(trainings[name]):.0f} s", flush=True)
    first = trainings["ddp"][0]
    dense, parameters = first.marks[-1], first.parameters
    per_step = ring_all_reduce_nbytes(FLOAT32_NBYTES * parameters, settings.nodes)
    if dense.link_bytes is not None:
        per_step = dense.link_bytes / dense.step
    ranks = trainings[ONEBIT]
    return {
        "parameters": parameters,
        "seconds": _seconds(ranks),
        "ddp_bytes_per_step": per_step,
        "counted": "as payload" if dense.link_bytes is None else "on the links, with all headers",
        "marks": [[asdict(mark) for mark in marks] for marks in zip(*(training.marks for training in ranks), strict=True)],
        "rate": settings.rate,
        "against": [
            {
                "name": name,
                "seconds": _seconds(ranks),
                "link_bytes": [training.marks[-1].link_bytes for training in ranks],
                "loss": ranks[0].loss,
            }
            for name, ranks in trainings.items()
            if settings.against
        ],
    }


def _seconds(ranks: list[Training]) -> float:
    return max(training.seconds for training in ranks)


def as_text(document: dict[str, Any]) -> str:
    """A table, and what the last interval says of a longer run."""
    ddp, rows, steps, sent = document["ddp_bytes_per_step"], [], [], []
    for nodes in document["marks"]:
        counts = [sum(m["payload_bytes"].values()) if m["link_bytes"] is None else m["link_bytes"] for m in nodes]
        first = nodes[0]
        steps.append(first["step"])
        sent.append(sum(counts) / len(counts))
        rows.append(
            [f"{steps[-1]}", f"{first['dense_steps']}", size(steps[-1] * ddp), size(sent[-1])]
            + [f"{steps[-1] * ddp / sent[-1]:.1f}"]
            + [size(first["payload_bytes"][what]) for what in ("dense", "signs", "refreshes", "sketches")]
        )
    header = ["steps", "dense", "DDP sends", "sent", "times less", "payload: dense", "signs", "refreshes", "sketches"]
    parts = [
        describe(document["environment"]),
        f"{document['parameters']} parameters; a step of DDP sends {size(ddp)} per node; bytes per node, counted"
        f" {document['counted']} (payload: of rank 0, without headers); {document['seconds']:.0f} s",
        table(header, rows),
    ]
    if document.get("against"):
        parts += [_as_table(document), SHARED_CORES]
    elif len(steps) > 1 and steps[-1] < LONG_RUN:
        rate = (sent[-1] - sent[-2]) / (steps[-1] - steps[-2])
        long = LONG_RUN * ddp / (sent[-1] + (LONG_RUN - steps[-1]) * rate)
        parts.append(
            f"Steps {steps[-2]} to {steps[-1]} sent {ddp / rate:.1f} times less. At that rate a run of {LONG_RUN} steps"
            f" would send {long:.1f} times less (computed, not run)."
        )
    return "\n\n".join(parts)


def _as_table(document: dict[str, Any]) -> str:
    """Whole runs side by side."""
    ddp = next(each for each in document["against"] if each["name"] == "ddp")
    rows = []
    for each in document["against"]:
        counts = each["link_bytes"]
        known = None not in (*counts, *ddp["link_bytes"])
        row = [LABELS[each["name"]], f"{each['seconds']:.0f}", f"{ddp['seconds'] / each['seconds']:.2f}"]
        row += [size(sum(counts) / len(counts)), f"{sum(ddp['link_bytes']) / sum(counts):.1f}"] if known else ["-", "-"]
        rows.append([*row, f"{each['loss']:.4f}", f"{each['loss'] - ddp['loss']:+.4f}"])
    header = ["", "seconds", "times faster", "sent per node", "times less", "held-out loss", "minus DDP's"]
    return f"Whole runs on links of {document['rate']}, one after the other, one seed\n\n{table(header, rows)}"


def main() -> int:
    settings = parse_arguments()
    if settings.report is not None:
        print(as_text(json.loads(settings.report.read_text(encoding="utf-8"))))
        return 0
    exit_on_sigterm()
    facts = environment()
    try:
        if settings.rate != LOOPBACK:
            check_requirements()
        document = {"environment": facts, **measure(settings)}
    except LabError as error:
        print(f"whole_run: {error}", file=sys.stderr)
        return 1
    text = as_text(document)
    print(text)
    if settings.out is not None:
        settings.out.write_text(text + "\n", encoding="utf-8")
        save(settings.out.with_suffix(".json"), document)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/whole_run.py",
        description="Bytes of a whole run with the default settings, and time and loss against others."
        " Rates other than loopback need root and iproute2.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=1000, help="length of the run")
    parser.add_argument("--marks", type=int, nargs="*", default=[], help="steps at which to note what was sent, too")
    parser.add_argument("--nodes", type=int, default=4, help="nodes, with one process each")
    parser.add_argument("--rate", default="unshaped", help="of each node's link, or loopback, which needs no root")
    parser.add_argument("--d-model", type=int, default=256, help="width of the GPT")
    parser.add_argument("--layers", type=int, default=8, help="its blocks")
    parser.add_argument("--context", type=int, default=16, help="words per window")
    parser.add_argument("--batch-size", type=int, default=1, help="windows per step and node")
    parser.add_argument("--lr", type=float, default=3e-3, help="largest learning rate")
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        choices=[name for name in LABELS if name != ONEBIT],
        help="train as long with these, too; needs 'ddp'",
    )
    parser.add_argument("--timeout", type=float, default=7200.0, metavar="S", help="a training that takes longer has failed")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a .txt; what was counted goes beside it, as JSON")
    parser.add_argument("--report", type=Path, metavar="JSON", help="run nothing; print what that says")
    settings = parser.parse_args()
    if settings.steps < 1 or settings.nodes < 2 or not all(0 < mark <= settings.steps for mark in settings.marks):
        parser.error("--steps must be at least 1, --nodes at least 2, --marks within the run")
    if settings.against and "ddp" not in settings.against:
        parser.error("--against needs ddp, which the others are compared with")
    return settings


if __name__ == "__main__":
    sys.exit(main())
