"""Manual optimization with several optimizers: all compressed, or some dense beside them."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import Precision
from ranks import run_ranks, run_trainers
from test_strategy import Messages
from torch import nn
from torch.nn import functional as F
from trainers import CLASSES, FEATURES, Classifier, fit, needs_complex_gloo, same_params

from lightning_onebit import FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch, VarianceStability
from lightning_onebit.checkpoint.state import CHECKPOINT_KEY
from lightning_onebit.comm.primitives import Communicator, completed_future
from lightning_onebit.comm.stats import PhaseCounters
from lightning_onebit.config import CompressionConfig
from lightning_onebit.freeze.criteria import Criterion, Plan, Verdict
from lightning_onebit.lightning.ddp_hook import HookState, phase_hook
from lightning_onebit.lightning.optimizer_steps import OptimizerSteps

WARMUP, COMPRESSED = Phase.WARMUP, Phase.COMPRESSED
WARMUP_STEPS, BATCHES = 4, 12
NOISE = 3


def adam(params):
    return torch.optim.Adam(params, lr=1e-2, betas=(0.5, 0.99))


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2)


def sgd(params):
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9)


def rmsprop(params):
    """Cannot be compressed."""
    return torch.optim.RMSprop(params, lr=1e-3, momentum=0.9)


def amsgrad(params):
    return torch.optim.Adam(params, lr=1e-2, amsgrad=True)


class Adversaries(pl.LightningModule):
    """A generator and a discriminator on the data of :func:`trainers.data`."""

    def __init__(self, kinds=(adam, adamw), critic_steps=1):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.discriminator = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 1))
        self.generator = nn.Sequential(nn.Linear(NOISE, 16), nn.Tanh(), nn.Linear(16, FEATURES))
        self.kinds, self.critic_steps = kinds, critic_steps

    def configure_optimizers(self):
        for_discriminator, for_generator = self.kinds
        return [for_discriminator(self.discriminator.parameters()), for_generator(self.generator.parameters())], []

    def fake(self, x, batch_idx):
        generator = torch.Generator().manual_seed(1000 * batch_idx + self.global_rank)
        return self.generator(torch.randn(len(x), NOISE, generator=generator, dtype=x.dtype))

    def discriminator_loss(self, x, batch_idx):
        return F.softplus(-self.discriminator(x)).mean() + F.softplus(self.discriminator(self.fake(x, batch_idx))).mean()

    def generator_loss(self, x, batch_idx):
        return F.softplus(-self.discriminator(self.fake(x, batch_idx))).mean()

    def training_step(self, batch, batch_idx):
        x, _ = batch
        for_discriminator, for_generator = self.optimizers()
        for _ in range(self.critic_steps):
            self.update(for_discriminator, lambda: self.discriminator_loss(x, batch_idx))
        self.update(for_generator, lambda: self.generator_loss(x, batch_idx))

    def update(self, optimizer, loss):
        """The gradients of the other optimizer's parameters stay, stale, in DDP's buckets."""
        optimizer.zero_grad()
        self.manual_backward(loss())
        optimizer.step()


class Toggling(Adversaries):
    """As Lightning's documentation has it: the other parameters require no gradient meanwhile."""

    def update(self, optimizer, loss):
        self.toggle_optimizer(optimizer)
        super().update(optimizer, loss)
        self.untoggle_optimizer(optimizer)


class WithClosure(Adversaries):
    def update(self, optimizer, loss):
        def closure():
            optimizer.zero_grad()
            self.manual_backward(loss())

        with optimizer.toggle_model():
            optimizer.step(closure=closure)


class Clipping(Adversaries):
    def update(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss())
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")
        optimizer.step()


class TwoBackwards(Adversaries):
    """Halves of the loss, the first one without synchronization if ``lazy``."""

    lazy = False

    def update(self, optimizer, loss):
        optimizer.zero_grad()
        for last in (False, True):
            with optimizer.toggle_model(sync_grad=last or not self.lazy):
                self.manual_backward(loss() / 2)
        optimizer.step()


