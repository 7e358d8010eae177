"""What is refused before training starts, each with a remedy."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.strategies import Strategy as FabricStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_onebit.consistency.ranks import Ranks
from lightning_onebit.flat import is_dense
from lightning_onebit.lightning.compressible import listed
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


_FOR_TRAINER = "Trainer(callbacks=[PhaseSwitch(criterion={})])"
_FIXED = "FixedStep({value!r})"
ELSEWHERE: Mapping[str, tuple[str, str]] = {
    "freeze_step": (_FOR_TRAINER.format(_FIXED), f"criterion={_FIXED}"),  # DeepSpeed
    "var_freeze_step": (_FOR_TRAINER.format(_FIXED), f"criterion={_FIXED}"),
    "var_update_scaler": ("variance_refresh={value!r}", "variance_refresh={value!r}"),
    **{name: ("nothing: all ranks step together",) * 2 for name in ("local_step_scaler", "local_step_clipper")},
    "warmup_steps": (_FOR_TRAINER.format(_FIXED), f"criterion={_FIXED}"),  # Bagua
    "criterion": (_FOR_TRAINER.format("{value!r}"), ""),
    "guard": ("Trainer(callbacks=[DivergenceGuard(every_n_steps=n)])", ""),
    "every_n_steps": ("Trainer(callbacks=[DivergenceGuard(every_n_steps={value!r})])", "guard=DivergenceGuard(...)"),
    "total_steps": ("nothing, as the Trainer knows the length of the run", ""),
    "overlap": ("", "nothing: a training loop may change gradients at any time, so nothing is sent during backward"),
    "comm_backend_name": ("process_group_backend={value!r}", "process_group_backend={value!r}"),
    "cuda_aware": ("nothing: NCCL and gloo know where tensors are", "nothing: NCCL and gloo know where tensors are"),
    "device_ids": ("Trainer(devices=...)", "Fabric(devices=...)"),
    **{
        name: (f"Trainer({name}={{value!r}})", f"Fabric({name}={{value!r}})")
        for name in ("devices", "num_nodes", "precision", "strategy")
    },
    **{name: ("the same argument of the optimizer",) * 2 for name in ("lr", "eps", "weight_decay")},
}
"""What takes the place of arguments that users of other systems, or of our other strategy, look for: Trainer, Fabric."""


def check_arguments(cls: type, ours: type, arguments: Mapping[str, Any]) -> None:
    """Raise if an argument that is handed on to DDP is unknown there, or asks for another communication of gradients.

    Args:
        cls: the strategy's class.
        ours: the class, ``cls`` or above it, that has taken its own arguments and hands on these.
        arguments: those that it hands on.

    Raises:
        TypeError: if one is unknown, or `timeout` a number. DDP would say so only when training starts, in its own words.
        ValueError: if one asks for another communication.
    """
    if not isinstance(arguments.get("timeout"), (timedelta, type(None))):
        raise TypeError(
            f"Invalid timeout: {arguments['timeout']!r}. Must be a datetime.timedelta, or None for torch's default. HINT:"
            " datetime.timedelta(minutes=5)."
        )
    for name in COMMUNICATION_ARGUMENTS:
        if arguments.get(name) is not None:
            raise ValueError(
                f"{cls.__name__} does its own gradient communication and cannot be combined with {name}={arguments[name]!r}."
                " HINT: leave it out, or use strategy='ddp'."
            )
    known = _known_arguments(cls, ours) if arguments else set()
    for name, value in arguments.items():
        if name in known:
            continue
        instead = ELSEWHERE.get(name, ("", ""))[issubclass(cls, FabricStrategy)].format(value=value)
        nearest = difflib.get_close_matches(name, sorted(known), n=1)
        if instead:
            hint = f"What takes its place is {instead}."
        elif nearest:
            hint = f"The nearest one is {nearest[0]!r}."
        else:
            hint = f"{ours.__name__} itself has {', '.join(_own_arguments(ours))}."
        raise TypeError(
            f"Unknown argument {name}={value!r}. Must be one of {ours.__name__}, Lightning's DDPStrategy or"
            f" DistributedDataParallel. HINT: {hint}"
        )


def _known_arguments(cls: type, ours: type) -> set[str]:
    takers = [each for each in cls.__mro__[cls.__mro__.index(ours) :] if "__init__" in vars(each) and each is not object]
    names = {name for taker in [*takers, DistributedDataParallel] for name in inspect.signature(taker.__init__).parameters}  # type: ignore[misc]
    # Lightning's strategies pass the module and its devices to DDP.
    return names - {"self", "args", "kwargs", "module", "device_ids"}


def _own_arguments(ours: type) -> list[str]:
    parameters = inspect.signature(ours.__init__).parameters.values()  # type: ignore[misc]
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def warn_if_alone(strategy: Ranks) -> None:
    """Say it if there is one process only."""
    if strategy.world_size == 1:
        rank_zero_warn(
            f"{type(strategy).__name__} runs with one process: there is nothing to send, so nothing is compressed and"
            " training is that of the optimizer by itself. HINT: use devices=2 or more, or num_nodes."
        )


def check_module(module: nn.Module) -> None:
    """Raise ``ValueError`` if a layer produces sparse gradients, writes to its parameters by the data of its rank, or if DDP
    is told not to average a parameter's."""
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    for name, p in module.named_parameters():
        if name in ignored and p.requires_grad:
            raise ValueError(
                f"DDP is told to ignore the parameter {name!r} (`_ddp_params_and_buffers_to_ignore`): every rank would train"
                " its own. A compressed step averages over the ranks. HINT: leave it out there, or use strategy='ddp'."
            )
    for name, submodule in module.named_modules():
        is_embedding = isinstance(submodule, (nn.Embedding, nn.EmbeddingBag))
        if is_embedding and submodule.max_norm is not None and submodule.weight.requires_grad:
            raise ValueError(
                f"The layer {name!r} ({type(submodule).__name__}, max_norm={submodule.max_norm:g}) changes its weight in"
                " `forward`, those rows that this rank's batch has: the ranks would drift apart, under DDP as well. HINT:"
                " use max_norm=None, and renormalize all rows after the optimizer step, in `on_train_batch_end`:"
                " `with torch.no_grad(): weight.renorm_(2, 0, max_norm)`."
            )
        if isinstance(submodule, (nn.Embedding, nn.EmbeddingBag)) and submodule.sparse:
            raise ValueError(
                f"The layer {name!r} ({type(submodule).__name__}) produces sparse gradients, which cannot be compressed."
                " Use sparse=False: rows without gradient are recognized and stay as they are."
            )


