"""The callback that shows what was sent."""

from __future__ import annotations

import math
import time
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
    ``onebit/total_sent_mib``                 MiB sent by rank 0 since training began, before it was resumed as well
    ``onebit/total_dense_equivalent_mib``     likewise
    ``onebit/step_seconds``                   seconds of a step since the last entry, pauses included
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

    Entries have Lightning's step numbers, so that they join with its own rows: by default at the steps at which it logs. One
    is made at the end of training, for what is left.

    The last four are logged in the compressed phase, with several ranks. rho and clamped share are averages over the last
    estimates, one each 16 optimizer steps (see ``strategy.variance_drift()``, which has them by tensor), and there are none
    before the first and without a second moment; tensors that are less than 1% of the elements and of the squared update
    are left out. Error over update reads all errors once and decodes the update: of rank 0 alone, and only for an entry. A
    value above 10 is warned of, once, and again when it has doubled; PhaseSwitch warns of drift and clamped elements.

    Args:
        every_n_steps: steps between entries; ``None``: the Trainer's ``log_every_n_steps``. As Lightning counts them: over
            all epochs, and batches that only accumulate gradients do not count.
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
        self._last_entry = (0, 0.0)
        """Lightning's number of the step of the last entry, and when it was made."""
        self._earlier = (0, 0)
        """Bytes sent, and dense-equivalent, before this run was resumed."""
        self._stats = CommStats()
        self._spoken_of = 0.0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy_of(trainer)
        if stage == "fit":  # a checkpoint is loaded after this
            self._earlier = (0, 0)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (strategy := strategy_of(trainer)) is not None:
            self._stats = strategy.comm_stats
            self._last = _counted(self._stats)
            self._last_entry = _steps_before(trainer), time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = _steps_before(trainer)
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (step + 1) % every == 0:
            ratio = self._make_entry(trainer, step)
            if self.progress_bar and ratio is not None:
                pl_module.log("less_sent", ratio, prog_bar=True, logger=False)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every_n_steps or trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self._make_entry(trainer, _steps_before(trainer) - 1)

    @override
    def state_dict(self) -> dict[str, Any]:
        sent, dense = self._total()
        return {"bytes_sent": sent, "dense_equivalent_bytes": dense}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier = state_dict["bytes_sent"], state_dict["dense_equivalent_bytes"]

    def _total(self) -> tuple[int, int]:
        """Bytes sent, and dense-equivalent, since training began."""
        return self._earlier[0] + self._stats.bytes_sent, self._earlier[1] + self._stats.dense_equivalent_bytes

    def _make_entry(self, trainer: pl.Trainer, step: int) -> float | None:
        """Make an entry, unless there is one of this step, Lightning's number. Returns how many times less was sent."""
        (last_step, since), seconds = self._last_entry, time.perf_counter()
        if step < last_step or (strategy := strategy_of(trainer)) is None:
            return None
        self._last_entry = step + 1, seconds
        now = _counted(strategy.comm_stats)
        sent, dense, waited, refreshes, sketches = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        ratio = dense / sent if sent else 1.0
        metrics = {
            "onebit/compressed_phase": float(strategy.phase is Phase.COMPRESSED),
            "onebit/sent_mib": sent / MEBIBYTE,
            "onebit/dense_equivalent_mib": dense / MEBIBYTE,
            "onebit/compression_ratio": ratio,
            "onebit/total_sent_mib": self._total()[0] / MEBIBYTE,
            "onebit/total_dense_equivalent_mib": self._total()[1] / MEBIBYTE,
            "onebit/step_seconds": (seconds - since) / (step + 1 - last_step),
            "onebit/seconds_waited": waited,
            "onebit/refresh_mib": refreshes / MEBIBYTE,
            "onebit/sketch_mib": sketches / MEBIBYTE,
        }
        if strategy.is_global_zero:
            metrics |= {f"onebit/{name}": value for name, value in self._quality(strategy).items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        return ratio

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


def _steps_before(trainer: pl.Trainer) -> int:
    """Steps before the present batch, as Lightning numbers its rows: its own LearningRateMonitor asks for it so."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _counted(stats: CommStats) -> tuple[float, ...]:
    refreshes, sketches = stats.refresh_bytes_sent, stats.sketch_bytes_sent
    return stats.bytes_sent, stats.dense_equivalent_bytes, stats.seconds_waited, refreshes, sketches
