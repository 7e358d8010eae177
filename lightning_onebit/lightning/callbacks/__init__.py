"""Lightning callbacks: when to switch the phase, what to show of it, and whether all ranks are still the same."""

from lightning_onebit.lightning.callbacks.comm_monitor import CommMonitor
from lightning_onebit.lightning.callbacks.divergence_guard import DivergenceGuard
from lightning_onebit.lightning.callbacks.phase_switch import PhaseSwitch

__all__ = ["CommMonitor", "DivergenceGuard", "PhaseSwitch"]
