"""Parameters of every kind in a Trainer with two ranks: shared, missing, strange, frozen, unfrozen during the run."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import BackboneFinetuning
from ranks import run_trainers
from test_strategy import Messages
from torch import nn
from torch.nn import functional as F
from trainers import FEATURES, Classifier, fit, needs_complex_gloo, same_params

from lightning_onebit import (
    DivergenceError,
    DivergenceGuard,
    FixedStep,
    OneBitDDPFabricStrategy,
    OneBitDDPStrategy,
    Phase,
    PhaseSwitch,
)
from lightning_onebit.lightning.preflight import check_module

WARMUP, COMPRESSED = Phase.WARMUP, Phase.COMPRESSED
WARMUP_STEPS, BATCHES = 4, 12


def compress(model, strategy="onebit_ddp", *, steps=WARMUP_STEPS, callbacks=(), **options):
    return fit(
        strategy,
        2,
        **{"batches": BATCHES, "model": model, "callbacks": [PhaseSwitch(FixedStep(steps)), *callbacks], **options},
    )


# Kinds of parameters and layers


class Tied(Classifier):
    """One parameter in two places."""

    def __init__(self):
        super().__init__()
        self.body[2].weight = self.tied = nn.Parameter(torch.randn(16, 16) / 4)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(self.body(x) @ self.tied), y)


class Odd(Classifier):
    """Empty, 0-d and transposed parameters."""

    def __init__(self):
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 5))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.transposed = nn.Parameter(torch.randn(16, FEATURES).div(4).t())

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.body(x) + x @ self.transposed
        return F.cross_entropy(self.head(hidden) * self.temperature + self.empty.sum(0), y)


class ChannelsLast(Classifier):
    """Weights and gradients whose memory order is not their index order; BatchNorm, whose statistics are buffers."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 2))
        self.image.to(memory_format=torch.channels_last)
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append([b.clone() for b in self.buffers()])
        image = self.image(x.view(-1, 3, 2, 2).contiguous(memory_format=torch.channels_last)).flatten(1)
        return F.cross_entropy(self.head(self.body(x) + image), y)

    def on_after_backward(self):
        for p in (self.image[0].weight, self.image[2].weight):
            assert p.is_contiguous(memory_format=torch.channels_last)
            assert p.grad.stride() == p.stride()


