"""The criteria as pure functions: hand-made gradients in, the step of the switch out."""

import itertools
import math
import random
import re
import statistics

import numpy as np
import pytest

from lightning_onebit.freeze.criteria import FixedStep, Observation, Plan, Ratio, Verdict
from lightning_onebit.freeze.stability import (
    VarianceStability,
    effective_samples,
    mean_deviation,
    share_of_new,
    tensor_ratio,
)
from lightning_onebit.refresh_schedule import is_refresh_due, longest_interval, refresh_interval

BETA2 = 0.999
NUMEL = 1000


def quiet(step):
    return 1.0


def fourfold(step):
    """A gradient whose scale grows 4-fold within the first 50 steps."""
    return 4.0 ** min(1.0, step / 50)


def falling(step):
    return 1.0 / fourfold(step)


class Gradients:
    """Tensors whose gradients have a scale by step, with Adam's second moment of them. ``numels`` and scatter by name."""

    def __init__(self, scales, *, numels=None, scatter=0.05, seed=0, learning_rate=lambda step: 1e-3):
        self.scales = scales if isinstance(scales, dict) else {"weight": scales}
        self.numels = numels or {}
        self.scatter, self.random, self.learning_rate = scatter, random.Random(seed), learning_rate
        self.v = dict.fromkeys(self.scales, 0.0)

    def observe(self, step):
        """The observation of ``step``; called once for each, in order."""
        ratios = {}
        for name, scale in self.scales.items():
            square = scale(step) ** 2 * math.exp(self.random.gauss(0.0, self.scatter) - self.scatter**2 / 2)
            if step > 1 and self.v[name] != 0:
                mean = square / (self.v[name] / (1 - BETA2 ** (step - 1)))
                mean = min(mean, 1 / (1 - BETA2)) if math.isfinite(mean) else mean
                ratios[name] = Ratio(mean=mean, numel=self.numels.get(name, NUMEL), steps=step - 1)
            self.v[name] = BETA2 * self.v[name] + (1 - BETA2) * square
        return Observation(step=step, ratios=ratios, learning_rate=self.learning_rate(step))


def run(criterion, gradients, *, total_steps=10_000.0, refresh="auto", steps=None):
    """Train as PhaseSwitch does, with no more history than the plan asks for.

    Returns the step of the switch (None if there was none), the last verdict, the history and the plan.
    """
    gradients = gradients if isinstance(gradients, Gradients) else Gradients(gradients)
    plan = criterion.plan(total_steps=total_steps, beta2=BETA2, refresh=refresh)
    history, verdict = [], Verdict(freeze=False, reason="never observed")
    for step in range(1, int(min(steps or 5000, total_steps)) + 1):
        observation = gradients.observe(step)
        if not plan.observes(step):
            continue
        history = [o for o in history if o.step >= step - plan.history]
        history.append(observation)
        verdict = criterion.judge(history, plan)
        if verdict.freeze:
            return step, verdict, history, plan
    return None, verdict, history, plan


def frozen(criterion, gradients, **kwargs):
    return run(criterion, gradients, refresh=None, **{"total_steps": 2000.0, "steps": 2000, **kwargs})


PATIENT = VarianceStability(max_steps=None)


# ---- With refreshes: a rough second moment will do


@pytest.mark.parametrize("total_steps", [1000, 10_000, math.inf])
def test_quiet_gradients_end_the_warmup_after_20_steps_by_themselves(total_steps):
    step, verdict, *_ = run(VarianceStability(), quiet, total_steps=total_steps)
    assert (step, verdict.forced) == (20, False)


@pytest.mark.parametrize("scale", [fourfold, falling, lambda t: 1.0 if t < 17 else 4.0, lambda t: 1.0 if t < 17 else 0.25])
@pytest.mark.parametrize("seed", range(5))
def test_a_scale_that_moves_fourfold_within_50_steps_ends_it_later_but_within_35(scale, seed):
    step, *_ = run(VarianceStability(), Gradients(scale, seed=seed))
    assert 20 < step <= 35


