"""The second moment goes on while D stays: v_i on every rank, and D renewed from all of them now and then.

Each rank carries on a second moment of its own, of all coordinates, those that never had a gradient included,

    v_i = beta2 v_i + (1 - beta2) r g_i^2

which begins as Adam's v at the switch and is updated in the pass that has g at hand (:mod:`lightning_onebit.quantize`). At a
**refresh**, after the step's gradient has entered, v = mean_i v_i goes through the exchange that the signs take, as an
8-bit logarithm, and D = sqrt(v / (1 - beta2^t)) + eps is the same on all ranks from the next step on. What travels in update
space is divided by D already, so errors stay as they are whatever D becomes. The momentum is u D, and is to stay, too: the
next step will add beta u, and is owed ``beta u (min(D_old / D_new, 1.25) - 1)`` more, as an error.

r, one number per tensor, brings one rank's gradients to the scale of the mean's
(:mod:`lightning_onebit.engine.gradient_statistics`).

Where D is frozen for good, v_i goes on nowhere. A refresh that is asked for there **collects** first: v_i begins with zero,
for every rank, and after 16 steps of the optimizer the refresh is made of it alone, with the bias correction of the steps
that the parameter has made meanwhile,

    D = sqrt(v / (1 - beta2^k)) + eps,    v = mean_i sum_j (1 - beta2) beta2^(k - j) r g_ij^2    for the k <= 16 last steps

so that nothing of the old D is left. Until then D stays, and so it does where no rank had a gradient. Coordinates that never
had one before take part from then on; late ones are renewed on as without it (:mod:`lightning_onebit.engine.variance`).
Then v_i is freed.
"""

from __future__ import annotations

from functools import partial

import torch

from lightning_onebit.comm.compressed_allreduce import exchange_
from lightning_onebit.comm.groups import ExchangeGroups
from lightning_onebit.engine.buckets import Buckets


@torch.no_grad()
def refresh_(buckets: Buckets, groups: ExchangeGroups) -> None:
    """Renew D from the second moments of all ranks; valid from the next step on. Collective.

    Args:
        buckets: whose second moments go on, or were collected: then they are freed.
        groups: the ranks.
    """
    kernels, numbers = buckets.kernels, buckets.refresh_numbers()
    for memory in buckets.memories:  # one after the other: messages of one bucket at a time
        before = memory.begin_refresh_() if buckets.is_collecting else None
        messages = memory.variance_messages() if buckets.is_quantized else None
        if messages is not None:
            kernels.encode_variance_(memory, messages, numbers.correction)
            exchange_(messages, groups, partial(kernels.serve_variance_, memory, messages))
        kernels.apply_variance_(memory, messages, numbers)
        if before is not None:
            memory.end_refresh_(before)
        buckets.note_live_(memory, waits=not kernels.reads_flags_on_device)
    buckets.collects_since = None
