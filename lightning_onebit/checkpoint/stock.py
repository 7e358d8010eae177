"""Whether the stock state that was loaded is what was saved, or what user code has put in its place.

A checkpoint of the compressed phase says the same twice: as stock state, for others, and exactly, for us. Stock state is
what users edit (``on_load_checkpoint``, ``torch.load`` and ``torch.save``): scale a second moment, or take that of another
run. What is restored must then not be what was saved. Both were written from the same state, so they are equal to the
rounding, unless somebody has changed one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.engine.optimizer import CompressedOptimizer

ROUNDINGS = 4
"""How many units in the last place do not count: another device may round otherwise."""


class LoadedState:
    """The stock state of optimizers as it was loaded, until it is known whether it is what was saved.

    On the CPU, where no copy is made of what is there already.

    Args:
        optimizers: which have loaded it, and will give it away.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._states = {
            optimizer: {
                p: {name: (_on_cpu(value), getattr(value, "device", None)) for name, value in state.items()}
                for p, state in optimizer.state.items()
            }
            for optimizer in optimizers
        }

    def is_what_was_saved(
        self,
        compressed: CompressedOptimizer,
        saved: Mapping[Tensor, Mapping[str, Tensor]],
        *,
        block_size: int,
        with_momentum: bool,
    ) -> bool:
        """Whether ``compressed`` was restored from just this state.

        Args:
            compressed: of one of the optimizers, restored.
            saved: what it was restored from. D of there is compared, as here it may have been rounded to codes, or to those
                of other blocks.
            block_size: of then.
            with_momentum: whether its momentum was restored, too.
        """
        states = self._states[compressed.optimizer]
        for p, entry in compressed.state.stock_state(saved, block_size=block_size).items():
            momentum = compressed.method.momentum(entry)
            loaded = states.get(p, {})
            for name, expected in entry.items():
                is_momentum = expected is momentum or expected is None
                if loaded and (with_momentum or not is_momentum) and not _is_same(loaded.get(name, (None,))[0], expected):
                    return False
        return True

    def put_back(self, optimizer: Optimizer) -> None:
        """Have the optimizer hold this state, in the place of what was frozen: as if user code had just loaded it."""
        state: defaultdict[Any, Any] = defaultdict(dict)
        for p, loaded in self._states[optimizer].items():
            state[p] = {name: value if device is None else value.to(device) for name, (value, device) in loaded.items()}
        optimizer.state = state


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _is_same(value: Any, expected: Any) -> bool:
    if not isinstance(value, Tensor) or not isinstance(expected, Tensor):
        return value is None and expected is None
    expected = _on_cpu(expected)
    if value.dtype != expected.dtype:  # `step`, say, which torch loads as it is
        return value.shape == expected.shape and torch.equal(value.double(), expected.double())
    if value.shape != expected.shape or torch.equal(value, expected):
        return value.shape == expected.shape
    limits = torch.finfo(value.dtype)
    if torch.isclose(value, expected, rtol=ROUNDINGS * limits.eps, atol=ROUNDINGS * limits.tiny * limits.eps).all():
        return True
    # Saved when the parameter had a smaller dtype.
    return any(torch.equal(value, expected.to(dtype).to(value.dtype)) for dtype in (torch.bfloat16, torch.float16))


def replaced_before_saving(header: Mapping[str, Any], index: int) -> bool:
    """Whether the header says that the stock state of an optimizer was replaced after it was frozen."""
    replaced = header.get("replaced") or []
    return index < len(replaced) and replaced[index]
