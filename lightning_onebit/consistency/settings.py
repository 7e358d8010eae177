"""What the ranks of a run must have in common, as settings for :mod:`lightning_onebit.consistency.agreement`.

Everything belongs here that decides which collectives are called, with how many bytes, or what a step computes from what
all ranks received. What concerns one rank only does not: its device's number, its seed, its data, the memory layout of DDP's
buckets. Other versions of torch or Lightning may do the same, so they are worth a warning.
"""

from __future__ import annotations

import dataclasses
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import Precision
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_onebit.consistency.agreement import ADVISORY
from lightning_onebit.consistency.ranks import Ranks
from lightning_onebit.freeze.criteria import Criterion
from lightning_onebit.methods import hyperparameters, parameters_of
from lightning_onebit.version import __version__

DDP_ARGUMENTS_OF_ONE_RANK = ("device_ids", "output_device", "gradient_as_bucket_view")


def strategy_settings(strategy: Ranks, options: Mapping[str, object], ddp_arguments: Mapping[str, Any]) -> dict[str, str]:
    """Versions, the strategy's arguments, and where it runs.

    Args:
        strategy: whose type and ranks are compared.
        options: its own arguments, by name.
        ddp_arguments: those for :class:`~torch.nn.parallel.DistributedDataParallel`. Only plain values are compared.
    """
    settings = {
        "lightning_onebit": __version__,
        f"{ADVISORY}torch": torch.__version__,
        f"{ADVISORY}lightning": lightning.__version__,
        f"{ADVISORY}python": platform.python_version(),
        "strategy": type(strategy).__name__,
        **{name: repr(value) for name, value in options.items()},
        "num_nodes": str(strategy.num_nodes),
        "processes per node": str(strategy.num_processes),
        "device type": strategy.root_device.type,
    }
    for name, value in ddp_arguments.items():
        if name not in DDP_ARGUMENTS_OF_ONE_RANK and (value is None or isinstance(value, (bool, int, float, str))):
            settings[name] = repr(value)
    return settings


def module_settings(module: nn.Module) -> dict[str, str]:
    """Parameters and buffers, in DDP's order."""
    named = list(module.named_parameters())
    settings = {"number of parameters": str(len(named))}
    for index, (name, p) in enumerate(named):
        settings[f"parameter {index}"] = f"{name} {_tensor(p)}{'' if p.requires_grad else ' frozen'}"
    for index, (name, buffer) in enumerate(module.named_buffers()):
        settings[f"buffer {index}"] = f"{name} {_tensor(buffer)}"
    kinds = sorted({type(m).__name__ for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)})
    settings["batch normalization"] = ", ".join(kinds)  # whether it communicates
    return settings


def optimizer_settings(optimizers: Sequence[Optimizer], names: Mapping[Tensor, str]) -> dict[str, str]:
    """Types, hyperparameters, and which parameters are where."""
    settings = {"number of optimizers": str(len(optimizers))}
    for index, optimizer in enumerate(optimizers):
        settings[f"optimizer {index}"] = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        settings.update({f"optimizer {index}, {name}": value for name, value in hyperparameters(optimizer).items()})
        for number, p in enumerate(parameters_of(optimizer)):
            settings[f"optimizer {index}, parameter {number}"] = names.get(p, f"one {_tensor(p)}")
    return settings


def precision_settings(precision: Precision) -> dict[str, str]:
    """What is computed in which dtype, and how losses are scaled: scalers must skip the same steps."""
    scaler = getattr(precision, "scaler", None)
    scaling = repr(scaler.state_dict()) if scaler is not None and scaler.is_enabled() else "none"
    return {"precision": str(precision.precision), "loss scaling": scaling}


def trainer_settings(trainer: pl.Trainer) -> dict[str, str]:
    """What decides when steps are made, what is done before, and when ranks are elsewhere."""
    names = ("val_check_interval", "check_val_every_n_epoch", "limit_val_batches") if trainer.enable_validation else ()
    evaluations = ", ".join(f"{name}={getattr(trainer, name)!r}" for name in names) or "none"
    return {
        **precision_settings(trainer.precision_plugin),
        "max_epochs": repr(trainer.max_epochs),
        "max_steps": repr(trainer.max_steps),
        "accumulate_grad_batches": repr(trainer.accumulate_grad_batches),
        "gradient_clip_val": repr(trainer.gradient_clip_val),
        "gradient_clip_algorithm": repr(trainer.gradient_clip_algorithm),
        "limit_train_batches": repr(trainer.limit_train_batches),
        "evaluations": evaluations,
    }


def criterion_settings(criteria: Iterable[Criterion]) -> dict[str, str]:
    """Rank 0 judges, but all ranks must know when."""
    texts = (repr(c) if dataclasses.is_dataclass(c) else type(c).__name__ for c in criteria)
    return {"criterion": re.sub(r" at 0x[0-9a-f]+", "", ", ".join(texts))}  # of functions


def checkpoint_settings(steps: Iterable[int], header: Mapping[str, Any] | None) -> dict[str, str]:
    """Where a checkpoint has led: steps of each optimizer, and what it says of the run, if it is one of ours."""
    settings = {"optimizer steps": str(list(steps))}
    if header is not None:
        settings["phase"], settings["save"] = header["phase"], str(header["save_id"])
    return settings


def _tensor(tensor: Tensor) -> str:
    if is_lazy(tensor):
        return "not initialized"  # DDP says what to do
    dtype = str(tensor.dtype).removeprefix("torch.")
    strides = "" if tensor.layout != torch.strided or tensor.is_contiguous() else f" strides {tensor.stride()}"
    return f"{list(tensor.shape)} {dtype}{strides}"
