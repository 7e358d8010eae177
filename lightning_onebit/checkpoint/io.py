"""How a ``.ckpt`` is written: so that an interrupted save leaves the previous one as it was."""

from __future__ import annotations

import os
from typing import Any

import torch
from fsspec.core import url_to_fs
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from typing_extensions import override

from lightning_onebit.checkpoint.parts import durable_file


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's, but for how a file gets its place: written beside it, flushed to disk, renamed.

    Lightning's own writes to the folder for temporary files and moves the result, which copies where that is on another
    disk, into a half-written checkpoint if interrupted, and does not flush.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)  # raises, and says why
        filesystem, path = url_to_fs(os.fspath(path))
        filesystem.makedirs(os.path.dirname(path), exist_ok=True)
        with durable_file(path, filesystem) as file:
            torch.save(checkpoint, file)


def durable_io(of_user: CheckpointIO | None) -> CheckpointIO:
    """What writes checkpoints: the user's, or else :class:`DurableCheckpointIO`; also inside one that wraps another."""
    if of_user is None:
        return DurableCheckpointIO()
    if isinstance(of_user, _WrappingCheckpointIO):
        of_user.checkpoint_io = DurableCheckpointIO()  # without effect if it wraps one already
    return of_user