class TwoLazyBackwards(TwoBackwards):
    lazy = True


BACKWARDS = (TwoBackwards, TwoLazyBackwards)


class Apart(Classifier):
    """Two networks that have nothing to do with each other but DDP's buckets: the second must be as under DDP."""

    def __init__(self, kinds=(adam, rmsprop)):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))
        self.kinds = kinds

    def configure_optimizers(self):
        mine, others = self.kinds
        return [mine([*self.body.parameters(), *self.head.parameters()]), others(self.other.parameters())], []

    def loss_of(self, network, batch):
        x, y = batch
        return F.cross_entropy(network(x), y)

    def training_step(self, batch, batch_idx):
        both = [lambda x: self.head(self.body(x)), self.other]
        for optimizer, network in zip(self.optimizers(), both, strict=True):
            optimizer.zero_grad()
            self.manual_backward(self.loss_of(network, batch))
            optimizer.step()


def compress(model, *, strategy=None, world_size=2, steps=WARMUP_STEPS, callbacks=(), **options):
    strategy = strategy or OneBitDDPStrategy(block_size=16, find_unused_parameters=True)
    options = {"batches": BATCHES, "callbacks": [PhaseSwitch(FixedStep(steps)), *callbacks], **options}
    return fit(strategy, world_size, model=model, **options)


def others(recorder, model):
    """What was recorded of the network :attr:`Apart.other`."""
    indices = [i for i, (name, _) in enumerate(model.named_parameters()) if name.startswith("other")]
    return [[params[i] for i in indices] for params in recorder.params]


MIXTURES = [(adam, adamw), (adam, sgd), (rmsprop, adamw), (amsgrad, adam)]


# All compressed


@pytest.mark.parametrize(("kinds", "world_size"), [(MIXTURES[0], 3), *((kinds, 2) for kinds in MIXTURES[1:])])
def test_warmup_is_bitwise_ddp(kinds, world_size):
    def fn(rank):
        def params(strategy):
            return fit(strategy, world_size, batches=4, model=Adversaries(kinds))[1].params

        assert same_params(params("onebit_ddp_find_unused_parameters_true"), params("ddp_find_unused_parameters_true"))

    run_trainers(world_size, fn)


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [(Adversaries, kinds) for kinds in MIXTURES]
    + [(Toggling, MIXTURES[0]), (WithClosure, MIXTURES[1]), (Clipping, MIXTURES[0])]
    + list(zip(BACKWARDS, MIXTURES, strict=False)),
)
def test_ranks_agree_bitwise_and_all_train(kind, kinds):
    def fn(rank):
        trainer, recorder = compress(kind(kinds))
        assert recorder.phases == [WARMUP] * (WARMUP_STEPS - 1) + [COMPRESSED] * (BATCHES - WARMUP_STEPS + 1)
        stats = trainer.strategy.comm_stats
        assert (stats[WARMUP].steps, stats[COMPRESSED].steps) == (2 * WARMUP_STEPS, 2 * (BATCHES - WARMUP_STEPS))
        for before, after in zip(recorder.params[-2], recorder.params[-1], strict=True):
            assert not torch.equal(before, after)
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_stale_gradients_of_the_other_optimizer_change_nothing():
    """Toggled or not, in a closure or not, an optimizer steps with the same gradients."""

    def fn(rank):
        plain, *variants = (compress(kind())[1].params for kind in (Adversaries, Toggling, WithClosure))
        assert all(same_params(params, plain) for params in variants)

    run_trainers(2, fn)


@pytest.mark.parametrize("kinds", MIXTURES[:2])
def test_several_backwards_before_a_step_equal_one(kinds):
    """Whether DDP synchronizes at each of them or not: in the compressed phase it has nothing to do with it."""

    def fn(rank):
        runs = [compress(kind(kinds), precision="64-true")[1] for kind in (Adversaries, *BACKWARDS)]
        for other in runs[1:]:
            for a, b in zip(runs[0].params[-1], other.params[-1], strict=True):
                assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)

    run_trainers(2, fn)


