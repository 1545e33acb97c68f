"""A translator in use: a sentence in, its translation and the experts of the subwords on both sides out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import core
from apps.data.given import GivenConfig, GivenData
from apps.data.subwords import EOS_ID
from apps.nlp import own_data
from apps.nlp.decode.exported import ExportedMemoryDecoder
from apps.nlp.decode.graphs import exported_writer, graphs_with_memory
from apps.nlp.decode.run import dropless
from apps.nlp.predict import source_batches
from apps.nlp.sizes import TextTask
from apps.nlp.specialization import side_of
from apps.nlp.text.words import words_of
from apps.nlp.translation.module import task_numbers
from apps.nlp.translation.routes import traced
from apps.report.exhibit import Example, LayerPart
from apps.task import Sizes, Trial, choice, ids_on_meta, text, vocabulary_loss, words_by_layer
from apps.task.outputs import Written, texts
from apps.train.publish.exporting import Exported
from core.convert.read.calls import evaluating

_LONGEST = 10_000
"""Characters of a sentence at most; what the model reads is counted in subwords."""
_USUAL_WORDS = range(4, 15)
"""Words of a sentence that serves as an example."""


class Translation(TextTask):
    """The use of a ``Translator``."""

    app, noun, verb, alternatives, streams = "translation", "Sentence", "Translate", 3, True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.several = len(model.pairs) > 1
        says = "The language of the sentence, and that of the translation."
        self.inputs = {
            "text": text("Sentence", "Good morning.", _LONGEST, from_json=self._sent),
            "pair": choice("Languages" if self.several else None, model.pairs, says, is_required=self.several),
        }
        self.output = texts("Translation", None, "Translation")

    @property
    def asks(self) -> str:
        return f"A sentence: the answer is its translation ({', '.join(self.model.pairs)})."

    @property
    def invites(self) -> str:
        return (
            f"Type a sentence: the model translates it ({', '.join(self.model.pairs)}), and shows which experts took "
            "each subword of the sentence and of its translation."
        )

    def _sent(self, plain: str, name: str) -> str:
        ids, longest = self._length(plain), self.model.longest_source
        if ids > longest:
            raise ValueError(f"{name} has {ids} subwords with its marks: the model reads at most {longest}")
        return plain

    def _length(self, plain: str) -> int:
        subwords = self.model.subwords
        return len(subwords.encode([plain], "source")[0]) + 1 + bool(subwords.languages)

    def answers(self, examples: Sequence[Mapping[str, Any]], most: int = 1) -> list[Written]:
        model, answers = self.model, [Written((), (), ())] * len(examples)
        config = dataclasses.replace(model.decode, num_return_sequences=min(most, model.decode.width))
        for places in self._together(examples):
            tell = examples[places[0]].get("tell")
            own, pair = [examples[place]["text"] for place in places], examples[places[0]]["pair"]
            for number, batch in self._batches(own, pair):
                with evaluating(model):
                    found = model.translate(batch, config, tell=tell)
                rows = zip(number, batch.empty_B.tolist(), found.ids, found.scores, strict=True)
                for i, is_empty, ids, scores in rows:
                    texts = [""] if is_empty else model.subwords.decode(ids, "target")
                    if tell is not None:
                        tell(texts[0])
                    answers[places[i]] = Written(texts, scores, ids[0], self._note(own[i]), f"Translation, {pair}")
        return answers

    def _together(self, examples: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Return the places of the examples of each pair; each by itself where draws depend on its number, or if what
        is written is told."""
        method, each = self.model.decode.method, enumerate(examples)
        keys = [place if method == "sample" or "tell" in own else own["pair"] for place, own in each]
        return [[place for place, own in enumerate(keys) if own == key] for key in dict.fromkeys(keys)]

    def _batches(self, own: Sequence[str], pair: str) -> Any:
        """Yield the numbers of sentences with their batch on the model's device."""
        model = self.model
        options = (model.subwords, model.pairs, model.pairs.index(pair), model.longest_source, 4096, len(own))
        for batch, _ in source_batches(own, *options):
            yield batch.index_B.tolist(), type(batch)(*(part.to(model.device) for part in batch))

    def _note(self, plain: str) -> str:
        longest = self.model.longest_source
        is_cut = self._length(plain) > longest
        return f"The sentence is too long for the model: it was cut after {longest} subwords." if is_cut else ""

    def layers(self, tape: core.Tape, example: Any, answer: Written) -> Mapping[str, tuple[LayerPart, ...]]:
        ((_, batch),) = self._batches([example["text"]], example["pair"])
        with evaluating(self.model), dropless(self.model.model):  # as in the search
            trace = traced(self.model, batch, [*answer.ids, EOS_ID])
        sides = {
            "source": (trace.source, "sentence, as the encoder"),
            "target": (trace.read, "translation, as the decoder"),
        }
        layers: dict[str, tuple[LayerPart, ...]] = {}
        for side, (pieces, title) in sides.items():
            entries = [entry for entry in trace.tape.entries if side_of(entry.name) == side]
            layers |= words_by_layer(entries, words_of(pieces), f"Subwords of the {title} reads them")
        return layers

    def examples(self, data: Any, most: int) -> tuple[Example, ...]:
        """Return sentences of the validation of a usual length, of each pair in turn."""
        usual: dict[str, list[str]] = {}
        for plain, pair in zip(data.sources("val"), data.pair_of("val"), strict=True):
            own = usual.setdefault(data.pairs[pair], [])
            if len(own) < most and len(plain.split()) in _USUAL_WORDS and plain not in own:
                own.append(plain)
        turns = [(place, pair) for pair, own in usual.items() for place in range(len(own))]
        chosen = [(usual[pair][place], pair) for place, pair in sorted(turns, key=lambda turn: turn[0])[:most]]
        if self.several:
            return tuple(Example(f"{pair}: {plain}", (plain, pair)) for plain, pair in chosen)
        return tuple(Example(plain, (plain,)) for plain, _ in chosen)

    def exported(self) -> Exported:
        """Return the graphs, and what spells their ids.

        A pair's "prefix" are ids that come before a source's own, such as the tag of the target language; ``EOS_ID``
        stands after them, and ``max_source_length`` counts all.
        """
        model = self.model
        source_BS = torch.randint(EOS_ID + 1, model.model.source_vocab, (2, 4), device=model.device)
        graphs = graphs_with_memory(model.model, "source", source_BS, {0: "batch", 1: "source"}, "source")
        pairs = {
            pair: {
                "prefix": [model.subwords.tag_id(pair.split("-")[1])] if model.subwords.languages else [],
                "task_ids": task,
                "domain_ids": domain,
            }
            for pair, task, domain in zip(model.pairs, *task_numbers(model.pairs, model.tasks), strict=True)
        }
        return exported_writer(self.app, model, graphs, {"pairs": pairs, "max_source_length": model.longest_source})

    # ---- without a trained model

    @classmethod
    def attach(cls, model: Any, graphs: Mapping[str, Any]) -> None:
        model.model = ExportedMemoryDecoder(graphs["encoder"], graphs["decoder"], model.transformer)
        tasks, domains = task_numbers(model.pairs, model.tasks)
        model.task_P, model.domain_P = torch.tensor(tasks), torch.tensor(domains)

    @classmethod
    def trial(cls, model: Any, sizes: Sizes, dtype: torch.dtype) -> Trial:
        length, budget = sizes.length or 32, sizes.option("tokens_per_batch") or 4096
        has_size = sizes.tokens is not None or sizes.batch is not None
        batch = sizes.examples(length) if has_size else max(int(budget) // length, 1)

        def run() -> Any:
            tasks = ids_on_meta(batch)
            return model.model.decode(
                ids_on_meta(batch, length), model.model.encode(ids_on_meta(batch, length), tasks, tasks)
            )

        loss = vocabulary_loss(batch * length, model.model.output_weight, dtype)
        return Trial(run, batch, batch * length, loss, "tokens of a side")

    @classmethod
    def own_data(cls, given: GivenData) -> GivenConfig | None:
        return own_data.config_for(given)


TASK = Translation
