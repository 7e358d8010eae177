"""A gradient passes few functions on its way to its parameter, and a switch of the phase few files: counted."""

import pytest
from call_paths import Entered, files
from ranks import run_trainers
from trainers import Classifier, fit

from lightning_onebit import FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch
from lightning_onebit.lightning import phase_controller
from lightning_onebit.lightning.phase_controller import PhaseController

MOST_FUNCTIONS_OF_A_GRADIENT = 8
MOST_FILES_OF_A_GRADIENT = 3
MOST_FILES_OF_A_SWITCH = 3


@pytest.mark.parametrize("overlap", [False, True])
def test_a_gradient_passes_few_functions_of_the_upper_layer(monkeypatch, overlap):
    """From DDP's hook and the Trainer's call of `optimizer_step` to the engine."""

    def fn(rank):
        entered = Entered()
        hook, step = phase_controller.phase_hook, OneBitDDPStrategy.optimizer_step

        def recorded_hook(state, bucket):
            if not state.local:
                return hook(state, bucket)
            with entered.recording():
                return hook(state, bucket)

        recorded_hook.__annotations__ = hook.__annotations__

        def recorded_step(self, *args, **kwargs):
            if self.phase is Phase.WARMUP or self._phases.is_pending:
                return step(self, *args, **kwargs)
            with entered.recording():
                return step(self, *args, **kwargs)

        monkeypatch.setattr(phase_controller, "phase_hook", recorded_hook)
        monkeypatch.setattr(OneBitDDPStrategy, "optimizer_step", recorded_step)
        fit(OneBitDDPStrategy(overlap=overlap), 2, batches=7, model=Classifier(), callbacks=[PhaseSwitch(FixedStep(4))])
        return entered.within("lightning", "checkpoint")

    for functions in run_trainers(2, fn):
        names = {name for _, name, _ in functions}
        assert names >= {"phase_hook", "optimizer_step", "compressed_step"}
        assert len(functions) <= MOST_FUNCTIONS_OF_A_GRADIENT, sorted(functions)
        assert len(files(functions)) <= MOST_FILES_OF_A_GRADIENT, sorted(files(functions))


def test_a_switch_of_the_phase_touches_few_files_of_the_upper_layer(monkeypatch):
    """From `freeze_variance` to the optimizers' state being frozen. (`consistency.step` belongs to the engine's step.)"""

    def fn(rank):
        entered = Entered()

        def recorded(function):
            def call(self):
                with entered.recording():
                    return function(self)

            return call

        monkeypatch.setattr(OneBitDDPStrategy, "freeze_variance", recorded(OneBitDDPStrategy.freeze_variance))
        monkeypatch.setattr(PhaseController, "begin_compressing", recorded(PhaseController.begin_compressing))
        trainer, _ = fit(OneBitDDPStrategy(), 2, batches=6, model=Classifier(), callbacks=[PhaseSwitch(FixedStep(4))])
        assert trainer.strategy.phase is Phase.COMPRESSED
        return {f for f in entered.within("lightning", "checkpoint", "consistency") if f[0] != "consistency/step.py"}

    for functions in run_trainers(2, fn):
        assert {"freeze_variance", "begin_compressing"} <= {name for _, name, _ in functions}
        assert len(files(functions)) <= MOST_FILES_OF_A_SWITCH, sorted(files(functions))
