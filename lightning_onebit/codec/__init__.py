"""The sign quantizer: layout of the wire, readable reference, fast implementations, one dispatch."""

from __future__ import annotations

import sys
from typing import Protocol

import torch
from torch import Tensor

from lightning_onebit.codec.cpu import CpuCodec
from lightning_onebit.codec.layout import SEGMENT_NUMEL
from lightning_onebit.codec.reference import ReferenceCodec
from lightning_onebit.config import CompressionConfig


class Codec(Protocol):
    """What every implementation offers; specified in :class:`~lightning_onebit.codec.reference.ReferenceCodec`."""

    name: str

    def encode_(self, values: Tensor, signs: Tensor, scales: Tensor, live: Tensor | None = None) -> None: ...

    def decode_(
        self, out: Tensor, signs: Tensor, scales: Tensor, factor: float = 1.0, live: Tensor | None = None
    ) -> None: ...

    def add_decoded_(
        self, target: Tensor, signs: Tensor, scales: Tensor, factor: float = 1.0, live: Tensor | None = None
    ) -> None: ...


def make_codec(config: CompressionConfig, *, device: torch.device, dtype: torch.dtype) -> Codec:
    """The fastest codec for tensors of ``dtype`` (float32 or float64) on ``device``, for up to a segment per call."""
    if device.type == "cpu" and sys.byteorder == "little":
        return CpuCodec(
            block_size=config.block_size,
            scale=config.scale,
            max_numel=max(SEGMENT_NUMEL, config.block_size),
            dtype=dtype,
        )
    return ReferenceCodec(block_size=config.block_size, scale=config.scale)
