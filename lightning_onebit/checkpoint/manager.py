"""Saving and resuming a run with two phases, whoever runs it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_onebit.checkpoint.io import DurableCheckpointIO
from lightning_onebit.checkpoint.parts import PROBLEMS, SPACE, Parts
from lightning_onebit.checkpoint.state import (
    VERSION,
    PartContent,
    Snapshot,
    load_errors,
    load_gradients,
    restore,
    shared_state,
)
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.lightning.ddp_hook import Regrouping
from lightning_onebit.lightning.phases import TwoPhases
from lightning_onebit.phase import Phase


class SavedPhases(TwoPhases):
    """Mixed into a DDP strategy: what is saved with a checkpoint beside the stock state, and how a run resumes from it."""

    if TYPE_CHECKING:  # what the strategy brings
        _checkpoint_io: CheckpointIO | None

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """The user's, or else one that never leaves half a file behind."""
        durable = DurableCheckpointIO()
        if self._checkpoint_io is None:
            self._checkpoint_io = durable
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = durable  # without effect if it wraps another already
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    def _snapshot(self) -> Snapshot | None:
        """What a checkpoint is to hold beside the stock state; ``None`` if nothing. Collective."""
        in_warmup = self._phase is Phase.WARMUP
        if self._hook_state is not None and self.world_size > 2:
            self._hook_state.look_ahead()
        waiting = {name: p.grad for p, name in self._names.items() if self._has_waiting_gradients and p.grad is not None}
        wants_parts = not (in_warmup or self._is_pending) or bool(waiting)
        # Rank 0 decides, and names the save. Nobody begins before all others have ended what they did with files.
        named = torch.tensor(secrets.randbits(62) if wants_parts and self.is_global_zero else 0, device=self.root_device)
        Communicator().all_reduce_max_(named)
        number = int(named)
        if in_warmup and not number and not self._ddp_buckets:
            return None
        save_id = f"{number:016x}" if number else None
        header = self._header(save_id=save_id, has_gradients=bool(waiting))
        if save_id is None:
            return Snapshot(header=header, content=None)
        content = PartContent()
        for compressed in self._compressed.values():
            content.add_optimizer(compressed)
        content.add_gradients(waiting)
        return Snapshot(header=header, content=content)

    def _header(self, *, save_id: str | None, has_gradients: bool) -> dict[str, Any]:
        """What all ranks know. Not collective; the optimizers' entries on rank 0 only, which writes them."""
        topology = self._topology
        return {
            "version": VERSION,
            "phase": self._phase.name,
            "is_pending": self._is_pending,
            "save_id": save_id,
            "has_gradients": has_gradients,
            "world_size": topology.world_size,
            "local_world_size": topology.local_world_size,
            "block_size": self.config.block_size,
            "space": self._space,
            "ddp_buckets": self._ddp_buckets,
            "optimizers": shared_state(list(self._compressed.values())) if self.is_global_zero else [],
        }

    @property
    def _ddp_buckets(self) -> list[list[str]]:
        """Names of the parameters in DDP's buckets, if the result depends on them: not for two ranks."""
        if self._hook_state is None or self.world_size <= 2:
            return []
        return [[self._names.get(p, "") for p in params] for params in self._hook_state.buckets]

    def _save_with_parts(self, path: Any, snapshot: Snapshot | None, save: Callable[[], None]) -> None:
        """Save the checkpoint, and before that this rank's part. Collective; what fails on one rank fails on all."""
        if snapshot is None or snapshot.content is None:
            with self._agreement(f"the checkpoint {path}"):
                save()
            return
        parts, save_id, content = Parts(path), snapshot.header["save_id"], snapshot.content
        with self._agreement(f"the parts of the checkpoint {path}"):
            parts.write(save_id, self.global_rank, content.meta, content.arrays)
        with self._agreement(f"the checkpoint {path}"):
            save()
        # One that is written in the background may not be there yet: until it is, the last one counts.
        keep_others = int(isinstance(self.checkpoint_io, AsyncCheckpointIO))
        parts.remove(self.global_rank, self.world_size, keep=save_id, keep_others=keep_others)

    def _resume(
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
        topology = self._topology
        parts = None if path is None else Parts(path, follow_link=True)
        problems: dict[int, str] = {}
        named_parameters = {name: p for p, name in self._names.items()}
        if header["world_size"] == self.world_size and header["ddp_buckets"] and self._hook_state is not None:
            buckets = [[named_parameters.get(name) for name in names] for names in header["ddp_buckets"]]
            self._hook_state.regrouping = Regrouping([[p for p in params if p is not None] for params in buckets])
        if header["phase"] == Phase.COMPRESSED.name:
            self._enter_compressed_phase()
            if not header["is_pending"]:
                self._begin_compressing()
                compressed = list(self._compressed.values())
                if header["space"] == self._space:
                    restore(compressed, optimizers, block_size=header["block_size"])
                    problems = load_errors(compressed, positions, header, parts, topology)
                else:
                    problems = dict.fromkeys(range(header["world_size"]), SPACE)
        if header["has_gradients"]:
            self._loaded_gradients, more = load_gradients(named_parameters, header, parts, topology)
            problems |= more
        self._tell_problems(problems, header, parts)

    def _put_back_gradients(self) -> None:
        """What waited for a step when the checkpoint was saved does so again."""
        for p, gradient in self._loaded_gradients.items():
            p.grad = torch.empty_like(p, memory_format=torch.preserve_format).copy_(gradient)
            self._has_waiting_gradients = True
        self._loaded_gradients = {}

    def _tell_problems(self, problems: Mapping[int, str], header: Mapping[str, Any], parts: Parts | None) -> None:
        codes = torch.zeros(header["world_size"], dtype=torch.int32, device=self.root_device)
        for rank, problem in problems.items():
            codes[rank] = 1 + PROBLEMS.index(problem)
        Communicator().all_reduce_max_(codes)
        unusable = [f"rank {rank} ({PROBLEMS[code - 1]})" for rank, code in enumerate(codes.tolist()) if code]
        if unusable:
            where = "a place that is not known, as it was not loaded from its path" if parts is None else parts.folder
            rank_zero_warn(
                f"The checkpoint's parts of {', '.join(unusable)} cannot be used: what they held of error feedback, and of"
                " gradients that waited for a step, starts at zero. All else goes on as saved. HINT: the parts are files in"
                f" {where}: keep them beside the checkpoint, where all ranks can read them."
            )
