"""How well the second moment predicts the next gradient: the numbers that a criterion judges by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.freeze.criteria import Ratio
from lightning_onebit.methods import method_for, parameters_of
from lightning_onebit.methods.base import Method

SAMPLE, SAMPLE_OF_TENSOR = 131072, 256
"""About how many elements are looked at, evenly spaced over all, but at least so many of a tensor. rho scatters from step to
step by what the batch does to all elements alike, which more of them would not average out."""

ROUNDING = 4.0
"""What is left of v after taking away the newest square counts from so many units of its last place on."""

NEGLIGIBLE, NEGLIGIBLE_IF_COARSE = 1e-5, 2.0**-8
"""Gradients so much smaller than those of the parameter group in the mean are taken for rounding; the second number where
they are computed with 16 bits, bfloat16's unit of rounding. Those of an attention's key bias, which would be zero, are about
1e-8 of the others, and with bfloat16 2e-4 to 2e-3."""


class _Sample(NamedTuple):
    parameter: Tensor
    step: int
    every: int
    """One in so many elements was taken."""
    gradient: Tensor
    second_moment: Tensor
    """v_hat, with the gradient in it."""


@torch.no_grad()
def gradient_ratios(optimizer: Optimizer, *, negligible: float = NEGLIGIBLE) -> dict[Tensor, Ratio]:
    """Compare the gradient of the step that ``optimizer`` has just made with the second moment from before that step.

    For each parameter tensor T, rho = mean over T of min(a^2, kappa^2), with a = g / D, D = sqrt(v_hat) + eps and
    kappa^2 = 1 / (1 - beta2). v_hat is that of the step before. It need not have been kept: as the newest gradient has
    the weight w = (1 - beta2) / (1 - beta2^t) in a bias-corrected average, v_hat_t = (1 - w) v_hat_(t-1) + w g^2.

    Left out are elements without a gradient before this step, those where eps decides and not v, as sqrt(v_hat) <= eps, and
    those whose gradient is zero but for rounding: the bias of an attention's keys, say.

    Args:
        optimizer: in warm-up, after its step, while ``p.grad`` is what it stepped by. Nothing is modified.
        negligible: elements whose sqrt(v_hat) is so much smaller than that of the group in the mean are left out.

    Returns:
        For parameters with a gradient and an element to compare. Empty without a second moment.
    """
    method = method_for(optimizer)
    ratios: dict[Tensor, Ratio] = {}
    if not method.has_second_moment:
        return ratios
    sparsely = -(-sum(p.numel() for p in parameters_of(optimizer)) // SAMPLE)
    for group in optimizer.param_groups:
        alike: dict[tuple[torch.device, torch.dtype], list[_Sample]] = {}  # what is computed together
        for p in group["params"]:
            sample = _sample(method, group, p, optimizer.state.get(p, {}), sparsely)
            if sample is not None:
                alike.setdefault((p.device, sample.second_moment.dtype), []).append(sample)
        for samples in alike.values():
            eps = method.coefficients(group, 1, num_averaged=1).eps
            ratios.update(_compare(samples, method.second_moment_decay(group), eps, negligible))
    return ratios


def _sample(method: Method, group: Mapping[str, Any], p: Tensor, state: Mapping[str, Any], sparsely: int) -> _Sample | None:
    """Every k-th element, k about ``sparsely``, of the gradient that enters v, and of v_hat after it.

    ``None`` if there is nothing to compare.
    """
    step = method.steps_done(state)
    if p.grad is None or step < 2 or not p.numel():
        return None
    every = max(1, min(sparsely, p.numel() // SAMPLE_OF_TENSOR))
    every += every % 2 == 0  # odd, or of a matrix some columns would never be seen

    def taken(tensor: Tensor) -> Tensor:
        flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
        return flat[::every]

    of_parameter = {key: taken(x) for key, x in state.items() if isinstance(x, Tensor) and x.dim() and x.shape == p.shape}
    second_moment = method.second_moment({**state, **of_parameter}, group)
    assert second_moment is not None
    gradient = taken(p.grad)
    numbers = method.coefficients(group, step, num_averaged=1)
    if numbers.coupled_decay:  # by now the parameter has moved by one step, which makes no difference
        gradient = gradient.add(taken(p), alpha=numbers.sign * numbers.coupled_decay)
    return _Sample(p, step, every, gradient, second_moment.reshape(gradient.shape))


def _compare(samples: list[_Sample], beta2: float, eps: float, negligible: float) -> dict[Tensor, Ratio]:
    """rho of tensors of one device and dtype: in one flat tensor, so that few operations do for many small ones."""
    stored = samples[0].second_moment.dtype
    dtype, device = torch.promote_types(stored, torch.float32), samples[0].gradient.device
    after = torch.cat([sample.second_moment for sample in samples]).to(dtype)
    squares = torch.cat([sample.gradient.to(dtype) for sample in samples]).square_()
    lengths = torch.tensor([sample.gradient.numel() for sample in samples], device=device)
    weights = [(1.0 - beta2) / (1.0 - beta2**sample.step) for sample in samples]
    w = torch.tensor(weights, dtype=dtype, device=device).repeat_interleave(lengths, output_size=len(after))
    before = (after - w * squares).div_(1.0 - w)  # v_hat_(t-1)
    is_nan = after.isfinite().logical_not_()
    smallest = (negligible**2 * before.masked_fill(is_nan, 0.0).mean()).clamp_(min=eps**2)
    counts = (before > ROUNDING * torch.finfo(stored).eps * after).logical_and_(before > smallest).logical_or_(is_nan)
    a_squared = squares.div_(before.clamp_(min=0.0).sqrt_().add_(eps).square_()).clamp_(max=1.0 / (1.0 - beta2))
    a_squared = a_squared.masked_fill_(counts.logical_not(), 0.0).masked_fill_(is_nan, math.nan)
    sums = torch.segment_reduce(torch.stack([a_squared, counts.to(dtype)]), "sum", lengths=lengths.repeat(2, 1), axis=1)
    return {
        sample.parameter: Ratio(mean=total / count, numel=round(count) * sample.every, steps=sample.step - 1)
        for sample, total, count in zip(samples, *sums.tolist(), strict=True)
        if count
    }
