"""Gradients that are infinite, NaN or huge: all ranks skip together and nothing is touched, or nothing overflows.

Injected into steps that are otherwise sound; the yardstick is a run in which the injected steps did not happen, bit for bit.
"""

import math
import re

import lightning.pytorch as pl
import pytest
import torch
from nodes import freeze, on_nodes, take_step, warmed_up
from ranks import run_ranks, run_trainers
from test_fabric import Loop
from test_fabric import ours as fabric_strategy
from test_precision import ScaledFloat32, mixed16
from test_strategy import Messages
from torch import nn
from torch.nn import functional as F
from trainers import BATCH_SIZE, CLASSES, FEATURES, Classifier, fit, same_params

from lightning_onebit import (
    ErrorFeedback,
    FixedStep,
    OneBitDDPFabricStrategy,
    OneBitDDPStrategy,
    Phase,
    PhaseSwitch,
    VarianceStability,
    compressed_all_reduce,
)
from lightning_onebit.coefficients import LARGEST_VALUE
from lightning_onebit.engine import optimizer as engine
from lightning_onebit.engine.clipping import NormSketch
from lightning_onebit.engine.nonfinite import SkippedSteps
from lightning_onebit.flat import all_within

WARMUP, COMPRESSED = Phase.WARMUP, Phase.COMPRESSED
WARMUP_STEPS = 10
SHAPES = [(37, 5), (130,), (12, 4), (3,)]
EMBEDDING, OFTEN_MISSING = 2, 3


def gradient(rank, step, index, shape, dtype=torch.float64):
    """Different everywhere. Rows 8 and up of the embedding never have one, rows 5 and 6 after step 12 on rank 1 only."""
    if index == OFTEN_MISSING and rank == 0 and step > 10:
        return None
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + 10 * rank + index), dtype=torch.float64)
    if index == EMBEDDING:
        g[8:] = 0
        if step <= 12 or rank != 1:
            g[5:7] = 0
    return g.to(dtype)


def poison_of(case):
    """A gradient like :func:`gradient`, spoiled."""

    def poisoned(rank, step, index, shape, dtype=torch.float64):
        g = gradient(rank, step + 500, index, shape, dtype)
        value = {
            "inf on one rank": math.inf if (rank, index) == (1, 0) else None,
            "NaN on all ranks": math.nan,
            "in one block": -math.inf if (rank, index) == (0, 1) else None,
            "beside a missing one": math.nan if (rank, index) == (1, OFTEN_MISSING) else None,
            "in a dead row": math.nan if (rank, index) == (1, EMBEDDING) else None,
        }[case]
        if value is not None and g is not None:
            place = slice(None) if case == "NaN on all ranks" else -1
            g.view(-1)[place] = value
        return g

    return poisoned


def expected_culprits(case, world_size):
    """By parameter the ranks where it is spoiled."""
    everybody = list(range(world_size))
    return {
        "inf on one rank": {0: [1]},
        "NaN on all ranks": {0: everybody, 1: everybody, 2: everybody, 3: everybody[1:]},
        "in one block": {1: [0]},
        "beside a missing one": {OFTEN_MISSING: [1]},
        "in a dead row": {EMBEDDING: [1]},
    }[case]


# After which steps what is injected: consecutive ones as well, right after the freeze, before and after rows take part.
INJECTED = {
    10: ["inf on one rank"],
    13: ["NaN on all ranks", "in a dead row", "in one block"],
    16: ["beside a missing one"],
}


