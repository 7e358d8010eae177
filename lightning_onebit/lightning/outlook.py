"""What a run says of its warm-up: at the start what will happen and save, at the end why it was never over."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer

from lightning_onebit.config import FLOAT32_NBYTES, CompressionConfig, WarmupPrecision
from lightning_onebit.consistency.step import agreement_nbytes
from lightning_onebit.freeze.criteria import Plan, Verdict
from lightning_onebit.quantize.layout import plan_buckets
from lightning_onebit.quantize.tensor_sketch import SUMS, WIDTH
from lightning_onebit.refresh_schedule import SKETCH_STEPS, longest_interval


def step_nbytes(numels: Sequence[int], config: CompressionConfig, *, num_chunks: int, has_second_moment: bool) -> float:
    """Bytes of a compressed step of one optimizer, in units in which those of a float32 gradient are 4 per element.

    With the padding of messages, which is most of them where there are fewer blocks than ranks, and with what the ranks
    agree on. Refreshes and sketches count as often as they are late in a run.

    Args:
        numels: elements of the parameters that it trains, in their order.
        config: how they are compressed, and how often second moments are renewed.
        num_chunks: ranks that serve.
        has_second_moment: whether there is one to renew and to watch.
    """
    cap = config.bucket_numel(sum(numels))
    layouts = plan_buckets(numels[::-1], block_size=config.block_size, num_chunks=num_chunks, bucket_numel=cap)
    sent: float = agreement_nbytes(len(numels)) + sum(layout.message_nbytes for layout in layouts)
    if has_second_moment:
        sent += FLOAT32_NBYTES * sum(min(WIDTH, numel) + SUMS - 1 for numel in numels) / SKETCH_STEPS
        if config.renews_variance:
            interval = longest_interval(config.variance_refresh)
            sent += sum(layout.codes.message_nbytes for layout in layouts) / interval
    return sent


def outlook(plan: Plan, *, total_steps: float, ratio: float, precision: WarmupPrecision = "fp32") -> str:
    """One line for the start of a run: how long it is dense, and what it sends from then on.

    Args:
        plan: of the criterion.
        total_steps: optimizer steps of the run; infinite if unknown.
        ratio: bytes of a dense float32 step over those of a compressed one.
        precision: what gradients travel as in warm-up.
    """
    first, last = max(plan.start, plan.min_steps, 1), plan.max_steps
    of_run = f" of {total_steps:.0f}" if math.isfinite(total_steps) else ""
    what = dense_training(precision)
    if first >= total_steps:
        return f"All {total_steps:.0f} optimizer steps of this run are warm-up, that is {what}."
    if first >= last:
        dense = f"The first {first} optimizer steps{of_run} are {what}"
    elif math.isfinite(last):
        dense = f"The first {first} to {last:.0f} optimizer steps{of_run} are {what}, as the criterion decides"
    else:
        dense = f"At least the first {first} optimizer steps{of_run} are {what}, until the criterion decides"
    return f"{dense}; from then on a step sends about {ratio:.1f} times fewer bytes than with float32 gradients."


def dense_training(precision: WarmupPrecision) -> str:
    """What a warm-up is."""
    return "plain DDP" if precision == "fp32" else "DDP with gradients rounded to bfloat16"


def remark_on_shares(plan: Plan, callbacks: Sequence[Callback], *, total_steps: float) -> str | None:
    """What to say if the criterion counts in shares of a run that a callback may end before; ``None``: nothing."""
    ending = [type(callback).__name__ for callback in callbacks if isinstance(callback, (EarlyStopping, Timer))]
    if not plan.shares or not ending or math.isinf(total_steps):
        return None
    return (
        f"{' and '.join(plan.shares)}: shares are taken of all {total_steps:.0f} optimizer steps of the run. Should"
        f" {' or '.join(ending)} end it before, they are a larger part of it. HINT: give a number of steps."
    )


def why_still_in_warmup(plan: Plan, verdict: Verdict | None, *, steps: int) -> str:
    """Why nothing was compressed in ``steps`` optimizer steps, and what to do about it: the setting that was in the way."""
    if steps < plan.min_steps:
        reason, hint = f"min_steps={plan.min_steps} is not reached", "`min_steps`"
    elif steps < plan.start and plan.start == plan.max_steps:
        reason, hint = f"{steps} of {plan.start} warm-up steps are done", "the number of FixedStep(n)"
    elif steps < plan.start:
        reason, hint = f"nothing is judged before step {plan.start}", "`start` of the criterion's plan"
    else:
        reason = "nothing was judged" if verdict is None else verdict.reason
        use = "set `max_steps` of VarianceStability, or use PhaseSwitch(criterion=FixedStep(n))"
        return f"({reason}). HINT: train longer, {use}."
    return f"({reason}). HINT: train longer, or lower {hint}."
