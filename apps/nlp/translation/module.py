"""``Translator``: the module that ``moesaic fit`` trains on parallel text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from apps.base.checks import check_name
from apps.data.subwords import Subwords
from apps.nlp.pairs.module import PairModule
from apps.nlp.text.batches import TranslationBatch
from apps.nlp.translation.metrics import TranslationMetrics, bleu_tokenizers, signatures
from apps.nlp.translation.report import TranslationReport, TranslationReportConfig
from apps.train.publish.model_card import ModelKind
from apps.train.step.parts import DataPart

_REPORT = TranslationReportConfig()
Tasks = Literal["pair", "source", "target"]


class Translations(NamedTuple):
    """Translations of a batch.

    Attributes:
        index: int64 (B,), as ``TranslationBatch.index_B``.
        pair: the language pair, such as "en-de".
        source: as the model read it.
        translation: the best hypothesis; empty for an empty line.
        score: float64 (B,), its score in the search; 0 for an empty line.
        alternatives: the further hypotheses, best first, where ``decode.num_return_sequences`` asks for them.
    """

    index: Tensor  # type: ignore[assignment]  # a batch has no use for tuple.index
    pair: list[str]
    source: list[str]
    translation: list[str]
    score: Tensor
    alternatives: list[list[str]]


class Translator(PairModule):
    """A transformer from one language to another, or from many to many, sparse or dense.

    It is trained by the cross-entropy of each target token given the tokens before it, with label smoothing, and
    evaluated by the text that it generates: BLEU and chrF++ of its translations as text, by sacrebleu, against the
    references as they are. With several pairs ``bleu`` and ``chrf`` are the means over the pairs.

    Args:
        subwords: of both languages; the command line takes them from the data.
        pairs: language pairs, such as "en-de"; the command line takes them from the data.
        tasks: the task id for routers that ask for one: the language "pair", or the "source" or the "target" language.
            The target language is the domain.
        bleu_tokenize: sacrebleu's tokenizer for BLEU, "13a", "zh", "char", ..., for all pairs, or by pair; None: by
            target language, as `bleu_tokenizers` says.
        report: options of the report that a test adds to the scores; None: nothing.
        kwargs: of ``PairModule``: ``transformer``, ``moe``, ``decode``, ``pretrained`` and others.

    Raises:
        ValueError: a value out of its range, or a combination that cannot be built.
    """

    model_kind = ModelKind("a translation model", 'model.predict(["a sentence"])', "translation")
    data_arguments: ClassVar[tuple[str, ...]] = ("subwords", "pairs")
    reporter = TranslationReport
    noun: ClassVar[str] = "pair"
    predicts: ClassVar[str] = "translation"

    def __init__(
        self,
        subwords: Subwords | None = None,
        pairs: Sequence[str] = (),
        tasks: Tasks = "pair",
        bleu_tokenize: str | dict[str, str] | None = None,
        report: TranslationReportConfig | None = _REPORT,
        **kwargs: Any,
    ) -> None:
        super().__init__(subwords=subwords, **kwargs)
        self.report = report
        if subwords is None:
            return
        self.bleu_tokenizers = bleu_tokenizers(pairs, bleu_tokenize)
        self.pairs, self.tasks, self.bleu_tokenize = tuple(pairs), tasks, bleu_tokenize
        said = f"the pairs {', '.join(self.pairs)} by tasks={tasks!r}"
        self._build(self.pairs, said)

    def numbers(self) -> tuple[list[int], list[int]]:
        return task_numbers(self.pairs, self.tasks)

    def part(self, name: str) -> DataPart:
        """Return one pair of languages: its task, and a translator of only this pair."""
        return self._part(name, bleu_tokenize=self.bleu_tokenizers.get(name))

    def tag_of(self, group: int) -> str | None:
        return self.pairs[group].split("-")[1] if self.subwords.languages else None

    # ---- evaluation

    def build_metrics(self) -> TranslationMetrics:
        return TranslationMetrics(self.pairs, self.bleu_tokenizers)

    @property
    def metric_signatures(self) -> Mapping[str, str]:
        return signatures(self.bleu_tokenizers)

    # ---- prediction

    def predict_step(self, batch: TranslationBatch, batch_idx: int) -> Translations:  # type: ignore[override]
        """Return the translation of each source; an empty line stays one."""
        return Translations(*super().predict_step(batch, batch_idx))


def task_numbers(pairs: Sequence[str], tasks: Tasks) -> tuple[list[int], list[int]]:
    """Return the task and the domain of each pair, numbered in the order of their first mention.

    Raises:
        ValueError: no pair, or ``tasks`` is none of its words.
    """
    if not pairs:
        raise ValueError("pairs=[] names no language pair")
    sources, targets = zip(*(pair.split("-") for pair in pairs), strict=True)
    of = {"pair": tuple(pairs), "source": sources, "target": targets}
    check_name("tasks", tasks, [*of])

    def numbers(names: Sequence[str]) -> list[int]:
        known = list(dict.fromkeys(names))
        return [known.index(name) for name in names]

    return numbers(of[tasks]), numbers(targets)
