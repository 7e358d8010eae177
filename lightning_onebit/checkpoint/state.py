"""What a checkpoint of the compressed phase holds beside the stock state of the optimizers.

The ``.ckpt`` stays an ordinary Lightning checkpoint: ``optimizer_states`` is what stock optimizers would have written (see
:class:`~lightning_onebit.engine.optimizer.CompressedOptimizer`), so plain ``strategy="ddp"`` can load it. What else it takes
to go on bit for bit is in two places:

* **Under a key of its own**, what all ranks know: the phase, D, the last average as bits, and which coordinates are
  late. Tensors, dicts, lists, strings and numbers only: it loads with ``weights_only=True``.
* **In a part per rank** beside it (:mod:`~lightning_onebit.checkpoint.parts`), what this rank alone knows: its worker
  errors, the server errors of its chunks, its own second moment v_i with what its chunks have not passed on of it, or those
  of late coordinates where D is never renewed, what is collected there for a refresh that was asked for, and gradients that
  wait for a step. No rank ever holds those of another.
  In a warm-up that was resumed, it is the errors that wait for the next compressed phase.

With as many ranks as before, everyone goes on where it stopped. Otherwise the means of the worker errors and of the second
moments, and all server errors, are the same afterwards: nodes take over what some of the old ones had, weighted, and all
look for the server errors of their chunks. A part that cannot be used is one warning: its errors start at zero, its second
moment as v of the last refresh. A run may go on with another ``variance_refresh``: then v_i begins so as well. What
was being collected goes on where all have their parts and are as many; otherwise that begins anew on all ranks, and with
another ``variance_refresh`` it is over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.checkpoint.parts import FOREIGN, MISSING, WORLD_SIZE, Part, PartError, Parts, part_errors
from lightning_onebit.comm.topology import Topology
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.engine.ranges import ElementRange, WaitingErrors, first_places
from lightning_onebit.methods import parameters_of

CHECKPOINT_KEY = "lightning_onebit"
PATH = "path"
"""Added to the entry when it is loaded: where from."""
VERSION = 3

_HEADER: dict[str, type | tuple[type, ...]] = {
    "phase": str,
    "is_pending": bool,
    "save_id": (str, type(None)),
    "has_gradients": bool,
    "world_size": int,
    "local_world_size": int,
    "block_size": int,
    "space": str,
    "ddp_buckets": list,
    "optimizer_steps": list,
    "optimizers": list,
}
"""What is always there, and of which type."""
MOST_RANKS = 2**20
"""A number that is larger is no number of ranks."""
MOST_STEPS = 2**53
_ERROR_DTYPES = {"float32": np.float32, "float64": np.float64}


def shared_state(compressed: Sequence[CompressedOptimizer]) -> list[dict[str, dict[str, Tensor]]]:
    """Per optimizer and parameter, by its position as in torch's state: what all ranks know, on the CPU."""
    states = []
    for c in compressed:
        entries = c.state.shared_state()
        positions = {p: str(index) for index, p in enumerate(parameters_of(c.optimizer))}
        states.append({positions[p]: {k: v.cpu() for k, v in entry.items()} for p, entry in entries.items()})
    return states


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint gets of a run at one moment."""

    header: dict[str, Any]
    """Goes under :data:`CHECKPOINT_KEY`. On rank 0, which writes it, complete."""
    content: PartContent | None
    """Goes into this rank's part; ``None`` if there are none."""


