"""1-bit SGD: torch's own on one rank, a float64 model and the telescoping identity on many (as threads of this process)."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from model import ErrorFeedbackModel
from test_many_ranks import noise
from thread_ranks import exchange_groups, run_threads
from torch import nn

from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.engine.variance import REFRESH_STEPS

SHAPES = [(17, 9), (5,), (), (120,)]
BLOCK_SIZE = 64
TIMEOUT_SECONDS = 100


def params_of(dtype, seed=0):
    return [nn.Parameter(noise(math.prod(s), 20, seed, i, dtype=dtype).view(s)) for i, s in enumerate(SHAPES)]


def gradients_of(step, rank, dtype=torch.float64):
    """Another size for every tensor."""
    gradients = [noise(math.prod(s), 21, step, i, rank, dtype=dtype).view(s) for i, s in enumerate(SHAPES)]
    return [(gradient + 0.3) * (1 + i) for i, gradient in enumerate(gradients)]


def compress(optimizer, communicator, **config):
    config = {"block_size": BLOCK_SIZE, **config}
    return CompressedOptimizer(
        optimizer, CompressionConfig(**config), communicator, {}, groups=exchange_groups(communicator)
    )


def make_step(optimizer, params, gradients):
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient
    return optimizer.step()


# One rank: torch's own

OPTIONS = [
    {**momentum, **decay, **sign}
    for momentum in (
        {},
        {"dampening": 0.3},  # without momentum torch ignores it
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
    )
    for decay in ({}, {"weight_decay": 0.05})
    for sign in ({}, {"maximize": True})
]


def name_of(options):
    return "-".join(options) or "plain"


@pytest.mark.parametrize("dense_steps", [0, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_one_rank_is_torchs_own_to_rounding(options, dense_steps):
    """60 steps; the rate and the momentum change on the way, one parameter begins late, and one has no gradient at times."""

    def train(compresses):
        params = params_of(torch.float64)
        optimizer = torch.optim.SGD(params, lr=0.02, **options)
        stepping, trace = optimizer, []
        for step in range(60):
            if step == dense_steps and compresses:
                stepping = run_threads(1, lambda communicator: compress(optimizer, communicator))[0]
            (group,) = optimizer.param_groups
            group["lr"] = 0.02 / (1 + step / 20)
            if step == 30 and options.get("momentum"):
                group["momentum"] = 0.7
            gradients = gradients_of(step, 0)
            if step < 10:
                gradients[1] = None
            if step % 7 == 3:
                gradients[3] = None
            make_step(stepping, params, gradients)
            trace.append([p.detach().clone() for p in params])
        return trace, optimizer.state_dict()

    (expected, expected_state), (trace, state) = train(False), train(True)
    for step, (ours, torchs) in enumerate(zip(trace, expected, strict=True)):
        for a, b in zip(ours, torchs, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-13), step
    for index, entry in expected_state["state"].items():
        buffer, ours = entry.get("momentum_buffer"), state["state"][index].get("momentum_buffer")
        assert (buffer is None) == (ours is None)
        assert buffer is None or torch.allclose(ours, buffer, rtol=1e-12, atol=1e-13)


def test_what_has_no_meaning_is_refused():
    optimizer = torch.optim.SGD(params_of(torch.float32), lr=0.1, differentiable=True)
    with pytest.raises(ValueError, match=r"differentiable=True \(parameter group 0\) is not supported"):
        run_threads(1, lambda communicator: compress(optimizer, communicator))


def test_nesterov_from_within_the_compressed_phase_is_refused_not_half_done():
    def fn(communicator):
        params = params_of(torch.float32)
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        compressed = compress(optimizer, communicator)
        make_step(compressed, params, gradients_of(0, communicator.rank, torch.float32))
        optimizer.param_groups[0]["nesterov"] = True
        with pytest.raises(RuntimeError, match="nesterov was switched on in the compressed phase"):
            make_step(compressed, params, gradients_of(1, communicator.rank, torch.float32))

    run_threads(2, fn)


# Many ranks: a model in float64


class SGDModel:
    """One parameter under 1-bit SGD; without ``compressed``, SGD on the mean gradient."""

    def __init__(self, x, world_size, *, lr, momentum, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False):
        self.x = x.detach().double().numpy().ravel().copy()
        self.lr, self.momentum, self.dampening = lr, momentum, dampening
        self.weight_decay, self.nesterov, self.sign = weight_decay, nesterov, -1.0 if maximize else 1.0
        self.u, self.first = np.zeros_like(self.x), True
        self.reduction = ErrorFeedbackModel(len(self.x), world_size, BLOCK_SIZE)

    def _local(self, gradients):
        return [self.sign * np.ravel(g) + self.weight_decay * self.x for g in gradients]

    def _move(self, u, before):
        ahead = self.momentum if self.nesterov else 0.0
        self.x -= self.lr * ((1 + ahead) * u - ahead * before)
        self.u, self.first = u, False

    def _weight(self):
        return 1.0 if self.first or not self.momentum else 1.0 - self.dampening

    def dense_step(self, gradients):
        u = self.momentum * self.u + self._weight() * np.mean(self._local(gradients), axis=0)
        self._move(u, self.u)

    def freeze(self):
        """The momentum waits in the errors: the last average is zero. With nesterov, times the momentum once more."""
        factor = self.momentum * (self.momentum if self.nesterov else 1.0)
        for error in self.reduction.worker_errors:
            error += factor * self.u
        self.u = np.zeros_like(self.x)

    def step(self, gradients):
        c = [self.momentum * self.u + self._weight() * g for g in self._local(gradients)]
        self._move(self.reduction.reduce(c, beta=self.momentum), self.u)


MODEL_OPTIONS = [
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, "maximize": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
]


@pytest.mark.parametrize(
    ("world_size", "options", "dense_steps"),
    [
        *((n, options, steps) for n in (2, 8) for options in MODEL_OPTIONS for steps in (0, 3)),
        (32, MODEL_OPTIONS[2], 0),
        (32, MODEL_OPTIONS[3], 3),
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else str(value),
)
def test_many_ranks_are_the_model(world_size, options, dense_steps):
    """From step ``dense_steps`` on; what runs before is torch's own SGD on the mean gradient."""
    steps, lr = 12, 0.01

    def fn(communicator):
        params = params_of(torch.float64)
        optimizer = torch.optim.SGD(params, lr=lr, **options)
        for step in range(dense_steps):
            everybodys = [gradients_of(step, rank) for rank in range(world_size)]
            make_step(optimizer, params, [sum(each) / world_size for each in zip(*everybodys, strict=True)])
        compressed = compress(optimizer, communicator)
        for step in range(dense_steps, steps):
            assert make_step(compressed, params, gradients_of(step, communicator.rank))
        return [p.detach() for p in params]

    first, *others = run_threads(world_size, fn, timeout=TIMEOUT_SECONDS)
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, first, strict=True))
    for index, (p, ours) in enumerate(zip(params_of(torch.float64), first, strict=True)):
        model = SGDModel(p, world_size, lr=lr, **options)
        for step in range(steps):
            if step == dense_steps:
                model.freeze()
            gradients = [gradients_of(step, rank)[index].numpy() for rank in range(world_size)]
            (model.dense_step if step < dense_steps else model.step)(gradients)
        # Scales travel in float32, and may be rounded the other way.
        assert torch.allclose(ours.ravel(), torch.from_numpy(model.x), rtol=0, atol=1e-6), index


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_momentum_of_dense_steps_moves_the_parameters_as_far_as_torchs(nesterov):
    """Gradients end at the switch; all that is left is momentum m, on each rank in its errors.

    E_t + u_t = E_(t-1) + beta u_(t-1) with E = mean_i e_i + s, so what is owed in the end is (E + beta u) / (1 - beta), less
    beta u with nesterov, which has moved ahead.
    """
    lr, beta = 0.1, 0.5

    def train(communicator, compresses):
        params = params_of(torch.float64)
        optimizer = torch.optim.SGD(params, lr=lr, momentum=beta, nesterov=nesterov)
        for step in range(5):
            make_step(optimizer, params, gradients_of(step, 0))
        stepping = compress(optimizer, communicator) if compresses else optimizer
        for _ in range(50):
            make_step(stepping, params, [torch.zeros_like(p) for p in params])
        if compresses:
            state, errors = optimizer.state_dict()["state"], stepping.state.outstanding()
            for i, p in enumerate(params):
                u = state[i]["momentum_buffer"]
                p.data -= lr * ((errors[p] + beta * u) / (1 - beta) - (beta * u if nesterov else 0.0))
        return [p.detach() for p in params]

    (expected,) = run_threads(1, train, False)
    for ours in run_threads(4, train, True):
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(ours, expected, strict=True))


