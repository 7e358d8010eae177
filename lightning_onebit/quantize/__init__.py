"""The quantizers, of signs and of second moments: layout of the wire, reference, fast implementations, one dispatch."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_onebit.coefficients import RefreshNumbers
from lightning_onebit.config import CompressionConfig
from lightning_onebit.quantize.cpu import CpuKernels
from lightning_onebit.quantize.memory import BucketMemory, Messages, StepInputs
from lightning_onebit.quantize.reference import ReferenceKernels
from lightning_onebit.quantize.tensor_sketch import TensorSketch


class Kernels(Protocol):
    """What every implementation offers; specified in :class:`~lightning_onebit.quantize.reference.ReferenceKernels`, and for
    the second moment in :mod:`lightning_onebit.quantize.reference_variance` and
    :mod:`lightning_onebit.quantize.reference_sketch`."""

    name: str
    reads_flags_on_device: bool
    """Whether ``apply_`` looks up on the device whether the step counts, so that nobody has to wait for that."""
    sketch_dtype: torch.dtype
    """In what ``sketch_tensors_`` adds up: int64 for fixed point, or float64."""

    def encode_(self, memory: BucketMemory, index: int, step: StepInputs, *, commit: bool) -> None: ...

    def serve_(self, memory: BucketMemory, step: StepInputs, *, commit: bool) -> None: ...

    def apply_(self, memory: BucketMemory, index: int, step: StepInputs, *, commit: bool) -> None: ...

    def encode_variance_(self, memory: BucketMemory, messages: Messages, correction: NDArray[np.float64]) -> None: ...

    def serve_variance_(self, memory: BucketMemory, messages: Messages) -> None: ...

    def apply_variance_(self, memory: BucketMemory, messages: Messages | None, numbers: RefreshNumbers) -> None: ...

    def sketch_tensors_(self, memory: BucketMemory, index: int, step: StepInputs, sketch: TensorSketch) -> None: ...


class DeviceKernels(Kernels, Protocol):
    """Kernels that read flags on the device, and do in one launch per bucket what others leave to torch, tensor by tensor.

    Specified in :mod:`lightning_onebit.quantize.triton_gradients`.
    """

    def gather_(self, flat: Tensor, memory: BucketMemory, step: StepInputs, factor: float = 1.0) -> None: ...

    def scale_(self, memory: BucketMemory, step: StepInputs, coefficient: Tensor) -> None: ...

    def sketch_(
        self, partial: Tensor, memory: BucketMemory, step: StepInputs, draws: Any, first_places: NDArray[np.int64]
    ) -> None: ...

    def draw_sketch(
        self, seed: int, *, total_numel: int, numel: int, rows_per_draw: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def add_parts_(self, out: Tensor, parts: Tensor, memory: BucketMemory) -> None: ...


def make_kernels(config: CompressionConfig, *, device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest quantizer for errors of ``dtype`` (float32 or float64) on ``device``; not to be shared by threads.

    On a GPU that is Triton's, or plain torch where Triton is not installed, or does not compute there what the reference
    does, which it warns of; which one it is, its ``name`` tells.

    Raises:
        torch.OutOfMemoryError: if the GPU has no room to compare Triton's kernels with the reference.
    """
    settings: dict[str, Any] = {"scale": config.scale, "space": config.space}
    if device.type == "cpu" and sys.byteorder == "little":
        return CpuKernels(**settings, block_size=config.block_size, dtype=dtype)
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        try:
            from lightning_onebit.quantize.triton import TritonKernels
            from lightning_onebit.quantize.triton_check import check_kernels

            check_kernels(device)
            return TritonKernels(**settings)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            warnings.warn(
                f"The Triton kernels do not work here, so this GPU runs plain torch, which takes longer: {error} HINT:"
                " another version of torch brings another Triton.",
                stacklevel=3,
            )
    return ReferenceKernels(**settings)
