"""The examples from start to end, small. That of ``make demo`` has a test of its own."""

import re

import torch
from scripts import ROOT, Script

from lightning_onebit.checkpoint.state import CHECKPOINT_KEY


def run(script, *arguments, cwd):
    code, text = Script(ROOT / "examples" / script, *arguments, cwd=cwd).wait()
    assert code == 0, text
    return text


def test_dcgan_digits(tmp_path):
    text = run("dcgan_digits.py", "--steps", "40", "--width", "16", "--picture", "out/digits.png", cwd=tmp_path)
    assert (tmp_path / "out" / "digits.png").read_bytes().startswith(b"\x89PNG")

    shown = dict(re.findall(r"^ *(\S.*?)  +(\S.*)$", text[text.index("steps of each optimizer") :], re.M))
    assert shown["steps of each optimizer"] == "40"
    assert shown["switch to the compressed phase"] == "after step 8"
    # 32 times less, and DDP sends the gradients of both networks for each of the two steps.
    assert 50 < float(shown["times less than ddp"]) < 64
    sent, dense = (float(shown[row].split()[0]) for row in ("sent per rank [2]", "ddp would have sent [3]"))
    assert 0.2 * dense < sent < 0.25 * dense
    assert float(shown["at the end"]) < 0.7 * float(shown["distance of generated from held-out digits [1]: at the start"])
    lines = re.findall(r"^step +(\d+)  (\w+)", text, re.M)
    assert lines == [(str(step), "dense" if step < 8 else "compressed") for step in range(4, 41, 4)]


def test_fabric_gpt(tmp_path):
    text = run("fabric_gpt.py", "--steps", "20", "--batch-size", "1", "--output", "out/gpt.ckpt", cwd=tmp_path)
    assert "step 20 (compressed): loss" in text
    assert float(re.search(r"a compressed step sends (\S+) times less", text)[1]) > 10
    saved = torch.load(tmp_path / "out" / "gpt.ckpt", weights_only=True)
    assert (saved["step"], saved["optimizer"][CHECKPOINT_KEY]["version"]) == (20, 2)
