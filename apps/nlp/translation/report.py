"""The test report of a translation model: scores by language and by length, sentences, and the use of its experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import core
from apps.base.files import replacing
from apps.data.text_files import num_words
from apps.nlp.pairs.report import PairReport, PairReportConfig, TestedPairs, examples, side_by_side, write_sentences
from apps.nlp.text.scores import scorer, signature
from apps.nlp.text.teacher_forced import Judged
from apps.nlp.translation.metrics import TranslationMetrics, corpus_metrics, signatures
from apps.report.page import Code, Section, Table
from apps.report.tables import write_csv
from apps.report.use import check_bounds, range_names, ranges_of

_COLUMNS = {"bleu": "BLEU", "chrf": "chrF++", "token_accuracy": "token acc., %", "perplexity": "perplexity"}


@core.register_config
@dataclass(frozen=True)
class TranslationReportConfig(PairReportConfig):
    """Options of what ``moesaic test`` adds to the scores of a translation model.

    Attributes:
        lengths: words of a reference up to which its sentences are one group, ascending; longer ones are the last. In
            scripts without spaces between words each character counts.

    Raises:
        ValueError: a number out of its range.
    """

    lengths: tuple[int, ...] = (5, 10, 15, 20, 30, 50)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("report.lengths", self.lengths)


class TranslationReport(PairReport):
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
    metrics = TranslationMetrics

    def write_scores(self, collected: TestedPairs, folder: Path) -> Section:
        return write_scores(
            collected.metrics.pieces, collected.metrics.tokenizers, collected.sources, folder, self.config
        )


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
    shown = examples(sentences, "pair", pairs, sources)
    samples = side_by_side({"hypothesis": shown}, "pair", config.samples)
    write_csv(folder / "pairs.csv", [{**row, **_signed(row, tokenizers)} for row in by_pair])
    write_csv(folder / "lengths.csv", by_length)
    chrf = scorer("chrf")
    scores = [{"chrf": round(chrf.sentence_score(s.written, [s.reference]).score, 2)} for s in sentences]
    write_sentences(folder / "sentences.jsonl", "sentence", sentences, shown, scores)
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
