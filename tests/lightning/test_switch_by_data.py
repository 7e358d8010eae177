"""The default criterion in a Trainer: the step of the switch depends on the gradients that the optimizer gets."""

import lightning.pytorch as pl
import pytest
import torch
from ranks import run_trainers
from trainers import Classifier, fit

from lightning_onebit import OneBitDDPStrategy, Phase, PhaseSwitch

BATCHES, EPOCHS = 50, 100
"""5,000 steps, so that the warm-up may have 20 to 35; it is cut off after one epoch at most."""


def still(module):
    """The model hardly moves, and so its gradients have the same scale all the time."""
    return torch.optim.Adam(module.parameters(), lr=1e-7)


class Scaled(Classifier):
    """The loss grows 4-fold within 50 steps."""

    def training_step(self, batch, batch_idx):
        return 4.0 ** (batch_idx / 50) * super().training_step(batch, batch_idx)


class ByHand(Scaled):
    """With manual optimization; gradients are gone when the batch ends."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()
        self.optimizers().zero_grad()


class EndWhenCompressed(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.strategy.phase is Phase.COMPRESSED or batch_idx >= 40:
            self.step, trainer.should_stop = trainer.strategy.optimizer_steps, True


def switch_step(model, **kwargs):
    """The last step of the warm-up, and why."""
    switch, end = PhaseSwitch(), EndWhenCompressed()
    strategy = OneBitDDPStrategy(variance_refresh="auto")
    fit(strategy, 2, batches=BATCHES, max_epochs=EPOCHS, model=model(still), callbacks=[switch, end], **kwargs)
    return end.step, switch.verdict


@pytest.mark.parametrize(
    ("model", "options", "moves"),
    [
        (Classifier, {}, False),
        (Scaled, {}, True),
        (ByHand, {}, True),
        # What the optimizer gets is of constant norm.
        (Scaled, {"gradient_clip_val": 1e-3}, False),
        # A loss scale that doubles every few steps is no move of the gradients.
        (Classifier, {"precision": "16-mixed"}, False),
    ],
)
def test_a_scale_that_grows_fourfold_within_50_steps_delays_the_switch_and_a_quiet_one_does_not(model, options, moves):
    def fn(rank):
        if options.get("precision") == "16-mixed":
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=4)
            plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
            step, verdict = switch_step(model, plugins=[plugin])
        else:
            step, verdict = switch_step(model, **options)
        assert 20 <= step <= 35
        assert rank or verdict.forced or verdict.freeze
        return step

    first, second = run_trainers(2, fn)
    assert first == second
    assert (first > 20) == moves
