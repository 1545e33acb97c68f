"""The test report of a text-to-text model: scores by task beside extractive baselines, texts, the use of experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import core
from apps.data.text_files import num_words
from apps.nlp.pairs.report import PairReport, TestedPairs, examples, side_by_side, write_sentences
from apps.nlp.sql.clauses import write_clauses
from apps.nlp.text.significance import mean_difference
from apps.nlp.text_to_text.metrics import METRICS, TextMetrics
from apps.report.base import spread_batches
from apps.report.page import Code, Section, Table
from apps.report.tables import is_share, write_csv

_MODEL = "model"


class TextToTextReport(PairReport):
    """After a test: the metrics by task beside those of sentences of the source itself, the written texts, and of a
    sparse model how far its experts are specialized in tasks and in kinds of subwords.

    It writes ``tasks.csv``, ``texts.jsonl`` (source, reference, hypothesis, metrics and search score of each text), and
    the files of ``PairReport``; with several tasks ``expert_task.png`` too, with ``constrain: sql``
    ``expert_clause.png``.

    A task whose sources have two sentences or more on average has two extractive baselines: the first sentence, and the
    one that TextRank finds.
    """

    metrics = TextMetrics

    def write(self, collected: TestedPairs, folder: Path) -> list[Section]:
        sections, module = super().write(collected, folder), collected.module
        some = spread_batches(collected.batches, self.config.routing_examples)
        if module.constrain == "sql" and core.moe_layers(module.model) and some:
            sections.insert(1, write_clauses(module, some, folder, self.config.pictures))
        return sections

    def write_scores(self, collected: TestedPairs, folder: Path) -> Section:
        pieces, module, sources = collected.metrics.pieces, collected.module, collected.sources
        table: list[dict[str, Any]] = []
        lines = ["Shares in percent"]
        for number, task in enumerate(module.tasks):
            own = [piece for piece in pieces if piece.group == number]
            texts, scores = {_MODEL: [piece.written or "" for piece in own]}, {_MODEL: [piece.scores for piece in own]}
            if own and sources is not None and hasattr(collected.data, "rows"):
                rows, texts = collected.data.rows("test"), texts | extracted([sources[piece.index] for piece in own])
                for name in [*texts][1:]:
                    each = zip(texts[name], (rows[piece.index] for piece in own), strict=True)
                    scores[name] = [{m: METRICS[m](text, row) for m in module.metrics} for text, row in each]
            words = sum(num_words(piece.reference) for piece in own)
            for name, values in scores.items() if own else ():
                means = {metric: float(np.mean([v[metric] for v in values])) for metric in module.metrics}
                ratio = sum(map(num_words, texts[name])) / words
                table.append({"task": task, "system": name, "texts": len(own), **means, "length_ratio": ratio})
            lines += _against(task, scores, module.metrics[0])
        shown = examples(pieces, "task", module.tasks, sources)
        write_csv(folder / "tasks.csv", table)
        write_sentences(folder / "texts.jsonl", "text", pieces, shown, [piece.scores for piece in pieces])
        samples = side_by_side({"hypothesis": shown}, "task", self.config.samples)
        cells = []
        for row in table:
            percent = {m: 100 * row[m] if is_share(m, [[row[m]]]) else row[m] for m in module.metrics}
            cells.append(tuple(f"{v:.2f}" if isinstance(v, float) else str(v) for v in {**row, **percent}.values()))
        parts = (Table("; ".join(lines), tuple(table[0]), tuple(cells)), Code("Texts", samples))
        return Section("Texts", parts[: 1 + bool(samples)])


def _against(task: str, systems: Mapping[str, Sequence[Mapping[str, float]]], metric: str) -> list[str]:
    """Return a line on the model beside the best baseline; none without baselines."""
    values = {name: [s[metric] for s in scores] for name, scores in systems.items()}
    if len(values) < 2:
        return []
    best = max([*values][1:], key=lambda name: float(np.mean(values[name])))
    d = mean_difference(metric, values[_MODEL], values[best], [task] * len(values[best]), "")
    shown, low, high = d.texts(is_share(metric, [values[_MODEL]]))
    return [f"{task}: {metric} {shown} beside {best}, 95 % interval {low} to {high}"]


# ---- extractive baselines


def extracted(sources: Sequence[str]) -> dict[str, list[str]]:
    """Return what each extractive baseline says of each source; none where sources are mostly one sentence."""
    split = [sentences(source) for source in sources]
    if sum(map(len, split)) < 2 * len(split):
        return {}
    baselines: dict[str, Callable[[Sequence[str]], str]] = {"first sentence": lambda own: own[0], "TextRank": textrank}
    return {name: [say(own) for own in split] for name, say in baselines.items()}


def sentences(text: str) -> list[str]:
    """Return the sentences of a text: what ends in a stop, a question or an exclamation mark before a space."""
    return re.split(r"(?<=[.!?])\s+", text.strip())


def textrank(own: Sequence[str]) -> str:
    """Return the most central sentence: by PageRank over the cosines of their tf-idf (Mihalcea and Tarau 2004)."""
    import networkx  # type: ignore[import-untyped]
    from sklearn.feature_extraction.text import TfidfVectorizer

    if len(own) < 3:
        return own[0]
    try:
        words_SV = TfidfVectorizer(token_pattern=r"\w+").fit_transform(own)
    except ValueError:  # no sentence has a word
        return own[0]
    graph = networkx.from_scipy_sparse_array(words_SV @ words_SV.T)
    rank = networkx.pagerank(graph)
    return own[max(range(len(own)), key=lambda place: (rank[place], -place))]
