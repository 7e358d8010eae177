"""The study's own arithmetic: what its numbers mean. Its results are those of a run by hand, not of these tests."""

import argparse
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sklearn.datasets  # noqa: F401  # sets environment variables; here, not within a test
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.convergence import __main__ as command
from benchmarks.convergence import report, trial
from benchmarks.convergence.methods import BY_WARMUP, CORE, FURTHER, METHODS, patches
from benchmarks.convergence.training import Setting, train
from benchmarks.convergence.workloads import WORKLOADS
from benchmarks.report import save
from lightning_onebit.refresh_schedule import is_refresh_due


@pytest.fixture(scope="module")
def results():
    """Short trainings on the cheapest workload."""
    names = ("adam", "renewed", "frozen15", "powersgd2", "bf16")
    return {name: train(Setting(workload="table", method=name, seed=0, steps=40), timeout=60) for name in names}


def test_all_ranks_end_with_the_same_parameters(results):
    assert all(result["ranks_equal"] for result in results.values())


def test_bytes_are_those_of_the_whole_run(results):
    assert results["adam"]["bytes"] == results["adam"]["ddp_bytes"]
    assert results["bf16"]["bytes"] == results["adam"]["bytes"] / 2
    frozen = results["frozen15"]
    assert frozen["dense_bytes"] == frozen["ddp_bytes"] * 6 / 40  # 15% of 40 steps
    # The other 34 steps: in a model as small as this one, what the ranks agree on at each step is a fourth of it.
    assert frozen["bytes"] - frozen["dense_bytes"] < frozen["ddp_bytes"] * 34 / 40 / 20
    # 96 x 96 as 2 x (96 + 96), and so on; the dense first 5% is 2 of 40 steps.
    assert results["powersgd2"]["dense_bytes"] == results["powersgd2"]["ddp_bytes"] * 2 / 40
    assert results["powersgd2"]["bytes"] < results["powersgd2"]["ddp_bytes"] / 2


def test_what_refreshes_and_sketches_send_is_told(results):
    renewed = results["renewed"]
    assert renewed["dense_bytes"] == renewed["ddp_bytes"] / 2  # 20 of 40 steps
    assert 0 < renewed["sketch_bytes"] < renewed["bytes"] - renewed["dense_bytes"]
    assert 0 < renewed["refresh_bytes"] < renewed["bytes"] - renewed["dense_bytes"]
    assert results["frozen15"]["refresh_bytes"] == 0


def test_adam_is_its_own_measure(results):
    assert results["adam"]["speed"] == [1.0]
    assert results["adam"]["scatter"] == [[pytest.approx(1.0, abs=1e-3)] * 5]
    assert results["frozen15"]["scatter"][0][2] != pytest.approx(1.0, abs=1e-3)


def test_methods_see_the_same_data(results):
    # The dense steps, of which the first point of the curve is one, are the same.
    assert results["frozen15"]["curve"][0] == results["adam"]["curve"][0]


def test_powersgd_is_another_method(results):
    assert results["powersgd2"]["loss"] != results["adam"]["loss"]


def test_a_training_without_an_end_is_told_and_in_no_mean(tmp_path, monkeypatch):
    gradient = torch.autograd.grad
    steps = []

    def infinite(loss, params):
        steps.append(1)
        return tuple(g * math.inf if len(steps) > 4 * 30 else g for g in gradient(loss, params))

    line = {"seed": 0, "speed": [1.0], "scatter": [[1.0] * 5]}
    adam = train(Setting(workload="table", method="adam", seed=0, steps=40), timeout=60)
    monkeypatch.setattr(torch.autograd, "grad", infinite)
    diverged = train(Setting(workload="table", method="renewed", seed=0, steps=40), timeout=60)
    assert diverged["loss"] is None
    assert 28 <= diverged["diverged_at"] <= 31  # ranks are threads, and compute their gradients in turn
    assert diverged["curve"][-1][0] <= diverged["diverged_at"]
    text = report.write_report([adam, {**line, **diverged}], tmp_path / "r.jsonl")
    assert f"Diverged: table, renewed, seed 0, 4 ranks, 40 steps, at step {diverged['diverged_at']}." in text
    assert "| table | renewed" not in " ".join(text.split())


def test_another_interval_counts_also_after_other_trainings_of_this_process():
    def refreshes():
        return [step for step in range(1, 400) if is_refresh_due(step, "auto")]

    usual = refreshes()
    with patches(METHODS["renewed_4"]):
        assert len(refreshes()) < 0.7 * len(usual)
    assert refreshes() == usual


@pytest.mark.parametrize("name", ["cnn", "table", "vae"])
def test_ranks_and_seeds_have_different_batches(name):
    workload = WORKLOADS[name]
    first, second = (workload.make(seed, 4, 100).parts[0].loss for seed in (0, 1))
    assert len({loss.item() for loss in (first(0, 0), first(0, 1), first(1, 0), second(0, 0))}) == 4
    assert first(3, 2).item() == first(3, 2).item()


