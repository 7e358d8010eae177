"""The criteria as pure functions: hand-made second moments in, the step of the freeze out."""

import math

import pytest

from lightning_onebit.freeze.criteria import FixedStep, Observation, Plan, VarianceStability, Verdict

BETA2 = 0.99  # a memory of 100 steps: a window of 100, observed every 10


def stability(**settings):
    """The criterion without its limits on the length of the warm-up, unless given."""
    return VarianceStability(**({"min_steps": 0, "max_steps": None} | settings))


PATIENT = stability()


def run(criterion, variances_at, *, total_steps=2000.0, beta2=BETA2, learning_rate_at=lambda step: 1e-3, steps=2000):
    """Train for ``steps`` as PhaseSwitch does, with no more history than the plan asks for.

    Returns the step of the freeze (None if there was none) and the last verdict.
    """
    plan = criterion.plan(total_steps=total_steps, beta2=beta2)
    history, verdict = [], Verdict(freeze=False, reason="never observed")
    for step in range(1, steps + 1):
        if not plan.observes(step):
            continue
        history = [observation for observation in history if observation.step >= step - plan.history]
        history.append(Observation(step=step, variances=variances_at(step), learning_rate=learning_rate_at(step)))
        verdict = criterion.judge(history, plan)
        if verdict.freeze:
            return step, verdict
    return None, verdict


def one(function):
    """Variances of a model of one tensor."""
    return lambda step: {"weight": function(step)}


def flat(step):
    return {"weight": 1.0}


# ---- VarianceStability: what passes and what does not


def test_flat_freezes_as_soon_as_a_window_and_the_patience_are_over():
    step, verdict = run(PATIENT, flat)
    assert step == 10 + 100 + 2 * 10  # first observation, a window later, two more
    assert not verdict.forced


def test_falling_freezes_when_the_fall_has_levelled_off():
    def v(step):
        return 1 + 10 * math.exp(-step / 50)

    def passes(step):
        return abs(v(step) / v(step - 100) - 1) <= 0.04

    expected = next(step for step in range(120, 2000, 10) if all(passes(step - back) for back in (0, 10, 20)))
    assert run(PATIENT, one(v))[0] == expected > 300


def test_growing_never_passes():
    step, verdict = run(PATIENT, one(lambda step: math.exp(step / 100)))
    assert step is None
    assert "'weight' changed by 171.8% in the 100 steps before step 2000 (4.0% allowed)" in verdict.reason


@pytest.mark.parametrize(("per_window", "passes"), [(1.03, True), (1.05, False), (0.97, True), (0.95, False)])
def test_slow_change_passes_within_the_tolerance_on_both_sides(per_window, passes):
    step, _ = run(PATIENT, one(lambda step: per_window ** (step / 100)))
    assert (step is not None) == passes


def test_tolerance_is_a_setting():
    growing = one(lambda step: 1.05 ** (step / 100))
    assert run(stability(tolerance=0.06), growing)[0] == 130


def test_one_moving_tensor_among_many_quiet_ones_is_found_and_named():
    def variances(step):
        return {f"layer.{i}": 1.0 for i in range(200)} | {"head.weight": math.exp(step / 500)}

    step, verdict = run(PATIENT, variances)
    assert step is None
    assert "'head.weight'" in verdict.reason


def test_a_tiny_moving_tensor_does_not_hide_behind_a_huge_quiet_one():
    step, verdict = run(PATIENT, lambda step: {"embedding": 1e12, "bias": 1e-12 * math.exp(step / 500)})
    assert step is None
    assert "'bias'" in verdict.reason


def test_opposite_changes_do_not_cancel():
    step, _ = run(PATIENT, lambda step: {"up": math.exp(step / 500), "down": math.exp(-step / 500)})
    assert step is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_moments_never_pass(bad):
    assert run(PATIENT, lambda step: {"quiet": 1.0, "bad": bad})[0] is None
    assert run(PATIENT, lambda step: {"bad": bad, "quiet": 1.0})[0] is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_non_finite_moment_starts_the_patience_anew(bad):
    assert run(PATIENT, one(lambda step: bad if step == 120 else 1.0))[0] == 120 + 3 * 10


def test_unused_tensors_are_ignored():
    assert run(PATIENT, lambda step: {"weight": 1.0, "unused": 0.0})[0] == 130
    assert run(PATIENT, lambda step: {"unused": 0.0})[0] == 130


def test_a_tensor_with_its_first_gradient_within_the_window_does_not_pass():
    step, verdict = run(PATIENT, lambda step: {"weight": 1.0, "late": float(step > 95)}, steps=190)
    assert step is None
    assert "'late'" in verdict.reason
    assert run(PATIENT, lambda step: {"weight": 1.0, "late": float(step > 95)})[0] == 100 + 100 + 2 * 10


