"""The compressed all-reduce on gloo, against a float64 model of one process. Every rank has data of its own."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from model import ErrorFeedbackModel
from ranks import run_ranks
from torch import nn

from lightning_onebit import ErrorFeedback, compressed_all_reduce


def values_of(rank, step, numel, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(numel, generator=generator, dtype=torch.float64).mul_(1.0 + rank).to(dtype)


def reduce_steps(rank, numel, steps, dtype=torch.float32, **kwargs):
    """Results of every step, and the errors left in the end."""
    state = ErrorFeedback(values_of(rank, 0, numel, dtype), **kwargs)
    results = [compressed_all_reduce(values_of(rank, step, numel, dtype), state) for step in range(steps)]
    return results, state.worker_error, state.server_error


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("numel", "block_size", "scale"), [(1, 8, "l2"), (1009, 64, "l2"), (4999, 2048, "l1"), (37, 16, "l1")]
)
def test_equals_float64_model(world_size, numel, block_size, scale):
    outcomes = run_ranks(
        world_size, lambda rank: reduce_steps(rank, numel, steps=8, block_size=block_size, scale=scale, dtype=torch.float64)
    )
    model = ErrorFeedbackModel(numel, world_size, block_size, scale)
    for step in range(8):
        expected = model.reduce([values_of(rank, step, numel, torch.float64).numpy() for rank in range(world_size)])
        for results, _, _ in outcomes:
            np.testing.assert_allclose(results[step].numpy(), expected, rtol=1e-6, atol=1e-6)
    server_error = sum(server for _, _, server in outcomes)
    np.testing.assert_allclose(server_error.numpy(), model.server_error, atol=1e-5)
    for rank, (_, worker_error, _) in enumerate(outcomes):
        np.testing.assert_allclose(worker_error.numpy(), model.worker_errors[rank], atol=1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_get_the_same_bits(world_size):
    outcomes = run_ranks(world_size, lambda rank: reduce_steps(rank, 5001, steps=5, block_size=256))
    for step in range(5):
        for results, _, _ in outcomes[1:]:
            assert torch.equal(results[step], outcomes[0][0][step])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_conservation(dtype):
    """Sum of results plus what is still held back equals the sum of the exact means (the telescoping identity)."""
    world_size, steps, numel = 3, 20, 777
    outcomes = run_ranks(world_size, lambda rank: reduce_steps(rank, numel, steps, dtype, block_size=64))
    results = outcomes[0][0]
    applied = torch.stack([r.double() for r in results]).sum(0)
    held_back = torch.stack([worker for _, worker, _ in outcomes]).double().mean(0)
    held_back += torch.stack([server for _, _, server in outcomes]).double().sum(0)
    exact = torch.stack(
        [values_of(rank, step, numel, dtype).double() for rank in range(world_size) for step in range(steps)]
    ).sum(0)
    # Results in half precision round once per step; the errors themselves are float32.
    tolerance = steps * 10 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-4
    assert (applied + held_back - exact / world_size).abs().max() < tolerance


def test_result_does_not_depend_on_the_bucket_size():
    def run(bucket_cap_mb):
        def fn(rank):
            return reduce_steps(rank, 20011, steps=4, block_size=64, bucket_cap_mb=bucket_cap_mb)

        return run_ranks(3, fn)

    reference = run(25.0)
    for bucket_cap_mb in (0.01, 0.0301):
        for (results, worker, _), (expected, expected_worker, _) in zip(run(bucket_cap_mb), reference, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
            assert torch.equal(worker, expected_worker)


def test_without_state_it_averages_once():
    results = run_ranks(2, lambda rank: compressed_all_reduce(torch.full((10,), float(rank + 1))))
    assert all(torch.allclose(r, torch.full((10,), 1.5)) for r in results)


def test_shapes_strides_and_empty_tensors():
    def fn(rank):
        strided = (torch.arange(12.0).view(3, 4) * (rank + 1)).t()
        assert not strided.is_contiguous()
        contiguous = strided.contiguous()
        assert torch.equal(compressed_all_reduce(strided), compressed_all_reduce(contiguous))
        assert compressed_all_reduce(torch.empty(0, 3)).shape == (0, 3)
        assert compressed_all_reduce(torch.tensor(float(rank))).shape == ()

    run_ranks(2, fn)


def test_subgroup():
    def fn(rank):
        group = dist.new_group([1, 2])
        if rank == 0:
            return None
        return compressed_all_reduce(torch.full((5,), float(rank)), group=group)

    results = run_ranks(3, fn)
    assert all(torch.allclose(r, torch.full((5,), 1.5)) for r in results[1:])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_nonfinite_values_are_refused_on_all_ranks_and_change_nothing(bad):
    def fn(rank):
        state = ErrorFeedback(torch.empty(100), block_size=16)
        compressed_all_reduce(values_of(rank, 0, 100), state)
        before = state.worker_error, state.server_error
        value = values_of(rank, 1, 100)
        if rank == 1:
            value[7] = bad
        kept = value.clone()
        with pytest.raises(FloatingPointError, match="this rank" if rank == 1 else "another rank"):
            compressed_all_reduce(value, state)
        assert torch.equal(value.nan_to_num(), kept.nan_to_num())
        assert torch.equal(state.worker_error, before[0])
        assert torch.equal(state.server_error, before[1])
        compressed_all_reduce(values_of(rank, 2, 100), state)

    run_ranks(2, fn)


def test_different_sizes_are_an_error_on_all_ranks():
    def fn(rank):
        with pytest.raises(ValueError, match="from 10 to 11"):
            compressed_all_reduce(torch.zeros(10 + rank))

    run_ranks(2, fn)


def test_parameters_are_reduced_as_by_torch_and_shared_memory_is_refused_before_anything():
    def fn(rank):
        exact = torch.arange(24.0).view(4, 6) * (1 + rank)
        kinds = [nn.Parameter(exact.clone()), nn.Parameter(exact.t().clone()).t(), exact.clone().requires_grad_()[:, ::2]]
        for tensor in kinds:
            state, plain = ErrorFeedback(tensor), tensor.detach().clone()
            expected = compressed_all_reduce(plain, ErrorFeedback(plain))
            assert compressed_all_reduce(tensor, state) is tensor
            assert torch.equal(tensor, expected)
        shared = torch.full((1, 6), 1.0 + rank).expand(4, 6)
        state = ErrorFeedback(shared)
        with pytest.raises(ValueError, match=r"share memory \(shape \(4, 6\), strides \(\d, 1\)\).*HINT: pass `tensor.cont"):
            compressed_all_reduce(shared, state)
        assert not state.worker_error.any()
        compressed_all_reduce(shared.contiguous(), state)
        return state.worker_error

    run_ranks(2, fn)


def test_misuse_is_explained():
    with pytest.raises(TypeError, match="int64"):
        compressed_all_reduce(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="int64"):
        compressed_all_reduce(torch.zeros(3, dtype=torch.int64), ErrorFeedback(torch.zeros(3)))
    with pytest.raises(ValueError, match="block_size: 12"):
        compressed_all_reduce(torch.zeros(3), block_size=12)
    with pytest.raises(ValueError, match=r"made for shape \(3,\)"):
        compressed_all_reduce(torch.zeros(4), ErrorFeedback(torch.zeros(3)))
    with pytest.raises(ValueError, match="float64 needs"):
        compressed_all_reduce(torch.zeros(3, dtype=torch.float64), ErrorFeedback(torch.zeros(3)))


def test_bytes_are_a_thirtieth_of_dense():
    def fn(rank):
        state = ErrorFeedback(torch.empty(1_000_000))
        compressed_all_reduce(values_of(rank, 0, 1_000_000), state)
        return state.communicator.counters.bytes_sent

    world_size = 4
    dense = 2 * (world_size - 1) / world_size * 4e6
    for sent in run_ranks(world_size, fn):
        assert dense / 32 < sent < dense / 31
