"""The engine as it runs on a GPU: Triton's kernels, errors committed late, no wait for the device. Here it is interpreted.

The expected results are those of the reference kernels, which commit at once, when all ranks know that the step counts.
"""

import functools
import math

import numpy as np
import pytest
import torch
from thread_ranks import exchange_groups, run_threads
from torch import nn

from lightning_onebit.comm.exchanger import ThreadExchanger
from lightning_onebit.config import CompressionConfig
from lightning_onebit.consistency.agreement import RanksDisagree
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.quantize.reference import ReferenceKernels

pytest.importorskip("triton", minversion="3.4")  # before, its interpreter lacks an operation
from interpreter import LateReferenceKernels, use_triton

from lightning_onebit.quantize.triton_tables import count_launches

SHAPES = ((12, 5), (3,), (1,), (20,), (4, 2))
ROWS = (slice(0, 2), slice(5, 6))
"""Rows of the first parameter without a gradient in the warm-up."""


def randn(shape, *key, dtype):
    """The caller's own."""
    return made_randn(tuple(shape), key).to(dtype, copy=True)


@functools.lru_cache(maxsize=10_000)
def made_randn(shape, key):
    seed = 0
    for number in key:
        seed = 1009 * seed + number + 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(kind, dtypes, **options):
    params = [nn.Parameter(randn(s, 7, i, dtype=dtypes[i % len(dtypes)])) for i, s in enumerate(SHAPES)]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 3e-3}]
    optimizer = kind(groups, lr=1e-2, **options)
    if kind is torch.optim.SGD:
        return params, optimizer
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = randn(p.shape, 11, step, i, dtype=p.dtype)
            if i == 0:
                for rows in ROWS:
                    p.grad[rows] = 0.0
        optimizer.step()
    return params, optimizer


def train(communicator, steps, *, kind=torch.optim.AdamW, dtypes=(torch.float32,), local_world_size=1, overlap=False,
          change=None, clip=None, late=False, options=None, config=None, refresh_at=None):  # fmt: skip
    """What a run leaves on one rank: by name, all tensors that its future depends on."""
    params, optimizer = make(kind, dtypes, **(options or {}))
    groups = exchange_groups(communicator, local_world_size)
    exchanger = ThreadExchanger() if overlap else None
    settings = CompressionConfig(**{"block_size": 32, "bucket_cap_mb": 4 * 70 / 2**20, **(config or {})})
    compressed = CompressedOptimizer(
        optimizer, settings, communicator, {}, groups=groups, exchanger=exchanger, overlap=overlap
    )
    made, norms = [], []
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = randn(p.shape, communicator.rank, step, i, dtype=p.dtype)
            if i == 0 and not (late and communicator.rank == 1):
                for rows in ROWS:
                    p.grad[rows] = 0.0
        if change is not None:
            change(communicator.rank, step, params, optimizer)
        if step == refresh_at:
            compressed.refresh_variance_()
        if clip is not None:
            norms.append(compressed.clip_grad_norm_(clip))
        if overlap:
            for p in reversed(params):
                compressed.gradients_ready([p])
        made.append(compressed.step())
    state = {f"parameter {i}": p.detach() for i, p in enumerate(params)}
    for number, each in enumerate(compressed._sets):
        for index, memory in enumerate(each.buckets.memories):
            for name in ("error", "server_error", "rms", "second_moment", "live", "live_before", "result"):
                if getattr(memory, name) is not None:
                    state[f"{name} of bucket {index} of set {number}"] = getattr(memory, name)
            if each.late:
                state[f"second moments {index} of {number}"] = each.late[index].second_moment
        if each.buckets.renews:
            state |= _renewed(number, each)
        if each.buckets.renews or refresh_at is not None:
            state |= _masks(number, each)
    if exchanger is not None:
        exchanger.close()
    return made, state, {i: dict(s) for i, s in optimizer.state_dict()["state"].items()}, norms


def _renewed(number, each):
    """What is kept of a set where D is renewed."""
    state = {f"statistics of {number}": torch.from_numpy(each.statistics.statistics)}
    for index, memory in enumerate(each.buckets.memories):
        for name in ("rms_code", "rms_scale", "second_moment", "second_moment_residual"):
            state[f"{name} of bucket {index} of set {number}"] = getattr(memory, name)
    return state


def _masks(number, each):
    """By what they say: after a refresh without a wait there always is one."""
    state = {}
    for index, memory in enumerate(each.buckets.memories):
        everything = torch.from_numpy(np.packbits(memory.layout.exists(), bitorder="little"))
        for name in ("live", "live_before"):
            mask = getattr(memory, name)
            state[f"{name} of bucket {index} of set {number}"] = everything if mask is None else mask & everything
    return state