@dataclass
class PartContent:
    """What a rank writes into its part: ``meta`` for what JSON can say, and arrays by name."""

    meta: dict[str, Any] = field(default_factory=lambda: {"optimizers": [], "gradients": []})
    arrays: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def add_optimizer(self, compressed: CompressedOptimizer) -> None:
        """Its errors, and second moments where they go on: all, or those of late coordinates. Needs no memory of a GPU."""
        own = {
            "worker": compressed.state.worker_errors(),
            "server": compressed.state.server_errors(),
            "second_moment": compressed.state.second_moments(),
            "residual": compressed.state.second_moment_residuals(),
            "collected": compressed.state.collected(),
        }
        self._add(compressed.optimizer, own, late=compressed.state.late_second_moments())

    def add_waiting_errors(self, optimizer: Optimizer, errors: WaitingErrors) -> None:
        """Those that wait for the next compressed phase of ``optimizer``."""
        worker, server = errors.ranges(optimizer)
        self._add(optimizer, {"worker": worker, "server": server}, late=(torch.zeros(0, dtype=torch.int64), torch.zeros(0)))

    def _add(self, optimizer: Optimizer, own: Mapping[str, Sequence[ElementRange]], *, late: tuple[Tensor, Tensor]) -> None:
        position = len(self.meta["optimizers"])
        entry: dict[str, Any] = {"numels": [p.numel() for p in parameters_of(optimizer)]}
        for name, ranges in own.items():
            entry[name] = [[each.start, each.values.numel(), _dtype_name(each.values.dtype)] for each in ranges]
            for index, each in enumerate(ranges):
                self.arrays[f"{position}/{name}/{index}"] = each.values.cpu().numpy()
        places, values = late
        entry["late"] = places.numel()
        self.arrays[f"{position}/late/places"] = places.cpu().numpy()
        self.arrays[f"{position}/late/values"] = values.cpu().double().numpy()  # holds all dtypes exactly
        self.meta["optimizers"].append(entry)

    def add_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Local gradients by parameter name."""
        for index, (name, gradient) in enumerate(gradients.items()):
            self.meta["gradients"].append([name, list(gradient.shape), _dtype_name(gradient.dtype)])
            self.arrays[f"gradient/{index}"] = gradient.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_header(state: Any) -> Mapping[str, Any]:
    """The entry under :data:`CHECKPOINT_KEY`, if this version can read it.

    Raises:
        ValueError: if it is of another version, or is not such an entry.
    """
    version = state.get("version") if isinstance(state, Mapping) else None
    if not isinstance(version, int) or version != VERSION:
        raise ValueError(
            f"The checkpoint's state of lightning_onebit has version {version}, but this is version {VERSION}."
            " HINT: use the release of lightning_onebit that wrote it, or load it with ckpt_path in strategy='ddp'."
        )
    for name, kinds in _HEADER.items():
        if not isinstance(state.get(name), kinds):
            raise _damaged(f"{name} is {state.get(name)!r:.80}")
    world_size, local_world_size = state["world_size"], state["local_world_size"]
    if not 1 <= local_world_size <= world_size <= MOST_RANKS or world_size % local_world_size:
        raise _damaged(f"world sizes are {world_size} and {local_world_size}")
    if state["block_size"] < 8 or state["block_size"] % 8:
        raise _damaged(f"block_size is {state['block_size']}")
    if state["save_id"] is not None and not re.fullmatch("[0-9a-f]{16}", state["save_id"]):
        raise _damaged(f"save_id is {state['save_id']!r:.80}")
    if not all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in state["ddp_buckets"]):
        raise _damaged("ddp_buckets are no lists of names")
    if not all(isinstance(steps, int) and 0 <= steps < MOST_STEPS for steps in state["optimizer_steps"]):
        raise _damaged(f"optimizer_steps are {state['optimizer_steps']!r:.80}")
    with_state = state.get("with_state") or []
    if not (isinstance(with_state, list) and all(isinstance(positions, list) for positions in with_state)):
        raise _damaged(f"with_state is {with_state!r:.80}")
    replaced = state.get("replaced") or []
    if not (isinstance(replaced, list) and all(isinstance(each, bool) for each in replaced)):
        raise _damaged(f"replaced is {replaced!r:.80}")
    if not isinstance(state.get("errors_wait", False), bool):
        raise _damaged(f"errors_wait is {state['errors_wait']!r:.80}")
    if not isinstance(state.get("variance_refresh"), (int, str, type(None))):
        raise _damaged(f"variance_refresh is {state['variance_refresh']!r:.80}")
    return state


def restore(
    compressed: Sequence[CompressedOptimizer],
    optimizers: Sequence[Mapping[str, Mapping[str, Tensor]]],
    *,
    block_size: int,
) -> None:
    """Take over what :func:`shared_state` returned, in place.

    Raises:
        ValueError: if it is for another number of optimizers, or does not fit their parameters.
    """
    if len(optimizers) != len(compressed):
        raise ValueError(
            f"The checkpoint was written with {len(optimizers)} compressed optimizers, but there are"
            f" {len(compressed)} now. HINT: return the same ones from `configure_optimizers`, or load it with ckpt_path in"
            " strategy='ddp'."
        )
    for c, entries in zip(compressed, optimizers, strict=True):
        try:
            if not isinstance(entries, Mapping):
                raise TypeError(f"the entry of an optimizer is {entries!r:.80}")
            c.restore_(saved_of(c, entries), block_size=block_size)
        except (ValueError, LookupError, TypeError) as error:
            raise _damaged(str(error)) from error


def saved_of(c: CompressedOptimizer, entries: Mapping[str, Mapping[str, Tensor]]) -> dict[Tensor, Mapping[str, Tensor]]:
    """By parameter, its entry of :func:`shared_state`."""
    return {p: entries[str(i)] for i, p in enumerate(parameters_of(c.optimizer)) if c.holds(p)}


def load_errors(
    compressed: Sequence[CompressedOptimizer],
    positions: Sequence[int],
    header: Mapping[str, Any],
    parts: Parts | None,
    topology: Topology,
) -> dict[int, str]:
    """Add the errors of a checkpoint to those of ``compressed``, in place, and the second moments of its ranks.

    Args:
        compressed: the optimizers.
        positions: their places in the parts.
        header: of the checkpoint.
        parts: where its parts are; ``None`` if that is unknown.
        topology: where this rank is now.

    Returns:
        By rank of then, what is wrong with its part: nothing of it was used.
    """
    old = _topology_of(header)
    weights = node_weights(topology, old)
    problems: dict[int, str] = {}

    def load(rank: int) -> bool:
        """Returns whether this rank serves just what ``rank`` served then."""
        weight = weights.get(rank // old.local_world_size)
        try:
            with _open(parts, header, rank) as part:
                contents = [_read(part, position, c) for c, position in zip(compressed, positions, strict=True)]
        except PartError as error:
            problems[rank] = error.problem
            return False
        for c, content in zip(compressed, contents, strict=True):
            if weight is not None:
                places, values = content.late
                c.state.add_late_second_moments_(places, values * weight)
                moments = [ElementRange(each.start, each.values * weight) for each in content.second_moment]
                c.state.add_second_moments_(moments, [])
                if same:
                    c.state.add_collected_(content.collected)
            c.state.add_second_moments_([], content.residual)
            if old.world_size > 1:
                worker = content.worker if weight is not None else []
                c.state.add_errors_(
                    [ElementRange(error.start, error.values * (weight or 1.0)) for error in worker], content.server
                )
            elif topology.world_size == 1:  # which have no errors: it is the momentum
                c.state.add_momentum_(content.worker)
        return all(content.same_chunks for content in contents)

    same = (old.num_nodes, old.local_world_size) == (topology.num_nodes, topology.local_world_size)
    if not (same and load(topology.rank)):
        for rank in range(old.world_size):
            if not (same and rank == topology.rank):
                load(rank)
    for c in compressed:
        c.state.complete_second_moments_()
        if not same:
            c.state.collect_anew_()
    return problems


def load_waiting_errors(
    optimizers: Sequence[Optimizer],
    positions: Sequence[int],
    header: Mapping[str, Any],
    parts: Parts | None,
    topology: Topology,
) -> tuple[dict[Optimizer, WaitingErrors], dict[int, str]]:
    """The errors of a checkpoint, to wait for the next compressed phase of ``optimizers``.

    Of worker errors, a rank takes some of those that its node takes over (see :func:`node_weights`); of all server errors
    each is taken by one rank, and finds its chunk when that phase begins.

    Args:
        optimizers: whose errors they are.
        positions: their places in the parts.
        header: of the checkpoint.
        parts: where its parts are; ``None`` if that is unknown.
        topology: where this rank is now.

    Returns:
        The errors of this rank, and, by rank of then, what is wrong with its part: nothing of it was used.
    """
    old = _topology_of(header)
    weights, problems = node_weights(topology, old), {}
    worker: list[list[ElementRange]] = [[] for _ in optimizers]
    server: list[list[ElementRange]] = [[] for _ in optimizers]
    for rank in range(old.world_size):
        node, local_rank = divmod(rank, old.local_world_size)
        weight = weights.get(node) if local_rank % topology.local_world_size == topology.local_rank else None
        is_served_here = rank % topology.world_size == topology.rank
        if weight is None and not is_served_here:
            continue
        try:
            with _open(parts, header, rank) as part, part_errors():
                found = [
                    [_read_ranges(part, position, name, optimizer) for name in ("worker", "server")]
                    for optimizer, position in zip(optimizers, positions, strict=True)
                ]
        except PartError as error:
            problems[rank] = error.problem
            continue
        for index, (workers, servers) in enumerate(found):
            if weight is not None:
                _gather_(worker[index], [ElementRange(each.start, each.values * weight) for each in workers])
            if is_served_here:
                _gather_(server[index], servers)
    each_of = zip(optimizers, worker, server, strict=True)
    return {o: WaitingErrors(first_places(o), own, served) for o, own, served in each_of}, problems


def _gather_(ranges: list[ElementRange], more: Sequence[ElementRange]) -> None:
    """Add ``more`` to the same elements of ``ranges`` where these are there, so that no rank has all that others had."""
    known = {(each.start, each.stop): each.values for each in ranges}
    for each in more:
        if (each.start, each.stop) in known:
            known[each.start, each.stop].add_(each.values)
        else:
            ranges.append(each)


def node_weights(topology: Topology, old: Topology) -> dict[int, float]:
    """Whose worker errors and late second moments a node takes over, weighted so that their means over all nodes stay.

    Args:
        topology: where this rank is now.
        old: nodes of then.

    Returns:
        By node of then, a weight. With as many nodes as then: the same node, 1.0.
    """
    new_nodes, old_nodes = topology.num_nodes, old.num_nodes
    if new_nodes < old_nodes:
        return {node: new_nodes / old_nodes for node in range(topology.node_rank, old_nodes, new_nodes)}
    node = topology.node_rank % old_nodes
    return {node: new_nodes / (old_nodes * len(range(node, new_nodes, old_nodes)))}


def load_gradients(
    named_parameters: Mapping[str, Tensor], header: Mapping[str, Any], parts: Parts | None, topology: Topology
) -> tuple[dict[Tensor, Tensor], dict[int, str]]:
    """By parameter, this rank's gradients that waited for a step, and what is wrong, as :func:`load_errors`."""
    if header["world_size"] != topology.world_size:
        return {}, dict.fromkeys(range(header["world_size"]), WORLD_SIZE)
    gradients: dict[Tensor, Tensor] = {}
    try:
        with _open(parts, header, topology.rank) as part, part_errors():
            for index, (name, shape, dtype) in enumerate(part.meta["gradients"]):
                p = named_parameters[name]
                if list(p.shape) != shape or _dtype_name(p.dtype) != dtype:
                    raise ValueError(f"the gradient of {name} is {dtype} {shape}")
                data = part.array(f"gradient/{index}", dtype=np.uint8, numel=p.numel() * p.element_size())
                gradients[p] = torch.from_numpy(data).view(p.dtype).view(p.shape) if p.numel() else torch.empty_like(p)
    except PartError as error:
        return {}, {topology.rank: error.problem}
    return gradients, {}


