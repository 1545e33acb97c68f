"""The items that are retrieved for users, in the order of the vectors or of a ranking model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from apps.base.checks import check_at_least, check_name
from apps.recsys.encoding.numbers import plain
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.retrieval.catalog import Catalog
from apps.recsys.retrieval.columns import column_of, encoding_of_part, names_of, numbers_of, raw_columns
from apps.recsys.retrieval.index import ItemIndex
from apps.recsys.tables.rows.scoring import encoded, encoding_of, framed, like, pieces
from apps.train.checkpoint.contents import fingerprint

if TYPE_CHECKING:
    import pyarrow as pa

CANDIDATES = 100
"""Items that are retrieved for a ranking model to order."""
_BATCHES = 8
"""Batches of users that are encoded at a time."""


@dataclass(frozen=True)
class Retrieved:
    """The items of some users: N of them, by user and then the best first.

    Attributes:
        user_N: int64 (N,), the place of each item's user.
        item_N: int64 (N,), the items' numbers, from 1.
        score_N: float32 (N,), dot products of the vectors.
        ranked: the ranking model's predictions by column, (N,) each; empty without one.
    """

    user_N: NDArray[np.int64]
    item_N: NDArray[np.int64]
    score_N: NDArray[np.float32]
    ranked: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, index: ItemIndex, vectors_BD: Tensor, k: int, seen_BH: Tensor | None) -> Retrieved:
        """Return the k best items of each user by the vectors; users with fewer candidates have fewer."""
        item_Bk, score_Bk = (x.cpu() for x in index.search(vectors_BD, k, seen_BH))
        has_Bk = item_Bk > 0
        user_N = has_Bk.nonzero(as_tuple=True)[0]
        return cls(user_N.numpy(), item_Bk[has_Bk].numpy(), score_Bk[has_Bk].numpy())

    def by_user(self, values_N: Sequence[Any], num_users: int) -> list[list[Any]]:
        """Return values of the items as a list for each user."""
        ends = np.bincount(self.user_N, minlength=num_users).cumsum().tolist()
        return [list(values_N[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]


class Ranking:
    """A model that orders retrieved items by the columns of user and item, as they are in tables.

    Args:
        model: a ``MultiTaskRecommender`` that has the encoding of its checkpoint.
        items: a row for each item of the catalog, with its columns.
        task: the task whose prediction orders the items; None: the first.

    Raises:
        ValueError: the model has another kind, or has no such task, or one of classes.
    """

    def __init__(self, model: Any, items: pa.Table, task: str | None = None) -> None:
        from apps.recsys.tables.module import MultiTaskRecommender

        if not isinstance(model, MultiTaskRecommender):
            raise ValueError(f"rank is a {type(model).__name__}: a MultiTaskRecommender ranks pairs of user and item")
        tasks = model.features.tasks
        if task is not None:
            check_name("rank_task", task, list(tasks))
        task = tasks[0] if task is None else task
        kind = model.features.target_of_task[tasks.index(task)].kind
        if kind == "multiclass":
            raise ValueError(f"rank_task={task!r} is of kind 'multiclass', whose classes have no order")
        self.model, self.items = model, items
        self.key = f"probability_{task}" if kind == "binary" else f"value_{task}"

    @classmethod
    def load(cls, retriever: Any, rank: Any, task: str | None = None) -> Ranking:
        """Return the ranking of a retriever's items by a model.

        Args:
            retriever: the model whose catalog is ranked.
            rank: a ``MultiTaskRecommender`` with its checkpoint's encoding, or the path of its run or checkpoint.
            task: as for the constructor.

        Raises:
            FileNotFoundError: the checkpoint does not exist.
            ValueError: as the constructor, or an item's column is hashed.
        """
        from apps.train.checkpoint.loading import load

        model = load(rank, retriever.device) if isinstance(rank, (str, Path)) else rank
        state = encoding_of(retriever)
        encoding, column = Encoding.from_state(state), state["item_column"]
        part = encoding_of_part(encoding, names_of(retriever.item_features))
        items = raw_columns(Catalog.from_state(state["catalogue"]).rows(part.features)[:], part)
        if column not in items.column_names:
            items = items.append_column(column, [list(encoding.vocabularies[column].texts())])
        return cls(model, items, task)

    @property
    def user_roles(self) -> dict[str, str]:
        """The role of each column that the model needs and the items lack, by column."""
        roles = Encoding.from_state(encoding_of(self.model)).roles
        return {column: role for column, role in roles.items() if column not in self.items.column_names}

    def order(self, users: pa.Table, retrieved: Retrieved, top: int) -> Retrieved:
        """Return the ``top`` items of each user by the model's prediction.

        Args:
            users: a row for each user, with the columns of ``user_roles``.
            retrieved: the items that are ordered.
            top: number of items.
        """
        import pyarrow as pa

        user_N, item_N = pa.array(retrieved.user_N), pa.array(retrieved.item_N - 1)
        columns = {name: plain(users[name]).take(user_N) for name in self.user_roles}
        columns |= {name: self.items[name].take(item_N) for name in self.items.column_names}
        predicted = self.model.predict(pa.table(columns))
        # A stable order: items of one prediction stay in the order in which they were retrieved.
        order_N = np.lexsort((-predicted[self.key].to_numpy(), retrieved.user_N))
        begin_U = np.searchsorted(retrieved.user_N, retrieved.user_N)
        order_N = order_N[np.arange(len(order_N)) - begin_U < top]
        ranked = {name: predicted[name].to_numpy()[order_N] for name in predicted.column_names}
        return Retrieved(retrieved.user_N[order_N], retrieved.item_N[order_N], retrieved.score_N[order_N], ranked)


def open_index(model: Any, index: Any) -> ItemIndex:
    """Return an index of a model's items, given itself or as its file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it holds no index, or one that another model has made.
    """
    opened = ItemIndex.load(index) if isinstance(index, (str, Path)) else index
    if opened.made_by != fingerprint(model):
        raise ValueError(
            f"index={index if isinstance(index, (str, Path)) else 'given'} was made by another model, or by other "
            "weights of this one: the vectors of users and items do not fit each other"
        )
    return opened


def retrieve(
    index: ItemIndex,
    vectors_BD: Tensor,
    seen_BH: Tensor | None,
    top: int,
    ranking: Ranking | None,
    candidates: int,
    users: pa.Table | None,
) -> Retrieved:
    """Return the ``top`` best items of each user by the vectors, or by a ranking of the ``candidates`` best.

    Args:
        index: the items' vectors.
        vectors_BD: vectors of the users.
        seen_BH: numbers of the items that are not candidates, padded with 0; None: all are.
        top: number of items.
        ranking: orders the candidates; None: there is none.
        candidates: number of items that it orders.
        users: a row for each user, with the columns of ``ranking.user_roles``; None without a ranking.
    """
    retrieved = Retrieved.of(index, vectors_BD, top if ranking is None else candidates, seen_BH)
    return retrieved if ranking is None else ranking.order(users, retrieved, top)


def as_json(value: Any) -> Any:
    """Return a value of a table as one that JSON has: others than numbers, text and booleans become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def check_candidates(top: int, candidates: int) -> None:
    """Reject fewer candidates for a ranking than are to be named.

    Raises:
        ValueError: naming both.
    """
    if candidates < top:
        raise ValueError(f"candidates={candidates} are fewer than the {top} items that are asked for")


