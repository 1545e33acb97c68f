"""Archives of strangers are unpacked within limits, and nowhere else."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from toy_dataset import CONTENT, archive_of

from apps.data.archives import unpack
from apps.data.cache import SourceFailed


def refused(folder: Path, content: bytes, match: str, below: str = "") -> str:
    """Return the line that refuses an archive, which is called toy."""
    (folder / "toy").write_bytes(content)
    with pytest.raises(SourceFailed, match=match) as caught:
        unpack(folder / "toy", folder / "to", below=below)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["", "gz", "bz2", "xz", "zip"])
def test_every_kind_of_archive_is_unpacked(kind: str, tmp_path: Path) -> None:
    (tmp_path / "toy").write_bytes(archive_of(kind, {"a/b.bin": b"abc", "c.bin": CONTENT}))
    unpack(tmp_path / "toy", tmp_path / "to")
    assert (tmp_path / "to/a/b.bin").read_bytes() == b"abc"
    assert (tmp_path / "to/c.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zip"])
def test_an_archive_that_unpacks_to_far_more_than_itself_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some KiB that hold 2 + 2 MiB, where 3 MiB may always be unpacked: the first member is written, the second not.
    monkeypatch.setattr("apps.base.inflate.FREE", 3 << 20)
    bomb = archive_of(kind, {"a.bin": bytes(2 << 20), "b.bin": bytes(2 << 20)})
    assert "\n" not in refused(tmp_path, bomb, r"^toy holds over 4,194,304 bytes in [\d,]+ bytes: no data")
    assert not (tmp_path / "to/b.bin").exists()


def test_attributes_of_a_tar_member_cannot_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.base.inflate.Inflated.__init__.__defaults__", (1 << 20, 50))
    with tarfile.open(tmp_path / "toy", "w:gz", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.bin")
        member.pax_headers = {"comment": "a" * (4 << 20)}
        tar.addfile(member)
    refused(tmp_path, (tmp_path / "toy").read_bytes(), r"^toy is compressed over \d+ times")


def test_a_damaged_archive_and_one_without_names_are_failed_sources(tmp_path: Path) -> None:
    for kind in ("gz", "bz2", "xz"):
        whole = archive_of(kind, {"a.bin": os.urandom(1 << 16)})
        for damaged in (whole[:-1000], whole[:-5000] + bytes(5000)):
            refused(tmp_path, damaged, r"^toy cannot be unpacked: ")
    refused(tmp_path, b"neither", r"^toy is neither a tar nor a zip archive$")
    nameless = archive_of("zip", {"a.bin": b"abc"}).replace(b"a.bin", b"\0.bin")
    refused(tmp_path, nameless, r"^toy cannot be unpacked: a member has no name$")


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (6, b"\xff", "zip file version 25.5"),
        (8, b"\1", "File .* is encrypted"),
        (10, b"\x63", "That compression method"),
    ],
    ids=["version", "password", "compression"],
)
def test_a_zip_that_python_cannot_read_is_a_failed_source(
    place: int, value: bytes, reason: str, tmp_path: Path
) -> None:
    whole = archive_of("zip", {"a.bin": b"abc"})
    at = whole.index(b"PK\1\2") + place
    refused(tmp_path, whole[:at] + value + whole[at + 1 :], f"^toy cannot be unpacked: {reason}")


@pytest.mark.parametrize("kind", ["gz", "zip"])
@pytest.mark.parametrize(
    ("below", "name"), [("", "../out.bin"), ("", "/out.bin"), ("a", "a//out.bin"), ("a", "a/../../out.bin")]
)
def test_a_member_stays_in_its_folder(below: str, name: str, kind: str, tmp_path: Path) -> None:
    refused(tmp_path, archive_of(kind, {name: b"abc"}), f"^toy holds {name}, which leads out of its folder$", below)
    assert not (tmp_path / "out.bin").exists()
    assert not Path("/out.bin").exists()


def test_members_below_a_folder_by_a_pattern_and_no_links(tmp_path: Path) -> None:
    members = {"toy-1.0/toy/text/de/a.mo": b"de", "toy-1.0/toy/text/de/b.mo": b"b", "toy-1.0/toy/other/a.mo": b"other"}
    (tmp_path / "toy").write_bytes(archive_of("gz", members))
    assert unpack(tmp_path / "toy", tmp_path / "to", "*/a.mo", "toy/text") == [tmp_path / "to/de/a.mo"]
    assert (tmp_path / "to/de/a.mo").read_bytes() == b"de"
    with tarfile.open(tmp_path / "toy", "w") as tar:
        link = tarfile.TarInfo("a.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert unpack(tmp_path / "toy", tmp_path / "to") == []
    assert not (tmp_path / "to/a.bin").is_symlink()
