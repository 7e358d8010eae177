"""Exchanges during backward: the same bits as after it, and only where that is certain."""

import math
import random
import re
import time
import warnings

import lightning.pytorch as pl
import pytest
import torch
from ranks import run_ranks, run_trainers
from test_engine import WARMUP_STEPS, compressed_steps, freeze, gradient, make_optimizer, params_of, warm_up
from thread_ranks import ThreadCommunicator, exchange_groups, run_threads
from torch import nn
from torch.nn import functional as F
from trainers import Classifier, adam, fit, make_trainer, same_params

from lightning_onebit import FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch
from lightning_onebit.comm.exchanger import ThreadExchanger
from lightning_onebit.comm.groups import new_groups
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.topology import Topology
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine import buckets as engine_buckets
from lightning_onebit.engine import optimizer as engine_optimizer
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.quantize.reference import ReferenceKernels

STEPS = 14


def every_gradient(rank, step, index, shape, dtype=torch.float64):
    return gradient(rank, step, index, shape, dtype)


def some_missing(rank, step, index, shape, dtype=torch.float64):
    """One parameter has no gradient anywhere in some steps, another on one rank."""
    if step >= WARMUP_STEPS and ((index == 1 and step % 3 == 0) or (index == 2 and (step + rank) % 2 == 0)):
        return None
    return gradient(rank, step, index, shape, dtype)


def some_not_finite(rank, step, index, shape, dtype=torch.float64):
    g = gradient(rank, step, index, shape, dtype)
    if (step, index) in [(12, 0), (13, 3), (20, 2)] and rank == step % 2:
        g.view(-1)[-1] = math.nan if step == 13 else math.inf
    return g


def some_late(rank, step, index, shape, dtype=torch.float64):
    """Rows without gradient until after the freeze, when they get one on one rank first."""
    g = gradient(rank, step, index, shape, dtype)
    if index == 0:
        g[20:30] = 0
        if step < WARMUP_STEPS + 5 + 3 * rank:
            g[5:9] = 0
    return g


def groups_of(communicator):
    """Process groups that the exchanger's thread has for itself."""
    if isinstance(communicator, ThreadCommunicator):
        return exchange_groups(communicator)
    return new_groups(Topology(num_nodes=communicator.world_size, node_rank=communicator.rank), None)


def train(communicator, overlap, gradient, kind=torch.optim.AdamW, optimizer_options=None, **config):
    """Everything that a run leaves behind, after each step."""
    optimizer = make_optimizer(kind, torch.float32, **(optimizer_options or {}))
    warm_up(optimizer, WARMUP_STEPS, 2, gradient)
    rank, exchanger = communicator.rank, ThreadExchanger()
    compressed = CompressedOptimizer(
        optimizer,
        CompressionConfig(**config),
        communicator,
        {},
        groups=groups_of(communicator),
        exchanger=exchanger,
        overlap=overlap,
    )
    # Ranks see gradients become ready in different orders and portions, and of some they never hear.
    order = random.Random(rank)
    history = []
    for step in range(WARMUP_STEPS, WARMUP_STEPS + STEPS):
        params = params_of(optimizer)
        for index, p in enumerate(params):
            p.grad = gradient(rank, step, index, p.shape, p.dtype)
        announced = order.sample(params, order.randrange(len(params) + 1))
        for p in announced:
            compressed.gradients_ready([p])
        stepped = compressed.step()
        state = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
        history.append(
            [torch.tensor(stepped), *(p.detach().clone() for p in params), *state, *compressed.state.outstanding().values()]
        )
    exchanger.close()
    return history


@pytest.mark.parametrize(
    "options",
    [{"variance_refresh": None}, {"variance_refresh": "auto"}, {"space": "momentum"}],
    ids=["frozen", "renewed", "m"],
)
@pytest.mark.parametrize("gradient", [every_gradient, some_missing, some_not_finite, some_late])
@pytest.mark.parametrize("bucket_cap_mb", [0.0005, None])
def test_overlapped_equals_deferred_bitwise(options, gradient, bucket_cap_mb):
    def fn(communicator):
        deferred, overlapped = (
            train(communicator, overlap, gradient, bucket_cap_mb=bucket_cap_mb, block_size=16, **options)
            for overlap in (False, True)
        )
        assert same_params(overlapped, deferred)
        return sum(not stepped for stepped, *_ in overlapped)

    skipped = run_threads(2, fn)
    assert skipped == [3 if gradient is some_not_finite else 0] * 2