class WrittenParameters:
    """Says once which parameters were written to between two moments, by code other than the optimizer's step."""

    BATCHES = 3
    """How many batches are looked at: a module does so always, or depending on what it is fed."""

    def __init__(self) -> None:
        self._versions: dict[Tensor, int] = {}
        self._batches = 0

    def begin(self, parameters: Iterable[Tensor]) -> None:
        """Before the forward of a batch."""
        self._batches += 1
        self._versions = {p: p._version for p in parameters if p.requires_grad} if self._batches <= self.BATCHES else {}

    def end(self, names: Mapping[Tensor, str]) -> None:
        """After it, before backward."""
        written = [p for p, version in self._versions.items() if p._version != version]
        self._versions = {}
        if written:
            self._batches = self.BATCHES
            rank_zero_warn(
                f"`training_step` has changed parameters that are trained: {listed(written, names)}. If it does so by the"
                " batch of its rank, the ranks drift apart, under DDP as well; DivergenceGuard would end the run. HINT:"
                " change them in `on_train_batch_end`, alike on all ranks, or keep in buffers what is no trained parameter."
            )


def check_optimizer(optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
    """Raise ``ValueError`` if the optimizer, or one of its parameters that train, cannot be compressed.

    Args:
        optimizer: what ``configure_optimizers`` returned.
        names: parameter names for messages.
    """
    method_for(optimizer)
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names.get(p, "a parameter")
            if not p.requires_grad:  # such as the frozen base of a model with adapters
                continue
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
