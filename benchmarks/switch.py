"""A network switch that loses and delays packets, for :mod:`lab` on machines whose kernel has no netem.

    python benchmarks/switch.py --loss 0.01 --jitter 0.05 --interface eth0 NAMESPACE ...

joins the TAP interfaces of the namespaces, until it is killed. Says "ready" when they are connected. Packets that are lost
are drawn at random with a fixed seed, one by one, acknowledgements included; those that are delayed keep their order, as in
a queue whose length varies. Nothing outside Python's standard library; needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import heapq
import itertools
import os
import random
import selectors
import struct
import time

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
MAXIMUM_FRAME_BYTES = 65536
SEED = 0


def open_tap(namespace: str, interface: str) -> int:
    """The file of a TAP interface in another network namespace, which this process enters for that."""
    with open(f"/var/run/netns/{namespace}") as entrance:
        if ctypes.CDLL(None, use_errno=True).setns(entrance.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"Cannot enter the namespace {namespace}")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", interface.encode(), IFF_TAP | IFF_NO_PI))
    return tap


class Switch:
    """Forwards frames between ``taps`` by the addresses that it has learned.

    Args:
        taps: open files, one per node.
        loss: probability that a frame is lost.
        jitter_seconds: frames wait for a random time between 0 and this.
    """

    def __init__(self, taps: list[int], *, loss: float, jitter_seconds: float) -> None:
        self._taps, self._loss, self._jitter_seconds = taps, loss, jitter_seconds
        self._random = random.Random(SEED)
        self._port_of: dict[bytes, int] = {}
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._serial = itertools.count()
        self._last = dict.fromkeys(itertools.product(taps, taps), 0.0)
        self._selector = selectors.DefaultSelector()
        for tap in taps:
            self._selector.register(tap, selectors.EVENT_READ)

    def serve(self) -> None:
        """Forward for ever."""
        while True:
            timeout = None if not self._waiting else max(0.0, self._waiting[0][0] - time.monotonic())
            for key, _ in self._selector.select(timeout):
                self._receive(key.fd)
            while self._waiting and self._waiting[0][0] <= time.monotonic():
                _, _, tap, frame = heapq.heappop(self._waiting)
                self._send(tap, frame)

    def _receive(self, tap: int) -> None:
        for _ in range(64):  # then the others have their turn
            try:
                frame = os.read(tap, MAXIMUM_FRAME_BYTES)
            except BlockingIOError:
                return
            destination, source = frame[:6], frame[6:12]
            self._port_of[source] = tap
            known = self._port_of.get(destination)
            for target in [known] if known is not None else [other for other in self._taps if other != tap]:
                if self._random.random() >= self._loss:
                    self._forward(tap, target, frame)

    def _forward(self, tap: int, target: int, frame: bytes) -> None:
        if not self._jitter_seconds:
            self._send(target, frame)
            return
        due = time.monotonic() + self._random.uniform(0.0, self._jitter_seconds)
        due = self._last[tap, target] = max(due, self._last[tap, target])
        heapq.heappush(self._waiting, (due, next(self._serial), target, frame))

    @staticmethod
    def _send(tap: int, frame: bytes) -> None:
        # If the queue is full or the interface down, the frame is lost, as on a cable.
        with contextlib.suppress(OSError):
            os.write(tap, frame)


def main() -> None:
    parser = argparse.ArgumentParser(description="Join TAP interfaces by a switch that loses and delays packets.")
    parser.add_argument("namespaces", nargs="+", metavar="NAMESPACE")
    parser.add_argument("--interface", default="eth0", help="its name in every namespace (default: eth0)")
    parser.add_argument("--loss", type=float, default=0.0, help="fraction of packets")
    parser.add_argument("--jitter", type=float, default=0.0, help="seconds")
    arguments = parser.parse_args()
    taps = [open_tap(namespace, arguments.interface) for namespace in arguments.namespaces]
    switch = Switch(taps, loss=arguments.loss, jitter_seconds=arguments.jitter)
    print("ready", flush=True)
    switch.serve()


if __name__ == "__main__":
    main()
