"""What all ranks agree on when an optimizer steps, in one small all-reduce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.consistency.agreement import exchange, raise_disagreement, short_digest
from lightning_onebit.methods import hyperparameters, method_for, parameters_of, used_values

DIGEST, NEWS = 1, 3
"""Places in the message, after those of the parameters."""
NUM_REQUESTS = 2
"""Whole numbers that ride along for whoever wants to tell all ranks something between two batches."""


def agreement_nbytes(num_parameters: int) -> int:
    """Bytes of the message of a step of ``num_parameters`` parameters; see :meth:`StepAgreement.propose`."""
    return torch.int32.itemsize * (1 + num_parameters + NEWS + NUM_REQUESTS)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The same on all ranks."""

    counts: bool
    """Whether the step is made: no rank wants to skip it, and no gradient is infinite or NaN."""
    active: list[bool]
    """Of each parameter, whether it has a gradient on any rank."""
    has_news: bool
    """Whether any rank asks for a refresh."""
    requests: list[int]
    """The largest that any rank has made, each."""
    beside: list[NDArray[np.float32]]
    """What was brought to the host together with this."""


class StepAgreement:
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
        self._settings: tuple[object, ...] = ()
        self._digest = 0
        self._changed: Sequence[Tensor] = ()
        self.replacements = 0
        """How often user code has replaced the optimizer's state since the freeze: if on some ranks only, they would drift
        apart. To be set before the first step."""
        self.requests = [0] * NUM_REQUESTS
        """To be told to all ranks with the next step; whole numbers >= 0."""

    def propose(self, *, skip: bool, has_news: bool, changed: Sequence[Tensor]) -> Tensor:
        """What this rank has to say: int32 ``[1 + parameters + others]``, on the device. See :meth:`share_`.

        The first element is 1 if the step shall not count, as this rank wants to skip it; then, by parameter, whether it
        has a gradient. Settings that the step is about to use are compared in the same message: ranks that did not use the
        same would drift apart, or hang.

        Args:
            skip: whether this rank wants to skip the step.
            has_news: whether it asks for a refresh.
            changed: parameters that are new, or in another group, since the second moment was frozen.

        Raises:
            ValueError: if an option of the optimizer is one that is not supported.
        """
        settings = (*(value for _, _, value in used_values(self._optimizer)), *map(id, changed))
        if settings != self._settings:  # told apart cheaply, described only then
            method_for(self._optimizer)  # refuses an option that is not supported and was set since the freeze
            self._settings, self._changed = settings, changed
            self._digest = short_digest(self._description())
        has_gradient = [p.grad is not None for p in self._parameters]
        words = torch.tensor([skip, *has_gradient, self._digest, -self._digest, has_news, *self.requests], dtype=torch.int32)
        if self._device.type == "cuda":
            words = words.pin_memory()
        return words.to(self._device, non_blocking=True)

    def add_(self, words: Tensor, *, skip: Sequence[Tensor], has_news: Sequence[Tensor]) -> None:
        """Add to ``words`` what only the device knows, without waiting for it: int32 ``[1]`` each, not 0 if so."""
        for place, flags in ((0, skip), (len(self._parameters) + NEWS, has_news)):
            word = words[place : place + 1]
            for flag in flags:
                torch.maximum(word, flag, out=word)

    def stop_if_different_(self, words: Tensor) -> None:
        """After :meth:`share_`, on the device: ranks that do not use the same settings make no step.

        :meth:`read` will raise, but only when the step has been launched.
        """
        first = len(self._parameters) + DIGEST
        different = words[first : first + 1] != words[first + 1 : first + 2].neg()
        torch.maximum(words[:1], different, out=words[:1])

    def share_(self, words: Tensor) -> None:
        """Make ``words`` those of all ranks, in place. Collective; does not wait for the device."""
        self._communicator.all_reduce_max_(words)

    def read(self, words: Tensor, beside: Sequence[Tensor] = ()) -> Outcome:
        """What :meth:`share_` has led to. Waits for the device, once; collective only where the ranks disagree.

        Args:
            words: that have been shared.
            beside: float32 on the device, to be brought to the host with the same wait.

        Raises:
            RanksDisagree: on all ranks, if settings of the optimizer, which schedulers may have changed, or its parameters
                are not the same.
        """
        numel = len(words)
        if beside:  # the bits of floats travel as int32
            words = torch.cat([words, *(each.reshape(-1).view(torch.int32) for each in beside)])
        values = words.tolist()
        stop, *rest = values[:numel]
        floats, bits = [], np.array(values[numel:], dtype=np.int32).view(np.float32)
        for each in beside:
            floats.append(bits[: each.numel()].reshape(each.shape))
            bits = bits[each.numel() :]
        active, (largest, minus_smallest, news, *requests) = rest[: len(self._parameters)], rest[len(self._parameters) :]
        if largest != -minus_smallest:
            everybodys = exchange(self._communicator, self._description(), self._device)
            raise_disagreement(everybodys, about="the optimizer's settings")
        return Outcome(
            counts=not stop,
            active=[bool(flag) for flag in active],
            has_news=bool(news),
            requests=requests,
            beside=floats,
        )

    def _description(self) -> dict[str, str]:
        changed = ", ".join(self._names.get(p, "a parameter") for p in self._changed)
        return {
            **hyperparameters(self._optimizer),
            "parameters that are new or elsewhere": changed,
            "times that its state was replaced": str(self.replacements),
        }

    @property
    def found_nonfinite(self) -> bool:
        """Whether a gradient was infinite or NaN on some rank since :meth:`forget_nonfinite`; the same on all."""
        return self._nonfinite_here is not None

    def note_nonfinite(self) -> None:
        """Keep in mind whose gradients are not finite on this rank.

        The first look at them counts: what comes after it, as clipping, makes others so.
        """
        if self._nonfinite_here is None:
            # One wait for all. A finite norm has finite elements; the reverse does not hold.
            having = [i for i, p in enumerate(self._parameters) if p.grad is not None and p.grad.numel()]
            gradients = [self._parameters[i].grad for i in having]
            norms = torch._foreach_norm(gradients) if gradients else []  # type: ignore[arg-type]
            suspected = torch.stack([~norm.isfinite().to(self._device) for norm in norms]).tolist() if norms else []
            self._nonfinite_here = [False] * len(self._parameters)
            for i, is_suspected in zip(having, suspected, strict=True):
                if is_suspected:
                    gradient = self._parameters[i].grad
                    self._nonfinite_here[i] = gradient is not None and not bool(torch.isfinite(gradient).all())

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
