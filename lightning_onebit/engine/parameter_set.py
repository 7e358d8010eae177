"""The parameters of one dtype and device, and what the present step brings for their buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_onebit.coefficients import LARGEST_VALUE, Coefficients
from lightning_onebit.comm.groups import ExchangeGroups
from lightning_onebit.comm.hierarchical import NodeAverage
from lightning_onebit.consistency.step import Outcome
from lightning_onebit.engine.buckets import Buckets
from lightning_onebit.engine.gradient_statistics import GradientStatistics
from lightning_onebit.engine.renewal import refresh_
from lightning_onebit.engine.variance import LateCoordinates, refresh_late_
from lightning_onebit.flat import flat_gradient, flat_view
from lightning_onebit.quantize.memory import StepInputs
from lightning_onebit.refresh_schedule import SKETCH_STEPS


class ParameterSet:
    """See the module.

    Args:
        buckets: of these parameters.
        groups: the ranks.
    """

    def __init__(self, buckets: Buckets, groups: ExchangeGroups) -> None:
        self.buckets = buckets
        self.late = self.find_late()
        self._groups = groups
        self.flags = torch.zeros(1 + len(buckets.params), dtype=torch.int32, device=buckets.device)
        self.node_average: NodeAverage | None = None
        self._params = [flat_view(p) for p in buckets.params]
        self.gradients: list[Tensor | None] = [None] * len(buckets.params)
        self._taken: set[int] = set()
        self._step: StepInputs | None = None
        self._share_gradient: Tensor | None = None

    @cached_property
    def statistics(self) -> GradientStatistics:
        """Of the ranks' gradients; nothing is known of them where nothing is sketched."""
        return GradientStatistics(self.buckets, self._groups)

    @property
    def is_sketched(self) -> bool:
        """Whether there is something to learn: with a D, on several ranks, or nodes where these average first."""
        return self.buckets.method.has_second_moment and self.buckets.topology.num_nodes > 1 and bool(self.buckets.memories)

    @property
    def is_sketched_often(self) -> bool:
        """Whether that is to be at every step: at first, where a second moment goes on or is collected, which needs r."""
        needs_r = self.buckets.renews or self.buckets.is_collecting
        return self.is_sketched and needs_r and self.statistics.statistics[:, 4].max() < SKETCH_STEPS

    def find_late(self) -> list[LateCoordinates]:
        """By bucket, the coordinates that are not live yet; none where all second moments go on."""
        return [] if self.buckets.renews else [LateCoordinates(self.buckets, i) for i in range(len(self.buckets.memories))]

    def step_inputs(self, num_averaged: int) -> StepInputs:
        """What the present step brings; made at the first call."""
        if self._step is None:
            self._step = StepInputs(
                params=self._flat_params(),
                gradients=self.gradients,
                numbers=self._numbers(num_averaged),
                flags=self.flags,
            )
        return self._step

    def _flat_params(self) -> list[Tensor]:
        """Flat views of the parameters, made anew only where a parameter has got other memory."""
        for i, (p, flat) in enumerate(zip(self.buckets.params, self._params, strict=True)):
            if flat.data_ptr() != p.data_ptr():
                self._params[i] = flat_view(p)
        return self._params

    def _numbers(self, num_averaged: int, *, clamps: bool = False) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The numbers of every parameter's next step: computed once for each group and step; ``clamps`` in either space."""
        buckets = self.buckets
        row_of: dict[tuple[int, int], int] = {}  # by group and number of the step
        keys = zip(buckets.param_group_of, (buckets.steps + 1).tolist(), strict=True)
        inverse = [row_of.setdefault(key, len(row_of)) for key in keys]
        groups = buckets.optimizer.param_groups
        rows: list[Coefficients] = [
            buckets.method.coefficients(groups[group], step, num_averaged=num_averaged) for group, step in row_of
        ]
        if not (buckets.divides_first or clamps):  # what is clamped in momentum space are gradients, not g / D
            rows = [row._replace(kappa=LARGEST_VALUE) for row in rows]
        if any(row.nesterov for row in rows) and not buckets.keeps_before:
            raise RuntimeError(
                "nesterov was switched on in the compressed phase, which did not keep the momentum before the last one."
                " HINT: set it when the optimizer is created."
            )
        numbers = np.array(rows, dtype=np.float64).reshape(len(rows), len(Coefficients._fields))[inverse]
        if buckets.renews or buckets.is_collecting:
            numbers[:, Coefficients._fields.index("root_r")] = self.statistics.root_r
        return numbers

    def take_gradients_(self, index: int) -> None:
        """Look up the gradients of a bucket's parameters."""
        for i in self.buckets.parameters_of_bucket[index]:
            if i not in self._taken:
                self._taken.add(i)
                self.gradients[i] = flat_gradient(self.buckets.params[i])

    def set_active_(self, outcome: Outcome, params: Sequence[Tensor]) -> None:
        """Note which parameters have a gradient on any rank."""
        if self._step is None or self._step.active is not None:
            return
        active = dict(zip(map(id, params), outcome.active, strict=True))  # to hash a tensor takes ten times as long
        self._step.active = np.array([active[id(p)] for p in self.buckets.params], dtype=bool)

    def average_inside_node_(self, index: int, *, keep: bool) -> None:
        """The mean gradient of this node for this rank's share; ``keep`` it until the step is over."""
        assert self.node_average is not None
        assert self._step is not None
        memory = self.buckets.memories[index]
        flat, kernels = self.node_average.flat_gradient(memory), self.buckets.device_kernels
        if kernels is not None:
            kernels.gather_(flat, memory, self._step)
        else:
            flat.zero_()
            for part in self.buckets.parts[index]:
                gradient = self.gradients[part.parameter]
                if gradient is not None:
                    part.of_bucket(flat).copy_(part.of_parameter(gradient))
        if keep:
            buffer = torch.empty_like(memory.error)
        else:  # one for all buckets, until the next of them
            if self._share_gradient is None:
                numel = max(each.error.numel() for each in self.buckets.memories)
                self._share_gradient = torch.empty(numel, dtype=memory.dtype, device=memory.device)
            buffer = self._share_gradient[: memory.error.numel()]
        self._step.share_gradients[index] = buffer
        self.node_average.average_(self._step.share_gradients[index], memory, kernels)

    def count_step_(self, *, late: bool) -> None:
        """Count the step of the parameters that were active.

        Args:
            late: whether nothing was committed when the gradients were encoded.
        """
        if self._step is not None and self._step.active is not None:
            self.buckets.steps += self._step.active
        if late and self._step is not None:
            for index, coordinates in enumerate(self.late):
                coordinates.collect_(index, self._step)
        for index in range(len(self.buckets.memories)):
            self.buckets.note_average_(index, None if self._step is None else self._step.active)

    def refresh_(self, groups: ExchangeGroups) -> None:
        """Renew D from second moments that go on or were collected, and let all coordinates take part. Collective."""
        if self.buckets.is_collecting:
            self.statistics.forget_drift_()
        refresh_(self.buckets, groups)
        for late in self.late:
            late.note_live_(int(self.buckets.steps.max(initial=0)))

    def refresh_late_(self, groups: ExchangeGroups) -> None:
        """Let late coordinates take part. Collective."""
        assert self._step is not None
        refresh_late_(self.late, self.buckets, groups, self._step, number=int(self.buckets.steps.max(initial=0)))

    def learn_(self, number: int) -> None:
        """Learn from the gradients of step ``number``. Collective. Waits for the device."""
        if self._step is not None:
            self.statistics.learn_(self._preconditioned(self._step), number)

    def estimate(self, number: int) -> Tensor | None:
        """What is to be learned from step ``number``; not waited for. Collective.

        Returns:
            float32 ``[4, parameters]``: see :meth:`GradientStatistics.estimate`.
        """
        if self._step is None:
            return None
        return self.statistics.estimate(self._preconditioned(self._step), number)

    def _preconditioned(self, step: StepInputs) -> StepInputs:
        """Sketches are of clamp(g / D) in momentum space, too."""
        if self.buckets.divides_first:
            return step
        return replace(step, numbers=self._numbers(self.buckets.topology.num_nodes, clamps=True))

    def forget_step_(self) -> None:
        """The step is over: gradients must not be kept alive."""
        self._step = None
        self._taken.clear()
        self.gradients[:] = [None] * len(self.gradients)
        self.flags.zero_()
