"""Compressed files are read as streams with a limit, so that a few megabytes cannot fill the memory or the disk."""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

FREE = 256 << 20
"""Bytes that any compressed file may unpack to, however small the file is."""

MOST = 200
"""Largest ratio of unpacked to packed bytes above ``FREE``; text and tables shrink 3 to 30 times."""


@contextlib.contextmanager
def naming_errors(path: Path, hint: str = "") -> Iterator[None]:
    """Turn the errors of reading a plain or compressed file inside into a ValueError that names it.

    ``hint`` ends the line about a corrupt file.
    """
    kind = "gzip" if path.suffix == ".gz" else path.suffix.removeprefix(".")
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is corrupt: it is truncated or no {kind} file ({error}){hint}") from error
    except RuntimeError as error:  # a password, or a method that Python lacks
        raise ValueError(f"{path} cannot be unpacked: {error}") from error
    except OSError as error:
        if error.errno is None:  # bz2 reports other bytes so
            raise ValueError(f"{path} is corrupt: it is truncated or no {kind} file ({error}){hint}") from error
        raise


def check_unpacked(name: str, packed: int, unpacked: int, what: str = "bytes") -> None:
    """Raise a ValueError if a file of ``packed`` bytes claims to hold too many ``unpacked`` ones.

    Too many are more than ``FREE`` and more than ``MOST`` times ``packed``; ``what`` names them in the message.
    """
    if unpacked > max(FREE, MOST * packed):
        raise ValueError(
            f"{name} holds over {unpacked:,} {what} in {packed:,} bytes: no data shrinks so much, and at most {MOST} "
            "times is read"
        )


class Inflated(io.RawIOBase):
    """A stream of unpacked bytes that raises a ValueError past ``free`` bytes and a ratio of ``most``.

    ``io.BufferedReader(Inflated(...))`` and ``io.TextIOWrapper`` take it like any other stream, and pyarrow as a file.

    Args:
        unpacked: stream of the unpacked bytes, such as ``gzip.open(path)`` or a member of a ``zipfile.ZipFile``.
        compressed_size: bytes of the compressed file or member.
        name: name of the file in messages.
        free: unpacked bytes that are always allowed.
        most: largest ratio of unpacked to compressed bytes beyond those.
    """

    def __init__(self, unpacked: BinaryIO, compressed_size: int, name: str, free: int = FREE, most: int = MOST) -> None:
        super().__init__()
        self._unpacked, self._size, self._name = unpacked, max(compressed_size, 1), name
        self._limit, self._most, self._read = max(free, most * self._size), most, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._unpacked.read(len(buffer))
        buffer[: len(data)] = data
        self._read += len(data)
        if self._read > self._limit:
            raise ValueError(
                f"{self._name} is compressed over {self._read // self._size} times ({self._size:,} bytes hold over "
                f"{self._read:,}): no data shrinks so much, and at most {self._most} times is read. Unpack it by hand "
                "if it is what you mean"
            )
        return len(data)

    def close(self) -> None:
        self._unpacked.close()
        super().close()


def read_limited(unpacked: BinaryIO, compressed_size: int, name: str) -> bytes:
    """Return all bytes of a compressed stream, within the limits of ``Inflated``."""
    with io.BufferedReader(Inflated(unpacked, compressed_size, name), 1 << 20) as stream:
        return stream.read()
