"""Ranks that take decisions by themselves, or have different numbers of batches: all end soon, and say where each was."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from ranks import run_trainers
from torch import nn
from trainers import Classifier, Stepwise, adam, data, make_trainer

from lightning_onebit import FixedStep, OneBitDDPFabricStrategy, OneBitDDPStrategy, PhaseSwitch
from lightning_onebit.comm import watch

FREEZE, FAULT = 3, 6


@pytest.mark.parametrize(
    ("count", "places", "other_count", "other_places", "expected"),
    [
        (3, "abc", 3, "abc", None),
        (5, "abc", 4, "xab", None),  # one is ahead; before, nothing is known in common
        (9, "abc", 3, "xyz", None),
        (5, "abc", 5, "abd", ("c", "d")),
        (5, "abc", 6, "abcd", None),  # positions count, not the ends
        (5, "abc", 6, "abdd", ("c", "d")),
        (4, "aac", 3, "aab", ("a", "b")),
        (4, "aac", 3, "aaa", None),
        (0, "", 2, "ab", None),
    ],
)
def test_lists_of_places_are_compared_where_both_are_known(count, places, other_count, other_places, expected):
    assert watch.first_difference(count, list(places), other_count, list(other_places)) == expected


def test_places_that_are_passed_while_a_note_is_written_are_in_the_next_one():
    class Lock:
        """Released, the training thread goes on to its last place at once."""

        def __enter__(self):
            pass

        def __exit__(self, *_):
            seen._lock = threading.Lock()
            seen.passing("last")

    store = dist.HashStore()
    seen = watch.Watch(store, 0, 2, 1, lambda: "here")
    seen.passing("first")
    seen._lock = Lock()
    seen._write()
    seen._write()
    seen.close()
    assert json.loads(store.get("lightning_onebit/1/0"))["places"] == ["first", "last"]


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_complete_just_after_a_look_is_no_failure_unless_it_failed(fails):
    class Work:
        looks = 0

        def wait(self, timeout=None):
            self.looks += 1
            if self.looks == 1:
                raise RuntimeError("Operation timed out!")
            if fails:
                raise RuntimeError("Connection closed by peer")

        def is_completed(self):
            return True

    seen = watch.Watch(dist.HashStore(), 0, 2, 1, lambda: "here")
    try:
        with pytest.raises(RuntimeError, match="closed by peer") if fails else contextlib.nullcontext():
            seen.wait(Work())
    finally:
        seen.close()


def test_only_what_was_turned_away_from_is_abandoned(monkeypatch):
    class Work:
        def wait(self, timeout=None):
            if seen.verdict is not None:
                raise RuntimeError("Operation timed out!")

        def is_completed(self):
            return False  # which some groups say of a collective that was waited for

    monkeypatch.setattr(watch, "_abandoned", False)
    seen = watch.Watch(dist.HashStore(), 0, 2, 1, lambda: "here")
    try:
        seen.wait(Work())
        assert not watch.has_abandoned_a_collective()
        seen.verdict = "The ranks have parted"
        with pytest.raises(RuntimeError, match="parted"):
            seen.wait(Work())
        assert watch.has_abandoned_a_collective()
    finally:
        seen.close()


def test_where_nobody_waits_on_the_host_it_is_logged(monkeypatch, caplog):
    """As on a GPU, where the driver waits."""
    monkeypatch.setattr(watch, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.1)
    store = dist.HashStore()
    ranks = [watch.Watch(store, rank, 2, 1, lambda: "here") for rank in range(2)]
    for seen, place in zip(ranks, ("an optimizer step", "the end of training"), strict=True):
        seen.host_waits = seen is ranks[1]
        seen.passing(place)
    deadline = time.monotonic() + 10
    while any(seen.verdict is None for seen in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    for seen in ranks:
        seen.close()
    (record,) = caplog.records
    assert "where rank 0 (here) came to 'an optimizer step', rank 1 (here) came to 'the end of training'" in record.message


def test_who_never_comes_to_a_meeting_is_not_waited_for_beyond_the_timeout():
    """It has died: no note of it tells another place."""
    store = dist.HashStore()
    ranks = [watch.Watch(store, rank, 2, 1, lambda: "here") for rank in range(2)]
    try:
        with pytest.raises(RuntimeError, match="Timed out waiting for 1 ranks to come to 'the way back'"):
            ranks[0].meet("the way back", timedelta(seconds=0.2))
        ranks[1].meet("the way back", timedelta(seconds=0.2))  # both were there
    finally:
        for seen in ranks:
            seen.close()


def test_who_knows_that_another_is_elsewhere_does_not_begin_to_wait(monkeypatch):
    seen = watch.Watch(dist.HashStore(), 0, 2, 1, lambda: "here")
    monkeypatch.setattr(watch, "_watch", seen)
    try:
        with watch.elsewhere("a barrier"):
            assert seen.is_elsewhere
        seen.verdict = "The ranks have parted"
        with watch.elsewhere("a barrier of two of four", group=object()):  # which others do not pass
            assert not seen.is_elsewhere
        assert list(seen._places) == ["a barrier"]
        with pytest.raises(RuntimeError, match="parted"), watch.elsewhere("a barrier"):
            pytest.fail("waits in a collective that cannot be interrupted")
        with pytest.raises(RuntimeError, match="parted"):
            seen.meet("the way back", timedelta(seconds=0.2))
    finally:
        seen.close()


class LeavesOut(Classifier):
    """Leaves out a step, on rank 1 only, as if its gradient were too large there."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        if batch_idx == FAULT and self.global_rank == 1:
            optimizer_closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


