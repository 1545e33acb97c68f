"""The demo page of a translator: a sentence, its translation, and the experts of the subwords on both sides."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from apps.base.evaluation import in_evaluation
from apps.data.subwords import EOS_ID
from apps.nlp.decode.run import dropless
from apps.nlp.predict import source_batches
from apps.nlp.specialisation import side_of
from apps.nlp.text.words import words_of
from apps.nlp.translation.routes import traced
from apps.report.exhibit import Answer, ChoiceField, Example, Exhibit, Field, Said, TextField, words_by_layer
from apps.report.page import Table, Text

_CANDIDATES = 3
"""Translations that are shown, where the search has so many."""
_USUAL_WORDS = range(4, 15)
"""Words of a sentence that serves as an example."""


def exhibit(model: Any, data: Any, most: int) -> Exhibit:
    """Return what the page of a ``Translator`` has; see ``apps.report.exhibit``."""
    several = len(model.pairs) > 1
    fields: tuple[Field, ...] = (TextField("Sentence"),)
    if several:
        fields += (ChoiceField("Languages", tuple(model.pairs), model.pairs[0]),)

    def answer(values: Sequence[Any]) -> Answer:
        return _answer(model, values[0], values[1] if several else model.pairs[0])

    about = (
        f"Type a sentence: the model translates it ({', '.join(model.pairs)}), and shows which experts took each "
        "subword of the sentence and of its translation."
    )
    return Exhibit(about, "Translate", fields, answer, () if data is None else _examples(data, most, several))


def _answer(model: Any, text: str, pair: str) -> Answer:
    config = dataclasses.replace(model.decode, num_best=min(_CANDIDATES, model.decode.width))
    number, longest = model.pairs.index(pair), model.longest_source
    ((batch, _),) = source_batches([text], model.subwords, model.pairs, number, longest, longest, 1)
    with in_evaluation(model):
        hypotheses = model.translate(type(batch)(*(part.to(model.device) for part in batch)), config)
        ids, scores = hypotheses.ids[0], hypotheses.scores[0]
        with dropless(model.model):  # as in the search
            trace = traced(model, batch, [*ids[0], EOS_ID])
    texts = model.subwords.decode(ids, "target")
    parts: list[Any] = [Said(f"Translation, {pair}", texts[0] or "(an empty text)")]
    if len(model.subwords.encode([text], "source")[0]) >= batch.source_BS.shape[1]:
        parts.append(Text.of(f"The sentence is too long for the model: it was cut after {longest} subwords."))
    if len(texts) > 1:
        rows = tuple((text, f"{score:.3f}") for text, score in zip(texts[1:], scores[1:], strict=True))
        parts.append(Table(f"Further candidates (the score of the best: {scores[0]:.3f})", ("text", "score"), rows))
    read = [entry for entry in trace.tape.entries if side_of(entry.name) == "source"]
    written = [entry for entry in trace.tape.entries if side_of(entry.name) == "target"]
    layers = words_by_layer(read, words_of(trace.source), "Subwords of the sentence, as the encoder reads them")
    layers |= words_by_layer(written, words_of(trace.read), "Subwords of the translation, as the decoder reads them")
    return Answer(tuple(parts), layers)


def _examples(data: Any, most: int, several: bool) -> tuple[Example, ...]:
    """Return sentences of the validation of a usual length, of each pair in turn."""
    usual: dict[str, list[str]] = {}
    for text, pair in zip(data.sources("val"), data.pair_of("val"), strict=True):
        own = usual.setdefault(data.pairs[pair], [])
        if len(own) < most and len(text.split()) in _USUAL_WORDS and text not in own:
            own.append(text)
    turns = [(place, pair) for pair, texts in usual.items() for place in range(len(texts))]
    chosen = [(usual[pair][place], pair) for place, pair in sorted(turns, key=lambda turn: turn[0])[:most]]
    if several:
        return tuple(Example(f"{pair}: {text}", (text, pair)) for text, pair in chosen)
    return tuple(Example(text, (text,)) for text, _ in chosen)