def everything(optimizer, compressed):
    """Copies of all that a step may change, by name."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {f"parameter {i}": p for i, p in enumerate(params)}
    for i, each in enumerate(compressed._sets):
        tensors[f"steps {i}"] = torch.from_numpy(each.buckets.steps)
        for j, memory in enumerate(each.buckets.memories):
            buffers = {
                name: getattr(memory, name) for name in ("error", "server_error", "rms", "result", "live", "live_before")
            }
            late = each.late[j]
            buffers |= {"late": late.places, "late since": late.live_since, "late second moment": late.second_moment}
            for name, buffer in buffers.items():
                tensors[f"{name} of bucket {i}, {j}"] = torch.empty(0) if buffer is None else buffer
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_untouched(now, before):
    changed = [name for name in before if not torch.equal(now[name], before[name])]
    assert not changed
    assert now.keys() == before.keys()


def train(groups, *, inject, overlap, dtype=torch.float32, **config):
    """Everything at the end of a run of 12 steps that count."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    params = [nn.Parameter(torch.linspace(-1, 1, math.prod(shape)).view(shape).to(dtype)) for shape in SHAPES]
    engine.REFRESH_STEPS = 8  # rows 5 and 6 take part from step 17 on
    optimizer = warmed_up(torch.optim.AdamW(params, lr=1e-2), world_size, gradient, steps=WARMUP_STEPS)
    compressed = freeze(optimizer, groups, overlap=overlap, bucket_cap_mb=0.0005, **config)
    for step in range(10, 22):
        assert take_step(optimizer, compressed, rank, step, gradient, overlap=overlap)
        before = everything(optimizer, compressed)
        for case in INJECTED.get(step, []) if inject else []:
            assert not take_step(optimizer, compressed, rank, step, poison_of(case), overlap=overlap)
            assert_untouched(everything(optimizer, compressed), before)
            found = compressed.agreement.nonfinite_gradients()
            culprits = {index: ranks for index, p in enumerate(params) if (ranks := found.get(p))}
            assert culprits == expected_culprits(case, world_size)
            compressed.agreement.forget_nonfinite()
    after = everything(optimizer, compressed)
    assert all(tensor.isfinite().all() for tensor in after.values() if tensor.is_floating_point())
    return after


@pytest.mark.parametrize(
    ("nodes", "configs"),
    [
        ((2, 1), [{}, {"space": "momentum"}, {"dtype": torch.bfloat16}, {"dtype": torch.float64}]),
        ((3, 1), [{"space": "momentum"}]),
        ((2, 2), [{}, {"space": "momentum"}]),
    ],
)
def test_skipped_steps_touch_no_buffer_and_the_run_is_the_one_without_them(nodes, configs):
    def fn(groups):
        for config in configs:
            for overlap in (False, True):
                undisturbed = train(groups, inject=False, overlap=overlap, **config)
                assert_untouched(train(groups, inject=True, overlap=overlap, **config), undisturbed)

    on_nodes(nodes, fn)


# In a Trainer


class Scripted(Classifier):
    """Draws its own data: bad batches, whose loss is multiplied on some ranks, take nothing from the good ones."""

    def __init__(self, bad=(), ranks=(1,), factor=math.nan, **options):
        super().__init__(**options)
        self.bad, self.ranks, self.factor, self.drawn, self.batches = bad, ranks, factor, 0, 0

    def training_step(self, batch, batch_idx):
        self.batches += 1
        is_bad = batch_idx in self.bad
        seed = 10**6 * is_bad + 100 * (batch_idx if is_bad else self.drawn) + self.global_rank
        self.drawn += not is_bad
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(BATCH_SIZE, FEATURES, generator=generator).to(self.head.weight.dtype)
        y = torch.randint(CLASSES, (BATCH_SIZE,), generator=generator)
        loss = F.cross_entropy(self.head(self.body(x)), y)
        return loss * self.factor if is_bad and self.global_rank in self.ranks else loss


