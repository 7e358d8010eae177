"""The parameters of one dtype and device in flat buckets: how state gets in at the freeze, and out for checkpoints.

Between steps a bucket holds the errors, D (as sqrt(v_hat)) and the last average u, as bits. The stock optimizer's state is
empty meanwhile: its momentum and second moment live here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.coefficients import RefreshNumbers
from lightning_onebit.comm.groups import ExchangeGroups
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.ranges import first_places
from lightning_onebit.flat import flat_view
from lightning_onebit.methods.base import Method
from lightning_onebit.quantize import DeviceKernels, Kernels, make_kernels
from lightning_onebit.quantize.exact import ExactKernels
from lightning_onebit.quantize.layout import BITS_PER_BYTE, plan_buckets, sign_nbytes
from lightning_onebit.quantize.logarithm import square_root_
from lightning_onebit.quantize.memory import BucketMemory, Encoded, error_dtype
from lightning_onebit.quantize.reference import ReferenceKernels, pack_bits


@dataclass(frozen=True)
class Part:
    """Neighbouring blocks of one parameter in one chunk of a bucket."""

    memory: BucketMemory
    parameter: int
    blocks: tuple[int, int]
    start: int
    """First element in the flattened parameter."""
    numel: int
    flat: int
    """First element in the bucket's memory."""

    def of_parameter(self, flat: Tensor) -> Tensor:
        """These elements of the flat parameter, or of something of its size."""
        return flat[self.start : self.start + self.numel]

    def of_bucket(self, flat: Tensor) -> Tensor:
        """These elements in flat memory of the whole bucket."""
        return flat[self.flat : self.flat + self.numel]

    def of_share(self, flat: Tensor) -> Tensor | None:
        """These elements in flat memory of this rank's share; ``None`` if they are another's."""
        share = self.memory.share_flat
        inside = share.start <= self.flat and self.flat + self.numel <= share.stop
        return flat[self.flat - share.start :][: self.numel] if inside else None

    def of_chunk(self, flat: Tensor) -> Tensor | None:
        """These elements in flat memory of the chunk that this rank serves; ``None`` if another does."""
        if self.memory.chunk is None:
            return None
        chunk = self.memory.chunk_flat
        inside = chunk.start <= self.flat and self.flat + self.numel <= chunk.stop
        return flat[self.flat - chunk.start :][: self.numel] if inside else None

    def of_bits(self, mask: Tensor) -> Tensor:
        """The bytes of these elements in a mask of the whole bucket."""
        return mask[self.flat // BITS_PER_BYTE :][: sign_nbytes(self.numel)]

    @property
    def rms(self) -> Tensor:
        """sqrt(v_hat), a new tensor ``[numel]``."""
        return self.memory.decoded_rms(self.blocks)[: self.numel]

    @property
    def average(self) -> Encoded:
        """The last average u, views."""
        return self.memory.encoded(self.memory.result, 0, self.blocks)


class Buckets:
    """Flat memory for parameters of one dtype and device, with the state that an optimizer had at the freeze.

    Args:
        optimizer: whose state moves here, bucket by bucket, and is empty afterwards.
        method: what it is.
        params: the parameters, in the order in which they travel.
        config: settings of the compression.
        groups: the ranks that exchange. With one rank nothing is quantized: errors hold u itself.
        keeps_before: whether the last average but one is kept; it always is where kernels may take a step back.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        method: Method,
        params: Sequence[Tensor],
        config: CompressionConfig,
        groups: ExchangeGroups,
        *,
        keeps_before: bool,
    ) -> None:
        self.optimizer, self.method, self.params, self.config = optimizer, method, list(params), config
        self.topology = groups.topology
        self.device, self.dtype = params[0].device, error_dtype(params[0].dtype)
        self.is_quantized = self.topology.world_size > 1
        self.renews = config.renews_variance and method.has_second_moment
        """Whether second moments go on, so that D can be renewed."""
        self.collects_since: NDArray[np.int64] | None = None
        """:attr:`steps` when a second moment began to be collected; ``None``: none is. Where they go on, none ever is."""
        self.keeps_before = keeps_before or not self.is_quantized  # a single rank knows it anyway
        in_group = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.param_group_of = [in_group[p] for p in self.params]
        self.steps = np.array([method.steps_done(optimizer.state.get(p, {})) for p in self.params], dtype=np.int64)
        """Steps of each parameter, those of the warm-up included."""
        self.common_share = torch.zeros(2, len(self.params), dtype=torch.float64)
        """Numerator and denominator of each tensor's s (see :mod:`lightning_onebit.engine.variance`), on the CPU."""
        places = first_places(optimizer)
        self.places = [places[p] for p in self.params]
        # One for each thread: they own their workspaces.
        self.kernels, self.server_kernels = (self._make_kernels() for _ in range(2))

        numels = [p.numel() for p in self.params]
        layouts = plan_buckets(
            numels,
            block_size=config.block_size,
            num_chunks=self.topology.world_size,
            bucket_numel=config.bucket_numel(sum(numels)),
        )
        self.memories: list[BucketMemory] = []
        self.parts: list[list[Part]] = []
        for layout in layouts:
            # Bucket by bucket, as the stock state is freed: no second copy of all of it.
            memory = BucketMemory(
                layout,
                share=self.topology.share,
                chunk=self.topology.chunk if self.is_quantized else None,
                has_rms=method.has_second_moment,
                renews=self.renews,
                keeps_before=keeps_before or self.kernels.reads_flags_on_device,
                dtype=self.dtype,
                device=self.device,
                parameter_numels=numels,
            )
            parts = list(_parts(memory))
            self.memories.append(memory)
            self.parts.append(parts)
            self._take_state_(memory, parts)
        for p in self.params:
            optimizer.state.pop(p, None)

    def _make_kernels(self) -> Kernels:
        if not self.is_quantized:
            return ExactKernels()
        return make_kernels(self.config, device=self.device, dtype=self.dtype)

    @property
    def device_kernels(self) -> DeviceKernels | None:
        """The kernels, if they work on whole buckets and never have the host wait."""
        return cast(DeviceKernels, self.kernels) if self.kernels.reads_flags_on_device else None

    def common_share_of(self, parameter: int) -> float:
        """s, the share of a tensor's gradient that the ranks have in common, in [0, 1]; 0 if nothing is known.

        Rounded to float32, for which it does not matter in which order, that of the buckets, squares were added.
        """
        numerator, denominator = self.common_share[:, parameter].tolist()
        return float(np.float32(min(max(numerator / denominator, 0.0), 1.0))) if denominator > 0 else 0.0

    def group(self, parameter: int) -> dict[str, Any]:
        """The parameter's group, looked up anew, as ``load_state_dict`` replaces them."""
        return self.optimizer.param_groups[self.param_group_of[parameter]]

    @cached_property
    def parameters_of_bucket(self) -> list[list[int]]:
        """For each bucket, the parameters of which it holds elements."""
        return [sorted({part.parameter for part in parts}) for parts in self.parts]

    # The freeze: D = sqrt(v_hat) + eps;  u = m / D;  errors e_i = s = 0

    def _take_state_(self, memory: BucketMemory, parts: Sequence[Part]) -> None:
        """Move the state of a bucket's parameters here.

        The first compressed step adds beta u, and an error of zero, to a last average of zero: put beta u into the error's
        place. So the momentum needs no dense copy. A single rank keeps u itself there, for it has no error.
        """
        if memory.has_rms:
            self._take_second_moment_(memory, parts)
        for part in parts:
            p, group = self.params[part.parameter], self.group(part.parameter)
            momentum, error = self.method.momentum(self.optimizer.state.get(p, {})), part.of_share(memory.error)
            if momentum is not None and error is not None:
                self._set_momentum_(error, part, part.of_parameter(flat_view(momentum)), group)
            if part.start + part.numel == p.numel():
                self.optimizer.state.pop(p, None)

    def _take_second_moment_(self, memory: BucketMemory, parts: Sequence[Part]) -> None:
        """D of a bucket, and v_i, which begins as Adam's v."""
        rms = torch.zeros(memory.layout.flat_numel, dtype=self.dtype, device=self.device)
        corrections = self.bias_corrections()
        for part in parts:
            v_hat = self._stock_second_moment(part.parameter)
            if v_hat is None:
                continue
            square_root_(part.of_parameter(v_hat).to(self.dtype), out=part.of_bucket(rms))
            v = None if memory.second_moment is None else part.of_share(memory.second_moment)
            if v is not None:
                v.copy_(part.of_parameter(v_hat)).div_(corrections[part.parameter])
        self._second_moment = None
        memory.set_rms_(rms)
        self.note_live_(memory)
        memory.live_before = memory.live

    _second_moment: tuple[int, Tensor] | None = None

    def _stock_second_moment(self, parameter: int) -> Tensor | None:
        """v_hat of a parameter, flat; computed once for all of its parts."""
        if self._second_moment is None or self._second_moment[0] != parameter:
            p = self.params[parameter]
            v_hat = self.method.second_moment(self.optimizer.state.get(p, {}), self.group(parameter))
            if v_hat is None:
                return None
            self._second_moment = parameter, flat_view(v_hat)
        return self._second_moment[1]

    # Where second moments do not go on, one may be collected for a refresh: see :mod:`lightning_onebit.engine.renewal`

    def collect_(self) -> None:
        """Begin to collect a second moment, or begin anew."""
        for memory in self.memories:
            memory.collect_()
        self.collects_since = self.steps.copy()

    @property
    def can_collect(self) -> bool:
        """Whether there is a D that is frozen for good, and could be another without a change of what errors mean."""
        return self.method.has_second_moment and not self.renews and self.config.space == "update"

    @property
    def is_collecting(self) -> bool:
        return self.collects_since is not None

    @property
    def collected_steps(self) -> NDArray[np.int64]:
        """By parameter, for how many of its steps a second moment has been collected; 0 if none is."""
        return np.zeros_like(self.steps) if self.collects_since is None else self.steps - self.collects_since

    def bias_corrections(self) -> NDArray[np.float64]:
        """By parameter, v_hat / v = 1 / (1 - beta2^t) with the steps t that v has seen."""
        decays = np.array([self.method.second_moment_decay(group) for group in self.optimizer.param_groups])
        seen = self.collected_steps if self.is_collecting else self.steps
        # A parameter that has made no step has v = 0, whatever it is multiplied by.
        return 1.0 / (1.0 - decays[self.param_group_of] ** np.maximum(seen, 1))

    def refresh_numbers(self) -> RefreshNumbers:
        """What a refresh needs of each parameter."""
        groups = [self.method.coefficients(group, 1, num_averaged=1) for group in self.optimizer.param_groups]
        beta, eps = np.array([[each.beta, each.eps] for each in groups])[self.param_group_of].T
        return RefreshNumbers(self.bias_corrections(), beta, eps)

    def _set_momentum_(self, error: Tensor, part: Part, momentum: Tensor, group: Mapping[str, Any]) -> None:
        error.copy_(momentum)
        memory, step = part.memory, int(self.steps[part.parameter])
        c = self.method.coefficients(group, max(1, step), num_averaged=1)
        if memory.has_rms and self.divides_first:
            rms = part.rms
            error.div_(rms + c.eps).masked_fill_(rms == 0, 0.0)
        if self.is_quantized:
            # With nesterov, step 6 will look back at a last average of zero, not at u. The later steps make up for that, so
            # that what u moves the parameter in all is the same, (m^2 + m^3 + ...) u, if the error begins with m^2 u.
            error.mul_(c.beta * (c.nesterov or 1.0))

    @property
    def divides_first(self) -> bool:
        """Whether values are divided by D before they are quantized; a single rank decides so for itself."""
        return self.config.space == "update" or not self.is_quantized

    def note_live_(self, memory: BucketMemory, *, waits: bool = True) -> None:
        """Elements with a second moment take part.

        Args:
            memory: the bucket.
            waits: whether the device may be waited for, to see whether all do; without, there is a mask in any case.
        """
        rms = memory.rms if memory.rms_code is None else memory.rms_code
        assert rms is not None
        live = rms != 0
        if waits and bool((live | ~torch.from_numpy(memory.layout.exists()).to(self.device)).all()):
            memory.live = None
        else:
            memory.live = pack_bits(live)

    def note_average_(self, index: int, active: np.ndarray[Any, Any] | None) -> None:
        """There is a new average: note which elements took part in it. Parameters that sat out keep theirs."""
        memory, old = self.memories[index], self.memories[index].live_before
        memory.live_before = memory.live
        if active is None or old is None or old is memory.live or bool(active[self.parameters_of_bucket[index]].all()):
            return
        merged = torch.full_like(old, 255) if memory.live is None else memory.live.clone()
        for part in self.parts[index]:
            if not active[part.parameter]:
                part.of_bits(merged).copy_(part.of_bits(old))
        memory.live_before = merged

    def numbers_of(self, parameter: int) -> Any:
        """The numbers of the parameter's present step."""
        step = max(1, int(self.steps[parameter]))
        return self.method.coefficients(self.group(parameter), step, num_averaged=self.topology.num_nodes)

    def last_average(self, memory: BucketMemory) -> Tensor:
        """u of a bucket, flat, a new tensor: 0 where elements are not live."""
        if not self.is_quantized:
            return memory.error.clone()
        blocks = (0, memory.layout.num_blocks)
        decoded = ReferenceKernels().decode(memory, memory.result, 0, blocks, memory.live_before)
        return decoded.add_(0.0)  # no negative zeros

    def squared_norms(self, memory: BucketMemory) -> tuple[float, float]:
        """||e||^2 and ||u||^2 of this rank's share of a bucket: scales and masks tell that of u. Waits for the device."""
        error = float(memory.error.norm().double().square())
        if not self.is_quantized:  # errors are u itself
            return 0.0, error
        numels = memory.numels(memory.share_blocks, memory.live_before)
        scales = memory.read_scales(memory.result, 0, memory.share_blocks).double()
        return error, float(scales.square() @ numels.double())


def _parts(memory: BucketMemory) -> Iterator[Part]:
    layout = memory.layout
    for parameter, first, last in layout.parameter_blocks():
        yield Part(
            memory=memory,
            parameter=parameter,
            blocks=(first, last),
            start=int(layout.start[first]),
            numel=int(layout.numel[first:last].sum()),
            flat=int(layout.offset[first]),
        )