# The founding note's identity

LATE, NEVER = slice(40, 60), slice(60, 70)
FIRST_LATE = 5
IDENTITY_NUMEL, IDENTITY_STEPS, IDENTITY_LR = 300, 90, 0.01


def target(rank):
    return noise(IDENTITY_NUMEL, 22, rank, dtype=torch.float64)


def identity_gradient(kind, x, step, rank):
    """``noise``: independent of x. ``x``: of a quadratic function, another on each rank, plus noise."""
    gradient = noise(IDENTITY_NUMEL, 23, step, rank, dtype=torch.float64) + 0.1
    if kind == "x":
        gradient = 0.3 * gradient + (x - target(rank)) * (1 + 0.2 * rank)
    gradient[NEVER] = 0.0
    # Late coordinates: the first gradient of each at another step, on one rank; then on all.
    for number, coordinate in enumerate(range(LATE.start, LATE.stop)):
        first = FIRST_LATE + 3 * number
        if step < first or (step == first and rank != number % 4):
            gradient[coordinate] = 0.0
    return gradient


@pytest.mark.parametrize("kind", ["noise", "x"])
def test_the_telescoping_identity(kind):
    """x_t = x_0 - lr sum_s mean_i g_i(x_s) + lr (mean_i e_i + s), momentum 0, constant lr: to rounding, at every step.

    From steps 2 and 4: u_s = mean_i g_i + E_{s-1} - E_s with E = mean_i e_i + s, so sum_s u_s = sum_s mean_i g_i - E_t. That
    holds for coordinates that are not live as well: u is zero there, and their gradients add up in the errors.
    """

    def fn(communicator):
        p = nn.Parameter(noise(IDENTITY_NUMEL, 24, dtype=torch.float64))
        compressed = compress(torch.optim.SGD([p], lr=IDENTITY_LR), communicator)
        trace = []
        for step in range(IDENTITY_STEPS):
            x = p.detach().clone()
            p.grad = identity_gradient(kind, x, step, communicator.rank)
            assert compressed.step()
            trace.append((x, p.detach().clone(), compressed.state.outstanding()[p]))
        return trace

    trace, *others = run_threads(4, fn, timeout=TIMEOUT_SECONDS)
    for (_, x, error), *rest in zip(trace, *others, strict=True):
        assert all(torch.equal(x, other) and torch.equal(error, theirs) for _, other, theirs in rest)
    x_0, total = trace[0][0], torch.zeros(IDENTITY_NUMEL, dtype=torch.float64)
    for step, (x, after, error) in enumerate(trace):
        total += sum(identity_gradient(kind, x, step, rank) for rank in range(4)) / 4
        assert torch.allclose(after, x_0 - IDENTITY_LR * (total - error), rtol=0, atol=1e-13), step
        assert error.abs().max() > 0.1  # else nothing would be proved
    moved = torch.stack([after for _, after, _ in trace]).ne(x_0)
    assert not moved[:, NEVER].any()
    assert not moved[: REFRESH_STEPS - 1, LATE].any()
    assert moved[REFRESH_STEPS + 1 :, LATE].all()  # those up to step 62 at once; none begins later


