"""What ``moesaic test`` says of a translation model beside its scores: by language, by length, sentence by sentence."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

import core
from apps.base.files import replacing
from apps.data.lines import num_words
from apps.data.loader import batches_of_test
from apps.nlp.translation.metrics import Sentence, TranslationMetrics, corpus_metrics, scorer, signature, signatures
from apps.nlp.translation.routes import report_curves, report_routes
from apps.report.tables import print_table, write_csv

_logger = logging.getLogger(__name__)

_COLUMNS = {"bleu": "BLEU", "chrf": "chrF++", "token_accuracy": "token acc., %", "perplexity": "perplexity"}


@core.register_config
@dataclass(frozen=True)
class ReportConfig:
    """What ``moesaic test`` adds to the scores of a translation model.

    Attributes:
        lengths: words of a reference up to which its sentences are one group, ascending; longer ones are the last.
            Of scripts without spaces between words each character counts.
        samples: translations printed, at equal steps through the test set.
        routing_sentences: test sentences from which the experts' use is read, about; 0 reads none.
        pictures: sentences whose attention and experts are drawn; 0 leaves out all pictures.

    Raises:
        ValueError: a number out of its range.
    """

    lengths: tuple[int, ...] = (5, 10, 15, 20, 30, 50)
    samples: int = 5
    routing_sentences: int = 2000
    pictures: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))  # a list in YAML and in a checkpoint
        if any(a >= b for a, b in zip((0, *self.lengths), self.lengths, strict=False)):
            raise ValueError(f"report.lengths={self.lengths} must be ascending numbers of at least 1")
        for name in ("samples", "routing_sentences", "pictures"):
            if getattr(self, name) < 0:
                raise ValueError(f"report.{name}={getattr(self, name)} must not be negative")


class TranslationReport(Callback):
    """After a test: prints the scores by language pair and by length with sacrebleu's signatures, translations, and of
    a sparse model how far its experts are specialised.

    Writes into ``<run folder>/report``: ``pairs.csv``, ``lengths.csv``, ``sentences.jsonl`` (source, reference,
    hypothesis, sentence chrF++ and search score of each sentence), ``signatures.txt``; ``specialisation.csv``,
    ``expert_subwords.csv``, ``expert_language.png``, ``expert_class.png``; ``sentence_1_attention.png``,
    ``sentence_1_experts.png``, ...; and, after a training too, ``learning_curves.png`` of the run's ``metrics.csv``.

    Args:
        config: what to do.
    """

    only_reports: ClassVar[bool] = True

    def __init__(self, config: ReportConfig) -> None:
        self.config = config

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._curves(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics: Any = pl_module.stage_metrics("test")
        if not isinstance(metrics, TranslationMetrics):
            return
        metrics.compute()  # on every rank: it gathers. The module's own call finds the result
        if not trainer.is_global_zero or not metrics.sentences:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        sources = data.sources("test") if hasattr(data, "sources") else None
        folder = Path(trainer.default_root_dir) / "report"
        written = report(metrics.sentences, metrics.tokenizers, sources, folder, self.config)
        batches = list(batches_of_test(trainer))
        written += report_routes(pl_module, batches, folder, self.config.routing_sentences, self.config.pictures)
        written += self._curves(trainer, pl_module)
        _logger.info(f"{folder}: {', '.join(p.name for p in written)}")

    def _curves(self, trainer: Trainer, pl_module: LightningModule) -> list[Path]:
        if not self.config.pictures:
            return []
        run, smoothing = Path(trainer.default_root_dir), float(getattr(pl_module, "label_smoothing", 0.0))
        return report_curves(run / "metrics.csv", run / "report", smoothing)


def report(
    sentences: Sequence[Sentence],
    tokenizers: Mapping[str, str],
    sources: Sequence[str] | None,
    folder: Path,
    config: ReportConfig,
) -> list[Path]:
    """Print the tables and samples, and write the files.

    Args:
        sentences: of the test, by ``index``.
        tokenizers: BLEU's, of each language pair, in the order of their numbers.
        sources: source texts, by ``index``; None: they are not known.
        folder: of the files.
        config: what to do.
    """
    pairs, signed = list(tokenizers), signatures(tokenizers)
    by_pair = breakdown({name: [s for s in sentences if s.pair == p] for p, name in enumerate(pairs)}, tokenizers)
    if len(by_pair) > 1:
        by_pair.append(_row("mean of the pairs", sentences, tokenizers))
    by_length = breakdown(length_groups(sentences, config.lengths), tokenizers)
    titles = {name: name.replace("bleu", "sacreBLEU").replace("chrf", "chrF++").replace("_", " ", 1) for name in signed}
    _print("\n".join(f"{titles[name]} {text}" for name, text in signed.items()), "pair", by_pair)
    _print("By words of the reference", "words", by_length)
    _print_samples(sentences, sources, pairs, config.samples)
    return [
        write_csv(
            folder / "pairs.csv", [{"pair": r["group"], **_without(r), **_signed(r, tokenizers)} for r in by_pair]
        ),
        write_csv(folder / "lengths.csv", [{"words": r["group"], **_without(r)} for r in by_length]),
        write_sentences(folder / "sentences.jsonl", sentences, pairs, sources),
        write_signatures(folder / "signatures.txt", signed),
    ]


def breakdown(groups: Mapping[str, Sequence[Sentence]], tokenizers: Mapping[str, str]) -> list[dict[str, Any]]:
    """Scores of each group that has a sentence: a row each, with its name as "group"."""
    return [_row(name, own, tokenizers) for name, own in groups.items() if own]


def _row(name: str, own: Sequence[Sentence], tokenizers: Mapping[str, str]) -> dict[str, Any]:
    values = corpus_metrics(own, tokenizers)
    words = sum(num_words(s.reference) for s in own)
    ratio = sum(num_words(s.hypothesis) for s in own) / words if words else math.nan
    return {"group": name, "sentences": len(own), "length_ratio": ratio, **{k: values[k] for k in _COLUMNS}}


def _without(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "group"}


def _signed(row: Mapping[str, Any], tokenizers: Mapping[str, str]) -> dict[str, str]:
    """BLEU's signature, of the mean of several pairs those of all."""
    own = [tokenizers[row["group"]]] if row["group"] in tokenizers else dict.fromkeys(tokenizers.values())
    return {"bleu_signature": "; ".join(signature("bleu", name) for name in own)}


