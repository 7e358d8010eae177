"""The norm of the mean gradient, from gradients that nobody averages.

A random-sign sketch (the count sketch of Charikar, Chen and Farach-Colton, 2002; as a norm estimator: Alon, Matias and
Szegedy, 1996): each element is multiplied by a random sign and added to one of k buckets. The map is linear, so the mean of
the ranks' sketches is the sketch of their mean; and the squared norm of a sketch estimates that of the vector without
bias, with a relative standard deviation of at most sqrt(2 / k), 1.1% for k = 16384 (half of that for the norm).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

SKETCH_NUMEL = 16384
ROWS_AT_ONCE = 4
"""Rows of a gradient that are folded together: 256 KiB, to stay in cache."""


class NormSketch:
    """A sketch of a list of tensors, seen as one long vector.

    Element e lies in column e mod k of row e div k; the column is its bucket. Row r takes its signs from a row of k random
    ones, rotated by r; after k rotations a new one is drawn. So all elements of a bucket have independent signs.

    Args:
        seed: determines the signs: the same on all ranks, another at every step.
        device: where the tensors are.
        numel: k, the number of buckets.
    """

    def __init__(self, seed: int, *, device: torch.device, numel: int = SKETCH_NUMEL) -> None:
        self.numel = numel
        self.buckets = torch.zeros(numel, dtype=torch.float32, device=device)
        """The sketch: float32 ``[k]``. Average it over the ranks before :meth:`norm`."""
        self._generator = torch.Generator().manual_seed(seed)
        self._turn = -1
        self._draw_row_()
        self._element = 0

    def add_(self, tensors: Iterable[Tensor | None], numels: Iterable[int]) -> None:
        """Append tensors to the vector.

        Args:
            tensors: floating point, any shape; ``None`` stands for zeros.
            numels: their numbers of elements, the same on all ranks: they fix every element's place.
        """
        for tensor, numel in zip(tensors, numels, strict=True):
            if tensor is not None:
                self._fold_(tensor.detach().reshape(-1), self._element)
            self._element += numel

    def norm(self) -> Tensor:
        """Estimate of the vector's L2 norm, 0-d."""
        return torch.linalg.vector_norm(self.buckets)

    def _fold_(self, flat: Tensor, element: int) -> None:
        """Add a flat tensor whose first element is number ``element`` of the vector."""
        k = self.numel
        head = min(-element % k, flat.numel())
        whole = (flat.numel() - head) // k * k
        first_row = (element + head) // k
        self._fold_part_(flat[:head], element)
        rows = flat[head : head + whole].view(-1, k)
        for start in range(0, rows.shape[0], ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE].float()
            signs = torch.stack([self._signs(first_row + start + i) for i in range(part.shape[0])])
            self.buckets.add_((part * signs).sum(dim=0))
        self._fold_part_(flat[head + whole :], element + head + whole)

    def _fold_part_(self, part: Tensor, element: int) -> None:
        """Add a piece that does not reach beyond its row."""
        row, column = divmod(element, self.numel)
        end = column + part.numel()
        self.buckets[column:end].add_(part.float() * self._signs(row)[column:end])

    def _signs(self, row: int) -> Tensor:
        turn, shift = divmod(row, self.numel)
        while self._turn < turn:  # all rotations are used up
            self._draw_row_()
        return self._row[shift : shift + self.numel]

    def _draw_row_(self) -> None:
        """A new row of random signs, twice in succession: each of its rotations is a slice then."""
        signs = torch.randint(0, 2, (self.numel,), generator=self._generator, dtype=torch.int8).mul_(2).sub_(1)
        self._row = signs.to(device=self.buckets.device, dtype=torch.float32).repeat(2)
        self._turn += 1
