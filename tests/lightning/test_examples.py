"""The examples from start to end, small. ``demo.py`` has a test of its own; ``minimal.py`` is run by ``make package``.

Most run on forked ranks, which find everything imported; the two launch files start processes as a user does.
"""

import csv
import importlib
import io
import logging
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import sklearn.datasets  # noqa: F401  # here, as it sets environment variables, which no test may leave behind
import torch
from ranks import free_port, run_trainers

from lightning_onebit.checkpoint.state import CHECKPOINT_KEY

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

SRUN = """#!/usr/bin/env bash
# One task per node of this machine, with what SLURM tells each.
set -euo pipefail
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_NODEID=$task SLURM_LOCALID=0 "$@" &
  tasks[task]=$!
done
for task in "${tasks[@]}"; do wait "$task"; done
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run an example as ``__main__`` on two forked ranks; returns what each prints and logs."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name, *arguments):
        importlib.import_module(name)  # once for both ranks

        def fn(rank):
            os.chdir(tmp_path)
            sys.argv = [f"{name}.py", *map(str, arguments)]
            printed = io.StringIO()
            logging.getLogger("lightning.pytorch").addHandler(logging.StreamHandler(printed))
            with redirect_stdout(printed):
                runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
            return printed.getvalue()

        return run_trainers(2, fn)

    return run


@pytest.fixture
def few_sources(monkeypatch):
    """A tenth of the standard library: to read all of it takes longer than to train on it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import gpt_stdlib

    files = gpt_stdlib.stdlib_files()
    monkeypatch.setattr(gpt_stdlib, "stdlib_files", lambda: dict(list(files.items())[::10]))


def test_dcgan_digits(run, tmp_path):
    printed, _ = run("dcgan_digits", "--steps", 40, "--width", 16, "--picture", "out/digits.png")
    assert (tmp_path / "out" / "digits.png").read_bytes().startswith(b"\x89PNG")

    shown = dict(re.findall(r"^ *(\S.*?)  +(\S.*)$", printed[printed.index("steps of each optimizer") :], re.M))
    assert shown["steps of each optimizer"] == "40"
    assert shown["switch to the compressed phase"] == "after step 8"
    # 32 times less, and DDP sends the gradients of both networks for each of the two steps.
    assert 50 < float(shown["times less than ddp"]) < 64
    sent, dense = (float(shown[row].split()[0]) for row in ("sent per rank [2]", "ddp would have sent [3]"))
    assert 0.2 * dense < sent < 0.25 * dense
    assert float(shown["at the end"]) < 0.7 * float(shown["distance of generated from held-out digits [1]: at the start"])
    lines = re.findall(r"^step +(\d+)  (\w+)", printed, re.M)
    assert lines == [(str(step), "dense" if step < 8 else "compressed") for step in range(4, 41, 4)]


def test_vit_digits(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    import vit_digits

    def fn(rank):
        os.chdir(tmp_path)
        sys.argv = ["vit_digits.py", "--epochs", "2"]
        return vit_digits.main()

    first, second = run_trainers(2, fn)
    assert first == second  # of all held-out images, though each rank looked at its half of them
    assert 0.3 < first < 1  # 0.1 by chance


def test_masked_lm(run, few_sources):
    pytest.importorskip("transformers")
    said, _ = run("masked_lm", "--steps", 40, "--batch-size", 4, "--d-model", 32)
    assert "Compressed after optimizer step 20" in said
    assert float(re.search(r"validation loss: (\S+)", said)[1]) < 7.5  # log(3001) = 8.0 to begin with


def test_fabric_gpt(run, few_sources, tmp_path):
    printed, _ = run("fabric_gpt", "--steps", 20, "--batch-size", 1, "--output", "out/gpt.ckpt")
    assert "step 20 (compressed): loss" in printed
    # In so short a run D is renewed every few steps, a byte per parameter each time.
    assert float(re.search(r"a compressed step sends (\S+) times less", printed)[1]) > 3.5
    saved = torch.load(tmp_path / "out" / "gpt.ckpt", weights_only=True)
    assert (saved["step"], saved["optimizer"][CHECKPOINT_KEY]["version"]) == (20, 3)


def test_cli(run, few_sources, tmp_path):
    pytest.importorskip("jsonargparse")
    small = ["--trainer.max_steps=20", "--trainer.val_check_interval=10", "--trainer.log_every_n_steps=5"]
    small += ["--model.d_model=16", "--data.batch_size=2", "--trainer.callbacks.every_n_steps=5"]
    run("cli", "fit", "--config", EXAMPLES / "config.yaml", *small)
    with (tmp_path / "runs/cli/lightning_logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = {name: [int(row["step"]) for row in rows if row[name]] for name in ("train_loss", "onebit/sent_mib", "val_loss")}
    assert steps == {"train_loss": [4, 9, 14, 19], "onebit/sent_mib": [4, 9, 14, 19], "val_loss": [9, 19]}


@pytest.mark.parametrize("compress", ["gradients", "optimizer"])
def test_plain_torch(run, compress):
    ranks = [
        re.search(r"loss (\S+) at first, (\S+) at last; sum of parameters (.*)", printed)
        for printed in run("plain_torch", "--compress", compress, "--steps", 100)
    ]
    assert ranks[0][3] == ranks[1][3]
    for rank in ranks:
        assert float(rank[2]) < 0.5 * float(rank[1])


def environment(folder):
    """With this Python first, and the package of this checkout."""
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
    }


def accuracy(command, variables, cwd):
    """What the vision transformer reaches that ``command`` starts, and on how many ranks."""
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ((reached, ranks),) = re.findall(r"accuracy on 360 held-out digits: (\S+), (\d) ranks", done.stdout)
    return float(reached), int(ranks)


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_launch_files_are_valid_bash(script):
    subprocess.run(["bash", "-n", EXAMPLES / script], check=True)


def test_torchrun(tmp_path):
    variables = {**environment(tmp_path), "PORT": str(free_port()), "DEVICES": "1"}
    reached, ranks = accuracy([str(EXAMPLES / "torchrun.sh"), "--epochs", "2"], variables, tmp_path)
    assert ranks == 1  # more of them, on two nodes: test_launchers.py
    assert reached > 0.3


def test_slurm(tmp_path):
    """SLURM's part is played here: it sets variables by what stands in the file, and `srun` starts the ranks."""
    srun = tmp_path / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", (EXAMPLES / "slurm.sbatch").read_text(), re.M))
    nodes, tasks_per_node = int(options["nodes"]), int(options["ntasks-per-node"])
    assert (nodes, tasks_per_node) == (2, 1)
    variables = {
        **environment(tmp_path),
        "SLURM_JOB_NAME": options["job-name"],
        "SLURM_JOB_ID": str(10_000 + free_port() % 10_000),  # Lightning makes a port of the last four digits
        "SLURM_JOB_NUM_NODES": options["nodes"],
        "SLURM_NNODES": options["nodes"],
        "SLURM_NTASKS": str(nodes * tasks_per_node),
        "SLURM_NTASKS_PER_NODE": options["ntasks-per-node"],
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
        "SLURM_NODELIST": "127.0.0.1",
    }
    reached, ranks = accuracy(["bash", str(EXAMPLES / "slurm.sbatch"), "--epochs", "2"], variables, ROOT)
    assert ranks == 2
    assert reached > 0.3
