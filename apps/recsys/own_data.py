"""A configuration for a table that a user names, with a column to predict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from apps.base.files import replacing
from apps.base.messages import excerpt, one_line, some
from apps.data.given import EXPERTS, NUMBERS, GivenConfig, GivenData
from apps.recsys.encoding.categories import as_list, is_list
from apps.recsys.encoding.numbers import is_text
from apps.recsys.readers.user_tables import find_files, opened
from apps.recsys.schema import nearest

LEAST_ROWS = 20
"""Least number of rows of each of the target's two classes: the smallest split, a ninth of them, has two then."""

_ENDINGS = (".csv", ".tsv", ".parquet")
_FEW_VALUES = 20
"""Integers of at most so many values are categories."""
_STEPS = 1500
TARGET = "target"


def config_for(given: GivenData) -> GivenConfig | None:
    """Return the configuration of a small MMoE with routers for a table; None: another kind of data.

    The table is a CSV, TSV or Parquet file, or a folder of files of one of these kinds with the same columns. Numbers
    are continuous columns, and dates and times timestamps; text, truth values and integers of few values are
    categories, and lists of these, also as text, multi-valued columns. Identifiers, whose value is another in nearly
    every row, are left out. A target of two values is binary, of more texts "multiclass", of integers of few values
    "ordinal", and of other numbers "regression", unless ``given.kind`` says otherwise. A binary one is made 0 and 1: of
    two values the larger is 1, of more numbers those from the median on, of more texts the most frequent one. The table
    as it is read lies below ``given.folder`` then.

    Raises:
        ValueError: no target is named, or the column is missing, has no value, or only one value; its values have
            another kind; too few rows, or of a class; no column to predict from; or a file that cannot be read.
    """
    if len(given.paths) != 1:
        return None
    files = _files(given.paths[0])
    if not files:
        return None
    table = _read(files)
    target = given.target
    name = str(given.paths[0])
    if target is None:
        raise ValueError(f"{name} is a table and needs --target, the column to predict: {some(table.column_names, 20)}")
    asked = (("target", target), ("time", given.time), ("user", given.user), *(("exclude", c) for c in given.exclude))
    for option, column in asked:
        if column is None or column in table.column_names:
            continue
        near = nearest(column, table.column_names)
        if len(table.column_names) == 1 and files[0].suffix.lower() != ".parquet":
            near = (
                f", whose one column is {excerpt(table.column_names[0])}: is it separated by commas, or .tsv by tabs?"
            )
        raise ValueError(f"--{option} {column!r} is not a column of {name}{near}")
    if doubled := next((option for option, column in asked[1:] if column == target), None):
        raise ValueError(f"--{doubled} {target!r} is the target")
    label, kind, meaning = _labels(table.column(target), target, given.kind)
    num_rows = len(table)
    table, label = table.filter(pc.is_valid(label)), label.drop_null()
    columns, roles, split, left_out = _features(table.drop_columns([target]), given)
    if not any(roles.values()):
        raise ValueError(f"{name} has no column to predict {target!r} from: {some(left_out)} left out")
    path = given.folder / "table.parquet"
    if not path.exists():
        made = pa.table({**columns, TARGET: label})
        with replacing(path, "wb") as file:
            pq.write_table(made, file)
    notes = [f"The target is {meaning} of {len(label):,} rows."]
    if missing := num_rows - len(label):
        notes.append(f"{missing:,} rows without a target are left out.")
    names = {"categorical": "categories", "multi_valued": "lists", "continuous": "numbers", "timestamps": "times"}
    used = [f"{', '.join(own)} ({names[role]})" for role, own in roles.items() if own]
    used += [f"left out: {', '.join(left_out)}"] if left_out else []
    notes.append(f"Columns: {'; '.join(used)}.")
    notes += [f"Rows are split by {kind}: {column}." for kind, column in split.items()]
    return _config(path, roles, split, kind, len(label), notes)


def _files(path: Path) -> list[Path]:
    """Return the files of a table; none if there is none."""
    if path.is_dir():
        parts = {ending: sorted(path.glob(f"*{ending}")) for ending in _ENDINGS}
        kinds = [ending for ending, own in parts.items() if own]
        if len(kinds) > 1:
            raise ValueError(f"{path} holds tables of several kinds ({', '.join(kinds)}): name one file")
        return parts[kinds[0]] if kinds else []
    return find_files(None, str(path), "DATA") if any(s.lower() in _ENDINGS for s in path.suffixes) else []


