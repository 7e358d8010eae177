"""Spans of a bucket for CPUs: blocks that are worked on in one call, with their views of the bucket's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_onebit.coefficients import Coefficients
from lightning_onebit.quantize.layout import BITS_PER_BYTE, Span
from lightning_onebit.quantize.logarithm import bits_of
from lightning_onebit.quantize.memory import BucketMemory, StepInputs
from lightning_onebit.quantize.workspace import SpanShape

Numbers: TypeAlias = "float | NDArray[np.floating]"
"""One for all, or one for each."""


class EncodedSpan(NamedTuple):
    """Quantized blocks of a span: arrays that are an :class:`~lightning_onebit.quantize.memory.Encoded`."""

    signs: NDArray[np.uint8]
    scales: NDArray[np.float32]


class RmsCode(NamedTuple):
    """D of a span, or what a message says of it: codes, and the bits of their scales."""

    codes: NDArray[np.uint8]
    scale_bits: NDArray[np.int32]


@dataclass(eq=False)
class SpanViews:
    """A span and its views of a bucket's memory, made once: to make them takes longer than to work on 1000 elements. What a
    span does not have on this rank is missing."""

    span: Span
    shape: SpanShape
    flat: slice
    """Its elements in the bucket's memory."""
    members: list[tuple[int, slice, slice]]
    """Of each parameter: index, elements of it, their place in the span."""
    are_whole: list[bool]
    """Of each parameter, whether all its elements are here."""
    results: list[EncodedSpan]
    member_of_block: NDArray[np.int64]
    """Which of the parameters each block belongs to."""
    real: np.dtype[np.floating]
    """dtype of the errors."""
    error: Tensor | None = None
    rms: NDArray[np.floating] | None = None
    rms_code: RmsCode | None = None
    second_moment: Tensor | None = None
    sent: EncodedSpan | None = None
    server_error: Tensor | None = None
    second_moment_residual: Tensor | None = None
    received: Sequence[EncodedSpan] = ()
    served: EncodedSpan | None = None
    _splits: dict[int, list[Tensor]] = field(default_factory=dict)
    _coefficients: tuple[NDArray[np.float64], Coefficients] | None = None
    """The numbers of all parameters in a step, and what this span makes of them."""

    def coefficients(self, step: StepInputs) -> Coefficients:
        """The numbers of a span, looked at once in a step. Where its parameters differ, an array ``[parameters]`` takes the
        place of a number."""
        if self._coefficients is None or self._coefficients[0] is not step.numbers:
            self._coefficients = step.numbers, self._coefficients_of(step)
        return self._coefficients[1]

    def _coefficients_of(self, step: StepInputs) -> Coefficients:
        rows = step.numbers[self.span.parameters[0]] if len(self.members) == 1 else step.numbers[list(self.span.parameters)]
        if rows.ndim == 1:
            return Coefficients(*rows.tolist())
        same = (rows == rows[0]).all(axis=0)
        columns = (float(rows[0, j]) if same[j] else rows[:, j] for j in range(rows.shape[1]))
        return Coefficients(*columns)  # type: ignore[arg-type]

    def per_block(self, numbers: Numbers) -> Numbers:
        """A number as it is, an array of parameters spread over blocks."""
        return numbers if isinstance(numbers, float) else numbers[self.member_of_block]

    def per_element(self, numbers: Numbers) -> Numbers:
        """A number as it is, an array of parameters spread over elements, padding included."""
        if isinstance(numbers, float):
            return float(numbers)  # numpy's own would be a float64
        rounded = numbers.astype(self.real)  # as torch and numpy round a number
        return self.spread(rounded[self.member_of_block])

    def spread(self, by_block: NDArray[Any]) -> NDArray[Any]:
        """What blocks have, ``[blocks]``, spread over their elements, padding included."""
        return np.repeat(by_block, self.shape.elements_of_block)

    def split(self, values: Tensor) -> list[Tensor]:
        """Views of ``values``, a tensor of the workspace, for each parameter. They are kept."""
        views = self._splits.get(values.data_ptr())
        if views is None:
            views = self._splits[values.data_ptr()] = [values[place] for _, _, place in self.members]
        return views


def span_views(memory: BucketMemory, chunks: range) -> list[SpanViews]:
    """The spans of neighbouring chunks, made at the first call."""
    cache: dict[range, list[SpanViews]] = memory.kept_views.setdefault("spans", {})
    if chunks not in cache:
        spans = memory.layout.spans(chunks, memory.parameter_numels)
        cache[chunks] = [_make_views(memory, span) for span in spans]
    return cache[chunks]


