"""The compressed optimizer step, without Lightning: stock torch optimizers, gradients made up per rank and step.

Ranks are threads, as test_thread_ranks.py shows that they do what forked ones on gloo do; a few tests use gloo itself."""

import functools
import gc
import math
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from model import AdamModel
from ranks import run_ranks
from thread_ranks import run_threads
from torch import nn

from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine import buckets as engine_buckets
from lightning_onebit.engine import optimizer as engine
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.engine.variance import REFRESH_STEPS

WARMUP_STEPS = 10
GROUPS = (
    {"shapes": [(37, 11), (5,)], "lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    {"shapes": [(300,), ()], "lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1},
)


def gradient(rank, step, index, shape, dtype=torch.float64):
    """Of different size for every parameter and coordinate, different on every rank; the caller's own."""
    return made_gradient(rank, step, index, shape).to(dtype, copy=True)


@functools.lru_cache(maxsize=10_000)
def made_gradient(rank, step, index, shape):
    """Asked for by every rank, and by the model again."""
    generator = torch.Generator().manual_seed(hash((rank, step, index)) % 2**31)
    size = torch.logspace(-2, 1, math.prod(shape), dtype=torch.float64).view(shape)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3) * size * (1 + index)


def make_params(dtype, shapes):
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def make_optimizer(kind, dtype, **kwargs):
    groups = []
    for group in GROUPS:
        options = {k: v for k, v in group.items() if k != "shapes"}
        groups.append({"params": make_params(dtype, group["shapes"]), **options})
    return kind(groups, **kwargs)


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def warm_up(optimizer, steps, world_size, gradient=gradient):
    """What DDP does: every rank steps with the mean gradient."""
    for step in range(steps):
        for index, p in enumerate(params_of(optimizer)):
            p.grad = sum(gradient(rank, step, index, p.shape) for rank in range(world_size)).div(world_size).to(p.dtype)
        optimizer.step()


def freeze(optimizer, communicator=None, **config):
    """The paper's frozen phase, unless ``config`` says otherwise; with refreshes: test_renewal.py."""
    config = CompressionConfig(**{"variance_refresh": None, **config})
    return CompressedOptimizer(optimizer, config, communicator or Communicator(), {})


def compressed_steps(optimizer, compressed, rank, steps, gradient=gradient):
    for step in steps:
        for index, p in enumerate(params_of(optimizer)):
            p.grad = gradient(rank, step, index, p.shape, p.dtype)
        yield compressed.step()


def train(communicator, kind, dtype, *, steps=50, optimizer_options=None, gradient=gradient, **config):
    """Parameters after every compressed step."""
    optimizer = make_optimizer(kind, dtype, **(optimizer_options or {}))
    warm_up(optimizer, WARMUP_STEPS, communicator.world_size, gradient)
    compressed = freeze(optimizer, communicator, **config)
    history = []
    for _ in compressed_steps(optimizer, compressed, communicator.rank, range(WARMUP_STEPS, WARMUP_STEPS + steps), gradient):
        history.append([p.detach().clone() for p in params_of(optimizer)])
    return history


def train_model(
    kind, world_size, *, steps=50, maximize=False, gradient=gradient, block_size=2048, scale="l2", space="update"
):
    models, index = [], 0
    for group in GROUPS:
        options = {k: v for k, v in group.items() if k != "shapes"}
        for p in make_params(torch.float64, group["shapes"]):
            model = AdamModel(
                p.detach().numpy(),
                world_size,
                decoupled=kind is torch.optim.AdamW,
                block_size=block_size,
                scale=scale,
                space=space,
                maximize=maximize,
                **options,
            )
            models.append((model, index, p.shape))
            index += 1
    history = []
    for step in range(WARMUP_STEPS + steps):
        if step == WARMUP_STEPS:
            for model, _, _ in models:
                model.freeze()
        for model, index, shape in models:
            grads = [gradient(rank, step, index, shape).numpy() for rank in range(world_size)]
            model.warmup_step(grads) if step < WARMUP_STEPS else model.compressed_step(grads)
        if step >= WARMUP_STEPS:
            history.append([model.x.copy() for model, _, _ in models])
    return history


