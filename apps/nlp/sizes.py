"""The facts that models of texts read from the data, without the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

import core
from apps.data.subwords import Subwords
from apps.nlp.specialization import tokens
from apps.task import Missing, Sizes, Task
from core.fields import Length


@core.register_config
@dataclass(frozen=True)
class Vocabulary(Subwords):
    """Subwords of which only the number is known."""

    models: Annotated[tuple[str, ...], Length(1, 2, "[]")] = ("",)
    num_ids: int = 0

    def size(self, side: Any) -> int:
        return self.num_ids


class TextTask(Task):
    """A use of a model of texts."""

    @classmethod
    def data_arguments(cls, given: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        """Return subwords of a number that is given, and pairs of languages where they are given."""
        size = sizes.option("tokenizer", "vocab_size")
        if size is None:
            raise Missing("the vocabulary's size comes from the data: give --data.tokenizer.vocab_size N")
        texts: dict[str, Any] = {"subwords": Vocabulary(num_ids=int(size))}
        pairs = sizes.option("pairs") or given.get("pairs")
        return {**texts, "pairs": tuple(pairs)} if pairs is not None else texts

    @classmethod
    def tokens(cls, model: Any, entry: Any, batch: Any) -> Mapping[str, Tensor]:
        """Return the subwords and the sentences; the batch is the language pair of each sentence."""
        return tokens(entry, batch)
