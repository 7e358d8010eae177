"""Momentum space: the quantizer gives all elements of a block the same magnitude, which a tiny D makes a huge move."""

import threading

import pytest
import torch
from sklearn.datasets import load_digits
from thread_ranks import run_threads
from torch import nn

from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.methods import method_for

WORLD_SIZE, DENSE_STEPS, BATCH_SIZE = 4, 20, 16


def relu_cnn(seed):
    """Whose dead and nearly dead units have second moments far below those of others in their block."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def digits():
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_relu_cnn_trains(seed):
    """Unbounded, its largest weight grew from 0.3 to 80 or more in the first compressed step, and it was NaN after 5."""
    images, labels = digits()
    lock = threading.Lock()  # of the random generator, which ranks share

    def fn(communicator):
        with lock:
            model = relu_cnn(seed)
        params = list(model.parameters())
        optimizer = torch.optim.Adam(params, lr=1e-3)
        compressed, losses = None, []
        for step in range(DENSE_STEPS + 30):
            generator = torch.Generator().manual_seed(1000 * seed + WORLD_SIZE * step + communicator.rank)
            batch = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            for p, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
                p.grad = gradient.clone()
            losses.append(float(loss.detach()))
            if step < DENSE_STEPS:
                for p in params:
                    communicator.all_reduce_mean_(p.grad)
                optimizer.step()
                continue
            if compressed is None:
                compressed = CompressedOptimizer(optimizer, CompressionConfig(space="momentum"), communicator, {})
            before = [p.detach().clone() for p in params]
            assert compressed.step()
            largest_move = (
                method_for(optimizer).coefficients(optimizer.param_groups[0], step + 1, num_averaged=4).largest_move
            )
            moves = [float((p.detach() - x).abs().max()) for p, x in zip(params, before, strict=True)]
            assert max(moves) < largest_move * 1.001
            assert max(float(p.detach().abs().max()) for p in params) < 1.0
        assert compressed is not None
        outstanding = compressed.state.outstanding()
        before = [p.detach().clone() for p in params]
        compressed.give_back_()
        assert max(float((p.detach() - x).abs().max()) for p, x in zip(params, before, strict=True)) < largest_move * 1.001
        assert any(bool(error.abs().max() > 0) for error in outstanding.values())
        return losses

    histories = run_threads(WORLD_SIZE, fn)
    first, last = (sum(sum(losses[part]) for losses in histories) for part in (slice(20, 25), slice(45, 50)))
    assert last < 0.7 * first
