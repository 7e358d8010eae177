"""Squared norms of the mean of tensors that nobody averages, tensor by tensor, by random-sign sketches of 1 KB.

Each element is multiplied by a random sign and added to one of 251 buckets (Charikar, Chen and Farach-Colton, 2002; Alon,
Matias and Szegedy, 1996). The map is linear: the mean of the ranks' sketches is the sketch of their mean, whose squared
norm estimates that of the vector without bias, with a relative standard deviation of at most sqrt(2 / 251), 9%. Up to 251
elements it is exact. See also :mod:`lightning_onebit.engine.clipping`, which sketches all tensors as one.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

WIDTH = 251
"""Buckets of one tensor. A prime: what is large in the same columns of many rows does not meet in the same few buckets."""
PIECE_NUMEL = 256 * WIDTH
"""Elements that share a table of signs, each piece from a random place in it on."""


class TensorSketches:
    """Sketches of many tensors, to be filled part by part, in whatever order and cut.

    Args:
        seed: determines what is random: the same on all ranks, another at every step.
        keys: a number for each tensor that does not depend on how tensors are put into buckets.
        device: where the tensors are.
    """

    def __init__(self, seed: int, keys: Sequence[int], device: torch.device) -> None:
        self.values = torch.zeros(len(keys), WIDTH, dtype=torch.float64, device=device)
        """float64 ``[tensors, 251]``: so that the order in which parts are added cannot be seen in float32."""
        self._seed, self._keys = seed, keys
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (2 * PIECE_NUMEL,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
        self._signs = signs.to(device=device, dtype=torch.float64)

    def add_(self, tensor: int, start: int, values: Tensor) -> None:
        """Add elements of a tensor.

        Args:
            tensor: which.
            start: place of the first of them in the flattened tensor.
            values: floating point ``[numel]``.
        """
        done = 0
        while done < values.numel():
            piece, offset = divmod(start + done, PIECE_NUMEL)
            part = values[done : done + PIECE_NUMEL - offset]
            shift, sign = self._draw(self._keys[tensor], piece)
            first = offset % WIDTH
            rows = torch.zeros(-(-(first + part.numel()) // WIDTH) * WIDTH, dtype=torch.float64, device=values.device)
            signs = self._signs[shift + offset : shift + offset + part.numel()]
            torch.mul(part, signs, out=rows[first : first + part.numel()])
            self.values[tensor].add_(rows.view(-1, WIDTH).sum(dim=0), alpha=sign)
            done += part.numel()

    def _draw(self, key: int, piece: int) -> tuple[int, float]:
        """Where the signs of a piece begin in the table, and the sign of all of it.

        Without the latter, products of signs would repeat where two pieces begin at one place.
        """
        digest = hashlib.blake2b(struct.pack("<3q", self._seed, key, piece), digest_size=8).digest()
        (number,) = struct.unpack("<Q", digest)
        return (number >> 1) % PIECE_NUMEL, 1.0 if number & 1 else -1.0
