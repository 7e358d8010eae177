"""`make gpu`: what of it Triton's interpreter can run, and that it names what is missing. The rest needs a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.4")  # before, its interpreter lacks an operation

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.timeout(300)


def kit(*arguments, **variables):
    """Its exit code, and its JSON; messages are in the error if that is none."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), **variables}
    command = [sys.executable, str(SCRIPT), "--json", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    return done.returncode, json.loads(done.stdout), done.stderr


def module():
    spec = importlib.util.spec_from_file_location("gpu_kit", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["gpu_kit"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def test_parts_pass_in_the_interpreter():
    """Kernels checked, a step of the engine, and a Trainer's run on two ranks, whose kernels are Triton's."""
    code, outcome, errors = kit("--interpret", "--parts", "check", "step", "trainer")
    parts = outcome["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(("check", "step", "trainer"), "passed"), (
        parts
    )
    assert code == 0, errors
    assert parts["trainer"]["result"]["kernels"] == ["triton"]
    assert set(parts["step"]["result"]["launches"].values()) == {parts["step"]["result"]["buckets"]} == {2}


def test_a_missing_package_is_named_and_the_part_skipped(tmp_path):
    gpu = module()
    outcome = gpu.run(gpu.Part(lambda device: {}, packages=("torch", "no_such_package")), None)
    assert outcome["status"] == "skipped"
    assert "no_such_package" in outcome["why"]


def test_a_part_that_hangs_or_dies_fails_alone(monkeypatch, tmp_path):
    """With everything that it has started."""
    gpu = module()
    script = tmp_path / "part.py"
    monkeypatch.setattr(gpu, "__file__", str(script))
    script.write_text(
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "time.sleep(60)"
    )
    assert gpu.run_apart("check", 5.0, interpret=False) == {"status": "failed", "why": "not done within 5 s"}
    script.write_text("print('{\"status\": \"passed\"}')\nprint('a warning at exit')")
    assert gpu.run_apart("check", 30.0, interpret=False) == {"status": "passed"}
    script.write_text("import os, sys\nprint('the reason', file=sys.stderr, flush=True)\nos.abort()")
    outcome = gpu.run_apart("check", 30.0, interpret=False)
    assert outcome["status"] == "failed"
    assert "the reason" in outcome["traceback"]


def test_the_exit_code_is_not_zero_if_a_part_was_skipped_or_failed(monkeypatch, capsys):
    gpu = module()
    for status, code in (("passed", 0), ("skipped", 1), ("failed", 1)):
        monkeypatch.setattr(gpu, "run_apart", lambda *_, status=status, **__: {"status": status, "why": "a reason"})
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--interpret", "--parts", "check"])
        monkeypatch.setattr(sys, "path", list(sys.path))
        assert gpu.main() == code
    assert "check: failed: a reason" in capsys.readouterr().out


def test_make_gpu_makes_no_environment():
    text = (SCRIPT.parents[1] / "Makefile").read_text(encoding="utf-8")
    (rule,) = (block for block in text.split("\n\n") if "\ngpu:" in block)
    assert "$(VENV)" not in rule
    assert "$(BIN)" not in rule
