"""The options of a search for translations or continuations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import core
from apps.base.checks import check_name
from core.fields import Checked, Count, CountOrZero, Length, NotNegative, Positive, PositiveShare, Share


@core.register_config
@dataclass(frozen=True)
class DecodeConfig(Checked):
    """The options of a search for translations or continuations.

    Attributes:
        method: "greedy": the best id each step; "beam"; "sample": each id is sampled.
        num_beams: open hypotheses a sentence of "beam".
        num_return_sequences: hypotheses a sentence that are returned, best first; of "sample", how many are sampled.
        early_stopping: when "beam" ends a sentence, as in transformers. "never": when no open hypothesis can still be
            among the ``num_return_sequences`` best, so that the search misses none. False: when none would be among the
            ``num_beams`` best if it ended at its present length, which is often right. True: when ``num_beams`` are
            finished.
        length_penalty: the score of a hypothesis is its sum of log p / length ** length_penalty; 0: the sum.
        max_length_ratio, max_length_extra: a hypothesis has at most ``ratio * S + extra`` ids before its end, rounded
            down; S counts the source's or the prompt's ids, with the markers of start, end and language.
        max_new_tokens: maximum number of ids before the end, whatever S is; None: by ratio and extra.
        min_new_tokens: minimum number of ids; takes precedence over the maximum.
        temperature: of "sample": divisor of the logits.
        top_k: of "sample": draw from the k most probable ids; 0: from all.
        top_p: of "sample": draw from the fewest most probable ids whose probabilities sum to p at least, after
            temperature and ``top_k``; 1: from all.
        min_p: of "sample": draw from the ids at least ``min_p`` times as probable as the best one; 0: from all.
        repetition_penalty: divides the logit of each id that is there already, a language model's prompt included, if
            the logit is above 0, and else multiplies it, as in transformers. It does so before the softmax in each
            method; transformers' beam search does it after.
        stop_strings: a hypothesis ends when its text has one of them, and the text that is returned ends before it. In
            its score, the id that completes the string stands for the end.
        seed: of "sample": a sentence's samples depend only on it and on the sentence's number.
        prune: finished sentences leave the batch.
        dtype: "bfloat16": compute with the weights in bfloat16; scores add up in float32. None: as the model is.

    Raises:
        ValueError: a value out of its range.
    """

    method: Literal["greedy", "beam", "sample"] = "beam"
    num_beams: Count = 5
    num_return_sequences: Count = 1
    early_stopping: bool | Literal["never"] = "never"
    length_penalty: NotNegative = 1.0
    max_length_ratio: NotNegative = 2.0
    max_length_extra: CountOrZero = 10
    max_new_tokens: Count | None = None
    min_new_tokens: CountOrZero = 1
    temperature: Positive = 1.0
    top_k: CountOrZero = 0
    top_p: PositiveShare = 1.0
    min_p: Share = 0.0
    repetition_penalty: Positive = 1.0
    stop_strings: tuple[Annotated[str, Length(1)], ...] = ()
    seed: CountOrZero = 0
    prune: bool = True
    dtype: Literal["bfloat16"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "sample" and self.num_return_sequences > self.width:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} exceeds the {self.width} hypotheses of "
                f"method={self.method}"
            )

    @property
    def width(self) -> int:
        """k, rows that a sentence has in the batch."""
        return {"greedy": 1, "beam": self.num_beams, "sample": self.num_return_sequences}[self.method]

    def max_length(self, source_length: int, most: int | None = None) -> int:
        """Return how many ids a hypothesis may have before its end; ``most``: the model's limit."""
        length = self.max_new_tokens or int(self.max_length_ratio * source_length + self.max_length_extra)
        length = max(length, self.min_new_tokens)
        return length if most is None else min(length, most)

    def score(self, log_prob: float, num_ids: int) -> float:
        """Return the score of a hypothesis of ``num_ids`` ids before its end."""
        return log_prob / (num_ids + 1) ** self.length_penalty

    @property
    def num_kept(self) -> int:
        """Finished hypotheses per sentence that open ones are measured against."""
        return self.num_return_sequences if self.method == "beam" and self.early_stopping == "never" else self.width

    def attainable(self, log_prob: float, num_ids: int, limit: int) -> float:
        """Return the best score that an open hypothesis is given credit for, as ``early_stopping`` says.

        Args:
            log_prob: its sum of log p.
            num_ids: its ids so far.
            limit: ids that it may have before its end.
        """
        if self.method != "beam" or self.early_stopping is True:
            return -math.inf
        # No sum of log p rises, so the largest length gives the best score.
        return self.score(log_prob, limit if self.early_stopping == "never" else num_ids - 1)


def decoding(config: DecodeConfig, options: Mapping[str, Any]) -> DecodeConfig:
    """Return ``config`` with some of its fields changed.

    Raises:
        ValueError: no such field, or a value out of its range.
    """
    known = [field.name for field in dataclasses.fields(DecodeConfig)]
    for name in options:
        check_name("option", name, known)
    return dataclasses.replace(config, **options)
