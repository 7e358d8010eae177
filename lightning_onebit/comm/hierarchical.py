"""What nodes with several devices do before compression: average their gradients, each rank those of its shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_onebit.comm.groups import ExchangeGroups
from lightning_onebit.quantize.layout import BucketLayout


class NodeAverage:
    """A reduce-scatter inside the node, in the dtype of the errors, of one bucket after the other.

    It is an all-to-all and a sum in rank order, which sends as much as a reduce-scatter and rounds the same wherever an
    element lies; a library's reduce-scatter sums in an order that depends on the place in the message.

    Args:
        layouts: of all buckets; size the workspace.
        groups: those of the exchange, with ``averaging``.
        dtype: float32 or float64.
        device: where gradients are.
    """

    def __init__(
        self, layouts: Sequence[BucketLayout], groups: ExchangeGroups, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        assert groups.averaging is not None
        self._communicator = groups.averaging
        self._topology = groups.topology
        numel = max((layout.numel for layout in layouts), default=0)
        shard_numel = max((layout.shard_numel(groups.topology) for layout in layouts), default=0)
        self._sent = torch.empty(numel, dtype=dtype, device=device)
        self._received = torch.empty(self._topology.local_world_size * shard_numel, dtype=dtype, device=device)

    def average_(self, out: Tensor, layout: BucketLayout, grads: Mapping[int, Tensor | None]) -> None:
        """Write the mean over the node of this rank's shard to ``out [shard_numel]``. Collective inside the node.

        Args:
            out: overwritten.
            layout: the bucket.
            grads: by parameter, flat; ``None`` is zero.
        """
        sent = self._sent[: layout.numel]
        for segment in layout.segments:
            grad, part = grads[segment.parameter], sent[segment.offset : segment.offset + segment.numel]
            if grad is None:
                part.zero_()
            else:
                part.copy_(grad[segment.start : segment.start + segment.numel])
        ranks = self._topology.local_world_size
        sent.mul_(1.0 / ranks)  # first, as DDP does: a sum may overflow where the mean does not
        received = self._received[: ranks * out.numel()]
        self._communicator.all_to_all_(
            received,
            sent,
            received_numels=[out.numel()] * ranks,
            sent_numels=layout.shard_numels(self._topology),
        )
        first, *others = received.view(ranks, -1)
        out.copy_(first)
        for other in others:
            out.add_(other)