GOOD, BAD = 10, (6, 7, 8, 12)
RUNS = {
    "deferred": {"overlap": False},
    "overlapped": {"overlap": True},
    "momentum space": {"space": "momentum"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "16-mixed": {"plugins": ScaledFloat32},
    "clipped": {"gradient_clip_val": 0.05},
}


def scripted(world_size, name, model, *, batches, freeze_at=4, num_nodes=1, **more):
    options = dict(RUNS[name])
    own = {key: options.pop(key) for key in ("overlap", "space") if key in options} | more
    if "plugins" in options:
        options["plugins"] = [mixed16(ScaledFloat32, init_scale=2.0**20)]
    strategy = OneBitDDPStrategy(block_size=16, **own)
    callbacks = [PhaseSwitch(FixedStep(freeze_at))]
    return fit(strategy, world_size, batches=batches, model=model, callbacks=callbacks, num_nodes=num_nodes, **options)


@pytest.mark.parametrize(
    ("world_size", "num_nodes", "names"), [(2, 1, list(RUNS)), (3, 1, ["deferred"]), (4, 2, ["overlapped"])]
)
def test_a_run_with_bad_steps_is_the_run_in_which_they_did_not_happen(world_size, num_nodes, names):
    """A loss that is NaN on one rank, infinite on another, NaN on all; once, and three times in a row."""

    def fn(rank):
        finals = []
        for name in names:
            size = {"hidden": 128 if name == "clipped" else 16}  # the norm of a larger model is an estimate
            undisturbed = scripted(world_size, name, Scripted(**size), batches=GOOD, num_nodes=num_nodes)[1].params[-1]
            ways = [(math.nan, (1,)), (math.inf, (0,)), (math.nan, range(world_size))]
            for factor, ranks in ways if name in ("deferred", "overlapped") else ways[:1]:
                model = Scripted(BAD, ranks, factor, **size)
                with Messages() as messages:
                    trainer, recorder = scripted(world_size, name, model, batches=GOOD + len(BAD), num_nodes=num_nodes)
                assert recorder.phases[-1] is COMPRESSED
                assert same_params([recorder.params[-1]], [undisturbed])
                assert trainer.strategy.skipped_steps == len(BAD)
                assert trainer.strategy.optimizer_steps == GOOD
                if rank == 0:  # once per streak, and how long it was; a loss scaler is silent
                    scaled = name == "16-mixed"
                    assert messages.count("all ranks skip this step") == (0 if scaled else 2)
                    assert messages.count("training goes on after 3 skipped steps") == (0 if scaled else 1)
            finals.append(undisturbed)
        return finals

    outcomes = run_trainers(world_size, fn, num_nodes=num_nodes)
    assert all(same_params(outcome, outcomes[0]) for outcome in outcomes)


def test_in_warmup_all_is_as_under_ddp_and_the_freeze_is_refused_on_all_ranks():
    """NaN reaches all ranks with the average, and stays. Bit for bit, but for the bits of NaN, which mean nothing."""

    def fn(rank):
        for options in ({}, {"precision": "bf16-mixed"}):
            for factor in (math.nan, math.inf):

                def run(strategy, callbacks=(), options=options, factor=factor):
                    model = Scripted([3], [1], factor)
                    return fit(strategy, 2, batches=8, model=model, callbacks=callbacks, **options)[1].params

                for a, b in zip(run("ddp"), run("onebit_ddp", [PhaseSwitch(FixedStep(9))]), strict=True):
                    assert all(torch.equal(x.nan_to_num(0.1), y.nan_to_num(0.1)) for x, y in zip(a, b, strict=True))
                    assert all(torch.equal(x.isnan(), y.isnan()) for x, y in zip(a, b, strict=True))
                refused = (
                    r"Cannot freeze: the momentum or second moment of 'body.0.weight', .* and 3 more holds infinite or NaN"
                )
                with pytest.raises(ValueError, match=refused):
                    run("onebit_ddp", [PhaseSwitch(FixedStep(6))])

    run_trainers(2, fn)


def test_a_warmup_of_sgd_that_is_nan_is_refused_at_its_end():
    """Of its momentum: else the first compressed step ends, and says that its gradients should have been skipped."""

    def fn(rank):
        model = Scripted([3], [1])
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with pytest.raises(ValueError, match=r"Cannot freeze: the momentum or second moment of 'body\.0\.weight'"):
            fit("onebit_ddp", 2, batches=9, model=model, callbacks=[PhaseSwitch(FixedStep(6))])

    run_trainers(2, fn)


def test_a_warmup_that_is_nan_ends_as_soon_as_its_second_moment_is_looked_at():
    """Instead of at the latest end of the warm-up."""

    def fn(rank):
        model = Scripted([21], [1])
        switch = PhaseSwitch(VarianceStability(window=50, min_steps=60, max_steps=90))
        with pytest.raises(ValueError, match="Cannot freeze: the momentum or second moment of"):
            fit("onebit_ddp", 2, batches=100, model=model, callbacks=[switch])
        return model.batches

    first, second = run_trainers(2, fn)
    assert first == second == 22  # every other step is observed


# A run that never recovers


class Spoiler(pl.Callback):
    """Makes one gradient NaN, on rank 1, from a batch on: for two batches another one."""

    def __init__(self, start=8):
        self.start = start

    def on_after_backward(self, trainer, pl_module):
        since = trainer.fit_loop.total_batch_idx - self.start
        if trainer.global_rank == 1 and since >= 0:
            layer = pl_module.head if since < 2 else pl_module.body[2]
            layer.weight.grad[0, 0] = math.nan


@pytest.mark.parametrize("how", ["norm", "value", "scaled", "scaled, fused"])
def test_a_run_that_never_recovers_ends_on_all_ranks_and_names_the_parameter(how):
    def fn(rank):
        if how.startswith("scaled"):
            options = {"plugins": [mixed16(ScaledFloat32, init_scale=1.0)]}
        else:
            options = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": how}
        model = Scripted(configure=lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, fused="fused" in how))
        strategy = OneBitDDPStrategy(max_skipped_steps=5)
        callbacks = [PhaseSwitch(FixedStep(4)), Spoiler()]
        with pytest.raises(FloatingPointError, match="The last 5 steps of Adam were skipped by all ranks") as raised:
            fit(strategy, 2, batches=30, model=model, callbacks=callbacks, **options)
        assert ": body.2.weight on rank 1. Parameters" in str(raised.value)
        assert "max_skipped_steps=5" in str(raised.value)
        assert strategy.skipped_steps == 5
        return model.batches

    first, second = run_trainers(2, fn)
    assert first == second == 8 + 5


