"""The sketch of preconditioned gradients for CPUs: vectorized passes over spans that fit in cache.

Sums are float64, of numbers that are not truncated before. The sketch of a part of a tensor is the sum of the rows of a
matrix of 251 columns, by BLAS.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_onebit.quantize.cpu_variance import add_decoded_rms
from lightning_onebit.quantize.memory import BucketMemory, StepInputs
from lightning_onebit.quantize.spans import SpanViews
from lightning_onebit.quantize.tensor_sketch import PIECE_NUMEL, ROWS_PER_PIECE, WIDTH, TensorSketch
from lightning_onebit.quantize.workspace import Workspace


class SketchWorkspace:
    """Memory in which spans of up to ``numel`` elements are sketched, allocated once."""

    def __init__(self, numel: int) -> None:
        rows = numel // WIDTH + 2
        self.values = torch.empty(rows * WIDTH, dtype=torch.float64)
        self._of: TensorSketch | None = None
        self._signs = self.values

    def signs(self, sketch: TensorSketch, dtype: torch.dtype) -> Tensor:
        """The table of signs, in the dtype of what is multiplied."""
        if self._of is not sketch or self._signs.dtype != dtype:
            self._of, self._signs = sketch, sketch.signs.to(dtype)
        return self._signs


def add_span_(
    sketch: TensorSketch,
    memory: BucketMemory,
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
        memory: the bucket.
        part: the span, of which all parameters are active.
        step: which of them have a gradient, and their numbers.
        gradient: of the span, in any dtype.
        work: of its shape.
        space: likewise to be overwritten.
        gathered: whether ``gradient`` is the mean of the node, of which all parameters have one.
    """
    c, a, array = part.coefficients(step), work.reals, work.reals_array
    if memory.rms_code is None:
        assert memory.rms is not None
        rms = memory.rms[part.flat][: part.shape.numel].numpy()
        np.add(rms, part.per_element(c.eps), out=array)
        nonzero = rms
    else:
        add_decoded_rms(memory, part, c.eps, work)
        nonzero = memory.rms_code[part.flat][: part.shape.numel].numpy()
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

    for p, elements, place in part.members:
        if not gathered and step.gradients[p] is None:
            continue
        # The span of one large parameter has no padding at all, and a packed one some at the end of each block.
        numel = elements.stop - elements.start
        own = slice(place.start, place.start + numel)
        squares = _add_(sketch, p, elements.start, a[own], space)
        sums = sketch.sums[:, p]
        sums[0] += squares
        sums[2] += int(np.count_nonzero(nonzero[own]))
        if reaches:
            sums[3] += int(np.count_nonzero(work.bits[own]))


def _add_(sketch: TensorSketch, tensor: int, start: int, values: Tensor, space: SketchWorkspace) -> float:
    """Add elements of a tensor from number ``start`` on, and overwrite them; their sum of squares."""
    numel, done, first_piece = values.numel(), 0, int(sketch.first_piece[tensor])
    signs = space.signs(sketch, values.dtype)
    while done < numel:
        piece, offset = divmod(start + done, PIECE_NUMEL)
        place = int(sketch.draws[first_piece + piece, 0]) + offset
        part = values[done : done + PIECE_NUMEL - offset]
        part.mul_(signs[place : place + part.numel()])
        done += part.numel()
    row, first = divmod(start, WIDTH)
    rows = -(-(first + numel) // WIDTH)
    row += first_piece * ROWS_PER_PIECE
    row_signs = sketch.row_signs[row : row + rows]
    matrix = space.values[: rows * WIDTH]
    if first:
        matrix[:first] = 0.0
    matrix[first : first + numel].copy_(values)
    matrix[first + numel :] = 0.0
    if rows == 1:
        sketch.values[tensor].add_(matrix, alpha=int(row_signs[0]))
    else:
        sketch.values[tensor].addmv_(matrix.view(rows, WIDTH).t(), torch.from_numpy(row_signs).double())
    return float(torch.dot(matrix, matrix))