def test_on_gloo_overlapped_equals_deferred_bitwise():
    def fn(rank):
        runs = (
            train(Communicator(), overlap, some_missing, block_size=16, bucket_cap_mb=0.001) for overlap in (False, True)
        )
        assert same_params(*runs)

    run_ranks(2, fn)


@pytest.mark.parametrize("options", [{"maximize": True}, {"weight_decay": 0.1}])
def test_coupled_decay_and_maximize_overlap_too(options):
    def fn(communicator):
        runs = (train(communicator, overlap, every_gradient, torch.optim.Adam, options) for overlap in (False, True))
        assert same_params(*runs)

    run_threads(2, fn)


def test_a_step_that_is_taken_back_leaves_all_state_untouched():
    def fn(rank):
        optimizer = make_optimizer(torch.optim.Adam, torch.float32)
        warm_up(optimizer, WARMUP_STEPS, 2)
        compressed = CompressedOptimizer(optimizer, CompressionConfig(block_size=16), Communicator(), {}, overlap=True)
        list(compressed_steps(optimizer, compressed, rank, range(10, 15)))

        def state():
            memories = [memory for each in compressed._sets for memory in each.buckets.memories]
            coded = [t for m in memories for t in (m.rms_code, m.rms_scale, m.second_moment, m.second_moment_residual)]
            tensors = [*coded, *(t for m in memories for t in (m.error, m.server_error, m.result))]
            stock = [t for entry in optimizer.state_dict()["state"].values() for t in entry.values()]
            return [t.detach().clone() for t in (*params_of(optimizer), *tensors, *stock)]

        before = state()
        for index, p in enumerate(params_of(optimizer)):
            p.grad = gradient(rank, 15, index, p.shape, p.dtype)
        if rank == 1:
            params_of(optimizer)[0].grad.view(-1)[3] = math.inf
        compressed.gradients_ready(params_of(optimizer))
        assert not compressed.step()
        assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))

    run_ranks(2, fn)


def test_a_second_backward_before_the_step_is_an_error():
    optimizer = make_optimizer(torch.optim.Adam, torch.float32)

    def fn(rank):
        warm_up(optimizer, WARMUP_STEPS, 2)
        names = {p: f"layer {index}" for index, p in enumerate(params_of(optimizer))}
        compressed = CompressedOptimizer(optimizer, CompressionConfig(), Communicator(), names, overlap=True)
        list(compressed_steps(optimizer, compressed, rank, range(10, 12)))
        last = params_of(optimizer)[-1:]
        compressed.gradients_ready(last)
        with pytest.raises(RuntimeError, match=r"gradient of 'layer 3' came a second time.*overlap=False"):
            compressed.gradients_ready(last)

    run_ranks(2, fn)


def test_without_overlap_announcements_are_ignored():
    def fn(rank):
        optimizer = make_optimizer(torch.optim.Adam, torch.float32)
        warm_up(optimizer, WARMUP_STEPS, 1)
        compressed = freeze(optimizer)
        for _ in range(2):
            compressed.gradients_ready(params_of(optimizer))

    run_ranks(1, fn)


# ---- with a Trainer


class Sometimes(Classifier):
    """One layer is never used, and one only in every other batch, differently on each rank."""

    def __init__(self):
        super().__init__()
        self.never = nn.Linear(3, 3)
        self.sometimes = nn.Linear(12, 5)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.head(self.body(x))
        if (batch_idx + self.global_rank) % 2 == 0 and batch_idx % 3:
            logits = logits + self.sometimes(x)
        return F.cross_entropy(logits, y)


