"""A translator in use: a sentence in, its translation and the experts of the subwords on both sides out."""

from __future__ import annotations

from typing import Any

from apps.data.given import GivenConfig, GivenData
from apps.nlp import own_data
from apps.nlp.pairs.task import PairTask


class Translation(PairTask):
    """The use of a ``Translator``."""

    app, noun, verb, written = "translation", "Sentence", "Translate", "Translation"
    usual_words = range(4, 15)

    def __init__(self, model: Any) -> None:
        says = "The language of the sentence, and that of the translation."
        super().__init__(model, "Good morning.", "Languages", says)

    @property
    def asks(self) -> str:
        return f"A sentence: the answer is its translation ({', '.join(self.model.pairs)})."

    @property
    def invites(self) -> str:
        return (
            f"Type a sentence: the model translates it ({', '.join(self.model.pairs)}), and shows which experts took "
            "each subword of the sentence and of its translation."
        )

    @classmethod
    def own_data(cls, given: GivenData) -> GivenConfig | None:
        return own_data.config_for(given)


TASK = Translation
