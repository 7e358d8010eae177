"""Loss scaling (``precision="16-mixed"``) in the compressed phase, where gradients are local.

Under DDP an infinity in the gradient of one rank reaches all with the average: every rank's ``GradScaler`` skips the step
and lowers the scale. Local gradients keep it to themselves. One rank would skip while the others wait for it in the
exchange, and its scale would differ from theirs. So it is spread by hand, at the same place: after backward, before
anything looks at the gradients. From there on all is as under DDP: the same hooks see it, and all scalers skip alike.

What is compressed is unscaled, so error feedback never meets a change of the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.plugins import Precision
from torch.optim import Optimizer

from lightning_onebit.engine.optimizer import CompressedOptimizer


def uses_loss_scaling(precision: Precision) -> bool:
    """Whether the losses, and so the gradients between backward and the optimizer's step, are scaled."""
    scaler = getattr(precision, "scaler", None)
    return scaler is not None and scaler.is_enabled()


def loss_scale(precision: Precision) -> float | None:
    """The scale of the next loss; ``None`` if losses are not scaled."""
    scaler = getattr(precision, "scaler", None)
    return scaler.get_scale() if scaler is not None and scaler.is_enabled() else None


def with_agreement(closure: Callable[[], Any], compressed: CompressedOptimizer) -> Callable[[], Any]:
    """``closure``, which runs backward, and then an infinity for everyone if anyone has one. Collective."""

    def closure_and_agreement() -> Any:
        output = closure()
        compressed.spread_nonfinite_()
        return output

    return closure_and_agreement


@torch.no_grad()
def found_inf_after_unscaling_(optimizer: Optimizer) -> bool:
    """Do what fused optimizers do in their kernel, and others have done for them: divide the gradients by the scale.

    A ``GradScaler`` leaves ``grad_scale`` and ``found_inf`` on a fused optimizer for the duration of its step.

    Returns:
        Whether the scaler wants the step to be skipped.
    """
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if scale is not None:
        inverse_scale = scale.double().reciprocal().float()  # as GradScaler.unscale_
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(inverse_scale.to(p.grad.device))
    return found_inf is not None and bool(found_inf)
