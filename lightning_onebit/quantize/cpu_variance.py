"""The renewal of the second moment for CPUs: the functions of the reference, span by span, in a workspace that is kept.

What every step does (:func:`add_decoded_rms`, :func:`renew_second_moment_`) is vectorized passes over what is in cache
anyway. A refresh is rarer, and may allocate a few arrays of the size of a span.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_onebit.coefficients import LARGEST_RESCALING
from lightning_onebit.quantize.logarithm import (
    LARGEST_CODE,
    LARGEST_FLOAT32,
    LOG_STEP,
    SMALLEST_NORMAL_BITS,
    bits_of,
)
from lightning_onebit.quantize.memory import BucketMemory, Messages
from lightning_onebit.quantize.spans import Numbers, RmsCode, SpanViews, rms_code, span_views
from lightning_onebit.quantize.workspace import Memory, Workspace


def add_decoded_rms(part: SpanViews, eps: Numbers, work: Workspace) -> None:
    """``work.reals = rms + eps``, from the code of D. Where an element is not live, any positive number."""
    assert part.rms_code is not None
    _decode_rms(part.rms_code, part, eps, work)


def _decode_rms(code: RmsCode, part: SpanViews, eps: Numbers, work: Workspace) -> None:
    """``work.reals``: what codes decode to, and eps; for code 0, any positive number."""
    _decode_positive(code, part, work)
    if work.reals.dtype != torch.float32:
        work.reals.copy_(work.floats)
    np.add(work.reals_array, part.per_element(eps), out=work.reals_array)


def renew_second_moment_(part: SpanViews, term: Tensor, square_decay: Numbers) -> None:
    """``v_i = square_decay v_i + term^2``, at most the largest finite number. ``term`` is overwritten."""
    assert part.second_moment is not None
    v = part.second_moment
    term.mul_(term)
    array = v.numpy()
    np.multiply(array, part.per_element(square_decay), out=array)
    if not float(v.add_(term).amax()) < math.inf:  # to look is faster than to write
        v.clamp_(max=torch.finfo(v.dtype).max)


def encode_variance_(memory: BucketMemory, messages: Messages, correction: NDArray[np.float64], workspace: Memory) -> None:
    """As the reference."""
    for part in span_views(memory, memory.share):
        work = workspace.cut(part.shape)
        _corrected_second_moment(work.values, part, correction)
        _code_(_views(messages, messages.sent, memory.share.start, part), part, work)


def serve_variance_(memory: BucketMemory, messages: Messages, workspace: Memory) -> None:
    """As the reference."""
    assert memory.chunk is not None
    for part in span_views(memory, range(memory.chunk, memory.chunk + 1)):
        work = workspace.cut(part.shape)
        assert part.second_moment_residual is not None
        mean, c = work.out.zero_(), work.values
        for message in messages.received.view(len(memory.share), -1):
            _decode_square(rms_code(*_views(messages, message, memory.chunk, part)), part, work)
            mean.add_(work.reals.mul_(1 / len(memory.share)))
        torch.add(mean, part.second_moment_residual, out=c)
        _bound_(c, mean, work)
        part.second_moment_residual.copy_(c)
        served = _views(messages, messages.served, memory.chunk, part)
        _code_(served, part, work)
        _decode_square(rms_code(*served), part, work)
        part.second_moment_residual.sub_(work.reals)


def apply_variance_(memory: BucketMemory, messages: Messages, correction: NDArray[np.float64], workspace: Memory) -> None:
    """As the reference."""
    for part in span_views(memory, memory.share):
        work = workspace.cut(part.shape)
        assert part.second_moment is not None
        v_hat, renewed = work.values, work.out
        _corrected_second_moment(v_hat, part, correction)
        _decode_square(rms_code(*_views(messages, messages.sent, memory.share.start, part)), part, work)
        v_hat.sub_(work.reals)
        _decode_square(rms_code(*_views(messages, messages.result, 0, part)), part, work)
        v_hat.add_(renewed.copy_(work.reals))
        _bound_(v_hat, renewed, work)
        np.divide(v_hat.numpy(), part.per_element(numbers_of(part, correction)), out=part.second_moment.numpy())
    assert memory.rms_code is not None
    assert memory.rms_scale is not None
    for chunk in range(memory.layout.num_chunks):
        first, last = memory.layout.blocks_of(range(chunk, chunk + 1))
        if first < last:
            codes, scales = messages.views(messages.result, 0, (first, last))
            memory.rms_code[slice(*memory.layout.flat_of(range(chunk, chunk + 1)))].copy_(codes)
            memory.rms_scale[first:last].copy_(scales)


def _views(messages: Messages, buffer: Tensor, first_chunk: int, part: SpanViews) -> tuple[Tensor, Tensor]:
    codes, scales = messages.views(buffer, first_chunk, (part.span.first, part.span.last))
    return codes[: part.shape.numel], scales


def rescaling_less_one(messages: Messages, part: SpanViews, eps: NDArray[np.float64], work: Workspace) -> Tensor:
    """``min(D_old / D_new, 1.25) - 1``, in ``work.values``; 0 where an element has no D before or now."""
    change, eps_of = work.values, numbers_of(part, eps)
    new, old = rms_code(*_views(messages, messages.result, 0, part)), part.rms_code
    assert old is not None
    _decode_rms(old, part, eps_of, work)
    change.copy_(work.reals)
    _decode_rms(new, part, eps_of, work)
    change.div_(work.reals).clamp_(max=LARGEST_RESCALING).sub_(1.0)
    for codes, _ in (new, old):
        np.equal(codes, 0, out=work.bits)
        np.copyto(change.numpy(), 0, where=work.bits)
    return change


def numbers_of(part: SpanViews, numbers: NDArray[np.float64]) -> Numbers:
    """Of all parameters' numbers, those of a span's: one, if they are equal."""
    own = numbers[list(part.span.parameters)]
    return float(own[0]) if (own == own[0]).all() else own


def _corrected_second_moment(out: Tensor, part: SpanViews, correction: NDArray[np.float64]) -> None:
    """v_hat_i."""
    assert part.second_moment is not None
    factor = part.per_element(numbers_of(part, correction))
    # By torch: numpy would warn of an overflow.
    torch.mul(part.second_moment, factor if isinstance(factor, float) else torch.from_numpy(factor), out=out)
    out.clamp_(max=torch.finfo(out.dtype).max)


def _bound_(v: Tensor, agreed: Tensor, work: Workspace) -> None:
    """``v`` within ``[agreed / 2, 2 agreed]``, and finite."""
    torch.maximum(v, torch.mul(agreed, 0.5, out=work.reals), out=v)
    torch.minimum(v, torch.mul(agreed, 2.0, out=work.reals).clamp_(max=torch.finfo(v.dtype).max), out=v)


def _code_(target: tuple[Tensor, Tensor], part: SpanViews, work: Workspace) -> None:
    """Codes and scales of ``sqrt(work.values)``, to ``target``."""
    codes, scales = target[0].numpy(), target[1]
    np.sqrt(work.values.numpy(), out=work.reals_array)
    if work.reals.dtype != torch.float32:
        work.floats.copy_(work.reals.clamp_(max=LARGEST_FLOAT32))
    scales.numpy()[:] = np.maximum.reduceat(work.floats.numpy(), part.shape.block_starts)
    x, steps = work.ints_array, work.ints_array
    np.not_equal(x, 0, out=work.bits)
    np.subtract(part.spread(bits_of(scales).numpy() + LOG_STEP // 2), x, out=steps)
    np.floor_divide(steps, LOG_STEP, out=steps)
    work.ints.clamp_(max=LARGEST_CODE - 1)
    np.subtract(LARGEST_CODE, steps, out=codes, casting="unsafe")
    np.multiply(codes, work.bits, out=codes)


def _decode_square(code: RmsCode, part: SpanViews, work: Workspace) -> None:
    """``work.reals``: squares of what ``code`` decodes to."""
    _decode_positive(code, part, work)
    np.equal(code.codes, 0, out=work.bits)
    np.copyto(work.ints_array, 0, where=work.bits)
    if work.reals.dtype != torch.float32:
        work.reals.copy_(work.floats)
    work.reals.mul_(work.reals)


def _decode_positive(code: RmsCode, part: SpanViews, work: Workspace) -> None:
    """``work.floats``: what codes decode to; for code 0, any positive number."""
    np.subtract(code.scale_bits, LARGEST_CODE * LOG_STEP, out=work.lowest)  # of code 0, if there were one
    np.copyto(work.ints_array, code.codes)
    if work.shape.numels is None:
        for rows, of_blocks in zip(work.int_rows, work.lowest_columns, strict=True):
            torch.add(of_blocks, rows, alpha=LOG_STEP, out=rows)
    else:
        np.multiply(work.ints_array, LOG_STEP, out=work.ints_array)
        np.add(work.ints_array, part.spread(work.lowest), out=work.ints_array)
    if int(work.lowest.min()) < SMALLEST_NORMAL_BITS:
        work.ints.clamp_(min=SMALLEST_NORMAL_BITS)
