"""A dataset of one small file, from the sources that a test names, and archives to fetch it in."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

from apps.data import datasets
from apps.data.datasets import Dataset

CONTENT = b"12,13,5\n" * 32


def toy(*origins: object, **changes: object) -> Dataset:
    record = {"name": "toy", "app": "test", "title": "toy", "layouts": (("toy.csv",),), "sources": origins, **changes}
    return datasets.register(Dataset(**record))  # type: ignore[arg-type]


def left_behind(cache: Path) -> list[str]:
    """Return the paths of everything in the cache but the empty lock files."""
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if ".locks" not in p.parts)


def archive_of(kind: str, members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, content in members.items():
                zipped.writestr(name, content)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
