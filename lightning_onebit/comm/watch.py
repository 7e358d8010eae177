"""Ranks that wait for each other at different places: found out within seconds, instead of after the timeout.

All ranks pass the same places in the same order: beginnings of batches, optimizer steps, collectives of the training
thread. Each keeps the last ones in a list. A rank that has been at the same place for 5 seconds writes its list into the
store of the process group, where the others can read it, and looks at theirs. Where two lists name different places at the
same position, these ranks will never meet: one has left out a step, say, or has had its last batch. That is a proof,
however slow a rank or the network is; where all have passed the same places, nothing is concluded, and only the timeout ends
the waiting.

On the CPU, whoever waits for a collective of ours raises it. Those of other libraries (at the end of an epoch, at a
checkpoint) cannot be interrupted: there the thread logs it and ends the process, which would wait until the timeout for what
cannot come. On a GPU it is the driver that waits: the thread logs it, and NCCL's timeout ends the waiting.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PATIENCE_SECONDS = 5.0
"""How long a rank may be at one place before it says so."""
LOOK_SECONDS = 1.0
"""Between two looks at the notes of the others; and how long others have, to read ours, before this rank ends."""
MEETING_SECONDS = 0.02
"""Between two looks whether all have come to a meeting."""
PLACES = 64
"""How many a rank remembers."""
CAUSES = (
    " They will never meet. Causes may be a decision that each rank takes by itself (to leave out a step because its own"
    " gradient is large, say), or different numbers of batches. HINT: decide by what is the same on all ranks:"
    " `strategy.grad_norm()`, the norm of the mean gradient, or a value that was reduced over the ranks; and give all ranks"
    " as many batches."
)


_log = logging.getLogger(__name__)


class Watch:
    """What this rank has passed, and what it knows of the others. Its thread only reads and writes notes.

    Args:
        store: of the process group.
        rank: of this process.
        world_size: number of ranks.
        number: the same on all ranks, another one for each watch of a process.
        describe: tells the phase and the step; called by the thread.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, number: int, describe: Callable[[], str]) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._prefix, self._describe = f"lightning_onebit/{number}", describe
        self._places: deque[str] = deque(maxlen=PLACES)
        self._count = 0
        self._since = time.monotonic()
        self._written = -1
        self._lock = threading.Lock()
        self._closing, self._hurry, self._looked = threading.Event(), threading.Event(), threading.Event()
        self.verdict: str | None = None
        """That this rank and another one are at different places, and where; ``None`` if nothing is known."""
        self.others: dict[int, str] = {}
        """What other ranks that wait, or have finished, say of themselves."""
        self.host_waits = True
        """Whether collectives are waited for on the host, where the verdict is raised."""
        self.is_elsewhere = False
        """Whether this rank is in a collective of another library."""
        self._thread = threading.Thread(target=self._serve, name="onebit-watch", daemon=True)
        self._thread.start()

    def passing(self, place: str) -> None:
        """This rank comes to ``place``, as all others do before or after."""
        with self._lock:
            self._places.append(place)
            self._count += 1
            self._since = time.monotonic()

    def wait(self, work: dist.Work) -> None:
        """Wait for a collective on CPU tensors.

        Raises:
            RuntimeError: if it failed; or if it never will be complete, as another rank is at another place.
        """
        global _abandoned
        try:
            while True:
                try:
                    work.wait(timedelta(seconds=LOOK_SECONDS))
                    return
                except RuntimeError:
                    if work.is_completed():  # failed, or done since it was late: it says which
                        work.wait()
                        return
                if self.verdict is not None:
                    raise RuntimeError(self.verdict)
        except BaseException:
            _abandoned = _abandoned or not work.is_completed()
            raise

    def meet(self, place: str, timeout: timedelta) -> None:
        """Come to ``place``, and wait for all others there: by the store, as a collective could meet another one of theirs.

        Raises:
            RuntimeError: if another rank is at another place; or has not come within ``timeout``, as it hangs or has died.
        """
        self.passing(place)
        deadline = time.monotonic() + timeout.total_seconds()
        with self._lock:
            key = f"{self._prefix}/meeting at {self._count}"
        arrived = self._store.add(key, 1)
        while arrived < self._world_size:
            if self.verdict is not None:
                raise RuntimeError(self.verdict)
            if time.monotonic() > deadline:
                raise RuntimeError(f"Timed out waiting for {self._world_size - arrived} ranks to come to {place!r}")
            time.sleep(MEETING_SECONDS)
            arrived = self._store.add(key, 0)

    def look(self, timeout_seconds: float = 2.0) -> None:
        """Have the thread look at the notes of the others now, and wait for it, if it comes back in time."""
        self._looked.clear()
        self._hurry.set()
        self._looked.wait(timeout_seconds)

    def close(self, last: str = "") -> None:
        """End the thread; ``last`` is what this rank leaves as its note, if anything."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._hurry.set()
        if last:
            self.passing(last)
            with contextlib.suppress(RuntimeError):  # the store is gone, and with it whoever could read
                self._write()
        self._thread.join(LOOK_SECONDS)

    def _serve(self) -> None:
        try:
            while not self._closing.is_set():
                was_asked = self._hurry.wait(LOOK_SECONDS)
                if self._closing.is_set():
                    return
                self._hurry.clear()
                if was_asked or time.monotonic() - self._since >= PATIENCE_SECONDS:
                    self._write()
                    found = self._read()
                    self._looked.set()
                    if found is not None and self.verdict is None:
                        self._closing.wait(LOOK_SECONDS)  # others read what this rank has just written
                        self.verdict = found
                        if self.is_elsewhere or not self.host_waits:
                            _log.error(found)
                        if self.is_elsewhere and self.host_waits:
                            end_process()
        except RuntimeError:
            return  # the store is gone: the rank that has it has ended, and collectives will say so

    def _write(self) -> None:
        with self._lock:
            count, places = self._count, list(self._places)
        if count != self._written:
            self._written = count  # not `_count`, which the training thread may have moved on
            note = {"count": count, "places": places, "says": self._describe()}
            self._store.set(f"{self._prefix}/{self._rank}", json.dumps(note))

    def _read(self) -> str | None:
        found = None
        for rank in range(self._world_size):
            key = f"{self._prefix}/{rank}"
            if rank != self._rank and self._store.check([key]):
                note = json.loads(self._store.get(key))
                self.others[rank] = f"rank {rank} ({note['says']}) is at {note['places'][-1]!r}"
                with self._lock:
                    difference = first_difference(self._count, list(self._places), note["count"], note["places"])
                if difference is not None:
                    own, other = difference
                    found = found or (
                        f"The ranks have parted: where rank {self._rank} ({self._describe()}) came to {own!r}, rank {rank}"
                        f" ({note['says']}) came to {other!r}.{CAUSES}"
                    )
        return found


def first_difference(count: int, places: list[str], other_count: int, other_places: list[str]) -> tuple[str, str] | None:
    """The first two different places at the same position of two lists, of which only the ends are known.

    Args:
        count: how many places the first rank has passed.
        places: the last of them.
        other_count: likewise, of the other rank.
        other_places: likewise.
    """
    start, other_start = count - len(places), other_count - len(other_places)
    for position in range(max(start, other_start), min(count, other_count)):
        pair = places[position - start], other_places[position - other_start]
        if pair[0] != pair[1]:
            return pair
    return None


_watch: Watch | None = None
_number = 0
_abandoned = False
"""Whether this process has turned away from a collective that is not complete."""


def has_abandoned_a_collective() -> bool:
    """Whether the default process group ends only with this process, or at the timeout, as a thread of gloo waits in it."""
    return _abandoned


def _exit_at_once() -> None:
    """The last thing at exit: the interpreter would wait for gloo's thread, and so would the others, as connections stay."""
    if _abandoned:
        end_process()


