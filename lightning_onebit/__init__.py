"""1-bit error-feedback gradient communication for Lightning.

Importing the package registers the strategies, so that ``Trainer(strategy="onebit_ddp")`` works, and with Fabric
``Fabric(strategy="onebit_ddp")``.
"""

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from lightning_onebit.comm.compressed_allreduce import ErrorFeedback, compressed_all_reduce
from lightning_onebit.comm.stats import CommStats
from lightning_onebit.consistency.divergence import DivergenceError
from lightning_onebit.freeze.criteria import Criterion, FixedStep, Observation, Plan, Ratio, Verdict
from lightning_onebit.freeze.stability import VarianceStability
from lightning_onebit.lightning.callbacks import CommMonitor, DivergenceGuard, PhaseSwitch
from lightning_onebit.lightning.fabric_strategy import OneBitDDPFabricStrategy
from lightning_onebit.lightning.pytorch_lightning import register_refusals
from lightning_onebit.lightning.trainer_strategy import OneBitDDPStrategy
from lightning_onebit.phase import Phase
from lightning_onebit.version import __version__

__all__ = [
    "CommMonitor",
    "CommStats",
    "Criterion",
    "DivergenceError",
    "DivergenceGuard",
    "ErrorFeedback",
    "FixedStep",
    "Observation",
    "OneBitDDPFabricStrategy",
    "OneBitDDPStrategy",
    "Phase",
    "PhaseSwitch",
    "Plan",
    "Ratio",
    "VarianceStability",
    "Verdict",
    "__version__",
    "compressed_all_reduce",
]

OneBitDDPStrategy.register_strategies(StrategyRegistry)
OneBitDDPFabricStrategy.register_strategies(STRATEGY_REGISTRY)
register_refusals([name for name in StrategyRegistry if name.startswith("onebit_")])
