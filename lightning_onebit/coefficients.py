"""The numbers of one step: all that a method says of it beside D (see :mod:`lightning_onebit.methods`)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LARGEST_VALUE = 1e30
"""Nothing larger is quantized: scales travel as float32, and what error feedback adds up must stay far below 3e38, or an
infinity would stay in it for ever."""

SERVER_GAIN_OF_BETA = 0.5
"""A server returns scales that are ``1 + SERVER_GAIN_OF_BETA beta`` times those of C. Along c_bar, C returns three quarters
of it; what it owes would make the momentum longer than beta says. Without momentum, scales larger than those of C let errors
grow. Settled in ``benchmarks/convergence/trial.py``: docs/quality.md."""


class Coefficients(NamedTuple):
    """What steps 1 and 6 of the algorithm need of one parameter::

    1.  c_i = e_i + beta u + weight clamp((sign g_i + coupled_decay x) / D, +-kappa),    D = rms + eps
    6.  x = shrink x - step_size ((1 + nesterov) u - nesterov u_before)

    In momentum space the division comes after the quantizer, which makes all elements of a block equally large, so that a
    bound is needed there::

    6.  x = shrink x - clamp(step_size ((1 + nesterov) u - nesterov u_before) / D, +-largest_move)

    And, where the second moment is renewed, of each rank's own::

        v_i = square_decay v_i + (1 - square_decay) (root_r sign g_i + coupled_decay x)^2
    """

    beta: float
    """Weight of the last average u."""
    weight: float
    """Weight of the new gradient."""
    kappa: float = LARGEST_VALUE
    """Bound of |g / D|."""
    eps: float = 0.0
    sign: float = 1.0
    """-1 to maximize."""
    coupled_decay: float = 0.0
    """Weight decay that enters the gradient."""
    shrink: float = 1.0
    """Decoupled weight decay: a."""
    step_size: float = 0.0
    """eta."""
    largest_move: float = LARGEST_VALUE
    """Bound of ``step_size |u / D|``, in momentum space. Not 0: with ``step_size`` 0, a 0 would lose the sign of a zero."""
    nesterov: float = 0.0
    """The momentum, if the step looks ahead; else 0."""
    square_decay: float = 1.0
    """beta2."""
    root_r: float = 1.0
    """Brings the gradient of one rank to the scale of the mean of all."""

    @property
    def server_gain(self) -> float:
        """What a server multiplies the scales of C by."""
        return 1.0 + SERVER_GAIN_OF_BETA * self.beta

    @property
    def square_root_weight(self) -> float:
        """``sqrt(1 - square_decay)``, so that ``v_i = square_decay v_i + (square_factor g_i + this coupled_decay x)^2``."""
        return np.sqrt(1.0 - self.square_decay)  # of arrays as well, where these stand for numbers

    @property
    def square_factor(self) -> float:
        """``sign root_r sqrt(1 - square_decay)``"""
        return self.sign * self.root_r * self.square_root_weight


LARGEST_RESCALING = 1.25
"""u grows no more than so much at a refresh. What came out of the quantizer is plus or minus the scale of the block, also
where the momentum is nothing: with beta2 = 0.95 and a bound of 4, coordinates whose gradients had ended went six times as
far. Gradients that shrink need no more than this (benchmarks/results/rescaling.txt)."""
LARGEST_EXACT_RESCALING = 4.0
"""The same for a single rank, whose u is the momentum itself: where v has fallen to less than a 16th, D was not that of
these gradients."""


class RefreshNumbers(NamedTuple):
    """What a refresh needs of each parameter; float64 ``[parameters]``, rounded to the dtype of the errors where used."""

    correction: NDArray[np.float64]
    """``1 / (1 - square_decay^t)``"""
    beta: NDArray[np.float64]
    eps: NDArray[np.float64]
