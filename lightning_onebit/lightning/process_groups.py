"""The process groups of a run: whether compressed exchanges go between all ranks, or between nodes only."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_onebit.comm.groups import ExchangeGroups, new_groups
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.topology import ALONE, Topology
from lightning_onebit.consistency.ranks import Ranks


def make_process_groups(
    strategy: Ranks, hierarchical: bool | Literal["auto"], communicator: Communicator, timeout: timedelta | None
) -> tuple[Topology, ExchangeGroups | None]:
    """Who exchanges with whom, and new process groups for it; none for a single process. Collective.

    Args:
        strategy: says where this process is.
        hierarchical: see :func:`find_topology`.
        communicator: all ranks.
        timeout: of collectives in the new groups; ``None``: the library's default.
    """
    if strategy.world_size == 1:
        return ALONE, None
    topology = find_topology(strategy, hierarchical, communicator)
    groups = new_groups(topology, timeout)
    # A rank that fails next closes its connections: wait until all others have made theirs.
    communicator.all_reduce_max_(torch.zeros((), dtype=torch.int32, device=strategy.root_device))
    return topology, groups


def find_topology(strategy: Ranks, hierarchical: bool | Literal["auto"], communicator: Communicator) -> Topology:
    """The nodes and their ranks, or a flat network if ranks are not numbered node by node. Collective.

    Args:
        strategy: says where this process is.
        hierarchical: ``False``: always flat; ``"auto"``: flat where nodes cannot be told, with a warning.
        communicator: all ranks.

    Raises:
        ValueError: on all ranks, if ``hierarchical`` is True and ranks are not numbered node by node.
    """
    flat = Topology(num_nodes=strategy.world_size, node_rank=strategy.global_rank)
    if hierarchical is False:
        return flat
    if strategy.num_nodes == 1 or strategy.num_processes == 1:
        if hierarchical is True:
            rank_zero_warn(
                f"hierarchical=True has no effect with {strategy.num_nodes} node(s) of {strategy.num_processes} process(es):"
                " it takes several nodes of several processes."
            )
        return flat
    nodes = Topology(
        num_nodes=strategy.num_nodes,
        node_rank=strategy.node_rank,
        local_world_size=strategy.num_processes,
        local_rank=strategy.local_rank,
    )
    misplaced = torch.tensor(nodes.rank != strategy.global_rank, dtype=torch.int32, device=strategy.root_device)
    communicator.all_reduce_max_(misplaced)
    if not misplaced:
        rank_zero_info(
            f"{type(strategy).__name__}: hierarchical={hierarchical!r}: the {nodes.local_world_size} ranks of each of"
            f" {nodes.num_nodes} nodes average their gradients first, and signs go between nodes only."
        )
        return nodes
    remark = "ranks are not numbered node by node, so exchanges cannot be hierarchical"
    if hierarchical is True:
        raise ValueError(f"hierarchical=True: {remark}. HINT: change the launcher's placement, or use 'auto'.")
    rank_zero_warn(f"{type(strategy).__name__}: {remark}: all ranks exchange with each other directly.")
    return flat
