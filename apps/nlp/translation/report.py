"""The test report of a translation model: scores by language and by length, sentences, and the use of its experts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from lightning.pytorch import LightningModule, Trainer

import core
from apps.base.files import replacing
from apps.data.text_files import num_words
from apps.nlp.expert_use import write_use
from apps.nlp.text.batches import TranslationBatch
from apps.nlp.text.foreseen import Judged
from apps.nlp.text.report import WrittenReport
from apps.nlp.text.scores import scorer, signature
from apps.nlp.translation.metrics import TranslationMetrics, corpus_metrics, signatures
from apps.nlp.translation.routes import expert_use, usual_sentences, write_sentence
from apps.report.base import ReportConfig, computed_metrics, spread_batches
from apps.report.page import Code, Part, Section, Table
from apps.report.tables import write_csv
from apps.report.use import check_bounds, range_names, ranges_of
from core.fields import CountOrZero

_COLUMNS = {"bleu": "BLEU", "chrf": "chrF++", "token_accuracy": "token acc., %", "perplexity": "perplexity"}


@core.register_config
@dataclass(frozen=True)
class TranslationReportConfig(ReportConfig):
    """Options of what ``moesaic test`` adds to the scores of a translation model.

    Attributes:
        lengths: words of a reference up to which its sentences are one group, ascending; longer ones are the last. In
            scripts without spaces between words each character counts.
        samples: translations shown, at equal steps through the test set.
        sentences: sentences whose attention and experts are plotted; 0 plots none.

    Raises:
        ValueError: a number out of its range.
    """

    routing_examples: CountOrZero = 2000
    lengths: tuple[int, ...] = (5, 10, 15, 20, 30, 50)
    samples: CountOrZero = 5
    sentences: CountOrZero = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("report.lengths", self.lengths)

    def brief(self) -> Self:
        return dataclasses.replace(self, samples=0)  # a comparison shows them of all models


@dataclass(frozen=True)
class _Collected:
    """The metrics of a test, and what its sentences were translated by and from; ``sources`` None: unknown."""

    metrics: TranslationMetrics
    module: Any
    batches: Sequence[TranslationBatch]
    sources: Sequence[str] | None
    run: Path


class TranslationReport(WrittenReport):
    """After a test: the scores by language pair and by length with sacrebleu's signatures, translations, and of a
    sparse model how far its experts are specialized.

    It writes ``pairs.csv``, ``lengths.csv``, ``sentences.jsonl`` (source, reference, hypothesis, sentence chrF++ and
    search score of each sentence), ``signatures.txt``; ``specialization.csv``, ``expert_subwords.csv``,
    ``expert_language.png``, ``expert_class.png``; ``sentence_1_attention.png``, ``sentence_1_experts.png``, ...; and,
    after a training too, ``learning_curves.png`` of the run's ``metrics.csv``.

    Args:
        config: what to do.
    """

    config: TranslationReportConfig
    of_batches = "the use of experts and the pictures of sentences"

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> _Collected | None:
        metrics = computed_metrics(pl_module, TranslationMetrics)
        if metrics is None or not metrics.pieces:
            return None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        sources = data.sources("test") if hasattr(data, "sources") else None
        return _Collected(metrics, pl_module, self.batches(trainer, pl_module), sources, Path(trainer.default_root_dir))

    def write(self, collected: _Collected, folder: Path) -> list[Section]:
        module, pictures = collected.module, self.config.pictures
        metrics = collected.metrics
        scores = write_scores(metrics.pieces, metrics.tokenizers, collected.sources, folder, self.config)
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


def write_scores(
    sentences: Sequence[Judged],
    tokenizers: Mapping[str, str],
    sources: Sequence[str] | None,
    folder: Path,
    config: TranslationReportConfig,
) -> Section:
    """Write the files, and return the tables and samples that a page shows.

    Args:
        sentences: the sentences of the test, by ``index``.
        tokenizers: BLEU's tokenizer for each language pair, in the order of their numbers.
        sources: source texts, by ``index``; None: they are not known.
        folder: folder of the files.
        config: what to do.
    """
    pairs, signed = list(tokenizers), signatures(tokenizers)
    of_pairs = {name: [s for s in sentences if s.group == p] for p, name in enumerate(pairs)}
    by_pair = breakdown("pair", of_pairs, tokenizers)
    if len(by_pair) > 1:
        by_pair += breakdown("pair", {"mean of the pairs": sentences}, tokenizers)
    by_length = breakdown("words", length_groups(sentences, config.lengths), tokenizers)
    titles = {name: name.replace("bleu", "sacreBLEU").replace("chrf", "chrF++").replace("_", " ", 1) for name in signed}
    signed_lines = "\n".join(f"{titles[name]} {text}" for name, text in signed.items())
    tables = (_table(signed_lines, "pair", by_pair), _table("By words of the reference", "words", by_length))
    shown = examples(sentences, pairs, sources)
    samples = side_by_side({"hypothesis": shown}, config.samples)
    write_csv(folder / "pairs.csv", [{**row, **_signed(row, tokenizers)} for row in by_pair])
    write_csv(folder / "lengths.csv", by_length)
    write_sentences(folder / "sentences.jsonl", sentences, shown)
    with replacing(folder / "signatures.txt") as file:
        file.writelines(f"{name} {text}\n" for name, text in signed.items())
    code = (Code("Translations", samples),) if samples else ()
    return Section("Translations", (*tables, *code))


def breakdown(what: str, groups: Mapping[str, Sequence[Judged]], tokenizers: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the scores of each group that has a sentence: a row each, with its name as ``what``."""
    rows = []
    for name, own in groups.items():
        if own:
            values = corpus_metrics(own, tokenizers)
            words = sum(num_words(s.reference) for s in own)
            ratio = sum(num_words(s.written or "") for s in own) / words if words else math.nan
            rows.append({what: name, "sentences": len(own), "length_ratio": ratio, **{k: values[k] for k in _COLUMNS}})
    return rows


