"""A configuration that reads a user's own table where it is, with the reason for each column's role as a comment."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from apps.base.messages import counted, excerpt, some
from apps.data.given import GivenConfig, GivenData
from apps.recsys.encoding.numbers import plain, to_order
from apps.recsys.encoding.texts import encoder_folder
from apps.recsys.encoding.timestamps import to_seconds
from apps.recsys.guesses import FEW_VALUES, TABLE_ROLES, Guess, guess, words_of
from apps.recsys.leaks import floats_of, leak
from apps.recsys.own_data import SHARES, check_columns, join_tables, labels_of, read_table, sparse_config, table_files
from apps.recsys.schema import TextConfig, timestamp_columns

LEAST_ZEROS = 0.1
"""Share of zeros from which on amounts are "revenue"."""

_LOOKED_AT = 20_000
_DATA = ("data", "init_args")
_TABLE = (*_DATA, "table")
_WITH_CLASSES = ("binary", "ordinal", "multiclass")
_CERTAIN = {"label", "target", "y", "class", "outcome"}
_LABELS = {"churn", "churned", "click", "clicked", "bought", "buy", "purchase", "purchased", "converted", "conversion"}
_LABELS |= {
    "survived",
    "default",
    "fraud",
    "spam",
    "response",
    "subscribed",
    "canceled",
    "returned",
    "liked",
} | _CERTAIN
_LAST = {"price", "amount", "sales", "revenue", "rating", "score", "demand", "count", "cnt", "value", "quality"}


@dataclass(frozen=True)
class _Label:
    """A column that is predicted.

    Attributes:
        config: arguments of its ``TaskConfig`` that are no default.
        meaning: its kind and its values in words.
        values_N: float64, NaN for none; of several classes, whether it is the most frequent one.
    """

    config: Mapping[str, Any]
    meaning: str
    values_N: np.ndarray

    @property
    def kind(self) -> str:
        return self.config.get("kind", "binary")


def config_for(given: GivenData) -> GivenConfig | None:
    """Return a commented configuration of a small MMoE with routers for a table; None: another kind of data.

    Several targets become tasks of one model. Without one the likeliest column is taken. Ids, columns without
    information, and columns that nearly decide a label by themselves are left out, and a comment says why.

    Raises:
        ValueError: as for ``apps.recsys.own_data.config_for``, or no column is plainly the label.
    """
    if len(given.paths) != 1 or not (files := table_files(given.paths[0])):
        return None
    tables = {file: read_table(file, is_literal=True) for file in files}
    table = join_tables(list(tables.values()), files)
    name = str(given.paths[0])
    if not len(table):
        raise ValueError(f"{name} has names of columns and no row")
    notes = []
    targets = [own for own in dict.fromkeys((given.target, *given.more_targets)) if own is not None]
    if not targets:
        targets, why = likeliest(table, name)
        notes.append(f"target: {targets[0]}, {why}; --target names another one")
    asked = (*(("target", target) for target in targets), ("time", given.time), ("user", given.user))
    check_columns(asked, table, files[0], name)
    labels = {target.replace(".", "_").replace("/", "_"): _label(target, table.column(target)) for target in targets}
    if given.time is not None:
        to_order([("the table", table.column(given.time))], given.time)
    found = {column: guess(column, table.column(column)) for column in table.column_names if column not in targets}
    lengths = {file.name: len(own) for file, own in tables.items()}
    dates = [column for column, own in found.items() if own.role == "date"]
    warnings = [line for column in dates for line in _odd_dates(column, table, lengths)]
    found = {column: _used(column, own, given, table, labels) for column, own in found.items()}
    separators = Counter(own.separator for own in found.values() if own.separator)
    separator = max(separators, key=separators.__getitem__, default="|")
    for column, own in found.items():
        if own.separator not in (None, separator):
            other = f"lists with {own.separator!r}, and a table has one separator, here {separator!r}"
            found[column] = Guess("unused", other, advice="write them as JSON lists")
    left_out = {column: own for column, own in found.items() if own.role not in TABLE_ROLES}
    if len(left_out) == len(found):
        raise ValueError(f"{name} has no column to predict {targets[0]!r} from: {some(list(left_out))} left out")
    odd = {column: own for column, own in left_out.items() if column not in (given.time, given.user)}
    warnings += [f"{column} is left out: {_words(own)}" for column, own in odd.items()]
    paths = {"train_file": str(given.paths[0] / f"*{files[0].suffix}") if given.paths[0].is_dir() else name}
    num_rows = max(int((~np.isnan(label.values_N)).sum()) for label in labels.values())
    notes.append(f"{len(table):,} rows; {'; '.join(f'{task}: {label.meaning}' for task, label in labels.items())}")
    columns, comments, above = _columns(found, table, given, labels, separator)
    comments[*_DATA, "train_file"] = f"{counted(len(table), 'row')}; file names start from the folder you are in"
    comments["model", "init_args", "dense", "kind"] = "also: piecewise_linear, quantile, normalize"
    comments[*_TABLE, "min_count"] = "rarer categories share a row"
    made = sparse_config({**paths, "table": columns}, num_rows, notes)
    return replace(made, comments=comments, above=above, warnings=tuple(warnings))


def likeliest(table: pa.Table, name: str) -> tuple[list[str], str]:
    """Return the column that is most likely the label, alone, and why.

    Raises:
        ValueError: none is more likely than others.
    """
    counts = {
        c: len(pc.unique(own.drop_null())) for c, own in zip(table.column_names, map(_flat, table.columns), strict=True)
    }
    can_be = [column for column, number in counts.items() if number > 1]
    two = [column for column in can_be if counts[column] == 2]
    named = [column for column in can_be if _LABELS & {*words_of(column)} and counts[column] <= len(table) / 2]
    certain = [column for column in table.column_names if column.lower() in _CERTAIN]
    last = table.column_names[-1]
    for columns, why in (
        (certain, "by its name"),
        ([column for column in named if column in two], "by its name and its two values"),
        (named, "by its name"),
        ([last] if last in two else [], "the last column, of two values"),
        (two if len(two) == 1 else [], "the only column of two values"),
        ([last] if last in can_be and _LAST & {*words_of(last)} else [], "the last column, by its name"),
    ):
        if columns:
            others = f"; also likely: {some(columns[1:])}" if len(columns) > 1 else ""
            return columns[:1], why + others
    hint = ": is it separated by commas, or .tsv by tabs?" if len(table.column_names) == 1 else ""
    names = some(table.column_names, 20)
    raise ValueError(f"{name} has no column that is plainly the label: give --target, one of {names}{hint}")


def _flat(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column, or nothing of one whose values are no single ones."""
    return column.slice(0, 0).cast(pa.null()) if pa.types.is_nested(column.type) else plain(column)