def test_steps_are_counted_per_optimizer_and_the_slowest_decides():
    def fn(rank):
        trainer, recorder = compress(Adversaries(critic_steps=3))
        assert recorder.phases.index(COMPRESSED) == WARMUP_STEPS - 1
        stats = trainer.strategy.comm_stats
        assert (stats[WARMUP].steps, stats[COMPRESSED].steps) == (4 * WARMUP_STEPS, 4 * (BATCHES - WARMUP_STEPS))
        assert trainer.strategy.optimizer_steps == BATCHES
        steps = [{float(state["step"]) for state in o.state_dict()["state"].values()} for o in trainer.optimizers]
        assert steps == [{3.0 * BATCHES}, {float(BATCHES)}]
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


@pytest.mark.parametrize(
    ("window", "freeze"),
    [
        (10, 30),  # all steps, that is 3, 6, ...; 24, 27, 30 are the first with two windows behind them
        (20, 48),
    ],
)
def test_a_criterion_sees_what_it_needs_when_a_batch_holds_several_steps(window, freeze):
    """Every step would do, but only every third can be observed here; history must reach as far back as it asks for."""

    class Easy(VarianceStability):
        def _judge_window(self, past, plan):
            assert past[0].step <= past[-1].step - 2 * plan.window + 3
            return Verdict(freeze=True, reason="")

    class Thrice(Adversaries):
        def update(self, optimizer, loss):
            for _ in range(3):
                super().update(optimizer, loss)

    def fn(rank):
        switch = PhaseSwitch(Easy(window=window, patience=3, min_steps=0, max_steps=None))
        strategy = OneBitDDPStrategy(find_unused_parameters=True, space="momentum")  # nothing is renewed there
        _, recorder = fit(strategy, 2, batches=freeze // 3 + 3, model=Thrice(), callbacks=[switch])
        assert recorder.phases.index(COMPRESSED) == freeze // 3 - 1

    run_trainers(2, fn)


def test_one_that_never_has_state_may_share_a_parameter_with_one_that_has():
    """SGD without momentum: that it has none is no loss, and no reason to go back to warm-up."""

    class Shared(Adversaries):
        def configure_optimizers(self):
            return adam(self.parameters()), torch.optim.SGD(self.generator.parameters(), lr=1e-3)

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                self.update(optimizer, lambda: self.discriminator_loss(batch[0], batch_idx))

    def fn(rank):
        trainer, recorder = fit(
            OneBitDDPStrategy(find_unused_parameters=True), 2, model=Shared(), callbacks=[PhaseSwitch(FixedStep(3))]
        )
        assert recorder.phases == [WARMUP] * 2 + [COMPRESSED] * 8
        assert [step for step, _ in trainer.strategy._phases.comparison.switches] == [3]
        return recorder.params

    assert same_params(*run_trainers(2, fn))


def test_steps_are_timed_by_the_first_optimizer_and_a_new_run_has_none():
    steps = OptimizerSteps({}, None, PhaseCounters())
    first, second = (sgd([nn.Parameter(torch.zeros(1))]) for _ in range(2))
    for optimizer in (first, second):
        steps.add(optimizer, Precision(), can_be_compressed=False)
    for optimizer in (first, second) * 3:
        with steps.step(optimizer):
            pass
    assert [len(steps.ends[phase]) for phase in Phase] == [len(steps.waits[phase]) for phase in Phase] == [3, 0]
    steps.forget()
    assert not any(steps.ends[phase] or steps.waits[phase] for phase in Phase)


class EveryOther(Criterion):
    def __init__(self):
        self.seen = []

    def plan(self, *, total_steps, beta2, refresh="auto"):
        return Plan(every=2, history=10)

    def judge(self, history, plan):
        self.seen.append((history[-1].step, set(history[-1].ratios)))
        return Verdict(freeze=False, reason="")


def test_a_criterion_sees_the_last_step_of_all_optimizers():
    """Steps are those of the slowest: the first one's is looked at before it is counted."""
    module = nn.ParameterDict({name: torch.ones(300) for name in "ab"})
    optimizers = [adam([p]) for p in module.values()]

    class Strategy(SimpleNamespace):
        @property
        def optimizer_steps(self):
            return min(int(optimizer.state[p]["step"]) if optimizer.state else 0 for optimizer, p in self.pairs)

    strategy = Strategy(
        pairs=list(zip(optimizers, module.values(), strict=True)),
        compressed_optimizers=optimizers,
        config=CompressionConfig(),
        phase=WARMUP,
        world_size=2,
        is_global_zero=True,
        rounds_coarsely=False,
        warmup_start=0,
        broadcast_decision=bool,
    )
    switch = PhaseSwitch(EveryOther())
    switch.start(strategy, total_steps=100, silent=True)
    for _ in range(6):
        for optimizer, p in strategy.pairs:
            p.grad = torch.ones_like(p)
            optimizer.step()
        switch.after_step(strategy, module)
    assert switch.criterion.seen == [(step, {"a", "b"}) for step in (2, 4, 6)]


def test_a_run_limited_by_max_steps_is_shared_by_its_optimizers():
    """Lightning counts the steps of all optimizers: here each makes half of them, and 30% of those are warm-up."""

    def fn(rank):
        switch = PhaseSwitch(VarianceStability(min_steps=0.3, max_steps=0.3))
        strategy = OneBitDDPStrategy(find_unused_parameters=True)
        model, options = Adversaries(), {"max_epochs": None, "max_steps": 40}
        _, recorder = fit(strategy, 2, batches=100, model=model, callbacks=[switch], **options)
        assert recorder.phases == [WARMUP] * 5 + [COMPRESSED] * 15

    run_trainers(2, fn)


def test_freezing_before_every_optimizer_has_stepped_is_explained():
    class CriticFirst(Adversaries):
        def training_step(self, batch, batch_idx):
            self.update(self.optimizers()[0], lambda: self.discriminator_loss(batch[0], batch_idx))

    class TooEarly(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            with pytest.raises(RuntimeError, match="before the first optimizer step of AdamW: "):
                trainer.strategy.freeze_variance()

    def fn(rank):
        with Messages() as messages:
            compress(CriticFirst(), callbacks=[TooEarly()])
        assert rank or messages.count("never compressed anything: after 0 optimizer steps") == 1

    run_trainers(2, fn)


def test_a_gradient_that_waits_when_the_warmup_resumes_becomes_the_mean():
    """As DDP would have left it: the next step may come without another backward."""

    class StepFirst(Adversaries):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()[0]
            if batch_idx:
                optimizer.step()
                optimizer.zero_grad()
            self.manual_backward(self.discriminator_loss(batch[0], batch_idx))

    class ByHand(PhaseSwitch):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx in (3, 9):
                trainer.strategy.freeze_variance()
            if batch_idx == 6:
                local = pl_module.discriminator[0].weight.grad.clone()
                trainer.strategy.resume_warmup()
                mean = Communicator()
                mean.all_reduce_mean_(local)
                assert torch.equal(pl_module.discriminator[0].weight.grad, local)

    def fn(rank):
        model = StepFirst()
        model.configure_optimizers = lambda: adam(model.parameters())
        model.optimizers = lambda: [pl.LightningModule.optimizers(model)]
        strategy = OneBitDDPStrategy(find_unused_parameters=True)
        return fit(strategy, 2, batches=BATCHES, model=model, callbacks=[ByHand(FixedStep(1))])[1].params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


# Some dense


@pytest.mark.parametrize(
    ("kinds", "ddp_options"),
    [
        ((adam, rmsprop), {}),
        ((adamw, amsgrad), {"bucket_cap_mb": 0.0005}),
        ((adam, rmsprop), {"gradient_as_bucket_view": True}),
    ],
)
def test_the_dense_optimizer_trains_bitwise_as_under_ddp(kinds, ddp_options):
    """Beside a compressed one, in the same buckets."""

    def fn(rank):
        options = {"find_unused_parameters": True, **ddp_options}
        model = Apart(kinds)
        recorder = compress(model, strategy=OneBitDDPStrategy(block_size=16, **options))[1]
        dense_model = Apart(kinds)
        dense = fit(pl.strategies.DDPStrategy(**options), 2, batches=BATCHES, model=dense_model)[1]
        assert recorder.phases[-1] is COMPRESSED
        assert same_params(others(recorder, model), others(dense, dense_model))
        assert not torch.equal(recorder.params[-1][0], dense.params[-1][0])
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_a_bucket_is_averaged_but_for_what_stays_local():
    """By the hook alone: three ranks, one bucket; integers, so that no rounding hides a mistake."""

    class Bucket:
        def __init__(self, rank):
            self.params = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (), (0,), (4,))]
            self.whole = torch.arange(11.0) * (rank + 1) * 3

        def buffer(self):
            return self.whole

        def index(self):
            return 0

        def parameters(self):
            return self.params

        def gradients(self):
            parts = self.whole.split([p.numel() for p in self.params])
            return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]

    def fn(rank):
        for local_indices in ([], [0], [1, 3], [0, 1, 2, 3]):
            bucket, state = Bucket(rank), HookState(Communicator())
            state.local = {bucket.params[i] for i in local_indices}
            own, mean = bucket.whole.clone(), torch.arange(11.0) * 6
            averaged = phase_hook(state, bucket).wait()
            assert averaged.data_ptr() == bucket.whole.data_ptr()
            for i, (a, b, c) in enumerate(zip(*(x.split([6, 1, 0, 4]) for x in (averaged, own, mean)), strict=True)):
                assert torch.equal(a, b if i in local_indices else c)
            dense = sum(bucket.params[i].numel() for i in range(4) if i not in local_indices)
            # 2 (n - 1) / n of four bytes each, rounded down in each of the two summands
            assert state.communicator.counters.bytes_sent == 16 * dense // 3
            assert abs(state.communicator.counters.dense_equivalent_bytes - 16 * 11 // 3) <= 1

    run_ranks(3, fn)


def test_dense_equivalent_bytes_are_not_disturbed_by_exchanges_that_go_on_meanwhile():
    """They are counted by the same counters, in another thread."""

    class Busy(Communicator):
        def all_reduce_mean_future(self, tensor, *, dtype=None):
            self._count(10**6, seconds=0.0)  # the other thread
            return completed_future(tensor)

    class Bucket:
        params = (nn.Parameter(torch.zeros(600)), nn.Parameter(torch.zeros(30)))
        whole = torch.zeros(630)
        buffer, index, parameters = lambda self: self.whole, lambda self: 0, lambda self: self.params
        gradients = lambda self: self.whole.split([600, 30])  # noqa: E731

    for local in ([], [0], [1], [0, 1]):
        communicator = Busy()
        communicator.world_size = 3
        state = HookState(communicator)
        state.local = {Bucket.params[i] for i in local}
        phase_hook(state, Bucket())
        assert communicator.counters.dense_equivalent_bytes == 2 * 2 * 4 * 630 // 3


def test_it_is_said_once_what_stays_dense_and_why():
    def fn(rank):
        with Messages() as messages:
            compress(Apart((adam, rmsprop)))
        if rank == 0:
            assert messages.count("are never compressed") == 1
            assert messages.count("The gradients of RMSprop, for 293 parameters (34% of the bytes of all gradients)") == 1
            said = "torch.optim.rmsprop.RMSprop cannot be compressed: a compressed step"
            assert messages.count(said) == 1
        with Messages() as messages:
            compress(Adversaries((amsgrad, adam)))
        assert rank or messages.count("The gradients of Adam, for 225 parameters") == 1
        assert rank or messages.count("Use amsgrad=False") == 1
        with Messages() as messages:
            compress(Adversaries())
        assert messages.count("are never compressed") == 0

    run_trainers(2, fn)


@pytest.mark.parametrize(
    ("kinds", "message"), [((rmsprop, rmsprop), "RMSprop cannot be compressed"), ((amsgrad, rmsprop), "amsgrad=False")]
)
def test_without_any_optimizer_to_compress_it_is_an_error_before_training(kinds, message):
    class NoBatch(pl.Callback):
        def on_train_start(self, *_):
            raise AssertionError("training has started")

    def fn(rank):
        with pytest.raises(ValueError, match=message):
            compress(Adversaries(kinds), callbacks=[NoBatch()])

    run_trainers(2, fn)


def test_bytes_are_those_of_ddp_for_the_dense_part_and_few_for_the_rest():
    """DDP sends all buckets at every backward, of which there are two in a batch."""

    class Wide(Apart):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(FEATURES, 1024), nn.Tanh(), nn.Linear(1024, 16))

    def fn(rank):
        model = Wide()
        strategy = OneBitDDPStrategy(find_unused_parameters=True)
        stats = compress(model, strategy=strategy)[0].strategy.comm_stats
        dense = sum(p.numel() for p in model.other.parameters())
        compressed = sum(p.numel() for p in model.parameters()) - dense
        steps = BATCHES - WARMUP_STEPS
        assert stats[COMPRESSED].dense_equivalent_bytes == steps * 2 * 4 * (dense + compressed)
        beside = stats[COMPRESSED].refresh_bytes_sent + stats[COMPRESSED].sketch_bytes_sent
        for_signs = stats[COMPRESSED].bytes_sent - beside - steps * 2 * 4 * dense
        assert compressed / 8 < for_signs / steps < compressed / 7
        assert stats[WARMUP].dense_equivalent_bytes == WARMUP_STEPS * 2 * 4 * (dense + compressed)

    run_trainers(2, fn)


