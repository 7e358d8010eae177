"""The callback that shows what was sent, and what it cost."""

from __future__ import annotations

import inspect
import math
import os
import time
from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_onebit.arguments import check_steps
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.stats import CommStats, PhaseCounters
from lightning_onebit.config import MEBIBYTE
from lightning_onebit.freeze.drift import LARGEST_ERROR_OVER_UPDATE, SPOKEN_OF_AGAIN, extremes
from lightning_onebit.lightning.callbacks.monitor_plot import MonitorPlot, Point
from lightning_onebit.lightning.callbacks.phase_switch import PhaseSwitch
from lightning_onebit.lightning.callbacks.strategy import TwoPhaseStrategy, strategy_of
from lightning_onebit.phase import Phase

WARMUP_FIELD, SAVING_FIELD = "warmup", "less_sent"
"""Of progress bars, before and after the switch."""


def _gather(value: Tensor, group: Any = None) -> list[Tensor]:
    """Of all ranks, a number that each has: as torchmetrics does it, but watched, so that ranks that part are found out."""
    communicator = Communicator()
    gathered = value.new_empty(communicator.world_size)
    communicator.all_gather_(gathered, value.view(1))
    return list(gathered)


class OfAllRanks(Metric):
    """What all ranks sent, and how long the one that waited longest has waited. Reduced when it is computed."""

    full_state_update = False
    bytes_sent: Tensor
    seconds_waited: Tensor

    def __init__(self) -> None:
        super().__init__(dist_sync_fn=_gather)
        self.add_state("bytes_sent", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("seconds_waited", torch.zeros(()), dist_reduce_fx="max")

    @override
    def update(self, counters: PhaseCounters) -> None:
        """Add what this rank has counted since the last time."""
        self.bytes_sent += counters.bytes_sent
        self.seconds_waited += counters.seconds_waited

    @override
    def compute(self) -> tuple[Tensor, Tensor]:
        """Bytes and seconds, 0-d, the same on all ranks. Collective, if there are several."""
        return self.bytes_sent, self.seconds_waited


class CommMonitor(Callback):
    """Logs ``onebit/...`` to every logger, and shows in the progress bar how the warm-up goes, and then what is saved.

    Since the last entry, of rank 0:

    ========================================  =====================================================================
    ``onebit/compressed_phase``               0 in warm-up, 1 afterwards
    ``onebit/sent_mib``                       MiB sent
    ``onebit/received_mib``                   MiB received
    ``onebit/dense_equivalent_mib``           MiB that dense float32 DDP would have sent meanwhile
    ``onebit/dense_equivalent_16bit_mib``     MiB that DDP would have sent with 16 bits
    ``onebit/compression_ratio``              float32 DDP's over those sent
    ``onebit/sign_mib``                       of ``sent_mib``: signs, their scales, and a few bytes by which the ranks agree
    ``onebit/refresh_mib``                    likewise: what renewed second moments
    ``onebit/sketch_mib``                     likewise: what told norms
    ``onebit/dense_mib``                      likewise: dense gradients, and exchanges of such that were only timed
    ``onebit/step_seconds``                   seconds of a step, pauses included
    ``onebit/seconds_waited``                 seconds that training waited for compressed exchanges, in all of these steps;
                                              DDP waits inside its backward, nobody knows how long
    ``onebit/share_hidden``                   of the duration of these exchanges, the share that training did not wait for;
                                              in the compressed phase only
    ``onebit/drift_max``, ``drift_min``       largest and smallest rho of a tensor: the mean square, over its elements, of
                                              the mean gradient over D; 1 where the second moment fits, 4 where gradients
                                              are twice as large as it says
    ``onebit/clamped_share``                  the largest share of elements of a tensor at which g / D was clamped
    ``onebit/error_over_update``              norm of rank 0's worker error over that of the update, in the last step
    ========================================  =====================================================================

    Since training began, before it was resumed as well: ``onebit/total_sent_mib``, ``total_received_mib``,
    ``total_dense_equivalent_mib``, ``total_dense_equivalent_16bit_mib``; the same of each phase as
    ``onebit/warmup/total_sent_mib`` and ``onebit/compressed/total_sent_mib`` and so on, with ``total_steps`` (those of all
    optimizers), ``total_seconds`` of training, and ``total_seconds_waited``.

    Of all ranks together, since the last entry: ``onebit/all_ranks/sent_mib``, and the ``seconds_waited`` of the rank that
    waited most: ``onebit/all_ranks/longest_wait_seconds``. These are reduced when an entry is made, so all ranks must have
    this callback, with the same ``every_n_steps``: else training does not begin.

    Entries have Lightning's step numbers, so that they join with its own rows: by default at the steps at which it logs. One
    is made at the end of training, for what is left. A logger whose ``log_metrics`` takes no step finds it as ``step``.

    The last four of the table are logged in the compressed phase, with several ranks. rho and clamped share are averages
    over the last estimates, one each 16 optimizer steps (see ``strategy.variance_drift()``, which has them by tensor), and
    there are none before the first and without a second moment; tensors that are less than 1% of the elements and of the
    squared update are left out. Error over update reads all errors once: of rank 0 alone, and only for an entry. A value
    above 10 is warned of, once, and again when it has doubled; PhaseSwitch warns of drift and clamped elements.

    Args:
        every_n_steps: steps between entries; ``None``: the Trainer's ``log_every_n_steps``. As Lightning counts them: over
            all epochs, and batches that only accumulate gradients do not count.
        progress_bar: whether to show in the progress bar, be it tqdm's or rich's: in warm-up, as ``warmup``, what the
            criterion sees and by which step it must decide; then, as ``less_sent``, how many times less was sent.
        plot: file of a picture that rank 0 draws at the end of training: loss, phase, bytes and step time of each entry,
            since training began or was resumed. Needs matplotlib. ``None``: none.

    Raises:
        TypeError, ValueError: if ``every_n_steps`` is not a whole number >= 1, ``progress_bar`` neither True nor False, or
            ``plot`` no path of a picture.
        ModuleNotFoundError: if ``plot`` is given, and matplotlib is not installed.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        progress_bar: bool = True,
        plot: str | os.PathLike[str] | None = None,
    ) -> None:
        if every_n_steps is not None:
            every_n_steps = check_steps("every_n_steps", every_n_steps, or_none="for the Trainer's log_every_n_steps")
        if not isinstance(progress_bar, bool):
            raise TypeError(f"Invalid progress_bar: {progress_bar!r}. Must be True or False.")
        self.every_n_steps = every_n_steps
        self.progress_bar = progress_bar
        self._plot = None if plot is None else MonitorPlot(plot)
        self._stats = CommStats()
        self._last = _copy(self._stats)
        """Of this run, by phase, until the last entry."""
        self._earlier = _copy(self._stats)
        """Before this run was resumed."""
        self._seconds = dict.fromkeys(Phase, 0.0)
        """Of training, by phase, before it was resumed as well."""
        self._last_batch = (dict.fromkeys(Phase, 0), 0.0)
        """Steps by phase until the last batch that made one, and when that ended."""
        self._last_entry = (0, 0.0)
        """Lightning's number of the step of the last entry, and when it was made."""
        self._of_all_ranks = OfAllRanks()
        self._spoken_of = 0.0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy_of(trainer)
        if stage == "fit":  # a checkpoint is loaded after this
            self._earlier, self._seconds = _copy(CommStats()), dict.fromkeys(Phase, 0.0)
            if self._plot is not None:
                self._plot.points.clear()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (strategy := strategy_of(trainer)) is not None:
            self._stats = strategy.comm_stats
            self._last = _copy(self._stats)
            now = time.perf_counter()
            self._last_entry, self._last_batch = (_steps_before(trainer), now), (dict.fromkeys(Phase, 0), now)
            self._of_all_ranks.reset()
            self._of_all_ranks.to(trainer.strategy.root_device)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (strategy := strategy_of(trainer)) is None:
            return
        self._count_seconds()
        step, every = _steps_before(trainer), self._every(trainer)
        if every and (step + 1) % every == 0:
            self._make_entry(trainer, strategy, step, outputs)
        if self.progress_bar and strategy.world_size > 1 and strategy.is_global_zero:
            bar: dict[str, Any] = trainer.progress_bar_metrics
            if strategy.phase is Phase.COMPRESSED:
                bar.pop(WARMUP_FIELD, None)
            elif switch := next((c for c in trainer.callbacks if isinstance(c, PhaseSwitch)), None):  # type: ignore[attr-defined]
                bar.pop(SAVING_FIELD, None)
                bar[WARMUP_FIELD] = switch.progress()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (strategy := strategy_of(trainer)) is not None:
            if self._every(trainer):
                self._make_entry(trainer, strategy, _steps_before(trainer) - 1, None)
            if self._plot is not None and strategy.is_global_zero:
                self._plot.save()

    @override
    def state_dict(self) -> dict[str, Any]:
        counters = {phase.name: asdict(total) for phase, total in self._totals().items()}
        return {"counters": counters, "seconds": {phase.name: seconds for phase, seconds in self._seconds.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        known = asdict(PhaseCounters())
        for phase in Phase:
            saved = state_dict["counters"][phase.name]
            self._earlier[phase] = PhaseCounters(**{name: saved[name] for name in known if name in saved})
            self._seconds[phase] = state_dict["seconds"][phase.name]

    def entries(self, trainer: pl.Trainer) -> str:
        """When they are made, in words."""
        return f"every {self._every(trainer)} steps"

    def _every(self, trainer: pl.Trainer) -> int:
        return self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]

    def _totals(self) -> dict[Phase, PhaseCounters]:
        """Since training began."""
        return {phase: self._earlier[phase] + self._stats[phase] for phase in Phase}

    def _count_seconds(self) -> None:
        """Once a batch has made a step, count the seconds since the last such batch in the phase of that step."""
        steps, now = {phase: self._stats[phase].steps for phase in Phase}, time.perf_counter()
        before, since = self._last_batch
        if phase := next((phase for phase in Phase if steps[phase] > before[phase]), None):
            self._seconds[phase] += now - since
            self._last_batch = steps, now

    def _make_entry(self, trainer: pl.Trainer, strategy: TwoPhaseStrategy, step: int, outputs: Any) -> None:
        """Make an entry, unless there is one of this step, Lightning's number. Collective."""
        (last_step, since), now = self._last_entry, time.perf_counter()
        if step < last_step:
            return
        self._last_entry = step + 1, now
        num_steps, phase = step + 1 - last_step, strategy.phase
        stats = strategy.comm_stats
        by_phase = {each: stats[each] - self._last[each] for each in Phase}
        counted = by_phase[Phase.WARMUP] + by_phase[Phase.COMPRESSED]
        self._last = _copy(stats)
        sent, dense = counted.bytes_sent, counted.dense_equivalent_bytes
        ratio = dense / sent if sent else 1.0
        metrics = {
            "compressed_phase": float(phase is Phase.COMPRESSED),
            **_mebibytes(counted),
            "compression_ratio": ratio,
            "sign_mib": by_phase[Phase.COMPRESSED].sign_bytes_sent / MEBIBYTE,
            "refresh_mib": counted.refresh_bytes_sent / MEBIBYTE,
            "sketch_mib": counted.sketch_bytes_sent / MEBIBYTE,
            "dense_mib": (counted.dense_bytes_sent + counted.baseline_bytes_sent) / MEBIBYTE,
            "step_seconds": (now - since) / num_steps,
            "seconds_waited": counted.seconds_waited,
            **self._in_total(),
        }
        if strategy.world_size > 1:
            hidden = by_phase[Phase.COMPRESSED].share_hidden
            if not math.isnan(hidden):
                metrics["share_hidden"] = hidden
            self._of_all_ranks.update(counted)
            bytes_sent, waited = self._of_all_ranks.compute()
            self._of_all_ranks.reset()
            metrics["all_ranks/sent_mib"] = float(bytes_sent) / MEBIBYTE
            metrics["all_ranks/longest_wait_seconds"] = float(waited)
        if strategy.is_global_zero:
            metrics |= self._quality(strategy)
        for logger in trainer.loggers:
            _log(logger, {f"onebit/{name}": value for name, value in metrics.items()}, step)
        if self.progress_bar and phase is Phase.COMPRESSED:
            bar: dict[str, Any] = trainer.progress_bar_metrics
            compressed = by_phase[Phase.COMPRESSED]  # without dense exchanges that are only timed
            bar[SAVING_FIELD] = compressed.dense_equivalent_bytes / max(1, compressed.bytes_sent)
        if self._plot is not None and strategy.is_global_zero:
            loss = outputs.get("loss") if isinstance(outputs, dict) else None
            seen = math.nan if loss is None else float(loss)
            per_step = sent / num_steps / MEBIBYTE, dense / num_steps / MEBIBYTE, (now - since) / num_steps
            self._plot.points.append(Point(step, phase is Phase.COMPRESSED, seen, *per_step))

    def _in_total(self) -> dict[str, float]:
        """Since training began: of both phases together, and of each that there was."""
        totals = self._totals()
        metrics = _mebibytes(totals[Phase.WARMUP] + totals[Phase.COMPRESSED], "total_")
        for phase, total in totals.items():
            if total.bytes_sent or total.steps:
                of_phase = {
                    **_mebibytes(total, "total_"),
                    "total_steps": float(total.steps),
                    "total_seconds": self._seconds[phase],
                    "total_seconds_waited": total.seconds_waited,
                }
                metrics |= {f"{phase.value}/{name}": value for name, value in of_phase.items()}
        return metrics

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


def _copy(stats: CommStats) -> dict[Phase, PhaseCounters]:
    return {phase: replace(stats[phase]) for phase in Phase}


def _mebibytes(counters: PhaseCounters, prefix: str = "") -> dict[str, float]:
    dense = counters.dense_equivalent_bytes / MEBIBYTE
    return {
        f"{prefix}sent_mib": counters.bytes_sent / MEBIBYTE,
        f"{prefix}received_mib": counters.bytes_received / MEBIBYTE,
        f"{prefix}dense_equivalent_mib": dense,
        f"{prefix}dense_equivalent_16bit_mib": dense / 2,
    }


def _log(logger: Any, metrics: dict[str, float], step: int) -> None:
    """Log a row; a logger that takes no step gets it as a metric, which Lightning reads as one."""
    taken = inspect.signature(logger.log_metrics).parameters.values()
    if any(p.name == "step" or p.kind is inspect.Parameter.VAR_KEYWORD for p in taken):
        logger.log_metrics(metrics, step=step)
    else:
        logger.log_metrics({**metrics, "step": float(step)})
