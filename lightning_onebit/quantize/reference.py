"""The sign quantizer in plain torch, written to be read: what every other implementation has to compute.

Each function works on a whole bucket at once. Bits are equal in all implementations, given equal values; scales to the
rounding of a sum in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_onebit.coefficients import LARGEST_RESCALING, Coefficients, RefreshNumbers
from lightning_onebit.config import Scale
from lightning_onebit.quantize.memory import BucketMemory, Messages, StepInputs
from lightning_onebit.quantize.reference_sketch import sketch_tensors_
from lightning_onebit.quantize.reference_variance import (
    apply_variance_,
    encode_variance_,
    renew_second_moment_,
    serve_variance_,
)
from lightning_onebit.quantize.tensor_sketch import TensorSketch

BIT_WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)


class ReferenceKernels:
    """One bit per element and one scale per block (Seide et al. 2014; 1-bit Adam, arXiv 2102.02888, section 4).

    The quantizer C maps a block c to ``+scale`` where ``c >= 0`` and ``-scale`` elsewhere, with
    ``scale = ||c||_2 / sqrt(size)`` (``"l2"``) or ``||c||_1 / size`` (``"l1"``). A block of zeros has scale 0. A server
    multiplies its scales by ``1 + beta / 2``.

    **Live elements.** An element of which no rank has seen a gradient yet is not *live*: it is no part of its block
    (neither of norm nor of size), its bit is 0, and it decodes to -0.0, which added to anything leaves its bits alone. So
    does padding.

    **Committing.** Errors must not change before all ranks know that the step counts. Where that is known, they are
    written at once (``commit=True``). Otherwise ``encode_`` and ``serve_`` write messages only, and ``apply_`` computes the
    same errors later, from the messages: both ways lead to the same bits. The second moment v_i, where there is one, is
    written together with the worker error.

    Args:
        scale: ``"l2"`` or ``"l1"``.
        space: ``"update"``: values are divided by D before they are quantized; ``"momentum"``: afterwards.
    """

    name = "reference"
    reads_flags_on_device = False
    encode_variance_ = staticmethod(encode_variance_)
    serve_variance_ = staticmethod(serve_variance_)
    sketch_dtype = torch.int64

    def __init__(self, *, scale: Scale = "l2", space: str = "update") -> None:
        self.scale: Scale = scale
        self.space = space

    # Steps 1 and 2, on a worker

    def encode_(self, memory: BucketMemory, index: int, step: StepInputs, *, commit: bool) -> None:
        """Quantize ``c = error + local momentum`` of the share into ``memory.sent``.

        Args:
            memory: the bucket; ``sent`` is written, and ``error`` and ``second_moment``, if ``commit``, where parameters are
                active.
            index: of the bucket, for ``step.share_gradients``.
            step: gradients, parameters and numbers; only read, but for ``flags[0]``.
            commit: whether the step is known to count. If not, ``step.flags[0]`` becomes 1 where a gradient of the share is
                infinite or NaN, and the message may then hold anything.
        """
        c = self.local_momentum(memory, index, step)
        signs, scales = self.quantize(c, memory, memory.share_blocks)
        self._write(memory, memory.sent, memory.share.start, memory.share_blocks, signs, scales)
        if commit:
            self._commit_worker_(memory, index, step)
        elif not torch.isfinite(self._gradient(memory, index, step)).all():
            step.flags[0] = 1

    def _commit_worker_(self, memory: BucketMemory, index: int, step: StepInputs) -> None:
        """``error = c - q``, with q as it was sent; and v_i."""
        q = self.decode(memory, memory.sent, memory.share.start, memory.share_blocks, memory.live)
        error = self.local_momentum(memory, index, step).sub_(q)
        active = self._by_element(memory, memory.share_blocks, step.is_active)
        memory.error.copy_(torch.where(active, error, memory.error))
        if memory.second_moment is not None:
            gradient, decay = self._gradient(memory, index, step), self._decay(memory, step)
            renew_second_moment_(memory, step, gradient, decay, active)

    def local_momentum(self, memory: BucketMemory, index: int, step: StepInputs) -> Tensor:
        """Step 1: ``c_i = e_i + beta u + weight clamp((sign g_i + coupled_decay x) / D, +-kappa)``, of the share."""
        blocks = memory.share_blocks
        n = self._numbers(memory, blocks, step)
        u = self.decode(memory, memory.result, 0, blocks, memory.live_before, factor=n.beta)
        a = self._gradient(memory, index, step) * n.sign
        decay = self._decay(memory, step)
        if decay is not None:
            a = a + decay
        if memory.has_rms and self.space == "update":
            live = self._live(memory, blocks, memory.live)
            a = torch.where(live, a / torch.where(live, memory.decoded_rms(blocks) + n.eps, 1.0), 0.0)
        return memory.error + u + a.clamp(-n.kappa, n.kappa) * n.weight

    def _decay(self, memory: BucketMemory, step: StepInputs) -> Tensor | None:
        """``coupled_decay x`` of the share, where there is any."""
        if not step.numbers[:, Coefficients._fields.index("coupled_decay")].any():
            return None
        # A parameter that has diverged stays what it is, as under Adam, but must not get into the errors.
        x = self._flat(memory, memory.share_blocks, step.params)
        decay = x * self._numbers(memory, memory.share_blocks, step).coupled_decay
        return decay.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    # Step 4, on a server

    def serve_(self, memory: BucketMemory, step: StepInputs, *, commit: bool) -> None:
        """Quantize ``c_bar = mean_i(q_i) + server error`` of the chunk into ``memory.served``.

        Args:
            memory: the bucket; ``served`` is written, and ``server_error``, if ``commit``, where parameters are active.
            step: its numbers, and which parameters are active, if ``commit``.
            commit: whether the step is known to count. Then parameters that sit out are served their last average.
        """
        assert memory.chunk is not None
        parameters = memory.layout.parameter[slice(*memory.chunk_blocks)]
        gains = Coefficients(*step.numbers[parameters].T).server_gain
        signs, scales = self.quantize(self.mean_received(memory), memory, memory.chunk_blocks, torch.from_numpy(gains))
        if commit:
            last_signs, last_scales = self._read(memory, memory.result, 0, memory.chunk_blocks)
            active = step.is_active[torch.from_numpy(parameters)]
            signs = torch.where(memory.spread(active, memory.chunk_blocks), signs, last_signs)
            scales = torch.where(active, scales, last_scales)
        self._write(memory, memory.served, memory.chunk, memory.chunk_blocks, signs, scales)
        if commit:
            self._commit_server_(memory, step)

    def _commit_server_(self, memory: BucketMemory, step: StepInputs) -> None:
        """``server error = c_bar - u``, with u as it was served."""
        assert memory.chunk is not None
        u = self.decode(memory, memory.served, memory.chunk, memory.chunk_blocks, memory.live)
        active = self._by_element(memory, memory.chunk_blocks, step.is_active)
        memory.server_error.copy_(torch.where(active, self.mean_received(memory).sub_(u), memory.server_error))

    def mean_received(self, memory: BucketMemory) -> Tensor:
        """``server error + sum_i q_i / n``, in the order of the ranks."""
        assert memory.chunk is not None
        c_bar = memory.server_error.clone()
        for message in memory.received.view(len(memory.share), -1):
            c_bar += self.decode(memory, message, memory.chunk, memory.chunk_blocks, memory.live, 1 / len(memory.share))
        return c_bar

    # Step 6

    def apply_(self, memory: BucketMemory, index: int, step: StepInputs, *, commit: bool) -> None:
        """``x = shrink x - step_size ((1 + nesterov) u - nesterov u_before)``; in momentum space,
        ``x = shrink x - clamp(step_size (...) / D, +-largest_move)``.

        Args:
            memory: the bucket, whose new average is ``memory.result``; if ``commit``, both errors are written, and the
                average of parameters that sit out becomes what it was before.
            index: of the bucket, for ``step.share_gradients``.
            step: ``step.params`` are written, where they are active.
            commit: whether errors were left as they were until now. Then nothing at all is done if ``step.flags[0]`` is set.
        """
        if commit:
            if step.flags[0]:
                return
            memory.turn_results_()  # step 1 was made with the average that was the last one then
            self._commit_worker_(memory, index, step)
            memory.turn_results_()
            self._commit_server_(memory, step)
            self._keep_last_average_(memory, step)
        blocks = (0, memory.layout.num_blocks)
        n = self._numbers(memory, blocks, step)
        move = self.decode(memory, memory.result, 0, blocks, memory.live, factor=-n.step_size * (1 + n.nesterov))
        if step.numbers[:, Coefficients._fields.index("nesterov")].any():
            before = memory.result_before
            move = move + self.decode(memory, before, 0, blocks, memory.live_before, factor=n.step_size * n.nesterov)
        if memory.has_rms and self.space == "momentum":
            live = self._live(memory, blocks, memory.live)
            move = move / torch.where(live, memory.decoded_rms(blocks) + n.eps, 1.0)
            move = move.clamp(-n.largest_move, n.largest_move)
        for p, x, part in self._parts(memory, blocks, step.params, move):
            if step.is_active[p]:
                x.mul_(step.coefficients(p).shrink).add_(part)

    def _keep_last_average_(self, memory: BucketMemory, step: StepInputs) -> None:
        blocks = (0, memory.layout.num_blocks)
        signs, scales = self._read(memory, memory.result, 0, blocks)
        last_signs, last_scales = self._read(memory, memory.result_before, 0, blocks)
        active = step.is_active[torch.from_numpy(memory.layout.parameter)]
        signs = torch.where(memory.spread(active, blocks), signs, last_signs)
        self._write(memory, memory.result, 0, blocks, signs, torch.where(active, scales, last_scales))

    def sketch_tensors_(self, memory: BucketMemory, index: int, step: StepInputs, sketch: TensorSketch) -> None:
        """See :func:`~lightning_onebit.quantize.reference_sketch.sketch_tensors_`."""
        sketch_tensors_(memory, index, step, sketch, self._gradient(memory, index, step))

    def apply_variance_(self, memory: BucketMemory, messages: Messages | None, numbers: RefreshNumbers) -> None:
        """Take over v (see :func:`~lightning_onebit.quantize.reference_variance.apply_variance_`), and keep the momentum:

            ``error = error + beta u (min(D_old / D_new, 1.25) - 1)``

        The momentum is u D. The average u stays as it was sent, alike on all ranks; what the new D makes of it is owed to
        the next step, which adds ``beta u``. Elements without D, before or now, owe nothing.

        Args:
            memory: the bucket; ``rms_code``, ``rms_scale``, ``second_moment`` and ``error`` are written.
            messages: ``sent`` and ``result`` are read.
            numbers: by parameter.
        """
        blocks = memory.share_blocks
        old = memory.decoded_rms(blocks)
        apply_variance_(memory, messages, numbers.correction)
        new = memory.decoded_rms(blocks)
        eps, beta = (
            self._by_element(memory, blocks, torch.from_numpy(each)).to(memory.dtype) for each in (numbers.eps, numbers.beta)
        )
        has_both = (old > 0) & (new > 0)
        rescaling = ((old + eps) / torch.where(has_both, new + eps, 1.0)).clamp(max=LARGEST_RESCALING)
        u = self.decode(memory, memory.result, 0, blocks, memory.live_before, factor=beta)
        memory.error.add_(u * torch.where(has_both, rescaling - 1, 0.0))

    # The quantizer C

    def quantize(
        self, c: Tensor, memory: BucketMemory, blocks: tuple[int, int], gains: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """C: bits, ``bool [elements]``, and scales, float32 ``[blocks]``, of blocks [first, last) in flat memory.

        ``gains``, float64 ``[blocks]``: what scales are multiplied by.
        """
        live = self._live(memory, blocks, memory.live)
        block_of = memory.block_of(blocks)
        counted = torch.where(live, c, 0.0).double()
        sums = torch.zeros(blocks[1] - blocks[0], dtype=torch.float64, device=c.device)
        sums.index_add_(0, block_of, counted.abs() if self.scale == "l1" else counted.square())
        sizes = torch.zeros_like(sums).index_add_(0, block_of, live.double()).clamp_(min=1.0)
        mean = sums / sizes
        scales = mean if self.scale == "l1" else mean.sqrt()
        return live & (c >= 0), (scales if gains is None else scales * gains.to(scales.device)).float()

    def decode(
        self,
        memory: BucketMemory,
        messages: Tensor,
        first_chunk: int,
        blocks: tuple[int, int],
        live: Tensor | None,
        factor: float | Tensor = 1.0,
    ) -> Tensor:
        """``factor q`` of blocks [first, last) in flat memory; -0.0 where elements are not live.

        Args:
            memory: the bucket.
            messages: of neighbouring chunks.
            first_chunk: the first of them.
            blocks: which.
            live: those that took part when it was quantized.
            factor: a number, or one per element.
        """
        signs, scales = self._read(memory, messages, first_chunk, blocks)
        magnitude = memory.spread(scales.to(memory.dtype), blocks) * factor
        return torch.where(self._live(memory, blocks, live), torch.where(signs, magnitude, -magnitude), -0.0)

    # Places

    def _by_element(self, memory: BucketMemory, blocks: tuple[int, int], by_parameter: Tensor) -> Tensor:
        parameter = torch.from_numpy(memory.layout.parameter[blocks[0] : blocks[1]])
        return memory.spread(by_parameter[parameter].to(memory.device), blocks)

    def _numbers(self, memory: BucketMemory, blocks: tuple[int, int], step: StepInputs) -> Coefficients:
        """The numbers of every element, tensors in the dtype of the errors."""
        columns = torch.from_numpy(step.numbers).unbind(1)
        return Coefficients(*(self._by_element(memory, blocks, column).to(memory.dtype) for column in columns))  # type: ignore[arg-type]

    def _live(self, memory: BucketMemory, blocks: tuple[int, int], live: Tensor | None) -> Tensor:
        """Which elements take part in their block: no padding."""
        start, stop = int(memory.layout.offset[blocks[0]]), int(memory.layout.offset[blocks[1]])
        exists = torch.from_numpy(memory.layout.exists(blocks)).to(memory.device)
        return exists if live is None else exists & unpack_bits(live)[start:stop]

    def _gradient(self, memory: BucketMemory, index: int, step: StepInputs) -> Tensor:
        if index in step.share_gradients:
            return step.share_gradients[index]
        return self._flat(memory, memory.share_blocks, step.gradients)

    def _flat(self, memory: BucketMemory, blocks: tuple[int, int], tensors: Sequence[Tensor | None]) -> Tensor:
        start, stop = int(memory.layout.offset[blocks[0]]), int(memory.layout.offset[blocks[1]])
        flat = torch.zeros(stop - start, dtype=memory.dtype, device=memory.device)
        for _, source, part in self._parts(memory, blocks, tensors, flat):
            part.copy_(source)
        return flat

    def _parts(self, memory: BucketMemory, blocks: tuple[int, int], tensors, flat):  # type: ignore[no-untyped-def]
        """Parameter by parameter: its index, its elements in ``tensors`` that these blocks hold, and in ``flat``."""
        layout, base = memory.layout, int(memory.layout.offset[blocks[0]])
        for p, first, last in layout.parameter_blocks():  # its blocks are neighbours, and only the last one is padded
            first, last = max(first, blocks[0]), min(last, blocks[1])
            if first < last and tensors[p] is not None:
                start, numel = int(layout.start[first]), int(layout.numel[first:last].sum())
                place = int(layout.offset[first]) - base
                yield p, tensors[p][start : start + numel], flat[place : place + numel]

    def _write(
        self, memory: BucketMemory, messages: Tensor, first_chunk: int, blocks: tuple[int, int], bits: Tensor, scales: Tensor
    ) -> None:
        memory.write_(messages, first_chunk, blocks, pack_bits(bits), scales)

    def _read(
        self, memory: BucketMemory, messages: Tensor, first_chunk: int, blocks: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        packed, scales = memory.read(messages, first_chunk, blocks)
        return unpack_bits(packed), scales


def pack_bits(bits: Tensor) -> Tensor:
    """Pack ``bool [8 k]`` into ``uint8 [k]``, least significant bit first."""
    weights = torch.tensor(BIT_WEIGHTS, dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_bits`: ``bool [8 k]``."""
    weights = torch.tensor(BIT_WEIGHTS, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] & weights).ne(0).view(-1)
