"""The second moment goes on, and D is renewed (DESIGN 2), on ranks that are threads: v against the true one, that of the
mean gradient, which nobody has; the whole algorithm against a float64 model; what must be equal bit for bit."""

import functools
import math
import threading

import numpy as np
import pytest
import torch
from model import RenewedAdamModel
from sklearn.datasets import load_digits
from thread_ranks import run_threads
from torch import nn

from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.quantize.logarithm import decode_logarithm, encode_logarithm
from lightning_onebit.refresh_schedule import is_refresh_due

WARMUP_STEPS = 10


def noise(shape, *key):
    """Normal numbers, others for each key of small integers; the caller's own."""
    return made_noise(tuple(shape), key).clone()


@functools.lru_cache(maxsize=10_000)
def made_noise(shape, key):
    """Asked for by every rank, and by the model again."""
    seed = 0
    for number in key:
        seed = 1009 * seed + number + 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The whole algorithm

GROUPS = (
    {"shapes": [(17, 11), (5,)], "lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0},
    {"shapes": [(250,), ()], "lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1},
)
NEVER, RARE = slice(0, None, 7), slice(3, None, 4)


def gradient(rank, step, index, shape):
    """Partly the same on all ranks; sizes change with time. Of the first and third tensor some coordinates have seldom a
    gradient, each time on one rank, and of the first some never."""
    size = torch.logspace(-2, 1, math.prod(shape), dtype=torch.float64).view(shape) * (1 + index) * 1.02**step
    g = (noise(shape, rank, step, index) + 0.8 * noise(shape, step, index) + 0.3) * size
    if index in (0, 2):
        g.view(-1)[RARE] *= step >= WARMUP_STEPS + 3 and (step + rank) % 5 == 0
    if index == 0:
        g.view(-1)[NEVER] = 0.0
    return g


def make_optimizer(kind, dtype=torch.float64):
    groups, index = [], 0
    for group in GROUPS:
        params = []
        for shape in group["shapes"]:
            params.append(nn.Parameter(noise(shape, 7, index).to(dtype)))
            index += 1
        groups.append({"params": params, **{k: v for k, v in group.items() if k != "shapes"}})
    return kind(groups)


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(optimizer, rank, step, gradient):
    for index, p in enumerate(params_of(optimizer)):
        p.grad = gradient(rank, step, index, p.shape).to(p.dtype)


def mean_gradient(ranks):
    return lambda _, step, index, shape: sum(gradient(rank, step, index, shape) for rank in range(ranks)) / ranks


def start(kind, ranks, dtype=torch.float64):
    """An optimizer after its warm-up."""
    optimizer = make_optimizer(kind, dtype)
    for step in range(WARMUP_STEPS):
        set_gradients(optimizer, 0, step, mean_gradient(ranks))
        optimizer.step()
    return optimizer


def train(communicator, kind, steps, *, dtype=torch.float64, groups=None, overlap=False, gradient=gradient, **config):
    """Parameters and all state after every compressed step."""
    optimizer = start(kind, communicator.world_size, dtype)
    settings = CompressionConfig(**{"block_size": 64, "variance_refresh": "auto", **config})
    compressed = CompressedOptimizer(optimizer, settings, communicator, {}, groups=groups, overlap=overlap)
    history = []
    for step in range(WARMUP_STEPS, WARMUP_STEPS + steps):
        set_gradients(optimizer, communicator.rank, step, gradient)
        compressed.gradients_ready(params_of(optimizer)[::-1])
        compressed.step()
        v = [entry["exp_avg_sq"] for entry in optimizer.state_dict()["state"].values()]
        history.append([p.detach().clone() for p in params_of(optimizer)] + v)
    return history


def code(roots):
    """What the roots of one block decode to."""
    x = torch.from_numpy(roots).float()
    scale = x.max().expand(len(x)).contiguous()
    return decode_logarithm(encode_logarithm(x, scale), scale).double().numpy()


def train_model(kind, ranks, steps, *, every="auto", block_size=64):
    models = []
    for group in GROUPS:
        options = {k: v for k, v in group.items() if k != "shapes"}
        for shape in group["shapes"]:
            x = noise(shape, 7, len(models)).numpy()
            decoupled = kind is torch.optim.AdamW
            settings = {"decoupled": decoupled, "block_size": block_size, "scale": "l2", "space": "update"}
            model = RenewedAdamModel(x, ranks, code=code, every=every, **settings, **options)
            models.append((model, shape))
    history = []
    for step in range(WARMUP_STEPS + steps):
        for index, (model, shape) in enumerate(models):
            if step == WARMUP_STEPS:
                model.freeze()
            grads = [gradient(rank, step, index, shape).numpy() for rank in range(ranks)]
            model.warmup_step(grads) if step < WARMUP_STEPS else model.compressed_step(grads)
        if step >= WARMUP_STEPS:
            history.append([model.x.copy() for model, _ in models])
    return history


@pytest.mark.parametrize(
    ("ranks", "kind", "every"),
    [(3, torch.optim.Adam, "auto"), (3, torch.optim.AdamW, 7), (1, torch.optim.Adam, "auto"), (1, torch.optim.AdamW, 7)],
)
def test_100_steps_equal_the_float64_model(ranks, kind, every):
    """Refreshes and estimates of r included; tensors are so small that sketches are exact."""
    history, *others = (
        run_threads(ranks, train, kind, 100)
        if every == "auto"
        else run_threads(ranks, lambda communicator: train(communicator, kind, 100, variance_refresh=every))
    )
    assert all(
        torch.equal(a, b) for other in others for x, y in zip(other, history, strict=True) for a, b in zip(x, y, strict=True)
    )
    expected = train_model(kind, ranks, 100, every=every)
    for step, (tensors, expected_tensors) in enumerate(zip(history, expected, strict=True)):
        for p, x in zip(tensors, expected_tensors, strict=False):
            error = np.abs(p.numpy().ravel() - x).max() / np.abs(x).max()
            assert error <= (1e-4 if ranks > 1 else 1e-9), f"relative error {error} at step {step}"
    p, first = history[-1][0].flatten(), history[0][0].flatten()
    assert torch.equal(p[NEVER], first[NEVER]) or kind is torch.optim.AdamW
    is_rare = torch.zeros(len(p), dtype=torch.bool)
    is_rare[RARE] = True
    is_rare[NEVER] = False
    assert (p != first)[is_rare].all()


def test_what_ranks_have_in_common_is_learned_from_the_first_estimate_of_a_tensor_on():
    """Whatever others had before; and anew with another number of ranks."""

    def fn(communicator):
        optimizer = start(torch.optim.Adam, 2)
        statistics = CompressedOptimizer(optimizer, CompressionConfig(), communicator, {})._sets[0].statistics

        def estimate(*quotients):
            squares = np.array([quotient > 0 for quotient in quotients], dtype=np.float32)
            statistics.take_over_(np.stack([np.array(quotients, dtype=np.float32), squares, squares, 0 * squares]))

        for _ in range(3):
            estimate(0.0, 0.6, 0.6, 0.6)
        estimate(0.9, 1.0, 0.6, 0.6)
        assert statistics.root_r**2 == pytest.approx([0.9, 0.8, 0.6, 0.6])
        saved = torch.tensor([0.7, 1.0, 1.0, 0.0, 9.0, 4.0], dtype=torch.float64)  # of four ranks
        statistics.restore_({i: {"gradient_statistics": saved} for i in range(4)})
        assert statistics.root_r**2 == pytest.approx([0.8] * 4)  # 0.6 + 0.4 / 2
        estimate(*[0.5] * 4)
        assert statistics.root_r**2 == pytest.approx([0.5] * 4)

    run_threads(2, fn)


def test_auto_refreshes_often_at_first():
    """The next after max(1, min(64, step / 8)) steps, whatever the step of the switch."""
    due, step = [], 1
    while step < 2000:
        due.append(step)
        step += max(1, min(64, step // 8))
    assert [step for step in range(1, 2000) if is_refresh_due(step, "auto")] == due
    assert [step for step in range(1, 30) if is_refresh_due(step, 7)] == [7, 14, 21, 28]
    assert not any(is_refresh_due(step, None) for step in range(100))


# v against the true one

DIGITS_PER_RANK, WORDS_PER_RANK, VOCABULARY, CONTEXT = 4, 32, 200, 3


class Vit(nn.Module):
    """A small vision transformer: 16 patches of 2 x 2 pixels."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Linear(4, 24)
        self.places = nn.Parameter(noise((16, 24), 1).float() * 0.02)
        layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(24, 10)

    def forward(self, images):
        patches = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        return self.head(self.encoder(self.patches(patches) + self.places).mean(dim=1))


class Words(nn.Module):
    """The next word from those before: most rows of the embedding and of the output's bias are rare."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.Sequential(nn.Linear(CONTEXT * 16, 32), nn.GELU(), nn.Linear(32, VOCABULARY))

    def forward(self, words):
        return self.layers(self.embedding(words).flatten(1))


def digits():
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16 - 0.3, dtype=torch.float32), torch.tensor(labels)

    def batch(rank, step):
        chosen = torch.randint(len(labels), (DIGITS_PER_RANK,), generator=torch.Generator().manual_seed(1000 * step + rank))
        return images[chosen], labels[chosen]

    return batch


def words():
    """Words as frequent as those of a language: the k-th comes up in proportion to 1 / k; each follows from the last two."""
    frequencies = 1 / torch.arange(1, VOCABULARY + 1)

    def batch(rank, step):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        text = torch.multinomial(frequencies, WORDS_PER_RANK * (CONTEXT + 1), replacement=True, generator=generator)
        text = text.view(WORDS_PER_RANK, -1)
        follows = (text[:, -2] * 7 + text[:, -3]) % VOCABULARY
        return text[:, :-1], torch.where(torch.rand(WORDS_PER_RANK, generator=generator) < 0.5, follows, text[:, -1])

    return batch


def v_against_true(make_model, batch, ranks, steps, *, beta2=0.999, warmup_steps=20, **config):
    """sqrt(v / v_true) of all coordinates where v_true is not 0, and the loss over the last steps."""

    def fn(communicator):
        with lock:
            torch.manual_seed(1)
            model = make_model()
        params = list(model.parameters())
        optimizer = torch.optim.AdamW(params, lr=3e-3, betas=(0.9, beta2), weight_decay=0.0)
        truth = [torch.zeros_like(p) for p in params]
        compressed, losses = None, []
        for step in range(warmup_steps + steps):
            inputs, labels = batch(communicator.rank, step)
            loss = nn.functional.cross_entropy(model(inputs), labels)
            grads = torch.autograd.grad(loss, params)
            losses.append(loss.item())
            mean = torch.cat([g.flatten() for g in grads])
            communicator.all_reduce_mean_(mean)
            means = [part.view_as(p) for part, p in zip(mean.split([p.numel() for p in params]), params, strict=True)]
            for v, g in zip(truth, means, strict=True):
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            for p, g in zip(params, means if step < warmup_steps else grads, strict=True):
                p.grad = g
            if step < warmup_steps:
                optimizer.step()
                continue
            if compressed is None:
                compressed = CompressedOptimizer(optimizer, CompressionConfig(**config), communicator, {})
            compressed.step()
        state = optimizer.state_dict()["state"]
        pairs = [(state[i]["exp_avg_sq"].flatten(), v.flatten()) for i, v in enumerate(truth)]
        return torch.cat([(v[true > 0] / true[true > 0]).sqrt() for v, true in pairs]), sum(losses[-50:]) / 50

    lock = threading.Lock()
    return run_threads(ranks, fn, timeout=110)[0]


@pytest.mark.parametrize(
    ("ranks", "steps", "median", "three_quarters"), [(4, 200, 0.08, 0.15), (16, 48, 0.12, 0.25)], ids=["4", "16"]
)
@pytest.mark.parametrize(("make_model", "make_data"), [(Vit, digits), (Words, words)], ids=["vit", "rare rows"])
def test_v_is_near_that_of_the_mean_gradient(make_model, make_data, ranks, steps, median, three_quarters):
    """Of all coordinates: off by so much in the median, and by so much at most for three quarters of them. (Seen with 4
    ranks: 2.3 and 1.8%, 8.7 and 6.3%; with r = 1 about 2x, with r = 1 / n about half where ranks have much in common.)"""
    ratio, loss = v_against_true(make_model, make_data(), ranks, steps, variance_refresh="auto")
    assert abs(ratio.median() - 1) <= median
    assert (ratio - 1).abs().quantile(0.75) <= three_quarters
    assert math.isfinite(loss)


def test_v_follows_where_ranks_begin_alike():
    """As those of a GAN's discriminator: at first all ranks have nearly the same gradients, which grow, so that D lags; then
    they have less and less in common, and r falls from 1 to 1 / n. What was learned at first must not stay. (Seen: 1.05;
    with quotients of sums, over a quarter of what v averages over: 1.35.)"""
    ranks, steps, grows, numel, beta2 = 4, 300, 50, 2000, 0.999

    def fn(communicator):
        p = nn.Parameter(torch.zeros(numel))
        optimizer, v = torch.optim.Adam([p], lr=1e-6, betas=(0.9, beta2)), torch.zeros(numel)
        compressed = None
        for step in range(steps):
            size, common = 1.1 ** min(step, grows), math.exp(-step / 30)
            alike = noise((numel,), step).mul_(common**0.5)
            g = [(alike + (1 - common) ** 0.5 * noise((numel,), rank, step)).float() * size for rank in range(ranks)]
            mean = sum(g) / ranks
            v.lerp_(mean.square(), 1 - beta2)
            if step == 20:
                compressed = CompressedOptimizer(optimizer, CompressionConfig(variance_refresh="auto"), communicator, {})
            p.grad = mean if compressed is None else g[communicator.rank]
            (compressed or optimizer).step()
        return (optimizer.state_dict()["state"][0]["exp_avg_sq"] / v).sqrt()

    for ratio in run_threads(ranks, fn):
        assert ratio.median() == pytest.approx(1, abs=0.08)


def test_half_of_a_block_changes_its_scale():
    """Becomes 4x smaller, or larger. The rounding must not stick: 900 steps later, nine times what v remembers, sqrt(v) is
    that of the new gradients, within 10% on both halves. Gradients are of one size and of either sign on each of two ranks,
    so v is known. With beta2 = 0.999 and 3,000 steps: test_quantized_variance.py."""
    steps, change, numel, beta2 = 1000, 100, 64, 0.99
    size = torch.ones(2, numel)
    size[:, numel // 2 :] = torch.tensor([[0.25], [4.0]])

    def fn(communicator):
        params = [nn.Parameter(torch.zeros(numel)) for _ in size]
        optimizer = torch.optim.Adam(params, lr=1e-6, betas=(0.9, beta2))
        for p in params:
            p.grad = torch.full((numel,), 0.5**0.5)
        for _ in range(20):
            optimizer.step()
        config = CompressionConfig(variance_refresh="auto", block_size=numel)
        compressed = CompressedOptimizer(optimizer, config, communicator, {})
        generator = torch.Generator().manual_seed(communicator.rank)
        for step in range(steps):
            signs = torch.randint(0, 2, size.shape, generator=generator).mul_(2).sub_(1)
            for p, g in zip(params, signs * size if step >= change else signs.float(), strict=True):
                p.grad = g
            compressed.step()
        state = optimizer.state_dict()["state"]
        return torch.stack([(2 * state[i]["exp_avg_sq"]).sqrt() / size[i] for i in range(len(size))])

    first, second = run_threads(2, fn, timeout=110)
    assert torch.equal(first, second)
    assert first.sub(1).abs().max() <= 0.1, first


@pytest.mark.parametrize("ranks", [2, 16])
def test_where_gradients_have_ended_a_refresh_makes_no_noise(ranks):
    """There u is what the quantizer makes of nothing: plus or minus the scale of its block. It must not grow with 1 / D."""
    numel, ended = 256, slice(0, None, 2)

    def fn(communicator):
        x = nn.Parameter(torch.zeros(numel))
        optimizer = torch.optim.Adam([x], lr=1.0, betas=(0.9, 0.95))
        for step in range(WARMUP_STEPS):
            x.grad = torch.stack([noise((numel,), rank, step) for rank in range(ranks)]).mean(0).float()
            optimizer.step()
        compressed = CompressedOptimizer(optimizer, CompressionConfig(variance_refresh=32), communicator, {})
        for step in range(WARMUP_STEPS, 140):
            x.grad = noise((numel,), communicator.rank, step).float()
            x.grad[ended] = 0.0
            compressed.step()
            if step == 40:
                before = x.detach().clone()
        return (x.detach() - before)[ended].square().mean().sqrt().item()

    assert run_threads(ranks, fn)[0] < 3  # learning rates


# D in blocks


@pytest.mark.parametrize("block_size", [64, 4096])
def test_coded_in_blocks_of_another_size_each_element_keeps_its_d(block_size):
    """Of a parameter whose second part begins within a block of before."""
    numel, before = 5000, 2048

    def fn(communicator):
        p = nn.Parameter(torch.zeros(numel))
        optimizer = torch.optim.Adam([p])

        def freeze(size):
            return CompressedOptimizer(optimizer, CompressionConfig(block_size=size), communicator, {})

        p.grad = torch.logspace(-3, 0, numel)
        optimizer.step()
        compressed = freeze(before)
        saved, shared = optimizer.state_dict()["state"][0]["exp_avg_sq"], compressed.state.shared_state()
        compressed.give_back_()
        freeze(block_size).restore_(shared, block_size=before)
        return saved, optimizer.state_dict()["state"][0]["exp_avg_sq"]

    for saved, restored in run_threads(2, fn):
        assert torch.allclose(restored, saved, rtol=0.1)


# A parameter without a step


def test_a_parameter_whose_first_gradient_comes_after_a_refresh_trains_from_the_next_one_on():
    """Refreshes end steps 2, 4, 6 and 8."""

    def fn(communicator):
        params = [nn.Parameter(torch.zeros(40)) for _ in range(2)]
        optimizer = torch.optim.Adam(params, lr=1e-2)
        params[0].grad = torch.ones(40)
        optimizer.step()
        compressed = CompressedOptimizer(optimizer, CompressionConfig(variance_refresh=2), communicator, {})
        moved = []
        for step in range(2, 9):
            params[0].grad, params[1].grad = torch.ones(40), torch.ones(40) if step >= 5 else None
            compressed.step()
            moved.append(bool((params[1] < 0).all()))
        assert moved == [step > 6 for step in range(2, 9)]
        assert all(bool(p.isfinite().all()) for p in params)

    run_threads(2, fn)
