"""Click histories for the next item: MovieLens, and any table of user, item and time.

A batch is read from one array of all items by the bounds of each user's history. The order of an epoch depends only on
(seed, epoch): `apps.data.loader.ResumableLoader` restores it in mid-epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from apps.base.checks import check_at_least, check_name
from apps.data.datasets import prepare
from apps.data.splits import Split
from apps.data.store import EncodedStore, identity
from apps.data.suite_data import SuiteData
from apps.recsys.datasets import RECSYS_DATASETS
from apps.recsys.readers import user_tables
from apps.recsys.sequence import histories
from apps.recsys.sequence.histories import Histories, Items

log = logging.getLogger(__name__)

DATASETS = (*(name for name in RECSYS_DATASETS if name.startswith("movielens")), "table")
_STORE = EncodedStore("histories", version=1)
MIN_LENGTH = 3
"""Interactions that a user needs: one to test, one to validate and one from which these are predicted."""


class HistoryBatch(NamedTuple):
    """Histories side by side, each with its oldest item first and padded after its last one.

    Attributes:
        items_BS: int64 (B, S), item ids from 1; 0 is padding. S is the longest history of the batch, or max_length.
        targets_BS: int64 (B, S), the item that came after each; 0: none. Training has one at each item, evaluation one
            only at the last item of each history, prediction none.
        index_B: int64 (B,), the example's place in its dataset.
        user_B: int64 (B,), the user's place in ``HistoryData.user_names``.
        seen_BH: int64 (B, H), all items of the user before the target, also those that ``items_BS`` is too short for,
            padded with 0; None in training. An item may be in it several times.
        seconds_BS: int64 (B, S), the time of each item of ``items_BS`` in whole seconds; None if the data have no
            times.
    """

    items_BS: Tensor
    targets_BS: Tensor
    index_B: Tensor
    user_B: Tensor
    seen_BH: Tensor | None = None
    seconds_BS: Tensor | None = None


class Examples(Dataset[Any]):
    """Parts of histories, read by whole batches: ``examples.__getitems__(positions)`` is a `HistoryBatch`.

    Args:
        item_N: all items, one user after the other.
        user_X, begin_X, end_X: each example's user and the bounds of its items in ``item_N``; the target of its last
            item is at ``end``.
        first_X: where the user's history starts, for ``seen_BH``; None in training.
        targets: "all", "last" or "none".
        second_N: int64, the time of each item of ``item_N``; None: no times.
    """

    def __init__(
        self,
        item_N: Tensor,
        user_X: Tensor,
        begin_X: Tensor,
        end_X: Tensor,
        first_X: Tensor | None,
        targets: Literal["all", "last", "none"],
        second_N: Tensor | None = None,
    ) -> None:
        self.item_N, self.user_X, self.begin_X, self.end_X = item_N, user_X, begin_X, end_X
        self.first_X, self.targets, self.second_N = first_X, targets, second_N

    def __len__(self) -> int:
        return len(self.user_X)

    def __getitem__(self, position: int) -> HistoryBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int] | Tensor) -> HistoryBatch:
        index_B = torch.as_tensor(positions, dtype=torch.int64)
        begin_B, end_B = self.begin_X[index_B], self.end_X[index_B]
        items_BS = self._cut(self.item_N, begin_B, end_B)
        if self.targets == "all":
            targets_BS = self._cut(self.item_N, begin_B + 1, end_B + 1)
        else:
            targets_BS = torch.zeros_like(items_BS)
        if self.targets == "last":
            targets_BS[torch.arange(len(index_B)), end_B - begin_B - 1] = self.item_N[end_B].long()
        seen_BH = None if self.first_X is None else self._cut(self.item_N, self.first_X[index_B], end_B)
        seconds_BS = None if self.second_N is None else self._cut(self.second_N, begin_B, end_B)
        return HistoryBatch(items_BS, targets_BS, index_B, self.user_X[index_B], seen_BH, seconds_BS)

    @staticmethod
    def _cut(value_N: Tensor, begin_B: Tensor, end_B: Tensor) -> Tensor:
        """Return int64 (B, longest), ``value_N[begin:end]`` of each example and zeros after it."""
        length_B = end_B - begin_B
        place_S = torch.arange(int(length_B.max()))
        inside_BS = place_S < length_B[:, None]
        # places past the end of the array are read at its end, and masked
        at_BS = (begin_B[:, None] + place_S).clamp_(max=len(value_N) - 1)
        return value_N[at_BS].long() * inside_BS


class HistoryData(SuiteData):
    """Users' histories of items, ordered by time, each split by leave-last-out.

    The last item of each user with three interactions or more is for the test, the one before for validation, and the
    others for training; the history that predicts the test item holds the validation item. Users with fewer are only
    for training, and with one interaction have nothing to predict; prediction covers all users. Interactions of one
    user and time keep the order of the file: more than half of MovieLens-1M's have the time of the one before.

    Args:
        dataset: "movielens_1m", "movielens_100k", or "table" for your own file (``file``).
        root: folder with the dataset's own files; None: the cache, or a source of it.
        cache_dir: where downloads are kept; default ``~/.cache/moesaic``.
        file: CSV, TSV or Parquet with one interaction per row, for "table", or a pattern of several. Users and items
            are read as text: "007" and "7" are different.
        user_column, item_column: columns of ``file``.
        time_column: column by which a user's interactions are ordered; None: they are in order.
        rating_column: column of the rating, for min_rating.
        name_column: column of the item's name, which predictions have next to the item; None: there is none.
        min_rating: lowest rating of an interaction that counts; None: every interaction counts, whatever its rating.
        min_item_count: items with fewer interactions are left out. 5 gives MovieLens-1M the 3,416 items that many
            papers have (SASRec, BERT4Rec) instead of 3,706.
        max_length: items of the longest history; a longer one is cut to its last items.
        train_windows: "last": the last max_length + 1 items of a longer training history train, as SASRec does; "all":
            it is cut from its end into segments, so that each of its items but the first is a target once per epoch.
        batch_size: histories per training batch and process.
        eval_batch_size: histories per batch and process in validation, testing and prediction.
        kwargs: ``drop_last``, ``num_workers`` and ``seed`` of ``SuiteData``. ``num_workers`` of 0 is enough.

    Raises:
        ValueError: the dataset is unknown, a value is out of its range, an option of "table" is given for another
            dataset, files are missing or not of their layout, or no user has a test item.

    Example::

        HistoryData("movielens_1m", max_length=200)
    """

    unit = "users"
    hold_out = "leave-last-out gives it some"

    def __init__(
        self,
        dataset: str = "movielens_1m",
        root: str | None = None,
        cache_dir: str | None = None,
        file: str | None = None,
        user_column: str = "user",
        item_column: str = "item",
        time_column: str | None = "time",
        rating_column: str | None = None,
        name_column: str | None = None,
        min_rating: float | None = None,
        min_item_count: int = 1,
        max_length: int = 200,
        train_windows: Literal["last", "all"] = "last",
        batch_size: int = 128,
        eval_batch_size: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, root, cache_dir, batch_size=batch_size, eval_batch_size=eval_batch_size, **kwargs)
        self.file, self.name_column = file, name_column
        self.user_column, self.item_column, self.time_column = user_column, item_column, time_column
        self.rating_column = rating_column
        self.min_rating, self.min_item_count = min_rating, min_item_count
        self.max_length, self.train_windows = max_length, train_windows
        self._check_options()

    # ---- contents of the data

    @property
    def histories(self) -> Histories:
        """All interactions; they are read at the first use."""
        return self.opened

    @property
    def num_items(self) -> int:
        """The number of items, which are numbered from 1; 0 is padding."""
        return len(self.encoding.values) - 1

    @property
    def encoding(self) -> Items:
        """The items by id: the checkpoint's, else the data's."""
        return self._adopted or self.histories.items

    @property
    def encoding_state(self) -> dict[str, Any]:
        """The items' values and names by id, as tensors, and the names of the file's columns, for a checkpoint."""
        columns = {
            "user": self.user_column,
            "item": self.item_column,
            "time": self.time_column,
            "rating": self._rating_column,
        }
        return {**self.encoding.state(), "columns": columns, "min_rating": self.min_rating}

    def extend(self, encoding_state: Mapping[str, Any]) -> None:
        """Keep a checkpoint's items and their ids, and give the next ids to further items of these data."""
        self._extend(encoding_state)

    @classmethod
    def encoding_of(cls, state: Mapping[str, Any]) -> Items:
        return Items.from_state(state)

    @property
    def item_values(self) -> tuple[str, ...]:
        """The items as they are in the file, by id; entry 0 is ""."""
        return self.encoding.values

    @property
    def item_names(self) -> tuple[str, ...]:
        """The items' names by id, entry 0 is ""; the values where the data has no other names."""
        return self.encoding.names

    @property
    def item_genres(self) -> tuple[tuple[str, ...], ...]:
        """The items' genres by id, entry 0 is (); empty for "table"."""
        return self.histories.item_genres

    @property
    def user_names(self) -> tuple[str, ...]:
        """The users as the data calls them, in the order that ``user_B`` of a batch counts."""
        return self.histories.user_names

    @property
    def in_training(self) -> NDArray[np.bool_]:
        """Which interactions train, bool (N,): all but those that validate and test."""
        data = self.histories
        trains_N, ends = np.ones(len(data.item_N), bool), data.offsets[1:][data.length_U >= MIN_LENGTH]
        trains_N[ends - 1] = trains_N[ends - 2] = False
        return trains_N

    @property
    def training_counts(self) -> NDArray[np.int64]:
        """How often each item trains, by id, int64 (num_items + 1,)."""
        return np.bincount(self.histories.item_N[self.in_training], minlength=self.num_items + 1)

    # ---- Lightning

    def check(self, stage: str | None) -> None:
        """Reject histories that are all too short to be split."""
        if stage != "predict" and not (self.histories.length_U >= MIN_LENGTH).any():
            raise ValueError(f"no user has the {MIN_LENGTH} interactions that a split by leave-last-out needs")

    def describe(self) -> str:
        return f"{super().describe()}, {self.num_items:,} items"

    def examples(self, split: Split) -> Examples:
        self.check(split)
        return self._train_examples() if split == "train" else self._eval_examples(2 if split == "val" else 1)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the batches of every user's whole history, also of users without items."""
        return self.eval_loader(self._eval_examples(0))

    # ---- examples

    def _train_examples(self) -> Examples:
        data = self.histories
        length_U = torch.from_numpy(data.length_U)
        begin_U = torch.from_numpy(data.offsets[:-1])
        # the last training item is a target and not an input
        end_U = begin_U + torch.where(length_U >= MIN_LENGTH, length_U - 2, length_U) - 1
        user_X = torch.nonzero(end_U > begin_U).squeeze(1)
        if self.train_windows == "all":
            pieces_U = -(-(end_U - begin_U)[user_X] // self.max_length)
            user_X = user_X.repeat_interleave(pieces_U)
            # 0, 1, ... counts the segments of a user from the end of the history
            nth_X = torch.arange(len(user_X)) - (pieces_U.cumsum(0) - pieces_U).repeat_interleave(pieces_U)
            end_X = end_U[user_X] - nth_X * self.max_length
        else:
            end_X = end_U[user_X]
        begin_X = torch.maximum(begin_U[user_X], end_X - self.max_length)
        return self._examples(user_X, begin_X, end_X, None, "all")

    def _eval_examples(self, held_out: int) -> Examples:
        """Return all users' histories without their last ``held_out`` items, the first of which is the target."""
        data = self.histories
        length_U = torch.from_numpy(data.length_U)
        begin_U = torch.from_numpy(data.offsets[:-1])
        user_X = torch.nonzero(length_U >= (MIN_LENGTH if held_out else 0)).squeeze(1)
        first_X = begin_U[user_X]
        end_X = first_X + length_U[user_X] - held_out
        begin_X = torch.maximum(first_X, end_X - self.max_length)
        return self._examples(user_X, begin_X, end_X, first_X, "last" if held_out else "none")

    def _examples(
        self,
        user_X: Tensor,
        begin_X: Tensor,
        end_X: Tensor,
        first_X: Tensor | None,
        targets: Literal["all", "last", "none"],
    ) -> Examples:
        item_N, second_N = self.histories.item_N, self.histories.second_N
        times = None if second_N is None else torch.from_numpy(second_N)
        return Examples(torch.from_numpy(item_N), user_X, begin_X, end_X, first_X, targets, times)

    # ---- reading

    @property
    def _rating_column(self) -> str | None:
        return self.rating_column if self.min_rating is not None else None

    def read(self) -> Histories:
        known, options = self._adopted or self._extended, (self.min_rating, self.min_item_count)
        extends = known is not None and self._adopted is None
        columns = (self.user_column, self.item_column, self.time_column, self._rating_column, self.name_column)
        if self.dataset == "table":
            assert self.file is not None
            files = user_tables.find_files(None, self.file, "file")
        else:
            root = prepare(self.dataset, self.root, self.cache_dir)
            files = RECSYS_DATASETS[self.dataset].files(root)

        def made() -> Histories:
            if self.dataset == "table":
                return histories.from_table(files, *columns, *options, known, extends)
            from apps.recsys.readers import movielens  # imports pyarrow

            ratings = {"movielens_1m": movielens.read_ratings_1m, "movielens_100k": movielens.read_ratings_100k}
            return histories.from_ratings(ratings[self.dataset](root), *options, known, extends)

        arrays = _STORE.open(
            self.cache,
            self.dataset,
            [identity(files), columns, options],
            lambda writer: histories.write(made(), writer),
            given=self.digest_of_given,
            digest_of=lambda files: histories.read(files).items.digest,
        )
        opened = histories.read(arrays)
        if opened.num_unknown and rank_zero_only.rank == 0:
            _warn_of_unknown(opened)
        return opened

    def _check_options(self) -> None:
        check_name("dataset", self.dataset, sorted(DATASETS))
        check_at_least(1, max_length=self.max_length, min_item_count=self.min_item_count)
        check_name("train_windows", self.train_windows, ["last", "all"])
        if self.dataset == "table":
            if self.file is None:
                raise ValueError("dataset='table' needs file, a CSV, TSV or Parquet file of interactions")
            if self.root is not None:
                raise ValueError(f"root={self.root!r} is for a standard dataset: name your table with file")
            if self.min_rating is not None and self.rating_column is None:
                raise ValueError(f"min_rating={self.min_rating} needs rating_column")
        elif self.file is not None:
            raise ValueError(f"file={self.file!r} is for dataset='table', not {self.dataset!r}")


def _warn_of_unknown(data: Histories) -> None:
    text = f"interactions left out, for they are of items that the model does not know: {data.num_unknown:,}"
    empty = (data.length_U == 0).nonzero()[0]
    if len(empty):
        first = data.user_names[empty[0]]
        text += f"; users who have no others, and for whom all items score 0: {len(empty):,}, first {first!r}"
    log.warning("%s", text)