@pytest.mark.parametrize("total_steps", [1000, 500, 100])
def test_a_run_of_up_to_1000_steps_has_20_dense_ones_whatever_happens(total_steps):
    step, verdict, *_ = run(VarianceStability(), fourfold, total_steps=total_steps)
    assert (step, verdict.forced) == (20, True)


@pytest.mark.parametrize(("total_steps", "longest"), [(10, 20), (60, 20), (1000, 20), (1500, 30), (1750, 35)])
def test_the_longest_warmup_is_2_percent_of_the_run_between_20_and_35(total_steps, longest):
    plan = VarianceStability().plan(total_steps=total_steps, beta2=BETA2, refresh="auto")
    assert (plan.max_steps, plan.min_steps) == (longest, 20)
    assert bool(plan.remarks) == (total_steps <= 20)


def test_without_a_known_length_it_is_35_steps():
    plan = VarianceStability().plan(total_steps=math.inf, beta2=BETA2, refresh="auto")
    assert (plan.min_steps, plan.max_steps, plan.remarks) == (20, 35, ())


def test_a_rising_learning_rate_delays_nothing():
    step, *_ = run(VarianceStability(), Gradients(quiet, learning_rate=lambda step: 1e-6 * step))
    assert step == 20


def test_tensors_count_by_their_size():
    both = {"large": quiet, "small": fourfold}
    assert run(VarianceStability(), Gradients(both, numels={"large": 10**6, "small": 10**3}))[0] == 20
    step, verdict, *_ = run(VarianceStability(), Gradients(both, numels={"large": 10**3, "small": 10**6}))
    assert step > 20
    assert "'small'" in verdict.reason


def test_rarer_refreshes_ask_for_a_better_second_moment():
    slow = lambda step: 1.6 ** min(1.0, step / 50)  # noqa: E731
    assert run(VarianceStability(), slow, refresh=1)[0] == run(VarianceStability(), fourfold, refresh=1)[0] == 20
    assert run(VarianceStability(), slow, refresh="auto")[0] == 20
    assert run(VarianceStability(), slow, refresh=64)[0] > 20


def test_the_reason_holds_the_numbers_that_decided():
    step, verdict, history, plan = run(VarianceStability(), Gradients({"a": quiet, "b": fourfold}, numels={"a": 10_000}))
    window = history[-5:]
    assert [o.step for o in window] == list(range(step - 4, step + 1))
    totals = [(10_000 * o.ratios["a"].mean + 1000 * o.ratios["b"].mean) / 11_000 for o in window]
    rho, noise = statistics.fmean(totals), statistics.stdev(totals) / math.sqrt(5)
    interval = refresh_interval("auto", step)
    share = (1 - BETA2**interval) / (1 - BETA2 ** (step + interval))
    change = abs(math.sqrt(1 + math.copysign(max(0, abs(rho - 1) - noise), rho - 1) * share) - 1)
    b = statistics.fmean(o.ratios["b"].mean for o in window)
    assert change <= plan.tolerance == 0.015
    assert f"steps {step - 4} to {step}, (g / D)^2 was {rho:.3g} +- {noise:.2g}" in verdict.reason
    assert f"'b', which contributes most: {b:.3g}" in verdict.reason
    assert f"change by {change:.1%} in the {interval} steps between refreshes (1.5% allowed)" in verdict.reason


@pytest.mark.parametrize("rho", [0.1, 1.9])
def test_a_second_moment_that_falls_changes_d_by_more_than_one_that_rises(rho):
    ratios = {"weight": Ratio(mean=rho, numel=NUMEL, steps=20)}
    history = [Observation(step=step, ratios=ratios, learning_rate=1e-3) for step in range(16, 21)]
    plan = VarianceStability().plan(total_steps=1000, beta2=BETA2)
    share = share_of_new(refresh_interval("auto", 20), 20, BETA2)
    change = abs(math.sqrt(1 + (rho - 1) * share) - 1)
    assert f"so D will change by {change:.1%} in" in VarianceStability().judge(history, plan).reason


