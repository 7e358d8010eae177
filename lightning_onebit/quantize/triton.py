# mypy: disallow-untyped-defs=False
"""The sign quantizer for GPUs: one launch per bucket each for encode, serve and apply, whatever the bucket consists of.

One program works on one block, and reads and writes each element once. Flags and activity are read by the kernels: no call
waits for the GPU. See :mod:`lightning_onebit.quantize.triton_blocks` for what makes results equal to the reference's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_onebit import coefficients
from lightning_onebit.config import Scale
from lightning_onebit.quantize.layout import SCALE_NBYTES
from lightning_onebit.quantize.memory import BucketMemory, StepInputs
from lightning_onebit.quantize.triton_blocks import (
    clamp,
    decode,
    divide,
    is_finite,
    load_at,
    load_flat,
    load_live,
    load_message,
    pack,
    quantize,
    rounded,
    store_at,
    store_flat,
    store_message,
    tile,
    unpack,
)
from lightning_onebit.quantize.triton_gradients import add_parts_, draw_sketch, gather_, scale_, sketch_
from lightning_onebit.quantize.triton_sketch import sketch_tensors_
from lightning_onebit.quantize.triton_tables import (
    BETA,
    BLOCK_COLUMNS,
    COUPLED_DECAY,
    EPS,
    GRADIENT,
    KAPPA,
    LARGEST_MOVE,
    NESTEROV,
    NUMEL,
    OFFSET,
    PARAM,
    PARAMETER,
    SCALE,
    SHRINK,
    SIGN,
    SIGN_OF_GRADIENT,
    SLOT,
    START,
    STEP_COLUMNS,
    STEP_SIZE,
    WEIGHT,
    any_number,
    block_kernel,
    is_aligned,
    launch,
    param_dtype,
    tables_of,
)
from lightning_onebit.quantize.triton_variance import (
    apply_variance_,
    encode_variance_,
    load_decoded_rms,
    renew_second_moment,
    serve_variance_,
)


class TritonKernels:
    """:class:`~lightning_onebit.quantize.reference.ReferenceKernels` on CUDA tensors, without a wait for the GPU.

    All parameters of a bucket, and their gradients, have one dtype: float32, bfloat16 or float64. A block with a gradient
    that is not finite gets a scale that is not finite either; with ``commit=False`` nothing of it remains.

    Args:
        scale: ``"l2"`` or ``"l1"``.
        space: ``"update"`` or ``"momentum"``.
    """

    name = "triton"
    encode_variance_ = staticmethod(encode_variance_)
    serve_variance_ = staticmethod(serve_variance_)
    apply_variance_ = staticmethod(apply_variance_)
    sketch_dtype = torch.int64
    sketch_tensors_ = staticmethod(sketch_tensors_)
    reads_flags_on_device = True
    gather_ = staticmethod(gather_)
    scale_ = staticmethod(scale_)
    sketch_ = staticmethod(sketch_)
    draw_sketch = staticmethod(draw_sketch)
    add_parts_ = staticmethod(add_parts_)

    def __init__(self, *, scale: Scale = "l2", space: str = "update") -> None:
        self.scale: Scale = scale
        self.space = space

    def encode_(self, memory: BucketMemory, index: int, step: StepInputs, *, commit: bool) -> None:
        """As the reference. Sends the step's addresses and numbers: those of its call of :meth:`apply_`, too."""
        tables = tables_of(memory)
        tables.update_(step)
        first, last = memory.share_blocks
        launch(
            _encode_kernel, last - first, memory,
            tables.blocks, tables.addresses, tables.numbers, step.flags, self._share_gradient(index, step),
            memory.error, self._rms(memory, "update"), memory.rms_code, memory.rms_scale, memory.second_moment,
            memory.result, memory.live, memory.live_before, memory.sent,
            first, memory.share_flat.start, memory.share.start * memory.layout.chunk_nbytes,
            PARAM_DTYPE=param_dtype(tables, step), COUPLED=any_number(step, "coupled_decay"), L1=self.scale == "l1",
            COMMIT=commit,
        )  # fmt: skip

    def serve_(self, memory: BucketMemory, step: StepInputs, *, commit: bool) -> None:
        """As the reference, with the numbers that this step's :meth:`encode_` has sent."""
        assert memory.chunk is not None
        first, last = memory.chunk_blocks
        tables = tables_of(memory)
        if not tables.has(step):
            tables.update_(step)
        launch(
            _serve_kernel, last - first, memory,
            tables.blocks, tables.numbers, step.flags,
            memory.server_error, memory.result, memory.live, memory.received, memory.served,
            first, memory.chunk_flat.start, memory.chunk * memory.layout.chunk_nbytes,
            len(memory.share), memory.layout.chunk_nbytes, 1 / len(memory.share),
            L1=self.scale == "l1", COMMIT=commit,
        )  # fmt: skip

    def apply_(self, memory: BucketMemory, index: int, step: StepInputs, *, commit: bool) -> None:
        """As the reference, with the addresses that this step's :meth:`encode_` has sent."""
        assert memory.chunk is not None
        assert len(memory.results) == 2 or not commit, "committing late needs the last average but one"
        tables = tables_of(memory)
        if not tables.has(step):
            tables.update_(step)
        launch(
            _apply_kernel, memory.layout.num_blocks, memory,
            tables.blocks, tables.addresses, tables.numbers, step.flags, self._share_gradient(index, step),
            memory.error, memory.server_error, self._rms(memory, "update"), self._rms(memory, "momentum"),
            memory.rms_code, memory.rms_scale, memory.second_moment,
            memory.result, memory.result_before, memory.live, memory.live_before,
            memory.sent, memory.received, memory.served,
            *memory.share_blocks, memory.share_flat.start, memory.share.start * memory.layout.chunk_nbytes,
            *memory.chunk_blocks, memory.chunk_flat.start, memory.chunk * memory.layout.chunk_nbytes,
            len(memory.share), memory.layout.chunk_nbytes, 1 / len(memory.share),
            PARAM_DTYPE=param_dtype(tables, step), COUPLED=any_number(step, "coupled_decay"),
            LOOKS_AHEAD=any_number(step, "nesterov"), COMMIT=commit,
        )  # fmt: skip

    def _share_gradient(self, index: int, step: StepInputs) -> Tensor | None:
        gradient = step.share_gradients.get(index)
        assert gradient is None or is_aligned(gradient)
        return gradient

    def _rms(self, memory: BucketMemory, space: str) -> Tensor | None:
        assert memory.rms_code is None or self.space == "update"
        return memory.rms if self.space == space else None


