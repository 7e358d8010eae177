"""Whether exchanges may start during backward: only where gradients can't change any more before the optimizer steps."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_onebit.consistency.ranks import Ranks
from lightning_onebit.lightning.loss_scaling import uses_loss_scaling

MODULE_HOOKS = (
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
)
"""Methods of a LightningModule that run between backward and step, or around them."""

PRECISIONS = (Precision, DoublePrecision, HalfPrecision, MixedPrecision)
"""Exactly these are known to leave gradients alone, but for the loss scale."""

CALLBACK_HOOKS = ("on_after_backward", "on_before_optimizer_step")


def choose_overlap(
    strategy: Ranks, overlap: bool | Literal["auto"], trainer: pl.Trainer, module: pl.LightningModule
) -> bool:
    """Whether exchanges start during backward; says so, and why.

    Raises:
        ValueError: if ``overlap`` is True and gradients may change after backward.
    """
    if strategy.world_size == 1 or overlap is False:
        return False
    obstacle = obstacle_to_overlap(trainer, module)
    if overlap is True:
        if obstacle is not None:
            raise ValueError(f"overlap=True is not possible: {obstacle}. HINT: use overlap='auto' or False.")
        return True
    if obstacle is None and strategy.root_device.type == "cpu":
        obstacle = "on CPU it costs more time than it hides"
    when = "during backward" if obstacle is None else f"in the optimizer step, as {obstacle}"
    rank_zero_info(f"{type(strategy).__name__}: once compressed, exchanges start {when} (overlap='auto').")
    return obstacle is None


def obstacle_to_overlap(trainer: pl.Trainer, module: pl.LightningModule) -> str | None:
    """Why a gradient may still change when DDP has it ready; ``None`` if it can't."""
    if not module.automatic_optimization:
        return "with manual optimization it is not known which backward is the last before a step"
    precision = trainer.precision_plugin
    if uses_loss_scaling(precision):
        return "gradients are divided by the loss scale after backward"
    if type(precision) not in PRECISIONS:
        return f"{type(precision).__name__} may change gradients after backward"
    if trainer.gradient_clip_val:
        return f"gradient_clip_val={trainer.gradient_clip_val} needs all gradients before the first is sent"
    for name in MODULE_HOOKS:
        if is_overridden(name, module, parent=pl.LightningModule):
            return f"{type(module).__name__}.{name} may change gradients after backward"
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        for name in CALLBACK_HOOKS:
            if is_overridden(name, callback, parent=Callback):
                return f"{type(callback).__name__}.{name} may change gradients after backward"
    for optimizer in trainer.optimizers:
        if optimizer._optimizer_step_pre_hooks:
            return "a step hook of the optimizer may change gradients"
    return None
