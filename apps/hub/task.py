"""A model of the hub in use: a prompt in, the answer and the experts of its tokens out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import core
from apps.base.evaluation import in_evaluation
from apps.report.exhibit import Example, LayerPart, Said
from apps.task import Output, Service, Sizes, Task, Trial, number, text, words_by_layer
from apps.task.outputs import properties
from apps.train.publish.exporting import Exported

_MOST_READ, _MOST_WRITTEN, _FIRST = 8_192, 1_024, 64
"""Tokens of a request at most, and those that a page writes at first."""


class Answered(NamedTuple):
    """A prompt that was answered.

    Attributes:
        prompt, answer: texts.
        ids: the tokens of both, as the model reads them.
    """

    prompt: str
    answer: str
    ids: list[int]


class HubPrompt(Task):
    """The use of a ``HubCausalLM``. Prompts are answered one by one."""

    app, noun, verb = "language", "Prompt", "Answer"
    asks = "A prompt: the answer is what the model writes after it."
    invites = "Type a prompt: the model answers, and shows which experts took each token."

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        says, default = "Tokens to write, at most", min(_MOST_WRITTEN, model.generate.max_new_tokens)
        self.inputs = {
            "text": text("Prompt", "Who goes there?", from_json=self._sent),
            "tokens": number(says, _FIRST, default, 1, _MOST_WRITTEN, f"{says}."),
        }
        schema = {"type": "string", "description": "What the model writes."}
        self.output = Output(
            properties("Answer", text=schema),
            lambda answer: {"text": answer.answer},
            lambda answer: (Said("Answer", answer.answer or " (the text ends here)", answer.prompt),),
        )

    def _sent(self, plain: str, name: str) -> str:
        ids = len(self.model.ids_of(plain))
        if ids > _MOST_READ:
            raise ValueError(f"{name} has {ids} tokens: at most {_MOST_READ} are read")
        return plain

    def answers(self, examples: Sequence[Mapping[str, Any]], most: int = 1) -> list[Answered]:
        answers = []
        for example in examples:
            prompt = example["text"]
            ((read, ids),) = self.model.continued([prompt], example.get("tell"), max_new_tokens=example["tokens"])
            answer = self.model.tokenizer.decode(ids, skip_special_tokens=True)
            answers.append(Answered(prompt, answer, [*read, *ids]))
        return answers

    def service(self) -> Service:
        return replace(super().service(), listen=lambda values, tell: {**values, "tell": tell})

    @torch.no_grad()
    def layers(self, tape: core.Tape, example: Any, answer: Answered) -> Mapping[str, tuple[LayerPart, ...]]:
        with in_evaluation(self.model), core.record(self.model.model) as of_text:  # one pass, not one a token
            self.model.model(input_ids=torch.tensor([answer.ids], device=self.model.device))
        words = [[self.model.tokenizer.decode([i]) or "·"] for i in answer.ids]
        return words_by_layer(of_text.entries, words, "Tokens, as the model reads them", "tokens")

    def examples(self, data: Any, most: int) -> tuple[Example, ...]:
        return ()

    def exported(self) -> Exported:
        """Raise a ``ValueError``: transformers' own exporters write such graphs, of what ``save_folder`` writes."""
        raise ValueError("a model of the hub is exported by transformers' exporters, from the folder of save_folder")

    @classmethod
    def trial(cls, model: Any, sizes: Sizes, dtype: torch.dtype) -> Trial:
        raise ValueError("moesaic plan knows the apps' own networks: a model of the hub is in none of them")


TASK = HubPrompt
