"""One picture of a run: loss, bytes and step time over steps, and which of them were compressed."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

COMPRESSED_COLOUR = "0.92"


@dataclass(frozen=True)
class Point:
    """What an entry of :class:`~lightning_onebit.CommMonitor` adds to the picture."""

    step: int
    """Lightning's number."""
    is_compressed: bool
    loss: float
    """NaN if there is none, as with manual optimization."""
    sent_mib: float
    """Of a step, as the two next."""
    dense_mib: float
    seconds: float


class MonitorPlot:
    """Draws into a file, by matplotlib.

    Args:
        path: of the picture; its ending is that of a format of matplotlib. Its folder is made, if need be.

    Raises:
        TypeError: if ``path`` is no path.
        ValueError: if it is that of a folder, or its format is unknown.
        ModuleNotFoundError: if matplotlib is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        allowed = "Must be the path of a picture, such as 'run.png', or None."
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"Invalid plot: {path!r}. {allowed}")
        if importlib.util.find_spec("matplotlib") is None:
            raise ModuleNotFoundError(
                f"plot={path!r} needs matplotlib, which is not installed. HINT: `pip install matplotlib`, or leave it out."
            )
        self.path = Path(path)
        from matplotlib.backend_bases import FigureCanvasBase

        formats = FigureCanvasBase.get_supported_filetypes()
        if self.path.suffix.removeprefix(".").lower() not in formats or self.path.is_dir():
            raise ValueError(f"Invalid plot: {path!r}. {allowed} Formats: {', '.join(sorted(formats))}.")
        self.points: list[Point] = []

    def save(self) -> None:
        """Draw what was noted. Training is over, so a file that cannot be written is only warned of."""
        from matplotlib.figure import Figure

        if not self.points:
            return
        steps = [point.step + 1 for point in self.points]
        figure = Figure(figsize=(8, 8), layout="constrained")
        axes: Any = figure.subplots(3, 1, sharex=True)
        begin = 0
        for point in self.points:
            if point.is_compressed:
                for each in axes:
                    each.axvspan(begin, point.step + 1, color=COMPRESSED_COLOUR, linewidth=0)
            begin = point.step + 1
        if any(math.isfinite(point.loss) for point in self.points):
            axes[0].plot(steps, [point.loss for point in self.points], ".-")
        axes[0].set(ylabel="training loss", title="grey: compressed")
        axes[1].plot(steps, [point.sent_mib for point in self.points], ".-", label="sent")
        axes[1].plot(steps, [point.dense_mib for point in self.points], "--", label="DDP, float32")
        axes[1].plot(steps, [point.dense_mib / 2 for point in self.points], ":", label="DDP, 16 bits")
        if all(point.sent_mib > 0 for point in self.points):
            axes[1].set_yscale("log")
        axes[1].set(ylabel="MiB per step, rank 0")
        axes[1].legend()
        axes[2].plot(steps, [1000 * point.seconds for point in self.points], ".-")
        axes[2].set(ylabel="ms per step, pauses included", xlabel="step", ylim=(0, None))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.path)
        except OSError as error:
            rank_zero_warn(f"CommMonitor could not write plot={str(self.path)!r}: {error}")