def test_learning_rate_warms_up_and_decays():
    workload = WORKLOADS["gpt"]
    factors = [workload.lr_factor(step, 400) for step in range(400)]
    assert max(factors) == factors[50] == 1.0
    assert factors[0] == 1 / 50
    assert factors[-1] == pytest.approx(workload.lr_end, abs=1e-3)
    constant = Setting(workload="gpt", method="adam", seed=0, lr_end=1.0).of_workload()
    assert {constant.lr_factor(step, 400) for step in range(50, 400)} == {1.0}


def test_each_method_is_shown_at_its_own_best_learning_rate(tmp_path):
    setting = {"workload": "cnn", "ranks": 4, "steps": 300, "beta2": None, "seconds": 1.0, "seed": 0}
    numbers = {"bytes": 1, "ddp_bytes": 30, "speed": [1.0], "scatter": [[1.0] * 5], "ranks_equal": True}
    losses = {("adam", 1.0): 1.0, ("adam", 2.0): 2.0, ("renewed", 1.0): 3.0, ("renewed", 2.0): 2.5}
    losses |= {("bf16", 1.0): 5.0, ("bf16", 2.0): 4.5}
    lines = [
        {
            **setting,
            **numbers,
            "method": method,
            "lr_scale": scale,
            "seed": seed,
            "loss": loss + seed,
            "curve": [[300, loss]],
        }
        for (method, scale), loss in losses.items()
        for seed in range(3)
    ]
    another = [{**line, "lr_end": 1.0, "loss": line["seed"]} for line in lines]  # decays otherwise: in no row of this table
    text = report.write_report(lines + another, tmp_path / "r.jsonl").split("own best learning rate")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| cnn")]
    assert rows == [
        ["cnn", "adam", "2.0000 <", "3.0000"],
        ["cnn", "renewed", "4.0000", "3.5000 <"],
        ["cnn", "bf16", "6.0000", "5.5000 <"],
    ]


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    trained = []

    def train_nothing(setting):
        trained.append(setting)
        if len(trained) == 3:
            raise KeyboardInterrupt
        steps = setting.of_workload().steps
        return {"loss": 0.0, "seconds": 0.0, **vars(setting), "steps": steps}

    monkeypatch.setattr(command, "train", train_nothing)
    chosen = dict(set=None, workloads=["vit"], methods=["adam", "bf16"], seeds=[0, 1], ranks=None, steps=None)
    arguments = argparse.Namespace(results=tmp_path / "r.jsonl", beta2=None, lr_scale=None, lr_end=None, **chosen)
    with pytest.raises(KeyboardInterrupt):
        command.run(arguments)
    command.run(arguments)
    keys = [command.key(line) for line in command.read(tmp_path / "r.jsonl")]
    assert len(keys) == len(set(keys)) == 4
    assert len(trained) == 5  # the third twice


