"""The sign quantizer: layout of the wire, readable reference, fast implementations, one dispatch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_onebit.codec.cpu import CpuCodec
from lightning_onebit.codec.encoded import Encoded
from lightning_onebit.codec.layout import SEGMENT_NUMEL
from lightning_onebit.codec.reference import ReferenceCodec
from lightning_onebit.config import CompressionConfig
from lightning_onebit.momentum import LocalMomentum


class Codec(Protocol):
    """What every implementation offers; specified in :class:`~lightning_onebit.codec.reference.ReferenceCodec`."""

    name: str

    def encode_(self, values: Tensor, encoded: Encoded) -> None: ...

    def decode_(self, out: Tensor, encoded: Encoded, factor: float = 1.0) -> None: ...

    def add_decoded_(self, target: Tensor, encoded: Encoded, factor: float = 1.0) -> None: ...

    def encode_momentum_(
        self, out: Tensor, error: Tensor, previous: Encoded, momentum: LocalMomentum, sent: Encoded
    ) -> None: ...

    def settle_momentum_(self, error: Tensor, previous: Encoded, momentum: LocalMomentum, sent: Encoded) -> None: ...

    def encode_mean_(self, out: Tensor, error: Tensor, received: Sequence[Encoded], served: Encoded) -> None: ...

    def settle_mean_(self, error: Tensor, received: Sequence[Encoded], served: Encoded) -> None: ...


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