def test_parameters_without_a_second_moment_that_matters_delay_nothing():
    step, verdict, *_ = run(VarianceStability(), lambda step: 0.0)
    assert (step, verdict.forced) == (20, False)
    assert "no parameter" in verdict.reason


# ---- Without refreshes: it must have settled, and is kept for good


def early_mess(step):
    """Gradients that are five times larger at first."""
    return 1.0 + 4.0 * math.exp(-step / 10)


@pytest.mark.parametrize("seed", range(3))
def test_frozen_for_good_quiet_gradients_end_the_warmup_within_15_percent(seed):
    step, verdict, *_ = frozen(VarianceStability(), Gradients(quiet, seed=seed))
    assert 200 <= step <= 300
    assert not verdict.forced


def test_frozen_for_good_it_waits_until_a_mess_at_the_beginning_is_forgotten():
    step, verdict, *_ = frozen(VarianceStability(), early_mess)
    v = 1 + sum(early_mess(t) ** 2 - 1 for t in range(1, step)) / step
    assert 230 < step < 600
    assert not verdict.forced
    assert v < 1.3**2 * 1.1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("direction", [1, -1])
def test_frozen_for_good_a_scale_that_moves_16_fold_over_the_run_is_never_found_settled(seed, direction):
    gradients = Gradients(lambda step: 16.0 ** (direction * step / 2000), seed=seed)
    step, verdict, *_ = frozen(VarianceStability(), gradients)
    assert (step, verdict.forced) == (600, True)
    assert frozen(PATIENT, Gradients(lambda step: 16.0 ** (direction * step / 2000), seed=seed))[0] is None


def test_frozen_for_good_a_fourfold_move_within_50_steps_delays_it():
    assert frozen(PATIENT, fourfold)[0] >= frozen(PATIENT, quiet)[0]
    late = lambda step: 4.0 ** min(1.0, max(0.0, step - 150) / 50)  # noqa: E731
    assert (frozen(PATIENT, late)[0] or math.inf) > 1.5 * frozen(PATIENT, quiet)[0]


@pytest.mark.parametrize(("factor", "since"), [(10.0, 190), (0.1, 120)])
def test_frozen_for_good_one_moving_tensor_among_many_quiet_ones_is_found_and_named(factor, since):
    scales = {f"layer.{i}": quiet for i in range(10)} | {"head.weight": lambda step: 1.0 if step < since else factor}
    step, verdict, *_ = frozen(PATIENT, Gradients(scales), steps=240)
    assert step is None
    assert "'head.weight' is off by more than a factor of 3" in verdict.reason


def test_frozen_for_good_what_scatters_may_be_off_by_its_noise():
    """A tensor of few elements whose gradient comes in bursts: its rho is 1 in the mean, but of a window rarely near it."""
    step, *_ = frozen(PATIENT, Gradients({"weight": quiet, "bias": quiet}, numels={"bias": 4}))
    assert step is not None
    ratios = [Ratio(mean=x, numel=4, steps=100) for x in (0.0, 0.0, 12.0)]
    window = [Observation(step=i, ratios={"bias": r}, learning_rate=0.0) for i, r in enumerate(ratios)]
    rho, noise = tensor_ratio(window, "bias", BETA2)
    k = effective_samples(100, BETA2)
    assert rho == 4.0
    assert noise == pytest.approx(math.sqrt(4.0**2 + 2 / 4 * (1 / 3 + 1 / k)))


