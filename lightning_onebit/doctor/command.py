"""``python -m lightning_onebit doctor``: arguments in, text out."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.topology import Topology
from lightning_onebit.consistency.agreement import agreement
from lightning_onebit.doctor.advice import rate
from lightning_onebit.doctor.clock import Clock
from lightning_onebit.doctor.cost_model import DeviceSpeeds, Job
from lightning_onebit.doctor.launch import Place, device_of, find_place, joined, topology_of
from lightning_onebit.doctor.links import Links, network_of
from lightning_onebit.doctor.probe import NetworkProbe, probe_network
from lightning_onebit.doctor.published import grid_table, published_table
from lightning_onebit.doctor.simulate import (
    EXAMPLE,
    FORWARD_SHARE,
    MATRIX_SIDE,
    STEPS,
    Setting,
    job_of,
    parse_count,
    parse_seconds,
    simulated,
)
from lightning_onebit.doctor.speeds import measure_speeds, slowest
from lightning_onebit.doctor.text import aligned, document, plot, report, require_matplotlib
from lightning_onebit.doctor.workload import load_module, measure_module, trained_shapes

T = TypeVar("T")
UNKNOWN_ALONE = (
    "This process is alone, so nothing is known of the network. HINT: start it on all nodes, as your training: torchrun"
    " --nnodes 2 --nproc-per-node 1 ... -m lightning_onebit doctor ...; or describe the network: --simulate."
)
SHARES_CORES = 1.3
"""Work of the processor that takes so much longer than --cores explains is worth a remark."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run doctor; the exit code."""
    parser = make_parser()
    settings = parser.parse_args(arguments)
    try:
        if settings.plot is not None:
            require_matplotlib()
        if settings.published or settings.simulate is not None:
            return _on_paper(settings)
        return _measured(settings)
    except (ValueError, RuntimeError) as error:  # ranks that disagree included
        return _failed(str(error))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_onebit doctor",
        description="Measure this network and this device, and predict what a training step takes under DDP, with a 16-bit"
        " hook, with PowerSGD, and with onebit_ddp. Start it as you start your training: by torchrun, by srun, or alone.",
    )
    parser.add_argument(
        "module", nargs="?", help="your model: package.module:Class or file.py:Class; its example_input_array is measured"
    )
    parser.add_argument("--params", type=_argument(parse_count, "340M"), help="trained parameters, such as 340M")
    parser.add_argument(
        "--backward", type=_argument(parse_seconds, "0.3 or 300ms"), help="seconds of backward on one device"
    )
    parser.add_argument(
        "--forward", type=_argument(parse_seconds, "0.1 or 100ms"), help="of forward (default: half of that)"
    )
    parser.add_argument("--steps", type=int, help=f"of the whole run (default: {STEPS})")
    parser.add_argument("--cores", type=float, help="processor cores that all ranks share (default: as many as they need)")
    parser.add_argument("--nodes", type=int, help="how many, if only NODE_RANK and MASTER_ADDR are set")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds until a rank that waits gives up (default: 60)")
    parser.add_argument(
        "--simulate", metavar="SETTING", help="nodes=16,gpus=4,bandwidth=10gbit,...: nothing is measured; or: grid"
    )
    parser.add_argument("--published", action="store_true", help="published speed-ups beside the model's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw step times over bandwidth; needs matplotlib")
    return parser


def _argument(parse: Callable[[str], T], example: str) -> Callable[[str], T]:
    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid value: {text!r}. Must be a number > 0, such as {example}.") from None

    return convert


def _check(settings: argparse.Namespace) -> None:
    settings.steps = STEPS if settings.steps is None else settings.steps
    if settings.steps < 1:
        raise ValueError(f"Invalid --steps: {settings.steps}. Must be >= 1: optimizer steps of the whole run.")
    for name in ("cores", "timeout", "nodes"):
        value = getattr(settings, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"Invalid --{name}: {value}. Must be a finite number > 0.")
    if settings.module is not None and settings.params is not None:
        raise ValueError(
            f"Both a module ({settings.module!r}) and --params. HINT: leave out --params, the module's are counted."
        )
    if settings.params is not None and settings.backward is None:
        raise ValueError(
            "--params needs --backward: of a number of parameters nobody knows how long backward takes. HINT: measure it in"
            " your training, or give a module with an example_input_array instead."
        )
    if settings.backward is not None and settings.params is None and settings.module is None:
        raise ValueError("--backward needs --params or a module. HINT: --params 340M.")


