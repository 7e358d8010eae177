"""The two phases of a run."""

import enum


class Phase(enum.Enum):
    """What the strategy does with gradients.

    A run starts in ``WARMUP`` and is moved on by :class:`lightning_onebit.PhaseSwitch`,
    or by hand with ``strategy.freeze_variance()`` and ``strategy.resume_warmup()``.
    """

    WARMUP = "warmup"
    """Plain DDP: gradients are averaged at full precision, the user's optimizer runs untouched."""

    COMPRESSED = "compressed"
    """The second moment is frozen; workers exchange signs and block scales."""
