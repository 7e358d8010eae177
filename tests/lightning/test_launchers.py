"""Every way in which Lightning starts processes: a script, spawn, fork, torchrun over two nodes."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port, run_trainers

from lightning_onebit import OneBitDDPStrategy, PhaseSwitch

SCRIPT = Path(__file__).parents[1] / "support" / "launch_script.py"
ROOT = Path(__file__).resolve().parents[2]


def environment():
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def wait_for(processes):
    outputs = [process.communicate(timeout=110)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)


def start(*command):
    return subprocess.Popen(
        list(map(str, command)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def check(folder, world_size, num_nodes=1):
    reports = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]
    for report in reports:
        assert (report["world_size"], report["num_nodes"]) == (world_size, num_nodes)
        assert report["phase"] == "COMPRESSED"
        assert report["steps"] == [4, 6]
        assert report["ratio"] > 20
        assert report["params"] == reports[0]["params"]


@pytest.mark.parametrize("strategy", ["onebit_ddp", "onebit_ddp_spawn"])
def test_lightning_starts_the_processes(strategy, tmp_path):
    """`onebit_ddp_fork` is below, by `python -c`."""
    wait_for([start(sys.executable, SCRIPT, strategy, 2, 1, tmp_path)])
    check(tmp_path, world_size=2)


def test_torchrun_with_two_nodes(tmp_path):
    port = free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--nnodes", 2]
    nodes = [
        start(
            *torchrun,
            *("--node-rank", node, "--master-addr", "127.0.0.1", "--master-port", port),
            *(SCRIPT, "onebit_ddp", 2, 2, tmp_path),
        )
        for node in range(2)
    ]
    wait_for(nodes)
    check(tmp_path, world_size=4, num_nodes=2)


CELLS = """
from trainers import *
from lightning_onebit import *
model = Classifier(hidden=128)
before = [p.detach().clone() for p in model.parameters()]
callbacks = [PhaseSwitch(FixedStep(4)), CommMonitor(1)]
trainer = make_trainer("STRATEGY", 2, callbacks=callbacks)
trainer.fit(model, data(10, 2))
moved = [bool((p != old).any()) for p, old in zip(model.parameters(), before)]
print("FITTED", all(moved))
_ = make_trainer("onebit_ddp_fork", 2).validate(model, data(4, 2))
Classifier.training_step = lambda *_: 1 / 0
try: make_trainer("STRATEGY", 2).fit(Classifier(), data(10, 2))
except Exception as error: print("FAILED", type(error).__name__, "division by zero" in str(error))

"""


def test_notebooks_and_python_c(tmp_path):
    """Both fork: an interactive interpreter is what a notebook is to Lightning. There, `onebit_ddp` says what to use."""
    command = [sys.executable, "-c", CELLS.replace("STRATEGY", "onebit_ddp_fork")]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": SCRIPT.parent}
    at_once = subprocess.Popen(command, env=environment(), **options)
    cells = CELLS.replace("STRATEGY", "onebit_ddp_notebook") + 'make_trainer("onebit_ddp", 2)\n'
    interactive = subprocess.run([sys.executable, "-i"], input=cells, env=environment(), timeout=110, **options).stdout
    at_once = at_once.communicate(timeout=110)[0]
    for output in (interactive, at_once):
        assert "FITTED True" in output, output
        # A byte for D's renewal beside the bit, as that is due at each step of so short a run, and four dense steps of ten
        assert 1.4 < float(re.search(r"In all (\S+) times fewer bytes", output)[1]) < 2
        assert "val_loss" in output
        assert "FAILED ProcessRaisedException True" in output  # what a rank raised, not what came of it
    assert "`Trainer(strategy='onebit_ddp')` is not compatible with an interactive environment" in interactive


@pytest.mark.skipif(importlib.util.find_spec("pytorch_lightning") is None, reason="pytorch_lightning is not installed")
def test_pytorch_lightning_says_that_it_is_the_wrong_package():
    """Whatever is passed to it: a name, a strategy, a callback. In a process of its own: importing it silences Lightning."""

    def fn(rank):
        import pytorch_lightning
        from pytorch_lightning.demos.boring_classes import BoringModel

        from lightning_onebit.lightning.pytorch_lightning import register_refusals

        options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "fast_dev_run": 1}
        with pytest.raises(ValueError, match=r"must be either a string or an instance of `pytorch_lightning.strategies"):
            pytorch_lightning.Trainer(strategy=OneBitDDPStrategy(), **options)
        with pytest.raises(TypeError, match=r"HINT: write `import lightning.pytorch as pl`"):
            pytorch_lightning.Trainer(callbacks=[PhaseSwitch()], **options).fit(BoringModel())
        register_refusals(["onebit_ddp"])  # as importing ours does if that was imported first
        with pytest.raises(TypeError, match="works with the package `lightning`, not with `pytorch_lightning`"):
            pytorch_lightning.Trainer(strategy="onebit_ddp", **options)

    run_trainers(1, fn)
