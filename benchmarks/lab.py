"""A network of several nodes on one machine: network namespaces joined by a bridge, every link shaped to a rate.

    python benchmarks/lab.py --nodes 4 --rate 200mbit -- python train.py

runs the command once per node, with the environment that torch.distributed and Lightning expect, and removes everything
afterwards. Needs Linux, root and iproute2, and nothing outside Python's standard library. From Python::

    with NetworkLab(nodes=4, rate="200mbit") as lab:
        lab.run(["python", "train.py"])      # a command, once per node
        lab.call(function, argument)         # or a function of this process, in forked children
        lab.interface_bytes()

All of it, the bridge included, lives in namespaces named ``onebitlab-PID-...``: the machine's own network is not touched.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import IO, Any

PREFIX = "onebitlab"
INTERFACE = "eth0"
"""Name of every node's interface, in its own namespace."""

UNSHAPED, LOOPBACK = "unshaped", "loopback"
PORT = 29500


class LabError(RuntimeError):
    """The lab could not be built, or a node failed."""


@dataclass(frozen=True, kw_only=True)
class Completed:
    """How a command ended on one node."""

    node: int
    returncode: int
    output: str | None
    """stdout and stderr, if captured."""


@dataclass(frozen=True, kw_only=True)
class InterfaceBytes:
    """What went through a node's link since the lab was built, Ethernet headers of every packet included."""

    sent_bytes: int
    received_bytes: int