def same(actual, expected):
    assert actual[0] == expected[0]
    assert actual[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        bits = torch.equal(actual[1][name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        assert bits, f"{name}: {actual[1][name]} instead of {tensor}"


def run_both(monkeypatch, world_size, steps, kernels=None, **arguments):
    """The results of all ranks: of Triton's ``kernels``, or others that commit late, and of the reference."""
    results = []
    for each in (kernels, ReferenceKernels):
        with monkeypatch.context() as patch:
            use_triton(patch, each)
            results.append(run_threads(world_size, lambda communicator: train(communicator, steps, **arguments)))
    for actual, expected in zip(*results, strict=True):
        same(actual, expected)
    for rank in results[0][1:]:
        for name in (name for name in rank[1] if name.startswith("parameter")):
            assert torch.equal(rank[1][name], results[0][0][1][name])
    return results


SGD = {"kind": torch.optim.SGD, "options": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}}


@pytest.mark.parametrize(
    "arguments",
    [
        {"config": {"scale": "l1", "space": "momentum"}},
        {"dtypes": (torch.bfloat16,)},
        {"dtypes": (torch.float16,), **SGD},
        {"dtypes": (torch.float32, torch.bfloat16, torch.float64)},
        {"kind": torch.optim.Adam, "options": {"weight_decay": 0.1, "maximize": True}},
        SGD,
    ],
    ids=["momentum", "bfloat16", "float16", "several", "Adam", "SGD"],
)
def test_late_commits_equal_early_ones_of_the_reference(monkeypatch, arguments):
    ((made, state, *_), _), _ = run_both(monkeypatch, 2, 3, **arguments)
    assert made == [True] * 3
    assert any("bucket 1" in name for name in state)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"local_world_size": 2},
        {"dtypes": (torch.float32, torch.bfloat16, torch.float64)},
        {"clip": 1.0, "late": True},
    ],
    ids=["flat", "nodes", "several", "clipped"],
)
def test_renewed_variance(monkeypatch, arguments):
    """What is learned of the gradients is launched before the host knows whether the step counts, and used by the next one:
    as when it is learned at the step's end. Steps that do not count teach nothing."""

    def change(rank, step, params, optimizer):
        if (rank, step) == (1, 3):
            params[1].grad[0] = math.inf
        if step == 5:
            params[3].grad = None

    world_size = 4 if arguments.get("local_world_size") == 2 else 2
    config = {"variance_refresh": "auto"}
    results = run_both(monkeypatch, world_size, 20, LateReferenceKernels, config=config, change=change, **arguments)
    made, state, *_ = results[0][0]
    assert made == [step != 3 for step in range(20)]
    statistics = state["statistics of 0"]
    assert statistics[:, 4].max() == 16
    assert ((statistics[:, 0] > 0) & (statistics[:, 0] < statistics[:, 1])).all()
    for other in results[0][1:]:
        assert torch.equal(other[1]["statistics of 0"], statistics)


def test_renewed_variance_by_interpreted_kernels(monkeypatch):
    run_both(monkeypatch, 2, 3, config={"variance_refresh": "auto"}, dtypes=(torch.float32,))


@pytest.mark.parametrize("arguments", [{}, {"local_world_size": 2}], ids=["flat", "nodes"])
def test_a_refresh_on_request(monkeypatch, arguments):
    """Collected from step 1 on, but for one that does not count, and renewed after step 17; and by interpreted kernels."""
    from lightning_onebit.engine import optimizer

    def change(rank, step, params, _):
        if (rank, step) == (1, 3):
            params[1].grad[0] = math.inf

    more = {"config": {"variance_refresh": None}, "change": change, "refresh_at": 1}
    world_size = 4 if arguments else 2
    without_masks = run_both(monkeypatch, world_size, 17, LateReferenceKernels, **more, **arguments)
    assert any("second_moment" in name for name in without_masks[0][0][1])
    monkeypatch.setattr(optimizer, "COLLECTING_STEPS", 2)
    results = run_both(monkeypatch, world_size, 5 if arguments else 4, None, **more, **arguments)
    made, state, *_ = results[0][0]
    assert made[:4] == [True, True, True, False]
    assert not any("second_moment" in name for name in state)


def test_nodes_average_first(monkeypatch):
    run_both(monkeypatch, 4, 2, local_world_size=2, dtypes=(torch.float32, torch.bfloat16))
    run_both(monkeypatch, 6, 8, LateReferenceKernels, local_world_size=3)