def assert_close(actual, expected, rtol):
    for step, (params, expected_params) in enumerate(zip(actual, expected, strict=True)):
        for p, x in zip(params, expected_params, strict=True):
            error = np.abs(p.double().numpy().ravel() - x).max() / np.abs(x).max()
            assert error <= rtol, f"relative error {error} at step {step}"


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("space", ["update", "momentum"])
@pytest.mark.parametrize("scale", ["l2", "l1"])
def test_50_steps_equal_the_float64_model(kind, space, scale):
    config = {"space": space, "scale": scale, "block_size": 64}
    histories = run_threads(3, lambda communicator: train(communicator, kind, torch.float64, **config))
    assert_close(histories[0], train_model(kind, 3, **config), rtol=1e-4)


def test_moves_that_are_cut_in_momentum_space_equal_the_float64_model():
    """One block for second moments from 1 to 10^6, which the quantizer makes equal in size before D divides."""
    config = {"space": "momentum", "block_size": 512, "steps": 20}
    histories = run_threads(3, lambda communicator: train(communicator, torch.optim.AdamW, torch.float64, **config))
    assert_close(histories[0], train_model(torch.optim.AdamW, 3, **config), rtol=1e-4)


def test_on_gloo_50_steps_equal_the_float64_model():
    histories = run_ranks(3, lambda rank: train(Communicator(), torch.optim.AdamW, torch.float64, block_size=64))
    assert_close(histories[0], train_model(torch.optim.AdamW, 3, block_size=64), rtol=1e-4)


def late_gradient(rank, step, index, shape, dtype=torch.float64):
    """Some coordinates have their first gradient after the freeze, seldom, and on one rank at a time; some never do."""
    g = gradient(rank, step, index, shape, dtype)
    flat = g.view(-1)
    if index == 0:
        flat[::7] = 0.0
    if index in (0, 2) and (step < WARMUP_STEPS + 3 or (step + rank) % 5):
        flat[3::4] = 0.0
    return g


