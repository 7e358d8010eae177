"""The Lightning strategy: DDP whose gradients are averaged densely during warm-up and as signs afterwards."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.strategies import _StrategyRegistry
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_onebit.checkpoint import CHECKPOINT_KEY, compressed_state, load_compressed_state
from lightning_onebit.comm.groups import ExchangeGroups, new_groups
from lightning_onebit.comm.lane import AnyLane, InlineLane, make_lane
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.config import CompressionConfig, Scale, Space
from lightning_onebit.ddp_hook import HookState, phase_hook
from lightning_onebit.division import Division, divide, listed
from lightning_onebit.engine import CompressedOptimizer
from lightning_onebit.optim import parameters_of
from lightning_onebit.overlap import obstacle_to_overlap
from lightning_onebit.phase import Phase
from lightning_onebit.preflight import check_module, check_optimizer, check_trainer
from lightning_onebit.stats import CommStats
from lightning_onebit.topology import Topology


class OneBitDDPStrategy(DDPStrategy):
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
        **kwargs: every argument of :class:`~lightning.pytorch.strategies.DDPStrategy` and of
            :class:`~torch.nn.parallel.DistributedDataParallel`.

    Raises:
        ValueError: if an argument is outside its domain, or asks for a communication hook or model averaging.
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
        **kwargs: Any,
    ) -> None:
        for name, value in (("overlap", overlap), ("hierarchical", hierarchical)):
            if value not in (True, False, "auto"):
                raise ValueError(f"Invalid {name}: {value!r}. Must be 'auto', True or False.")
        self.config = CompressionConfig(
            block_size=block_size,
            scale=scale,
            space=space,
            bucket_cap_mb=bucket_cap_mb,
        )
        for name in ("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper", "model_averaging_period"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{type(self).__name__} does its own gradient communication and cannot be combined with {name}="
                    f"{kwargs[name]!r}. HINT: leave it out, or use strategy='ddp'."
                )
        super().__init__(*args, bucket_cap_mb=bucket_cap_mb, **kwargs)
        self.comm_stats = CommStats()
        self._hook_state: HookState | None = None
        self._compressed: dict[Optimizer, CompressedOptimizer] = {}
        self._division = Division(compressed=[], dense={})
        self._steps: dict[Optimizer, int] = {}
        self._averaged: set[Tensor] = set()
        self._phase = Phase.WARMUP
        self._stepping = False
        self.overlap = overlap
        self.hierarchical = hierarchical
        self._overlaps = False
        self._groups: ExchangeGroups | None = None
        self._lane: AnyLane = InlineLane()

    # What a user reads and calls

    @property
    def phase(self) -> Phase:
        """``Phase.WARMUP`` or ``Phase.COMPRESSED``."""
        return self._phase

    @property
    def optimizer_steps(self) -> int:
        """Steps of the optimizer that can be compressed: with several, of the one that made fewest."""
        return min((self._steps[optimizer] for optimizer in self._division.compressed), default=0)

    def freeze_variance(self) -> None:
        """Freeze the second moment and compress from the next optimizer step on.

        Call on all ranks, between two batches. Without effect in the compressed phase. With one process nothing is
        quantized: training goes on as exact Adam with a frozen second moment.

        Raises:
            RuntimeError: outside ``fit``, or before every optimizer that can be compressed has made its first step.
        """
        if self._phase is Phase.COMPRESSED:
            return
        if self._hook_state is None:
            raise RuntimeError("freeze_variance() needs a running `trainer.fit`. HINT: call it from a callback.")
        if self.optimizer_steps == 0:
            waiting = [type(o).__name__ for o in self._division.compressed if not self._steps[o]]
            raise RuntimeError(
                f"freeze_variance() was called before the first optimizer step of {', '.join(waiting)}: no second moment"
                " yet. HINT: call it after a step."
            )
        self._enter_compressed_phase()

    def resume_warmup(self) -> None:
        """Go back to plain DDP: what error feedback still holds is applied, and the second moment moves on.

        :class:`~lightning_onebit.PhaseSwitch` judges this warm-up as if the run began with it, so it will freeze again.
        Call on all ranks, between two batches. Without effect in warm-up.
        """
        if self._phase is Phase.WARMUP:
            return
        for compressed in self._compressed.values():
            compressed.thaw_()
        self._compressed.clear()
        self._set_phase(Phase.WARMUP)

    # What callbacks need

    @property
    def compressed_optimizers(self) -> Sequence[Optimizer]:
        """Those whose gradients are compressed once the warm-up is over; empty before optimizers are set up."""
        return self._division.compressed

    def broadcast_decision(self, decision: bool) -> bool:
        """Rank 0's decision, on all ranks. Collective."""
        assert self._hook_state is not None
        communicator = self._hook_state.communicator
        return bool(communicator.broadcast_int(int(decision), device=self.root_device))

    # Set-up

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if trainer.state.fn == TrainerFn.FITTING:
            # Here, as it is built on this module.
            from lightning_onebit.callbacks.phase_switch import ensure_phase_switch

            ensure_phase_switch(trainer)

    @override
    def configure_ddp(self) -> None:
        self._reset()
        self._hook_state = HookState(Communicator())
        super().configure_ddp()
        if self._groups is None and self.world_size > 1:
            self._groups = new_groups(self._topology(self._hook_state.communicator), self._timeout)
        self._set_phase(Phase.WARMUP)

    @override
    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        wrapped = super()._setup_model(model)
        wrapped.register_comm_hook(self._hook_state, phase_hook)
        self._pl_static_graph_delay_done = False  # Lightning's note of what the first backward through it does
        self._averaged = {p for p in model.parameters() if p.requires_grad}
        return wrapped

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        assert self.lightning_module is not None
        check_trainer(trainer)
        check_module(self.lightning_module)
        self._division = divide(self.optimizers)
        self._steps = dict.fromkeys(self.optimizers, 0)
        for optimizer in self._division.compressed:
            check_optimizer(optimizer, self._names())
        self._overlaps = self._choose_overlap(trainer)
        for optimizer in self._division.compressed:
            optimizer.register_step_pre_hook(self._guard)
        if self.world_size == 1:
            rank_zero_warn(
                f"{type(self).__name__} runs with one process: there is nothing to send, so nothing is compressed and"
                " training is plain Adam. HINT: use devices=2 or more, or num_nodes."
            )
            return
        for remark in self._division.remarks(self.lightning_module):
            rank_zero_warn(f"{type(self).__name__}: {remark}")

    def _names(self) -> dict[Tensor, str]:
        assert self.lightning_module is not None
        return {p: name for name, p in self.lightning_module.named_parameters()}

    def _topology(self, communicator: Communicator) -> Topology:
        """The nodes, or a flat network if ranks are not numbered node by node. Collective."""
        flat = Topology(num_nodes=self.world_size, node_rank=self.global_rank)
        if self.hierarchical is False:
            return flat
        if self.num_nodes == 1 or self.num_processes == 1:
            if self.hierarchical is True:
                rank_zero_warn(
                    f"hierarchical=True has no effect with {self.num_nodes} node(s) of {self.num_processes} process(es):"
                    " it takes several nodes of several processes."
                )
            return flat
        nodes = Topology(
            num_nodes=self.num_nodes,
            node_rank=self.node_rank,
            local_world_size=self.num_processes,
            local_rank=self.local_rank,
        )
        misplaced = torch.tensor(nodes.rank != self.global_rank, dtype=torch.int32, device=self.root_device)
        communicator.all_reduce_max_(misplaced)
        if not misplaced:
            return nodes
        remark = "ranks are not numbered node by node, so exchanges cannot be hierarchical"
        if self.hierarchical is True:
            raise ValueError(f"hierarchical=True: {remark}. HINT: change the launcher's placement, or use 'auto'.")
        rank_zero_warn(f"{type(self).__name__}: {remark}: all ranks exchange with each other directly.")
        return flat

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
        plugin = self.precision_plugin
        if not isinstance(getattr(plugin.clip_grad_by_norm, "__self__", None), OneBitDDPStrategy):
            self._dense_clip_grad_by_norm = plugin.clip_grad_by_norm
        plugin.clip_grad_by_norm = self._clip_grad_by_norm  # type: ignore[method-assign]

    # Parameters that begin to train during the run

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        added = [p for compressed in self._compressed.values() for p in compressed.added_parameters()]
        if added:
            rank_zero_warn(
                f"{type(self).__name__}: new parameters are trained, which have no second moment yet:"
                f" {listed(added, self._names())}. All go back to warm-up, that is plain DDP, until PhaseSwitch freezes the"
                " second moment again. HINT: unfreeze or add them before the first freeze, and there is only one warm-up."
            )
            self.resume_warmup()
        if self._unaveraged():
            # DDP knows the parameters that required a gradient when it was made, and never averages those of others.
            self.model = self._setup_model(cast(pl.LightningModule, self.lightning_module))
            self._check_all_averaged("it belongs to no submodule of the LightningModule. HINT: register it there")

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        self._check_all_averaged(
            "it began to require gradients within `training_step`. HINT: unfreeze it in a hook that runs before, such as"
            " `on_train_batch_start`"
        )
        super().pre_backward(closure_loss)

    def _unaveraged(self) -> list[Tensor]:
        """Parameters that are trained, but that DDP does not know."""
        if self.world_size == 1:
            return []
        return [p for p in parameters_of(*self.optimizers) if p.requires_grad and p not in self._averaged]

    def _check_all_averaged(self, reason: str) -> None:
        unaveraged = self._unaveraged()
        if unaveraged:
            raise RuntimeError(
                f"The ranks would drift apart: DDP does not average the gradient of {listed(unaveraged, self._names())}, as"
                f" {reason}."
            )

    # Steps

    def _clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        """Takes the place of the precision plugin's: in the compressed phase gradients are local, and so are their norms."""
        compressed = self._compressed.get(optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer)
        if compressed is None:
            self._dense_clip_grad_by_norm(optimizer, clip_val)
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
        compressed = self._compressed.get(optimizer)
        if compressed is None:
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
            self.comm_stats[self._phase].steps += 1
        else:
            with self._replaced_step(optimizer, compressed):
                output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._steps[optimizer] += 1
        return output

    @contextmanager
    def _replaced_step(self, optimizer: Optimizer, compressed: CompressedOptimizer) -> Iterator[None]:
        """Within, ``optimizer.step`` is the compressed step. The object stays the same, as schedulers are bound to it."""

        def step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if not compressed.step():
                rank_zero_warn("A gradient was infinite or NaN on at least one rank: all ranks skip this step.")
            return loss

        previous = optimizer.__dict__.get("step")
        # The decorator runs the user's step hooks, as for every torch optimizer.
        optimizer.step = types.MethodType(Optimizer.profile_hook_step(step), optimizer)  # type: ignore[method-assign]
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers look at
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False
            if previous is None:
                del optimizer.step
            else:
                optimizer.step = previous  # type: ignore[method-assign]

    def _guard(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Step pre-hook: a raw ``optimizer.step()`` would apply local gradients, and the ranks would drift apart."""
        if self._phase is Phase.COMPRESSED and not self._stepping:
            raise RuntimeError(
                "In the compressed phase the optimizer must step through Lightning, but `step()` was called on the"
                " optimizer itself. HINT: use `self.optimizers()`, without `use_pl_optimizer=False`."
            )

    # State

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self._phase is Phase.COMPRESSED and "optimizer_states" in checkpoint:
            assert self.lightning_module is not None
            # After an exception the other ranks may be anywhere: nothing collective then.
            interrupted = self.lightning_module.trainer.interrupted
            checkpoint[CHECKPOINT_KEY] = compressed_state(list(self._compressed.values()), with_errors=not interrupted)
            if interrupted:
                rank_zero_warn("Saving after an exception: the checkpoint does not hold the errors of error feedback.")
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for compressed in self._compressed.values():
            compressed.close()
        self._compressed.clear()
        self._set_phase(Phase.WARMUP)
        super().load_optimizer_state_dict(checkpoint)
        for optimizer in self.optimizers:
            steps = (float(state["step"]) for state in optimizer.state.values() if "step" in state)
            self._steps[optimizer] = int(max(steps, default=0))
        state = checkpoint.get(CHECKPOINT_KEY)
        if state is not None:
            self._enter_compressed_phase()
            load_compressed_state(list(self._compressed.values()), state)

    def _enter_compressed_phase(self) -> None:
        assert self._hook_state is not None
        self._lane.close()
        self._lane = make_lane(self.root_device) if self.world_size > 1 else InlineLane()
        self._compressed = {
            optimizer: CompressedOptimizer(
                optimizer,
                self.config,
                self._hook_state.communicator,
                self._names(),
                groups=self._groups,
                lane=self._lane,
                overlap=self._overlaps,
            )
            for optimizer in self._division.compressed
        }
        self._hook_state.local = self._division.local_parameters()
        if self._overlaps:
            (compressed,) = self._compressed.values()
            self._hook_state.gradients_ready = compressed.gradients_ready
        self._set_phase(Phase.COMPRESSED)

    def _set_phase(self, phase: Phase) -> None:
        self._phase = phase
        if self._hook_state is not None:
            self._hook_state.communicator.counters = self.comm_stats[phase]
            if phase is Phase.WARMUP:
                self._hook_state.local = frozenset()
                self._hook_state.gradients_ready = None
        if self._groups is not None:
            self._groups.count_into(self.comm_stats[phase])

    def _reset(self) -> None:
        """Forget an earlier fit."""
        for compressed in self._compressed.values():
            compressed.close()
        self._compressed.clear()
        self._steps.clear()
        self.comm_stats = CommStats()

    @override
    def teardown(self) -> None:
        self._lane.close()
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
        TypeError: if it is another.
    """
    if not isinstance(trainer.strategy, OneBitDDPStrategy):
        raise TypeError(
            f"This callback belongs to OneBitDDPStrategy, but the Trainer uses {type(trainer.strategy).__name__}. HINT: use"
            " Trainer(strategy='onebit_ddp')."
        )
    return trainer.strategy
