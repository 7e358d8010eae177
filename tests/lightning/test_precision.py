"""Precisions, in both phases; above all the loss scale of 16-mixed, which must be one for all ranks."""

import contextlib
import itertools
import math
import sys
import types
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.precision import transformer_engine
from lightning.pytorch.plugins import MixedPrecision, TransformerEnginePrecision
from ranks import run_ranks, run_trainers
from test_engine import WARMUP_STEPS, freeze, gradient, make_optimizer, params_of, warm_up
from thread_ranks import run_threads
from torch import nn
from trainers import Classifier, fit, same_params

from lightning_onebit import FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch
from lightning_onebit.lightning.preflight import check_optimizer

WARMUP, COMPRESSED = Phase.WARMUP, Phase.COMPRESSED


def mixed16(kind=MixedPrecision, **scaler_options):
    """Lightning turns ``Trainer(precision="16-mixed")`` into bf16-mixed on CPU; its plugin works there."""
    return kind("16-mixed", device="cpu", scaler=torch.amp.GradScaler(device="cpu", **scaler_options))


class ScaledFloat32(MixedPrecision):
    """A loss scale without float16: powers of two change no bit, so a run with it equals one without."""

    @contextlib.contextmanager
    def forward_context(self):
        yield


class Scales(pl.Callback):
    """Keeps, for every batch, whether gradients were finite after backward and before the step, and the scale."""

    def __init__(self):
        self.local, self.seen, self.scales = [], [], []

    def on_after_backward(self, trainer, pl_module):
        self.local.append(finite_gradients(pl_module))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(finite_gradients(pl_module))

    def on_train_batch_end(self, trainer, *_):
        self.scales.append(trainer.precision_plugin.scaler.get_scale())


def finite_gradients(module):
    return all(p.grad.isfinite().all().item() for p in module.parameters() if p.grad is not None)


def adam(**options):
    return lambda module: torch.optim.Adam(module.parameters(), lr=1e-2, **options)


class InfiniteOnRank1(Classifier):
    """Its loss is infinite on rank 1 in some batches."""

    def __init__(self, configure, batches):
        super().__init__(configure)
        self.batches = batches

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.inf if self.global_rank == 1 and batch_idx in self.batches else loss


class InfiniteOnRank1ByHand(InfiniteOnRank1):
    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


# Every precision


def precision_options(name):
    if name == "16-mixed":
        return {"plugins": [mixed16(init_scale=2.0**24, growth_interval=4)]}
    return {"precision": name}


def model_for(name, configure=None):
    model = Classifier(configure)
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(name, torch.float32)
    model.body.register_forward_pre_hook(lambda _, args: (args[0].to(dtype),))
    return model


@pytest.mark.parametrize(
    ("precision", "fused"),
    [
        ("32-true", True),
        ("64-true", False),
        ("bf16-mixed", False),
        ("bf16-true", True),
        ("16-mixed", False),
        ("16-mixed", True),
    ],
)
def test_warmup_is_bitwise_ddp(precision, fused):
    def fn(rank):
        def run(strategy):
            scales = [Scales()] if precision == "16-mixed" else []
            model = model_for(precision, adam(fused=fused))
            recorder = fit(strategy, 2, batches=14, model=model, callbacks=scales, **precision_options(precision))[1]
            return recorder.params, scales[0].scales if scales else []

        (dense, dense_scales), (ours, scales) = run("ddp"), run("onebit_ddp")
        assert same_params(ours, dense)
        assert scales == dense_scales
        if precision == "16-mixed":  # it went down, after steps that were skipped, and up again
            assert min(scales) < 2**22
            assert any(b > a for a, b in itertools.pairwise(scales))

    run_trainers(2, fn)


