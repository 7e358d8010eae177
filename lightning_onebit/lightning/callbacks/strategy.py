"""What callbacks may ask of the strategy, be it the Trainer's or Fabric's, and how they find it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_onebit.comm.stats import CommStats
from lightning_onebit.config import CompressionConfig
from lightning_onebit.lightning.pytorch_lightning import HINT, is_pytorch_lightning
from lightning_onebit.phase import Phase


@runtime_checkable
class TwoPhaseStrategy(Protocol):
    """A strategy that compresses: :class:`~lightning_onebit.OneBitDDPStrategy` and that for Fabric are such objects."""

    @property
    def world_size(self) -> int: ...
    @property
    def is_global_zero(self) -> bool: ...
    @property
    def phase(self) -> Phase: ...
    @property
    def optimizer_steps(self) -> int: ...
    @property
    def config(self) -> CompressionConfig: ...
    @property
    def comm_stats(self) -> CommStats: ...
    @property
    def compressed_optimizers(self) -> Sequence[Optimizer]: ...
    def broadcast_decision(self, decision: bool) -> bool: ...
    def freeze_variance(self) -> None: ...
    def check_ranks_agree(self) -> None: ...


def strategy_of(trainer: pl.Trainer) -> TwoPhaseStrategy:
    """The Trainer's strategy, if it compresses.

    Raises:
        TypeError: if it is another, or the Trainer is that of ``pytorch_lightning``.
    """
    if is_pytorch_lightning(trainer):
        raise TypeError(HINT)
    strategy: object = trainer.strategy
    if not isinstance(strategy, TwoPhaseStrategy):
        raise TypeError(
            f"This callback belongs to OneBitDDPStrategy, but the Trainer uses {type(strategy).__name__}. HINT: use"
            " Trainer(strategy='onebit_ddp')."
        )
    return strategy
