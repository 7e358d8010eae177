"""Lightning callbacks: when to switch the phase, and what to show of it."""

from lightning_onebit.callbacks.comm_monitor import CommMonitor
from lightning_onebit.callbacks.phase_switch import PhaseSwitch

__all__ = ["CommMonitor", "PhaseSwitch"]
