"""What the ranks learn of their gradients now and then: how alike they are (r), and how well D still fits them.

Both come from the a_i of step 1, preconditioned and clamped. Nobody has their mean: its norm, tensor by tensor, is that of a
sketch (:mod:`lightning_onebit.quantize.tensor_sketch`).

**r**, one number per tensor, brings one rank's gradients to the scale of the mean's:

    r = E ||mean_i a_i||^2 / E mean_i ||a_i||^2        in [1/n, 1]

The clamp is in it so that the few coordinates with large gradients, or with a tiny D, do not decide. Second moments that go
on need it (:mod:`lightning_onebit.engine.renewal`). It is the average of a few quotients of single steps. Of the sums of
many, those of the first steps would be most, when D is too small: on a DCGAN, whose r falls from 0.95 to 0.3, D stayed a
fifth too large so. What a quotient scatters, v averages out, as it is linear in r; what it lags, v would keep.

**rho** = ||mean_i a_i||^2 per element that takes part: 1 where D is the scale of the mean gradient, 16 where gradients are
four times as large as D says. It is learned where D is never renewed as well, so that its drift is seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_onebit.comm.groups import ExchangeGroups
from lightning_onebit.engine.buckets import Buckets
from lightning_onebit.quantize.memory import StepInputs
from lightning_onebit.quantize.tensor_sketch import TensorSketch, used_columns
from lightning_onebit.refresh_schedule import SKETCH_STEPS

R_WINDOW = 2
"""Estimates that r is averaged over."""
SHORTEST_WINDOW = 4
"""Estimates that the others are at least averaged over; more where v has a long memory, but a quarter of it."""


class GradientStatistics:
    """Of the tensors of one :class:`~lightning_onebit.engine.buckets.Buckets`, which has a D.

    Args:
        buckets: the tensors.
        groups: the ranks.
    """

    def __init__(self, buckets: Buckets, groups: ExchangeGroups) -> None:
        self._buckets, self._groups = buckets, groups
        self.statistics = np.zeros((len(buckets.params), 5))
        """By parameter: the average of r; how many elements took part in the last estimate; averages of the squared mean per
        element that takes part, and of the share of clamped elements; and how many estimates there were. Float32 numbers:
        the order in which buckets were added up is not in them. The same on all ranks."""
        self.last_ratio = np.full(len(buckets.params), np.nan)
        """By parameter, the squared mean per element by the last estimate alone. NaN: not known."""
        self._columns: Tensor | None = None

    @property
    def root_r(self) -> NDArray[np.float64]:
        """sqrt(r) by parameter: sqrt(1/n) until there is an estimate."""
        r, least = self.statistics[:, 0], 1.0 / self._groups.topology.num_nodes
        return np.sqrt(np.clip(r, least, 1.0).astype(np.float32)).astype(np.float64)

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
        elements, quotient = np.maximum(live, 1), of_mean / np.where(here, squares, 1)
        self.last_ratio[here] = (of_mean / elements)[here]
        windows = self._windows()
        for column, value, window in (
            (0, quotient, R_WINDOW),
            (1, elements, 1),
            (2, of_mean / elements, windows),
            (3, clamped / elements, windows),
        ):
            weight = np.maximum(1.0 / np.maximum(statistics[:, 4], 1), 1.0 / window)
            new = statistics[:, column] + weight * (value - statistics[:, column])
            statistics[here, column] = new.astype(np.float32)[here]

    def forget_drift_(self) -> None:
        """D is another one, not made little by little: how well it fits is not known until the next estimate. r stays."""
        self.statistics[:, 2:] = 0.0
        self.last_ratio[:] = np.nan

    @property
    def drift(self) -> list[tuple[float, float, float, float, int]]:
        """By parameter: of a :class:`~lightning_onebit.freeze.drift.Drift` ``ratio`` and ``clamped``; how many elements take
        part; ``last_ratio``, ``estimates``."""
        _, elements, ratio, clamped, estimates = self.statistics.T
        rows = zip(ratio, clamped, elements, self.last_ratio, estimates, strict=True)
        return [(float(r), float(c), float(n), float(last), int(k)) for r, c, n, last, k in rows]

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
            if saved is None:  # a single rank, or an optimizer without D
                continue
            fits = isinstance(saved, Tensor) and saved.dtype == torch.float64 and saved.shape == (6,)
            if not (fits and bool((saved.isfinite() & (saved >= 0)).all())):
                raise ValueError(f"`gradient_statistics` of a parameter are {saved!r:.80}")
            *statistics, old_n = saved.tolist()
            self.statistics[i] = statistics
            if old_n != n:
                r = statistics[0]
                s = min(max((r - 1 / old_n) / (1 - 1 / old_n), 0.0), 1.0) if old_n > 1 else 0.0
                self.statistics[i, 0] = s + (1 - s) / n
                self.statistics[i, 4] = 0

    def _windows(self) -> NDArray[np.float64]:
        """Estimates that the ratio and the clamped share are averaged over, by parameter."""
        buckets = self._buckets
        steps = [1.0 / (1.0 - buckets.method.second_moment_decay(group)) for group in buckets.optimizer.param_groups]
        windows = np.maximum(SHORTEST_WINDOW, np.array(steps) / (4 * SKETCH_STEPS))
        return windows[buckets.param_group_of]
