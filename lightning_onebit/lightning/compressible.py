"""Which gradients are compressed and which stay dense, where a run has several optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_onebit.consistency.agreement import NAMES_SHOWN
from lightning_onebit.methods import method_for, parameters_of


@dataclass(frozen=True, kw_only=True)
class CompressibleOptimizers:
    """The optimizers of a run, each in Lightning's order: those that can be compressed, and the others."""

    compressed: Sequence[Optimizer] = ()
    dense: Mapping[Optimizer, str] = field(default_factory=dict)
    """Those that cannot be compressed, and why."""

    def remarks(self, module: nn.Module) -> list[str]:
        """What a user should know: which part of the gradients is not going to be compressed, and why."""
        names: dict[Tensor, str] = {p: name for name, p in module.named_parameters() if p.requires_grad}
        total_nbytes = sum(p.nbytes for p in names)

        def size(params: Sequence[Tensor]) -> str:
            share = sum(p.nbytes for p in params) / max(1, total_nbytes)
            return f"{sum(p.numel() for p in params):,} parameters ({share:.0%} of the bytes of all gradients)"

        remarks = []
        for optimizer, reason in self.dense.items():
            own = [p for p in parameters_of(optimizer) if p.requires_grad]
            remarks.append(
                f"The gradients of {type(optimizer).__name__}, for {size(own)}, are never compressed: they stay as under"
                f" DDP. {reason}"
            )
        owned = set(parameters_of(*self.compressed, *self.dense))
        orphans = [p for p in names if p not in owned]
        if orphans:
            remarks.append(
                f"The gradients of {size(orphans)} are never compressed, as no optimizer has them: {listed(orphans, names)}."
                " HINT: give them to an optimizer, or call `requires_grad_(False)`, and DDP need not send them at all."
            )
        return remarks


def compressible(optimizers: Sequence[Optimizer]) -> CompressibleOptimizers:
    """Tell the optimizers that can be compressed from the others.

    Raises:
        ValueError: if none can.
    """
    compressed, dense = [], {}
    for optimizer in optimizers:
        try:
            method_for(optimizer)
            compressed.append(optimizer)
        except ValueError as error:
            dense[optimizer] = str(error)
    if not compressed:
        beside = " Beside one that can be compressed, others may stand: their gradients stay dense, as under DDP."
        reasons = " ".join(dict.fromkeys(dense.values()))
        none = "There is no optimizer: nothing can be compressed. HINT: return one from `configure_optimizers`."
        raise ValueError(reasons + beside if reasons else none)
    return CompressibleOptimizers(compressed=compressed, dense=dense)


def listed(params: Sequence[Tensor], names: Mapping[Tensor, str]) -> str:
    """The first few parameters by name, for a message."""
    shown = [repr(names[p]) if p in names else f"one of shape {tuple(p.shape)}" for p in params[:NAMES_SHOWN]]
    return ", ".join(shown) + (f" and {len(params) - NAMES_SHOWN} more" if len(params) > NAMES_SHOWN else "")
