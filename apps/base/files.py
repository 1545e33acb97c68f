"""The place of the shipped configurations, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
"""The folder of the shipped configurations: in the source tree, or beside the packages of an installed wheel."""


def temporary_path(path: Path) -> Path:
    """Return the path at which a folder is written before it is moved to ``path``.

    The name is always the same, so the next run finds and removes the leftovers of a killed run.
    """
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Make an empty folder next to ``path``, and delete it in the end if it was not moved."""
    folder = temporary_path(path)
    delete(folder)  # a kill has left it
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            delete(folder)


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file or a folder; a kill or a full disk leaves nothing at ``path``."""
    with folder_beside(path) as folder:
        part = folder / path.name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, part)
        os.replace(part, path)


def put_folder(folder: Path, path: Path) -> None:
    """Move a folder to ``path`` and replace the one there; an error leaves that as it was."""
    earlier = path.with_name(f".{path.name}.earlier")
    delete(earlier)
    if path.exists():
        path.rename(earlier)
    try:
        folder.rename(path)
    except OSError:
        if earlier.exists():
            earlier.rename(path)
        raise
    delete(earlier)


def new_file(path: Path) -> Path:
    """Make an empty file next to ``path``, to be written and then moved there, and return its path.

    Its name is random, and no existing link is followed: the folder may be a stranger's.
    """
    new = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    open(new, "xb").close()
    return new


def delete_leftovers(path: Path) -> None:
    """Delete what killed runs have left next to ``path``, and not what another process is writing."""
    folder = temporary_path(path)
    for leftover in [*path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"), *[folder] * folder.is_dir()]:
        with contextlib.suppress(OSError, ImportError), contextlib.ExitStack() as stack:
            if leftover.is_file() and not leftover.is_symlink():
                _lock(stack.enter_context(open(leftover, "rb")))
            delete(leftover)


def _lock(file: IO[Any]) -> None:
    """Lock a file until it is closed.

    Raises:
        OSError: another process has locked it.
        ImportError: the system has no such locks.
    """
    import fcntl  # Windows has none

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w", **options: Any) -> Iterator[Any]:
    """Open a file next to ``path``, and move it there once the block has ended without an error.

    A kill or a full disk leaves the old file as it was, and an ``OSError`` names it. ``options`` are passed to
    ``open``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    delete_leftovers(path)
    temporary = new_file(path)
    try:
        with open(temporary, mode, **options) as file:
            with contextlib.suppress(OSError, ImportError):  # a file system or a system without locks
                _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> Path:
    """Write a text whole or not at all, and return its path."""
    with replacing(path) as file:
        file.write(text)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write a plain value as JSON, whole or not at all, and return its path."""
    return write_text(path, json.dumps(value, indent=1, allow_nan=True) + "\n")


def read_json(path: Path) -> Any:
    """Return the value in ``path``; None if the file does not exist.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file ({error}): delete it to have it made again") from None


@contextlib.contextmanager
def holding(path: Path, refusal: str = "", waiting: str = "") -> Iterator[None]:
    """Hold the lock file ``path`` inside. The system frees it when its holder dies: a killed process blocks nobody.

    Args:
        path: the lock file; its folder exists.
        refusal: error message if another process holds the lock.
        waiting: warning before this process waits for the other one, instead of the error.

    Raises:
        ValueError: another process holds the lock, and ``waiting`` is empty.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not waiting:
            raise ValueError(refusal) from None
        log.warning(waiting)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name ``path`` in an OSError that is raised inside and names no file, such as a full disk's."""
    try:
        yield
    except Exception as error:
        cause = os_error(error)
        if cause is None or not cause.errno:
            raise
        raise OSError(cause.errno, os.strerror(cause.errno), cause.filename or str(Path(path))) from error


def os_error(error: BaseException | None) -> OSError | None:
    """Return the first OSError among an error and its causes; None if there is none."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def delete(path: Path) -> None:
    """Delete a file, a link or a folder with all that it holds; nothing happens if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
