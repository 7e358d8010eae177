"""What the criterion is told of a step: rho, against a second moment that was kept before it."""

import math

import pytest
import torch
from torch import nn

from lightning_onebit.lightning import gradient_ratios as module
from lightning_onebit.lightning.gradient_ratios import gradient_ratios

BETA2 = 0.99


def stepped(gradients, *, kind=torch.optim.Adam, dtype=torch.float32, **options):
    """An optimizer after a step by each of the gradients (one list per parameter), and rho by hand from a kept copy of v."""
    torch.manual_seed(0)
    params = [
        nn.Parameter(torch.randn(next((g.shape for g in each if g is not None), (4,)), dtype=dtype)) for each in gradients
    ]
    optimizer = kind(params, betas=(0.9, BETA2), **options)
    expected = [math.nan] * len(params)
    for step in range(len(gradients[0])):
        for index, (p, each) in enumerate(zip(params, gradients, strict=True)):
            p.grad = None if each[step] is None else each[step].to(dtype)
            state = optimizer.state[p]
            if p.grad is not None and int(state.get("step", 0)):
                v = state["exp_avg_sq"].double() / (1 - BETA2 ** int(state["step"]))
                g = p.grad.double()
                if kind is torch.optim.Adam:
                    g = g + options.get("weight_decay", 0.0) * p.detach().double() * (-1 if options.get("maximize") else 1)
                seen = v.sqrt() > options.get("eps", 1e-8)
                a_squared = (g / (v.sqrt() + options.get("eps", 1e-8))) ** 2
                expected[index] = float(a_squared[seen].clamp(max=1 / (1 - BETA2)).mean())
        optimizer.step()
    return params, optimizer, expected


def noise(*shape, steps=6, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return [scale * torch.randn(shape, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    "options",
    [{}, {"foreach": True}, {"fused": True}, {"maximize": True}, {"weight_decay": 0.1}, {"eps": 0.3}, {"lr": 1.0e-4}],
)
def test_rho_is_that_of_a_second_moment_kept_before_the_step(kind, options):
    options = {"lr": 1e-6, **options}
    params, optimizer, expected = stepped([noise(40, 30), noise(7), noise(3, 5, 2)], kind=kind, **options)
    found = gradient_ratios(optimizer)
    assert [found[p].mean for p in params] == pytest.approx(expected, rel=1e-3)
    assert all(found[p].steps == 5 for p in params)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.bfloat16, 0.05)])
def test_other_dtypes(dtype, tolerance):
    (p,), optimizer, (expected,) = stepped([noise(64, 64)], dtype=dtype)
    assert gradient_ratios(optimizer)[p].mean == pytest.approx(expected, rel=tolerance)


def test_nothing_is_modified_and_nothing_is_left_behind():
    params, optimizer, _ = stepped([noise(40, 30), noise(7)], weight_decay=0.1)
    before = [t.clone() for p in params for t in (p.detach(), p.grad, *optimizer.state[p].values())]
    gradient_ratios(optimizer)
    after = [t for p in params for t in (p.detach(), p.grad, *optimizer.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(p.grad.requires_grad for p in params)


def test_a_gradient_out_of_nowhere_is_clamped():
    gradients = [torch.ones(10)] * 5 + [1e6 * torch.ones(10)]
    (p,), optimizer, _ = stepped([gradients])
    # 1e12 of v_hat_t is the newest square: what is left of the others is rounding, and says nothing.
    assert gradient_ratios(optimizer).get(p) is None
    (p,), optimizer, _ = stepped([[torch.ones(10)] * 5 + [100 * torch.ones(10)]])
    assert gradient_ratios(optimizer)[p].mean == pytest.approx(1 / (1 - BETA2))


def test_elements_and_tensors_without_an_earlier_gradient_do_not_count():
    rows = noise(10, 4)
    for g in rows:
        g[3:] = 0
    rows[-1][3:6] = 1.0  # rows whose first gradient this is
    late, never, first = [None] * 5 + noise(4, steps=1), [None] * 6, noise(4, steps=1)
    (p, *_), optimizer, (expected, *_) = stepped([rows, late, never])
    found = gradient_ratios(optimizer)
    assert set(found) == {p}
    assert found[p].numel == 12
    assert found[p].mean == pytest.approx(expected, rel=1e-3)
    assert gradient_ratios(stepped([first])[1]) == {}


def test_a_gradient_that_is_rounding_only_is_not_judged():
    """As that of an attention's key bias: below eps, or above it, but nothing beside the others."""
    small, large = noise(16, scale=1e-9), noise(50, 50, scale=1e-2)
    (p, q), optimizer, _ = stepped([small, large])
    assert set(gradient_ratios(optimizer)) == {q}
    small, large = noise(16, scale=1e-7), noise(50, 50, scale=1.0)
    (p, q), optimizer, _ = stepped([small, large])
    assert set(gradient_ratios(optimizer)) == {q}
    (p,), optimizer, _ = stepped([noise(16, scale=1e-7)])
    assert set(gradient_ratios(optimizer)) == {p}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad):
    gradients = noise(20)
    gradients[-1][4] = bad
    (p, q), optimizer, _ = stepped([gradients, noise(8)])
    found = gradient_ratios(optimizer)
    assert not math.isfinite(found[p].mean)
    assert math.isfinite(found[q].mean)


def test_of_large_models_a_sample_is_looked_at_that_counts_for_all(monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 4000)
    (p, q), optimizer, expected = stepped([noise(200, 100), noise(30)])
    found = gradient_ratios(optimizer)
    assert found[p].numel == pytest.approx(20_000, rel=0.01)
    assert found[q].numel == 30
    assert found[p].mean == pytest.approx(expected[0], rel=0.2)
    assert found[q].mean == pytest.approx(expected[1], rel=1e-3)
