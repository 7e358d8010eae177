"""Saving and resuming a run: the ``.ckpt`` that Lightning writes, with a header of ours, and one part per rank beside it.

The strategies for Trainer and Fabric each have a :class:`CheckpointManager`. What is saved is in
:mod:`lightning_onebit.checkpoint.state`, the files of the parts are in :mod:`lightning_onebit.checkpoint.parts`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.checkpoint.parts import PROBLEMS, SPACE, Parts
from lightning_onebit.checkpoint.state import (
    VERSION,
    PartContent,
    Snapshot,
    load_errors,
    load_gradients,
    load_waiting_errors,
    restore,
    saved_of,
    shared_state,
)
from lightning_onebit.checkpoint.stock import LoadedState, replaced_before_saving
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.topology import Topology
from lightning_onebit.config import CompressionConfig, VarianceRefresh
from lightning_onebit.consistency.agreement import agreement
from lightning_onebit.consistency.ranks import Ranks
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.engine.ranges import ElementRange, WaitingErrors
from lightning_onebit.phase import Phase


class Phases(Protocol):
    """What the manager asks of :class:`~lightning_onebit.lightning.phase_controller.PhaseController`; see there."""

    names: dict[Tensor, str]
    topology: Topology
    is_pending: bool
    has_waiting_gradients: bool
    waiting_errors: dict[Optimizer, WaitingErrors]

    @property
    def phase(self) -> Phase: ...
    @property
    def space(self) -> str: ...
    @property
    def compressed(self) -> dict[Optimizer, CompressedOptimizer]: ...
    @property
    def steps_made(self) -> list[int]: ...
    def state_positions(self) -> list[list[int]]: ...
    def trained_without_state(self, saved: Sequence[Collection[int]] | None) -> list[Tensor]: ...
    def warm_up_again(self, missing: Sequence[Tensor], *, drops_gradients: bool) -> None: ...
    @property
    def compressed_optimizers(self) -> Sequence[Optimizer]: ...
    @property
    def replaced_state(self) -> list[bool]: ...
    @property
    def stock_state_tells_all(self) -> bool: ...
    def ddp_buckets(self, *, of_next_backward: bool = False) -> list[list[str]]: ...
    def resume(self, phase: Phase, *, is_pending: bool, ddp_buckets: Sequence[Sequence[str]]) -> None: ...


class ConfiguredStrategy(Ranks, Protocol):
    """What the manager asks of the strategy that has it."""

    config: CompressionConfig


class CheckpointManager:
    """Takes snapshots of a run, writes them with its checkpoints, and has a run go on from one.

    Args:
        strategy: the one that has this manager; says where this process is.
        phases: of the run that is saved and resumed.
    """

    def __init__(self, strategy: ConfiguredStrategy, phases: Phases) -> None:
        self._strategy = strategy
        self._phases = phases
        self._loaded_gradients: dict[Tensor, Tensor] = {}

    # Saving

    def snapshot(self) -> Snapshot | None:
        """What a checkpoint is to hold beside the stock state; ``None`` if nothing. Collective."""
        phases = self._phases
        in_warmup = phases.phase is Phase.WARMUP
        ddp_buckets = phases.ddp_buckets(of_next_backward=True)
        waiting: dict[str, Tensor] = {}
        if phases.has_waiting_gradients:
            waiting = {name: p.grad for p, name in phases.names.items() if p.grad is not None}
        is_frozen = not (in_warmup or phases.is_pending)
        wants_parts = is_frozen or bool(waiting) or bool(phases.waiting_errors)
        # Rank 0 decides, and names the save. Wait here until all ranks have closed the files of the last one.
        name = secrets.randbits(62) if wants_parts and self._strategy.is_global_zero else 0
        number = torch.tensor(name, device=self._strategy.root_device)
        Communicator().all_reduce_max_(number)
        save_id = f"{int(number):016x}" if number else None
        if in_warmup and save_id is None and not ddp_buckets and phases.stock_state_tells_all:
            return None
        header = self._header(save_id=save_id, has_gradients=bool(waiting))
        if save_id is None:
            return Snapshot(header=header, content=None)
        content = PartContent()
        for compressed in phases.compressed.values():
            content.add_optimizer(compressed)
        if phases.waiting_errors:
            for optimizer in phases.compressed_optimizers:
                content.add_waiting_errors(optimizer, phases.waiting_errors.get(optimizer, WaitingErrors({})))
        content.add_gradients(waiting)
        return Snapshot(header=header, content=content)

    def header_after_exception(self, *, is_torn: bool) -> dict[str, Any]:
        """What goes into a checkpoint that this rank saves without the others, so without parts; says so. Not collective.

        Args:
            is_torn: whether the exception came within a step.
        """
        torn = (
            " It came within a step: some parameters may be those of the next one already. HINT: rather resume from an"
            " earlier checkpoint."
        )
        rank_zero_warn(
            f"Saving after an exception: the checkpoint does not hold the errors of error feedback.{torn if is_torn else ''}"
        )
        return self._header(save_id=None, has_gradients=False)

    def _header(self, *, save_id: str | None, has_gradients: bool) -> dict[str, Any]:
        """What all ranks know. Not collective; the optimizers' entries on rank 0 only, which writes them."""
        phases, topology = self._phases, self._phases.topology
        return {
            "version": VERSION,
            "phase": phases.phase.name,
            "is_pending": phases.is_pending,
            "save_id": save_id,
            "has_gradients": has_gradients,
            "errors_wait": bool(phases.waiting_errors) and save_id is not None,
            "world_size": topology.world_size,
            "local_world_size": topology.local_world_size,
            "block_size": self._strategy.config.block_size,
            "space": phases.space,
            "variance_refresh": self._variance_refresh,
            "ddp_buckets": phases.ddp_buckets(),
            "optimizer_steps": phases.steps_made,
            "with_state": phases.state_positions() if phases.is_pending else None,
            "replaced": phases.replaced_state if any(phases.replaced_state) else None,
            "optimizers": shared_state(list(phases.compressed.values())) if self._strategy.is_global_zero else [],
        }

    def save(self, path: Any, snapshot: Snapshot | None, write: Callable[[], None], *, in_background: bool = False) -> None:
        """Save a checkpoint, and before that this rank's part. Collective; what fails on one rank fails on all.

        Args:
            path: where the checkpoint goes.
            snapshot: of :meth:`snapshot`.
            write: writes the checkpoint, which holds the snapshot's header.
            in_background: whether ``write`` may return before the checkpoint is on disk.
        """
        device = self._strategy.root_device
        if snapshot is None or snapshot.content is None:
            with agreement(Communicator(), device, about=f"the checkpoint {path}"):
                write()
            return
        parts, save_id, content = Parts(path), snapshot.header["save_id"], snapshot.content
        with agreement(Communicator(), device, about=f"the parts of the checkpoint {path}"):
            parts.write(save_id, self._strategy.global_rank, content.meta, content.arrays)
        with agreement(Communicator(), device, about=f"the checkpoint {path}"):
            write()
        # One that is written in the background may not be there yet: until it is, the last one counts.
        parts.remove(self._strategy.global_rank, self._strategy.world_size, keep=save_id, keep_others=int(in_background))

    def remove_parts(self, path: Any) -> None:
        """Remove this rank's parts of a checkpoint that is removed."""
        Parts(path).remove(self._strategy.global_rank, self._strategy.world_size)

    # Resuming

    def resume(
        self,
        header: Mapping[str, Any],
        optimizers: Sequence[Mapping[str, Any]],
        positions: Sequence[int],
        path: str | None,
    ) -> None:
        """Go on as a checkpoint says, once the optimizers have loaded their stock state. Collective.

        Args:
            header: what the checkpoint says of the run.
            optimizers: what it says of each compressed optimizer.
            positions: their places in the parts.
            path: where the checkpoint is; ``None`` if unknown.
        """
        phases, topology = self._phases, self._phases.topology
        parts = None if path is None else Parts(path, follow_link=True)
        phase = Phase.COMPRESSED if header["phase"] == Phase.COMPRESSED.name else Phase.WARMUP
        is_frozen, same_space = phase is Phase.COMPRESSED and not header["is_pending"], header["space"] == phases.space
        errors_wait = header.get("errors_wait", False)
        same_world_size = header["world_size"] == self._strategy.world_size
        ddp_buckets = header["ddp_buckets"] if same_world_size else []
        if phase is Phase.COMPRESSED:
            # At the freeze those that never had a gradient have no state; afterwards all have one that are trained.
            missing = phases.trained_without_state(header.get("with_state"))
            some_miss = torch.tensor(len(missing), device=self._strategy.root_device)
            Communicator().all_reduce_max_(some_miss)
            if some_miss:
                phases.resume(Phase.WARMUP, is_pending=False, ddp_buckets=ddp_buckets)
                phases.warm_up_again(missing, drops_gradients=header["has_gradients"])
                if errors_wait or (is_frozen and header["world_size"] > 1):  # a single rank had none
                    self._warn_of_problems(self._load_waiting_errors(header, positions, parts), header, parts)
                return
        if is_frozen and same_space:
            loaded = LoadedState(phases.compressed_optimizers)
            phases.resume(phase, is_pending=False, ddp_buckets=ddp_buckets)
            problems = self._restore(header, optimizers, positions, parts, loaded)
        else:  # all there is is stock state
            phases.resume(phase, is_pending=phase is Phase.COMPRESSED, ddp_buckets=ddp_buckets)
            problems = dict.fromkeys(range(header["world_size"]), SPACE) if is_frozen else {}
            if errors_wait:
                problems = self._load_waiting_errors(header, positions, parts)
        if header["has_gradients"]:
            named_parameters = {name: p for p, name in phases.names.items()}
            self._loaded_gradients, more = load_gradients(named_parameters, header, parts, topology)
            problems |= more
        self._warn_of_problems(problems, header, parts)
        before = header.get("variance_refresh", self._variance_refresh)  # earlier checkpoints do not tell it
        if is_frozen and before != self._variance_refresh:
            rank_zero_info(
                f"The checkpoint was written with variance_refresh={before!r}; the run goes on with"
                f" {self._variance_refresh!r}."
            )

    @property
    def _variance_refresh(self) -> VarianceRefresh:
        """What has an effect: in momentum space there are no refreshes."""
        config = self._strategy.config
        return config.variance_refresh if config.renews_variance else None

    def _load_waiting_errors(
        self, header: Mapping[str, Any], positions: Sequence[int], parts: Parts | None
    ) -> dict[int, str]:
        """Errors that wait for the next compressed phase; returns what is wrong with parts, by rank of then."""
        phases = self._phases
        if header["space"] != phases.space:
            return dict.fromkeys(range(header["world_size"]), SPACE)
        errors, problems = load_waiting_errors(phases.compressed_optimizers, positions, header, parts, phases.topology)
        phases.waiting_errors.update(errors)
        return problems

    def _restore(
        self,
        header: Mapping[str, Any],
        optimizers: Sequence[Mapping[str, Any]],
        positions: Sequence[int],
        parts: Parts | None,
        loaded: LoadedState,
    ) -> dict[int, str]:
        """State as it was saved, and errors; where stock state is not that which was saved, it takes over at the next step.

        Returns:
            By rank of then, what is wrong with its part.
        """
        topology, compressed = self._phases.topology, list(self._phases.compressed.values())
        restore(compressed, optimizers, block_size=header["block_size"])
        was_alone, is_alone = header["world_size"] == 1, topology.world_size == 1
        has_average = not was_alone and not is_alone and header["block_size"] == self._strategy.config.block_size
        in_part = was_alone and is_alone  # the momentum
        replaced: set[CompressedOptimizer] = set()

        def compare(*, with_momentum: bool) -> None:
            for index, c in enumerate(compressed):
                saved = saved_of(c, optimizers[index])
                if replaced_before_saving(header, index) or not loaded.is_what_was_saved(
                    c, saved, block_size=header["block_size"], with_momentum=with_momentum
                ):
                    replaced.add(c)

        if not in_part:
            compare(with_momentum=has_average)
            for c in replaced if not is_alone and not has_average else ():  # where the stock momentum is now, to come again
                c.state.add_errors_([ElementRange(error.start, -error.values) for error in c.state.worker_errors()], [])
        problems = load_errors(compressed, positions, header, parts, topology)
        if in_part:
            compare(with_momentum=True)
        for c in replaced:
            loaded.put_back(c.optimizer)
        return problems

    def put_back_gradients(self) -> None:
        """Gradients that waited for a step when the checkpoint was saved do so again, in ``p.grad``."""
        for p, gradient in self._loaded_gradients.items():
            p.grad = torch.empty_like(p, memory_format=torch.preserve_format).copy_(gradient)
            self._phases.has_waiting_gradients = True
        self._loaded_gradients = {}

    def _warn_of_problems(self, problems: Mapping[int, str], header: Mapping[str, Any], parts: Parts | None) -> None:
        """Say once which parts any rank found unusable. Collective."""
        codes = torch.zeros(header["world_size"], dtype=torch.int32, device=self._strategy.root_device)
        for rank, problem in problems.items():
            codes[rank] = 1 + PROBLEMS.index(problem)
        Communicator().all_reduce_max_(codes)
        unusable = [f"rank {rank} ({PROBLEMS[code - 1]})" for rank, code in enumerate(codes.tolist()) if code]
        if unusable:
            for compressed in self._phases.compressed.values():
                compressed.state.collect_anew_()
            where = "a place that is not known, as it was not loaded from its path" if parts is None else parts.folder
            rank_zero_warn(
                f"The checkpoint's parts of {', '.join(unusable)} cannot be used: what they held of error feedback, and of"
                " gradients that waited for a step, starts at zero, and the second moment of a rank's own gradients as that"
                " of all. All else goes on as saved. HINT: the parts are files in"
                f" {where}: keep them beside the checkpoint, where all ranks can read them."
            )
