"""What callbacks may ask of the strategy, be it the Trainer's or Fabric's, and how they find it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast
from weakref import WeakSet

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_onebit.comm.stats import CommStats
from lightning_onebit.config import CompressionConfig
from lightning_onebit.freeze.drift import Drift
from lightning_onebit.lightning.pytorch_lightning import HINT, is_pytorch_lightning
from lightning_onebit.phase import Phase


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
    def warmup_start(self) -> int: ...
    @property
    def expected_compression_ratio(self) -> float: ...
    @property
    def rounds_coarsely(self) -> bool: ...
    @property
    def compressed_optimizers(self) -> Sequence[Optimizer]: ...
    def broadcast_decision(self, decision: bool) -> bool: ...
    def freeze_variance(self, reason: str = "") -> None: ...
    def variance_drift(self) -> Mapping[str, Drift]: ...
    def error_over_update(self) -> float: ...
    def check_ranks_agree(self) -> None: ...


_told: WeakSet[pl.Trainer] = WeakSet()
"""Trainers of other strategies, of which it has been said."""


def strategy_of(trainer: pl.Trainer) -> TwoPhaseStrategy | None:
    """The Trainer's strategy if it compresses, else ``None``: then callbacks do nothing, which is said once per Trainer.

    So a run is compared with ``strategy="ddp"`` by changing one string.

    Raises:
        TypeError: if the Trainer is that of ``pytorch_lightning``.
    """
    if is_pytorch_lightning(trainer):
        raise TypeError(HINT)
    strategy: object = trainer.strategy
    # Not isinstance: of a protocol that asks for every property, at every batch, and some of them are computed.
    if not hasattr(strategy, TwoPhaseStrategy.freeze_variance.__name__):
        if trainer not in _told:
            _told.add(trainer)
            rank_zero_warn(
                f"The Trainer uses {type(strategy).__name__}, which compresses nothing: callbacks of lightning_onebit do"
                " nothing there. HINT: Trainer(strategy='onebit_ddp') compresses."
            )
        return None
    return cast(TwoPhaseStrategy, strategy)
