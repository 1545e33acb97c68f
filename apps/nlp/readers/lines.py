"""Lines of text files. Bytes that are no text are one ValueError that names the file and the line."""

from __future__ import annotations

import gzip
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


@dataclass(frozen=True)
class Rows:
    """Aligned text: line i of every language says the same.

    Attributes:
        text: the lines of each language, as many of each; "" where a language lacks one.
        name: where they come from, for messages.

    Raises:
        ValueError: languages with different numbers of lines.
    """

    text: dict[str, list[str]]
    name: str

    def __post_init__(self) -> None:
        counts = {language: len(lines) for language, lines in self.text.items()}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{count:,} in {language}" for language, count in counts.items())
            raise ValueError(f"{self.name}: line i of one language translates line i of another, but there are {told}")

    def __len__(self) -> int:
        return len(next(iter(self.text.values()), []))


def clean(line: str) -> str:
    """A line without control characters (tabs, odd line ends) and without spaces around it."""
    return _CONTROL.sub(" ", line).strip()


# Chinese and Japanese, Thai, Lao, Tibetan, Burmese and Khmer are written without spaces between words.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")


def num_words(line: str) -> int:
    """Words cut at spaces; of scripts that put none between words each character counts as one."""
    return len(_WORD.findall(line))


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, cleaned, gzipped if its name ends in ``.gz``.

    A line ends at a line feed and nowhere else: corpora hold other characters that Unicode calls line ends, and one
    line too many would shift all that follow against their translations.

    Raises:
        ValueError: the file is missing, empty, truncated, or not UTF-8.
    """
    lines = [clean(line) for line in decode(read_bytes(path), str(path)).split("\n")]
    if lines[-1] == "":  # what follows the last line end
        lines.pop()
    return lines


def decode(data: bytes, name: str) -> str:
    """UTF-8 text, without a byte order mark.

    Raises:
        ValueError: it is empty, or not UTF-8; the message names the line.
    """
    if not data:
        raise ValueError(f"{name} is empty")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name}, line {line}: byte 0x{data[error.start]:02x} is not valid UTF-8; convert the file, "
            "for example with iconv"
        ) from error


def read_bytes(path: Path) -> bytes:
    """The content of a file, gzipped if its name ends in ``.gz``.

    Raises:
        ValueError: it is missing, or truncated.
    """
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is corrupt: it is truncated or no gzip file ({error})") from error


def read_zip(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each ``.txt`` or ``.tsv`` file in an archive, but those that are called ``_about.txt`` or so.

    Raises:
        ValueError: the archive is missing, truncated, or holds no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if re.search(r"(^|/)[^_/][^/]*\.(txt|tsv)$", n)]
            if not names:
                raise ValueError(f"{path} holds no .txt or .tsv file")
            for name in names:
                yield f"{path}:{name}", archive.read(name)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is corrupt: it is truncated or no zip file ({error})") from error


def expand(root: Path, pattern: str) -> list[Path]:
    """The files that match a name or a pattern, in alphabetical order; of a name also ``NAME.gz``."""
    plain = root / pattern
    # first as a name: it may have brackets of its own
    for path in (plain, plain.with_name(plain.name + ".gz")):
        if path.is_file():
            return [path]
    if not any(c in pattern for c in "*?["):
        return []
    if Path(pattern).is_absolute():
        root, pattern = Path(plain.anchor), str(plain.relative_to(plain.anchor))
    return sorted(p for p in root.glob(pattern) if p.is_file())
