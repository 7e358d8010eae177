"""The default criterion in a Trainer: the step of the switch depends on the gradients that the optimizer gets."""

import itertools

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import EarlyStopping
from ranks import run_trainers
from test_strategy import Messages
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from trainers import CLASSES, Classifier, data, fit, make_trainer

from lightning_onebit import OneBitDDPFabricStrategy, OneBitDDPStrategy, Phase, PhaseSwitch, VarianceStability

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


class Attention(Classifier):
    """Two attentions: torch's, whose biases are one tensor, and one with a tensor for the bias of its keys."""

    WIDTH, HEADS = 16, 4

    def __init__(self):
        super().__init__(torch_adam)
        width = self.WIDTH
        self.body = nn.Linear(3, width)
        self.places = nn.Parameter(torch.randn(4, width) / 10)
        self.attention = nn.MultiheadAttention(width, self.HEADS, batch_first=True)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, CLASSES)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = self.body(x.unflatten(1, (4, 3))) + self.places
        x = x + self.attention(x, x, x, need_weights=False)[0]
        query, key, value = (f(x).unflatten(2, (self.HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return functional.cross_entropy(self.head(x.mean(1)), y)


def torch_adam(module):
    return torch.optim.Adam(module.parameters(), lr=1e-2)


class Seeing(PhaseSwitch):
    """Notes what the criterion is told."""

    def _judge(self, now, **kwargs):
        self.seen = [*getattr(self, "seen", []), now]
        return super()._judge(now, **kwargs)


@pytest.mark.parametrize(("precision", "refresh"), [("32-true", None), ("64-true", "auto"), ("bf16-mixed", None)])
def test_a_key_bias_whose_gradient_is_rounding_is_never_looked_at_and_so_never_blamed(precision, refresh):
    """Softmax does not see what all keys have in common: the gradient of their bias is zero but for rounding."""

    def fn(rank):
        model, switch = Attention(), Seeing(VarianceStability(window=4, min_steps=0, max_steps=24))
        strategy = OneBitDDPStrategy(variance_refresh=refresh)
        fit(strategy, 2, batches=25, model=model, callbacks=[switch], precision=precision)
        if rank:
            return
        width = Attention.WIDTH
        looked_at = switch.seen[2:]
        assert len(looked_at) >= 1
        for observation in looked_at:
            assert "key.bias" not in observation.ratios
            # A third of this tensor; bfloat16 has zeros of its own.
            assert observation.ratios["attention.in_proj_bias"].numel <= 2 * width
            assert {"query.bias", "key.weight", "value.bias", "head.bias"} < set(observation.ratios)
        assert "key.bias" not in switch.verdict.reason

    run_trainers(2, fn)


@pytest.mark.parametrize(
    ("precision", "coarse"), [("32-true", False), ("64-true", False), ("bf16-mixed", True), ("bf16-true", True)]
)
def test_precision_of_16_bits_is_coarse_for_both_strategies(precision, coarse):
    assert make_trainer(OneBitDDPStrategy(), 1, precision=precision).strategy.rounds_coarsely == coarse
    fabric = Fabric(accelerator="cpu", devices=1, strategy=OneBitDDPFabricStrategy(), precision=precision)
    assert fabric.strategy.rounds_coarsely == coarse


class Endless(IterableDataset):
    """Batches without end: the length of the run is not known."""

    def __iter__(self):
        yield from itertools.cycle(data(4, 2).dataset)


def test_where_shares_of_the_run_are_used_it_is_said_if_it_may_end_before_or_has_no_known_length():
    shares = "max_steps='auto' (30% of the run)"

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 3

    def messages_of(refresh, loader, *callbacks):
        strategy = OneBitDDPStrategy(variance_refresh=refresh, warmup_precision="bf16")
        model = Classifier()
        model.logs_loss = True  # what EarlyStopping looks at
        with Messages() as messages:
            make_trainer(strategy, 2, callbacks=[Stop(), *callbacks]).fit(model, loader)
        return messages

    def fn(rank):
        early, endless = EarlyStopping("train_loss"), DataLoader(Endless(), batch_size=8)
        said = [
            (messages_of(None, data(70, 2), early), (1, 0)),
            (messages_of("auto", data(70, 2), early), (0, 0)),
            (messages_of(None, endless), (0, 1)),
            (messages_of("auto", endless), (0, 0)),
        ]
        for messages, expected in said:
            may_end = messages.count(
                f"{shares}: shares are taken of all 70 optimizer steps of the run. Should EarlyStopping"
            )
            unknown = messages.count(f"The length of the run is not known, so {shares}, a fraction of it, has no effect")
            assert (may_end, unknown) == ((0, 0) if rank else expected)
        if rank == 0:
            first_lines = [
                "The first 40 optimizer steps of 70 are DDP with gradients rounded to bfloat16; from",
                "The first 20 optimizer steps of 70 are DDP",
                "At least the first 200 optimizer steps are DDP",
                "The first 20 to 35 optimizer steps are DDP",
            ]
            for (messages, _), line in zip(said, first_lines, strict=True):
                assert messages.count(f"PhaseSwitch: {line}") == 1

    run_trainers(2, fn)
