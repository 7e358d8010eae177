"""Gradient clipping once gradients are local: by norm it means the same as under DDP, with one coefficient for all ranks."""

import lightning.pytorch as pl
import pytest
import torch
from ranks import run_ranks, run_trainers
from test_engine import WARMUP_STEPS, freeze, gradient, make_optimizer, params_of, warm_up
from test_precision import InfiniteOnRank1, ScaledFloat32, adam, mixed16
from trainers import Classifier, fit, make_trainer, same_params
from trainers import data as make_data

from lightning_onebit import FixedStep, Phase, PhaseSwitch
from lightning_onebit.engine import optimizer as engine
from lightning_onebit.engine.clipping import SKETCH_NUMEL

WARMUP_BATCHES, BATCHES = 5, 13


LARGE = 300
"""Units of a hidden layer with which a model has six times more elements than a sketch has buckets."""


class Watch(pl.Callback):
    """Keeps the gradients of a layer before and after clipping, at each step."""

    def __init__(self):
        self.before, self.after = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before.append(pl_module.head.weight.grad.clone())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.after.append(pl_module.head.weight.grad.clone())

    def factors(self):
        return [(after.norm() / before.norm()).item() for before, after in zip(self.before, self.after, strict=True)]


class ByHook(Classifier):
    """Clips in ``configure_gradient_clipping``, as users do who want something special."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        self.clip_gradients(optimizer, gradient_clip_val=self.clip[0], gradient_clip_algorithm=self.clip[1])


class ByHand(Classifier):
    """Clips in manual optimization."""

    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip_gradients(optimizer, gradient_clip_val=self.clip[0], gradient_clip_algorithm=self.clip[1])
        optimizer.step()


def train(model, *, watch=None, strategy="onebit_ddp", **options):
    callbacks = [watch] if watch else []
    if strategy == "onebit_ddp":
        callbacks.append(PhaseSwitch(FixedStep(WARMUP_BATCHES)))
    _, recorder = fit(strategy, 2, batches=BATCHES, model=model, callbacks=callbacks, **options)
    if strategy == "onebit_ddp":
        assert recorder.phases[-1] is Phase.COMPRESSED
    return recorder.params


# Norm


def test_by_norm_the_coefficient_is_within_3_percent_of_ddps():
    """With the learning rate 0 both see the same gradients."""

    class Skewed(Classifier):
        """Gradients of rank 1 are three times as large, so a coefficient from local norms would be far off."""

        def training_step(self, batch, batch_idx):
            return (1 + 2 * self.global_rank) * super().training_step(batch, batch_idx)

    def fn(rank):
        def factors(strategy):
            watch = Watch()
            model = Skewed(lambda m: torch.optim.Adam(m.parameters(), lr=0.0), hidden=LARGE)
            assert sum(p.numel() for p in model.parameters()) > 5 * SKETCH_NUMEL
            train(model, watch=watch, strategy=strategy, gradient_clip_val=0.05)
            return watch.factors()

        return factors("ddp"), factors("onebit_ddp")

    (dense, ours), (_, other) = run_trainers(2, fn)
    assert max(dense) < 0.5
    assert ours[:WARMUP_BATCHES] == pytest.approx(dense[:WARMUP_BATCHES], rel=1e-6)
    assert ours[WARMUP_BATCHES:] == pytest.approx(dense[WARMUP_BATCHES:], rel=0.03)
    assert ours == pytest.approx(other, rel=1e-6)
    # Not exactly DDP's, else the sketch would have been exact.
    assert ours[WARMUP_BATCHES:] != pytest.approx(dense[WARMUP_BATCHES:], rel=0.001)


@pytest.mark.parametrize("kind", ["small", "large"])
def test_all_ranks_get_the_same_norm_bitwise_and_it_is_that_of_the_mean(kind):
    """Whatever they have: another gradient, or none."""
    shapes = [(5,), (37, 11)] if kind == "small" else [(7,), (400, 300)]

    def fn(rank):
        params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        optimizer = torch.optim.Adam(params)
        warm_up(optimizer, 2, 2)
        compressed = freeze(optimizer)
        trace = []
        for step in range(2, 8):
            grads = [[gradient(r, step, i, p.shape, p.dtype) for i, p in enumerate(params)] for r in range(2)]
            grads[1][0] = None
            mean = [grads[0][0], grads[0][1] + grads[1][1]]
            exact = torch.cat([g.ravel() for g in mean]).norm() / 2
            for p, grad in zip(params, grads[rank], strict=True):
                p.grad = None if grad is None else grad.clone()
            norm = compressed.clip_grad_norm_(1.0)
            assert norm == pytest.approx(exact.item(), rel=1e-5 if kind == "small" else 0.03)
            coefficient = torch.clamp(1.0 / (norm + 1e-6), max=1.0)
            assert torch.equal(params[1].grad, grads[rank][1] * coefficient)
            compressed.step()
            trace.append(norm)
        return torch.stack(trace)

    first, second = run_ranks(2, fn)
    assert torch.equal(first, second)


def test_gradients_within_bounds_are_not_touched():
    def fn(rank):
        assert same_params(train(Classifier(), gradient_clip_val=1e6), train(Classifier()))

    run_trainers(2, fn)


def test_a_precision_plugin_may_be_used_again():
    """Our clipping stands in for the plugin's own."""

    def fn(rank):
        plugin = pl.plugins.Precision()
        runs = [train(Classifier(), strategy=s, plugins=[plugin], gradient_clip_val=0.05) for s in ("onebit_ddp",) * 2]
        assert same_params(*runs)
        reused, fresh = (train(Classifier(), strategy="ddp", plugins=p, gradient_clip_val=0.05) for p in ([plugin], []))
        assert same_params(reused, fresh)

    run_trainers(2, fn)


