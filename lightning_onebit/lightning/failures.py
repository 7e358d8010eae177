"""What a user is told when ranks cannot reach each other, and what becomes of processes that do not end by themselves.

gloo and NCCL say "Connection closed by peer" or "Timed out waiting": true on this rank, but the cause is on another one.
"""

from __future__ import annotations

import atexit
import logging
import re
import subprocess
import time
from collections.abc import Sequence
from datetime import timedelta

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_onebit.comm.watch import has_abandoned_a_collective, others_say
from lightning_onebit.phase import Phase

_log = logging.getLogger(__name__)

_LATE = re.compile(r"time[d -]*out", re.IGNORECASE)
_CLOSED = re.compile(r"closed by peer|reset by peer|broken pipe|pair closure", re.IGNORECASE)
_FAILED = re.compile(rf"{_CLOSED.pattern}|timed out waiting|gloo/|nccl", re.IGNORECASE)
_BEGIN = "Communication with the other ranks failed"

GRACE_SECONDS = 10.0
"""For processes that should end by themselves, before they are killed."""


def is_communication_failure(error: BaseException) -> bool:
    """Whether a collective could not be completed, on whichever library's word."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and _FAILED.search(str(error)) is not None


def explain_(
    error: BaseException,
    *,
    rank: int,
    phase: Phase,
    step: int,
    timeout: timedelta | None,
    resume: str,
) -> None:
    """Say what happened and how to resume in the message of a communication failure, before what the library said.

    It is logged as well, at once: torchrun ends the ranks that are left, which then may not come to their tracebacks.

    Args:
        error: changed in place: its message, not its type, cause or traceback. Any other error stays as it is.
        rank: of this process.
        phase: of the run.
        step: optimizer steps that are complete.
        timeout: how long collectives wait; ``None`` for the library's default.
        resume: what to call for that.
    """
    if not is_communication_failure(error) or str(error).startswith(_BEGIN):
        return
    if _LATE.search(str(error)):
        limit = "the timeout" if timeout is None else f"{timeout.total_seconds():g} seconds (`timeout` of the strategy)"
        what = f"there was no answer within {limit}: another rank hangs or is stopped, or the network is down"
    elif _CLOSED.search(str(error)):
        what = (
            "a connection was closed: another rank has died or failed, as its own output says, or has come to its end before"
        )
    else:
        what = "another rank has died or failed, or is at another place of the program"
    others = others_say()
    if others:
        what += f" ({'; '.join(others)})"
    message = (
        f"{_BEGIN}, on rank {rank}, phase {phase.name}, after {step} optimizer steps: {what}. Training cannot go on without"
        f" that rank, so all ranks end. HINT: start again, and resume from the last checkpoint with `{resume}`. What the"
        f" library said: {error}"
    )
    error.args = (message, *error.args[1:])
    _log.error(message)


def last_checkpoint(trainer: pl.Trainer) -> str | None:
    """Path of what the Trainer's ModelCheckpoints saved last, or found best."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    paths = [path for callback in callbacks for path in (callback.last_model_path, callback.best_model_path)]
    return next(filter(None, paths), None)


def end_at_exit_(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait at the exit of this process for its children, and kill those that do not end: stopped, or hanging for good.

    Not before, as a user's script may go on after an error, in the children as well.
    """
    atexit.register(_end, processes)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    if all(process.poll() is not None for process in processes):
        return
    # So that those who wait for this rank see that it is gone. NCCL's way of ending a group would wait for them instead.
    grace_seconds = GRACE_SECONDS
    if has_abandoned_a_collective():  # nor can gloo's end it; the others have been told, or wait in vain
        grace_seconds /= 2
    elif dist.is_initialized() and "nccl" not in dist.get_backend_config():
        dist.destroy_process_group()
    deadline = time.monotonic() + grace_seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
