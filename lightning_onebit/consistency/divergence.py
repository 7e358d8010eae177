"""Whether all ranks hold the same parameters, momentum and second moments, bit for bit."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.consistency.checksum import Checksum
from lightning_onebit.methods import method_for

KINDS = ("value", "momentum", "second moment")
"""Of what belongs to a parameter, the parts that are told apart."""


class HasReplicatedState(Protocol):
    """An optimizer of the compressed phase, which holds what a stock one has in ``state``."""

    def replicated_state(self) -> Iterator[tuple[Tensor, str, Iterable[Tensor]]]:
        """A parameter, one of :data:`KINDS`, and tensors that must have the same bits on all ranks."""


class DivergenceError(RuntimeError):
    """The ranks hold different parameters or optimizer state. Raised on all ranks, with the same message."""


def divergence_error(difference: str, *, step: int, agreed_after: int | None) -> DivergenceError:
    """The error for what :func:`difference_between_ranks` found after ``step``, if ``agreed_after`` there was nothing."""
    if agreed_after is None:
        last, earlier = "They were not compared before in this run", "an earlier checkpoint"
    else:
        last = f"All ranks were last seen to agree after step {agreed_after}"
        earlier = f"a checkpoint of step {agreed_after} or earlier"
    return DivergenceError(
        f"The ranks have diverged: after optimizer step {step} {difference}. {last}. Causes may be a memory error of the"
        " hardware, code that changes parameters on one rank only or by this rank's data (in `forward`, as"
        " `nn.Embedding(max_norm=...)` does), or processors that round differently. HINT: resume from"
        f" {earlier}; DivergenceGuard(every_n_steps=1) finds the step, every_n_steps=None compares never."
    )


def replicas(model: DistributedDataParallel) -> dict[Tensor, str]:
    """The parameters that DDP made equal on all ranks, frozen ones as well, with their names."""
    return {
        p: name
        for name, p in model.module.named_parameters()
        # Frozen weights of other types (quantized ones, say) may have no memory of their own to look at.
        if name not in model.parameters_to_ignore and (p.requires_grad or type(p) is nn.Parameter)
    }


def replicated_state(
    optimizers: Iterable[Optimizer], compressed: Mapping[Optimizer, HasReplicatedState]
) -> Iterator[tuple[Tensor, str, Iterable[Tensor]]]:
    """What the optimizers keep of their parameters, alike on all ranks, in either phase."""
    for optimizer in optimizers:
        if optimizer in compressed:
            yield from compressed[optimizer].replicated_state()
            continue
        method = method_for(optimizer)
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                momentum = method.momentum(state)
                if momentum is not None:
                    yield p, "momentum", [momentum]
                # As it is: divided by its bias correction, one of two neighbours may round to the other.
                rest = [t for name, t in state.items() if isinstance(t, Tensor) and t is not momentum and name != "step"]
                yield p, "second moment", rest


def difference_between_ranks(
    parameters: Mapping[Tensor, str],
    state: Iterable[tuple[Tensor, str, Iterable[Tensor]]],
    communicator: Communicator,
    device: torch.device,
) -> str | None:
    """Which ranks hold other bits than the rest, and where the first difference is; ``None`` if there is none. Collective.

    Ranks compare checksums (:mod:`lightning_onebit.consistency.checksum`), 16 bytes each; only if these differ, those of all
    parameters and kinds.

    Args:
        parameters: with their names, in the same order on all ranks.
        state: what optimizers keep of them.
        communicator: the ranks.
        device: where to compute.
    """
    checksum = Checksum(device)
    table = _checksums(parameters, state, checksum)
    digest = torch.stack([checksum.of_checksums(table.view(-1)), torch.tensor(len(table), device=device)])
    digests = _gathered(digest, communicator)
    if (digests == digests[0]).all():
        return None
    lengths = digests[:, 1].tolist()
    if len(set(lengths)) > 1:
        return f"the ranks have different numbers of parameters: {lengths}"
    return _first_difference(_gathered(table, communicator), list(parameters.values()))


def _checksums(
    parameters: Mapping[Tensor, str],
    state: Iterable[tuple[Tensor, str, Iterable[Tensor]]],
    checksum: Checksum,
) -> Tensor:
    """``[parameters, kinds]``, int64."""
    parts: dict[tuple[Tensor, str], list[Iterable[Tensor]]] = defaultdict(list)
    for p, kind, tensors in state:
        parts[p, kind].append(tensors)
    for p in parameters:
        parts[p, "value"].append([p])
    values = [checksum.of(chain.from_iterable(parts[p, kind])) for p in parameters for kind in KINDS]
    return torch.stack(values).view(-1, len(KINDS))


def _gathered(tensor: Tensor, communicator: Communicator) -> Tensor:
    """``tensor`` of every rank, ``[world_size, ...]``, on the CPU."""
    gathered = tensor.new_empty(communicator.world_size * tensor.numel())
    communicator.all_gather_(gathered, tensor.reshape(-1))
    return gathered.view(communicator.world_size, *tensor.shape).cpu()


def _first_difference(tables: Tensor, names: Sequence[str]) -> str:
    """Of ``tables [ranks, parameters, kinds]``, which are not all the same."""
    rows = [tuple(row) for row in tables.flatten(1).tolist()]
    [(most_common, count), *_] = Counter(rows).most_common()
    is_majority = 2 * count > len(rows)
    right = most_common if is_majority else rows[0]
    wrong = [rank for rank, row in enumerate(rows) if row != right]
    who = f"rank {wrong[0]} holds" if len(wrong) == 1 else f"ranks {', '.join(map(str, wrong))} hold"
    than = "the other ranks" if is_majority else "rank 0 (either may be wrong: there is no majority)"

    differs = (tables != tables[0]).any(0)
    affected = differs.any(1).nonzero().flatten().tolist()
    kinds = [kind for kind, has_changed in zip(KINDS, differs[affected[0]].tolist(), strict=True) if has_changed]
    return (
        f"{who} other bits than {than}, in {len(affected)} of {len(names)} parameters. The first of them is"
        f" {names[affected[0]]!r}: its {' and its '.join(kinds)}"
    )
