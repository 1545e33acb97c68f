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

    Raises:
        ValueError: without ``surfaces``.
    """

    def __init__(self, strings: Sequence[str], surfaces: Sequence[bytes | None] | None) -> None:
        if surfaces is None:
            raise ValueError(f"stop_strings={list(strings)} needs the surfaces of ids")
        self.strings, self.surfaces = [string.encode() for string in strings], [own or b"" for own in surfaces]
        self._reach = max(map(len, self.strings)) - 1

    def start(self, prompt: Sequence[int]) -> bytes | None:
        """Return the state after a prompt, in which strings do not count."""
        return b"" if any(self.surfaces[i] for i in prompt) else None

    def advance(self, state: bytes | None, token_id: int) -> bytes | None:
        """Return the state after one more id."""
        piece = self.surfaces[token_id]
        if state is None:
            return piece.removeprefix(b" ") or None
        return state[max(0, len(state) - self._reach) :] + piece

    def ends(self, state: bytes | None) -> bool:
        """Return whether the last id has completed a string."""
        return state is not None and any(string in state for string in self.strings)

    def cut(self, ids: Sequence[int], prompt: Sequence[int]) -> list[int]:
        """Return ids of the text before the first string; what is left of a subword that it cuts has others."""
        text = b"".join(self.surfaces[i] for i in ids)
        kept, at, dropped = list[int](), 0, int(self.start(prompt) is None and text[:1] == b" ")
        end = min(place for place in (text.find(string, dropped) for string in self.strings) if place >= 0)
        for i in ids:
            if at + len(self.surfaces[i]) > end:
                break
            kept, at = [*kept, i], at + len(self.surfaces[i])
        at = max(at, dropped)
        while at < end:  # the longest first; a byte without an id is left out
            size = next((n for n in range(end - at, 0, -1) if text[at : at + n] in self.surfaces), 0)
            kept += [self.surfaces.index(text[at : at + size])] if size else []
            at += max(size, 1)
        return kept