def by_trainer(rank, *, model, batches, strategy):
    trainer = make_trainer(strategy, 2, callbacks=[PhaseSwitch(FixedStep(FREEZE))], use_distributed_sampler=False)
    trainer.fit(model, data(batches[rank]))


def leaves_out_a_step(rank):
    by_trainer(rank, model=LeavesOut(), batches=(20, 20), strategy="onebit_ddp")


def has_fewer_batches(rank):
    by_trainer(rank, model=Classifier(), batches=(20, FAULT), strategy=OneBitDDPStrategy())


def has_fewer_batches_in_warmup(rank):
    by_trainer(rank, model=Classifier(), batches=(20, FREEZE - 1), strategy="onebit_ddp")


class ClearsState(Classifier):
    """Removes the optimizer's state, on rank 1 only."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == FAULT and self.global_rank == 1:
            self.trainer.optimizers[0].state.clear()


def clears_state(rank):
    by_trainer(rank, model=ClearsState(), batches=(20, 20), strategy="onebit_ddp")


class Validated(Classifier):
    """Metrics of epochs and evaluations are averaged over the ranks, and each rank knows those of the others."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("epoch_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.trainer.should_stop |= self.stops_alone and batch_idx == FAULT and self.global_rank == 1
        return loss

    stops_alone = False

    def on_train_epoch_end(self):
        self.all_gather(torch.ones(1))


class StopsAlone(Validated):
    stops_alone = True


def has_fewer_batches_before_an_evaluation(rank):
    trainer = make_trainer("onebit_ddp", 2, callbacks=[PhaseSwitch(FixedStep(FREEZE))], use_distributed_sampler=False)
    trainer.fit(Validated(), data(20 if rank == 0 else FAULT), data(2))


def stops_alone(rank):
    by_trainer(rank, model=StopsAlone(), batches=(20, 20), strategy="onebit_ddp")


class WaitsByItself(Classifier):
    """At the end of an epoch, or in an evaluation: in a collective of which nobody has told us."""

    def __init__(self, place):
        super().__init__()
        self.place = place

    def on_train_epoch_end(self):
        if self.place == "the end of an epoch":
            dist.barrier()

    def validation_step(self, batch, batch_idx):
        if self.place == "an evaluation" and not self.trainer.sanity_checking:
            dist.barrier()


def waits_by_itself(place):
    def scenario(rank):
        callbacks = [PhaseSwitch(FixedStep(FREEZE))]
        trainer = make_trainer("onebit_ddp", 2, callbacks=callbacks, use_distributed_sampler=False)
        trainer.fit(WaitsByItself(place), data(20 if rank == 0 else FAULT), data(1))

    return scenario


