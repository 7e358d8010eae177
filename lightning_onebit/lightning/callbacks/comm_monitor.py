"""The callback that shows what was sent."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_onebit.arguments import check_steps
from lightning_onebit.comm.stats import CommStats
from lightning_onebit.config import MEBIBYTE
from lightning_onebit.freeze.drift import LARGEST_ERROR_OVER_UPDATE, SPOKEN_OF_AGAIN, extremes
from lightning_onebit.lightning.callbacks.strategy import TwoPhaseStrategy, strategy_of
from lightning_onebit.phase import Phase


class CommMonitor(Callback):
    """Logs ``onebit/...`` to every logger, and how many times less is sent in the progress bar.

    ========================================  =====================================================================
    ``onebit/compressed_phase``               0 in warm-up, 1 afterwards
    ``onebit/sent_mib``                       MiB sent by rank 0 since the last entry
    ``onebit/dense_equivalent_mib``           MiB that dense float32 DDP would have sent meanwhile
    ``onebit/compression_ratio``              their quotient
    ``onebit/seconds_waited``                 seconds rank 0 spent in compressed exchanges meanwhile
    ``onebit/refresh_mib``                    of ``sent_mib``, what renewed second moments
    ``onebit/sketch_mib``                     of ``sent_mib``, what told norms; the rest is signs, their scales, and a few
                                              bytes by which the ranks agree; in warm-up, dense gradients
    ``onebit/drift_max``, ``drift_min``       largest and smallest rho of a tensor: the mean square, over its elements, of
                                              the mean gradient over D; 1 where the second moment fits, 4 where gradients
                                              are twice as large as it says
    ``onebit/clamped_share``                  the largest share of elements of a tensor at which g / D was clamped
    ``onebit/error_over_update``              norm of rank 0's worker error over that of the update, in the last step
    ========================================  =====================================================================

    The last four are logged in the compressed phase, with several ranks. rho and clamped share are averages over the last
    estimates, one each 16 optimizer steps (see ``strategy.variance_drift()``, which has them by tensor), and there are none
    before the first and without a second moment; tensors that are less than 1% of the elements and of the squared update
    are left out. Error over update reads all errors once and decodes the update: of rank 0 alone, and only for an entry. A
    value above 10 is warned of, once, and again when it has doubled; PhaseSwitch warns of drift and clamped elements.

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
        self._last: tuple[float, ...] = (0, 0, 0.0, 0, 0)
        self._spoken_of = 0.0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy_of(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (strategy := strategy_of(trainer)) is not None:
            self._last = _counted(strategy.comm_stats)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = self.every_n_steps or max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if (batch_idx + 1) % every or (strategy := strategy_of(trainer)) is None:
            return
        now = _counted(strategy.comm_stats)
        sent, dense, waited, refreshes, sketches = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        ratio = dense / sent if sent else 1.0
        metrics = {
            "onebit/compressed_phase": float(strategy.phase is Phase.COMPRESSED),
            "onebit/sent_mib": sent / MEBIBYTE,
            "onebit/dense_equivalent_mib": dense / MEBIBYTE,
            "onebit/compression_ratio": ratio,
            "onebit/seconds_waited": waited,
            "onebit/refresh_mib": refreshes / MEBIBYTE,
            "onebit/sketch_mib": sketches / MEBIBYTE,
        }
        if strategy.is_global_zero:
            metrics |= {f"onebit/{name}": value for name, value in self._quality(strategy).items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if self.progress_bar:
            pl_module.log("less_sent", ratio, prog_bar=True, logger=False)

    def _quality(self, strategy: TwoPhaseStrategy) -> dict[str, float]:
        """What is known of drift and errors; warns of large errors."""
        quality = extremes(strategy.variance_drift())
        if not math.isnan(error := strategy.error_over_update()):
            quality["error_over_update"] = error
            if error > max(LARGEST_ERROR_OVER_UPDATE, SPOKEN_OF_AGAIN * self._spoken_of):
                self._spoken_of = error
                rank_zero_warn(
                    f"{type(self).__name__}: what error feedback holds back is {error:.3g} times as large as an update"
                    f" (more than {LARGEST_ERROR_OVER_UPDATE:g} is unusual), so it comes late. HINT: a smaller block_size,"
                    " gradient clipping, or a lower learning rate."
                )
        return quality


def _counted(stats: CommStats) -> tuple[float, ...]:
    refreshes, sketches = stats.refresh_bytes_sent, stats.sketch_bytes_sent
    return stats.bytes_sent, stats.dense_equivalent_bytes, stats.seconds_waited, refreshes, sketches
