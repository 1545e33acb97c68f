"""``MultiTaskRecommender``: the module that ``moesaic fit`` trains on tables."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor

import core
from apps.base.checks import check_name
from apps.recsys.encoding.features import Features
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.kinds import Outputs
from apps.recsys.metrics import MultiTaskMetrics
from apps.recsys.tables.blend.blend import KEY as BLEND, Blend
from apps.recsys.tables.blend.training import TrainsBlend
from apps.recsys.tables.columns.bottoms import SharedBottom, SingleTask
from apps.recsys.tables.columns.dense import DenseConfig
from apps.recsys.tables.columns.embedding import EmbeddingConfig, check_rows_are_stepped
from apps.recsys.tables.columns.history import HistoryConfig
from apps.recsys.tables.model import Ensemble, InteractionConfig, MultiTaskModel, SharedMembers
from apps.recsys.tables.negatives.weighting import WeightingConfig
from apps.recsys.tables.outputs import TaskOutputs, difference, labeled_mean
from apps.recsys.tables.report.importance import importances
from apps.recsys.tables.report.report import RecommenderReport, RecommenderReportConfig, TrainingChecks
from apps.recsys.tables.rows import scoring
from apps.recsys.tables.rows.batch import TableBatch
from apps.recsys.tables.shard import growing
from apps.recsys.tables.tasks import HeadConfig
from apps.train.checkpoint import sharded
from apps.train.lightning_internals import trainer_of
from apps.train.publish.model_card import ModelKind
from apps.train.step.balance import Stage
from apps.train.step.module import SparseModule, TaskOutput
from core.config.plain import from_plain
from core.convert.read.calls import evaluating

_logger = logging.getLogger(__name__)

_REPORT = RecommenderReportConfig()


class MultiTaskRecommender(SparseModule):
    """A recommender for several tasks: clicks, purchases, watch times, ratings.

    The metric that is compared, and by which the best weights are kept, is the mean AUC of the tasks, or their mean R^2
    if all predict numbers; if only some do, it is "quality", the mean of AUCs and R^2.

    Configs may also be given as mappings, as they are in a run's ``config.yaml``.

    Args:
        features: the columns and tasks; the command line takes them from the data.
        shared: the layer between the columns and the towers: ``core.MMoE``, ``OMoE``, ``CGC``, ``PLE``, ``SMES``,
            ``HoME``, ``M3oE``, ``STAR``, ``RankMixer``, or of ``apps.recsys.tables.columns.bottoms`` ``SharedBottom``
            or ``SingleTask``.
        embedding: embeddings of the categorical columns.
        dense: encoding of the continuous columns.
        interaction: interaction of the columns.
        head: towers of the tasks.
        weighting: weighting of the tasks' losses in their sum.
        dropout: dropout of the shared layer's input, in training.
        num_members: networks trained side by side; the prediction is the mean of their probabilities.
        share_members: whether they share columns and weights, each with scales and biases of its own (TabM, arXiv
            2410.24210): several for little more than one. For a ``SharedBottom`` and a plain head.
        score_bins: number of bins of the scores whose counts the metrics keep instead of every prediction; there is no
            AUC by user then. None: exact metrics.
        report: options of the report that a test adds to the metrics; None: nothing.
        history: how the columns of sequences become one vector each.
        gate_embeddings: width of the hidden layer of a gate that scales the columns by domain (EPNet, arXiv
            2302.01115); 0: none.
        blend: "lightgbm": boosted trees are trained on the same rows when the training ends, and a prediction is the
            weighted mean of both, with the weight of the least validation loss; None: the network by itself.
        kwargs: ``optimizer``, ``ema_decay``, ``average_last``, ``grow`` and ``distil`` of ``SparseModule``.

    Raises:
        ValueError: no features, no task, a value out of its range, or parts that do not go together.
    """

    model_kind = ModelKind(
        "a multi-task model of table rows", 'model.predict("rows.csv")', tags=("recommendation", "tabular")
    )
    data_arguments: ClassVar[tuple[str, ...]] = ("features",)
    monitor: str = "val/auc"
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"
    _read: tuple[Mapping[str, Any], Encoding] | None = None
    """The last state of ``encoding_state`` that was read, and what it says."""
    trees: Blend | None = None
    """The trees of a checkpoint's blend and their weights; None: predictions are the network's."""

    @classmethod
    def defaults_of_none(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **super().defaults_of_none(arguments),
            "shared": SharedBottom(),
            "embedding": EmbeddingConfig(),
            "dense": DenseConfig(),
            "interaction": InteractionConfig(),
            "head": HeadConfig(),
            "weighting": WeightingConfig(),
            "history": HistoryConfig(),
        }

    def __init__(
        self,
        features: Features | None = None,
        shared: core.MultiGateConfig | None = None,
        embedding: EmbeddingConfig | None = None,
        dense: DenseConfig | None = None,
        interaction: InteractionConfig | None = None,
        head: HeadConfig | None = None,
        weighting: WeightingConfig | None = None,
        dropout: float = 0.0,
        num_members: int = 1,
        share_members: bool = False,
        score_bins: int | None = None,
        report: RecommenderReportConfig | None = _REPORT,
        history: HistoryConfig | None = None,
        gate_embeddings: int = 0,
        blend: Literal["lightgbm"] | None = None,
        **kwargs: Any,
    ) -> None:
        features = from_plain(features, Features, "features")
        shared = from_plain(shared, core.MultiGateConfig, "shared")
        embedding = from_plain(embedding, EmbeddingConfig, "embedding")
        dense = from_plain(dense, DenseConfig, "dense")
        interaction = from_plain(interaction, InteractionConfig, "interaction")
        head = from_plain(head, HeadConfig, "head")
        weighting = from_plain(weighting, WeightingConfig, "weighting")
        report = from_plain(report, RecommenderReportConfig, "report")
        history = from_plain(history, HistoryConfig, "history")
        super().__init__(**kwargs)
        if blend is not None:
            check_name("blend", blend, ["lightgbm"])
        self.blend = blend
        if features is None:
            return self.wait_for_data("features")
        if not features.tasks:
            raise ValueError("features.tasks=() names no task: there is nothing to learn")
        if not (features.categorical or features.continuous or features.vectors or features.sequences):
            raise ValueError("features has no column: categorical, continuous, vectors and sequences are empty")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1)")
        if num_members < 1:
            raise ValueError(f"num_members={num_members} is not at least 1")
        if num_members > 1 and weighting is not None and weighting.kind == "gradnorm":
            raise ValueError(f"weighting.kind='gradnorm' needs one shared layer; num_members={num_members} has as many")
        if isinstance(shared, SingleTask) and weighting is not None and weighting.kind == "gradnorm":
            raise ValueError("weighting.kind='gradnorm' needs a shared layer, and SingleTask shares nothing")
        self.features = features
        self.outputs = Outputs(features.target_of_task)
        self.monitor = f"val/{self.outputs.main_metric or 'quality'}"
        self.shared_config = shared or SharedBottom()
        self.embedding, self.dense = embedding or EmbeddingConfig(), dense or DenseConfig()
        self.interaction, self.head = interaction or InteractionConfig(), head or HeadConfig()
        self.weighting_config, self.history = weighting or WeightingConfig(), history or HistoryConfig()
        self.dropout, self.num_members, self.report = dropout, num_members, report
        self.score_bins, self.gate_embeddings = score_bins, gate_embeddings
        self.build_metrics()  # an impossible number is rejected here
        parts: dict[str, Any] = {
            "embedding": self.embedding, "dense": self.dense, "interaction": self.interaction, "head": self.head,
            "dropout": dropout, "history": self.history, "gate_embeddings": gate_embeddings,
        }  # fmt: skip
        self.model: MultiTaskModel | Ensemble
        if share_members:
            self.model = SharedMembers(features, self.shared_config, num_members=num_members, **parts)
        elif num_members == 1:
            self.model = MultiTaskModel(features, self.shared_config, **parts)
        else:
            self.model = Ensemble([MultiTaskModel(features, self.shared_config, **parts) for _ in range(num_members)])
        shares = features.positives or (0.5,) * len(features.tasks)
        initial = [kind.initial_loss(share) for kind, share in zip(self.outputs.kinds, shares, strict=True)]
        self.weighting = self.weighting_config.build(features.tasks, initial)
        self.balance.weight = 1 / num_members  # the tasks' losses are means over the members

    @property
    def members(self) -> list[MultiTaskModel]:
        """The networks, one if there is no ensemble or it is one network."""
        if isinstance(self.model, MultiTaskModel):
            return [self.model]
        return [m for m in self.model.members if isinstance(m, MultiTaskModel)]

    @property
    def input_dim(self) -> int:
        """Width D of what enters the shared layer."""
        return self.members[0].input_dim

    def forward(self, batch: TableBatch) -> Tensor:
        """Return the tasks' outputs (B, Z), one logit per task if all are binary; see ``apps.recsys.kinds``.

        An ensemble's represent the mean of the members' predictions.
        """
        return self._blended(self.model(batch), batch)

    def _blended(self, z: Tensor, batch: TableBatch) -> Tensor:
        """Return the outputs (B, Z) of networks' (B, Z) or (M, B, Z)."""
        z = z if z.ndim == 2 else self.outputs.mean(z)
        return z if self.trees is None else self.trees.mixed(self.outputs, z, batch)

    def task_loss(self, batch: TableBatch) -> TaskOutput:
        """Return the weighted sum of each task's mean loss over its labeled examples.

        A task without a label in the batch has the loss 0 there.
        """
        predicted = self.distribution(batch)
        z, label_Bt = predicted.z, predicted.label_Bt
        trained = z if batch.offset_Bt is None else self.outputs.shifted(z, batch.offset_Bt)
        loss_t = labeled_mean(self.outputs.losses(trained, label_Bt), label_Bt, predicted.weight_Bt)
        tasks = self.features.tasks
        terms = {f"loss_{name}": value for name, value in zip(tasks, loss_t.detach().unbind(), strict=True)}
        if not self.training:
            self.members[0].head.check_labels(label_Bt, tasks)
        by_gradients = self.training and self.weighting_config.kind == "gradnorm"
        shared = last_weight(self.members[0].shared) if by_gradients else None
        loss, learned = self.weighting(loss_t, (label_Bt == label_Bt).any(0), shared)
        for what, value_t in learned.items():
            terms |= {f"{what}_{name}": value for name, value in zip(tasks, value_t.unbind(), strict=True)}
        for name, value in self._head_losses(z).items():
            loss = loss + value
            terms[name] = value.detach()
        outputs = z if z.ndim == 2 else self.outputs.mean(z)
        if batch.offset_Bt is not None and not self.training:  # metrics count the rows as they are sampled
            outputs = self.outputs.shifted(outputs, batch.offset_Bt)
        return TaskOutput(loss, outputs, label_Bt, len(batch), terms, batch.group_B, distribution=predicted)

    def judged(self, batch: TableBatch, out: TaskOutput, stage: Stage) -> TaskOutput:
        if isinstance(metrics := self.stage_metrics(stage), MultiTaskMetrics):
            # A task's mean over all its labels is not that of the batches' means.
            loss_t = torch.stack([out.terms[f"loss_{name}"] for name in self.features.tasks])
            loss_t, _ = self.weighting(loss_t.diag())
            rows_t = (out.targets == out.targets).sum(0)
            loss_p = torch.cat((loss_t, (out.loss - loss_t.sum())[None]))
            metrics.add_losses(loss_p, torch.cat((rows_t, rows_t.new_tensor([len(batch)]))))
        return dataclasses.replace(out, cold=batch.cold_B) if stage == "test" else out

    def distribution(self, batch: TableBatch) -> TaskOutputs:
        """Return the tasks' outputs, and the labels, which say where a task counts."""
        labels = self.members[0].head.labels(batch.label_Bt)
        z = self.model(batch).float()
        return TaskOutputs(self.outputs, z if self.trees is None else self._blended(z, batch), labels, batch.weight_Bt)

    def _head_losses(self, z: Tensor) -> Mapping[str, Tensor]:
        if z.ndim == 2 or len(self.members) == 1:
            return self.members[0].head.losses(z)
        by_member = [m.head.losses(z_BZ) for m, z_BZ in zip(self.members, z, strict=True)]
        return {name: torch.stack([losses[name] for losses in by_member]).mean() for name in by_member[0]}

    @property
    def encoding(self) -> Encoding:
        """The encoding of the table's values, read once from a checkpoint's state: that takes longer than a row."""
        state = scoring.encoding_of(self)
        if self._read is None or self._read[0] is not state:
            self._read = state, Encoding.from_state(state)
        return self._read[1]

    def example_inputs(self, batch: TableBatch) -> tuple[TableBatch]:
        return (batch,)

    def cost_unit(self, batch: TableBatch) -> str:
        return "a row"

    def build_metrics(self) -> MultiTaskMetrics:
        return MultiTaskMetrics(self.features.tasks, self.score_bins is None, self.score_bins, self.outputs)

    @property
    def shown_metrics(self) -> tuple[str, ...]:
        kinds = zip(self.features.tasks, self.outputs.kinds, strict=True)
        return tuple(f"{kind.main_metric}_{name}" for name, kind in kinds)

    @property
    def metric_signatures(self) -> Mapping[str, str]:
        """Return the shares of network and trees in a blend's predictions, by each task's metric."""
        pairs = zip(self.features.tasks, self.shown_metrics, strict=True)
        return {} if self.trees is None else {metric: self.trees.signature(task) for task, metric in pairs}

    def predict_step(self, batch: TableBatch, batch_idx: int) -> dict[str, Any]:
        """Return the rows' numbers in the table, the data's ``predict_columns`` and each task's prediction.

        It is ``probability_<task>`` of a binary task, ``value_<task>`` of the others, and both of a multiclass one.
        Rows of a split have each task's ``label_<task>`` too, as the table has it, or None for no label; those of a
        ``predict_file`` have none.
        """
        data, tasks = self._data(), self.features.tasks
        labels = {}
        if getattr(data, "predict_file", None) is None:
            for task, kind, label_B in zip(tasks, self.outputs.kinds, batch.label_Bt.T, strict=True):
                labels[f"label_{task}"] = kind.label_values(label_B)
        return {
            "index": batch.index_B,
            **(batch.kept or {}),
            **self.outputs.columns(tasks, self(batch).float()),
            **labels,
        }

    @torch.inference_mode()
    def predict(self, rows: Any, batch_size: int = 4096) -> Any:
        """Return the prediction of each task for each row, in the rows' order: what ``moesaic predict`` writes.

        Values are encoded with the encoding that the checkpoint keeps, as in an evaluation: no training file is needed,
        and a value that training lacked has row 0. Columns that the model does not know are ignored, labels too.

        Args:
            rows: a pandas DataFrame, or a row of one, a pyarrow Table (or what offers itself as one, such as a polars
                DataFrame), a dict of columns, a list of dicts, one a row, or a path, or a pattern of paths, of CSV or
                Parquet files.
            batch_size: rows per step. Files and frames are read in chunks of sixteen steps; the scores are held whole.

        Returns:
            columns ``probability_<task>`` of binary tasks and ``value_<task>`` of the others, float32; a multiclass
            task has the likeliest class as text, and its probability. They are a DataFrame with the index of ``rows``
            for pandas, a ``pyarrow.Table`` for a table or a list, and a dict of numpy arrays (N,) for a dict and
            for files.

        Raises:
            ValueError: a column is missing or doubled, a value has the wrong type, a domain that training lacked, a
                file that cannot be read, or a model that has neither a checkpoint's encoding nor its data.

        Example::

            model = apps.load("runs/census_income")
            scores = model.predict(df)        # df["age"], df["education"], ...: scores["probability_income"]
        """
        with evaluating(self):
            return scoring.predict(self, rows, batch_size)

    def importances(self, data: Any) -> list[dict[str, Any]]:
        """Return what each task's metric loses when a column is shuffled among test rows, a line each: permutation
        importance with 95 % intervals. Columns that say the same share it."""
        return [dataclasses.asdict(one) for one in importances(self, data)]

    def drift(self, pattern: str) -> list[str]:
        """Return a line for each column in which the rows of files differ from the training rows, the worst first.

        Args:
            pattern: path, or a pattern of paths, of CSV or Parquet files.

        Raises:
            ValueError: a file lacks a column, holds a value that cannot be encoded, or has no row.
        """
        from apps.recsys.tables.encode.drift import drift  # reads pyarrow, which others do without

        return drift(self.encoding, pattern)

    # ---- set-up, and the tables' needs from Lightning

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.trees = None
        if self.embedding.deferred and not getattr(self.trainer.strategy, "shards_tables", False):
            raise ValueError(
                "embedding.deferred=True leaves the tables to trainer.strategy=TorchRecStrategy; "
                "without it set deferred to false"
            )
        if self.history.pooling == "din" and getattr(self.trainer.strategy, "shards_tables", False):
            raise ValueError(
                "history.pooling='din' reads single rows of the tables, which TorchRecStrategy shards: take pooling "
                "'mean'"
            )
        if stage == "fit" and self.embedding.kind == "fused":
            check_rows_are_stepped(self.trainer, "embedding.kind='fused'", "; kinds 'joined' and 'collection' allow it")
            if self.trainer.world_size > 1:
                raise ValueError(
                    f"embedding.kind='fused' trains on one process, not on {self.trainer.world_size}: take 'joined' or "
                    "'collection'"
                )

    def _check_data(self) -> None:
        in_data = getattr(self._data(), "features", None)
        if in_data is not None and in_data != self.features:
            raise ValueError(f"model.features does not fit the data: {difference(self.features, in_data)}")

    def report_callbacks(self) -> list[Callback]:
        if self.report is None:
            return []
        return [TrainingChecks(self.report.routing_examples), RecommenderReport(self.report)]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.embedding.kind == "fused":
            first: Any = self.trainer.optimizers[0].param_groups[0]
            factor = first["lr"] / first["initial_lr"]
            for member in self.members:
                member.sparse.set_fused_lr(factor)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.embedding.kind == "fused":
            checkpoint["fused_embeddings"] = [member.sparse.fused_state() for member in self.members]
        if self.trees is not None:
            checkpoint[BLEND] = self.trees.record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        fitting = (trainer := trainer_of(self)) is not None and trainer.state.fn == "fit"
        shards_tables = getattr(trainer and trainer.strategy, "shards_tables", False)
        if fitting and not shards_tables and sharded.has_tables(checkpoint):
            raise ValueError(
                "the checkpoint's tables are sharded: training continues from it with "
                "trainer.strategy=TorchRecStrategy; validate, test and predict take it as it is"
            )
        if fitting or self.embedding.kind == "fused":  # a test takes only the weights, whatever the kind
            for member, state in zip(self.members, checkpoint.get("fused_embeddings", []), strict=False):
                member.sparse.load_fused_state(state)

        if trainer is not None and not fitting:
            self._take_trees(checkpoint, Path(str(trainer.ckpt_path)))

    @classmethod
    def restored(cls, checkpoint: dict[str, Any], path: str, **changed: Any) -> Self:
        module = super().restored(checkpoint, path, **changed)
        module._take_trees(checkpoint, Path(path))
        return module

    def _take_trees(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        """Read the trees that a checkpoint names, if the model is a blend."""
        self.trees = None
        if self.blend is not None and BLEND in checkpoint:
            self.trees = Blend.read(checkpoint[BLEND], path, self.features)
        elif self.blend is not None and self.reports:
            _logger.warning("%s has no trees, which a training's end adds: its network predicts by itself", path)

    def save_beside(self, folder: Path) -> None:
        if self.trees is not None:
            self.trees.write(folder)

    def configure_callbacks(self) -> list[Callback]:
        callbacks = super().configure_callbacks()
        return [*callbacks, TrainsBlend()] if self.blend is not None and self.reports else callbacks

    def widened(self, checkpoint: Mapping[str, Any], encoding_state: Mapping[str, Any]) -> Mapping[str, Any]:
        return growing.widened(self, checkpoint, encoding_state)

    def twin(self, **changed: Any) -> Self:
        return super().twin(**{"blend": None, **changed})  # a comparison is one of networks


def last_weight(shared: torch.nn.Module) -> tuple[Tensor, int]:
    """Return the stacked weight of the experts' last layer, and how many experts, its first, all tasks share.

    Raises:
        ValueError: the weight or a shared expert is missing, or experts are sharded over processes.
    """
    experts: Any = getattr(shared, "experts", None)
    if isinstance(experts, torch.nn.ModuleList):
        experts = experts[-1]
    stacked = {} if experts is None else {n: p for n, p in experts.named_parameters() if p.ndim == 3}
    if not stacked:
        raise ValueError(f"weighting.kind='gradnorm' finds no stacked weight in {type(experts).__name__}")
    # GradNorm needs the parameter itself, and not ``Experts.weights_of``; a gated FFN's gate follows its ``w_out``.
    weight = stacked.get("w_out", list(stacked.values())[-1])
    groups = getattr(shared, "groups", None)
    groups = groups[-1] if isinstance(groups, tuple) else groups  # one a level
    if isinstance(weight, DTensor):
        raise ValueError(
            "weighting.kind='gradnorm' needs the gradient of every expert on each process, and they are sharded over "
            "processes: take kind 'fixed' or 'uncertainty', or the strategy's experts: 1"
        )
    num_shared = len(weight) if groups is None else groups.num_shared
    if not num_shared:
        raise ValueError("weighting.kind='gradnorm' needs an expert that all tasks share: num_experts is 0")
    return weight, num_shared