@dataclass(frozen=True, kw_only=True)
class _Content:
    """What a part holds of one optimizer."""

    worker: list[ElementRange]
    server: list[ElementRange]
    """Those that touch this rank's chunks."""
    second_moment: list[ElementRange]
    collected: list[ElementRange]
    residual: list[ElementRange]
    """Those that touch this rank's chunks."""
    late: tuple[Tensor, Tensor]
    """Places and second moments of late coordinates."""
    same_chunks: bool


def _read_ranges(
    part: Part, position: int, name: str, optimizer: Optimizer, targets: Sequence[ElementRange] | None = None
) -> list[ElementRange]:
    """What a part holds of an optimizer under ``name``: all, or what touches ``targets``."""
    entry = part.meta["optimizers"][position]
    if entry["numels"] != [p.numel() for p in parameters_of(optimizer)]:
        raise PartError(FOREIGN, "its parameters have other sizes")
    found = []
    for index, (start, numel, dtype) in enumerate(entry.get(name, [])):  # not all are there without refreshes
        if targets is None or any(start < t.stop and t.start < start + numel for t in targets):
            array = part.array(f"{position}/{name}/{index}", dtype=np.dtype(_ERROR_DTYPES[dtype]), numel=numel)
            if not np.isfinite(array).all():
                raise ValueError(f"{name} {index} is not finite")
            found.append(ElementRange(int(start), torch.from_numpy(array)))
    return found


