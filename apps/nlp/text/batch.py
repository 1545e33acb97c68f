"""A batch of sentence pairs, as the data serve it and the models take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from apps.data.subwords import EOS_ID


class TranslationBatch(NamedTuple):
    """B sentence pairs as subword ids, each padded with ``PAD_ID`` after its end.

    Attributes:
        source_BS: int64 (B, S), the source with its language tag before it where there is one, and ``EOS_ID`` after it.
        target_BL: int64 (B, L), ``BOS_ID``, the reference, ``EOS_ID``: a decoder reads ``[:, :-1]`` and is to say
            ``[:, 1:]``. In prediction there is no reference, and L is 1.
        pair_B: int64 (B,), the language pair's place among the data's ``pairs``.
        index_B: int64 (B,), the sentence's place in its split, from 0. In prediction of text or a file
            it is the sentence's line there.
    """

    source_BS: Tensor
    target_BL: Tensor
    pair_B: Tensor
    index_B: Tensor  # type: ignore[assignment]  # a batch has no use for tuple.index

    @property
    def empty_B(self) -> Tensor:
        """bool (B,): the source is an empty line, which is to stay one. It has ``EOS_ID`` alone, without a tag."""
        return self.source_BS[:, 0] == EOS_ID
