"""What nodes with several devices do before compression: average their gradients, each rank those of its share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_onebit.comm.groups import ExchangeGroups
from lightning_onebit.quantize import DeviceKernels
from lightning_onebit.quantize.memory import BucketMemory


class NodeAverage:
    """A reduce-scatter inside the node, in the dtype of the errors, of one bucket after the other.

    It is an all-to-all and a sum in rank order, which sends as much as a reduce-scatter and rounds the same wherever an
    element lies; a library's reduce-scatter sums in an order that depends on the place in the message.

    Args:
        memories: the buckets; size the workspace.
        groups: those of the exchange, with ``averaging``.
    """

    def __init__(self, memories: Sequence[BucketMemory], groups: ExchangeGroups) -> None:
        assert groups.averaging is not None
        self._communicator = groups.averaging
        self._topology = groups.topology
        numel = max((memory.layout.flat_numel for memory in memories), default=0)
        share_numel = max((memory.error.numel() for memory in memories), default=0)
        dtype, device = (memories[0].dtype, memories[0].device) if memories else (torch.float32, torch.device("cpu"))
        self._gradient = torch.empty(numel, dtype=dtype, device=device)
        self._received = torch.empty(self._topology.local_world_size * share_numel, dtype=dtype, device=device)

    def flat_gradient(self, memory: BucketMemory) -> Tensor:
        """Workspace for the gradient of a bucket, ``[flat_numel]``: to be filled, 0 in padding, before :meth:`average_`."""
        return self._gradient[: memory.layout.flat_numel]

    def average_(self, out: Tensor, memory: BucketMemory, kernels: DeviceKernels | None = None) -> None:
        """Write the mean over the node of this rank's share to ``out [share's flat numel]``. Collective inside the node."""
        ranks, nodes = self._topology.local_world_size, self._topology.num_nodes
        sent = self.flat_gradient(memory).mul_(1.0 / ranks)  # first, as DDP does: a sum may overflow where the mean does not
        received = self._received[: ranks * out.numel()]
        self._communicator.all_to_all_(
            received,
            sent,
            received_numels=[out.numel()] * ranks,
            sent_numels=[memory.layout.flat_numel_of(range(r * nodes, (r + 1) * nodes)) for r in range(ranks)],
        )
        if kernels is not None:
            kernels.add_parts_(out, received.view(ranks, -1), memory)
            return
        first, *others = received.view(ranks, -1)
        out.copy_(first)
        for other in others:
            out.add_(other)
