"""A translator in use: a sentence in, its translation and the experts of the subwords on both sides out."""

from __future__ import annotations

from apps.data.given import GivenConfig, GivenData
from apps.nlp import own_data
from apps.nlp.pairs.task import PairTask


class Translation(PairTask):
    """The use of a ``Translator``."""

    app, noun, verb, written = "translation", "Sentence", "Translate", "Translation"
    usual_words, example = range(4, 15), "Good morning."
    asked = ("Languages", "The language of the sentence, and that of the translation.")

    @classmethod
    def own_data(cls, given: GivenData) -> GivenConfig | None:
        return own_data.config_for(given)


TASK = Translation