@pytest.mark.parametrize("space", ["update", "momentum"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_late_coordinates_equal_the_float64_model(space, world_size, monkeypatch):
    """Over two refreshes; written from DESIGN section 2. They come at every 16th step; at every 64th, as they really do:
    test_one_rank_with_late_coordinates_is_the_float64_model."""
    refresh_steps = 16
    monkeypatch.setattr(engine, "REFRESH_STEPS", refresh_steps)
    monkeypatch.setattr("model.REFRESH_STEPS", refresh_steps)
    options = {"space": space, "block_size": 64, "steps": 30}
    trace, *others = run_threads(
        world_size,
        lambda communicator: train(communicator, torch.optim.Adam, torch.float64, gradient=late_gradient, **options),
    )
    assert all(
        torch.equal(a, b) for other in others for x, y in zip(other, trace, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert_close(trace, train_model(torch.optim.Adam, world_size, gradient=late_gradient, **options), rtol=1e-4)
    started = [(params[0].flatten() != trace[0][0].flatten()) for params in trace]
    assert not started[refresh_steps - WARMUP_STEPS - 1][3::4].any()  # the refresh of step 16 is valid from step 17 on
    assert started[-1][[i for i in range(3, 407, 4) if i % 7]].all()
    assert not started[-1][::7].any()


def test_float32_follows_the_float64_model():
    """With float32 arithmetic; the seeds were chosen so that no sign decision lies within rounding of zero."""
    histories = run_threads(2, lambda communicator: train(communicator, torch.optim.AdamW, torch.float32, steps=20))
    assert_close(histories[0], train_model(torch.optim.AdamW, 2, steps=20), rtol=1e-4)


@pytest.mark.parametrize("space", ["update", "momentum"])
def test_maximize_ascends(space):
    options = {"optimizer_options": {"maximize": True}, "space": space}
    histories = run_threads(2, lambda communicator: train(communicator, torch.optim.Adam, torch.float64, **options))
    assert_close(histories[0], train_model(torch.optim.Adam, 2, maximize=True, space=space), rtol=1e-4)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("space", ["update", "momentum"])
def test_one_rank_is_exact_frozen_adam(kind, space):
    """Unquantized; with one rank the space decides nothing."""
    history = train(Communicator(), kind, torch.float64, space=space)
    assert_close(history, train_model(kind, 1, space="update"), rtol=1e-9)


def test_one_rank_with_late_coordinates_is_the_float64_model():
    history = train(Communicator(), torch.optim.Adam, torch.float64, gradient=late_gradient, steps=125)
    assert_close(history, train_model(torch.optim.Adam, 1, gradient=late_gradient, steps=125), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_bitwise(dtype, world_size):
    def fn(communicator):
        rank = communicator.rank
        optimizer = make_optimizer(torch.optim.AdamW, dtype)
        warm_up(optimizer, WARMUP_STEPS, world_size)
        compressed = freeze(optimizer, communicator, block_size=64)
        trace = []
        for _ in compressed_steps(optimizer, compressed, rank, range(WARMUP_STEPS, 40)):
            state = optimizer.state_dict()["state"]
            trace.append([p.detach().clone() for p in params_of(optimizer)] + [s["exp_avg"] for s in state.values()])
        return trace

    traces = run_threads(world_size, fn)
    for trace in traces[1:]:
        for tensors, expected in zip(trace, traces[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_result_does_not_depend_on_buckets():
    def run(bucket_cap_mb):
        options = {"steps": 8, "block_size": 8, "bucket_cap_mb": bucket_cap_mb}
        return run_threads(3, lambda communicator: train(communicator, torch.optim.AdamW, torch.float32, **options))[0]

    reference = run(25.0)
    for bucket_cap_mb in (1e-6, 0.0005, 0.0013):
        for params, expected in zip(run(bucket_cap_mb), reference, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


@pytest.mark.parametrize("space", ["update", "momentum"])
def test_telescoping_identity(space):
    """With lr = 1 - beta1^t and no decay, sum of applied updates + errors = what exact frozen Adam has applied, per step."""
    steps, lr = 30, 1e-3
    world_size, shape = 3, (40, 5)

    def fn(communicator):
        rank = communicator.rank
        x = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        optimizer = torch.optim.Adam([x], lr=lr, betas=(0.0, 0.999))
        warm_up(optimizer, WARMUP_STEPS, world_size)
        exact = x.detach().clone()
        D = (optimizer.state[x]["exp_avg_sq"] / (1 - 0.999**WARMUP_STEPS)).sqrt() + 1e-8
        compressed = freeze(optimizer, communicator, block_size=32, space=space)
        kappa = world_size / math.sqrt(1 - 0.999) if space == "update" else math.inf
        for step in range(WARMUP_STEPS, WARMUP_STEPS + steps):
            grads = [gradient(r, step, 0, shape) for r in range(world_size)]
            exact -= lr * sum((g / D).clamp(-kappa, kappa) for g in grads) / world_size
            x.grad = grads[rank]
            compressed.step()
        outstanding = compressed.state.outstanding()[x]
        assert outstanding.abs().max() > 0.1  # else nothing would be proved
        assert torch.allclose(x.detach() - lr * (outstanding if space == "update" else outstanding / D), exact, atol=1e-9)

    run_threads(world_size, fn)


# Coordinates without gradient, and outliers (invariant 5)

ROWS, COLUMNS = 40, 12  # blocks of 64 hold live rows and dead ones


def embedding_gradient(seen, dtype=torch.float32):
    """Gradients of an embedding whose rows ``seen[rank]`` occur on each rank."""

    def fn(rank, step, index, shape, _=None):
        mask = torch.zeros(ROWS, 1)
        mask[list(seen(rank, step))] = 1.0
        generator = torch.Generator().manual_seed(100 * step + rank)
        return ((torch.randn(shape, generator=generator) + 0.5) * mask).to(dtype)

    return fn


@pytest.mark.parametrize("space", ["update", "momentum"])
def test_rows_never_seen_stay_bitwise_and_their_neighbours_train(space):
    def fn(communicator):
        rank = communicator.rank
        x = nn.Parameter(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)))
        with torch.no_grad():
            x[5, 0] = -0.0
        optimizer = torch.optim.Adam([x], lr=1e-2)
        grads = embedding_gradient(lambda rank, step: [0, 3, 7, 8, 9, 30])
        initial = x.detach().clone()
        warm_up(optimizer, WARMUP_STEPS, 2, grads)
        compressed = freeze(optimizer, communicator, block_size=64, space=space)
        list(compressed_steps(optimizer, compressed, rank, range(WARMUP_STEPS, WARMUP_STEPS + 100), grads))
        changed = (x.detach().view(torch.int32) != initial.view(torch.int32)).any(dim=1)
        assert changed.nonzero().ravel().tolist() == [0, 3, 7, 8, 9, 30]
        return x.detach()

    first, second = run_threads(2, fn)
    assert torch.equal(first, second)


@pytest.mark.parametrize("space", ["update", "momentum"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rows_first_seen_after_the_freeze_on_one_rank_train_on_all(space, world_size):
    """They start with the step after the refresh, together, and move within 2x of Adam from then on."""
    late_steps = 2 * REFRESH_STEPS
    known, beside_live_rows, in_another_block = [0, 1, 2, 3, 6], [4, 5], [20]
    new_rows = beside_live_rows + in_another_block

    def seen(rank, step):
        return known + (new_rows if rank == world_size - 1 and step >= WARMUP_STEPS + 5 else [])

    def start():
        x = nn.Parameter(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)))
        optimizer = torch.optim.Adam([x], lr=1e-3)
        warm_up(optimizer, WARMUP_STEPS, world_size, embedding_gradient(seen))
        return x, optimizer

    def fn(communicator):
        x, optimizer = start()
        compressed = freeze(optimizer, communicator, block_size=64, space=space)
        trace = [x.detach().clone()]
        steps = range(WARMUP_STEPS, WARMUP_STEPS + late_steps)
        for _ in compressed_steps(optimizer, compressed, communicator.rank, steps, embedding_gradient(seen)):
            trace.append(x.detach().clone())
        return torch.stack(trace)

    traces = run_threads(world_size, fn)
    assert all(torch.equal(trace, traces[0]) for trace in traces)
    moved = (traces[0][:, new_rows] != traces[0][0, new_rows]).flatten(1)
    refreshed = REFRESH_STEPS - WARMUP_STEPS  # compressed steps until the one that refreshes, which is included
    assert not moved[refreshed].any()
    assert moved[refreshed + 1].all()

    x, optimizer = start()
    for step in range(WARMUP_STEPS, WARMUP_STEPS + late_steps):
        if step == WARMUP_STEPS + refreshed:
            before = x.detach().clone()
        grads = embedding_gradient(seen)
        x.grad = sum(grads(rank, step, 0, x.shape) for rank in range(world_size)) / world_size
        optimizer.step()
    for rows in (beside_live_rows, in_another_block):
        adam = (x.detach() - before)[rows].norm()
        ours = (traces[0][-1] - traces[0][refreshed])[rows].norm()
        assert adam / 2 < ours < adam * 2, ours / adam
    others = [row for row in range(ROWS) if row not in (*known, *new_rows)]
    assert torch.equal(traces[0][-1][others], traces[0][0][others])


def test_a_late_coordinate_whose_second_moment_decays_to_zero_stays_what_it_is():
    """With a small beta2 that takes a few steps without gradients, before the refresh, or after it."""

    def seen(rank, step):
        at = {4: [WARMUP_STEPS + 2], 5: [REFRESH_STEPS - 2, REFRESH_STEPS + 5]}
        return [0, 1, *(row for row, steps in at.items() if rank == 1 and step in steps)]

    def fn(communicator):
        x = nn.Parameter(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)))
        initial = x.detach().clone()
        optimizer = torch.optim.Adam([x], lr=1e-3, betas=(0.9, 1e-3))
        warm_up(optimizer, WARMUP_STEPS, 2, embedding_gradient(seen))
        compressed = freeze(optimizer, communicator, block_size=64)
        steps = range(WARMUP_STEPS, WARMUP_STEPS + 2 * REFRESH_STEPS)
        list(compressed_steps(optimizer, compressed, communicator.rank, steps, embedding_gradient(seen)))
        assert torch.isfinite(x).all()
        assert torch.equal(x[4], initial[4])
        assert (x[5] != initial[5]).all()
        return [x.detach(), *optimizer.state_dict()["state"][0].values()]

    first, second = run_threads(2, fn)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[-1][5].all()  # the stock second moment of a coordinate that takes part


@pytest.mark.parametrize("space", ["update", "momentum"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_second_moments_as_small_as_those_of_new_coordinates_are_frozen_too(space, world_size):
    """Gradients of 1e-17, as behind many layers: finite, and trained as others are."""

    def tiny(rank, step, index, shape, dtype=torch.float64):
        g = gradient(rank, step, index, shape, dtype)
        g.view(-1)[::2] = 1e-17
        return g

    options = {"steps": 5, "gradient": tiny, "space": space, "block_size": 16}
    for history in run_threads(
        world_size, lambda communicator: train(communicator, torch.optim.Adam, torch.float32, **options)
    ):
        assert all(torch.isfinite(p).all() for params in history for p in params)
        assert not any(torch.equal(a, b) for a, b in zip(history[0], history[-1], strict=True))


def test_an_outlier_moves_its_block_no_more_than_the_clamp_allows():
    """A gradient 10^6 times the frozen deviation counts as kappa deviations: it cannot raise the block's scale further."""
    numel, beta1, beta2, lr = 64, 0.9, 0.999, 1e-3
    kappa = 2 / math.sqrt(1 - beta2)

    def fn(communicator, outlier):
        rank = communicator.rank
        x = nn.Parameter(torch.zeros(numel))
        optimizer = torch.optim.Adam([x], lr=lr, betas=(beta1, beta2))
        warm_up(optimizer, WARMUP_STEPS, 2)
        deviation = (optimizer.state[x]["exp_avg_sq"][3] / (1 - beta2**WARMUP_STEPS)).sqrt()
        compressed = freeze(optimizer, communicator, block_size=64)
        before = x.detach().clone()
        grad = gradient(rank, WARMUP_STEPS, 0, x.shape, torch.float32)
        grad[3] = outlier * deviation
        x.grad = grad
        compressed.step()
        return (x.detach() - before)[[i for i in range(numel) if i != 3]]

    with_outlier = run_threads(2, fn, 1e6)[0]
    at_clamp = run_threads(2, fn, 1.01 * kappa)[0]
    assert torch.equal(with_outlier, at_clamp)
    # Momenta of the others are below 2 deviations; the outlier's is at most one deviation more than its clamped gradient.
    largest_scale = math.sqrt(((numel - 1) * 2**2 + ((1 - beta1) * kappa + 1) ** 2) / numel)
    assert with_outlier.abs().max() < lr / (1 - beta1 ** (WARMUP_STEPS + 1)) * largest_scale


# Gradients that are missing or not finite


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_nonfinite_gradient_on_one_rank_skips_the_step_on_all(bad):
    def fn(communicator, inject):
        rank = communicator.rank
        optimizer = make_optimizer(torch.optim.AdamW, torch.float32)
        warm_up(optimizer, WARMUP_STEPS, 2)
        compressed = freeze(optimizer, communicator, block_size=64)
        done = list(compressed_steps(optimizer, compressed, rank, [20, 21]))
        if inject:
            before = [p.detach().clone() for p in params_of(optimizer)]
            for index, p in enumerate(params_of(optimizer)):
                p.grad = gradient(rank, 22, index, p.shape, p.dtype)
            if rank == 1:
                params_of(optimizer)[2].grad[17] = bad
            done.append(compressed.step())
            assert done == [True, True, False]
            assert all(torch.equal(a, b) for a, b in zip(params_of(optimizer), before, strict=True))
        list(compressed_steps(optimizer, compressed, rank, range(23, 30)))
        return [p.detach().clone() for p in params_of(optimizer)]

    undisturbed, disturbed = (run_threads(2, fn, inject)[0] for inject in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(undisturbed, disturbed, strict=True))


def test_a_huge_but_finite_gradient_is_no_reason_to_skip():
    """Its square is beyond float32, but it is clamped."""

    def fn(communicator):
        rank = communicator.rank
        optimizer = make_optimizer(torch.optim.AdamW, torch.float32)
        warm_up(optimizer, WARMUP_STEPS, 2)
        compressed = freeze(optimizer, communicator, block_size=64)
        for index, p in enumerate(params_of(optimizer)):
            p.grad = gradient(rank, 20, index, p.shape, p.dtype)
        params_of(optimizer)[2].grad[17] = 1e30
        assert compressed.step()
        assert all(torch.isfinite(p).all() for p in params_of(optimizer))

    run_threads(2, fn)


def test_a_parameter_without_gradient_on_all_ranks_sits_out():
    """Like under Adam: neither it nor its state changes, and its step does not count."""

    def fn(communicator):
        rank = communicator.rank
        optimizer = make_optimizer(torch.optim.AdamW, torch.float32)
        warm_up(optimizer, WARMUP_STEPS, 2)
        compressed = freeze(optimizer, communicator, block_size=64)
        list(compressed_steps(optimizer, compressed, rank, [20, 21]))
        idle = params_of(optimizer)[0]
        before = idle.detach().clone(), optimizer.state_dict()["state"][0]["exp_avg"], compressed.state.outstanding()[idle]
        step = float(optimizer.state_dict()["state"][0]["step"])
        for index, p in enumerate(params_of(optimizer)):
            p.grad = gradient(rank, 22, index, p.shape, p.dtype) if index else None
        compressed.step()
        after = idle.detach().clone(), optimizer.state_dict()["state"][0]["exp_avg"], compressed.state.outstanding()[idle]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert float(optimizer.state_dict()["state"][0]["step"]) == step
        list(compressed_steps(optimizer, compressed, rank, [23]))
        assert not torch.equal(idle.detach(), before[0])

    run_threads(2, fn)


def test_a_parameter_without_gradient_on_one_rank_counts_as_zero_there():
    def fn(communicator, explicit_zero):
        rank = communicator.rank
        optimizer = make_optimizer(torch.optim.Adam, torch.float32)
        warm_up(optimizer, WARMUP_STEPS, 2)
        compressed = freeze(optimizer, communicator, block_size=64)
        for index, p in enumerate(params_of(optimizer)):
            p.grad = gradient(rank, 22, index, p.shape, p.dtype)
        if rank == 0:
            params_of(optimizer)[2].grad = torch.zeros(300) if explicit_zero else None
        compressed.step()
        return [p.detach().clone() for p in params_of(optimizer)]

    implicit, explicit = (run_threads(2, fn, explicit_zero) for explicit_zero in (False, True))
    for a, b in zip(implicit[0] + implicit[1], explicit[0] + explicit[0], strict=True):
        assert torch.equal(a, b)


# State


@pytest.mark.parametrize("overlap", [False, True])
def test_one_message_per_bucket_and_phase(overlap):
    """Signs and scales travel together: an all-to-all and an all-gather per bucket, and one agreement per step. The sketches
    of step 16 are one message more each way."""

    def fn(communicator):
        optimizer = make_optimizer(torch.optim.Adam, torch.float32)
        warm_up(optimizer, WARMUP_STEPS, 2)
        config = CompressionConfig(block_size=8, bucket_cap_mb=0.001, variance_refresh=None)
        compressed = CompressedOptimizer(optimizer, config, communicator, {}, overlap=overlap)
        buckets = len(compressed._queue)
        before = compressed.communicator.counters.collectives
        list(compressed_steps(optimizer, compressed, communicator.rank, range(WARMUP_STEPS, WARMUP_STEPS + 7)))
        return buckets, compressed.communicator.counters.collectives - before

    ((buckets, collectives), other) = run_threads(2, fn)
    assert buckets == 3
    assert other == (buckets, collectives)
    assert collectives == 7 * (2 * buckets + 1) + 2


def test_gradients_are_only_read_and_the_momentum_is_freed():
    def fn(communicator):
        rank = communicator.rank
        optimizer = make_optimizer(torch.optim.Adam, torch.float32, maximize=True)
        warm_up(optimizer, WARMUP_STEPS, 2)
        compressed = freeze(optimizer, communicator, block_size=64)
        assert not optimizer.state
        list(compressed_steps(optimizer, compressed, rank, [20]))
        for index, p in enumerate(params_of(optimizer)):
            assert torch.equal(p.grad, gradient(rank, 20, index, p.shape, p.dtype))

    run_threads(2, fn)


def test_the_momentum_is_freed_bucket_by_bucket(monkeypatch):
    """So that the switch itself needs no second copy of it."""
    optimizer = torch.optim.Adam(make_params(torch.float32, [(64,)] * 4))
    warm_up(optimizer, 1, 1)
    left = []

    class Counting(engine_buckets.BucketMemory):
        def __init__(self, *args, **kwargs):
            left.append(sum("exp_avg" in state for state in optimizer.state.values()))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(engine_buckets, "BucketMemory", Counting)
    freeze(optimizer, block_size=8, bucket_cap_mb=64 * 4 / 2**20)
    assert left == [4, 3, 2, 1]


def tensor_bytes():
    """Bytes of all tensors that are alive, but for what gloo's thread still holds of an exchange that has just ended."""
    time.sleep(0.1)
    while gc.collect():  # what one pass frees may be the last to hold something else
        pass
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if is_tensor(t)}
    return sum(storages.values())


def is_tensor(candidate):
    return type(candidate) in (torch.Tensor, nn.Parameter)


@pytest.mark.parametrize(("variance_refresh", "more"), [(None, lambda n: 4 / n), ("auto", lambda n: 8 / n + 1)])
def test_memory_per_parameter(variance_refresh, more):
    """Invariant 9: dense Adam's 8 bytes + 4/n for the server error, + 5%; with refreshes, v_i takes v's place, D is a byte,
    and the chunks' residual takes 4/n. As the slope between two sizes, as workspaces do not grow with the model."""
    world_size = 2

    def fn(rank):
        def state_bytes(numel):
            before = tensor_bytes()
            p = nn.Parameter(torch.zeros(numel))
            optimizer = torch.optim.Adam([p])
            p.grad = torch.ones(numel)
            optimizer.step()
            dense = tensor_bytes() - before - 8 * numel  # without parameter and gradient
            compressed = freeze(optimizer, variance_refresh=variance_refresh)
            compressed.step()
            return dense, tensor_bytes() - before - 8 * numel

        small, large = 1_200_000, 3_600_000  # both with segments of full length
        (dense_small, ours_small), (dense_large, ours_large) = state_bytes(small), state_bytes(large)
        return [(b - a) / (large - small) for a, b in ((dense_small, dense_large), (ours_small, ours_large))]

    slopes = run_ranks(world_size, fn)
    dense = slopes[0][0]
    assert dense == pytest.approx(8.0)
    assert max(ours for _, ours in slopes) <= (dense + more(world_size)) * 1.05


@pytest.mark.parametrize("space", ["update", "momentum"])
def test_state_dict_is_that_of_a_stock_optimizer(space):
    """It holds what exact Adam would: a stock optimizer loads it and starts with the frozen step sizes and the momentum."""

    def fn(communicator):
        rank = communicator.rank
        optimizer = make_optimizer(torch.optim.Adam, torch.float64)
        warm_up(optimizer, WARMUP_STEPS, 2)
        expected = {i: {k: v.clone() for k, v in s.items()} for i, s in optimizer.state_dict()["state"].items()}
        compressed = freeze(optimizer, communicator, space=space)
        list(compressed_steps(optimizer, compressed, rank, [20, 21, 22]))
        state = optimizer.state_dict()["state"]
        stock = make_optimizer(torch.optim.Adam, torch.float64)
        stock.load_state_dict(optimizer.state_dict())
        for index, group_index in enumerate([0, 0, 1, 1]):
            beta2 = GROUPS[group_index]["betas"][1]
            assert set(state[index]) == {"step", "exp_avg", "exp_avg_sq"}
            assert float(state[index]["step"]) == WARMUP_STEPS + 3
            v_hat = state[index]["exp_avg_sq"] / (1 - beta2 ** (WARMUP_STEPS + 3))
            expected_v_hat = expected[index]["exp_avg_sq"] / (1 - beta2**WARMUP_STEPS)
            assert torch.allclose(v_hat, expected_v_hat, rtol=1e-12)
            assert state[index]["exp_avg"].abs().max() > 0
        return [s["exp_avg"] for s in state.values()]

    first, second = run_threads(2, fn)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_outstanding_errors_can_be_taken_over():
    def fn(communicator):
        rank = communicator.rank

        def start():
            optimizer = make_optimizer(torch.optim.Adam, torch.float64)
            warm_up(optimizer, WARMUP_STEPS, 2)
            return optimizer, freeze(optimizer, communicator, block_size=16)

        optimizer, compressed = start()
        list(compressed_steps(optimizer, compressed, rank, range(20, 30)))
        saved = compressed.state.outstanding()
        other_optimizer, other = start()
        before = other.state.outstanding()
        errors = dict(zip(params_of(other_optimizer), (saved[p] for p in params_of(optimizer)), strict=True))
        other.state.add_errors_(compressed.state.worker_errors(), compressed.state.server_errors())
        for p, error in other.state.outstanding().items():
            assert torch.allclose(error, before[p] + errors[p], rtol=1e-12)

    run_threads(2, fn)


def test_new_parameters_after_the_freeze_are_refused():
    optimizer = make_optimizer(torch.optim.Adam, torch.float32)
    warm_up(optimizer, 2, 1)
    compressed = freeze(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(RuntimeError, match=r"resume_warmup"):
        compressed.step()


def test_freezing_a_diverged_second_moment_is_refused():
    optimizer = make_optimizer(torch.optim.Adam, torch.float32)
    warm_up(optimizer, 2, 1)
    p = params_of(optimizer)[2]
    optimizer.state[p]["exp_avg_sq"][4] = math.nan
    with pytest.raises(ValueError, match=r"second moment of 'layer.bias'"):
        CompressedOptimizer(optimizer, CompressionConfig(), Communicator(), {p: "layer.bias"})


@pytest.mark.parametrize("world_size", [1, 2])
def test_strange_parameters(world_size):
    """Empty, 0-d, transposed, channels_last, never used: all step like their contiguous equals, or stay."""
    shapes = [(0, 3), (), (6, 5), (2, 3, 4, 4), (7,)]

    def fn(communicator, strange):
        rank = communicator.rank
        params = make_params(torch.float32, shapes)
        if strange:
            params[2] = nn.Parameter(params[2].detach().t().contiguous().t())
            params[3] = nn.Parameter(params[3].detach().contiguous(memory_format=torch.channels_last))
        optimizer = torch.optim.Adam(params, lr=1e-2)
        unused = params.pop()
        initial = unused.detach().clone()
        for step in range(30):
            for index, p in enumerate(params):
                p.grad = torch.zeros_like(p).copy_(gradient(rank if step >= 10 else 0, step, index, p.shape, p.dtype))
            if step == 10:
                compressed = freeze(optimizer, communicator, block_size=8)
            compressed.step() if step >= 10 else optimizer.step()
        assert torch.equal(unused, initial)
        return [p.detach().contiguous() for p in params]

    plain = run_threads(world_size, fn, False)[0]
    strange = run_threads(world_size, fn, True)[0]
    assert torch.equal(plain[1], strange[1])
    # A strided parameter has its elements in other blocks, so only its course is the same.
    assert all((a - b).abs().max() < 0.3 for a, b in zip(plain[2:], strange[2:], strict=True))


def test_an_option_that_is_refused_is_refused_in_mid_run():
    p = nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.Adam([p])
    p.grad = torch.ones(8)
    optimizer.step()
    compressed = freeze(optimizer)
    compressed.step()
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad=True"):
        compressed.step()


def test_dtypes_travel_in_the_order_of_their_names():
    """On all ranks, which order what they hash in other ways."""
    names = ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]
    params = [nn.Parameter(torch.zeros(1, dtype=getattr(torch, name))) for name in names[::-1]]
    compressed = freeze(torch.optim.SGD(params, lr=0.1))
    assert [str(each.buckets.params[0].dtype) for each in compressed._sets] == [f"torch.{name}" for name in names]


def test_strided_gradients_of_contiguous_parameters():
    def fn(strided):
        p = nn.Parameter(torch.zeros(6, 5))
        optimizer = torch.optim.Adam([p])
        grad = gradient(0, 0, 0, (6, 5), torch.float32)
        p.grad = grad
        optimizer.step()
        compressed = freeze(optimizer)
        p.grad = grad.t().contiguous().t() if strided else grad
        compressed.step()
        return p.detach()

    assert torch.equal(fn(True), fn(False))


def test_no_process_group_is_needed_with_one_rank():
    assert not dist.is_initialized()
    assert len(train(Communicator(), torch.optim.Adam, torch.float32, steps=2)) == 2
