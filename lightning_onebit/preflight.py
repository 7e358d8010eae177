"""What is refused before training starts, each with a remedy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_onebit.flat import is_dense
from lightning_onebit.optim import method_for


def check_module(module: nn.Module) -> None:
    """Raise ``ValueError`` if a layer produces sparse gradients."""
    for name, submodule in module.named_modules():
        if isinstance(submodule, (nn.Embedding, nn.EmbeddingBag)) and submodule.sparse:
            raise ValueError(
                f"The layer {name!r} ({type(submodule).__name__}) produces sparse gradients, which cannot be compressed."
                " Use sparse=False: rows without gradient are recognized and stay as they are."
            )


def check_optimizer(optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
    """Raise ``ValueError`` if the optimizer, or one of its parameters, cannot be compressed.

    Args:
        optimizer: what ``configure_optimizers`` returned.
        names: parameter names for messages.
    """
    method_for(optimizer)
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names.get(p, "a parameter")
            if p.dtype == torch.float16:
                raise ValueError(
                    f"The parameter {name!r} has dtype torch.float16. Must be float32, float64 or bfloat16: Adam's"
                    " second moment and eps underflow in float16, under DDP as well. HINT: use precision='bf16-true', or"
                    " '16-mixed', which keeps parameters in float32."
                )
            if p.is_complex():
                raise ValueError(
                    f"The parameter {name!r} has dtype {p.dtype}. Must be float32, float64 or bfloat16. HINT: keep real"
                    " numbers in the parameter, and use `torch.view_as_complex(parameter)`; `torch.view_as_real` converts."
                )
            if p.dtype not in (torch.float32, torch.float64, torch.bfloat16):
                raise ValueError(
                    f"The parameter {name!r} has dtype {p.dtype}. Must be float32, float64 or bfloat16. HINT: quantized"
                    " weights do not train; give the optimizer only parameters that do, such as adapters."
                )
            if p.layout != torch.strided or not is_dense(p):
                raise ValueError(
                    f"The parameter {name!r} (strides {p.stride() if p.layout == torch.strided else p.layout}) is sparse,"
                    " or shares memory between its elements. HINT: use `.contiguous()`."
                )
