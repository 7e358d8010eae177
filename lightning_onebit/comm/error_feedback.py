"""What a bucket remembers between steps: the errors of both quantizations and the last result, as bits.

Error feedback (Seide et al. 2014; 1-bit Adam, arXiv 2102.02888, algorithm 1) adds to each message what the previous
one left out, so that quantization delays information but loses none:

    worker   c_i   = error_i + value_i;         q_i = C(c_i);     error_i = c_i - q_i
    server   c_bar = mean_i(q_i) + server_error;  u = C(c_bar);  server_error = c_bar - u
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_onebit.codec.layout import BucketLayout, Segment


class Encoded(NamedTuple):
    """A quantized segment: views of a message."""

    signs: Tensor
    """uint8 ``[ceil(numel / 8)]``"""
    scales: Tensor
    """float32 ``[blocks]``"""


@dataclass(frozen=True, kw_only=True)
class SegmentViews:
    """The parts of a bucket's buffers that belong to one segment."""

    segment: Segment
    worker_error: Tensor
    """``[numel]``; before a segment is encoded, callers add the new values to it."""
    sent: Encoded
    result: Encoded


@dataclass(frozen=True, kw_only=True)
class ServedSegment:
    """A segment of the chunk that this rank serves."""

    segment: Segment
    index: int
    """Position of the segment in the bucket."""
    server_error: Tensor
    received: tuple[Encoded, ...]
    """One per rank, in rank order."""
    result: Encoded


class ErrorFeedbackBuffers:
    """Memory of one bucket, allocated once: ``numel`` worker errors, the own chunk's server errors, and messages.

    Args:
        layout: places of blocks and bytes.
        rank: this rank.
        dtype: dtype of the errors, float32 or float64.
        device: where they live.
    """

    def __init__(self, layout: BucketLayout, *, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        chunk = layout.chunk(rank)
        first = chunk[0].offset if chunk else 0

        def message_buffer(nbytes: int) -> Tensor:
            return torch.zeros(nbytes, dtype=torch.uint8, device=device)

        self.worker_error = torch.zeros(layout.numel, dtype=dtype, device=device)
        self.server_error = torch.zeros(sum(s.numel for s in chunk), dtype=dtype, device=device)
        self.sent = message_buffer(layout.message_nbytes)
        self.received = message_buffer(layout.message_nbytes)
        self.served = message_buffer(layout.chunk_nbytes)
        self.result = message_buffer(layout.message_nbytes)
        """The last result in wire format: with one scale per block, u takes 1/32 of a dense tensor."""

        self.segments = tuple(
            SegmentViews(
                segment=s,
                worker_error=self.worker_error[s.offset : s.offset + s.numel],
                sent=_encoded(self.sent, s),
                result=_encoded(self.result, s),
            )
            for s in layout.segments
        )
        self.chunk = tuple(
            ServedSegment(
                segment=s,
                index=layout.segments.index(s),
                server_error=self.server_error[s.offset - first : s.offset - first + s.numel],
                received=tuple(
                    _encoded(self.received, s, shift=(source - rank) * layout.chunk_nbytes)
                    for source in range(layout.world_size)
                ),
                result=_encoded(self.served, s, shift=-rank * layout.chunk_nbytes),
            )
            for s in chunk
        )


def _encoded(messages: Tensor, segment: Segment, shift: int = 0) -> Encoded:
    """Views of a segment in a message, ``shift`` bytes away from its place among the messages to all ranks."""
    return Encoded(
        signs=messages[segment.signs_offset + shift : segment.signs_end + shift],
        scales=messages[segment.scales_offset + shift : segment.scales_end + shift].view(torch.float32),
    )
