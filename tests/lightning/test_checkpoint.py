"""Checkpoints of both phases: what they hold, and what a run does that resumes from them."""

import copy
import io
import itertools
import math
import os
import re
import shutil
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from ranks import run_trainers
from test_strategy import Messages
from trainers import Stepwise, fit, same_params

from lightning_onebit import FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch, VarianceStability
from lightning_onebit.checkpoint.manager import CheckpointManager
from lightning_onebit.checkpoint.parts import Parts
from lightning_onebit.checkpoint.state import CHECKPOINT_KEY, node_weights
from lightning_onebit.comm.topology import Topology
from lightning_onebit.config import CompressionConfig
from lightning_onebit.consistency.agreement import RanksDisagree
from lightning_onebit.engine import optimizer as engine
from lightning_onebit.engine.compressed_state import CompressedState
from lightning_onebit.methods import parameters_of

WARMUP, COMPRESSED = Phase.WARMUP, Phase.COMPRESSED
BATCHES = 30
FREEZE = 10
REFRESH = 8
"""Steps between refreshes where they matter, for short runs: late coordinates wait at 15, and train from 17 on."""


class SaveAt(pl.Callback):
    """Saves after a number of batches, on all ranks."""

    def __init__(self, path, batch):
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.batch:
            trainer.save_checkpoint(self.path)


