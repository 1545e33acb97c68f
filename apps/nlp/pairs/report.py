"""The common parts of the test reports of models that write a text of a text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from lightning.pytorch import LightningModule, Trainer

import core
from apps.base.files import replacing
from apps.nlp.expert_use import write_use
from apps.nlp.pairs.routes import expert_use, usual_sentences, write_sentence
from apps.nlp.text.batches import TranslationBatch
from apps.nlp.text.report import WrittenReport
from apps.nlp.text.teacher_forced import Judged
from apps.report.base import ReportConfig, computed_metrics, spread_batches
from apps.report.page import Part, Section
from core.fields import CountOrZero


@core.register_config
@dataclass(frozen=True)
class PairReportConfig(ReportConfig):
    """Options of what ``moesaic test`` adds to the scores of a model that writes a text of a text.

    Attributes:
        samples: written texts shown, at equal steps through the test set.
        sentences: sentences whose attention and experts are plotted; 0 plots none.

    Raises:
        ValueError: a number out of its range.
    """

    routing_examples: CountOrZero = 2000
    samples: CountOrZero = 5
    sentences: CountOrZero = 2

    def brief(self) -> Self:
        return dataclasses.replace(self, samples=0)  # a comparison shows them of all models


@dataclass(frozen=True)
class TestedPairs:
    """The metrics of a test, and what its sentences were written by and from; ``sources`` None: unknown."""

    metrics: Any
    module: Any
    batches: Sequence[TranslationBatch]
    sources: Sequence[str] | None
    run: Path
    data: Any


class PairReport(WrittenReport):
    """Base of the reports of models that write a text of a text.

    It writes ``specialization.csv``, ``expert_subwords.csv``, ``expert_class.png``;
    ``sentence_1_attention.png``, ``sentence_1_experts.png``, ...; and, after a training too, ``learning_curves.png`` of
    the run's ``metrics.csv``.

    Args:
        config: what to do.

    Attributes:
        metrics: the class of the test's metrics.
    """

    config: PairReportConfig
    metrics: ClassVar[type[Any]]
    of_batches = "the use of experts and the pictures of sentences"

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> TestedPairs | None:
        metrics: Any = computed_metrics(pl_module, self.metrics)
        if metrics is None or not metrics.pieces:
            return None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        sources = data.sources("test") if hasattr(data, "sources") else None
        run = Path(trainer.default_root_dir)
        return TestedPairs(metrics, pl_module, self.batches(trainer, pl_module), sources, run, data)

    def write(self, collected: TestedPairs, folder: Path) -> list[Section]:
        module, pictures = collected.module, self.config.pictures
        scores = self.write_scores(collected, folder)
        sections = []
        if core.moe_layers(module.model) and (some := spread_batches(collected.batches, self.config.routing_examples)):
            sections.append(write_use(expert_use(module, some), folder, draw=pictures))
        if pictures:
            shown: list[Part] = []
            for number, sentence in enumerate(usual_sentences(collected.batches, self.config.sentences), 1):
                shown += write_sentence(module, sentence, number, folder)
            if shown:
                sections.append(Section("Words in sentences", tuple(shown)))
            self.write_curves(collected.run, folder)
        return [*sections, scores]

    def write_scores(self, collected: TestedPairs, folder: Path) -> Section:
        """Write the files of scores, and return the tables and samples that a page shows."""
        raise NotImplementedError


def examples(
    sentences: Sequence[Judged], noun: str, groups: Sequence[str], sources: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Return each sentence's index, group, as ``noun``, source where it is known, reference and hypothesis."""
    return [
        {
            "index": s.index,
            noun: groups[s.group],
            **({} if sources is None else {"source": sources[s.index]}),
            "reference": s.reference,
            "hypothesis": s.written,
        }
        for s in sentences
    ]


def side_by_side(systems: Mapping[str, Sequence[Mapping[str, Any]]], noun: str, count: int) -> str:
    """Return ``count`` test sentences, at equal steps through those that all systems have, with each system's text.

    Args:
        systems: the ``examples`` of each system, by its heading.
        noun: as in ``examples``.
        count: how many sentences.
    """
    translations = {name: {s["index"]: s for s in own} for name, own in systems.items()}
    first = next(iter(translations.values()), {})
    shared = sorted(index for index in first if all(index in own for own in translations.values()))
    width = max((len(name) for name in (*systems, "reference")), default=0) + 2
    lines: list[str] = []
    count = min(count, len(shared))
    for number in range(count):
        index = shared[number * len(shared) // count]
        given = first[index]
        lines += ["", f"{given[noun]}, sentence {index + 1}"]
        lines += [f"  {key:<{width}}{given[key]}" for key in ("source", "reference") if key in given]
        lines += [f"  {name:<{width}}{own[index]['hypothesis']}" for name, own in translations.items()]
    return "\n".join(lines[1:])


def write_sentences(
    path: Path,
    noun: str,
    sentences: Sequence[Judged],
    shown: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, float]],
) -> None:
    """Write one JSON object a line for each sentence: its number as ``noun``, its ``examples`` and its scores."""
    with replacing(path) as file:
        for s, example, own in zip(sentences, shown, scores, strict=True):
            row = {noun: s.index + 1, **example, **own, "search_score": s.log_prob}
            del row["index"]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
