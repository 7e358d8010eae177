"""Checkpoints under Fabric, which knows no run: every optimizer carries a header of the run in its own state dict.

A stock optimizer disregards the entry. When the last optimizer of a run has loaded its state, with ``fabric.load`` or with
``load_state_dict``, the run goes on as the headers say: all optimizers change phase together. State without a header, or of
some optimizers only, takes the place of theirs, and the phase stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_onebit.checkpoint.manager import CheckpointManager
from lightning_onebit.checkpoint.state import CHECKPOINT_KEY, read_header
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.consistency.agreement import agreement
from lightning_onebit.consistency.settings import checkpoint_settings
from lightning_onebit.lightning.phase_controller import PhaseController
from lightning_onebit.methods import counted_steps
from lightning_onebit.phase import Phase

POSITION = "position"
"""In an optimizer's saved state: which one of all it was."""


class FabricCheckpoints:
    """What :class:`~lightning_onebit.checkpoint.manager.CheckpointManager` needs under Fabric: headers found in state dicts.

    Args:
        phases: of the run.
        checkpoints: resumes it.
    """

    def __init__(self, phases: PhaseController, checkpoints: CheckpointManager) -> None:
        self._phases = phases
        self._checkpoints = checkpoints
        self._headers: dict[Optimizer, Mapping[str, Any]] = {}
        self._path: str | None = None
        """What is being loaded; ``None`` outside :meth:`load`."""

    def watch(self, optimizer: Optimizer) -> None:
        """Look at every state dict that ``optimizer`` loads."""
        optimizer.register_load_state_dict_pre_hook(self._before_loading)
        optimizer.register_load_state_dict_post_hook(self._after_loading)

    def with_header(self, optimizer: Optimizer, state_dict: Mapping[str, Any], header: Mapping[str, Any]) -> dict[str, Any]:
        """``state_dict`` with what the header says of the run and of this optimizer."""
        position = list(self._phases.steps.made).index(optimizer)
        of_all = [name for name in ("optimizers", "optimizer_steps", "with_state", "replaced") if header[name] is not None]
        own = {**header, **{name: header[name][position : position + 1] for name in of_all}, POSITION: position}
        return {**state_dict, CHECKPOINT_KEY: own}

    def load(
        self, path: Any, objects: Sequence[Any], read: Callable[[], dict[str, Any]], device: torch.device
    ) -> dict[str, Any]:
        """Load a checkpoint into ``objects``, and go on as it says if all optimizers are among them. Collective.

        What this rank reads is in place before it is compared with the others'.

        Args:
            path: of the checkpoint.
            objects: what it is loaded into.
            read: loads it, on this rank.
            device: where tensors of collectives live.

        Raises:
            ValueError: in the compressed phase, if only some of the optimizers are loaded.
            RanksDisagree: on all ranks, if they load different checkpoints.
        """
        optimizers = list(self._phases.steps.made)
        loaded = [optimizer for optimizer in optimizers if any(optimizer is each for each in objects)]
        if not loaded:
            return read()
        if self._phases.phase is Phase.COMPRESSED:
            if len(loaded) != len(optimizers):
                raise ValueError(
                    f"Cannot load {len(loaded)} of {len(optimizers)} optimizers in the compressed phase: they change phase"
                    " together. HINT: load all, or call `fabric.strategy.resume_warmup()` first."
                )
            self._phases.drop_compressed_state()
        if len(loaded) == len(optimizers):
            self._phases.waiting_errors.clear()
        self._path = os.fspath(path)
        try:
            with agreement(Communicator(), device, about="the checkpoint that they load") as settings:
                remainder = read()
                header = next(iter(self._headers.values()), None)
                settings.update(checkpoint_settings(self._phases.steps.made.values(), header))
            self._resume_when_all_are_loaded()
        finally:
            self._path = None
        return remainder

    def _before_loading(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._headers.pop(optimizer, None)
        if CHECKPOINT_KEY in state_dict:
            self._headers[optimizer] = read_header(state_dict[CHECKPOINT_KEY])

    def _after_loading(self, optimizer: Optimizer) -> None:
        header = self._headers.get(optimizer)
        if header is not None or counted_steps(optimizer) is not None or self._phases.phase is Phase.WARMUP:
            self._phases.steps.count_loaded(optimizer, () if header is None else header["optimizer_steps"])
        if self._path is None:
            self._resume_when_all_are_loaded()

    def forget(self) -> None:
        """Training goes on: what some optimizers have loaded by now is a state like any other, without its header."""
        self._headers.clear()

    def _resume_when_all_are_loaded(self) -> None:
        made = self._phases.steps.made
        if len(self._headers) == len(made):
            self._phases.drop_compressed_state()
            headers = [self._headers[optimizer] for optimizer in made]
            self._headers.clear()
            optimizers = [entry for header in headers for entry in header["optimizers"]]
            positions = [header[POSITION] for header in headers]
            with_state = [each for header in headers for each in header.get("with_state") or []]
            replaced = [each for header in headers for each in header.get("replaced") or []]
            header = {**headers[0], "with_state": with_state or None, "replaced": replaced or None}
            self._checkpoints.resume(header, optimizers, positions, self._path)
            self._checkpoints.put_back_gradients()