def _on_paper(settings: argparse.Namespace) -> int:
    """Nothing is measured."""
    for name in ("module", "params", "backward", "forward", "steps", "cores", "nodes"):
        if getattr(settings, name) is not None:
            raise ValueError(
                f"{'A module' if name == 'module' else f'--{name}'} has no effect with --simulate or --published, which"
                f" measure nothing. HINT: --simulate {EXAMPLE}, where what is known stands in one list."
            )
    if settings.published or settings.simulate == "grid":
        if settings.json or settings.plot:
            raise ValueError("--published and --simulate grid print a table only. HINT: leave out --json and --plot.")
        return _say(published_table() if settings.published else grid_table())
    return _tell(settings, simulated(settings.simulate), {})


def _measured(settings: argparse.Namespace) -> int:
    _check(settings)
    place = find_place(os.environ, settings.nodes)
    device = device_of(place)
    with joined(place, device, settings.timeout):
        communicator = Communicator()
        clock = Clock(device)
        # Whatever goes wrong on one rank here ends all of them, with its words.
        with agreement(communicator, device, about="what doctor was asked") as agreed:
            module = None if settings.module is None else load_module(settings.module)
            shapes = _shapes(settings, None if module is None else trained_shapes(module))
            agreed.update({name: str(value) for name, value in vars(settings).items()}, shapes=str(shapes))
        topology = topology_of(place, communicator, device)
        probe = None
        numels = [float(math.prod(shape)) for shape in shapes]
        if place.world_size > 1:
            known = sum(numels) if settings.params or module is not None else None
            probe = probe_network(topology, device, numel=known, tensors=len(shapes), cores=settings.cores)
        speeds, kernels = _together(communicator, device, lambda: measure_speeds(shapes, place.world_size, clock))
        speeds = _slowest(speeds, communicator, device)
        job = None
        if module is not None or settings.params is not None:
            job = _job(settings, module, shapes, clock, communicator, device)
        measured = _document(place, topology, probe, speeds, kernels, device)
        if place.rank != 0:
            return 0
        if job is None or probe is None:
            return _tell_without_prediction(settings, measured, speeds, probe, place, topology, kernels, device, job)
        setting = Setting(
            job=job, speeds=speeds, network=probe.network, cores=settings.cores, overlaps=device.type == "cuda"
        )
        return _tell(
            settings, setting, measured, _probe_text(place, topology, probe, speeds, kernels, device, settings.cores)
        )


def _shapes(settings: argparse.Namespace, of_module: list[tuple[int, ...]] | None) -> list[tuple[int, ...]]:
    if of_module is not None:
        if not of_module:
            raise ValueError(
                f"{settings.module!r} has no parameter that is trained. HINT: requires_grad is False everywhere."
            )
        return of_module
    if settings.params is None:
        return [(MATRIX_SIDE, MATRIX_SIDE)] * 4
    whole, rest = divmod(int(settings.params), MATRIX_SIDE**2)
    return [(MATRIX_SIDE, MATRIX_SIDE)] * whole + ([(rest,)] if rest else [])


def _job(
    settings: argparse.Namespace,
    module: torch.nn.Module | None,
    shapes: list[tuple[int, ...]],
    clock: Clock,
    communicator: Communicator,
    device: torch.device,
) -> Job:
    if settings.params is not None:
        return job_of(settings.params, settings.backward, settings.forward, settings.steps)
    assert module is not None
    if settings.backward is None:
        forward, backward = _together(communicator, device, lambda: measure_module(module, clock))
        slowest_rank = torch.tensor([forward, backward], dtype=torch.float64, device=device)
        communicator.all_reduce_max_(slowest_rank)
        forward, backward = slowest_rank.tolist()
        forward = settings.forward or forward
    else:
        backward = settings.backward
        forward = settings.forward or FORWARD_SHARE * backward
    matrices = [shape for shape in shapes if len(shape) > 1]
    return Job(
        numels=tuple(float(math.prod(shape)) for shape in shapes),
        forward_seconds=forward,
        backward_seconds=backward,
        factor_numel=float(sum(shape[0] + math.prod(shape[1:]) for shape in matrices)),
        vector_numel=float(sum(math.prod(shape) for shape in shapes if len(shape) <= 1)),
        steps=settings.steps,
    )


