"""Signals that ask a run to end (SIGTERM) or to be requeued (SIGUSR1 under SLURM), answered by all ranks at the same batch.

Lightning's own handlers communicate at once, wherever training is at that moment, while other ranks are in the middle of
another collective. Each then waits for the other until the timeout: so it went in 2 of 4 trials under plain DDP. Ours only
take note. The ranks tell each other, and at the start of a batch all do what any was asked for; from there on it is
Lightning again. What a rank was asked for travels with its next compressed step, in a message that is sent anyway. After a
batch without one, as in warm-up, a small all-reduce at the start of the next batch asks all ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.rank_zero import rank_prefixed_message, rank_zero_info

from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.watch import passing
from lightning_onebit.engine.optimizer import CompressedOptimizer

_log = logging.getLogger(__name__)
_BROADCAST = "_broadcast_sigterm_tensor"
_REPLACED = ("_sigterm_notifier_fn", "_slurm_sigusr_handler_fn")


class AgreedSignals:
    """Takes the place of the handlers of one Trainer, until :meth:`close`. Lightning registers them when a run starts.

    Args:
        trainer: whose process group has been initialized.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._connector: Any = trainer._signal_connector
        self._communicator = Communicator()  # counters of its own: this is no communication of gradients
        self._requests = [0, 0]
        """SIGTERM, and the number of the signal to requeue: of this rank, 0 until it comes."""
        self._requeued = False
        for name, handler in zip(_REPLACED, (self._on_terminate, self._on_requeue), strict=True):
            assert hasattr(_SignalConnector, name)
            setattr(self._connector, name, handler)
        self._broadcast = getattr(trainer.fit_loop.epoch_loop, _BROADCAST, None)  # not in older versions
        if self._broadcast is not None:
            setattr(trainer.fit_loop.epoch_loop, _BROADCAST, self._begin_batch)

    def close(self) -> None:
        """Give Lightning's handlers back."""
        for name in _REPLACED:
            vars(self._connector).pop(name, None)
        vars(self._trainer.fit_loop.epoch_loop).pop(_BROADCAST, None)

    def _begin_batch(self) -> None:
        """In place of Lightning's broadcast, in which a rank waits for one that has no other batch until the timeout."""
        passing("another batch")
        device = self._trainer.strategy.root_device
        if Communicator().broadcast_int(int(self._connector.received_sigterm), device=device):
            assert self._broadcast is not None
            self._broadcast()  # once more, and raises

    def agree(self, compressed: Collection[CompressedOptimizer]) -> None:
        """Before a batch: do on all ranks what any of them was asked for. Collective after a batch without compressed step.

        A requeue is Lightning's: a checkpoint, and ``scontrol``. To end, this batch is trained, and Lightning raises
        ``SIGTERMException`` after it.

        Args:
            compressed: the optimizers of the compressed phase, whose steps carry the requests; none in warm-up.
        """
        told = [each.last_outcome.requests for each in compressed if each.last_outcome is not None]
        for each in compressed:
            each.last_outcome = None
        if not told:
            asked = torch.tensor(self._requests, dtype=torch.int32, device=self._trainer.strategy.root_device)
            self._communicator.all_reduce_max_(asked)
            told = [asked.tolist()]
        terminate, requeue = map(max, zip(*told, strict=True))
        if requeue and not self._requeued:  # once, although the signal may reach other ranks later
            self._requeued = True
            _SignalConnector._slurm_sigusr_handler_fn(self._connector, requeue, None)  # type: ignore[arg-type]
        if terminate and not self._connector.received_sigterm:
            rank_zero_info("SIGTERM reached this rank or another: all ranks end after this batch.")
            self._connector.received_sigterm = True

    def travel_with(self, compressed: Collection[CompressedOptimizer]) -> None:
        """From now on, tell the other ranks of this one's requests with the steps of these optimizers."""
        for each in compressed:
            each.agreement.requests = self._requests

    def end_alone(self) -> None:
        """Before an evaluation, which has no point where ranks meet: end at the next batch, without the others."""
        self._connector.received_sigterm |= bool(self._requests[0])

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        _log.info(rank_prefixed_message(f"Received SIGTERM: {number}", self._trainer.local_rank))
        launcher = self._trainer.strategy.launcher
        if not self._requests[0] and launcher is not None:
            launcher.kill(number)
        self._requests[0] = 1
        if not self._trainer.training:
            self.end_alone()

    def _on_requeue(self, number: int, frame: FrameType | None) -> None:
        self._requests[1] = number
