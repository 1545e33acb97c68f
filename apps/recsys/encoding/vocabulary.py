"""Distinct texts by number, as two tensors that a file maps and a checkpoint keeps."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    import pyarrow as pa

_FEW = 1_000
"""Texts of a vocabulary for each text that is looked up, from which on they are sorted once instead of hashed."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Distinct texts by number, as UTF-8 bytes: millions of them are two tensors, mapped or in a checkpoint.

    Attributes:
        offsets: int64 (n + 1,), where each text starts and ends.
        content: uint8, the bytes.
    """

    offsets: Tensor
    content: Tensor

    @classmethod
    def of(cls, values: pa.StringArray) -> Vocabulary:
        """Return the vocabulary of distinct texts, numbered in their order."""
        offsets, content = utf8(values)
        kept = content[offsets[0] : offsets[-1]]
        return cls(torch.from_numpy(offsets - offsets[0]), torch.from_numpy(kept.copy()))

    @classmethod
    def of_state(cls, offsets: Tensor, content: Tensor) -> Vocabulary:
        """Return the vocabulary of a checkpoint. Earlier versions wrote decimals to the scale of their type, 5.00; no
        text of another type ends so."""
        own = cls(offsets, content)
        if b".0" not in content.numpy().tobytes():
            return own
        import pyarrow.compute as pc

        is_old, is_number = (
            pc.match_substring_regex(own._arrow, rf"^-?(?:0|[1-9][0-9]*){end}$")
            for end in (r"\.0+", r"(?:\.[0-9]+)?(?:E-[0-9]+)?")
        )
        has_old = pc.any(is_old).as_py() and pc.all(is_number).as_py()
        return cls.of(short_decimals(own._arrow)) if has_old else own

    def extended(self, values: pa.StringArray) -> Vocabulary:
        """Return the vocabulary with further texts after its own, which it must lack."""
        added = Vocabulary.of(values)
        offsets = torch.cat((self.offsets, self.offsets[-1] + added.offsets[1:]))
        return Vocabulary(offsets, torch.cat((self.content, added.content)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def texts(self) -> tuple[str, ...]:
        content = self.content.numpy().tobytes()
        return tuple(content[a:b].decode() for a, b in itertools.pairwise(self.offsets.tolist()))

    def find(self, values: pa.StringArray) -> NDArray[np.int64]:
        """Return the number of each text, int64 (N,); -1 if the vocabulary lacks it."""
        import pyarrow.compute as pc

        if _FEW * len(values) < len(self):
            return np.array([self._find(value) for value in values.to_pylist()], dtype=np.int64)
        return np.asarray(pc.index_in(values.cast(self._arrow.type), self._arrow).fill_null(-1), dtype=np.int64)

    def _find(self, value: str) -> int:
        """Return the number of a text by bisection: a row is encoded in the time that it takes, whatever the number of
        texts, of which ``index_in`` makes a hash table for each call."""
        order, offsets, content = self._order, self.offsets.numpy(), self.content.numpy()

        def text(place: int) -> bytes:
            return content[offsets[order[place]] : offsets[order[place] + 1]].tobytes()

        place = bisect.bisect_left(range(len(order)), value.encode(), key=text)
        return int(order[place]) if place < len(order) and text(place) == value.encode() else -1

    @cached_property
    def _arrow(self) -> pa.Array:
        import pyarrow as pa

        buffers = [None, pa.py_buffer(self.offsets.numpy()), pa.py_buffer(self.content.numpy())]
        return pa.Array.from_buffers(pa.large_string(), len(self), buffers)

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        """The numbers of the texts, sorted by their bytes."""
        import pyarrow.compute as pc

        return np.asarray(pc.sort_indices(self._arrow), dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """A hash of the texts and their order."""
        digest = hashlib.sha256(self.offsets.numpy().data)
        digest.update(self.content.numpy().data)
        return digest.hexdigest()

    def state(self) -> dict[str, Tensor]:
        return {"offsets": self.offsets, "content": self.content}


def short_decimals(text: pa.StringArray) -> pa.StringArray:
    """Return decimals without zeros at their end, as floats are written: 5 for 5.00, 5.5 for 5.50, 0 for 0E-10."""
    import pyarrow.compute as pc

    zeros = r"^(0)e-\d+$|\.0+($|e)|(\.\d*[1-9])0+($|e)"
    return pc.replace_substring_regex(pc.utf8_lower(text), zeros, r"\1\2\3\4")


def utf8(values: pa.StringArray) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return where each text starts and ends, int64 (N + 1,), and the bytes that this points into."""
    if not len(values):
        return np.zeros(1, np.int64), np.empty(0, np.uint8)
    import pyarrow as pa

    values = values.cast(pa.large_string())
    _, ends, data = values.buffers()
    offsets = np.frombuffer(ends, dtype=np.int64)[values.offset : values.offset + len(values) + 1]
    return offsets, np.empty(0, np.uint8) if data is None else np.frombuffer(data, dtype=np.uint8)


def whole_numbers(values: Sequence[str]) -> tuple[Any, ...]:
    """Return texts as integers where all of them are written as such ("7", not "007"), else as they are."""
    if all(value.removeprefix("-").isdecimal() and str(int(value)) == value for value in values):
        return tuple(map(int, values))
    return tuple(values)