def _read(part: Part, position: int, compressed: CompressedOptimizer) -> _Content:
    with part_errors():
        chunks = compressed.state.server_errors()
        read = partial(_read_ranges, part, position, optimizer=compressed.optimizer)
        entry = part.meta["optimizers"][position]
        places = part.array(f"{position}/late/places", dtype=np.int64, numel=entry["late"])
        values = part.array(f"{position}/late/values", dtype=np.float64, numel=entry["late"])
        if len(places) and not (places[0] >= 0 and places[-1] < sum(entry["numels"]) and (np.diff(places) > 0).all()):
            raise ValueError("places of late coordinates do not rise")
        if not np.isfinite(values).all():
            raise ValueError("second moments of late coordinates are not finite")
        return _Content(
            worker=read("worker"),
            server=read("server", targets=chunks),
            second_moment=read("second_moment"),
            collected=read("collected"),
            residual=read("residual", targets=chunks),
            late=(torch.from_numpy(places), torch.from_numpy(values)),
            same_chunks=[[c.start, c.values.numel()] for c in chunks] == [error[:2] for error in entry["server"]],
        )


def _open(parts: Parts | None, header: Mapping[str, Any], rank: int) -> AbstractContextManager[Part]:
    if parts is None or header["save_id"] is None:
        raise PartError(MISSING, "where the checkpoint was is unknown" if parts is None else "none was written")
    return parts.read(header["save_id"], rank)


def _topology_of(header: Mapping[str, Any]) -> Topology:
    local_world_size = header["local_world_size"]
    return Topology(num_nodes=header["world_size"] // local_world_size, node_rank=0, local_world_size=local_world_size)


def _damaged(details: str) -> ValueError:
    return ValueError(
        f"The checkpoint's state of lightning_onebit is damaged, or was written for another model: {details}. HINT: resume"
        " from another checkpoint, or load it with ckpt_path in strategy='ddp', which disregards that state."
    )
