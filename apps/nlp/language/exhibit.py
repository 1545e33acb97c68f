"""The demo page of a language model: a text, what follows it, and the experts of its subwords."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import core
from apps.base.evaluation import in_evaluation
from apps.data.subwords import EOS_ID
from apps.nlp.decode import decoding
from apps.nlp.decode.run import dropless
from apps.nlp.language.data import prompt_batches
from apps.nlp.text.words import words_of
from apps.report.exhibit import Answer, Example, Exhibit, Field, NumberField, Said, TextField, words_by_layer

_FIRST, _MOST = 24, 200
"""Subwords that are written: at first, and at most."""
_PROMPT_WORDS, _READ_IDS = 6, 20_000


def exhibit(model: Any, data: Any, most: int) -> Exhibit:
    """Return what the page of a ``LanguageModeler`` has; see ``apps.report.exhibit``."""
    draws = model.decode.method == "sample"
    fields: tuple[Field, ...] = (
        TextField("Text", may_be_empty=True),
        NumberField("Subwords to write, at most", _FIRST, whole=True, least=1, most=_MOST),
    )
    if draws:
        fields += (NumberField("Seed of the draws", model.decode.seed, whole=True, least=0),)

    def answer(values: Sequence[Any]) -> Answer:
        text, length = values[:2]
        return _answer(model, text, length, {"seed": values[2]} if draws else {})

    about = "Type the beginning of a text: the model goes on, and shows which experts took each subword."
    examples = () if data is None else _examples(data, most, model.decode.seed if draws else None)
    return Exhibit(about, "Continue", fields, answer, examples)


@torch.no_grad()
def _answer(model: Any, text: str, length: int, options: dict[str, Any]) -> Answer:
    limits = {"num_best": 1, "max_length_ratio": 0.0, "max_length_extra": length}
    config = decoding(model.decode, {**limits, **options})
    ((batch, _),) = prompt_batches([text], model.subwords)
    with in_evaluation(model), dropless(model.model):
        written = model.hypotheses_of(batch, config).best[0]
        # The last id is what is written, and not read.
        read = [*batch.tokens_BL[0].tolist(), *written][: -1 if written else None]
        with core.record(model.model) as tape:
            model.model.hidden(torch.tensor([read], device=model.device))
    whole = model.subwords.decode([[*batch.tokens_BL[0].tolist(), *written]], "target")[0]
    given = model.subwords.decode(batch.tokens_BL.tolist(), "target")[0]
    own = whole.removeprefix(given) or " (the text ends here)"
    pieces = words_of(model.subwords.pieces(read, "target"))
    layers = words_by_layer(tape.entries, pieces, "Subwords, as the model reads them")
    return Answer((Said("The text goes on", own, given),), layers)


def _examples(data: Any, most: int, seed: int | None) -> tuple[Example, ...]:
    """Return the first words of validation documents."""
    ids = data.opened["val_ids"][:_READ_IDS].tolist()
    documents: list[list[int]] = [[]]
    for i in ids:
        if i == EOS_ID:
            documents.append([])
        else:
            documents[-1].append(i)
    texts = [text.split() for text in data.subwords.decode(documents[:-1], "target")]
    begins = dict.fromkeys(" ".join(words[:_PROMPT_WORDS]) for words in texts if len(words) > _PROMPT_WORDS)
    chosen = list(begins)[:: max(1, len(begins) // most)][:most]
    rest = (str(_FIRST),) if seed is None else (str(_FIRST), str(seed))
    return tuple(Example(text, (text, *rest)) for text in chosen)
