"""When drift of the second moment is warned of: floats in, sentences out."""

import pytest

from lightning_onebit.freeze.drift import Drift, DriftWatch, extremes

FITS = Drift(ratio=1.0, clamped=0.0, share=0.5, last_ratio=1.0, estimates=0)


def warnings_of(ratios, *, is_frozen=True, **values):
    """Of a run with two tensors, of which the second has these rhos, by step of the warning."""
    watch, average, found = DriftWatch(), 0.0, {}
    for number, ratio in enumerate(ratios, 1):
        step = 16 * number
        average += (ratio - average) / min(number, 16)
        moves = FITS._replace(ratio=average, last_ratio=ratio, estimates=number, **values)
        assert watch.is_due(step)
        assert not watch.is_due(step + 1)
        drifts = {"first": FITS._replace(estimates=number), "second": moves}
        for warning in watch.observe(step, drifts, is_frozen=is_frozen):
            found.setdefault(step, []).append(warning)
    return found


def test_drift_is_warned_of_once_and_again_when_it_has_doubled():
    found = warnings_of([1.0] * 4 + [16.0] * 20 + [64.0] * 40)
    first, *later = found
    assert first == 16 * 9  # the fourth estimate in a row: with the first large one the average is 4
    (warning,) = found[first]
    for expected in ("'second'", "since step 96", "variance_refresh='auto'"):
        assert expected in warning
    assert "'first'" not in warning
    assert len(later) == 2  # from 9.3 to nearly 64 in the end


def test_gradients_that_shrink_are_drift_too():
    (warning,) = warnings_of([1.0] * 4 + [0.01] * 40).popitem()[1]
    assert "0.4" in warning or "0.3" in warning or "0.2" in warning or "0.1" in warning
    assert "beyond 1/4" in warning


@pytest.mark.parametrize(
    ("ratios", "values"),
    [
        ([1.0, 0.3, 3.0, 2.0] * 20, {}),
        ([1.0] * 10 + [200.0] + [1.0] * 20, {}),  # one odd batch, in the average for a long time
        ([0.1, 1.9, 0.2, 1.8] * 20, {}),  # noise of a small tensor
        ([16.0] * 20, {"share": 0.001}),
        ([0.001] * 20, {}),  # eps is most of D from the beginning
        ([3.0] + [0.5] * 40, {}),  # from above 1 to half of it
        ([16.0] * 20, {"is_frozen": False}),  # a refresh is due
    ],
)
def test_what_is_no_drift(ratios, values):
    assert not warnings_of(ratios, **values)


def test_drift_to_the_other_side_is_counted_anew():
    watch, found = DriftWatch(), []
    for number, ratio in enumerate([16.0] * 3 + [0.01] * 4, 1):
        drifts = {"only": FITS._replace(ratio=ratio, last_ratio=ratio, estimates=number)}
        found.append(watch.observe(16 * number, drifts, is_frozen=True))
    *before, (warning,) = found
    assert not any(before)
    assert "beyond 1/4 at all estimates since step 64" in warning


@pytest.mark.parametrize(("is_frozen", "hint"), [(True, "variance_refresh='auto'"), (False, "clip gradients")])
def test_clamped_elements_are_warned_of(is_frozen, hint):
    found = warnings_of([1.0] * 20, clamped=0.2, is_frozen=is_frozen)
    ((step, (warning,)),) = found.items()
    assert step == 64
    assert "0.2 of the elements of 'second'" in warning
    assert hint in warning
    assert not warnings_of([1.0] * 20, clamped=0.01, is_frozen=is_frozen)


def test_extremes_are_of_tensors_that_matter():
    some = {
        "a": FITS._replace(ratio=2.0, clamped=0.1, estimates=1),
        "b": FITS._replace(ratio=0.5, estimates=1),
        "small": FITS._replace(ratio=100.0, clamped=1.0, share=0.001, estimates=1),
        "not yet": FITS._replace(ratio=0.0),
    }
    assert extremes(some) == {"drift_max": 2.0, "drift_min": 0.5, "clamped_share": 0.1}
    assert extremes({}) == {}
