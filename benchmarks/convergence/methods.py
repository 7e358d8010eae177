"""What the study compares: how the mean gradient reaches the optimizer. Each rank has an instance per optimizer.

* ``adam``: torch's Adam on the mean gradient, as under DDP.
* ``bf16``: three lines that cast, all-reduce and cast back. What DDP's bf16 hook does; torch refuses that hook on gloo.
* ``powersgd``: torch's own ``powerSGD_hook``, all gradients in one bucket, then Adam.
* ``compressed``: the library. After the dense steps a ``CompressedOptimizer`` takes over.
* ``exact``: the library on one rank that gets the mean gradient: the same D and refreshes, with r = 1, no quantization.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.optim import Optimizer

from lightning_onebit import coefficients, refresh_schedule
from lightning_onebit.coefficients import RefreshNumbers
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.stats import ring_all_reduce_nbytes
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.buckets import Buckets
from lightning_onebit.engine.optimizer import CompressedOptimizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))

from thread_ranks import ThreadProcessGroup


@dataclass(frozen=True, kw_only=True)
class Method:
    name: str
    kind: Literal["adam", "bf16", "powersgd", "compressed", "exact"]
    dense_steps: float = 0
    """Before the method begins; a share of the run if below 1."""
    variance_refresh: str | int | None = None
    space: Literal["update", "momentum"] = "update"
    block_size: int = 2048
    has_error_feedback: bool = True
    steps_per_interval: int | None = None
    """The next refresh of "auto" after this share of the steps so far; ``None``: the library's, 8."""
    keeps_momentum: bool = True
    """Whether m = u D goes on at a refresh, as in the library; else u does."""
    rank: int = 0
    """PowerSGD's."""
    text: str = ""

    def dense_steps_of(self, steps: int) -> int:
        return round(self.dense_steps * steps) if self.dense_steps < 1 else int(self.dense_steps)

    def config(self) -> CompressionConfig:
        return CompressionConfig(
            block_size=self.block_size,
            space=self.space,
            variance_refresh=self.variance_refresh,  # type: ignore[arg-type]
        )


def _renewed(name: str, dense_steps: float, text: str) -> Method:
    return Method(name=name, kind="compressed", dense_steps=dense_steps, variance_refresh="auto", text=f"renewed, {text}")


def _frozen(name: str, dense_steps: float, text: str) -> Method:
    return Method(name=name, kind="compressed", dense_steps=dense_steps, text=f"frozen, {text}")


METHODS = {
    each.name: each
    for each in (
        # The core
        Method(name="adam", kind="adam", text="Adam, dense float32"),
        _renewed("renewed", 20, "20 dense steps"),
        _frozen("frozen15", 0.15, "15% dense"),
        Method(name="exact", kind="exact", dense_steps=20, variance_refresh="auto", text="renewed, exact average"),
        Method(name="powersgd2", kind="powersgd", dense_steps=0.05, rank=2, text="PowerSGD rank 2, 5% dense"),
        # Further
        _renewed("renewed5", 5, "5 dense steps"),
        _renewed("renewed45", 45, "45 dense steps"),
        Method(
            name="renewed_u",
            kind="compressed",
            dense_steps=20,
            variance_refresh="auto",
            keeps_momentum=False,
            text="renewed, u goes on",
        ),
        Method(
            name="renewed_4",
            kind="compressed",
            dense_steps=20,
            variance_refresh="auto",
            steps_per_interval=4,
            text="renewed after step // 4 more",
        ),
        Method(
            name="renewed_4_u",
            kind="compressed",
            dense_steps=20,
            variance_refresh="auto",
            steps_per_interval=4,
            keeps_momentum=False,
            text="renewed after step // 4 more, u goes on",
        ),
        _frozen("frozen30", 0.30, "30% dense"),
        Method(
            name="paper",
            kind="compressed",
            dense_steps=0.15,
            space="momentum",
            block_size=16384,
            text="the paper's: momentum space, blocks of 16,384, frozen, 15% dense",
        ),
        Method(name="exact_frozen", kind="exact", dense_steps=0.15, text="frozen, 15% dense, exact average"),
        Method(
            name="no_feedback",
            kind="compressed",
            dense_steps=20,
            variance_refresh="auto",
            has_error_feedback=False,
            text="renewed, no error feedback; scales of C, as the momentum of larger ones would grow without bound",
        ),
        Method(name="bf16", kind="bf16", text="Adam, three lines that cast to bf16 and all-reduce"),
        Method(name="powersgd1", kind="powersgd", dense_steps=0.05, rank=1, text="PowerSGD rank 1, 5% dense"),
        Method(name="powersgd4", kind="powersgd", dense_steps=0.05, rank=4, text="PowerSGD rank 4, 5% dense"),
        # Other lengths of the warm-up
        _renewed("renewed_2%", 0.02, "2% dense"),
        _renewed("renewed_5%", 0.05, "5% dense"),
        _renewed("renewed_15%", 0.15, "15% dense"),
        _renewed("renewed_30%", 0.30, "30% dense"),
        _frozen("frozen_5_steps", 5, "5 dense steps"),
        _frozen("frozen_20_steps", 20, "20 dense steps"),
        _frozen("frozen_45_steps", 45, "45 dense steps"),
        _frozen("frozen_2%", 0.02, "2% dense"),
        _frozen("frozen_5%", 0.05, "5% dense"),
    )
}
CORE = ("adam", "renewed", "frozen15", "exact", "powersgd2")
WARMUPS = ("5 steps", "20 steps", "45 steps", "2%", "5%", "15%", "30%")
"""Lengths of the warm-up that are compared."""
BY_WARMUP = {
    "renewed": ("renewed5", "renewed", "renewed45", "renewed_2%", "renewed_5%", "renewed_15%", "renewed_30%"),
    "frozen": ("frozen_5_steps", "frozen_20_steps", "frozen_45_steps", "frozen_2%", "frozen_5%", "frozen15", "frozen30"),
}
"""The methods with these lengths, with refreshes and without."""
FURTHER = tuple(name for name in METHODS if name not in CORE and "_steps" not in name and "%" not in name)


