"""Adam and AdamW with a frozen second moment (1-bit Adam, arXiv 2102.02888, algorithm 1).

With the second moment fixed at v_hat, Adam is momentum SGD with one step size per coordinate, and linear in the
gradients: error feedback works. In update space the preconditioned momentum u is what travels:

    D    = sqrt(v_hat) + eps                                     fixed at the freeze
    u_i  = beta1 u + (1 - beta1) clamp(g_i / D, +-kappa)         kappa = 1 / sqrt(1 - beta2)
    x    = x - lr u / (1 - beta1^t)

In momentum space (the paper's) m_i = beta1 m + (1 - beta1) g_i travels, and D divides the average afterwards.

The clamp restores the bound that an unfrozen Adam has: a gradient out of nowhere enters v before it divides, and so moves
m / sqrt(v) by at most (1 - beta1) / sqrt(1 - beta2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from typing_extensions import override

from lightning_onebit.engine.momentum import LARGEST_VALUE, LocalMomentum, square_root_
from lightning_onebit.methods.base import CompressedMethod

WOKEN_VARIANCE = 1e-34
"""Second moment with which a coordinate starts whose first gradient comes after the freeze: far below eps, but not the
zero of a dead one."""


@dataclass(frozen=True, kw_only=True)
class AdamCoefficients:
    """One step's numbers of one parameter."""

    beta1: float
    beta2: float
    eps: float
    kappa: float
    step_size: float
    """lr / (1 - beta1^t)"""
    coupled_decay: float
    """Adam's weight decay: times the parameter, added to the gradient."""
    shrink: float
    """AdamW's weight decay: 1 - lr * weight_decay."""
    sign: float
    """-1 to maximize."""