@pytest.mark.parametrize(("scatter", "moves"), [(0.5, False), (0.0, True)])
def test_frozen_for_good_the_noise_of_the_window_before_counts_too(scatter, moves):
    means = [1.1 + scatter, 1.1 - scatter] * 2 + [1.3] * 4
    history = [
        Observation(step=step, ratios={"weight": Ratio(mean=mean, numel=10**6, steps=1000)}, learning_rate=1e-3)
        for step, mean in enumerate(means, 1)
    ]
    criterion = VarianceStability(window=4, patience=1, min_steps=1, max_steps=None)
    verdict = criterion.judge(history, criterion.plan(total_steps=1000, beta2=BETA2, refresh=None))
    assert verdict.freeze != moves
    assert ("the second moment moves" in verdict.reason) == moves


def test_frozen_for_good_a_rising_learning_rate_blocks():
    step, verdict, *_ = frozen(PATIENT, Gradients(quiet, learning_rate=lambda step: 1e-6 * step))
    assert step is None
    assert "learning rate" in verdict.reason
    step, *_ = frozen(PATIENT, Gradients(quiet, learning_rate=lambda step: min(step, 500)))
    assert 500 < step < 600


def test_frozen_for_good_the_reason_holds_the_numbers_that_decided():
    scales = {"a": early_mess, "b": quiet}
    step, verdict, history, plan = frozen(VarianceStability(), Gradients(scales, numels={"a": 3000}))
    window = [o for o in history if o.step > step - 100]
    before = [o for o in history if step - 200 < o.step <= step - 100]

    def deviation(observations):
        a, b = (statistics.fmean(o.ratios[name].mean for o in observations) for name in "ab")
        return (3000 * abs(math.log(a)) + 1000 * abs(math.log(b))) / 4000, a

    now, a = deviation(window)
    assert math.exp(now / 2) - 1 <= plan.tolerance == 0.3
    assert f"steps {window[0].step} to {step}, (g / D)^2 was off by a factor of {math.exp(now):.3g}" in verdict.reason
    assert f"(before, {math.exp(deviation(before)[0]):.3g}; farthest: 'a', {a:.3g} +- " in verdict.reason
    assert f"so D by {math.exp(now / 2) - 1:.1%} (30.0% allowed)" in verdict.reason


@pytest.mark.parametrize(("patience", "later"), [(1, 0), (3, 10), (7, 30)])
def test_frozen_for_good_patience_is_a_number_of_observations_in_a_row(patience, later):
    criterion = VarianceStability(patience=patience, max_steps=None)
    assert frozen(criterion, Gradients(quiet, scatter=0.0))[0] == 200 + later


def test_a_criterion_that_ignores_its_observations_would_fail():
    """The same plan, the same steps, other gradients: other verdicts, on both sides and in both regimes."""
    for refresh, scales in (("auto", (quiet, fourfold, falling)), (None, (quiet, early_mess))):
        found = {run(PATIENT, scale, refresh=refresh, total_steps=2000.0, steps=2000)[0] for scale in scales}
        assert len(found) == len(scales)


# ---- Both: what is not finite, limits


@pytest.mark.parametrize("refresh", ["auto", None])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradients_never_pass(refresh, bad):
    scales = {"quiet": quiet, "bad": lambda step: bad if step > 10 else 1.0}
    step, verdict, *_ = run(PATIENT, Gradients(scales), refresh=refresh, total_steps=2000.0, steps=600)
    assert step is None
    assert "'bad' is infinite or NaN" in verdict.reason


@pytest.mark.parametrize("refresh", ["auto", None])
def test_a_tensor_with_its_first_gradient_late_is_no_obstacle(refresh):
    step, *_ = run(PATIENT, Gradients({"weight": quiet, "late": lambda step: float(step > 15)}), refresh=refresh)
    assert step is not None


def test_min_steps_hold_back_a_stable_run():
    assert run(VarianceStability(min_steps=55), quiet)[0] == 55
    assert "min_steps" in run(VarianceStability(min_steps=55), quiet, steps=54)[1].reason
    assert frozen(VarianceStability(min_steps=555), Gradients(quiet, scatter=0.0))[0] == 555


