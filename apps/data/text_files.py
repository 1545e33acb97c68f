"""Lines of text files, plain or compressed, as a stream. Bytes that are not text are an error with file and line."""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apps.base.inflate import Inflated, naming_errors

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
"""What ``clean`` takes for a space: control characters and odd line ends."""


@dataclass(frozen=True)
class AlignedText:
    """Aligned text: line i of one language translates line i of every other one.

    Attributes:
        text: the lines of each language, equally many; "" if a language lacks one.
        name: origin of the lines, for messages.
        left_out: number of rows of the files that are not among them, by reason.

    Raises:
        ValueError: languages with different numbers of lines.
    """

    text: dict[str, list[str]]
    name: str
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = {language: len(lines) for language, lines in self.text.items()}
        if len(set(counts.values())) > 1:
            numbers = ", ".join(f"{count:,} in {language}" for language, count in counts.items())
            raise ValueError(
                f"{self.name}: line i of one language translates line i of another, but there are {numbers}"
            )

    def __len__(self) -> int:
        return len(next(iter(self.text.values()), []))


def clean(line: str) -> str:
    """Return a line without control characters (tabs, odd line ends) and without spaces around it."""
    return CONTROL.sub(" ", line).strip()


# Chinese and Japanese, Thai, Lao, Tibetan, Burmese and Khmer are written without spaces between words.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")
"""A word between spaces; in scripts without spaces between words a character."""


def num_words(line: str) -> int:
    """Count the words between spaces; in scripts without spaces between words each character counts as one."""
    return len(WORD.findall(line))


def read_lines(path: Path) -> list[str]:
    """Return all ``text_lines`` of a file, cleaned.

    A line ends at a line feed and nowhere else: corpora hold other characters that Unicode calls line ends, and one
    line too many would shift all that follow against their translations.
    """
    return [clean(line) for line in text_lines(path)]


_UNPACK: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSED = tuple(_UNPACK)
"""Endings of files that are unpacked while they are read."""


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 text file without their line ends, and without a byte order mark.

    A file that ends in ``.gz``, ``.bz2`` or ``.xz`` is unpacked as it is read. One that unpacks to far more than text
    does raises an error before its first line.

    Raises:
        ValueError: the file is missing, empty, truncated, unpacks to too much, or is not UTF-8.
    """
    unpack = _UNPACK.get(path.suffix)
    with naming_errors(path):
        if unpack is None:
            with open(path, "rb") as file:
                yield from decoded(file, str(path))
        else:
            yield from _unpacked(functools.partial(unpack, path), path.stat().st_size, str(path))


def zipped_lines(path: Path) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield name and lines of each ``.txt`` or ``.tsv`` file in a zip archive, but those called ``_about.txt`` or so.

    Raises:
        ValueError: the archive is missing, truncated or locked, holds no such file, or one that ``text_lines`` rejects.
    """
    with naming_errors(path), zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if re.search(r"(^|/)[^_/][^/]*\.(txt|tsv)$", m.filename)]
        if not members:
            raise ValueError(f"{path} holds no .txt or .tsv file")
        for member in members:
            name = f"{path}:{member.filename}"
            yield name, _member_lines(archive, member, path, name)


def _member_lines(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, name: str) -> Iterator[str]:
    with naming_errors(path):
        yield from _unpacked(lambda: archive.open(member), member.compress_size, name)


def _unpacked(unpack: Callable[[], Any], compressed_size: int, name: str) -> Iterator[str]:
    # Unpacked twice: kept lines take memory, so a file that is too large must be rejected before the first one is kept.
    with Inflated(unpack(), compressed_size, name) as stream:
        while stream.read(1 << 20):
            pass
    with unpack() as stream:
        yield from decoded(stream, name)


def decoded(lines: Iterable[bytes], name: str) -> Iterator[str]:
    """Yield lines of bytes as UTF-8 text without their line feeds; the first without a byte order mark.

    Raises:
        ValueError: there are no lines, or one that is not UTF-8, which the message names.
    """
    number = 0
    for number, line in enumerate(lines, 1):
        try:
            yield line.removesuffix(b"\n").decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}, line {number}: byte 0x{line[error.start]:02x} is not valid UTF-8; convert the file, "
                "for example with iconv"
            ) from error
    if not number:
        raise ValueError(f"{name} is empty")


def expand(root: Path, pattern: str) -> list[Path]:
    """Return the files that match a name or a pattern, sorted by name; a name may lack an ending of `COMPRESSED`."""
    plain = root / pattern
    # first as a name: it may have brackets of its own
    for path in (plain, *(plain.with_name(plain.name + ending) for ending in COMPRESSED)):
        if path.is_file():
            return [path]
    if not any(c in pattern for c in "*?["):
        return []
    if Path(pattern).is_absolute():
        root, pattern = Path(plain.anchor), str(plain.relative_to(plain.anchor))
    return sorted(p for p in root.glob(pattern) if p.is_file())


def named_files(root: str | None, names: list[str] | str | None) -> list[Path]:
    """Return the files of one name or pattern, or of several, each once.

    Raises:
        ValueError: a name without a file.
    """
    folder, listed = Path(root or ".").expanduser(), [names] if isinstance(names, str) else names or []
    found = {name: expand(folder, name) for name in listed}
    if lacking := next((name for name, paths in found.items() if not paths), None):
        raise ValueError(f"{folder / lacking} is missing")
    return list(dict.fromkeys(path for paths in found.values() for path in paths))
