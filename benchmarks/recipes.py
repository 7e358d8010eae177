"""Run the commands of docs/multinode.md as they stand there, on two nodes of the network lab.

    sudo python benchmarks/recipes.py --out benchmarks/results/recipes.txt

``train.py`` is ``examples/minimal.py`` with ``num_nodes=2``. Takes a minute or two on two cores, root and iproute2.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from lab import NetworkLab, exit_on_sigterm
from report import describe, environment

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/multinode.md"
SECTIONS = ("torchrun", "Lightning's own variables")
NODES = ("first machine", "second machine")
ALONE, TOGETHER = "devices=2", "devices=2, num_nodes=2"
BY_THE_LAB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Set by the lab for each node: a user has none of them."""
SHOWN = re.compile(r"distributed_backend|Starting with|PhaseSwitch: freezing|hierarchical=|what this run sent|Error|error")
REPORT_LINES = 8


def commands(section: str) -> list[str]:
    """Of each node, the block of the page's section.

    Raises:
        ValueError: if the section has not one for each.
    """
    (text,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    if [block.splitlines()[0] for block in blocks] != [f"# {node}" for node in NODES]:
        raise ValueError(f"{PAGE.name}, {section!r}: there must be one block for each of {', '.join(NODES)}.")
    return blocks


def shown(output: str) -> list[str]:
    """The lines that tell how a training went."""
    lines = [line.rstrip() for line in output.replace("\r", "\n").splitlines()]
    begin = next((i for i, line in enumerate(lines) if "what this run sent" in line), len(lines))
    report = set(range(begin, begin + REPORT_LINES))
    return [line for i, line in enumerate(lines) if i in report or SHOWN.search(line)]


def run(lab: NetworkLab, section: str, timeout_seconds: float) -> list[str]:
    """What the section's commands printed, and what they left; in a folder that the nodes share, as they share a disk."""
    lines = [f"== {section}", ""]
    with tempfile.TemporaryDirectory(prefix="onebit-recipes-") as folder:
        script = (ROOT / "examples/minimal.py").read_text()
        assert script.count(ALONE) == 1
        Path(folder, "train.py").write_text(script.replace(ALONE, TOGETHER))
        variables = [f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}", f"PYTHONPATH={ROOT}", "OMP_NUM_THREADS=1"]
        options = [f"--chdir={folder}", *(f"--unset={name}" for name in (*BY_THE_LAB, "GLOO_SOCKET_IFNAME"))]
        before, begin = lab.interface_bytes(), time.perf_counter()
        outputs = [Path(folder, f"output{node}") for node in range(lab.nodes)]
        processes = []
        for node, (block, output) in enumerate(zip(commands(section), outputs, strict=True)):
            with output.open("wb") as file:
                command = ["env", *options, *variables, "bash", "-e", "-c", block]
                processes.append(lab.start(node, command, port=0, output=file))
        codes = [process.wait(timeout_seconds) for process in processes]
        seconds = time.perf_counter() - begin
        sent = [(now.sent_bytes - then.sent_bytes) / 1e6 for now, then in zip(lab.interface_bytes(), before, strict=True)]
        for node, (block, output, code) in enumerate(zip(commands(section), outputs, codes, strict=True)):
            lines += [*block.splitlines(), *(f"    {line}" for line in shown(output.read_text(errors="replace")))]
            lines += [f"    exit code {code}; {sent[node]:.1f} MB sent on the link", ""]
        kept = sorted(f for f in Path(folder).glob("checkpoints/**/*") if f.is_file())
        lines += [f"{seconds:.0f} s. In the folder that both share afterwards:"]
        lines += [f"    {file.relative_to(folder)} ({file.stat().st_size / 1e6:.1f} MB)" for file in kept]
        if any(codes):
            raise RuntimeError("\n".join(output.read_text(errors="replace") for output in outputs))
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the commands of docs/multinode.md on two nodes of the network lab.")
    parser.add_argument("--rate", default="1gbit", help="of each node's link (default: 1gbit)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each section (default: 300)")
    parser.add_argument("--out", type=Path, help="text file to write as well")
    arguments = parser.parse_args()
    exit_on_sigterm()
    lines = [describe(environment()), "", f"Two nodes, links of {arguments.rate}. train.py: examples/minimal.py with"]
    lines += [f"    {TOGETHER} instead of {ALONE}", "", "Of the output, the lines that tell how it went.", ""]
    with NetworkLab(nodes=len(NODES), rate=arguments.rate) as lab:
        for section in SECTIONS:
            lines += run(lab, section, arguments.timeout)
    text = "\n".join(lines)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
