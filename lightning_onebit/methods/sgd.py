"""SGD with momentum (1-bit SGD: Seide, Fu, Droppo, Li and Yu, Interspeech 2014, with the momentum before the quantizer).

There is nothing to divide by, so D is absent and nothing is clamped: beta = momentum, w = 1 - dampening, eta = lr. Linear in
the gradients from the first step on, it needs no warm-up. Without momentum, and with a constant learning rate, the
parameters are those of exact SGD but for lr times the error that is left: x_t = x_0 - lr sum_s mean(g_s) + lr e_t.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import SGD
from typing_extensions import override

from lightning_onebit.coefficients import Coefficients
from lightning_onebit.methods.base import Method


class SGDMethod(Method):
    """1-bit SGD, on the state of ``torch.optim.SGD``."""

    optimizer_types = (SGD,)
    has_second_moment = False
    counts_steps = False

    @override
    def coefficients(self, group: Mapping[str, Any], step: int, *, num_averaged: int) -> Coefficients:
        momentum = float(group["momentum"])
        # torch ignores dampening at the first step, and without momentum.
        is_dampened = momentum != 0.0 and step > 1
        return Coefficients(
            beta=momentum,
            weight=1.0 - float(group["dampening"]) if is_dampened else 1.0,
            sign=-1.0 if group["maximize"] else 1.0,
            coupled_decay=float(group["weight_decay"]),
            step_size=float(group["lr"]),
            nesterov=momentum if group["nesterov"] else 0.0,
        )

    @override
    def steps_done(self, state: Mapping[str, Any]) -> int:
        return int(self.momentum(state) is not None)  # all that matters is whether it is the first

    @override
    def momentum(self, state: Mapping[str, Any]) -> Tensor | None:
        return state.get("momentum_buffer")

    @override
    def stock_state(
        self, momentum: Tensor, second_moment: Tensor | None, param: Tensor, group: Mapping[str, Any], step: int
    ) -> dict[str, Any]:
        has_buffer = float(group["momentum"]) != 0.0 and step > 0
        return {"momentum_buffer": momentum.to(param.dtype) if has_buffer else None}
