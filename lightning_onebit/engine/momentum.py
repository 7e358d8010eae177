"""What a worker adds to its error at each step, whichever optimizer it comes from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LARGEST_VALUE = 1e30
"""Nothing larger is quantized: scales travel as float32, and what error feedback adds up must stay far below 3e38, or an
infinity would stay in it for ever."""


@dataclass(frozen=True, kw_only=True)
class LocalMomentum:
    """Step 1 of the algorithm for one segment, apart from the last average u, which is kept as bits::

        decay * u + weight * clamp(gradient / (sqrt(second_moment) + eps), -kappa, kappa)

    and ``decay * u + weight * clamp(gradient, -kappa, kappa)`` for a method without preconditioner.
    """

    gradient: Tensor
    """``[numel]``, in the dtype of the errors; only read."""
    second_moment: Tensor | None
    """``[numel]``, float32, float64 or bfloat16; only read. ``None``: no preconditioner."""
    decay: float
    weight: float
    eps: float = 0.0
    kappa: float = float("inf")

    def add_gradient_(self, target: Tensor, workspace: Tensor) -> None:
        """Add the second term to ``target [numel]``, by way of ``workspace [numel]`` of the same dtype."""
        # No fused multiply-add (`alpha=`) anywhere: it rounds differently in vectorized loops and in their
        # remainders, and the result would depend on how a parameter was cut into segments.
        if self.second_moment is None:
            torch.clamp(self.gradient, -self.kappa, self.kappa, out=workspace)
        else:
            moment = self.second_moment
            square_root_(moment if moment.dtype == workspace.dtype else workspace.copy_(moment), out=workspace)
            torch.div(self.gradient, workspace.add_(self.eps), out=workspace)
            workspace.clamp_(-self.kappa, self.kappa)
        target.add_(workspace.mul_(self.weight))


def square_root_(values: Tensor, out: Tensor) -> None:
    """The correctly rounded root of ``values``, to ``out`` of the same dtype.

    torch's on a CPU is MKL's: it rounds a quarter of the numbers in [2, 4) the other way, perhaps others on another
    processor, and takes 28 us for 65536 elements of float32 where numpy's takes 24 us.
    """
    if values.device.type == "cpu":
        np.sqrt(values.numpy(), out=out.numpy())
    else:
        torch.sqrt(values, out=out)