def test_without_a_limit_steps_are_skipped_for_ever():
    assert OneBitDDPStrategy(max_skipped_steps=0).max_skipped_steps is None

    def fn(rank):
        strategy = OneBitDDPStrategy(max_skipped_steps=None)
        trainer, _ = fit(strategy, 2, batches=130, callbacks=[PhaseSwitch(FixedStep(4)), Spoiler()])
        assert trainer.strategy.skipped_steps == 122

    run_trainers(2, fn)


@pytest.mark.parametrize("freeze_at", [4, 10**6])
@pytest.mark.parametrize("fused", [False, True])
def test_with_a_loss_scale_steps_count_from_where_it_is_down_to_one(freeze_at, fused):
    """In both phases: under DDP it would be halved for ever. More than ``max_skipped_steps`` do not count before."""

    def fn(rank):
        def run(bad, batches):
            model = Scripted(bad, configure=lambda module: torch.optim.Adam(module.parameters(), lr=1e-2, fused=fused))
            strategy = OneBitDDPStrategy(max_skipped_steps=3)
            plugin = mixed16(ScaledFloat32, init_scale=2.0**6)
            options = {"plugins": [plugin], "callbacks": [PhaseSwitch(FixedStep(freeze_at))]}
            return lambda: fit(strategy, 2, batches=batches, model=model, **options)[0], model, strategy

        # A search for the scale, from 2^6 to 2: it is found, and so is a new one.
        start, _, strategy = run([*range(8, 13), *range(15, 17)], 19)
        assert start().precision_plugin.scaler.get_scale() == 0.5
        assert strategy.skipped_steps == 7
        # None is found: 2^6 is down to 1 after 6 steps, the last of which counts.
        start, model, strategy = run(range(8, 100), 40)
        where = "body.0.weight on rank 1" if freeze_at == 4 else "body.0.weight, body.0.bias"
        with pytest.raises(FloatingPointError, match=f"though the loss scale is down to 0.25: {where}"):
            start()
        return model.batches, strategy.skipped_steps

    assert run_trainers(2, fn) == [(8 + 8, 8)] * 2


