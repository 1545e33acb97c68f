"""Subwords of a corpus: sentencepiece models as plain values, so that they travel in a checkpoint."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
"""Ids of padding, of what has no subword, and of a sentence's begin and end, in every vocabulary here."""

Side = Literal["source", "target"]


@dataclass(frozen=True)
class Subwords:
    """Sentencepiece models of both sides of a corpus. Saved in the checkpoint with the model that reads its ids.

    Attributes:
        models: base64 of the sentencepiece model files: one for both sides, or the source's and the target's.
        languages: those with a tag; its id is that of the piece ``<2xx>``, xx being the language's code. Empty where
            sentences have no tag.

    Raises:
        ValueError: not one model or two, or one that sentencepiece cannot read.
    """

    models: tuple[str, ...]
    languages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", tuple(self.models))  # a list in a checkpoint
        object.__setattr__(self, "languages", tuple(self.languages))
        if len(self.models) not in (1, 2):
            raise ValueError(f"subwords has {len(self.models)} models: one for both sides, or one for each")

    @property
    def is_joint(self) -> bool:
        """Both sides have the same ids."""
        return len(self.models) == 1

    @property
    def digest(self) -> str:
        """12 hex digits that tell one set of models from another."""
        return hashlib.sha256("\n".join((*self.models, *self.languages)).encode()).hexdigest()[:12]

    def processor(self, side: Side) -> Any:
        """The ``SentencePieceProcessor`` of a side."""
        return _processor(self.models[0 if side == "source" else -1])

    def size(self, side: Side) -> int:
        """V, ids of a side's vocabulary, specials and tags included."""
        return int(self.processor(side).vocab_size())

    def encode(self, sentences: Sequence[str], side: Side) -> list[list[int]]:
        """Ids of each sentence, without tag, begin and end."""
        return self.processor(side).encode(list(sentences), out_type=int)

    def decode(self, ids: Sequence[Sequence[int]], side: Side) -> list[str]:
        """The text of each row of ids; specials and tags have none."""
        return self.processor(side).decode([[int(i) for i in row] for row in ids])

    def pieces(self, ids: Sequence[int], side: Side) -> list[str]:
        """The subwords themselves, as they are shown."""
        processor = self.processor(side)
        return [processor.id_to_piece(int(i)) for i in ids]

    def tag_id(self, language: str) -> int:
        """The id, on the source side, of the tag that asks for a translation into ``language``.

        Raises:
            ValueError: it has no tag.
        """
        if language not in self.languages:
            raise ValueError(f"language {language!r} has no tag: there is {', '.join(self.languages) or 'none'}")
        return int(self.processor("source").piece_to_id(f"<2{language}>"))


@functools.lru_cache(maxsize=8)
def _processor(model: str) -> Any:
    # Not kept in the dataclass: it stays plain values, and pickles.
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(base64.b64decode(model, validate=True))
    except Exception as error:
        raise ValueError("subwords: not a sentencepiece model") from error
    specials = (processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id())
    if specials != (PAD_ID, UNK_ID, BOS_ID, EOS_ID):
        raise ValueError(f"subwords: ids of pad, unk, bos, eos are {specials}, not {(PAD_ID, UNK_ID, BOS_ID, EOS_ID)}")
    return processor
