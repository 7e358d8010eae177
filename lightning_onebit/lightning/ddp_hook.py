"""What DDP does with a full bucket of gradients: average it, but for those that their optimizer exchanges itself."""

# DDP inspects the hook's annotations: no `from __future__ import annotations` here.

from collections.abc import Callable, Iterable, Mapping, Sequence
from weakref import ReferenceType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_onebit.comm.primitives import Communicator, completed_future
from lightning_onebit.comm.stats import DENSE_ELEMENT_NBYTES, ring_all_reduce_nbytes
from lightning_onebit.config import WarmupPrecision


class Regrouping:
    """Averages gradients in the buckets of an earlier run, until DDP has found these itself.

    DDP learns from the first backward in which order gradients come, and then cuts its buckets anew. A run that resumes
    so begins with other buckets than it had; and with three ranks or more the last bits of an average depend on the place
    in the message.

    Args:
        buckets: parameters of the buckets of the earlier run.
    """

    PATIENCE = 2
    """Backwards after which DDP has its final buckets, at the latest (with ``static_graph``)."""

    def __init__(self, buckets: Sequence[Sequence[Tensor]]) -> None:
        self._wanted = buckets
        self._backwards = 0
        self._begin()

    def _begin(self) -> None:
        self._found: list[Sequence[Tensor]] = []
        self._gradients: dict[Tensor, Tensor] = {}
        self._futures: list[tuple[torch.futures.Future[Tensor], Tensor]] = []

    @property
    def is_over(self) -> bool:
        """Whether DDP's own buckets will do from now on."""
        return self._backwards >= self.PATIENCE

    def average(
        self,
        communicator: Communicator,
        bucket: dist.GradBucket,
        dense: Mapping[Tensor, Tensor],
        dtype: torch.dtype | None,
    ) -> torch.futures.Future[Tensor]:
        """Average the ``dense`` gradients of a bucket, views of it by parameter: all together, when the last is there.

        ``dtype`` is what they travel as; ``None``: as they are.
        """
        buffer = bucket.buffer()
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        self._futures.append((future, buffer))
        self._found.append(bucket.parameters())
        self._gradients.update(dense)
        if bucket.is_last():
            self._average_all(communicator, dtype)
        return future

    def _average_all(self, communicator: Communicator, dtype: torch.dtype | None) -> None:
        found, wanted = ([p for params in buckets for p in params] for buckets in (self._found, self._wanted))
        buckets = self._wanted if set(found) == set(wanted) else self._found
        for params in buckets:
            gradients = [self._gradients[p] for p in params if p in self._gradients]
            if gradients:
                message = torch.cat([gradient.reshape(-1) for gradient in gradients])
                communicator.all_reduce_mean_(message, dtype=dtype)
                _put_back(message, gradients)
        for future, buffer in self._futures:
            future.set_result(buffer)
        is_final = buckets is self._found or [list(map(id, b)) for b in self._found] == [
            list(map(id, b)) for b in self._wanted
        ]
        self._backwards = self.PATIENCE if is_final else self._backwards + 1
        self._begin()


class HookState:
    """What the hook needs to know; the phase controller changes ``local`` and ``gradients_ready`` between batches."""

    def __init__(self, communicator: Communicator, warmup_precision: WarmupPrecision = "fp32") -> None:
        self.communicator = communicator
        self.warmup_precision = warmup_precision
        """What gradients travel as while ``local`` is empty."""
        self.local_world_size = 1
        """Ranks of a node, if they exchange as one."""
        self.local: frozenset[Tensor] = frozenset()
        """Parameters of compressed optimizers, whose gradients are left as they are: none in warm-up."""
        self.gradients_ready: Callable[[Iterable[Tensor]], None] | None = None
        """Told the parameters whose local gradients are final; ``None``: nobody wants to know."""
        self.model: ReferenceType[DistributedDataParallel] | None = None
        """The last one that has this hook. It owns this state, by ways that Python's garbage collector does not see: a
        reference back would keep it, its buckets and the process group with its threads for ever."""
        self.buckets: list[list[Tensor]] = []
        """The parameters of DDP's buckets, as of the last backward."""
        self.backwards = 0
        """How many of ``model`` there were with communication."""
        self.was_called = False
        """Whether there was any, of whichever model."""
        self.regrouping: Regrouping | None = None
        """Averages in other buckets than DDP's; ``None``: nobody wants that."""

    def travelling_dtype(self, buffer: Tensor) -> torch.dtype | None:
        """What the gradients in ``buffer`` are averaged as; ``None``: as they are."""
        narrows = self.warmup_precision == "bf16" and not self.local and buffer.is_floating_point()
        return torch.bfloat16 if narrows and buffer.element_size() > torch.bfloat16.itemsize else None

    def look_ahead(self) -> None:
        """See to it that ``buckets`` are those of the next backward. Collective.

        DDP cuts them anew at the beginning of its second forward: that is done now, if it is still to be done.
        """
        model = None if self.model is None else self.model()
        if model is not None and 0 < self.backwards <= Regrouping.PATIENCE:
            reducer = model.reducer
            reducer._rebuild_buckets()
            self.buckets = [bucket.parameters() for bucket in reducer._get_zeros_like_grad_buckets()]


