"""The norm sketch: linear, unbiased, of the promised accuracy, the same on all ranks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_onebit.sketch import NormSketch

CPU = torch.device("cpu")


def sketch_of(tensors, seed=0, k=256, numels=None):
    sketch = NormSketch(seed, device=CPU, numel=k)
    sketch.add_(tensors, numels or [t.numel() for t in tensors])
    return sketch


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 700), min_size=1, max_size=5), st.integers(0, 2**31), st.sampled_from([64, 256]))
def test_linear(numels, seed, k):
    generator = torch.Generator().manual_seed(seed)
    first, second = ([torch.randn(n, generator=generator) for n in numels] for _ in range(2))
    both = [2 * a - 3 * b for a, b in zip(first, second, strict=True)]
    expected = 2 * sketch_of(first, seed, k).buckets - 3 * sketch_of(second, seed, k).buckets
    assert torch.allclose(sketch_of(both, seed, k).buckets, expected, atol=1e-3)


@pytest.mark.parametrize("numel", [5, 256, 1000, 256 * 256 + 300])
def test_unbiased(numel):
    """The mean of the squared norm over many seeds; also where rotations repeat (more than k rows)."""
    k = 16 if numel > 10000 else 64
    vector = torch.randn(numel, generator=torch.Generator().manual_seed(1)) + 0.5
    trials = 300
    squares = torch.stack([sketch_of([vector], seed, k).norm() ** 2 for seed in range(trials)])
    relative = squares.mean() / vector.square().sum()
    assert abs(relative - 1) < 5 * math.sqrt(2 / k / trials)


def test_accuracy_is_as_promised():
    k = 1024
    vector = torch.randn(100_000, generator=torch.Generator().manual_seed(1)).pow(3)
    squares = torch.stack([sketch_of([vector], seed, k).norm() ** 2 for seed in range(200)]) / vector.square().sum()
    assert squares.std() < 1.2 * math.sqrt(2 / k)


def test_mean_of_sketches_is_sketch_of_mean():
    """Local norms, for comparison, are several times too large when the ranks' noise cancels in the mean."""
    ranks = [torch.randn(200_000, generator=torch.Generator().manual_seed(rank)) + 0.05 for rank in range(8)]
    sketches = [sketch_of([r], seed=3, k=16384) for r in ranks]
    mean = torch.stack([s.buckets for s in sketches]).mean(0)
    exact = torch.stack(ranks).mean(0).norm()
    assert abs(mean.norm() / exact - 1) < 0.03
    assert torch.stack(ranks).norm(dim=1).mean() > 2.5 * exact


def test_place_depends_on_numels_only():
    first, second = torch.randn(100), torch.randn(50)
    zeros = sketch_of([first, torch.zeros(77), second])
    missing = sketch_of([first, None, second], numels=[100, 77, 50])
    assert torch.equal(zeros.buckets, missing.buckets)


def test_shapes_and_dtypes():
    matrix = torch.randn(30, 20, dtype=torch.float64)
    assert torch.equal(sketch_of([matrix]).buckets, sketch_of([matrix.ravel()]).buckets)
    assert sketch_of([matrix.bfloat16()]).buckets.dtype == torch.float32
    assert sketch_of([]).norm() == 0


def test_nonfinite_values_show():
    assert not torch.isfinite(sketch_of([torch.tensor([1.0, float("nan")])]).norm())
