"""Squared norms of the mean of tensors that nobody averages, tensor by tensor, by random-sign sketches of 1 KB.

Each element is multiplied by a random sign and added to one of 251 buckets (Charikar, Chen and Farach-Colton, 2002; Alon,
Matias and Szegedy, 1996). The map is linear: the mean of the ranks' sketches is the sketch of their mean, whose squared
norm estimates that of the vector without bias. The relative standard deviation is at most sqrt(2 / 251), 9%, where what is
large is spread over the buckets, which a period of 251 elements alone can prevent. Up to 251 elements it is exact. See also
:mod:`lightning_onebit.engine.clipping`, which sketches all tensors as one.

**Signs.** Element P of a tensor goes to bucket P mod 251. It lies in row P div 251, and in segment P div 64256, 256 rows. At
offset o in its segment, it has the sign ``signs[shift + o] row_sign``. All tensors share one table of signs; the shift and
the signs of the rows are drawn for each segment from (seed, key of the tensor, segment). Without the latter, products of
signs would repeat from segment to segment, where these overlap in the table. All of it is integer arithmetic (splitmix64:
Steele, Lea and Flood, 2014), the same on every device.

**Sums** must not depend on the order of additions, as nobody knows it on a GPU. There, and in the reference, they are
integers: of ``a 2^36``, truncated, so that only what is smaller than 2^-13 loses bits, and a bucket may hold up to 2^27.
Sums of a^2 are made block by block in float64; each is split into a whole number and a fraction in units of 2^-38. On a
CPU they are float64 sums. What is made of either is rounded to float32, in which the order is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_onebit.flat import send_

WIDTH = 251
"""Buckets of one tensor. A prime: what is large in the same columns of many rows does not meet in the same few buckets."""
ROWS_PER_SEGMENT = 256
SEGMENT_NUMEL = ROWS_PER_SEGMENT * WIDTH
"""Elements that share a table of signs, each segment from a random place in it on."""
VALUE_BITS = 36
"""Of the fraction of a fixed-point value."""
SQUARE_BITS = 38
"""Of the fraction of a sum of squares."""
WORDS_PER_SEGMENT = ROWS_PER_SEGMENT // 64
DRAWS_PER_SEGMENT = 1 + WORDS_PER_SEGMENT
SUMS = 4
"""Of a tensor: sum of a^2, its whole part; its fraction; elements that take part; those that are clamped."""


class TensorSketch:
    """Sketches of many tensors, and sums, to be filled bucket by bucket by ``Kernels.sketch_tensors_``.

    Args:
        seed: determines what is random: the same on all ranks, another at every step.
        keys: a number for each tensor that does not depend on how tensors are put into buckets.
        numels: elements of each tensor.
        dtype: of the sums: int64 for fixed point, or float64.
        device: where the tensors are. It is not waited for.
    """

    def __init__(
        self, seed: int, keys: Sequence[int], numels: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        assert dtype in (torch.int64, torch.float64)
        self.numels = np.asarray(numels, dtype=np.int64)
        tensors = len(self.numels)
        self.numbers = torch.zeros(tensors * (WIDTH + SUMS), dtype=dtype, device=device)
        """All sums, ``[251 tensors + 4 tensors]``: those of several ranks add up."""
        self.values = self.numbers[: tensors * WIDTH].view(tensors, WIDTH)
        """``[tensors, 251]``; int64: in units of 2^-36."""
        self.sums = self.numbers[tensors * WIDTH :].view(SUMS, tensors)
        """``[4, tensors]``: see :data:`SUMS`."""
        self.sign_table = random_signs(seed, 2 * SEGMENT_NUMEL)
        self.first_segment, self.draws = draw_segments(seed, keys, self.numels)
        self.signs = torch.empty(len(self.sign_table), dtype=torch.int8, device=device)
        """The table, int8 ``[2 * 64256]``."""
        send_(self.signs, self.sign_table)
        sent = torch.empty(tensors + self.draws.size, dtype=torch.int64, device=device)
        send_(sent, np.concatenate([self.first_segment, self.draws.ravel()]))
        self.first_segment_on_device, self.draws_on_device = sent[:tensors], sent[tensors:].view(-1, DRAWS_PER_SEGMENT)

    @cached_property
    def row_signs(self) -> NDArray[np.int8]:
        """Of all rows of all segments, +1 or -1, ``[256 segments]``."""
        return _signs_of(np.ascontiguousarray(self.draws[:, 1:]).view(np.uint64).ravel())

    def squares(self) -> Tensor:
        """By tensor, the sum of a^2: float64 ``[tensors]``."""
        fraction = 2.0**-SQUARE_BITS if self.numbers.dtype == torch.int64 else 1.0
        return self.sums[0].double() + self.sums[1].double() * fraction

    def message(self, columns: Tensor) -> Tensor:
        """What is averaged over the ranks: float32 ``[columns + 3 tensors]``.

        Args:
            columns: int64, see :func:`used_columns`.
        """
        unit = 2.0**-VALUE_BITS if self.numbers.dtype == torch.int64 else 1.0
        values = self.values.view(-1)[columns].double() * unit  # exact up to 2^53
        return torch.cat([values, self.squares(), self.sums[2:].double().view(-1)]).float()

    def estimate(self, mean: Tensor, columns: Tensor) -> Tensor:
        """Of the mean of all ranks' messages, by tensor: the squared norm of the mean; and the means of the sum of squares,
        of the number of elements that take part, and of those that are clamped. float32 ``[4, tensors]``."""
        rows = torch.zeros(self.values.shape, dtype=torch.float64, device=mean.device)
        rows.view(-1)[columns] = mean[: len(columns)].double()
        squares = rows.square_().sum(dim=1).float()
        return torch.cat([squares.view(1, -1), mean[len(columns) :].view(SUMS - 1, -1)])


def used_columns(numels: Sequence[int], device: torch.device) -> Tensor:
    """Places in ``values.view(-1)`` that can be other than 0: a tensor of fewer than 251 elements has as many; int64."""
    used = np.arange(WIDTH) < np.asarray(numels, dtype=np.int64)[:, None]
    places = np.flatnonzero(used)
    columns = torch.empty(len(places), dtype=torch.int64, device=device)
    send_(columns, places)
    return columns


def draw_segments(seed: int, keys: Sequence[int], numels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What is drawn for the segments of all tensors.

    Returns:
        By tensor, the number of its first segment, ``[tensors]``. By segment, its shift, and 4 words of 64 bits, one for
        each row, lowest first: set where the sign is +1; ``[segments, 5]``.
    """
    segments = -(-numels // SEGMENT_NUMEL)
    first = np.cumsum(segments) - segments
    segment = np.arange(int(segments.sum())) - np.repeat(first, segments)
    of_key = splitmix64(np.asarray(keys, dtype=np.int64).astype(np.uint64) ^ splitmix64(np.uint64(seed)))
    number = splitmix64(segment.astype(np.uint64) ^ np.repeat(of_key, segments))
    words = (splitmix64(number ^ np.uint64(1 + word)) for word in range(WORDS_PER_SEGMENT))
    draws = np.stack([number % np.uint64(SEGMENT_NUMEL), *words], axis=1)
    return first, draws.view(np.int64)


def random_signs(seed: int, numel: int) -> NDArray[np.int8]:
    """``numel`` random signs, +1 or -1."""
    return _signs_of(splitmix64(np.arange(-(-numel // 64), dtype=np.uint64) ^ splitmix64(~np.uint64(seed))))[:numel]


def _signs_of(words: NDArray[np.uint64]) -> NDArray[np.int8]:
    """+1 where a bit is set, lowest first, else -1; ``[64 words]``."""
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")
    return bits.view(np.int8) * np.int8(2) - np.int8(1)


def splitmix64(x: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """A bijection of 64-bit integers whose values look random (the finalizer of splitmix64)."""
    z = np.atleast_1d(x) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
