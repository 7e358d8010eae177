"""What is refused before training starts, each with a remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_onebit.flat import is_dense
from lightning_onebit.optim import method_for

COMMUNICATION_ARGUMENTS = (
    "ddp_comm_hook",
    "ddp_comm_state",
    "ddp_comm_wrapper",
    "model_averaging_period",
    "process_group",
    "device_mesh",
    "mixed_precision",
    "delay_all_reduce_named_params",
)
"""Arguments of Lightning's DDP strategies and of DistributedDataParallel that ask for another communication than ours."""


def check_ddp_arguments(strategy: str, arguments: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if an argument for DDP asks for another communication of gradients."""
    for name in COMMUNICATION_ARGUMENTS:
        if arguments.get(name) is not None:
            raise ValueError(
                f"{strategy} does its own gradient communication and cannot be combined with {name}={arguments[name]!r}."
                " HINT: leave it out, or use strategy='ddp'."
            )


def check_trainer(trainer: pl.Trainer) -> None:
    """Raise ``ValueError`` if a setting of the Trainer cannot be honoured in the compressed phase."""
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            "precision='16-mixed' is not supported: its loss scaler would skip steps on one rank only."
            " HINT: use precision='bf16-mixed' or '32-true'."
        )


def check_module(module: nn.Module) -> None:
    """Raise ``ValueError`` if a layer produces sparse gradients, or if DDP is told not to average a parameter's."""
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    for name, p in module.named_parameters():
        if name in ignored and p.requires_grad:
            raise ValueError(
                f"DDP is told to ignore the parameter {name!r} (`_ddp_params_and_buffers_to_ignore`): every rank would train"
                " its own. A compressed step averages over the ranks. HINT: leave it out there, or use strategy='ddp'."
            )
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
            if not p.is_floating_point() or p.dtype == torch.float16:
                raise ValueError(
                    f"The parameter {name!r} has dtype {p.dtype}. Must be float32, float64 or bfloat16: the second moment"
                    " of float16 gradients underflows. HINT: use precision='bf16-true' or a mixed precision."
                )
            if p.layout != torch.strided or not is_dense(p):
                raise ValueError(
                    f"The parameter {name!r} (strides {p.stride() if p.layout == torch.strided else p.layout}) is sparse,"
                    " or shares memory between its elements. HINT: use `.contiguous()`."
                )
