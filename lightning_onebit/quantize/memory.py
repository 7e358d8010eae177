"""The flat memory of one bucket, and what a step brings: all that the kernels of a quantizer read and write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_onebit.coefficients import Coefficients
from lightning_onebit.quantize.layout import BITS_PER_BYTE, SCALE_NBYTES, BucketLayout, Wire
from lightning_onebit.quantize.logarithm import LARGEST_FLOAT32, decode_logarithm, encode_logarithm, largest_of_blocks

BITS_IN_BYTE = torch.tensor([byte.bit_count() for byte in range(256)])


class Encoded(NamedTuple):
    """Neighbouring blocks of one chunk, quantized."""

    signs: Tensor
    """uint8 ``[flat elements / 8]``, least significant bit first; 0 for padding and for elements that are not live."""
    scales: Tensor
    """float32 ``[blocks]``"""


class Messages:
    """What travels in one exchange of a bucket, uint8, all of it zero at first. Each tensor is one message after the other.

    Args:
        layout: places of blocks.
        wire: places of their bytes in the messages.
        share: the chunks that this rank sends.
        chunk: the chunk that it serves; ``None``: nothing is exchanged.
        keeps_before: whether the last result but one is kept.
        device: where they live.
    """

    def __init__(
        self,
        layout: BucketLayout,
        wire: Wire,
        *,
        share: range,
        chunk: int | None,
        keeps_before: bool = False,
        device: torch.device,
    ) -> None:
        self.layout, self.wire, self.share, self.chunk, self.device = layout, wire, share, chunk, device

        def messages(chunks: int) -> Tensor:
            return torch.zeros(chunks * wire.chunk_nbytes, dtype=torch.uint8, device=device)

        exchanged = 0 if chunk is None else len(share)
        self.sent, self.received, self.served = messages(exchanged), messages(exchanged), messages(1 if exchanged else 0)
        self.share_result = messages(exchanged if exchanged < layout.num_chunks else 0)
        """What the peers have served, where that is not yet the whole bucket."""
        self.results = tuple(messages(layout.num_chunks) for _ in range((2 if keeps_before else 1) if exchanged else 0))
        """The last result, of all chunks, and, if it is kept, the one before."""
        self.current = 0
        """Which of the results is the last."""

    @property
    def result(self) -> Tensor:
        """The last result of all chunks: of signs, the average u."""
        return self.results[self.current]

    @property
    def result_before(self) -> Tensor:
        """The one before, where it is kept: memory for the next one."""
        return self.results[self.current - 1]

    def turn_results_(self) -> None:
        """Make :attr:`result_before` the last result."""
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

    def views(self, messages: Tensor, first_chunk: int, blocks: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Bytes of elements, and scales, of neighbouring blocks of one chunk: views of ``messages``.

        Args:
            messages: of neighbouring chunks.
            first_chunk: the first of them.
            blocks: the first block, and the one after the last.
        """
        first, last = blocks
        shift = first_chunk * self.wire.chunk_nbytes
        scale, element = int(self.wire.scale_byte[first]) - shift, int(self.wire.element_byte[first]) - shift
        nbytes = self.wire.element_nbytes(int(self.layout.offset[last] - self.layout.offset[first]))
        scales = messages[scale : scale + SCALE_NBYTES * (last - first)].view(torch.float32)
        return messages[element : element + nbytes], scales

    def read(self, messages: Tensor, first_chunk: int, blocks: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The same of blocks of several chunks, as copies."""
        scale, element = self._places(first_chunk, blocks)
        return messages[element], messages.view(torch.float32)[scale]

    def read_scales(self, messages: Tensor, first_chunk: int, blocks: tuple[int, int]) -> Tensor:
        """The scales alone."""
        return messages.view(torch.float32)[self._scale_places(first_chunk, blocks)]

    def write_(self, messages: Tensor, first_chunk: int, blocks: tuple[int, int], elements: Tensor, scales: Tensor) -> None:
        """Inverse of :meth:`read`."""
        scale, element = self._places(first_chunk, blocks)
        messages.view(torch.float32)[scale] = scales
        messages[element] = elements

    def _places(self, first_chunk: int, blocks: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Of the blocks' scales among the float32 of messages, of the bytes of elements among their bytes."""
        shift = first_chunk * self.wire.chunk_nbytes
        ends = torch.from_numpy(self.layout.offset[blocks[0] : blocks[1] + 1] * self.wire.bits_per_element // BITS_PER_BYTE)
        first = torch.from_numpy(self.wire.element_byte[slice(*blocks)] - shift) - ends[:-1]
        element = torch.arange(int(ends[0]), int(ends[-1])) + first.repeat_interleave(ends.diff())
        return self._scale_places(first_chunk, blocks), element.to(self.device)

    def _scale_places(self, first_chunk: int, blocks: tuple[int, int]) -> Tensor:
        shift = first_chunk * self.wire.chunk_nbytes
        return torch.from_numpy((self.wire.scale_byte[slice(*blocks)] - shift) // SCALE_NBYTES).to(self.device)

    def spread(self, by_block: Tensor, blocks: tuple[int, int]) -> Tensor:
        """What blocks [first, last) have, ``[blocks]`` on this device, for every element of theirs, padding included."""
        padded = self.padded(blocks)
        if self.device.type == "cpu":  # torch would make an index of 8 bytes per element first
            return torch.from_numpy(np.repeat(by_block.numpy(), padded))
        return by_block.repeat_interleave(torch.from_numpy(padded).to(self.device), output_size=int(padded.sum()))

    def block_of(self, blocks: tuple[int, int]) -> Tensor:
        """Of every element of blocks [first, last) in flat memory, its block, counted from the first: int64."""
        return self.spread(torch.arange(blocks[1] - blocks[0], device=self.device), blocks)

    def numels(self, blocks: tuple[int, int], live: Tensor | None) -> Tensor:
        """Elements of blocks [first, last) that exist and are in the mask ``live``, if there is one: int64 ``[blocks]``, on
        this device."""
        numels = torch.from_numpy(self.layout.numel[slice(*blocks)])
        if live is None or not len(numels):
            return numels.to(self.device)
        ends = torch.from_numpy(self.layout.offset[blocks[0] : blocks[1] + 1] // BITS_PER_BYTE)
        masks = live[ends[0] : ends[-1]].clone()
        ends = ends - ends[0]
        ragged = (numels % BITS_PER_BYTE).nonzero().flatten()  # few: the last of a parameter
        inside = (1 << numels[ragged] % BITS_PER_BYTE) - 1
        masks[(ends[ragged + 1] - 1).to(self.device)] &= inside.to(masks)
        totals = BITS_IN_BYTE.to(self.device)[masks.int()].cumsum(0)
        totals = torch.cat([totals.new_zeros(1), totals])[ends.to(self.device)]
        return totals.diff()

    def padded(self, blocks: tuple[int, int]) -> NDArray[np.int64]:
        """Elements of blocks [first, last), their padding included."""
        return np.diff(self.layout.offset[blocks[0] : blocks[1] + 1])


class BucketMemory(Messages):
    """Flat memory of one bucket on one rank, with the messages of its signs, allocated once. All of it is zero at first.

    Args:
        layout: places of blocks and bytes.
        share: the chunks that this rank compresses.
        chunk: the chunk that it serves; ``None``: none, as nothing is exchanged.
        has_rms: whether there is a D (see :attr:`rms`).
        keeps_before: whether the last average but one is kept: for steps that may be taken back, and for nesterov.
        renews: whether D is renewed: there is a :attr:`second_moment`, and D is kept as its code where one is exchanged.
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
        renews: bool = False,
    ) -> None:
        assert has_rms or not renews
        super().__init__(layout, layout.signs, share=share, chunk=chunk, keeps_before=keeps_before, device=device)
        if parameter_numels is None:
            numels = np.zeros(int(layout.parameter.max(initial=-1)) + 1, dtype=np.int64)
            np.maximum.at(numels, layout.parameter, layout.start + layout.numel)
            parameter_numels = numels.tolist()
        self.parameter_numels = parameter_numels
        self.dtype = dtype
        self.kept_views: dict[str, dict[Any, Any]] = {}
        """Views that kernels have made of the tensors here and keep: to be made anew where one takes another's place."""
        reals = self._reals
        own = range(0) if chunk is None else range(chunk, chunk + 1)
        self.error = reals(layout.flat_numel_of(share))
        """Worker error of the share. Of a single rank, which has none: u itself."""
        self.server_error = reals(layout.flat_numel_of(own)) if own else reals(0)
        """Server error of the chunk."""
        is_coded = renews and chunk is not None
        self.rms = reals(layout.flat_numel) if has_rms and not is_coded else None
        """sqrt(v_hat), so that D = rms + eps: the same on all ranks, 0 where an element is not live. ``None`` without D, and
        where it is coded."""
        self.rms_code: Tensor | None = None
        """The same as codes of :mod:`~lightning_onebit.quantize.logarithm`, uint8 ``[flat_numel]``: not 0 where an element
        is live."""
        self.rms_scale: Tensor | None = None
        """Their scales, float32 ``[blocks]``."""
        self.second_moment = reals(layout.flat_numel_of(share)) if renews else None
        """v_i of the share: this rank's own second moment, or its node's. Also there while one is collected."""
        self.second_moment_residual: Tensor | None = None
        """Of the chunk: what the last code of the second moment has left out, in units of v_hat."""
        if is_coded:
            self._make_codes_()
        self.live: Tensor | None = None
        """uint8 ``[flat_numel / 8]``: bit set where an element takes part in its block. ``None`` if all do.
        Those of padding may be either."""
        self.live_before: Tensor | None = None
        """The same at the time of the last average."""

    def _reals(self, numel: int) -> Tensor:
        return torch.zeros(numel, dtype=self.dtype, device=self.device)

    def _make_codes_(self) -> None:
        assert self.chunk is not None
        self.rms_code = torch.zeros(self.layout.flat_numel, dtype=torch.uint8, device=self.device)
        self.rms_scale = torch.zeros(self.layout.num_blocks, dtype=torch.float32, device=self.device)
        self.second_moment_residual = self._reals(self.layout.flat_numel_of(range(self.chunk, self.chunk + 1)))

    @property
    def has_rms(self) -> bool:
        """Whether there is a D, in either form."""
        return self.rms is not None or self.rms_code is not None

    def decoded_rms(self, blocks: tuple[int, int]) -> Tensor:
        """sqrt(v_hat) of blocks [first, last) in flat memory: a new tensor, in the dtype of errors."""
        places = slice(int(self.layout.offset[blocks[0]]), int(self.layout.offset[blocks[1]]))
        if self.rms_code is None or self.rms_scale is None:
            assert self.rms is not None
            return self.rms[places].clone()
        scale = self.spread(self.rms_scale[slice(*blocks)], blocks)
        return decode_logarithm(self.rms_code[places], scale).to(self.dtype)

    def set_rms_(self, flat: Tensor) -> None:
        """Set D.

        Args:
            flat: sqrt(v_hat) of the whole bucket, ``[flat_numel]``, finite, at least 0; 0 for padding. Where it is coded,
                what is larger than the largest float32 becomes that.
        """
        if self.rms_code is None or self.rms_scale is None:
            assert self.rms is not None
            self.rms.copy_(flat)
            return
        rms, blocks = flat.clamp(max=LARGEST_FLOAT32).float(), (0, self.layout.num_blocks)
        self.rms_scale.copy_(largest_of_blocks(rms, self.padded(blocks)))
        self.rms_code.copy_(encode_logarithm(rms, self.spread(self.rms_scale, blocks)))

    # A second moment that is collected for a while, where none goes on

    def collect_(self) -> None:
        """From now on, steps add their gradients to a second moment, of zero at first; D stays as it is."""
        assert self.rms is not None
        self.second_moment = self._reals(self.layout.flat_numel_of(self.share))
        self.kept_views.clear()

    def begin_refresh_(self) -> Tensor:
        """Make D ready to be replaced by what was collected: coded, where that is exchanged.

        Returns:
            sqrt(v_hat) as it was: for :meth:`end_refresh_`.
        """
        assert self.rms is not None
        before = self.rms
        if self.chunk is None:
            self.rms = before.clone()
        else:
            self.rms = None
            self._make_codes_()
            self.set_rms_(before)
        self.kept_views.clear()
        return before

    def end_refresh_(self, before: Tensor) -> None:
        """Keep the new D, as numbers; where it is 0, as no rank had a gradient, that of ``before``. Free all else."""
        renewed = self.decoded_rms((0, self.layout.num_blocks))
        self.rms = torch.where(renewed == 0, before, renewed)
        self.rms_code = self.rms_scale = self.second_moment = self.second_moment_residual = None
        self.kept_views.clear()

    def variance_messages(self) -> Messages:
        """New messages for a refresh of the second moment."""
        return Messages(self.layout, self.layout.codes, share=self.share, chunk=self.chunk, device=self.device)

    def encoded(self, messages: Tensor, first_chunk: int, blocks: tuple[int, int]) -> Encoded:
        """Views of neighbouring blocks of one chunk in ``messages``, signs of chunks from ``first_chunk`` on."""
        return Encoded(*self.views(messages, first_chunk, blocks))


def error_dtype(dtype: torch.dtype) -> torch.dtype:
    """Errors are kept in float32, or in float64 for float64 tensors: half precision would lose them."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(kw_only=True, eq=False)
class StepInputs:
    """What one step reads and writes beside the buckets' memory. Lists and arrays are by parameter."""

    params: Sequence[Tensor]
    """Flat views in memory order; written by step 6."""
    gradients: Sequence[Tensor | None]
    """Flat, in the memory order and dtype of their parameters; ``None`` is zero. Only read."""
    numbers: NDArray[np.float64]
    """``[parameters, len(Coefficients)]``: another array in each step, never written again."""
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