# Coordinates without gradient


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {}], ids=name_of)
@pytest.mark.parametrize("local_world_size", [1, 2])
def test_coordinates_without_gradient_stay_bitwise_and_late_ones_lose_nothing(options, local_world_size):
    world_size, steps, first = 4, 80, 3

    def gradient(step, rank):
        g = noise(256, 25, step, rank)
        g[:100] = 0.0
        if step == first and rank == 1:
            g[:40] = 2.0 + torch.arange(40.0)
        return g

    def fn(communicator):
        p = nn.Parameter(noise(256, 26))
        with torch.no_grad():
            p[50] = -0.0
        groups = exchange_groups(communicator, local_world_size)
        compressed = CompressedOptimizer(
            torch.optim.SGD([p], lr=0.1, **options),
            CompressionConfig(block_size=BLOCK_SIZE),
            communicator,
            {},
            groups=groups,
        )
        trace = [p.detach().clone()]
        for step in range(steps):
            p.grad = gradient(step, communicator.rank)
            compressed.step()
            trace.append(p.detach().clone())
            if step == REFRESH_STEPS - 1:
                waiting = compressed.state.outstanding()[p][:40].clone()
        return torch.stack(trace), waiting

    (trace, waiting), *others = run_threads(world_size, fn)
    assert all(torch.equal(other, trace) for other, _ in others)
    bits = trace[:, 40:100].view(torch.int32)
    assert torch.equal(bits, bits[:1].expand_as(bits))
    assert torch.equal(trace[: REFRESH_STEPS + 1, :40], trace[:1, :40].expand(REFRESH_STEPS + 1, 40))
    assert torch.allclose(waiting, (2.0 + torch.arange(40.0)) / world_size)  # all of it, on one rank
    assert (trace[REFRESH_STEPS + 1, :40] != trace[0, :40]).all()


