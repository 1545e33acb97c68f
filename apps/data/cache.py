"""The cache on disk: its folder, the locks of its entries, and entries that are complete or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from apps.base.files import holding

_NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class DataError(ValueError):
    """Data cannot be had: no source could be reached, the cache cannot be written, or the disk is full."""


def cache_root(cache_dir: str | os.PathLike[str] | None) -> Path:
    """Return the folder of downloads and encoded data: ``cache_dir``, or the user's own cache. It is absolute."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME", "")
    # the specification of XDG says to ignore a relative path
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "moesaic"


class SourceFailed(Exception):
    """One source could not deliver. The message is the reason; ``datasets.prepare`` tries the next source."""


@contextlib.contextmanager
def locked(cache: Path, entry: str, doing: str) -> Iterator[None]:
    """Hold the lock of one entry of the cache while the block writes it, and name the cache in its disk errors.

    Args:
        cache: the cache's folder, which is made if need be.
        entry: name of the lock.
        doing: description of the block for a process that has to wait, such as ``fetching digits``.

    Raises:
        DataError: the cache cannot be written, the disk is full, or another file cannot be read.
    """
    with _disk_errors(cache, doing):
        locks = cache / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with holding(locks / f"{entry}.lock", waiting=f"waiting for another process that is {doing}"):
            yield


@contextlib.contextmanager
def _disk_errors(cache: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno is not None else str(error)
        if error.errno in _NO_SPACE:
            raise DataError(
                f"no disk space while {doing} in cache_dir={str(cache)!r} ({reason}): nothing was kept; free some, or "
                "set cache_dir (--data.cache_dir) to a folder with more"
            ) from error
        # An error without a file name comes from a write to a file that is open, and all of those lie in the cache.
        if error.filename is not None and not Path(os.fsdecode(error.filename)).absolute().is_relative_to(cache):
            raise DataError(f"{os.fsdecode(error.filename)!r} cannot be read while {doing} ({reason})") from error
        raise DataError(
            f"cache_dir={str(cache)!r} cannot be written ({reason}): set cache_dir (--data.cache_dir) to a folder that "
            "can"
        ) from error


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder next to ``target``, and move it there when the block ends without an error.

    The caller holds the lock of ``target``, so folders next to it are leftovers of killed processes: they are removed.
    An old ``target`` is replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        old = target.with_name(f".{target.name}.old")
        if target.exists():
            os.replace(target, old)
        os.replace(partial, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