def test_parameters_in_no_optimizer_are_averaged_as_under_ddp_and_it_is_said():
    """Somebody may use their gradients; so it is left to the user to say that nobody does."""

    class Orphans(Classifier):
        def __init__(self):
            super().__init__(lambda m: adam(m.body.parameters()))

        def on_after_backward(self):
            self.gradient = self.head.weight.grad.clone()

    def fn(rank):
        model = Orphans()
        with Messages() as messages:
            trainer = compress(model)[0]
        assert trainer.strategy.phase is COMPRESSED
        if rank == 0:
            assert (
                messages.count("The gradients of 85 parameters (15% of the bytes of all gradients) are never compressed")
                == 1
            )
            assert messages.count("no optimizer has them: 'head.weight', 'head.bias'. HINT") == 1
        return model.gradient, model.body[0].weight.grad

    (first, first_local), (second, second_local) = run_trainers(2, fn)
    assert torch.equal(first, second)
    assert not torch.equal(first_local, second_local)


def test_parameters_in_no_optimizer_do_not_hold_up_exchanges_during_backward():
    def fn(rank):
        def params(overlap):
            strategy = OneBitDDPStrategy(block_size=16, bucket_cap_mb=0.0005, overlap=overlap)
            return compress(Classifier(lambda m: adam(m.body.parameters())), strategy=strategy)[1].params

        assert same_params(params(True), params(False))

    run_trainers(2, fn)


