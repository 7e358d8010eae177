"""What all ranks agree on before an optimizer steps, in one tiny all-reduce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.consistency.agreement import exchange, raise_disagreement, short_digest
from lightning_onebit.engine.flat import all_finite
from lightning_onebit.methods import hyperparameters, parameters_of


class Consensus:
    """Whether a step is made, of which parameters, and whose gradients were in the way: the same answers on all ranks.

    Args:
        optimizer: the optimizer, whose settings have to be the same as well.
        parameters: those that take part, the same on all ranks.
        communicator: the ranks.
        names: parameter names for messages.
        device: where tensors of collectives live.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Sequence[Tensor],
        communicator: Communicator,
        names: Mapping[Tensor, str],
        device: torch.device,
    ) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._communicator = communicator
        self._names = names
        self._device = device
        self._nonfinite_here: list[bool] | None = None

    def reach(self, *, skip: bool, changed: Sequence[Tensor]) -> tuple[bool, dict[Tensor, bool]]:
        """Whether no rank wants to skip; which parameters have a gradient on any rank. Collective.

        Settings that the step is about to use are compared in the same message: ranks that did not use the same would
        drift apart, or hang.

        Args:
            skip: whether this rank wants to skip the step.
            changed: parameters that are new, or in another group, since the second moment was frozen.

        Raises:
            RanksDisagree: on all ranks, if settings of the optimizer, which schedulers may have changed, or ``changed`` are
                not the same.
        """
        settings = {
            **hyperparameters(self._optimizer),
            "parameters that are new or elsewhere": ", ".join(self._names.get(p, "a parameter") for p in changed),
        }
        digest = short_digest(settings)
        has_gradient = [p.grad is not None for p in self._parameters]
        flags = torch.tensor([skip, digest, -digest, *has_gradient], dtype=torch.int32, device=self._device)
        self._communicator.all_reduce_max_(flags)
        any_skips, largest, minus_smallest, *active = flags.tolist()
        if largest != -minus_smallest:
            raise_disagreement(exchange(self._communicator, settings, self._device), about="the optimizer's settings")
        return not any_skips, {p: bool(flag) for p, flag in zip(self._parameters, active, strict=True)}

    @property
    def found_nonfinite(self) -> bool:
        """Whether a gradient was infinite or NaN on some rank since :meth:`forget_nonfinite`; the same on all."""
        return self._nonfinite_here is not None

    def note_nonfinite(self) -> None:
        """Keep in mind whose gradients are not finite on this rank.

        The first look at them counts: what comes after it, as clipping, makes others so.
        """
        if self._nonfinite_here is None:
            self._nonfinite_here = [p.grad is not None and not all_finite([p.grad]) for p in self._parameters]

    def forget_nonfinite(self) -> None:
        """What was found concerned a step that is over."""
        self._nonfinite_here = None

    def nonfinite_gradients(self) -> dict[Tensor, list[int]]:
        """The parameters whose gradients were found infinite or NaN, and the ranks where. Collective."""
        here = self._nonfinite_here
        if not here:
            return {}
        flags = torch.tensor(here, dtype=torch.uint8, device=self._device)
        gathered = flags.repeat(self._communicator.world_size)
        self._communicator.all_gather_(gathered, flags)
        found: dict[Tensor, list[int]] = {p: [] for p in parameters_of(self._optimizer)}  # in the user's order
        for rank, index in gathered.view(-1, len(here)).nonzero().tolist():
            found[self._parameters[index]].append(rank)
        return {p: ranks for p, ranks in found.items() if ranks}
