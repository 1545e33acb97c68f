"""The specialization of experts in languages and in kinds of subwords, from counts over an evaluation.

A routed pair is one token and one of the experts that compute it; pairs that no expert had room for do not count. In
the encoder tokens are the source's. In the decoder they are the tokens it reads, from the sentence's start on, so that
a pair's expert helps to say the token after.

How much an expert says of a label is their mutual information over the routed pairs,

    I(E; C) = sum over e, c of p(e, c) log2(p(e, c) / (p(e) p(c)))    bits

or, as a share of the most it could be, I / min(H(E), H(C)): 0 if each label's tokens are spread over the experts as all
tokens are, 1 if a label tells the expert, or an expert the label.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import core
from apps.data.subwords import Side, Subwords
from apps.report.use import QUARTERS, ExpertUse, Labels, Tokens, entropy, mutual_information, quarters

CLASSES = (
    "begin of sentence",
    "end of sentence",
    "language tag",
    "byte or unknown",
    "digits",
    "punctuation",
    "function-like",
    *(f"word start, {q}" for q in QUARTERS),
    *(f"continuation, {q}" for q in QUARTERS),
)
"""The classes of ``token_classes``, by number."""
SPECIAL = 4
"""The first so many are not of the text itself."""
_DIGITS, _PUNCTUATION, _FUNCTION, _START = 4, 5, 6, 7
_MARKED = {"<s>": 0, "</s>": 1, "<unk>": 3, "<pad>": 3}
_SHORT = 4

SIDES: tuple[Side, ...] = ("source", "target")
Label = Literal["source language", "target language", "pair", "task", "token class"]


def token_classes(pieces: Sequence[str], counts_V: np.ndarray) -> np.ndarray:
    """Return the class of each subword, by its characters and how often it came; no tagger takes part.

    - start, end and language tag (``<2de>``) of a sentence; bytes (``<0xE4>``), with what has no subword at all.
    - digits: a number without a letter. punctuation: neither letter nor number.
    - All others have letters. They start a word (sentencepiece's mark U+2581 is before them) or continue one, and are
      put in order by ``counts_V``: "frequent" are the first ones, as many as make up a quarter of all tokens with
      letters, then those of the "2nd" and the "3rd quarter", and the "rare" of the last.
    - function-like: of the frequent ones that start a word, those with at most 4 letters: articles, prepositions, and
      beginnings that are as short.

    Args:
        pieces: the vocabulary, V subwords.
        counts_V: how often each came among the tokens looked at.

    Returns:
        int64 (V,), places in ``CLASSES``.
    """
    class_V = np.array([_class_by_text(piece) for piece in pieces], dtype=np.int64)
    lettered = np.flatnonzero(class_V < 0)
    for v, q in zip(lettered.tolist(), quarters(counts_V[lettered]).tolist(), strict=True):
        starts = pieces[v].startswith("\u2581")
        if starts and q == 0 and sum(c.isalpha() for c in pieces[v]) <= _SHORT:
            class_V[v] = _FUNCTION
        else:
            class_V[v] = _START + q + (0 if starts else len(QUARTERS))
    return class_V


def _class_by_text(piece: str) -> int:
    """Return the class, or -1 for a piece of letters."""
    if piece in _MARKED:
        return _MARKED[piece]
    if re.fullmatch(r"<2[^<>]+>", piece):
        return 2
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return 3
    body = piece.lstrip("\u2581")
    kinds = {unicodedata.category(c)[0] for c in body}
    if not body or kinds & {"L", "M"}:  # M: vowel signs
        return -1
    return _DIGITS if "N" in kinds else _PUNCTUATION


@dataclass(frozen=True)
class LayerUse:
    """Routed pairs of one MoE layer over an evaluation.

    Attributes:
        name: such as "encoder 1".
        side: whose tokens the layer sees.
        by_sentence: int64 (sentences, E).
        by_piece: int64 (V, E).
    """

    name: str
    side: Side
    by_sentence: np.ndarray
    by_piece: np.ndarray

    @property
    def num_experts(self) -> int:
        """E."""
        return self.by_sentence.shape[1]

    @property
    def num_pairs(self) -> int:
        """Routed pairs."""
        return int(self.by_sentence.sum())


class TextUse(ExpertUse):
    """Adds up, batch by batch, which sentences and which subwords each expert is used for.

    Args:
        tokens: says what the tokens are.
        subwords: of the ids.
        pairs: language pairs, in the order of their numbers, or tasks; one of any name for plain text.
        noun: "pair" or "task".

    Example::

        with torch.no_grad(), core.record(model) as tape:
            model(source_BS, target_BL, task_ids_B)
        use.add(tape, pair_B)
    """

    def __init__(
        self, tokens: Tokens, subwords: Subwords, pairs: Sequence[str], noun: Literal["pair", "task"] = "pair"
    ) -> None:
        self.subwords, self.pairs, self.noun = subwords, tuple(pairs), noun
        self.pair_B = np.zeros(0, np.int64)
        labels = {"sentence": Labels("sentence", None)}
        super().__init__(tokens, labels | {str(side): Labels(side, subwords.size(side)) for side in SIDES})

    def add(self, tape: core.Tape, batch: Tensor) -> None:
        """Add the passes of one batch, given the language pairs of its sentences, (B,)."""
        super().add(tape, batch)
        self.pair_B = np.concatenate([self.pair_B, batch.cpu().numpy()])

    @property
    def layers(self) -> list[LayerUse]:
        """The use of each layer, in the order of the passes."""
        return [
            LayerUse(name, side_of(name), by_sentence, self.counts[side_of(name)][name])
            for name, by_sentence in self.counts["sentence"].items()
        ]

    def labels(self) -> dict[Label, tuple[np.ndarray, tuple[str, ...]]]:
        """Return the label of each sentence and the labels' names, by the topic of the labels.

        What all sentences share is left out, and the pair where one of its languages tells it.
        """
        if len(self.pairs) < 2:
            return {}
        if self.noun == "task":
            return {"task": (self.pair_B, self.pairs)}
        labels: dict[Label, tuple[np.ndarray, tuple[str, ...]]] = {}
        for about, end in (("source language", 0), ("target language", 1)):
            of_P = [pair.split("-")[end] for pair in self.pairs]
            names = tuple(dict.fromkeys(of_P))
            if len(names) > 1:
                labels[about] = np.array([names.index(n) for n in of_P])[self.pair_B], names  # type: ignore[index]
        if all(len(names) < len(self.pairs) for _, names in labels.values()) and len(self.pairs) > 1:
            labels["pair"] = self.pair_B, self.pairs
        return labels

    def classes_of(self, side: Side) -> np.ndarray:
        """Return ``token_classes`` by the tokens that the first layer of a side saw, int64 (V,)."""
        counts = next((own.sum(1) for own in self.counts[side].values()), None)
        pieces = self.pieces(side)
        return token_classes(pieces, np.zeros(len(pieces), np.int64) if counts is None else counts)

    def pieces(self, side: Side) -> Sequence[str]:
        """Return all subwords of a side."""
        return self.subwords.pieces(range(self.subwords.size(side)), side)


def tokens(entry: Any, pair_B: Tensor) -> dict[str, Tensor]:
    """Return the subword of each token of a pass, as "source" or "target", and the number of each sentence."""
    return {side_of(entry.name): entry.context.token_ids_BS.flatten(), "sentence": torch.arange(len(pair_B))}


def by_label(layer: LayerUse, label_B: np.ndarray, num_labels: int) -> np.ndarray:
    """Return a layer's routed pairs by label of their sentence, int64 (num_labels, E)."""
    return np.eye(num_labels, dtype=np.int64)[label_B].T @ layer.by_sentence


def by_class(layer: LayerUse, class_V: np.ndarray) -> np.ndarray:
    """Return a layer's routed pairs by class of their token, int64 (len(CLASSES), E)."""
    counts_CE = np.zeros((len(CLASSES), layer.num_experts), np.int64)
    np.add.at(counts_CE, class_V, layer.by_piece)
    return counts_CE


def side_of(layer: str) -> Side:
    """Return the side whose tokens the layer of this name sees."""
    return "target" if "decoder" in layer else "source"


# ---- metrics


@dataclass(frozen=True)
class Specialization:
    """The mutual information of a layer's experts and a label.

    Attributes:
        layer: its name.
        about: the label.
        num_labels: labels that have a routed pair.
        num_experts: E.
        num_pairs: routed pairs.
        bits: their mutual information.
        share: of ``min(H(E), H(C))``; 0 if that is 0.
        by_chance: bits that would come from so few sentences by chance: of languages the mean over shuffles of the
            labels among the sentences, of token classes ``(C - 1) (E - 1) / (2 N ln 2)``, the bias for N independent
            pairs (Miller 1955).
    """

    layer: str
    about: Label
    num_labels: int
    num_experts: int
    num_pairs: int
    bits: float
    share: float
    by_chance: float


def specialization(use: TextUse, shuffles: int = 20) -> list[Specialization]:
    """Return how specialized each layer is: in the languages, if there are several, then in the token classes."""
    draw = np.random.RandomState(0)
    classes = {side: use.classes_of(side) for side in {layer.side for layer in use.layers}}
    rows = []
    for layer in use.layers:
        for about, (label_B, names) in use.labels().items():
            shuffled = (by_label(layer, draw.permutation(label_B), len(names)) for _ in range(shuffles))
            chance = np.mean([mutual_information(counts) for counts in shuffled])
            counts = by_label(layer, label_B, len(names))
            rows.append(_specialization(layer, about, counts, float(chance)))
        counts = by_class(layer, classes[layer.side])
        free = max(int(np.count_nonzero(counts.sum(1))) - 1, 0) * max(int(np.count_nonzero(counts.sum(0))) - 1, 0)
        chance = free / (2 * max(layer.num_pairs, 1) * np.log(2))
        rows.append(_specialization(layer, "token class", counts, float(chance)))
    return rows


def _specialization(layer: LayerUse, about: Label, counts_CE: np.ndarray, by_chance: float) -> Specialization:
    bits = mutual_information(counts_CE)
    most = min(entropy(counts_CE.sum(0)), entropy(counts_CE.sum(1)))
    return Specialization(
        layer.name,
        about,
        int(np.count_nonzero(counts_CE.sum(1))),
        layer.num_experts,
        layer.num_pairs,
        bits,
        bits / most if most > 0 else 0.0,
        by_chance,
    )
