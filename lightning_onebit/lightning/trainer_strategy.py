"""The Lightning strategy: DDP whose gradients are averaged densely during warm-up and as signs afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.strategies import _StrategyRegistry
from lightning.pytorch.core.optimizer import LightningOptimizer, _MockOptimizer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.strategies.strategy import TBroadcast
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_onebit.checkpoint.io import durable_io
from lightning_onebit.checkpoint.manager import CheckpointManager
from lightning_onebit.checkpoint.state import CHECKPOINT_KEY, PATH, Snapshot, read_header
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.stats import CommStats
from lightning_onebit.comm.watch import elsewhere, passing
from lightning_onebit.config import CompressionConfig, Scale, Space, VarianceRefresh, WarmupPrecision
from lightning_onebit.consistency.agreement import agreement
from lightning_onebit.consistency.settings import (
    checkpoint_settings,
    criterion_settings,
    module_settings,
    optimizer_settings,
    strategy_settings,
    trainer_settings,
)
from lightning_onebit.engine.nonfinite import check_max_skipped_steps
from lightning_onebit.freeze.drift import Drift
from lightning_onebit.lightning.callbacks.comm_monitor import CommMonitor
from lightning_onebit.lightning.callbacks.divergence_guard import DivergenceGuard, ensure_divergence_guard
from lightning_onebit.lightning.callbacks.phase_switch import PhaseSwitch, ensure_phase_switch
from lightning_onebit.lightning.compressible import compressible, listed
from lightning_onebit.lightning.failures import end_at_exit_, explain_, last_checkpoint
from lightning_onebit.lightning.loss_scaling import with_agreement
from lightning_onebit.lightning.optimizer_steps import unaveraged_error
from lightning_onebit.lightning.overlap import choose_overlap
from lightning_onebit.lightning.phase_controller import PhaseController
from lightning_onebit.lightning.preflight import (
    WrittenParameters,
    check_arguments,
    check_module,
    check_optimizer,
    warn_if_alone,
)
from lightning_onebit.lightning.signals import AgreedSignals
from lightning_onebit.phase import Phase

ABOUT_MODEL = "model or strategy"
START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
"""How processes are started, by the end of the strategy's registered name."""


