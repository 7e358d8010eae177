"""What the buckets of one dtype and device hold, in the order of their parameters: to be saved, restored and handed on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_onebit.comm.groups import ExchangeGroups
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.engine.buckets import Buckets, Part
from lightning_onebit.engine.ranges import ElementRange, add_ranges_, merged
from lightning_onebit.flat import flat_view, unflatten_like
from lightning_onebit.quantize.layout import BITS_PER_BYTE, num_blocks, sign_nbytes
from lightning_onebit.quantize.logarithm import decode_logarithm
from lightning_onebit.quantize.memory import BucketMemory
from lightning_onebit.quantize.reference import unpack_bits


class BucketState:
    """Reads and writes the flat memory of ``buckets`` by parameter, in ranges of elements that tell where they belong."""

    def __init__(self, buckets: Buckets) -> None:
        self.buckets = buckets
        self.params, self.dtype, self.device = buckets.params, buckets.dtype, buckets.device
        self.memories, self.parts = buckets.memories, buckets.parts
        self.is_quantized = buckets.is_quantized

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
            u = self.buckets.last_average(memory)
            for part in parts:
                p, values = self.params[part.parameter], part.of_bucket(u)
                if part.start == 0:
                    momentum, second_moment = (torch.empty(p.numel(), dtype=self.dtype) for _ in range(2))
                if memory.has_rms:
                    rms = part.rms if rms_of is None else rms_of(part).to(part.memory.error)
                    part.of_parameter(second_moment).copy_(rms).square_()
                    if self.buckets.divides_first:
                        values.mul_(rms + self.buckets.numbers_of(part.parameter).eps)
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
        v = unflatten_like(second_moment, like) if self.buckets.method.has_second_moment else None
        steps = int(self.buckets.steps[parameter])
        return self.buckets.method.stock_state(unflatten_like(momentum, like), v, p, self.buckets.group(parameter), steps)

    def give_back_(self) -> None:
        """Give the optimizer its own state back."""
        stock = self.stock_state()
        for i, p in enumerate(self.params):
            # Torch keeps numbers such as `step` where they are, and tensors beside their parameter.
            state = {k: v.to(p.device) if isinstance(v, Tensor) and v.dim() else v for k, v in stock[i].items()}
            self.buckets.optimizer.state[p] = state

    def outstanding(self, mean: Any) -> dict[int, Tensor]:
        """By parameter, flat: mean worker error plus server error; ``mean`` averages a tensor in place. Collective."""
        errors = {i: torch.zeros(p.numel(), dtype=self.dtype, device=self.device) for i, p in enumerate(self.params)}
        if self.is_quantized:
            for memory, parts in zip(self.memories, self.parts, strict=True):
                # Averaged over all ranks: the nodes' worker errors, and the server error of the one that has it.
                total = torch.zeros(memory.layout.flat_numel, dtype=self.dtype, device=self.device)
                total[memory.share_flat].copy_(memory.error).mul_(self.buckets.topology.local_world_size)
                total[memory.chunk_flat].add_(memory.server_error, alpha=self.buckets.topology.world_size)
                mean(total)
                for part in parts:
                    part.of_parameter(errors[part.parameter]).copy_(part.of_bucket(total))
        return errors

    def worker_errors(self) -> list[ElementRange]:
        """This rank's worker errors, merged where neighbours; on the CPU, as all ranges here. With one rank: u."""
        return self._merged(lambda part: part.of_share(part.memory.error))

    def server_errors(self) -> list[ElementRange]:
        """The server errors of this rank's chunks, merged where neighbours."""
        return self._merged(lambda part: part.of_chunk(part.memory.server_error))

    def _merged(self, view: Any) -> list[ElementRange]:
        """Ranges of all elements that this rank has, on the CPU."""
        parts = (part for parts in self.parts for part in parts)
        return merged(self._range(part, values) for part in parts if (values := view(part)) is not None)

    def _range(self, part: Part, values: Tensor) -> ElementRange:
        return ElementRange(self.buckets.places[part.parameter] + part.start, values)

    def add_errors_(self, worker: Sequence[ElementRange], server: Sequence[ElementRange]) -> None:
        """Add errors to those of this rank in the same places; a single rank, which has none, applies them at once."""
        if self.is_quantized:
            self._add_(lambda part: part.of_share(part.memory.error), worker)
            self._add_(lambda part: part.of_chunk(part.memory.server_error), server)
            return
        for i, p in enumerate(self.params):
            error = torch.zeros(p.numel(), dtype=self.dtype, device=self.device)
            add_ranges_([ElementRange(self.buckets.places[i], error)], [*worker, *server])
            flat_view(p).add_(error.mul_(-self.buckets.numbers_of(i).step_size))

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
        return self._merged(_second_moment) if self.buckets.renews else []

    def second_moment_residuals(self) -> list[ElementRange]:
        """What this rank's chunks have not passed on of v, merged where neighbours; none where D stays."""
        return self._merged(_residual) if self.buckets.renews and self.is_quantized else []

    def collected(self) -> list[ElementRange]:
        """v_i of this rank's share as far as it is collected, merged where neighbours."""
        return self._merged(_second_moment) if self.buckets.is_collecting else []

    def add_collected_(self, collected: Sequence[ElementRange]) -> None:
        """Take over :meth:`collected`, after :meth:`restore_`."""
        if self.buckets.is_collecting:
            self._add_(_second_moment, collected)

    def add_second_moments_(self, second_moments: Sequence[ElementRange], residuals: Sequence[ElementRange]) -> None:
        """Add what an earlier run had of them, after :meth:`restore_`, which sets them to zero."""
        if self.buckets.renews:
            self._add_(_second_moment, second_moments)
            if self.is_quantized:
                self._add_(_residual, residuals)

    def complete_second_moments_(self) -> None:
        """Where an earlier run told no v_i, it begins as v. Where it did, none that takes part is 0."""
        if not self.buckets.renews:
            return
        corrections = self.buckets.bias_corrections()
        for part in (part for parts in self.parts for part in parts):
            v = _second_moment(part)
            if v is not None:
                v.copy_(torch.where(v == 0, part.rms.square_().div_(corrections[part.parameter]), v))

    def _add_(self, view: Any, sources: Sequence[ElementRange]) -> None:
        parts = (part for parts in self.parts for part in parts)
        add_ranges_([self._range(part, values) for part in parts if (values := view(part)) is not None], sources)

    def shared_state(self) -> dict[int, dict[str, Tensor]]:
        """By parameter, what all ranks know and stock state does not tell exactly; restored by :meth:`restore_`. On the CPU.

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
                everything = torch.full((sign_nbytes(part.numel),), 255, dtype=torch.uint8)
                entry.setdefault(name, []).append(everything if mask is None else part.of_bits(mask))
        shared: dict[int, dict[str, Tensor]] = {}
        for i, entry in enumerate(collected):
            joined = {name: torch.cat([each.cpu() for each in values]) for name, values in entry.items()}
            for name in ("live", "live_before"):
                if name in joined and _all_set(joined[name], self.params[i].numel()):
                    del joined[name]
            shared[i] = {"step": torch.tensor(int(self.buckets.steps[i])), **joined}
            if self.buckets.common_share[1, i]:
                shared[i]["common_share"] = self.buckets.common_share[:, i].clone()
            if self.buckets.is_collecting:
                shared[i]["collected"] = torch.tensor(int(self.buckets.collected_steps[i]))
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
            self.buckets.steps[i] = int(shared[i]["step"])
            self.buckets.common_share[:, i] = shared[i].get("common_share", torch.zeros(2))
        if any("collected" in shared[i] for i in range(len(self.params))) and self.buckets.can_collect:
            self.buckets.collect_()
            self.buckets.collects_since = self.buckets.steps - np.array(
                [int(shared[i].get("collected", 0)) for i in range(len(self.params))]
            )
        was_quantized = any("signs" in shared[i] for i in range(len(self.params)))
        same_blocks = was_quantized == self.is_quantized and block_size == self.buckets.config.block_size
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
        if (
            memory.rms_code is not None
            and block_size == self.buckets.config.block_size
            and all("rms_code" in e for e in entries)
        ):
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
        if self.buckets.method.has_second_moment and numel:  # a parameter without elements is in no bucket
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