def phase_hook(state: HookState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP communication hook of both phases.

    In warm-up the bucket is averaged over the ranks, bitwise as DDP does it without a hook, or rounded to bfloat16. In the
    compressed phase ``p.grad`` is the local gradient where a compressed optimizer will exchange it, when it steps, or at
    once if exchanges overlap with backward. All others are averaged: those of optimizers that cannot be compressed, and of
    parameters in no optimizer.
    """
    buffer, counters = bucket.buffer(), state.communicator.counters
    if bucket.index() == 0:
        state.buckets = []
        state.backwards += 1
        state.was_called = True
        if state.regrouping is not None and state.regrouping.is_over:
            state.regrouping = None
    params = bucket.parameters()
    state.buckets.append(params)
    dense: dict[Tensor, Tensor] = {}
    local_numel = 0
    if state.regrouping is None and state.local.issuperset(params):  # nothing is averaged: views would be made for nothing
        local_numel = buffer.numel()
    elif state.local or state.regrouping is not None:
        for p, gradient in zip(params, bucket.gradients(), strict=True):
            if p in state.local:
                local_numel += gradient.numel()
            else:
                dense[p] = gradient
    world_size = state.communicator.world_size
    counters.dense_equivalent_bytes += (
        ring_all_reduce_nbytes(DENSE_ELEMENT_NBYTES * local_numel, world_size) // state.local_world_size
    )  # of a ring, one hop in so many leaves the node: only those count as sent
    # Not what was sent meanwhile: another thread, in which exchanges are carried out, counts there as well.
    averaged_nbytes = sum(gradient.nbytes for gradient in dense.values()) if local_numel else buffer.nbytes
    counters.dense_equivalent_bytes += ring_all_reduce_nbytes(averaged_nbytes, world_size)
    dtype = state.travelling_dtype(buffer) if averaged_nbytes else None
    sent_nbytes = averaged_nbytes if dtype is None else averaged_nbytes // buffer.element_size() * dtype.itemsize
    counters.dense_bytes_sent += ring_all_reduce_nbytes(sent_nbytes, world_size)
    if local_numel and state.gradients_ready is not None:
        state.gradients_ready(params)
    if state.regrouping is not None:
        future = state.regrouping.average(state.communicator, bucket, dense, dtype)
    elif not local_numel:
        future = state.communicator.all_reduce_mean_future(buffer, dtype=dtype)
    elif dense:
        future = _average_some(state.communicator, buffer, list(dense.values()))
    else:
        future = completed_future(buffer)
    return future


def _average_some(communicator: Communicator, buffer: Tensor, dense: list[Tensor]) -> torch.futures.Future[Tensor]:
    """Average ``dense``, views of parts of ``buffer``, in one message."""
    message = torch.cat([gradient.reshape(-1) for gradient in dense])

    def put_back(future: torch.futures.Future[Tensor]) -> Tensor:
        _put_back(future.value(), dense)
        return buffer

    return communicator.all_reduce_mean_future(message).then(put_back)


def _put_back(message: Tensor, gradients: Sequence[Tensor]) -> None:
    parts = message.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))
