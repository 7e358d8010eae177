"""A rank's own part of a checkpoint: a file beside the ``.ckpt``, and how files are written so that none is ever half there.

``model.ckpt`` has its parts in the folder ``model.ckpt.onebit``, one ``SAVE-rank-R.npz`` for each rank R, where SAVE names
one act of saving. Saving once more to the same path so writes new files beside the old ones, and whichever ``model.ckpt`` is
there has its parts complete: first all parts are written, then the checkpoint that names them, and then older ones go.

A part is numpy's ``.npz`` (a ZIP archive with checksums) with arrays of numbers and one JSON text: reading it runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

FOLDER_SUFFIX = ".onebit"
VERSION = 2
META = "meta"
MISSING, UNREADABLE, DAMAGED, FOREIGN, WORLD_SIZE, SPACE = PROBLEMS = (
    "missing",
    "unreadable",
    "damaged",
    "of another checkpoint",
    "of another number of ranks",
    "quantized in another space",
)


class PartError(ValueError):
    """A part cannot be used; ``problem`` is one of :data:`PROBLEMS`, the message says more."""

    def __init__(self, problem: str, details: str) -> None:
        super().__init__(f"{problem}: {details}")
        self.problem = problem


class Parts:
    """The parts of the checkpoint at ``path``.

    Args:
        path: the ``.ckpt``, a local path or URL of any file system that Lightning writes to.
        follow_link: whether ``path`` may be a link to the checkpoint.
    """

    def __init__(self, path: str | os.PathLike[str], *, follow_link: bool = False) -> None:
        self._filesystem, name = url_to_fs(os.fspath(path))
        if follow_link and isinstance(self._filesystem, LocalFileSystem):
            name = os.path.realpath(name)
        self.folder: str = name + FOLDER_SUFFIX

    def path(self, save_id: str, rank: int) -> str:
        return f"{self.folder}/{save_id}-rank-{rank}.npz"

    def write(self, save_id: str, rank: int, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Write the part of ``rank``: on return it is complete and on disk.

        Args:
            save_id: names the act of saving.
            rank: whose part it is.
            meta: what JSON can say.
            arrays: by name; float32, float64 or integers, only read.
        """
        self._filesystem.makedirs(self.folder, exist_ok=True)
        text = json.dumps({"version": VERSION, "save_id": save_id, "rank": rank, **meta})
        every = {META: np.frombuffer(text.encode(), dtype=np.uint8), **arrays}
        with durable_file(self.path(save_id, rank), self._filesystem, temporary_name=f".saving-rank-{rank}") as file:
            np.savez(file, **every)  # type: ignore[arg-type]  # its flag is keyword-only, and no name of ours

    @contextmanager
    def read(self, save_id: str, rank: int) -> Iterator[Part]:
        """The part of ``rank``, open.

        Raises:
            PartError: if it is missing, damaged, or another checkpoint's; also from what is read within the context.
        """
        path = self.path(save_id, rank)
        try:
            with self._filesystem.open(path, "rb") as file:
                part = Part(file)
                if (
                    part.meta.get("version") != VERSION
                    or part.meta.get("save_id") != save_id
                    or part.meta.get("rank") != rank
                ):
                    raise PartError(FOREIGN, path)
                yield part
        except OSError as error:
            raise PartError(MISSING if isinstance(error, FileNotFoundError) else UNREADABLE, str(error)) from error

    def remove(self, rank: int, world_size: int, *, keep: str | None = None, keep_others: int = 0) -> None:
        """Remove this rank's parts, and those of ranks that there were in an earlier, larger run; the folder, too, if empty.

        Every rank removes its own, so that nothing is removed which another rank has just written. What cannot be removed
        stays.

        Args:
            rank: this rank.
            world_size: number of ranks now.
            keep: the save whose part stays.
            keep_others: how many others stay, the newest.
        """
        own = []
        with suppress(OSError):  # there is no folder, or another rank was faster; and whoever is last removes it
            for entry in self._filesystem.ls(self.folder, detail=False):
                save_id, _, owner = os.path.basename(entry).removesuffix(".npz").rpartition("-rank-")
                if owner.isdigit() and int(owner) % world_size == rank and save_id != keep:
                    own.append(entry)
            own.sort(key=self._filesystem.modified)
            for entry in own[: max(0, len(own) - keep_others)]:
                self._filesystem.rm_file(entry)
            if keep is None:
                self._filesystem.rmdir(self.folder)


class Part:
    """An open part: ``meta``, and arrays by name.

    Raises:
        PartError: for whatever is not a part, and when an array is read, if that is damaged.
    """

    def __init__(self, file: IO[bytes]) -> None:
        with part_errors():
            self._archive = zipfile.ZipFile(file)
            self.meta: dict[str, Any] = dict(json.loads(self.array(META, dtype=np.uint8).tobytes()))

    def array(self, name: str, *, dtype: np.dtype[Any] | type, numel: int | None = None) -> np.ndarray[Any, Any]:
        """The array ``name``, if it is ``[numel]`` of this dtype; ``None``: as long as it is."""
        with part_errors(), self._archive.open(f"{name}.npy") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError(f"{name} is of another version")
            shape, _, found = np.lib.format.read_array_header_1_0(file)
            array = np.frombuffer(file.read(), found)  # to the end, where the checksum is compared
            if found != np.dtype(dtype) or shape != array.shape or numel not in (None, len(array)):
                raise ValueError(f"{name} is {found} {shape}, {array.nbytes} bytes, instead of {np.dtype(dtype)} [{numel}]")
            return array.copy()  # into memory that may be written to


@contextmanager
def part_errors() -> Iterator[None]:
    """Within, whatever is raised by what a part holds is a :class:`PartError`."""
    try:
        yield
    except (OSError, PartError):
        raise
    except (Exception, MemoryError) as error:  # zipfile, json and numpy each have their own
        raise PartError(DAMAGED, f"{type(error).__name__}: {error}") from error


@contextmanager
def durable_file(path: str, filesystem: AbstractFileSystem, *, temporary_name: str | None = None) -> Iterator[IO[bytes]]:
    """A new file that takes the place of ``path`` on success, at once and for good; until then the old one is untouched.

    Written under another name in the same folder, flushed to disk, then renamed. A process that is killed meanwhile leaves
    that other file behind, which the next to write ``path`` overwrites. Other file systems than the machine's own are left
    to their ways: an object in a store appears once it is complete.

    Args:
        path: as ``filesystem`` names it.
        filesystem: where it is.
        temporary_name: the other name; ``None``: one that follows from ``path``.
    """
    if not isinstance(filesystem, LocalFileSystem):
        with filesystem.open(path, "wb") as file:
            yield file
        return
    # It holds nothing that looks like a checkpoint's name: Lightning searches folders for those.
    name_hash = hashlib.sha256(os.path.basename(path).encode()).hexdigest()[:16]
    temporary = Path(path).with_name(temporary_name or f".saving-{name_hash}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
