"""Unpack tar and zip archives of strangers: within limits, only plain files, and never out of their folder.

pooch's ``Untar`` and ``Unzip`` have no such limits: they write whatever an archive holds, of any size.
"""

from __future__ import annotations

import bz2
import contextlib
import fnmatch
import gzip
import io
import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from apps.base.inflate import Inflated, check_unpacked
from apps.base.messages import one_line
from apps.data.cache import SourceFailed

_COMPRESSED_TARS: tuple[tuple[bytes, Callable[..., Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\x00", lzma.open),
)


def unpack(archive: Path, target: Path, pattern: str = "*", below: str = "") -> list[Path]:
    """Write plain files of a tar or zip archive into ``target``. Links and devices are left out.

    Args:
        archive: the file; its content, not its name, decides of which kind it is.
        target: a folder. Files that were written before an error stay there.
        pattern: the members to write, with ``*`` for any characters.
        below: folder in the archive that contains the members, and from which their paths below ``target`` start. It
            may be inside one more folder, as in a source archive.

    Returns:
        The files that were written.

    Raises:
        SourceFailed: it is neither, is damaged, has a wanted member that leads out of ``target``, or unpacks to more
            than ``apps.base.inflate`` allows. The message is one line that names the archive and the reason.
    """
    written: list[Path] = []
    total, size, prefix = 0, archive.stat().st_size, f"{below}/" if below else ""
    with _errors_of(archive), contextlib.ExitStack() as stack:
        for name, member_size, open_member in _members(archive, stack):
            check_unpacked(archive.name, size, total := total + member_size)
            if open_member is None or not any(
                fnmatch.fnmatchcase(name, wanted) for wanted in (prefix + pattern, f"*/{prefix}{pattern}")
            ):
                continue
            relative = PurePosixPath(name[name.index(prefix) + len(prefix) :])
            if relative.is_absolute() or ".." in relative.parts:
                raise SourceFailed(f"{archive.name} holds {name}, which leads out of its folder")
            path = target / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_member() as content, open(path, "wb") as out:
                shutil.copyfileobj(content, out)
            written.append(path)
    return written


def _members(archive: Path, stack: contextlib.ExitStack) -> Iterator[tuple[str, int, Callable[[], Any] | None]]:
    """Yield name, unpacked size and opener of each member, one after the other; the opener of a link is None."""
    with open(archive, "rb") as file:
        start = file.read(8)
    opener = next((opener for magic, opener in _COMPRESSED_TARS if start.startswith(magic)), open)
    # The limit lies under tarfile, which reads a member's attributes whole, however long they say they are.
    limited = Inflated(opener(archive, "rb"), archive.stat().st_size, archive.name)
    stream = stack.enter_context(io.BufferedReader(limited))
    try:
        tar = stack.enter_context(tarfile.open(fileobj=stream, mode="r|"))  # noqa: SIM115
    except tarfile.TarError:
        if not zipfile.is_zipfile(archive):
            raise SourceFailed(f"{archive.name} is neither a tar nor a zip archive") from None
        zipped = stack.enter_context(zipfile.ZipFile(archive))
        for info in zipped.infolist():
            if not info.filename:  # an IndexError of is_dir
                raise zipfile.BadZipFile("a member has no name") from None
            yield info.filename, info.file_size, None if info.is_dir() else partial(zipped.open, info)
        return
    for member in tar:
        yield member.name, member.size, None if not member.isfile() else partial(tar.extractfile, member)


@contextlib.contextmanager
def _errors_of(archive: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # past the limit
        raise SourceFailed(str(error)) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, RuntimeError) as error:
        # zipfile's RuntimeErrors: a newer version of the format, another compression, a password
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of gzip or bz2
            raise
        raise SourceFailed(f"{archive.name} cannot be unpacked: {one_line(str(error))}") from error
