"""Which rank this process is, under torchrun, srun, Lightning's variables, or alone; and its process group."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment

from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.topology import ALONE, Topology
from lightning_onebit.consistency.agreement import exchange


@dataclass(frozen=True, kw_only=True)
class Place:
    """What the launcher said of this process."""

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    node: str = "0"
    """The same for the ranks of one node."""


def find_place(environment: Mapping[str, str], nodes: int | None = None) -> Place:
    """This process's place, from its environment variables.

    Args:
        environment: ``os.environ``.
        nodes: how many there are, with one rank each; needed with Lightning's ``NODE_RANK`` and ``MASTER_ADDR`` alone.

    Raises:
        ValueError: if variables are missing or contradict each other.
    """
    if "WORLD_SIZE" in environment and "RANK" in environment:  # torchrun, or whoever writes the same variables
        world_size, rank = _number(environment, "WORLD_SIZE"), _number(environment, "RANK")
        local_rank = _number(environment, "LOCAL_RANK", default=0)
        node = next((environment[name] for name in ("GROUP_RANK", "NODE_RANK") if name in environment), str(rank))
        place = Place(launcher="torchrun", rank=rank, world_size=world_size, local_rank=local_rank, node=node)
    elif SLURMEnvironment.detect():
        slurm = SLURMEnvironment()
        os.environ.setdefault("MASTER_ADDR", slurm.main_address)
        os.environ.setdefault("MASTER_PORT", str(slurm.main_port))
        place = Place(
            launcher="srun", rank=slurm.global_rank(), world_size=slurm.world_size(), local_rank=slurm.local_rank(),
            node=str(slurm.node_rank()),
        )  # fmt: skip
    elif "NODE_RANK" in environment and "MASTER_ADDR" in environment:
        rank = _number(environment, "NODE_RANK")
        if nodes is None:
            raise ValueError(
                "NODE_RANK and MASTER_ADDR are set, but not how many nodes there are. HINT: pass --nodes N, the same on"
                " all, or start doctor by torchrun."
            )
        place = Place(launcher="NODE_RANK", rank=rank, world_size=nodes, node=str(rank))
    else:
        return Place(launcher="alone")
    if not 0 <= place.rank < place.world_size:
        raise ValueError(
            f"Invalid rank: {place.rank} of {place.world_size} ranks. Must be between 0 and {place.world_size - 1}. HINT:"
            " see which variables the launcher has set: RANK, WORLD_SIZE, NODE_RANK."
        )
    if place.world_size > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if missing:
            raise ValueError(
                f"Not set: {' and '.join(missing)}, so the {place.world_size} ranks cannot meet. HINT: start doctor by"
                " torchrun, or set both: the address of the node with rank 0, and a free port there."
            )
    return place


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"Invalid {name} in the environment: {text!r}. Must be a whole number.") from None


def device_of(place: Place) -> torch.device:
    """A GPU of its own for each rank of a node; the CPU where there is none.

    Raises:
        ValueError: if a node has GPUs, but fewer than ranks: some would use them, and others not.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if place.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"Rank {place.rank} is number {place.local_rank} of its node, counted from 0, which has"
            f" {torch.cuda.device_count()} GPUs. Must be a rank per GPU at most. HINT: --nproc-per-node"
            f" {torch.cuda.device_count()}; or CUDA_VISIBLE_DEVICES='' for the processors."
        )
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


@contextmanager
def joined(place: Place, device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """Within, all ranks have a default process group: NCCL for GPUs, else gloo. A rank alone has none."""
    if place.world_size == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    dist.init_process_group(
        backend, rank=place.rank, world_size=place.world_size, timeout=timedelta(seconds=timeout_seconds)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def topology_of(place: Place, communicator: Communicator, device: torch.device) -> Topology:
    """Nodes and their devices; every rank a node of its own, if they are not numbered node by node. Collective."""
    if communicator.world_size == 1:
        return ALONE
    nodes = [each["node"] for each in exchange(communicator, {"node": place.node}, device)]
    names = list(dict.fromkeys(nodes))
    devices = len(nodes) // len(names)
    if nodes != [name for name in names for _ in range(devices)]:
        return Topology(num_nodes=len(nodes), node_rank=communicator.rank)
    return Topology(
        num_nodes=len(names),
        node_rank=communicator.rank // devices,
        local_world_size=devices,
        local_rank=communicator.rank % devices,
    )