@pytest.mark.parametrize(
    ("precision", "fused"),
    [("64-true", False), ("bf16-mixed", True), ("bf16-true", False), ("16-mixed", False), ("16-mixed", True)],
)
def test_ranks_agree_bitwise_and_learn_in_the_compressed_phase(precision, fused):
    def fn(rank):
        model = model_for(precision, adam(fused=fused))
        model.logs_loss = True
        options = {"batches": 60, "callbacks": [PhaseSwitch(FixedStep(8))], **precision_options(precision)}
        trainer, recorder = fit("onebit_ddp", 2, model=model, **options)
        assert recorder.phases[-40:] == [COMPRESSED] * 40
        assert not trainer.strategy._phases.overlaps
        assert trainer.callback_metrics["train_loss"] < 1.2  # from 1.7
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


# The loss scale


@pytest.mark.parametrize("fused", [False, True])
def test_a_growing_loss_scale_never_meets_error_feedback(fused):
    """All of the run, and so all errors, are bitwise those of a run without loss scale."""

    def fn(rank):
        def run(**options):
            switch = PhaseSwitch(FixedStep(4))
            scales = [Scales()] if options else []
            strategy = OneBitDDPStrategy(block_size=16)
            configure = adam(fused=fused)
            recorder = fit(strategy, 2, batches=30, configure=configure, callbacks=[switch, *scales], **options)[1]
            assert recorder.phases[-1] is COMPRESSED
            return recorder.params, scales and scales[0].scales

        scaled, scales = run(plugins=[mixed16(ScaledFloat32, init_scale=4.0, growth_interval=3)])
        assert scales[-1] == 4.0 * 2**10
        assert same_params(scaled, run()[0])

    run_trainers(2, fn)


@pytest.mark.parametrize(
    ("kind", "fused"), [(InfiniteOnRank1, False), (InfiniteOnRank1, True), (InfiniteOnRank1ByHand, True)]
)
def test_an_infinite_gradient_on_one_rank_lowers_the_scale_on_all_and_touches_nothing_else(kind, fused):
    """Bitwise the run without loss scale, where the step is skipped as well: see test_engine for what it leaves alone."""
    bad = (12, 13, 20)

    def fn(rank):
        def run(scales, **options):
            model = kind(adam(fused=fused), bad)
            switch = PhaseSwitch(FixedStep(4))
            trainer, recorder = fit("onebit_ddp", 2, batches=30, model=model, callbacks=[switch, *scales], **options)
            assert recorder.phases[-1] is COMPRESSED
            assert trainer.strategy.optimizer_steps == 30 - len(bad)
            return recorder.params

        scales = Scales()
        scaled = run([scales], plugins=[mixed16(ScaledFloat32, init_scale=1024.0)])
        assert same_params(scaled, run([]))
        for batch in bad:
            assert same_params(scaled[batch : batch + 1], scaled[batch - 1 : batch])
        return scaled, scales.scales, scales.local, scales.seen

    (params, scales, local, seen), (other_params, other_scales, other_local, other_seen) = run_trainers(2, fn)
    assert same_params(params, other_params)
    assert scales == other_scales == [1024.0] * 12 + [512.0] + [256.0] * 7 + [128.0] * 10
    # Only rank 1's gradients were infinite, but hooks see infinities on both, as under DDP.
    assert all(local)
    assert seen == other_seen == other_local == [batch not in bad for batch in range(30)]


