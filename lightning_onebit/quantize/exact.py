"""The same interface for a single rank, which sends nothing: exact steps with the same D and clamp."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_onebit.coefficients import LARGEST_EXACT_RESCALING, RefreshNumbers
from lightning_onebit.quantize.logarithm import square_root_
from lightning_onebit.quantize.memory import BucketMemory, Messages, StepInputs
from lightning_onebit.quantize.reference import unpack_bits
from lightning_onebit.quantize.tensor_sketch import TensorSketch


class ExactKernels:
    """Steps 1 and 6 without quantization. The worker error, which a single rank does not have, holds u itself."""

    name = "exact"
    reads_flags_on_device = False
    sketch_dtype = torch.float64

    def __init__(self) -> None:
        self._before: dict[int, Tensor] = {}

    def encode_(self, memory: BucketMemory, index: int, step: StepInputs, *, commit: bool) -> None:
        """Step 1: ``u = beta u + weight clamp((sign g + coupled_decay x) / D, +-kappa)``, in ``memory.error``."""
        assert commit
        self._before = {}
        live = None if memory.live is None else unpack_bits(memory.live)
        for p, elements, flat in _parts(memory, step):
            c, u, gradient = step.coefficients(p), memory.error[flat], step.gradients[p]
            if c.nesterov:
                self._before[flat.start] = u.clone()
            a = torch.zeros_like(u) if gradient is None else gradient[elements].to(u.dtype, copy=True).mul_(c.sign)
            if c.coupled_decay:
                decay = step.params[p][elements].to(u.dtype) * c.coupled_decay
                a.add_(decay.nan_to_num_(0.0, 0.0, 0.0))
            if memory.second_moment is not None:  # Adam's own, as r = 1; the same elements as of memory.error
                term = a * c.square_root_weight
                v = memory.second_moment[flat].mul_(c.square_decay).add_(term.square_())
                v.clamp_(max=torch.finfo(v.dtype).max)
            if memory.rms is not None:
                a.div_(memory.rms[flat] + c.eps)
            a.clamp_(-c.kappa, c.kappa)
            if memory.rms is not None and live is not None:
                a.masked_fill_(~live[flat], 0.0)
            u.mul_(c.beta).add_(a.mul_(c.weight))

    def serve_(self, memory: BucketMemory, step: StepInputs, *, commit: bool) -> None:
        """Nothing to serve."""

    def encode_variance_(self, memory: BucketMemory, messages: Messages, correction: NDArray[np.float64]) -> None:
        """Nothing is sent."""

    def serve_variance_(self, memory: BucketMemory, messages: Messages) -> None:
        """Nothing to serve."""

    def apply_variance_(self, memory: BucketMemory, messages: Messages | None, numbers: RefreshNumbers) -> None:
        """``rms = sqrt(v correction)``, with the rank's own v, and ``u = u min(D_old / D_new, 4)``."""
        assert memory.second_moment is not None
        assert memory.rms is not None
        layout, largest = memory.layout, torch.finfo(memory.dtype).max
        for p, first, last in layout.parameter_blocks():
            flat = slice(int(layout.offset[first]), int(layout.offset[last]))
            rms, eps = memory.rms[flat], float(numbers.eps[p])
            old = rms.clone()
            torch.mul(memory.second_moment[flat], float(numbers.correction[p]), out=rms)
            square_root_(rms.clamp_(max=largest), out=rms)
            rescaling = ((old + eps) / (rms + eps)).clamp_(max=LARGEST_EXACT_RESCALING)
            memory.error[flat].mul_(torch.where((old > 0) & (rms > 0), rescaling, 1.0))

    def sketch_tensors_(self, memory: BucketMemory, index: int, step: StepInputs, sketch: TensorSketch) -> None:
        """A single rank has the mean itself."""

    def apply_(self, memory: BucketMemory, index: int, step: StepInputs, *, commit: bool) -> None:
        """Step 6: ``x = shrink x - step_size ((1 + nesterov) u - nesterov u_before)``."""
        for p, elements, flat in _parts(memory, step):
            c, x = step.coefficients(p), step.params[p][elements]
            move = memory.error[flat] * (-c.step_size * (1 + c.nesterov))
            if c.nesterov:
                move.add_(self._before[flat.start] * (c.step_size * c.nesterov))
            x.mul_(c.shrink).add_(move)


def _parts(memory: BucketMemory, step: StepInputs) -> Iterator[tuple[int, slice, slice]]:
    """Neighbouring blocks of one active parameter: its index, elements of it, their place in the bucket's memory."""
    layout = memory.layout
    for p, first, last in layout.parameter_blocks():
        if step.active is not None and not step.active[p]:
            continue
        start, place, numel = int(layout.start[first]), int(layout.offset[first]), int(layout.numel[first:last].sum())
        yield p, slice(start, start + numel), slice(place, place + numel)
