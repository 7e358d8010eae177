"""``optimizer.state_dict()`` in the compressed phase: a stock optimizer goes on from it, and it takes no second copy."""

from copy import deepcopy
from itertools import accumulate

import pytest
import torch
from nodes import freeze, take_step, warmed_up
from ranks import run_ranks
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.profiler import ProfilerActivity, profile

from lightning_onebit.comm.groups import flat_groups
from lightning_onebit.comm.primitives import Communicator

SHAPES = [(37, 5), (130,), (4, 6, 3, 3), (0,), ()]
UNUSED = 1
WARMUP_STEPS = 5


def gradient(rank, step, index, shape, dtype=torch.float64):
    """Different everywhere; one parameter never has one."""
    if index == UNUSED:
        return None
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + index)
    g = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return g.to(memory_format=torch.channels_last) if g.dim() == 4 else g


def parameters(dtype=torch.float32):
    params = [nn.Parameter(torch.linspace(-1, 1, torch.Size(s).numel(), dtype=dtype).view(s)) for s in SHAPES]
    params[2] = nn.Parameter(params[2].detach().to(memory_format=torch.channels_last))
    return params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Adam, {"weight_decay": 0.1}),
        (Adam, {"fused": True}),
        (AdamW, {"capturable": True, "fused": True}),
        (SGD, {"momentum": 0.9, "nesterov": True}),
        (SGD, {"momentum": 0.9, "dampening": 0.5, "fused": True}),
        (SGD, {}),
    ],
)
def test_a_stock_optimizer_goes_on_from_it(kind, options, dtype):
    """The state has the names, dtypes, shapes and strides that torch itself would have written; all in order."""

    def fn(rank):
        groups = flat_groups(Communicator())
        optimizer = warmed_up(kind(parameters(dtype), lr=0.1, **options), 2, gradient, steps=WARMUP_STEPS)
        expected = optimizer.state_dict()
        compressed = freeze(optimizer, groups)
        at_freeze = optimizer.state_dict()
        for step in range(WARMUP_STEPS, WARMUP_STEPS + 3):
            assert take_step(optimizer, compressed, rank, step, gradient)
        state = optimizer.state_dict()
        assert state["param_groups"] == expected["param_groups"]
        assert list(state["state"]) == [i for i in range(len(SHAPES)) if i in state["state"]]
        for i, entry in expected["state"].items():
            assert list(state["state"][i]) == list(entry)
            for name, value in entry.items():
                now = state["state"][i][name]
                if value is None:
                    assert now is None
                    continue
                assert (now.dtype, now.shape, now.stride()) == (value.dtype, value.shape, value.stride())
                if name == "step":
                    assert (at_freeze["state"][i][name], now) == (WARMUP_STEPS, WARMUP_STEPS + 3)

        params = [nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
        stock = kind(params, lr=0.1, **options)
        stock.load_state_dict(deepcopy(state))
        for index, p in enumerate(params):
            p.grad = gradient(0, 99, index, p.shape, p.dtype)
        before = [p.detach().clone() for p in params]
        stock.step()
        moved = [not torch.equal(a, b) for a, b in zip(before, params, strict=True)]
        assert moved == [index != UNUSED and p.numel() > 0 for index, p in enumerate(params)]
        # And one that is given its own state back has the same.
        compressed.give_back_()
        own = optimizer.state_dict()
        assert list(own["state"]) == list(state["state"])
        for i, entry in own["state"].items():
            for name, value in entry.items():
                assert value is None or torch.equal(value, state["state"][i][name])
        return [p.detach() for p in params]

    first, second = run_ranks(2, fn)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_takes_little_more_memory_than_what_it_returns(dtype):
    numel, layers, bucket_mb = 2**16, 16, 0.25

    def fn(rank):
        optimizer = Adam([nn.Parameter(torch.ones(numel, dtype=dtype)) for _ in range(layers)])
        optimizer = warmed_up(optimizer, 2, gradient_of_layer, steps=1)
        compressed = freeze(optimizer, flat_groups(Communicator()), block_size=2048, bucket_cap_mb=bucket_mb)
        take_step(optimizer, compressed, rank, 1, gradient_of_layer)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            state = optimizer.state_dict()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        returned = sum(t.nbytes for entry in state["state"].values() for t in entry.values())
        assert returned == layers * (2 * numel * dtype.itemsize + 4)
        peak = max(accumulate(changes))
        assert peak >= returned  # else the profiler has not seen all
        # A bucket of 2**16 elements: u and what decoding it takes, and the float32 of one parameter.
        assert peak - returned < 12 * 4 * numel
        assert 12 * 4 * numel < returned

    run_ranks(2, fn)


def gradient_of_layer(rank, step, index, shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + index)
    return torch.randn(shape, generator=generator).to(dtype)
