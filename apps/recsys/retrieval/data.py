"""``RetrievalData``: a table of users and the items that they took, in pairs for two towers, with its catalog."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from apps.base.checks import check_at_least, check_name
from apps.data.loader import as_it_is
from apps.data.splits import SPLITS, Split
from apps.recsys.encoding.features import Features
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.retrieval.batch import PairBatch
from apps.recsys.retrieval.catalog import Catalog, Seen, last_rows
from apps.recsys.retrieval.columns import (
    arrays_of,
    column_of,
    divide,
    encoding_of_part,
    id_feature,
    names_of,
    raw_columns,
    take_columns,
)
from apps.recsys.retrieval.loss import log_probability
from apps.recsys.retrieval.scoring import CANDIDATES, check_candidates
from apps.recsys.tables.data import TableData
from apps.recsys.tables.rows.rows import TableRows

if TYPE_CHECKING:
    import pyarrow as pa

    from apps.recsys.tables.rows.streaming import FileRows

log = logging.getLogger(__name__)


class Pairs(Dataset[PairBatch]):
    """Rows of a table as pairs of a user and an item, read by whole batches.

    Args:
        rows: the rows.
        user: description of the users' columns.
        items: the catalog's rows, of which the items' columns come.
        item_column: column that tells one item from another.
        log_q_I: float32 (I,), log of the probability with which a training batch holds each item in a place.
        num_uniform: additional items of a batch, sampled from the whole catalog by torch's global generator.
        seen: the items that each user had; None: they may be retrieved again.
        user_column: column whose row of its table ``seen`` counts by.
    """

    def __init__(
        self,
        rows: TableRows,
        user: Features,
        items: TableRows,
        item_column: str,
        log_q_I: Tensor,
        num_uniform: int = 0,
        seen: Seen | None = None,
        user_column: str | None = None,
    ) -> None:
        self.rows, self.user, self.items, self.item_column = rows, user, items, item_column
        self.log_q_I, self.num_uniform = log_q_I, num_uniform
        self.seen, self.user_column = seen, user_column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> PairBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int] | Tensor) -> PairBatch:
        batch, features = self.rows.__getitems__(positions), self.rows.features
        seen_BH = None
        if self.seen is not None and self.user_column is not None:
            seen_BH = self.seen.by_user(column_of(batch, features, self.user_column))
        item_B = column_of(batch, features, self.item_column)
        drawn_N = torch.randint(1, len(self.items) + 1, (self.num_uniform,)) if self.num_uniform else item_B[:0]
        item_C = torch.cat((item_B, drawn_N))
        item_U, place_C = item_C.clamp_min(1).unique(return_inverse=True)
        return PairBatch(
            take_columns(batch, features, self.user),
            batch.index_B,
            item=self.items.__getitems__(item_U - 1),
            item_B=item_B,
            own_B=place_C[: len(item_B)],
            count_U=place_C[item_C > 0].bincount(minlength=len(item_U)),
            log_q_U=self.log_q_I[item_U - 1],
            seen_BH=seen_BH,
        )


class FileUsers(IterableDataset[PairBatch]):
    """The users of files, in batches: a retriever's form of ``FileRows``.

    Args:
        rows: the files' rows, encoded only by the users' columns.
        seen: the items that each user had; None: they may be retrieved again.
        user_column: column whose row of its table ``seen`` counts by.
    """

    def __init__(self, rows: FileRows, seen: Seen | None = None, user_column: str | None = None) -> None:
        self.rows, self.seen, self.user_column = rows, seen, user_column

    def __iter__(self) -> Iterator[PairBatch]:
        for batch in self.rows:
            seen_BH = None
            if self.seen is not None and self.user_column is not None:
                seen_BH = self.seen.by_user(column_of(batch, self.rows.encoding.features, self.user_column))
            yield PairBatch(batch, batch.index_B, seen_BH=seen_BH)


class RetrievalData(TableData):
    """A table whose rows are users with the items that they took, in batches of `PairBatch`.

    Rows with a positive label of ``positive`` are pairs. The catalog is all items of the training rows, each with its
    columns as its last training row has them. Pairs of validation and test whose item is not in the catalog stay,
    because a retrieval misses them; training pairs whose item was too rare for ``table.min_count``, are left out.

    Args:
        item_column: column that tells one item from another: categorical, with a row for each value.
        item_columns: columns that the items' tower reads; ``item_column`` may be among them.
        user_columns: columns that the users' tower reads; none: all others but ``item_column``.
        positive: binary task whose positive rows are the pairs; None: all rows are.
        user_column: column that tells one user from another, of the users' tower: categorical, with a row for each
            value. Predictions repeat it. None: users have no name.
        exclude_seen: whether validation, test and prediction leave out the items of all the user's training rows,
            whatever their label; users with fewer rows than ``table.min_count`` share row 0, and keep theirs. It needs
            ``user_column``.
        num_uniform: further negatives per training step and process, sampled from the whole catalog with all items
            equally likely; the pairs of the batch share them (mixed negative sampling).
        top_k: number of items that ``moesaic predict`` returns per user.
        rank: run or checkpoint of a ``MultiTaskRecommender``, whose prediction orders the items that
            ``moesaic predict`` retrieves; None: they are ordered by the vectors.
        rank_task: the task of that model; None: its first.
        candidates: number of items that are retrieved for it.
        index_file: file of the items' vectors that a test of the model wrote, for ``moesaic predict``; None: they are
            computed again.
        kwargs: further options, as for ``TableData``, but for ``negatives``. The rows of ``predict_file`` are users:
            they need only the users' columns.

    Raises:
        ValueError: as ``TableData``; a column of neither side, or of both; no such task, or one that is not binary; no
            pair in training; ``exclude_seen`` without a column of users; or fewer ``candidates`` than ``top_k``.
    """

    unit = "pairs"
    needs_labels = False

    def __init__(
        self,
        dataset: str = "movielens_1m",
        item_column: str = "item",
        item_columns: Sequence[str] = ("item",),
        user_columns: Sequence[str] = (),
        positive: str | None = None,
        user_column: str | None = None,
        exclude_seen: bool = False,
        num_uniform: int = 0,
        top_k: int = 10,
        rank: str | None = None,
        rank_task: str | None = None,
        candidates: int = CANDIDATES,
        index_file: str | None = None,
        eval_batch_size: int = 1024,
        **kwargs: Any,
    ) -> None:
        check_at_least(0, num_uniform=num_uniform)
        check_at_least(1, top_k=top_k)
        if rank is not None:
            check_candidates(top_k, candidates)
        super().__init__(dataset, eval_batch_size=eval_batch_size, **kwargs)
        if self.negatives is not None:
            raise ValueError(f"negatives={self.negatives} are of TableData: num_uniform gives a retriever further ones")
        if exclude_seen and user_column is None:
            raise ValueError("exclude_seen=True needs user_column, the column that tells one user from another")
        self.top_k, self.rank, self.rank_task, self.candidates = top_k, rank, rank_task, candidates
        self.index_file = index_file
        self.item_column, self.item_columns, self.user_columns = item_column, tuple(item_columns), tuple(user_columns)
        self.positive, self.user_column, self.exclude_seen = positive, user_column, exclude_seen
        self.num_uniform = num_uniform
        self._given_catalog: Catalog | None = None
        self._own_catalog: Catalog | None = None
        self._earlier_catalog: Catalog | None = None

    # ---- for models and readers of results

    @property
    def user_features(self) -> Features:
        """The columns that the users' tower reads."""
        return self._sides[0]

    @property
    def item_features(self) -> Features:
        """The columns that the items' tower reads."""
        return self._sides[1]

    @property
    def _sides(self) -> tuple[Features, Features]:
        user, item = divide(self.features, self.user_columns, self.item_columns, self.item_column)
        if self.item_column not in self.encoding.vocabularies:
            raise ValueError(f"item_column={self.item_column!r} is in table.num_rows, which keeps no values")
        if self.user_column is not None:
            id_feature(user, self.user_column, "user_column")
        return user, item

    @property
    def num_items(self) -> int:
        """The number of items of the catalog."""
        return id_feature(self.features, self.item_column).num_rows - 1

    @property
    def item_values(self) -> tuple[str, ...]:
        """The items as they are in the table, by number; entry 0 is ""."""
        return tuple(value or "" for value in self.vocabulary(self.item_column))

    @property
    def catalog(self) -> Catalog:
        """The items of the checkpoint, or else of the training rows."""
        if self._given_catalog is not None:
            return self._given_catalog
        if self._own_catalog is None:
            self._own_catalog = self._make_catalog()
        return self._own_catalog

    @property
    def _seen(self) -> Seen | None:
        """The items that are not candidates of a user in evaluation; None: all are.

        Raises:
            ValueError: the checkpoint does not keep them.
        """
        if self.exclude_seen and self.catalog.seen is None:
            raise ValueError(
                "exclude_seen=True: the checkpoint does not keep what users had, for it was trained without"
            )
        return self.catalog.seen if self.exclude_seen else None

    @property
    def encoding_state(self) -> dict[str, Any]:
        """The encoding of the columns and the catalog, as plain values and tensors, for a checkpoint."""
        sides = {"item_column": self.item_column, "user_column": self.user_column}
        return {**self.encoding.state(), **sides, "catalogue": self.catalog.state()}

    def adopt(self, encoding_state: Mapping[str, Any]) -> None:
        super().adopt(encoding_state)
        self._given_catalog = Catalog.from_state(encoding_state["catalogue"])

    def extend(self, encoding_state: Mapping[str, Any]) -> None:
        super().extend(encoding_state)
        self._earlier_catalog = Catalog.from_state(encoding_state["catalogue"])

    def forget(self) -> None:
        super().forget()
        self._own_catalog = None

    # ---- Lightning

    def check(self, stage: str | None) -> None:
        """Reject columns that do not go together, and files of users that lack one."""
        _ = self._sides
        if stage == "predict" and self.predict_file is not None:
            self._users_to_predict(self.predict_file).check()

    def examples(self, split: Split) -> Pairs:  # type: ignore[override]
        catalog, is_train = self.catalog, split == "train"
        return Pairs(
            TableRows(self.opened, self.features, self._pairs(split)),
            self.user_features,
            catalog.rows(self.item_features),
            self.item_column,
            log_probability(catalog.count_I, self.batch_size or 1, self.num_uniform),
            self.num_uniform if is_train else 0,
            None if is_train else self._seen,
            self.user_column,
        )

    def announce(self) -> None:
        super().announce()
        if not self.exclude_seen:
            return
        assert self.user_column is not None
        user_N = self._column(self.user_column).index_select(0, self.opened["train"])
        if shared := int((user_N == 0).sum()):
            log.warning(
                "exclude_seen: %s of %s training rows have row 0 of column %r (missing, or rarer than table.min_count)"
                ": their items stay candidates",
                f"{shared:,}",
                f"{len(user_N):,}",
                self.user_column,
            )

    def batching(self, examples: Any) -> dict[str, Any]:
        return {**super().batching(examples), "draws": self.num_uniform > 0}

    def sizes(self) -> dict[Split, int]:
        return {split: len(self._pairs(split)) for split in SPLITS}

    def describe(self) -> str:
        return f"{super().describe()}, {self.num_items:,} items"

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the users of ``predict_file``, else the test's."""
        if self.predict_file is None:
            return self.test_dataloader()
        model = None if self.trainer is None else self.trainer.lightning_module
        rows = self._users_to_predict(self.predict_file, getattr(model, "user_roles", {}))
        rows.check()
        users = FileUsers(rows, self._seen, self.user_column)
        return DataLoader(users, batch_size=None, collate_fn=as_it_is)

    def _users_to_predict(self, pattern: str, further: Mapping[str, str] = MappingProxyType({})) -> FileRows:
        """Return the users of the files of a pattern, which carry along their names and ``further`` columns."""
        named = {} if self.user_column is None else {self.user_column: "user_column"}
        return self._rows_to_predict(pattern, self.users_encoding, {**further, **named})

    def train_eval_dataloader(self) -> DataLoader[Any]:
        """Return the training pairs in the table's order."""
        return self.eval_loader(self.examples("train"))

    # ---- the table

    def users(self, batch: PairBatch, roles: Mapping[str, str]) -> pa.Table:
        """Return columns of a batch's users as they are in ``predict_file``, else in the table.

        Args:
            batch: users of ``predict_dataloader``.
            roles: role of each column, by column; of a file those that its batches carry along.

        Raises:
            ValueError: there is no ``predict_file``, and the users' tower does not read a column.
        """
        import pyarrow as pa

        if batch.user.kept is not None:
            return pa.table({column: batch.user.kept[column] for column in roles})
        known = raw_columns(batch.user, self.users_encoding)
        for column, role in roles.items():
            if column not in known.column_names:
                raise ValueError(f"column {column!r} ({role}) is not among user_columns: give it in a predict_file")
        return known

    @property
    def users_encoding(self) -> Encoding:
        """The encoding of the users' columns."""
        return encoding_of_part(self.encoding, names_of(self.user_features))

    def _pairs(self, split: Split) -> Tensor:
        """Return the rows of a split that are pairs, int64 (n,)."""
        index = self.rows(split).index
        features = self.features
        if self.positive is not None:
            check_name("positive", self.positive, list(features.tasks))
            place = features.tasks.index(self.positive)
            kind = features.target_of_task[place].kind
            if kind != "binary":
                raise ValueError(f"positive={self.positive!r} is a task of kind {kind!r}: it must be 'binary'")
            index = index[self.opened["label"][:, place].index_select(0, index) == 1]
        if split == "train":
            index = index[self._column(self.item_column).index_select(0, index) > 0]
        return index

    def _column(self, column: str) -> Tensor:
        """Return the row of each of the table's rows in the table of a column of one value, (N,)."""
        return self.opened["categorical"][:, self.features.single.index(id_feature(self.features, column))]

    def _make_catalog(self) -> Catalog:
        item_features = self.item_features  # it checks the options
        train = self.opened["train"]
        item_N = self._column(self.item_column)
        of_train = item_N.index_select(0, train).long()
        last_I = last_rows(of_train, self.num_items)  # -1: only the checkpoint has the item
        batch = TableRows(self.opened, self.features, train[last_I])[:]
        arrays = arrays_of(take_columns(batch, self.features, item_features), item_features)
        taken = item_N.index_select(0, self._pairs("train")).long()
        if not len(taken):
            raise ValueError(f"positive={self.positive!r} leaves no training row: there is no pair to learn from")
        count_I = torch.bincount(taken, minlength=self.num_items + 1)[1:]
        seen = None
        if self.exclude_seen:
            assert self.user_column is not None
            user_N = self._column(self.user_column).index_select(0, train).long()
            seen = Seen.of(user_N, of_train, id_feature(self.features, self.user_column).num_rows)
        own, earlier = Catalog(arrays, count_I, seen), self._earlier_catalog
        return own if earlier is None else own.after(earlier, last_I >= 0, item_features)
