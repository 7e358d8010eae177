"""The network lab's switch, on socket pairs in the place of network interfaces."""

import contextlib
import importlib.util
import socket
import threading
import time
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("switch", Path(__file__).parents[2] / "benchmarks/switch.py")
switch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(switch)

BROADCAST = b"\xff" * 6


def frame(source, destination, number=0):
    return (
        (BROADCAST if destination is None else bytes([2] * 5 + [destination]))
        + bytes([2] * 5 + [source])
        + number.to_bytes(4, "big")
    )


class Network:
    """Three nodes. A frame is sent and received by the number of its node."""

    def __init__(self, **options):
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
        self.nodes = [node for node, _ in pairs]
        self.ports = [port for _, port in pairs]
        for port in self.ports:
            port.setblocking(False)
        self.switch = switch.Switch([port.fileno() for port in self.ports], **options)
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()
        for node in range(3):  # so that it learns who is where, however many of these get lost
            for _ in range(20):
                self.nodes[node].send(frame(node, None))
        time.sleep(0.3)
        for node in range(3):
            self.received(node)

    def serve(self):
        with contextlib.suppress(OSError):  # of a port that was closed
            self.switch.serve()

    def received(self, node, seconds=0.3):
        self.nodes[node].settimeout(seconds)
        frames = []
        try:
            while True:
                frames.append(self.nodes[node].recv(4096))
        except TimeoutError:
            return frames


@pytest.fixture
def network():
    networks = []

    def make(**options):
        networks.append(Network(**{"loss": 0.0, "jitter_seconds": 0.0, **options}))
        return networks[-1]

    yield make
    for each in networks:
        for end in [*each.ports, *each.nodes]:
            end.close()


def test_frames_go_where_they_are_addressed(network):
    net = network()
    net.nodes[0].send(frame(0, 2, 7))
    assert net.received(2) == [frame(0, 2, 7)]
    assert net.received(1, 0.05) == []
    net.nodes[1].send(frame(1, None, 8))
    assert [net.received(node, 0.1) for node in range(3)] == [[frame(1, None, 8)], [], [frame(1, None, 8)]]


def test_as_many_get_lost_as_asked_for(network):
    net = network(loss=0.2)
    for number in range(100):
        net.nodes[0].send(frame(0, 1, number))
        time.sleep(0.001)
    numbers = [int.from_bytes(each[12:], "big") for each in net.received(1)]
    assert 65 < len(numbers) < 95
    assert numbers == sorted(numbers)


def test_jitter_delays_and_keeps_the_order(network):
    net = network(jitter_seconds=0.2)
    delays = []
    for number in range(6):
        start = time.perf_counter()
        net.nodes[0].send(frame(0, 1, number))
        net.nodes[1].settimeout(1.0)
        assert net.nodes[1].recv(4096) == frame(0, 1, number)
        delays.append(time.perf_counter() - start)
    assert max(delays) > 0.05
    assert max(delays) - min(delays) > 0.02
    for number in range(20):
        net.nodes[0].send(frame(0, 1, number))
    assert net.received(1) == [frame(0, 1, number) for number in range(20)]
