"""Items sampled as negatives for a table of positives only.

Each row k of the table is a positive: besides its other columns it has the item i_k. An epoch has each row, and n times
more with an item j that is sampled with probability q_j / (1 - Q_k). q is uniform, or the items' shares of the training
rows; Q_k is the probability of the items that are excluded for the row: its own or, with ``exclude_seen``, all of its
user. A sampled row counts 1 - Q_k times, so item j is paired with each row that does not exclude it n q_j times on
average. The odds of a positive are then 1 / (n q_j) times the odds in the full table, in which every such item is
paired with the row once. So the loss is computed on the logit minus log(n q_j), as in noise-contrastive estimation
(arXiv 1206.6426, where n q is k P_n) and in the logQ correction of a softmax (Yi et al., RecSys 2019), and the logit
itself gives the odds in the full table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from apps.base.checks import check_name
from apps.data.array_files import ArrayFiles
from apps.data.splits import SPLITS, Split
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.schema import NegativesConfig, timestamp_columns
from apps.recsys.tables.encode.item_columns import ItemColumns
from apps.recsys.tables.negatives.draws import ItemDraws
from apps.recsys.tables.rows.batch import TableBatch
from apps.recsys.tables.rows.rows import TableRows


class Items:
    """The items of the training rows, each with its columns as these rows have them.

    Args:
        columns: arrays of the table.
        encoding: its encoding.
        config: the rule, of kind "items".

    Attributes:
        moved: names of all columns that a sampled item brings.
        count_I: int64 (I,), training rows of each item, by its row in the column's table; 0 for row 0, which is for
            missing and rare values.
        row_I: int64 (I,), the first row of the table that has the item in training.
        num_without: training rows without an item, which do not train.

    Raises:
        ValueError: fewer than two items, a column of ``item_features`` that is not there or has two values for an item,
            or ``exclude_seen`` without a column of users.
    """

    def __init__(self, columns: ArrayFiles, encoding: Encoding, config: NegativesConfig) -> None:
        assert config.column is not None
        self.columns, self.encoding, self.config, self.column = columns, encoding, config, config.column
        self.by_name = ItemColumns(columns, encoding)
        self.moved = (self.column, *self._moving())
        if config.exclude_seen and "group" not in columns:
            raise ValueError("negatives.exclude_seen=True needs table.user, the column that tells users apart")
        train = columns["train"]
        item_N = self.of_rows(train)
        num_rows = len(encoding.vocabularies[self.column]) + 1
        self.count_I = item_N.bincount(minlength=num_rows)
        self.num_without = int(self.count_I[0])
        self.count_I[0] = 0
        if len(self) < 2:
            raise ValueError(
                f"negatives.column={self.column!r} has {len(self)} of the values that the model knows in the training "
                "rows: there must be two, so that another one can be sampled"
            )
        self.row_I = train.new_zeros(num_rows).scatter_reduce(0, item_N, train, "amin", include_self=False)
        self._train = train[item_N > 0]
        for name in self.moved:
            self._check_one_value(name)

    def __len__(self) -> int:
        """Return the number of items that can be sampled."""
        return int((self.count_I > 0).sum())

    def of_rows(self, index_N: Tensor) -> Tensor:
        """Return the items of rows of the table, int64 (N,); 0 for none."""
        return self.by_name.read(self.column, index_N)[:, 0].long()

    def table_rows(self, rows: TableRows, index: Tensor) -> TableRows:
        """Return rows of the table that can take an item's columns from other rows."""
        return TableRows(rows.columns, rows.features, index, self.moved, self.encoding.domain in self.moved)

    def draws(self, weight_I: Tensor, split: Split) -> ItemDraws:
        """Return the draws by some weights for the rows of a split, which have the keys of ``keys``."""
        if not self.config.exclude_seen:
            own_I = torch.arange(len(weight_I))
            return ItemDraws(weight_I, own_I, own_I, len(weight_I))
        splits = dict.fromkeys(("train", split))
        index_N, user_N = torch.cat([self.columns[name] for name in splits]), self.columns["group"]
        return ItemDraws(weight_I, user_N[index_N], self.of_rows(index_N), int(user_N.max()) + 1)

    def keys(self, draws: ItemDraws, index_N: Tensor) -> Tensor:
        """Return the keys of rows of the table, int64 (N,): their users where what these had is excluded, else their
        items.

        Raises:
            ValueError: the user of a row has all items.
        """
        if not self.config.exclude_seen:
            return self.of_rows(index_N)
        key_N = self.columns["group"].index_select(0, index_N)
        none_N = draws.left_K[key_N] == 0
        if none_N.any():
            raise ValueError(
                f"negatives.exclude_seen=True: the user of row {int(index_N[none_N][0])} has all {len(self)} items of "
                f"column {self.column!r}, and none is left to draw"
            )
        return key_N

    def kept_by_positives(self) -> list[str]:
        """Return the columns that have one value for each item, and are not in ``item_features``.

        A sampled row keeps the positive's value there, which gives away that its item is another one. Items of one row
        are not evidence, and the others must have half of the rows.
        """
        item_N = self.of_rows(self._train)
        again_N = self.count_I[item_N] > 1
        index_N, first_N = self._train[again_N], self.row_I[item_N[again_N]]
        if 2 * len(index_N) < len(self._train):
            return []
        first_I = self.row_I[self.count_I > 0]
        others = [name for name in self.by_name.names if name not in self.moved]
        is_fixed = [bool(self.by_name.same(name, index_N, first_N).all()) for name in others]
        varies = [not bool(self.by_name.same(name, first_I, first_I[:1].expand(len(first_I))).all()) for name in others]
        return [name for name, fixed, various in zip(others, is_fixed, varies, strict=True) if fixed and various]

    def _moving(self) -> list[str]:
        """Return the columns of ``item_features``, with those that timestamps become in their place."""
        valid, sequences = self.by_name.names, [f.name for f in self.encoding.features.sequences]
        names: list[str] = []
        for name in self.config.item_features:
            if name in sequences:
                raise ValueError(f"negatives.item_features names {name!r}, a sequence: it is the row's, not the item's")
            if name in self.encoding.timestamps:
                names += [part for part in timestamp_columns(name) if part in valid]
            else:
                check_name("negatives.item_features", name, valid)
                names.append(name)
        return names

    def _check_one_value(self, name: str) -> None:
        same_N = self.by_name.same(name, self._train, self.row_I[self.of_rows(self._train)])
        if same_N.all():
            return
        other = int(self._train[~same_N][0])
        first = int(self.row_I[self.of_rows(torch.tensor([other]))])
        own, value = (self.by_name.text(name, row) for row in (first, other))
        raise ValueError(
            f"negatives.item_features names {name!r}, which must have one value for each item, but the item "
            f"{self.by_name.text(self.column, first)} has {own} in row {first} and {value} in row {other}"
        )


