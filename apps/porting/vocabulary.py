"""Ids of a published vocabulary in the order of ours: padding, unknown, start and end come first here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Vocabulary:
    """Maps our ids to theirs: the specials as in ``apps.data.subwords``, then the others in their order.

    A special that they lack gets a row of its own, a copy of the row of ``spare``, which their models do not say. So
    its logit equals the logit of ``spare`` too, which a softmax then counts twice.

    Attributes:
        size: V of theirs.
        pad, unk, bos, eos: their ids; None: they have none.
        spare: their id that replaces the missing ones.

    Raises:
        ValueError: an id outside the vocabulary, or one for two specials.
    """

    size: int
    pad: int | None
    unk: int | None
    bos: int | None
    eos: int | None
    spare: int

    def __post_init__(self) -> None:
        for name in ("pad", "unk", "bos", "eos", "spare"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.size:
                raise ValueError(f"the id {value} of {name} is not in a vocabulary of vocab_size={self.size}")
        known = [i for i in self.specials if i is not None]
        if len(set(known)) < len(known):
            raise ValueError(f"ids of pad, unk, bos, eos are {self.specials}: one stands for two")

    @property
    def specials(self) -> tuple[int | None, ...]:
        """Their ids of ours 0 to 3."""
        return self.pad, self.unk, self.bos, self.eos

    @property
    def theirs(self) -> Tensor:
        """int64 (V of ours,), the id of theirs that each of ours is."""
        first = [self.spare if i is None else i for i in self.specials]
        known = set(self.specials)
        return torch.tensor(first + [i for i in range(self.size) if i not in known])

    @property
    def ours(self) -> Tensor:
        """int64 (V of theirs,), the id of ours that each of theirs is: the last one where there are different."""
        ours = torch.zeros(self.size, dtype=torch.int64)
        for i, their_id in enumerate(self.theirs.tolist()):
            ours[their_id] = i
        return ours

    @property
    def our_size(self) -> int:
        """V of ours."""
        return self.size + self.specials.count(None)

    def token_ids(self) -> dict[str, int]:
        """Return the size and the special ids as ``config.json`` names them, but for those that they lack."""
        named = {"vocab_size": self.size, "pad_token_id": self.pad, "bos_token_id": self.bos, "eos_token_id": self.eos}
        return {name: value for name, value in named.items() if value is not None}

    def resized(self, our_size: int) -> Vocabulary:
        """Return a vocabulary of ``our_size`` ids with these specials; a ``spare`` at its end stays at the end."""
        size = our_size - self.specials.count(None)
        spare = size - 1 if self.spare == self.size - 1 else self.spare
        return replace(self, size=size, spare=spare)


def special_id(config: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    """Return ``config``'s id of that name; the first one if it has several.

    Raises:
        ValueError: it is not an id.
    """
    value = config.get(name, default)
    first = value[0] if isinstance(value, list) and value else value
    if first is not None and type(first) is not int:
        raise ValueError(f"config.json says {name}={value!r}, which is no id")
    return first
