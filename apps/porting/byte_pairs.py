"""CLIP's tokenizer: words cut into pairs of bytes that were merged most often, read from its published file."""

from __future__ import annotations

import gzip
import html
from collections.abc import Sequence
from pathlib import Path

from apps.base.messages import first_line

FILE = "bpe_simple_vocab_16e6.txt.gz"
BEGIN, END = "<start_of_text>", "<end_of_text>"
_MERGES = 49152 - 256 - 2  # the file has more; the published models know these
WORD_END = "</w>"
"""What a piece ends with that ends a word."""
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
"""Short forms, runs of letters, single digits, and runs of other characters without space."""


class BytePairs:
    """CLIP's text tokens: 256 bytes, the same at the end of a word, one token for each merge, start and end.

    Text is lower-cased, HTML's entities are resolved, and white space counts as one space. Text in a broken encoding is
    not repaired, as ftfy does for open_clip.

    Args:
        merges: pairs of tokens with a space between, the most frequent first.

    Raises:
        ValueError: a merge that is not two tokens, or of tokens that are not there before it.
    """

    def __init__(self, merges: Sequence[str]) -> None:
        from tokenizers import AddedToken, Regex, Tokenizer
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel, Sequence as Steps, Split

        bytes_ = _shown_bytes()
        pieces = [*bytes_, *(piece + WORD_END for piece in bytes_)]
        known = set(pieces)
        pairs = [merge.partition(" ")[::2] for merge in merges]
        for merge, pair in zip(merges, pairs, strict=True):
            if not {*pair} <= known:
                raise ValueError(f"the merge {merge!r} does not join two earlier subwords")
            pieces.append("".join(pair))
            known.add(pieces[-1])
        self.pieces = (*pieces, BEGIN, END)
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        self._tokenizer = Tokenizer(BPE(self.ids, pairs, end_of_word_suffix=WORD_END))
        self._tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in (BEGIN, END)])
        words, as_bytes = Split(Regex(_WORDS), "removed", invert=True), ByteLevel(False, use_regex=False)
        self._tokenizer.pre_tokenizer = Steps([words, as_bytes])

    @classmethod
    def of(cls, folder: str | Path) -> BytePairs:
        """Read the merges from a folder that has ``bpe_simple_vocab_16e6.txt.gz``.

        Raises:
            ValueError: the file is missing or cannot be read.
        """
        return cls(read_merges(folder))

    def encode(self, text: str, most: int) -> list[int]:
        """Return the ids of at most ``most`` tokens, from the start token to the end token."""
        plain = " ".join(html.unescape(html.unescape(text)).lower().split())
        ids = self._tokenizer.encode(plain, add_special_tokens=False).ids
        return [self.ids[BEGIN], *ids[: most - 2], self.ids[END]]


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


def _shown_bytes() -> list[str]:
    """Return a character that can be seen for each byte, in the order of CLIP's ids."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, seen), *(chr(256 + n) for n in range(256 - len(seen)))]