def _read(files: Sequence[Path]) -> pa.Table:
    tables = []
    for file in files:
        try:
            tables.append(_read_one(file))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{str(file)!r} cannot be read: {one_line(str(error))}") from None
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"{files[0].name} and the files beside it differ: {one_line(str(error))}") from None
    twice = [column for column, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise ValueError(f"{str(files[0])!r} has two columns {twice[0]!r}")
    return table


def _read_one(file: Path) -> pa.Table:
    if file.suffix.lower() == ".parquet":
        return pq.read_table(file)
    delimiter = "\t" if ".tsv" in [s.lower() for s in file.suffixes] else ","
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with opened(file) as source:
        return pa.csv.read_csv(source, parse_options=parse)


def _labels(column: pa.ChunkedArray, name: str, kind: str | None) -> tuple[pa.ChunkedArray, str, str]:
    """Return the target as a table holds it, null for none, its kind, and a description in words to put before "of N
    rows".

    Raises:
        ValueError: there is nothing to learn, or the values are not of the kind.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if is_text:
        column = pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)
    counts = {c["values"]: c["counts"] for c in pc.value_counts(column).to_pylist() if c["values"] is not None}
    if not counts:
        raise ValueError(f"--target {name!r} has no value in any of {len(column):,} rows: there is nothing to learn")
    if len(counts) == 1:
        (value,) = counts
        raise ValueError(f"--target {name!r} is {excerpt(value)} in every row that has one: there is nothing to learn")
    is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if not (is_number or is_text or pa.types.is_boolean(column.type)):
        raise ValueError(f"--target {name!r} holds {column.type}, and not numbers, text or truth values")
    if kind is None:
        kind = _kind_of(len(counts), is_text, pa.types.is_integer(column.type))
    if kind == "binary":
        return _binary(column, name, counts, is_number)
    if kind == "multiclass":
        enough = sum(count >= LEAST_ROWS for count in counts.values())
        if enough < 2:
            raise ValueError(
                f"--target {name!r}: {enough} of {len(counts):,} classes have {LEAST_ROWS} rows, and two are needed"
            )
        return column.cast(pa.string()), kind, f"{name!r}, one of {len(counts):,} classes,"
    if not is_number:
        raise ValueError(f"--target {name!r} holds {column.type}, and kind {kind!r} takes numbers")
    if (count := sum(counts.values())) < 2 * LEAST_ROWS:
        raise ValueError(f"--target {name!r} has a number in {count} rows, and {2 * LEAST_ROWS} are needed")
    meaning = {"ordinal": f"one of {len(counts)} levels", "count": "a count"}.get(kind, "a number")
    return column.cast(pa.float64()), kind, f"{name!r}, {meaning},"


def _kind_of(num_values: int, is_text: bool, is_whole: bool) -> str:
    """Return the kind of a target by its values."""
    if num_values == 2:
        return "binary"
    if is_text:
        return "multiclass"
    return "ordinal" if is_whole and num_values <= _FEW_VALUES else "regression"


def _binary(
    column: pa.ChunkedArray, name: str, counts: dict[Any, int], is_number: bool
) -> tuple[pa.ChunkedArray, str, str]:
    """Return the target as 0 and 1."""
    if len(counts) == 2:
        high = max(counts) if is_number or pa.types.is_boolean(column.type) else max(counts, key=str)
        positive, meaning = pc.equal(column, pa.scalar(high, column.type)), f"{name!r} = {excerpt(high)}"
    elif is_number:
        values = column.drop_null().to_numpy()
        middle = float(np.median(values))
        # Where half of the rows have the smallest value, "at least the median" would be all of them.
        above = middle if middle > values.min() else float(values[values > middle].min())
        positive, meaning = pc.greater_equal(column, above), f"{name!r} of at least {above:g}"
    else:
        most = max(counts, key=lambda value: (counts[value], value))
        positive = pc.equal(column, pa.scalar(most, column.type))
        meaning = f"{name!r} = {excerpt(most)}, the most frequent of {len(counts)} values"
    num_positive, num_rows = int(pc.sum(positive).as_py()), sum(counts.values())
    for count, what in ((num_positive, "are"), (num_rows - num_positive, "are not")):
        if count < LEAST_ROWS:
            raise ValueError(
                f"--target {name!r}: {count} rows {what} positive ({meaning}), and each class needs {LEAST_ROWS}"
            )
    return positive.cast(pa.int8()), "binary", f"{meaning}: {num_positive / num_rows:.1%}"


def _features(
    table: pa.Table, given: GivenData
) -> tuple[dict[str, pa.ChunkedArray], dict[str, list[str]], dict[str, str], list[str]]:
    """Return the columns that are read by their names, the names of those to predict from by their role, the name of
    the column by which rows are split by "time" or "user", and the columns that are not predicted from."""
    columns: dict[str, pa.ChunkedArray] = {}
    split: dict[str, str] = {}
    roles: dict[str, list[str]] = {"categorical": [], "multi_valued": [], "continuous": [], "timestamps": []}
    left_out = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        role, values = _role(column)
        own_split = next((kind for kind in ("time", "user") if name == getattr(given, kind)), None)
        # A user or a number of the time is another in each split; of a timestamp hour and weekday are not.
        if name in given.exclude or (own_split and role != "timestamps"):
            role = None
        if role is None:
            left_out.append(name)
            if own_split is None:
                continue
        plain = name.replace(".", "_").replace("/", "_") or "column"  # names become keys of modules and metrics
        while plain in columns or plain == TARGET:
            plain += "_"
        columns[plain] = values
        if role is not None:
            roles[role].append(plain)
        if own_split is not None:
            split[own_split] = plain
    return columns, roles, split, left_out


def _role(column: pa.ChunkedArray) -> tuple[str | None, pa.ChunkedArray]:
    """Return the role of a column, with its values as text, lists, float64 or timestamps; None: it has none."""
    kind = column.type
    if _are_lists(column):
        return "multi_valued", column
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_decimal(kind):
        column, kind = column.cast(pa.float64()), pa.float64()
    known = column.drop_null()
    distinct = len(pc.unique(known)) if not pa.types.is_nested(kind) else 0
    if distinct < 2:
        return None, column
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        return "timestamps", column
    if pa.types.is_floating(kind):
        return "continuous", column.cast(pa.float64())
    if pa.types.is_integer(kind):
        if distinct <= _FEW_VALUES:
            return "categorical", column.cast(pa.string())
        steps = np.diff(known.to_numpy())
        counts_rows = distinct == len(known) and (bool((steps > 0).all()) or bool((steps < 0).all()))
        return (None if counts_rows else "continuous"), column.cast(pa.float64())
    if pa.types.is_boolean(kind):
        return "categorical", column.cast(pa.string())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return ("categorical" if distinct <= len(known) / 2 else None), column.cast(pa.string())
    return None, column


def _are_lists(column: pa.ChunkedArray) -> bool:
    """Return whether a column holds lists, or text that is mostly lists, whose values recur as categories do."""
    kind, values = column.type, column.drop_null().to_pylist() if is_text(column.type) or is_list(column.type) else []
    if is_list(kind) and pa.types.is_nested(kind.value_type):
        return False
    lists = [own for own in (map(as_list, values) if is_text(kind) else values) if own is not None]
    flat = [value for own in lists for value in own]
    return 2 * len(lists) > len(values) and 2 * len(set(flat)) <= len(flat)


def _config(
    path: Path, roles: dict[str, list[str]], split: dict[str, str], kind: str, num_rows: int, notes: Sequence[str]
) -> GivenConfig:
    """Return 8 experts of width 32, of which a row takes 2, and as many epochs as give 1,500 steps, within limits."""
    num_train = round(num_rows * 0.75 * 0.85)
    batch_size = 2 ** min(max(math.floor(math.log2(max(num_train / 16, 1))), 5), 9)
    steps = math.ceil(num_train / batch_size)
    by = next(iter(split), "random")
    stratify = None if split or kind in NUMBERS else TARGET
    expert = {"class_path": "core.MLP", "init_args": {"hidden_dims": [32]}}
    gates = {**EXPERTS, "expert": expert, "balance": {"load_balancing_loss": 0.01, "router_z_loss": 0.001}}
    model = {
        "shared": {"class_path": "core.MMoE", "init_args": gates},
        "embedding": {"dim": 8},
        "dense": {"kind": "normalize"},
        "head": {"hidden_dims": [8], "activation": "silu"},
        "optimizer": {"lr": 2.0e-3, "weight_decay": 0.01, "warmup_steps": 0.05, "fused": True},
    }
    table = {
        **roles,
        **split,
        "left_out": [f"{column}_days" for column in split.values() if column in roles["timestamps"]],
        "tasks": {TARGET: {"column": TARGET, "kind": kind}},
        "split": {"kind": by, "val": 0.15, "test": 0.25, "stratify": stratify},
    }
    data = {"dataset": "table", "train_file": str(path), "table": table, "batch_size": batch_size}
    trainer = {"max_epochs": min(max(math.ceil(_STEPS / steps), 5), 40)}
    return GivenConfig.of(notes, trainer, model=("MultiTaskRecommender", model), data=("TableData", data))
