"""The renewal of the second moment in plain torch, written to be read: what every other implementation has to compute.

Every rank carries its own second moment v_i on in the background (``square_decay v_i + (1 - square_decay) r g_i^2``). At a
refresh the ranks exchange 8-bit logarithms of sqrt(v_i) and get the mean, v, back in the same form: D is made of it.

**The rounding must not stick.** If v_i were simply set to the decoded v, a v that falls by less than half a step of the
code between two refreshes would never fall. So v_i keeps what its own code left out, and the server what the mean's code
left out. Both are bounded: within a factor of 2 of what the ranks agree on, so that what is left of an old, larger v cannot
make v vanish.

Each function works on a whole bucket at once. All bits are equal in all implementations. Second moments with bias
correction, ``v_hat = v / (1 - square_decay^t)``, are what is coded: they are stationary where v is not yet. ``correction``
is ``1 / (1 - square_decay^t)`` everywhere: float64 ``[parameters]``, rounded to the dtype of the errors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_onebit.coefficients import Coefficients
from lightning_onebit.quantize.logarithm import decode_logarithm, encode_logarithm, largest_of_blocks, root_as_float32
from lightning_onebit.quantize.memory import BucketMemory, Messages, StepInputs


def renew_second_moment_(
    memory: BucketMemory, step: StepInputs, gradient: Tensor, decay: Tensor | None, active: Tensor
) -> None:
    """``v_i = min(square_decay v_i + (1 - square_decay) (root_r sign g_i + coupled_decay x)^2, largest finite)``.

    The factor of the square is drawn into it, as its root. All elements take part, whether they are live or not.

    Args:
        memory: the bucket; ``second_moment`` is written.
        step: its numbers.
        gradient: g_i of the share, in the dtype of errors, like all of these ``[share's flat numel]``.
        decay: ``coupled_decay x``, finite; ``None`` if there is none.
        active: ``bool``: where parameters are active.
    """
    assert memory.second_moment is not None
    v = memory.second_moment
    n: Any = Coefficients(*step.numbers.T)
    term = gradient * _by_element(memory, memory.share_blocks, n.square_factor)
    if decay is not None:
        term = term + decay * _by_element(memory, memory.share_blocks, n.square_root_weight)
    renewed = v * _by_element(memory, memory.share_blocks, n.square_decay) + term * term
    v.copy_(torch.where(active, renewed.clamp_(max=torch.finfo(v.dtype).max), v))


def encode_variance_(memory: BucketMemory, messages: Messages, correction: NDArray[np.float64]) -> None:
    """Code ``sqrt(v_hat_i)`` of the share.

    Args:
        memory: the bucket; only read.
        messages: ``sent`` is written.
        correction: by parameter; see above.
    """
    v_hat = _corrected_second_moment(memory, correction)
    codes, scales, _ = _code(v_hat, memory, memory.share_blocks)
    messages.write_(messages.sent, memory.share.start, memory.share_blocks, codes, scales)


def serve_variance_(memory: BucketMemory, messages: Messages) -> None:
    """Code ``sqrt(c)`` of the chunk, ``c = mean_i(v_hat_i) + residual``; ``residual = c - what was coded``.

    c is bounded to ``[mean / 2, 2 mean]``; where the mean is 0, so are both results.

    Args:
        memory: the bucket; ``second_moment_residual`` is written.
        messages: ``received`` is read, in the order of the ranks; ``served`` is written.
    """
    assert memory.chunk is not None
    assert memory.second_moment_residual is not None
    blocks, residual, ranks = memory.chunk_blocks, memory.second_moment_residual, len(memory.share)
    mean = torch.zeros_like(residual)
    for message in messages.received.view(ranks, -1):
        mean += _decoded_square(memory, messages, message, memory.chunk, blocks) * (1 / ranks)
    c = _bounded(mean + residual, mean)
    codes, scales, coded = _code(c, memory, blocks)
    messages.write_(messages.served, memory.chunk, blocks, codes, scales)
    residual.copy_(c - coded)


def apply_variance_(memory: BucketMemory, messages: Messages | None, correction: NDArray[np.float64]) -> None:
    """Take over v: D is made of it, and of the share ``v_hat_i = v_hat_i - its own code, decoded + v_hat``.

    v_hat_i is bounded to ``[v_hat / 2, 2 v_hat]``; where v_hat is 0, so is v_i. Which elements are live is left to the
    caller.

    Args:
        memory: the bucket; ``rms_code``, ``rms_scale`` and ``second_moment`` are written.
        messages: ``sent`` and ``result`` are read.
        correction: that of :func:`encode_variance_`.
    """
    assert messages is not None
    assert memory.second_moment is not None
    assert memory.rms_code is not None
    assert memory.rms_scale is not None
    blocks = memory.share_blocks
    own = _decoded_square(memory, messages, messages.sent, memory.share.start, blocks)
    renewed = _decoded_square(memory, messages, messages.result, 0, blocks)
    v_hat = _bounded(_corrected_second_moment(memory, correction) - own + renewed, renewed)
    memory.second_moment.copy_(v_hat / _by_element(memory, blocks, correction))
    codes, scales = messages.read(messages.result, 0, (0, memory.layout.num_blocks))
    memory.rms_code.copy_(codes)
    memory.rms_scale.copy_(scales)


def _corrected_second_moment(memory: BucketMemory, correction: NDArray[np.float64]) -> Tensor:
    """v_hat_i of the share."""
    assert memory.second_moment is not None
    v_hat = memory.second_moment * _by_element(memory, memory.share_blocks, correction)
    return v_hat.clamp_(max=torch.finfo(v_hat.dtype).max)


def _bounded(v: Tensor, agreed: Tensor) -> Tensor:
    """``v`` within ``[agreed / 2, 2 agreed]``, and finite."""
    return torch.minimum(torch.maximum(v, agreed * 0.5), (agreed * 2.0).clamp_(max=torch.finfo(v.dtype).max))


def _code(v: Tensor, memory: BucketMemory, blocks: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of ``sqrt(v)``, of blocks [first, last) in flat memory, and the square of what they decode to."""
    rms = root_as_float32(v)
    scales = largest_of_blocks(rms, memory.padded(blocks))
    of_elements = memory.spread(scales, blocks)
    codes = encode_logarithm(rms, of_elements)
    return codes, scales, decode_logarithm(codes, of_elements).to(v.dtype).square()


def _decoded_square(
    memory: BucketMemory, messages: Messages, buffer: Tensor, first_chunk: int, blocks: tuple[int, int]
) -> Tensor:
    """v_hat of blocks [first, last) in flat memory, from codes in ``buffer``, in the dtype of errors."""
    codes, scales = messages.read(buffer, first_chunk, blocks)
    return decode_logarithm(codes, memory.spread(scales, blocks)).to(memory.dtype).square()


def _by_element(memory: BucketMemory, blocks: tuple[int, int], by_parameter: NDArray[np.float64]) -> Tensor:
    """Numbers of parameters, rounded to the dtype of errors, spread over blocks [first, last) in flat memory."""
    by_block = torch.from_numpy(by_parameter[memory.layout.parameter[slice(*blocks)]]).to(memory.dtype)
    return memory.spread(by_block.to(memory.device), blocks)
