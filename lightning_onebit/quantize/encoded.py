"""A quantized segment."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor


class _Encoded(NamedTuple):
    signs: Tensor
    """uint8 ``[ceil(numel / 8)]``, least significant bit first."""
    scales: Tensor
    """float32 ``[ceil(numel / block_size)]``"""
    live: Tensor | None = None
    """Like ``signs``: bit set where an element takes part in its block; ``None`` if all do.

    Known to all ranks, never sent.
    """


class Encoded(_Encoded):
    """Signs and scales of a segment of ``numel`` elements, usually views of a message: made once, filled at every step."""

    def among(self, live: Tensor | None) -> Encoded:
        """The same signs and scales, with other live elements."""
        return self if live is self.live else self._replace(live=live)

    @cached_property
    def signs_array(self) -> np.ndarray[Any, Any]:
        """The same memory for numpy. A new view takes longer than numpy's work on 1000 elements."""
        return self.signs.numpy()

    @cached_property
    def scales_array(self) -> np.ndarray[Any, Any]:
        """The same memory for numpy."""
        return self.scales.numpy()
