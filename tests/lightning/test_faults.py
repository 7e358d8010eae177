"""Ranks that die, hang or are asked to end: the others end in time and say why, and the run can go on from a checkpoint."""

import io
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fault_script import WARMUP_STEPS, Fault, Slow, digest, make_strategy, train
from lightning.fabric import Fabric
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from ranks import _rank_main, free_port, run_trainers
from test_launchers import start
from trainers import Classifier, Recorder, adam, data, make_trainer

from lightning_onebit import FixedStep, OneBitDDPFabricStrategy, Phase
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.lightning import failures
from lightning_onebit.lightning.failures import explain_, is_communication_failure

SCRIPT = Path(__file__).parents[1] / "support" / "fault_script.py"
RANKS = 3
TIMEOUT_SECONDS = 4.0
MARGIN_SECONDS = 15.0
"""For a busy machine; a hang lasts at least as long as the default timeout, half an hour."""

COMPRESSED_STEP = WARMUP_STEPS + 2


def survivors(fn, harmed, marker):
    """Fork ranks that call ``fn(rank)``, and wait for those that are not ``harmed``.

    Returns:
        By rank, the message of the exception, seconds from the time of ``marker`` until then, and whether the thread that
        exchanges is left.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()

    def call(rank):
        message = "ended well"
        try:
            fn(rank)
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        return message, time.time(), "onebit-exchanger" in [thread.name for thread in threading.enumerate()]

    pipes, processes = {}, []
    try:
        for rank in range(RANKS):
            receiver, sender = context.Pipe(duplex=False)
            target_args = (sender, rank, RANKS, 1, None, port, call, ())
            processes.append(context.Process(target=_rank_main, args=target_args, daemon=True))
            processes[-1].start()
            sender.close()
            if rank not in harmed:
                pipes[rank] = receiver
        outcomes, deadline = {}, time.monotonic() + TIMEOUT_SECONDS + 3 * MARGIN_SECONDS
        while len(outcomes) < len(pipes):
            waiting = [pipe for rank, pipe in pipes.items() if rank not in outcomes]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            assert ready, f"ranks other than {sorted(outcomes)} hang"
            for rank, pipe in pipes.items():
                if pipe in ready:
                    outcomes[rank] = receive(pipe)
        struck = marker.stat().st_mtime
        return {rank: (message, ended - struck, is_left) for rank, (message, ended, is_left) in outcomes.items()}
    finally:
        for process in processes:
            process.kill()
            process.join()


def receive(pipe):
    ok, payload = pipe.recv()
    assert ok, payload
    return torch.load(io.BytesIO(payload), weights_only=False)


@pytest.mark.parametrize(
    ("number", "step", "place"),
    [
        (signal.SIGKILL, 2, "backward"),
        (signal.SIGKILL, COMPRESSED_STEP, "exchange"),
        (signal.SIGKILL, COMPRESSED_STEP, "save"),
        (signal.SIGSTOP, COMPRESSED_STEP, "exchange"),
    ],
)
def test_others_end_within_the_timeout_and_say_what_happened_and_how_to_resume(number, step, place, tmp_path):
    marker = tmp_path / "fault"

    def fn(rank):
        faults = [Fault(marker, number, step=step, place=place)] if rank == 1 else []
        train(tmp_path, make_strategy("onebit_ddp", TIMEOUT_SECONDS), RANKS, steps=14, faults=faults)

    for rank, (message, seconds, thread_is_left) in survivors(fn, harmed=[1], marker=marker).items():
        assert not thread_is_left
        assert message.startswith("RuntimeError: Communication with the other ranks failed, on rank"), message
        phase = "WARMUP" if step < WARMUP_STEPS else "COMPRESSED"
        # A checkpoint is written every third step, the step after the switch being the next.
        completed = 9 if place == "save" else step
        assert f"on rank {rank}, phase {phase}, after {completed} optimizer steps" in message
        assert "ckpt_path=" in message
        if step > 3:
            assert f"ckpt_path='{tmp_path}/last.ckpt'" in message
        if number == signal.SIGKILL:
            assert "another rank has died or failed" in message
            assert seconds < MARGIN_SECONDS
        else:
            assert "hangs or is stopped, or the network is down" in message or "a connection was closed" in message
            assert seconds < TIMEOUT_SECONDS + MARGIN_SECONDS
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix not in (".ckpt", ".onebit")) == ["fault"]


@pytest.mark.parametrize("step", [2, COMPRESSED_STEP])
def test_fabric_says_it_too(step, tmp_path):
    marker = tmp_path / "fault"

    def fn(rank):
        strategy = OneBitDDPFabricStrategy(criterion=FixedStep(WARMUP_STEPS), timeout=timedelta(seconds=30))
        fabric = Fabric(accelerator="cpu", devices=RANKS, strategy=strategy)
        fabric.launch()
        module = Classifier()
        model, optimizer = fabric.setup(module, adam(module))
        for index, batch in enumerate(data(20)):
            if rank == 1 and index == step:
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            fabric.backward(model.training_step(batch, index))
            optimizer.step()
            optimizer.zero_grad()

    for rank, (message, seconds, _) in survivors(fn, harmed=[1], marker=marker).items():
        phase = "WARMUP" if step < WARMUP_STEPS else "COMPRESSED"
        assert f"failed, on rank {rank}, phase {phase}, after {step} optimizer steps: a connection was closed" in message
        assert seconds < MARGIN_SECONDS


def test_an_error_beside_an_exchange_that_hangs_is_seen_soon(tmp_path):
    """Long before the timeout: neither the thread nor the process groups of the exchange keep the rank from ending."""
    marker = tmp_path / "fault"

    def fn(rank):
        send, steps = CompressedOptimizer._send_, itertools.count()

        def send_or_raise(compressed, each, index, **kwargs):
            if rank == 0 and index == 1 and next(steps) == 2:
                while not marker.exists():  # rank 1 hangs in the exchange of bucket 0
                    time.sleep(0.01)
                raise ValueError("mine")
            send(compressed, each, index, **kwargs)

        CompressedOptimizer._send_ = send_or_raise
        faults = [Fault(marker, signal.SIGSTOP, step=WARMUP_STEPS + 2, place="exchange")] if rank == 1 else []
        train(tmp_path, make_strategy("onebit_ddp", 60), RANKS, steps=14, faults=faults)

    # Rank 2 waits for the timeout, as its neighbour in the ring is the one that hangs.
    ((message, seconds, _),) = survivors(fn, harmed=[1, 2], marker=marker).values()
    assert message == "ValueError: mine"
    assert seconds < MARGIN_SECONDS


@pytest.mark.parametrize(
    ("asked", "step", "place"),
    [
        ([1], 2, "backward"),
        ([0, 1, 2], 2, "backward"),
        ([0], COMPRESSED_STEP, "exchange"),
        ([0, 1, 2], COMPRESSED_STEP, "save"),
    ],
)
def test_sigterm_to_some_ranks_ends_all_after_the_same_batch(asked, step, place, tmp_path):
    def fn(rank):
        delay = 0.004 * rank  # not all in the same place of the program
        fault = Fault(tmp_path / f"fault{rank}", signal.SIGTERM, step=step, place=place, delay_seconds=delay)
        steps = []

        class Count(Callback):
            def on_train_batch_end(self, trainer, *_):
                time.sleep(0.002)
                steps.append(trainer.global_step)

        faults = [Count(), fault] if rank in asked else [Count()]
        with pytest.raises(SIGTERMException):
            train(tmp_path, make_strategy("onebit_ddp", 20), RANKS, steps=200, faults=faults)
        return steps[-1]

    first, *others = run_trainers(RANKS, fn)
    assert step < first < 100
    assert others == [first] * (RANKS - 1)


def test_sigterm_during_validation_ends_it(tmp_path):
    """Without the others: an evaluation has no point where ranks meet. All that got the signal end at their next batch."""

    def fn(rank):
        batches = []

        class Asked(Callback):
            def on_validation_batch_end(self, trainer, *_):
                batches.append(trainer.global_step)
                if len(batches) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)

        trainer = make_trainer(
            make_strategy("onebit_ddp", 20), 2, callbacks=[Asked()], num_sanity_val_steps=0, limit_val_batches=20
        )
        with pytest.raises(SIGTERMException):
            trainer.fit(Classifier(), data(4, 2), data(20, 2))
        return batches

    assert run_trainers(2, fn) == [[4, 4]] * 2


def test_handlers_are_lightnings_again_after_the_run(tmp_path):
    def fn(rank):
        before = signal.getsignal(signal.SIGTERM)
        trainer = train(tmp_path, make_strategy("onebit_ddp", 20), 1, steps=2)
        assert signal.getsignal(signal.SIGTERM) is before
        assert trainer._signal_connector._sigterm_notifier_fn.__self__ is trainer._signal_connector

    run_trainers(1, fn)


def slurm(rank, folder):
    """The environment that ``srun`` makes, and an ``scontrol`` that writes down what it is told."""
    scontrol = folder / "scontrol"
    if rank == 0:
        scontrol.write_text(f'#!/bin/sh\necho "$@" >> {folder}/requeued\n')
        scontrol.chmod(0o755)
    os.environ.update(
        SLURM_JOB_ID="42",
        SLURM_JOB_NAME="training",
        SLURM_NTASKS="2",
        SLURM_NTASKS_PER_NODE="2",
        SLURM_PROCID=str(rank),
        SLURM_LOCALID=str(rank),
        SLURM_NODEID="0",
        SLURM_JOB_NODELIST="127.0.0.1",
        PATH=f"{folder}{os.pathsep}{os.environ['PATH']}",
    )


@pytest.mark.parametrize("asked_step", [3, COMPRESSED_STEP])
def test_slurm_requeues_and_the_job_goes_on_where_it_was(asked_step, tmp_path):
    """As ``sbatch --signal`` sends SIGUSR1 to all, at slightly different times: one checkpoint, one requeue."""

    def fn(rank, asked):
        slurm(rank, tmp_path)
        recorder = Recorder()
        fault = Fault(
            tmp_path / f"fault{rank}", signal.SIGUSR1, step=asked_step, place="backward", delay_seconds=0.003 * rank
        )
        faults = [recorder, Slow(), fault] if asked else [recorder]
        trainer = train(tmp_path, make_strategy("onebit_ddp", 20), 2, steps=16, faults=faults)
        return len(recorder.params), digest(trainer.lightning_module)

    whole = run_trainers(2, fn, True)
    assert (tmp_path / "requeued").read_text() == "requeue 42\n"
    assert [file.name for file in tmp_path.glob("hpc_ckpt_*.ckpt")] == ["hpc_ckpt_1.ckpt"]
    resumed = run_trainers(2, fn, False)
    assert {steps for steps, _ in whole} == {16}
    assert {steps for steps, _ in resumed} == {16 - asked_step - 1}
    assert {digest for _, digest in resumed} == {whole[0][1]}


def test_torchrun_restarts_a_job_that_lost_a_rank_and_it_ends_as_if_nothing_had_happened(tmp_path, monkeypatch):
    """By itself, from its last checkpoint, two steps before; bit for bit."""
    # Else torchrun (2.13) keeps one store for all attempts, and ranks may find the addresses of those that are dead.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1]
    fault = ["--fault", "KILL", "--step", 11, "--place", "exchange"]  # the last checkpoint is of step 9
    restarted = start(sys.executable, *torchrun, SCRIPT, tmp_path, "--timeout", 60, "--steps", 14, "--resume", *fault)

    def undisturbed(rank):
        trainer = train(tmp_path / "undisturbed", make_strategy("onebit_ddp", 60), 2, steps=14)
        return digest(trainer.lightning_module)

    expected = run_trainers(2, undisturbed)
    output = restarted.communicate(timeout=110)[0]
    assert restarted.returncode == 0, output
    assert "Communication with the other ranks failed" in output
    assert (tmp_path / "fault1").exists()
    for rank in range(2):
        report = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert report == {"step": 14, "digest": expected[rank]}


@pytest.mark.parametrize(
    ("backend", "has_abandoned"),
    [("cpu:gloo", False), ("cpu:gloo", True), ("cuda:nccl", False), ("cpu:gloo,cuda:nccl", False)],
)
def test_at_exit_the_group_is_ended_unless_that_waits_for_ranks_that_hang(monkeypatch, backend, has_abandoned):
    ended = []
    monkeypatch.setattr(failures, "has_abandoned_a_collective", lambda: has_abandoned)
    monkeypatch.setattr(failures.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(failures.dist, "get_backend_config", lambda: backend)
    monkeypatch.setattr(failures.dist, "destroy_process_group", lambda: ended.append(True))
    monkeypatch.setattr(failures, "GRACE_SECONDS", 0.1)
    with subprocess.Popen(["sleep", "1000"]) as process:
        failures._end([process])
    assert bool(ended) == (backend == "cpu:gloo" and not has_abandoned)
    assert process.returncode == -signal.SIGKILL
    monkeypatch.undo()


def test_children_that_do_not_end_are_killed_at_exit(monkeypatch):
    """Such as stopped ones, which Lightning's launcher would leave behind."""
    registered = []
    monkeypatch.setattr(failures.atexit, "register", lambda *call: registered.append(call))
    monkeypatch.setattr(failures, "GRACE_SECONDS", 1.0)
    with subprocess.Popen(["sleep", "1000"]) as stopped, subprocess.Popen(["sh", "-c", "sleep 0.3; exit 3"]) as ends:
        stopped.send_signal(signal.SIGSTOP)
        failures.end_at_exit_([stopped, ends])
        assert stopped.poll() is None
        ((function, *arguments),) = registered
        function(*arguments)
        assert (stopped.returncode, ends.returncode) == (-signal.SIGKILL, 3)


