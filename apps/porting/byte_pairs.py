"""CLIP's tokenizer: words cut into pairs of bytes that were merged most often, read from its published file."""

from __future__ import annotations

import gzip
import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from apps.base.messages import first_line

FILE = "bpe_simple_vocab_16e6.txt.gz"
BEGIN, END = "<start_of_text>", "<end_of_text>"
_MERGES = 49152 - 256 - 2  # the file has more; the published models know these
WORD_END = "</w>"
"""What a piece ends with that ends a word."""
_SHORT_FORMS = re.compile("|".join((BEGIN, END, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d")))


class BytePairs:
    """The pieces of CLIP's texts: 256 bytes, the same at the end of a word, one piece for each merge, begin and end.

    Text is lower-cased, HTML's entities are resolved, and white space counts as one space. Text in a broken encoding is
    not repaired, as ftfy does for open_clip.

    Args:
        merges: pairs of pieces with a space between, the most frequent first.

    Raises:
        ValueError: a merge that is not two pieces, or of pieces that are not there before it.
    """

    def __init__(self, merges: Sequence[str]) -> None:
        bytes_ = list(_shown_bytes().values())
        pieces = [*bytes_, *(piece + WORD_END for piece in bytes_)]
        known = set(pieces)
        self._rank: dict[tuple[str, str], int] = {}
        for merge in merges:
            first, _, second = merge.partition(" ")
            if not {first, second} <= known:
                raise ValueError(f"the merge {merge!r} is not of two pieces that stand before it")
            self._rank[first, second] = len(self._rank)
            pieces.append(first + second)
            known.add(first + second)
        self.pieces = (*pieces, BEGIN, END)
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        self._cuts: dict[str, list[int]] = {}

    @classmethod
    def of(cls, folder: str | Path) -> BytePairs:
        """Read the merges from a folder that has ``bpe_simple_vocab_16e6.txt.gz``.

        Raises:
            ValueError: the file is missing or cannot be read.
        """
        return cls(read_merges(folder))

    @cached_property
    def _shown(self) -> dict[int, str]:
        return _shown_bytes()

    def encode(self, text: str, most: int) -> list[int]:
        """Return the ids of at most ``most`` pieces, the first that of the begin and the last that of the end."""
        ids = [self.ids[BEGIN]]
        for word in _words(html.unescape(html.unescape(text)).lower()):
            ids += self._cut(word)
            if len(ids) >= most:
                break
        return [*ids[: most - 1], self.ids[END]]

    def _cut(self, word: str) -> list[int]:
        if word in (BEGIN, END):
            return [self.ids[word]]
        if word not in self._cuts:
            letters = [self._shown[byte] for byte in word.encode()]
            self._cuts[word] = [self.ids[piece] for piece in self._merged([*letters[:-1], letters[-1] + WORD_END])]
        return self._cuts[word]

    def _merged(self, pieces: list[str]) -> list[str]:
        """Return pieces after all merges, the most frequent pair first."""
        while len(pieces) > 1:
            pairs = set(pairwise(pieces)) & self._rank.keys()
            if not pairs:
                break
            pair = min(pairs, key=self._rank.__getitem__)
            merged, i = [], 0
            while i < len(pieces):
                is_pair = tuple(pieces[i : i + 2]) == pair
                merged.append("".join(pair) if is_pair else pieces[i])
                i += 2 if is_pair else 1
            pieces = merged
        return pieces


def read_merges(folder: str | Path) -> list[str]:
    """Return the merges of CLIP's published vocabulary.

    Raises:
        ValueError: the file is missing or cannot be read.
    """
    path = Path(folder).expanduser() / FILE
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: it is CLIP's vocabulary, which the package open_clip_torch has in its folder open_clip"
        )
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
    return [line for line in lines[1 : 1 + _MERGES] if line]  # the first line names its version


def _words(text: str) -> Iterator[str]:
    """Yield short forms such as 's, runs of letters, single digits, and runs of other characters without space."""
    i = 0
    while i < len(text):
        short = _SHORT_FORMS.match(text, i)
        if short is not None:
            yield short.group()
            i = short.end()
            continue
        kind, start = _kind(text[i]), i
        i += 1
        while kind not in ("N", " ") and i < len(text) and _kind(text[i]) == kind:
            i += 1
        if kind != " ":
            yield text[start:i]


def _kind(c: str) -> str:
    """Return "L" for a letter, "N" for a number, " " for white space and "." for all else."""
    if c.isspace():
        return " "
    group = unicodedata.category(c)[0]
    return group if group in "LN" else "."


def _shown_bytes() -> dict[int, str]:
    """Return a character that can be seen for each byte, in the order of CLIP's ids."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {**{byte: chr(byte) for byte in seen}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}