def test_one_process_uses_the_exact_norm():
    optimizer = make_optimizer(torch.optim.Adam, torch.float32)
    warm_up(optimizer, WARMUP_STEPS, 1)
    compressed = freeze(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params_of(optimizer)])
    assert torch.equal(compressed.clip_grad_norm_(0.1), norm)


def test_signs_change_from_step_to_step_and_a_resumed_run_draws_the_same(tmp_path):
    def fn(rank):
        seeds = []

        class Noting(engine.NormSketch):
            def __init__(self, seed, **kwargs):
                seeds.append(seed)
                super().__init__(seed, **kwargs)

        engine.NormSketch = Noting

        def run(max_epochs, ckpt_path=None):
            options = {"max_epochs": max_epochs, "gradient_clip_val": 0.05, "callbacks": [PhaseSwitch(FixedStep(4))]}
            trainer = make_trainer("onebit_ddp", 2, **options)
            trainer.fit(Classifier(), make_data(6, 2), ckpt_path=ckpt_path)
            return trainer

        run(1).save_checkpoint(tmp_path / "last.ckpt")
        run(2, tmp_path / "last.ckpt")
        assert seeds == [4, 5, *range(6, 12)]

    run_trainers(2, fn)


# Value, and by whose hand


@pytest.mark.parametrize("clip", [(0.05, "norm"), (0.01, "value")])
def test_clipping_by_hook_and_by_hand_is_that_of_the_trainer(clip):
    def fn(rank):
        def run(kind, **options):
            model, watch = kind(), Watch()
            model.clip = clip
            return train(model, watch=watch, **options), watch

        ours, watch = run(Classifier, gradient_clip_val=clip[0], gradient_clip_algorithm=clip[1])
        assert same_params(run(ByHook)[0], ours)
        assert same_params(run(ByHand)[0], ours)
        assert not same_params(run(Classifier)[0], ours)
        if clip[1] == "value":
            for before, after in zip(watch.before, watch.after, strict=True):
                assert after.abs().max() <= clip[0] < before.abs().max()
        return ours

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


@pytest.mark.parametrize("clip", [(0.05, "norm"), (0.01, "value")])
def test_an_infinite_gradient_on_one_rank_skips_the_step_on_all(clip):
    """An infinite norm makes clipped gradients zero or NaN, and NaN stays what it is: no step either way."""

    def fn(rank):
        options = {"gradient_clip_val": clip[0], "gradient_clip_algorithm": clip[1]}
        params = train(InfiniteOnRank1(adam(), [9]), **options)
        assert same_params(params[9:10], params[8:9])
        return params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


# Together with a loss scale


@pytest.mark.parametrize("clip", [(0.05, "norm"), (0.01, "value")])
def test_with_a_loss_scale_unscaled_gradients_are_clipped(clip):
    """Bitwise the run without loss scale, as the scale is a power of two: while it grows, and after it went down."""
    bad = 9

    def fn(rank):
        def run(**options):
            model = InfiniteOnRank1(adam(), [bad])
            return train(model, gradient_clip_val=clip[0], gradient_clip_algorithm=clip[1], **options)

        scaled = run(plugins=[mixed16(ScaledFloat32, init_scale=16.0, growth_interval=3)])
        assert same_params(scaled, run())
        assert same_params(scaled[bad : bad + 1], scaled[bad - 1 : bad])
        return scaled

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_fused_optimizers_with_a_loss_scale_cannot_be_clipped_as_under_ddp():
    def fn(rank):
        for strategy in ("ddp", "onebit_ddp"):
            with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
                train(Classifier(adam(fused=True)), strategy=strategy, plugins=[mixed16()], gradient_clip_val=0.1)

    run_trainers(2, fn)
