"""The flat memory of one bucket, and what a step brings: all that the kernels of a quantizer read and write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_onebit.coefficients import Coefficients
from lightning_onebit.quantize.layout import BITS_PER_BYTE, SCALE_NBYTES, BucketLayout


class Encoded(NamedTuple):
    """Neighbouring blocks of one chunk, quantized."""

    signs: Tensor
    """uint8 ``[flat elements / 8]``, least significant bit first; 0 for padding and for elements that are not live."""
    scales: Tensor
    """float32 ``[blocks]``"""


class BucketMemory:
    """Flat memory of one bucket on one rank, allocated once. All of it is zero at first.

    Args:
        layout: places of blocks and bytes.
        share: the chunks that this rank compresses.
        chunk: the chunk that it serves; ``None``: none, as nothing is exchanged.
        has_rms: whether there is a D (see :attr:`rms`).
        keeps_before: whether the last average but one is kept: for steps that may be taken back, and for nesterov.
        dtype: dtype of errors and D, float32 or float64.
        device: where it lives.
        parameter_numels: elements of each parameter; without, those that the layout has.
    """

    def __init__(
        self,
        layout: BucketLayout,
        *,
        share: range,
        chunk: int | None,
        has_rms: bool,
        keeps_before: bool,
        dtype: torch.dtype,
        device: torch.device,
        parameter_numels: Sequence[int] | None = None,
    ) -> None:
        self.layout, self.share, self.chunk = layout, share, chunk
        if parameter_numels is None:
            numels = np.zeros(int(layout.parameter.max(initial=-1)) + 1, dtype=np.int64)
            np.maximum.at(numels, layout.parameter, layout.start + layout.numel)
            parameter_numels = numels.tolist()
        self.parameter_numels = parameter_numels
        self.dtype, self.device = dtype, device

        def reals(numel: int) -> Tensor:
            return torch.zeros(numel, dtype=dtype, device=device)

        def messages(chunks: int) -> Tensor:
            return torch.zeros(chunks * layout.chunk_nbytes, dtype=torch.uint8, device=device)

        own = range(0) if chunk is None else range(chunk, chunk + 1)
        self.error = reals(layout.flat_numel_of(share))
        """Worker error of the share. Of a single rank, which has none: u itself."""
        self.server_error = reals(layout.flat_numel_of(own)) if own else reals(0)
        """Server error of the chunk."""
        self.rms = reals(layout.flat_numel) if has_rms else None
        """sqrt(v_hat), so that D = rms + eps: the same on all ranks, 0 where an element is not live. ``None`` without D."""
        self.live: Tensor | None = None
        """uint8 ``[flat_numel / 8]``: bit set where an element takes part in its block. ``None`` if all do."""
        self.live_before: Tensor | None = None
        """The same at the time of the last average."""
        exchanged = 0 if chunk is None else len(share)
        self.sent, self.received, self.served = messages(exchanged), messages(exchanged), messages(len(own))
        self.share_result = messages(exchanged if exchanged < layout.num_chunks else 0)
        """What the peers have served, where that is not yet the whole bucket."""
        self.results = tuple(messages(layout.num_chunks) for _ in range((2 if keeps_before else 1) if exchanged else 0))
        """The last average u in wire format and, if it is kept, the one before."""
        self.current = 0
        """Which of the results is the last."""

    @property
    def result(self) -> Tensor:
        """The last average u of all chunks."""
        return self.results[self.current]

    @property
    def result_before(self) -> Tensor:
        """The one before, where it is kept: memory for the next one."""
        return self.results[self.current - 1]

    def turn_results_(self) -> None:
        """Make :attr:`result_before` the last average."""
        self.current = (self.current + 1) % len(self.results)

    @cached_property
    def share_blocks(self) -> tuple[int, int]:
        """First block of the share, and the one after its last."""
        return self.layout.blocks_of(self.share)

    @cached_property
    def share_flat(self) -> slice:
        """The share's elements in the bucket's flat memory."""
        return slice(*self.layout.flat_of(self.share))

    @cached_property
    def chunk_blocks(self) -> tuple[int, int]:
        """First block of the chunk, and the one after its last."""
        assert self.chunk is not None
        return self.layout.blocks_of(range(self.chunk, self.chunk + 1))

    @cached_property
    def chunk_flat(self) -> slice:
        """The chunk's elements in the bucket's flat memory."""
        assert self.chunk is not None
        return slice(*self.layout.flat_of(range(self.chunk, self.chunk + 1)))

    def encoded(self, messages: Tensor, first_chunk: int, blocks: tuple[int, int]) -> Encoded:
        """Views of neighbouring blocks of one chunk in ``messages``, which begins with chunk ``first_chunk``."""
        first, last = blocks
        start, stop = int(self.layout.offset[first]), int(self.layout.offset[last])
        shift = first_chunk * self.layout.chunk_nbytes
        scale, sign = int(self.layout.scale_byte[first]) - shift, int(self.layout.sign_byte[first]) - shift
        return Encoded(
            signs=messages[sign : sign + (stop - start) // BITS_PER_BYTE],
            scales=messages[scale : scale + SCALE_NBYTES * (last - first)].view(torch.float32),
        )


@dataclass(kw_only=True, eq=False)
class StepInputs:
    """What one step reads and writes beside the buckets' memory. Lists and arrays are by parameter."""

    params: Sequence[Tensor]
    """Flat views in memory order; written by step 6."""
    gradients: Sequence[Tensor | None]
    """Flat, in the memory order and dtype of their parameters; ``None`` is zero. Only read."""
    numbers: NDArray[np.float64]
    """``[parameters, len(Coefficients)]``"""
    flags: Tensor
    """int32 ``[1 + parameters]``, on the device: whether the step does not count, as a gradient is not finite on some rank,
    or for another reason; and by parameter, whether it is active. Those that are not sit out: nothing of theirs changes."""
    active: NDArray[np.bool_] | None = None
    """``flags[1:] != 0`` as the host knows it; ``None``: not yet."""
    share_gradients: dict[int, Tensor] = field(default_factory=dict)
    """Where nodes average first: by bucket's index, the mean gradient of the share, ``[share's flat numel]``, in the dtype
    of the errors. It takes the place of ``gradients``."""

    @property
    def is_active(self) -> Tensor:
        """``bool [parameters]``"""
        return self.flags[1:] != 0

    @cached_property
    def all_are_active(self) -> bool:
        """Whether no parameter sits out; to be asked once :attr:`active` is known."""
        return self.active is not None and bool(self.active.all())

    def coefficients(self, parameter: int) -> Coefficients:
        return Coefficients(*self.numbers[parameter].tolist())