GLOO = "[../third_party/gloo/gloo/transport/tcp/"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(f"{GLOO}pair.cc:534] Connection closed by peer [10.0.0.1]:4321"), "another rank has died or failed"),
        (RuntimeError(f"{GLOO}unbound_buffer.cc:81] Timed out waiting 5000ms for recv"), "no answer within 5 seconds"),
        (RuntimeError("Application timeout caused pair closure"), "no answer within 5 seconds"),
        (RuntimeError(f"[enforce fail at {GLOO}pair.cc:446] op.preamble.length <= op.nbytes"), "at another place"),
        (dist.DistStoreError("wait timeout after 5000ms, keys: /barrier"), "no answer within 5 seconds"),
        (dist.DistBackendError("NCCL error in: ..., remote process exited"), "another rank has died or failed"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ConnectionResetError("Connection reset by peer"), None),  # a logger's, say
    ],
)
def test_which_errors_are_explained(error, expected, caplog):
    before = str(error)
    for _ in range(2):  # of a fit within a fit, say
        explain_(error, rank=2, phase=Phase.WARMUP, step=7, timeout=timedelta(seconds=5), resume="fabric.load(path, state)")
    assert is_communication_failure(error) == (expected is not None)
    assert caplog.messages == ([] if expected is None else [str(error)])  # at once: a launcher may end this process any time
    if expected is None:
        assert str(error) == before
    else:
        assert expected in str(error)
        assert "on rank 2, phase WARMUP, after 7 optimizer steps" in str(error)
        assert "`fabric.load(path, state)`" in str(error)
        assert str(error).endswith(before)
        assert str(error).count("HINT") == 1
