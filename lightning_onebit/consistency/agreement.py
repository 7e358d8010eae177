"""Whether all ranks have the same settings: one small all-reduce if they do, else an exchange of all settings.

Settings are strings by name. The ranks compare digests of them, whose size does not depend on the settings: one rank may
have more of them than another. Only if the digests differ, the settings themselves are exchanged; then every rank names the
difference, and none waits in a collective that another rank never calls.
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

Settings: TypeAlias = Mapping[str, str]
"""What a rank states, by name. The order of the names matters to the digest only."""

FAILURE = "failure"
"""The name under which a rank states that it could not do its part, and why."""

ADVISORY = "version of "
"""Settings whose names begin so may differ: that is a warning."""

DIFFERENCES_SHOWN = 5
NAMES_SHOWN = 3
"""Parameters that a message names."""
DIGEST_WORDS = 2
BITS_OF_WORD = 62  # its negative is an int64, too


class RanksDisagree(RuntimeError):
    """The ranks differ in something in which they must not. Raised on all of them."""


@contextmanager
def agreement(communicator: Communicator, device: torch.device, *, about: str) -> Iterator[dict[str, str]]:
    """Within, every rank states its settings, and does nothing collective. Afterwards they are the same on all ranks.

    Yields a dict, to be filled with this rank's settings. Collective: one all-reduce of 32 bytes if all is well.

    Args:
        communicator: the ranks.
        device: where tensors of collectives live.
        about: what has to be the same, for messages.

    Raises:
        RanksDisagree: on all ranks, if settings differ; on all others, if there was an exception on some.
        Exception: what was raised within, after the others have been told.
    """
    settings: dict[str, str] = {}
    failure = None
    try:
        yield settings
    except Exception as error:
        failure = error
        settings = {FAILURE: f"{type(error).__name__}: {error}"}
    try:
        of_all = exchange_if_different(communicator, settings, device)
    except RuntimeError as error:
        if failure is not None:
            raise failure from None
        raise RuntimeError(
            f"The ranks could not compare {about}: {error}. HINT: see whether another rank has failed before, and whether"
            " all use the same strategy and the same version of lightning_onebit."
        ) from error
    if failure is not None:
        raise failure
    if of_all is not None:
        raise_disagreement([_without_advisory(each) for each in of_all], about=about)
        if communicator.rank == 0:
            warnings.warn(f"The ranks differ in software: {'; '.join(differences(of_all))}.", stacklevel=3)


def exchange_if_different(communicator: Communicator, settings: Settings, device: torch.device) -> list[Settings] | None:
    """``None`` if all ranks have the same settings, else those of every rank, in rank order. Collective."""
    words = _digest(settings)
    extremes = torch.tensor([*words, *(-word for word in words)], dtype=torch.int64, device=device)
    communicator.all_reduce_max_(extremes)
    largest, minus_smallest = extremes.view(2, -1)
    return None if torch.equal(largest, -minus_smallest) else exchange(communicator, settings, device)


def exchange(communicator: Communicator, settings: Settings, device: torch.device) -> list[Settings]:
    """The settings of every rank, in rank order. Collective."""
    text = json.dumps(dict(settings)).encode()
    longest = torch.tensor(len(text), dtype=torch.int64, device=device)
    communicator.all_reduce_max_(longest)
    numel = int(longest)
    message = torch.frombuffer(bytearray(text.ljust(numel)), dtype=torch.uint8).to(device)
    gathered = torch.empty(communicator.world_size * numel, dtype=torch.uint8, device=device)
    communicator.all_gather_(gathered, message)
    return [json.loads(_bytes(part)) for part in gathered.view(communicator.world_size, numel)]


def raise_disagreement(of_all: Sequence[Settings], *, about: str) -> None:
    """Raise :class:`RanksDisagree` with the failures of ranks, or else the first few differences, if there are any."""
    failures = [f"rank {rank}: {settings[FAILURE]}" for rank, settings in enumerate(of_all) if FAILURE in settings]
    if failures:
        raise RanksDisagree(
            f"All ranks stop, because some of them failed ({about}):\n  " + "\n  ".join(failures[:DIFFERENCES_SHOWN])
        )
    lines = differences(of_all)
    if not lines:
        return
    shown = "\n  ".join(lines[:DIFFERENCES_SHOWN])
    more = f"\n  and {len(lines) - DIFFERENCES_SHOWN} more" if len(lines) > DIFFERENCES_SHOWN else ""
    raise RanksDisagree(
        f"The ranks differ in {about}:\n  {shown}{more}\nHINT: start all ranks with the same code, versions and arguments,"
        " and do the same on all."
    )


def differences(of_all: Sequence[Settings]) -> list[str]:
    """One line for each setting that is not the same everywhere: its values, and whose they are."""
    lines = []
    for name in dict.fromkeys(name for settings in of_all for name in settings):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, settings in enumerate(of_all):
            ranks_by_value.setdefault(settings.get(name) or "none", []).append(rank)
        if len(ranks_by_value) > 1:
            said = (f"{value} on {listed_ranks(ranks)}" for value, ranks in ranks_by_value.items())
            lines.append(f"{name}: {', but '.join(said)}")
    return lines


def listed_ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, or ``ranks 0, 1, 2 and 5 more``."""
    shown = ", ".join(map(str, ranks[:3])) + (f" and {len(ranks) - 3} more" if len(ranks) > 3 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"


def short_digest(settings: Settings) -> int:
    """31 bits, for messages of int32."""
    return _digest(settings)[0] % 2**31


def _without_advisory(settings: Settings) -> Settings:
    return {name: value for name, value in settings.items() if not name.startswith(ADVISORY)}


def _digest(settings: Settings) -> list[int]:
    digest = hashlib.sha256(json.dumps(list(settings.items())).encode()).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") % 2**BITS_OF_WORD for i in range(DIGEST_WORDS)]


def _bytes(message: Tensor) -> bytes:
    return message.cpu().numpy().tobytes()
