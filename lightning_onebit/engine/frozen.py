"""What is frozen and what is remembered between steps: second moments, the last average, errors. And the way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.comm.compressed_allreduce import CompressedBucket
from lightning_onebit.comm.groups import ExchangeGroups
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.flat import flat_view, unflatten_like
from lightning_onebit.engine.runs import Run, add_runs_, offsets
from lightning_onebit.methods.base import CompressedMethod
from lightning_onebit.quantize import make_codec, segment_numel
from lightning_onebit.quantize.encoded import Encoded
from lightning_onebit.quantize.layout import Segment, num_blocks, plan_buckets, sign_nbytes
from lightning_onebit.quantize.reference import pack_bits, unpack_bits

Replicated = Literal["momentum", "second moment"]
"""What an optimizer keeps of a parameter, alike on all ranks."""


@dataclass(frozen=True)
class Piece:
    """One segment of a parameter: where it lies, and what belongs to it."""

    bucket: CompressedBucket
    index: int
    parameter: int
    start: int
    numel: int
    error: Tensor | None
    """The worker error; ``None`` if the segment belongs to another rank's shard."""
    shard_offset: int
    """Place in the shard, if it belongs to this one's."""

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.numel]


class FrozenParameters:
    """The parameters of one dtype and device, with their state frozen and cut into buckets.

    Args:
        optimizer: whose state is frozen, in place.
        placed: parameters with their groups, in the order in which they travel.
        method_type: the arithmetic of the optimizer.
        config: settings of the compression.
        communicator: all ranks. With one nothing is quantized: what would be the worker error holds u itself.
        groups: the same ranks, for compressed exchanges.
        revocable: whether exchanges may be taken back.
        dtype: dtype of the errors.
        device: of the parameters.
    """

    def __init__(
        self,
        *,
        optimizer: Optimizer,
        placed: Sequence[tuple[dict[str, Any], Tensor]],
        method_type: type[CompressedMethod[Any]],
        config: CompressionConfig,
        communicator: Communicator,
        groups: ExchangeGroups,
        revocable: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.optimizer = optimizer
        self.parameters = [p for _, p in placed]
        self.device = device
        self._dtype = dtype
        self._communicator = communicator
        self._config = config
        self._topology = groups.topology
        self._quantized = communicator.world_size > 1
        if not self._quantized:  # the space of what is quantized decides nothing: take the one that is bounded
            self._config = config = replace(config, space="update")
        layouts = plan_buckets(
            [p.numel() for p in self.parameters],
            block_size=config.block_size,
            world_size=communicator.world_size,
            bucket_numel=config.bucket_numel(sum(p.numel() for p in self.parameters)),
            segment_numel=segment_numel(device),
        )
        longest = max((segment.numel for layout in layouts for segment in layout.segments), default=0)
        self._method = method_type(optimizer, config, segment_numel=longest, dtype=dtype, device=device)
        self._scratch = torch.empty(longest, dtype=dtype, device=device)
        self._group_of = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}

        self._offset_of = offsets(optimizer)

        # One for each thread: a codec owns its workspace.
        self._codec, server_codec = (make_codec(config, device=device, dtype=dtype) for _ in range(2))
        server_scratch = torch.empty(longest, dtype=dtype, device=device)
        for p in self.parameters:
            self._method.freeze_(p, self._group(p))
        self._buckets: list[CompressedBucket] = []
        self._pieces: list[list[Piece]] = []
        for layout in layouts:
            # Bucket by bucket, as the momentum's memory is freed: no second copy of all of it.
            bucket = CompressedBucket(
                layout, groups, server_codec, server_scratch, revocable=revocable, dtype=dtype, device=device
            )
            pieces = _pieces(bucket)
            self._buckets.append(bucket)
            self._pieces.append(pieces)
            for piece in pieces:
                self._take_momentum(piece)
                p = self.parameters[piece.parameter]
                if piece.start + piece.numel == p.numel():
                    del optimizer.state[p]["exp_avg"]
        for p in self.parameters:
            optimizer.state[p].pop("exp_avg", None)  # of empty parameters, which have no segment

    @property
    def codec_name(self) -> str:
        """Of the quantizer."""
        return self._codec.name

    def outstanding(self) -> dict[Tensor, Tensor]:
        """Per parameter, mean worker error plus server error; see the engine. Collective."""
        errors = {p: torch.zeros(p.numel(), dtype=self._dtype, device=self.device) for p in self.parameters}
        if self._quantized:
            for bucket, pieces in zip(self._buckets, self._pieces, strict=True):
                # Summed over all ranks: the mean of the nodes' worker errors, and the server error of the one that has it.
                total = torch.zeros(bucket.layout.numel, dtype=self._dtype, device=self.device)
                for index, worker in bucket.buffers.worker.items():
                    _part(total, bucket, index).copy_(worker.worker_error).mul_(self._topology.local_world_size)
                for served in bucket.buffers.server:
                    _part(total, bucket, served.index).add_(served.server_error, alpha=self._topology.world_size)
                self._communicator.all_reduce_mean_(total)
                for piece in pieces:
                    piece.of(errors[self.parameters[piece.parameter]]).copy_(_part(total, bucket, piece.index))
        return {p: unflatten_like(error, p) for p, error in errors.items()}

    def stock_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Per parameter, the entries of a stock optimizer's state that are held in another form while frozen."""
        stock = {}
        for p in self.parameters:
            frozen = self.optimizer.state[p]["exp_avg_sq"]
            stock[p] = {
                "exp_avg": torch.zeros_like(frozen, memory_format=torch.preserve_format),
                "exp_avg_sq": self._method.thawed(p, self._group(p)),
            }
        for piece in self._all_pieces():
            p = self.parameters[piece.parameter]
            self._method.exp_avg_(
                piece.of(flat_view(stock[p]["exp_avg"])),
                self._direction(piece, 1.0),
                piece.of(self._variance(p)),
                self._group(p),
            )
        return stock

    def apply_outstanding_(self, errors: Mapping[Tensor, Tensor]) -> None:
        """Move the parameters by what had not been applied, at once."""
        for piece in self._all_pieces():
            p = self.parameters[piece.parameter]
            if p in errors:
                coefficients = self._method.coefficients(p, self._group(p))
                direction = self._scratch[: piece.numel].copy_(piece.of(flat_view(errors[p])))
                direction.mul_(self._method.direction_factor(coefficients))
                self._method.apply_(piece.of(flat_view(p)), direction, piece.of(self._variance(p)), coefficients)

    def thaw_(self, outstanding: Mapping[Tensor, Tensor]) -> None:
        """Give the optimizer its own state back, and apply what is outstanding."""
        stock = self.stock_state()
        self.apply_outstanding_(outstanding)
        for p in self.parameters:
            self.optimizer.state[p].update(stock[p])

    # What a checkpoint holds beside the stock state

    def worker_errors(self) -> list[Run]:
        """This rank's worker errors, views. With one rank: u."""
        return [
            run
            for bucket in self._buckets
            for run in self._runs(bucket.layout.shard(self._topology), bucket.buffers.worker_error)
        ]

    def server_errors(self) -> list[Run]:
        """The server errors of this rank's chunks, views."""
        return [
            run
            for bucket in self._buckets
            for run in self._runs(bucket.layout.chunk(self._topology.chunk), bucket.buffers.server_error)
        ]

    def private_variances(self) -> tuple[Tensor, Tensor]:
        """Second moments that this rank alone knows (of late coordinates): places, int64 and rising, and copies of them."""
        places, values = [], []
        for p in sorted(self.parameters, key=self._offset_of.__getitem__):
            variance = self._variance(p)
            indices = self._method.private(variance).nonzero().view(-1)
            places.append(indices + self._offset_of[p])
            values.append(variance[indices])
        return (torch.cat(places), torch.cat(values)) if places else (torch.zeros(0, dtype=torch.int64), torch.zeros(0))

    def set_private_variances_(self, places: Tensor, values: Tensor) -> None:
        """Take them over, where it is still so that every rank has its own."""
        for p in self.parameters:
            variance, offset = self._variance(p), self._offset_of[p]
            first, last = torch.searchsorted(places, torch.tensor([offset, offset + p.numel()])).tolist()
            indices, saved = (places[first:last] - offset).to(self.device), values[first:last].to(variance)
            indices, saved = indices[torch.signbit(saved)], saved[torch.signbit(saved)]
            variance[indices] = torch.where(self._method.private(variance[indices]), saved, variance[indices])

    def shared_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Per parameter, what all ranks know and stock state does not tell exactly; restored by :meth:`restore_`.

        * ``variance_ulps``: what freezing the stock second moment again would miss, in units in the last place; signed
          integers, shape of the flat parameter.
        * ``signs``, ``scales``: the last average; uint8 ``[ceil(numel / 8)]``, float32 ``[blocks]``. With one rank: none.
        * ``live``: as signs, where an element took part in it; only if not all did.
        """
        shared: dict[Tensor, dict[str, Tensor]] = {}
        for p in self.parameters:
            stock = self._method.thawed(p, self._group(p))
            again = self._method.refrozen(stock, p, self._group(p))
            exact = self._method.shared(self.optimizer.state[p]["exp_avg_sq"])
            ulps = flat_view(_bits(exact)) - flat_view(_bits(again))
            small = bool((ulps.abs() < 128).all())  # nearly always: a few ulps, at most
            shared[p] = {"variance_ulps": ulps.to(torch.int8) if small else ulps}
        if self._quantized:
            for p, averages in self._averages().items():
                shared[p]["signs"] = torch.cat([average.signs for average in averages])
                shared[p]["scales"] = torch.cat([average.scales for average in averages])
                if any(average.live is not None for average in averages):
                    everything = [torch.full_like(average.signs, 255) for average in averages]
                    live = [all_ if a.live is None else a.live for a, all_ in zip(averages, everything, strict=True)]
                    shared[p]["live"] = torch.cat(live)
        return shared

    def restore_(self, shared: Mapping[Tensor, Mapping[str, Tensor]], *, block_size: int) -> None:
        """Take over what :meth:`shared_state` returned, bit for bit. What the worker errors are left with is to be added to.

        Cut into blocks of another size, the last average cannot be taken over: then the worker errors stay as freezing the
        stock momentum has made them, which says the same in other bits.

        Raises:
            ValueError: if an entry does not fit its parameter.
        """
        for p in self.parameters:
            check_shared_state(shared[p], p, block_size=block_size)
            variance = self._variance(p)
            ulps = shared[p]["variance_ulps"].to(variance.device)
            exact = (_bits(self._method.shared(variance)) + ulps).view(variance.dtype)
            if not bool(((exact >= 0) & exact.isfinite()).all()):
                raise ValueError("`variance_ulps` does not belong to this second moment")
            variance.copy_(torch.where(self._method.private(variance), variance, exact))
        for piece in self._all_pieces():
            self._note_live(piece)
        was_quantized = any("signs" in shared[p] for p in self.parameters)
        if was_quantized != self._quantized or block_size != self._config.block_size:
            return
        for piece in self._all_pieces():
            if piece.error is not None:
                piece.error.fill_(-0.0)  # to which everything, zeros with their signs as well, adds to itself
        if not self._quantized:
            return
        for piece in self._all_pieces():
            saved = shared[self.parameters[piece.parameter]]
            signs = slice(piece.start // 8, piece.start // 8 + sign_nbytes(piece.numel))
            scales = slice(piece.start // block_size, piece.start // block_size + num_blocks(piece.numel, block_size))
            live = saved["live"][signs].to(self.device) if "live" in saved else None
            if live is not None and unpack_bits(live, piece.numel).all():
                live = None
            piece.bucket.restore_(piece.index, saved["signs"][signs], saved["scales"][scales], live)

    def replicated_state(self) -> Iterator[tuple[Tensor, Replicated, Iterable[Tensor]]]:
        """Parameter by parameter, tensors that must be the same on all ranks; to be read one by one before the next step."""
        live: dict[Tensor, list[Tensor]] = {}
        for piece in self._all_pieces():
            mask = piece.bucket.live[piece.index]
            live.setdefault(self.parameters[piece.parameter], []).extend([] if mask is None else [mask])
        for p, averages in self._averages().items():
            signs, scales = ([getattr(u, part) for u in averages] for part in ("signs", "scales"))
            yield p, "momentum", [*signs, *scales, *(u.live for u in averages if u.live is not None)]
            # Segment by segment, as they may be copies.
            yield p, "second moment", map(self._method.shared, self._variance(p).split(self._scratch.numel()))
            yield p, "second moment", live[p]

    def add_errors_(self, worker: Sequence[Run], server: Sequence[Run]) -> None:
        """Add errors to those of this rank in the same places; a single rank, which has none, applies them."""
        if self._quantized:
            add_runs_(self.worker_errors(), worker)
            add_runs_(self.server_errors(), server)
            return
        errors = {}
        for p in self.parameters:
            flat = torch.zeros(p.numel(), dtype=self._dtype, device=self.device)
            add_runs_([Run(self._offset_of[p], flat)], [*worker, *server])
            errors[p] = unflatten_like(flat, p)
        self.apply_outstanding_(errors)

    def add_momentum_(self, momentum: Sequence[Run]) -> None:
        """Take over u, on a single rank, after :meth:`restore_`."""
        add_runs_(self.worker_errors(), momentum)

    def _runs(self, segments: Sequence[Segment], flat: Tensor) -> list[Run]:
        """``flat``, which holds the elements of ``segments``, as runs."""
        runs: list[Run] = []
        place = 0
        for segment in segments:
            start = self._offset_of[self.parameters[segment.parameter]] + segment.start
            if runs and start == runs[-1].start + len(runs[-1].values):
                first = place - len(runs[-1].values)
                runs[-1] = Run(runs[-1].start, flat[first : place + segment.numel])
            else:
                runs.append(Run(start, flat[place : place + segment.numel]))
            place += segment.numel
        return runs

    def _averages(self) -> dict[Tensor, list[Encoded]]:
        """Per parameter, the last average of its pieces, in order."""
        averages: dict[Tensor, list[Encoded]] = {p: [] for p in self.parameters}
        for piece in self._all_pieces():
            averages[self.parameters[piece.parameter]].append(piece.bucket.result(piece.index))
        return {p: pieces for p, pieces in averages.items() if pieces}

    def _note_live(self, piece: Piece) -> None:
        dead = self._method.dead(piece.of(self._variance(self.parameters[piece.parameter])))
        piece.bucket.live[piece.index] = pack_bits(~dead) if dead.any() else None

    def _take_momentum(self, piece: Piece) -> None:
        """Step t = T_w. The first compressed step adds beta1 u and a zero error: put beta1 u in the error's place.

        So the momentum needs no dense copy. A single rank keeps u itself there, for it has no error.
        """
        p = self.parameters[piece.parameter]
        group, state = self._group(p), self.optimizer.state[p]
        variance = piece.of(self._variance(p))
        self._note_live(piece)
        error = piece.error
        if error is None:
            return
        self._method.momentum_(error, piece.of(flat_view(state["exp_avg"])), variance, group)
        error.masked_fill_(self._method.dead(variance), 0.0)
        if self._quantized:
            error.mul_(self._method.momentum_decay(self._method.coefficients(p, group)))

    def _direction(self, piece: Piece, factor: float) -> Tensor:
        """The average u of the last step, times ``factor``."""
        direction = self._scratch[: piece.numel]
        if self._quantized:
            self._codec.decode_(direction, piece.bucket.result(piece.index), factor)
        else:
            assert piece.error is not None
            torch.mul(piece.error, factor, out=direction)
        return direction

    def _variance(self, p: Tensor) -> Tensor:
        return flat_view(self.optimizer.state[p]["exp_avg_sq"])

    def _group(self, p: Tensor) -> dict[str, Any]:
        # Looked up anew: `load_state_dict` replaces the groups.
        return self.optimizer.param_groups[self._group_of[p]]

    def _all_pieces(self) -> list[Piece]:
        return [piece for pieces in self._pieces for piece in pieces]


def _pieces(bucket: CompressedBucket) -> list[Piece]:
    pieces, shard_offset = [], 0
    for index, segment in enumerate(bucket.layout.segments):
        worker = bucket.buffers.worker.get(index)
        pieces.append(
            Piece(
                bucket=bucket,
                index=index,
                parameter=segment.parameter,
                start=segment.start,
                numel=segment.numel,
                error=None if worker is None else worker.worker_error,
                shard_offset=shard_offset,
            )
        )
        shard_offset += 0 if worker is None else segment.numel
    return pieces


def _part(flat: Tensor, bucket: CompressedBucket, index: int) -> Tensor:
    """The elements of a segment in a tensor that holds those of its bucket."""
    segment = bucket.layout.segments[index]
    return flat[segment.offset : segment.offset + segment.numel]


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: neighbouring positive numbers are neighbours."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def check_shared_state(entry: Mapping[str, Tensor], p: Tensor, *, block_size: int) -> None:
    """Raise ``ValueError`` if an entry of :meth:`FrozenParameters.shared_state` does not fit its parameter."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"the entry of a parameter is {entry!r:.80}")
    integers = {torch.int8, {2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]}
    expected: dict[str, tuple[set[torch.dtype], int]] = {"variance_ulps": (integers, p.numel())}
    if "signs" in entry:
        expected["signs"] = expected["live"] = ({torch.uint8}, sign_nbytes(p.numel()))
        expected["scales"] = ({torch.float32}, num_blocks(p.numel(), block_size))
    for name, (dtypes, numel) in expected.items():
        value = entry.get(name)
        if name == "live" and value is None:
            continue
        if not isinstance(value, Tensor) or value.dtype not in dtypes or value.shape != (numel,):
            raise ValueError(
                f"`{name}` of a parameter of {p.numel()} elements must be {numel} of {dtypes}, not {value!r:.80}"
            )
    if "scales" in entry and not bool((entry["scales"].isfinite() & (entry["scales"] >= 0)).all()):
        raise ValueError("`scales` are infinite, NaN or negative")
