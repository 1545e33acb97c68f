"""A recommender on tables in use: a row in, the prediction of each task and the weights of the gates out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import core
from apps.data.given import GivenConfig, GivenData
from apps.recsys.encoding.features import Features
from apps.recsys.kinds import Kind, Outputs
from apps.recsys.row import RowTask
from apps.recsys.tables.export import PlainTables, described_columns, described_tasks, state_of_columns
from apps.recsys.tables.report.gating import GateReader
from apps.recsys.tables.rows.plain_columns import GraphOfColumns, dynamic_axes, example_inputs
from apps.recsys.tables.rows.scoring import encoded
from apps.recsys.tables.sizes import columns_of, read_on_meta, refuse_without_columns
from apps.report.exhibit import Bars, Example, LayerPart, Part
from apps.report.page import Table
from apps.task import Output, Sizes, Trial, gates_by_layer
from apps.task.outputs import properties
from apps.train.publish.exporting import Exported, Graph
from core.convert.read.calls import evaluating

if TYPE_CHECKING:
    import pyarrow as pa

_NAMED = 3
"""Columns that name a row among the examples."""


def predictions(tasks: Sequence[str], outputs: Outputs) -> Output:
    """Return the prediction of each task; an answer has them by column, as ``Outputs.columns`` names them.

    A page shows the probabilities of binary tasks as bars, and the values of the others as a table.
    """
    kinds = dict(zip(tasks, outputs.kinds, strict=True))
    schemas = {column: own for task, kind in kinds.items() for column, own in kind.schemas(task).items()}

    def to_parts(answer: Mapping[str, Any]) -> tuple[Part, ...]:
        shown = {task: kind.shown(task, answer) for task, kind in kinds.items()}
        shares = tuple((task, own) for task, own in shown.items() if not isinstance(own, str))
        values = tuple((task, own) for task, own in shown.items() if isinstance(own, str))
        bars = (Bars("Probability of each task", shares),) if shares else ()
        return (*bars, *((Table("Predictions", ("task", "value"), values),) if values else ()))

    return Output(properties("Predictions", **schemas), dict, to_parts)


class TablePrediction(RowTask):
    """The use of a ``MultiTaskRecommender``."""

    app, noun, verb = "tables", "Row", "Predict"
    columns = ("tables", "numbers", "histories")

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.encoding = model.encoding
        self.tasks = self.encoding.features.tasks
        self.output = predictions(self.tasks, model.outputs)

    @property
    def description(self) -> str:
        return (
            f"A row: the answer predicts {', '.join(self.tasks)}. Each column may be null, but for that of a domain; "
            "others are left out."
        )

    @property
    def instructions(self) -> str:
        return (
            f"Fill in a row: the model predicts {', '.join(self.tasks)}, and shows the weight that each gate gives "
            "each expert. An empty field is a missing value."
        )

    def answers(self, examples: Sequence[Mapping[str, Any]], most: int = 1) -> list[dict[str, Any]]:
        import pyarrow as pa

        with torch.inference_mode(), evaluating(self.model):
            return pa.table(self.scores([self.row.table(examples)], len(examples))).to_pylist()

    def scores(self, tables: Sequence[pa.Table] | Iterator[pa.Table], batch_size: int) -> dict[str, Any]:
        """Return the predictions of the rows of tables by column, as numpy arrays or lists; see ``logits``."""
        columns = self.model.outputs.columns(self.tasks, self.logits(tables, batch_size))
        return {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in columns.items()}

    def logits(self, tables: Sequence[pa.Table] | Iterator[pa.Table], batch_size: int) -> Tensor:
        """Return the tasks' outputs for the rows of tables, (N, Z).

        Args:
            tables: chunks of one table, with the columns of the encoding.
            batch_size: rows per step.
        """
        parts = [torch.empty(0, self.model.outputs.width)]
        for _, batch in encoded(tables, self.encoding, batch_size):
            parts.append(self.model(batch.to(self.model.device)).float().cpu())
        return torch.cat(parts)

    def layers(self, tape: core.Tape, example: Any, answer: Any) -> Mapping[str, tuple[LayerPart, ...]]:
        reader = GateReader(self.model)
        reader.add(tape)
        gates = [(g.block or "gates", g.label, g.expert_labels, g.weights_NE[0]) for g in reader.gates()]
        return gates_by_layer(gates, "Weight of each expert in each task's gate")

    def examples(self, data: Any, most: int) -> tuple[Example, ...]:
        """Return validation rows, or test rows if there are none, at equal steps, as they are in the table."""
        split = "val" if len(data.opened["val"]) else "test"
        rows = data.rows(split)
        places = range(0, len(rows), max(1, len(rows) // most))[:most]
        batch = rows.__getitems__(list(places))
        examples = []
        for number, row in enumerate(self.row.shown(batch)):
            named = [f"{column} {value}" for column, value in row.items() if value][:_NAMED]
            labels = zip(self.tasks, self.model.outputs.kinds, batch.label_Bt[number, :, None], strict=True)
            true = [f"{task} {_label(kind, label)}" for task, kind, label in labels if not label.isnan()]
            examples.append(Example(f"{', '.join(named)} (in truth {', '.join(true)})", tuple(row.values())))
        return tuple(examples)

    def exported(self) -> Exported:
        """Return the graph, and the facts that a script needs to encode a row and to read the outputs."""
        model, inputs = self.model, example_inputs(self.model.features)
        network = PlainTables(model.members, model.outputs, model.features, tuple(inputs)).train(model.training)
        graph = Graph("model", network, inputs, ("logits",), dynamic_axes(inputs))
        described = {**described_columns(self.encoding), "tasks": described_tasks(model)}
        note = "" if model.trees is None else "only the network is exported: predictions are without the blend's trees"
        return Exported(self.app, (graph,), described, note=note)

    # ---- without a trained model

    @classmethod
    def attach(cls, model: Any, graphs: Mapping[str, Any]) -> None:
        model.model = GraphOfColumns(graphs["model"], model.features)
        model.embedding = dataclasses.replace(model.embedding, deferred=False)  # no table is left to be sharded

    @classmethod
    def encoding_state(cls, exported: Any) -> dict[str, Any]:
        features = exported.description.arguments["features"]
        return state_of_columns(exported.description.preprocessing, features)

    @classmethod
    def data_arguments(cls, given: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        """Return the columns of a table given only by their numbers."""
        if "features" in given:
            return {}
        refuse_without_columns(given, sizes)
        tasks = int(sizes.columns["tasks"])
        features = dataclasses.replace(
            columns_of(sizes, "tables", "numbers", sizes.columns["histories"]),
            tasks=tuple(f"task {i}" for i in range(tasks)),
            positives=(0.5,) * tasks,
            num_domains=sizes.columns["domains"],
        )
        return {"features": features}

    @classmethod
    def trial(cls, model: Any, sizes: Sizes, dtype: torch.dtype) -> Trial:
        """Return a forward from the pooled embeddings on: TorchRec's all-to-all is counted separately."""
        batch = sizes.examples()

        def run() -> Any:
            return [_network(member, model.features, batch, dtype) for member in model.members]

        return Trial(run, batch, batch, unit="rows")

    @classmethod
    def own_data(cls, given: GivenData) -> GivenConfig | None:
        from apps.recsys import own_table  # reads pyarrow, which others do without

        return own_table.config_for(given)


def _network(model: Any, features: Features, batch: int, dtype: torch.dtype) -> Any:
    """Run a table's network from the pooled embeddings on."""
    domain = torch.zeros(batch, dtype=torch.int64, device="meta") if model.num_domains else None
    return model.compute(*read_on_meta(model, features, batch, dtype), domain)


def _label(kind: Kind, label_1: Tensor) -> str:
    (value,) = kind.label_values(label_1)
    if kind.target.kind == "binary":
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:.4g}"


TASK = TablePrediction