class Words(pl.LightningModule):
    """An embedding with rows that come late, tied to the output, in two precisions' worth of layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 12)
        self.body = nn.GRU(12, 12, batch_first=True)

    def training_step(self, batch, batch_idx):
        x, y = batch
        words = (x * 4).round().long().clamp(0, 9) + (20 if batch_idx > 12 else 0)
        hidden, _ = self.body(self.embedding(words))
        return F.cross_entropy(F.linear(hidden[:, -1], self.embedding.weight), y)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def with_parameters_of_two_dtypes():
    model = Classifier()
    model.head.double()
    forward = model.head.forward
    model.head.forward = lambda x: forward(x.double())
    return model


@pytest.mark.parametrize(
    ("make_model", "options", "trainer_options"),
    [
        (Classifier, {"block_size": 16, "bucket_cap_mb": 0.001}, {}),
        (Classifier, {"block_size": 16, "bucket_cap_mb": 0.0005, "gradient_as_bucket_view": True}, {}),
        (Classifier, {"block_size": 16, "bucket_cap_mb": 0.001, "static_graph": True}, {}),
        (Classifier, {"block_size": 16, "bucket_cap_mb": 0.001}, {"accumulate_grad_batches": 2}),
        (Classifier, {"space": "momentum", "scale": "l1"}, {"precision": "bf16-mixed"}),
        (Classifier, {"block_size": 16, "bucket_cap_mb": 0.001}, {"precision": "bf16-true"}),
        (with_parameters_of_two_dtypes, {"block_size": 16, "bucket_cap_mb": 0.001}, {}),
        (Sometimes, {"block_size": 16, "bucket_cap_mb": 0.001, "find_unused_parameters": True}, {}),
        (Sometimes, {"gradient_as_bucket_view": True, "find_unused_parameters": True}, {}),
        (Words, {"block_size": 16, "bucket_cap_mb": 0.001}, {}),
    ],
)
def test_overlapped_training_equals_deferred_bitwise(make_model, options, trainer_options):
    def fn(rank):
        def run(overlap):
            strategy = OneBitDDPStrategy(overlap=overlap, **options)
            switch = PhaseSwitch(FixedStep(4))
            trainer, recorder = fit(strategy, 2, batches=22, model=make_model(), callbacks=[switch], **trainer_options)
            assert recorder.phases[-1] is Phase.COMPRESSED
            assert trainer.strategy._phases.overlaps is overlap
            return recorder.params

        assert same_params(run(True), run(False))

    run_trainers(2, fn)


def test_the_first_bucket_is_sent_before_backward_ends():
    """DDP's first bucket holds a MiB: the layers behind the slow one fill it."""

    def fn(rank):
        events = []
        exchange = engine_optimizer.exchange_

        def noting(*args, **kwargs):
            events.append("sent")
            exchange(*args, **kwargs)

        engine_optimizer.exchange_ = noting

        class Slow(torch.autograd.Function):
            """Before the first layer's gradient, long enough for the exchanger's thread to begin."""

            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                time.sleep(0.05)
                events.append("first layer")
                return grad

        class Model(Classifier):
            def training_step(self, batch, batch_idx):
                x, y = batch
                hidden = Slow.apply(self.body[0](x))
                return F.cross_entropy(self.head(self.body[1:](hidden)), y)

        events_of = {}
        for overlap in (False, True):
            events.clear()
            strategy = OneBitDDPStrategy(overlap=overlap, bucket_cap_mb=0.5)
            fit(strategy, 2, batches=8, model=Model(hidden=600), callbacks=[PhaseSwitch(FixedStep(4))])
            first = len(events) - 1 - events[::-1].index("first layer")
            events_of[overlap] = sum(event == "sent" for event in events[:first])
            sent_after = sum(event == "sent" for event in events[first:])
            assert sent_after > 0
        return events_of[True] - events_of[False]

    assert all(earlier > 0 for earlier in run_trainers(2, fn))


# ---- when it is chosen


class Watching(pl.Callback):
    def on_after_backward(self, trainer, pl_module):
        pass