def predict(
    model: Any,
    users: Any,
    top: int,
    include_seen: bool,
    rank: Any,
    rank_task: str | None,
    candidates: int,
    index: Any,
    batch_size: int,
) -> Any:
    """See ``TwoTowerRetriever.predict``."""
    check_at_least(1, top=top, batch_size=batch_size)
    state = encoding_of(model)
    encoding = encoding_of_part(Encoding.from_state(state), names_of(model.user_features))
    ranking = None
    if rank is not None:
        check_candidates(top, candidates)
        ranking = Ranking.load(model, rank, rank_task)
    index = model.index() if index is None else open_index(model, index)
    roles = encoding.roles | ({} if ranking is None else ranking.user_roles)
    seen = None if include_seen else Catalog.from_state(state["catalogue"]).seen
    names, parts = [], []
    users = framed(users, roles)
    tables = pieces(users, roles, numbers_of(roles), _BATCHES * batch_size)
    for own, batch in encoded(tables, encoding, batch_size):
        seen_BH = None
        if seen is not None:
            seen_BH = seen.by_user(column_of(batch, encoding.features, state["user_column"])).to(model.device)
        vectors_BD = model.user_tower(batch.to(model.device))
        retrieved = retrieve(index, vectors_BD, seen_BH, top, ranking, candidates, own)
        parts.append(replace(retrieved, user_N=batch.index_B.numpy()[retrieved.user_N]))
        if state["user_column"] is not None:
            names.append(plain(own[state["user_column"]]))
    return like(users, _columns(index, state, parts, names))


def _columns(
    index: ItemIndex, state: Mapping[str, Any], parts: Sequence[Retrieved], names: Sequence[pa.ChunkedArray]
) -> dict[str, Any]:
    """Return the columns of a prediction, given the users' names piece by piece, if they have any."""
    import pyarrow as pa

    user_N = np.concatenate([np.empty(0, np.int64), *(part.user_N for part in parts)])
    item_N = np.concatenate([np.empty(0, np.int64), *(part.item_N for part in parts)])
    columns: dict[str, Any] = {"row": user_N}
    if state["user_column"] is not None:
        chunks = [chunk for name in names for chunk in name.chunks]
        name_U = pa.chunked_array(chunks) if chunks else pa.array([], pa.string())
        columns[state["user_column"]] = name_U.take(pa.array(user_N))
    columns[state["item_column"]] = index.named(item_N)
    columns["score"] = np.concatenate([np.empty(0, np.float32), *(part.score_N for part in parts)])
    ranked = parts[0].ranked if parts else {}
    return columns | {name: np.concatenate([part.ranked[name] for part in parts]) for name in ranked}
