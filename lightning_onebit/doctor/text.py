"""What doctor found, for readers, for programs, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_onebit.doctor.advice import advise, milliseconds, rate, recommended
from lightning_onebit.doctor.cost_model import Prediction, bandwidths, compute_seconds, processor_factor
from lightning_onebit.doctor.simulate import Setting

PLOTTED_FACTORS = (1 / 100, 100.0)
PLOTTED_POINTS = 61


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def described(setting: Setting) -> str:
    """The network and the job, in two lines."""
    network, job = setting.network, setting.job
    factor = processor_factor(network.ranks, setting.cores)
    inside = f" of {network.devices} devices" if network.devices > 1 else ""
    lines = [
        f"network  {counted(network.nodes, 'node')}{inside}, {rate(network.bits_per_second)},"
        f" latency {1e6 * network.latency_seconds:.0f} us",
        f"model    {job.numel / 1e6:.4g} M parameters, forward {milliseconds(job.forward_seconds)} ms, backward"
        f" {milliseconds(job.backward_seconds)} ms" + (f", {factor:.2g} ranks share a core" if factor > 1 else ""),
    ]
    return "\n".join(lines)


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def table(setting: Setting) -> str:
    """Predictions, one line each."""
    factor = processor_factor(setting.network.ranks, setting.cores)
    local = compute_seconds(setting.job, setting.speeds, factor)
    rows = [("", "ms a step", "sent, MB", f"mean of {setting.job.steps} steps, ms", "times DDP's speed")]
    rows.append(("no communication", milliseconds(local), "0", milliseconds(local), ""))
    for each in setting.predictions:
        rows.append(
            (
                each.label,
                milliseconds(each.step_seconds),
                f"{each.sent_bytes / 1e6:.3g}",
                milliseconds(each.mean_step_seconds),
                f"{each.speedup:.2f}",
            )
        )
    return aligned(rows)


NOTES = (
    "ms a step: late in the run, renewals of second moments spread over the steps. Mean: its dense beginning included, of"
    " onebit_ddp 20 steps, of PowerSGD 1000 (torch's default). PowerSGD under Adam ended above Adam's loss wherever it was"
    " tried (docs/quality.md), so it is not recommended."
)


def report(setting: Setting) -> str:
    """Network, job, table, notes and one line of advice."""
    return f"{described(setting)}\n\n{table(setting)}\n\n{NOTES}\n\n{advise(setting.network, setting.predict_at)}"


def document(setting: Setting) -> dict[str, Any]:
    """The same for programs: seconds, bytes, bits per second."""
    network, job = setting.network, setting.job
    factor = processor_factor(network.ranks, setting.cores)
    return {
        "nodes": network.nodes,
        "devices_per_node": network.devices,
        "bits_per_second": network.bits_per_second,
        "latency_seconds": network.latency_seconds,
        "processor_factor": factor,
        "parameters": job.numel,
        "forward_seconds": job.forward_seconds,
        "backward_seconds": job.backward_seconds,
        "steps": job.steps,
        "speeds_seconds_per_element": asdict(setting.speeds),
        "no_communication_seconds": compute_seconds(job, setting.speeds, factor),
        "predictions": [asdict(each) for each in setting.predictions],
        "recommended": recommended(setting.predictions).name if network.ranks > 1 else None,
        "advice": advise(network, setting.predict_at),
    }


def curves(setting: Setting) -> tuple[list[float], dict[str, list[float]]]:
    """Bandwidths around the present one, bits per second, and for each way the mean step of the run, seconds."""
    low, high = PLOTTED_FACTORS
    rates: list[float] = []
    seconds: dict[str, list[float]] = {}
    for factor in bandwidths(low, high, PLOTTED_POINTS):
        network = setting.network.with_bandwidth(factor)
        rates.append(network.bits_per_second)
        for each in setting.predict_at(network):
            seconds.setdefault(each.label, []).append(each.mean_step_seconds)
    return rates, seconds


def require_matplotlib() -> None:
    """Raise ``ValueError`` if nothing can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "--plot needs matplotlib, which is not installed. HINT: pip install matplotlib, or leave out --plot."
        ) from None


def plot(setting: Setting, file: Path) -> None:
    """Draw step times over bandwidth.

    Raises:
        ValueError: if the file cannot be written, or its name says no format that is known.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    rates, seconds = curves(setting)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, values in seconds.items():
        axes.loglog([r / 1e9 for r in rates], [1000 * s for s in values], label=label)
    axes.axvline(setting.network.bits_per_second / 1e9, color="gray", linestyle=":", label="this network")
    axes.set_xlabel("bandwidth, Gbit/s")
    axes.set_ylabel(f"mean step of {setting.job.steps}, ms")
    axes.set_title(described(setting).splitlines()[1].removeprefix("model").strip(), fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Cannot write --plot {str(file)!r}: {error}. HINT: a name that ends with .png, in a folder that exists."
        ) from error


def best_of(predictions: Sequence[Prediction]) -> str:
    """A few words for a cell of a grid: what to use, and how much faster the whole run is than DDP."""
    choice = recommended(predictions)
    short = {"ddp": "ddp", "16bit": "16-bit hook", "onebit": "onebit_ddp", "onebit_hierarchical": "onebit_ddp (hier.)"}
    return short[choice.name] if choice.name == "ddp" else f"{short[choice.name]}, {choice.speedup:.1f}x"
