"""Texts that end at a string, wherever the subwords are cut."""

from __future__ import annotations

from collections.abc import Sequence


def num_begun(text: str, strings: Sequence[str]) -> int:
    """Return the number of characters at the end of a text that may become one of some strings."""
    return max((n for string in strings for n in range(1, len(string)) if text.endswith(string[:n])), default=0)


class Stops:
    """Finds strings in texts as they grow, and ends the ids before them.

    The state of a text is the end of what is written, in UTF-8; None: nothing is, and a subword's leading space is not.

    Args:
        strings: the strings.
        surfaces: what each id writes, see ``Subwords.surfaces``.
    """

    def __init__(self, strings: Sequence[str], surfaces: Sequence[bytes | None]) -> None:
        self.strings, self.surfaces = [string.encode() for string in strings], surfaces
        self._reach = max(map(len, self.strings)) - 1
        self._ids = {piece: i for i, piece in reversed(list(enumerate(surfaces))) if piece}

    def start(self, prompt: Sequence[int]) -> bytes | None:
        """Return the state after a prompt, in which strings do not count."""
        return b"" if any(self.surfaces[i] for i in prompt) else None

    def advance(self, state: bytes | None, token_id: int) -> bytes | None:
        """Return the state after one more id."""
        piece = self.surfaces[token_id] or b""
        if state is None:
            return piece.removeprefix(b" ") or None
        return state[max(0, len(state) - self._reach) :] + piece

    def ends(self, state: bytes | None) -> bool:
        """Return whether the last id has completed a string."""
        return state is not None and any(string in state for string in self.strings)

    def cut(self, ids: Sequence[int], prompt: Sequence[int]) -> list[int]:
        """Return the ids before the first string; what is left of a subword that it cuts is spelled by others."""
        pieces, state = list[bytes](), self.start(prompt)
        for i in ids:
            piece = self.surfaces[i] or b""
            pieces.append(piece.removeprefix(b" ") if state is None else piece)
            state = pieces[-1] or state
        text = b"".join(pieces)
        left = min(place for place in map(text.find, self.strings) if place >= 0)
        kept = list[int]()
        for i, piece in zip(ids, pieces, strict=True):
            if len(piece) > left:
                return [*kept, *self._spelled(piece[:left])]
            kept.append(i)
            left -= len(piece)
        raise AssertionError("the string is in the text")

    def _spelled(self, text: bytes) -> list[int]:
        """Return ids of a part of a subword, the longest first."""
        ids = list[int]()
        while text:
            size = next((n for n in range(len(text), 0, -1) if text[:n] in self._ids), 0)
            ids += [self._ids[text[:size]]] if size else []
            text = text[max(size, 1) :]
        return ids
