"""What users do around an optimizer: its variants, schedulers, hooks, accumulation. All as under DDP, in both phases."""

import contextlib
import inspect
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.core.optimizer import LightningOptimizer
from ranks import run_ranks, run_trainers
from test_engine import (
    GROUPS,
    WARMUP_STEPS,
    AdamModel,
    assert_close,
    freeze,
    gradient,
    make_optimizer,
    make_params,
    params_of,
)
from test_precision import ScaledFloat32, mixed16
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)
from trainers import Classifier, fit, same_params

from lightning_onebit import FixedStep, Phase, PhaseSwitch

WARMUP, COMPRESSED = Phase.WARMUP, Phase.COMPRESSED


def switch_after(steps):
    return PhaseSwitch(FixedStep(steps))


class Float64(Classifier):
    """So that roundings of variants differ too little to change a sign."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.double()
        self.body.register_forward_pre_hook(lambda _, args: (args[0].double(),))


# Variants of Adam


VARIANTS = {
    "foreach": (Adam, {"foreach": True}),
    "fused": (Adam, {"fused": True}),
    "AdamW, foreach": (AdamW, {"foreach": True}),
    "AdamW, fused": (AdamW, {"fused": True}),
    "decoupled_weight_decay": (Adam, {"decoupled_weight_decay": True}),
    "tensor lr": (Adam, {"lr": torch.tensor(1e-2, dtype=torch.float64)}),
    "tensor lr, fused": (Adam, {"lr": torch.tensor(1e-2), "fused": True}),
    "tensor betas": (Adam, {"betas": (torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.999, dtype=torch.float64))}),
    "capturable, fused": (Adam, {"capturable": True, "fused": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_ddps_in_warmup_and_the_plain_optimizer_afterwards(name):
    kind, options = VARIANTS[name]
    if not inspect.signature(kind).parameters.keys() >= options.keys():
        pytest.skip(f"this torch has no {kind.__name__}({', '.join(options)})")
    plain_kind = AdamW if "decoupled_weight_decay" in options else kind

    def fn(rank):
        def configure(kind, **options):
            return lambda m: kind(m.parameters(), **{"lr": 1e-2, "weight_decay": 0.01, **options})

        def run(strategy, kind, **options):
            callbacks = [switch_after(6)] if strategy == "onebit_ddp" else []
            return fit(strategy, 2, batches=12, model=Float64(configure(kind, **options)), callbacks=callbacks)[1]

        ours = run("onebit_ddp", kind, **options)
        assert ours.phases[-1] is COMPRESSED
        assert same_params(ours.params[:6], run("ddp", kind, **options).params[:6])
        for a, b in zip(ours.params[-1], run("onebit_ddp", plain_kind, foreach=False).params[-1], strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-7)
        return ours.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_maximize_ascends_as_minimizing_the_negative_descends():
    class Negative(Classifier):
        def training_step(self, batch, batch_idx):
            return -super().training_step(batch, batch_idx)

    def fn(rank):
        def run(kind, maximize):
            configure = lambda m: AdamW(m.parameters(), lr=1e-2, maximize=maximize)  # noqa: E731
            return fit("onebit_ddp", 2, batches=20, model=kind(configure), callbacks=[switch_after(6)])[1].params

        ours = run(Negative, True)
        assert same_params(ours, run(Classifier, False))
        return ours

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_lightning_optimizers_may_be_returned():
    def fn(rank):
        def run(wrap):
            configure = lambda m: wrap(Adam(m.parameters(), lr=1e-2))  # noqa: E731
            return fit("onebit_ddp", 2, configure=configure, callbacks=[switch_after(4)])[1].params

        assert same_params(run(LightningOptimizer), run(lambda optimizer: optimizer))

    run_trainers(2, fn)


def test_steps_without_any_gradient_are_no_warmup():
    class Late(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            if batch_idx >= 3:
                self.manual_backward(loss)
            optimizer.step()

    def fn(rank):
        trainer, recorder = fit("onebit_ddp", 2, model=Late(), callbacks=[switch_after(2)])
        assert recorder.phases.index(COMPRESSED) == 4
        assert trainer.strategy.optimizer_steps == 7

    run_trainers(2, fn)


# Schedulers


class Rates(pl.Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_end(self, trainer, *_):
        (group,) = trainer.optimizers[0].param_groups
        self.rates.append((float(group["lr"]), *map(float, group["betas"])))


SCHEDULERS = {
    "step": (lambda o: StepLR(o, 2, 0.5), {"interval": "step"}),
    "epoch": (lambda o: ExponentialLR(o, 0.5), {"interval": "epoch"}),
    "every third step": (lambda o: CosineAnnealingLR(o, 10), {"interval": "step", "frequency": 3}),
    "OneCycleLR": (lambda o: OneCycleLR(o, 1e-2, total_steps=32), {"interval": "step"}),
    "plateau": (
        lambda o: ReduceLROnPlateau(o, factor=0.5, patience=1),
        {"interval": "step", "monitor": "constant", "frequency": 2},
    ),
    "linear warm-up": (lambda o: LambdaLR(o, lambda step: min(1.0, (step + 1) / 20)), {"interval": "step"}),
}


@pytest.mark.parametrize(("name", "precision"), [*((name, "32-true") for name in SCHEDULERS), ("OneCycleLR", "16-mixed")])
def test_schedulers_go_on_without_a_warning(name, precision):
    """Also if the lr is a tensor, which schedulers fill in place."""
    make, config = SCHEDULERS[name]

    class Logging(Classifier):
        def training_step(self, batch, batch_idx):
            self.log("constant", 1.0)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            optimizer = AdamW(self.parameters(), lr=torch.tensor(1e-2))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **config}}

    def fn(rank):
        def run(strategy, *callbacks):
            rates = Rates()
            plugins = [mixed16()] if precision == "16-mixed" else []
            options = {"batches": 5, "max_epochs": 4, "model": Logging(), "plugins": plugins}
            trainer, recorder = fit(strategy, 2, callbacks=[*callbacks, rates], **options)
            # What schedulers put in the optimizer's place of `step` is there again.
            return recorder, (rates.rates, hasattr(trainer.optimizers[0].step, "_wrapped_by_lr_sched"))

        expected = run("ddp")[1]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(lr_scheduler|optimizer).step.*")
            recorder, outcome = run("onebit_ddp", switch_after(5))
        assert recorder.phases[-10:] == [COMPRESSED] * 10
        assert outcome == expected
        assert len(set(outcome[0][12:])) > 1
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_a_scheduler_whose_first_step_follows_a_compressed_one(tmp_path):
    """Resumed within the first epoch: torch looks whether the optimizer that it sees has stepped before."""

    class PerEpoch(Classifier):
        def configure_optimizers(self):
            optimizer = Adam(self.parameters(), lr=1e-2)
            return [optimizer], [ExponentialLR(optimizer, 0.5)]

    def fn(rank):
        def run(ckpt_path=None):
            sixth = pl.callbacks.ModelCheckpoint(tmp_path, "sixth", every_n_train_steps=6, enable_version_counter=False)
            callbacks = [switch_after(4), sixth]
            options = {"ckpt_path": ckpt_path, "enable_checkpointing": True}
            return fit("onebit_ddp", 2, model=PerEpoch(), callbacks=callbacks, **options)[0]

        run()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(lr_scheduler|optimizer).step.*")
            trainer = run(tmp_path / "sixth.ckpt")
        assert trainer.global_step == 10
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5e-2

    run_trainers(2, fn)


@pytest.mark.parametrize("space", ["update", "momentum"])
def test_lr_and_beta1_are_read_anew_at_every_step(space):
    """As OneCycleLR rewrites both: the float64 model with the numbers that it gives."""
    steps = 30

    def one_cycle(optimizer):
        return OneCycleLR(optimizer, [1e-2, 3e-3], total_steps=WARMUP_STEPS + steps + 1, pct_start=0.6)

    def fn(rank):
        optimizer = make_optimizer(AdamW, torch.float64)
        scheduler = one_cycle(optimizer)
        compressed, history, numbers = None, [], []
        for step in range(WARMUP_STEPS + steps):
            if step == WARMUP_STEPS:
                compressed = freeze(optimizer, block_size=64, space=space)
            numbers.append([(group["lr"], group["betas"][0]) for group in optimizer.param_groups])
            for index, p in enumerate(params_of(optimizer)):
                grads = [gradient(r, step, index, p.shape) for r in range(2)]
                p.grad = grads[rank] if compressed else sum(grads) / 2
            compressed.step() if compressed else optimizer.step()
            scheduler.step()
            history.append([p.detach().clone() for p in params_of(optimizer)])
        return history, numbers

    (history, numbers), (other, _) = run_ranks(2, fn)
    assert same_params(history, other)
    beta1s = [beta1 for ((_, beta1), _) in numbers]
    assert max(beta1s[WARMUP_STEPS:]) - min(beta1s[WARMUP_STEPS:]) > 0.05

    models = []
    for group_index, group in enumerate(GROUPS):
        options = {k: v for k, v in group.items() if k != "shapes"}
        for p in make_params(torch.float64, group["shapes"]):
            settings = {"decoupled": True, "block_size": 64, "scale": "l2", "space": space}
            models.append((group_index, p.shape, AdamModel(p.detach().numpy(), 2, **settings, **options)))
    expected = []
    for step in range(WARMUP_STEPS + steps):
        for index, (group_index, shape, model) in enumerate(models):
            model.lr, model.beta1 = numbers[step][group_index]
            grads = [gradient(rank, step, index, shape).numpy() for rank in range(2)]
            if step == WARMUP_STEPS:
                model.freeze()
            model.warmup_step(grads) if step < WARMUP_STEPS else model.compressed_step(grads)
        expected.append([model.x.copy() for _, _, model in models])
    assert_close(history, expected, rtol=1e-4)


# Hooks


class Events(Classifier):
    """Notes what is called, around every step and in which order; the callback of the same name does so too."""

    def __init__(self, fused=False):
        super().__init__(self.make_optimizer)
        self.events, self.fused = [], fused

    def make_optimizer(self, module):
        optimizer = Adam(self.parameters(), lr=1e-2, fused=self.fused)
        optimizer.register_step_pre_hook(lambda *_: self.events.append("step pre-hook"))
        optimizer.register_step_post_hook(lambda *_: self.events.append("step post-hook"))
        scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch, batch_idx):
        self.events.append(f"training_step {batch_idx}")
        return super().training_step(batch, batch_idx)

    def backward(self, *args, **kwargs):
        self.events.append("backward")
        super().backward(*args, **kwargs)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        self.events.append("optimizer_step")
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.events.append("optimizer_step done")

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        self.events.append("optimizer_zero_grad")
        optimizer.zero_grad(set_to_none=False)

    def configure_gradient_clipping(self, *args, **kwargs):
        self.events.append("configure_gradient_clipping")

    def lr_scheduler_step(self, scheduler, metric):
        self.events.append("lr_scheduler_step")
        super().lr_scheduler_step(scheduler, metric)


class EventsCallback(pl.Callback):
    pass


for name in ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"):

    def note(self, *_, _name=name):
        self.events.append(_name)

    def note_in_callback(self, trainer, pl_module, *_, _name=name):
        pl_module.events.append(f"callback: {_name}")

    setattr(Events, name, note)
    setattr(EventsCallback, name, note_in_callback)


class EventsByHand(Events):
    def __init__(self, fused=False):
        super().__init__(fused)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()

        def closure():
            self.manual_backward(super(EventsByHand, self).training_step(batch, batch_idx))

        optimizer.step(closure=closure)
        self.lr_schedulers().step()


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "16-mixed, fused"])
@pytest.mark.parametrize("kind", [Events, EventsByHand])
def test_hooks_run_in_ddps_order_in_both_phases(kind, precision):
    def fn(rank):
        def run(strategy, *callbacks):
            model = kind(fused="fused" in precision)
            plugins = [] if precision == "32-true" else [mixed16()]
            recorder = fit(strategy, 2, model=model, plugins=plugins, callbacks=[*callbacks, EventsCallback()])[1]
            return model.events, recorder

        expected, (events, recorder) = run("ddp")[0], run("onebit_ddp", switch_after(4))
        assert recorder.phases[-6:] == [COMPRESSED] * 6
        assert events == expected
        assert sum("hook" in event for event in events) == 20
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_an_optimizer_step_override_may_step_now_and_then():
    """The recipe of Lightning's documentation: a warm-up of the rate, and a step in every second batch."""

    class Sometimes(Classifier):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * min(1.0, (batch_idx + 1) / 10)

    def fn(rank):
        trainer, recorder = fit("onebit_ddp", 2, batches=20, model=Sometimes(), callbacks=[switch_after(4)])
        stats = trainer.strategy.comm_stats
        assert (stats[WARMUP].steps, stats[COMPRESSED].steps) == (4, 6)
        for batch in range(2, 20, 2):
            assert same_params(recorder.params[batch : batch + 1], recorder.params[batch - 1 : batch])
            assert not same_params(recorder.params[batch : batch + 1], recorder.params[batch + 1 : batch + 2])
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


