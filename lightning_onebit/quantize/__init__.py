"""The sign quantizer: layout of the wire, readable reference, fast implementations, one dispatch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.momentum import LocalMomentum
from lightning_onebit.quantize.cpu import CpuCodec
from lightning_onebit.quantize.encoded import Encoded
from lightning_onebit.quantize.layout import CUDA_SEGMENT_NUMEL, SEGMENT_NUMEL
from lightning_onebit.quantize.reference import ReferenceCodec

OLDEST_TRITON = (3, 7)
"""How older ones round was never checked; 3.2, which was tried, does not even interpret the kernels."""


class Codec(Protocol):
    """What every implementation offers; specified in :class:`~lightning_onebit.quantize.reference.ReferenceCodec`."""

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


def segment_numel(device: torch.device) -> int:
    """Elements that one call of a codec should work on, on ``device``. No result depends on it."""
    return CUDA_SEGMENT_NUMEL if device.type == "cuda" else SEGMENT_NUMEL


def make_codec(config: CompressionConfig, *, device: torch.device, dtype: torch.dtype) -> Codec:
    """The fastest codec for tensors of ``dtype`` (float32 or float64) on ``device``, for up to a segment per call.

    On a GPU that is Triton's, or plain torch where Triton is not installed, or too old, which it warns of; which one it is,
    its ``name`` tells.
    """
    if device.type == "cpu" and sys.byteorder == "little":
        return CpuCodec(
            block_size=config.block_size,
            scale=config.scale,
            max_numel=max(segment_numel(device), config.block_size),
            dtype=dtype,
        )
    if device.type == "cuda" and _has_triton():
        from lightning_onebit.quantize.triton import TritonCodec

        return TritonCodec(block_size=config.block_size, scale=config.scale)
    return ReferenceCodec(block_size=config.block_size, scale=config.scale)


def _has_triton() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    installed = importlib.metadata.version("triton")
    if tuple(int(part) for part in installed.split(".")[:2]) >= OLDEST_TRITON:
        return True
    wanted = ".".join(map(str, OLDEST_TRITON))
    warnings.warn(
        f"Triton {installed} is installed, but the kernels are only known to be right from {wanted} on: this GPU runs"
        " plain torch instead, which takes longer. HINT: a newer torch brings a newer Triton.",
        stacklevel=3,
    )
    return False