class RowsWithItems(Dataset[TableBatch]):
    """Rows of a training split for training, together with sampled items.

    Of N rows, position k + i N is row k with item i; i = 0 means its own item.

    Args:
        rows: the rows, all positive.
        items: the items.
    """

    def __init__(self, rows: TableRows, items: Items) -> None:
        self.items, config = items, items.config
        self.rows = items.table_rows(rows, rows.index[items.of_rows(rows.index) > 0])
        self.per_positive = round(config.per_positive)
        weight_I = (items.count_I > 0).long() if config.distribution == "uniform" else items.count_I
        self.draws = items.draws(weight_I, "train")
        self._key_N = items.keys(self.draws, self.rows.index)
        share_I = weight_I / self.draws.total
        self._offset_I = -(self.per_positive * share_I).log().float()
        self._weight_N = (self.draws.left_K[self._key_N] / self.draws.total).float()

    def __len__(self) -> int:
        return len(self.rows) * len(self.items.count_I)

    @property
    def num_in_epoch(self) -> int:
        """The number of rows of an epoch."""
        return len(self.rows) * (1 + self.per_positive)

    def epoch(self, generator: torch.Generator) -> Tensor:
        """Return the positions of an epoch's rows, int64, not yet in a random order."""
        N = len(self.rows)
        uniform_Nn = torch.rand(N, self.per_positive, dtype=torch.float64, generator=generator)
        own_N = torch.arange(N)
        drawn_Nn = own_N[:, None] + N * self.draws.items(uniform_Nn, self._key_N)
        return torch.cat((own_N, drawn_Nn.flatten()))

    def __getitems__(self, positions: Sequence[int] | Tensor) -> TableBatch:
        position_B = torch.as_tensor(positions, dtype=torch.int64)
        place_B, item_B = position_B % len(self.rows), position_B // len(self.rows)
        batch = with_items(self.rows, self.items, place_B, item_B)
        if not self.items.config.correct:
            return batch
        item_B = torch.where(item_B > 0, item_B, self.items.of_rows(batch.index_B))
        weight_Bt = torch.where(position_B < len(self.rows), 1.0, self._weight_N[place_B])[:, None]
        weight_Bt = weight_Bt.expand_as(batch.label_Bt) if batch.weight_Bt is None else weight_Bt * batch.weight_Bt
        return replace(batch, weight_Bt=weight_Bt, offset_Bt=self._offset_I[item_B, None].expand_as(batch.label_Bt))

    def __str__(self) -> str:
        config, without = self.items.config, self.items.num_without
        words = (
            f"negatives of each positive row: {self.per_positive} of {len(self.items):,} items of column "
            f"{config.column}, sampled again in each epoch ({config.distribution}), labeled 0"
        )
        return f"{words}; {without:,} training rows without a known item are left out" if without else words