def _signed(row: Mapping[str, Any], tokenizers: Mapping[str, str]) -> dict[str, str]:
    """Return BLEU's signature; for the mean of several pairs, the signatures of all."""
    own = [tokenizers[row["pair"]]] if row["pair"] in tokenizers else dict.fromkeys(tokenizers.values())
    return {"bleu_signature": "; ".join(signature("bleu", name) for name in own)}


def length_groups(sentences: Sequence[Judged], lengths: Sequence[int]) -> dict[str, list[Judged]]:
    """Group sentences by the words of their reference: "1-5", "6-10", ..., "over 50"."""
    names = range_names(lengths)
    groups: dict[str, list[Judged]] = {name: [] for name in names}
    words_N = np.array([num_words(sentence.reference) for sentence in sentences])
    for sentence, place in zip(sentences, ranges_of(words_N, lengths), strict=True):
        groups[names[place]].append(sentence)
    return groups


def _table(title: str, what: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    lines = tuple(
        (
            row[what],
            f"{row['sentences']:,}",
            f"{row['bleu']:.2f}",
            f"{row['chrf']:.2f}",
            f"{100 * row['token_accuracy']:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['length_ratio']:.3f}",
        )
        for row in rows
    )
    return Table(title, (what, "sentences", *_COLUMNS.values(), "length ratio"), lines)


def examples(sentences: Sequence[Judged], pairs: Sequence[str], sources: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return each sentence's index, pair, source where it is known, reference and hypothesis."""
    return [
        {
            "index": s.index,
            "pair": pairs[s.group],
            **({} if sources is None else {"source": sources[s.index]}),
            "reference": s.reference,
            "hypothesis": s.written,
        }
        for s in sentences
    ]


def side_by_side(systems: Mapping[str, Sequence[Mapping[str, Any]]], count: int) -> str:
    """Return ``count`` test sentences, at equal steps through those that all systems have, with their translations.

    Args:
        systems: the ``examples`` of each system, by its heading.
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
        lines += ["", f"{given['pair']}, sentence {index + 1}"]
        lines += [f"  {key:<{width}}{given[key]}" for key in ("source", "reference") if key in given]
        lines += [f"  {name:<{width}}{own[index]['hypothesis']}" for name, own in translations.items()]
    return "\n".join(lines[1:])


def write_sentences(path: Path, sentences: Sequence[Judged], shown: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object a line for each sentence, from its ``examples``, with its scores."""
    chrf = scorer("chrf")
    with replacing(path) as file:
        for s, example in zip(sentences, shown, strict=True):
            score = round(chrf.sentence_score(s.written, [s.reference]).score, 2)
            row = {"sentence": s.index + 1, **example, "chrf": score, "search_score": s.log_prob}
            del row["index"]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
