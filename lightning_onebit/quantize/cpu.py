"""The sign quantizer for CPUs: vectorized passes over spans that fit in cache, on memory allocated once.

Each pass is one torch or numpy call, whichever is faster: for 65536 elements of float32 on one core (Zen 4) from 3 us (in
place) to 24 us. On a small span the calls themselves are what counts, 0.3 us (numpy) to 2 us (torch with a Python number):
hence few of them, views kept from step to step, and small parameters packed into spans of their own.

The spans of one large parameter are matrices of whole blocks. Packed spans have blocks of any size: their norms are sums
over ragged rows (``np.add.reduceat``), their scales are spread over elements.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_onebit.coefficients import Coefficients, RefreshNumbers
from lightning_onebit.config import Scale
from lightning_onebit.flat import all_finite
from lightning_onebit.quantize.cpu_sketch import SketchWorkspace, add_span_
from lightning_onebit.quantize.cpu_variance import (
    add_decoded_rms,
    apply_variance_,
    encode_variance_,
    numbers_of,
    renew_second_moment_,
    rescaling_less_one,
    serve_variance_,
)
from lightning_onebit.quantize.layout import BITS_PER_BYTE, SPAN_NUMEL
from lightning_onebit.quantize.memory import BucketMemory, Messages, StepInputs
from lightning_onebit.quantize.spans import (
    EncodedSpan,
    Numbers,
    SpanViews,
    active_parts,
    all_active,
    any_number,
    average_before,
    gather_,
    last_average,
    live_bits,
    parts_of,
    span_views,
)
from lightning_onebit.quantize.tensor_sketch import TensorSketch
from lightning_onebit.quantize.workspace import BITS_OF_BYTE, Memory, Workspace, scale_divisors

ORDERS: dict[Scale, int] = {"l2": 2, "l1": 1}
SMALLEST_SAFE_NORM, LARGEST_SAFE_NORM = 1e-15, 1e15
"""Between these a float32 norm loses nothing to under- or overflow of the squares."""


class CpuKernels:
    """:class:`~lightning_onebit.quantize.reference.ReferenceKernels`, fast. Not thread-safe: it owns its workspace.

    Args:
        scale: ``"l2"`` or ``"l1"``.
        space: ``"update"`` or ``"momentum"``.
        block_size: elements per block, a multiple of 8.
        dtype: dtype of errors, float32 or float64.
    """

    name = "cpu"
    reads_flags_on_device = False
    sketch_dtype = torch.float64

    def __init__(self, *, scale: Scale = "l2", space: str = "update", block_size: int, dtype: torch.dtype) -> None:
        self.scale: Scale = scale
        self.space = space
        self._memory = Memory(max(SPAN_NUMEL, block_size), SPAN_NUMEL // 8, scale=scale, dtype=dtype)
        self._real = torch.empty(0, dtype=dtype).numpy().dtype
        self._signs_of_byte = np.where(BITS_OF_BYTE, 1, -1).astype(self._real)
        self._opposite_signs_of_byte = -self._signs_of_byte
        self._num_bits_of_byte = BITS_OF_BYTE.sum(axis=1).astype(self._real)

    # Steps 1 and 2, on a worker

    def encode_(self, memory: BucketMemory, index: int, step: StepInputs, *, commit: bool) -> None:
        """As the reference. Without ``commit``, a bucket with a gradient that is not finite is not encoded."""
        for view in span_views(memory, memory.share):
            for part in active_parts(memory, view, step, check=commit):
                work, c = self._memory.cut(part.shape), part.coefficients(step)
                assert part.error is not None
                assert part.sent is not None
                gradient = self._gradient(memory, index, part, step, c, work)
                if not commit and not all_finite([gradient]):
                    step.flags[0] = 1
                    return
                if commit and part.second_moment is not None:
                    self._renew_second_moment_(memory, index, part, step, gradient, c, work)
                out = part.error if commit else work.out
                live = live_bits(memory.live, part)
                self._add_local_momentum_(out, memory, part, last_average(memory, part), live, gradient, c, work)
                self._quantize_(out, part.sent, live, work)

    def _add_local_momentum_(
        self,
        out: Tensor,
        memory: BucketMemory,
        part: SpanViews,
        last: EncodedSpan,
        live: NDArray[np.uint8] | None,
        gradient: Tensor,
        c: Coefficients,
        work: Workspace,
    ) -> None:
        """Step 1: ``out = error + beta u + weight clamp(gradient / D, +-kappa)``."""
        assert part.error is not None
        before = live if memory.live_before is memory.live else live_bits(memory.live_before, part)
        self._add_decoded_(out, part.error, last, before, part.per_block(c.beta), work)
        term, array = work.reals, work.reals_array
        if not memory.has_rms or self.space == "momentum":
            term.copy_(gradient)
        else:
            if part.rms is None:
                add_decoded_rms(part, c.eps, work)
            else:
                np.add(part.rms, part.per_element(c.eps), out=array)
            torch.div(gradient, term, out=term)
            if live is not None:
                work.put_live(term, live)
            elif part.shape.numels is not None:
                array[part.shape.gaps] = 0.0
        kappa = part.per_element(c.kappa)
        if isinstance(kappa, float):
            term.clamp_(-kappa, kappa)
        else:
            np.clip(array, -kappa, kappa, out=array)
        np.multiply(array, part.per_element(c.weight), out=array)
        out.add_(term)

    def _renew_second_moment_(
        self,
        memory: BucketMemory,
        index: int,
        part: SpanViews,
        step: StepInputs,
        gradient: Tensor,
        c: Coefficients,
        work: Workspace,
    ) -> None:
        """``v_i = square_decay v_i + (square_factor g_i + square_root_weight coupled_decay x)^2``, and finite.

        ``gradient`` is that of :meth:`_gradient`, with decay.
        """
        term = work.out_array
        if not any_number(c.coupled_decay):  # the sign makes no difference to the square
            np.multiply(gradient.numpy(), part.per_element(c.root_r * c.square_root_weight), out=term)
        else:
            work.out.copy_(self._local_gradient(memory, index, part, step, work, work.out))
            np.multiply(term, part.per_element(c.square_factor), out=term)
            decay = self._decay(part, step, c, work)
            np.multiply(decay, part.per_element(c.square_root_weight), out=decay)
            np.add(term, decay, out=term)
        renew_second_moment_(part, work.out, c.square_decay)

    def _gradient(
        self, memory: BucketMemory, index: int, part: SpanViews, step: StepInputs, c: Coefficients, work: Workspace
    ) -> Tensor:
        """``sign g + coupled_decay x`` of a span, in the dtype of the errors: a view of g, if it can be."""
        gradient = self._local_gradient(memory, index, part, step, work, work.values)
        decays = any_number(c.coupled_decay)
        if not isinstance(c.sign, float) or c.sign < 0 or decays or gradient.dtype != memory.dtype:
            gradient = work.values.copy_(gradient)
            array = gradient.numpy()
            np.multiply(array, part.per_element(c.sign), out=array)
            if decays:
                np.add(array, self._decay(part, step, c, work), out=array)
        return gradient

    def _local_gradient(
        self, memory: BucketMemory, index: int, part: SpanViews, step: StepInputs, work: Workspace, out: Tensor
    ) -> Tensor:
        """The gradient of a span: a view of it, if it can be; else in ``out``."""
        shared = step.share_gradients.get(index)
        if shared is not None:
            start = part.flat.start - memory.share_flat.start
            return shared[start : start + part.shape.numel]
        if part.shape.numels is None:
            p, elements, _ = part.members[0]
            whole = step.gradients[p]
            return out.zero_() if whole is None else whole[elements]
        gather_(out, part, step.gradients).numpy()[part.shape.gaps] = 0.0
        return out

    def _decay(self, part: SpanViews, step: StepInputs, c: Coefficients, work: Workspace) -> NDArray[np.floating]:
        """``coupled_decay x`` of a span, in the workspace."""
        decay = gather_(work.reals, part, step.params)
        np.multiply(work.reals_array, part.per_element(c.coupled_decay), out=work.reals_array)
        if part.shape.numels is not None:
            work.reals_array[part.shape.gaps] = 0.0
        # A parameter that has diverged stays what it is, as under Adam, but must not get into the errors.
        decay.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return work.reals_array

    # Step 4, on a server

    def serve_(self, memory: BucketMemory, step: StepInputs, *, commit: bool) -> None:
        """As the reference."""
        assert memory.chunk is not None
        for view in span_views(memory, range(memory.chunk, memory.chunk + 1)):
            if commit and not all_active(view, step):
                assert view.served is not None
                view.served.signs[:] = last_average(memory, view).signs
                view.served.scales[:] = last_average(memory, view).scales
            for part in active_parts(memory, view, step, check=commit):
                work = self._memory.cut(part.shape)
                assert part.server_error is not None
                assert part.served is not None
                out, live = part.server_error if commit else work.out, live_bits(memory.live, part)
                self._add_mean_(out, part, live, work)
                self._quantize_(out, part.served, live, work, part.per_block(part.coefficients(step).server_gain))

    def _add_mean_(self, out: Tensor, part: SpanViews, live: NDArray[np.uint8] | None, work: Workspace) -> None:
        """``out = server error + sum_i q_i / n``, in the order of the ranks."""
        assert part.server_error is not None
        source = part.server_error
        for each in part.received:
            self._add_decoded_(out, source, each, live, 1 / len(part.received), work)
            source = out

    # Step 6

    def apply_(self, memory: BucketMemory, index: int, step: StepInputs, *, commit: bool) -> None:
        """As the reference."""
        if commit:
            if step.flags[0]:
                return
            self._commit_(memory, index, step)
        for view in span_views(memory, range(memory.layout.num_chunks)):
            if commit and not all_active(view, step):
                for part in parts_of(memory, view):
                    if not all_active(part, step):
                        new, before = last_average(memory, part), average_before(memory, part)
                        new.signs[:] = before.signs
                        new.scales[:] = before.scales
            for part in active_parts(memory, view, step, check=True):
                self._apply_part_(memory, part, step, self._memory.cut(part.shape))

    def _apply_part_(self, memory: BucketMemory, part: SpanViews, step: StepInputs, work: Workspace) -> None:
        c = part.coefficients(step)
        u, live = last_average(memory, part), live_bits(memory.live, part)
        is_view = part.shape.numels is None
        looks_ahead = not isinstance(c.nesterov, float) or c.nesterov != 0.0
        factor = part.per_block(-c.step_size * (1 + c.nesterov))
        if is_view:
            p, elements, _ = part.members[0]
            param = step.params[p][elements]
            if c.shrink != 1.0:
                param.mul_(c.shrink)
            if param.dtype == memory.dtype and not looks_ahead and self.space == "update":
                self._add_decoded_(param, param, u, live, factor, work)
                return
        move = self._decode(work.values, u, live, factor, work)
        if looks_ahead:
            before, factor = average_before(memory, part), part.per_block(c.step_size * c.nesterov)
            self._add_decoded_(move, move, before, live_bits(memory.live_before, part), factor, work)
        if part.rms is not None and self.space == "momentum":
            np.add(part.rms, part.per_element(c.eps), out=work.reals_array)
            if live is not None:
                work.expand_mask(live)
                work.reals.masked_fill_(work.mask == 0, 1.0)
            elif not is_view:
                work.reals_array[part.shape.gaps] = 1.0
            np.divide(move.numpy(), work.reals_array, out=move.numpy())
            largest = part.per_element(c.largest_move)
            np.clip(move.numpy(), -largest, largest, out=move.numpy())
        if is_view:
            param.add_(move)
            return
        members = zip(part.members, part.are_whole, strict=True)
        params = [step.params[p] if is_whole else step.params[p][s] for (p, s, _), is_whole in members]
        if not isinstance(c.shrink, float) or c.shrink != 1.0:
            shrinks = np.broadcast_to(c.shrink, len(params)).tolist()
            if params[0].dtype == memory.dtype:
                torch._foreach_mul_(params, shrinks)
            else:  # there it would round the number to bfloat16 first: 0.999 to 1
                for param, shrink in zip(params, shrinks, strict=True):
                    param.mul_(shrink)
        torch._foreach_add_(params, part.split(move))

    def _commit_(self, memory: BucketMemory, index: int, step: StepInputs) -> None:
        """Write both errors, from the messages."""
        assert memory.chunk is not None
        for view in span_views(memory, memory.share):
            for part in active_parts(memory, view, step, check=True):
                work, c = self._memory.cut(part.shape), part.coefficients(step)
                assert part.error is not None
                assert part.sent is not None
                gradient = self._gradient(memory, index, part, step, c, work)
                if part.second_moment is not None:
                    self._renew_second_moment_(memory, index, part, step, gradient, c, work)
                before, live = average_before(memory, part), live_bits(memory.live, part)
                self._add_local_momentum_(part.error, memory, part, before, live, gradient, c, work)
                self._add_decoded_(part.error, part.error, part.sent, live, -1.0, work)
        for view in span_views(memory, range(memory.chunk, memory.chunk + 1)):
            for part in active_parts(memory, view, step, check=True):
                work = self._memory.cut(part.shape)
                assert part.server_error is not None
                assert part.served is not None
                live = live_bits(memory.live, part)
                self._add_mean_(part.server_error, part, live, work)
                self._add_decoded_(part.server_error, part.server_error, part.served, live, -1.0, work)

    # The second moment

    def encode_variance_(self, memory: BucketMemory, messages: Messages, correction: NDArray[np.float64]) -> None:
        """As the reference."""
        encode_variance_(memory, messages, correction, self._memory)

    def serve_variance_(self, memory: BucketMemory, messages: Messages) -> None:
        """As the reference."""
        serve_variance_(memory, messages, self._memory)

    def apply_variance_(self, memory: BucketMemory, messages: Messages | None, numbers: RefreshNumbers) -> None:
        """As the reference."""
        assert messages is not None
        for part in span_views(memory, memory.share):
            work = self._memory.cut(part.shape)
            assert part.error is not None
            change = rescaling_less_one(messages, part, numbers.eps, work)
            beta, live = part.per_block(numbers_of(part, numbers.beta)), live_bits(memory.live_before, part)
            self._decode(work.out, last_average(memory, part), live, beta, work)
            part.error.add_(work.out.mul_(change))
        apply_variance_(memory, messages, numbers.correction, self._memory)

    @cached_property
    def _sketch_workspace(self) -> SketchWorkspace:
        """Made at the first sketch: kernels that only serve need none."""
        return SketchWorkspace()

    def sketch_tensors_(self, memory: BucketMemory, index: int, step: StepInputs, sketch: TensorSketch) -> None:
        """As the reference, in float64."""
        for view in span_views(memory, memory.share):
            for part in active_parts(memory, view, step, check=True):
                work, is_mean = self._memory.cut(part.shape), index in step.share_gradients
                if is_mean or any(step.gradients[p] is not None for p, _, _ in part.members):
                    gradient = self._local_gradient(memory, index, part, step, work, work.values)
                    add_span_(sketch, part, step, gradient, work, self._sketch_workspace, gathered=is_mean)

    # The quantizer C

    def _quantize_(
        self,
        values: Tensor,
        encoded: EncodedSpan,
        live: NDArray[np.uint8] | None,
        work: Workspace,
        gain: Numbers = 1.0,
    ) -> None:
        """Quantize ``values`` into ``encoded``, with ``gain`` times the scales of C; leave the error in ``values``."""
        if live is None:
            divisors = work.divisors
        else:
            work.indices[:] = live
            counts = self._num_bits_of_byte.take(work.indices, out=work.reals_array[: len(work.indices)], mode="clip")
            sizes = torch.from_numpy(np.add.reduceat(counts, work.shape.block_starts // BITS_PER_BYTE))
            divisors = scale_divisors(sizes.clamp_(min=1), self.scale).numpy()
        if any_number(gain - 1.0):
            # In the dtype of the errors, whether it is one number or several: spans of other members round alike.
            divisors = divisors / np.asarray(gain, dtype=self._real)
        self._measure_(encoded.scales, values if live is None else work.put_live(values, live), divisors, work)
        np.greater_equal(values.numpy(), 0, out=work.bits)
        if work.shape.numels is not None:
            work.bits[work.shape.gaps] = False
        work.pack_bits()
        if live is not None:
            np.bitwise_and(work.bytes, live, out=work.bytes)
        encoded.signs[:] = work.indices
        self._add_decoded_(values, values, encoded, live, -1.0, work)

    def _measure_(
        self, scales: NDArray[np.float32], values: Tensor, divisors: NDArray[np.floating], work: Workspace
    ) -> None:
        """Scales of all blocks, of values that are 0 where they do not count."""
        if work.shape.numels is None:
            for part, of_part in zip(work.rows(values), work.norm_parts, strict=True):
                torch.linalg.vector_norm(part, ORDERS[self.scale], dim=1, out=of_part)
        else:
            terms = values.abs() if self.scale == "l1" else values.square()
            np.add.reduceat(terms.numpy(), work.shape.block_starts, out=work.norms_array)
            if self.scale == "l2":
                work.norms.sqrt_()
        norms = work.norms_array
        with np.errstate(all="ignore"):  # what was too large or small is done once more
            np.divide(norms, divisors, out=scales, casting="same_kind")
        if not (norms.min() > SMALLEST_SAFE_NORM and norms.max() < LARGEST_SAFE_NORM):
            self._measure_unsafe_(scales, values, divisors, work)

    def _measure_unsafe_(
        self, scales: NDArray[np.float32], values: Tensor, divisors: NDArray[np.floating], work: Workspace
    ) -> None:
        """Once more in float64, where squares may have under- or overflowed; the other blocks keep their rounding."""
        unsafe = ~((work.norms_array > SMALLEST_SAFE_NORM) & (work.norms_array < LARGEST_SAFE_NORM))
        wide = values.double()
        sums = self._sums(wide.abs() if self.scale == "l1" else wide.square(), work)
        exact = (sums if self.scale == "l1" else sums.sqrt()) / torch.from_numpy(divisors).double()
        np.copyto(scales, exact.float().numpy(), where=unsafe)
        if not np.isfinite(scales).all():
            raise FloatingPointError(
                "Cannot quantize infinite or NaN values, or values beyond float32. HINT: a non-finite gradient has to be"
                " skipped on all ranks before compression, or it would stay in the error feedback for ever."
            )

    def _sums(self, values: Tensor, work: Workspace) -> Tensor:
        """Sum of each block, a new tensor."""
        if work.shape.numels is None:
            return torch.cat([part.sum(dim=1) for part in work.rows(values)])
        return torch.from_numpy(np.add.reduceat(values.numpy(), work.shape.block_starts))

    def _decode(
        self, out: Tensor, encoded: EncodedSpan, live: NDArray[np.uint8] | None, factor: Numbers, work: Workspace
    ) -> Tensor:
        """``factor q``, in ``out``."""
        self._load(encoded, live, factor, work)
        if work.shape.numels is None:
            for rows, signs, factors in zip(work.rows(out), work.real_rows, work.factor_columns, strict=True):
                torch.mul(signs, factors, out=rows)
            return out
        return out.copy_(work.reals)

    def _add_decoded_(
        self,
        out: Tensor,
        values: Tensor,
        encoded: EncodedSpan,
        live: NDArray[np.uint8] | None,
        factor: Numbers,
        work: Workspace,
    ) -> None:
        """``out = values + factor q``. The product is exact: it makes no difference whether it is rounded first."""
        self._load(encoded, live, factor, work)
        if work.shape.numels is None:
            rows = work.rows(out)
            sources = rows if out is values else work.rows(values)
            for into, each, signs, factors in zip(rows, sources, work.real_rows, work.factor_columns, strict=True):
                torch.addcmul(each, signs, factors, out=into)
        else:
            torch.add(values, work.reals, out=out)

    def _load(self, encoded: EncodedSpan, live: NDArray[np.uint8] | None, factor: Numbers, work: Workspace) -> None:
        """Put signs and ``factor scales`` into the workspace, such that the product of an element not live is -0.0.

        Of a packed span, the products themselves.
        """
        np.multiply(encoded.scales, factor, out=work.factors, dtype=self._real)
        signs_of_byte = self._signs_of_byte
        if live is not None:
            work.expand_mask(live)
            if not np.any(np.signbit(factor)):  # 0.0, times what is not positive, is -0.0; a step size may be -0.0 itself
                np.negative(work.factors, out=work.factors)
                signs_of_byte = self._opposite_signs_of_byte
        work.indices[:] = encoded.signs  # `take` would make a copy of this type itself, and allocate it
        signs_of_byte.take(work.indices, axis=0, out=work.real_bytes, mode="clip")
        if live is not None:
            work.put_live(work.reals, live)
        if work.shape.numels is not None:
            np.multiply(work.reals_array, np.repeat(work.factors, work.shape.elements_of_block), out=work.reals_array)
            work.reals_array[work.shape.gaps] = -0.0