# Accumulation


class AccumulatingByHand(Classifier):
    """What ``accumulate_grad_batches=3`` does, spelled out. ``block`` suppresses DDP's exchange while accumulating."""

    def __init__(self, block):
        super().__init__()
        self.automatic_optimization, self.block = False, block

    def training_step(self, batch, batch_idx):
        optimizer, last = self.optimizers(), batch_idx % 3 == 2
        if batch_idx % 3 == 0:
            optimizer.zero_grad()
        with contextlib.nullcontext() if last else self.block(self, optimizer):
            self.manual_backward(super().training_step(batch, batch_idx) / 3)
        if last:
            optimizer.step()


BLOCKS = {
    "block_backward_sync": lambda module, optimizer: module.trainer.strategy.block_backward_sync(),
    "DDP.no_sync": lambda module, optimizer: module.trainer.model.no_sync(),
    "toggle_model": lambda module, optimizer: optimizer.toggle_model(sync_grad=False),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_accumulation_by_hand_is_that_of_the_trainer(block):
    def fn(rank):
        switch = {"batches": 30, "callbacks": [switch_after(4)]}
        trainer, recorder = fit("onebit_ddp", 2, model=AccumulatingByHand(BLOCKS[block]), **switch)
        assert trainer.strategy.comm_stats[COMPRESSED].steps == 6
        assert same_params(recorder.params, fit("onebit_ddp", 2, accumulate_grad_batches=3, **switch)[1].params)
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_accumulation_scheduler_changes_the_number_in_the_compressed_phase():
    def fn(rank):
        callbacks = [switch_after(4), GradientAccumulationScheduler({0: 1, 1: 2, 2: 5})]
        trainer, recorder = fit("onebit_ddp", 2, batches=10, max_epochs=3, callbacks=callbacks)
        stats = trainer.strategy.comm_stats
        assert (stats[WARMUP].steps, stats[COMPRESSED].steps) == (4, 6 + 5 + 2)
        moved = [not same_params([a], [b]) for a, b in zip(recorder.params[9:], recorder.params[10:], strict=False)]
        assert moved == [False, True] * 5 + [False, False, False, False, True] * 2
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_accumulation_with_a_loss_scale():
    """Micro-batches meet one scale, as it changes at steps only: bitwise the run without."""

    def fn(rank):
        def run(**options):
            settings = {"batches": 30, "accumulate_grad_batches": 3, "callbacks": [switch_after(3)]}
            return fit("onebit_ddp", 2, **settings, **options)[1].params

        assert same_params(run(plugins=[mixed16(ScaledFloat32, init_scale=16.0, growth_interval=2)]), run())

    run_trainers(2, fn)


# Steps that are not made


@pytest.mark.parametrize("strategy", ["ddp", "onebit_ddp"])
@pytest.mark.parametrize("ranks", [(0, 1), (1,)])
def test_training_step_that_returns_none(strategy, ranks):
    """Lightning forbids it with several processes, in both phases: it raises on every rank that does it.

    If only some do, plain DDP leaves the others waiting in backward, in an all-reduce; we, in the compressed phase, in the
    optimizer step. Either way they fail as soon as the process of the first one is gone, or after the timeout.
    """

    class Skipping(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 8 and self.global_rank in ranks else loss

    def fn(rank):
        callbacks = [switch_after(4)] if strategy == "onebit_ddp" else []
        message = (
            "by returning None in distributed training is not supported" if rank in ranks else "onnection (closed|reset)"
        )
        with pytest.raises(RuntimeError, match=message):
            fit(strategy, 2, batches=12, model=Skipping(), callbacks=callbacks)

    run_trainers(2, fn)


def test_manual_optimization_may_leave_out_steps():
    """All ranks alike: the remedy for a training_step that has nothing to learn from."""

    class Skipping(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            if batch_idx % 4 == 1:
                return None
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            return optimizer.step()

    def fn(rank):
        trainer, recorder = fit("onebit_ddp", 2, batches=20, model=Skipping(), callbacks=[switch_after(4)])
        assert trainer.strategy.optimizer_steps == 15
        assert recorder.phases[-1] is COMPRESSED
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)