class RefreshAfter(pl.Callback):
    """Asks for a refresh after a number of batches."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.batch:
            trainer.strategy.refresh_variance()


def run(world_size, *, strategy=None, model=Stepwise, **kwargs):
    callbacks = [PhaseSwitch(FixedStep(FREEZE)), *kwargs.pop("callbacks", [])]
    own = OneBitDDPStrategy(**(strategy or {}))
    return fit(own, world_size, batches=BATCHES, callbacks=callbacks, model=model(), **kwargs)


@pytest.mark.parametrize(("refresh", "window"), [("auto", 8), (None, 4)])
def test_the_criterion_goes_on_with_its_history(refresh, window, tmp_path):
    """The moment of the switch depends on it: with refreshes on one window, without on two."""
    path = tmp_path / "warmup.ckpt"

    def switch():
        return PhaseSwitch(VarianceStability(tolerance=0.9, window=window, min_steps=10, max_steps=12))

    def fn(rank):
        def strategy():
            return OneBitDDPStrategy(variance_refresh=refresh)

        options = {"world_size": 2, "batches": BATCHES}
        first, second = switch(), switch()
        full = fit(strategy(), callbacks=[first, SaveAt(path, 7)], model=Stepwise(), **options)[1]
        resumed = fit(strategy(), callbacks=[second], model=Stepwise(), ckpt_path=path, **options)[1]
        assert first.verdict == second.verdict
        begin = range(3, 6) if refresh == "auto" else range(7, 10)  # of the window that ends with the 10th to 12th step
        assert rank or any(f"in steps {step} to " in second.verdict.reason for step in begin)
        assert COMPRESSED in full.phases
        assert resumed.phases == full.phases[7:]
        assert same_params(resumed.params, full.params[7:])

    run_trainers(2, fn)


class Late(Stepwise):
    """Feature 0 is zero until after the freeze, and so are the gradients of its weights: late coordinates."""

    def batch(self, batch_idx):
        x, y = super().batch(batch_idx)
        x[:, 0] *= batch_idx >= FREEZE + 4
        return x, y


def everything(strategy):
    """All that a compressed step reads and writes, on this rank."""
    state = []
    for compressed in strategy._phases.compressed.values():
        for each in compressed._sets:
            state.append(torch.from_numpy(each.buckets.steps))
            for memory in each.buckets.memories:
                state += [memory.error, memory.server_error, memory.rms, memory.live, memory.live_before]
                state += [memory.result] if memory.results else []  # one rank sends nothing
                state += [memory.rms_code, memory.rms_scale, memory.second_moment, memory.second_moment_residual]
            for late in each.late:
                state += [late.places, late.live_since, late.second_moment]
            if each.is_sketched:
                state.append(torch.from_numpy(each.statistics.statistics))
    return [torch.tensor(()) if each is None else each.clone() for each in state]


class Everything(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        self.state = everything(trainer.strategy)


def same_bits(first, second):
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def check_bitwise_resumes(
    rank, tmp_path, world_size, saves, make_model=Late, num_nodes=1, strategy=None, refresh_after=None, **kwargs
):
    """One run that saves after some batches, and runs that resume there: parameters, phases and all state are the same."""
    options = {"world_size": world_size, "num_nodes": num_nodes, "batches": BATCHES, **kwargs}
    engine.REFRESH_STEPS = REFRESH

    def run(callbacks=(), ckpt_path=None):
        last = Everything()
        own = OneBitDDPStrategy(**(strategy or {}))
        switch = PhaseSwitch(FixedStep(FREEZE))
        callbacks = [switch, last, RefreshAfter(refresh_after), *callbacks]
        _, recorder = fit(own, callbacks=callbacks, model=make_model(), ckpt_path=ckpt_path, **options)
        return recorder, last.state

    full, last = run([SaveAt(tmp_path / f"{k}.ckpt", k) for k in saves])
    assert len(last) >= 10
    for k in saves:
        resumed, resumed_last = run(ckpt_path=tmp_path / f"{k}.ckpt")
        assert resumed.phases == full.phases[k:], k
        pairs = enumerate(zip(resumed.params, full.params[k:], strict=True), start=k)
        different = [batch for batch, (a, b) in pairs if not same_params([a], [b])]
        assert not different, (k, different)
        assert all(same_bits(a, b) for a, b in zip(resumed_last, last, strict=True)), k
    return full.params[-1]


SAVES = (1, 3, FREEZE, FREEZE + 1, FREEZE + 5, FREEZE + 6, BATCHES - 1)


@pytest.mark.parametrize(
    ("world_size", "saves", "options"),
    [
        (2, (1, FREEZE, FREEZE + 6, BATCHES - 1), {}),
        (2, (3, FREEZE, FREEZE + 6), {"space": "momentum"}),
        (3, SAVES, {"overlap": True, "bucket_cap_mb": 0.002, "block_size": 64}),
        (2, (3, *range(FREEZE, FREEZE + 4)), {"variance_refresh": 3}),
    ],
)
def test_resuming_is_bitwise(tmp_path, world_size, saves, options):
    """In both phases, across the switch, with several buckets, and with late coordinates before, at and after a refresh."""
    results = run_trainers(world_size, check_bitwise_resumes, tmp_path, world_size, saves, Late, 1, options)
    assert all(same_params([result], [results[0]]) for result in results)


ASKED = FREEZE + 3
"""A refresh that is asked for then is there after batch 29, the last but one."""


@pytest.mark.parametrize(
    ("ranks", "nodes", "options"),
    [(2, 1, {"bucket_cap_mb": 0.002}), (2, 1, {"overlap": True}), (4, 2, {})],
    ids=["flat", "overlap", "nodes"],
)
def test_resuming_while_a_second_moment_is_collected_is_bitwise(tmp_path, ranks, nodes, options):
    """At the request, in the middle, right before the refresh, and when it is over."""
    options = {"variance_refresh": None, "block_size": 64, **options}

    def fn(rank):
        saves = (ASKED, ASKED + 1, ASKED + 9, ASKED + 15, ASKED + 16)
        return check_bitwise_resumes(rank, tmp_path, ranks, saves, Late, nodes, options, refresh_after=ASKED)

    results = run_trainers(ranks, fn, num_nodes=nodes)
    assert all(same_params([result], [results[0]]) for result in results)
    states = [torch.load(tmp_path / f"{batch}.ckpt")[CHECKPOINT_KEY]["optimizers"][0] for batch in (13, 28, 29)]
    for i in range(1, 6):  # the first has late coordinates
        at_request, before, after = (state[str(i)]["rms"] for state in states)
        assert torch.equal(at_request, before)
        assert not (after == before).any()


@pytest.mark.parametrize(
    ("before", "after", "new", "loses"),
    [
        (None, None, 2, False),
        (None, None, 2, True),
        (None, None, 3, False),
        (None, None, 1, False),
        (None, "auto", 2, False),
        ("auto", None, 2, False),
    ],
    ids=["the same", "a part is lost", "more ranks", "alone", "auto", "from auto"],
)
def test_what_is_collected_after_a_resume_elsewhere(tmp_path, before, after, new, loses):
    """Of other ranks, or without the part of one, it begins anew on all; with other settings it is over."""
    path, batch = tmp_path / "saved.ckpt", ASKED + 5
    goes_on, begins_anew = (after is None and before is None) and not loses and new == 2, before is None and after is None

    def first(rank):
        run(2, strategy={"variance_refresh": before}, callbacks=[RefreshAfter(ASKED), SaveAt(path, batch)], max_steps=batch)

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            (compressed,) = trainer.strategy._phases.compressed.values()
            (each,) = compressed._sets
            self.steps, self.v = set(each.buckets.collected_steps.tolist()), dense_errors(compressed)["collected"]
            self.is_collecting, self.is_d = compressed.is_collecting, None
            if each.buckets.renews:
                memory, corrections = each.buckets.memories[0], each.buckets.bias_corrections()
                d = memory.decoded_rms((0, memory.layout.num_blocks)).square() / corrections[0]
                self.is_d = torch.allclose(memory.second_moment, d[memory.share_flat])

    def second(rank):
        look, recorded = Look(), {"strategy": {"variance_refresh": after}, "ckpt_path": path}
        recorder = run(new, callbacks=[look], **recorded)[1]
        assert set(recorder.phases) == {COMPRESSED}
        assert all(torch.isfinite(p).all() for p in recorder.params[-1])
        return look.steps, look.v, look.is_collecting, look.is_d, recorder.params

    run_trainers(2, first)
    if loses:
        next(iter(Path(f"{path}.onebit").iterdir())).unlink()
    results = run_trainers(new, second)
    for steps, v, is_collecting, is_d, params in results:
        assert is_collecting == (goes_on or begins_anew)
        assert steps == ({5} if goes_on else {0})
        assert v.any() == goes_on
        assert is_d in (None, True)
        assert (is_d is None) == (after is None)
        assert same_params(params, results[0][4])


def test_checkpoint_is_an_ordinary_one(tmp_path):
    """It loads with torch's safe loader, into plain DDP with a stock Adam, and a plain one loads here."""
    path, dense_path = tmp_path / "compressed.ckpt", tmp_path / "dense.ckpt"

    def fn(rank):
        run(2, callbacks=[SaveAt(path, 20)], max_steps=20)
        loaded = torch.load(path, weights_only=True)
        assert loaded[CHECKPOINT_KEY]["version"] == 3
        state = loaded["optimizer_states"][0]["state"]
        assert all(set(entry) == {"step", "exp_avg", "exp_avg_sq"} for entry in state.values())
        dense = fit("ddp", 2, batches=BATCHES, ckpt_path=path)[1]
        assert len(dense.params) == 10
        assert all(torch.isfinite(p).all() for p in dense.params[-1])

        fit("ddp", 2, batches=BATCHES, callbacks=[SaveAt(dense_path, 5)], max_steps=5)
        trainer, recorder = run(2, ckpt_path=dense_path)
        assert trainer.strategy.optimizer_steps == BATCHES
        assert recorder.phases[:6] == [WARMUP] * 4 + [COMPRESSED] * 2

    run_trainers(2, fn)