def test_fabric_ends_such_a_run_as_well():
    def fn(rank):
        loop = Loop(fabric_strategy(max_skipped_steps=3))
        loop.run(8)

        def spoil(grad):
            return grad * math.nan if rank == 0 else grad

        loop.model.module.head.bias.register_hook(spoil)
        with pytest.raises(FloatingPointError, match=r"last 3 steps of Adam.*or NaN: head.bias on rank 0\. "):
            loop.run(20)
        return loop.batch

    assert run_trainers(2, fn) == [11, 11]


def test_streaks_are_announced_ever_more_rarely(monkeypatch):
    p = nn.Parameter(torch.zeros(2, 3))
    skips = SkippedSteps(None, "Adam")
    asked = []

    def find():
        asked.append(skips.total)
        return {p: [0, 1, 2, 3, 4]}

    with Messages() as messages:
        for _ in range(20):
            for _ in range(2):
                skips.skipped(find, {}, scale=None)
            skips.made()
            skips.made()
    assert asked == [1, 3, 7, 15, 31]
    assert messages.count("one of shape (2, 3) on ranks 0, 1, 2 and 2 more") == 5
    assert messages.count("(streak number 16)") == 1
    assert messages.count("training goes on after 2 skipped steps") == 5
    assert skips.total == 40


def test_only_consecutive_steps_count():
    skips = SkippedSteps(3, "Adam")
    for _ in range(4):
        for _ in range(2):
            skips.skipped(dict, {}, scale=None)
        skips.made()
    for scale in (4.0, None, 2.0, 1.0):
        skips.skipped(dict, {}, scale=scale)
    with pytest.raises(FloatingPointError, match="The last 5 steps of Adam were skipped"):
        skips.skipped(dict, {}, scale=0.5)


@pytest.mark.parametrize("strategy", [OneBitDDPStrategy, OneBitDDPFabricStrategy])
@pytest.mark.parametrize("value", [-1, 1.5, True, "many", math.inf])
def test_an_invalid_limit_is_refused(strategy, value):
    with pytest.raises(
        ValueError, match=re.escape(f"Invalid max_skipped_steps: {value!r}. Must be an integer >= 1, or None")
    ):
        strategy(max_skipped_steps=value)


# Finite, but huge


def huge(rank, step, index, shape, dtype=torch.float64):
    """On one rank at a time the largest number there is, or its opposite, in a few places; late rows too."""
    g = gradient(rank, step, index, shape, dtype)
    if g is not None and rank == step % 2 and step % 3:
        sign = 1 if step % 4 < 2 else -1
        g.view(-1)[:: 1 if step == 19 else 9] = sign * torch.finfo(dtype).max
        if index == EMBEDDING:
            g[8:] = 0
    return g


@pytest.mark.parametrize(
    ("nodes", "kind"), [((2, 1), torch.optim.AdamW), ((2, 1), torch.optim.Adam), ((2, 2), torch.optim.Adam)]
)
def test_gradients_whose_squares_and_sums_overflow_leave_all_buffers_finite(nodes, kind):
    """In both spaces, in every dtype, overlapped or not, with the same parameters on all ranks."""

    def fn(groups):
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        engine.REFRESH_STEPS = 8
        results = []
        dtypes = [torch.float32, torch.bfloat16, torch.float64][: 2 if world_size > 2 else 3]
        for dtype in dtypes:
            for space in ("update", "momentum"):
                runs = []
                for overlap in (False, True):
                    params = [nn.Parameter(torch.linspace(-1, 1, math.prod(s)).view(s).to(dtype)) for s in SHAPES]
                    optimizer = warmed_up(kind(params, lr=1e-2, weight_decay=0.1), world_size, gradient, steps=WARMUP_STEPS)
                    compressed = freeze(optimizer, groups, overlap=overlap, space=space, bucket_cap_mb=0.0005)
                    for step in range(10, 24):
                        assert take_step(optimizer, compressed, rank, step, huge, overlap=overlap)
                        now = everything(optimizer, compressed)
                        infinite = [n for n, t in now.items() if t.is_floating_point() and not t.isfinite().all()]
                        assert not infinite, (step, dtype, space, infinite)
                    runs.append([p.detach().clone() for p in params])
                assert same_params(runs[:1], runs[1:])
                results.append(runs[0])
        return results

    outcomes = on_nodes(nodes, fn)
    assert all(same_params(outcome, outcomes[0]) for outcome in outcomes)


