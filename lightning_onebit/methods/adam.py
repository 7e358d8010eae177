"""Adam and AdamW with a frozen second moment (1-bit Adam, arXiv 2102.02888, algorithm 1).

With the second moment fixed at v_hat, Adam is momentum SGD with one step size per coordinate, and linear in the
gradients: error feedback works. beta = beta1, w = 1 - beta1, eta = lr / (1 - beta1^t); AdamW's decay shrinks x, Adam's
enters the gradient.

**The clamp** gives back a bound that an unfrozen Adam has: a gradient out of nowhere enters v before it divides, and so
moves m / sqrt(v) by at most (1 - beta1) / sqrt(1 - beta2). D is that of the mean gradient, while each rank clamps its own:
ordinary noise is larger there by up to sqrt(n), and a coordinate that has its gradient on one rank at a time (a rare word)
has it n times as large. So kappa = n / sqrt(1 - beta2), n the gradients that are averaged after the clamp. With
1 / sqrt(1 - beta2) updates came out at 0.59 of exact ones at 32 ranks and beta2 = 0.95 (benchmarks/results/clamp.txt).

**In momentum space** g is not divided; what has to be bounded is u / D of step 6, as the quantizer gives all elements of a
block the same magnitude, whatever their D (see :func:`largest_update`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from typing_extensions import override

from lightning_onebit.coefficients import LARGEST_VALUE, Coefficients
from lightning_onebit.methods.base import Method


def largest_update(beta1: float, beta2: float) -> float:
    """What ``|m| / sqrt(v_hat)`` of an unfrozen Adam cannot exceed, whatever its gradients: 7.3 for 0.9 and 0.999.

    By Cauchy and Schwarz on m = (1 - beta1) sum_k beta1^k g_k and v = (1 - beta2) sum_k beta2^k g_k^2,

        |m| / sqrt(v) <= (1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 / beta2)).

    The bias correction of v makes it smaller; that of m is part of eta. With beta1^2 near beta2 or beyond, this grows
    without end: there the bound is 1 / sqrt(1 - beta2), that of a single gradient. Never below 1, what a constant one has.
    """
    ratio = beta1**2 / beta2 if beta2 else math.inf
    growth = (1.0 - beta1) / math.sqrt(1.0 - ratio) if ratio < 1.0 else math.inf
    return min(growth, 1.0) / math.sqrt(1.0 - beta2)


class AdamMethod(Method):
    """1-bit Adam, on the state of ``torch.optim.Adam``."""

    optimizer_types: ClassVar[tuple[type[Optimizer], ...]] = (Adam,)
    has_second_moment = True
    decouples_weight_decay = False
    """Whether weight decay always shrinks the parameter; otherwise the group says so, or it enters the gradient."""

    @override
    def check(self, group: Mapping[str, Any], index: int) -> None:
        if group["amsgrad"]:
            raise ValueError(
                f"amsgrad=True (parameter group {index}) is not supported: its running maximum of the second moment"
                " contradicts a frozen one. Use amsgrad=False."
            )

    @override
    def coefficients(self, group: Mapping[str, Any], step: int, *, num_averaged: int) -> Coefficients:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
        decoupled = self.decouples_weight_decay or group.get("decoupled_weight_decay", False)
        step_size = lr / (1.0 - beta1**step)
        return Coefficients(
            beta=beta1,
            weight=1.0 - beta1,
            kappa=num_averaged / math.sqrt(1.0 - beta2),
            eps=float(group["eps"]),
            sign=-1.0 if group["maximize"] else 1.0,
            coupled_decay=0.0 if decoupled else weight_decay,
            shrink=1.0 - lr * weight_decay if decoupled else 1.0,
            step_size=step_size,
            largest_move=step_size * largest_update(beta1, beta2) if lr else LARGEST_VALUE,
            square_decay=beta2,
        )

    @override
    def steps_done(self, state: Mapping[str, Any]) -> int:
        return int(state["step"]) if "step" in state else 0

    @override
    def momentum(self, state: Mapping[str, Any]) -> Tensor | None:
        return state.get("exp_avg")

    @override
    def second_moment(self, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
        if not self.steps_done(state):
            return None
        return state["exp_avg_sq"] / self._bias_correction(group, self.steps_done(state))

    @override
    def second_moment_decay(self, group: Mapping[str, Any]) -> float:
        return float(group["betas"][1])

    @override
    def stock_state(
        self, momentum: Tensor, second_moment: Tensor | None, param: Tensor, group: Mapping[str, Any], step: int
    ) -> dict[str, Any]:
        assert second_moment is not None
        device = param.device if group["capturable"] or group["fused"] else None
        return {
            "step": torch.tensor(float(step), dtype=torch.float32, device=device),
            "exp_avg": momentum.to(param.dtype),
            "exp_avg_sq": second_moment.mul_(self._bias_correction(group, step)).to(param.dtype),
        }

    def _bias_correction(self, group: Mapping[str, Any], step: int) -> float:
        return 1.0 - self.second_moment_decay(group) ** step


class AdamWMethod(AdamMethod):
    """1-bit AdamW, on the state of ``torch.optim.AdamW``."""

    optimizer_types = (AdamW,)
    decouples_weight_decay = True