def test_a_parameter_of_a_dense_and_a_compressed_optimizer_is_averaged():
    class Shared(Apart):
        def configure_optimizers(self):
            return [adam(self.parameters()), rmsprop(self.other.parameters())], []

    def fn(rank):
        trainer, recorder = compress(Shared())
        assert trainer.strategy.phase is COMPRESSED
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


@needs_complex_gloo
def test_complex_parameters_may_have_a_dense_optimizer():
    class Complex(Apart):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(FEATURES, CLASSES, dtype=torch.complex64)

        def loss_of(self, network, batch):
            x, y = batch
            if network is self.other:
                return F.cross_entropy(network(x.to(torch.complex64)).abs(), y)
            return super().loss_of(network, batch)

    def fn(rank):
        model, dense_model = Complex(), Complex()
        recorder = compress(model)[1]
        dense = fit("ddp_find_unused_parameters_true", 2, batches=BATCHES, model=dense_model)[1]
        assert recorder.phases[-1] is COMPRESSED
        assert same_params(others(recorder, model), others(dense, dense_model))

    run_trainers(2, fn)


def test_the_criterion_sees_the_compressed_optimizers_only():
    seen = set()

    class Watching(PhaseSwitch):
        def _judge(self, now, **kwargs):
            seen.update(name.split(".")[0] for name in now.ratios)
            return super()._judge(now, **kwargs)

    def fn(rank):
        switch = Watching(VarianceStability(min_steps=3, max_steps=3))
        strategy = OneBitDDPStrategy(find_unused_parameters=True)
        fit(strategy, 2, batches=4, model=Adversaries((amsgrad, adam)), callbacks=[switch])
        assert rank or (switch.verdict.freeze and seen == {"generator"})

    run_trainers(2, fn)


