"""What becomes of a training when a rank dies, hangs or is asked to end, and when the network misbehaves.

    python benchmarks/faults.py processes --out benchmarks/results/faults_processes.txt
    sudo python benchmarks/faults.py network --out benchmarks/results/faults_network.txt

Trains ``tests/support/fault_script.py``: an MLP whose gradients travel in several buckets, first in warm-up, then
compressed. A row is a kind of trial. "Seconds" are from the fault, or where there is none from the start of the processes,
until the last rank that was not killed or stopped had ended; "explained" counts the ranks that failed and said what
happened and how to resume;
"left" counts processes, files and shared memory that are there afterwards and were not before. "Digest" compares the bits of
the final parameters with those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import NetworkLab, exit_on_sigterm
from report import SHARED_CORES, describe, environment, table

SCRIPT = Path(__file__).resolve().parent.parent / "tests/support/fault_script.py"
RANKS = 3
LIMIT_SECONDS = 120.0
EXPLAINED = "Communication with the other ranks failed"
EXPECTED_FILES = re.compile(r"(epoch=.*|last)\.ckpt|progress\d|fault\d|rank\d\.json")


@dataclass
class Trial:
    """What was seen of one training."""

    hit: bool = True
    """Whether the fault came at all: on a busy machine ranks may be too late for the start of the training."""
    seconds: float | None = None
    """From the fault to the end of the last rank that could end; None if one did not."""
    codes: dict[int, int | None] = field(default_factory=dict)
    outputs: dict[int, str] = field(default_factory=dict)
    digests: set[str] = field(default_factory=set)
    left: list[str] = field(default_factory=list)


class Training:
    """One training in processes of its own; its folder is removed at the end."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="onebit-faults-"))
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.fault_time: float | None = None
        self._shared_memory = set(os.listdir("/dev/shm"))

    def command(self, *arguments: str) -> list[str]:
        variables = [f"TMPDIR={self.temporary}", f"ONEBIT_FAULTS={self.folder}", "OMP_NUM_THREADS=1"]
        return ["env", *variables, sys.executable, str(SCRIPT), str(self.folder), *arguments]

    def output(self, rank: int) -> Path:
        return self.folder / f"tmp/output{rank}"

    def step(self) -> int:
        """Optimizer steps that rank 0 has made."""
        try:
            return int((self.folder / "progress0").read_text() or 0)
        except FileNotFoundError:
            return 0

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while self.step() < step and time.monotonic() < deadline:
            time.sleep(0.005)

    def finish(self, harmed: set[int], *, children: bool = False) -> Trial:
        """Wait for all but the ``harmed`` ranks, and for their ``children``; kill those; and look at what there is."""
        trial = Trial()
        started = time.time()
        waiting = {rank: process for rank, process in self.processes.items() if rank not in harmed}
        while (waiting or (children and self.living())) and time.time() - started < LIMIT_SECONDS:
            waiting = {rank: process for rank, process in waiting.items() if process.poll() is None}
            time.sleep(0.01)
        ended = time.time()
        marks = [file.stat().st_mtime for file in self.folder.glob("fault*")]
        trial.hit = bool(marks)
        begin = self.fault_time or (max(marks) if marks else started)
        trial.seconds = None if waiting else ended - begin
        for rank, process in self.processes.items():
            if process.poll() is None and (rank in harmed or rank in waiting):
                process.kill()
            trial.codes[rank] = None if rank in waiting else process.wait()
            trial.outputs[rank] = self.output(rank).read_text(errors="replace")
        for file in self.folder.glob("rank*.json"):
            trial.digests.add(json.loads(file.read_text())["digest"])
        trial.left = [f"process {pid}" for pid in self.living()]
        trial.left += [f.name for f in self.folder.iterdir() if f.is_file() and not EXPECTED_FILES.fullmatch(f.name)]
        temporary = (file.name for file in self.temporary.iterdir())
        trial.left += [name for name in temporary if not name.startswith(("output", "torchinductor"))]  # its cache
        shared_memory = set(os.listdir("/dev/shm")) - self._shared_memory
        # What another program uses goes with it: a training that has ended leaves for good what it leaves.
        deadline = time.monotonic() + 30
        while shared_memory and time.monotonic() < deadline:
            time.sleep(0.5)
            shared_memory &= set(os.listdir("/dev/shm"))
        trial.left += sorted(shared_memory)
        return trial

    def living(self) -> list[int]:
        """Processes of this training that still run, or are stopped."""
        mark = f"ONEBIT_FAULTS={self.folder}".encode()
        pids = []
        for entry in os.listdir("/proc"):
            with suppress(OSError):
                if entry.isdigit() and mark in Path(f"/proc/{entry}/environ").read_bytes():
                    pids.append(int(entry))
        return pids

    def close(self) -> None:
        for pid in self.living():
            os.kill(pid, signal.SIGKILL)
        for process in self.processes.values():
            process.wait()
        shutil.rmtree(self.folder)


