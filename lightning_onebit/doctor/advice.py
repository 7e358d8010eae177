"""Which way to average gradients is worth it, and at what bandwidth another would be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_onebit.doctor.cost_model import Network, Prediction, bandwidths

WORTH_IT = 1.10
"""A way that changes more than the one before it must make the whole run at least 10% faster: the model is no better than
that, and compression has a price in loss (docs/quality.md)."""
IN_ORDER = ("ddp", "16bit", "onebit", "onebit_hierarchical")
"""From the least change of a training to the most. PowerSGD is no candidate: under Adam it ended above Adam's loss."""
USE = {
    "ddp": "strategy='ddp'",
    "16bit": "DDP with a 16-bit hook",
    "onebit": "strategy='onebit_ddp'",
    "onebit_hierarchical": "OneBitDDPStrategy(hierarchical=True)",
}
RANGE = 1000.0
"""Bandwidths are tried from a thousandth to a thousand times the present one."""
TRIED = 241

PredictAt = Callable[[Network], Sequence[Prediction]]


def recommended(predictions: Sequence[Prediction]) -> Prediction:
    """The least change that no further one beats by 10%."""
    by_name = {each.name: each for each in predictions}
    choice = by_name["ddp"]
    for name in IN_ORDER[1:]:
        candidate = by_name.get(name)
        # Hierarchical or flat is a setting of the same strategy: the faster one, whatever the difference.
        margin = 1.0 if choice.name == "onebit" else WORTH_IT
        if candidate is not None and candidate.mean_step_seconds * margin < choice.mean_step_seconds:
            choice = candidate
    return choice


def turning_point(network: Network, predict_at: PredictAt, *, faster: bool) -> tuple[float, Prediction] | None:
    """The bandwidth next to the present one at which another way is recommended, bits per second; ``None``: none in range.

    Args:
        network: the present one.
        predict_at: predictions on another network.
        faster: whether to look among higher bandwidths, or lower ones.
    """
    present = recommended(predict_at(network)).name
    low = 1.0
    for factor in bandwidths(1.0, RANGE if faster else 1.0 / RANGE, TRIED):
        other = recommended(predict_at(network.with_bandwidth(factor)))
        if _is_other(other.name, present):
            high = factor
            for _ in range(20):  # halve the interval
                middle = (low * high) ** 0.5
                at_middle = recommended(predict_at(network.with_bandwidth(middle)))
                if _is_other(at_middle.name, present):
                    high, other = middle, at_middle
                else:
                    low = middle
            return high * network.bits_per_second, other
        low = factor
    return None


def _is_other(name: str, present: str) -> bool:
    """Flat and hierarchical are one."""
    return name.split("_")[0] != present.split("_")[0]


def advise(network: Network, predict_at: PredictAt) -> str:
    """One line: what to use, why, and what it would take for that to change."""
    if network.ranks == 1:
        return "Stay with one device: there is nobody to send gradients to."
    predictions = predict_at(network)
    choice = recommended(predictions)
    by_name = {each.name: each for each in predictions}
    dense = by_name["ddp"].mean_step_seconds
    if choice.name == "ddp":
        best = min((p for p in predictions if p.name in IN_ORDER[1:]), key=lambda p: p.mean_step_seconds)
        gain = dense / best.mean_step_seconds
        why = f"{USE[best.name]} would be {gain:.2f} times as fast" if gain >= 1 else f"{USE[best.name]} would be no faster"
        line = f"Stay with ddp here: {milliseconds(dense)} ms a step, and {why}"
    else:
        line = (
            f"Use {USE[choice.name]}: {milliseconds(choice.mean_step_seconds)} ms a step over the whole run,"
            f" {dense / choice.mean_step_seconds:.1f} times as fast as DDP"
        )
        if choice.name != "16bit":
            half = by_name["16bit"].mean_step_seconds / choice.mean_step_seconds
            line += f", {half:.1f} times as fast as a 16-bit hook"
    for faster, word in ((False, "below"), (True, "above")):
        turn = turning_point(network, predict_at, faster=faster)
        if turn is not None:
            line += f"; {word} {rate(turn[0])} {USE[turn[1].name]} would be the choice"
    return f"{line}."


def milliseconds(seconds: float) -> str:
    """Three digits."""
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rate(bits_per_second: float) -> str:
    """In a readable unit."""
    for unit, scale in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits_per_second >= scale:
            return f"{bits_per_second / scale:.3g} {unit}"
    return f"{bits_per_second:.3g} bit/s"
