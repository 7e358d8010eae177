"""The Lightning strategy: DDP whose gradients are averaged densely during warm-up and as signs afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, cast

import lightning.pytorch as pl
from lightning.fabric.plugins import Precision
from lightning.fabric.strategies import _StrategyRegistry
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_onebit.checkpoint.manager import SavedPhases
from lightning_onebit.checkpoint.parts import Parts
from lightning_onebit.checkpoint.state import CHECKPOINT_KEY, PATH, Snapshot, read_header
from lightning_onebit.config import CompressionConfig, Scale, Space
from lightning_onebit.consistency.settings import (
    checkpoint_facts,
    module_facts,
    optimizer_facts,
    strategy_facts,
    trainer_facts,
)
from lightning_onebit.lightning.compressible import divide, listed
from lightning_onebit.lightning.failures import end_at_exit_, last_checkpoint
from lightning_onebit.lightning.loss_scaling import with_agreement
from lightning_onebit.lightning.overlap import obstacle_to_overlap
from lightning_onebit.lightning.preflight import check_ddp_arguments, check_module, check_optimizer
from lightning_onebit.lightning.pytorch_lightning import HINT, comes_from_twin
from lightning_onebit.lightning.signals import AgreedSignals
from lightning_onebit.phase import Phase

ABOUT_MODEL = "model or strategy"


class OneBitDDPStrategy(SavedPhases, DDPStrategy):
    """DDP with 1-bit error-feedback communication (1-bit Adam, arXiv 2102.02888).

    Starts as plain DDP, bitwise. :meth:`freeze_variance`, called by :class:`~lightning_onebit.PhaseSwitch`, starts the
    compressed phase: gradients stay local, and the optimizer step exchanges signs and block scales.

    Args:
        block_size: elements that share one scale; a multiple of 8, at most 16384.
        scale: ``"l2"``: root mean square of a block; ``"l1"``: mean absolute value.
        space: what is quantized: ``"update"``, the preconditioned momentum m/D, or ``"momentum"``, as in the paper.
        overlap: whether buckets are sent during backward, as their gradients come. The result is the same, bit for bit.
            ``"auto"``: on a GPU, where nothing can change gradients between backward and step; says what it chose and why.
        hierarchical: whether ranks of a node average their gradients first, at full precision, and each sends its share.
            ``"auto"``: with several nodes of several processes.
        bucket_cap_mb: size of DDP's gradient buckets and of one compressed exchange, MiB; ``None``: DDP's default for
            the former, a quarter of the model, between 4 and 25, for the latter.
        max_skipped_steps: a run that skips this many steps in a row, because gradients are infinite or NaN, ends with an
            error that names the parameters; ``None``: never. Steps that a loss scaler skips count where its scale is
            down to 1.
        **kwargs: every argument of :class:`~lightning.pytorch.strategies.DDPStrategy` and of
            :class:`~torch.nn.parallel.DistributedDataParallel`.

    Raises:
        ValueError: if an argument is outside its domain, or asks for another communication of gradients.
    """

    def __init__(
        self,
        *args: Any,
        block_size: int = 2048,
        scale: Scale = "l2",
        space: Space = "update",
        overlap: bool | Literal["auto"] = "auto",
        hierarchical: bool | Literal["auto"] = "auto",
        bucket_cap_mb: float | None = None,
        max_skipped_steps: int | None = 100,
        **kwargs: Any,
    ) -> None:
        check_ddp_arguments(type(self).__name__, kwargs)
        super().__init__(*args, bucket_cap_mb=bucket_cap_mb, **kwargs)
        config = CompressionConfig(block_size=block_size, scale=scale, space=space, bucket_cap_mb=bucket_cap_mb)
        self._set_up_phases(config, overlap=overlap, hierarchical=hierarchical, max_skipped_steps=max_skipped_steps)
        self._final_snapshot: Snapshot | None = None
        self._has_stated_model = False
        self._some_are_frozen = False
        self._signals: AgreedSignals | None = None

    # Set-up

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        self._signals = AgreedSignals(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            # Here, as it is built on this module.
            from lightning_onebit.lightning.callbacks.divergence_guard import ensure_divergence_guard
            from lightning_onebit.lightning.callbacks.phase_switch import ensure_phase_switch

            ensure_phase_switch(trainer)
            ensure_divergence_guard(trainer)

    @override
    def configure_ddp(self) -> None:
        self._forget_run()
        self._final_snapshot = None
        super().configure_ddp()  # calls :meth:`_setup_model`

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        self._has_stated_model = False
        try:
            super().setup(trainer)
        except Exception:
            if trainer.state.fn == TrainerFn.FITTING and not self._has_stated_model:
                with self._agreement(ABOUT_MODEL):  # where the others are waiting
                    raise
            raise

    @override
    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        self._has_stated_model = True
        with self._agreement(ABOUT_MODEL) as facts:
            facts.update({**strategy_facts(self), **module_facts(model)})
        self._some_are_frozen = not all(p.requires_grad for p in model.parameters())
        wrapped = super()._setup_model(model)
        self._communicate_for(wrapped)
        self._pl_static_graph_delay_done = False  # Lightning's note of what the first backward through it does
        self._names = {p: name for name, p in model.named_parameters()}
        return wrapped

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        with self._agreement("optimizers or Trainer") as facts:
            self._set_up_optimizers(trainer)
            facts.update({**optimizer_facts(self.optimizers, self._names), **trainer_facts(trainer)})
            facts["exchanges start during backward"] = repr(self._overlaps)

    def _set_up_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        # `configure_optimizers` may return Lightning's wrappers, which are made anew here.
        self.optimizers = [o.optimizer if isinstance(o, LightningOptimizer) else o for o in self.optimizers]
        assert self.lightning_module is not None
        self._names = {p: name for name, p in self.lightning_module.named_parameters()}
        check_module(self.lightning_module)
        self._division = divide(self.optimizers)
        self._steps = dict.fromkeys(self.optimizers, 0)
        for optimizer in self._division.compressed:
            check_optimizer(optimizer, self._names)
        self._overlaps = self._choose_overlap(trainer)
        for optimizer in self._division.compressed:
            self._watch(optimizer)
        self._warn_if_alone()
        if self.world_size > 1:
            for remark in self._division.remarks(self.lightning_module):
                rank_zero_warn(f"{type(self).__name__}: {remark}")

    def _choose_overlap(self, trainer: pl.Trainer) -> bool:
        """Whether exchanges start during backward; says so, and why."""
        assert self.lightning_module is not None
        if self.world_size == 1 or self.overlap is False:
            return False
        obstacle = obstacle_to_overlap(trainer, self.lightning_module)
        if self.overlap is True:
            if obstacle is not None:
                raise ValueError(f"overlap=True is not possible: {obstacle}. HINT: use overlap='auto' or False.")
            return True
        if obstacle is None and self.root_device.type == "cpu":
            obstacle = "on CPU it costs more time than it hides"
        when = "during backward" if obstacle is None else f"in the optimizer step, as {obstacle}"
        rank_zero_info(f"{type(self).__name__}: once compressed, exchanges start {when} (overlap='auto').")
        return obstacle is None

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
        if self._signals is not None:
            self._signals.settle_alone()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        assert self._signals is not None
        self._signals.settle()
        added = self._added_parameters()
        unaveraged = self._unaveraged()
        if self._some_are_frozen:  # only then a rank may be alone with a parameter that begins to train
            with self._agreement("which parameters are trained from this batch on") as facts:
                facts["begin to train"] = ", ".join(
                    self._names.get(p, "a parameter") for p in dict.fromkeys([*unaveraged, *added])
                )
        if unaveraged:
            self._averaged.clear()
            self.model = self._setup_model(cast(pl.LightningModule, self.lightning_module))
            self._check_all_averaged("it belongs to no submodule of the LightningModule. HINT: register it there")
        if added:
            rank_zero_warn(
                f"{type(self).__name__}: new parameters are trained, which have no second moment yet:"
                f" {listed(added, self._names)}. All go back to warm-up, that is plain DDP, until PhaseSwitch freezes the"
                " second moment again. HINT: unfreeze or add them before the first freeze, and there is only one warm-up."
            )
            self.resume_warmup()
        self._begin_compressing()

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        self._check_all_averaged(
            "it began to require gradients within `training_step`. HINT: unfreeze it in a hook that runs before, such as"
            " `on_train_batch_start`"
        )
        super().pre_backward(closure_loss)

    # Steps

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._put_back_gradients()  # now, as the Trainer has set all to None after loading

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        self._has_waiting_gradients = True

    @property
    @override
    def _precision_in_use(self) -> Precision:
        return self.precision_plugin

    def _clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        """Takes the place of the precision plugin's: in the compressed phase gradients are local, and so are their norms."""
        compressed = self._compressed_of(optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer)
        if compressed is None:
            plugin = self.precision_plugin
            type(plugin).clip_grad_by_norm(plugin, optimizer, clip_val)
        else:
            compressed.clip_grad_norm_(float(clip_val))

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        if optimizer not in self._steps:
            raise RuntimeError(
                f"The optimizer ({type(optimizer).__name__}) is not one of those that this run began with, so its gradients"
                " may be local ones. HINT: return all optimizers from `configure_optimizers`, and change their parameter"
                " groups instead of replacing them."
            )
        compressed = self._compressed_of(optimizer)
        if compressed is None:
            with self._counting_skips(optimizer):
                output = super().optimizer_step(optimizer, closure, model, **kwargs)
            self.comm_stats[self._phase].steps += 1
        else:
            if self._scales_losses:
                closure = with_agreement(closure, compressed)
            with self._counting_skips(optimizer), self._compressed_step(optimizer):
                output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._has_waiting_gradients = False
        return output

    # State

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """As Lightning's, plus this rank's part, in a folder beside it. Collective, unless there was an exception."""
        save = partial(super().save_checkpoint, checkpoint, filepath, storage_options)
        if "optimizer_states" not in checkpoint:  # weights only
            save()
        elif self._interrupted:
            self._save_interrupted(checkpoint, save)
        else:
            snapshot = self._final_snapshot or self._snapshot()
            if snapshot is not None:
                checkpoint[CHECKPOINT_KEY] = snapshot.header
            self._save_with_parts(filepath, snapshot, save)

    def _save_interrupted(self, checkpoint: dict[str, Any], save: Callable[[], None]) -> None:
        """Without the others, so without parts."""
        if self._phase is Phase.COMPRESSED:
            torn = (
                " It came within a step: some parameters may be those of the next one already. HINT: rather resume from an"
                " earlier checkpoint."
            )
            rank_zero_warn(
                "Saving after an exception: the checkpoint does not hold the errors of error feedback."
                f"{torn if self._is_torn else ''}"
            )
            checkpoint[CHECKPOINT_KEY] = self._header(save_id=None, has_gradients=False)
        save()

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        Parts(filepath).remove(self.global_rank, self.world_size)

    @override
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        if isinstance(checkpoint.get(CHECKPOINT_KEY), dict):
            checkpoint[CHECKPOINT_KEY][PATH] = os.fspath(checkpoint_path)
        return checkpoint

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        self._leave_compressed_phase()
        with self._agreement("the checkpoint that they resume from") as facts:
            super().load_optimizer_state_dict(checkpoint)
            self._count_loaded_steps()
            header = read_header(checkpoint[CHECKPOINT_KEY]) if CHECKPOINT_KEY in checkpoint else None
            facts.update(checkpoint_facts(self._steps.values(), header))
        if header is not None:
            optimizers = header["optimizers"]
            self._resume(header, optimizers, range(len(optimizers)), header.get(PATH))

    # The end

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
            checkpoint = last_checkpoint(self._trainer)
            self._explain_failure_(exception, step=self._trainer.global_step, checkpoint=checkpoint)
        if isinstance(self.launcher, _SubprocessScriptLauncher):
            end_at_exit_(self.launcher.procs)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        # Lightning has one after saving. If this rank alone failed it would wait for the timeout, and its error be lost.
        if not self._interrupted:
            super().barrier(*args, **kwargs)

    @override
    def teardown(self) -> None:
        if self._hook_state is not None and not self._interrupted:
            # Lightning takes the model off the device now, so errors must leave it, too: a user may still save a checkpoint.
            self._final_snapshot = self._snapshot()
            for compressed in self._compressed.values():
                compressed.retire_()
            self._compressed.clear()
        if self._signals is not None:
            self._signals.close()
        self._release(after_failure=self._interrupted)
        super().teardown()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        for suffix, start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
            name = f"onebit_ddp{suffix}"
            variants: dict[str, dict[str, Any]] = {
                name: {},
                f"{name}_find_unused_parameters_false": {"find_unused_parameters": False},
                f"{name}_find_unused_parameters_true": {"find_unused_parameters": True},
            }
            for variant, init_params in variants.items():
                if variant not in strategy_registry:
                    strategy_registry.register(
                        variant,
                        cls,
                        description=f"1-bit DDP strategy with `start_method` '{start_method}'",
                        start_method=start_method,
                        **init_params,
                    )


def strategy_of(trainer: pl.Trainer) -> OneBitDDPStrategy:
    """The Trainer's strategy, if it is this one.

    Raises:
        TypeError: if it is another, or the Trainer is that of ``pytorch_lightning``.
    """
    if comes_from_twin(trainer):
        raise TypeError(HINT)
    if not isinstance(trainer.strategy, OneBitDDPStrategy):
        raise TypeError(
            f"This callback belongs to OneBitDDPStrategy, but the Trainer uses {type(trainer.strategy).__name__}. HINT: use"
            " Trainer(strategy='onebit_ddp')."
        )
    return trainer.strategy