class WithHook(Classifier):
    def on_before_optimizer_step(self, optimizer):
        pass


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def with_step_hook(module):
    optimizer = adam(module)
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gradient_clip_val": 1.0}, "gradient_clip_val=1.0"),
        ({"callbacks": [Watching()]}, r"Watching\.on_after_backward"),
        ({"model": WithHook()}, r"WithHook\.on_before_optimizer_step"),
        ({"model": Manual()}, "manual optimization"),
        ({"configure": with_step_hook}, "step hook"),
    ],
)
def test_overlap_is_refused_where_gradients_may_change_and_auto_does_without(options, reason):
    def fn(rank):
        callbacks = [PhaseSwitch(FixedStep(2)), *options.get("callbacks", ())]
        options_of_run = {**options, "callbacks": callbacks, "batches": 4}
        with pytest.raises(ValueError, match=f"overlap=True is not possible: .*{reason}.*HINT"):
            fit(OneBitDDPStrategy(overlap=True), 2, **options_of_run)
        trainer, recorder = fit(OneBitDDPStrategy(), 2, **options_of_run)
        assert recorder.phases[-1] is Phase.COMPRESSED
        assert not trainer.strategy._phases.overlaps

    run_trainers(2, fn)


def test_the_choice_is_said_once_with_its_reason(caplog):
    def fn(rank):
        caplog.clear()
        with caplog.at_level("INFO"):
            fit(OneBitDDPStrategy(), 2, batches=6, callbacks=[PhaseSwitch(FixedStep(2))], gradient_clip_val=0.5)
        return [record.message for record in caplog.records if "overlap=" in record.message]

    (first, second) = run_trainers(2, fn)
    assert len(first) == 1
    assert "in the optimizer step, as gradient_clip_val=0.5" in first[0]
    assert second == []


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("rank_to_fail", "step_to_fail", "bucket_to_fail"), [(0, 0, 0), (1, 2, 1), (1, 3, 2)])
def test_an_exception_in_an_exchange_ends_every_rank_with_the_cause(overlap, rank_to_fail, step_to_fail, bucket_to_fail):
    def fn(rank):
        exchange, calls, buckets = engine_optimizer.exchange_, {}, []

        def failing(memory, groups, *args, **kwargs):
            if memory not in buckets:
                buckets.append(memory)
            step = calls[memory] = calls.get(memory, -1) + 1
            here = (groups.topology.rank, step, buckets.index(memory))
            if here == (rank_to_fail, step_to_fail, bucket_to_fail):
                raise OSError("injected")
            exchange(memory, groups, *args, **kwargs)

        engine_optimizer.exchange_ = failing
        started = time.monotonic()
        message = "injected" if rank == rank_to_fail else "A compressed exchange failed|Connection closed|Connection reset"
        strategy = OneBitDDPStrategy(block_size=16, bucket_cap_mb=0.001, overlap=overlap)
        with pytest.raises(RuntimeError, match=message):
            fit(strategy, 2, batches=30, callbacks=[PhaseSwitch(FixedStep(3))])
        assert time.monotonic() - started < 30

    run_trainers(2, fn)


def test_the_kernels_in_use_are_said(caplog, monkeypatch):
    def fn(rank, kernels):
        if kernels == "reference":
            monkeypatch.setattr(engine_buckets, "make_kernels", lambda config, **_: ReferenceKernels(scale=config.scale))
        caplog.clear()
        with caplog.at_level("INFO"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(OneBitDDPStrategy(), 2, batches=4, callbacks=[PhaseSwitch(FixedStep(2))])
        slow = [w for w in caught if "no fast kernels for this device" in str(w.message)]
        return [r.message for r in caplog.records if "compressing with the kernels" in r.message], len(slow)

    fast, slow = (run_trainers(2, fn, kernels)[0] for kernels in ("cpu", "reference"))
    for (said, warnings_of_slowness), name, slow_ones in ((fast, "cpu", 0), (slow, "reference", 1)):
        assert warnings_of_slowness == slow_ones
        assert len(said) == 1
        assert re.fullmatch(
            rf".*: compressing with the kernels '{name}': a step sends about \d+\.\d times fewer .*", said[0]
        )


def test_one_process_and_unknown_values():
    trainer = make_trainer(OneBitDDPStrategy(overlap=True), 1)
    assert trainer.strategy.overlap is True
    with pytest.raises(ValueError, match=r"Invalid overlap: 1\.5"):
        OneBitDDPStrategy(overlap=1.5)
