"""Settings written as ``nodes=16,gpus=4,bandwidth=10gbit,...``, and what the model says of them; no process group."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_onebit.doctor.cost_model import DeviceSpeeds, Job, Network, Prediction, predict
from lightning_onebit.doctor.links import Links, network_of, speeds_of_memory

MATRIX_SIDE = 1024
"""Where only the number of parameters is known, they are taken for square matrices of this side."""
LARGEST_NODES, LARGEST_DEVICES = 1024, 8
STEPS = 10_000
"""Of a run, if not given."""
FORWARD_SHARE = 0.5
"""Forward takes half of backward: 2 and 4 operations per parameter and token (Kaplan et al. 2020)."""
MEMORY_BYTES_PER_SECOND = 1.5e12
"""Of a device, if not given: about that of an A100."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A job on a network of devices."""

    job: Job
    speeds: DeviceSpeeds
    network: Network
    cores: float | None = None
    overlaps: bool = True

    def predict_at(self, network: Network) -> list[Prediction]:
        """Predictions for this job on another network of the same ranks."""
        return predict(self.job, self.speeds, network, cores=self.cores, overlaps=self.overlaps)

    @property
    def predictions(self) -> list[Prediction]:
        return self.predict_at(self.network)


def job_of(params: float, backward: float, forward: float | None = None, steps: int = STEPS) -> Job:
    """A job of which only the number of parameters is known."""
    matrix = float(MATRIX_SIDE**2)
    whole = int(params // matrix)
    numels = [matrix] * whole + ([params - whole * matrix] if params > whole * matrix else [])
    return Job(
        numels=tuple(numels),
        forward_seconds=FORWARD_SHARE * backward if forward is None else forward,
        backward_seconds=backward,
        factor_numel=2 * params / MATRIX_SIDE,
        steps=steps,
    )


def simulated(text: str) -> Setting:
    """The setting that ``text`` describes.

    Raises:
        ValueError: names the value, what is allowed and what to do.
    """
    values = parse(text)
    if values.get("nodes") == 1:
        values.setdefault("bandwidth", values.get("node_bandwidth", Links.node_bandwidth))
    for name in ("nodes", "bandwidth", "params", "backward"):
        if name not in values:
            raise ValueError(f"Missing in --simulate: {name}. {_ALLOWED} HINT: {EXAMPLE}")
    links = Links(**{ours: values[theirs] for theirs, ours in _LINKS.items() if theirs in values})
    steps = int(values.get("steps", STEPS))
    return Setting(
        job=job_of(values["params"], values["backward"], values.get("forward"), steps),
        speeds=speeds_of_memory(values.get("memory", MEMORY_BYTES_PER_SECOND), links.nodes * links.devices),
        network=network_of(links),
    )


def parse(text: str) -> dict[str, Any]:
    """``name=value`` pairs as numbers in bits, bytes, seconds."""
    values: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = (each.strip() for each in pair.partition("="))
        if name not in _KEYS or not equals:
            raise ValueError(f"Invalid in --simulate: {pair!r}. {_ALLOWED} HINT: {EXAMPLE}")
        if name in values:
            raise ValueError(f"Twice in --simulate: {name}. Each is given once. HINT: {EXAMPLE}")
        convert, allowed = _KEYS[name]
        try:
            values[name] = convert(value)
        except ValueError as error:
            raise ValueError(f"Invalid {name} in --simulate: {value!r}. Must be {allowed}. HINT: {EXAMPLE}") from error
    return values


def _quantity(units: dict[str, float], *, suffix: bool) -> Callable[[str], float]:
    """A parser of positive numbers with a unit, which may be left out unless ``suffix``."""

    def parse_quantity(text: str) -> float:
        text = text.strip().lower()
        for unit in sorted(units, key=len, reverse=True):
            if unit and text.endswith(unit):
                number, scale = text[: -len(unit)], units[unit]
                break
        else:
            if suffix:
                raise ValueError("no unit")
            number, scale = text, 1.0
        value = float(number) * scale
        if not (math.isfinite(value) and value > 0):
            raise ValueError("not positive")
        return value

    return parse_quantity


def _whole(largest: float) -> Callable[[str], int]:
    def parse_whole(text: str) -> int:
        value = int(text)
        if not 1 <= value <= largest:
            raise ValueError("outside")
        return value

    return parse_whole


parse_count = _quantity({"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}, suffix=False)
parse_rate = _quantity({"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "kbit/s": 1e3, "mbit/s": 1e6, "gbit/s": 1e9}, suffix=True)
parse_seconds = _quantity({"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}, suffix=False)
_bytes_per_second = _quantity({"gb": 1e9, "tb": 1e12, "gb/s": 1e9, "tb/s": 1e12}, suffix=True)

_RATE = "a rate > 0 with its unit, such as 10gbit or 200mbit: what one connection moves"
_TIME = "a time > 0: 50us, 0.3ms, or seconds without a unit"
_KEYS: dict[str, tuple[Callable[[str], Any], str]] = {
    "nodes": (_whole(LARGEST_NODES), f"a whole number from 1 to {LARGEST_NODES}"),
    "gpus": (_whole(LARGEST_DEVICES), f"a whole number of devices per node from 1 to {LARGEST_DEVICES}"),
    "bandwidth": (parse_rate, _RATE),
    "latency": (parse_seconds, _TIME),
    "node_bandwidth": (parse_rate, f"{_RATE}, between the devices of a node"),
    "node_latency": (parse_seconds, _TIME),
    "message": (parse_seconds, _TIME),
    "memory": (_bytes_per_second, "the memory bandwidth of a device with its unit, such as 1555gb"),
    "params": (parse_count, "a number > 0, such as 340M"),
    "backward": (parse_seconds, _TIME),
    "forward": (parse_seconds, _TIME),
    "steps": (_whole(math.inf), "a whole number >= 1"),
}
_LINKS = {"nodes": "nodes", "gpus": "devices"} | {
    name: name for name in ("bandwidth", "latency", "node_bandwidth", "node_latency", "message")
}
_ALLOWED = f"Names are {', '.join(_KEYS)}; nodes, bandwidth (of several), params and backward are needed."
EXAMPLE = "nodes=16,gpus=4,bandwidth=10gbit,latency=50us,params=340M,backward=0.3"