PLACES = (
    "first_block", "share_first", "share_last", "share_start", "share_byte",
    "chunk_first", "chunk_last", "chunk_start", "chunk_byte", "ranks", "chunk_nbytes",
)  # fmt: skip


@block_kernel(PLACES)
def _encode_kernel(
    blocks, addresses, numbers, flags, share_gradient, error, rms, rms_code, rms_scale, second_moment,
    last_average, live, live_before, sent,
    first_block, share_start, share_byte,
    PARAM_DTYPE: tl.constexpr, COUPLED: tl.constexpr, L1: tl.constexpr, COMMIT: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    block = first_block + tl.program_id(0)
    row, step_row, numel, start, offset, sign, scale = _place(blocks, block)
    byte, element, exists, byte_exists = tile(numel, BYTES)
    alive = load_live(live, offset, byte, exists, byte_exists)

    # 1. Local momentum c
    x = 0.0
    if COUPLED:
        x = load_at(tl.load(addresses + step_row + PARAM), start, numel, element, exists, byte_exists, PARAM_DTYPE)
    c, gradient, decay = _local_momentum(
        addresses, numbers, step_row, x, start, numel, share_gradient, error, block, offset, offset - share_start, rms,
        rms_code, rms_scale, last_average, sign, scale, alive, live_before, byte, element, exists, byte_exists,
        PARAM_DTYPE, COUPLED,
    )  # fmt: skip
    # 2. q = C(c), error = c - q
    bits, value = quantize(c, alive, L1, 1.0)
    store_message(
        sent, sign - share_byte, scale - share_byte // SCALE_BYTES, byte, byte_exists, pack(bits), value
    )  # fmt: skip
    if COMMIT:
        if tl.load(flags + 1 + tl.load(row + PARAMETER)) != 0:
            q = decode(bits, value.to(error.dtype.element_ty), alive)
            store_flat(error, offset - share_start, element, exists, byte_exists, c - q)
            if second_moment is not None:
                renew_second_moment(
                    second_moment, offset - share_start, numbers, step_row, gradient, decay, element, exists, byte_exists,
                    COUPLED,
                )  # fmt: skip
    else:
        if tl.max(tl.max((~is_finite(gradient)).to(tl.int32), axis=1), axis=0) != 0:
            tl.store(flags, 1)


@block_kernel(PLACES)
def _serve_kernel(
    blocks, numbers, flags, server_error, last_average, live, received, served,
    first_block, chunk_start, chunk_byte, ranks, chunk_nbytes, weight: tl.float64,
    L1: tl.constexpr, COMMIT: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    row, step_row, numel, _, offset, sign, scale = _place(blocks, first_block + tl.program_id(0))
    byte, element, exists, byte_exists = tile(numel, BYTES)
    alive = load_live(live, offset, byte, exists, byte_exists)
    sign_here, scale_here = sign - chunk_byte, scale - chunk_byte // SCALE_BYTES

    # 4. c_bar = mean_i(q_i) + server error, u = gain C(c_bar), server error = c_bar - u
    c_bar = _mean_received(
        server_error, offset - chunk_start, received, sign_here, scale_here, ranks, chunk_nbytes, weight,
        alive, byte, element, byte_exists,
    )  # fmt: skip
    gain = 1.0 + SERVER_GAIN_OF_BETA * tl.load(numbers + step_row + BETA)
    bits, value = quantize(c_bar, alive, L1, gain)
    packed = pack(bits)
    if COMMIT:
        if tl.load(flags + 1 + tl.load(row + PARAMETER)) != 0:
            u = decode(bits, value.to(server_error.dtype.element_ty), alive)
            store_flat(server_error, offset - chunk_start, element, exists, byte_exists, c_bar - u)
        else:  # it sits out: everybody keeps its last average
            packed, value = load_message(last_average, sign, scale, byte, byte_exists)
    store_message(served, sign_here, scale_here, byte, byte_exists, packed, value)


@block_kernel(PLACES)
def _apply_kernel(
    blocks, addresses, numbers, flags, share_gradient, error, server_error, update_rms, momentum_rms,
    rms_code, rms_scale, second_moment, average, average_before, live, live_before, sent, received, served,
    share_first, share_last, share_start, share_byte, chunk_first, chunk_last, chunk_start, chunk_byte,
    ranks, chunk_nbytes, weight: tl.float64,
    PARAM_DTYPE: tl.constexpr, COUPLED: tl.constexpr, LOOKS_AHEAD: tl.constexpr, COMMIT: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = error.dtype.element_ty
    block = tl.program_id(0)
    row, step_row, numel, start, offset, sign, scale = _place(blocks, block)
    counts = tl.load(row + NUMEL) > 0  # always
    if COMMIT:
        counts = tl.load(flags) == 0
    active = tl.load(flags + 1 + tl.load(row + PARAMETER)) != 0
    byte, element, exists, byte_exists = tile(numel, BYTES)

    if counts & active:
        alive = load_live(live, offset, byte, exists, byte_exists)
        address = tl.load(addresses + step_row + PARAM)
        x = load_at(address, start, numel, element, exists, byte_exists, PARAM_DTYPE)
        if COMMIT:
            if (block >= share_first) & (block < share_last):
                # 2. error = c - q, where c was made with the average that was the last one then
                c, gradient, decay = _local_momentum(
                    addresses, numbers, step_row, x, start, numel, share_gradient, error, block, offset,
                    offset - share_start, update_rms, rms_code, rms_scale, average_before, sign, scale,
                    alive, live_before, byte, element, exists, byte_exists,
                    PARAM_DTYPE, COUPLED,
                )  # fmt: skip
                packed, value = load_message(
                    sent, sign - share_byte, scale - share_byte // SCALE_BYTES, byte, byte_exists
                )  # fmt: skip
                q = decode(unpack(packed), value.to(dtype), alive)
                store_flat(error, offset - share_start, element, exists, byte_exists, c - q)
                if second_moment is not None:
                    renew_second_moment(
                        second_moment, offset - share_start, numbers, step_row, gradient, decay, element, exists,
                        byte_exists, COUPLED,
                    )  # fmt: skip
            if (block >= chunk_first) & (block < chunk_last):
                # 4. server error = c_bar - u
                sign_here, scale_here = sign - chunk_byte, scale - chunk_byte // SCALE_BYTES
                c_bar = _mean_received(
                    server_error, offset - chunk_start, received, sign_here, scale_here, ranks, chunk_nbytes, weight,
                    alive, byte, element, byte_exists,
                )  # fmt: skip
                packed, value = load_message(served, sign_here, scale_here, byte, byte_exists)
                u = decode(unpack(packed), value.to(dtype), alive)
                store_flat(server_error, offset - chunk_start, element, exists, byte_exists, c_bar - u)

        # 6. x = shrink x - step_size ((1 + nesterov) u - nesterov u_before); in momentum space divided by D, clamped
        step_size = tl.load(numbers + step_row + STEP_SIZE).to(dtype)
        nesterov = tl.load(numbers + step_row + NESTEROV).to(dtype)
        packed, value = load_message(average, sign, scale, byte, byte_exists)
        move = decode(unpack(packed), value.to(dtype) * (step_size * -1.0 * (1.0 + nesterov)), alive)
        if LOOKS_AHEAD:
            alive_before = load_live(live_before, offset, byte, exists, byte_exists)
            packed, value = load_message(average_before, sign, scale, byte, byte_exists)
            move += decode(unpack(packed), value.to(dtype) * (step_size * nesterov), alive_before)
        if momentum_rms is not None:
            eps = tl.load(numbers + step_row + EPS).to(dtype)
            d = load_flat(momentum_rms, offset, element, byte_exists) + eps
            move = divide(move, tl.where(alive, d, 1.0))
            move = clamp(move, tl.load(numbers + step_row + LARGEST_MOVE).to(dtype))
        # As torch: in the dtype of the errors, but rounded to that of the parameter after each of the two operations.
        shrunk = rounded(x.to(dtype) * tl.load(numbers + step_row + SHRINK).to(dtype), PARAM_DTYPE)
        moved = rounded(shrunk + move, PARAM_DTYPE)
        store_at(address, start, numel, element, exists, byte_exists, moved.to(PARAM_DTYPE), PARAM_DTYPE)
    elif COMMIT:  # noqa: SIM102 - a constant, and a value on the device
        if counts:  # it sits out: the average stays what it was
            packed, value = load_message(average_before, sign, scale, byte, byte_exists)
            store_message(average, sign, scale, byte, byte_exists, packed, value)


SCALE_BYTES = tl.constexpr(SCALE_NBYTES)
SERVER_GAIN_OF_BETA = tl.constexpr(coefficients.SERVER_GAIN_OF_BETA)


@triton.jit
def _place(blocks, block):
    """A block's row in its table; its parameter's row; elements; the first in the parameter, and in memory; sign, scale."""
    row = blocks + block.to(tl.int64) * BLOCK_COLUMNS
    step_row = tl.load(row + SLOT) * STEP_COLUMNS
    numel = tl.load(row + NUMEL).to(tl.int32)
    return row, step_row, numel, tl.load(row + START), tl.load(row + OFFSET), tl.load(row + SIGN), tl.load(row + SCALE)


@triton.jit
def _local_momentum(
    addresses, numbers, step_row, x, start, numel, share_gradient, error, block, offset, place, rms, rms_code, rms_scale,
    last_average, sign, scale, alive, live_before, byte, element, exists, byte_exists,
    PARAM_DTYPE: tl.constexpr, COUPLED: tl.constexpr,
):  # fmt: skip
    """``c = error + beta u + weight clamp((sign g + coupled_decay x) / D, +-kappa)``; g; ``coupled_decay x``, or 0."""
    dtype: tl.constexpr = error.dtype.element_ty
    if share_gradient is None:
        address = tl.load(addresses + step_row + GRADIENT)
        gradient = load_at(address, start, numel, element, exists, byte_exists, PARAM_DTYPE)
    else:
        gradient = load_flat(share_gradient, place, element, byte_exists)
    a = gradient.to(dtype) * tl.load(numbers + step_row + SIGN_OF_GRADIENT).to(dtype)
    decay = 0.0
    if COUPLED:
        decay = x.to(dtype) * tl.load(numbers + step_row + COUPLED_DECAY).to(dtype)
        decay = tl.where(is_finite(decay), decay, 0.0)
        a += decay
    if (rms is not None) or (rms_code is not None):
        if rms_code is not None:
            d = load_decoded_rms(rms_code, rms_scale, block, offset, element, byte_exists).to(dtype)
        else:
            d = load_flat(rms, offset, element, byte_exists)
        d += tl.load(numbers + step_row + EPS).to(dtype)
        a = tl.where(alive, divide(a, tl.where(alive, d, 1.0)), 0.0)
    a = clamp(a, tl.load(numbers + step_row + KAPPA).to(dtype))

    packed, value = load_message(last_average, sign, scale, byte, byte_exists)
    alive_before = load_live(live_before, offset, byte, exists, byte_exists)
    u = decode(unpack(packed), value.to(dtype) * tl.load(numbers + step_row + BETA).to(dtype), alive_before)
    c = load_flat(error, place, element, byte_exists) + u + a * tl.load(numbers + step_row + WEIGHT).to(dtype)
    return c, gradient, decay


@triton.jit
def _mean_received(
    server_error, place, received, sign, scale, ranks, chunk_nbytes, weight, alive, byte, element, byte_exists
):  # fmt: skip
    """``c_bar = server error + sum_i q_i / n``, in the order of the ranks."""
    dtype: tl.constexpr = server_error.dtype.element_ty
    c_bar = load_flat(server_error, place, element, byte_exists)
    for _ in range(ranks):
        packed, value = load_message(received, sign, scale, byte, byte_exists)
        c_bar += decode(unpack(packed), value.to(dtype) * tl.full((), weight, dtype), alive)
        received += chunk_nbytes
    return c_bar
