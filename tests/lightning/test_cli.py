"""LightningCLI: strategy and callbacks by class path, from YAML and from the command line."""

import sys
from pathlib import Path

import pytest
import yaml
from ranks import run_trainers
from trainers import Classifier, Recorder, data, same_params

from lightning_onebit import CommMonitor, OneBitDDPStrategy, Phase, PhaseSwitch, VarianceStability

pytest.importorskip("jsonargparse")
from lightning.pytorch.cli import LightningCLI

EXAMPLES = Path(__file__).parents[2] / "examples"

CONFIG = """
trainer:
  accelerator: cpu
  devices: 2
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  strategy:
    class_path: lightning_onebit.OneBitDDPStrategy
    init_args:
      block_size: 64
      scale: l1
      overlap: false
      find_unused_parameters: true
  callbacks:
    - class_path: lightning_onebit.PhaseSwitch
      init_args:
        criterion:
          class_path: lightning_onebit.FixedStep
          init_args: {n: 4}
    - class_path: trainers.Recorder
model:
  hidden: 16
"""


class Model(Classifier):
    """What a CLI can make: arguments with types."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__(hidden=hidden)

    def train_dataloader(self):
        return data(10, 2)


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cli.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # they are meant for Lightning


def cli(*args):
    return LightningCLI(Model, args=list(map(str, args)), save_config_callback=None, seed_everything_default=False)


@pytest.mark.parametrize("how", ["yaml", "arguments"])
def test_a_compressed_run_is_configured_by_class_path(tmp_path, how):
    """The CLI passes every argument of DDP, with its default."""
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    arguments = ["--config", file]
    if how == "arguments":  # the strategy and its callback replaced by what is written here
        arguments += ["--trainer.strategy", "onebit_ddp", "--trainer.callbacks=lightning_onebit.PhaseSwitch"]
        arguments += ["--trainer.callbacks.criterion=lightning_onebit.FixedStep", "--trainer.callbacks.criterion.n=4"]
        arguments += ["--trainer.callbacks+=trainers.Recorder"]

    def fn(rank):
        trainer = cli("fit", *arguments).trainer
        strategy, (recorder,) = trainer.strategy, [c for c in trainer.callbacks if isinstance(c, Recorder)]
        assert isinstance(strategy, OneBitDDPStrategy)
        if how == "yaml":
            assert (strategy.config.block_size, strategy.config.scale, strategy.overlap) == (64, "l1", False)
            assert strategy._ddp_kwargs["find_unused_parameters"] is True
            assert "static_graph" in strategy._ddp_kwargs
        assert recorder.phases == [Phase.WARMUP] * 3 + [Phase.COMPRESSED] * 7
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_wrong_values_are_explained_before_anything_starts(capsys):
    for argument, message in [
        ("--trainer.strategy.block_size=100", "Must be a multiple of 8"),
        ("--trainer.strategy.scale=l3", "l3"),
        ("--trainer.strategy.blocksize=64", "blocksize"),
    ]:
        with pytest.raises((SystemExit, ValueError)) as caught:
            cli("fit", "--trainer.strategy=lightning_onebit.OneBitDDPStrategy", argument)
        assert message in capsys.readouterr().err + str(caught.value)


@pytest.fixture
def output(monkeypatch, capsys):
    """What the example prints for arguments that make it print and exit."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("COLUMNS", "500")
    from gpt_stdlib import GPT, StdlibSources

    def printed(*arguments):
        with pytest.raises(SystemExit) as caught:
            LightningCLI(GPT, StdlibSources, args=["fit", *map(str, arguments)], seed_everything_default=False)
        assert caught.value.code == 0
        return capsys.readouterr().out

    return printed


def test_the_example_config_is_complete(output):
    trainer = yaml.safe_load(output("--config", EXAMPLES / "config.yaml", "--print_config"))["trainer"]
    strategy, (switch, monitor) = trainer["strategy"]["init_args"], trainer["callbacks"]
    written = yaml.safe_load((EXAMPLES / "config.yaml").read_text())["trainer"]["strategy"]["init_args"]
    assert strategy.items() >= written.items()
    assert "static_graph" in strategy
    assert OneBitDDPStrategy(**{name: strategy[name] for name in written}).config.block_size == strategy["block_size"]
    assert switch["class_path"] == f"lightning_onebit.{PhaseSwitch.__name__}"
    criterion = switch["init_args"]["criterion"]
    assert criterion["class_path"] == f"lightning_onebit.{VarianceStability.__name__}"
    assert VarianceStability(**criterion["init_args"]).patience == 3
    assert CommMonitor(**monitor["init_args"]).every_n_steps == 10


def test_every_argument_is_typed_and_explained(output):
    explained = output("--trainer.strategy.help", "lightning_onebit.OneBitDDPStrategy")
    explained = explained[explained.index("Help for") :]
    for name in ("block_size", "scale", "space", "overlap", "hierarchical", "bucket_cap_mb", "warmup_precision"):
        text, kind = explained.split(f"--trainer.strategy.{name} ", 1)[1].split("(type: ", 1)
        assert len(" ".join(text.split())) > 40, name
        assert not kind.startswith("Any"), name
    assert "--trainer.strategy.static_graph" in explained
