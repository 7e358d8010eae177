"""What a bucket remembers between steps: the errors of both quantizations and the last result, as bits.

Error feedback (Seide et al. 2014; 1-bit Adam, arXiv 2102.02888, algorithm 1) adds to each message what the previous
one left out, so that quantization delays information but loses none:

    worker   c_i   = error_i + value_i;         q_i = C(c_i);     error_i = c_i - q_i
    server   c_bar = mean_i(q_i) + server_error;  u = C(c_bar);  server_error = c_bar - u
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_onebit.codec.layout import BucketLayout, Segment


@dataclass(frozen=True)
class SegmentViews:
    """The parts of a bucket's buffers that belong to one segment."""

    segment: Segment
    worker_error: Tensor
    """``[numel]``. Between :meth:`CompressedBucket.exchange_` and the next one the error; callers add values to it."""
    sent_signs: Tensor
    sent_scales: Tensor
    result_signs: Tensor
    result_scales: Tensor


@dataclass(frozen=True)
class ServedSegment:
    """A segment of the chunk that this rank serves."""

    segment: Segment
    index: int
    """Position of the segment in the bucket."""
    server_error: Tensor
    received_signs: tuple[Tensor, ...]
    """One per rank, in rank order."""
    received_scales: tuple[Tensor, ...]
    result_signs: Tensor
    result_scales: Tensor


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
                s,
                self.worker_error[s.offset : s.offset + s.numel],
                *_signs_and_scales(self.sent, s),
                *_signs_and_scales(self.result, s),
            )
            for s in layout.segments
        )
        chunk_start = rank * layout.chunk_nbytes
        self.chunk = tuple(
            ServedSegment(
                s,
                layout.segments.index(s),
                self.server_error[s.offset - first : s.offset - first + s.numel],
                *zip(
                    *(
                        _signs_and_scales(self.received, s, shift=source * layout.chunk_nbytes - chunk_start)
                        for source in range(layout.world_size)
                    ),
                    strict=True,
                ),
                *_signs_and_scales(self.served, s, shift=-chunk_start),
            )
            for s in chunk
        )


def _signs_and_scales(messages: Tensor, segment: Segment, shift: int = 0) -> tuple[Tensor, Tensor]:
    """Views of a segment's sign bytes and float32 scales, ``shift`` bytes away from its own place."""
    signs = messages[segment.signs_offset + shift : segment.signs_end + shift]
    scales = messages[segment.scales_offset + shift : segment.scales_end + shift].view(torch.float32)
    return signs, scales