class Diverged(Exception):
    """A training that has no end: on all ranks at the same step."""


class Averaging:
    """The mean gradient by an all-reduce, then the optimizer. Also the dense steps of all other methods."""

    def __init__(self, params: Sequence[Tensor], optimizer: Optimizer, communicator: Communicator) -> None:
        self.params, self.optimizer, self.communicator = params, optimizer, communicator

    def average_(self, flat: Tensor) -> None:
        self.communicator.all_reduce_mean_(flat)

    def step(self) -> None:
        """From local gradients in ``p.grad``, which become their mean."""
        flat = torch.cat([gradient_of(p).view(-1) for p in self.params])
        self.average_(flat)
        for p, part in zip(self.params, flat.split([p.numel() for p in self.params]), strict=True):
            gradient_of(p).copy_(part.view(p.shape))
        self.optimizer.step()


class Bfloat16Averaging(Averaging):
    def average_(self, flat: Tensor) -> None:
        half = flat.bfloat16()
        self.communicator.all_reduce_mean_(half)
        flat.copy_(half)


class CountingGroup(ThreadProcessGroup):
    """Counts what torch's hooks all-reduce."""

    bytes_sent = 0

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Any:
        self.bytes_sent += ring_all_reduce_nbytes(tensors[0].nbytes, self.size())
        return super().allreduce(tensors, opts)


class Bucket:
    """What ``powerSGD_hook`` asks of a ``dist.GradBucket`` that holds all gradients."""

    def __init__(self, flat: Tensor, shapes: list[torch.Size]) -> None:
        parts = flat.split([shape.numel() for shape in shapes])
        self._flat, self._gradients = flat, [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def buffer(self) -> Tensor:
        return self._flat

    def gradients(self) -> list[Tensor]:
        return self._gradients

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True


_fork_rng, _random_lock = torch.random.fork_rng, threading.Lock()


@contextmanager
def one_rank_at_a_time(*args: Any, **kwargs: Any) -> Iterator[None]:
    """``fork_rng`` for ranks that are threads, which share torch's random generator."""
    with _random_lock, _fork_rng(*args, **kwargs):
        yield


class PowerSGDAveraging(Averaging):
    def __init__(self, params: Sequence[Tensor], optimizer: Optimizer, communicator: Communicator, rank: int) -> None:
        super().__init__(params, optimizer, communicator)
        whole = communicator.group
        assert isinstance(whole, ThreadProcessGroup)
        self.group = CountingGroup(whole._world, whole._members, whole.rank(), "powersgd")
        # Dense steps come before: from its third iteration on the hook compresses, so let it begin there.
        self.state = PowerSGDState(self.group, matrix_approximation_rank=rank, start_powerSGD_iter=2)
        self.state.iter = 2

    def average_(self, flat: Tensor) -> None:
        bucket = Bucket(flat, [p.shape for p in self.params])
        with torch.no_grad():
            result = powerSGD_hook(self.state, bucket).wait()  # type: ignore[arg-type]
        flat.copy_(result)
        self.communicator.counters.bytes_sent += self.group.bytes_sent
        self.group.bytes_sent = 0


class Compressing:
    """The library's compressed phase."""

    def __init__(self, method: Method, optimizer: Optimizer, communicator: Communicator) -> None:
        self.method, self.compressed = method, CompressedOptimizer(optimizer, method.config(), communicator, {})

    def step(self) -> None:
        if not self.compressed.step():
            raise Diverged("A step was skipped on all ranks: the gradient is not finite.")
        if not self.method.has_error_feedback:
            for each in self.compressed._sets:
                for memory in each.buckets.memories:
                    memory.error.zero_()
                    memory.server_error.zero_()


def gradient_of(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def begin(
    method: Method, params: Sequence[Tensor], optimizer: Optimizer, communicator: Communicator
) -> Averaging | Compressing:
    """What steps after the dense steps."""
    if method.kind in ("compressed", "exact"):
        return Compressing(method, optimizer, communicator)
    if method.kind == "powersgd":
        return PowerSGDAveraging(params, optimizer, communicator, method.rank)
    if method.kind == "bf16":
        return Bfloat16Averaging(params, optimizer, communicator)
    return Averaging(params, optimizer, communicator)


_refresh_numbers = Buckets.refresh_numbers


def _without_beta(buckets: Buckets) -> RefreshNumbers:
    """Nothing is owed to the next step then."""
    numbers = _refresh_numbers(buckets)
    return numbers._replace(beta=np.zeros_like(numbers.beta))


@contextmanager
def patches(method: Method) -> Iterator[None]:
    """What a training needs to be otherwise, for all threads: torch's hook is not made for them."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.random, "fork_rng", one_rank_at_a_time))
        if method.steps_per_interval is not None:
            forget = refresh_schedule._first_refreshes.cache_clear  # those of another training of this process
            stack.callback(forget)
            stack.enter_context(mock.patch.object(refresh_schedule, "STEPS_PER_INTERVAL", method.steps_per_interval))
            forget()
        if not method.has_error_feedback:
            stack.enter_context(mock.patch.object(coefficients, "SERVER_GAIN_OF_BETA", 0.0))
        if not method.keeps_momentum:
            stack.enter_context(mock.patch.object(Buckets, "refresh_numbers", _without_beta))
        yield