def _label(name: str, column: pa.ChunkedArray) -> _Label:
    """Return what is to be known of a target.

    Raises:
        ValueError: as for ``labels_of``.
    """
    label, kind, _ = labels_of(column, name, None)
    config: dict[str, Any] = {"column": name}
    counts = pc.value_counts(label.drop_null()).to_pylist()
    missing = f", {label.null_count:,} rows without" if label.null_count else ""
    if kind == "binary":
        values = [own for own in pc.unique(plain(column).drop_null()).to_pylist() if own not in ("",)]
        high = max(values)
        if not {str(own).lower().removesuffix(".0") for own in values} <= {"0", "1", "false", "true"}:
            config |= {"positive": [high.strip()]} if isinstance(high, str) else {"at_least": high}
        share = float(pc.mean(label).as_py())
        return _Label(config, f"binary, {excerpt(high)} in {share:.1%}{missing}", floats_of(label))
    if kind == "multiclass":
        most = max(counts, key=lambda own: own["counts"])["values"]
        own = f"{len(counts):,} classes, most often {excerpt(most)}"
        return _Label({**config, "kind": kind}, f"{kind}, {own}{missing}", floats_of(pc.equal(label, most)))
    values_N = floats_of(label)
    known = values_N[~np.isnan(values_N)]
    kind = number_kind(known) if kind == "regression" else kind
    own = f"{known.min():,.10g} to {known.max():,.10g}, {np.mean(known == 0):.0%} zeros"
    return _Label({**config, "kind": kind}, f"{kind}, {own}{missing}", values_N)


def number_kind(values: np.ndarray) -> str:
    """Return the kind of a target of numbers, of more values than levels have."""
    from scipy.stats import skew

    is_whole = bool((np.floor(values) == values).all())
    if values.min() < 0:
        return "regression"
    if np.mean(values == 0) >= LEAST_ZEROS and (not is_whole or skew(values) > 1):
        return "revenue"
    return "count" if is_whole and values.min() <= 1 and np.median(values) < 5 * FEW_VALUES else "regression"


def _odd_dates(column: str, table: pa.Table, lengths: Mapping[str, int]) -> list[str]:
    """Return a line on dates that are still to come, and one on two files whose dates overlap.

    Args:
        column: a column of dates.
        table: rows of all files.
        lengths: number of rows of each file.
    """
    seconds_N = to_seconds(table.column(column), column, "the table")
    lines = []
    if late := int((seconds_N > time.time() + 86_400).sum()):
        lines.append(f"{column} is in the future in {counted(late, 'row')}, up to {_day(np.nanmax(seconds_N))}")
    parts = np.split(seconds_N, np.cumsum([*lengths.values()])[:-1])
    spans = [
        (np.nanmin(own), np.nanmax(own), name) for own, name in zip(parts, lengths, strict=True) if (own == own).any()
    ]
    for (_, last, name), (first, _, other) in itertools.pairwise(sorted(spans)):
        if first < last:
            when = f"{_day(first)} to {_day(last)}"
            return [*lines, f"{column} of {name} and {other} overlaps, {when}: is it one time after another?"]
    return lines