@pytest.mark.parametrize("refresh", ["auto", None])
def test_max_steps_end_the_warmup_and_say_what_moved(refresh):
    growing = lambda step: 8.0 ** (step / 50)  # noqa: E731
    step, verdict, *_ = run(VarianceStability(max_steps=777), growing, refresh=refresh, total_steps=10_000)
    assert (step, verdict.forced) == (777, True)
    assert "max_steps is reached at step 777" in verdict.reason


def test_max_steps_before_anything_can_be_compared_still_force():
    step, verdict, *_ = frozen(VarianceStability(max_steps=5), quiet)
    assert (step, verdict.forced) == (5, True)
    step, verdict, *_ = run(VarianceStability(max_steps=1), quiet)
    assert (step, verdict.forced) == (1, True)


def test_without_refreshes_the_warmup_ends_after_three_tenths_of_the_run():
    plan = VarianceStability().plan(total_steps=1000, beta2=BETA2, refresh=None)
    assert (plan.window, plan.min_steps, plan.max_steps, plan.every) == (50, 100, 300, 2)


def test_max_steps_as_a_fraction_are_not_fewer_than_min_steps():
    plan = VarianceStability(min_steps=500, max_steps=0.3).plan(total_steps=1000, beta2=BETA2)
    assert (plan.min_steps, plan.max_steps) == (500, 500)


def test_fractions_are_of_the_run():
    plan = VarianceStability(min_steps=0.1, max_steps=0.25).plan(total_steps=1001, beta2=BETA2)
    assert (plan.min_steps, plan.max_steps) == (101, 251)


@pytest.mark.parametrize(("max_steps", "refresh"), [(0.25, "auto"), (0.25, None), ("auto", None)])
def test_fractions_have_no_effect_on_a_run_of_unknown_length(max_steps, refresh):
    plan = VarianceStability(min_steps=0.1, max_steps=max_steps).plan(total_steps=math.inf, beta2=BETA2, refresh=refresh)
    assert (plan.min_steps, plan.max_steps) == (0, math.inf)
    shares = ["min_steps=0.1", "max_steps=0.25" if max_steps == 0.25 else "max_steps='auto' (30% of the run)"]
    for remark, share in zip(plan.remarks, shares, strict=True):
        assert remark.startswith(f"The length of the run is not known, so {share}, a fraction of it, has no effect: ")


def test_numbers_of_steps_hold_on_a_run_of_unknown_length():
    plan = VarianceStability(min_steps=50, max_steps=400).plan(total_steps=math.inf, beta2=BETA2)
    assert (plan.min_steps, plan.max_steps) == (50, 400)


def test_a_run_shorter_than_its_warmup_is_told_so():
    (remark,) = VarianceStability(min_steps=100).plan(total_steps=100, beta2=BETA2).remarks
    assert "nothing will be compressed" in remark


@pytest.mark.parametrize(("shortest", "longest"), [(500, 400), (0.5, 0.1)])
def test_more_min_steps_than_max_steps_is_refused_with_both(shortest, longest):
    with pytest.raises(ValueError, match=rf"Invalid min_steps: {shortest}\..*max_steps={longest}"):
        VarianceStability(min_steps=shortest, max_steps=longest)
    VarianceStability(min_steps=longest, max_steps=shortest)
    VarianceStability(min_steps=0.5, max_steps=400)  # of 800 steps, say


@pytest.mark.parametrize(("refresh", "shortest"), [("auto", 20), (None, 40)])
def test_runs_of_few_steps_have_their_shortest_warmup_and_are_told_if_that_is_all(refresh, shortest):
    for total_steps in (1, 2, 5, 10, shortest):
        plan = VarianceStability().plan(total_steps=total_steps, beta2=BETA2, refresh=refresh)
        assert "nothing will be compressed" in plan.remarks[0]
        assert run(VarianceStability(), quiet, total_steps=total_steps - 1, refresh=refresh)[0] is None
    assert run(VarianceStability(), fourfold, total_steps=shortest + 1, refresh=refresh)[0] == shortest