@pytest.mark.parametrize("arguments", [{}, SGD], ids=["AdamW", "SGD"])
def test_overlapped_equals_deferred(monkeypatch, arguments):
    results = []
    use_triton(monkeypatch, LateReferenceKernels)
    for overlap in (False, True):
        results.append(
            run_threads(2, lambda communicator, overlap=overlap: train(communicator, 5, overlap=overlap, **arguments))
        )
    for actual, expected in zip(*results, strict=True):
        same(actual, expected)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.float64)], ids=len)
def test_a_step_that_is_skipped_leaves_no_trace(monkeypatch, overlap, dtypes):
    def bad(rank, step, params, optimizer):
        if step == 4 and rank == 1:
            params[3].grad[5] = math.nan

    use_triton(monkeypatch, LateReferenceKernels)
    arguments = {"overlap": overlap, "dtypes": dtypes}
    without, with_bad = (
        run_threads(2, lambda communicator, n=n: train(communicator, n, change=bad, **arguments)) for n in (4, 5)
    )
    for (made, *state), expected in zip(with_bad, without, strict=True):
        assert made == [True] * 4 + [False]
        same((made[:4], *state), expected)


def test_what_follows_a_skipped_step(monkeypatch):
    def bad(rank, step, params, optimizer):
        if step in (0, 2, 3) and rank == step % 2:
            params[2].grad.fill_(math.inf)

    results, _ = run_both(monkeypatch, 2, 7, LateReferenceKernels, change=bad)
    assert results[0][0] == [False, True, False, False, True, True, True]
    run_both(monkeypatch, 2, 2, change=bad)


def test_parameters_that_sit_out(monkeypatch):
    """Parameter 1 on all ranks at step 2, parameter 4 at steps 3 and 4; parameter 3 on one rank, where it counts as zero."""

    def missing(rank, step, params, optimizer):
        for i in {2: [1], 3: [4], 4: [4]}.get(step, []):
            params[i].grad = None
        if step == 3 and rank == 0:
            params[3].grad = None

    run_both(monkeypatch, 2, 5, change=missing)


def test_a_parameter_sits_out_whoever_of_another_dtype_does_not(monkeypatch):
    seen = {}

    def missing(rank, step, params, optimizer):
        seen[rank, step] = params[1].detach().clone()
        if step == 2:
            params[1].grad = None

    use_triton(monkeypatch, LateReferenceKernels)
    dtypes = (torch.float32, torch.float64)
    run_threads(2, lambda communicator: train(communicator, 5, change=missing, dtypes=dtypes))
    for rank in range(2):
        assert [bool((seen[rank, step + 1] != seen[rank, step]).any()) for step in range(4)] == [True, True, False, True]


@pytest.mark.parametrize(("variance_refresh", "refreshed"), [(None, 8), ("auto", 4)])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16, torch.float32)], ids=["one dtype", "two dtypes"])
def test_late_coordinates_take_part_after_the_refresh(monkeypatch, dtypes, variance_refresh, refreshed):
    """On one rank they have gradients from the first compressed step on, the fourth in all. They move in the step after the
    next refresh, in every set. A later one may lead a bfloat16 back to where it was."""
    from lightning_onebit.engine import optimizer

    monkeypatch.setattr(optimizer, "REFRESH_STEPS", 8)
    seen = {}

    def look(rank, step, params, optimizer):
        seen[rank, 4 + step] = params[0].detach().clone()

    options = {"options": {"weight_decay": 0.0}, "config": {"variance_refresh": variance_refresh}, "change": look}
    run_both(monkeypatch, 2, 10, LateReferenceKernels, late=True, dtypes=dtypes, **options)
    for rows in ROWS:  # what a step finds, by its number
        start, *found = (seen[0, step][rows] for step in (4, *range(refreshed + 1, 14)))
        assert torch.equal(found[0], start)
        assert (found[1] != start)[start.abs() < 1].all()  # larger ones may need two steps in bfloat16
        assert (torch.stack(found) != start).any(dim=0).all()


def test_clipping_follows_the_norm_of_the_mean_and_scales_all(monkeypatch):
    use_triton(monkeypatch, LateReferenceKernels)
    seen = []

    def look(rank, step, params, optimizer):
        seen.append((rank, [p.grad.clone() for p in params]))

    results = run_threads(2, lambda communicator: train(communicator, 1, clip=0.5, change=look, kind=torch.optim.SGD))
    by_rank = dict(seen)
    mean = [(a + b) / 2 for a, b in zip(by_rank[0], by_rank[1], strict=True)]
    norm = torch.nn.utils.get_total_norm(mean)
    (first,), (second,) = (result[3] for result in results)
    assert torch.equal(first, second)
    assert abs(first / norm - 1) < 0.15  # 92 elements in 256 buckets: but for collisions exact


