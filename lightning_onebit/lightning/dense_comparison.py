"""What compression brings in this run, on this network: its steps beside dense ones, as a warning early and at the end."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_onebit.comm.stats import CommStats
from lightning_onebit.config import CompressionConfig
from lightning_onebit.lightning.baseline import DenseExchange, time_dense_exchanges
from lightning_onebit.lightning.optimizer_steps import OptimizerSteps
from lightning_onebit.lightning.outlook import dense_training
from lightning_onebit.lightning.report import FEWEST_ENDS, WORTH_SAYING, gain, report
from lightning_onebit.phase import Phase


class DenseComparison:
    """Of one run. Asked between a step and the next backward.

    Args:
        steps: of the run's optimizers: how long they took.
        stats: what this rank sent in the run.
        config: of the strategy.
    """

    def __init__(self, steps: OptimizerSteps, stats: CommStats, config: CompressionConfig) -> None:
        self._steps, self._stats, self._config = steps, stats, config
        self._warmup = dense_training(config.warmup_precision)
        self.switches: list[tuple[int, str]] = []
        """Optimizer steps after which the compressed phase began, and why; to be appended to."""
        self._is_done = False
        """Whether the first compressed steps were compared."""
        self._dense_exchange: DenseExchange | None = None
        """Timed where there are too few dense steps."""

    @property
    def is_due(self) -> bool:
        """Whether the first compressed steps were made, and not compared yet. Alike on all ranks: steps are counted."""
        is_compressed = self._steps.phase is Phase.COMPRESSED
        return is_compressed and not self._is_done and len(self._steps.ends[Phase.COMPRESSED]) >= FEWEST_ENDS

    def warn_if_no_faster(self, gradients: Iterable[Tensor], device: torch.device, *, of: str) -> None:
        """Warn if compressed steps are no faster than dense ones; that is done then. Collective, on the training thread.

        Where too few dense steps were timed, dense exchanges are now, all ranks together.

        Args:
            gradients: tensors of the sizes and dtypes that a dense step exchanges.
            device: where they are.
            of: who warns.
        """
        self._is_done = True
        # With several optimizers it is not known how often a step of the first one exchanges what.
        if len(self._steps.ends[Phase.WARMUP]) < FEWEST_ENDS and len(self._steps.made) == 1:
            self._dense_exchange = time_dense_exchanges(
                gradients,
                device,
                self._stats[Phase.WARMUP],
                bucket_cap_mb=self._config.bucket_cap_mb,
                precision=self._config.warmup_precision,
            )
        found = gain(self._steps.ends, self._steps.waits, self._dense_exchange, warmup=self._warmup)
        # The quickest quarter counts: second moments are renewed more often in the first steps than later.
        if found.quick_steps is not None and found.quick_steps < WORTH_SAYING:
            rank_zero_warn(f"{of}: after the first {FEWEST_ENDS} compressed steps: {found.text}")

    def report(self) -> str:
        """The table for the end of the run; see :func:`~lightning_onebit.lightning.report.report`."""
        # Skipped steps are counted, but not made: what was made and not counted was before.
        earlier = max(0, sum(self._steps.made.values()) - self._stats.steps)
        return report(
            self._stats,
            self._steps.ends,
            self._steps.waits,
            self.switches,
            exchange=self._dense_exchange,
            warmup=self._warmup,
            earlier_steps=earlier,
        )
