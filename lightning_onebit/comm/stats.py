"""Counters: what was sent, what dense DDP would have sent, how long the training thread waited."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from operator import add, sub
from typing import Any

from lightning_onebit.phase import Phase

DENSE_ELEMENT_NBYTES = 4
"""Dense gradients are counted as float32, the width of DDP's default."""


def ring_all_reduce_nbytes(nbytes: int, world_size: int) -> int:
    """Bytes that each rank sends (and receives) in a bandwidth-optimal all-reduce of ``nbytes``.

    A reduce-scatter followed by an all-gather: ``2 (n - 1) / n`` times the data (Patarasuk and Yuan, 2009).
    """
    return 2 * (world_size - 1) * nbytes // world_size


@dataclass
class PhaseCounters:
    """What one phase has cost this rank so far."""

    steps: int = 0
    """Optimizer steps, those of all optimizers added up."""
    bytes_sent: int = 0
    """Bytes handed to the network: payload, without headers of the transport."""
    bytes_received: int = 0
    bytes_within_node: int = 0
    """Bytes sent to other devices of the same node, by hierarchical exchanges; in none of the others."""
    refresh_bytes_sent: int = 0
    """Those of :attr:`bytes_sent` that renewed second moments."""
    sketch_bytes_sent: int = 0
    """Those of :attr:`bytes_sent` that told norms: for clipping, and how the ranks' gradients compare with their mean."""
    dense_bytes_sent: int = 0
    """Those of :attr:`bytes_sent` that averaged gradients, perhaps rounded: all of the warm-up's, and afterwards those of
    parameters that are not compressed."""
    baseline_bytes_sent: int = 0
    """Those of :attr:`bytes_sent` that only told how long a dense exchange takes."""
    collectives: int = 0
    """Collective operations, each of one message per pair of ranks or less."""
    dense_equivalent_bytes: int = 0
    """Bytes that dense DDP would have sent meanwhile: all gradients at each synchronization, compressed ones as float32."""
    seconds_waited: float = 0.0
    """Time the training thread, or on a GPU its stream, waited for exchanges. Counted for compressed exchanges only:
    during warm-up DDP waits inside its own backward."""
    seconds_exchanging: float = 0.0
    """Time that the same exchanges took, waited for or not: what was not waited for was hidden behind other work."""

    @property
    def sign_bytes_sent(self) -> int:
        """What is left of :attr:`bytes_sent`: signs and scales, and a few bytes by which the ranks agree."""
        others = self.refresh_bytes_sent + self.sketch_bytes_sent + self.dense_bytes_sent + self.baseline_bytes_sent
        return self.bytes_sent - others

    @property
    def share_hidden(self) -> float:
        """Of the duration of compressed exchanges, how much the training thread did not wait; NaN without any."""
        if not self.seconds_exchanging:
            return float("nan")
        return min(1.0, max(0.0, 1.0 - self.seconds_waited / self.seconds_exchanging))

    def __add__(self, other: PhaseCounters) -> PhaseCounters:
        return self._combined(other, add)

    def __sub__(self, other: PhaseCounters) -> PhaseCounters:
        return self._combined(other, sub)

    def _combined(self, other: PhaseCounters, how: Callable[[Any, Any], Any]) -> PhaseCounters:
        return PhaseCounters(**{f.name: how(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})

    @contextmanager
    def counting_refreshes(self) -> Iterator[None]:
        """Within, what is sent renews second moments. Nothing else may be on its way."""
        before = self.bytes_sent
        yield
        self.refresh_bytes_sent += self.bytes_sent - before

    @contextmanager
    def counting_sketches(self) -> Iterator[None]:
        """Within, what is sent are sketches. Nothing else may be on its way."""
        before = self.bytes_sent
        yield
        self.sketch_bytes_sent += self.bytes_sent - before


@dataclass
class CommStats:
    """Communication of this rank, by phase; attributes of the same names as in a phase give the sum.

    Read it as ``strategy.comm_stats``.
    """

    phases: dict[Phase, PhaseCounters] = field(default_factory=lambda: {phase: PhaseCounters() for phase in Phase})

    def __getitem__(self, phase: Phase) -> PhaseCounters:
        return self.phases[phase]

    @property
    def steps(self) -> int:
        return sum(counters.steps for counters in self.phases.values())

    @property
    def bytes_sent(self) -> int:
        return sum(counters.bytes_sent for counters in self.phases.values())

    @property
    def refresh_bytes_sent(self) -> int:
        return sum(counters.refresh_bytes_sent for counters in self.phases.values())

    @property
    def sketch_bytes_sent(self) -> int:
        return sum(counters.sketch_bytes_sent for counters in self.phases.values())

    @property
    def bytes_received(self) -> int:
        return sum(counters.bytes_received for counters in self.phases.values())

    @property
    def bytes_within_node(self) -> int:
        return sum(counters.bytes_within_node for counters in self.phases.values())

    @property
    def dense_equivalent_bytes(self) -> int:
        return sum(counters.dense_equivalent_bytes for counters in self.phases.values())

    @property
    def seconds_waited(self) -> float:
        return sum(counters.seconds_waited for counters in self.phases.values())

    @property
    def compression_ratio(self) -> float:
        """Dense-equivalent bytes over bytes sent in the compressed phase; NaN before it."""
        compressed = self.phases[Phase.COMPRESSED]
        return compressed.dense_equivalent_bytes / compressed.bytes_sent if compressed.bytes_sent else float("nan")
