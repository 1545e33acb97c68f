"""Greedy search, beam search and sampling, over any model that gives the next token's logits a position at a time.

A hypothesis is a list of ids that ends in ``EOS_ID``; ``PAD_ID`` and ``BOS_ID`` are never in it. Its score is

    sum over its ids of log p(id | ids before, source) / length ** length_penalty

where ``log p`` is the model's, over its whole vocabulary and at temperature 1; the sum and ``length`` count the EOS_ID.
A hypothesis of as many ids as its sentence may have is closed by the EOS_ID that would then follow, with its log p, and
is scored as any other.

Beam search keeps ``k = beam_size`` open hypotheses a sentence. Each step, all that may follow them are ranked by their
sum of log p. What ends in EOS_ID among the first k is finished; the first k of the others stay open. A sentence is done
when k hypotheses are finished, whatever its batch mates do. It is done earlier where no open one could still be among
its best ``num_best``: a sum of log p never rises, so divided by the largest length possible it bounds all that may come
of it. That saves steps and changes no output.

Among equal sums the better hypothesis's goes first, then the lower id. ``tests/support/naive_search.py`` does all of it
in plain loops.

A finished sentence leaves the batch (batch pruning, arXiv 2211.10017), unless ``prune=False``. What a sentence becomes
does not depend on it, nor on its batch mates, as far as the model's logits do not.
"""

from apps.nlp.decode.candidate import Candidate, check_one
from apps.nlp.decode.config import DecodeConfig, decoding
from apps.nlp.decode.run import caption_ids, generate_ids, in_dtype, translate_ids
from apps.nlp.decode.search import Hypotheses

__all__ = [
    "Candidate",
    "DecodeConfig",
    "Hypotheses",
    "caption_ids",
    "check_one",
    "decoding",
    "generate_ids",
    "in_dtype",
    "translate_ids",
]
