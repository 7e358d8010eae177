"""What all benchmarks write down: quartiles, tables, the machine, the versions, the command."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

SHARED_CORES = (
    "All nodes are processes of this one machine and share its cores, also for the work of the network stack: computing"
    " takes longer than on as many real nodes, and communication that uses the processor costs more."
)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    lower_quartile: float
    upper_quartile: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(median=values[0], lower_quartile=values[0], upper_quartile=values[0], samples=1)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=median, lower_quartile=lower, upper_quartile=upper, samples=len(values))

    def milliseconds(self) -> str:
        """Values in seconds, as "median [quartiles]" in milliseconds."""
        digits = 0 if self.median >= 0.1 else 1 if self.median >= 0.01 else 2
        median, lower, upper = (f"{1000 * x:.{digits}f}" for x in (self.median, self.lower_quartile, self.upper_quartile))
        return f"{median} [{lower}-{upper}]"


def environment(*packages: str) -> dict[str, Any]:
    """The command, when and with what it ran. Call before measuring: it notes how busy the machine is.

    Args:
        packages: whose versions to note, beside those that every benchmark uses.
    """
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load_average_before": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            "kernel": f"{platform.system()} {platform.release()}",
            **{name: _version(name) for name in ("torch", "lightning", "numpy", "lightning_onebit", *packages)},
        },
    }


def describe(environment: dict[str, Any]) -> str:
    """The environment, for readers."""
    hardware, versions = environment["hardware"], environment["versions"]
    return (
        f"{environment['date']}  {environment['command']}\n"
        f"{hardware['processor']}, {hardware['cores']} cores, {hardware['memory_bytes'] / 2**30:.0f} GiB,"
        f" load average before: {hardware['load_average_before']}\n"
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def size(nbytes: float) -> str:
    """Bytes in a readable unit (powers of 1000)."""
    if math.isnan(nbytes):
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.{2 if nbytes < 10 * scale else 1}f} {unit}"
    return f"{nbytes:.0f} B"


def save(path: Path, results: dict[str, Any]) -> None:
    """Write JSON; dataclasses inside become objects, and what is infinite or NaN, for which JSON has no number, null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(results, default=asdict), parse_constant=lambda _: None)
    path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {path}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        module = sys.modules.get(name)
        return str(getattr(module, "__version__", "not installed")).strip()
