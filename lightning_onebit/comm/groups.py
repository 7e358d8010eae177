"""The process groups of compressed exchanges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

from lightning_onebit.comm.primitives import Communicator, destroy_group, new_group
from lightning_onebit.comm.stats import PhaseCounters
from lightning_onebit.comm.topology import Topology


@dataclass(frozen=True, kw_only=True)
class ExchangeGroups:
    """Who exchanges what with whom, on process groups that no other thread uses."""

    topology: Topology
    peers: Communicator
    """Across nodes: signs."""
    node: Communicator | None = None
    """Inside the node: the results of the other shares. ``None`` on a flat network."""
    averaging: Communicator | None = None
    """Inside the node, used by the training thread: gradients. ``None`` on a flat network."""

    def count_into(self, counters: PhaseCounters) -> None:
        """Count what is sent from now on in ``counters``."""
        for communicator in (self.peers, self.node, self.averaging):
            if communicator is not None:
                communicator.counters = counters

    def destroy(self) -> None:
        """End the process groups, which must have been made by :func:`new_groups`; none can be used from here on."""
        for communicator in (self.peers, self.node, self.averaging):
            if communicator is not None:
                destroy_group(communicator.group)
                del communicator.group  # gloo's threads end with the last reference


def flat_groups(communicator: Communicator) -> ExchangeGroups:
    """All ranks exchange with each other on the group of ``communicator``."""
    return ExchangeGroups(
        topology=Topology(num_nodes=communicator.world_size, node_rank=communicator.rank), peers=communicator
    )


def new_groups(topology: Topology, timeout: timedelta | None) -> ExchangeGroups:
    """New process groups for ``topology``, with the backend of the default one. Collective over all ranks."""

    def communicator(members: list[list[int]], *, waits: bool, within_node: bool) -> Communicator:
        # All ranks take part in the making of every group, in the same order.
        groups = [(new_group(timeout, ranks), ranks) for ranks in members]
        own = next(group for group, ranks in groups if topology.rank in ranks)
        return Communicator(own, waits=waits, within_node=within_node)

    shares = [replace(topology, local_rank=r).peers for r in range(topology.local_world_size)]
    peers = communicator(shares, waits=False, within_node=False)
    if topology.is_flat:
        return ExchangeGroups(topology=topology, peers=peers)
    nodes = [replace(topology, node_rank=r).node for r in range(topology.num_nodes)]
    return ExchangeGroups(
        topology=topology,
        peers=peers,
        node=communicator(nodes, waits=False, within_node=True),
        averaging=communicator(nodes, waits=True, within_node=True),
    )