def test_a_tensor_that_appears_within_the_window_does_not_pass():
    step, verdict = run(PATIENT, lambda step: {"weight": 1.0} | ({"new": 1.0} if step > 95 else {}), steps=190)
    assert step is None
    assert "'new'" in verdict.reason


@pytest.mark.parametrize(("patience", "expected"), [(1, 110), (3, 130), (7, 170)])
def test_patience_is_a_number_of_observations_in_a_row(patience, expected):
    assert run(stability(patience=patience), flat)[0] == expected


def test_one_failure_starts_the_patience_anew():
    assert run(PATIENT, one(lambda step: 2.0 if step == 120 else 1.0))[0] == 120 + 3 * 10


def test_a_moment_that_failed_is_also_no_past_to_compare_with():
    step, _ = run(stability(patience=12), one(lambda step: 2.0 if step == 120 else 1.0))
    assert step == 120 + 100 + 12 * 10


def test_a_rising_learning_rate_blocks():
    step, verdict = run(PATIENT, flat, learning_rate_at=lambda step: 1e-6 * step)
    assert step is None
    assert "learning rate" in verdict.reason


def test_freezes_once_the_learning_rate_has_stopped_rising_for_as_long_as_the_patience():
    assert run(PATIENT, flat, learning_rate_at=lambda step: min(step, 500))[0] == 500 + 3 * 10


def test_a_falling_learning_rate_does_not_block():
    assert run(PATIENT, flat, learning_rate_at=lambda step: 1 / step)[0] == 130


# ---- VarianceStability: limits


def test_min_steps_hold_back_a_stable_run():
    criterion = stability(min_steps=555)
    assert run(criterion, flat)[0] == 560
    assert "min_steps" in run(criterion, flat, steps=550)[1].reason


def test_max_steps_force_the_freeze_and_say_what_was_unstable():
    step, verdict = run(stability(max_steps=777), one(lambda step: math.exp(step / 100)))
    assert step == 777  # between two observations
    assert verdict.forced
    assert "max_steps" in verdict.reason
    assert "777" in verdict.reason
    assert "'weight'" in verdict.reason


def test_a_stable_run_at_max_steps_is_not_forced():
    step, verdict = run(stability(window=100, max_steps=130), flat)
    assert step == 130
    assert not verdict.forced


def test_max_steps_before_anything_can_be_compared_still_force():
    step, verdict = run(stability(window=100, max_steps=5), flat)
    assert (step, verdict.forced) == (5, True)


@pytest.mark.parametrize(("total_steps", "expected"), [(1000, 300), (334, 101), (333, 100), (200, 100)])
def test_by_default_the_warm_up_ends_after_three_tenths_of_the_run_but_100_steps(total_steps, expected):
    step, verdict = run(VarianceStability(), one(lambda step: math.exp(step / 100)), total_steps=total_steps)
    assert (step, verdict.forced) == (expected, True)


def test_max_steps_as_a_fraction_are_not_fewer_than_min_steps():
    plan = VarianceStability(min_steps=500).plan(total_steps=1000, beta2=BETA2)
    assert (plan.min_steps, plan.max_steps) == (500, 500)


def test_fractions_are_of_the_run():
    plan = VarianceStability(min_steps=0.1, max_steps=0.25).plan(total_steps=1001, beta2=BETA2)
    assert (plan.min_steps, plan.max_steps) == (101, 251)


def test_fractions_have_no_effect_on_a_run_of_unknown_length():
    plan = VarianceStability(min_steps=0.1, max_steps=0.25).plan(total_steps=math.inf, beta2=BETA2)
    assert (plan.min_steps, plan.max_steps) == (0, math.inf)
    assert plan.window == 100
    assert [remark.split(",")[0] for remark in plan.remarks] == ["The length of the run is not known"]
    assert run(VarianceStability(), one(lambda step: math.exp(step / 100)), total_steps=math.inf)[0] is None


def test_numbers_of_steps_hold_on_a_run_of_unknown_length():
    plan = VarianceStability(min_steps=50, max_steps=400).plan(total_steps=math.inf, beta2=BETA2)
    assert (plan.min_steps, plan.max_steps) == (50, 400)


def test_more_min_steps_than_max_steps_is_refused_with_both():
    with pytest.raises(ValueError, match=r"Invalid min_steps: 500\..*max_steps=400"):
        VarianceStability(min_steps=500, max_steps=400)


# ---- VarianceStability: the window


def test_the_window_is_the_memory_of_the_second_moment():
    plan = PATIENT.plan(total_steps=math.inf, beta2=0.999)
    assert (plan.window, plan.every, plan.remarks) == (1000, 100, ())