class Patchy(Classifier):
    """Parameters without gradient in some steps on all ranks, in others on one rank."""

    def __init__(self):
        super().__init__()
        self.sometimes, self.somewhere, self.never = (nn.Linear(FEATURES, 16) for _ in range(3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.body(x)
        if batch_idx % 3 == 0:
            hidden = hidden + self.sometimes(x)
        if (batch_idx + self.global_rank) % 2:
            hidden = hidden + self.somewhere(x)
        return F.cross_entropy(self.head(hidden), y)


class Frozen(Classifier):
    def __init__(self):
        super().__init__()
        self.body[0].requires_grad_(False)


STATIC = {"static_graph": True, "gradient_as_bucket_view": True}


@pytest.mark.parametrize(
    ("kind", "ddp_options", "idle"),
    [
        (Tied, {}, []),
        (Tied, STATIC, []),
        (Odd, {}, ["empty"]),
        (Odd, STATIC | {"bucket_cap_mb": 0.0005}, ["empty"]),
        (ChannelsLast, {}, []),
        (ChannelsLast, {"gradient_as_bucket_view": True, "broadcast_buffers": False}, []),
        (Patchy, {"find_unused_parameters": True}, ["never.weight", "never.bias"]),
        (Patchy, {"find_unused_parameters": True, "bucket_cap_mb": 0.0005}, ["never.weight", "never.bias"]),
        (Frozen, {}, ["body.0.weight", "body.0.bias"]),
    ],
)
def test_ranks_agree_bitwise(kind, ddp_options, idle):
    """And every parameter moves in the compressed phase that would move under DDP."""

    def fn(rank):
        model = kind()
        initial = {name: p.detach().clone() for name, p in model.named_parameters()}
        _, recorder = compress(model, OneBitDDPStrategy(block_size=16, **ddp_options))
        assert recorder.phases == [WARMUP] * (WARMUP_STEPS - 1) + [COMPRESSED] * (BATCHES - WARMUP_STEPS + 1)
        switch, last = (dict(zip(initial, recorder.params[i], strict=True)) for i in (WARMUP_STEPS - 1, -1))
        assert [name for name in initial if torch.equal(switch[name], last[name])] == idle
        assert all(torch.equal(initial[name], last[name]) for name in idle)
        return recorder.params, getattr(model, "seen", [])

    (first, first_seen), (second, second_seen) = run_trainers(2, fn)
    assert same_params(first, second)
    # DDP hands rank 0's buffers to all before each forward, in the compressed phase as ever, unless told not to.
    broadcast = ddp_options.get("broadcast_buffers", True)
    assert same_params(first_seen, second_seen) is broadcast
    assert kind is not ChannelsLast or not torch.equal(first_seen[-1][0], first_seen[-2][0])


def test_parameters_without_gradient_on_one_rank_while_gradients_accumulate():
    """Without synchronization in between, DDP does not fill in zeros: the set of gradients differs between ranks."""

    def fn(rank):
        strategy = OneBitDDPStrategy(block_size=16, find_unused_parameters=True)
        trainer, recorder = compress(Patchy(), strategy, batches=24, accumulate_grad_batches=2)
        assert trainer.strategy.comm_stats[COMPRESSED].steps == 8
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_synchronized_batch_norm_on_cpu_fails_as_under_ddp():
    def fn(rank):
        for strategy in ("ddp", "onebit_ddp"):
            with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
                fit(strategy, 2, model=ChannelsLast(), sync_batchnorm=True)

    run_trainers(2, fn)


class Writes(Classifier):
    """Changes a parameter in forward, now and then."""

    def training_step(self, batch, batch_idx):
        if batch_idx in (1, 2):
            with torch.no_grad():
                self.body[2].weight.clamp_(-1, 1)
        return super().training_step(batch, batch_idx)


class MadeAnew(Classifier):
    """Puts another parameter, by the data of its rank, in the place of one that no optimizer has."""

    def __init__(self):
        super().__init__(lambda m: torch.optim.Adam([*m.body.parameters(), *m.head.parameters()]))
        self.codebook = nn.Parameter(torch.zeros(FEATURES), requires_grad=False)

    def training_step(self, batch, batch_idx):
        self.codebook = nn.Parameter(0.9 * self.codebook + batch[0].mean(0), requires_grad=False)
        return super().training_step(batch, batch_idx)


def test_modules_that_write_to_parameters_in_forward_are_found():
    """Before training where that is known; else at the first batches, or when the ranks are compared."""

    def fn(rank):
        for kind in (nn.Embedding, nn.EmbeddingBag):
            model = Classifier()
            model.words = kind(10, 4, max_norm=1.5)
            with pytest.raises(
                ValueError, match=rf"'words' \({kind.__name__}, max_norm=1.5\) changes its weight in `forward`"
            ):
                compress(model)
            model.words.weight.requires_grad_(False)
            check_module(model)
        for model, said in ((Writes(), 1), (Classifier(), 0)):
            with Messages() as messages:
                compress(model, batches=4)
            assert rank or messages.count("`training_step` has changed parameters that are trained: 'body.2.weight'") == said
        with pytest.raises(DivergenceError, match=r"'codebook': its value.*in `forward`"):
            compress(MadeAnew(), callbacks=[DivergenceGuard(every_n_steps=5)])

    run_trainers(2, fn)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        pytest.param(
            torch.zeros(3, dtype=torch.complex64),
            r"'extra' has dtype torch.complex64.*HINT: .*view_as_real",
            marks=needs_complex_gloo,
        ),
        (torch.zeros(3, dtype=torch.float16), r"'extra' has dtype torch.float16.*HINT: .*bf16"),
        (torch.zeros(6)[::2], r"'extra' \(strides \(2,\)\).*HINT: .*contiguous"),
    ],
)
def test_parameters_that_cannot_be_compressed_are_an_error_before_training(parameter, message):
    class Extra(Classifier):
        def __init__(self):
            super().__init__()
            self.extra = nn.Parameter(parameter)

        def training_step(self, batch, batch_idx):
            raise AssertionError("training has started")

    def fn(rank):
        with pytest.raises(ValueError, match=message):
            compress(Extra())

    run_trainers(2, fn)


