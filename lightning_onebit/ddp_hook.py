"""What DDP does with a full bucket of gradients: average it, but for those that their optimizer exchanges itself."""

# DDP inspects the hook's annotations: no `from __future__ import annotations` here.

from collections.abc import Callable, Iterable, Set

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_onebit.comm.primitives import Communicator, completed_future
from lightning_onebit.stats import DENSE_ELEMENT_NBYTES, ring_all_reduce_nbytes


class HookState:
    """What the hook needs to know; the strategy changes ``local`` and ``gradients_ready`` between batches."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.local_world_size = 1
        """Ranks of a node, if they exchange as one."""
        self.local: Set[Tensor] = frozenset()
        """Parameters of compressed optimizers, whose gradients are left as they are: none in warm-up."""
        self.gradients_ready: Callable[[Iterable[Tensor]], None] | None = None
        """Told the parameters whose local gradients are final; ``None``: nobody wants to know."""


def phase_hook(state: HookState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP communication hook of both phases.

    In warm-up the bucket is averaged over the ranks, bitwise as DDP does it without a hook. In the compressed phase
    ``p.grad`` is the local gradient where a compressed optimizer will exchange it, when it steps, or at once if
    exchanges overlap with backward. All others are averaged: those of optimizers that cannot be compressed, and of
    parameters in no optimizer.
    """
    buffer, counters = bucket.buffer(), state.communicator.counters
    if not state.local:
        dense, local_numel = [buffer], 0
    else:
        gradients = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
        dense = [gradient for p, gradient in gradients if p not in state.local]
        local_numel = sum(gradient.numel() for p, gradient in gradients if p in state.local)
    counters.dense_equivalent_bytes += (
        ring_all_reduce_nbytes(DENSE_ELEMENT_NBYTES * local_numel, state.communicator.world_size) // state.local_world_size
    )  # of a ring, one hop in so many leaves the node: only those count as sent
    if local_numel and state.gradients_ready is not None:
        state.gradients_ready(bucket.parameters())
    if not dense:
        return completed_future(buffer)
    before = counters.bytes_sent
    if local_numel:
        future = _average_some(state.communicator, buffer, dense)
    else:
        future = state.communicator.all_reduce_mean_future(buffer)
    counters.dense_equivalent_bytes += counters.bytes_sent - before
    return future


def _average_some(communicator: Communicator, buffer: Tensor, dense: list[Tensor]) -> torch.futures.Future[Tensor]:
    """Average ``dense``, views of parts of ``buffer``, in one message."""
    message = torch.cat([gradient.reshape(-1) for gradient in dense])

    def put_back(future: torch.futures.Future[Tensor]) -> Tensor:
        parts = future.value().split([gradient.numel() for gradient in dense])
        for gradient, part in zip(dense, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))
        return buffer

    return communicator.all_reduce_mean_future(message).then(put_back)
