"""The examples from start to end, small. That of ``make demo`` has a test of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from lightning_onebit.checkpoint.state import CHECKPOINT_KEY

ROOT = Path(__file__).parents[2]


def run(script, *arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=110, check=False)


def test_minimal(tmp_path):
    done = run("minimal.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert re.search(r"in all +256 ", said)
    assert 7 < float(re.search(r"In all (\S+) times fewer bytes", said)[1]) < 9
    assert said.count("Speed-up: ") == 1


def test_dcgan_digits(tmp_path):
    done = run("dcgan_digits.py", "--steps", "40", "--width", "16", "--picture", "out/digits.png", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "digits.png").read_bytes().startswith(b"\x89PNG")

    shown = dict(re.findall(r"^ *(\S.*?)  +(\S.*)$", done.stdout[done.stdout.index("steps of each optimizer") :], re.M))
    assert shown["steps of each optimizer"] == "40"
    assert shown["switch to the compressed phase"] == "after step 8"
    # 32 times less, and DDP sends the gradients of both networks for each of the two steps.
    assert 50 < float(shown["times less than ddp"]) < 64
    sent, dense = (float(shown[row].split()[0]) for row in ("sent per rank [2]", "ddp would have sent [3]"))
    assert 0.2 * dense < sent < 0.25 * dense
    assert float(shown["at the end"]) < 0.7 * float(shown["distance of generated from held-out digits [1]: at the start"])
    lines = re.findall(r"^step +(\d+)  (\w+)", done.stdout, re.M)
    assert lines == [(str(step), "dense" if step < 8 else "compressed") for step in range(4, 41, 4)]


def test_fabric_gpt(tmp_path):
    done = run("fabric_gpt.py", "--steps", "20", "--batch-size", "1", "--output", "out/gpt.ckpt", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 20 (compressed): loss" in done.stdout
    # In so short a run D is renewed every few steps, a byte per parameter each time.
    assert float(re.search(r"a compressed step sends (\S+) times less", done.stdout)[1]) > 3.5
    saved = torch.load(tmp_path / "out" / "gpt.ckpt", weights_only=True)
    assert (saved["step"], saved["optimizer"][CHECKPOINT_KEY]["version"]) == (20, 3)
