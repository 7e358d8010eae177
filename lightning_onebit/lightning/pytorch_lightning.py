"""What a user of ``pytorch_lightning``, the other package with Lightning in it, is told.

It has other classes of the same names, and a registry of its own: nothing made for one package works with the other. Its
Trainer refuses our strategy as an object, and our strings as unknown names.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

HINT = (
    "lightning_onebit works with the package `lightning`, not with `pytorch_lightning`. HINT: write `import"
    " lightning.pytorch as pl` instead of `import pytorch_lightning as pl`; all names stay the same."
)


def register_refusals(names: list[str]) -> None:
    """Have the Trainer of ``pytorch_lightning``, if that has been imported before, refuse our strings with the remedy."""
    strategies = sys.modules.get("pytorch_lightning.strategies")
    if strategies is not None:
        for name in names:
            if name not in strategies.StrategyRegistry:
                strategies.StrategyRegistry.register(name, _refuse, description="Only with the package `lightning`")


def is_pytorch_lightning(thing: object) -> bool:
    """Whether a Trainer, or anything else, is of a class of ``pytorch_lightning``."""
    return any(kind.__module__.split(".")[0] == "pytorch_lightning" for kind in type(thing).__mro__)


def _refuse(**_: Any) -> NoReturn:
    raise TypeError(HINT)