@pytest.mark.parametrize(("options", "dense_steps"), [({"weight_decay": 0.1}, 0), ({"momentum": 0.5}, 1)])
def test_without_gradient_in_the_first_compressed_step_decay_and_dense_momentum_still_move_as_torchs(options, dense_steps):
    """All of one block is alike: nothing is lost when it is quantized."""

    def train(communicator, compresses):
        p = nn.Parameter(torch.ones(2 * BLOCK_SIZE, dtype=torch.float64))
        optimizer = torch.optim.SGD([p], lr=0.1, **options)
        for _ in range(dense_steps):
            make_step(optimizer, [p], [torch.ones_like(p)])
        stepping, before = compress(optimizer, communicator) if compresses else optimizer, p.detach().clone()
        for _ in range(30):
            make_step(stepping, [p], [(torch.arange(2 * BLOCK_SIZE) >= BLOCK_SIZE).double()])
        return (p.detach() - before)[:BLOCK_SIZE]

    (expected,) = run_threads(1, train, False)
    assert (expected < -0.04).all()
    assert all(torch.allclose(moved, expected, rtol=1e-6) for moved in run_threads(2, train, True))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_first_step_that_does_not_count_makes_nothing_live(overlap):
    """Its gradient is infinite where there never is one; and the run is, bitwise, the one without this step."""

    def fn(communicator, bad):
        p = nn.Parameter(noise(256, 27))
        compressed = CompressedOptimizer(
            torch.optim.SGD([p], lr=0.1, momentum=0.9),
            CompressionConfig(block_size=BLOCK_SIZE),
            communicator,
            {},
            groups=exchange_groups(communicator),
            overlap=overlap,
        )
        trace = []
        for step in range(-1 if bad else 0, 70):
            p.grad = noise(256, 28, step + 1, communicator.rank)
            p.grad[::2] = 0.0  # in blocks whose other elements train
            if step < 0 and communicator.rank == 1:
                p.grad[:100:2] = torch.inf
            compressed.gradients_ready([p])
            assert compressed.step() == (step >= 0)
            trace.append(p.detach().clone())
        return torch.stack(trace[-70:])

    expected, trace = (run_threads(2, fn, bad)[0] for bad in (False, True))
    assert torch.equal(expected, trace)
    assert torch.equal(trace[:, ::2], noise(256, 27)[::2].expand(70, 128))


# Saved and resumed


def resumed(saved, communicator, *, block_size=BLOCK_SIZE, **options):
    """As the checkpoint does it: stock state, shared state, errors."""
    params = [nn.Parameter(x.clone()) for x in saved["params"]]
    optimizer = torch.optim.SGD(params, lr=0.1, **options)
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    compressed = compress(optimizer, communicator, block_size=block_size)
    compressed.restore_(dict(zip(params, saved["shared"], strict=True)), block_size=BLOCK_SIZE)
    return params, optimizer, compressed


def saved_run(communicator, steps, **options):
    params = params_of(torch.float32)
    optimizer = torch.optim.SGD(params, lr=0.1, **options)
    compressed = compress(optimizer, communicator)
    for step in range(steps):
        make_step(compressed, params, gradients_of(step, communicator.rank, torch.float32))
    return saved_state(params, optimizer, compressed)


