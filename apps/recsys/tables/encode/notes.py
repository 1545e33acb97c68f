"""Notes of an encoding on a table's labels and columns: shares by split, and warnings of what looks wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.recsys.encoding.categories import MISSING
from apps.recsys.encoding.features import Target
from apps.recsys.encoding.labels import determines
from apps.recsys.schema import TableConfig
from apps.recsys.tables.encode.findings import TableFindings
from apps.recsys.tables.encode.leaks import Column, Copies, groups_of, later_dates, made_of_labels, outcome

_ID_SHARE, _FEWEST_FOR_ID = 0.95, 100
"""A column is taken for an id of the rows from this share of distinct values on, in at least this many rows."""

_SHIFTED, _OUTSIDE, _BY_CHANCE = 0.05, 0.01, 2
"""Shares of values that training lacks, and of numbers outside its range, above which a warning says so, if these are
more than chance puts there in a small split."""


class Notes:
    """Fills the ``findings`` of a table while it is encoded: first each task's labels, then each column.

    Args:
        config: description of the table, with the parts of its timestamps.
        masks: the rows of each split.
        draws_items: whether the table must be of positives only, as other items are sampled as negatives.
        user_N: codes of the rows' users, if there are any.
        dates: columns of times, as numbers of days.
    """

    def __init__(
        self,
        config: TableConfig,
        masks: Mapping[str, NDArray[np.bool_]],
        draws_items: bool,
        user_N: NDArray[np.int64] | None = None,
        dates: Mapping[str, NDArray[np.float64]] | None = None,
    ) -> None:
        self.config, self.masks, self.draws_items = config, masks, draws_items
        num_rows = len(masks["train"])
        self._copies = Copies(num_rows)
        self._ids = {} if user_N is None else {str(config.user): user_N}
        self._dates = dict(dates or {})
        self.orders = {"the order of the rows": np.arange(num_rows, dtype=np.float64), **self._dates}
        self.findings = TableFindings(rows={name: int(mask.sum()) for name, mask in masks.items()})
        self.warnings = self.findings.warnings
        self._labels: dict[str, tuple[NDArray[np.float64], bool]] = {}

    def labels(self, name: str, target: Target, label: NDArray[np.float32], unknown: NDArray[np.bool_]) -> float:
        """Note a task's number of labels, and their mean, in each split.

        Args:
            name: the task.
            target: what its labels are.
            label: of each row; NaN: none.
            unknown: rows whose label is a value that training lacks.

        Returns:
            the share of positive ones in training; 0.5 of a task that is not binary.

        Raises:
            ValueError: a binary task's training labels have only one class, or one is 0 in a table of positives.
        """
        self._copies.add(np.unique(label, return_inverse=True)[1])
        self._labels[name] = label.astype(np.float64), target.kind not in ("binary", "multiclass")
        if target.kind == "multiclass":  # whether it is the most frequent class
            most = np.bincount(label[~np.isnan(label)].astype(np.int64)).argmax()
            self._labels[name] = np.where(np.isnan(label), np.nan, label == most), False
        if target.kind == "ordinal":
            label = target.numbers_of(label).astype(np.float32)
        labeled, means = self.findings.labeled.setdefault(name, {}), dict[str, float]()
        for split, mask in self.masks.items():
            in_split = label[mask]
            in_split = in_split[~np.isnan(in_split)]
            num = labeled[split] = len(in_split)
            means[split] = float(in_split.mean(dtype=np.float64)) if num else 0.0
            if target.kind == "binary":
                self._check_classes(name, split, num, means[split], label)
                continue
            if mask.any() and not num:
                self.warnings.append(f"task {name!r} has no label in the {split} split")
            if num_unknown := int(unknown[mask].sum()):
                self.warnings.append(
                    f"task {name!r}: {num_unknown:,} labels of the {split} split are values that training lacks; they "
                    "count as none"
                )
        if target.kind == "binary":
            self.findings.positives[name] = means
            return means["train"]
        if target.kind == "multiclass":
            self.findings.classes[name] = len(target.classes)
        else:
            self.findings.means[name] = means
        return 0.5

    def _check_classes(self, name: str, split: str, num: int, share: float, label: NDArray[np.float32]) -> None:
        """Reject training labels of one class, and warn of such ones in another split."""
        mask = self.masks[split]
        if self.draws_items and num:
            if share < 1:
                row = int(np.argmax((label == 0) & mask))
                raise ValueError(
                    f"negatives.kind='items' is for tables of positives alone, and task {name!r} is 0 in row "
                    f"{row}: leave such rows out, or take kind 'rows', which trains on them"
                )
        elif mask.any() and share in (0.0, 1.0):
            which = "no label" if not num else "positive labels alone" if share else "no positive label"
            message = f"task {name!r} has {which} in the {split} split"
            if split == "train":
                raise ValueError(f"{message}: there is nothing to learn")
            self.warnings.append(f"{message}: its AUC is not defined there")

    def column(
        self,
        column: str,
        missing: NDArray[np.bool_],
        unseen: NDArray[np.bool_] | None = None,
        lengths: NDArray[np.int64] | None = None,
        is_id: bool = False,
    ) -> None:
        """Note a column's share of missing rows and of values that training lacks, in each split.

        ``is_id`` leaves out a warning of new values, where one of ids has been given.
        """
        share_missing = self.findings.missing[column] = {s: _share(missing[mask]) for s, mask in self.masks.items()}
        if share_missing["train"] == 1:
            self.warnings.append(
                f"column {column!r} has no value in any training row: leave it out (exclude: [{column}])"
            )
        if unseen is None:
            return
        masks = self.masks if lengths is None else {s: np.repeat(m, lengths) for s, m in self.masks.items()}
        share = self.findings.unseen[column] = {s: _share(unseen[mask]) for s, mask in masks.items()}
        split = self.config.split
        new_by_design = is_id or (split.kind == "user" and column == self.config.user) or column == split.column
        shifted = {}
        for part in () if new_by_design else ("val", "test"):
            # Rare values of training are unseen too, but a sequence in which most are unseen says nothing.
            if share[part] > 0.5 and (share["train"] < 0.25 or column in self.config.sequences):
                self.warnings.append(
                    f"column {column!r}: {share[part]:.0%} of the {part} values are not in training: are they "
                    "written alike there?"
                )
            elif share[part] - share["train"] > _SHIFTED and unseen[masks[part]].sum() > _BY_CHANCE:
                shifted[part] = share[part]
        if shifted:
            self.warnings.append(f"column {column!r}: {_by_split(shifted)} values are not in training")

    def outside(self, column: str, values: NDArray[np.float32]) -> None:
        """Warn of numbers of validation and test that lie outside the range of the training rows."""
        in_train = values[self.masks["train"]]
        low, high = np.fmin.reduce(in_train), np.fmax.reduce(in_train)  # NaN without a number: nothing is outside then
        is_outside, is_there = (values < low) | (values > high), ~np.isnan(values)
        outside = {part: is_outside[self.masks[part] & is_there] for part in ("val", "test")}
        shares = {
            part: own.mean() for part, own in outside.items() if own.sum() > max(_OUTSIDE * len(own), 2 * _BY_CHANCE)
        }
        if shares:
            self.warnings.append(
                f"column {column!r}: {_by_split(shares)} values are outside the training rows' range, {low:g} to "
                f"{high:g}: the model has seen none such. Leave out what only grows with time (exclude: [{column}])"
            )

    def single(self, column: str, codes: NDArray[np.int64], unseen: NDArray[np.bool_]) -> None:
        """Note a categorical column of one value per row, with a warning if nearly each training row has its own."""
        in_train = codes[self.masks["train"]]
        in_train = in_train[in_train != MISSING]
        share = len(np.unique(in_train)) / max(len(in_train), 1)
        is_id = len(in_train) >= _FEWEST_FOR_ID and share >= _ID_SHARE
        if is_id:
            self.warnings.append(
                f"column {column!r} looks like an id of the rows: {math.floor(100 * share)} % of its {len(in_train):,} "
                f"training values are distinct. It says nothing of new rows: leave it out (exclude: [{column}])"
            )
        self.column(column, codes == MISSING, unseen, is_id=is_id)
        self._ids |= groups_of({column: codes})
        self.leak(column, codes)

    def number(self, column: str, values: NDArray[np.float32]) -> None:
        """Note a column of numbers."""
        self.column(column, np.isnan(values))
        self.outside(column, values)
        self.leak(column, np.unique(values, return_inverse=True)[1], values)

    def leak(self, column: str, codes: NDArray[Any], values: NDArray[np.float32] | None = None) -> None:
        """Warn of a column each value of which comes with only one label, or one of whose values does.

        Args:
            column: its name.
            codes: equal for equal values; ``MISSING`` for none.
            values: the numbers, NaN for none; None: the column has none.
        """
        self._copies.add(codes)
        train = self.masks["train"]
        missing = codes == MISSING if values is None else np.isnan(values)
        own = Column(codes, missing, None if values is None else values.astype(np.float64))
        for name, (label_N, is_number) in self._labels.items():
            if determines(codes[train], label_N[train]):
                how = "determines the label of task {label} in every training row"
            else:
                how = outcome(own.take(np.flatnonzero(train)), label_N[train], is_number)
            if not how and own.number_N is not None:
                how = made_of_labels(own.number_N, label_N, groups_of(self._ids), self.orders)
            self._warn(column, how, name)

    def later_dates(self) -> None:
        """Warn of dates that come after another date of their row only with one label, once the labels are noted."""
        for name, (label_N, is_number) in self._labels.items():
            for column, how in later_dates(self._dates, label_N, is_number):
                self._warn(column, how, name)

    def _warn(self, column: str, how: str, task: str) -> None:
        if how:
            self.warnings.append(
                f"column {column!r} {how.format(label=repr(task))}: is it known before the label is? Else leave it out "
                f"(exclude: [{column}])"
            )

    def repeated(self) -> None:
        """Warn of rows of validation and test that repeat training rows, once all columns are noted."""
        for split in ("val", "test"):
            if shared := self._copies.shared(self.masks["train"], self.masks[split]):
                self.warnings.append(
                    f"{shared:,} of {int(self.masks[split].sum()):,} {split} rows repeat a training row, label "
                    "included: leave copies out, or the metrics are too good"
                )


def _by_split(shares: Mapping[str, float]) -> str:
    return " and ".join(f"{share:.1%} of the {part}" for part, share in shares.items())


def _share(mask: NDArray[np.bool_]) -> float:
    return float(mask.mean()) if len(mask) else 0.0
