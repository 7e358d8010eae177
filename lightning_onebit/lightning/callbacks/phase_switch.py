"""The callback that ends the warm-up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_onebit.comm.watch import passing
from lightning_onebit.config import VarianceRefresh
from lightning_onebit.engine.optimizer import diverged_parameters
from lightning_onebit.freeze.criteria import Criterion, Observation, Plan, Ratio, Verdict, is_whole
from lightning_onebit.freeze.drift import DriftWatch
from lightning_onebit.freeze.stability import VarianceStability
from lightning_onebit.lightning.callbacks.strategy import TwoPhaseStrategy, strategy_of
from lightning_onebit.lightning.gradient_ratios import NEGLIGIBLE, NEGLIGIBLE_IF_COARSE, gradient_ratios
from lightning_onebit.lightning.outlook import dense_training, outlook, remark_on_shares, why_still_in_warmup
from lightning_onebit.methods import method_for, needs_warmup
from lightning_onebit.phase import Phase


class PhaseSwitch(Callback):
    """Watches gradients and the second moment during warm-up, and ends it when the criterion says so.

    Rank 0 compares each gradient with the second moment that it meets, in the optimizer's step; it judges after the step,
    between two batches, and all ranks follow its verdict at the same step.
    The strategy adds one with the default criterion if the Trainer has none.

    A run whose optimizers have no second moment (SGD) starts compressed, unless the criterion is a ``FixedStep``. Beside
    an Adam, SGD is switched with it.

    With several optimizers, the steps that count are those of the one that has made fewest, of those that can be
    compressed. After ``strategy.resume_warmup()`` steps are counted anew.

    Args:
        criterion: :class:`~lightning_onebit.VarianceStability` (default), :class:`~lightning_onebit.FixedStep` or another
            :class:`~lightning_onebit.Criterion`.

    Raises:
        TypeError: if it is none.

    Example::

        Trainer(strategy="onebit_ddp", callbacks=[PhaseSwitch(criterion=VarianceStability(tolerance=0.02))])
    """

    def __init__(self, criterion: Criterion | None = None) -> None:
        if criterion is not None and not isinstance(criterion, Criterion):
            hint = f" HINT: PhaseSwitch(FixedStep({criterion}))." if is_whole(criterion) else ""
            raise TypeError(
                f"Invalid criterion: {criterion!r}. Must be a VarianceStability(...), a FixedStep(n) or another Criterion,"
                f" or None: VarianceStability().{hint}"
            )
        self.criterion = criterion if criterion is not None else VarianceStability()
        self._history: list[Observation] = []
        self._last_step = 0
        self._start = 0
        self._plan = Plan(every=1)
        self._ratios: dict[Optimizer, dict[Tensor, Ratio]] = {}
        """Of each optimizer's last step that was looked at."""
        self._hooks: list[RemovableHandle] = []
        self._drift = DriftWatch()
        self.verdict: Verdict | None = None
        """The criterion's last word, on rank 0: whether it froze, why, and whether it was forced to."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy_of(trainer)
        if stage == "fit":  # another fit than the last; a checkpoint is loaded after this
            self._history, self._last_step, self._start, self.verdict = [], 0, 0, None
            self._drift = DriftWatch()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop_watching()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (strategy := strategy_of(trainer)) is None:
            return
        is_trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        self.start(strategy, total_steps=_total_steps(trainer), silent=is_trial)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if strategy.world_size > 1 and strategy.phase is Phase.WARMUP and not is_trial:
            remark = remark_on_shares(self._plan, callbacks, total_steps=_total_steps(trainer))
            if remark is not None:
                rank_zero_info(f"{type(self).__name__}: {remark}")
        if strategy.optimizer_steps > 0:  # a checkpoint, perhaps of plain DDP, may have had all its warm-up
            self.after_step(strategy, pl_module)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if (strategy := strategy_of(trainer)) is not None:
            passing("the end of a batch")
            self.after_step(strategy, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        passing("the end of an epoch")

    def progress(self) -> str:
        """In a few characters, for a progress bar: what the criterion saw last, and by which step it must decide.

        Of rank 0. Steps are those of the optimizer, from the beginning of the run.
        """
        first, last = self._start + max(self._plan.start, self._plan.min_steps), self._start + self._plan.max_steps
        when = f"by {last:.0f}" if math.isfinite(last) else f"not before {first}"
        return f"{self.verdict.seen}, {when}" if self.verdict is not None and self.verdict.seen else when

    def start(self, strategy: TwoPhaseStrategy, *, total_steps: float, silent: bool = False) -> None:
        """Fix the criterion's settings for a run of ``total_steps`` steps (``inf`` if unknown), and begin to watch.

        ``silent``: say nothing of what is to come.
        """
        if strategy.world_size == 1:
            return
        beta2 = slowest_beta2(strategy.compressed_optimizers)
        self._plan = self.criterion.plan(total_steps=total_steps, beta2=beta2, refresh=renewal(strategy))
        self._watch(strategy)
        if self._needs_no_warmup(strategy):
            self._freeze_at_once(strategy)
        elif strategy.phase is Phase.WARMUP and strategy.optimizer_steps - self._start < self._plan.max_steps and not silent:
            ratio, precision = strategy.expected_compression_ratio, strategy.config.warmup_precision
            line = outlook(self._plan, total_steps=total_steps, ratio=ratio, precision=precision)
            remarks = [line, *self._plan.remarks]
            if strategy.config.variance_refresh is not None and not strategy.config.renews_variance:
                remarks.append("variance_refresh='auto' is None with space='momentum': the second moment stays frozen.")
            for remark in remarks:
                rank_zero_info(f"{type(self).__name__}: {remark}")

    def _watch(self, strategy: TwoPhaseStrategy) -> None:
        """Look at gradients where they are what the optimizer steps by: unscaled, clipped, of this optimizer alone."""
        self._stop_watching()
        if not (strategy.is_global_zero and self._plan.measures):
            return
        are_several = len(strategy.compressed_optimizers) > 1
        negligible = NEGLIGIBLE_IF_COARSE if strategy.rounds_coarsely else NEGLIGIBLE

        def look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if strategy.phase is Phase.COMPRESSED or getattr(optimizer, "found_inf", False):
                return  # gradients are local, or a loss scaler has this step skipped
            step = strategy.optimizer_steps - self._start
            # With several, those that step before the last have made one more than are counted.
            if self._plan.observes(step) or (are_several and self._plan.observes(step + 1)):
                self._ratios[optimizer] = gradient_ratios(optimizer, negligible=negligible)

        self._hooks = [optimizer.register_step_post_hook(look) for optimizer in strategy.compressed_optimizers]

    def _stop_watching(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._ratios = [], {}

    def after_step(self, strategy: TwoPhaseStrategy, module: nn.Module) -> None:
        """Judge, and freeze if so, between two batches. Without effect if no optimizer has stepped. Collective."""
        if strategy.world_size == 1:
            return
        if strategy.phase is Phase.COMPRESSED:
            # Another warm-up would begin here.
            self._start, self._last_step = strategy.optimizer_steps, 0
            if strategy.is_global_zero and self._drift.is_due(strategy.optimizer_steps):
                is_frozen = renewal(strategy) is None
                for warning in self._drift.observe(strategy.optimizer_steps, strategy.variance_drift(), is_frozen=is_frozen):
                    rank_zero_warn(f"{type(self).__name__}: {warning}")
            return
        if self._needs_no_warmup(strategy):  # somebody has resumed it, as parameters were added perhaps
            self._freeze_at_once(strategy)
            return
        if strategy.warmup_start > self._start:  # it was resumed, perhaps before the first compressed step
            self._history, self._start, self._last_step = [], strategy.warmup_start, 0
        if strategy.optimizer_steps < self._start:  # somebody has gone back to an earlier checkpoint
            self._start = 0
        step = strategy.optimizer_steps - self._start
        previous, self._last_step = self._last_step, step
        if step == previous or not self._plan.observes(step, previous):
            return
        verdict, diverged = None, False
        if strategy.is_global_zero:
            ratios = named([pair for ratios in self._ratios.values() for pair in ratios.items()], module)
            self._ratios = {}
            now = Observation(step=step, ratios=ratios, learning_rate=largest_learning_rate(strategy.compressed_optimizers))
            if not all(math.isfinite(ratio.mean) for ratio in ratios.values()):
                diverged = any(diverged_parameters(optimizer) for optimizer in strategy.compressed_optimizers)
            if not diverged:
                verdict = self._judge(now, steps_between=step - previous)
        # Second moments are equal on all ranks, but a rank that judged otherwise would hang the job: one verdict for all.
        # A second moment that has diverged stays so: to freeze it is refused on all ranks, so why train on till then?
        if strategy.broadcast_decision(diverged or (verdict is not None and verdict.freeze)):
            if verdict is not None:
                # A second moment that is renewed may move.
                announce = rank_zero_warn if verdict.forced and renewal(strategy) is None else rank_zero_info
                anew = f" (step {step} of this warm-up)" if self._start else ""
                freezes = any(map(needs_warmup, strategy.compressed_optimizers))
                what = "freezing the second moment" if freezes else "compressing"
                steps = f"{strategy.optimizer_steps}{of_each(strategy.compressed_optimizers)}"
                announce(f"{type(self).__name__}: {what} after step {steps}{anew}: {verdict.reason}.")
            self._history = []
            strategy.freeze_variance("" if verdict is None else verdict.reason)

    def _needs_no_warmup(self, strategy: TwoPhaseStrategy) -> bool:
        optimizers = strategy.compressed_optimizers
        return self.criterion.judges_second_moment and bool(optimizers) and not any(map(needs_warmup, optimizers))

    def _freeze_at_once(self, strategy: TwoPhaseStrategy) -> None:
        """Without a second moment all ranks know alike that there is nothing to wait for. Collective."""
        if strategy.phase is Phase.WARMUP:
            kinds = " and ".join(sorted({type(optimizer).__name__ for optimizer in strategy.compressed_optimizers}))
            rank_zero_info(
                f"{type(self).__name__}: {kinds} has no second moment that must settle first: compressing from step"
                f" {strategy.optimizer_steps + 1} on. HINT: PhaseSwitch(criterion=FixedStep(n)) makes n dense steps before."
            )
            strategy.freeze_variance(f"{kinds} has no second moment that must settle first")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (strategy := strategy_of(trainer)) is None:
            return
        fast_dev_run = trainer.fast_dev_run  # type: ignore[attr-defined]
        if strategy.world_size > 1 and strategy.phase is Phase.WARMUP and not fast_dev_run:
            why = why_still_in_warmup(self._plan, self.verdict, steps=strategy.optimizer_steps - self._start)
            steps = f"{strategy.optimizer_steps} optimizer steps{of_each(strategy.compressed_optimizers)}"
            once = strategy.comm_stats[Phase.COMPRESSED].steps
            what = f"compressed only {once} steps and went back to warm-up" if once else "never compressed anything"
            dense = dense_training(strategy.config.warmup_precision)
            rank_zero_warn(f"This run {what}: after {steps} it was still in warm-up, that is {dense} {why}")

    @override
    def state_dict(self) -> dict[str, Any]:
        history = [
            {
                "step": o.step,
                "ratios": {name: (ratio.mean, ratio.numel, ratio.steps) for name, ratio in o.ratios.items()},
                "learning_rate": o.learning_rate,
            }
            for o in self._history
        ]
        return {"history": history, "last_step": self._last_step, "start": self._start}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history = [
            Observation(
                step=entry["step"],
                ratios={name: Ratio(mean=mean, numel=n, steps=k) for name, (mean, n, k) in entry["ratios"].items()},
                learning_rate=entry["learning_rate"],
            )
            for entry in state_dict["history"]
            if "ratios" in entry  # not in checkpoints of the first versions
        ]
        self._last_step = state_dict["last_step"]
        self._start = state_dict.get("start", 0)  # not in checkpoints of the first versions

    def _judge(self, now: Observation, *, steps_between: int) -> Verdict:
        # The plan's history is enough where every step can be observed.
        oldest = now.step - self._plan.history * steps_between
        self._history = [o for o in self._history if oldest <= o.step < now.step]
        self._history.append(now)
        self.verdict = self.criterion.judge(self._history, self._plan)
        return self.verdict


def renewal(strategy: TwoPhaseStrategy) -> VarianceRefresh:
    """When the second moment is renewed after the switch; ``None``: never."""
    config = strategy.config
    return config.variance_refresh if config.renews_variance else None


def named(ratios: Sequence[tuple[Tensor, Ratio]], module: nn.Module) -> dict[str, Ratio]:
    """By the names of parameters in ``module``."""
    name_of: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    return {name_of.get(p, f"parameter {index}"): ratio for index, (p, ratio) in enumerate(ratios)}


def largest_learning_rate(optimizers: Sequence[Optimizer]) -> float:
    """Of optimizers with a second moment; if there are none, of all."""
    judged = [optimizer for optimizer in optimizers if needs_warmup(optimizer)] or optimizers
    return max((float(group["lr"]) for o in judged for group in o.param_groups), default=0.0)


def of_each(optimizers: Sequence[Optimizer]) -> str:
    """What to add to a number of steps: with several optimizers it is not the Trainer's, which counts those of all."""
    return f" of each of {len(optimizers)} optimizers" if len(optimizers) > 1 else ""


