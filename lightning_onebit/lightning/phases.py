"""A run's two phases, whoever runs it: what the strategies for Trainer and Fabric have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from weakref import ref

import torch
from lightning.fabric.plugins import Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_onebit.comm.exchanger import AnyLane, InlineLane, make_lane
from lightning_onebit.comm.groups import ExchangeGroups, new_groups
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.stats import CommStats
from lightning_onebit.comm.topology import ALONE, Topology
from lightning_onebit.config import CompressionConfig
from lightning_onebit.consistency.agreement import agreement
from lightning_onebit.consistency.divergence import difference_between_ranks, divergence_error, replicas, replicated_state
from lightning_onebit.engine.flat import all_finite
from lightning_onebit.engine.nonfinite import Found, SkippedSteps, check_max_skipped_steps
from lightning_onebit.engine.optimizer import CompressedOptimizer, check_second_moments
from lightning_onebit.lightning.compressible import Division, listed
from lightning_onebit.lightning.ddp_hook import HookState, phase_hook
from lightning_onebit.lightning.failures import explain_
from lightning_onebit.lightning.loss_scaling import found_inf_after_unscaling_, loss_scale, uses_loss_scaling
from lightning_onebit.lightning.replaced_step import replaced_step
from lightning_onebit.methods import parameters_of
from lightning_onebit.phase import Phase
from lightning_onebit.quantize.reference import ReferenceCodec


class TwoPhases:
    """Mixed into a DDP strategy: owns the phase, the DDP hook, the compressed optimizers and their process groups."""

    if TYPE_CHECKING:  # what the strategy brings
        optimizers: list[Optimizer]
        num_nodes: int
        _timeout: timedelta | None
        _ddp_kwargs: dict[str, Any]

        @property
        def num_processes(self) -> int: ...
        @property
        def world_size(self) -> int: ...
        @property
        def global_rank(self) -> int: ...
        @property
        def node_rank(self) -> int: ...
        @property
        def local_rank(self) -> int: ...
        @property
        def is_global_zero(self) -> bool: ...
        @property
        def root_device(self) -> torch.device: ...
        @property
        def _precision_in_use(self) -> Precision: ...

    def _set_up_phases(
        self,
        config: CompressionConfig,
        *,
        overlap: bool | Literal["auto"],
        hierarchical: bool | Literal["auto"],
        max_skipped_steps: int | None,
    ) -> None:
        """To be called by ``__init__``. Nothing here may be a lock, a thread or a process group: spawning pickles it."""
        for name, value in (("overlap", overlap), ("hierarchical", hierarchical)):
            if value not in (True, False, "auto"):
                raise ValueError(f"Invalid {name}: {value!r}. Must be 'auto', True or False.")
        self.config = config
        self.overlap = overlap
        self.hierarchical = hierarchical
        self.max_skipped_steps = check_max_skipped_steps(max_skipped_steps)
        self.comm_stats = CommStats()
        self._hook_state: HookState | None = None
        self._compressed: dict[Optimizer, CompressedOptimizer] = {}
        self._division = Division(compressed=[], dense={})
        self._steps: dict[Optimizer, int] = {}
        self._skipped: dict[Optimizer, SkippedSteps] = {}
        self._hooks: list[RemovableHandle] = []
        self._names: dict[Tensor, str] = {}
        self._averaged: set[Tensor] = set()
        self._replicas: dict[Tensor, str] = {}
        self._agreed_after: int | None = None
        self._phase = Phase.WARMUP
        self._is_pending = False
        self._frozen: set[Tensor] = set()
        self._stepping = False
        self._is_torn = False
        """Whether an exception came within a compressed step, when some parameters may be those of the next one."""
        self._has_waiting_gradients = False
        self._loaded_gradients: dict[Tensor, Tensor] = {}
        self._overlaps = False
        self._topology = ALONE
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

    @property
    def skipped_steps(self) -> int:
        """Steps that all ranks skipped because a gradient was infinite or NaN, those of all optimizers added up.

        In warm-up, which is plain DDP, only a loss scaler skips steps.
        """
        return sum(skipped.total for skipped in self._skipped.values())

    def freeze_variance(self) -> None:
        """Freeze the second moment and compress from the next optimizer step on.

        Call on all ranks, between two batches. Without effect in the compressed phase. With one process nothing is
        quantized: training goes on as exact Adam with a frozen second moment.

        Raises:
            ValueError: if a second moment is infinite or NaN.
            RuntimeError: outside a running training, or before every optimizer that can be compressed has made a step.
        """
        if self._phase is Phase.COMPRESSED:
            return
        if self._hook_state is None:
            raise RuntimeError(
                "freeze_variance() needs a running `trainer.fit`, or a model set up with Fabric. HINT: call it from a"
                " callback, or from the training loop."
            )
        if self.optimizer_steps == 0:
            waiting = [type(o).__name__ for o in self._division.compressed if not self._steps[o]]
            raise RuntimeError(
                f"freeze_variance() was called before the first optimizer step of {', '.join(waiting)}: no second moment"
                " yet. HINT: call it after a step."
            )
        with self._agreement("the second moments to be frozen"):
            for optimizer in self._division.compressed:
                check_second_moments(optimizer, self._names)
        self._enter_compressed_phase()

    def resume_warmup(self) -> None:
        """Go back to plain DDP: what error feedback still holds is applied, and the second moment moves on.

        :class:`~lightning_onebit.PhaseSwitch` judges this warm-up as if the run began with it, so it will freeze again.
        Call on all ranks, between two batches. Without effect in warm-up.
        """
        if self._phase is Phase.WARMUP:
            return
        self._begin_compressing()  # gradients may be local already
        for compressed in self._compressed.values():
            compressed.thaw_()
        self._compressed.clear()
        self._set_phase(Phase.WARMUP)

    def check_ranks_agree(self) -> None:
        """Compare parameters, momentum and second moments of all ranks, bit for bit, by checksums. Collective.

        :class:`~lightning_onebit.DivergenceGuard` calls it every so many steps. Call on all ranks, between two batches.

        Raises:
            DivergenceError: on all ranks, if they differ.
            RuntimeError: outside a running training.
        """
        if self._hook_state is None:
            raise RuntimeError(
                "check_ranks_agree() needs a running `trainer.fit`, or a model set up with Fabric. HINT: call it from a"
                " callback, or from the training loop."
            )
        if self.world_size == 1:
            return
        state = replicated_state(self._division.compressed, self._compressed)
        difference = difference_between_ranks(self._replicas, state, self._hook_state.communicator, self.root_device)
        if difference is not None:
            raise divergence_error(difference, step=self.optimizer_steps, agreed_after=self._agreed_after)
        self._agreed_after = self.optimizer_steps

    def __repr__(self) -> str:
        overlap, hierarchical = repr(self.overlap), repr(self.hierarchical)
        if self._hook_state is not None:  # what was chosen is known
            overlap += " (during backward)" if self._overlaps else " (in the optimizer step)"
        t = self._topology
        if t.world_size > 1:
            ranks = f"flat, {t.world_size} ranks" if t.is_flat else f"{t.num_nodes} nodes of {t.local_world_size} ranks"
            hierarchical += f" ({ranks})"
        c = self.config
        return (
            f"{type(self).__name__}(phase={self.phase.name}, optimizer_steps={self.optimizer_steps},"
            f" block_size={c.block_size}, scale={c.scale!r}, space={c.space!r}, bucket_cap_mb={c.bucket_cap_mb},"
            f" overlap={overlap}, hierarchical={hierarchical})"
        )

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

    # What the strategies call

    def _warn_if_alone(self) -> None:
        if self.world_size == 1:
            rank_zero_warn(
                f"{type(self).__name__} runs with one process: there is nothing to send, so nothing is compressed and"
                " training is plain Adam. HINT: use devices=2 or more, or num_nodes."
            )

    def _agreement(self, about: str) -> AbstractContextManager[dict[str, str]]:
        """Within, this rank states what must be the same on all. Not counted: it is no part of training."""
        return agreement(Communicator(), self.root_device, about=about)

    def _communicate_for(self, model: DistributedDataParallel) -> None:
        """Take over DDP's communication of gradients. Collective for the first model of a run."""
        if self._hook_state is None:
            communicator = Communicator()
            self._hook_state, self._topology = HookState(communicator), ALONE
            if self.world_size > 1:
                self._topology = self._find_topology(communicator)
                self._groups = new_groups(self._topology, self._timeout)
                # A rank that fails next closes its connections: not before the others have made theirs.
                communicator.all_reduce_max_(torch.zeros((), dtype=torch.int32, device=self.root_device))
                self._hook_state.local_world_size = self._topology.local_world_size
            self._set_phase(self._phase)
        model.register_comm_hook(self._hook_state, phase_hook)
        self._hook_state.regrouping = None
        self._hook_state.model, self._hook_state.backwards = ref(model), 0
        # DDP knows the parameters that required a gradient when it was made, and never averages those of others.
        self._averaged.update(p for p in model.parameters() if p.requires_grad)
        self._replicas.update(replicas(model))

    def _find_topology(self, communicator: Communicator) -> Topology:
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

    def _unaveraged(self) -> list[Tensor]:
        """Parameters that are trained, but that DDP does not know."""
        if self.world_size == 1:
            return []
        return [p for p in parameters_of(*self.optimizers) if p.requires_grad and p not in self._averaged]

    def _check_all_averaged(self, reason: str) -> None:
        unaveraged = self._unaveraged()
        if unaveraged:
            raise RuntimeError(
                f"The ranks would drift apart: DDP does not average the gradient of {listed(unaveraged, self._names)}, as"
                f" {reason}."
            )

    @property
    def _scales_losses(self) -> bool:
        """Whether a loss scaler decides which steps are made."""
        return uses_loss_scaling(self._precision_in_use)

    def _watch(self, optimizer: Optimizer) -> None:
        """Guard the optimizer's steps, and count those of the warm-up."""
        self._hooks.append(optimizer.register_step_pre_hook(self._guard))
        self._hooks.append(optimizer.register_step_post_hook(self._count_warmup_step))

    @contextmanager
    def _counting_skips(self, optimizer: Optimizer) -> Iterator[None]:
        """Within, the optimizer is asked for a step. In warm-up only a loss scaler refuses it, for averaged gradients."""
        steps = self._steps.get(optimizer)
        yield
        if steps is None or optimizer not in self._division.compressed:
            return
        compressed = self._compressed.get(optimizer)
        skipped = self._skipped.setdefault(
            optimizer, SkippedSteps(self.max_skipped_steps, optimizer=type(optimizer).__name__)
        )
        if self._steps[optimizer] > steps:
            skipped.made()
        elif compressed is not None and compressed.consensus.found_nonfinite:
            found_by = compressed.consensus.nonfinite_gradients
            skipped.skipped(found_by, self._names, scale=loss_scale(self._precision_in_use))
            compressed.consensus.forget_nonfinite()
        elif compressed is None and self._scales_losses:
            found: Found = {p: () for p in parameters_of(optimizer) if p.grad is not None and not all_finite([p.grad])}
            if found:
                skipped.skipped(lambda: found, self._names, scale=loss_scale(self._precision_in_use))

    @contextmanager
    def _compressed_step(self, optimizer: Optimizer) -> Iterator[None]:
        """Within, ``optimizer.step`` is the compressed step."""
        self._stepping = True
        try:
            with replaced_step(optimizer, partial(self._step_compressed, optimizer)):
                yield
        finally:
            self._stepping = False

    def _compressed_of(self, optimizer: Optimizer) -> CompressedOptimizer | None:
        """What steps ``optimizer`` in the compressed phase; ``None`` in warm-up, and if it cannot be compressed."""
        self._begin_compressing()
        return self._compressed.get(optimizer)

    def _step_compressed(self, optimizer: Optimizer) -> None:
        self._is_torn = True
        made = self._compressed[optimizer].step(skip=found_inf_after_unscaling_(optimizer))
        self._is_torn = False
        self._steps[optimizer] += made

    def _guard(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Step pre-hook: a raw ``optimizer.step()`` would apply local gradients, and the ranks would drift apart."""
        if self._phase is Phase.COMPRESSED and not self._stepping:
            raise RuntimeError(
                "In the compressed phase the optimizer must step through Lightning, but `step()` was called on the"
                " optimizer itself. HINT: use `self.optimizers()`, without `use_pl_optimizer=False`; with Fabric, the"
                " optimizer that `fabric.setup` returned."
            )

    def _count_warmup_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Step post-hook: a step that a loss scaler skipped, or that found no gradient, has left no second moment."""
        if self._phase is Phase.WARMUP and not getattr(optimizer, "found_inf", False):
            has_gradient = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
            self._steps[optimizer] += has_gradient

    def _enter_compressed_phase(self) -> None:
        """Gradients stay local from the next backward on.

        The optimizers' state is left as it is until it is needed: saved in between, it is exactly that of the warm-up.
        """
        assert self._hook_state is not None
        self._hook_state.local = self._division.local_parameters()
        self._frozen = {
            p
            for optimizer in self._division.compressed
            for p in parameters_of(optimizer)
            if p.requires_grad or optimizer.state.get(p)
        }
        self._is_pending = True
        self._set_phase(Phase.COMPRESSED)

    def _begin_compressing(self) -> None:
        """Freeze the optimizers' state, if it is still to be done. Before the first backward that overlaps."""
        if not self._is_pending:
            return
        self._is_pending = False
        assert self._hook_state is not None
        self._lane.close()
        self._lane = make_lane(self.root_device) if self.world_size > 1 else InlineLane()
        with self._agreement("the switch to compression"):
            self._compressed = {
                optimizer: CompressedOptimizer(
                    optimizer,
                    self.config,
                    self._hook_state.communicator,
                    self._names,
                    groups=self._groups,
                    lane=self._lane,
                    overlap=self._overlaps,
                )
                for optimizer in self._division.compressed
            }
        if self._overlaps:
            (compressed,) = self._compressed.values()
            self._hook_state.gradients_ready = compressed.gradients_ready
        if self.world_size > 1:
            self._say_which_codec()

    def _added_parameters(self) -> list[Tensor]:
        """In the compressed phase, parameters that are trained since it began, but were not before."""
        if self._phase is Phase.WARMUP:
            return []
        return [p for p in parameters_of(*self._division.compressed) if p.requires_grad and p not in self._frozen]

    @property
    def _space(self) -> str:
        """What errors are kept in; a single rank decides for itself."""
        return self.config.space if self.world_size > 1 else "update"

    def _say_which_codec(self) -> None:
        names = sorted({name for compressed in self._compressed.values() for name in compressed.codec_names})
        rank_zero_info(f"{type(self).__name__}: compressing with the codec {' and '.join(map(repr, names))}.")
        if ReferenceCodec.name in names:
            rank_zero_warn(
                "There is no fast codec for this device, so compression runs as plain torch operations, many times slower."
                " HINT: for GPUs, install Triton: pip install lightning_onebit[cuda]."
            )

    def _leave_compressed_phase(self) -> None:
        """Back to warm-up because the optimizers' state is about to be replaced: what is outstanding is dropped."""
        for compressed in self._compressed.values():
            compressed.close()
        self._compressed.clear()
        self._set_phase(Phase.WARMUP)

    def _set_phase(self, phase: Phase) -> None:
        self._phase = phase
        self._is_pending = self._is_pending and phase is Phase.COMPRESSED
        if self._hook_state is not None:
            self._hook_state.communicator.counters = self.comm_stats[phase]
            if phase is Phase.WARMUP:
                self._hook_state.local = frozenset()
                self._hook_state.gradients_ready = None
        if self._groups is not None:
            self._groups.count_into(self.comm_stats[phase])

    def _count_loaded_steps(self) -> None:
        """Go on counting where the state that was loaded into the optimizers stopped."""
        for optimizer in self.optimizers:
            steps = (float(state["step"]) for state in optimizer.state.values() if "step" in state)
            self._steps[optimizer] = int(max(steps, default=0))

    def _forget_run(self) -> None:
        """Forget an earlier run, but not the process groups."""
        self._leave_compressed_phase()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._division = Division(compressed=[], dense={})
        self._averaged.clear()
        self._replicas.clear()
        self._agreed_after = None
        self._steps.clear()
        self._skipped.clear()
        self.comm_stats = CommStats()

    def _explain_failure_(self, error: BaseException, *, step: int, checkpoint: str | None = None) -> None:
        """If ranks could not reach each other, have the error say what happened and how to resume."""
        explain_(error, rank=self.global_rank, phase=self._phase, step=step, timeout=self._timeout, checkpoint=checkpoint)

    def _release(self, *, after_failure: bool) -> None:
        """End the thread and the process groups. What was trained can still be saved.

        Args:
            after_failure: whether the other ranks may be anywhere.
        """
        self._lane.close()
        self._hook_state = None
        # NCCL's way of ending a group waits for the other ranks.
        if self._groups is not None and not (after_failure and self.root_device.type == "cuda"):
            self._groups.destroy()
        self._groups = None
