"""A model of the hub in use: a prompt in, the answer and the experts of its tokens out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import core
from apps.report.exhibit import Example, LayerPart, Said
from apps.task import Output, Service, Sizes, Task, Trial, number, text, words_by_layer
from apps.task.outputs import properties
from apps.train.publish.exporting import Exported, Graph
from core.convert.read.calls import evaluating

_MOST_READ, _MOST_WRITTEN, _FIRST = 8_192, 1_024, 64
"""Tokens of a request at most, and those that a page writes at first."""
_EXAMPLE = 16
"""Tokens of a row of an export's example."""


class Answered(NamedTuple):
    """A prompt that was answered.

    Attributes:
        prompt, answer: texts.
        ids: the tokens of both, as the model reads them.
    """

    prompt: str
    answer: str
    ids: list[int]


class _Logits(nn.Module):
    """A model of transformers as a function of ids only."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=token_ids, use_cache=False).logits
        return logits


class HubPrompt(Task):
    """The use of a ``HubCausalLM``. Prompts are answered one by one."""

    app, noun, verb, streams = "language", "Prompt", "Answer", True
    description = "A prompt: the answer is what the model writes after it."
    instructions = "Type a prompt: the model answers, and shows which experts took each token."

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
        _ = self.model.tokenizer  # a folder without one is rejected before a request comes
        return super().service()

    @torch.no_grad()
    def layers(self, tape: core.Tape, example: Any, answer: Answered) -> Mapping[str, tuple[LayerPart, ...]]:
        with evaluating(self.model), core.record(self.model.model) as of_text:  # one pass, not one a token
            self.model.model(input_ids=torch.tensor([answer.ids], device=self.model.device))
        words = [[self.model.tokenizer.decode([i]) or "·"] for i in answer.ids]
        return words_by_layer(of_text.entries, words, "Tokens, as the model reads them", "tokens")

    def examples(self, data: Any, most: int) -> tuple[Example, ...]:
        return ()

    def exported(self) -> Exported:
        """Return one graph of a forward: ids of rows of one length in, the logits of the token after each id out."""
        ids_BS = torch.arange(2 * _EXAMPLE).view(2, _EXAMPLE) % self.model.config.get_text_config().vocab_size
        axes = {"token_ids": {0: "batch", 1: "length"}}
        graph = Graph("model", _Logits(self.model.model), {"token_ids": ids_BS}, ("logits",), axes)
        return Exported("own", (graph,), {})

    @classmethod
    def encoding_state(cls, exported: Any) -> Any:
        raise ValueError(f"{exported.path} has logits only: predict takes the run, --ckpt_path")

    @classmethod
    def trial(cls, model: Any, sizes: Sizes, dtype: torch.dtype) -> Trial:
        raise ValueError("moesaic plan knows the apps' own networks: a model of the hub is in none of them")


TASK = HubPrompt
