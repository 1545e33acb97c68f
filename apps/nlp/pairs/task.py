"""A model of pairs in use: a text in, the written one and the experts of the subwords on both sides out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

import core
from apps.data.subwords import EOS_ID
from apps.nlp.decode.exported import ExportedMemoryDecoder
from apps.nlp.decode.graphs import exported_writer, graphs_with_memory
from apps.nlp.decode.run import dropless
from apps.nlp.pairs.routes import traced
from apps.nlp.predict import source_batches
from apps.nlp.sizes import TextTask
from apps.nlp.specialization import side_of
from apps.nlp.text.words import words_of
from apps.report.exhibit import Example, LayerPart
from apps.task import Sizes, Trial, choice, ids_on_meta, text, vocabulary_loss, words_by_layer
from apps.task.outputs import Written, texts
from apps.train.publish.exporting import Exported
from core.convert.read.calls import evaluating


class PairTask(TextTask):
    """The base of the uses of a ``PairModule``: its group is an input beside the text.

    Attributes:
        noun: a source, such as "Sentence".
        written: title of a written text, such as "Translation".
        longest: characters of a source at most; what the model reads is counted in subwords.
        usual_words: words of a source that serves as an example.
        example: a source.
        asked: of the group, its label and a sentence on it.
    """

    written: ClassVar[str]
    longest: ClassVar[int] = 10_000
    usual_words: ClassVar[range]
    example: ClassVar[str]
    asked: ClassVar[tuple[str, str]]
    alternatives, streams = 3, True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        label, says = self.asked
        self.several = len(model.groups) > 1
        self.inputs = {
            "text": text(self.noun, self.example, self.longest, from_json=self._sent),
            model.noun: choice(label if self.several else None, model.groups, says, is_required=self.several),
        }
        self.output = texts(self.written, None, self.written)

    @property
    def description(self) -> str:
        groups = ", ".join(self.model.groups)
        return f"A {self.noun.lower()}: the answer is its {self.written.lower()} ({groups})."

    @property
    def instructions(self) -> str:
        noun, written = self.noun.lower(), self.written.lower()
        return (
            f"Type a {noun}: the model writes its {written} ({', '.join(self.model.groups)}), and shows which experts "
            f"took each subword of the {noun} and of its {written}."
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
            own, group = [examples[place]["text"] for place in places], examples[places[0]][model.noun]
            for number, batch in self._batches(own, group):
                with evaluating(model):
                    found = model.translate(batch, config, tell=tell)
                rows = zip(number, batch.empty_B.tolist(), found.ids, found.scores, strict=True)
                for i, is_empty, ids, scores in rows:
                    texts = [""] if is_empty else model.subwords.decode(ids, "target")
                    if tell is not None:
                        tell(texts[0])
                    answers[places[i]] = Written(texts, scores, ids[0], self._note(own[i]), f"{self.written}, {group}")
        return answers

    def _together(self, examples: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Return the places of the examples of each group; each by itself where draws depend on its number, or if what
        is written is told."""
        method, each = self.model.decode.method, enumerate(examples)
        keys = [place if method == "sample" or "tell" in own else own[self.model.noun] for place, own in each]
        return [[place for place, own in enumerate(keys) if own == key] for key in dict.fromkeys(keys)]

    def _batches(self, own: Sequence[str], group: str) -> Any:
        """Yield the numbers of sentences with their batch on the model's device."""
        model = self.model
        number = model.groups.index(group)
        options = (number, model.tag_of(number), model.longest_source, 4096, len(own))
        for batch, _ in source_batches(own, model.subwords, *options):
            yield batch.index_B.tolist(), model.transfer_batch_to_device(batch, model.device, 0)

    def _note(self, plain: str) -> str:
        longest = self.model.longest_source
        is_cut = self._length(plain) > longest
        return (
            f"The {self.noun.lower()} is too long for the model: it was cut after {longest} subwords." if is_cut else ""
        )

    def layers(self, tape: core.Tape, example: Any, answer: Written) -> Mapping[str, tuple[LayerPart, ...]]:
        ((_, batch),) = self._batches([example["text"]], example[self.model.noun])
        with evaluating(self.model), dropless(self.model.model):  # as in the search
            trace = traced(self.model, batch, [*answer.ids, EOS_ID])
        sides = {
            "source": (trace.source, f"{self.noun.lower()}, as the encoder"),
            "target": (trace.read, f"{self.written.lower()}, as the decoder"),
        }
        layers: dict[str, tuple[LayerPart, ...]] = {}
        for side, (pieces, title) in sides.items():
            entries = [entry for entry in trace.tape.entries if side_of(entry.name) == side]
            layers |= words_by_layer(entries, words_of(pieces), f"Subwords of the {title} reads them")
        return layers

    def examples(self, data: Any, most: int) -> tuple[Example, ...]:
        """Return sources of the validation of a usual length, of each group in turn."""
        usual: dict[str, list[str]] = {}
        for plain, number in zip(data.sources("val"), data.pair_of("val"), strict=True):
            own = usual.setdefault(data.groups[number], [])
            if len(own) < most and len(plain.split()) in self.usual_words and plain not in own:
                own.append(plain)
        turns = [(place, group) for group, own in usual.items() for place in range(len(own))]
        chosen = [(usual[group][place], group) for place, group in sorted(turns, key=lambda turn: turn[0])[:most]]
        if self.several:
            return tuple(Example(f"{group}: {plain}", (plain, group)) for plain, group in chosen)
        return tuple(Example(plain, (plain,)) for plain, _ in chosen)

    def exported(self) -> Exported:
        """Return the graphs, and what spells their ids.

        A group's "prefix" are ids that come before a source's own, such as the tag of the target language; ``EOS_ID``
        stands after them, and ``max_source_length`` counts all.
        """
        model = self.model
        source_BS = torch.randint(EOS_ID + 1, model.model.source_vocab, (2, 4), device=model.device)
        graphs = graphs_with_memory(model.model, "source", source_BS, {0: "batch", 1: "source"}, "source")
        tags = [model.tag_of(number) for number in range(len(model.groups))]
        groups = {
            group: {
                "prefix": [] if tag is None else [model.subwords.tag_id(tag)],
                "task_ids": task,
                "domain_ids": domain,
            }
            for group, tag, task, domain in zip(model.groups, tags, *model.numbers(), strict=True)
        }
        how = {f"{model.noun}s": groups, "max_source_length": model.longest_source}
        return exported_writer(self.app, model, graphs, how)

    # ---- without a trained model

    @classmethod
    def attach(cls, model: Any, graphs: Mapping[str, Any]) -> None:
        model.model = ExportedMemoryDecoder(graphs["encoder"], graphs["decoder"], model.transformer)
        model.task_P, model.domain_P = map(torch.tensor, model.numbers())

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
