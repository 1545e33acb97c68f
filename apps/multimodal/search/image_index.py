"""``ImageIndex``: the vectors of a folder's images in a file; only changed images are encoded again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.base.files import naming, os_error, replacing
from apps.base.messages import counted, first_line
from apps.data.cache import locked
from apps.multimodal.search.vectors import list_images
from core.config.plain import to_plain

log = logging.getLogger(__name__)

_KIND = "moesaic image index"
_MOST_LINES = 20
"""Unreadable images that are named one by one."""


@dataclass(frozen=True)
class ImageFile:
    """An image of a folder as it was when its vector was made.

    Attributes:
        path: path relative to the folder.
        size: bytes.
        mtime_ns: time of its last change, in nanoseconds since 1970.
        digest: SHA-256 of its content, in hex digits.
    """

    path: str
    size: int
    mtime_ns: int
    digest: str = ""


@dataclass(frozen=True)
class ImageIndex:
    """The vectors of a folder's images.

    Attributes:
        folder: the folder.
        files: the images, by path.
        vectors_ND: float32 (N, dim), a vector of each.
        made_by: what tells the model that made them from others.
        num_encoded: number of vectors that were rebuilt when the index was last refreshed.
    """

    folder: Path
    files: tuple[ImageFile, ...]
    vectors_ND: Tensor
    made_by: str
    num_encoded: int = 0

    def __len__(self) -> int:
        return len(self.files)

    @property
    def paths(self) -> list[str]:
        """The images' paths, relative to the folder."""
        return [file.path for file in self.files]

    def save(self, path: Path) -> None:
        """Write the index to a file of safetensors, whole or not at all."""
        from safetensors.torch import save

        tensors = {
            "vectors": self.vectors_ND.contiguous(),
            "size": torch.tensor([f.size for f in self.files], dtype=torch.int64),
            "mtime_ns": torch.tensor([f.mtime_ns for f in self.files], dtype=torch.int64),
            "digest": _bytes(bytes.fromhex("".join(f.digest for f in self.files))).reshape(-1, 32),
            "paths": _bytes(b"\0".join(os.fsencode(f.path) for f in self.files)),  # no path has a zero
        }
        about = {"format": "pt", "kind": _KIND, "made_by": self.made_by, "folder": str(self.folder)}
        with replacing(path, "wb") as file:
            file.write(save(tensors, metadata=about))

    @classmethod
    def load(cls, path: Path) -> ImageIndex:
        """Read an index that ``save`` has written.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged, or holds no such index.
        """
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise FileNotFoundError(f"no index of images {path}")
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("kind") != _KIND:
                    raise ValueError("it is another safetensors file")
                parts = {name: file.get_tensor(name) for name in ("vectors", "size", "mtime_ns", "digest", "paths")}
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{path} holds no index of images: {first_line(error)}") from error
        paths = os.fsdecode(parts["paths"].numpy().tobytes()).split("\0") if len(parts["size"]) else []
        digests = [bytes(row).hex() for row in parts["digest"].numpy()]
        rows = zip(paths, parts["size"].tolist(), parts["mtime_ns"].tolist(), digests, strict=True)
        files = tuple(ImageFile(*row) for row in rows)
        return cls(Path(about["folder"]), files, parts["vectors"], about["made_by"])


Encode = Callable[[Sequence[str]], Iterable[tuple[list[int], Tensor, list[str]]]]
"""A function of relative paths that yields places of some of them, their vectors (b, dim), and complaints about
unreadable ones."""


def refreshed(folder: Path, path: Path | None, cache: Path, made_by: str, encode: Encode) -> ImageIndex:
    """Return the index of a folder as it is now, and keep it in its file.

    An image is encoded if neither its path, size and time nor its content match an image in the file. An error in the
    midst of it keeps the vectors encoded until then.

    Args:
        folder: the images' folder.
        path: the index's file; None: one in the cache, by the folder.
        cache: the cache's folder.
        made_by: what tells the model from others; the vectors of another one count for nothing.
        encode: a function that makes vectors.

    Raises:
        ValueError: there is no folder, no image in it, none that can be read, or ``path`` is a file of another kind, or
            cannot be written.
    """
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    file = cache / "image_vectors" / f"{name}.safetensors" if path is None else path
    with locked(cache, f"image_vectors-{name}", f"encoding the images of {folder}"):
        return _refreshed(folder, file, path is not None, made_by, encode)


