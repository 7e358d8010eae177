"""What `python -m lightning_onebit doctor` predicts of training steps on shaped links, beside what they take.

    python benchmarks/doctor.py --nodes 4 --rates 100mbit 200mbit 1gbit 10gbit --out benchmarks/results/doctor.json

On each link, doctor is run as a user would, on all nodes: it probes the link, the kernels and the model, and predicts.
Then the steps are measured, by the competitors of training_step.py. Predictions know doctor's own probes on that link, and
how many cores all nodes share; nothing of the steps. Every cell (link and model) is written as it is done, and those that
the file has already are left out, so that it can be continued. ``--table`` only prints it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lab import LabError, check_requirements, exit_on_sigterm, make_lab
from report import SHARED_CORES, Spread, describe, environment, save, table
from training_step import COMPETITORS, Competitor, last_line, make_model, train

from lightning_onebit import OneBitDDPStrategy
from lightning_onebit.doctor.command import main as doctor

MODELS: dict[str, dict[str, int]] = {
    "deep": {"d_model": 256, "layers": 8, "heads": 8, "vocabulary": 3000, "context": 64, "batch_size": 4},
    "wide": {"d_model": 512, "layers": 2, "heads": 8, "vocabulary": 3000, "context": 64, "batch_size": 2},
}
ROWS = ("none", "ddp", "fp16", "powersgd-1-bucket", "onebit", "onebit-renewed")
LABELS = {
    "none": "no communication",
    "ddp": "DDP, fp32",
    "fp16": "DDP, fp16 hook",
    "powersgd-1-bucket": "PowerSGD rank 2, one bucket",
    "onebit": "onebit_ddp",
    "onebit-renewed": "onebit_ddp, renewed at each step",
}
PREDICTED = {"ddp": "ddp", "fp16": "16bit", "powersgd-1-bucket": "powersgd", "onebit": "onebit", "onebit-renewed": "onebit"}
AIM = 0.25
NOTES = (
    "predicted: by doctor's own probes on that link right before, and the number of cores; nothing of these steps. measured:"
    " median and quartiles over the timed steps of rank 0.",
    "onebit_ddp sketches at each of these first compressed steps, later at every 16th; it renews second moments at none of"
    " them (variance_refresh=64), or at each, as the default does at first.",
)


def competitor(refresh: int) -> Competitor:
    def strategy(timeout: timedelta) -> OneBitDDPStrategy:
        return OneBitDDPStrategy(overlap=False, variance_refresh=refresh, timeout=timeout)

    return Competitor(label="onebit_ddp", strategy=strategy)


COMPETITORS["onebit"], COMPETITORS["onebit-renewed"] = competitor(64), competitor(1)


def model(name: str) -> torch.nn.Module:
    """A GPT with an example of the batches that it will be trained on."""
    options = argparse.Namespace(**MODELS[name])
    gpt = make_model(options)
    gpt.example_input_array = torch.randint(options.vocabulary, (options.batch_size, options.context))
    return gpt


def deep() -> torch.nn.Module:
    return model("deep")


def wide() -> torch.nn.Module:
    return model("wide")


def examine(name: str, cores: float, timeout: float) -> dict[str, Any] | None:
    """Run doctor as one of the nodes; on rank 0, what it says."""
    torch.set_num_threads(1)
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        code = doctor([f"{__file__}:{name}", "--cores", f"{cores:g}", "--json", "--timeout", f"{timeout:g}"])
    if code:
        raise RuntimeError(complained.getvalue())
    return json.loads(said.getvalue()) if os.environ["RANK"] == "0" else None


def predicted_seconds(document: dict[str, Any], row: str) -> float:
    """Of the steps that are measured here."""
    if row == "none":
        return float(document["no_communication_seconds"])
    [entry] = [each for each in document["predictions"] if each["name"] == PREDICTED[row]]
    seconds = float(entry["step_seconds"])
    if row.startswith("onebit"):  # late in a run a share of a refresh and of a sketch is in a step; here all or nothing
        seconds += entry["sketch_seconds"] * (1 - 1 / 16) - entry["refresh_seconds"] / 64
        seconds += entry["refresh_seconds"] if row == "onebit-renewed" else 0.0
    return seconds


def measure(rate: str, name: str, settings: argparse.Namespace) -> dict[str, Any]:
    """One cell."""
    options = argparse.Namespace(**vars(settings), **MODELS[name])
    cell: dict[str, Any] = {"rate": rate, "model": name, "nodes": settings.nodes, "cores": settings.cores, "rows": []}
    with make_lab(nodes=settings.nodes, rate=rate) as network:
        cell["environment"] = environment()
        cell["doctor"] = network.call(examine, name, settings.cores, settings.timeout, timeout_seconds=settings.timeout)[0]
        for row in settings.rows:
            predicted = predicted_seconds(cell["doctor"], row)
            try:
                of_ranks = network.call(train, row, options, timeout_seconds=settings.timeout)
            except LabError as error:
                cell["rows"].append({"row": row, "predicted_seconds": predicted, "failure": str(error)})
                print(f"{rate}, {name}: {row} failed: {last_line(str(error))}", flush=True)
                continue
            spread = Spread.of(of_ranks[0].step_seconds)
            cell["parameters"] = of_ranks[0].parameters
            cell["rows"].append({"row": row, "predicted_seconds": predicted, "measured_seconds": spread})
            print(f"{rate}, {name}: {row} {1000 * predicted:.0f}, {spread.milliseconds()} ms", flush=True)
    return cell


def spread_of(entry: dict[str, Any]) -> Spread:
    measured = entry["measured_seconds"]
    return measured if isinstance(measured, Spread) else Spread(**measured)


def as_text(document: dict[str, Any]) -> str:
    """All cells, and which are not within the aim."""
    parts, outside, count = [], [], 0
    for cell in document["cells"]:
        network = cell["doctor"]["measured"]["network"]
        rows = []
        for entry in cell["rows"]:
            if "failure" in entry:
                rows.append([LABELS[entry["row"]], f"{1000 * entry['predicted_seconds']:.0f}", "failed", "-"])
                continue
            spread = spread_of(entry)
            ratio = entry["predicted_seconds"] / spread.median
            rows.append(
                [LABELS[entry["row"]], f"{1000 * entry['predicted_seconds']:.0f}", spread.milliseconds(), f"{ratio:.2f}"]
            )
            count += 1
            if not 1 / (1 + AIM) <= ratio <= 1 + AIM:
                outside.append(f"{cell['rate']}, {cell['model']}, {LABELS[entry['row']]}: {ratio:.2f}")
        parts.append(
            f"{cell['rate']}, {cell['model']} ({cell['parameters']} parameters), {cell['nodes']} nodes on {cell['cores']:g}"
            f" cores; probed: {network['bits_per_second'] / 1e6:.0f} Mbit/s, latency"
            f" {1e6 * network['latency_seconds']:.0f} us, {cell['environment']['date']}\n\n"
            + table(["", "predicted, ms", "measured, ms [quartiles]", "predicted / measured"], rows)
            + f"\n\n{cell['doctor']['advice']}"
        )
    ratios = [
        entry["predicted_seconds"] / spread_of(entry).median
        for cell in document["cells"]
        for entry in cell["rows"]
        if "failure" not in entry
    ]
    summary = f"{count - len(outside)} of {count} predictions are within {AIM:.0%} of the measured median; all lie between"
    summary += f" {min(ratios):.2f} and {max(ratios):.2f} of it." + "".join(f"\nOutside: {each}" for each in outside)
    models = "; ".join(
        f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in options.items())
        for name, options in MODELS.items()
    )
    environments = [cell["environment"] for cell in document["cells"]]
    head = describe(environments[0])
    further = {each["command"]: each for each in environments[1:] if each["command"] != environments[0]["command"]}
    head += "".join(f"\n{each['date']}  {command}" for command, each in further.items())
    remarks = document.get("remarks", [])
    return "\n\n".join([head, f"GPTs ({models})", *parts, summary, *remarks, *NOTES, SHARED_CORES]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4, help="with one process each (default: %(default)s)")
    parser.add_argument("--rates", nargs="+", default=["100mbit", "200mbit", "1gbit", "10gbit"], metavar="RATE")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what is measured")
    parser.add_argument("--cores", type=float, default=float(len(os.sched_getaffinity(0))), help="that all nodes share")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per training (default: %(default)s)")
    parser.add_argument("--untimed-steps", type=int, default=4, help="before them (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=150.0, metavar="S")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON; the table goes to .txt beside it")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    settings = parser.parse_args()
    exit_on_sigterm()
    document = json.loads(settings.out.read_text()) if settings.out.exists() else {"cells": []}
    done = {(cell["rate"], cell["model"]) for cell in document["cells"]}
    try:
        check_requirements()
        for rate in settings.rates if not settings.table else []:
            for name in settings.models:
                if (rate, name) not in done:
                    document["cells"].append(measure(rate, name, settings))
                    save(settings.out, document)
    except (LabError, ValueError) as error:
        print(f"doctor: {error}", file=sys.stderr)
        return 1
    text = as_text(document)
    settings.out.with_suffix(".txt").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