def test_a_short_run_shortens_the_window_and_says_so():
    plan = VarianceStability().plan(total_steps=1000, beta2=0.999)
    assert plan.window == 300 // 4
    (remark,) = plan.remarks
    assert "1000 steps apart" in remark
    assert "75 steps apart instead" in remark
    assert run(VarianceStability(), flat, total_steps=1000, beta2=0.999)[0] < 300


@pytest.mark.parametrize("total_steps", [1, 2, 3, 5, 10, 30])
def test_very_short_runs_still_freeze(total_steps):
    criterion = stability(max_steps=0.3)
    assert criterion.plan(total_steps=total_steps, beta2=0.999).window >= 1
    assert run(criterion, flat, total_steps=total_steps, beta2=0.999)[0] <= math.ceil(0.3 * total_steps)


def test_an_explicit_window_is_not_shortened():
    plan = VarianceStability(window=500).plan(total_steps=600, beta2=0.999)
    assert (plan.window, plan.remarks) == (500, ())


@pytest.mark.parametrize("window", [1, 7, 25, 99, 100])
def test_the_history_kept_is_enough_for_any_window(window):
    every = max(1, window // 10)
    expected = math.ceil((every + window) / every) * every + 2 * every
    assert run(stability(window=window), flat)[0] == expected


def test_observations_are_every_tenth_of_a_window_and_all_after_max_steps():
    plan = stability(window=100, max_steps=35).plan(total_steps=1000, beta2=BETA2)
    assert [step for step in range(1, 41) if plan.observes(step)] == [10, 20, 30, 35, 36, 37, 38, 39, 40]


def test_a_plan_observes_nothing_before_its_start():
    plan = Plan(every=5, start=12)
    assert [step for step in range(1, 26) if plan.observes(step)] == [15, 20, 25]


# ---- FixedStep


@pytest.mark.parametrize("n", [1, 2, 100])
def test_fixed_step_freezes_after_exactly_n_steps(n):
    step, verdict = run(FixedStep(n), lambda step: {"weight": math.nan})
    assert (step, verdict.forced) == (n, False)


def test_fixed_step_does_not_freeze_before():
    criterion = FixedStep(10)
    plan = criterion.plan(total_steps=100, beta2=BETA2)
    early = Observation(step=9, variances={}, learning_rate=1e-3)
    assert not criterion.judge([early], plan).freeze
    assert not plan.observes(9)
    assert plan.observes(10)


@pytest.mark.parametrize(("n", "warns"), [(99, False), (100, True), (101, True)])
def test_fixed_step_warns_if_the_run_ends_first(n, warns):
    remarks = FixedStep(n).plan(total_steps=100, beta2=BETA2).remarks
    assert bool(remarks) == warns
    assert all(f"FixedStep({n})" in remark and "100 optimizer steps" in remark for remark in remarks)


def test_fixed_step_does_not_warn_on_a_run_of_unknown_length():
    assert FixedStep(10**9).plan(total_steps=math.inf, beta2=BETA2).remarks == ()


# ---- invalid arguments


@pytest.mark.parametrize("n", [0, -1, 0.25, 1.5, math.inf, math.nan])
def test_fixed_step_refuses_what_is_no_number_of_steps(n):
    with pytest.raises(ValueError, match=rf"FixedStep\({n}\).*integer >= 1"):
        FixedStep(n)


@pytest.mark.parametrize(
    ("name", "value", "domain"),
    [
        ("tolerance", 0, "> 0"),
        ("tolerance", -0.1, "> 0"),
        ("tolerance", math.nan, "> 0"),
        ("window", 0, "integer >= 1"),
        ("window", -5, "integer >= 1"),
        ("window", 2.5, "integer >= 1"),
        ("window", math.inf, "integer >= 1"),
        ("window", math.nan, "integer >= 1"),
        ("patience", 0, "integer >= 1"),
        ("patience", 1.5, "integer >= 1"),
        ("patience", math.inf, "integer >= 1"),
        ("patience", math.nan, "integer >= 1"),
        ("min_steps", -1, "between 0 and 1"),
        ("min_steps", -0.1, "between 0 and 1"),
        ("min_steps", 1.5, "between 0 and 1"),
        ("min_steps", math.inf, "between 0 and 1"),
        ("min_steps", math.nan, "between 0 and 1"),
        ("max_steps", 0, "> 0"),
        ("max_steps", -1, "between 0 and 1"),
        ("max_steps", 2.5, "between 0 and 1"),
        ("max_steps", math.inf, "between 0 and 1"),
        ("max_steps", math.nan, "between 0 and 1"),
    ],
)
def test_variance_stability_refuses_with_value_and_domain(name, value, domain):
    with pytest.raises(ValueError, match=rf"Invalid {name}: {value}\..*{domain}"):
        VarianceStability(**{name: value})