def _day(seconds: float) -> str:
    return str(np.datetime64(int(seconds), "s").astype("M8[D]"))


def _used(column: str, own: Guess, given: GivenData, table: pa.Table, labels: Mapping[str, _Label]) -> Guess:
    """Return a guess, or why a column is not used after all."""
    if own.role not in TABLE_ROLES:
        return own
    if column == given.time and own.role != "date":
        return Guess("unused", "it orders the rows")
    if column == given.user and given.time is None:
        return Guess("unused", "each of its values is in one split")
    if "." in column or "/" in column or not column:
        return Guess("unused", "its name", advice="a name takes no dot and no slash")
    if own.role == "date" and (parts := [part for part in timestamp_columns(column) if part in table.column_names]):
        return Guess("unused", f"{some(parts)} is there already")
    if own.role == "text":
        try:
            encoder_folder(TextConfig(), column)
        except ValueError as error:
            return Guess("unused", f"text of {own.reason}", advice=str(error).partition(": ")[2])
    # In a random order: halves of the rows are compared.
    rows = np.random.default_rng(0).permutation(len(table))[:_LOOKED_AT]
    values = plain(table.column(column)).take(rows)
    for task, label in labels.items():
        if why := leak(values, own.role, label.values_N[rows], label.kind):
            advice = "put it back if it is known before the label"
            return Guess("unused", f"a leak? It {why.format(label=task)}", advice=advice)
    return own


def _words(own: Guess) -> str:
    role = "" if own.role == "unused" else f"{own.role}, "
    return f"{role}{own.reason}{own.advice and f' ({own.advice})'}"


def _columns(
    found: Mapping[str, Guess], table: pa.Table, given: GivenData, labels: Mapping[str, _Label], separator: str
) -> tuple[dict[str, Any], dict[tuple[str, ...], str], dict[tuple[str, ...], tuple[str, ...]]]:
    """Return the section ``table``, and its comments beside and above values."""
    section: dict[str, Any] = {}
    comments: dict[tuple[str, ...], str] = {}
    above: dict[tuple[str, ...], tuple[str, ...]] = {}
    parts: dict[str, str] = {}
    for role in dict.fromkeys(TABLE_ROLES.values()):
        own = {column: what for column, what in found.items() if TABLE_ROLES.get(what.role) == role}
        if own:
            section[role] = {column: {} for column in own} if role == "texts" else list(own)
        for column, what in own.items():
            missing = table.column(column).null_count / len(table)
            comments[*_TABLE, role, column] = _words(what) + (f", {max(missing, 0.01):.0%} missing" if missing else "")
            if role == "timestamps":
                hour, _, days = timestamp_columns(column)
                seconds = to_seconds(table.column(column), column, "the table")
                if (seconds[~np.isnan(seconds)] % 86_400 == 0).all():
                    parts[hour] = "the dates have no time"
                if column == given.time:
                    parts[days] = "training has none of the test's days"
    if parts:
        section["left_out"] = list(parts)
        comments |= {(*_TABLE, "left_out", part): why for part, why in parts.items()}
    if separator != "|":
        section["separator"] = separator
        comments[*_TABLE, "separator"] = "between the values of a list"
    section["tasks"] = {task: dict(label.config) for task, label in labels.items()}
    comments |= {(*_TABLE, "tasks", task): label.meaning for task, label in labels.items()}
    if unused := [f"  {c}: {_words(own)}" for c, own in found.items() if own.role not in TABLE_ROLES]:
        above[*_TABLE, "tasks"] = ("Left out; a column that is wanted goes into a list above:", *unused)
    section |= {"user": given.user} if given.user else {}
    section |= {"time": given.time} if given.time else {}
    kind = "time" if given.time else "user" if given.user else "random"
    section["split"] = {"kind": kind, **SHARES}
    rules = {"time": "the last rows test", "user": "all rows of a user are in one split", "random": "also: time, user"}
    comments[*_TABLE, "split", "kind"] = rules[kind]
    first = next(iter(labels))
    if kind == "random" and labels[first].kind in _WITH_CLASSES:
        section["split"]["stratify"] = first
        comments[*_TABLE, "split", "stratify"] = "each split has its classes in the same shares"
    if kind == "time":
        above[*_TABLE, "split", "val"] = ("gap: 90d # out between splits: for labels that look 90 days ahead",)
    elif dates := section.get("timestamps"):
        above[*_TABLE, "split"] = (f"To test on the last rows: moesaic init {given.paths[0]} --time {dates[0]}",)
    return section, comments, above
