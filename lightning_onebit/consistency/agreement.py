"""Whether all ranks say the same: one small all-reduce if they do, and otherwise what each of them said.

A rank describes something by *facts*, strings by name. Ranks compare digests, whose size does not depend on the facts, so it
does no harm if one rank has more of them than another. Only where digests differ are the facts themselves exchanged,
and then every rank has those of all, and can say what differs instead of waiting for somebody who does something else.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_onebit.comm.primitives import Communicator

Facts: TypeAlias = Mapping[str, str]

FAILURE = "failure"
"""Name of the fact that a rank could not do its part, and why."""

ADVISORY = "version of "
"""How the names of facts begin that may differ, with a warning."""

DIFFERENCES_SHOWN = 5
DIGEST_WORDS = 2
BITS_OF_WORD = 62  # its negative is an int64, too


class RanksDisagree(RuntimeError):
    """The ranks differ in something in which they must not. Raised on all of them."""


@contextmanager
def agreement(communicator: Communicator, device: torch.device, *, about: str) -> Iterator[dict[str, str]]:
    """Within, every rank states its facts, and does only what concerns no other rank. Afterwards they are the same on all.

    Args:
        communicator: the ranks.
        device: where tensors of collectives live.
        about: what has to be the same, for messages.

    Raises:
        RanksDisagree: on all ranks, if facts differ; on all others, if there was an exception on some.
        Exception: what was raised within, after the others have been told.
    """
    facts: dict[str, str] = {}
    failure = None
    try:
        yield facts
    except Exception as error:
        failure = error
        facts = {FAILURE: f"{type(error).__name__}: {error}"}
    try:
        everybodys = facts_if_different(communicator, facts, device)
    except RuntimeError as error:
        if failure is not None:
            raise failure from None
        raise RuntimeError(
            f"The ranks could not compare {about}: {error}. HINT: see whether another rank has failed before, and whether"
            " all use the same strategy and the same version of lightning_onebit."
        ) from error
    if failure is not None:
        raise failure
    if everybodys is not None:
        raise_disagreement([_without_advisory(each) for each in everybodys], about=about)
        if communicator.rank == 0:
            warnings.warn(f"The ranks differ in software: {'; '.join(differences(everybodys))}.", stacklevel=3)


def facts_if_different(communicator: Communicator, facts: Facts, device: torch.device) -> list[Facts] | None:
    """``None`` if the facts of all ranks are the same, else those of every rank, in rank order. Collective."""
    words = _digest(facts)
    extremes = torch.tensor([*words, *(-word for word in words)], dtype=torch.int64, device=device)
    communicator.all_reduce_max_(extremes)
    largest, minus_smallest = extremes.view(2, -1)
    return None if torch.equal(largest, -minus_smallest) else exchange(communicator, facts, device)


def exchange(communicator: Communicator, facts: Facts, device: torch.device) -> list[Facts]:
    """The facts of every rank, in rank order. Collective."""
    text = json.dumps(dict(facts)).encode()
    longest = torch.tensor(len(text), dtype=torch.int64, device=device)
    communicator.all_reduce_max_(longest)
    numel = int(longest)
    message = torch.frombuffer(bytearray(text.ljust(numel)), dtype=torch.uint8).to(device)
    gathered = torch.empty(communicator.world_size * numel, dtype=torch.uint8, device=device)
    communicator.all_gather_(gathered, message)
    return [json.loads(_bytes(part)) for part in gathered.view(communicator.world_size, numel)]


def raise_disagreement(everybodys: Sequence[Facts], *, about: str) -> None:
    """Raise :class:`RanksDisagree` with the failures of ranks, or else the first few differences, if there are any."""
    failures = [f"rank {rank}: {facts[FAILURE]}" for rank, facts in enumerate(everybodys) if FAILURE in facts]
    if failures:
        raise RanksDisagree(
            f"All ranks stop, because some of them failed ({about}):\n  " + "\n  ".join(failures[:DIFFERENCES_SHOWN])
        )
    lines = differences(everybodys)
    if not lines:
        return
    shown = "\n  ".join(lines[:DIFFERENCES_SHOWN])
    more = f"\n  and {len(lines) - DIFFERENCES_SHOWN} more" if len(lines) > DIFFERENCES_SHOWN else ""
    raise RanksDisagree(
        f"The ranks differ in {about}:\n  {shown}{more}\nHINT: start all ranks with the same code, versions and arguments,"
        " and do the same on all."
    )


def differences(everybodys: Sequence[Facts]) -> list[str]:
    """One line for each fact that is not the same everywhere: who says what."""
    lines = []
    for name in dict.fromkeys(name for facts in everybodys for name in facts):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, facts in enumerate(everybodys):
            ranks_by_value.setdefault(facts.get(name) or "none", []).append(rank)
        if len(ranks_by_value) > 1:
            said = (f"{value} on {listed_ranks(ranks)}" for value, ranks in ranks_by_value.items())
            lines.append(f"{name}: {', but '.join(said)}")
    return lines


def listed_ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, or ``ranks 0, 1, 2 and 5 more``."""
    shown = ", ".join(map(str, ranks[:3])) + (f" and {len(ranks) - 3} more" if len(ranks) > 3 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"


def short_digest(facts: Facts) -> int:
    """31 bits, for messages of int32."""
    return _digest(facts)[0] % 2**31


def _without_advisory(facts: Facts) -> Facts:
    return {name: value for name, value in facts.items() if not name.startswith(ADVISORY)}


def _digest(facts: Facts) -> list[int]:
    digest = hashlib.sha256(json.dumps(list(facts.items())).encode()).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") % 2**BITS_OF_WORD for i in range(DIGEST_WORDS)]


def _bytes(message: Tensor) -> bytes:
    return message.cpu().numpy().tobytes()