def saved_state(params, optimizer, compressed):
    shared = compressed.state.shared_state()
    return {
        "params": [p.detach().clone() for p in params],
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "shared": [{k: v.clone() for k, v in shared[p].items()} for p in params],
        "worker": [r._replace(values=r.values.clone()) for r in compressed.state.worker_errors()],
        "server": [r._replace(values=r.values.clone()) for r in compressed.state.server_errors()],
    }


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True}], ids=name_of)
def test_the_state_dict_is_that_of_a_stock_optimizer(options):
    saved = run_threads(2, saved_run, 5)[0] if not options else run_threads(2, lambda c: saved_run(c, 5, **options))[0]
    params = [nn.Parameter(x.clone()) for x in saved["params"]]
    stock = torch.optim.SGD(params, lr=0.3, **options)
    stock.load_state_dict(saved["optimizer"])
    assert stock.param_groups[0]["lr"] == 0.1
    for p in params:
        buffer = stock.state[p].get("momentum_buffer")
        assert (buffer is not None) == bool(options)
        assert buffer is None or (buffer.shape == p.shape and buffer.dtype == p.dtype and buffer.abs().min() > 0)
    make_step(stock, params, gradients_of(5, 0, torch.float32))


def test_before_the_first_average_a_resumed_run_still_asks_who_is_live():
    def fn(communicator):
        saved = saved_run(communicator, 0, momentum=0.9)
        params, _, compressed = resumed(saved, communicator, momentum=0.9)
        gradients = gradients_of(0, communicator.rank, torch.float32)
        gradients[3][:70] = 0.0
        before = params[3].detach().clone()
        for _ in range(3):
            make_step(compressed, params, gradients)
        assert torch.equal(params[3][:70], before[:70])
        assert (params[3][70:] != before[70:]).all()

    run_threads(2, fn)


def test_a_resumed_run_goes_on_bitwise_where_gradients_are_missing():
    """In its first step, all of a tensor and half of another. Neither run has errors then, which would tell who is live."""

    def fn(communicator):
        params = params_of(torch.float32)
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        compressed = compress(optimizer, communicator)
        for step in range(3):
            make_step(compressed, params, gradients_of(step, communicator.rank, torch.float32))
        saved = saved_state(params, optimizer, compressed)
        compressed.state.add_errors_(*([r._replace(values=-r.values) for r in saved[each]] for each in ("worker", "server")))
        others, _, other = resumed(saved, communicator, momentum=0.9)
        for step in range(3, 7):
            gradients = gradients_of(step, communicator.rank, torch.float32)
            if step == 3:
                gradients[0][::2], gradients[3] = 0.0, None
            make_step(compressed, params, gradients)
            make_step(other, others, gradients)
            assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True)), step
        assert not torch.equal(params[3], saved["params"][3])

    run_threads(2, fn)


def test_a_run_of_one_rank_resumed_on_two_leaves_alone_what_never_had_a_gradient():
    def gradients(step, rank):
        each = gradients_of(step, rank, torch.float32)
        each[3][:70] = 0.0
        return each

    def alone(communicator):
        params = params_of(torch.float32)
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        compressed = compress(optimizer, communicator)
        for step in range(3):
            make_step(compressed, params, gradients(step, 0))
        shared = compressed.state.shared_state()
        state = copy.deepcopy(optimizer.state_dict())
        return {"params": [p.detach() for p in params], "optimizer": state, "shared": [shared[p] for p in params]}

    (saved,) = run_threads(1, alone)

    def fn(communicator):
        params, _, compressed = resumed(saved, communicator, momentum=0.9)
        for step in range(3, 6):
            make_step(compressed, params, gradients(step, communicator.rank))
        assert torch.equal(params[3][:70], saved["params"][3][:70])
        assert (params[3][70:] != saved["params"][3][70:]).all()

    run_threads(2, fn)


def test_every_combination_makes_steps_whatever_torchs_implementation_would_be():
    """What torch's constructor allows; torch's own step is not called, so ``fused`` and ``foreach`` change no bit."""

    def train(options):
        return run_threads(2, lambda communicator: saved_run(communicator, 3, **options))[0]["params"]

    for momentum, dampening, nesterov in itertools.product((0.0, 0.9), (0.0, 0.5), (False, True)):
        if nesterov and (not momentum or dampening):
            continue  # torch refuses it
        options = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        params = train(options)
        assert all(bool(x.isfinite().all()) for x in params)
        for implementation in ("fused", "foreach"):
            assert all(torch.equal(a, b) for a, b in zip(params, train({**options, implementation: True}), strict=True))
