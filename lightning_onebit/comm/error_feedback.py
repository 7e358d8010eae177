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

from lightning_onebit.comm.topology import Topology
from lightning_onebit.quantize.encoded import Encoded
from lightning_onebit.quantize.layout import BucketLayout, Segment


@dataclass(frozen=True, kw_only=True)
class WorkerSegment:
    """A segment that this rank compresses: one of its shard."""

    worker_error: Tensor
    """``[numel]``"""
    sent: Encoded


@dataclass(frozen=True, kw_only=True)
class ServedSegment:
    """A segment of the chunk that this rank serves."""

    index: int
    """Position of the segment in the bucket."""
    server_error: Tensor
    """``[numel]``"""
    received: tuple[Encoded, ...]
    """One per peer, in rank order."""
    served: Encoded


class ErrorFeedbackBuffers:
    """Memory of one bucket, allocated once: worker errors of the shard, server errors of the chunk, and messages.

    Args:
        layout: places of blocks and bytes.
        topology: where this rank is.
        revocable: whether the last result is kept until the next one is accepted, in another buffer.
        dtype: dtype of the errors, float32 or float64.
        device: where they live.
    """

    def __init__(
        self, layout: BucketLayout, topology: Topology, *, revocable: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        shard, chunk = layout.shard(topology), layout.chunk(topology.chunk)
        shard_nbytes = topology.num_nodes * layout.chunk_nbytes

        def message_buffer(nbytes: int) -> Tensor:
            return torch.zeros(nbytes, dtype=torch.uint8, device=device)

        self.worker_error = torch.zeros(layout.shard_numel(topology), dtype=dtype, device=device)
        self.server_error = torch.zeros(sum(s.numel for s in chunk), dtype=dtype, device=device)
        self.sent = message_buffer(shard_nbytes)
        self.received = message_buffer(shard_nbytes)
        self.served = message_buffer(layout.chunk_nbytes)
        self.shard_result = None if topology.is_flat else message_buffer(shard_nbytes)
        """On a flat network the shard is all there is."""
        self.results = tuple(message_buffer(layout.message_nbytes) for _ in range(2 if revocable else 1))
        """The last result and, if revocable, the next, in wire format: with one scale per block, u takes 1/32 of a dense
        tensor."""

        own_nbytes = topology.chunk * layout.chunk_nbytes
        self.worker: dict[int, WorkerSegment] = {
            layout.segments.index(s): WorkerSegment(
                worker_error=_elements(self.worker_error, s, shard),
                sent=_encoded(self.sent, s, shift=-topology.shard.start * layout.chunk_nbytes),
            )
            for s in shard
        }
        """By position of the segment in the bucket."""
        self.server = tuple(
            ServedSegment(
                index=layout.segments.index(s),
                server_error=_elements(self.server_error, s, chunk),
                received=tuple(
                    _encoded(self.received, s, shift=source * layout.chunk_nbytes - own_nbytes)
                    for source in range(topology.num_nodes)
                ),
                served=_encoded(self.served, s, shift=-own_nbytes),
            )
            for s in chunk
        )
        self.result_segments = tuple(tuple(_encoded(result, s) for s in layout.segments) for result in self.results)
        """By buffer and segment."""


def _elements(flat: Tensor, segment: Segment, part: tuple[Segment, ...]) -> Tensor:
    """The elements of a segment in a tensor that holds those of ``part``, a run of segments."""
    start = segment.offset - part[0].offset
    return flat[start : start + segment.numel]


def _encoded(messages: Tensor, segment: Segment, shift: int = 0) -> Encoded:
    """Views of a segment in a message, ``shift`` bytes away from its place among the messages of all chunks."""
    return Encoded(
        signs=messages[segment.signs_offset + shift : segment.signs_end + shift],
        scales=messages[segment.scales_offset + shift : segment.scales_end + shift].view(torch.float32),
    )