@contextmanager
def training() -> Iterator[Training]:
    one = Training()
    try:
        yield one
    finally:
        one.close()


# Processes


def as_torchrun(arguments: list[str], harmed: set[int]) -> Trial:
    """Every rank started from outside, with the variables that torchrun sets."""
    with training() as one, socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        for rank in range(RANKS):
            variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS), "NODE_RANK": "0"}
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with one.output(rank).open("wb") as output:
                command = one.command("--devices", str(RANKS), *arguments)
                environ = {**os.environ, **variables}
                one.processes[rank] = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
        return one.finish(harmed)


def as_script(arguments: list[str], harmed: set[int]) -> Trial:
    """Rank 0 started by hand; Lightning starts the others, which share its output."""
    with training() as one:
        with one.output(0).open("wb") as output:
            command = one.command("--devices", str(RANKS), *arguments)
            one.processes[0] = subprocess.Popen(command, stdout=output, stderr=output)
        return one.finish(set(), children=True)


def processes(arguments: argparse.Namespace) -> str:
    warmup, compressed = ["--step", "3", "--place", "backward"], ["--step", "8", "--place", "exchange"]
    save = ["--step", "8", "--place", "save"]
    places = {"warm-up, before averaging": warmup, "compressed, within an exchange": compressed, "while saving": save}
    rows = []

    def row(launch: Any, strategy: str, fault: str, ranks: list[int], place: str, where: list[str], trials: int) -> None:
        command = ["--timeout", str(arguments.timeout), "--strategy", strategy, "--fault", fault, *where, "--ranks"]
        harmed = set(ranks) if fault != "TERM" else set()
        results: list[Trial] = []
        while len(results) < trials:
            trial = launch([*command, *map(str, ranks)], harmed)
            if trial.hit:
                results.append(trial)
            else:
                print("The fault did not come; once more.", *trial.outputs.values(), file=sys.stderr)
        to = "all" if len(ranks) == RANKS else f"rank {ranks[0]}"
        by = "torchrun" if launch is as_torchrun else "Lightning"
        cells = summary(results, harmed if launch is as_torchrun else set())
        rows.append([strategy, by, f"SIG{fault} to {to}", place, *cells])
        print(" | ".join(rows[-1]), flush=True)

    for fault in ("KILL", "STOP", "TERM"):
        for place, where in places.items():
            ranks = [0] if place == "while saving" else [1]  # the rank that writes
            row(as_torchrun, "onebit_ddp", fault, ranks, place, where, arguments.trials)
    for fault, rank in (("KILL", 1), ("STOP", 1), ("TERM", 1), ("KILL", 0), ("TERM", 0)):
        row(as_script, "onebit_ddp", fault, [rank], "compressed, within an exchange", compressed, arguments.trials)
    apart = [*warmup, "--apart", "0.013"]
    for strategy, trials in (("onebit_ddp", arguments.sigterm_trials), ("ddp", min(4, arguments.sigterm_trials))):
        row(as_torchrun, strategy, "TERM", list(range(RANKS)), "warm-up, 13 ms apart", apart, trials)
    header = [
        "strategy",
        "started as by",
        "fault",
        "when",
        "trials",
        "seconds, median (most)",
        "exit codes",
        "explained",
        "left",
    ]
    return table(header, rows)


def summary(trials: list[Trial], harmed: set[int]) -> list[str]:
    """Cells for trials of one kind."""
    seconds = sorted(trial.seconds for trial in trials if trial.seconds is not None)
    hangs = len(trials) - len(seconds)
    cell = f"{seconds[len(seconds) // 2]:.1f} ({seconds[-1]:.1f})" if seconds else "-"
    others = [(rank, code) for trial in trials for rank, code in trial.codes.items() if rank not in harmed]
    codes = sorted({code for _, code in others if code is not None})
    failed = [
        EXPLAINED in output
        for trial in trials
        for rank, output in trial.outputs.items()
        if rank not in harmed and trial.codes[rank] not in (0, None)
    ]
    explained = "no error" if not failed else f"{sum(failed)} of {len(failed)}"
    left = sum(len(trial.left) for trial in trials)
    names = sorted({name.split()[0] for trial in trials for name in trial.left})
    return [
        str(len(trials)),
        f"{hangs} hang" if hangs else cell,
        ", ".join(map(str, codes)) or "-",
        explained,
        "nothing" if not left else f"{left}: {' '.join(names)}",
    ]


