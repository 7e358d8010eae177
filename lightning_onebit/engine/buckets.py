"""The parameters of one dtype and device in flat buckets: how state gets in at the freeze, and out for checkpoints.

Between steps a bucket holds the errors, D (as sqrt(v_hat)) and the last average u, as bits. The stock optimizer's state is
empty meanwhile: its momentum and second moment live here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.coefficients import RefreshNumbers
from lightning_onebit.comm.compressed_allreduce import error_dtype
from lightning_onebit.comm.groups import ExchangeGroups
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.ranges import ElementRange, add_ranges_, first_places, merged
from lightning_onebit.flat import flat_view, unflatten_like
from lightning_onebit.methods.base import Method
from lightning_onebit.quantize import DeviceKernels, Kernels, make_kernels
from lightning_onebit.quantize.exact import ExactKernels
from lightning_onebit.quantize.layout import BITS_PER_BYTE, num_blocks, plan_buckets, sign_nbytes
from lightning_onebit.quantize.logarithm import decode_logarithm, square_root_
from lightning_onebit.quantize.memory import BucketMemory, Encoded
from lightning_onebit.quantize.reference import ReferenceKernels, pack_bits, unpack_bits


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

    # The way back

    def stock_state(self, rms_of: Callable[[Part], Tensor] | None = None) -> dict[int, dict[str, Any]]:
        """By parameter, what a stock optimizer would hold now, on the CPU if the parameters are on a GPU.

        Beside what it returns, it takes memory for one bucket and one parameter at a time. The momentum is u D. After a
        refresh, until the next step, that is with the new D: what is owed then (see :mod:`lightning_onebit.engine.renewal`)
        is among the errors.

        Args:
            rms_of: where sqrt(v_hat) of a part is from, if not from here.
        """
        stock = {}
        momentum = second_moment = torch.empty(0)
        for memory, parts in zip(self.memories, self.parts, strict=True):
            u = self.last_average(memory)
            for part in parts:
                p, values = self.params[part.parameter], part.of_bucket(u)
                if part.start == 0:
                    momentum, second_moment = (torch.empty(p.numel(), dtype=self.dtype) for _ in range(2))
                if memory.has_rms:
                    rms = part.rms if rms_of is None else rms_of(part).to(part.memory.error)
                    part.of_parameter(second_moment).copy_(rms).square_()
                    if self.divides_first:
                        values.mul_(rms + self.numbers_of(part.parameter).eps)
                part.of_parameter(momentum).copy_(values)
                if part.start + part.numel == p.numel():
                    stock[part.parameter] = self._stock_state_of(part.parameter, momentum, second_moment)
        for i, p in enumerate(self.params):
            if not p.numel():  # in no bucket
                stock[i] = self._stock_state_of(i, *(torch.empty(0, dtype=self.dtype) for _ in range(2)))
        return stock

    def _stock_state_of(self, parameter: int, momentum: Tensor, second_moment: Tensor) -> dict[str, Any]:
        p = self.params[parameter]
        like = torch.empty_like(p, device="meta", memory_format=torch.preserve_format)
        v = unflatten_like(second_moment, like) if self.method.has_second_moment else None
        steps = int(self.steps[parameter])
        return self.method.stock_state(unflatten_like(momentum, like), v, p, self.group(parameter), steps)

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

    def give_back_(self) -> None:
        """Give the optimizer its own state back."""
        stock = self.stock_state()
        for i, p in enumerate(self.params):
            # Torch keeps numbers such as `step` where they are, and tensors beside their parameter.
            state = {k: v.to(p.device) if isinstance(v, Tensor) and v.dim() else v for k, v in stock[i].items()}
            self.optimizer.state[p] = state

    def outstanding(self, mean: Any) -> dict[int, Tensor]:
        """By parameter, flat: mean worker error plus server error; ``mean`` averages a tensor in place. Collective."""
        errors = {i: torch.zeros(p.numel(), dtype=self.dtype, device=self.device) for i, p in enumerate(self.params)}
        if self.is_quantized:
            for memory, parts in zip(self.memories, self.parts, strict=True):
                # Averaged over all ranks: the nodes' worker errors, and the server error of the one that has it.
                total = torch.zeros(memory.layout.flat_numel, dtype=self.dtype, device=self.device)
                total[memory.share_flat].copy_(memory.error).mul_(self.topology.local_world_size)
                total[memory.chunk_flat].add_(memory.server_error, alpha=self.topology.world_size)
                mean(total)
                for part in parts:
                    part.of_parameter(errors[part.parameter]).copy_(part.of_bucket(total))
        return errors

    # What a checkpoint holds beside the stock state

    def worker_errors(self) -> list[ElementRange]:
        """This rank's worker errors, merged where neighbours. With one rank: u."""
        return self._merged(lambda part: part.of_share(part.memory.error))

    def server_errors(self) -> list[ElementRange]:
        """The server errors of this rank's chunks, merged where neighbours."""
        return self._merged(lambda part: part.of_chunk(part.memory.server_error))

    def _merged(self, view: Any) -> list[ElementRange]:
        """Ranges of all elements that this rank has; copies, where padding lies between."""
        parts = (part for parts in self.parts for part in parts)
        return merged(self._range(part, values) for part in parts if (values := view(part)) is not None)

    def _range(self, part: Part, values: Tensor) -> ElementRange:
        return ElementRange(self.places[part.parameter] + part.start, values)

    def add_errors_(self, worker: Sequence[ElementRange], server: Sequence[ElementRange]) -> None:
        """Add errors to those of this rank in the same places; a single rank, which has none, applies them at once."""
        if self.is_quantized:
            self._add_(lambda part: part.of_share(part.memory.error), worker)
            self._add_(lambda part: part.of_chunk(part.memory.server_error), server)
            return
        for i, p in enumerate(self.params):
            error = torch.zeros(p.numel(), dtype=self.dtype, device=self.device)
            add_ranges_([ElementRange(self.places[i], error)], [*worker, *server])
            flat_view(p).add_(error.mul_(-self.numbers_of(i).step_size))

    def take_over_errors_(
        self,
        worker: Sequence[ElementRange],
        server: Sequence[ElementRange],
        communicator: Communicator,
        groups: ExchangeGroups,
    ) -> None:
        """Add errors of which each rank tells some, whoever has their places now. Collective, bucket by bucket.

        Args:
            worker: those of this rank's node; only here, if its share of the node was and is the same.
            server: those of no other rank.
            communicator: all ranks.
            groups: the nodes.
        """
        if not self.is_quantized:
            self.add_errors_(worker, server)
            return
        for memory, parts in zip(self.memories, self.parts, strict=True):
            total = self._in_bucket(memory, parts, worker)
            if groups.averaging is not None:
                groups.averaging.all_reduce_sum_(total)
            memory.error.add_(total[memory.share_flat])
            total = self._in_bucket(memory, parts, server)
            communicator.all_reduce_sum_(total)
            memory.server_error.add_(total[memory.chunk_flat])

    def _in_bucket(self, memory: BucketMemory, parts: Sequence[Part], ranges: Sequence[ElementRange]) -> Tensor:
        """``ranges`` in flat memory of a bucket, 0 elsewhere."""
        flat = torch.zeros(memory.layout.flat_numel, dtype=self.dtype, device=self.device)
        add_ranges_([self._range(part, part.of_bucket(flat)) for part in parts], ranges)
        return flat

    def add_momentum_(self, momentum: Sequence[ElementRange]) -> None:
        """Take over u, on a single rank, after :meth:`restore_`."""
        self._add_(lambda part: part.of_share(part.memory.error), momentum)

    def second_moments(self) -> list[ElementRange]:
        """v_i of this rank's share, merged where neighbours; none where D stays."""
        return self._merged(_second_moment) if self.renews else []

    def second_moment_residuals(self) -> list[ElementRange]:
        """What this rank's chunks have not passed on of v, merged where neighbours; none where D stays."""
        return self._merged(_residual) if self.renews and self.is_quantized else []

    def collected(self) -> list[ElementRange]:
        """v_i of this rank's share as far as it is collected, merged where neighbours."""
        return self._merged(_second_moment) if self.is_collecting else []

    def add_collected_(self, collected: Sequence[ElementRange]) -> None:
        """Take over :meth:`collected`, after :meth:`restore_`."""
        if self.is_collecting:
            self._add_(_second_moment, collected)

    def add_second_moments_(self, second_moments: Sequence[ElementRange], residuals: Sequence[ElementRange]) -> None:
        """Add what an earlier run had of them, after :meth:`restore_`, which sets them to zero."""
        if self.renews:
            self._add_(_second_moment, second_moments)
            if self.is_quantized:
                self._add_(_residual, residuals)

    def complete_second_moments_(self) -> None:
        """Where an earlier run told no v_i, it begins as v. Where it did, none that takes part is 0."""
        if not self.renews:
            return
        corrections = self.bias_corrections()
        for part in (part for parts in self.parts for part in parts):
            v = _second_moment(part)
            if v is not None:
                v.copy_(torch.where(v == 0, part.rms.square_().div_(corrections[part.parameter]), v))

    def _add_(self, view: Any, sources: Sequence[ElementRange]) -> None:
        parts = (part for parts in self.parts for part in parts)
        add_ranges_([self._range(part, values) for part in parts if (values := view(part)) is not None], sources)

    def shared_state(self) -> dict[int, dict[str, Tensor]]:
        """By parameter, what all ranks know and stock state does not tell exactly; restored by :meth:`restore_`.

        * ``rms``: sqrt(v_hat), ``[numel]``, in the dtype of the errors; or, where it is renewed by several ranks,
          ``rms_code`` and ``rms_scale``: its 8-bit logarithm, uint8 ``[numel]``, float32 ``[blocks]``. Only if there is a D.
        * ``step``: int64, 0-d.
        * ``common_share``: numerator and denominator of s, float64 ``[2]``; only if it is known.
        * ``collected``: steps that a second moment has been collected for, int64, 0-d; only if one is.
        * ``signs``, ``scales``: the last average; uint8 ``[ceil(numel / 8)]``, float32 ``[blocks]``. With one rank: none.
        * ``live``, ``live_before``: as signs: where an element takes part in its block, and did in the last average; only
          if not all do.
        """
        collected: list[dict[str, list[Tensor]]] = [{} for _ in self.params]
        for part in (part for parts in self.parts for part in parts):
            entry, memory = collected[part.parameter], part.memory
            if memory.rms is not None:
                entry.setdefault("rms", []).append(part.of_bucket(memory.rms))
            if memory.rms_code is not None:
                assert memory.rms_scale is not None
                entry.setdefault("rms_code", []).append(part.of_bucket(memory.rms_code))
                entry.setdefault("rms_scale", []).append(memory.rms_scale[slice(*part.blocks)])
            if self.is_quantized:
                entry.setdefault("signs", []).append(part.average.signs)
                entry.setdefault("scales", []).append(part.average.scales)
            for name in ("live", "live_before"):
                mask = getattr(memory, name)
                everything = torch.full((sign_nbytes(part.numel),), 255, dtype=torch.uint8, device=self.device)
                entry.setdefault(name, []).append(everything if mask is None else part.of_bits(mask))
        shared: dict[int, dict[str, Tensor]] = {}
        for i, entry in enumerate(collected):
            joined = {name: torch.cat(values) for name, values in entry.items()}
            for name in ("live", "live_before"):
                if name in joined and _all_set(joined[name], self.params[i].numel()):
                    del joined[name]
            shared[i] = {"step": torch.tensor(int(self.steps[i])), **joined}
            if self.common_share[1, i]:
                shared[i]["common_share"] = self.common_share[:, i].clone()
            if self.is_collecting:
                shared[i]["collected"] = torch.tensor(int(self.collected_steps[i]))
        return shared

    def restore_(self, shared: Mapping[int, Mapping[str, Tensor]], *, block_size: int) -> None:
        """Take over what :meth:`shared_state` returned, bit for bit. What the worker errors are left with is to be added to.

        Cut into blocks of another size, the last average cannot be taken over: then the worker errors stay as the stock
        momentum has made them, which says the same in other bits.

        Raises:
            ValueError: if an entry does not fit its parameter.
        """
        for i, p in enumerate(self.params):
            self._check_shared_state(shared[i], p.numel(), block_size)
            self.steps[i] = int(shared[i]["step"])
            self.common_share[:, i] = shared[i].get("common_share", torch.zeros(2))
        if any("collected" in shared[i] for i in range(len(self.params))) and self.can_collect:
            self.collect_()
            self.collects_since = self.steps - np.array(
                [int(shared[i].get("collected", 0)) for i in range(len(self.params))]
            )
        was_quantized = any("signs" in shared[i] for i in range(len(self.params)))
        same_blocks = was_quantized == self.is_quantized and block_size == self.config.block_size
        for memory, parts in zip(self.memories, self.parts, strict=True):
            if memory.has_rms:
                self._restore_rms_(memory, parts, shared, block_size)
            if memory.second_moment is not None:
                memory.second_moment.zero_()
            for name in ("live", "live_before"):
                if any(name in shared[part.parameter] for part in parts):
                    mask = torch.full((memory.layout.flat_numel // BITS_PER_BYTE,), 255, dtype=torch.uint8)
                    for part in parts:
                        bits = shared[part.parameter].get(name)
                        if bits is not None:
                            part.of_bits(mask).copy_(bits[part.start // 8 :][: sign_nbytes(part.numel)])
                    setattr(memory, name, mask.to(self.device))
                else:
                    setattr(memory, name, None)
            if not same_blocks:
                memory.live_before = memory.live
                continue
            memory.error.fill_(-0.0)  # to which everything, zeros with their signs as well, adds to itself
            memory.error[~torch.from_numpy(memory.layout.exists(memory.share_blocks))] = 0.0
            if self.is_quantized:
                for part in parts:
                    entry, average = shared[part.parameter], part.average
                    first = part.start // block_size
                    average.signs.copy_(entry["signs"][part.start // 8 :][: sign_nbytes(part.numel)])
                    average.scales.copy_(entry["scales"][first : first + part.blocks[1] - part.blocks[0]])

    def _restore_rms_(
        self, memory: BucketMemory, parts: Sequence[Part], shared: Mapping[int, Mapping[str, Tensor]], block_size: int
    ) -> None:
        entries = [shared[part.parameter] for part in parts]
        if memory.rms_code is not None and block_size == self.config.block_size and all("rms_code" in e for e in entries):
            assert memory.rms_scale is not None
            memory.rms_code.zero_()
            for part, entry in zip(parts, entries, strict=True):
                first, (start, stop) = part.start // block_size, part.blocks
                part.of_bucket(memory.rms_code).copy_(part.of_parameter(entry["rms_code"]))
                memory.rms_scale[start:stop].copy_(entry["rms_scale"][first : first + stop - start])
            return
        rms = torch.zeros(memory.layout.flat_numel, dtype=self.dtype, device=self.device)
        for part in parts:
            part.of_bucket(rms).copy_(self.saved_rms(shared, block_size, part))
        memory.set_rms_(rms)

    def saved_rms(self, shared: Mapping[int, Mapping[str, Tensor]], block_size: int, part: Part) -> Tensor:
        """sqrt(v_hat) of a part as :meth:`shared_state` has it, on the CPU: the same bits when it is coded again."""
        entry = shared[part.parameter]
        if "rms_code" not in entry:
            return part.of_parameter(entry["rms"])
        first, last = part.start // block_size, num_blocks(part.start + part.numel, block_size)  # which may begin before
        codes = entry["rms_code"][first * block_size : last * block_size]
        scales = np.repeat(entry["rms_scale"][first:last].numpy(), block_size)[: len(codes)]
        return decode_logarithm(codes, torch.from_numpy(scales))[part.start - first * block_size :][: part.numel]

    def _check_shared_state(self, entry: Any, numel: int, block_size: int) -> None:
        if not isinstance(entry, Mapping):
            raise ValueError(f"the entry of a parameter is {entry!r:.80}")
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"step": (torch.int64, ())}
        if "common_share" in entry:
            expected["common_share"] = (torch.float64, (2,))
        if "collected" in entry:
            expected["collected"] = (torch.int64, ())
        if self.method.has_second_moment and numel:  # a parameter without elements is in no bucket
            if "rms_code" in entry:
                expected["rms_code"] = (torch.uint8, (numel,))
                expected["rms_scale"] = (torch.float32, (num_blocks(numel, block_size),))
            else:
                expected["rms"] = (self.dtype, (numel,))
        if "signs" in entry:
            expected["signs"] = (torch.uint8, (sign_nbytes(numel),))
            expected["scales"] = (torch.float32, (num_blocks(numel, block_size),))
        for name in ("live", "live_before"):
            if name in entry:
                expected[name] = (torch.uint8, (sign_nbytes(numel),))
        for name, (dtype, shape) in expected.items():
            value = entry.get(name)
            if not isinstance(value, Tensor) or value.dtype != dtype or value.shape != shape:
                raise ValueError(
                    f"`{name}` of a parameter of {numel} elements must be {dtype} {list(shape)}, not {value!r:.80}"
                )
        if "collected" in entry and not 0 <= int(entry["collected"]) <= int(entry["step"]):
            raise ValueError(f"`collected` is {int(entry['collected'])} of {int(entry['step'])} steps")
        for name in ("rms", "rms_scale", "scales"):
            if name in expected and not bool((entry[name].isfinite() & (entry[name] >= 0)).all()):
                raise ValueError(f"`{name}` holds infinite, NaN or negative values")

    def replicated_state(self) -> Iterator[tuple[Tensor, str, Iterable[Tensor]]]:
        """See :class:`~lightning_onebit.consistency.divergence.HasReplicatedState`."""
        for part in (part for parts in self.parts for part in parts):
            p, memory = self.params[part.parameter], part.memory
            if self.is_quantized:
                masks = [] if memory.live_before is None else [part.of_bits(memory.live_before)]
                yield p, "momentum", [*part.average, *masks]
            second_moment = [] if memory.rms is None else [part.of_bucket(memory.rms)]
            if memory.rms_code is not None:
                assert memory.rms_scale is not None
                second_moment = [part.of_bucket(memory.rms_code), memory.rms_scale[slice(*part.blocks)]]
            yield p, "second moment", [*second_moment, *([] if memory.live is None else [part.of_bits(memory.live)])]


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


def _all_set(mask: Tensor, numel: int) -> bool:
    """Whether the first ``numel`` bits are set."""
    whole = numel // BITS_PER_BYTE
    return bool((mask[:whole] == 255).all()) and bool(unpack_bits(mask[whole:])[: numel - whole * BITS_PER_BYTE].all())


def _second_moment(part: Part) -> Tensor | None:
    assert part.memory.second_moment is not None
    return part.of_share(part.memory.second_moment)


def _residual(part: Part) -> Tensor | None:
    assert part.memory.second_moment_residual is not None
    return part.of_chunk(part.memory.second_moment_residual)
