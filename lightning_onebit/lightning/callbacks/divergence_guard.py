"""The callback that stops a run whose ranks no longer hold the same."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint
from typing_extensions import override

from lightning_onebit.arguments import check_steps
from lightning_onebit.lightning.callbacks.strategy import TwoPhaseStrategy, strategy_of


class DivergenceGuard(Callback):
    """Compares parameters, momentum and second moments of all ranks, bit for bit, every so many optimizer steps.

    Ranks that drift apart (a memory error, a parameter changed on one rank only) would otherwise train on unnoticed, and
    average gradients of different models. If they differ, all ranks raise :class:`~lightning_onebit.DivergenceError`,
    which names the ranks, the step, the first parameter that differs and the last step at which all was equal.

    What is compared is a checksum: one pass over memory, and 16 bytes from each rank. A change within one element is
    always found, any other is missed once in 2^32 times (:mod:`lightning_onebit.consistency.checksum`). The end of training
    is checked as well. The strategy adds one with the default interval if the Trainer has none.

    Args:
        every_n_steps: optimizer steps between comparisons, those of all optimizers added up; ``None``: never.

    Raises:
        TypeError, ValueError: if ``every_n_steps`` is not a whole number >= 1.
    """

    def __init__(self, every_n_steps: int | None = 100) -> None:
        if every_n_steps is not None:
            every_n_steps = check_steps("every_n_steps", every_n_steps, or_none="to compare never")
        self.every_n_steps = every_n_steps
        self._compared = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy_of(trainer)
        if stage == "fit":  # another fit than the last, which counts anew
            self._compared = 0

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if (strategy := strategy_of(trainer)) is not None:
            self.after_step(strategy)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (strategy := strategy_of(trainer)) is not None:
            self.after_step(strategy, is_last=True)

    def after_step(self, strategy: TwoPhaseStrategy, *, is_last: bool = False) -> None:
        """Compare, if enough steps have been made since the last time. Collective.

        Args:
            strategy: the strategy for Trainer or Fabric.
            is_last: whether to compare after fewer steps.
        """
        if self.every_n_steps is None or strategy.world_size == 1:
            return
        steps = strategy.comm_stats.steps  # the same on all ranks
        if steps - self._compared >= (1 if is_last else self.every_n_steps):
            self._compared = steps
            strategy.check_ranks_agree()


def ensure_divergence_guard(trainer: pl.Trainer) -> None:
    """Add the default guard if there is none."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, DivergenceGuard) for callback in callbacks):
        # Before the checkpoints, which Lightning keeps last: what is known to have diverged is not saved.
        position = next((i for i, c in enumerate(callbacks) if isinstance(c, Checkpoint)), len(callbacks))
        callbacks.insert(position, DivergenceGuard())
