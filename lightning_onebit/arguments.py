"""Numbers that users pass, checked where they are passed: what comes later would not say whose mistake it was."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def check_steps(name: str, value: Any, *, or_none: str = "") -> int:
    """``value`` as an integer, if it is a whole number of steps >= 1; ``1000.0`` is one.

    Args:
        name: of the argument.
        value: what was passed.
        or_none: what ``None``, which the caller has dealt with, would mean; empty if it is not allowed.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is another number; a fraction of the run is told why it is refused.
    """
    allowed = f"Must be >= 1, a whole number of steps{or_none and f', or None {or_none}'}."
    if not is_number(value):
        raise TypeError(f"Invalid {name}: {value!r}. {allowed}")
    if not (math.isfinite(value) and value >= 1 and value == int(value)):
        reason = (
            " A fraction of the run has no meaning here: it counts in runs of unknown length as well. HINT: multiply it by"
            " the number of steps."
            if 0 < value < 1
            else ""
        )
        raise ValueError(f"Invalid {name}: {value!r}. {allowed}{reason}")
    return int(value)


def check_switch(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is True, False or "auto"; 1 and 0 equal two of them and are none."""
    if not isinstance(value, (bool, str)) or value not in (True, False, "auto"):
        raise ValueError(f"Invalid {name}: {value!r}. Must be 'auto', True or False.")


def is_number(value: Any) -> bool:
    """Whether it is an integer or a floating-point number. ``True`` is neither."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Whether its type is one of integers, those of numpy included. ``True`` is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)
