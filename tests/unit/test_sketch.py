"""The norm sketch: linear, unbiased, of the promised accuracy, the same on all ranks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_onebit.engine.clipping import NormSketch, sketch_numel

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


def layer_gradient(outputs, inputs):
    """Outer product of one example: outputs' derivatives, all of one sign after a ReLU, times the inputs."""
    return torch.outer(outputs, inputs).ravel()


ROWS, K = 200, 128
GENERATOR = torch.Generator().manual_seed(1)
OUTPUTS, INPUTS = torch.rand(ROWS, generator=GENERATOR), torch.randn(K, generator=GENERATOR)
VECTORS = {
    "noise": torch.randn(ROWS * K, generator=GENERATOR),
    "heavy tail": torch.randn(ROWS * K, generator=GENERATOR).pow(3),
    "all alike": torch.ones(ROWS * K),
    "layer": layer_gradient(OUTPUTS, INPUTS),
    "layer, one input": layer_gradient(OUTPUTS, torch.eye(K)[7]),
    "layer, one output": layer_gradient(torch.eye(ROWS)[7], INPUTS),
    "rows at a distance": torch.eye(K)[3].repeat(ROWS) * (torch.arange(ROWS * K) % (K * K // 2) < K),
}


@pytest.mark.parametrize("kind", VECTORS)
def test_unbiased_and_of_the_promised_deviation_whatever_the_vector(kind):
    """Over many seeds. Signs or buckets that repeat from row to row would fail here: see the docstring of the class."""
    vector, trials = VECTORS[kind], 120
    squares = torch.stack([sketch_of([vector], seed, K).norm() ** 2 for seed in range(trials)]) / vector.square().sum()
    promised = math.sqrt(2 / K)
    assert abs(squares.mean() - 1) < 5 * promised / math.sqrt(trials)
    # The sample's own deviation scatters by 1 / sqrt(2 trials) = 6%, a little more as the distribution has a tail.
    assert squares.std() < 1.25 * promised


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 64), st.integers(0, 2**31))
def test_exact_up_to_k_elements(numel, seed):
    vector = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(sketch_of([vector], seed, 64).norm(), vector.norm(), rtol=1e-5)


def test_the_seed_and_nothing_else_determines_the_sketch():
    vector = torch.randn(5000)
    first, again, other = (sketch_of([vector], seed).buckets for seed in (4, 4, 5))
    torch.manual_seed(99)
    assert torch.equal(first, again)
    assert torch.equal(first, sketch_of([vector], 4).buckets)
    assert not torch.equal(first, other)


def test_cutting_the_vector_elsewhere_changes_nothing():
    """However parameters are grouped, rows and draws go on where they were."""
    vector = torch.randn(300 * 64 + 17)
    whole = sketch_of([vector], k=64)
    for cuts in ([1], [64, 100], [5, 300 * 64], [7000, 7001, 19000]):
        assert torch.equal(sketch_of(torch.tensor_split(vector, cuts), k=64).buckets, whole.buckets)


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


@pytest.mark.parametrize(
    ("numel", "k"),
    [(0, 4096), (3_200_000, 4096), (2**23, 8192), (2**24, 16384), (10**9, 16384)],
)
def test_the_size_follows_that_of_the_model(numel, k):
    assert sketch_numel(numel) == k
