"""What is refused before training starts, each with a remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_onebit.consistency.ranks import Ranks
from lightning_onebit.flat import is_dense
from lightning_onebit.methods import method_for

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


def warn_if_alone(strategy: Ranks) -> None:
    """Say it if there is one process only."""
    if strategy.world_size == 1:
        rank_zero_warn(
            f"{type(strategy).__name__} runs with one process: there is nothing to send, so nothing is compressed and"
            " training is plain Adam. HINT: use devices=2 or more, or num_nodes."
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