class Loopback:
    """The same processes and the same environment on the loopback interface: no root, no namespaces, no shaping."""

    master_address = "127.0.0.1"
    interface = "lo"

    def __init__(self, *, nodes: int) -> None:
        if not 1 <= nodes <= 200:
            raise ValueError(f"Invalid number of nodes: {nodes}. Must be between 1 and 200.")
        self.nodes = nodes

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def environment(self, node: int, port: int) -> dict[str, str]:
        """What is added to the environment of a node's process: one rank per node."""
        return {
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(self.nodes),
            "RANK": str(node),
            "NODE_RANK": str(node),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "GLOO_SOCKET_IFNAME": self.interface,
            "OMP_NUM_THREADS": "1",
        }

    def run(
        self,
        command: Sequence[str],
        *,
        timeout_seconds: float | None = None,
        capture: bool = False,
        check: bool = True,
    ) -> list[Completed]:
        """Run a command once per node, all at the same time; when one fails, the others are killed.

        Args:
            command: program and arguments.
            timeout_seconds: kill all after this long.
            capture: collect the output instead of passing it on.
            check: raise if a node failed.

        Raises:
            LabError: after the timeout, and, with ``check``, if the command failed on a node.
        """
        port = self._port()
        deadline = time.monotonic() + timeout_seconds if timeout_seconds is not None else None
        with contextlib.ExitStack() as stack:
            outputs = [stack.enter_context(tempfile.TemporaryFile()) if capture else None for _ in range(self.nodes)]
            processes: list[subprocess.Popen[bytes]] = []
            stack.callback(_kill, processes)
            for node, output in enumerate(outputs):
                processes.append(self.start(node, command, port=port, output=output))
            while True:
                codes = [process.poll() for process in processes]
                failed = next((node for node, code in enumerate(codes) if code), None)
                if failed is not None or None not in codes:
                    break
                if deadline is not None and time.monotonic() > deadline:
                    raise LabError(f"The command did not finish within {timeout_seconds:g} seconds.")
                time.sleep(0.05)
            _kill(processes)
            results = [
                Completed(node=node, returncode=processes[node].returncode, output=_read(output) if output else None)
                for node, output in enumerate(outputs)
            ]
        if check and failed is not None:
            output_text = f":\n{results[failed].output}" if capture else "."
            raise LabError(f"The command failed on node {failed} with exit code {results[failed].returncode}{output_text}")
        return results

    def start(self, node: int, command: Sequence[str], *, port: int, output: IO[bytes] | None) -> subprocess.Popen[bytes]:
        """Start a command on one node, in a session of its own, and leave it to the caller.

        Args:
            node: where.
            command: program and arguments.
            port: for ``MASTER_PORT``, the same on all nodes.
            output: a file for stdout and stderr; ``None`` for those of this process.
        """
        return subprocess.Popen(
            self._command(node, command),
            env={**os.environ, **self.environment(node, port)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def call(self, function: Callable[..., Any], *args: Any, timeout_seconds: float | None = None) -> list[Any]:
        """Call ``function(*args)`` once per node in forked children of this process.

        Much cheaper than :meth:`run` where imports take seconds: children inherit what this process has imported. It
        must not have started threads that they would miss, so: no torch computations here.

        Args:
            function: finds its rank in the environment. What it writes to stdout and stderr is shown only if it fails.
            args: its arguments, inherited.
            timeout_seconds: kill all after this long.

        Returns:
            What the function returned, pickled on the way, by node.

        Raises:
            LabError: as soon as the function fails on a node, with the cause, or if it does not return in time.
        """
        context = multiprocessing.get_context("fork")
        port = self._port()
        with contextlib.ExitStack() as stack:
            receivers: list[Connection] = []
            processes: list[BaseProcess] = []
            outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(self.nodes)]
            stack.callback(_kill, processes)
            sys.stdout.flush()
            for node, output in enumerate(outputs):
                receiver, sender = context.Pipe(duplex=False)
                arguments = (sender, output.fileno(), node, port, function, args)
                process = context.Process(target=self._child, args=arguments, daemon=True)
                process.start()
                sender.close()
                receivers.append(receiver)
                processes.append(process)
            values: dict[int, Any] = {}
            for node, succeeded, value in _receive(receivers, timeout_seconds):
                if not succeeded:
                    if value is None:
                        processes[node].join()
                        value = f"The process ended with exit code {processes[node].exitcode}.\n{_read(outputs[node])}"
                    raise LabError(f"Node {node} failed:\n{value}")
                values[node] = value
            return [values[node] for node in range(self.nodes)]

    def _child(
        self, sender: Connection, output: int, node: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> None:
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(self.environment(node, port))
            self._enter(node)
            sender.send((True, function(*args)))
        except BaseException:
            sender.send((False, traceback.format_exc()))
        finally:
            # Not sys.exit: exit handlers belong to the parent, and communication threads may still be waiting.
            os._exit(0)

    def _command(self, node: int, command: Sequence[str]) -> list[str]:
        return list(command)

    def _enter(self, node: int) -> None:
        """Move the calling process into the node's network."""

    def _port(self) -> int:
        with socket.socket() as s:
            s.bind((self.master_address, 0))
            return int(s.getsockname()[1])


class NetworkLab(Loopback):
    """Namespaces joined by a bridge. Exists between entering and leaving the ``with`` block.

    Args:
        nodes: how many.
        rate: of every node's link, for each direction by itself, as ``tc`` writes it ("200mbit", "1gbit"); or "unshaped".
        delay: added on the way from a node to the bridge, as ``tc`` writes it ("1ms"): a round trip takes twice this.
        loss: fraction of the packets between nodes that get lost, at random.
        jitter_seconds: packets between nodes come later, by a random time between 0 and this; they keep their order. With
            loss or jitter a process takes the place of the bridge (:mod:`switch`), and received bytes are not counted.

    Raises:
        LabError: on entering, if something that it needs is missing.
    """

    interface = INTERFACE
    master_address = "10.77.0.1"
    _serial = itertools.count()

    def __init__(
        self,
        *,
        nodes: int,
        rate: str = UNSHAPED,
        delay: str | None = None,
        loss: float = 0.0,
        jitter_seconds: float = 0.0,
    ) -> None:
        super().__init__(nodes=nodes)
        if not 0 <= loss < 1:
            raise ValueError(f"Invalid loss: {loss}. Must be a fraction, at least 0 and below 1.")
        if jitter_seconds < 0:
            raise ValueError(f"Invalid jitter: {jitter_seconds} seconds. Must be at least 0.")
        self.loss = loss
        self.jitter_seconds = jitter_seconds
        self._switch_process: subprocess.Popen[bytes] | None = None
        self.rate = rate
        self.rate_bits_per_second = None if rate == UNSHAPED else bits_per_second(rate)
        self.delay = delay
        name = f"{PREFIX}-{os.getpid()}-{next(self._serial)}"
        self.namespaces = [f"{name}-node{node}" for node in range(nodes)]
        self._switch = f"{name}-switch"

    def __enter__(self) -> NetworkLab:
        check_requirements()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def interface_bytes(self) -> list[InterfaceBytes]:
        """Counters of every node's link."""
        return [
            InterfaceBytes(
                sent_bytes=_qdisc_bytes(INTERFACE, namespace),
                received_bytes=0 if self._switch_process is not None else _qdisc_bytes(f"port{node}", self._switch),
            )
            for node, namespace in enumerate(self.namespaces)
        ]

    def congestion_control(self) -> str:
        """The TCP congestion control in use."""
        path = "/proc/sys/net/ipv4/tcp_congestion_control"
        return _system("ip", "netns", "exec", self.namespaces[0], "cat", path).strip()

    def throughput_bits_per_second(self, seconds: float = 1.0) -> float:
        """TCP payload per second on one connection from the last node to the first, measured over ``seconds``."""
        results = self.call(_transfer, seconds, timeout_seconds=30 + 2 * seconds)
        return float(results[0])

    def set_link(self, node: int, *, up: bool) -> None:
        """Plug or unplug a node's cable, at the side of the bridge."""
        if self._switch_process is not None:
            raise LabError("Links can only be unplugged from a bridge. HINT: build the lab without loss and jitter.")
        _system("ip", "-n", self._switch, "link", "set", f"port{node}", "up" if up else "down")

    def set_rate(self, node: int, rate: str) -> None:
        """Shape the link of one node to another rate than the others', in both directions."""
        if self._switch_process is not None or self.delay is not None:
            raise LabError("One link cannot be shaped beside loss, jitter or a delay. HINT: build the lab without.")
        burst, limit = token_bucket_bytes(bits_per_second(rate))
        for namespace, device in ((self.namespaces[node], INTERFACE), (self._switch, f"port{node}")):
            replace = ("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root")
            _system(*replace, "tbf", "rate", rate, "burst", f"{burst}b", "limit", f"{limit}b")

    def _build(self) -> None:
        if self.loss or self.jitter_seconds:
            self._build_with_switch()
        else:
            self._build_with_bridge()

    def _build_with_switch(self) -> None:
        for node, namespace in enumerate(self.namespaces):
            _system("ip", "netns", "add", namespace)
            _system("ip", "netns", "exec", namespace, "sh", "-c", _CONFIGURE)
            # A TAP: what is sent through it arrives in a file, in packets as a cable would carry them.
            _system("ip", "-n", namespace, "tuntap", "add", "dev", INTERFACE, "mode", "tap")
            _system("ip", "-n", namespace, "address", "add", f"10.77.0.{node + 1}/24", "dev", INTERFACE)
            self._shape(namespace, INTERFACE, self.delay)
            _system("ip", "-n", namespace, "link", "set", "lo", "up")
            _system("ip", "-n", namespace, "link", "set", INTERFACE, "up")
        program = Path(__file__).with_name("switch.py")
        arguments = [f"--loss={self.loss}", f"--jitter={self.jitter_seconds}", f"--interface={INTERFACE}", *self.namespaces]
        self._switch_process = subprocess.Popen(
            [sys.executable, str(program), *arguments], stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._switch_process.stdout is not None
        if not self._switch_process.stdout.readline():  # it says when it is ready
            raise LabError("The switch did not start; its error is above.")

    def _build_with_bridge(self) -> None:
        _system("ip", "netns", "add", self._switch)
        _system("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _system("ip", "-n", self._switch, "link", "set", "bridge", "up")
        for node, namespace in enumerate(self.namespaces):
            port = f"port{node}"
            _system("ip", "netns", "add", namespace)
            _system("ip", "netns", "exec", namespace, "sh", "-c", _CONFIGURE)
            peer = ("type", "veth", "peer", "name", port, "netns", self._switch)
            _system("ip", "-n", namespace, "link", "add", INTERFACE, *peer)
            _system("ip", "-n", namespace, "address", "add", f"10.77.0.{node + 1}/24", "dev", INTERFACE)
            _system("ip", "-n", self._switch, "link", "set", port, "master", "bridge")
            self._shape(namespace, INTERFACE, self.delay)
            self._shape(self._switch, port, None)
            _system("ip", "-n", self._switch, "link", "set", port, "up")
            _system("ip", "-n", namespace, "link", "set", "lo", "up")
            _system("ip", "-n", namespace, "link", "set", INTERFACE, "up")

    def _shape(self, namespace: str, device: str, delay: str | None) -> None:
        add = ("tc", "-n", namespace, "qdisc", "add", "dev", device)
        place: tuple[str, ...] = ("root",)
        if delay is not None:
            try:
                _system(*add, "root", "handle", "1:", "netem", "delay", delay, "limit", "100000")
            except LabError as error:
                raise LabError(f"{error} HINT: a delay needs the kernel's netem (module sch_netem).") from error
            place = ("parent", "1:1")
        if self.rate_bits_per_second is not None:
            burst, limit = token_bucket_bytes(self.rate_bits_per_second)
            _system(*add, *place, "tbf", "rate", self.rate, "burst", f"{burst}b", "limit", f"{limit}b")
        elif delay is None:
            # Changes nothing, but counts.
            _system(*add, "root", "pfifo", "limit", "10000")

    def _remove(self) -> None:
        if self._switch_process is not None:
            _kill([self._switch_process])
            self._switch_process = None
        for namespace in [*self.namespaces, self._switch]:
            _remove_namespace(namespace)

    def _command(self, node: int, command: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.namespaces[node], *command]

    def _enter(self, node: int) -> None:
        with open(f"/var/run/netns/{self.namespaces[node]}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"Cannot enter the namespace {self.namespaces[node]}")

    def _port(self) -> int:
        return PORT


def make_lab(*, nodes: int, rate: str, delay: str | None = None) -> Loopback:
    """A :class:`Loopback`, which knows no delay, if the rate is "loopback"; else a :class:`NetworkLab`."""
    return Loopback(nodes=nodes) if rate == LOOPBACK else NetworkLab(nodes=nodes, rate=rate, delay=delay)


def sent_bytes() -> int | None:
    """Bytes that the calling process's node has sent so far; None on loopback, where others send too."""
    return _qdisc_bytes(INTERFACE) if os.environ.get("GLOO_SOCKET_IFNAME") == INTERFACE else None


# Rates

_UNITS = {"bit": 1, "bps": 8}
_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def bits_per_second(rate: str) -> float:
    """A rate in ``tc``'s notation, where "bps" means bytes per second.

    Raises:
        ValueError: if it is not one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)((?:[kmgt]i?)?)(bit|bps)", rate.lower())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"Invalid rate: {rate!r}. Must be as tc writes it (200mbit, 1gbit, 25mbps), or {UNSHAPED!r}.")
    return float(match[1]) * _PREFIXES[match[2]] * _UNITS[match[3]]


def token_bucket_bytes(rate_bits_per_second: float) -> tuple[int, int]:
    """Burst and queue limit of the token bucket, bytes.

    The burst is what passes at once after a pause: a millisecond at the rate, so that timers which fire late cost no
    throughput, and from 100 Mbit/s on at least one packet as the sender's segmentation offload makes it. With less, the
    kernel cuts those up and sets a timer for every 1.5 KB: at 200 Mbit/s that took 0.4 cores per connection, which the
    training then lacks. Below 100 Mbit/s, at least ten packets. The queue holds 50 ms, and, like a port of a switch,
    between 128 KiB and 4 MiB.
    """
    bytes_per_second = rate_bits_per_second / 8
    least = 72_000 if rate_bits_per_second >= 100e6 else 10 * 1514
    burst = max(least, int(bytes_per_second * 1e-3))
    limit = min(max(128 * 1024, int(bytes_per_second * 50e-3)), 4 * 1024**2)
    return burst, limit + burst


# Namespaces

_CONFIGURE = """
cd /proc/sys/net
for name in cubic reno; do
    if echo $name > ipv4/tcp_congestion_control; then break; fi
done 2> /dev/null
if [ -e ipv6 ]; then echo 1 > ipv6/conf/all/disable_ipv6; fi
"""
"""The same congestion control whatever the machine is set to: Linux's default, or, if the machine does not allow that inside
namespaces, the one that is always there (they act alike at short round trips). And gloo shall find one address."""


def check_requirements() -> None:
    """Raise :class:`LabError` if this machine cannot build a lab."""
    if not sys.platform.startswith("linux"):
        raise LabError(f"Network namespaces are a feature of Linux; this is {sys.platform}. HINT: use --rates loopback.")
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        raise LabError(f"Not found: {' and '.join(missing)}. HINT: install iproute2 (apt-get install iproute2).")
    if os.geteuid() != 0:
        raise LabError("Network namespaces need root. HINT: sudo, or --rates loopback where the benchmark has it.")


def remove_leftovers() -> tuple[list[str], list[str]]:
    """Remove the namespaces of labs whose process is gone, and what still runs in them.

    Returns:
        The namespaces that were removed, and those that belong to a lab in use.
    """
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    removed, in_use = [], []
    for name in re.findall(rf"^{PREFIX}-\d+-\S+", listed, re.MULTILINE):
        if os.path.exists(f"/proc/{name.split('-')[1]}"):
            in_use.append(name)
        else:
            _remove_namespace(name)
            removed.append(name)
    return removed, in_use


def _remove_namespace(name: str) -> None:
    """Kill what runs in it, and delete it with its interfaces; without effect if there is none."""
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout.split()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _qdisc_bytes(device: str, namespace: str | None = None) -> int:
    """Bytes that a device has sent.

    From its queueing discipline, not from ``/sys/class/net``: between the segmentation offload of sender and receiver, a
    virtual interface counts up to 64 KiB with one header, where a cable carries one header per packet.
    """
    within = () if namespace is None else ("-n", namespace)
    output = _system("tc", *within, "-s", "-j", "qdisc", "show", "dev", device)
    return next(int(qdisc["bytes"]) for qdisc in json.loads(output) if qdisc.get("root"))


def _system(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise LabError(f"`{' '.join(command)}` failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def _transfer(seconds: float) -> float | None:
    """On the last node: send for 1.2 times ``seconds``. On the first: the rate of arrival after the first fifth."""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank == 0:
        with socket.create_server(address) as server, server.accept()[0] as connection:
            buffer = bytearray(1 << 20)
            begin = now = time.perf_counter()
            counted_from: float | None = None
            received_bytes = 0
            while count := connection.recv_into(buffer):
                now = time.perf_counter()
                if counted_from is not None:
                    received_bytes += count
                elif now - begin > 0.2 * seconds:
                    counted_from = now
            assert counted_from is not None
            return 8 * received_bytes / (now - counted_from)
    if rank == world_size - 1:
        end = time.perf_counter() + 10
        while True:
            try:
                connection = socket.create_connection(address, timeout=10)
                break
            except ConnectionRefusedError:
                if time.perf_counter() > end:
                    raise
                time.sleep(0.02)
        end = time.perf_counter() + 1.2 * seconds
        with connection:
            data = bytes(1 << 18)
            while time.perf_counter() < end:
                connection.sendall(data)
    return None


# Processes


def _kill(processes: Sequence[subprocess.Popen[bytes] | BaseProcess]) -> None:
    """Kill processes that lead a session each, and all of their sessions; wait for them."""
    for process in processes:
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # in case it has not come to lead a session yet
    for process in processes:
        if isinstance(process, subprocess.Popen):
            process.wait()
        else:
            process.join()


def _read(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode(errors="replace")


def _receive(receivers: Sequence[Connection], timeout_seconds: float | None) -> Iterator[tuple[int, bool, Any]]:
    """Per node, as they come: its number, and what it sent, which is (False, None) if it died."""
    pending = {receiver: node for node, receiver in enumerate(receivers)}
    deadline = time.monotonic() + timeout_seconds if timeout_seconds is not None else None
    while pending:
        ready = wait(list(pending), timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not ready:
            raise LabError(f"Nodes {sorted(pending.values())} did not finish within {timeout_seconds:g} seconds.")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            try:
                message = receiver.recv()
            except EOFError:
                message = (False, None)
            yield (pending.pop(receiver), *message)


def exit_on_sigterm() -> None:
    """Let SIGTERM end this process by an exception, so that ``with`` blocks clean up."""

    def handler(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, handler)


# Command line


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=f"python benchmarks/{Path(__file__).name}",
        usage="%(prog)s [--nodes N] [--rate RATE] [--delay DELAY] [--loss P] [--jitter MS] [--timeout S] -- COMMAND ...\n"
        "       %(prog)s --clean",
        description="Run a command once per node, each node in a network namespace of its own, over shaped links."
        " Needs root and iproute2. Every process finds RANK, WORLD_SIZE, LOCAL_RANK (0), NODE_RANK, MASTER_ADDR,"
        " MASTER_PORT, GLOO_SOCKET_IFNAME and OMP_NUM_THREADS (1) in its environment: for Lightning, devices=1 and"
        " num_nodes=N.",
    )
    parser.add_argument("--nodes", type=int, default=2, help="number of nodes (default: 2)")
    parser.add_argument(
        "--rate", default=UNSHAPED, help="of each node's link, each direction: 200mbit, 1gbit, ...; default: unshaped"
    )
    parser.add_argument("--delay", help="from each node to the bridge, such as 1ms: half a round trip (default: none)")
    parser.add_argument("--loss", type=float, default=0.0, help="fraction of packets that get lost, such as 0.01")
    parser.add_argument("--jitter", type=float, default=0.0, metavar="MS", help="packets come up to this much later")
    parser.add_argument("--timeout", type=float, metavar="S", help="kill everything after S seconds (default: never)")
    parser.add_argument("--check", action="store_true", help="first print the throughput of one TCP connection")
    parser.add_argument("--clean", action="store_true", help="remove what crashed labs have left behind, and exit")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="program and arguments, after --")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command and not arguments.clean and not arguments.check:
        parser.error("nothing to run: give a COMMAND after --, or --check, or --clean")

    exit_on_sigterm()
    try:
        check_requirements()
        if arguments.clean:
            removed, in_use = remove_leftovers()
            print(f"Removed: {', '.join(removed) or 'nothing'}.")
            if in_use:
                print(f"Left alone, as the process that made them runs: {', '.join(in_use)}.")
            return 0
        lab = NetworkLab(
            nodes=arguments.nodes,
            rate=arguments.rate,
            delay=arguments.delay,
            loss=arguments.loss,
            jitter_seconds=arguments.jitter / 1000,
        )
        with lab:
            if arguments.check:
                print(f"{arguments.rate}: TCP payload at {lab.throughput_bits_per_second() / 1e6:.1f} Mbit/s", flush=True)
            if not command:
                return 0
            results = lab.run(command, timeout_seconds=arguments.timeout, check=False)
            # The node that failed by itself, rather than one that was killed for it.
            codes = sorted((result.returncode for result in results), key=lambda code: (code <= 0, code == 0))
            return codes[0] if codes[0] >= 0 else 128 - codes[0]
    except (LabError, ValueError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