class OneBitDDPStrategy(DDPStrategy):
    """DDP with 1-bit error-feedback communication (1-bit Adam, arXiv 2102.02888; 1-bit SGD, Seide et al. 2014).

    Starts as plain DDP, bitwise. :meth:`freeze_variance`, called by :class:`~lightning_onebit.PhaseSwitch`, starts the
    compressed phase: gradients stay local, and the optimizer step exchanges signs and block scales.

    Args:
        block_size: elements that share one scale; a multiple of 8, at most 16384.
        scale: ``"l2"``: root mean square of a block; ``"l1"``: mean absolute value.
        space: what is quantized: ``"update"``, the preconditioned momentum m/D, or ``"momentum"``, as in the paper.
            There m/D is clamped to the most that an unfrozen Adam could have.
        variance_refresh: when the frozen second moment is renewed: ``"auto"``: often at first, then every 64 steps; a
            number: every so many steps; ``None``: never, as in the paper, and always in momentum space.
        overlap: whether buckets are sent during backward, as their gradients come. The result is the same, bit for bit.
            ``"auto"``: on a GPU, where nothing can change gradients between backward and step; says what it chose and why.
        hierarchical: whether ranks of a node average their gradients first, at full precision, and each sends its share.
            ``"auto"``: with several nodes of several processes.
        bucket_cap_mb: size of DDP's gradient buckets and of one compressed exchange, MiB; ``None``: DDP's default for
            the former, a quarter of the model, between 4 and 64, for the latter.
        warmup_precision: what gradients travel as in warm-up. ``"fp32"``: as they are, bitwise as under DDP; ``"bf16"``:
            rounded to bfloat16, half the bytes.
        max_skipped_steps: a run that skips this many steps in a row, because gradients are infinite or NaN, ends with an
            error that names the parameters; ``None``: never. Steps that a loss scaler skips count where its scale is
            down to 1.
        **kwargs: every argument of :class:`~lightning.pytorch.strategies.DDPStrategy` and of
            :class:`~torch.nn.parallel.DistributedDataParallel`.

    Raises:
        TypeError: if an argument is unknown; the message names the nearest one, or what takes its place.
        ValueError: if an argument is outside its domain, or asks for another communication of gradients.
    """

    def __init__(
        self,
        *args: Any,
        block_size: int = 2048,
        scale: Scale = "l2",
        space: Space = "update",
        variance_refresh: VarianceRefresh = "auto",
        overlap: bool | Literal["auto"] = "auto",
        hierarchical: bool | Literal["auto"] = "auto",
        bucket_cap_mb: float | None = None,
        warmup_precision: WarmupPrecision = "fp32",
        max_skipped_steps: int | None = 100,
        **kwargs: Any,
    ) -> None:
        check_arguments(type(self), OneBitDDPStrategy, kwargs)
        super().__init__(*args, bucket_cap_mb=bucket_cap_mb, **kwargs)
        self.config = CompressionConfig(
            block_size=block_size,
            scale=scale,
            space=space,
            variance_refresh=variance_refresh,
            bucket_cap_mb=bucket_cap_mb,
            warmup_precision=warmup_precision,
        )
        self.overlap = overlap
        self.hierarchical = hierarchical
        self.max_skipped_steps = check_max_skipped_steps(max_skipped_steps)
        self._phases = PhaseController(self)
        self._checkpoints = CheckpointManager(self, self._phases)
        self._final_snapshot: Snapshot | None = None
        self._has_stated_model = False
        self._some_are_frozen = False
        self._signals: AgreedSignals | None = None
        self._written = WrittenParameters()

    # What a user reads and calls

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
        """Steps of the optimizer that can be compressed: with several, of the one that made fewest."""
        return self._phases.optimizer_steps

    @property
    def skipped_steps(self) -> int:
        """Steps that all ranks skipped because a gradient was infinite or NaN, those of all optimizers added up.

        In warm-up, which is plain DDP, only a loss scaler skips steps.
        """
        return self._phases.steps.skipped

    @property
    def compressed_optimizers(self) -> Sequence[Optimizer]:
        """Those whose gradients are compressed once the warm-up is over; empty before optimizers are set up."""
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
        return str(self.precision_plugin.precision) not in ("32-true", "64-true")

    def freeze_variance(self, reason: str = "") -> None:
        """Freeze the second moment and compress from the next optimizer step on.

        Call on all ranks, between two batches. Without effect in the compressed phase. With one process nothing is
        quantized: training goes on as exact Adam with a frozen second moment, or as exact SGD.

        Args:
            reason: why now, for :meth:`report`.

        Raises:
            ValueError: if a second moment is infinite or NaN.
            RuntimeError: outside a running training, within an optimizer step (with automatic optimization, `training_step`
                is), or before every optimizer that has a second moment has made a step.
        """
        self._phases.freeze_variance(reason)

    def refresh_variance(self) -> None:
        """Renew the frozen second moment once, from the gradients of all ranks, where a change of scale is known.

        Call on all ranks, in the compressed phase, between a step and the next backward.

        Beside the refreshes of ``variance_refresh``, v_i of every rank has all gradients so far, the latest most: D is
        renewed now, valid from the next step on. Best some steps after the change.

        With ``variance_refresh=None`` no rank has a v_i: the gradients of the next 16 steps of an optimizer are collected, 4
        bytes per parameter (over L with nodes of L ranks), and renew D after them, for good. Call it when the change has
        come. Nothing of before is in it: a coordinate with one gradient in these 16 steps gets a D as if it had always one
        in 16; without any, it keeps its own. A call meanwhile begins anew. A checkpoint holds what is collected; on another
        number of ranks, or without the part of one, that begins anew, with another ``variance_refresh`` it is over. So it is
        after :meth:`resume_warmup`, and where the optimizer's state is replaced.

        Raises:
            RuntimeError: on all ranks, in warm-up, while gradients wait for a step, without a second moment, or with
                ``space="momentum"``.
        """
        self._phases.refresh_variance()

    def variance_drift(self) -> dict[str, Drift]:
        """By parameter, how well the second moment fits the gradients in the compressed phase, frozen or renewed.

        Estimated every 16 optimizer steps, from 1 KB per parameter. The same on all ranks; empty in warm-up and without a
        second moment. With one process, or node, nothing is estimated. Not collective, and nothing is modified.

        Returns:
            By name: ``ratio``: mean square of the mean gradient over D, 1 where it fits; ``clamped``: share of clamped
            elements; ``share`` of the tensor in all; ``last_ratio``: the ratio by the last estimate alone; ``estimates``.
        """
        return self._phases.variance_drift()

    def error_over_update(self) -> float:
        """Norm of this rank's worker error over that of the update; NaN before the first compressed step. Not collective.

        Reads all errors once, and on a GPU waits for it: not for every step.
        """
        return self._phases.error_over_update()

    def resume_warmup(self) -> None:
        """Go back to plain DDP and the optimizers' own state; the second moment moves on.

        What error feedback has not applied yet waits, on each rank its own, in checkpoints too, and is handed to the next
        compressed phase. Meanwhile it takes 4 + 4 / n bytes per parameter beside Adam's; ``repr(strategy)`` says that it is
        there. Where training ends before, it is never applied, as at the end of a compressed phase.

        :class:`~lightning_onebit.PhaseSwitch` judges this warm-up as if the run began with it, so it will freeze again.
        Call on all ranks, between two batches. Without effect in warm-up.

        Raises:
            RuntimeError: within an optimizer step.
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
        """Compare parameters, momentum and second moments of all ranks, bit for bit, by checksums. Collective.

        :class:`~lightning_onebit.DivergenceGuard` calls it every so many steps. Call on all ranks, between two batches.

        Raises:
            DivergenceError: on all ranks, if they differ.
            RuntimeError: outside a running training.
        """
        self._phases.check_ranks_agree()

    def broadcast_decision(self, decision: bool) -> bool:
        """Rank 0's decision, on all ranks. Collective."""
        return self._phases.broadcast_decision(decision)

    def report(self) -> str:
        """What this rank has sent and how long its steps took, by phase, beside plain DDP: a table, and what it says.

        Of the run so far, or since it was resumed. Rank 0 prints it at the end of every ``fit``. Not collective.
        """
        return self._phases.comparison.report()

    def __repr__(self) -> str:
        return repr(self._phases)

    # Set-up

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self.lightning_module is None:  # process groups by themselves, without a run
            return
        trainer = self.lightning_module.trainer
        self._signals = AgreedSignals(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            ensure_phase_switch(trainer)
            ensure_divergence_guard(trainer)

    @override
    def configure_ddp(self) -> None:
        self._phases.forget_run()
        self._final_snapshot = None
        super().configure_ddp()  # calls :meth:`_setup_model`

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        self._has_stated_model = False
        self._written = WrittenParameters()
        try:
            super().setup(trainer)
        except Exception:
            if trainer.state.fn == TrainerFn.FITTING and not self._has_stated_model:
                with agreement(Communicator(), self.root_device, about=ABOUT_MODEL):  # where the others are waiting
                    raise
            raise

    @override
    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        self._has_stated_model = True
        with agreement(Communicator(), self.root_device, about=ABOUT_MODEL) as settings:
            settings.update(strategy_settings(self, self._phases.options, self._ddp_kwargs) | module_settings(model))
        self._some_are_frozen = not all(p.requires_grad for p in model.parameters())
        wrapped = super()._setup_model(model)
        self._phases.communicate_for(wrapped, self._timeout)
        self._pl_static_graph_delay_done = False  # Lightning's note of what the first backward through it does
        self._name_parameters(model)
        return wrapped

    def _name_parameters(self, model: nn.Module) -> None:
        self._phases.names.clear()
        self._phases.names.update({p: name for name, p in model.named_parameters()})

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        with agreement(Communicator(), self.root_device, about="optimizers or Trainer") as settings:
            self._set_up_optimizers(trainer)
            settings.update(optimizer_settings(self.optimizers, self._phases.names) | trainer_settings(trainer))
            callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
            settings.update(criterion_settings(c.criterion for c in callbacks if isinstance(c, PhaseSwitch)))
            monitors = [c.entries(trainer) for c in callbacks if isinstance(c, CommMonitor)]
            settings["entries of CommMonitor"] = ", ".join(monitors) or "none"  # which are made by all ranks together
            guards = [repr(c.every_n_steps) for c in callbacks if isinstance(c, DivergenceGuard)]
            settings["every_n_steps of DivergenceGuard"] = ", ".join(guards)
            settings["exchanges start during backward"] = repr(self._phases.overlaps)

    def _set_up_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        # `configure_optimizers` may return Lightning's wrappers, which are made anew here.
        self.optimizers = [o.optimizer if isinstance(o, LightningOptimizer) else o for o in self.optimizers]
        module = self.lightning_module
        assert module is not None
        self._name_parameters(module)
        check_module(module)
        # Lightning's stands for none at all.
        found = compressible([o for o in self.optimizers if not isinstance(o, _MockOptimizer)])
        for optimizer in found.compressed:
            check_optimizer(optimizer, self._phases.names)
        self._phases.steps.made.clear()
        self._phases.overlaps = choose_overlap(self, self.overlap, trainer, module)
        for optimizer in self.optimizers:
            self._phases.steps.add(optimizer, self.precision_plugin, can_be_compressed=optimizer not in found.dense)
        self._phases.optimizers = found
        warn_if_alone(self)
        if self.world_size > 1:
            for remark in found.remarks(module):
                rank_zero_warn(f"{type(self).__name__}: {remark}")

    @override
    def _register_ddp_hooks(self) -> None:
        """Lightning registers a user's hook here, on CUDA only; ours is registered in :meth:`configure_ddp`."""

    @override
    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        self.precision_plugin.clip_grad_by_norm = self._clip_grad_by_norm  # type: ignore[method-assign]

    # Between batches: signals, and parameters that begin to train during the run

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        passing("an evaluation")
        if self._signals is not None:
            self._signals.end_alone()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        passing("the beginning of a batch")
        assert self._signals is not None
        phases = self._phases
        self._signals.agree(phases.compressed.values())
        phases.drop_lost_state()
        added, unaveraged = phases.added_parameters(), phases.steps.unaveraged()
        if self._some_are_frozen:  # only then a rank may be alone with a parameter that begins to train
            about = "which parameters are trained from this batch on"
            with agreement(Communicator(), self.root_device, about=about) as settings:
                named = (phases.names.get(p, "a parameter") for p in dict.fromkeys([*unaveraged, *added]))
                settings["begin to train"] = ", ".join(named)
        for optimizer in phases.optimizers.compressed if unaveraged or added else ():
            check_optimizer(optimizer, phases.names)  # which did not look at what was frozen
        if unaveraged:
            phases.steps.averaged.clear()
            self.model = self._setup_model(cast(pl.LightningModule, self.lightning_module))
            if unaveraged := phases.steps.unaveraged():
                reason = "it belongs to no submodule of the LightningModule. HINT: register it there"
                raise unaveraged_error(unaveraged, phases.names, reason)
        if added:
            rank_zero_warn(
                f"{type(self).__name__}: new parameters are trained, which have no second moment yet:"
                f" {listed(added, phases.names)}. All go back to warm-up, that is plain DDP, until PhaseSwitch freezes the"
                " second moment again. HINT: unfreeze or add them before the first freeze, and there is only one warm-up."
            )
            phases.resume_warmup()
        phases.compare_with_dense()
        self._signals.travel_with(phases.compressed.values())
        if cast(pl.LightningModule, self.lightning_module).automatic_optimization:
            self._written.begin(phases.names)

    # Steps

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._checkpoints.put_back_gradients()  # now, as the Trainer has set all to None after loading

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        if unaveraged := self._phases.steps.unaveraged():
            reason = (
                "it began to require gradients within `training_step`. HINT: unfreeze it in a hook that runs before, such as"
                " `on_train_batch_start`"
            )
            raise unaveraged_error(unaveraged, self._phases.names, reason)
        self._written.end(self._phases.names)
        if self._phases.overlaps and cast(DistributedDataParallel, self.model).require_backward_grad_sync:
            self._freeze_stock_state()
        super().pre_backward(closure_loss)
        self._phases.has_waiting_gradients = True  # until the next step

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        phases = self._phases
        if optimizer not in phases.steps.made:
            raise RuntimeError(
                f"The optimizer ({type(optimizer).__name__}) is not one of those that this run began with, so its gradients"
                " may be local ones. HINT: return all optimizers from `configure_optimizers`, and change their parameter"
                " groups instead of replacing them."
            )
        passing("an optimizer step")
        if phases.has_stock_state:
            self._freeze_stock_state()
        if phases.steps.scales_losses and optimizer in phases.steps.compressed:
            closure = with_agreement(closure, phases.steps.compressed[optimizer])
        with phases.steps.step(optimizer):
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        phases.has_waiting_gradients = False
        return output

    def _freeze_stock_state(self) -> None:
        """Before the first exchange of a step: freeze state of the warm-up, or that of user code. Collective then."""
        self._phases.take_over_replaced_state()
        self._phases.begin_compressing()
        if self._signals is not None:
            self._signals.travel_with(self._phases.compressed.values())

    def _clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        """Takes the place of the precision plugin's: in the compressed phase gradients are local, and so are their norms."""
        self._phases.begin_compressing()
        stock = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        compressed = self._phases.compressed.get(stock)
        if compressed is None:
            plugin = self.precision_plugin
            type(plugin).clip_grad_by_norm(plugin, optimizer, clip_val)
        else:
            compressed.clip_grad_norm_(float(clip_val))

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
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """As Lightning's, plus this rank's part, in a folder beside it. Collective, unless there was an exception."""
        write = partial(super().save_checkpoint, checkpoint, filepath, storage_options)
        if "optimizer_states" not in checkpoint:  # weights only
            write()
        elif self._interrupted:  # without the others, so without parts
            if self.phase is Phase.COMPRESSED or self._phases.waiting_errors:
                checkpoint[CHECKPOINT_KEY] = self._checkpoints.header_after_exception(is_torn=self._phases.steps.is_torn)
            write()
        else:
            snapshot = self._final_snapshot or self._checkpoints.snapshot()
            if snapshot is not None:
                checkpoint[CHECKPOINT_KEY] = snapshot.header
            in_background = isinstance(self.checkpoint_io, AsyncCheckpointIO)
            self._checkpoints.save(filepath, snapshot, write, in_background=in_background)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        self._checkpoints.remove_parts(filepath)

    @override
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        if isinstance(checkpoint.get(CHECKPOINT_KEY), dict):
            checkpoint[CHECKPOINT_KEY][PATH] = os.fspath(checkpoint_path)
        return checkpoint

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        steps = self._phases.steps
        self._phases.drop_compressed_state()
        with agreement(Communicator(), self.root_device, about="the checkpoint that they resume from") as settings:
            super().load_optimizer_state_dict(checkpoint)
            header = read_header(checkpoint[CHECKPOINT_KEY]) if CHECKPOINT_KEY in checkpoint else None
            saved = [] if header is None else header["optimizer_steps"]
            steps.count_all_loaded(saved, total=checkpoint.get("global_step", 0))
            settings.update(checkpoint_settings(steps.made.values(), header))
        if header is not None:
            positions = range(len(self._phases.compressed_optimizers))
            self._checkpoints.resume(header, header["optimizers"], positions, header.get(PATH))

    # The end

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        passing("the end of training")
        is_trial = self._trainer is not None and self._trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.world_size > 1 and self.comm_stats.steps and not is_trial:
            rank_zero_info(f"{type(self).__name__}: what this run sent, and how long it took, on rank 0:\n{self.report()}")

    @property
    def _trainer(self) -> pl.Trainer | None:
        """The Trainer of this rank; ``None`` in a process that is no rank, as it only spawned or forked them."""
        return None if self.lightning_module is None else self.lightning_module._trainer

    @property
    def _interrupted(self) -> bool:
        """Whether there was an exception: the other ranks may be anywhere, so nothing collective from here on."""
        return self._trainer is not None and self._trainer.interrupted

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        # Lightning's advice for unused parameters is to take a strategy that would not compress.
        advice = {"'ddp_find_unused": "'onebit_ddp_find_unused", "=DDPStrategy(": f"={type(self).__name__}("}
        for old, new in advice.items():
            exception.args = tuple(arg.replace(old, new) if isinstance(arg, str) else arg for arg in exception.args)
        if self._trainer is not None:
            step, checkpoint = self._trainer.global_step, last_checkpoint(self._trainer)
            rank, timeout = self.global_rank, self._timeout
            resume = f"trainer.fit(..., ckpt_path={'...' if checkpoint is None else repr(checkpoint)})"
            explain_(exception, rank=rank, phase=self.phase, step=step, timeout=timeout, resume=resume)
        if isinstance(self.launcher, _SubprocessScriptLauncher):
            end_at_exit_(self.launcher.procs)

    # Collectives of Lightning and of user code

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        # Lightning has one after saving. If this rank alone failed it would wait for the timeout, and its error be lost.
        if not self._interrupted:
            with elsewhere("a barrier"):
                super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        with elsewhere("a broadcast"):
            return super().broadcast(obj, src)

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        with elsewhere("a reduction", group):
            return super().reduce(tensor, group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        with elsewhere("an all-gather", group):
            return super().all_gather(tensor, group, sync_grads)

    @override
    def teardown(self) -> None:
        if self._phases.hook_state is not None and not self._interrupted:
            # Lightning takes the model off the device now, so errors must leave it, too: a user may still save a checkpoint.
            self._final_snapshot = self._checkpoints.snapshot()
            self._phases.retire()
        if self._signals is not None:
            self._signals.close()
        self._phases.release(after_failure=self._interrupted)
        super().teardown()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        for suffix, start_method in START_METHODS.items():
            for unused in (None, False, True):
                name = f"onebit_ddp{suffix}" + ("" if unused is None else f"_find_unused_parameters_{unused}".lower())
                init_params = {} if unused is None else {"find_unused_parameters": unused}
                if name not in strategy_registry:
                    description = f"1-bit DDP strategy with `start_method` '{start_method}'"
                    strategy_registry.register(name, cls, description=description, start_method=start_method, **init_params)