def test_an_exchanged_optimizer_is_an_error():
    """Its gradients would be local ones, and nobody would know."""

    class Swap(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 7:
                trainer.strategy.optimizers = [adam(pl_module.parameters())]

    def fn(rank):
        with pytest.raises(RuntimeError, match=r"\(Adam\) is not one of those that this run began with.*HINT"):
            compress(Classifier(), callbacks=[Swap()])

    run_trainers(2, fn)


def test_one_process_says_one_thing():
    def fn(rank):
        with Messages() as messages:
            compress(Apart(), world_size=1)
        assert messages.count("runs with one process") == 1
        assert messages.count("are never compressed") == 0

    run_trainers(1, fn)


# Checkpoints


def test_checkpoint_of_a_mixture(tmp_path):
    path = tmp_path / "mixture.ckpt"

    class Stepwise(Apart):
        """Data by step: Lightning does not fast-forward a loader when it resumes within an epoch."""

        def training_step(self, batch, batch_idx):
            generator = torch.Generator().manual_seed(1000 * self.global_rank + self.trainer.global_step)
            x = torch.randn(8, FEATURES, generator=generator)
            super().training_step((x, x.argmax(1) % CLASSES), batch_idx)

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 7:
                trainer.save_checkpoint(path)

    def fn(rank):
        model, resumed_model = Stepwise(), Stepwise()
        full = compress(model, callbacks=[Save()])[1]
        state = torch.load(path, weights_only=True)
        assert len(state[CHECKPOINT_KEY]["optimizers"]) == 1
        assert set(state["optimizer_states"][1]["state"][0]) == {"step", "square_avg", "momentum_buffer"}
        trainer, resumed = compress(resumed_model, ckpt_path=path)
        assert set(resumed.phases) == {COMPRESSED}
        assert trainer.strategy.optimizer_steps == BATCHES
        assert same_params(resumed.params, full.params[8:])
        fit("ddp_find_unused_parameters_true", 2, batches=BATCHES, model=Stepwise(), ckpt_path=path)
        return resumed.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_a_checkpoint_with_another_number_of_compressed_optimizers_is_refused(tmp_path):
    path = tmp_path / "mixture.ckpt"

    def fn(rank):
        trainer = compress(Adversaries((adam, adam)))[0]
        trainer.save_checkpoint(path)
        if rank == 0:  # alone: nobody may read while it writes
            state = torch.load(path, weights_only=True)
            state[CHECKPOINT_KEY]["optimizers"].pop()
            torch.save(state, path)
        torch.distributed.barrier()
        with pytest.raises(ValueError, match=r"written with 1 compressed optimizers, but there are 2 now\. HINT"):
            compress(Adversaries((adam, adam)), ckpt_path=path, max_epochs=2)

    run_trainers(2, fn)
