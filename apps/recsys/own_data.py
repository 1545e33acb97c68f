"""A configuration for a table that a user names, with a column to predict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
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
from apps.recsys.encoding.numbers import is_text, known_text, plain
from apps.recsys.guesses import FEW_VALUES, TABLE_ROLES, guess
from apps.recsys.readers.user_tables import find_files, opened
from apps.recsys.schema import nearest

LEAST_ROWS = 20
"""Least number of rows of each of the target's two classes: the smallest split, a ninth of them, has two then."""

_ENDINGS = (".csv", ".tsv", ".parquet")
_LARGEST_BLOCK = 1 << 28
_STEPS = 1500
TARGET = "target"
SHARES = {"val": 0.15, "test": 0.25}


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
    files = table_files(given.paths[0])
    if not files:
        return None
    table = join_tables([read_table(file) for file in files], files)
    target = given.target
    name = str(given.paths[0])
    if target is None:
        raise ValueError(f"{name} is a table and needs --target, the column to predict: {some(table.column_names, 20)}")
    asked = (("target", target), ("time", given.time), ("user", given.user), *(("exclude", c) for c in given.exclude))
    check_columns(asked, table, files[0], name)
    label, kind, meaning = labels_of(table.column(target), target, given.kind)
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


def check_columns(asked: Sequence[tuple[str, str | None]], table: pa.Table, file: Path, name: str) -> None:
    """Reject options that name no column of a table, or its target twice.

    Args:
        asked: options with their columns; the first one is a target.
        table: the table.
        file: its first file.
        name: what to call the table.
    """
    for option, column in asked:
        if column is None or column in table.column_names:
            continue
        near = nearest(column, table.column_names)
        if len(table.column_names) == 1 and file.suffix.lower() != ".parquet":
            near = (
                f", whose one column is {excerpt(table.column_names[0])}: is it separated by commas, or .tsv by tabs?"
            )
        raise ValueError(f"--{option} {column!r} is not a column of {name}{near}")
    targets = [column for option, column in asked if option == "target"]
    if doubled := next((own for own in asked if own[0] != "target" and own[1] in targets), None):
        raise ValueError(f"--{doubled[0]} {doubled[1]!r} is the target")


def table_files(path: Path) -> list[Path]:
    """Return the files of a table; none if there is none."""
    if path.is_dir():
        parts = {ending: sorted(path.glob(f"*{ending}")) for ending in _ENDINGS}
        kinds = [ending for ending, own in parts.items() if own]
        if len(kinds) > 1:
            raise ValueError(f"{path} holds tables of several kinds ({', '.join(kinds)}): name one file")
        return parts[kinds[0]] if kinds else []
    return find_files(None, str(path), "DATA") if any(s.lower() in _ENDINGS for s in path.suffixes) else []


def read_table(file: Path, is_literal: bool = False) -> pa.Table:
    """Return one file of a table.

    Args:
        file: a file of a kind that `table_files` returns.
        is_literal: whether a text file is read as `TableData` reads it: "NA" is missing among numbers, and text
            elsewhere.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        table = _read_file(file, is_literal)
        table.column_names  # noqa: B018  decodes them
    except UnicodeDecodeError:
        raise ValueError(f"{str(file)!r} cannot be read: the names of its columns are no UTF-8 text") from None
    except (pa.ArrowException, OSError) as error:
        text = one_line(str(error))
        if not text.isprintable() or "\ufffd" in text:  # what a broken file holds is not for a terminal
            text = f"{text.encode('ascii', 'replace').decode().partition(': ')[0]}: is it a text file?"
        raise ValueError(f"{str(file)!r} cannot be read: {text}") from None
    return table


def join_tables(tables: Sequence[pa.Table], files: Sequence[Path]) -> pa.Table:
    """Return the rows of the tables of some files.

    Raises:
        ValueError: the tables differ in their types, or have a column twice.
    """
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"{files[0].name} and the files beside it differ: {one_line(str(error))}") from None
    twice = [column for column, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise ValueError(f"{str(files[0])!r} has two columns {twice[0]!r}")
    return table


def _read_file(file: Path, is_literal: bool) -> pa.Table:
    if file.suffix.lower() == ".parquet":
        return pq.read_table(file)
    delimiter = "\t" if ".tsv" in [s.lower() for s in file.suffixes] else ","
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    convert = pa.csv.ConvertOptions(null_values=[""], strings_can_be_null=True) if is_literal else None
    # The types follow from the first block: a larger one has the "unknown" that comes late in a column of
    # numbers. A compressed file unpacks to a few times its size.
    block = pa.csv.ReadOptions(block_size=min(max(20 * file.stat().st_size, 1 << 20), _LARGEST_BLOCK))
    with opened(file) as source:
        table = pa.csv.read_csv(source, block, parse, convert)
    if is_literal:
        for place, column in enumerate(table.columns):
            if is_text(column.type):
                table = table.set_column(place, table.column_names[place], _numbers_in(column))
    return table


def _numbers_in(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return text as numbers if all of it is, but for "NA" and the like, and as it is otherwise."""
    try:
        return known_text(column).cast(pa.float64())
    except pa.ArrowInvalid:
        return column


