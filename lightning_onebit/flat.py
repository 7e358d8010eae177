"""Tensors as flat vectors in memory order, without a copy, and what is asked of all their elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import get_total_norm


def flat_view(tensor: Tensor) -> Tensor:
    """The elements in memory order, ``[numel]``, sharing storage. The tensor must be dense: :func:`is_dense`."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dim() == 1 and tensor.is_contiguous():
        return tensor
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def flat_gradient(param: Tensor) -> Tensor | None:
    """The gradient's elements in the memory order of its parameter."""
    grad = param.grad
    if grad is None or grad.stride() == param.stride() or (grad.is_contiguous() and param.is_contiguous()):
        return None if grad is None else flat_view(grad)
    return flat_view(torch.empty_like(param, memory_format=torch.preserve_format).copy_(grad))


def unflatten_like(flat: Tensor, like: Tensor) -> Tensor:
    """Inverse of :func:`flat_view` for a tensor strided as ``like``."""
    return flat.view_as(like) if like.is_contiguous() else flat.as_strided(like.shape, like.stride())


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap (contiguous, channels_last, transposed, ...)."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: (pair[1], pair[0])):
        if size == 0:
            return True
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element is infinite or NaN."""
    # One pass at the speed of memory nearly always answers: a finite norm has finite elements. The reverse does not hold.
    return math.isfinite(float(get_total_norm(tensors))) or all(bool(torch.isfinite(t).all()) for t in tensors)


def all_within(tensors: Sequence[Tensor], limit: float) -> bool:
    """Whether no magnitude is above ``limit``; NaN is."""
    # Python's numbers are compared: in float16 a limit of 1e30 would be infinite.
    return float(get_total_norm(tensors)) <= limit or all(float(t.abs().amax()) <= limit for t in tensors if t.numel())


def send_(target: Tensor, values: NDArray[Any]) -> None:
    """Copy an array into a tensor on the device, without waiting for it.

    Pinned memory comes from torch's allocator, which hands it out again only after the copies that read it have ended.
    """
    source = torch.from_numpy(values)
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)
