"""The callback that shows what was sent."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_onebit.arguments import check_steps
from lightning_onebit.config import MEBIBYTE
from lightning_onebit.lightning.callbacks.strategy import strategy_of
from lightning_onebit.phase import Phase


class CommMonitor(Callback):
    """Logs ``onebit/...`` to every logger, and how many times less is sent in the progress bar.

    ========================================  =====================================================================
    ``onebit/compressed_phase``               0 in warm-up, 1 afterwards
    ``onebit/sent_mib``                       MiB sent by rank 0 since the last entry
    ``onebit/dense_equivalent_mib``           MiB that dense float32 DDP would have sent meanwhile
    ``onebit/compression_ratio``              their quotient
    ``onebit/seconds_waited``                 seconds rank 0 spent in compressed exchanges meanwhile
    ========================================  =====================================================================

    Args:
        every_n_steps: batches between entries; ``None``: the Trainer's ``log_every_n_steps``.
        progress_bar: whether to show the ratio as ``less_sent`` in the progress bar.

    Raises:
        TypeError, ValueError: if ``every_n_steps`` is not a whole number >= 1.
    """

    def __init__(self, every_n_steps: int | None = None, *, progress_bar: bool = True) -> None:
        if every_n_steps is not None:
            every_n_steps = check_steps("every_n_steps", every_n_steps, or_none="for the Trainer's log_every_n_steps")
        self.every_n_steps = every_n_steps
        self.progress_bar = progress_bar
        self._last = (0, 0, 0.0)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy_of(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (strategy := strategy_of(trainer)) is not None:
            stats = strategy.comm_stats
            self._last = stats.bytes_sent, stats.dense_equivalent_bytes, stats.seconds_waited

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = self.every_n_steps or max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if (batch_idx + 1) % every or (strategy := strategy_of(trainer)) is None:
            return
        stats = strategy.comm_stats
        now = stats.bytes_sent, stats.dense_equivalent_bytes, stats.seconds_waited
        sent, dense, waited = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        ratio = dense / sent if sent else 1.0
        metrics = {
            "onebit/compressed_phase": float(strategy.phase is Phase.COMPRESSED),
            "onebit/sent_mib": sent / MEBIBYTE,
            "onebit/dense_equivalent_mib": dense / MEBIBYTE,
            "onebit/compression_ratio": ratio,
            "onebit/seconds_waited": waited,
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if self.progress_bar:
            pl_module.log("less_sent", ratio, prog_bar=True, logger=False)