def _together(communicator: Communicator, device: torch.device, work: Callable[[], T]) -> T:
    """Do ``work`` on all ranks; if it fails on one, fail on all. Collective."""
    failure: Exception | None = None
    result: T
    try:
        result = work()
    except Exception as error:
        failure = error
    failed = torch.tensor([0 if failure is None else communicator.rank + 1], dtype=torch.int64, device=device)
    communicator.all_reduce_max_(failed)
    if failure is not None:
        raise failure
    if int(failed):
        raise RuntimeError(f"Rank {int(failed) - 1} failed, so this one stops. HINT: its own message says why.")
    return result


def _slowest(speeds: DeviceSpeeds, communicator: Communicator, device: torch.device) -> DeviceSpeeds:
    of_all = torch.tensor(list(vars(speeds).values()), dtype=torch.float64, device=device)
    communicator.all_reduce_max_(of_all)
    return slowest(speeds, of_all.cpu())


# Output


def _document(
    place: Place, topology: Topology, probe: NetworkProbe | None, speeds: DeviceSpeeds, kernels: str, device: torch.device
) -> dict[str, Any]:
    return {
        "launcher": place.launcher,
        "nodes": topology.num_nodes,
        "devices_per_node": topology.local_world_size,
        "device": str(device.type),
        "kernels": kernels,
        "speeds_seconds_per_element": vars(speeds),
        "network": None if probe is None else probe.document(),
    }


def _probe_text(
    place: Place,
    topology: Topology,
    probe: NetworkProbe | None,
    speeds: DeviceSpeeds,
    kernels: str,
    device: torch.device,
    cores: float | None,
) -> str:
    lines = [f"measured by {place.world_size} rank{'s' if place.world_size > 1 else ''} ({place.launcher}, {device.type}):"]
    if probe is not None:
        rows = [["ranks", "", "latency, us", "bandwidth"]]
        for pair in probe.pairs:
            where = "in one node" if pair.same_node else "between nodes"
            ranks = " and ".join(map(str, pair.ranks))
            rows.append([ranks, where, f"{1e6 * pair.latency_seconds:.0f}", rate(pair.bits_per_second)])
        rows.append(
            [
                "all",
                "all-reduce",
                f"{1e6 * probe.curves['all_reduce'].points[0][1]:.0f}",
                rate(probe.network.bits_per_second),
            ]
        )
        lines.append(aligned(rows))
    told = ("encode", "serve", "apply", "adam", "copy")
    parts = ", ".join(f"{part} {1e9 * getattr(speeds, part):.2g}" for part in told)
    lines.append(f"kernels ({kernels}), ns per element: {parts}")
    if probe is not None and probe.contention > SHARES_CORES * max(1.0, place.world_size / (cores or place.world_size)):
        lines.append(
            f"The processor's work takes {probe.contention:.1f} times as long when all ranks work at once, more than the"
            f" number of cores explains. HINT: --cores {place.world_size / probe.contention:.1f} would account for it."
        )
    return "\n".join(lines)


def _tell(settings: argparse.Namespace, setting: Setting, measured: dict[str, Any], text: str = "") -> int:
    if settings.plot is not None:
        plot(setting, settings.plot)
    if settings.json:
        return _say(json.dumps({**document(setting), **({"measured": measured} if measured else {})}, indent=1))
    return _say(f"{text}\n\n{report(setting)}" if text else report(setting))


def _tell_without_prediction(
    settings: argparse.Namespace,
    measured: dict[str, Any],
    speeds: DeviceSpeeds,
    probe: NetworkProbe | None,
    place: Place,
    topology: Topology,
    kernels: str,
    device: torch.device,
    job: Job | None,
) -> int:
    if settings.plot is not None:
        raise ValueError("--plot needs a prediction: several ranks, and --params with --backward, or a module.")
    hint = UNKNOWN_ALONE if probe is None else "HINT: for a prediction, pass --params 340M --backward 0.3, or a module."
    if job is not None:
        measured["job"] = {
            "parameters": job.numel,
            "forward_seconds": job.forward_seconds,
            "backward_seconds": job.backward_seconds,
        }
    if settings.json:
        return _say(json.dumps({"measured": measured, "hint": hint}, indent=1))
    text = _probe_text(place, topology, probe, speeds, kernels, device, settings.cores)
    if job is not None:
        alone = Setting(job=job, speeds=speeds, network=network_of(Links(nodes=1, bandwidth=1.0)))
        text += f"\n\n{report(alone)}"
    return _say(f"{text}\n\n{hint}")


def _say(text: str) -> int:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return 0


def _failed(message: str) -> int:
    sys.stderr.write(f"doctor: {message}\n")
    return 1
