"""The demo from start to end, small: two trainings on two processes each, a table, a picture."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401  changes the environment, as no test may
import pytest
from ranks import run_trainers

ROOT = Path(__file__).parents[2]
SMALL = ["--steps=40", "--batch-size=2", "--context=16", "--d-model=16", "--validation-windows=16"]


@pytest.fixture
def demo(monkeypatch):
    """With a sixteenth of the text, and with forked ranks where it starts itself anew: scripts that Lightning launches are
    for test_launchers.py and test_examples.py."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    gpt_stdlib, demo = map(importlib.import_module, ("gpt_stdlib", "demo"))
    files = list(gpt_stdlib.stdlib_files().items())[::16]
    monkeypatch.setattr(gpt_stdlib, "stdlib_files", lambda: dict(files))

    def run_forked(command, env):
        assert command[:2] == [sys.executable, demo.__file__]
        assert env["OMP_NUM_THREADS"] == "1"
        settings = demo.parse_arguments(command[2:])
        run_trainers(demo.RANKS, lambda rank: demo.fit(settings.strategy, settings))
        return subprocess.CompletedProcess(command, returncode=0)

    monkeypatch.setattr(demo.subprocess, "run", run_forked)
    yield demo
    for name in ("demo", "gpt_stdlib"):
        sys.modules.pop(name, None)


def test_demo(demo, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # Lightning may have set it
    monkeypatch.setattr(sys, "argv", ["demo.py", *SMALL, "--output", str(tmp_path / "out")])
    demo.main()
    said = capfd.readouterr()

    dense, onebit = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("ddp", "onebit_ddp"))
    warmup = onebit["compressed"].count(False)
    assert dense["compressed"] == [False] * 40
    assert onebit["compressed"] == [False] * warmup + [True] * (40 - warmup)
    assert 0 < warmup < 40
    # The same parameters and batches: the two runs are one until the switch, and not the same afterwards.
    assert onebit["train_losses"][:warmup] == dense["train_losses"][:warmup]
    assert onebit["train_losses"][warmup + 1 :] != dense["train_losses"][warmup + 1 :]
    assert [step for step, _ in dense["validations"]] == [step for step, _ in onebit["validations"]] == list(range(4, 41, 4))
    assert all(record["validations"][-1][1] < record["validations"][0][1] for record in (dense, onebit))
    # Counted by the strategy in warm-up, computed for ddp: the numbers must agree. The switch itself sends next to nothing.
    sent_in_warmup = onebit["bytes_sent"][warmup - 1]
    assert dense["bytes_sent"][warmup - 1] <= sent_in_warmup < 1.01 * dense["bytes_sent"][warmup - 1]
    # In a model as small as this, and so early in a run, refreshes and sketches are most of it.
    assert onebit["bytes_sent"][-1] - sent_in_warmup < (40 - warmup) * dense["dense_bytes_per_step"] / 3

    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    table = said.out[said.out.index("training loss, mean") :]
    assert f"{onebit['validations'][-1][1]:.3f}" in table
    assert f"after step {warmup}" in table
    assert "less_sent=" in said.out + said.err  # the progress bar


def test_steps_that_do_not_divide_are_refused(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--steps", "41", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as refused:
        demo.main()
    assert refused.value.code == 2
    assert "--steps 41" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
