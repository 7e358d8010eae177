"""Whether exchanges may start during backward: only where gradients can't change any more before the optimizer steps."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities.model_helpers import is_overridden

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