class FixedDraws(Dataset[TableBatch]):
    """Rows of a split in their order, each followed by itself with items that are sampled once, all equally likely.

    The sample depends only on the split and its seed: every model is evaluated by the same rows. Batches have the
    offsets at which a logit of the full table gives the odds among these rows.

    Args:
        rows: the rows, all positive.
        items: the items.
        split: the split whose rows they are.
        seed: seed of the split.
    """

    def __init__(self, rows: TableRows, items: Items, split: Split, seed: int) -> None:
        self.items, self.rows = items, items.table_rows(rows, rows.index)
        draws = items.draws((items.count_I > 0).long(), split)
        key_N = items.keys(draws, rows.index)
        self.num_drawn = items.config.eval_per_positive
        # numpy keeps this stream, as it does for the splits
        uniform_Nn = np.random.RandomState([seed, SPLITS.index(split)]).random_sample((len(rows), self.num_drawn))
        drawn_Nn = draws.items(torch.from_numpy(uniform_Nn), key_N)
        own_N1 = torch.zeros(len(rows), 1, dtype=torch.int64)
        self._item_P = torch.cat((own_N1, drawn_Nn), dim=1).flatten()
        self._offset_N = -(self.num_drawn / draws.left_K[key_N]).log().float()

    def __len__(self) -> int:
        return len(self._item_P)

    def __getitem__(self, position: int | slice) -> TableBatch:
        positions = torch.arange(len(self))[position]
        return self.__getitems__(positions.reshape(-1))

    def __getitems__(self, positions: Sequence[int] | Tensor) -> TableBatch:
        position_B = torch.as_tensor(positions, dtype=torch.int64)
        place_B = position_B // (1 + self.num_drawn)
        batch = with_items(self.rows, self.items, place_B, self._item_P[position_B])
        if not self.items.config.correct:
            return batch
        return replace(batch, offset_Bt=self._offset_N[place_B, None].expand_as(batch.label_Bt))

    def __str__(self) -> str:
        return (
            f"{len(self.rows):,} positive rows, and for each {self.num_drawn} of {len(self.items):,} items of column "
            f"{self.items.column}, sampled once (uniform) and labeled 0: metrics are of these {len(self):,} rows"
        )


def with_items(rows: TableRows, items: Items, place_B: Tensor, item_B: Tensor) -> TableBatch:
    """Return rows with other items, labeled 0 if the row has a label.

    Args:
        rows: rows of ``Items.table_rows``.
        items: the items.
        place_B: int64 (B,), places in ``rows``.
        item_B: int64 (B,), the items; 0 for the row's own, whose labels stay.
    """
    index_B, drawn_B = rows.index[place_B], item_B > 0
    batch = rows.batch(index_B, torch.where(drawn_B, items.row_I[item_B], index_B))
    # No label, NaN, stays none.
    return replace(batch, label_Bt=torch.where(drawn_B[:, None], 0.0 * batch.label_Bt, batch.label_Bt))
