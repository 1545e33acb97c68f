"""The best next items of a script's own histories."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from apps.base.checks import check_at_least
from apps.data.loader import in_order
from apps.recsys.encoding.categories import MISSING, factorize
from apps.recsys.encoding.numbers import Part, plain, to_numbers, to_order
from apps.recsys.encoding.vocabulary import whole_numbers
from apps.recsys.sequence.data import Examples
from apps.recsys.sequence.histories import Items, whole_seconds
from apps.recsys.tables.rows.scoring import encoding_of, like, pieces

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

_COLUMNS = {"user": "user", "item": "item", "time": "time", "rating": None}
"""Names of the columns of events by default; a checkpoint may have others."""


def predict(model: Any, histories: Any, top: int, include_seen: bool, batch_size: int) -> Any:
    """See ``NextItemRecommender.predict``."""
    check_at_least(1, top=top, batch_size=batch_size)
    encoding = encoding_of(model)
    items = Items.from_state(encoding)
    histories = histories.to_list() if hasattr(histories, "to_list") else histories  # a pandas Series of lists
    if _are_lists(histories):
        texts, lengths = _flat(histories)
        id_N = np.array([items.ids.get(text, 0) for text in texts], np.int32)
        history_N = np.repeat(np.arange(len(lengths)), lengths)
        history_X, item_X, score_X = _best(model, id_N, history_N, len(lengths), top, include_seen, batch_size)
        whole = all(isinstance(v, (int, np.integer)) for history in histories for v in history)
        values = whole_numbers(items.values[1:]) if whole else items.values[1:]
        by_history: list[list[tuple[Any, float]]] = [[] for _ in lengths]
        for history, item, score in zip(history_X.tolist(), item_X.tolist(), score_X.tolist(), strict=True):
            by_history[history].append((values[item - 1], score))
        return by_history
    columns = {**_COLUMNS, **encoding.get("columns", {})}
    user, item = columns["user"], columns["item"]
    table = _events(histories, columns)
    code_N, id_N, first_U, second_N = _ordered(table, columns, encoding.get("min_rating"), items.ids)
    user_X, item_X, score_X = _best(model, id_N, code_N, len(first_U), top, include_seen, batch_size, second_N)
    result = {
        user: plain(table[user]).take(first_U[user_X]),
        item: _like_items(items.values[1:], table[item].type).take(item_X - 1),
    }
    if items.names != items.values:
        result["name"] = [items.names[i] for i in item_X.tolist()]
    return like(histories, {**result, "score": score_X})


def _best(
    model: Any,
    id_N: NDArray[np.int32],
    history_N: NDArray[np.int64],
    num: int,
    top: int,
    include_seen: bool,
    batch_size: int,
    second_N: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Return history, item id and score of each recommendation, by history and the best first.

    Args:
        model: the model that scores the items.
        id_N: items in the order of their histories, 0 for one that the model does not know.
        history_N: the history of each, ascending.
        num: number of histories.
        top, include_seen, batch_size: see ``NextItemRecommender.predict``.
        second_N: the times of the items in whole seconds; None: the items of a history were taken at one time.
    """
    known_N = id_N > 0
    length_U = np.bincount(history_N[known_N], minlength=num)
    if unknown := int((~known_N).sum()):
        empty = int((length_U == 0).sum())
        more = f"; histories of no others, which get no items: {empty:,}" if empty else ""
        log.warning("items left out, for the model does not know them: %s%s", f"{unknown:,}", more)
    user_X = torch.from_numpy(np.flatnonzero(length_U))
    ends_X = torch.from_numpy(np.cumsum(length_U))[user_X]
    first_X = ends_X - torch.from_numpy(length_U)[user_X]
    begin_X = torch.maximum(first_X, ends_X - model.max_length)
    times = None if second_N is None else torch.from_numpy(second_N[known_N])
    examples = Examples(torch.from_numpy(id_N[known_N]), user_X, begin_X, ends_X, first_X, "none", times)
    parts = [(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0))]
    for batch in in_order(examples, batch_size):
        seconds_BS = None if batch.seconds_BS is None else batch.seconds_BS.to(model.device)
        seen_BH = None if include_seen else batch.seen_BH.to(model.device)
        scores_BI = model(batch.items_BS.to(model.device), seconds_BS, seen_BH)
        best = scores_BI.topk(min(top, model.num_items), dim=-1)
        item_Bk, score_Bk = best.indices.cpu(), best.values.float().cpu()
        kept_Bk = score_Bk > -torch.inf
        parts.append((batch.user_B[:, None].expand_as(item_Bk)[kept_Bk], item_Bk[kept_Bk], score_Bk[kept_Bk]))
    history, item, score = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    return history, item, score