class HasFrozen(Classifier):
    def __init__(self, dtype):
        super().__init__()
        self.extra = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.int8, pytest.param(torch.complex64, marks=needs_complex_gloo)], ids=str
)
def test_frozen_parameters_of_the_optimizer_may_be_of_any_type(dtype, tmp_path):
    """Such as the base of a model with adapters, where the optimizer was given all parameters. A run with them resumes."""

    def fn(rank):
        trainer, _ = compress(HasFrozen(dtype))
        trainer.save_checkpoint(tmp_path / "frozen.ckpt")
        _, resumed = compress(HasFrozen(dtype), max_epochs=2, ckpt_path=tmp_path / "frozen.ckpt")
        _, whole = compress(HasFrozen(dtype), max_epochs=2)
        assert resumed.phases[0] is COMPRESSED
        assert same_params(resumed.params, whole.params[-len(resumed.params) :])
        return resumed.params

    assert same_params(*run_trainers(2, fn))


@pytest.mark.parametrize("batch", [1, WARMUP_STEPS + 1])
def test_what_begins_to_train_and_cannot_be_compressed_is_refused_then(batch):
    def fn(rank):
        unfreeze = Unfreeze("on_train_batch_end", batch, lambda trainer, module: module.extra.requires_grad_(True))
        with pytest.raises(ValueError, match=r"'extra' has dtype torch\.float16"):
            compress(HasFrozen(torch.float16), callbacks=[unfreeze])

    run_trainers(2, fn)


def test_frozen_parameters_cost_neither_memory_nor_bytes():
    class Large(Frozen):
        def __init__(self):
            super().__init__()
            self.large = nn.Linear(FEATURES, 16, bias=False).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            return super().training_step((self.large(batch[0])[:, :FEATURES], batch[1]), batch_idx)

    def fn(rank):
        def sent(kind):
            trainer = compress(kind())[0]
            large = getattr(trainer.lightning_module, "large", None)
            assert large is None or not trainer.optimizers[0].state[large.weight]
            return trainer.strategy.comm_stats[COMPRESSED].bytes_sent

        assert sent(Large) == sent(Frozen)

    run_trainers(2, fn)


# Parameters that begin to train during the run


class Backbone(Classifier):
    """``backbone`` is what BackboneFinetuning freezes and unfreezes."""

    def __init__(self, kind=torch.optim.AdamW):
        super().__init__(lambda m: kind([p for p in m.parameters() if p.requires_grad], lr=1e-2))
        self.backbone = self.body


class Unfreeze(pl.Callback):
    """Makes the backbone trainable in a hook of a batch."""

    def __init__(self, hook, batch, then=lambda trainer, module: None):
        self.batch = batch

        def unfreeze(trainer, pl_module, *args):
            if args[-1] == batch:
                pl_module.body.requires_grad_(True)
                then(trainer, pl_module)

        setattr(self, hook, unfreeze)


def test_stock_ddp_lets_ranks_drift_apart():
    """What is mended below; should this fail one day, DDP has learned it."""

    def fn(rank):
        finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
        return fit("ddp", 2, batches=3, max_epochs=2, model=Backbone(), callbacks=[finetuning])[1].params

    first, second = run_trainers(2, fn)
    assert same_params(first[:3], second[:3])
    assert not same_params(first[3:], second[3:])


@pytest.mark.parametrize("ddp_options", [{}, STATIC, {"find_unused_parameters": True}])
def test_finetuning_in_warmup(ddp_options):
    """The unfrozen parameters are averaged from their first step on: the course is that of one process with all data."""

    def fn(rank):
        finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0)
        trainer, recorder = compress(
            Backbone(), OneBitDDPStrategy(**ddp_options), steps=9, callbacks=[finetuning], batches=4, max_epochs=4
        )
        assert recorder.phases == [WARMUP] * 8 + [COMPRESSED] * 8
        assert trainer.strategy.comm_stats[WARMUP].steps == 9
        moved = [not torch.equal(a[0], b[0]) for a, b in zip(recorder.params, recorder.params[1:], strict=False)]
        assert moved == [False] * 3 + [True] * 12
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