class FrozenAdam(CompressedMethod[AdamCoefficients]):
    """1-bit Adam and AdamW, on the state of ``torch.optim.Adam``.

    While frozen, ``state["exp_avg_sq"]`` holds v_hat, the bias-corrected second moment at the freeze, which needs no
    further correction; ``state["step"]`` goes on counting.

    **Late coordinates**, those whose first gradient comes after the freeze, have nothing frozen to divide by. In update
    space D is needed by the worker alone, so each rank goes on as Adam would, from the gradients that it sees: v = beta2 v +
    (1 - beta2) g_i^2, kept in ``exp_avg_sq`` with a minus sign. Outside, they have the variance of a new coordinate, the
    same on all ranks.
    """

    optimizer_types = (Adam, AdamW)

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._has_late = False

    @classmethod
    @override
    def validate(cls, optimizer: Optimizer) -> None:
        for index, group in enumerate(optimizer.param_groups):
            if group["amsgrad"]:
                raise ValueError(
                    f"amsgrad=True (parameter group {index}) is not supported: its running maximum of the second moment"
                    " contradicts a frozen one. Use amsgrad=False."
                )
            if group["differentiable"]:
                raise ValueError(
                    f"differentiable=True (parameter group {index}) is not supported: gradients cannot flow through"
                    " signs. Use differentiable=False."
                )

    @override
    def freeze_(self, param: Tensor, group: Mapping[str, Any]) -> None:
        state = self.optimizer.state[param]
        if not state:  # never had a gradient on any rank
            on_device = group["capturable"] or group["fused"]
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if on_device else None)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
        exp_avg_sq = state["exp_avg_sq"]
        exp_avg_sq.div_(self._freezing_correction(param, group))
        # An earlier compressed phase may have left late coordinates behind.
        late = (exp_avg_sq > 0) & (exp_avg_sq <= 2 * WOKEN_VARIANCE)
        if late.any():
            self.wake_(exp_avg_sq, late)

    @override
    def thawed(self, param: Tensor, group: Mapping[str, Any]) -> Tensor:
        return self.shared(self.optimizer.state[param]["exp_avg_sq"]) * self._bias_correction2(param, group)

    @override
    def refrozen(self, exp_avg_sq: Tensor, param: Tensor, group: Mapping[str, Any]) -> Tensor:
        return exp_avg_sq / self._freezing_correction(param, group)

    @override
    def count_step_(self, param: Tensor) -> None:
        step = self.optimizer.state[param]["step"]
        step += 1

    @override
    def coefficients(self, param: Tensor, group: Mapping[str, Any]) -> AdamCoefficients:
        step = max(1.0, float(self.optimizer.state[param]["step"]))
        beta1, beta2 = (float(beta) for beta in group["betas"])
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
        decoupled = isinstance(self.optimizer, AdamW) or group.get("decoupled_weight_decay", False)
        return AdamCoefficients(
            beta1=beta1,
            beta2=beta2,
            eps=float(group["eps"]),
            kappa=1.0 / math.sqrt(1.0 - beta2),
            step_size=lr / (1.0 - beta1**step),
            coupled_decay=0.0 if decoupled else weight_decay,
            shrink=1.0 - lr * weight_decay if decoupled else 1.0,
            sign=-1.0 if group["maximize"] else 1.0,
        )

    @override
    def momentum_decay(self, coefficients: AdamCoefficients) -> float:
        return coefficients.beta1

    @override
    def momentum_(self, out: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, group: Mapping[str, Any]) -> None:
        out.copy_(exp_avg)
        if self.config.space == "update":
            out.div_(self._denominator(self.shared(exp_avg_sq), float(group["eps"])))

    @override
    def exp_avg_(self, out: Tensor, direction: Tensor, exp_avg_sq: Tensor, group: Mapping[str, Any]) -> None:
        if self.config.space == "update":
            direction = self._denominator(self.shared(exp_avg_sq), float(group["eps"])).mul_(direction)
        out.copy_(direction)

    @override
    def local_momentum(
        self, grad: Tensor | None, param: Tensor, exp_avg_sq: Tensor, coefficients: AdamCoefficients, *, keep: bool
    ) -> LocalMomentum:
        c, numel = coefficients, param.numel()
        if grad is None or grad.dtype != self.dtype or c.coupled_decay or c.sign < 0:
            gradient = self._workspace(1, numel)
            gradient.zero_() if grad is None else gradient.copy_(grad).mul_(c.sign)
            if c.coupled_decay:
                decay = self._workspace(0, numel).copy_(param).mul_(c.coupled_decay)
                # A parameter that has diverged stays what it is, as under Adam, but must not get into the errors.
                gradient.add_(decay.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0))
        else:
            gradient = grad
        if self.config.space == "momentum":
            return LocalMomentum(
                gradient=gradient, second_moment=None, decay=c.beta1, weight=1.0 - c.beta1, kappa=LARGEST_VALUE
            )
        return LocalMomentum(
            gradient=gradient,
            second_moment=self._with_late_variance(exp_avg_sq, gradient, c.beta2, keep=keep),
            decay=c.beta1,
            weight=1.0 - c.beta1,
            eps=c.eps,
            kappa=c.kappa,
        )

    @override
    def decay_(self, param: Tensor, coefficients: AdamCoefficients) -> None:
        if coefficients.shrink != 1.0:
            param.mul_(coefficients.shrink)

    @override
    def direction_factor(self, coefficients: AdamCoefficients) -> float:
        return -coefficients.step_size

    @property
    @override
    def only_adds(self) -> bool:
        return self.config.space == "update"

    @override
    def apply_(self, param: Tensor, direction: Tensor, exp_avg_sq: Tensor, coefficients: AdamCoefficients) -> None:
        if self.config.space == "momentum":
            self._estimate_woken_variance_(exp_avg_sq, direction, coefficients)
            direction.div_(self._denominator(exp_avg_sq, coefficients.eps))
        param.add_(direction)

    @override
    def dead(self, exp_avg_sq: Tensor) -> Tensor:
        return (exp_avg_sq == 0) & ~self.private(exp_avg_sq)

    @override
    def shared(self, exp_avg_sq: Tensor) -> Tensor:
        return exp_avg_sq.masked_fill(self.private(exp_avg_sq), WOKEN_VARIANCE) if self._has_late else exp_avg_sq

    @override
    def private(self, exp_avg_sq: Tensor) -> Tensor:
        return torch.signbit(exp_avg_sq)  # without gradients they decay, down to minus zero

    @override
    def wake_(self, exp_avg_sq: Tensor, woken: Tensor) -> None:
        late = self.config.space == "update"
        self._has_late = self._has_late or late
        exp_avg_sq.masked_fill_(woken, -WOKEN_VARIANCE if late else WOKEN_VARIANCE)

    def _with_late_variance(self, exp_avg_sq: Tensor, gradient: Tensor, beta2: float, *, keep: bool) -> Tensor:
        """Second moments to divide by, after an Adam update of the late coordinates (in place if ``keep``)."""
        if not self._has_late:
            return exp_avg_sq
        late = self.private(exp_avg_sq)
        if not late.any():
            return exp_avg_sq
        adapted = exp_avg_sq.mul(beta2).sub_(gradient.square().mul_(1.0 - beta2))  # minus the new variance
        # A square may be beyond the dtype. Under Adam the coordinate would never train again.
        adapted.clamp_(min=torch.finfo(adapted.dtype).min)
        adapted = torch.where(late, adapted, exp_avg_sq)
        if keep:
            exp_avg_sq.copy_(adapted)
        return adapted.abs_()

    def _estimate_woken_variance_(self, exp_avg_sq: Tensor, direction: Tensor, c: AdamCoefficients) -> None:
        """Momentum space only, where D = eps would turn a block's quantization step into a leap.

        The first momentum sent for a woken coordinate is +-scale, which bounds neither its first gradient,
        scale / (1 - beta1), nor its steady one, scale; the variance in the middle of the two is taken.
        """
        woken = exp_avg_sq == WOKEN_VARIANCE
        if c.step_size and woken.any():
            squared_scale = direction.div(c.step_size).square_()
            estimate = (squared_scale / (1.0 - c.beta1)).to(exp_avg_sq.dtype)
            estimate.clamp_(max=torch.finfo(estimate.dtype).max)
            exp_avg_sq.copy_(torch.where(woken & (estimate > 0), estimate, exp_avg_sq))

    def _denominator(self, exp_avg_sq: Tensor, eps: float) -> Tensor:
        """D = sqrt(v_hat) + eps, in workspace 0."""
        out = self._workspace(0, exp_avg_sq.numel())
        source = exp_avg_sq if exp_avg_sq.dtype == out.dtype else out.copy_(exp_avg_sq)
        square_root_(source, out=out)
        return out.add_(eps)

    def _bias_correction2(self, param: Tensor, group: Mapping[str, Any]) -> float:
        return 1.0 - float(group["betas"][1]) ** float(self.optimizer.state[param]["step"])

    def _freezing_correction(self, param: Tensor, group: Mapping[str, Any]) -> float:
        return self._bias_correction2(param, group) or 1.0  # nothing to correct before the first step