# ---- lists of items


def _are_lists(histories: Any) -> bool:
    return isinstance(histories, (Sequence, np.ndarray)) and not isinstance(histories, (str, bytes))


def _flat(histories: Sequence[Any]) -> tuple[list[str], NDArray[np.int64]]:
    """Return all items as text, and how many each history has."""
    import pyarrow as pa

    for place, history in enumerate(histories):
        if not _are_lists(history):
            raise ValueError(f"histories[{place}]={history!r} is not a list of items: give a list of histories")
    flat = [value for history in histories for value in history]
    try:
        array = pa.array(flat, from_pandas=True)
    except (pa.ArrowException, TypeError):  # of several types
        array = pa.array([None if value is None else str(value) for value in flat], pa.string())
    lengths = np.array([len(history) for history in histories], np.int64)
    if not flat:
        return [], lengths
    codes = factorize([("the histories", pa.chunked_array([array]))], "items")
    if (codes.codes == MISSING).any():
        at = int(np.argmax(codes.codes == MISSING))
        place = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
        raise ValueError(f"histories[{place}] has no value at place {at - int(lengths[:place].sum())}")
    texts = codes.values.to_pylist()
    return [texts[code] for code in codes.codes.tolist()], lengths


# ---- tables of events


def _events(rows: Any, columns: Mapping[str, str | None]) -> pa.Table:
    """Return the columns of the events as one table."""
    import pyarrow as pa

    roles = {column: role for role, column in columns.items() if column is not None}
    numbers = [] if columns["rating"] is None else [columns["rating"]]
    tables = list(pieces(rows, roles, numbers, 1 << 40))
    return tables[0] if tables else pa.table({column: pa.array([], pa.string()) for column in roles})


def _ordered(
    table: pa.Table, columns: Mapping[str, str | None], min_rating: float | None, ids: Mapping[str, int]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64] | None]:
    """Return user and item id of each event, ordered as ``histories.build`` does, each user's first row, and the time
    of each event in whole seconds, if there are times.

    Users are numbered in the order in which they first occur.
    """

    def parts(column: str) -> list[Part]:
        return [("the rows to predict", table[column])]

    coded = {}
    for role in ("user", "item"):
        column = columns[role]
        assert column is not None
        coded[column] = factorize(parts(column), column)
        if (coded[column].codes == MISSING).any():
            raise ValueError(f"column {column!r} has no value in row {int(np.argmax(coded[column].codes == -1))}")
    user, item = coded.values()
    _, first_U = np.unique(user.codes, return_index=True)
    id_V = np.array([ids.get(text, 0) for text in item.values.to_pylist()], np.int32)
    keep = np.ones(len(table), bool)
    if columns["rating"] is not None and min_rating is not None:
        keep = to_numbers(parts(columns["rating"]), columns["rating"]) >= min_rating  # false for NaN
    by: list[NDArray[Any]] = [user.codes]
    second_N = None
    if columns["time"] is not None:
        by.insert(0, to_order(parts(columns["time"]), columns["time"]))  # lexsort sorts by its last key first
        second_N = whole_seconds(by[0])
    order = np.lexsort(by)
    order = order[keep[order]]
    return user.codes[order], id_V[item.codes[order]], first_U, None if second_N is None else second_N[order]


def _like_items(values: Sequence[str], kind: pa.DataType) -> pa.Array:
    """Return items as integers where the given column has them and all are written as such, else as text."""
    import pyarrow as pa

    numbers = whole_numbers(values) if pa.types.is_integer(kind) else values
    for dtype in (kind, pa.int64()) if numbers != values else ():
        with contextlib.suppress(pa.ArrowInvalid, OverflowError):  # the type is too small for some item
            return pa.array(numbers, dtype)
    return pa.array(values, pa.string())
