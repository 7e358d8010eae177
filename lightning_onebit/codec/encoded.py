"""A quantized segment."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Encoded(NamedTuple):
    """Signs and scales of a segment of ``numel`` elements, usually views of a message."""

    signs: Tensor
    """uint8 ``[ceil(numel / 8)]``, least significant bit first."""
    scales: Tensor
    """float32 ``[ceil(numel / block_size)]``"""
    live: Tensor | None = None
    """Like ``signs``: bit set where an element takes part in its block; ``None`` if all do. Known to all, never sent."""