def end_process() -> None:
    """At once, from whatever thread: as a failure, with all that was written."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # there is none, or it is closed
            stream.flush()
    os._exit(1)


atexit.register(_exit_at_once)  # as the module is imported: after all that programs register


def start_watch(describe: Callable[[], str]) -> None:
    """Begin to watch the default process group, anew. Not collective, but all ranks must do it alike."""
    global _watch, _number
    stop_watch()
    if not _number:
        atexit.register(_end_watch)  # nobody tells Fabric's strategy of the end
    _number += 1
    store: Any = dist.distributed_c10d._get_default_store()
    with contextlib.suppress(AttributeError, RuntimeError):  # not every store can be cloned
        store = store.clone()  # so that nobody waits for another's request
    _watch = Watch(store, dist.get_rank(), dist.get_world_size(), _number, describe)


def stop_watch(last: str = "") -> None:
    """End the watch, if there is one; ``last`` is the note that this rank leaves."""
    global _watch
    if _watch is not None:
        _watch.close(last)
    _watch = None


def _end_watch() -> None:
    stop_watch("" if hasattr(sys, "last_value") else "the end")  # an exception is no end


def passing(place: str) -> None:
    """This rank comes to ``place``, as all others do; nothing if nobody watches."""
    if _watch is not None:
        _watch.passing(place)


@contextlib.contextmanager
def elsewhere(place: str, group: Any = None) -> Iterator[None]:
    """Come to ``place``, as all others do, and wait there for them, in a collective of another library.

    Args:
        place: the same on all ranks.
        group: of the collective. Nobody watches others than the default one.

    Raises:
        RuntimeError: if another rank is known to be at another place. If it comes out later, the process ends.
    """
    if _watch is None or group not in (None, dist.group.WORLD):
        yield
        return
    _watch.passing(place)
    _watch.is_elsewhere = True  # before the look: a verdict that comes between finds it
    try:
        if _watch.verdict is not None:
            raise RuntimeError(_watch.verdict)
        yield
    finally:
        if _watch is not None:
            _watch.is_elsewhere = False


def meet(place: str, timeout: timedelta | None) -> None:
    """Come to ``place``, and wait for all others there, without a collective; see :meth:`Watch.meet`.

    Args:
        place: the same on all ranks.
        timeout: ``None``: torch's default for collectives.
    """
    if _watch is not None:
        _watch.meet(place, dist.distributed_c10d.default_pg_timeout if timeout is None else timeout)


def others_say() -> list[str]:
    """What the other ranks that wait or have finished say of themselves."""
    if _watch is None:
        return []
    _watch.look()
    return [_watch.others[rank] for rank in sorted(_watch.others)]


def watched(collective: str, tensor: torch.Tensor, call: Callable[..., Any]) -> None:
    """Carry out ``call``, a collective of the training thread on the default group that takes ``async_op``."""
    if _watch is None:
        call()
        return
    _watch.passing(f"{collective} of {tensor.numel()} elements")
    _watch.host_waits = tensor.device.type == "cpu"
    if _watch.host_waits:
        _watch.wait(call(async_op=True))
    else:
        call()