# Network


def on_lab(lab: NetworkLab, arguments: list[str], disturb: Callable[[NetworkLab, Training], None] | None) -> Trial:
    """One rank per node; ``disturb`` is called when they have been started."""
    with training() as one:
        command = one.command("--devices", "1", "--nodes", str(RANKS), *arguments)
        for node in range(RANKS):
            with one.output(node).open("wb") as output:
                one.processes[node] = lab.start(node, command, port=29500, output=output)
        if disturb is not None:
            disturber = threading.Thread(target=disturb, args=(lab, one), daemon=True)
            disturber.start()
        return one.finish(set())


def unplug(step: int, seconds: float | None) -> Callable[[NetworkLab, Training], None]:
    def disturb(lab: NetworkLab, one: Training) -> None:
        one.wait_for_step(step)
        one.fault_time = time.time()
        lab.set_link(1, up=False)
        if seconds is not None:
            time.sleep(seconds)
            lab.set_link(1, up=True)

    return disturb


def pulse(lab: NetworkLab, one: Training) -> None:
    """Stop one node for half of the time, half a second each."""
    one.wait_for_step(1)
    one.fault_time = time.time()
    process = one.processes[1]
    while process.poll() is None:
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGCONT)
        time.sleep(0.5)


def network(arguments: argparse.Namespace) -> str:
    cases: dict[str, tuple[dict[str, Any], Callable[[NetworkLab, Training], None] | None, str | None]] = {
        "undisturbed": ({}, None, None),
        "1% of packets lost": ({"loss": 0.01}, None, None),
        "jitter of 50 ms": ({"jitter_seconds": 0.05}, None, None),
        "link down for 5 s, in warm-up": ({}, unplug(3, 5.0), None),
        "link down for 5 s, compressed": ({}, unplug(12, 5.0), None),
        "link down for good, in warm-up": ({}, unplug(3, None), None),
        "link down for good, compressed": ({}, unplug(12, None), None),
        "one node at 1 Mbit/s, others unshaped": ({}, None, "1mbit"),
        "one node stopped half of the time": ({}, pulse, None),
    }
    command = ["--timeout", str(arguments.timeout), "--hidden", "128", "--bucket-cap-mb", "0.02", "--steps", "24"]
    rows, expected = [], None
    for name, (options, disturb, slow) in cases.items():
        trials = []
        for _ in range(arguments.trials):
            with NetworkLab(nodes=RANKS, **options) as lab:
                if slow is not None:
                    lab.set_rate(1, slow)
                trials.append(on_lab(lab, command, disturb))
        expected = expected or trials[0].digests
        ended_well = sum(set(trial.codes.values()) == {0} for trial in trials)
        same = sum(trial.digests == expected and len(expected) == 1 for trial in trials)
        count, seconds, _, explained, left = summary(trials, set())
        how = f"{ended_well} of {count} trained to the end"
        digest = f"equal in {same} of {count}" if ended_well else "-"
        rows.append([name, how, seconds, digest, explained, left])
        print(" | ".join(rows[-1]), flush=True)
    header = ["network", "ended how", "seconds, median (most)", "digest", "explained", "left"]
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Faults of processes and of the network.")
    parser.add_argument("study", choices=("processes", "network"))
    parser.add_argument("--timeout", type=float, default=10.0, help="of collectives, seconds (default: 10)")
    parser.add_argument("--trials", type=int, default=1, help="of each kind (default: 1)")
    parser.add_argument("--sigterm-trials", type=int, default=10, help="where all ranks get SIGTERM (default: 10)")
    parser.add_argument("--out", type=Path, help="a text file for the table")
    arguments = parser.parse_args()
    exit_on_sigterm()
    about = describe(environment())
    result = {"processes": processes, "network": network}[arguments.study](arguments)
    text = f"{about}\n\n{RANKS} ranks, timeout of collectives {arguments.timeout:g} s. {SHARED_CORES}\n\n{result}\n"
    print(f"\n{text}")
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
