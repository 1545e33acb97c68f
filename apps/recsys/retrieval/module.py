"""``TwoTowerRetriever``: the module that ``moesaic fit`` trains on pairs of users and items, for retrieval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

import core
from apps.base.checks import check_at_least
from apps.nets.blocks import one_ffn, resolve_blocks
from apps.nets.place import Place, check_fits, check_layers
from apps.recsys.encoding.features import Features
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.retrieval import scoring
from apps.recsys.retrieval.batch import PairBatch
from apps.recsys.retrieval.catalog import Catalog
from apps.recsys.retrieval.index import ItemIndex
from apps.recsys.retrieval.loss import sampled_softmax
from apps.recsys.retrieval.metrics import RetrievalMetrics
from apps.recsys.retrieval.model import Tower, TowerConfig
from apps.recsys.retrieval.report import RetrievalReport, RetrievalReportConfig
from apps.recsys.retrieval.scoring import CANDIDATES, Ranking, as_json, open_index, retrieve
from apps.recsys.tables.columns.dense import DenseConfig
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.model import InteractionConfig
from apps.recsys.tables.rows.batch import TableBatch
from apps.recsys.tables.rows.scoring import encoding_of
from apps.recsys.tables.shard import growing
from apps.train.checkpoint.contents import fingerprint
from apps.train.publish.model_card import ModelKind
from apps.train.step.balance import Stage
from apps.train.step.module import OptimizerConfig, SparseModule, TaskOutput
from core.config.plain import from_plain
from core.convert.read.calls import evaluating
from core.kernels import outside_autocast

_REPORT = RetrievalReportConfig()
_LEAST_TEMPERATURE = 0.01
"""Temperature below which a learned one does not fall, as in CLIP."""


class TwoTowerRetriever(SparseModule):
    """Two towers, sparse or dense, that map users and items to vectors whose dot product scores how well they match.

    They are trained by the softmax over the items of a batch (Yi et al., RecSys 2019), and evaluated by the rank of a
    pair's item among *all* items of the catalog, by exact search: ``recall_10``, ``recall_50``, ``recall_100``,
    ``ndcg_10`` and ``mrr``.

    Configs may also be given as mappings, as they are in a run's ``config.yaml``.

    Args:
        user_features, item_features: columns of each tower; the command line takes them from the data.
        num_items: items of the catalog; the command line takes it from the data.
        tower: sizes of both towers.
        moe: the experts that replace the FFN of some blocks of both towers; None: dense FFNs.
        moe_blocks: which blocks: "all", "everyN", "lastN" (the last N of every second block), or indices.
        dense_ffn: the FFN of those blocks in a dense model, as in the baselines; None: the same as in the others.
        embedding, dense, interaction: how a tower reads its columns.
        temperature: divisor of the dot products in the softmax. They lie between -1 and 1.
        learn_temperature: whether training updates the temperature, which then starts there and stays above 0.01.
        log_q: whether the softmax is corrected for how often each item is in a batch.
        ks: numbers of best items at which recall is measured, ascending; NDCG is measured at the first.
        report: options of the report that a test writes besides the metrics; None: nothing.
        optimizer: learning rate, weight decay and schedule.
        ema_decay: decay of the moving average of the weights; None: no average.

    Raises:
        ValueError: a value is out of its range, or the parts do not fit together.
    """

    reporter = RetrievalReport
    model_kind = ModelKind("a retriever of items for users", 'model.predict("users.csv")', tags=("recommendation",))
    data_arguments: ClassVar[tuple[str, ...]] = ("user_features", "item_features", "num_items")
    compiled_networks = ("user_tower", "item_tower")
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"

    @classmethod
    def defaults_of_none(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **super().defaults_of_none(arguments),
            "tower": TowerConfig(),
            "embedding": EmbeddingConfig(),
            "dense": DenseConfig(),
            "interaction": InteractionConfig(),
        }

    def __init__(
        self,
        user_features: Features | None = None,
        item_features: Features | None = None,
        num_items: int = 0,
        tower: TowerConfig | None = None,
        moe: core.MoEConfig | None = None,
        moe_blocks: str | list[int] = "all",
        dense_ffn: core.DenseFFN | None = None,
        embedding: EmbeddingConfig | None = None,
        dense: DenseConfig | None = None,
        interaction: InteractionConfig | None = None,
        temperature: float = 0.05,
        learn_temperature: bool = False,
        log_q: bool = True,
        ks: Sequence[int] = (10, 50, 100),
        report: RetrievalReportConfig | None = _REPORT,
        optimizer: OptimizerConfig | None = None,
        ema_decay: float | None = None,
    ) -> None:
        user_features = from_plain(user_features, Features, "user_features")
        item_features = from_plain(item_features, Features, "item_features")
        tower = from_plain(tower, TowerConfig, "tower")
        moe, dense_ffn = from_plain(moe, core.MoEConfig, "moe"), from_plain(dense_ffn, core.DenseFFN, "dense_ffn")
        embedding = from_plain(embedding, EmbeddingConfig, "embedding")
        dense = from_plain(dense, DenseConfig, "dense")
        interaction = from_plain(interaction, InteractionConfig, "interaction")
        super().__init__(optimizer=optimizer, ema_decay=ema_decay)
        self.report = from_plain(report, RetrievalReportConfig, "report")
        if user_features is None or item_features is None:
            return self.wait_for_data("user_features and item_features")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive")
        if learn_temperature and temperature < _LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature={temperature} is below {_LEAST_TEMPERATURE}, where a learned one stays above"
            )
        check_at_least(1, num_items=num_items)
        self.ks = tuple(ks)
        if not self.ks or list(self.ks) != sorted(set(self.ks)) or self.ks[0] < 1:
            raise ValueError(f"ks={list(ks)} must be ascending numbers of at least 1")
        if self.ks[-1] >= num_items:
            raise ValueError(f"ks={list(ks)}: the last must be below the {num_items} items, or recall is always 1")
        self.user_features, self.item_features, self.num_items = user_features, item_features, num_items
        self.tower, self.moe, self.moe_blocks = tower or TowerConfig(), moe, moe_blocks
        self.log_q = log_q
        self.monitor = f"val/recall_{self.ks[-1]}"
        self.place = Place(type(self).__name__, ())
        if moe is not None:
            check_fits(self.place, moe.router, moe.balance)
        ffn = one_ffn(moe, dense_ffn)
        blocks = resolve_blocks(moe_blocks, self.tower.depth) if ffn is not None else ()
        parts = (
            self.tower,
            embedding or EmbeddingConfig(),
            dense or DenseConfig(),
            interaction or InteractionConfig(),
            ffn,
            blocks,
        )
        self.user_tower, self.item_tower = Tower(user_features, *parts), Tower(item_features, *parts)
        check_layers(self.place, self)
        log_temperature = torch.tensor(math.log(temperature))
        self.log_temperature: Tensor
        if learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature, persistent=False)
        self._index: ItemIndex | None = None
        self._ranking: Ranking | None = None

    @property
    def temperature(self) -> Tensor:
        """Return the divisor of the dot products in the softmax, ()."""
        return self.log_temperature.exp().clamp_min(_LEAST_TEMPERATURE)

    def forward(self, user: TableBatch, item: TableBatch) -> tuple[Tensor, Tensor]:
        """Return the vectors of users, float32 (B, dim), and of items, (U, dim), all of length 1."""
        return self.user_tower(user), self.item_tower(item)

    def task_loss(self, batch: PairBatch) -> TaskOutput:
        """Return the mean softmax cross-entropy of each pair's item among the batch's.

        In evaluation pairs whose item the catalog lacks are left out of it; ``outputs`` are the users' vectors and
        ``targets`` the items' numbers.
        """
        assert batch.item is not None
        assert batch.item_B is not None
        assert batch.own_B is not None
        assert batch.count_U is not None
        user_BD, item_UD = self(batch.user, batch.item)
        known_B = slice(None) if self.training else batch.item_B > 0
        with outside_autocast(user_BD.device):
            logits_BU = (user_BD / self.temperature)[known_B] @ item_UD.t()
        log_q_U = batch.log_q_U if self.log_q else None
        if len(logits_BU):
            loss = sampled_softmax(logits_BU, batch.own_B[known_B], batch.count_U, log_q_U)
        else:
            loss = logits_BU.sum()
        if self.training:
            return TaskOutput(loss, None, None, len(batch))
        return TaskOutput(loss, user_BD, batch.item_B, len(batch))

    def judged(self, batch: PairBatch, out: TaskOutput, stage: Stage) -> TaskOutput:
        """Return ``out`` with the rank of each pair's item among all candidates, int64 (B,), as ``outputs``."""
        return dataclasses.replace(out, outputs=self.index().ranks(out.outputs, out.targets, batch.seen_BH))

    def example_inputs(self, batch: PairBatch) -> tuple[TableBatch, TableBatch]:
        assert batch.item is not None
        return batch.user, batch.item

    def cost_unit(self, batch: PairBatch) -> str:
        return "a pair of user and item"

    def build_metrics(self) -> RetrievalMetrics:
        return RetrievalMetrics(self.ks)

    @property
    def shown_metrics(self) -> tuple[str, ...]:
        return (*(f"recall_{k}" for k in self.ks[:-1]), f"ndcg_{self.ks[0]}", "mrr")

    # ---- predictions

    @property
    def ranking(self) -> Ranking | None:
        """The model that reranks the items retrieved by a Trainer's predictions; it is loaded once for all batches."""
        data = self._data()
        if data.rank is not None and self._ranking is None:
            self._ranking = Ranking.load(self, data.rank, data.rank_task)
        return self._ranking

    @property
    def user_roles(self) -> dict[str, str]:
        """The role of each of the users' columns that the ranking model reads, by column; empty without one."""
        return {} if self.ranking is None else self.ranking.user_roles

    def on_predict_start(self) -> None:
        super().on_predict_start()
        if self._data().index_file is not None:
            self._index = open_index(self, self._data().index_file)

    def on_predict_end(self) -> None:
        super().on_predict_end()
        self._ranking = None

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Any]:
        """Return the data's ``top_k`` best items of each user: a list of each user's items, and a list of their dot
        products.

        The keys are ``index``, the data's ``predict_columns``, the columns of user and item, ``score``, and with its
        ``rank`` the ranking model's predictions, as lists too.
        """
        data, state = self._data(), encoding_of(self)
        vectors_BD, ranking = self.user_tower(batch.user), self.ranking
        users = None if ranking is None else data.users(batch, ranking.user_roles)
        found = retrieve(self.index(), vectors_BD, batch.seen_BH, data.top_k, ranking, data.candidates, users)
        named = () if state["user_column"] is None else (state["user_column"],)
        roles = {**dict.fromkeys(data.predict_columns, "predict_columns"), **dict.fromkeys(named, "user_column")}
        columns = data.users(batch, roles).select(list(roles)).to_pydict() if roles else {}
        lists = {state["item_column"]: self.index().named(found.item_N), "score": found.score_N.tolist()}
        lists |= {name: values_N.tolist() for name, values_N in found.ranked.items()}
        by_user = {name: found.by_user(values_N, len(batch)) for name, values_N in lists.items()}
        return {"index": batch.index_B, **{name: list(map(as_json, x)) for name, x in columns.items()}, **by_user}

    @torch.inference_mode()
    def predict(
        self,
        users: Any,
        top: int = 10,
        include_seen: bool = False,
        rank: Any = None,
        rank_task: str | None = None,
        candidates: int = CANDIDATES,
        index: Any = None,
        batch_size: int = 1024,
    ) -> Any:
        """Return the best items of each user, retrieved from the whole catalog, and ordered by a ranking model if one
        is given.

        Users and items are encoded with the encoding that the checkpoint keeps: no training file is needed. A user that
        training lacked has the row 0 in its column, and is known by the other columns.

        Args:
            users: rows with the columns of the users' tower, and those that the ranking model needs and the items lack:
                a pandas DataFrame, a pyarrow Table, a dict of columns, or a path, or a pattern of paths, of CSV or
                Parquet files.
            top: maximum number of items per user.
            include_seen: recommend items of the user's training rows too, where the data had ``exclude_seen``.
            rank: a ``MultiTaskRecommender``, or the path of its run or checkpoint; it orders ``candidates`` retrieved
                items of each user. None: only the vectors order them.
            rank_task: the task whose prediction orders them; None: the first.
            candidates: number of items that are retrieved for the ranking model.
            index: the items' vectors, an ``ItemIndex`` or its file, such as ``report/items.safetensors`` of a test's
                run; None: they are rebuilt.
            batch_size: users per step.

        Returns:
            A row for each user and item, in the order of the users, the best item first: ``row``, the place of the user
            in ``users``; the columns of user, where one is named, and item; ``score``, the dot product of the two
            vectors; and the ranking model's predictions. They are a DataFrame for a DataFrame, a ``pyarrow.Table`` for
            a table, and a dict of numpy arrays for a dict and for files. Items are integers where all of them are.

        Raises:
            FileNotFoundError: no checkpoint exists for ``rank``, or no file of the index.
            ValueError: a column is missing, a value has the wrong type, a number is out of its range, the index belongs
                to another model, or the model has neither a checkpoint's encoding nor its data.

        Example::

            model = apps.load("runs/movielens_1m_retrieval")
            best = model.predict(users, top=10, rank="runs/movielens_1m")   # columns score and probability_like
        """
        with evaluating(self):
            return scoring.predict(self, users, top, include_seen, rank, rank_task, candidates, index, batch_size)

    # ---- the items' vectors

    def index(self) -> ItemIndex:
        """Return the vectors of all items of the catalog, which the data has, or the checkpoint keeps.

        They are made when they are first asked for, and again after the model has been put into another mode or other
        weights have been loaded.

        Raises:
            ValueError: there are neither data nor a checkpoint.
        """
        if self._index is None:
            state = encoding_of(self)
            catalog, encoding = Catalog.from_state(state["catalogue"]), Encoding.from_state(state)
            values = encoding.vocabularies[state["item_column"]].texts()
            with evaluating(self), torch.no_grad():
                batches = catalog.batches(self.item_features)
                vectors = [self.item_tower(batch.to(self.device)) for batch in batches]
            self._index = ItemIndex(values, torch.cat(vectors), fingerprint(self))
        return self._index

    def train(self, mode: bool = True) -> Self:
        self._index = None
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._index = None
        return super().load_state_dict(*args, **kwargs)

    def widened(self, checkpoint: Mapping[str, Any], encoding_state: Mapping[str, Any]) -> Mapping[str, Any]:
        return growing.widened(self, checkpoint, encoding_state)
