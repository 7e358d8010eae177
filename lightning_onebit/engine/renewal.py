"""The second moment goes on while D stays: v_i on every rank, and D renewed from all of them now and then.

Each rank carries on a second moment of its own, of all coordinates, those that never had a gradient included,

    v_i = beta2 v_i + (1 - beta2) r g_i^2

which begins as Adam's v at the switch and is updated in the pass that has g at hand (:mod:`lightning_onebit.quantize`). At a
**refresh**, after the step's gradient has entered, v = mean_i v_i goes through the exchange that the signs take, as an
8-bit logarithm, and D = sqrt(v / (1 - beta2^t)) + eps is the same on all ranks from the next step on. What travels in update
space is divided by D already, so errors keep their meaning whatever D becomes. Of u = m / D it is the momentum m that goes
on: the next step's beta u becomes beta u D_old / D_new, as errors take what it is more.

r, one number per tensor, brings one rank's gradients to the scale of the mean's:

    r = E ||mean_i a_i||^2 / E mean_i ||a_i||^2        in [1/n, 1]

with the a_i of step 1: preconditioned and clamped, so that the few coordinates with large gradients, or with a tiny D, do
not decide. Nobody has the mean: its norm is that of a sketch (:mod:`lightning_onebit.quantize.tensor_sketch`). The same
numbers tell how well D still fits: the mean square of the mean gradient over D, which is 1 where it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_onebit.comm.compressed_allreduce import exchange_
from lightning_onebit.comm.groups import ExchangeGroups
from lightning_onebit.engine.buckets import Buckets
from lightning_onebit.quantize.layout import BucketLayout
from lightning_onebit.quantize.logarithm import decode_logarithm
from lightning_onebit.quantize.memory import BucketMemory, Messages, StepInputs
from lightning_onebit.quantize.tensor_sketch import TensorSketch, used_columns

SKETCH_STEPS = 16
"""Steps between estimates of r, after as many at every step."""
MOST_NUMEL = 2**20
"""Elements of the momentum that are worked on at a time: a few times as many numbers are needed meanwhile."""
SHORTEST_WINDOW = 4
"""Estimates that r is at least averaged over; more where v has a long memory, but a quarter of it: r must not lag."""


class Renewal:
    """Of one :class:`~lightning_onebit.engine.buckets.Buckets`: r of its tensors, and the refresh.

    Args:
        buckets: whose D is renewed.
        groups: the ranks.
    """

    def __init__(self, buckets: Buckets, groups: ExchangeGroups) -> None:
        self._buckets, self._groups = buckets, groups
        self.statistics = np.zeros((len(buckets.params), 5))
        """By parameter: averages of ||mean_i a_i||^2, of mean_i ||a_i||^2, of the squared mean per element that takes part,
        of the share of clamped elements, and over how many estimates. Float32 numbers: the order in which buckets were
        added up is not in them. The same on all ranks."""
        self._columns: Tensor | None = None

    @property
    def root_r(self) -> NDArray[np.float64]:
        """sqrt(r) by parameter: sqrt(1/n) until there is an estimate."""
        of_mean, mean = self.statistics[:, 0], self.statistics[:, 1]
        least = 1.0 / self._groups.topology.num_nodes
        r = np.divide(of_mean, mean, out=np.full_like(mean, least), where=mean > 0)
        return np.sqrt(np.clip(r, least, 1.0).astype(np.float32)).astype(np.float64)

    def is_sketch_due(self, step: int) -> bool:
        """Whether r is estimated at the end of optimizer step number ``step``: at each of the first 16, then every 16."""
        if self._groups.topology.num_nodes == 1:
            return False
        return step % SKETCH_STEPS == 0 or self.statistics[:, 4].max(initial=SKETCH_STEPS * self._is_empty) < SKETCH_STEPS

    @property
    def _is_empty(self) -> bool:
        return not self._buckets.memories

    def learn_(self, step: StepInputs, number: int) -> None:
        """Estimate r from the gradients of a step, with the D that it used. Collective. Waits for the device.

        Args:
            step: whose gradients are at hand.
            number: of the step, the seed of the sketches.
        """
        self.take_over_(self.estimate(step, number).cpu().numpy())

    @torch.no_grad()
    def estimate(self, step: StepInputs, number: int) -> Tensor:
        """What :meth:`learn_` learns, not yet taken over. Collective. Does not wait for the device.

        Returns:
            By parameter, means over the ranks: ||mean_i a_i||^2; of ||a_i||^2; of how many elements take part; of how many
            are clamped. float32 ``[4, parameters]``, on the device.
        """
        buckets, groups, kernels = self._buckets, self._groups, self._buckets.kernels
        numels = [p.numel() for p in buckets.params]
        sketch = TensorSketch(number, buckets.places, numels, dtype=kernels.sketch_dtype, device=buckets.device)
        for index, memory in enumerate(buckets.memories):
            kernels.sketch_tensors_(memory, index, step, sketch)
        if groups.node is not None:  # sums over the node's shares, whose gradients are means over nodes
            groups.node.all_reduce_sum_(sketch.numbers)
        if self._columns is None:
            self._columns = used_columns(numels, buckets.device)
        add = None  # one launch for all ranks
        if buckets.device_kernels is not None and buckets.memories:
            add = partial(buckets.device_kernels.add_parts_, memory=buckets.memories[0])
        return sketch.estimate(groups.peers.ordered_mean(sketch.message(self._columns), add), self._columns)

    def take_over_(self, estimate: NDArray[np.float32]) -> None:
        """Let the averages follow :meth:`estimate`, brought to the host."""
        self._average_(*estimate.astype(np.float64))

    def _average_(
        self,
        of_mean: NDArray[np.float64],
        squares: NDArray[np.float64],
        live: NDArray[np.float64],
        clamped: NDArray[np.float64],
    ) -> None:
        here = squares > 0  # a tensor without a gradient teaches nothing
        statistics = self.statistics
        statistics[here, 4] += 1
        weight = np.maximum(1.0 / np.maximum(statistics[:, 4], 1), 1.0 / self._windows())
        elements = np.maximum(live, 1)
        for column, value in enumerate((of_mean, squares, of_mean / elements, clamped / elements)):
            new = statistics[:, column] + weight * (value - statistics[:, column])
            statistics[here, column] = new.astype(np.float32)[here]

    # What a checkpoint holds

    def statistics_of(self, parameter: int) -> Tensor:
        """:attr:`statistics` of a parameter, and the number of gradients that were averaged: float64 ``[6]``."""
        return torch.tensor([*self.statistics[parameter], self._groups.topology.num_nodes], dtype=torch.float64)

    def restore_(self, shared: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Take over :meth:`statistics_of` all parameters.

        With another number of ranks, r becomes what it would be there if they had the same share s of the gradient in
        common, r = s + (1 - s) / n, and is estimated anew.

        Raises:
            ValueError: if an entry does not fit.
        """
        n = self._groups.topology.num_nodes
        for i in range(len(self.statistics)):
            saved = shared[i].get("gradient_statistics")
            if saved is None:  # D was not renewed then
                continue
            if saved.dtype != torch.float64 or saved.shape != (6,) or not bool((saved.isfinite() & (saved >= 0)).all()):
                raise ValueError(f"`gradient_statistics` of a parameter are {saved!r:.80}")
            *statistics, old_n = saved.tolist()
            self.statistics[i] = statistics
            if old_n != n:
                of_mean, mean = statistics[:2]
                r = of_mean / mean if mean else 0.0
                s = min(max((r - 1 / old_n) / (1 - 1 / old_n), 0.0), 1.0) if old_n > 1 else 0.0
                self.statistics[i, :2] = (s + (1 - s) / n) * mean, mean
                self.statistics[i, 4] = 0

    def _windows(self) -> NDArray[np.float64]:
        """Estimates that r is averaged over, by parameter."""
        buckets = self._buckets
        steps = [1.0 / (1.0 - buckets.method.second_moment_decay(group)) for group in buckets.optimizer.param_groups]
        windows = np.maximum(SHORTEST_WINDOW, np.array(steps) / (4 * SKETCH_STEPS))
        return windows[buckets.param_group_of]

    @torch.no_grad()
    def refresh_(self) -> None:
        """Renew D from the second moments of all ranks; valid from the next step on. Collective."""
        buckets, kernels = self._buckets, self._buckets.kernels
        correction = buckets.bias_corrections()
        for memory in buckets.memories:  # one after the other: messages of one bucket at a time
            if buckets.is_quantized:
                messages = memory.variance_messages()
                kernels.encode_variance_(memory, messages, correction)
                exchange_(messages, self._groups, partial(kernels.serve_variance_, memory, messages))
                self._keep_momentum_(memory, messages)
                kernels.apply_variance_(memory, messages, correction)
            else:
                blocks = (0, memory.layout.num_blocks)
                old = memory.decoded_rms(blocks)
                kernels.apply_variance_(memory, None, correction)
                memory.error.copy_(self._rescaled(memory, blocks, memory.error, old, memory.decoded_rms(blocks))[0])
            buckets.note_live_(memory, waits=not kernels.reads_flags_on_device)

    def _keep_momentum_(self, memory: BucketMemory, messages: Messages) -> None:
        """Before D is taken over: add ``beta (u D_old / D_new - u)`` to the worker errors of the share."""
        layout = memory.layout
        for blocks in _cut(layout, memory.share_blocks):
            u = self._buckets.decoded_average(memory, blocks)
            codes, scales = messages.read(messages.result, 0, blocks)
            new = decode_logarithm(codes, scales[memory.block_of(blocks)]).to(memory.dtype)
            kept, beta = self._rescaled(memory, blocks, u, memory.decoded_rms(blocks), new)
            start, stop = (layout.offset[list(blocks)] - memory.share_flat.start).tolist()
            memory.error[start:stop] += kept.sub_(u).mul_(beta)

    def _rescaled(
        self, memory: BucketMemory, blocks: tuple[int, int], u: Tensor, old: Tensor, new: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``u D_old / D_new`` of blocks [first, last), and beta of each element. At most kappa, as of any gradient."""
        buckets, n = self._buckets, self._groups.topology.num_nodes
        groups = buckets.optimizer.param_groups
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
