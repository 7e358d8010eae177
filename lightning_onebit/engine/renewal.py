"""The second moment goes on while D stays: v_i on every rank, and D renewed from all of them now and then.

Each rank carries on a second moment of its own, of all coordinates, those that never had a gradient included,

    v_i = beta2 v_i + (1 - beta2) r g_i^2

which begins as Adam's v at the switch and is updated in the pass that has g at hand (:mod:`lightning_onebit.quantize`). At a
**refresh**, after the step's gradient has entered, v = mean_i v_i goes through the exchange that the signs take, as an
8-bit logarithm, and D = sqrt(v / (1 - beta2^t)) + eps is the same on all ranks from the next step on. What travels in update
space is divided by D already, so errors keep their meaning whatever D becomes. Of u = m / D it is the momentum m that goes
on: the next step's beta u becomes beta u D_old / D_new, as errors take what it is more.

r, one number per tensor, brings one rank's gradients to the scale of the mean's
(:mod:`lightning_onebit.engine.gradient_statistics`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightning_onebit.comm.compressed_allreduce import exchange_
from lightning_onebit.comm.groups import ExchangeGroups
from lightning_onebit.engine.buckets import Buckets
from lightning_onebit.quantize.layout import BucketLayout
from lightning_onebit.quantize.logarithm import decode_logarithm
from lightning_onebit.quantize.memory import BucketMemory, Messages

MOST_NUMEL = 2**20
"""Elements of the momentum that are worked on at a time: a few times as many numbers are needed meanwhile."""


@torch.no_grad()
def refresh_(buckets: Buckets, groups: ExchangeGroups) -> None:
    """Renew D from the second moments of all ranks; valid from the next step on. Collective.

    Args:
        buckets: whose second moments go on.
        groups: the ranks.
    """
    kernels, correction = buckets.kernels, buckets.bias_corrections()
    for memory in buckets.memories:  # one after the other: messages of one bucket at a time
        if buckets.is_quantized:
            messages = memory.variance_messages()
            kernels.encode_variance_(memory, messages, correction)
            exchange_(messages, groups, partial(kernels.serve_variance_, memory, messages))
            _keep_momentum_(buckets, memory, messages)
            kernels.apply_variance_(memory, messages, correction)
        else:
            blocks = (0, memory.layout.num_blocks)
            old = memory.decoded_rms(blocks)
            kernels.apply_variance_(memory, None, correction)
            memory.error.copy_(_rescaled(buckets, memory, blocks, memory.error, old, memory.decoded_rms(blocks))[0])
        buckets.note_live_(memory, waits=not kernels.reads_flags_on_device)


def _keep_momentum_(buckets: Buckets, memory: BucketMemory, messages: Messages) -> None:
    """Before D is taken over: add ``beta (u D_old / D_new - u)`` to the worker errors of the share."""
    layout = memory.layout
    for blocks in _cut(layout, memory.share_blocks):
        u = buckets.decoded_average(memory, blocks)
        codes, scales = messages.read(messages.result, 0, blocks)
        new = decode_logarithm(codes, scales[memory.block_of(blocks)]).to(memory.dtype)
        kept, beta = _rescaled(buckets, memory, blocks, u, memory.decoded_rms(blocks), new)
        start, stop = (layout.offset[list(blocks)] - memory.share_flat.start).tolist()
        memory.error[start:stop] += kept.sub_(u).mul_(beta)


def _rescaled(
    buckets: Buckets, memory: BucketMemory, blocks: tuple[int, int], u: Tensor, old: Tensor, new: Tensor
) -> tuple[Tensor, Tensor]:
    """``u D_old / D_new`` of blocks [first, last), and beta of each element. At most kappa, as of any gradient."""
    groups, n = buckets.optimizer.param_groups, buckets.topology.num_nodes
    rows = [buckets.method.coefficients(group, 1, num_averaged=n) for group in groups]
    numbers = np.array([(row.beta, row.eps, row.kappa) for row in rows])[buckets.param_group_of]
    by_block = torch.from_numpy(numbers[memory.layout.parameter[slice(*blocks)]]).to(memory.device, memory.dtype)
    beta, eps, kappa = by_block[memory.block_of(blocks)].unbind(dim=1)
    factor = torch.where((old > 0) & (new > 0), (old + eps) / (new + eps), 1.0)
    return torch.minimum(torch.maximum(u * factor, -kappa), kappa), beta


def _cut(layout: BucketLayout, blocks: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Blocks [first, last) in ranges of at most MOST_NUMEL elements, or one block."""
    first, stop = blocks
    while first < stop:
        last = int(np.searchsorted(layout.offset, layout.offset[first] + MOST_NUMEL, side="right")) - 1
        last = min(max(last, first + 1), stop)
        yield first, last
        first = last