def slowest_beta2(optimizers: Sequence[Optimizer]) -> float:
    """The decay of the second moment that averages over most steps."""
    return max((method_for(o).second_moment_decay(group) for o in optimizers for group in o.param_groups), default=0.0)


def _total_steps(trainer: pl.Trainer) -> float:
    """Steps that each optimizer makes in the whole run, if all step as often; infinite if the Trainer does not know."""
    total = float(trainer.estimated_stepping_batches)
    if trainer.max_steps > 0:  # of all optimizers added up
        total = min(total, trainer.max_steps / len(trainer.optimizers))
    strategy = strategy_of(trainer)
    if strategy is not None and not strategy.optimizer_steps and total > 0:
        total -= trainer.global_step / len(trainer.optimizers)  # an earlier `fit` of this Trainer has made them
    return total if total > 0 else math.inf


def ensure_phase_switch(trainer: pl.Trainer) -> None:
    """Add the default switch if there is none; refuse two."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    switches = [callback for callback in callbacks if isinstance(callback, PhaseSwitch)]
    if len(switches) > 1:
        raise ValueError(f"Found {len(switches)} PhaseSwitch callbacks. There must be one: keep the one you mean.")
    if not switches:
        # Before the checkpoints, which Lightning keeps last: they must save the phase that the batch ended in.
        position = next((i for i, c in enumerate(callbacks) if isinstance(c, Checkpoint)), len(callbacks))
        callbacks.insert(position, PhaseSwitch())
        if trainer.world_size > 1:
            rank_zero_info("Using PhaseSwitch() with its default criterion, VarianceStability(), to end the warm-up.")