def labels_of(column: pa.ChunkedArray, name: str, kind: str | None) -> tuple[pa.ChunkedArray, str, str]:
    """Return the target as a table holds it, null for none, its kind, and a description in words to put before "of N
    rows".

    Raises:
        ValueError: there is nothing to learn, or the values are not of the kind.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    are_texts = is_text(column.type)
    if are_texts:
        column = pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)
    counts = {c["values"]: c["counts"] for c in pc.value_counts(column).to_pylist() if c["values"] is not None}
    if not counts:
        raise ValueError(f"--target {name!r} has no value in any of {len(column):,} rows: there is nothing to learn")
    if len(counts) == 1:
        (value,) = counts
        raise ValueError(f"--target {name!r} is {excerpt(value)} in every row that has one: there is nothing to learn")
    is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if not (is_number or are_texts or pa.types.is_boolean(column.type)):
        raise ValueError(f"--target {name!r} holds {column.type}, and not numbers, text or truth values")
    if kind is None:
        kind = _kind_of(len(counts), are_texts, pa.types.is_integer(column.type))
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


def _kind_of(num_values: int, are_texts: bool, is_whole: bool) -> str:
    """Return the kind of a target by its values."""
    if num_values == 2:
        return "binary"
    if are_texts:
        return "multiclass"
    return "ordinal" if is_whole and num_values <= FEW_VALUES else "regression"


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
        role, values = _role(name, column)
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


def _role(name: str, column: pa.ChunkedArray) -> tuple[str | None, pa.ChunkedArray]:
    """Return the role of a column, with its values as text, lists, float64 or timestamps; None: it has none."""
    found = guess(name, column)
    role, column = TABLE_ROLES.get(found.role), plain(column)
    if role in ("texts", "vectors"):
        return None, column
    if role == "categorical":
        return role, column.cast(pa.string())
    if role == "continuous":
        return role, column.cast(pa.float64())
    return role, column if found.separator is None else pc.split_pattern(column, found.separator)


def _config(
    path: Path, roles: dict[str, list[str]], split: dict[str, str], kind: str, num_rows: int, notes: Sequence[str]
) -> GivenConfig:
    """Return the configuration of a table that was written to ``path``."""
    by = next(iter(split), "random")
    stratify = None if split or kind in NUMBERS else TARGET
    table = {
        **roles,
        **split,
        "left_out": [f"{column}_days" for column in split.values() if column in roles["timestamps"]],
        "tasks": {TARGET: {"column": TARGET, "kind": kind}},
        "split": {"kind": by, **SHARES, "stratify": stratify},
    }
    return sparse_config({"train_file": str(path), "table": table}, num_rows, notes)


def sparse_config(data: Mapping[str, Any], num_rows: int, notes: Sequence[str]) -> GivenConfig:
    """Return 8 experts of width 32, of which a row takes 2, and as many epochs as give 1,500 steps, within limits.

    Args:
        data: arguments of ``TableData`` that name files and columns.
        num_rows: rows with a label.
        notes: sentences on how the data were read.
    """
    num_train = round(num_rows * 0.75 * 0.85)
    batch_size = 2 ** min(max(math.floor(math.log2(max(num_train / 16, 1))), 5), 9)
    steps = math.ceil(num_train / batch_size)
    expert = {"class_path": "core.MLP", "init_args": {"hidden_dims": [32]}}
    gates = {**EXPERTS, "expert": expert, "balance": {"load_balancing_loss": 0.01, "router_z_loss": 0.001}}
    model = {
        "shared": {"class_path": "core.MMoE", "init_args": gates},
        "embedding": {"dim": 8},
        "dense": {"kind": "quantile_normal", "num_bins": 32},
        "head": {"hidden_dims": [8], "activation": "silu"},
        "optimizer": {"lr": 2.0e-3, "weight_decay": 0.01, "warmup_steps": 0.05, "fused": True},
    }
    # A row of its own for a user of three orders learns these by heart.
    rare = {"min_count": min(max(num_train // 2000, 2), 20)}
    named = {"dataset": "table", **data, "table": {**data["table"], **rare}, "batch_size": batch_size}
    trainer = {"max_epochs": min(max(math.ceil(_STEPS / steps), 5), 40)}
    return GivenConfig.of(notes, trainer, model=("MultiTaskRecommender", model), data=("TableData", named))