def test_a_coordinate_of_the_gradient_is_scaled_in_place_whatever_its_strides(monkeypatch):
    use_triton(monkeypatch)

    def fn(communicator):
        p = nn.Parameter(torch.zeros(4, 6))
        optimizer = torch.optim.SGD([p], lr=1.0)
        compressed = CompressedOptimizer(optimizer, CompressionConfig(block_size=8), communicator, {})
        p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(communicator.rank)).t()
        before = p.grad.clone()
        with count_launches() as launched:
            norm = compressed.grad_norm()
        assert launched["_sketch_kernel"] > 0
        assert torch.equal(p.grad, before)
        assert torch.equal(compressed.clip_grad_norm_(0.1), norm)
        assert torch.allclose(p.grad, before * (0.1 / (norm + 1e-6)))
        assert p.grad.stride() == (1, 4)
        compressed.step()

    run_threads(2, fn)


def test_ranks_that_disagree_make_no_step(monkeypatch):
    """Nobody has waited before kernels were launched, but nothing of the step remains."""
    use_triton(monkeypatch, LateReferenceKernels)

    def fn(communicator):
        params, optimizer = make(torch.optim.AdamW, (torch.float32,))
        compressed = CompressedOptimizer(optimizer, CompressionConfig(block_size=32), communicator, {})
        for i, p in enumerate(params):
            p.grad = randn(p.shape, communicator.rank, i, dtype=p.dtype)
        compressed.step()
        memory = compressed._sets[0].buckets.memories[0]
        before = [x.detach().clone() for x in (*params, memory.error, memory.server_error, memory.result)]
        optimizer.param_groups[1]["lr"] = 1e-3 * communicator.rank
        with pytest.raises(RanksDisagree, match="lr"):
            compressed.step()
        after = (*params, memory.error, memory.server_error, memory.result)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    run_threads(2, fn)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda groups: groups[0]["params"].pop(0), "since the second moment was frozen: removed: 'first'. State"),
        (
            lambda groups: groups[-1]["params"].append(groups[0]["params"].pop(0)),
            "frozen: moved to another group: 'first'. S",
        ),
        (lambda groups: groups.pop(), "frozen: removed: 'other'. State"),
        (lambda groups: groups[-1]["params"].append(nn.Parameter(torch.zeros(3))), r"frozen: new: 'one of shape \(3,\)'. S"),
        (lambda groups: groups[-1]["params"][-1].requires_grad_(True), "frozen: new: 'untrained'. S"),
        (
            lambda groups: groups[-1].update(params=[nn.Parameter(torch.zeros(3))]),
            r"frozen: new: 'one of shape \(3,\)'; removed: 'other'. S",
        ),
    ],
    ids=["removed", "moved", "group", "new", "trained now", "replaced"],
)
def test_it_is_said_which_parameters_have_changed_and_how(change, said):
    def fn(communicator):
        params, optimizer = make(torch.optim.AdamW, (torch.float32,))
        other, untrained = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(5), requires_grad=False)
        group = [other, untrained] if "untrained" in said else [other]  # where there is one, groups are looked at closely
        optimizer.add_param_group({"params": group, "tokens": communicator.rank})
        names = {params[0]: "first", other: "other", untrained: "untrained"}
        compressed = CompressedOptimizer(optimizer, CompressionConfig(block_size=32), communicator, names)
        for i, p in enumerate([*params, other]):
            p.grad = randn(p.shape, communicator.rank, i, dtype=p.dtype)
        optimizer.param_groups[-1]["tokens"] += 100 * communicator.rank  # is nobody's business
        assert compressed.step()
        change(optimizer.param_groups)
        with pytest.raises(RuntimeError, match=f"{said}.* HINT: call `strategy.resume_warmup.*requires_grad_"):
            compressed.step()

    run_threads(2, fn)


def test_a_parameter_that_is_new_on_all_ranks_is_refused_before_anything_changes(monkeypatch):
    use_triton(monkeypatch, LateReferenceKernels)

    def fn(communicator):
        params, optimizer = make(torch.optim.AdamW, (torch.float32,))
        compressed = CompressedOptimizer(optimizer, CompressionConfig(block_size=32), communicator, {})
        for i, p in enumerate(params):
            p.grad = randn(p.shape, communicator.rank, i, dtype=p.dtype)
        before = [p.detach().clone() for p in params]
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        with pytest.raises(RuntimeError, match="have changed since"):
            compressed.step()
        assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))

    run_threads(2, fn)