def test_a_parameter_that_has_diverged_stays_out_of_the_errors():
    """Coupled decay would take it there. Under Adam it stays NaN, too, and its neighbours train on."""

    def fn(groups):
        rank = torch.distributed.get_rank()
        params = [nn.Parameter(torch.ones(s)) for s in SHAPES]
        optimizer = warmed_up(torch.optim.Adam(params, lr=1e-2, weight_decay=0.1), 2, gradient, steps=WARMUP_STEPS)
        with torch.no_grad():
            params[1][7], params[1][8] = math.nan, math.inf
        compressed = freeze(optimizer, groups)
        before = params[1].detach().clone()
        for step in range(10, 13):
            assert take_step(optimizer, compressed, rank, step, gradient)
        assert all(error.isfinite().all() for error in compressed.state.outstanding().values())
        assert not params[1][7:9].isfinite().any()
        others = [i for i in range(130) if i not in (7, 8)]
        assert (params[1][others] != before[others]).all()

    on_nodes((2, 1), fn)


def test_the_norm_for_clipping_does_not_overflow():
    sketch = NormSketch(seed=0, device=torch.device("cpu"))
    sketch.add_([torch.tensor([3e30, -4e30])], [2])
    assert sketch.norm().dtype == torch.float32
    assert sketch.norm().item() == pytest.approx(5e30)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float64, 1e300),
        (torch.float32, 2e30),
        (torch.float32, -3e38),
        (torch.float16, math.inf),
        (torch.float64, math.nan),
    ],
)
def test_values_that_could_overflow_are_refused_on_all_ranks_and_change_nothing(dtype, value):
    def fn(rank):
        def values(step):
            return torch.randn(100, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)

        state = ErrorFeedback(values(0), block_size=16)
        compressed_all_reduce(values(0), state)
        before = state.worker_error, state.server_error
        tensor = values(1)
        if rank == 1:
            tensor[50] = value
        kept = tensor.clone()
        where = "this" if rank == 1 else "another"
        with pytest.raises(FloatingPointError, match=rf"beyond 1e\+30, on {where} rank\."):
            compressed_all_reduce(tensor, state)
        assert torch.equal(tensor.nan_to_num(), kept.nan_to_num())
        assert torch.equal(state.worker_error, before[0])
        assert torch.equal(state.server_error, before[1])
        assert compressed_all_reduce(values(2), state).isfinite().all()

    run_ranks(2, fn)


def test_the_largest_values_that_are_accepted_never_overflow():
    def fn(rank):
        state = ErrorFeedback(torch.empty(4096))
        largest = 0.99 * LARGEST_VALUE  # in float32, 1e30 itself is a little more than 1e30
        for step in range(50):
            tensor = torch.zeros(4096)
            tensor[step % 3 :: 1500] = largest if step % 2 else -largest
            tensor[17] = largest
            assert compressed_all_reduce(tensor, state).isfinite().all()
        assert state.worker_error.abs().max() < 1e33

    run_ranks(2, fn)


def test_magnitudes_are_compared_in_every_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert all_within([torch.tensor([1.0, -2.0], dtype=dtype), torch.empty(0, dtype=dtype)], 2.0)
        assert not all_within([torch.tensor([1.0, -2.0], dtype=dtype)], 1.5)
        for bad in (math.inf, -math.inf, math.nan):
            assert not all_within([torch.tensor([1.0, bad], dtype=dtype)], 1e30)
    large = torch.full((1000,), 0.9e30)
    assert all_within([large, large], 1e30)  # though their norm is beyond
