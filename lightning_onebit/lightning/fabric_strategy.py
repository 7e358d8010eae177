"""The strategy for Fabric: the same communication, for training loops of one's own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.strategies import DDPStrategy, _StrategyRegistry
from lightning.fabric.strategies.strategy import TBroadcast
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_onebit.arguments import check_steps
from lightning_onebit.checkpoint.io import durable_io
from lightning_onebit.checkpoint.manager import CheckpointManager
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.stats import CommStats
from lightning_onebit.comm.watch import elsewhere, passing
from lightning_onebit.config import CompressionConfig, Scale, Space, VarianceRefresh, WarmupPrecision
from lightning_onebit.consistency.agreement import agreement
from lightning_onebit.consistency.settings import (
    criterion_settings,
    module_settings,
    optimizer_settings,
    precision_settings,
    strategy_settings,
)
from lightning_onebit.engine.nonfinite import check_max_skipped_steps
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.freeze.criteria import Criterion
from lightning_onebit.freeze.drift import Drift
from lightning_onebit.lightning.callbacks.divergence_guard import DivergenceGuard
from lightning_onebit.lightning.callbacks.phase_switch import PhaseSwitch
from lightning_onebit.lightning.compressible import CompressibleOptimizers
from lightning_onebit.lightning.fabric_checkpoints import FabricCheckpoints
from lightning_onebit.lightning.failures import explain_
from lightning_onebit.lightning.optimizer_steps import unaveraged_error
from lightning_onebit.lightning.phase_controller import PhaseController
from lightning_onebit.lightning.preflight import check_arguments, check_module, check_optimizer, warn_if_alone
from lightning_onebit.phase import Phase


class OneBitDDPFabricStrategy(DDPStrategy):
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
        block_size: see :class:`~lightning_onebit.OneBitDDPStrategy`, also for the next six.
        scale: likewise.
        space: likewise.
        hierarchical: likewise.
        bucket_cap_mb: likewise.
        warmup_precision: likewise.
        max_skipped_steps: likewise.
        **kwargs: every argument of :class:`lightning.fabric.strategies.DDPStrategy` and of
            :class:`~torch.nn.parallel.DistributedDataParallel`.

    Raises:
        TypeError: if an argument is unknown, or of another type.
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
        variance_refresh: VarianceRefresh = "auto",
        hierarchical: bool | Literal["auto"] = "auto",
        bucket_cap_mb: float | None = None,
        warmup_precision: WarmupPrecision = "fp32",
        max_skipped_steps: int | None = 100,
        **kwargs: Any,
    ) -> None:
        if total_steps is not None:
            total_steps = check_steps("total_steps", total_steps, or_none="if it is not known")
        if guard is not None and not isinstance(guard, DivergenceGuard):
            raise TypeError(
                f"Invalid guard: {guard!r}. Must be a DivergenceGuard, or None for one with its default. HINT: for a number"
                " of steps, write guard=DivergenceGuard(every_n_steps=n)."
            )
        check_arguments(type(self), OneBitDDPFabricStrategy, kwargs)
        super().__init__(*args, bucket_cap_mb=bucket_cap_mb, **kwargs)
        self.config = CompressionConfig(
            block_size=block_size,
            scale=scale,
            space=space,
            variance_refresh=variance_refresh,
            bucket_cap_mb=bucket_cap_mb,
            warmup_precision=warmup_precision,
        )
        # Never overlapped: a training loop may do anything to gradients between backward and step.
        self.overlap: bool | Literal["auto"] = False
        self.hierarchical = hierarchical
        self.max_skipped_steps = check_max_skipped_steps(max_skipped_steps)
        self._phases = PhaseController(self)
        self._phases.steps.are_all_through_lightning = True  # nobody tells the switch of others
        self._checkpoints = CheckpointManager(self, self._phases)
        self._loading = FabricCheckpoints(self._phases, self._checkpoints)
        self.switch = PhaseSwitch(criterion)
        self.guard = guard if guard is not None else DivergenceGuard()
        self.total_steps = total_steps
        self._first_step = True
        self._modules: list[nn.Module] = []

    # What a user reads and calls, as of :class:`~lightning_onebit.OneBitDDPStrategy`

    @property
    def phase(self) -> Phase:
        """``Phase.WARMUP`` or ``Phase.COMPRESSED``."""
        return self._phases.phase

    @property
    def comm_stats(self) -> CommStats:
        """What was sent so far, by phase."""
        return self._phases.comm_stats

    @property
    def optimizer_steps(self) -> int:
        """Steps of the optimizer that has made fewest."""
        return self._phases.optimizer_steps

    @property
    def skipped_steps(self) -> int:
        """Steps that all ranks skipped because a gradient was infinite or NaN, those of all optimizers added up."""
        return self._phases.steps.skipped

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that were set up, in that order."""
        return list(self._phases.steps.made)

    @property
    def compressed_optimizers(self) -> Sequence[Optimizer]:
        """Those whose gradients are compressed once the warm-up is over: all."""
        return self._phases.optimizers.compressed

    @property
    def warmup_start(self) -> int:
        """Optimizer steps that were made when the warm-up was last resumed; 0 if it never was."""
        return self._phases.warmup_start

    @property
    def expected_compression_ratio(self) -> float:
        """Bytes of a step with float32 gradients over those of a compressed step, by the sizes of the parameters."""
        return self._phases.expected_compression_ratio

    @property
    def rounds_coarsely(self) -> bool:
        """Whether gradients come from numbers of 16 bits or fewer, by the precision of the run."""
        return str(self.precision.precision) not in ("32-true", "64-true")

    def freeze_variance(self, reason: str = "") -> None:
        """Freeze the second moment and compress from the next optimizer step on. Call on all ranks, between two steps.

        Args:
            reason: why now, for :meth:`report`.
        """
        self._phases.freeze_variance(reason)

    def refresh_variance(self) -> None:
        """Renew the frozen second moment: now or, with ``variance_refresh=None``, from the gradients of the next 16 steps.

        Call on all ranks, between a step and the next backward. All else, errors too, as
        :meth:`OneBitDDPStrategy.refresh_variance <lightning_onebit.OneBitDDPStrategy.refresh_variance>`.
        """
        self._phases.refresh_variance()

    def variance_drift(self) -> dict[str, Drift]:
        """By parameter, how well the second moment fits the gradients in the compressed phase."""
        return self._phases.variance_drift()

    def error_over_update(self) -> float:
        """Norm of this rank's worker error over that of the update. Reads all errors once."""
        return self._phases.error_over_update()

    def resume_warmup(self) -> None:
        """Go back to plain DDP. What error feedback has not applied yet waits, on each rank its own, in checkpoints too, and
        is handed to the next compressed phase; meanwhile it takes 4 + 4 / n bytes per parameter. Call on all ranks, between
        two steps.
        """
        self._phases.resume_warmup()

    def grad_norm(self, optimizer: Optimizer | None = None) -> Tensor:
        """The 2-norm of the mean gradient, 0-d and the same on all ranks: for decisions, which all must take alike.

        In the compressed phase ``p.grad`` is this rank's own, and so would be its norm; that of the mean is estimated,
        within about 1%. In warm-up it is exact. Call on all ranks, between backward and step, when gradients are unscaled.

        Args:
            optimizer: whose parameters; may be left out if there is one.
        """
        return self._phases.grad_norm(optimizer)

    def check_ranks_agree(self) -> None:
        """Raise :class:`~lightning_onebit.DivergenceError` on all ranks if they hold different bits. Collective."""
        self._phases.check_ranks_agree()

    def broadcast_decision(self, decision: bool) -> bool:
        """Rank 0's decision, on all ranks. Collective."""
        return self._phases.broadcast_decision(decision)

    def report(self) -> str:
        """What this rank has sent and how long its steps took, by phase, beside plain DDP: a table, and what it says.

        Of the run so far, or since it was resumed. Not collective.
        """
        return self._phases.comparison.report()

    def __repr__(self) -> str:
        return repr(self._phases)

    # Set-up

    @override
    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        with agreement(Communicator(), self.root_device, about="model or strategy") as settings:
            self._check_still_warming_up("a model")
            check_module(module)
            settings.update(strategy_settings(self, self._phases.options, self._ddp_kwargs) | module_settings(module))
            settings.update(precision_settings(self.precision) | criterion_settings([self.switch.criterion]))
            settings["total_steps"] = repr(self.total_steps)
            settings["every_n_steps of DivergenceGuard"] = repr(self.guard.every_n_steps)
        model = super().setup_module(module)
        self._modules.append(module)
        self._phases.names.update({p: name for name, p in module.named_parameters()})
        self._phases.communicate_for(model, self._timeout)
        return model

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        with agreement(Communicator(), self.root_device, about="optimizers") as settings:
            self._check_still_warming_up("an optimizer")
            check_optimizer(optimizer, self._phases.names)
            settings.update(optimizer_settings([optimizer], self._phases.names))
        if not self.optimizers:
            warn_if_alone(self)
        self._phases.steps.add(optimizer, self.precision, can_be_compressed=True)
        self._phases.optimizers = CompressibleOptimizers(compressed=self.optimizers)
        self._loading.watch(optimizer)
        return super().setup_optimizer(optimizer)

    def _check_still_warming_up(self, what: str) -> None:
        if self.phase is Phase.COMPRESSED:
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
            rank, step, timeout = self.global_rank, self.optimizer_steps, self._timeout
            explain_(error, rank=rank, phase=self.phase, step=step, timeout=timeout, resume="fabric.load(path, state)")
            raise

    @override
    def backward(self, *args: Any, **kwargs: Any) -> None:
        with self._failures_explained():
            self._start_switch()  # which may begin to compress with this very gradient
            passing("a backward")
            self._phases.drop_lost_state()
            self._loading.forget()
            super().backward(*args, **kwargs)
        self._phases.has_waiting_gradients = True  # until the next step

    @override
    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:  # type: ignore[override]
        phases = self._phases
        with self._failures_explained():
            self._start_switch()
            passing("an optimizer step")
            if unaveraged := phases.steps.unaveraged():
                reason = (
                    "it did not require gradients when `fabric.setup` made the DDP module, or is in no such module. HINT:"
                    " unfreeze parameters before, or set the module up once more"
                )
                raise unaveraged_error(unaveraged, phases.names, reason)
            phases.take_over_replaced_state()
            self._agree_on_infinities(optimizer)
            with phases.steps.step(optimizer):
                output = super().optimizer_step(optimizer, **kwargs)
            phases.has_waiting_gradients = False
            self.switch.after_step(self, self._modules[0] if len(self._modules) == 1 else nn.ModuleList(self._modules))
            self.guard.after_step(self)
            phases.compare_with_dense()
            return output

    def _start_switch(self) -> None:
        """Before the first backward, when all is set up; a checkpoint may have been loaded."""
        if self._first_step and self.optimizers:
            self._first_step = False
            self.switch.start(self, total_steps=self.total_steps or math.inf)

    def _agree_on_infinities(self, optimizer: Optimizer) -> CompressedOptimizer | None:
        """Before gradients are unscaled: see :mod:`lightning_onebit.lightning.loss_scaling`. Doing it twice is no harm.

        Collective, if losses are scaled. Returns what steps ``optimizer``, ``None`` in warm-up.
        """
        self._phases.begin_compressing()
        compressed = self._phases.compressed.get(optimizer)
        if compressed is not None and self._phases.steps.scales_losses:
            compressed.spread_nonfinite_()
        return compressed

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
        if float(norm_type) != 2.0 and self.world_size > 1:  # now, not at the switch
            raise ValueError(
                f"Invalid norm_type: {norm_type}. Must be 2, as in the compressed phase no rank has the mean gradient, and"
                " only its 2-norm can be estimated from what the ranks can tell each other. HINT: leave norm_type out, or"
                " clip values, with clip_val."
            )
        compressed = self._agree_on_infinities(optimizer)
        if compressed is None:
            return super().clip_gradients_norm(module, optimizer, max_norm, norm_type, error_if_nonfinite)
        self.precision.unscale_gradients(optimizer)
        norm = compressed.clip_grad_norm_(float(max_norm))
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                "The norm of the mean gradient is infinite or NaN, so it cannot be clipped. HINT: with"
                " error_if_nonfinite=False the step is skipped, on all ranks."
            )
        return norm

    # Collectives of user code

    @contextmanager
    def _elsewhere(self, place: str, group: Any | None = None) -> Iterator[None]:
        with self._failures_explained(), elsewhere(place, group):
            yield

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        with self._elsewhere("a barrier"):
            super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        with self._elsewhere("a broadcast"):
            return super().broadcast(obj, src)

    @override
    def all_reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        with self._elsewhere("a reduction", group):
            return super().all_reduce(tensor, group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        with self._elsewhere("an all-gather", group):
            return super().all_gather(tensor, group, sync_grads)

    # State

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """The user's, or else one that never leaves half a file behind."""
        self._checkpoint_io = durable_io(self._checkpoint_io)
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def save_checkpoint(self, path: Any, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As Fabric's, plus this rank's part, in a folder beside ``path``. Collective.

        What is not in the part goes into the optimizers' state dicts, where a stock optimizer disregards it.
        """
        snapshot = self._checkpoints.snapshot() if any(isinstance(value, Optimizer) for value in state.values()) else None
        if snapshot is not None:
            state = {
                key: self._loading.with_header(value, self.get_optimizer_state(value), snapshot.header)
                if isinstance(value, Optimizer) and value in self.optimizers
                else value
                for key, value in state.items()
            }
        write = partial(super().save_checkpoint, path, state, *args, **kwargs)
        in_background = isinstance(self.checkpoint_io, AsyncCheckpointIO)
        self._checkpoints.save(path, snapshot, write, in_background=in_background)

    @override
    def load_checkpoint(self, path: Any, state: Any | None = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Fabric's; goes on as the checkpoint says if ``state`` holds all optimizers. Collective."""
        objects = list(state.values()) if isinstance(state, dict) else [state]
        read = partial(super().load_checkpoint, path, state, *args, **kwargs)
        return self._loading.load(path, objects, read, self.root_device)

    @override
    def teardown(self) -> None:
        self._phases.release(after_failure=False)
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
