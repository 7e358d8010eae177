"""The sketch of preconditioned gradients for CPUs: vectorized passes over spans that fit in cache.

Sums are float64, of numbers that are not truncated before. The sketch of a part of a tensor is the sum of the rows of a
matrix of 251 columns, by BLAS.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_onebit.quantize.cpu_variance import add_decoded_rms
from lightning_onebit.quantize.memory import StepInputs
from lightning_onebit.quantize.spans import SpanViews
from lightning_onebit.quantize.tensor_sketch import ROWS_PER_SEGMENT, SEGMENT_NUMEL, WIDTH, TensorSketch
from lightning_onebit.quantize.workspace import Workspace

SMALL_NUMEL = 8192
"""What has no more elements is added by numpy, in fewer calls, on one thread."""


class SketchWorkspace:
    """Memory in which parts of tensors are sketched, segment by segment, allocated once."""

    def __init__(self) -> None:
        self.values = np.empty(SEGMENT_NUMEL, dtype=np.float64)
        self._of: TensorSketch | None = None
        self._signs: NDArray[np.floating] = self.values

    def signs(self, sketch: TensorSketch, dtype: np.dtype[np.floating]) -> NDArray[np.floating]:
        """The table of signs, in the dtype of what is multiplied."""
        if self._of is not sketch or self._signs.dtype != dtype:
            self._of, self._signs = sketch, sketch.sign_table.astype(dtype)
        return self._signs


def add_span_(
    sketch: TensorSketch,
    part: SpanViews,
    step: StepInputs,
    gradient: Tensor,
    work: Workspace,
    space: SketchWorkspace,
    *,
    gathered: bool,
) -> None:
    """Add a span.

    Args:
        sketch: of all tensors; float64.
        part: the span, of which all parameters are active.
        step: which of them have a gradient, and their numbers.
        gradient: of the span, in any dtype.
        work: of its shape.
        space: likewise to be overwritten.
        gathered: whether ``gradient`` is the mean of the node, of which all parameters have one.
    """
    c, a, array = part.coefficients(step), work.reals, work.reals_array
    nonzero: NDArray[Any]
    if part.rms_code is None:
        assert part.rms is not None
        np.add(part.rms, part.per_element(c.eps), out=array)
        nonzero = part.rms
    else:
        add_decoded_rms(part, c.eps, work)
        nonzero = part.rms_code.codes
    torch.div(gradient, a, out=a)
    if np.count_nonzero(nonzero) < len(nonzero):  # not live, or padding
        np.copyto(array, 0, where=np.equal(nonzero, 0, out=work.bits))
    kappa = part.per_element(c.kappa)
    smallest, largest = torch.aminmax(a)
    bound = float(np.min(kappa).astype(array.dtype))
    reaches = not (-bound < float(smallest) and float(largest) < bound)
    if reaches:
        np.clip(array, -kappa, kappa, out=array)
        np.greater_equal(np.abs(array), kappa, out=work.bits)

    sums = sketch.sums.numpy()
    for p, elements, place in part.members:
        if not gathered and step.gradients[p] is None:
            continue
        # The span of one large parameter has no padding at all, and a packed one some at the end of each parameter.
        own = slice(place.start, place.start + elements.stop - elements.start)
        sums[0, p] += _add_(sketch, p, elements.start, array[own], space)
        sums[2, p] += np.count_nonzero(nonzero[own])
        if reaches:
            sums[3, p] += np.count_nonzero(work.bits[own])


def _add_(sketch: TensorSketch, tensor: int, start: int, values: NDArray[np.floating], space: SketchWorkspace) -> float:
    """Add elements of a tensor from number ``start`` on; their sum of squares."""
    sketched, signs = sketch.values[tensor], space.signs(sketch, values.dtype)
    first_segment, done, squares = int(sketch.first_segment[tensor]), 0, 0.0
    while done < len(values):
        segment, offset = divmod(start + done, SEGMENT_NUMEL)
        part = values[done : done + SEGMENT_NUMEL - offset]
        place = int(sketch.draws[first_segment + segment, 0]) + offset
        row, first = divmod(offset, WIDTH)
        rows, end = -(-(first + len(part)) // WIDTH), first + len(part)
        matrix = space.values[: rows * WIDTH]
        matrix[:first] = 0.0
        np.multiply(part, signs[place : place + len(part)], out=matrix[first:end])
        matrix[end:] = 0.0
        row += (first_segment + segment) * ROWS_PER_SEGMENT
        row_signs = sketch.row_signs[row : row + rows].astype(np.float64)
        if len(part) <= SMALL_NUMEL:
            total = sketched.numpy()
            np.add(total, row_signs @ matrix.reshape(rows, WIDTH), out=total)
            squares += float(matrix @ matrix)
        else:  # by torch, whose number of threads is what the user has set
            flat = torch.from_numpy(matrix)
            sketched.addmv_(flat.view(rows, WIDTH).t(), torch.from_numpy(row_signs))
            squares += float(torch.dot(flat, flat))
        done += len(part)
    return squares
