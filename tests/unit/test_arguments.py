"""What users pass is checked where they pass it, and the message says what is allowed and what to write instead."""

import re
from datetime import timedelta

import pytest
import torch
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from lightning_onebit import (
    CommMonitor,
    DivergenceGuard,
    ErrorFeedback,
    FixedStep,
    OneBitDDPFabricStrategy,
    OneBitDDPStrategy,
    PhaseSwitch,
    VarianceStability,
)
from lightning_onebit.arguments import check_steps

BOTH = [OneBitDDPStrategy, OneBitDDPFabricStrategy]


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("blocksize", "The nearest one is 'block_size'."),
        ("find_unused_parameter", "The nearest one is 'find_unused_parameters'."),
        ("bucket_cap", "The nearest one is 'bucket_cap_mb'."),
        ("max_skiped_steps", "The nearest one is 'max_skipped_steps'."),
        ("zzz", "itself has .*block_size, scale, space, .*hierarchical"),
        ("device_ids", r"is (Trainer|Fabric)\(devices=\.\.\.\)\."),  # which Lightning passes to DDP
        ("lr", "the same argument of the optimizer"),
    ],
)
def test_an_unknown_argument_is_refused_at_once_with_the_nearest(kind, name, hint):
    with pytest.raises(TypeError, match=rf"Unknown argument {name}=7\. Must be one of {kind.__name__}, .* HINT: .*{hint}"):
        kind(**{name: 7})


@pytest.mark.parametrize(
    ("kind", "name", "instead"),
    [
        (OneBitDDPStrategy, "freeze_step", "Trainer(callbacks=[PhaseSwitch(criterion=FixedStep(1000))])"),
        (OneBitDDPFabricStrategy, "freeze_step", "is criterion=FixedStep(1000)."),
        (OneBitDDPStrategy, "criterion", "Trainer(callbacks=[PhaseSwitch(criterion=1000)])"),
        (OneBitDDPStrategy, "total_steps", "nothing, as the Trainer knows"),
        (OneBitDDPStrategy, "num_nodes", "Trainer(num_nodes=1000)"),
        (OneBitDDPStrategy, "var_update_scaler", "variance_refresh=1000"),
        (OneBitDDPStrategy, "local_step_scaler", "nothing: all ranks step together"),
        (OneBitDDPFabricStrategy, "overlap", "nothing: a training loop may change gradients"),
        (OneBitDDPFabricStrategy, "comm_backend_name", "is process_group_backend=1000."),
    ],
)
def test_what_other_systems_have_is_told_what_takes_its_place(kind, name, instead):
    with pytest.raises(TypeError, match=re.escape(instead)):
        kind(**{name: 1000})


@pytest.mark.parametrize("kind", BOTH)
def test_every_argument_of_ddp_and_of_a_subclass_passes(kind):
    class Mine(kind):
        def __init__(self, *, color, **kwargs):
            super().__init__(**kwargs)
            self.color = color

    strategy = Mine(color="red", find_unused_parameters=True, static_graph=False, dim=0, timeout=None)
    assert (strategy.color, strategy._ddp_kwargs["static_graph"]) == ("red", False)
    registry = StrategyRegistry if kind is OneBitDDPStrategy else STRATEGY_REGISTRY
    for name in [name for name in registry if name.startswith("onebit_")]:
        assert isinstance(registry.get(name), kind)


STEPS = [None, 0, -1, 0.2, 7.5, True, "100", "all", [3], float("nan"), float("inf"), torch.tensor([3.0, 4.0])]


@pytest.mark.parametrize(
    ("make", "name", "none_is_allowed"),
    [
        (CommMonitor, "every_n_steps", True),
        (DivergenceGuard, "every_n_steps", True),
        (lambda n: OneBitDDPFabricStrategy(total_steps=n), "total_steps", True),
        (lambda n: check_steps("n", n), "n", False),
    ],
)
@pytest.mark.parametrize("value", STEPS, ids=repr)
def test_what_is_no_number_of_steps_is_refused_by_value(make, name, none_is_allowed, value):
    if value is None and none_is_allowed:
        make(value)
        return
    with pytest.raises((TypeError, ValueError), match=f"Invalid {name}: {re.escape(repr(value))}. Must be >= 1") as raised:
        make(value)
    assert ("or None" in str(raised.value)) == none_is_allowed
    assert ("A fraction of the run has no meaning here" in str(raised.value)) == (repr(value) == "0.2")


def test_a_whole_number_of_any_type_is_one():
    assert CommMonitor(7).every_n_steps == 7
    steps = OneBitDDPFabricStrategy(total_steps=1000.0).total_steps
    assert (steps, type(steps)) == (1000, int)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *[(lambda value, kind=kind: kind(hierarchical=value), "hierarchical") for kind in BOTH],
        (lambda value: OneBitDDPStrategy(overlap=value), "overlap"),
    ],
)
@pytest.mark.parametrize("value", [1, 0, "True", "yes", None, [True]], ids=repr)
def test_switches_are_not_numbers(make, name, value):
    with pytest.raises(ValueError, match=f"Invalid {name}: {re.escape(repr(value))}. Must be 'auto', True or False"):
        make(value)


@pytest.mark.parametrize(
    "make", [*BOTH, lambda **options: ErrorFeedback(torch.zeros(3), **options)], ids=["trainer", "fabric", "tensor"]
)
@pytest.mark.parametrize(
    ("name", "value"),
    [("block_size", "2048"), ("block_size", None), ("block_size", True), ("bucket_cap_mb", "25"), ("bucket_cap_mb", True)],
)
def test_strings_and_none_for_numbers_are_refused_in_our_words(make, name, value):
    with pytest.raises(ValueError, match=f"Invalid {name}: {value!r}. Must be "):
        make(**{name: value})


@pytest.mark.parametrize("guard", [100, True, DivergenceGuard, "never"], ids=repr)
def test_a_guard_is_no_number(guard):
    with pytest.raises(TypeError, match=re.escape(f"Invalid guard: {guard!r}. Must be a DivergenceGuard, or None")):
        OneBitDDPFabricStrategy(guard=guard)


@pytest.mark.parametrize("make", [PhaseSwitch, lambda value: OneBitDDPFabricStrategy(criterion=value)])
@pytest.mark.parametrize("criterion", [100, 100.0, 0.25, True, "0.04", "auto", FixedStep, [FixedStep(7)]], ids=repr)
def test_a_criterion_is_no_number(make, criterion):
    text = (
        f"Invalid criterion: {criterion!r}. Must be a VarianceStability(...), a FixedStep(n) or another Criterion, or None"
    )
    with pytest.raises(TypeError, match=re.escape(text)) as raised:
        make(criterion)
    assert (f"HINT: PhaseSwitch(FixedStep({criterion}))" in str(raised.value)) == (criterion == 100)


def test_no_criterion_is_the_default_one():
    assert PhaseSwitch(None).criterion == VarianceStability()


@pytest.mark.parametrize("kind", BOTH)
def test_a_timeout_is_no_number(kind):
    kind(timeout=timedelta(seconds=30))
    with pytest.raises(TypeError, match=r"Invalid timeout: 30\. Must be a datetime\.timedelta.*HINT"):
        kind(timeout=30)
