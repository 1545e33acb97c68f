"""Greedy search, beam search and sampling, over any model that gives the next token's logits one position at a time.

A hypothesis is a list of ids that ends in ``EOS_ID``; ``PAD_ID`` and ``BOS_ID`` are never in it. Its score is

    sum over its ids of log p(id | ids before, source) / length ** length_penalty

where ``log p`` is the model's, over its whole vocabulary and at temperature 1; the sum and ``length`` count the EOS_ID.
A hypothesis of as many ids as its sentence may have is closed by the EOS_ID that would then follow, with its log p, and
is scored like any other.

Beam search keeps ``k = beam_size`` open hypotheses per sentence. Each step ranks every continuation of them by its sum
of log p. Those among the first k that end in EOS_ID are finished; the first k of the others stay open. A sentence ends,
whatever its batch mates do, when no open hypothesis can still be among its ``num_return_sequences`` best. A sum of
log p never rises, so the sum divided by the largest possible length bounds the score of all that may follow.
``early_stopping`` has two rules that end sooner and may miss the best text.

Among equal sums the better hypothesis's goes first, then the lower id. ``tests/support/naive_search.py`` does all of it
in plain loops.

A finished sentence leaves the batch (batch pruning, arXiv 2211.10017), unless ``prune=False``. The output for a
sentence does not depend on it, nor on the rest of its batch, provided that the model's logits do not.
"""

from apps.nlp.decode.candidate import Candidate, in_columns, one_each
from apps.nlp.decode.config import DecodeConfig, decoding
from apps.nlp.decode.constraint import Constraint, TextConstraint, TrieConstraint
from apps.nlp.decode.grammar import Chars, Grammar, GrammarConstraint, Ref
from apps.nlp.decode.run import caption_ids, generate_ids, in_dtype, translate_ids
from apps.nlp.decode.search import Hypotheses

__all__ = [
    "Candidate",
    "Chars",
    "Constraint",
    "DecodeConfig",
    "Grammar",
    "GrammarConstraint",
    "Hypotheses",
    "Ref",
    "TextConstraint",
    "TrieConstraint",
    "caption_ids",
    "decoding",
    "generate_ids",
    "in_columns",
    "in_dtype",
    "one_each",
    "translate_ids",
]