@pytest.mark.skipif(
    not hasattr(OneBitDDPStrategy(), "_pl_static_graph_delay_done"),
    reason="this Lightning never averages the first gradients, under DDP either",
)
def test_finetuning_by_hand_with_a_static_graph():
    """Lightning sends the gradients of the first backward through a DDP model itself, so also of the second model."""

    class ByHand(Backbone):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def fn(rank):
        finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
        strategy = OneBitDDPStrategy(static_graph=True)
        return compress(ByHand(), strategy, steps=9, callbacks=[finetuning], batches=4, max_epochs=3)[1].params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_finetuning_in_the_compressed_phase_goes_back_to_warmup_says_so_and_freezes_again():
    def fn(rank):
        finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=2)
        with Messages() as messages:
            trainer, recorder = compress(Backbone(), steps=3, callbacks=[finetuning], batches=4, max_epochs=4)
        assert recorder.phases == [WARMUP] * 2 + [COMPRESSED] * 6 + [WARMUP] * 2 + [COMPRESSED] * 6
        stats = trainer.strategy.comm_stats
        assert (stats[WARMUP].steps, stats[COMPRESSED].steps) == (6, 10)
        assert not torch.equal(recorder.params[-1][0], recorder.params[8][0])
        if rank == 0:
            assert messages.count("new parameters are trained") == 1
            assert messages.count("'body.0.weight', 'body.0.bias', 'body.2.weight' and 1 more") == 1
            assert messages.count("after step 11 (step 3 of this warm-up)") == 1
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def by_hand(trainer, module):
    if len(trainer.optimizers[0].param_groups) == 1:
        trainer.strategy.freeze_variance()
        trainer.optimizers[0].add_param_group({"params": list(module.body.parameters())})


@pytest.mark.parametrize("how", ["callback", "hand"])
def test_unfreezing_between_the_freeze_and_its_effect_begins_a_whole_warmup(how):
    """At the boundary of epochs at which `PhaseSwitch` has just frozen; or where user code freezes and unfreezes at once."""

    def fn(rank):
        if how == "callback":
            unfreeze, steps, before = BackboneFinetuning(unfreeze_backbone_at_epoch=1), 4, [WARMUP] * 3 + [COMPRESSED]
        else:
            unfreeze, steps, before = Unfreeze("on_train_batch_start", 3, by_hand), 5, [WARMUP] * 3
        model = Backbone()
        model.body.requires_grad_(False)
        recorder = compress(model, steps=steps, callbacks=[unfreeze], batches=4, max_epochs=4)[1]
        # From then on as many steps of warm-up as from the beginning; the last of them ends compressed.
        expected = before + [WARMUP] * (steps - 1)
        assert recorder.phases == expected + [COMPRESSED] * (16 - len(expected))
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_a_finetuned_run_resumes(tmp_path):
    """In the compressed phase, with the parameter groups that came during the run."""

    def fn(rank):
        def run(epochs, **kwargs):
            callbacks = [BackboneFinetuning(unfreeze_backbone_at_epoch=1)]
            options = {"steps": 3, "callbacks": callbacks, "batches": 5, "max_epochs": epochs, **kwargs}
            return compress(Backbone(), **options)

        trainer, before = run(2)
        assert before.phases[-1] is COMPRESSED
        trainer.save_checkpoint(tmp_path / "finetuned.ckpt")
        trainer, after = run(3, ckpt_path=tmp_path / "finetuned.ckpt")
        assert after.phases == [COMPRESSED] * 5
        assert len(trainer.optimizers[0].param_groups) == 2
        return after.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("batch", [1, 7])
