"""Where the ranks are: nodes, each with the same number of devices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Topology:
    """One rank among ``num_nodes * local_world_size``. Ranks are numbered node by node.

    Ranks with the same ``local_rank`` are *peers*: they exchange signs with each other, about their *share*, the
    ``1 / local_world_size`` of every bucket that they stand for. On a flat network each rank is a node of its own.
    """

    num_nodes: int
    node_rank: int
    local_world_size: int = 1
    local_rank: int = 0

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.local_world_size

    @property
    def rank(self) -> int:
        return self.node_rank * self.local_world_size + self.local_rank

    @property
    def is_flat(self) -> bool:
        return self.local_world_size == 1

    @property
    def chunk(self) -> int:
        """The chunk of every bucket that this rank serves. Chunks are numbered share by share."""
        return self.local_rank * self.num_nodes + self.node_rank

    @property
    def share(self) -> range:
        """The chunks of this rank's share, one for each peer, in the order of the nodes."""
        first = self.local_rank * self.num_nodes
        return range(first, first + self.num_nodes)

    @property
    def peers(self) -> list[int]:
        """Ranks with this ``local_rank``, in the order of the nodes."""
        return [node * self.local_world_size + self.local_rank for node in range(self.num_nodes)]

    @property
    def node(self) -> list[int]:
        """Ranks of this node, in order."""
        first = self.node_rank * self.local_world_size
        return list(range(first, first + self.local_world_size))


ALONE = Topology(num_nodes=1, node_rank=0)
"""Of a single rank, and as long as others are not known."""