def length_groups(sentences: Sequence[Sentence], lengths: Sequence[int]) -> dict[str, list[Sentence]]:
    """Sentences by the words of their reference: "1-5", "6-10", ..., "over 50"."""
    names = [f"{low + 1}-{high}" for low, high in zip((0, *lengths), lengths, strict=False)]
    names.append(f"over {lengths[-1]}" if lengths else "all")
    found: dict[str, list[Sentence]] = {name: [] for name in names}
    for sentence in sentences:
        words = num_words(sentence.reference)
        found[names[sum(words > high for high in lengths)]].append(sentence)
    return found


def _print(title: str, what: str, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [
        [
            row["group"],
            f"{row['sentences']:,}",
            f"{row['bleu']:.2f}",
            f"{row['chrf']:.2f}",
            f"{100 * row['token_accuracy']:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['length_ratio']:.3f}",
        ]
        for row in rows
    ]
    print_table(title, (what, "sentences", *_COLUMNS.values(), "length ratio"), lines)


def _print_samples(
    sentences: Sequence[Sentence], sources: Sequence[str] | None, pairs: Sequence[str], count: int
) -> None:
    """Some sentences, line by line, that a reader may judge."""
    count = min(count, len(sentences))
    for number in range(count):
        s = sentences[number * len(sentences) // count]
        print(f"\n{pairs[s.pair]}, sentence {s.index + 1}")
        if sources is not None:
            print(f"  source      {sources[s.index]}")
        print(f"  reference   {s.reference}\n  hypothesis  {s.hypothesis}")


def side_by_side(systems: Mapping[str, Sequence[Mapping[str, Any]]], count: int) -> str:
    """``count`` test sentences, at equal steps through those that all systems have: source, reference, translations.

    Args:
        systems: of each system's heading, what ``Translator.examples_of_test`` gives.
        count: sentences.
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


def write_sentences(
    path: Path, sentences: Sequence[Sentence], pairs: Sequence[str], sources: Sequence[str] | None
) -> Path:
    """A JSON object a line and sentence."""
    chrf = scorer("chrf")
    with replacing(path) as file:
        for s in sentences:
            row = {
                "sentence": s.index + 1,
                "pair": pairs[s.pair],
                **({} if sources is None else {"source": sources[s.index]}),
                "reference": s.reference,
                "hypothesis": s.hypothesis,
                "chrf": round(chrf.sentence_score(s.hypothesis, [s.reference]).score, 2),
                "search_score": s.log_prob,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def write_signatures(path: Path, signed: Mapping[str, str]) -> Path:
    """A line a score, as "bleu nrefs:1|case:mixed|..."."""
    with replacing(path) as file:
        file.writelines(f"{name} {signature}\n" for name, signature in signed.items())
    return path