def test_parameters_of_the_optimizer_may_be_unfrozen_between_batches(hook, batch):
    """In the compressed phase with another warm-up, as for new groups: they have no second moment either."""

    def fn(rank):
        model = Classifier()
        model.body.requires_grad_(False)
        options = {"callbacks": [Unfreeze(hook, batch)], "batches": 16}
        _, recorder = compress(model, OneBitDDPStrategy(block_size=16), **options)
        # The batch that is first trained with them
        first = batch + (hook == "on_train_batch_end")
        once = [WARMUP] * (WARMUP_STEPS - 1) + [COMPRESSED] * (16 - WARMUP_STEPS + 1)
        assert recorder.phases == (once if first < WARMUP_STEPS else once[:first] + once[: 16 - first])
        moved = [not torch.equal(a[0], b[0]) for a, b in zip(recorder.params, recorder.params[1:], strict=False)]
        assert moved == [False] * (first - 1) + [True] * (16 - first)
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


@pytest.mark.parametrize("batch", [1, 7])
def test_unfreezing_within_a_training_step_is_an_error(batch):
    class Late(Classifier):
        def training_step(self, some, batch_idx):
            self.body.requires_grad_(batch_idx >= batch)
            return super().training_step(some, batch_idx)

    def fn(rank):
        model = Late()
        model.body.requires_grad_(False)
        with pytest.raises(RuntimeError, match=r"drift apart.*'body.0.weight', .*within `training_step`. HINT: .*before"):
            compress(model)

    run_trainers(2, fn)


def test_adding_parameters_within_a_training_step_of_the_compressed_phase_is_an_error():
    class Late(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 7:
                self.optimizers().add_param_group({"params": list(self.body.parameters())})
            return super().training_step(batch, batch_idx)

    def fn(rank):
        with pytest.raises(RuntimeError, match=r"parameters have changed since .* HINT: call `strategy.resume_warmup"):
            compress(Late(lambda m: torch.optim.Adam(m.head.parameters())))

    run_trainers(2, fn)


def test_a_parameter_outside_the_module_is_an_error():
    """DDP would never average its gradient."""

    def fn(rank):
        model = Classifier(lambda m: torch.optim.Adam([*m.parameters(), *m.hidden_away]))
        model.hidden_away = [nn.Parameter(torch.zeros(3, 2))]
        with pytest.raises(RuntimeError, match=r"drift apart.*one of shape \(3, 2\).*no submodule.*HINT: register"):
            compress(model)
        trainer = fit("onebit_ddp", 2, batches=1, model=Classifier())[0]
        assert trainer.strategy._phases.steps.averaged == set(trainer.lightning_module.parameters())

    run_trainers(2, fn)


def test_with_fabric_unfreezing_takes_another_setup():
    """Stock Fabric lets the ranks drift apart."""

    def fn(rank):
        strategy = OneBitDDPFabricStrategy(criterion=FixedStep(1000))
        fabric = Fabric(accelerator="cpu", strategy=strategy, devices=2)
        fabric.launch()
        body, head = nn.Linear(4, 3), nn.Linear(3, 1)
        body.requires_grad_(False)
        both = nn.Sequential(body, head)
        model, optimizer = fabric.setup(both, torch.optim.Adam(both.parameters()))

        def step(model):
            optimizer.zero_grad()
            fabric.backward(model(torch.full((1, 4), rank + 1.0)).sum())
            optimizer.step()

        step(model)
        body.requires_grad_(True)
        with pytest.raises(RuntimeError, match=r"drift apart.*'0.weight', '0.bias'.*`fabric.setup` made.*HINT"):
            step(model)
        step(fabric.setup_module(both))
        strategy.teardown()
        return [[p.detach() for p in both.parameters()]]

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_exchanges_during_backward_follow_unfrozen_parameters():
    def fn(rank):
        def params(overlap):
            torch.manual_seed(0)
            model = Classifier()
            model.body.requires_grad_(False)
            strategy = OneBitDDPStrategy(block_size=16, overlap=overlap)
            recorder = compress(model, strategy, callbacks=[Unfreeze("on_train_batch_start", 6)])[1]
            assert recorder.phases[-1] is COMPRESSED
            return recorder.params

        assert same_params(params(True), params(False))

    run_trainers(2, fn)


def test_what_is_not_initialized_is_ddps_to_explain():
    class Lazy(Classifier):
        def __init__(self):
            super().__init__()
            self.late = nn.LazyLinear(3)

    def fn(rank):
        with pytest.raises(RuntimeError, match=r"dry run|dummy forward"):
            fit("onebit_ddp", 2, model=Lazy())

    run_trainers(2, fn)
