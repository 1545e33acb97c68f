"""A language model in use: the beginning of a text in, what follows and the experts of its subwords out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

import core
from apps.data.subwords import EOS_ID
from apps.nlp.decode import decoding
from apps.nlp.decode.exported import ExportedLanguageModel
from apps.nlp.decode.graphs import decoder_graph, exported_writer
from apps.nlp.decode.run import dropless
from apps.nlp.language.data import prompt_batches
from apps.nlp.predict import checked_texts
from apps.nlp.sizes import TextTask
from apps.nlp.text.words import words_of
from apps.report.exhibit import Example, LayerPart, NumberField, Said
from apps.task import Input, Output, Sizes, Trial, ids_on_meta, number, text, vocabulary_loss, words_by_layer
from apps.task.outputs import properties
from apps.train.publish.exporting import Exported
from core.convert.read.calls import evaluating

_MOST_READ, _MOST_WRITTEN = 1_024, 256
"""Subwords of a request at most."""
_FIRST, _MOST_SHOWN = 24, 200
"""Subwords that a page writes: at first, and at most."""
_PROMPT_WORDS, _READ_IDS = 6, 20_000


class Continued(NamedTuple):
    """A text that was continued.

    Attributes:
        whole: the beginning and what follows it.
        given: the beginning as it was read.
        read: the ids that the model has read; the last one that it writes it does not read.
    """

    whole: str
    given: str
    read: list[int]


def _said(answer: Continued) -> tuple[Said]:
    own = answer.whole.removeprefix(answer.given) or " (the text ends here)"
    return (Said("Continuation", own, answer.given),)


class Continuation(TextTask):
    """The use of a ``LanguageModeler``. Beginnings are continued one by one: a decoder has no padding."""

    app, noun, verb, streams = "language", "Beginning", "Continue", True
    description = "The beginning of a text: the answer is the text with what follows."
    instructions = "Type the beginning of a text: the model continues it, and shows which experts took each subword."

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        learned = model.transformer.positions == "learned"
        self.longest = min(_MOST_READ, model.transformer.max_length - 1) if learned else _MOST_READ
        label = "Subwords to write, at most"
        says = f"{label}; by default as many as in a prediction, and at most {_MOST_WRITTEN}."
        self.inputs = {
            "text": text("Text", "And the king", may_be_empty=True, from_json=self._sent),
            "subwords": number(label, _FIRST, None, 1, _MOST_WRITTEN, says, shown=_MOST_SHOWN),
        }
        if model.decode.method == "sample":
            seed = model.decode.seed
            limits = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1, "default": seed}
            field = NumberField("Seed of the draws", seed, whole=True, least=0)
            self.inputs["seed"] = Input(limits, seed, field=field, is_required=False, default=seed, is_shown=False)
        schema = {"type": "string", "description": "The beginning and what follows it."}
        self.output = Output(properties("Text", text=schema), lambda answer: {"text": answer.whole}, _said)

    def _sent(self, plain: str, name: str) -> str:
        ids = len(self.model.subwords.encode([plain], "target")[0]) + 1
        if ids > self.longest:
            raise ValueError(f"{name} has {ids} subwords with its mark: at most {self.longest} are read")
        return plain

    @torch.no_grad()
    def answers(self, examples: Sequence[Mapping[str, Any]], most: int = 1) -> list[Continued]:
        answers, model, own, decode = [], self.model, self.model.decode, self.model.subwords.decode
        for example in examples:
            ((batch, _),) = prompt_batches(checked_texts([example["text"]]), model.subwords)
            batch = model.transfer_batch_to_device(batch, model.device, 0)
            (given,), tell = batch.tokens_BL.tolist(), example.get("tell")
            longest = example["subwords"] or min(_MOST_WRITTEN, own.max_length(len(given)))
            limits = {"max_new_tokens": longest, "min_new_tokens": min(own.min_new_tokens, longest)}
            config = decoding(own, {**limits, "num_return_sequences": 1, "seed": example.get("seed", own.seed)})
            written = model.hypotheses_of(batch, config, tell=tell).best[0]
            ids = [*given, *written]
            whole, begin = decode([ids, given], "target")
            if tell is not None:
                tell(whole)
            answers.append(Continued(whole, begin, ids[:-1] if written else ids))
        return answers

    @torch.no_grad()
    def layers(self, tape: core.Tape, example: Any, answer: Continued) -> Mapping[str, tuple[LayerPart, ...]]:
        network = self.model.model
        with evaluating(self.model), dropless(network), core.record(network) as of_text:  # one pass, not the search
            network.hidden(torch.tensor([answer.read], device=self.model.device))
        pieces = words_of(self.model.subwords.pieces(answer.read, "target"))
        return words_by_layer(of_text.entries, pieces, "Subwords, as the model reads them")

    def examples(self, data: Any, most: int) -> tuple[Example, ...]:
        """Return the first words of validation documents."""
        documents: list[list[int]] = [[]]
        for i in data.opened["val_ids"][:_READ_IDS].tolist():
            if i == EOS_ID:
                documents.append([])
            else:
                documents[-1].append(i)
        texts = [text.split() for text in data.subwords.decode(documents[:-1], "target")]
        begins = dict.fromkeys(" ".join(words[:_PROMPT_WORDS]) for words in texts if len(words) > _PROMPT_WORDS)
        chosen = list(begins)[:: max(1, len(begins) // most)][:most]
        rest = (str(_FIRST), *([str(self.model.decode.seed)] if "seed" in self.inputs else []))
        return tuple(Example(begin, (begin, *rest)) for begin in chosen)

    def exported(self) -> Exported:
        """Return one graph, which reads a prompt or the next id, and what spells its ids: a text starts with
        ``EOS_ID``.

        Raises:
            ValueError: a router cannot decide step by step, or asks for a domain.
        """
        graph = decoder_graph(self.model.model, "model")
        if "domain_ids" in graph.inputs:
            why = "a prompt's domain is guessed by further passes over it"
            raise ValueError(f"a language model whose routers ask for a domain is not exported: {why}")
        return exported_writer(self.app, self.model, (graph,), {})

    # ---- without a trained model

    @classmethod
    def attach(cls, model: Any, graphs: Mapping[str, Any]) -> None:
        model.model = ExportedLanguageModel(graphs["model"], model.transformer)

    @classmethod
    def trial(cls, model: Any, sizes: Sizes, dtype: torch.dtype) -> Trial:
        length = sizes.length or sizes.option("block_size") or 128
        batch = sizes.examples(length)
        loss = vocabulary_loss(batch * length, model.model.output_weight, dtype)
        return Trial(lambda: model.model.hidden(ids_on_meta(batch, length)), batch, batch * length, loss)


TASK = Continuation