def test_a_fused_step_is_skipped_if_the_scaler_found_an_infinity_though_the_gradients_are_finite():
    """Unscaled and cleaned by a callback, as one may; Lightning leaves the unscaling to fused optimizers."""

    class Cleaning(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            trainer.precision_plugin.scaler.unscale_(optimizer)
            for p in pl_module.parameters():
                p.grad.nan_to_num_(0.5, 0.5, 0.5)

    bad = (7, 8)

    def fn(rank):
        def run(**options):
            model = InfiniteOnRank1(adam(fused=True), bad)
            callbacks = [PhaseSwitch(FixedStep(4)), *options.pop("callbacks", [])]
            return fit("onebit_ddp", 2, batches=12, model=model, callbacks=callbacks, **options)[1].params

        assert same_params(run(callbacks=[Cleaning()], plugins=[mixed16(ScaledFloat32)]), run())

    run_trainers(2, fn)


@pytest.mark.parametrize("fused", [False, True])
def test_float16_overflows_of_one_rank_are_everyones(fused):
    """The scale grows until float16 gradients overflow, again and again, at first on one rank only."""

    def fn(rank):
        class Skewed(Classifier):
            def training_step(self, batch, batch_idx):
                return (1 + 3 * ((batch_idx + self.global_rank) % 2)) * super().training_step(batch, batch_idx)

        scales = Scales()
        callbacks = [PhaseSwitch(FixedStep(5)), scales]
        options = {"plugins": [mixed16(init_scale=2.0**18, growth_interval=2)], "callbacks": callbacks}
        _, recorder = fit("onebit_ddp", 2, batches=50, model=Skewed(adam(fused=fused)), **options)
        start = recorder.phases.index(COMPRESSED) + 1
        assert start < 20
        return recorder.params, scales.scales, scales.local[start:]

    (params, scales, local), (other_params, other_scales, other_local) = run_trainers(2, fn)
    assert same_params(params, other_params)
    assert scales == other_scales
    alone = sum(a != b for a, b in zip(local, other_local, strict=True))
    assert alone > 2


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_scaler_skips_are_no_warmup(fused):
    """A second moment that was never updated must not be frozen."""

    def fn(rank):
        options = {"plugins": [mixed16(ScaledFloat32)], "callbacks": [PhaseSwitch(FixedStep(2))]}
        model = InfiniteOnRank1(adam(fused=fused), range(5))
        trainer, recorder = fit("onebit_ddp", 2, batches=10, model=model, **options)
        assert recorder.phases.index(COMPRESSED) == 6
        assert trainer.strategy.optimizer_steps == 5

    run_trainers(2, fn)


def test_a_rank_without_any_gradient_follows_the_scaler_of_the_others():
    class Lazy(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            if batch_idx < 10 or self.global_rank == 0:
                self.manual_backward(loss * (math.inf if batch_idx == 12 else 1))
            optimizer.step()

    def fn(rank):
        scales = Scales()
        callbacks = [PhaseSwitch(FixedStep(4)), scales]
        recorder = fit("onebit_ddp", 2, batches=15, model=Lazy(), plugins=[mixed16()], callbacks=callbacks)[1]
        return recorder.params, scales.scales

    (params, scales), (other_params, other_scales) = run_trainers(2, fn)
    assert same_params(params, other_params)
    assert scales == other_scales == [2.0**16] * 12 + [2.0**15] * 3
    assert not same_params(params[13:14], params[14:15])


def test_the_scale_is_in_the_checkpoint_of_the_compressed_phase(tmp_path):
    def fn(rank):
        def run(**options):
            scales = Scales()
            plugin = mixed16(init_scale=2.0**12, growth_interval=3)
            callbacks = [PhaseSwitch(FixedStep(4)), scales]
            trainer, recorder = fit("onebit_ddp", 2, batches=10, plugins=[plugin], callbacks=callbacks, **options)
            return trainer, recorder, scales.scales

        trainer, _, first = run()
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        _, recorder, second = run(max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
        assert first[-1] == 2.0**15
        # Ten steps are three times three and one: the count goes on as well.
        assert second == [2.0**15] + [2.0**16] * 3 + [2.0**17] * 3 + [2.0**18] * 3
        assert set(recorder.phases) == {COMPRESSED}
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_a_disabled_scaler_is_none():
    """Then the skipped step is worth a warning, as in every other precision."""

    def fn(rank):
        model = InfiniteOnRank1(adam(), [7])
        options = {"plugins": [mixed16(enabled=False)], "callbacks": [PhaseSwitch(FixedStep(4))]}
        if rank == 0:
            with pytest.warns(UserWarning, match="all ranks skip this step"):
                return fit("onebit_ddp", 2, model=model, **options)[1].params
        return fit("onebit_ddp", 2, model=model, **options)[1].params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_an_overflow_reaches_a_rank_that_lacks_any_one_gradient():
    def fn(communicator):
        optimizer = make_optimizer(torch.optim.Adam, torch.float32)
        warm_up(optimizer, WARMUP_STEPS, 2)
        compressed, params = freeze(optimizer, communicator), params_of(optimizer)
        for unused in range(len(params)):
            for index, p in enumerate(params):
                p.grad = gradient(communicator.rank, 20, index, p.shape, p.dtype)
            if communicator.rank == 0:
                params[unused].grad.fill_(torch.inf)
            else:
                params[unused].grad = None
            compressed.spread_nonfinite_()
            assert any(p.grad is not None and bool(p.grad.isinf().any()) for p in params)

    run_threads(2, fn)


def test_spreading_without_any_gradient_anywhere_does_nothing():
    def fn(rank):
        optimizer = make_optimizer(torch.optim.Adam, torch.float32)
        warm_up(optimizer, WARMUP_STEPS, 2)
        compressed = freeze(optimizer)
        optimizer.zero_grad()
        compressed.spread_nonfinite_()
        assert all(p.grad is None for p in params_of(optimizer))
        # And finite ones stay as they are.
        for index, p in enumerate(params_of(optimizer)):
            p.grad = gradient(rank, 20, index, p.shape, p.dtype)
        compressed.spread_nonfinite_()
        for index, p in enumerate(params_of(optimizer)):
            assert torch.equal(p.grad, gradient(rank, 20, index, p.shape, p.dtype))

    run_ranks(2, fn)


def test_overlap_is_refused_with_a_loss_scale():
    def fn(rank):
        with pytest.raises(ValueError, match="overlap=True is not possible: gradients are divided by the loss scale"):
            fit(OneBitDDPStrategy(overlap=True), 2, plugins=[mixed16()])

    run_trainers(2, fn)


# What cannot work


def test_float16_parameters_are_refused_before_training_and_diverge_under_ddp():
    def fn(rank):
        model = model_for("16-true")
        model.body.register_forward_pre_hook(lambda _, args: (args[0].half(),))
        with pytest.raises(ValueError, match=r"'body.0.weight' has dtype torch.float16.*HINT: use precision='bf16-true'"):
            fit("onebit_ddp", 2, precision="16-true", model=model)
        recorder = fit("ddp", 2, precision="16-true", model=model)[1]
        assert not all(p.isfinite().all() for p in recorder.params[-1])

    run_trainers(2, fn)


def test_quantized_weights_in_the_optimizer_are_refused_if_they_train():
    """As of BitsandbytesPrecision, which needs CUDA, where they do not. Beside them, others train."""
    quantized = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    adapter, narrow = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4).to(torch.float8_e4m3fn))
    check_optimizer(torch.optim.Adam([quantized, adapter]), {quantized: "layer"})
    with pytest.raises(
        ValueError, match=r"'layer' has dtype torch.float8_e4m3fn.*only parameters that do, such as adapters"
    ):
        check_optimizer(torch.optim.Adam([narrow, adapter]), {narrow: "layer"})


def test_transformer_engine_trains_bfloat16_weights_in_both_phases(monkeypatch):
    """Its plugin with a stand-in for the library, which needs CUDA: what it does to parameters and contexts, without FP8."""
    recipe = types.ModuleType("transformer_engine.common.recipe")
    recipe.DelayedScaling = type("DelayedScaling", (), {})
    layers = types.ModuleType("transformer_engine.pytorch")
    layers.Linear, layers.LayerNorm = nn.Linear, nn.LayerNorm
    layers.fp8_autocast = lambda **_: contextlib.nullcontext()
    package = types.ModuleType("transformer_engine")
    package.pytorch = layers
    modules = {package.__name__: package, layers.__name__: layers, recipe.__name__: recipe}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(transformer_engine, "_TRANSFORMER_ENGINE_AVAILABLE", True)

    def fn(rank):
        def run(dtype):
            plugin = TransformerEnginePrecision(weights_dtype=dtype, replace_layers=False)
            switch = PhaseSwitch(FixedStep(8))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*CUDA is not available.*")
                return fit("onebit_ddp", 2, batches=25, plugins=[plugin], callbacks=[switch])[1]

        recorder = run(torch.bfloat16)
        assert recorder.phases[-1] is COMPRESSED
        assert recorder.params[-1][0].dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"'body.0.weight' has dtype torch.float16"):
            run(torch.float16)
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)
