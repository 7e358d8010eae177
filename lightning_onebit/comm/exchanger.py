"""One thread that carries out exchanges in the order in which they were submitted.

Collectives must be issued in the same order on all ranks, and from one thread only: completing futures from callbacks,
or two threads on one process group, mixes them up. So the exchanges of a run have one thread, and a process group of
their own, on which nobody else communicates.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

import torch
from typing_extensions import override


class Exchange:
    """An exchange that was submitted."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._finished = threading.Event()
        self._error: BaseException | None = None
        self._seconds_waited = self._seconds_taken = 0.0

    def done(self) -> bool:
        """Whether :meth:`wait` would return at once."""
        return self._finished.is_set()

    def wait(self) -> None:
        """Block until the exchange is complete.

        Raises:
            RuntimeError: if it failed, with the cause attached.
        """
        start = time.perf_counter()
        self._finished.wait()
        self._seconds_waited += time.perf_counter() - start
        if self._error is not None:
            raise RuntimeError(f"A compressed exchange failed on this rank: {self._error}") from self._error

    def seconds(self) -> tuple[float, float] | None:
        """How long :meth:`wait` kept what waits from going on, and how long the work took; ``None``: not known yet."""
        return self._seconds_waited, self._seconds_taken

    def run(self, failed: BaseException | None = None) -> BaseException | None:
        """Do the work, unless an earlier one ``failed``. Returns the error, if there was one. Only Ctrl-C is raised, which
        Python has in the main thread alone: there is more to end than this exchange."""
        self._error = failed
        if failed is None:
            start = time.perf_counter()
            try:
                self._work()
            except BaseException as error:
                self._error = error
                if isinstance(error, KeyboardInterrupt):
                    raise
            self._seconds_taken = time.perf_counter() - start
        self._finished.set()
        return self._error


class StreamExchange(Exchange):
    """An exchange on a CUDA stream: issued, perhaps not complete."""

    def __init__(self, work: Callable[[], None], stream: torch.cuda.Stream) -> None:
        super().__init__(work)
        self._stream = stream
        self._begin, self._event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._waited: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    @override
    def done(self) -> bool:
        return super().done() and self._event.query()

    @override
    def wait(self) -> None:
        """Have the current stream wait for the exchange; the calling thread goes on."""
        super().wait()
        stream = torch.cuda.current_stream(self._stream.device)
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(stream)
        stream.wait_event(self._event)
        after.record(stream)
        self._waited = before, after

    @override
    def seconds(self) -> tuple[float, float] | None:
        """Of the device: the host only issues."""
        if self._waited is None or not self._waited[1].query():
            return None
        return self._waited[0].elapsed_time(self._waited[1]) / 1000.0, self._begin.elapsed_time(self._event) / 1000.0

    @override
    def run(self, failed: BaseException | None = None) -> BaseException | None:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            self._begin.record(self._stream)
            error = super().run(failed)
            self._event.record(self._stream)
        return error


class InlineExchanger:
    """Carries out each exchange when it is submitted: for one rank, and where a thread brings nothing."""

    def submit(self, work: Callable[[], None]) -> Exchange:
        exchange = Exchange(work)
        exchange.run()
        exchange._seconds_waited = exchange._seconds_taken  # nothing else was done meanwhile
        return exchange

    def close(self) -> None:
        """Nothing to end."""


class StreamExchanger:
    """Issues each exchange at once, on a CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._failed: BaseException | None = None

    def submit(self, work: Callable[[], None]) -> Exchange:
        exchange = StreamExchange(work, self._stream)
        self._failed = exchange.run(self._failed)
        return exchange

    def close(self) -> None:
        """Nothing to end."""


class ThreadExchanger:
    """A thread for exchanges. After a failure all later ones fail with the same cause: their order is lost."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Exchange | None] = queue.SimpleQueue()
        # A daemon: an exchange that hangs must not keep a failed process alive.
        self._thread = threading.Thread(target=self._serve, name="onebit-exchanger", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None]) -> Exchange:
        """Have ``work`` done after everything submitted before."""
        exchange = Exchange(work)
        self._queue.put(exchange)
        return exchange

    def close(self, timeout_seconds: float = 5.0) -> None:
        """End the thread after what was submitted; does not wait for an exchange that hangs."""
        self._queue.put(None)
        self._thread.join(timeout_seconds)

    def _serve(self) -> None:
        failed = None
        while (exchange := self._queue.get()) is not None:
            failed = exchange.run(failed)


Exchanger: TypeAlias = InlineExchanger | StreamExchanger | ThreadExchanger


def make_exchanger(device: torch.device) -> Exchanger:
    """What lets exchanges of tensors on ``device`` run beside other work."""
    return StreamExchanger(device) if device.type == "cuda" else ThreadExchanger()