def _make_views(memory: BucketMemory, span: Span) -> SpanViews:
    layout, blocks = memory.layout, (span.first, span.last)
    start, stop = int(layout.offset[span.first]), int(layout.offset[span.last])
    members = []
    for p, group in groupby(range(*blocks), key=lambda block: int(layout.parameter[block])):
        own = list(group)
        first, numel = int(layout.start[own[0]]), int(layout.numel[own].sum())
        place = int(layout.offset[own[0]]) - start
        members.append((p, slice(first, first + numel), slice(place, place + numel)))
    numel = stop - start if span.is_packed else int(layout.numel[span.first : span.last].sum())
    numels = tuple(layout.numel[span.first : span.last].tolist()) if span.is_packed else None
    flat = slice(start, stop)
    changes = np.flatnonzero(np.diff(layout.parameter[span.first : span.last]))
    views = SpanViews(
        span=span,
        shape=SpanShape(layout.block_size, numel, numels),
        flat=flat,
        members=members,
        are_whole=[elements.stop - elements.start == memory.parameter_numels[p] for p, elements, _ in members],
        member_of_block=np.searchsorted(changes, np.arange(span.last - span.first)),
        real=memory.error.numpy().dtype,
        results=[_encoded(memory, result, 0, blocks) for result in memory.results],
    )
    if memory.rms is not None:
        views.rms = memory.rms[start:][:numel].numpy()
    if memory.rms_code is not None and memory.rms_scale is not None:
        views.rms_code = rms_code(memory.rms_code[start:][:numel], memory.rms_scale[slice(*blocks)])
    first, last = memory.share_blocks
    if first <= span.first and span.last <= last:
        shift = memory.share_flat.start
        views.error = memory.error[start - shift :][:numel]
        if memory.second_moment is not None:
            views.second_moment = memory.second_moment[start - shift :][:numel]
        views.sent = _encoded(memory, memory.sent, memory.share.start, blocks)
    if memory.chunk is not None and memory.chunk_blocks[0] <= span.first and span.last <= memory.chunk_blocks[1]:
        views.server_error = memory.server_error[start - memory.chunk_flat.start :][:numel]
        if memory.second_moment_residual is not None:
            views.second_moment_residual = memory.second_moment_residual[start - memory.chunk_flat.start :][:numel]
        messages = memory.received.view(len(memory.share), -1)
        views.received = [_encoded(memory, message, memory.chunk, blocks) for message in messages]
        views.served = _encoded(memory, memory.served, memory.chunk, blocks)
    return views


def _encoded(memory: BucketMemory, messages: Tensor, first_chunk: int, blocks: tuple[int, int]) -> EncodedSpan:
    signs, scales = memory.encoded(messages, first_chunk, blocks)
    return EncodedSpan(signs.numpy(), scales.numpy())


def rms_code(codes: Tensor, scales: Tensor) -> RmsCode:
    """Of uint8 ``[elements]`` and float32 ``[blocks]``: the same memory."""
    return RmsCode(codes.numpy(), bits_of(scales).numpy())


def parts_of(memory: BucketMemory, view: SpanViews) -> list[SpanViews]:
    """A packed span cut into its parameters, made at the first call."""
    cache: dict[Span, list[SpanViews]] = memory.kept_views.setdefault("parts of spans", {})
    if view.span not in cache:
        parameter, first, parts = memory.layout.parameter, view.span.first, []
        for block in range(view.span.first + 1, view.span.last + 1):
            if block == view.span.last or parameter[block] != parameter[first]:
                parts.append(_make_views(memory, Span(first, block, (int(parameter[first]),), view.span.is_packed)))
                first = block
        cache[view.span] = parts
    return cache[view.span]


def active_parts(memory: BucketMemory, view: SpanViews, step: StepInputs, *, check: bool) -> Iterator[SpanViews]:
    """What of a span is worked on: all of it, unless some of its parameters sit out.

    Args:
        memory: the bucket.
        view: a span.
        step: which parameters are active.
        check: whether it is known which parameters are active: those that are not are left out.
    """
    whole = not check or len(view.members) == 1 or all_active(view, step)
    for part in [view] if whole else parts_of(memory, view):
        if not check or all_active(part, step):
            yield part


def all_active(view: SpanViews, step: StepInputs) -> bool:
    if step.active is None:
        step.active = step.is_active.numpy()
    return step.all_are_active or all(step.active[p] for p, _, _ in view.members)


def any_number(numbers: Numbers) -> bool:
    """Whether a number, or one of several that differ, is not 0."""
    return not isinstance(numbers, float) or numbers != 0.0


def last_average(memory: BucketMemory, part: SpanViews) -> EncodedSpan:
    return part.results[memory.current]


def average_before(memory: BucketMemory, part: SpanViews) -> EncodedSpan:
    return part.results[memory.current - 1]


def live_bits(live: Tensor | None, part: SpanViews) -> NDArray[np.uint8] | None:
    """Which elements of a span take part in their blocks, uint8 ``[bytes]``; ``None`` if all of them do, without padding."""
    if live is None:
        return None
    bits = live[part.flat.start // BITS_PER_BYTE : part.flat.stop // BITS_PER_BYTE] & part.shape.inside
    return None if torch.equal(bits, part.shape.inside) else bits.numpy()


def gather_(out: Tensor, part: SpanViews, tensors: Sequence[Tensor | None]) -> Tensor:
    """The elements of a span's parameters, in ``out``: those of ``None`` are zero."""
    sources, targets = [], []
    for (p, elements, _), is_whole, target in zip(part.members, part.are_whole, part.split(out), strict=True):
        tensor = tensors[p]
        if tensor is None:
            target.zero_()
        else:
            sources.append(tensor if is_whole else tensor[elements])
            targets.append(target)
    if sources:
        torch._foreach_copy_(targets, sources)
    return out