def _refreshed(folder: Path, path: Path, is_named: bool, made_by: str, encode: Encode) -> ImageIndex:
    with _writing(path):  # not after an hour of encoding
        path.parent.mkdir(parents=True, exist_ok=True)
    before = _opened(path, is_named)
    known = before if before is not None and before.made_by == made_by else None
    files = _listed(folder)
    kept, rest = _split(folder, files, known)
    new, vectors, complaints = list[ImageFile](), list[Tensor](), list[str]()
    index = None
    try:
        for places, vectors_bD, bad in encode([file.path for file in rest]) if rest else ():
            new += [rest[i] for i in places]
            vectors.append(vectors_bD)
            complaints += bad
    finally:
        if kept or new:
            index = _joined(folder, known, kept, new, vectors, made_by)
            if known is None or index.files != known.files:
                with _writing(path):
                    index.save(path)
    tell(complaints)
    if new and kept:
        log.info("%s of %s images are new or changed, and were encoded", f"{len(new):,}", f"{len(files):,}")
    if index is None:
        raise ValueError(f"none of the {len(files):,} images of {folder} can be read: {complaints[0]}")
    return index


def _opened(path: Path, is_named: bool) -> ImageIndex | None:
    """Return the index in a file; None if there is none, or it is damaged and not the user's own."""
    try:
        return ImageIndex.load(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        if is_named:
            raise ValueError(f"{error}: it stays as it is; give data.index another file") from None
        log.warning("%s: all images are encoded again", error)
        return None


def _listed(folder: Path) -> list[ImageFile]:
    stats = ((path, (folder / path).stat(follow_symlinks=(folder / path).exists())) for path in list_images(folder))
    return [ImageFile(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def _split(
    folder: Path, files: Sequence[ImageFile], known: ImageIndex | None
) -> tuple[list[tuple[ImageFile, int]], list[ImageFile]]:
    """Return the images whose vectors are known, with their places there, and the others; all with their digests."""
    known_files = () if known is None else known.files
    place_of = {(file.path, file.size, file.mtime_ns): place for place, file in enumerate(known_files)}
    place_of_content = {file.digest: place for place, file in enumerate(known_files)}
    kept, rest = list[tuple[ImageFile, int]](), list[ImageFile]()
    for file in files:
        place = place_of.get((file.path, file.size, file.mtime_ns))
        if place is not None:
            kept.append((known_files[place], place))
            continue
        if not (folder / file.path).exists():  # a link to nothing: reading it says so
            rest.append(file)
            continue
        with open(folder / file.path, "rb") as content:
            file = replace(file, digest=hashlib.file_digest(content, "sha256").hexdigest())
        place = place_of_content.get(file.digest)
        if place is None:
            rest.append(file)
        else:  # touched, copied or renamed
            kept.append((file, place))
    return kept, rest


def _joined(
    folder: Path,
    known: ImageIndex | None,
    kept: Sequence[tuple[ImageFile, int]],
    new: Sequence[ImageFile],
    vectors: Sequence[Tensor],
    made_by: str,
) -> ImageIndex:
    """Return the index of images whose vectors are known and of new ones, by path."""
    old = [] if known is None else [known.vectors_ND[[place for _, place in kept]]]
    files = [*(file for file, _ in kept), *new]
    order = sorted(range(len(files)), key=lambda i: files[i].path)
    vectors_ND = torch.cat([*old, *vectors])[order]
    return ImageIndex(folder, tuple(files[i] for i in order), vectors_ND, made_by, len(new))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name the index in an error of the disk."""
    try:
        with naming(path):
            yield
    except OSError as error:
        reason = getattr(os_error(error), "strerror", None) or str(error)
        raise ValueError(f"the index of images {path} cannot be written: {reason}") from error


def tell(complaints: Sequence[str]) -> None:
    """Log the complaints about images that are left out, a line each; of very many, the first ones and their number."""
    for complaint in complaints[:_MOST_LINES]:
        log.warning("left out: %s", complaint)
    if len(complaints) > _MOST_LINES:
        log.warning("left out: %s that cannot be read", counted(len(complaints) - _MOST_LINES, "more image"))


def model_digest(weights: str, encoding: Any) -> str:
    """Return what tells a model's image vectors from other models' vectors: its weights and how images become its
    input."""
    plain = {k: v for k, v in to_plain(encoding, type(encoding)).items() if k not in ("text", "attributes")}
    made_from = [weights, plain, "turned by EXIF"]  # vectors of images that were read without are others
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
