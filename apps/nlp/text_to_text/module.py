"""``TextToText``: the module that ``moesaic fit`` trains to write summaries, answers or queries of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from apps.base.checks import check_name
from apps.data.subwords import Subwords
from apps.nlp.decode.constraint import Constraint
from apps.nlp.pairs.module import PairModule
from apps.nlp.pairs.report import PairReportConfig
from apps.nlp.sql.grammar import sql_constraint
from apps.nlp.sql.schema import read_schema, serialized
from apps.nlp.text.batches import TranslationBatch
from apps.nlp.text_to_text.metrics import METRICS, TextMetrics
from apps.nlp.text_to_text.report import TextToTextReport
from apps.train.lightning_internals import trainer_of
from apps.train.publish.model_card import ModelKind
from apps.train.step.module import Stage, TaskOutput
from apps.train.step.parts import DataPart

_REPORT = PairReportConfig()


class TextToText(PairModule):
    """A transformer from text to text, of one task or several, sparse or dense.

    It is trained by the cross-entropy of each target token given the tokens before it, with label smoothing, and
    evaluated by the text that it generates. With several tasks the metrics are the means over the tasks.

    Args:
        subwords: of texts and targets; the command line takes them from the data.
        tasks: names of the tasks; the command line takes them from the data. Routers may ask for the task, as the
            task or the domain.
        copy: the model may copy subwords of its source, such as names that it has not learned (a pointer-generator, See
            et al. 2017); the subwords must be joint.
        constrain: "sql": what a test or a prediction writes is a SELECT that is valid for the tables that follow the
            question, as `apps.nlp.sql.schema.serialized` writes them; a validation while training is not constrained.
        metrics: names of `METRICS`; the first one decides which checkpoint is the best.
        report: options of the report that a test adds to the scores; None: nothing.
        kwargs: of ``PairModule``: ``transformer``, ``moe``, ``decode``, ``pretrained`` and others.

    Raises:
        ValueError: a value out of its range, or a combination that cannot be built.
    """

    model_kind = ModelKind("a text-to-text model", 'model.predict(["a text"])', "summarization")
    data_arguments: ClassVar[tuple[str, ...]] = ("subwords", "tasks")
    reporter = TextToTextReport
    readout: ClassVar[tuple[str, ...]] = ("model.output", "model.copy_gate.gate")
    noun: ClassVar[str] = "task"
    longest_usual: ClassVar[int] = 512

    def __init__(
        self,
        subwords: Subwords | None = None,
        tasks: Sequence[str] = (),
        copy: bool = False,
        constrain: Literal["sql"] | None = None,
        metrics: Sequence[str] = ("rouge_l", "rouge_1", "rouge_2", "exact_match", "token_f1", "chrf"),
        report: PairReportConfig | None = _REPORT,
        **kwargs: Any,
    ) -> None:
        super().__init__(subwords=subwords, **kwargs)
        self.report = report
        for name in metrics:
            check_name("metrics", name, [*METRICS])
        if not metrics:
            raise ValueError(f"metrics=[] names none of {', '.join(METRICS)}")
        if copy and kwargs.get("pretrained") is not None:
            raise ValueError(f"copy=True: pretrained={kwargs['pretrained']!r} has no weights for it")
        if constrain is not None:
            check_name("constrain", constrain, ["sql"])
        self.copy, self.constrain, self.metrics = copy, constrain, tuple(metrics)
        self.monitor, self.shown_metrics = f"val/{metrics[0]}", (*metrics[1:], "perplexity")
        if subwords is None:
            return
        if not tasks:
            raise ValueError("tasks=[] names no task")
        self.tasks = tuple(tasks)
        self._rows: Sequence[Mapping[str, Any]] | None = None
        self._build(self.tasks, f"the tasks {', '.join(self.tasks)}", copies=copy)

    def numbers(self) -> tuple[Sequence[int], Sequence[int]]:
        return (range(len(self.tasks)),) * 2

    def part(self, name: str) -> DataPart:
        """Return one task: its number, and a model of only this task."""
        return self._part(name)

    def tag_of(self, group: int) -> str | None:
        return self.tasks[group] if self.subwords.languages else None

    def constraints(self, batch: TranslationBatch) -> Sequence[Constraint] | None:
        trainer = trainer_of(self)
        if self.constrain is None or (trainer is not None and trainer.state.fn == "fit"):
            return None  # a validation while training is to be fast
        sources = self.subwords.decode(batch.source_BS.tolist(), "source")
        return [sql_constraint(source, self.subwords) for source in sources]

    def made_from(self, data: Any) -> dict[str, Any]:
        database = getattr(data, "database", None)
        tables = None if database is None else serialized(read_schema(database))
        return {**super().made_from(data), "database": tables}

    # ---- evaluation

    def build_metrics(self) -> TextMetrics:
        return TextMetrics(self.tasks, self.metrics)

    def _start_pass(self, stage: Stage) -> None:
        super()._start_pass(stage)
        rows = getattr(self._data(), "rows", None)
        self._rows = None if rows is None else rows(stage)

    def judged(self, batch: TranslationBatch, out: TaskOutput, stage: Stage) -> TaskOutput:
        out, pieces = super().judged(batch, out, stage), []
        for piece in out.outputs:
            row = {"references": [piece.reference]} if self._rows is None else self._rows[piece.index]
            pieces.append(piece._replace(scores={n: METRICS[n](piece.written, row) for n in self.metrics}))
        return dataclasses.replace(out, outputs=pieces)
