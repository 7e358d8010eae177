"""What DDP does with a full bucket of gradients: average it during warm-up, hand it back as it is afterwards."""

# DDP inspects the hook's annotations: no `from __future__ import annotations` here.

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_onebit.comm.primitives import Communicator, completed_future
from lightning_onebit.phase import Phase


class HookState:
    """What the hook needs to know; the strategy changes ``phase`` and ``gradients_ready`` between batches."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.phase = Phase.WARMUP
        self.gradients_ready: Callable[[Iterable[Tensor]], None] | None = None
        """In the compressed phase told the parameters whose gradients are final; ``None``: nobody wants to know."""


def phase_hook(state: HookState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP communication hook of both phases.

    In warm-up the bucket is averaged over the ranks, bitwise as DDP does it without a hook. In the compressed phase it
    comes back unchanged: ``p.grad`` holds the local gradient. It is compressed when the optimizer steps, or at once if
    exchanges overlap with backward.
    """
    if state.phase is Phase.COMPRESSED:
        if state.gradients_ready is not None:
            state.gradients_ready(bucket.parameters())
        return completed_future(bucket.buffer())
    counters = state.communicator.counters
    before = counters.bytes_sent
    future = state.communicator.all_reduce_mean_future(bucket.buffer())
    counters.dense_equivalent_bytes += counters.bytes_sent - before
    return future
