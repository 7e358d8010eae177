"""A step of an optimizer in either phase: who makes it, whether it was made, and what would let the ranks drift apart."""

from __future__ import annotations

import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.plugins import Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.stats import PhaseCounters
from lightning_onebit.engine.nonfinite import Found, SkippedSteps
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.flat import all_finite
from lightning_onebit.lightning.compressible import listed
from lightning_onebit.lightning.ddp_hook import HookState
from lightning_onebit.lightning.loss_scaling import found_inf_after_unscaling_, loss_scale, uses_loss_scaling
from lightning_onebit.lightning.report import no_steps
from lightning_onebit.methods import counted_steps, parameters_of
from lightning_onebit.phase import Phase

IDLE_STEPS = 100
"""After so many of the others, an optimizer that makes no steps is spoken of."""
RAW_STEP = (
    "the optimizer must step through Lightning, but `step()` was called on the optimizer itself. HINT: use"
    " `self.optimizers()`, without `use_pl_optimizer=False`; with Fabric, the optimizer that `fabric.setup` returned."
)


LOCAL_GRADIENTS = (
    "The ranks would drift apart: {optimizer} has made a step, but DDP has seen no backward, so that gradients were not"
    " averaged. HINT: in manual optimization write `self.manual_backward(loss)` instead of `loss.backward()`; with Fabric"
    " `fabric.backward(loss)`, and call the module that `fabric.setup` returned."
)


