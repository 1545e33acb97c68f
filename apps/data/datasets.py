"""The standard datasets by name, and the folder of each one's files.

Every standard dataset is one `Dataset` record: the files of its own layout and an ordered list of sources. Apps
register their records; nothing here knows an app. `prepare` returns a folder in that layout, from the first of

1. ``root``, a folder of the user's: taken as it is, never written, never replaced by anything else;
2. the cache, ``~/.cache/moesaic/NAME`` (``XDG_CACHE_HOME`` is honored);
3. a source that is already on this machine (a ``UrlSource`` never is): a Debian or a Python package, read where it lies
   and never imported;
4. each source in turn, fetched into the cache.

A download goes into a temporary folder next to its place, is checked, and is moved there in one step: a folder in the
cache is complete, whatever was killed and when. A lock per dataset lets two processes ask at once; the second one finds
the folder ready. Whoever holds the lock removes the leftovers of a killed process.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps import registry
from apps.base.checks import check_name
from apps.base.progress import bar
from apps.data.cache import DataError, SourceFailed, cache_root, locked, whole_folder
from apps.data.sources import Source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A standard dataset: the files of its folder and their sources.

    Attributes:
        name: its name in ``--data.dataset`` and in the cache.
        app: the app that registers it.
        title: one line for people: kind and amount of data.
        layouts: the accepted layouts; each one lists the files, or patterns of files, that a complete folder holds. The
            first one is the sources' own.
        sources: sources in the order they are tried; empty for data that only the user can bring.
        license: license of the data.
        note: a caveat for results, or how to get data that has no source.
    """

    name: str
    app: str
    title: str
    layouts: tuple[tuple[str, ...], ...]
    sources: tuple[Source, ...] = ()
    license: str = ""
    note: str = ""

    def missing(self, folder: Path) -> str | None:
        """Return the first file ``folder`` lacks of the layout it comes closest to; None if one layout is complete."""
        lacking = [[name for name in layout if next(folder.glob(name), None) is None] for layout in self.layouts]
        fewest = min(range(len(lacking)), key=lambda i: len(lacking[i]) / len(self.layouts[i]))
        return lacking[fewest][0] if lacking[fewest] else None

    def files(self, folder: Path) -> list[Path]:
        """Return the files of any layout that ``folder`` holds, sorted."""
        return sorted({path for layout in self.layouts for name in layout for path in folder.glob(name)})


@dataclass(frozen=True)
class Late:
    """A function that is imported when it is called, so that a list of datasets imports no library of their readers.

    Attributes:
        path: its module and its name.
    """

    path: str

    def __call__(self, *args: Any, **options: Any) -> Any:
        return pkgutil.resolve_name(self.path)(*args, **options)


_REGISTRY: dict[str, Dataset] = {}
_FETCHES = contextvars.ContextVar("fetches", default=True)


@contextlib.contextmanager
def without_fetching() -> Iterator[None]:
    """Fetch no dataset inside: ``prepare`` raises a ``DataError`` if it is not on this machine."""
    token = _FETCHES.set(False)
    try:
        yield
    finally:
        _FETCHES.reset(token)


def register(dataset: Dataset) -> Dataset:
    """Add a record and return it. An app's module calls this when it is imported."""
    if (other := _REGISTRY.get(dataset.name)) is not None and other != dataset:
        raise ValueError(f"dataset={dataset.name!r} is registered already, by the {other.app} app")
    _REGISTRY[dataset.name] = dataset
    return dataset


def find(name: str) -> Dataset:
    """Return the record called ``name``; a ``ValueError`` for an unknown one suggests the nearest name."""
    if name not in _REGISTRY:
        registry.import_datasets()
    check_name("dataset", name, sorted(_REGISTRY))
    return _REGISTRY[name]


def list_datasets() -> list[Dataset]:
    """Return all registered datasets, by app and name."""
    registry.import_datasets()
    return sorted(_REGISTRY.values(), key=lambda d: (d.app, d.name))


def available(name: str, cache_dir: str | os.PathLike[str] | None = None) -> bool:
    """Return whether `prepare` would return at once: the dataset is in the cache or in an installed package."""
    return _local(find(name), cache_root(cache_dir)) is not None


def prepare(
    name: str, root: str | os.PathLike[str] | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """Return a folder with the dataset in its own layout; fetch it if need be.

    Args:
        name: a registered dataset.
        root: the user's own copy. If given, nothing else is tried.
        cache_dir: where downloads are kept; default ``$XDG_CACHE_HOME/moesaic``, or ``~/.cache/moesaic``.

    Raises:
        ValueError: unknown name, or ``root`` lacks a file of the layout.
        DataError: no source could deliver (each one is listed with the reason), the cache cannot be written, no disk
            space; or it is not here, inside ``without_fetching``.
    """
    dataset = find(name)
    if root is not None:
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise ValueError(f"root={str(root)!r} is not a folder: {name} expects {_layout(dataset)} in it")
        if (lacking := dataset.missing(folder)) is not None:
            raise ValueError(f"root={str(root)!r} holds no {lacking}: {name} expects {_layout(dataset)}")
        return folder
    cache = cache_root(cache_dir)
    if (ready := _local(dataset, cache)) is not None:
        return ready
    if not _FETCHES.get():
        raise DataError(f"the dataset {name} is not on this machine")
    if not dataset.sources:
        how = f"set root (--data.root) to a folder with {_layout(dataset)}"
        raise DataError(f"{name} cannot be fetched: {how}. {dataset.note}".strip())
    with locked(cache, name, f"fetching {name}"):
        return _local(dataset, cache) or _fetch(dataset, cache)


def _layout(dataset: Dataset) -> str:
    return ", ".join(dataset.layouts[0])  # one is enough for a message; the docs list the others


def _local(dataset: Dataset, cache: Path) -> Path | None:
    folders = [cache / dataset.name, *(source.installed() for source in dataset.sources)]
    return next((f for f in folders if f is not None and f.is_dir() and dataset.missing(f) is None), None)


def _fetch(dataset: Dataset, cache: Path) -> Path:
    """Fetch from the first source that delivers; the caller holds the dataset's lock."""
    target = cache / dataset.name
    failures = []
    for source in dataset.sources:
        log.info("fetching %s from %s", dataset.name, source)
        try:
            with bar(f"fetching {dataset.name}"), whole_folder(target) as folder:
                source.fetch(folder)
                if (lacking := dataset.missing(folder)) is not None:
                    raise SourceFailed(f"it holds no {lacking}")
            return target
        except SourceFailed as failed:
            log.info("%s: %s", source, failed)
            failures.append(f"{source} ({failed})")
    raise DataError(
        f"{dataset.name} could not be fetched; tried {'; '.join(failures)}. Connect to the network and try again, "
        f"or set root (--data.root) to a folder with {_layout(dataset)}"
    )