class MeetsNobody(Classifier):
    """In a collective of Lightning, on rank 1 only."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == FAULT and self.global_rank == 1:
            getattr(self.trainer.strategy, self.collective)(*self.arguments)


def waits_alone(name, *arguments):
    def scenario(rank):
        model = MeetsNobody()
        model.collective, model.arguments = name, arguments
        by_trainer(rank, model=model, batches=(20, 20), strategy="onebit_ddp")

    return scenario


def clears_state_while_overlapping(rank):
    by_trainer(rank, model=ClearsState(), batches=(20, 20), strategy=OneBitDDPStrategy(overlap=True))


def waits_alone_with_fabric(name, *arguments):
    def meets_nobody(fabric, index):
        if index == FAULT and fabric.global_rank == 1:
            getattr(fabric, name)(*arguments)

    return lambda rank: train_with_fabric(rank, after_batch=meets_nobody)


def leaves_out_a_step_with_fabric(rank):
    train_with_fabric(rank, leaves_out=lambda index: index == FAULT and rank == 1)


def clears_state_with_fabric(rank):
    train_with_fabric(rank, clears=lambda index: index == FAULT and rank == 1)


def train_with_fabric(rank, *, leaves_out=lambda index: False, clears=lambda index: False, after_batch=lambda *_: None):
    strategy = OneBitDDPFabricStrategy(criterion=FixedStep(FREEZE), timeout=timedelta(seconds=60))
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    module = Classifier()
    model, optimizer = fabric.setup(module, adam(module))
    try:
        for index, batch in enumerate(data(20)):
            fabric.backward(model.training_step(batch, index))
            if not leaves_out(index):
                optimizer.step()
            optimizer.zero_grad()
            if clears(index):
                optimizer.state.clear()
            after_batch(fabric, index)
        watch._end_watch()  # as at the exit of a process
        time.sleep(3)  # rank 0, which has the store, may be the one that has finished
    finally:
        strategy.teardown()


@pytest.mark.parametrize(
    ("scenario", "patience_seconds"),
    [
        (leaves_out_a_step, watch.PATIENCE_SECONDS),
        (has_fewer_batches, 1.0),
        (has_fewer_batches_in_warmup, 1.0),
        (leaves_out_a_step_with_fabric, 1.0),
        (clears_state, 1.0),
        (clears_state_while_overlapping, 1.0),
        (clears_state_with_fabric, 1.0),
    ],
)
def test_ranks_that_part_end_soon_and_both_are_named(scenario, patience_seconds):
    def fn(rank):
        if patience_seconds < watch.PATIENCE_SECONDS:
            watch.PATIENCE_SECONDS, watch.LOOK_SECONDS = patience_seconds, 0.5
        start = time.perf_counter()
        try:
            scenario(rank)
        except RuntimeError as error:
            return str(error), time.perf_counter() - start
        return "", time.perf_counter() - start

    messages, seconds = zip(*run_trainers(2, fn), strict=True)
    assert patience_seconds <= max(seconds) < 15
    assert any(messages)
    phase = "WARMUP" if scenario is has_fewer_batches_in_warmup else "COMPRESSED"
    for rank, message in enumerate(messages):
        if message:
            assert f"rank {rank}" in message
            assert f"rank {1 - rank} (phase {phase}, after " in message, message
    assert any("The ranks have parted" in message and "strategy.grad_norm()" in message for message in messages), messages
    if "clears_state" in scenario.__name__:
        assert any("the way back to warm-up, as the state of Adam was reset" in message for message in messages), messages


@pytest.mark.parametrize(
    "scenario",
    [
        has_fewer_batches_before_an_evaluation,
        stops_alone,
        waits_by_itself("the end of an epoch"),
        waits_by_itself("an evaluation"),
        *(
            waits_alone(name, argument)
            for name, argument in (
                ("barrier", "here"),
                ("broadcast", 1),
                ("all_gather", torch.ones(1)),
                ("reduce_boolean_decision", True),
            )
        ),
        waits_alone_with_fabric("barrier"),
        waits_alone_with_fabric("broadcast", 1),
        waits_alone_with_fabric("all_reduce", torch.ones(1)),
        waits_alone_with_fabric("all_gather", torch.ones(1)),
    ],
)
def test_who_waits_in_a_collective_of_lightning_does_not_wait_for_the_timeout(scenario, tmp_path):
    """Nothing can interrupt it: the process ends, after its last words. The other rank's may raise."""

    def fn(rank):
        watch.PATIENCE_SECONDS, watch.LOOK_SECONDS = 1.0, 0.5

        def end(message=None):
            (tmp_path / f"{rank}.txt").write_text(message or watch._watch.verdict)
            os._exit(1)

        watch.end_process = end
        try:
            scenario(rank)
        except RuntimeError as error:
            end(str(error))

    start = time.perf_counter()
    with pytest.raises(AssertionError, match="died without a word"):
        run_trainers(2, fn)
    assert time.perf_counter() - start < 15
    for rank in range(2):
        words = (tmp_path / f"{rank}.txt").read_text()
        assert "The ranks have parted" in words or "Communication with the other ranks failed" in words
        assert f"rank {1 - rank} (phase COMPRESSED, after " in words, words


