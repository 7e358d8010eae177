"""The two phases of a run and the switch between them, for the Trainer's strategy and Fabric's alike.

In warm-up DDP averages all gradients, and the optimizers are the user's own. :meth:`PhaseController.freeze_variance` ends
the warm-up in two moves. At once, gradients of compressed optimizers stay local from the next backward on. Before that
backward, each such optimizer hands its state to a :class:`~lightning_onebit.engine.optimizer.CompressedOptimizer`; until
then ("pending") that state can be saved as what it is, the warm-up's last.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from typing import Literal, Protocol
from weakref import ReferenceType, ref

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lightning_onebit.arguments import check_switch
from lightning_onebit.comm.exchanger import Exchanger, InlineExchanger, make_exchanger
from lightning_onebit.comm.groups import ExchangeGroups
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.stats import CommStats
from lightning_onebit.comm.topology import ALONE, Topology
from lightning_onebit.comm.watch import meet, start_watch, stop_watch
from lightning_onebit.config import FLOAT32_NBYTES, CompressionConfig
from lightning_onebit.consistency.agreement import agreement
from lightning_onebit.consistency.divergence import difference_between_ranks, divergence_error, replicas, replicated_state
from lightning_onebit.consistency.ranks import Ranks
from lightning_onebit.engine.optimizer import CompressedOptimizer, check_moments
from lightning_onebit.engine.ranges import ElementRange, WaitingErrors
from lightning_onebit.freeze.drift import Drift
from lightning_onebit.lightning.compressible import CompressibleOptimizers, listed
from lightning_onebit.lightning.ddp_hook import HookState, Regrouping, phase_hook
from lightning_onebit.lightning.dense_comparison import DenseComparison
from lightning_onebit.lightning.optimizer_steps import OptimizerSteps
from lightning_onebit.lightning.outlook import step_nbytes
from lightning_onebit.lightning.process_groups import make_process_groups
from lightning_onebit.methods import counted_steps, needs_warmup, parameters_of
from lightning_onebit.phase import Phase
from lightning_onebit.quantize.reference import ReferenceKernels
from lightning_onebit.refresh_schedule import COLLECTING_STEPS

REPLACED_TOO_LATE = (
    "The optimizer's state was reset or replaced in the compressed phase, while gradients of this rank were waiting for a"
    " step. HINT: do it between a step and the next backward."
)
NOT_RUNNING = (
    "needs a running `trainer.fit`, or a model set up with Fabric. HINT: call it from a callback, or from the training loop."
)


class ConfiguredStrategy(Ranks, Protocol):
    """What the controller asks of the DDP strategy that has it: settings, and where this process is."""

    config: CompressionConfig
    overlap: bool | Literal["auto"]
    hierarchical: bool | Literal["auto"]
    max_skipped_steps: int | None


class PhaseController:
    """Owns the phase, the state of the DDP hook, the compressed optimizers, the process groups and the exchanger.

    Creating it starts no thread and no process group, and takes no lock: spawning processes pickles it with its strategy.

    Args:
        strategy: the DDP strategy that has this controller. It is asked whenever an answer is needed.

    Raises:
        ValueError: if a setting of the strategy is outside its domain.
    """

    def __init__(self, strategy: ConfiguredStrategy) -> None:
        for name in ("overlap", "hierarchical"):
            check_switch(name, getattr(strategy, name))
        self._strategy = strategy
        self.comm_stats = CommStats()
        self.names: dict[Tensor, str] = {}
        """Parameter names for messages and checkpoints; the strategy fills it."""
        self.steps = OptimizerSteps(self.names, strategy.max_skipped_steps, self.comm_stats[Phase.WARMUP])
        self.optimizers = CompressibleOptimizers()
        self.is_pending = False
        """Whether the compressed phase has begun, but the optimizers' state is still that of the warm-up's end."""
        self.warmup_start = 0
        """Optimizer steps that were made when the warm-up was last resumed; 0 if it never was."""
        self.waiting_errors: dict[Optimizer, WaitingErrors] = {}
        """What error feedback held of optimizers when their state was given back, until it is frozen again. With the same
        optimizers on all ranks."""
        self.overlaps = False
        """Whether buckets are sent during backward, once compressed."""
        self.has_waiting_gradients = False
        """Whether there was a backward since the last step."""
        self.hook_state: HookState | None = None
        """Of the DDP hook; ``None`` while no run is set up."""
        self.topology: Topology = ALONE
        self.groups: ExchangeGroups | None = None
        self._exchanger: Exchanger = InlineExchanger()
        self._frozen: set[Tensor] = set()
        self._had_state: set[tuple[Optimizer, Tensor]] = set()
        """Parameters that had a state when the compressed phase began."""
        self._models: list[ReferenceType[DistributedDataParallel]] = []
        self._agreed_after: int | None = None
        self._timeout: timedelta | None = None
        self.comparison = DenseComparison(self.steps, self.comm_stats, strategy.config)

    @property
    def phase(self) -> Phase:
        return self.steps.phase

    @property
    def compressed(self) -> dict[Optimizer, CompressedOptimizer]:
        """What steps the optimizers in the compressed phase, unless it is pending."""
        return self.steps.compressed

    @property
    def optimizer_steps(self) -> int:
        """Steps of the optimizer that can be compressed: with several, of the one that made fewest."""
        return min((self.steps.made[optimizer] for optimizer in self.optimizers.compressed), default=0)

    @property
    def compressed_optimizers(self) -> Sequence[Optimizer]:
        """Those that are compressed, or will be."""
        return self.optimizers.compressed

    @property
    def steps_made(self) -> list[int]:
        """Steps of each optimizer of the run."""
        return list(self.steps.made.values())

    @property
    def stock_state_tells_all(self) -> bool:
        """In warm-up, whether a checkpoint of plain DDP would let a run go on as it was."""
        return self.steps.is_told_by_stock_state()

    @property
    def space(self) -> str:
        """What errors are kept in; a single rank decides for itself."""
        return self._strategy.config.space if self._strategy.world_size > 1 else "update"

    @property
    def expected_compression_ratio(self) -> float:
        """Bytes of a step with float32 gradients over those of a compressed step, as they will be late in the run."""
        trained = {p for p in (*self.names, *parameters_of(*self.optimizers.compressed)) if p.requires_grad}
        stay_dense = trained - set(parameters_of(*self.optimizers.compressed))
        sent: float = FLOAT32_NBYTES * sum(p.numel() for p in stay_dense)
        for optimizer in self.optimizers.compressed:
            sent += step_nbytes(
                [p.numel() for p in parameters_of(optimizer) if p.requires_grad],
                self._strategy.config,
                num_chunks=self._strategy.world_size,
                has_second_moment=needs_warmup(optimizer),
            )
        return FLOAT32_NBYTES * sum(p.numel() for p in trained) / max(1, sent)

    @property
    def options(self) -> dict[str, object]:
        """The strategy's own arguments, by name."""
        strategy = self._strategy
        options = {**vars(strategy.config), "overlap": strategy.overlap, "hierarchical": strategy.hierarchical}
        return {**options, "max_skipped_steps": strategy.max_skipped_steps}

    def __repr__(self) -> str:
        overlap, hierarchical = repr(self._strategy.overlap), repr(self._strategy.hierarchical)
        if self.hook_state is not None:  # what was chosen is known
            overlap += " (during backward)" if self.overlaps else " (in the optimizer step)"
        t = self.topology
        if t.world_size > 1:
            ranks = f"flat, {t.world_size} ranks" if t.is_flat else f"{t.num_nodes} nodes of {t.local_world_size} ranks"
            hierarchical += f" ({ranks})"
        c = self._strategy.config
        return (
            f"{type(self._strategy).__name__}(phase={self.phase.name}, optimizer_steps={self.optimizer_steps},"
            f" block_size={c.block_size}, scale={c.scale!r}, space={c.space!r}, bucket_cap_mb={c.bucket_cap_mb},"
            f" overlap={overlap}, hierarchical={hierarchical}{', errors_wait=True' if self.waiting_errors else ''})"
        )

    # The switch

    def freeze_variance(self, reason: str = "") -> None:
        """Freeze the second moment and compress from the next optimizer step on. Collective; see the strategies."""
        if self.phase is Phase.COMPRESSED:
            return
        if self.hook_state is None:
            raise RuntimeError(f"freeze_variance() {NOT_RUNNING}")
        self._refuse_within_a_step("freeze_variance")
        waiting = [type(o).__name__ for o in self.optimizers.compressed if not self.steps.made[o] and needs_warmup(o)]
        if waiting:
            raise RuntimeError(
                f"freeze_variance() was called before the first optimizer step of {', '.join(waiting)}: no second moment"
                " yet. HINT: call it after a step."
            )
        with agreement(Communicator(), self._strategy.root_device, about="the second moments to be frozen"):
            for optimizer in self.optimizers.compressed:
                check_moments(optimizer, self.names)
        self.comparison.switches.append((self.optimizer_steps, reason))
        self.enter_compressed_phase()

    def _refuse_within_a_step(self, switch: str) -> None:
        """It would end in the phase in which it has begun, with gradients of the other: local ones would not be averaged."""
        if self.steps.is_stepping:
            raise RuntimeError(
                f"{switch}() was called within an optimizer step: with automatic optimization, `training_step` and backward"
                " are part of it. HINT: call it between two batches, as in `on_train_batch_start` or `on_train_batch_end`."
            )

    def enter_compressed_phase(self) -> None:
        """Gradients stay local from the next backward on; :meth:`begin_compressing` freezes the optimizers' state."""
        assert self.hook_state is not None
        compressed, dense = parameters_of(*self.optimizers.compressed), parameters_of(*self.optimizers.dense)
        # What a dense optimizer has as well is averaged: that one needs the mean, and the compressed one can do with it.
        self.hook_state.local = frozenset(compressed) - frozenset(dense)
        # Two may have the same parameter, and one of them no state of it, as SGD without momentum.
        self._had_state = {(o, p) for o in self.optimizers.compressed for p, state in o.state.items() if state}
        have_state = {p for _, p in self._had_state}
        self._frozen = {p for p in compressed if p.requires_grad or p in have_state}
        self.is_pending = True
        self._set_phase(Phase.COMPRESSED)

    def begin_compressing(self) -> None:
        """Freeze the optimizers' state, if that is pending. Before the first backward that overlaps. Collective then.

        As late as possible, so that until then state is stock: to be saved, read and replaced as in warm-up.
        """
        if not self.is_pending:
            return
        self.is_pending = False
        world_size, device = self._strategy.world_size, self._strategy.root_device
        self._exchanger.close()
        self._exchanger = make_exchanger(device) if world_size > 1 else InlineExchanger()
        with agreement(Communicator(), device, about="the switch to compression"):
            self._freeze_state(self.optimizers.compressed)
        self._take_over_waiting_errors()
        if world_size == 1:
            return
        kernels = sorted({name for compressed in self.compressed.values() for name in compressed.kernel_names})
        rank_zero_info(
            f"{type(self._strategy).__name__}: compressing with the kernels {' and '.join(map(repr, kernels))}: a step sends"
            f" about {self.expected_compression_ratio:.1f} times fewer bytes than with float32 gradients."
        )
        if ReferenceKernels.name in kernels:
            rank_zero_warn(
                "There are no fast kernels for this device, so compression runs as plain torch, many times slower."
                " HINT: for GPUs, install Triton: `pip install triton`, in the version that goes with your torch."
            )

    def _freeze_state(self, optimizers: Sequence[Optimizer]) -> None:
        """Have the state of ``optimizers``, which is stock, held in buckets from now on."""
        assert self.hook_state is not None
        for optimizer in optimizers:
            self.compressed[optimizer] = CompressedOptimizer(
                optimizer,
                self._strategy.config,
                self.hook_state.communicator,
                self.names,
                groups=self.groups,
                exchanger=self._exchanger,
                overlap=self.overlaps,
            )
        if self.overlaps:
            (compressed,) = self.compressed.values()
            self.hook_state.gradients_ready = compressed.gradients_ready

    def _take_over_waiting_errors(self) -> None:
        """Begin with what error feedback held when an earlier compressed phase ended. Collective."""
        for optimizer, compressed in self.compressed.items():
            if optimizer in self.waiting_errors:
                lost = compressed.state.take_over_errors_(self.waiting_errors.pop(optimizer))
                if lost:
                    rank_zero_warn(
                        f"{type(self._strategy).__name__}: what error feedback has not applied yet of"
                        f" {listed(lost, self.names)} is dropped, as {type(optimizer).__name__} no longer trains it."
                    )

    def refresh_variance(self) -> None:
        """Renew the second moment now. Collective; see the strategies."""
        if self.hook_state is None:
            raise RuntimeError(f"refresh_variance() {NOT_RUNNING}")
        with agreement(Communicator(), self._strategy.root_device, about="the second moment to be renewed"):
            self._check_refresh()
        self.take_over_replaced_state()
        self.begin_compressing()
        anew = any(compressed.is_collecting for compressed in self.compressed.values())
        for compressed in self.compressed.values():
            compressed.refresh_variance_()
        if any(compressed.is_collecting for compressed in self.compressed.values()):
            rank_zero_info(
                f"{type(self._strategy).__name__}: with variance_refresh=None no second moment goes on: one is collected"
                f" from now on{', anew' if anew else ''}, and renews the frozen one after {COLLECTING_STEPS} optimizer"
                " steps."
            )

    def _check_refresh(self) -> None:
        if self.phase is Phase.WARMUP:
            raise RuntimeError(
                "refresh_variance() was called in warm-up, in which the second moment moves on at every step. HINT: call it"
                " when `strategy.phase` is Phase.COMPRESSED."
            )
        if not any(map(needs_warmup, self.optimizers.compressed)):
            raise RuntimeError(
                "refresh_variance() was called, but the optimizers have no second moment. HINT: leave it out."
            )
        if self._strategy.config.space == "momentum":
            raise RuntimeError(
                "refresh_variance() was called with space='momentum', where momentum travels before it is divided by D:"
                " errors would change their meaning with D. HINT: space='update', the default; or `resume_warmup()`, and"
                " freeze again later."
            )
        if self.has_waiting_gradients or any(c.has_begun_a_step for c in self.compressed.values()):
            raise RuntimeError(
                "refresh_variance() was called while gradients were waiting for a step, and may have been sent. HINT: call"
                " it between a step and the next backward."
            )

    def variance_drift(self) -> dict[str, Drift]:
        """By parameter, how well D fits the gradients. See the strategies."""
        found = {p: drift for compressed in self.compressed.values() for p, drift in compressed.variance_drift().items()}
        return {self.names.get(p, f"parameter {i}"): drift for i, (p, drift) in enumerate(found.items())}

    def error_over_update(self) -> float:
        """The largest of the compressed optimizers. See the strategies."""
        ratios = [compressed.error_over_update() for compressed in self.compressed.values()]
        return max((ratio for ratio in ratios if not math.isnan(ratio)), default=math.nan)

    def resume_warmup(self) -> None:
        """Go back to plain DDP; what error feedback holds waits for the next freeze. Collective; see the strategies."""
        self.drop_lost_state()
        if self.phase is Phase.WARMUP:
            return
        self._refuse_within_a_step("resume_warmup")
        self.warmup_start = self.optimizer_steps
        stock = {o: dict(o.state) for o in self.optimizers.compressed if self.is_pending or self._is_replaced(o)}
        if self.is_pending and self.has_waiting_gradients:  # which may be local already
            waiting, self.waiting_errors = self.waiting_errors, {}
            self.begin_compressing()
            for compressed in self.compressed.values():
                compressed.average_gradients_()
                compressed.close()
            self.waiting_errors = waiting
        else:
            for compressed in self.compressed.values():
                compressed.average_gradients_()
            self._keep_errors(self.compressed)
            self._give_back_()
        for optimizer, state in stock.items():
            optimizer.state = defaultdict(dict, state)
        self.compressed.clear()
        self._set_phase(Phase.WARMUP)
        if self.waiting_errors:
            nbytes = sum(errors.nbytes for errors in self.waiting_errors.values())
            rank_zero_info(
                f"{type(self._strategy).__name__}: back in warm-up, that is plain DDP. What error feedback has not applied"
                f" yet ({nbytes:,} bytes on this rank) waits for the next compressed phase."
            )

    def _keep_errors(self, compressed: Mapping[Optimizer, CompressedOptimizer]) -> None:
        """Have what error feedback holds wait for the next freeze. Not collective."""
        if self._strategy.world_size > 1:  # a single rank has none
            self.waiting_errors.update({optimizer: each.state.waiting_errors() for optimizer, each in compressed.items()})

    def _give_back_(self) -> None:
        """Give the compressed optimizers their own state back, where it was not replaced. Not collective."""
        for compressed in self.compressed.values():
            if compressed.state_was_replaced:
                compressed.close()
            else:
                compressed.give_back_()
        self.compressed.clear()

    def _is_replaced(self, optimizer: Optimizer) -> bool:
        """Whether user code has replaced state that was frozen; until the next step it is stock, beside the errors."""
        return optimizer in self.compressed and self.compressed[optimizer].state_was_replaced

    @property
    def has_stock_state(self) -> bool:
        """In the compressed phase, whether state of the warm-up, or of user code, is still to be frozen before a step."""
        return self.is_pending or any(compressed.state_was_replaced for compressed in self.compressed.values())

    @property
    def replaced_state(self) -> list[bool]:
        """For each compressed optimizer, whether its state was replaced since its last step."""
        return [self._is_replaced(optimizer) for optimizer in self.optimizers.compressed]

    def drop_lost_state(self) -> None:
        """Go back to warm-up if user code has removed state, so that a second moment is missing. Alike on all ranks.

        Raises:
            RuntimeError: if gradients of the compressed phase are waiting for their step; or if a rank is alone with it.
        """
        replaced = [optimizer for optimizer, c in self.compressed.items() if c.state_was_replaced]
        if self.is_pending:
            missing = [
                p for o in self.optimizers.compressed for p in self._trained_without_state(o) if (o, p) in self._had_state
            ]
        else:
            missing = [p for optimizer in replaced for p in self._trained_without_state(optimizer)]
        if not missing:
            return
        if self.has_waiting_gradients:
            raise RuntimeError(REPLACED_TOO_LATE)
        kinds = " and ".join(type(optimizer).__name__ for optimizer in replaced or self.optimizers.compressed)
        meet(f"the way back to warm-up, as the state of {kinds} was reset or replaced", self._timeout)
        self._warn_of_missing(missing, f"the state of {kinds} was reset or replaced")
        self._keep_errors(self.compressed)
        self._give_back_()
        self.warmup_start = self.optimizer_steps
        self._set_phase(Phase.WARMUP)

    def take_over_replaced_state(self) -> None:
        """If user code has replaced the state of compressed optimizers, go on from what it is now. Alike on all ranks.

        With a second moment for all that is trained: compressed, with the errors that there are. Else in warm-up. Called
        before a step, so that until then the new state is stock, and can be saved and read. Not collective: of a rank that
        does so alone, all learn with the step.

        Raises:
            RuntimeError: if it would have to be warm-up, but gradients of the compressed phase are waiting for their step,
                or if they have been sent.
        """
        self.drop_lost_state()
        replaced = {optimizer: c for optimizer, c in self.compressed.items() if c.state_was_replaced}
        if not replaced:
            return
        if any(compressed.has_begun_a_step for compressed in replaced.values()):
            raise RuntimeError(REPLACED_TOO_LATE)
        kinds = " and ".join(type(optimizer).__name__ for optimizer in replaced)
        rank_zero_info(f"{type(self._strategy).__name__}: the state of {kinds} was replaced: going on from the new one.")
        errors = {}
        for optimizer, compressed in replaced.items():  # copies: so the old buckets can go before new ones come
            worker, server = (
                [ElementRange(e.start, e.values.clone()) for e in each]
                for each in (compressed.state.worker_errors(), compressed.state.server_errors())
            )
            errors[optimizer] = worker, server, compressed.state.late_second_moments(), compressed.agreement.replacements
            compressed.close()
            if counted_steps(optimizer) is not None:
                self.steps.count_loaded(optimizer)
        del compressed
        replaced.clear()
        for optimizer in errors:
            del self.compressed[optimizer]
        order = self.optimizers.compressed
        self._freeze_state([o for o in order if o in errors])
        self.steps.compressed = {optimizer: self.compressed[optimizer] for optimizer in order}
        for optimizer, (worker, server, late, replacements) in errors.items():
            new = self.compressed[optimizer]
            new.agreement.replacements = replacements + 1
            if self._strategy.world_size > 1:
                new.state.add_errors_(worker, server)
            new.state.add_late_second_moments_(*late)

    def trained_without_state(self, saved: Sequence[Collection[int]] | None) -> list[Tensor]:
        """Parameters that have no state after loading a checkpoint, although they had one when it was saved.

        Args:
            saved: for each compressed optimizer, the positions of those that had one; ``None``: all that are trained.
        """
        missing = []
        for index, optimizer in enumerate(self.optimizers.compressed):
            position = {p: i for i, p in enumerate(parameters_of(optimizer))}
            without = self._trained_without_state(optimizer)
            missing += [p for p in without if saved is None or (index < len(saved) and position[p] in saved[index])]
        return missing

    def warm_up_again(self, missing: Sequence[Tensor], *, drops_gradients: bool) -> None:
        """After loading a checkpoint of the compressed phase without the state of ``missing``: begin another warm-up.

        Args:
            missing: parameters of this rank; empty if there are some on others only.
            drops_gradients: whether gradients were waiting for a step, which cannot be: they are local ones.
        """
        self._warn_of_missing(missing, "the checkpoint is one of the compressed phase", drops_gradients=drops_gradients)
        self.warmup_start = self.optimizer_steps

    def _warn_of_missing(self, missing: Sequence[Tensor], why: str, *, drops_gradients: bool = False) -> None:
        of = f" of {listed(missing, self.names)}" if missing else ", on another rank,"
        rank_zero_warn(
            f"{type(self._strategy).__name__}: {why}, and the optimizer's state{of} is missing now: there is no second"
            " moment to divide by. All go back to warm-up, that is plain DDP, until PhaseSwitch ends it again; what error"
            " feedback has not applied yet waits for the next compressed phase"
            f"{', gradients that waited for a step are dropped' if drops_gradients else ''}."
        )

    @staticmethod
    def _trained_without_state(optimizer: Optimizer) -> list[Tensor]:
        return [p for p in parameters_of(optimizer) if p.requires_grad and not optimizer.state.get(p)]

    def state_positions(self) -> list[list[int]]:
        """For each compressed optimizer, the positions of the parameters that have a state, while that is still stock."""
        return [
            [i for i, p in enumerate(parameters_of(optimizer)) if optimizer.state.get(p)]
            for optimizer in self.optimizers.compressed
        ]

    def drop_compressed_state(self) -> None:
        """Back to warm-up because the run is about to be another: drop what error feedback holds, and what of it waits."""
        for compressed in self.compressed.values():
            compressed.close()
        self.compressed.clear()
        self.waiting_errors.clear()
        self.warmup_start = 0
        self._set_phase(Phase.WARMUP)

    def retire(self) -> None:
        """The run is over: give the optimizers their own state back, without what error feedback holds. Not collective."""
        self._give_back_()
        self.waiting_errors.clear()

    def resume(self, phase: Phase, *, is_pending: bool, ddp_buckets: Sequence[Sequence[str]]) -> None:
        """Be in the phase in which a checkpoint was saved; errors start at zero. Collective.

        Args:
            phase: of then; the optimizers have loaded their stock state.
            is_pending: whether their state was still that of the warm-up's end.
            ddp_buckets: names of the parameters in DDP's buckets of then, to average in the same order; empty: no matter.
        """
        if ddp_buckets and self.hook_state is not None:
            by_name = {name: p for p, name in self.names.items()}
            self.hook_state.regrouping = Regrouping([[by_name[n] for n in names if n in by_name] for names in ddp_buckets])
        if phase is Phase.COMPRESSED:
            self.enter_compressed_phase()
            if not is_pending:
                self.begin_compressing()

    def _set_phase(self, phase: Phase) -> None:
        counters = self.comm_stats[phase]
        self.steps.phase, self.steps.counters = phase, counters
        self.is_pending = self.is_pending and phase is Phase.COMPRESSED
        if self.hook_state is not None:
            self.hook_state.communicator.counters = counters
            if phase is Phase.WARMUP:
                self.hook_state.local = frozenset()
                self.hook_state.gradients_ready = None
        if self.groups is not None:
            self.groups.count_into(counters)

    # A run's beginning and end

    def communicate_for(self, model: DistributedDataParallel, timeout: timedelta | None) -> None:
        """Take over DDP's communication of gradients. Collective for the first model of a run.

        Args:
            model: whose hook is registered here.
            timeout: for collectives of the new process groups; ``None``: the library's default.
        """
        self._timeout = timeout
        if self.hook_state is None:
            communicator = Communicator()
            self.hook_state = HookState(communicator, self._strategy.config.warmup_precision)
            self.topology, self.groups = make_process_groups(
                self._strategy, self._strategy.hierarchical, communicator, timeout
            )
            self.hook_state.local_world_size = self.topology.local_world_size
            self._set_phase(self.phase)
            if self._strategy.world_size > 1:
                start_watch(self.describe_place)
        model.register_comm_hook(self.hook_state, phase_hook)
        self.hook_state.regrouping = None
        self.hook_state.model, self.hook_state.backwards = ref(model), 0
        self.steps.hook_state = self.hook_state
        # DDP knows the parameters that required a gradient when it was made, and never averages those of others.
        self.steps.averaged.update(p for p in model.parameters() if p.requires_grad)
        self._models.append(ref(model))

    def forget_run(self) -> None:
        """Forget an earlier run, but not the process groups."""
        self.drop_compressed_state()
        self.steps.forget()
        self.optimizers = CompressibleOptimizers()
        self._models.clear()
        self._agreed_after = None
        self.comm_stats = CommStats()
        self.comparison = DenseComparison(self.steps, self.comm_stats, self._strategy.config)
        self._set_phase(Phase.WARMUP)

    def release(self, *, after_failure: bool) -> None:
        """End the thread and the process groups. What was trained can still be saved.

        Args:
            after_failure: whether the other ranks may be anywhere.
        """
        self._exchanger.close()
        stop_watch("" if after_failure else "the end")
        self.hook_state = self.steps.hook_state = None
        # NCCL's way of ending a group waits for the other ranks.
        if self.groups is not None and not (after_failure and self._strategy.root_device.type == "cuda"):
            self.groups.destroy()
        self.groups = None

    # What the ranks know of each other

    def describe_place(self) -> str:
        """Where this rank is, for the others; see :mod:`lightning_onebit.comm.watch`."""
        return f"phase {self.phase.name}, after {self.optimizer_steps} optimizer steps"

    def grad_norm(self, optimizer: Optimizer | None) -> Tensor:
        """The 2-norm of the mean gradient. Collective in the compressed phase; see the strategies."""
        if optimizer is None and len(self.optimizers.compressed) != 1:
            raise ValueError(
                f"There are {len(self.optimizers.compressed)} optimizers. HINT: grad_norm(optimizer) is of one."
            )
        optimizer = optimizer or self.optimizers.compressed[0]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # of Lightning's wrappers
        self.begin_compressing()
        compressed = self.compressed.get(optimizer)
        if compressed is not None:
            return compressed.grad_norm()
        return get_total_norm([p.grad for p in parameters_of(optimizer) if p.grad is not None])

    def check_ranks_agree(self) -> None:
        """Compare parameters, momentum and second moments of all ranks, bit for bit. Collective; see the strategies."""
        if self.hook_state is None:
            raise RuntimeError(f"check_ranks_agree() {NOT_RUNNING}")
        if self._strategy.world_size == 1:
            return
        models = [model for reference in self._models if (model := reference()) is not None]
        # Looked up anew: user code may have put another parameter in the place of one.
        parameters = {p: name for model in models for p, name in replicas(model).items()}
        held = {optimizer: compressed.state for optimizer, compressed in self.compressed.items()}
        state = replicated_state(self.optimizers.compressed, held)
        communicator, device = self.hook_state.communicator, self._strategy.root_device
        difference = difference_between_ranks(parameters, state, communicator, device)
        if difference is not None:
            raise divergence_error(difference, step=self.optimizer_steps, agreed_after=self._agreed_after)
        self._agreed_after = self.optimizer_steps

    def compare_with_dense(self) -> None:
        """Warn, once, if the first compressed steps were no faster than dense ones. Collective, on the training thread."""
        if self.comparison.is_due and self._strategy.world_size > 1 and self.hook_state is not None:
            gradients = [p for p in self.hook_state.local if p.requires_grad]
            device, of = self._strategy.root_device, type(self._strategy).__name__
            self.comparison.warn_if_no_faster(gradients, device, of=of)

    def broadcast_decision(self, decision: bool) -> bool:
        """Rank 0's decision, on all ranks. Collective."""
        assert self.hook_state is not None
        return bool(self.hook_state.communicator.broadcast_int(int(decision), device=self._strategy.root_device))

    def added_parameters(self) -> list[Tensor]:
        """In the compressed phase, parameters that are trained since it began, but were not before."""
        if self.phase is Phase.WARMUP:
            return []
        return [p for p in parameters_of(*self.optimizers.compressed) if p.requires_grad and p not in self._frozen]

    def ddp_buckets(self, *, of_next_backward: bool = False) -> list[list[str]]:
        """Names of the parameters in DDP's buckets, if the result depends on them: not for two ranks.

        Args:
            of_next_backward: whether DDP may still have to cut them; that is done now. Collective then.
        """
        if self.hook_state is None or self._strategy.world_size <= 2:
            return []
        if of_next_backward:
            self.hook_state.look_ahead()
        return [[self.names.get(p, "") for p in params] for params in self.hook_state.buckets]
