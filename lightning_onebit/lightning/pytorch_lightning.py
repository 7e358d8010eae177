"""What a user of ``pytorch_lightning``, the twin package of ``lightning``, is told.

The twin has classes of the same names that are others, and a registry of its own: nothing made for the one works with the
other. Its Trainer refuses our strategy as an object, and our strings as unknown names.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

HINT = (
    "lightning_onebit works with the package `lightning`, not with its twin `pytorch_lightning`. HINT: write `import"
    " lightning.pytorch as pl` instead of `import pytorch_lightning as pl`; all names stay the same."
)


def explain_to_twin(names: list[str]) -> None:
    """Have the twin's Trainer say so if it is given one of our strings, provided that it has been imported before."""
    twin = sys.modules.get("pytorch_lightning.strategies")
    if twin is not None:
        for name in names:
            if name not in twin.StrategyRegistry:
                twin.StrategyRegistry.register(name, _refuse, description="Only with the package `lightning`")


def comes_from_twin(thing: object) -> bool:
    """Whether a Trainer, or anything else, is the twin's."""
    return any(kind.__module__.split(".")[0] == "pytorch_lightning" for kind in type(thing).__mro__)


def _refuse(**_: Any) -> NoReturn:
    raise TypeError(HINT)
