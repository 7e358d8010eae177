"""What a checkpoint of the compressed phase holds beside the stock state of the optimizers.

The ``.ckpt`` stays an ordinary Lightning checkpoint: ``optimizer_states`` is what stock optimizers would have written (see
:class:`~lightning_onebit.engine.CompressedOptimizer`), so plain ``strategy="ddp"`` can load it. Under a key of its own
lies, per optimizer and parameter, what error feedback has not applied yet: the mean of the worker errors plus the server
error. It has no rank in it and so fits any world size: every rank starts with it as its worker error, which preserves
the sum of everything that is still to be applied.

Tensors, dicts, lists, strings and integers only: it loads with ``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.engine import CompressedOptimizer
from lightning_onebit.optim import parameters_of

CHECKPOINT_KEY = "lightning_onebit"
VERSION = 1


def compressed_state(compressed: Sequence[CompressedOptimizer], *, with_errors: bool) -> dict[str, Any]:
    """The entry under :data:`CHECKPOINT_KEY`, the same on all ranks.

    Args:
        compressed: the compressed optimizers, in Lightning's order.
        with_errors: whether to collect the errors, which is collective.
    """
    outstanding = [_by_index(c.optimizer, c.outstanding()) if with_errors else {} for c in compressed]
    return {"version": VERSION, "outstanding": outstanding}


def load_compressed_state(compressed: Sequence[CompressedOptimizer], state: Mapping[str, Any]) -> None:
    """Add the errors of a checkpoint to those of ``compressed``, in place.

    Raises:
        ValueError: if another version wrote the state, or for another number of compressed optimizers.
    """
    if state["version"] != VERSION:
        raise ValueError(
            f"The checkpoint's state of lightning_onebit has version {state['version']}, but this is version {VERSION}."
            " HINT: use the release of lightning_onebit that wrote it."
        )
    if len(state["outstanding"]) != len(compressed):
        raise ValueError(
            f"The checkpoint was written with {len(state['outstanding'])} compressed optimizers, but there are"
            f" {len(compressed)} now. HINT: return the same ones from `configure_optimizers`, or load it with ckpt_path in"
            " strategy='ddp'."
        )
    for c, errors in zip(compressed, state["outstanding"], strict=True):
        params = parameters_of(c.optimizer)
        c.add_outstanding_({params[int(index)]: error.to(params[int(index)].device) for index, error in errors.items()})


def _by_index(optimizer: Optimizer, errors: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
    """Keyed by the position of the parameter, as in torch's optimizer state."""
    return {str(index): errors[p].cpu() for index, p in enumerate(parameters_of(optimizer)) if p in errors}
