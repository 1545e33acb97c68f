"""Encoded data in the cache, made once for each set of inputs, however many processes ask at the same time."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.base.progress import bar
from apps.data.array_files import ArrayFiles, ArrayWriter, Damaged
from apps.data.cache import locked, whole_folder

log = logging.getLogger(__name__)

_APPS = Path(__file__).resolve().parents[1]
_OWN_CODE = ("data/array_files.py", "data/store.py", "data/parquet_files.py", "base/inflate.py")


@dataclass(frozen=True)
class EncodedStore:
    """The encoded data of one kind, each in a folder ``CACHE/KIND/NAME-KEY`` that is complete or not there.

    The key is a hash of the files, the options, and the code that reads and encodes. So a change of any of them is an
    entry of its own, and an old entry is never read by mistake.

    Attributes:
        kind: the folder's name in the cache.
        code: files that read and encode, as patterns below ``apps``.
    """

    kind: str
    code: tuple[str, ...]

    def open(
        self,
        cache: Path,
        name: str,
        made_from: Any,
        write: Callable[[ArrayWriter], None],
        *,
        learning: Any = None,
        given: str | None = None,
        digest_of: Callable[[ArrayFiles], str] | None = None,
    ) -> ArrayFiles:
        """Return the arrays that were made from this, by this code; write them if they are not there or are damaged.

        Args:
            cache: the cache's folder.
            name: name of the data, for people who look into the folder.
            made_from: plain values that change when the encoded data do.
            write: fills the writer and ends with its ``finish``.
            learning: plain values that say how an encoding is learned from the data. They count if none is given.
            given: digest of the encoding that is used, such as a checkpoint's; None: it is learned from the data. An
                entry that learned the same encoding serves too.
            digest_of: returns the digest of the encoding that an entry learned; goes with ``given``.

        Raises:
            DataError: the cache cannot be written, or the disk is full.
        """
        learned = self._folder(cache, name, [made_from, learning])
        if given is None:
            return self._open_or_write(cache, learned, write)
        if digest_of is not None and (files := _open_whole(learned)) is not None and digest_of(files) == given:
            return files
        return self._open_or_write(cache, self._folder(cache, name, [made_from, given]), write)

    def _folder(self, cache: Path, name: str, made_from: list[Any]) -> Path:
        key = json.dumps([_digest_of_code((*_OWN_CODE, *self.code)), name, made_from], sort_keys=True)
        return cache / self.kind / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def _open_or_write(self, cache: Path, folder: Path, write: Callable[[ArrayWriter], None]) -> ArrayFiles:
        if (files := _open_whole(folder)) is not None:
            return files
        with locked(cache, folder.name, f"encoding {folder.name}"):
            if (files := _open_whole(folder)) is not None:  # another process has made it meanwhile
                return files
            log.info("encoding into %s", folder)
            with bar(f"encoding {folder.name.rpartition('-')[0]}"), whole_folder(folder) as partial:
                writer = ArrayWriter(partial)
                write(writer)
                writer.close()
        return ArrayFiles(folder)


def identity(files: Iterable[Path]) -> list[list[Any]]:
    """Return path, size and time of the last change of each file, by which an exchanged one is noticed."""
    stats = [(path.resolve(), path.stat()) for path in files]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def _open_whole(folder: Path) -> ArrayFiles | None:
    """Return the arrays of ``folder``; None if there are none, or they are damaged."""
    if not folder.is_dir():
        return None
    try:
        return ArrayFiles(folder)
    except Damaged as damage:
        log.warning("%s is damaged (%s): it is encoded again", folder, damage)
        return None


@functools.cache
def _digest_of_code(patterns: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for pattern in patterns:
        files = sorted(_APPS.glob(pattern))
        assert files, f"apps/{pattern} names no file"
        for path in files:
            digest.update(path.read_bytes())
    return digest.hexdigest()