def test_differences_are_paired_by_seed_and_in_units_of_adams_spread(tmp_path):
    setting = {"workload": "cnn", "ranks": 4, "steps": 300, "beta2": None, "lr_scale": 1.0, "seconds": 1.0}
    numbers = {"bytes": 1, "ddp_bytes": 30, "speed": [1.0], "scatter": [[1.0] * 5], "ranks_equal": True}
    losses = {"adam": [1.0, 2.0, 3.0], "frozen15": [1.5, 2.5, 3.8]}
    lines = [
        {**setting, **numbers, "method": method, "seed": seed, "loss": loss, "curve": [[300, loss]]}
        for method, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    text = report.write_report(lines[::-1], tmp_path / "r.jsonl")
    assert "2.0000 (1.0000; 3)" in text
    assert "+0.6000 (0.1732; 3) / +0.6" in text
    assert "1/30.0" in text
    assert (tmp_path / "r.txt").read_text() == text
    assert (tmp_path / "r.png").exists()


def test_json_has_null_for_what_is_no_number(tmp_path):
    save(
        tmp_path / "r.json",
        {"loss": math.nan, "seeds": [math.inf, 1.5], "setting": Setting(workload="vit", method="adam", seed=0)},
    )
    text = (tmp_path / "r.json").read_text()
    saved = json.loads(text, parse_constant=pytest.fail)
    assert (saved["loss"], saved["seeds"], saved["setting"]["method"]) == (None, [None, 1.5], "adam")


def test_sets_hold_what_they_say():
    assert len(list(command.core())) == 11 * 5 * 3
    further = list(command.further())
    assert {setting.ranks for setting in further} == {4, 16, 32}
    assert {setting.lr_end for setting in further} == {None, 0.0, 1.0}
    assert {setting.method for setting in further} == {*CORE, *FURTHER}
    rates = {(setting.method, setting.lr_scale, setting.workload, setting.seed) for setting in further}
    with_a_spread = {*CORE, *FURTHER} - {*command.ONE_SEED}
    for method, lr_scale in itertools.product(with_a_spread, (0.5, 2.0)):
        assert {place[2:] for place in rates if place[:2] == (method, lr_scale)} == {
            *itertools.product(command.TWO, (0, 1, 2))
        }
    for setting in further:  # an Adam with the same seed and setting is there, or in the core
        adam = replace(setting, method="adam")
        assert adam in further or adam in command.core(), setting
    assert max(setting.steps or 0 for setting in further) >= 5000
    warmups = list(command.warmups())
    assert len(warmups) == 11 * 2 * 7
    assert {setting.method for setting in warmups} | {*CORE, *FURTHER} == set(METHODS)
    for kind, methods in BY_WARMUP.items():  # in the order of the columns
        assert [METHODS[name].dense_steps for name in methods] == [5, 20, 45, 0.02, 0.05, 0.15, 0.30], kind
        assert {METHODS[name].variance_refresh for name in methods} == {"auto" if kind == "renewed" else None}


# The simulation


def test_blocks_lie_within_tensors():
    layout = trial.Layout([5000, 10], 2048)
    x = torch.zeros(layout.numel)
    x[:5000], x[layout.starts[1] : layout.starts[1] + 10] = 1.0, 2.0
    assert layout.sums(x, layout.block_of, layout.blocks).tolist() == [2048, 2048, 5000 - 4096, 20]
    assert layout.sums(x, layout.tensor_of, 2).tolist() == [5000, 20]


def test_two_bits_are_those_of_lloyd_and_max():
    torch.manual_seed(0)
    layout = trial.Layout([2048], 2048)
    simulation = argparse.Namespace(layout=layout, v=torch.ones(2048), arm=trial.ARMS["server_bits_2"])
    simulation.is_exact = torch.zeros(2048, dtype=torch.bool)
    x = torch.randn(200, 2048)
    lost = [(x - trial.Simulation.signs(simulation, x, bits)).square().mean() for bits in (1, 2)]
    assert float(lost[0]) == pytest.approx(2 - 2 * math.sqrt(2 / math.pi), rel=0.02)  # scale l2, not the mean of |x|
    assert float(lost[1]) == pytest.approx(0.1175, rel=0.02)  # Max 1960, table I


def test_logarithms_are_within_half_a_level():
    layout = trial.Layout([2048], 2048)
    root = torch.logspace(0, math.log10(2**-23), 2047)
    v = torch.cat([root, torch.zeros(1)]).square()
    decoded = trial.Log8(layout)(v[None])[0]
    assert decoded[-1] == 0
    assert float((decoded[:-1].sqrt() / root).log2().abs().max()) <= trial.Log8.STEP / 2 + 1e-5


def test_the_simulated_sketch_is_unbiased():
    simulation = argparse.Namespace(arm=trial.ARMS["renewed20"])
    x = torch.randn(5000)
    torch.manual_seed(0)
    estimates = torch.stack([trial.Simulation.sketched_square(simulation, x) for _ in range(400)]) / x.square().sum()
    assert float(estimates.mean()) == pytest.approx(1.0, abs=0.02)
    assert float(estimates.std()) == pytest.approx(math.sqrt(2 / 256), rel=0.2)


def test_the_simulation_is_adam_without_compression():
    results = [json.loads(json.dumps(trial.simulate(WORKLOADS["table"], arm, 0, steps=30))) for arm in ("adam", "renewed45")]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-5)  # 45 dense steps of 30
    assert results[0]["speed"] == [pytest.approx(1.0, abs=1e-3)]


def test_the_trials_table_pairs_by_seed():
    scatter = [[70, "v_i", 0.8, 0.9, 1.0, 1.1, 1.2, 0.5], [70, "D", 0.6, 0.7, 0.8, 0.9, 1.0, 0.4]]
    line = {"workload": "cnn", "ranks": 4, "steps": 300, "speed": [1.1], "scatter": scatter, "bits": 3.0}
    losses = [("adam", 0, 1.0), ("adam", 1, 2.0), ("renewed20", 1, 2.5), ("renewed20", 0, 1.25)]
    alone = {**line, "workload": "vit", "arm": "renewed20", "seed": 0, "loss": 1.0}  # without an Adam to compare with
    text = trial.summary([alone, *({**line, "arm": arm, "seed": seed, "loss": loss} for arm, seed, loss in losses)])
    assert "vit" not in text
    assert "+0.3750 | +0.5000 +0.2500" in text
    assert "0.70 0.80 0.90" in text  # D, then v_i
    assert "0.90 1.00 1.10" in text
