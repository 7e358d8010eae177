"""The strategy for Fabric: the same communication, for training loops of one's own."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.plugins import Precision
from lightning.fabric.strategies import DDPStrategy, _StrategyRegistry
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_onebit.checkpoint.manager import SavedPhases
from lightning_onebit.checkpoint.state import CHECKPOINT_KEY, read_header
from lightning_onebit.config import CompressionConfig, Scale, Space
from lightning_onebit.consistency.settings import (
    checkpoint_facts,
    criterion_facts,
    module_facts,
    optimizer_facts,
    precision_facts,
    strategy_facts,
)
from lightning_onebit.freeze.criteria import Criterion
from lightning_onebit.lightning.callbacks.divergence_guard import DivergenceGuard
from lightning_onebit.lightning.callbacks.phase_switch import PhaseSwitch
from lightning_onebit.lightning.compressible import Division
from lightning_onebit.lightning.preflight import check_ddp_arguments, check_module, check_optimizer
from lightning_onebit.phase import Phase

POSITION = "position"
"""In an optimizer's saved state: which one of all it was."""


class OneBitDDPFabricStrategy(SavedPhases, DDPStrategy):
    """:class:`~lightning_onebit.OneBitDDPStrategy` for :class:`lightning.fabric.Fabric`.

    Starts as Fabric's DDP, bitwise. After every step of an optimizer the criterion judges, as
    :class:`~lightning_onebit.PhaseSwitch` does in a Trainer. In the compressed phase gradients are local, and
    ``optimizer.step()`` exchanges signs and block scales. ``fabric.strategy.phase``, ``.comm_stats``,
    ``.freeze_variance()`` and ``.resume_warmup()`` are the same as there.

    ``fabric.save`` and ``fabric.load`` keep the phase and the errors if the state holds the optimizers, not only their
    state dicts. Fabric never ends a strategy: ``fabric.strategy.teardown()`` ends its thread and process groups.

    Args:
        criterion: when to freeze; ``None``: :class:`~lightning_onebit.VarianceStability`.
        guard: compares the ranks every so many steps; ``None``: :class:`~lightning_onebit.DivergenceGuard` with its default.
        total_steps: optimizer steps of the whole run, for criteria that are fractions of it; Fabric does not know it.
        block_size: see :class:`~lightning_onebit.OneBitDDPStrategy`, also for the next five.
        scale: likewise.
        space: likewise.
        hierarchical: likewise.
        bucket_cap_mb: likewise.
        max_skipped_steps: likewise.
        **kwargs: every argument of :class:`lightning.fabric.strategies.DDPStrategy` and of
            :class:`~torch.nn.parallel.DistributedDataParallel`.

    Raises:
        ValueError: if an argument is outside its domain, or asks for another communication of gradients.

    Example::

        fabric = Fabric(strategy=OneBitDDPFabricStrategy(criterion=FixedStep(1000)), devices=8, num_nodes=4)
    """

    def __init__(
        self,
        *args: Any,
        criterion: Criterion | None = None,
        guard: DivergenceGuard | None = None,
        total_steps: int | None = None,
        block_size: int = 2048,
        scale: Scale = "l2",
        space: Space = "update",
        hierarchical: bool | Literal["auto"] = "auto",
        bucket_cap_mb: float | None = None,
        max_skipped_steps: int | None = 100,
        **kwargs: Any,
    ) -> None:
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"Invalid total_steps: {total_steps}. Must be >= 1, or None if it is not known.")
        check_ddp_arguments(type(self).__name__, kwargs)
        super().__init__(*args, bucket_cap_mb=bucket_cap_mb, **kwargs)
        config = CompressionConfig(block_size=block_size, scale=scale, space=space, bucket_cap_mb=bucket_cap_mb)
        # Never overlapped: a training loop may do anything to gradients between backward and step.
        self._set_up_phases(config, overlap=False, hierarchical=hierarchical, max_skipped_steps=max_skipped_steps)
        self.switch = PhaseSwitch(criterion)
        self.guard = guard if guard is not None else DivergenceGuard()
        self.total_steps = total_steps
        self._first_step = True
        self._modules: list[nn.Module] = []
        self._loaded: dict[Optimizer, Mapping[str, Any]] = {}
        self._loading_from: str | None = None

    @property
    def optimizers(self) -> list[Optimizer]:  # type: ignore[override]
        """Those that were set up, in that order."""
        return list(self._steps)

    # Set-up

    @override
    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        with self._agreement("model or strategy") as facts:
            self._check_still_warming_up("a model")
            check_module(module)
            facts.update({**strategy_facts(self), **module_facts(module), **precision_facts(self.precision)})
            facts.update({**criterion_facts([self.switch.criterion]), "total_steps": repr(self.total_steps)})
        model = super().setup_module(module)
        self._modules.append(module)
        self._names.update({p: name for name, p in module.named_parameters()})
        self._communicate_for(model)
        return model

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        with self._agreement("optimizers") as facts:
            self._check_still_warming_up("an optimizer")
            check_optimizer(optimizer, self._names)
            facts.update(optimizer_facts([optimizer], self._names))
        if not self._steps:
            self._warn_if_alone()
        self._steps[optimizer] = 0
        self._division = Division(compressed=self.optimizers, dense={})
        self._watch(optimizer)
        optimizer.register_load_state_dict_pre_hook(self._before_loading)
        optimizer.register_load_state_dict_post_hook(self._after_loading)
        return super().setup_optimizer(optimizer)

    def _check_still_warming_up(self, what: str) -> None:
        if self._phase is Phase.COMPRESSED:
            raise RuntimeError(
                f"Cannot set up {what} in the compressed phase: it has had no warm-up. HINT: set up all of them before"
                " training, or call `fabric.strategy.resume_warmup()` first."
            )

    # Steps

    @contextmanager
    def _failures_explained(self) -> Iterator[None]:
        """A Trainer tells its strategy of exceptions, Fabric does not."""
        try:
            yield
        except RuntimeError as error:
            self._explain_failure_(error, step=self.optimizer_steps)
            raise

    @override
    def backward(self, *args: Any, **kwargs: Any) -> None:
        with self._failures_explained():
            super().backward(*args, **kwargs)
        self._has_waiting_gradients = True

    @override
    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:  # type: ignore[override]
        with self._failures_explained():
            return self._optimizer_step(optimizer, **kwargs)

    def _optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        if self._first_step:
            self._first_step = False
            self.switch.start(self, total_steps=self.total_steps or math.inf)
        self._check_all_averaged(
            "it did not require gradients when `fabric.setup` made the DDP module, or is in no such module. HINT: unfreeze"
            " parameters before, or set the module up once more"
        )
        if self._compressed_of(optimizer) is None:
            with self._counting_skips(optimizer):
                output = super().optimizer_step(optimizer, **kwargs)
            self.comm_stats[Phase.WARMUP].steps += 1
        else:
            self._agree_on_infinities(optimizer)
            with self._counting_skips(optimizer), self._compressed_step(optimizer):
                output = super().optimizer_step(optimizer, **kwargs)
        self._has_waiting_gradients = False
        self.switch.after_step(self, self._modules[0] if len(self._modules) == 1 else nn.ModuleList(self._modules))
        self.guard.after_step(self)
        return output

    @property
    @override
    def _precision_in_use(self) -> Precision:
        return self.precision

    def _agree_on_infinities(self, optimizer: Optimizer) -> None:
        """Before gradients are unscaled: see :mod:`lightning_onebit.lightning.loss_scaling`. Collective; doing it twice is no harm."""
        compressed = self._compressed_of(optimizer)
        if self._scales_losses and compressed is not None:
            compressed.spread_nonfinite_()

    @override
    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float) -> None:
        self._agree_on_infinities(optimizer)
        super().clip_gradients_value(module, optimizer, clip_val)

    @override
    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """In the compressed phase by the norm of the mean gradient, as under DDP, estimated within about 1%."""
        compressed = self._compressed_of(optimizer)
        if compressed is None:
            return super().clip_gradients_norm(module, optimizer, max_norm, norm_type, error_if_nonfinite)
        if float(norm_type) != 2.0:
            raise ValueError(
                f"Invalid norm_type: {norm_type}. Must be 2 in the compressed phase: no rank has the mean gradient, and"
                " only its 2-norm can be estimated from what the ranks can tell each other."
            )
        self._agree_on_infinities(optimizer)
        self.precision.unscale_gradients(optimizer)
        norm = compressed.clip_grad_norm_(float(max_norm))
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                "The norm of the mean gradient is infinite or NaN, so it cannot be clipped. HINT: with"
                " error_if_nonfinite=False the step is skipped, on all ranks."
            )
        return norm

    # State

    @override
    def save_checkpoint(self, path: Any, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As Fabric's, plus this rank's part, in a folder beside ``path``. Collective.

        What is not in the part goes into the optimizers' state dicts, where a stock optimizer disregards it.
        """
        snapshot = self._snapshot() if any(isinstance(value, Optimizer) for value in state.values()) else None
        if snapshot is not None:
            state = {key: self._with_header(value, snapshot.header) for key, value in state.items()}
        save = partial(super().save_checkpoint, path, state, *args, **kwargs)
        self._save_with_parts(path, snapshot, save)

    def _with_header(self, value: Any, header: dict[str, Any]) -> Any:
        if not (isinstance(value, Optimizer) and value in self.optimizers):
            return value
        position = self.optimizers.index(value)
        own = {**header, "optimizers": header["optimizers"][position : position + 1], POSITION: position}
        return {**self.get_optimizer_state(value), CHECKPOINT_KEY: own}

    @override
    def load_checkpoint(self, path: Any, state: Any | None = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Fabric's; all that this rank reads is in place before it is compared with the others'. Collective."""
        objects = list(state.values()) if isinstance(state, dict) else [state]
        loaded = [optimizer for optimizer in self.optimizers if any(optimizer is each for each in objects)]
        if loaded and self._phase is Phase.COMPRESSED:
            if len(loaded) != len(self._steps):
                raise ValueError(
                    f"Cannot load {len(loaded)} of {len(self._steps)} optimizers in the compressed phase: they change phase"
                    " together. HINT: load all, or call `fabric.strategy.resume_warmup()` first."
                )
            self._leave_compressed_phase()
        if not loaded:
            return super().load_checkpoint(path, state, *args, **kwargs)
        self._loading_from = os.fspath(path)
        try:
            with self._agreement("the checkpoint that they load") as facts:
                remainder = super().load_checkpoint(path, state, *args, **kwargs)
                facts.update(checkpoint_facts(self._steps.values(), next(iter(self._loaded.values()), None)))
            self._resume_when_all_are_loaded()
        finally:
            self._loading_from = None
        return remainder

    def _before_loading(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        if self._phase is Phase.COMPRESSED:
            raise RuntimeError(
                "`load_state_dict` was called on an optimizer in the compressed phase, whose state is held in another form."
                " HINT: use `fabric.load`, or call `fabric.strategy.resume_warmup()` first."
            )
        self._loaded.pop(optimizer, None)
        if CHECKPOINT_KEY in state_dict:
            self._loaded[optimizer] = read_header(state_dict[CHECKPOINT_KEY])

    def _after_loading(self, optimizer: Optimizer) -> None:
        self._count_loaded_steps()
        if self._loading_from is None:
            self._resume_when_all_are_loaded()

    def _resume_when_all_are_loaded(self) -> None:
        if len(self._loaded) == len(self._steps):  # they change phase together
            headers = [self._loaded[each] for each in self.optimizers]
            self._loaded.clear()
            optimizers = [entry for header in headers for entry in header["optimizers"]]
            self._resume(headers[0], optimizers, [header[POSITION] for header in headers], self._loading_from)
            self._put_back_gradients()

    @override
    def teardown(self) -> None:
        self._release(after_failure=False)
        super().teardown()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        for suffix, start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
            name = f"onebit_ddp{suffix}"
            if name not in strategy_registry:
                description = f"1-bit DDP strategy with `start_method={start_method!r}`"
                strategy_registry.register(name, cls, description=description, start_method=start_method)
        name = "onebit_ddp_find_unused_parameters_true"
        if name not in strategy_registry:
            strategy_registry.register(name, cls, start_method="popen", find_unused_parameters=True)
