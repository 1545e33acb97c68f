"""Metrics of written texts, each a value of one text; a test has the means by task, and over the tasks.

Another metric is a line: ``METRICS["execution"] = my_function``, where ``my_function(prediction, row)`` sees the text
and the row that ``TextToTextData.rows`` has of it. ``model.metrics`` then names it.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apps.data.text_files import WORD
from apps.nlp.sql.execution import execution_match, query_match, valid
from apps.nlp.text.scores import scorer
from apps.nlp.text.teacher_forced import Judged
from apps.train.step.pieces import PieceMetrics, token_metrics

Metric = Callable[[str, Mapping[str, Any]], float]
"""The value of a text, given its row: ``references`` are the right texts, of which the best one counts."""


def rouge(key: str) -> Metric:
    """Return the F1 of ROUGE-1, -2 or -L (Lin 2004) as rouge-score has it without stemming.

    Letters of every script count, with their marks, where rouge-score knows those of English. In scripts without spaces
    between words each character is one.
    """

    def value(prediction: str, row: Mapping[str, Any]) -> float:
        from torchmetrics.functional.text import rouge_score

        options: dict[str, Any] = {"rouge_keys": key, "normalizer": str.lower, "tokenizer": _words}
        return max(float(rouge_score(prediction, r, **options)[f"{key}_fmeasure"]) for r in row["references"])

    return value


def _words(text: str) -> list[str]:
    """Return the words of letters, digits and their marks, such as vowels of Hindi, but not the marks of emoji."""
    marks = {c for c in text if unicodedata.category(c) in ("Mn", "Mc") and not "\ufe00" <= c <= "\ufe0f"}
    return WORD.findall("".join(c if c.isalnum() or c in marks else " " for c in text))


def squad(key: str) -> Metric:
    """Return SQuAD's "exact_match" or "f1" of words, without case, punctuation and articles."""

    def value(prediction: str, row: Mapping[str, Any]) -> float:
        from torchmetrics.functional.text import squad

        answers = {"answer_start": [0] * len(row["references"]), "text": list(row["references"])}
        written = {"prediction_text": prediction, "id": "0"}
        return float(squad([written], [{"answers": answers, "id": "0"}])[key]) / 100

    return value


def chrf(prediction: str, row: Mapping[str, Any]) -> float:
    """Return chrF++ of the text in 0..100, by sacrebleu."""
    return float(_chrf().sentence_score(prediction, list(row["references"])).score)


_chrf = functools.cache(lambda: scorer("chrf"))

METRICS: dict[str, Metric] = {
    "rouge_l": rouge("rougeL"),
    "rouge_1": rouge("rouge1"),
    "rouge_2": rouge("rouge2"),
    "exact_match": squad("exact_match"),
    "token_f1": squad("f1"),
    "chrf": chrf,
    "execution": execution_match,
    "valid": valid,
    "query_match": query_match,
}


class TextMetrics(PieceMetrics[Judged]):
    """Means of ``Judged.scores``, token accuracy and perplexity.

    ``compute`` returns each metric by name, with several tasks its mean over the tasks next to ``<metric>_<task>``.

    Args:
        tasks: in the order of their numbers.
        names: the metrics.
    """

    def __init__(self, tasks: Sequence[str], names: Sequence[str]) -> None:
        super().__init__()
        self.tasks, self.names = tuple(tasks), tuple(names)

    def values_of(self, pieces: Sequence[Judged]) -> dict[str, float]:
        of_tasks = {task: [s.scores for s in pieces if s.group == number] for number, task in enumerate(self.tasks)}
        values: dict[str, float] = {}
        for name in self.names:
            means = {task: sum(s[name] for s in own) / len(own) for task, own in of_tasks.items() if own}
            values[name] = sum(means.values()) / len(means) if means else float("nan")
            if len(self.tasks) > 1:
                values |= {f"{name}_{task}": value for task, value in means.items()}
        return {**values, **token_metrics(pieces)}