SCRIPT = """
import os
from lightning_onebit.comm import watch
watch.PATIENCE_SECONDS, watch.LOOK_SECONDS = 1.0, 0.5
from test_watch import *
by_trainer(int(os.environ.get("LOCAL_RANK", 0)), model=Classifier(), batches=(20, FAULT), strategy="onebit_ddp")
"""


def test_their_processes_end_too(tmp_path):
    """Although a thread of gloo waits in the collective that one has turned away from, for up to 30 minutes."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode in (1, -signal.SIGKILL)  # Lightning's launcher kills all once one has ended
    assert "The ranks have parted" in done.stderr


def test_the_norm_of_the_mean_gradient_is_the_same_on_all_ranks_in_both_phases():
    class Norms(Stepwise):
        def on_before_optimizer_step(self, optimizer):
            gradients = torch.cat([p.grad.reshape(-1) for p in self.parameters()])
            mean = self.trainer.strategy.reduce(gradients.clone(), reduce_op="mean")
            before = [p.grad.clone() for p in self.parameters()]
            own = self.trainer.strategy.grad_norm()
            assert all(torch.equal(p.grad, b) for p, b in zip(self.parameters(), before, strict=True))
            self.norms.append((float(own), float(mean.norm()), float(gradients.norm())))

    def fn(rank):
        model = Norms()
        model.norms = []
        by_trainer(rank, model=model, batches=(8, 8), strategy="onebit_ddp")
        return model.norms

    torch.manual_seed(0)
    first, second = run_trainers(2, fn)
    assert [norm for norm, _, _ in first] == [norm for norm, _, _ in second]
    for norm, mean, _ in first:
        assert norm == pytest.approx(mean, rel=0.2)  # of a model so small that its sketch is
    for norm, mean, _ in first[:FREEZE]:
        assert norm == pytest.approx(mean, rel=1e-5)


def test_the_first_norm_of_the_compressed_phase_is_that_of_all_ranks_with_manual_optimization_too():
    """Asked for before the step that freezes the state, when gradients are local already."""

    class Norms(Stepwise):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.norms.append(float(self.trainer.strategy.grad_norm()))
            optimizer.step()

    def fn(rank):
        model = Norms()
        model.norms = []
        by_trainer(rank, model=model, batches=(FREEZE + 2, FREEZE + 2), strategy=OneBitDDPStrategy(overlap=False))
        return model.norms

    first, second = run_trainers(2, fn)
    assert len(first) == FREEZE + 2
    assert first == second


def test_a_long_wait_is_no_parting():
    """The other rank is slow, not elsewhere."""

    class Slow(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == FAULT and self.global_rank == 0:
                time.sleep(3)

    def fn(rank):
        watch.PATIENCE_SECONDS, watch.LOOK_SECONDS = 0.5, 0.2
        model = Slow()
        by_trainer(rank, model=model, batches=(10, 10), strategy="onebit_ddp")
        return nn.utils.parameters_to_vector(model.parameters())

    first, second = run_trainers(2, fn)
    assert torch.equal(first, second)