class OptimizerSteps:
    """Steps of the optimizers of a run. The phase controller owns it, and sets ``phase``, ``counters``, ``compressed`` and
    ``hook_state``.

    Args:
        names: parameter names for messages; read whenever there is one, so the owner may fill it later.
        max_skipped_steps: how many skipped steps in a row end the run; ``None``: none do.
        counters: where dense steps are counted.
    """

    def __init__(self, names: Mapping[Tensor, str], max_skipped_steps: int | None, counters: PhaseCounters) -> None:
        self.phase = Phase.WARMUP
        self.counters = counters
        self.compressed: dict[Optimizer, CompressedOptimizer] = {}
        """What steps an optimizer in the compressed phase: empty in warm-up, and without those that cannot be compressed."""
        self.made: dict[Optimizer, int] = {}
        """Steps that each optimizer of the run has made; skipped ones do not count."""
        self.averaged: set[Tensor] = set()
        """Parameters whose gradients DDP knows, and averages unless they are to stay local."""
        self.is_alone = False
        """Whether there is one process only."""
        self.hook_state: HookState | None = None
        """Of DDP's communication."""
        self.are_all_through_lightning = False
        """Whether others than those within :meth:`step` would never be seen, not in warm-up either."""
        self.is_torn = False
        """Whether an exception came within a compressed step, when some parameters may be those of the next one."""
        self.scales_losses = False
        """Whether a loss scaler decides which steps are made."""
        self.ends = no_steps()
        """When steps of the first optimizer ended, by phase."""
        self.waits = no_steps()
        """And how many seconds had been waited in that phase by then."""
        self._precision: Precision | None = None
        self._names = names
        self._max_skipped_steps = max_skipped_steps
        self._skipped: dict[Optimizer, SkippedSteps] = {}
        self._hooks: list[RemovableHandle] = []
        self._has_warned = False
        self._idle: Counter[Optimizer] = Counter()
        """In warm-up, how many steps the others have made since each one's last."""
        self.is_stepping = False
        """Whether an optimizer is making a step: with automatic optimization, `training_step` and backward are within."""

    def add(self, optimizer: Optimizer, precision: Precision, *, can_be_compressed: bool) -> None:
        """Count the steps of ``optimizer``; if it can be compressed, also guard them and count those that are skipped."""
        self.made[optimizer] = 0
        self.is_alone = Communicator().world_size == 1
        self._precision, self.scales_losses = precision, uses_loss_scaling(precision)
        if can_be_compressed:
            self._skipped[optimizer] = SkippedSteps(self._max_skipped_steps, optimizer=type(optimizer).__name__)
            self._hooks.append(optimizer.register_step_pre_hook(self._refuse_raw_step))
            self._hooks.append(optimizer.register_step_post_hook(self._count_dense_step))

    def forget(self) -> None:
        """Forget the optimizers of an earlier run."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._skipped.clear()
        self._idle.clear()
        self.made.clear()
        self.averaged.clear()
        self.ends, self.waits = no_steps(), no_steps()

    @property
    def skipped(self) -> int:
        """Steps that all ranks skipped because a gradient was infinite or NaN, those of all optimizers added up."""
        return sum(skipped.total for skipped in self._skipped.values())

    @contextmanager
    def step(self, optimizer: Optimizer) -> Iterator[None]:
        """Within, ask the optimizer for one step: in the compressed phase ``optimizer.step`` is the compressed step.

        The object stays the same, as schedulers are bound to it; only its ``step`` is another one for the duration.

        Raises:
            FloatingPointError: on all ranks, at the end, after too many skipped steps in a row.
        """
        compressed, made_before = self.compressed.get(optimizer), self.made.get(optimizer, 0)
        was_stepping, self.is_stepping = self.is_stepping, True
        try:
            with nullcontext() if compressed is None else self._replaced_step(optimizer, compressed):
                yield
        finally:
            self.is_stepping = was_stepping
        if (skipped := self._skipped.get(optimizer)) is not None:
            if self.phase is Phase.WARMUP:
                self._count_idle(optimizer)
            if self.made[optimizer] > made_before:
                skipped.made()
            else:
                self._count_skipped(optimizer, skipped)
        if compressed is None:
            self.counters.steps += 1  # the engine counts compressed ones
        if optimizer is next(iter(self.made), None):  # with several, each steps as often
            self.ends[self.phase].append(time.perf_counter())
            self.waits[self.phase].append(self.counters.seconds_waited)

    @contextmanager
    def _replaced_step(self, optimizer: Optimizer, compressed: CompressedOptimizer) -> Iterator[None]:
        def compressed_step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()  # leaves local gradients in `p.grad`
            self.is_torn = True
            # Only a fused optimizer has the attribute, while a loss scaler calls it.
            skip = hasattr(optimizer, "found_inf") and found_inf_after_unscaling_(optimizer)
            self.made[optimizer] += compressed.step(skip=skip)  # steps 1 to 6 of the algorithm
            self.is_torn = False
            return loss

        step_of_user = optimizer.__dict__.get("step")  # a scheduler's wrapper
        # The decorator runs the step hooks, as for every torch optimizer.
        optimizer.step = types.MethodType(Optimizer.profile_hook_step(compressed_step), optimizer)  # type: ignore[method-assign]
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers look at
        try:
            yield
        finally:
            if step_of_user is None:
                del optimizer.step
            else:
                optimizer.step = step_of_user  # type: ignore[method-assign]

    def _count_idle(self, optimizer: Optimizer) -> None:
        """Say that the switch waits for one that makes no steps, such as that of an earlier model."""
        for other in self._skipped:
            self._idle[other] = 0 if other is optimizer else self._idle[other] + 1
            if self._idle[other] == IDLE_STEPS and not self.is_alone:
                rank_zero_warn(
                    f"{type(other).__name__}, with {listed(parameters_of(other), self._names)}, has made no step while"
                    f" others made {IDLE_STEPS}. All are compressed together, so the warm-up goes on until it has made its"
                    " steps. HINT: for another model after the first one, make another Fabric or Trainer."
                )

    def _count_skipped(self, optimizer: Optimizer, skipped: SkippedSteps) -> None:
        """No step was made. In warm-up only a loss scaler refuses one, for averaged gradients."""
        compressed = self.compressed.get(optimizer)
        scale = None if self._precision is None else loss_scale(self._precision)
        if compressed is not None:
            if compressed.agreement.found_nonfinite:
                skipped.skipped(compressed.agreement.nonfinite_gradients, self._names, scale=scale)
                compressed.agreement.forget_nonfinite()
        elif self.scales_losses:
            found: Found = {p: () for p in parameters_of(optimizer) if p.grad is not None and not all_finite([p.grad])}
            if found:
                skipped.skipped(lambda: found, self._names, scale=scale)

    def _refuse_raw_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Step pre-hook: a raw ``optimizer.step()`` would apply local gradients, and the ranks would drift apart."""
        if self.is_stepping:
            return
        if self.phase is Phase.COMPRESSED:
            raise RuntimeError(f"In the compressed phase {RAW_STEP}")
        if self.are_all_through_lightning and not self.is_alone:
            raise RuntimeError(f"For the warm-up to end, {RAW_STEP}")
        if not (self._has_warned or self.is_alone):  # now, not hours later
            rank_zero_warn(f"From the first compressed step on, which is still to come, {RAW_STEP}")
            self._has_warned = True

    def _count_dense_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Step post-hook: a step that a loss scaler skipped, or that found no gradient, has left no second moment."""
        if self.phase is Phase.WARMUP and not getattr(optimizer, "found_inf", False):
            has_gradient = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
            self.made[optimizer] += has_gradient
            if has_gradient and not self.is_alone and self.hook_state is not None and not self.hook_state.was_called:
                raise RuntimeError(LOCAL_GRADIENTS.format(optimizer=type(optimizer).__name__))

    def count_loaded(self, optimizer: Optimizer, saved: Sequence[int] = ()) -> None:
        """Go on counting where the state that was loaded into ``optimizer`` stopped.

        Args:
            optimizer: one of the run.
            saved: the number, if the checkpoint holds a header of ours. Otherwise the state tells it, but for that of SGD.
        """
        steps = (float(state["step"]) for state in optimizer.state.values() if "step" in state)
        self.made[optimizer] = saved[0] if len(saved) == 1 else int(max(steps, default=0))

    def count_all_loaded(self, saved: Sequence[int], *, total: int) -> None:
        """The same for all optimizers.

        Args:
            saved: the number of each, if the checkpoint holds a header of ours.
            total: of all optimizers: without a header, those whose state does not count (SGD) have made the rest.
        """
        for index, optimizer in enumerate(self.made):
            self.count_loaded(optimizer, saved[index : index + 1] if len(saved) == len(self.made) else ())
        uncounted = [optimizer for optimizer in self._skipped if counted_steps(optimizer) is None]
        if uncounted and len(saved) != len(self.made):
            rest = max(0, total - sum(self.made.values()))
            self.made.update(dict.fromkeys(uncounted, rest // len(uncounted)))

    def is_told_by_stock_state(self) -> bool:
        """Whether a checkpoint without a header of ours tells how many steps were made."""
        return all(counted_steps(optimizer) is not None or not self.made[optimizer] for optimizer in self._skipped)

    def unaveraged(self) -> list[Tensor]:
        """Parameters that are trained, but that DDP does not know. A single process need not average any."""
        unaveraged = []
        if not self.is_alone:
            for optimizer in self.made:
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        if p.requires_grad and p not in self.averaged:
                            unaveraged.append(p)
        return unaveraged


def unaveraged_error(unaveraged: Sequence[Tensor], names: Mapping[Tensor, str], reason: str) -> RuntimeError:
    """The error for what :meth:`OptimizerSteps.unaveraged` found, with the ``reason`` why DDP does not know it."""
    return RuntimeError(
        f"The ranks would drift apart: DDP does not average the gradient of {listed(unaveraged, names)}, as {reason}."
    )
