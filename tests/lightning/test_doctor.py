"""``python -m lightning_onebit doctor``: probes on two ranks, alone, on paper, and what it refuses."""

import contextlib
import io
import json
import sys

import pytest
import torch
from ranks import run_ranks
from torch import nn

from lightning_onebit.doctor import command
from lightning_onebit.doctor.launch import Place, device_of, find_place
from lightning_onebit.doctor.workload import load_module

SETTING = "nodes=16,gpus=4,bandwidth=10gbit,latency=50us,params=340M,backward=0.3"
MODULE = f"{__name__}:Small"


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
        self.example_input_array = torch.randn(4, 64)

    def forward(self, x):
        return {"logits": self.layers(x)}


class Bare(Small):
    def __init__(self):
        super().__init__()
        self.example_input_array = None


class Broken(Small):
    def __init__(self):
        raise OSError("no data")


def say(*arguments):
    """Exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command.main(list(arguments))
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Each number from few, small calls; forked ranks inherit it."""
    monkeypatch.setattr("lightning_onebit.doctor.clock.TIMED", 3)
    monkeypatch.setattr("lightning_onebit.doctor.speeds.LARGEST_NUMEL", {"cpu": 2**16})
    monkeypatch.setattr("lightning_onebit.doctor.probe.LONGEST_CALL_SECONDS", 0.02)
    monkeypatch.setattr("lightning_onebit.doctor.probe.ALL_REDUCE_BYTES", [256.0, 65536.0])


def test_two_ranks_probe_and_predict():
    results = run_ranks(2, lambda rank: say(MODULE, "--cores", "1", "--json", "--timeout", "30"), group=False, num_nodes=2)
    assert [code for code, *_ in results] == [0, 0], results
    assert results[1][1] == ""  # rank 0 speaks
    found = json.loads(results[0][1])
    assert (found["nodes"], found["devices_per_node"], found["processor_factor"]) == (2, 1, 2)
    assert found["parameters"] == 64 * 128 + 128 + 128 * 8 + 8
    assert {each["name"] for each in found["predictions"]} == {"ddp", "16bit", "powersgd", "onebit"}
    network = found["measured"]["network"]
    assert network["bits_per_second"] > 0
    assert network["pairs"][0]["same_node"] is False
    assert all(seconds > 0 for points in network["seconds_by_bytes"].values() for _, seconds in points)


def test_devices_of_a_node_are_probed_apart():
    arguments = ("--params", "100k", "--backward", "10ms", "--timeout", "30")
    results = run_ranks(4, lambda rank: say(*arguments), group=False, num_nodes=2)
    assert [code for code, *_ in results] == [0] * 4, results
    for words in ("in one node", "between nodes", "onebit_ddp, hierarchical", "2 nodes of 2 devices"):
        assert words in results[0][1]


def test_what_fails_on_one_rank_ends_all():
    def fn(rank):
        return say(MODULE if rank == 0 else MODULE.replace("Small", "Broken"), "--timeout", "30")

    (code0, _, error0), (code1, _, error1) = run_ranks(2, fn, group=False, num_nodes=2)
    assert (code0, code1) == (1, 1)
    assert "rank 1: ValueError: Cannot make the module" in error0
    assert "OSError: no data" in error1


def test_alone_it_tells_what_it_cannot_know():
    code, out, _ = say("--json")
    assert code == 0
    found = json.loads(out)
    assert found["measured"]["network"] is None
    assert "nothing is known of the network" in found["hint"]
    assert all(value > 0 for value in found["measured"]["speeds_seconds_per_element"].values())
    code, out, _ = say(MODULE)
    assert code == 0
    assert "Stay with one device" in out


def test_simulate_in_text_and_json_and_as_a_picture(tmp_path):
    code, out, _ = say("--simulate", SETTING)
    assert code == 0
    assert "Use strategy='onebit_ddp'" in out.splitlines()[-1]
    code, out, _ = say("--simulate", SETTING, "--json", "--plot", str(tmp_path / "a.png"))
    assert code == 0
    assert json.loads(out)["recommended"] == "onebit"
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_published_and_grid():
    assert say("--published")[1].count("x  ") >= 4
    assert "1 box, 8 GPUs, no NVLink" in say("--simulate", "grid")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--params", "340X", "--backward", "1"], "invalid value: '340X'. Must be a number > 0, such as 340M"),
        (["--params", "340M"], "--params needs --backward"),
        (["--backward", "1"], "--backward needs --params or a module"),
        (["--steps", "0"], "Invalid --steps: 0. Must be >= 1"),
        (["--cores", "-1"], "Invalid --cores: -1.0"),
        (["nothing.here:Model"], "Cannot make the module 'nothing.here:Model': ModuleNotFoundError"),
        (["model.py"], "Invalid module path: 'model.py'. Must be package.module:Class or file.py:Class"),
        ([MODULE.replace("Small", "Bare")], "Bare has no example_input_array"),
        ([MODULE, "--params", "3M"], "HINT: leave out --params"),
        (["--simulate", "nodes=2"], "Missing in --simulate: bandwidth"),
        (["--simulate", SETTING, "--steps", "500"], "--steps has no effect with --simulate"),
        (["--published", "--cores", "2"], "--cores has no effect with"),
        ([MODULE, "--simulate", SETTING], "A module has no effect with --simulate"),
    ],
)
def test_bad_input_is_named(arguments, message):
    code, _, error = say(*arguments)
    assert code != 0
    assert message in error


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "--plot needs matplotlib" in say("--simulate", SETTING, "--plot", "a.png")[2]


def test_a_module_in_a_file(tmp_path):
    file = tmp_path / "of_a_user.py"
    file.write_text("from torch import nn\ndef model():\n    return nn.Linear(2, 3)\n")
    path = list(sys.path)
    assert sum(p.numel() for p in load_module(f"{file}:model").parameters()) == 9
    sys.path[:] = path


@pytest.mark.parametrize(
    ("variables", "nodes", "place"),
    [
        ({}, None, ("alone", 0, 1, "0")),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "GROUP_RANK": "1"}, None, ("torchrun", 3, 4, "1")),
        ({"NODE_RANK": "1"}, 2, ("NODE_RANK", 1, 2, "1")),
    ],
)
def test_the_place_of_this_process(variables, nodes, place):
    variables = {**variables, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"} if variables else {}
    found = find_place(variables, nodes)
    assert (found.launcher, found.rank, found.world_size, found.node) == place


def test_ranks_without_a_gpu_where_others_have_one_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert device_of(Place(launcher="torchrun", rank=3, world_size=4, local_rank=1)) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"Rank 6 is number 2 of its node, counted from 0, which has 2 GPUs.*per-node 2"):
        device_of(Place(launcher="torchrun", rank=6, world_size=8, local_rank=2))


def test_variables_that_make_no_sense_are_named():
    for variables, message in (
        ({"RANK": "4", "WORLD_SIZE": "4"}, "Invalid rank: 4 of 4"),
        ({"RANK": "a", "WORLD_SIZE": "4"}, "Invalid RANK in the environment: 'a'"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "Not set: MASTER_ADDR"),
        ({"NODE_RANK": "0", "MASTER_ADDR": "x"}, "pass --nodes N"),
    ):
        with pytest.raises(ValueError, match=message):
            find_place(variables)