@pytest.mark.parametrize("window", [1, 7, 25, 99, 100])
@pytest.mark.parametrize("refresh", ["auto", None])
def test_the_history_kept_is_enough_for_any_window(window, refresh):
    criterion = VarianceStability(window=window, max_steps=None, min_steps=0)
    step, *_ = run(criterion, Gradients(quiet, scatter=0.0), refresh=refresh)
    assert 1 <= step <= 2 * window + 5 * max(1, window // 20) + 2


def test_observations_are_every_twentieth_of_a_window_and_all_after_max_steps():
    plan = VarianceStability(window=100, max_steps=12).plan(total_steps=1000, beta2=BETA2, refresh=None)
    assert [step for step in range(1, 17) if plan.observes(step)] == [5, 10, 12, 13, 14, 15, 16]


def test_a_plan_observes_nothing_before_its_start():
    plan = Plan(every=5, start=12)
    assert [step for step in range(1, 26) if plan.observes(step)] == [15, 20, 25]
    renewed = VarianceStability().plan(total_steps=10_000, beta2=BETA2)
    assert [step for step in range(1, 21) if renewed.observes(step)] == [16, 17, 18, 19, 20]
    with pytest.raises(ValueError, match=r"Invalid every of a Plan: 0\. Must be >= 1"):
        Plan(every=0)


# ---- The numbers


@pytest.mark.parametrize("steps", [1, 10, 1000, 100_000])
def test_effective_samples_are_one_over_the_squared_weights(steps):
    weights = [BETA2**k for k in range(steps)]
    expected = sum(weights) ** 2 / sum(w * w for w in weights)
    assert effective_samples(steps, BETA2) == pytest.approx(expected, rel=1e-6)


def test_the_share_of_new_gradients_is_what_the_average_gives_them():
    v = corrected = 0.0
    for step in range(1, 41):
        v = BETA2 * v + (1 - BETA2) * (1.0 if step <= 30 else 3.0)
        corrected = v / (1 - BETA2**step)
    assert corrected == pytest.approx(1 + (3.0 - 1) * share_of_new(10, 30, BETA2), rel=1e-9)


def test_refreshes_are_as_often_as_the_strategy_says():
    assert [refresh_interval("auto", step) for step in (1, 7, 20, 35, 511, 512, 10_000)] == [1, 1, 2, 4, 63, 64, 64]
    assert refresh_interval(7, 10_000) == 7
    for every in ("auto", 1, 7, 100):
        due = [step for step in range(1, 3000) if is_refresh_due(step, every)]
        apart = [after - before for before, after in itertools.pairwise(due)]
        assert apart == [refresh_interval(every, step) for step in due[:-1]]
        assert longest_interval(every) == apart[-1]
        # What is taken at any step is valid until the next refresh, and so no longer than the criterion assumes.
        for step in range(due[0], 2900):
            assert min(d for d in due if d > step) - step <= refresh_interval(every, step)
    assert not any(is_refresh_due(step, None) for step in range(100))
    with pytest.raises(ValueError, match="Invalid variance_refresh: None"):
        refresh_interval(None, 7)


def test_the_mean_deviation_does_not_let_opposite_tensors_cancel():
    ratios = {"up": Ratio(mean=2.0, numel=10, steps=50), "down": Ratio(mean=0.5, numel=30, steps=50)}
    deviation, _ = mean_deviation([Observation(step=1, ratios=ratios, learning_rate=0.0)], BETA2)
    assert deviation == pytest.approx(math.log(2.0))


# ---- FixedStep


@pytest.mark.parametrize("n", [1, 2, 100])
def test_fixed_step_freezes_after_exactly_n_steps(n):
    step, verdict, *_ = run(FixedStep(n), lambda step: math.nan)
    assert (step, verdict.forced) == (n, False)


def test_fixed_step_does_not_freeze_before_and_needs_no_ratios():
    criterion = FixedStep(10)
    plan = criterion.plan(total_steps=100, beta2=BETA2)
    early = Observation(step=9, ratios={}, learning_rate=1e-3)
    assert not criterion.judge([early], plan).freeze
    assert not plan.observes(9)
    assert plan.observes(10)
    assert not plan.measures


@pytest.mark.parametrize(("n", "warns"), [(99, False), (100, True), (101, True)])
def test_fixed_step_warns_if_the_run_ends_first(n, warns):
    remarks = FixedStep(n).plan(total_steps=100, beta2=BETA2).remarks
    assert bool(remarks) == warns
    assert all(f"FixedStep({n})" in remark and "100 optimizer steps" in remark for remark in remarks)


def test_fixed_step_does_not_warn_on_a_run_of_unknown_length():
    assert FixedStep(10**9).plan(total_steps=math.inf, beta2=BETA2).remarks == ()


# ---- invalid arguments


@pytest.mark.parametrize("n", [0, -1, 1.5, math.inf, math.nan, True, False, None, "100", "0.04", [7]], ids=repr)
def test_fixed_step_refuses_what_is_no_number_of_steps(n):
    with pytest.raises(
        (TypeError, ValueError), match=rf"FixedStep\({re.escape(repr(n))}\).*integer >= 1.*HINT: 20 to 35 steps"
    ):
        FixedStep(n)


def test_fixed_step_says_why_it_takes_no_fraction_and_what_does():
    with pytest.raises(
        ValueError, match=r"FixedStep\(0\.25\).*integer >= 1.*length may be unknown\. HINT: (.*) takes one"
    ) as raised:
        FixedStep(0.25)
    instead = re.search(r"HINT: (.*) takes one", str(raised.value))[1]
    step, *_ = run(eval(instead), fourfold, total_steps=1000)
    assert step == 250


def test_a_whole_number_of_any_type_is_a_number_of_steps():
    assert repr(FixedStep(100.0)) == "FixedStep(n=100)"
    assert FixedStep(np.int64(7)) == FixedStep(7)
    plan = VarianceStability(window=np.int64(8), min_steps=np.float64(10.0), max_steps=20.0).plan(
        total_steps=100, beta2=BETA2
    )
    assert (plan.window, plan.min_steps, plan.max_steps) == (8, 10, 20)


BAD = {
    "tolerance": (["0.04", True, False, [0.1], 0, -0.1, math.nan], "a number > 0"),
    "window": (["5", True, False, [5], 0, -5, 2.5, 0.05, math.inf, math.nan], "an integer >= 1"),
    "patience": (["3", True, None, (3,), 0, 1.5, 0.5, math.inf, math.nan], "an integer >= 1"),
    "min_steps": (
        ["100", "0.1", "auto", True, False, -1, -0.1, 1.5, math.inf, math.nan],
        "a fraction of the run between 0 and 1",
    ),
    "max_steps": (
        ["0.3", "never", True, False, -1, 2.5, math.inf, math.nan],
        "a fraction of the run between 0 and 1, 'auto'",
    ),
}


@pytest.mark.parametrize(
    ("name", "value", "allowed"), [(name, v, allowed) for name, (vs, allowed) in BAD.items() for v in vs]
)
def test_variance_stability_refuses_with_value_and_domain(name, value, allowed):
    with pytest.raises(
        (TypeError, ValueError), match=f"Invalid {name}: {re.escape(repr(value))}\\. Must be .*{allowed}"
    ) as raised:
        VarianceStability(**{name: value})
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    assert type(raised.value) is (ValueError if is_number else TypeError)
    is_share_of_what_counts = name in ("window", "patience") and is_number and 0 < value < 1
    assert ("A fraction of the run is none" in str(raised.value)) == is_share_of_what_counts


def test_no_longest_warmup_at_all_is_refused():
    with pytest.raises(ValueError, match=r"Invalid max_steps: 0\. Must be > 0"):
        VarianceStability(max_steps=0)