def test_resuming_within_an_accumulation_is_bitwise(tmp_path):
    """Gradients that wait for a step are each rank's own: in warm-up, at the freeze (after batch 30) and later.

    On three ranks, whose sums depend on DDP's buckets, and these are cut anew after a resume. A parameter is empty.
    """

    class More(Late):
        def __init__(self):
            super().__init__()
            self.empty = torch.nn.Parameter(torch.zeros(0))

        def batch(self, batch_idx):
            return super().batch(batch_idx // 3 + 100 * (batch_idx % 3))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.empty.sum()

    def fn(rank):
        saves = (2, 4, 29, 30, 31, 44)
        return check_bitwise_resumes(rank, tmp_path, 3, saves, More, batches=60, accumulate_grad_batches=3)

    results = run_trainers(3, fn)
    assert all(same_params([result], [results[0]]) for result in results)


def test_resuming_on_nodes_is_bitwise(tmp_path):
    def fn(rank):
        options = {"num_nodes": 2, "strategy": {"bucket_cap_mb": 0.002, "block_size": 64}}
        return check_bitwise_resumes(rank, tmp_path, 4, (4, FREEZE, 20), **options)

    results = run_trainers(4, fn, num_nodes=2)
    assert all(same_params([result], [results[0]]) for result in results)


@pytest.mark.parametrize("collects", [False, True])
def test_resuming_alone_is_bitwise(tmp_path, collects):
    """One process that goes on with a second moment that is renewed, or frozen and being collected for a refresh that was
    asked for: nothing is quantized, and the momentum is dense."""
    strategy = {"variance_refresh": None if collects else "auto"}
    first, second, third = tmp_path / "2.ckpt", tmp_path / "1.ckpt", tmp_path / "again.ckpt"
    run_trainers(2, lambda rank: run(2, strategy=strategy, callbacks=[SaveAt(first, 13)], max_steps=13) and None)

    def fn(rank):
        last, last_resumed = Everything(), Everything()
        asks = [RefreshAfter(14)] if collects else []
        full = run(1, strategy=strategy, ckpt_path=first, callbacks=[*asks, SaveAt(second, 20), last])[1]
        resumed = run(1, strategy=strategy, ckpt_path=second, callbacks=[last_resumed, SaveAt(third, 25)])[1]
        assert set(full.phases) == {COMPRESSED}
        assert same_params(resumed.params, full.params[7:])
        assert all(same_bits(a, b) for a, b in zip(last_resumed.state, last.state, strict=True))

    run_trainers(1, fn)
    # And back to two: they begin without errors, with the momentum that the one had.
    history = run_trainers(2, lambda rank: run(2, ckpt_path=third)[1].params)
    assert same_params(*history)


ERRORS = {
    "worker": CompressedState.worker_errors,
    "server": CompressedState.server_errors,
    "v_i": CompressedState.second_moments,
    "residual": CompressedState.second_moment_residuals,
    "collected": CompressedState.collected,
}


class Errors(pl.Callback):
    """Errors and second moments of this rank at the start, dense, in a common order; zero where it has none."""

    def on_train_start(self, trainer, pl_module):
        (compressed,) = trainer.strategy._phases.compressed.values()
        self.errors = dense_errors(compressed)


def dense_errors(compressed):
    numel = sum(p.numel() for p in parameters_of(compressed.optimizer))
    dense = {}
    for name, ranges_of in ERRORS.items():
        dense[name] = torch.zeros(numel, dtype=torch.float64)
        for run in ranges_of(compressed.state):
            dense[name][run.start :][: run.values.numel()] = run.values
    places, values = compressed.state.late_second_moments()
    dense["late"] = torch.zeros(numel, dtype=torch.float64).index_put((places,), values)
    return dense


@pytest.mark.parametrize(
    ("old", "new", "variance_refresh"),
    [(4, 2, "auto"), (2, 4, None), (3, 1, "auto"), (1, 3, "auto"), (2, 3, "auto"), (3, 2, None)],
)
def test_another_world_size_keeps_the_mean_worker_error_and_all_server_errors(tmp_path, old, new, variance_refresh):
    """And the mean of second moments: of all, with what servers have not passed on; or of late coordinates."""
    path, start = tmp_path / "old.ckpt", tmp_path / "start.ckpt"
    strategy = {"bucket_cap_mb": 0.002, "block_size": 64, "variance_refresh": variance_refresh}
    options = {"strategy": strategy, "model": Late}

    class KeepErrors(SaveAt):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if batch_idx + 1 == self.batch:
                self.errors = dense_errors(trainer.strategy._phases.compressed[trainer.optimizers[0]])

    def first(rank, world_size, path, ckpt_path):
        save = KeepErrors(path, 20)
        recorder = run(world_size, callbacks=[save], ckpt_path=ckpt_path, max_steps=20, **options)[1]
        return save.errors, recorder.params

    def second(rank):
        look = Errors()
        recorder = run(new, callbacks=[look], ckpt_path=path, **options)[1]
        assert set(recorder.phases) == {COMPRESSED}
        return look.errors, recorder.params

    if old == 1:
        run_trainers(2, lambda rank: run(2, callbacks=[SaveAt(start, 15)], max_steps=15, **options) and None)
    before = run_trainers(old, first, old, path, start if old == 1 else None)
    after = run_trainers(new, second)
    assert all(same_params(params, after[0][1]) for _, params in after)
    if old > 1 and new > 1:
        mean = {name: [sum(e[name] for e, _ in ranks) for ranks in (before, after)] for name in (*ERRORS, "late")}
        assert mean["worker"][0].abs().max() > 0.1
        assert mean["server"][0].abs().max() > 0.1
        assert torch.allclose(mean["worker"][1] / new, mean["worker"][0] / old, rtol=1e-6, atol=1e-7)
        assert torch.equal(mean["server"][1], mean["server"][0])
        of_second_moments = "late" if variance_refresh is None else "v_i"
        assert mean[of_second_moments][0].any()
        for name in ("late", "v_i"):
            assert torch.allclose(mean[name][1] / new, mean[name][0] / old, rtol=1e-6, atol=0)
        assert mean["residual"][0].any() == (variance_refresh is not None)
        assert torch.equal(mean["residual"][1], mean["residual"][0])
    elif new == 1:  # applied at once
        moved = torch.cat([(a - b).ravel() for a, b in zip(after[0][1][0], before[0][1][19], strict=True)])
        assert 0.001 < moved.norm() < 1
    else:
        assert not any(errors["server"].any() for errors, _ in after)
    assert all(torch.isfinite(p).all() for p in after[0][1][-1])


def test_whose_errors_a_node_takes_over_preserves_the_mean():
    """Of any number of nodes, on any other; everyone reads as few parts as possible."""
    for old, new in itertools.product(range(1, 9), repeat=2):
        nodes = [Topology(num_nodes=new, node_rank=node) for node in range(new)]
        weights = [node_weights(node, Topology(num_nodes=old, node_rank=0)) for node in nodes]
        for node in range(old):
            assert sum(each.get(node, 0.0) for each in weights) / new == pytest.approx(1 / old)
        assert max(map(len, weights)) == math.ceil(old / new)


def test_the_learning_curve_has_no_jump_at_another_world_size(tmp_path):
    """Evaluated on the same data after each batch: what a change of the number of ranks costs is less than two batches."""
    path = tmp_path / "four.ckpt"
    x = torch.randn(512, 12, generator=torch.Generator().manual_seed(5))

    class Evaluate(pl.Callback):
        def __init__(self):
            self.losses = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            with torch.no_grad():
                logits = pl_module.head(pl_module.body(x))
            self.losses.append(torch.nn.functional.cross_entropy(logits, x.argmax(1) % 5).item())

    def first(rank):
        evaluate = Evaluate()
        run(4, callbacks=[SaveAt(path, 20), evaluate])
        return evaluate.losses

    def second(rank):
        evaluate = Evaluate()
        run(2, callbacks=[evaluate], ckpt_path=path)
        return evaluate.losses

    before, after = run_trainers(4, first)[0], run_trainers(2, second)[0]
    steps = [abs(b - a) for a, b in itertools.pairwise(before[9:])]
    assert abs(after[0] - before[19]) < 2 * max(steps)
    assert after[-1] < before[19]


@pytest.fixture(scope="module")
def compressed_checkpoint(tmp_path_factory):
    """One that two ranks have saved after batch 20, and the parameters of their run, up to its end."""
    path = tmp_path_factory.mktemp("saved") / "compressed.ckpt"
    params, _ = run_trainers(2, lambda rank: run(2, callbacks=[SaveAt(path, 20)])[1].params)
    return path, params


@pytest.fixture
def checkpoint(compressed_checkpoint, tmp_path):
    """A copy, with the parameters, for a test that changes it."""
    saved, params = compressed_checkpoint
    path = tmp_path / saved.name
    shutil.copy(saved, path)
    shutil.copytree(f"{saved}.onebit", f"{path}.onebit")
    return path, params


def spoil_missing(part, others):
    part.unlink()


def spoil_truncated(part, others):
    part.write_bytes(part.read_bytes()[:-100])


def spoil_one_bit(part, others):
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 4
    part.write_bytes(content)


def spoil_swapped(part, others):
    part.write_bytes(others[0].read_bytes())


SPOILED = [
    (spoil_missing, "missing"),
    (spoil_truncated, "damaged"),
    (spoil_one_bit, "damaged"),
    (spoil_swapped, "of another checkpoint"),
]


@pytest.mark.parametrize(("spoil", "problem"), SPOILED)
def test_a_part_that_cannot_be_used_is_one_warning_and_its_errors_start_at_zero(checkpoint, spoil, problem):
    path, _ = checkpoint
    parts = sorted(Path(f"{path}.onebit").iterdir(), key=lambda part: part.stem[-1])
    assert len(parts) == 2
    spoil(parts[1], parts[:1])

    def fn(rank):
        look = Errors()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            recorder = run(2, callbacks=[look], ckpt_path=path, max_steps=24)[1]
        said = [str(w.message) for w in caught if "parts of" in str(w.message)]
        assert set(recorder.phases) == {COMPRESSED}
        return look.errors, recorder.params, said

    (errors, params, said), (others, other_params, nothing) = run_trainers(2, fn)
    assert same_params(params, other_params)
    assert all(errors[name].any() for name in ERRORS if name != "collected")
    assert others.pop("v_i").all()  # begins as v
    assert not any(error.any() for error in others.values())
    assert len(said) == 1
    assert f"parts of rank 1 ({problem}) cannot be used" in said[0]
    assert not nothing


def test_gradients_of_a_warmup_that_are_lost_with_a_part_are_warned_of(tmp_path):
    p = torch.nn.Parameter(torch.zeros(3))
    strategy = SimpleNamespace(config=CompressionConfig(), world_size=1, root_device=torch.device("cpu"))
    phases = SimpleNamespace(
        names={p: "p"},
        topology=Topology(num_nodes=1, node_rank=0),
        space="update",
        compressed={},
        resume=lambda *_, **__: None,
    )
    header = {"phase": "WARMUP", "is_pending": False, "save_id": "0" * 16, "has_gradients": True, "errors_wait": False}
    header |= {"world_size": 1, "local_world_size": 1, "space": "update", "ddp_buckets": []}
    with pytest.warns(UserWarning, match=r"parts of rank 0 \(missing\) cannot be used: .*gradients that waited for a step"):
        CheckpointManager(strategy, phases).resume(header, [], [], tmp_path / "x.ckpt")


def test_a_checkpoint_that_was_moved_alone_says_so(checkpoint):
    path, _ = checkpoint
    moved = path.rename(path.with_name("moved.ckpt"))

    def fn(rank):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert set(run(2, ckpt_path=moved, max_steps=22)[1].phases) == {COMPRESSED}
        return [str(w.message) for w in caught if "parts of rank 0 (missing), rank 1 (missing)" in str(w.message)]

    said, nothing = run_trainers(2, fn)
    assert (len(said), len(nothing)) == (1, 0)


def test_other_settings_than_the_saved_ones(compressed_checkpoint):
    """Buckets matter not even to the last bit, blocks only there; errors of another space mean nothing."""
    path, full = compressed_checkpoint

    def fn(rank):
        others = [{"bucket_cap_mb": 0.002}, {"block_size": 64}, {"space": "momentum"}]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            buckets, blocks, space = (run(2, strategy=options, ckpt_path=path)[1] for options in others)
        said = [str(w.message) for w in caught if "quantized in another space" in str(w.message)]
        assert len(said) == (1 if rank == 0 else 0)
        assert same_params(buckets.params, full[20:])
        for other in (blocks, space):
            assert set(other.phases) == {COMPRESSED}
            assert max((a - b).abs().max() for a, b in zip(other.params[0], full[20], strict=True)) < 0.1
        return buckets.params, blocks.params, space.params

    first, second = run_trainers(2, fn)
    assert all(map(same_params, first, second))


@pytest.mark.parametrize(
    ("before", "after", "blocks"), [(None, "auto", None), ("auto", None, None), (64, "auto", None), ("auto", "auto", 64)]
)
def test_a_run_goes_on_with_another_variance_refresh_or_block_size(tmp_path, before, after, blocks):
    """Said once. D is coded then as it was not before, but nobody has replaced the state; who does, is noticed."""
    path = tmp_path / "saved.ckpt"

    class Scales(pl.Callback):
        def on_load_checkpoint(self, trainer, pl_module, checkpoint):
            checkpoint["optimizer_states"][0]["state"][2]["exp_avg_sq"] *= 1.05  # less than from one code to the next

    class IsEarlier(pl.Callback):
        """Of a version that did not tell it."""

        def on_load_checkpoint(self, trainer, pl_module, checkpoint):
            del checkpoint[CHECKPOINT_KEY]["variance_refresh"], checkpoint[CHECKPOINT_KEY]["errors_wait"]

    def fn(rank):
        saved = {"variance_refresh": before} | ({} if blocks is None else {"block_size": blocks})
        full = run(2, strategy=saved, callbacks=[SaveAt(path, 20)], max_steps=21)[1]
        other = {"variance_refresh": after}  # larger blocks: their codes are multiples of another largest value
        with Messages() as messages:
            recorder = run(2, strategy=other, ckpt_path=path)[1]
        said = f"was written with variance_refresh={before!r}; the run goes on with {after!r}"
        assert messages.count(said) == (rank == 0 and before != after), messages.texts
        assert messages.count("was replaced") == 0
        assert set(recorder.phases) == {COMPRESSED}
        assert max((a - b).abs().max() for a, b in zip(recorder.params[0], full.params[20], strict=True)) < 0.05
        with Messages() as messages:
            run(2, strategy=other, ckpt_path=path, callbacks=[Scales()], max_steps=22)
        assert messages.count("was replaced: going on from the new one") == (rank == 0)
        with Messages() as messages:
            run(2, strategy=other, ckpt_path=path, callbacks=[IsEarlier()], max_steps=22)
        assert messages.count("variance_refresh=") == 0
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_the_parts_follow_links_and_go_with_their_checkpoint(tmp_path):
    """`save_last="link"`; with save_top_k=1 the folder has one checkpoint at a time, and one link."""

    def fn(rank):
        saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_last="link")
        full = run(2, callbacks=[saving], enable_checkpointing=True)[1]
        torch.distributed.barrier()
        resumed = run(2, ckpt_path=tmp_path / "last.ckpt")[1]
        assert same_params(resumed.params, full.params[28:])

    run_trainers(2, fn)
    assert {path.name for path in tmp_path.iterdir()} == {"step=28.ckpt", "step=28.ckpt.onebit", "last.ckpt"}
    assert len(list((tmp_path / "step=28.ckpt.onebit").iterdir())) == 2


