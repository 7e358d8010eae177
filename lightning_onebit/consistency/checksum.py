"""A checksum of the bits of tensors: to compare what should be equal, without sending it.

Memory is read as words x_0, ..., x_(n-1) of at most 32 bits, and

    h = x_0 + A x_1 + A^2 x_2 + ... + A^(n-1) x_(n-1) + A^n   mod 2^64

whose last term stands for the length. A is 5 mod 8, from which follows:

* **A change in one word** is always seen: A^i is odd, so A^i d = 0 mod 2^64 for no difference d of two words but 0.
* **Two words that changed places**, less than 2^30 apart, are always seen: A^i - A^j has at most 31 factors of two (it is
  A^j times A^(i - j) - 1, which has two more of them than i - j), and a difference of words at most 31.
* **Any other change** is missed if its terms happen to cancel, in the 32 bits or more that are left above its lowest one:
  about once in 2^32.

Zeros of both signs, and the many NaN, differ in their bits and so in their checksums.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_onebit.flat import flat_view, is_dense

MULTIPLIER = 6364136223846793005
"""A: Knuth's, of the random number generator MMIX."""

CHUNK_NUMEL = {"cpu": 1 << 15}
"""Words that are worked on at a time: on CPU they stay in the cache."""
DEFAULT_CHUNK_NUMEL = 1 << 22


class Checksum:
    """Computes checksums on one device, with memory that is allocated once."""

    def __init__(self, device: torch.device) -> None:
        numel = CHUNK_NUMEL.get(device.type, DEFAULT_CHUNK_NUMEL)
        powers = torch.full((numel,), MULTIPLIER, dtype=torch.int64, device=device)
        powers[0] = 1
        self.device = device
        self._powers = powers.cumprod(0)
        self._buffer = torch.empty_like(self._powers)

    @torch.no_grad()
    def of(self, tensors: Iterable[Tensor]) -> Tensor:
        """h of the words of ``tensors`` laid end to end: int64, 0-d. One pass; does not wait for the device.

        Args:
            tensors: of any dtype and shape, on any device; taken one by one.
        """
        return self._sum(words(tensor) for tensor in tensors)

    @torch.no_grad()
    def of_checksums(self, checksums: Tensor) -> Tensor:
        """One checksum, 0-d, for many, int64 ``[n]``; if one of them changes, always another one."""
        return self._sum([checksums])

    def _sum(self, vectors: Iterable[Tensor]) -> Tensor:
        total, numel = torch.zeros((), dtype=torch.int64, device=self.device), 0
        for vector in vectors:
            for chunk in vector.split(len(self._buffer)):
                weights, buffer = self._powers[: len(chunk)], self._buffer[: len(chunk)].copy_(chunk)
                # There is no `dot` of integers on GPUs.
                h = torch.dot(buffer, weights) if self.device.type == "cpu" else buffer.mul_(weights).sum()
                total += h.mul_(_power(numel))
                numel += len(chunk)
        return total.add_(_power(numel))


def words(tensor: Tensor) -> Tensor:
    """The elements' memory as integers ``[n]`` of 8, 16 or 32 bits; a view in memory order if the tensor is dense."""
    flat = flat_view(tensor) if is_dense(tensor) else tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    # Not 64 bits: the highest ones would have nothing above them to be mixed into.
    return flat.view({1: torch.uint8, 2: torch.int16}.get(flat.element_size(), torch.int32))


def _power(exponent: int) -> int:
    """A^exponent mod 2^64, as a signed integer."""
    power = pow(MULTIPLIER, exponent, 1 << 64)
    return power - (1 << 64) if power >> 63 else power