def test_saving_again_to_the_same_path_leaves_one_set_of_parts(tmp_path):
    path = tmp_path / "x.ckpt"
    others = tmp_path / "x.ckpt.onebit"

    def fn(rank):
        full = run(2, callbacks=[SaveAt(path, 15), SaveAt(path, 18)])[1]
        assert same_params(run(2, ckpt_path=path)[1].params, full.params[18:])

    run_trainers(2, fn)
    assert sorted(part.name[-11:] for part in others.iterdir()) == ["-rank-0.npz", "-rank-1.npz"]
    (others / "0123-rank-5.npz").touch()  # of a larger run
    run_trainers(2, fn)
    assert sorted(part.name[-11:] for part in others.iterdir()) == ["-rank-0.npz", "-rank-1.npz"]


@pytest.mark.parametrize("newest", ["a", "b"])
def test_while_a_save_goes_on_the_newest_of_the_earlier_ones_stays(tmp_path, newest):
    parts = Parts(tmp_path / "x.ckpt")
    for save_id in ("a", "b", "c"):
        parts.write(save_id, 0, {}, {})
        os.utime(parts.path(save_id, 0), (1000.0 + (save_id == newest),) * 2)
    parts.remove(0, 1, keep="c", keep_others=1)
    assert {path.name for path in Path(parts.folder).iterdir()} == {f"{newest}-rank-0.npz", "c-rank-0.npz"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("when", ["in the part", "before the checkpoint", "in the checkpoint", "before the end"])
def test_a_save_that_is_cut_off_leaves_the_previous_one_usable(tmp_path, compressed_checkpoint, when):
    """At the same path, by a process that dies; at whichever byte, the previous one goes on bit for bit."""
    path = tmp_path / "x.ckpt"

    def die():
        os._exit(9)

    def cut_off(rank):
        real = {"savez": np.savez, "save": torch.save, "replace": os.replace}
        if when == "in the part":

            def savez(file, **arrays):
                buffer = io.BytesIO()
                real["savez"](buffer, **arrays)
                file.write(buffer.getvalue()[: len(buffer.getvalue()) // (rank + 2)])
                file.flush()
                die()

            patch = (np, "savez", savez)
        elif when == "in the checkpoint":

            def save(checkpoint, file, **kwargs):
                buffer = io.BytesIO()
                real["save"](checkpoint, buffer)
                file.write(buffer.getvalue()[:-7])
                file.flush()
                die()

            patch = (torch, "save", save)
        else:

            def replace(source, target):
                if when == "before the checkpoint" and str(target).endswith(".ckpt"):
                    die()
                real["replace"](source, target)
                if when == "before the end" and str(target).endswith(".ckpt"):
                    die()

            patch = (os, "replace", replace)

        class CutOff(SaveAt):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if batch_idx + 1 == self.batch:
                    setattr(*patch)
                super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

        run(2, callbacks=[SaveAt(path, 15), CutOff(path, 18)], strategy={"timeout": timedelta(seconds=5)})

    with pytest.raises(AssertionError, match="died without a word"):
        run_trainers(2, cut_off)
    saved = 18 if when == "before the end" else 15
    assert torch.load(path, weights_only=True)["global_step"] == saved

    _, full = compressed_checkpoint  # that a run saves does not change it

    def fn(rank):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*parts of.*")
            resumed = run(2, ckpt_path=path, callbacks=[SaveAt(path, 25)])[1]
        assert same_params(resumed.params, full[saved:])

    run_trainers(2, fn)
    assert {entry.name for entry in tmp_path.iterdir()} == {"x.ckpt", "x.ckpt.onebit"}
    assert len(list((tmp_path / "x.ckpt.onebit").iterdir())) == 2


@pytest.mark.parametrize("failing", ["savez", "save"])
def test_a_save_that_fails_on_one_rank_fails_on_all(tmp_path, failing):
    path = tmp_path / "x.ckpt"

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def fn(rank):
        if rank == (1 if failing == "savez" else 0):
            setattr(np if failing == "savez" else torch, failing, fail)
            expected = pytest.raises(OSError, match="No space left")
        else:
            what = "the parts of the checkpoint" if failing == "savez" else "the checkpoint"
            message = rf"failed \({what} .*rank {1 if failing == 'savez' else 0}: OSError: .*No space left"
            expected = pytest.raises(RanksDisagree, match=re.compile(message, re.DOTALL))
        with expected:
            run(2, callbacks=[SaveAt(path, 15)])

    run_trainers(2, fn)
    assert not path.exists()


def test_a_plain_checkpoint_with_a_stable_variance_goes_straight_into_compression(tmp_path):
    """`FixedStep(n)` says that after n steps it is: one loaded after more of them has had its warm-up."""
    path = tmp_path / "dense.ckpt"

    def fn(rank):
        fit("ddp", 2, batches=BATCHES, callbacks=[SaveAt(path, 12)], model=Stepwise(), max_steps=12)
        with Messages() as messages:
            trainer, recorder = run(2, ckpt_path=path)
        assert not messages.count("are plain DDP"), messages.texts  # that is over
        assert messages.count(f"{FREEZE} of {FREEZE} warm-up steps are done") == 2 * (rank == 0), messages.texts
        assert recorder.phases == [COMPRESSED] * 18
        assert trainer.strategy.optimizer_steps == BATCHES
        compressed = trainer.strategy.comm_stats[COMPRESSED]
        assert compressed.steps == 18
        assert trainer.strategy.comm_stats[WARMUP].steps == 0
        later = fit(
            "onebit_ddp", 2, batches=BATCHES, callbacks=[PhaseSwitch(FixedStep(15))], model=Stepwise(), ckpt_path=path
        )
        assert later[1].phases == [WARMUP] * 2 + [COMPRESSED] * 16
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_a_checkpoint_right_after_the_freeze_is_that_of_the_warmup(tmp_path):
    """Plain DDP goes on from it as from its own, momentum included."""
    ours, ddps = tmp_path / "ours.ckpt", tmp_path / "ddp.ckpt"

    def fn(rank):
        run(2, callbacks=[SaveAt(ours, FREEZE)], max_steps=FREEZE + 1)
        fit("ddp", 2, batches=BATCHES, callbacks=[SaveAt(ddps, FREEZE)], model=Stepwise(), max_steps=FREEZE)

    run_trainers(2, fn)
    first, second = (torch.load(path, weights_only=True) for path in (ours, ddps))
    assert (first[CHECKPOINT_KEY]["phase"], first[CHECKPOINT_KEY]["is_pending"]) == ("COMPRESSED", True)
    for index, entry in second["optimizer_states"][0]["state"].items():
        assert entry["exp_avg"].any()
        assert all(torch.equal(first["optimizer_states"][0]["state"][index][key], value) for key, value in entry.items())


def test_model_checkpoint_saves_and_a_weights_only_file_has_no_extra_state(tmp_path):
    def fn(rank):
        full = pl.callbacks.ModelCheckpoint(tmp_path / "full", every_n_train_steps=7, save_top_k=-1)
        small = pl.callbacks.ModelCheckpoint(tmp_path / "small", save_weights_only=True)
        run(2, callbacks=[full, small], enable_checkpointing=True)

    run_trainers(2, fn)
    saved = {path.name: torch.load(path, weights_only=True) for path in (tmp_path / "full").glob("*.ckpt")}
    assert len(saved) == 4
    assert [CHECKPOINT_KEY in saved[name] for name in sorted(saved, key=lambda n: saved[n]["global_step"])] == [
        False,
        True,
        True,
        True,
    ]
    (small,) = (tmp_path / "small").iterdir()
    assert CHECKPOINT_KEY not in torch.load(small, weights_only=True)


def test_saving_after_an_exception_does_not_wait_for_the_other_ranks(tmp_path):
    path = tmp_path / "failed.ckpt"

    class SaveOnOneRank(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 20 and trainer.global_rank == 0:
                trainer.state.status = TrainerStatus.INTERRUPTED
                with pytest.warns(UserWarning, match="does not hold the errors"):
                    trainer.strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(), path)
                trainer.state.status = TrainerStatus.RUNNING

    def fn(rank):
        run(2, callbacks=[SaveOnOneRank()])
        assert set(run(2, ckpt_path=path)[1].phases) == {COMPRESSED}

    run_trainers(2, fn)


def test_saving_after_an_exception_within_a_step_says_that_it_is_torn(tmp_path):
    finish = engine.CompressedOptimizer._finish_

    def fn(rank):
        steps = itertools.count()

        def finish_or_fail(compressed, each, index, exchange):
            if index == 1 and next(steps) == 5:
                raise OSError("injected")
            finish(compressed, each, index, exchange)

        engine.CompressedOptimizer._finish_ = finish_or_fail
        saving = pl.callbacks.OnExceptionCheckpoint(tmp_path, "failed")
        options = {"strategy": {"bucket_cap_mb": 0.001, "block_size": 64}, "enable_checkpointing": True}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(OSError, match="injected"):
                run(2, callbacks=[saving], **options)
        return [str(w.message) for w in caught if "parameters may be those of the next one already" in str(w.message)]

    first, second = run_trainers(2, fn)
    assert (len(first), len(second)) == (1, 0)


@pytest.mark.parametrize("saves", [(20, 25), (5, 20)])
def test_ranks_that_resume_from_different_checkpoints_are_told_so(tmp_path, saves):
    """Such as stale copies on the disks of nodes: of different steps, or of different phases."""

    def fn(rank):
        run(2, callbacks=[SaveAt(tmp_path / f"{k}.ckpt", k) for k in saves], max_steps=max(saves))
        expected = (
            f"differ in the checkpoint that they resume from.*optimizer steps: .{saves[0]}. on rank 0, but .{saves[1]}. on"
        )
        with pytest.raises(RanksDisagree, match=re.compile(expected, re.DOTALL)):
            run(2, ckpt_path=tmp_path / f"{saves[rank]}.ckpt")

    run_trainers(2, fn)


def test_foreign_version_is_refused(checkpoint):
    path, _ = checkpoint
    content = torch.load(path, weights_only=True)
    content[CHECKPOINT_KEY]["version"] = 99
    torch.save(content, path)

    def fn(rank):
        with pytest.raises(ValueError, match="version 99, but this is version 3"):
            run(2, ckpt_path=path)

    run_trainers(2, fn)


def test_schedulers_by_epoch_do_not_complain_after_a_resume(tmp_path):
    """The first step that a resumed run makes is a compressed one; the scheduler must notice it."""
    path = tmp_path / "compressed.ckpt"

    def configure(module):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def fn(rank):
        options = {"strategy": "onebit_ddp", "world_size": 2, "batches": BATCHES, "configure": configure}
        fit(callbacks=[PhaseSwitch(FixedStep(FREEZE)), SaveAt(path, 20)], max_steps=20, **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
            trainer, recorder = fit(callbacks=[PhaseSwitch(FixedStep(FREEZE))], ckpt_path=path, **options)
        assert set(recorder.phases) == {COMPRESSED}
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3)

    run_trainers(2, fn)


def test_rolling_back_to_a_checkpoint_of_the_warmup_leaves_the_compressed_phase():
    """As the learning-rate finder does, which saves, trains and restores."""

    class RollBack(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx + 1 == 5:
                states = [optimizer.state_dict() for optimizer in trainer.optimizers]
                self.checkpoint = copy.deepcopy({"optimizer_states": states})
            if batch_idx + 1 == 20:
                assert trainer.strategy.phase is COMPRESSED
                trainer.strategy.load_optimizer_state_dict(copy.deepcopy(self.checkpoint))
                assert trainer.strategy.phase is WARMUP
                assert trainer.strategy.optimizer_steps == 5
                state = trainer.optimizers[0].state_dict()["state"]
                for index, entry in self.checkpoint["optimizer_states"][0]["state"].items():
                    assert all(torch.equal(value, state[index][key]) for key, value in entry.items())
            if batch_idx + 1 == 28:
                trainer.strategy.resume_warmup()
                assert trainer.strategy._phases.waiting_errors
                trainer.strategy.load_optimizer_state_dict(copy.deepcopy(self.checkpoint))
                assert not trainer.strategy._phases.waiting_errors  # those of the run that is given up

    def fn(rank):
        _, recorder = run(2, callbacks=[RollBack()])
        # Step 10 is reached again five batches later.
        assert recorder.phases[19:] == [WARMUP] * 5 + [COMPRESSED] * 3 + [WARMUP] * 3
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)
