"""A configuration that reads a user's own table where it is, with the reason for each column's role as a comment."""

from __future__ import annotations

import glob
import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from apps.base.messages import counted, some
from apps.data.given import NUMBERS, GivenConfig, GivenData
from apps.recsys.encoding.numbers import is_text, plain, to_order
from apps.recsys.encoding.texts import encoder_folder
from apps.recsys.encoding.timestamps import to_seconds
from apps.recsys.guesses import FEW_VALUES, TABLE_ROLES, Guess, Role, guess
from apps.recsys.own_files import check_columns, read_tables, table_files
from apps.recsys.own_labels import LEAST_ROWS, Label, floats_of, is_outcome, label_of, likeliest
from apps.recsys.readers.user_tables import joined
from apps.recsys.schema import TextConfig, plain_name, timestamp_columns
from apps.recsys.tables.encode.ids import ids_among_numbers
from apps.recsys.tables.encode.leaks import Column, Copies, groups_of, later_dates, leak, made_of_labels
from apps.recsys.tables.recipe import Size, experts, network, trainer

_LOOKED_AT = 20_000
_KNOWN_BEFORE = "put it back if it is known before the label"
_SHARES = {"val": 0.15, "test": 0.25}
_NUMBERS = ("number", "count")
_DATA = ("data", "init_args")
_TABLE = (*_DATA, "table")


def config_for(given: GivenData) -> GivenConfig | None:
    """Return a commented configuration of a small network for a table; None: another kind of data.

    The table is a CSV, TSV or Parquet file, or a folder of files of one of these kinds with the same columns, and is
    read where it is. Several targets become tasks of one model. A person who reads the configuration may name none:
    then it is the likeliest column. Ids, columns without information, and columns that nearly decide a label by
    themselves are left out, and a comment says why.

    Raises:
        ValueError: no target is named, or no column is plainly one; an option names no column; a target has no value,
            only one, values of another kind, or too few rows, or of a class; no column is left to predict from; or a
            file cannot be read.
    """
    if len(given.paths) != 1 or not (files := table_files(given.paths[0])):
        return None
    tables = read_tables(files)
    table = joined([*tables.values()], files)
    name = str(given.paths[0])
    if not len(table):
        raise ValueError(f"{name} has names of columns and no row")
    notes = []
    targets = [own for own in dict.fromkeys((given.target, *given.more_targets)) if own is not None]
    if not targets:
        if not given.in_place:
            names = some(table.column_names, 20)
            raise ValueError(f"{name} is a table and needs --target, the column to predict: {names}")
        targets, why = likeliest(table, name)
        notes.append(f"target: {targets[0]}, {why}; --target names another one")
    asked = [("time", given.time), ("user", given.user), *(("exclude", column) for column in given.exclude)]
    check_columns([*(("target", target) for target in targets), *asked], table, files[0], name)
    least = 1 if given.is_chosen else LEAST_ROWS
    labels = {plain_name(target): label_of(target, table.column(target), given.kind, least) for target in targets}
    if given.time is not None:
        to_order([("the table", table.column(given.time))], given.time)
    words = (*(("--target", target) for target in targets), ("--time", given.time), ("--user", given.user))
    verdict = tuple(word for option, value in words if value is not None for word in (option, value))
    given, table = _with_plain_names(given, table.drop_columns(targets), targets)
    found = {column: guess(column, table.column(column)) for column in table.column_names}
    found |= dict.fromkeys(given.exclude, Guess("unused", "excluded"))
    found |= dict.fromkeys(given.categorical, Guess("category", "named"))
    lengths = {file.name: len(own) for file, own in tables.items()}
    dates = (column for column, own in found.items() if own.role == "date")
    warnings = [line for column in dates for line in _odd_dates(column, table, lengths)]
    found = {column: _used(column, own, given, table) for column, own in found.items()}
    found |= _ids(found, table, labels)
    if not given.is_chosen:
        found, copies = _without_leaks(found, given, table, labels)
        warnings += copies
    separators = Counter(own.separator for own in found.values() if own.separator)
    separator = max(separators, key=separators.__getitem__, default="|")
    for column, own in found.items():
        if own.separator not in (None, separator):
            other = f"lists with {own.separator!r}, and a table has one separator, here {separator!r}"
            found[column] = Guess("unused", other, advice="write them as JSON lists")
    left_out = {column: own for column, own in found.items() if own.role not in TABLE_ROLES}
    if len(left_out) == len(found):
        raise ValueError(f"{name} has no column to predict {targets[0]!r} from: {some(list(left_out))} left out")
    odd = {column: own for column, own in left_out.items() if column not in (given.time, given.user, *given.exclude)}
    warnings += [f"{column} is left out: {_words(own)}" for column, own in odd.items()]
    path = f"{glob.escape(name)}/*{files[0].suffix}" if given.paths[0].is_dir() else name
    num_rows = max(int((~np.isnan(label.values_N)).sum()) for label in labels.values())
    notes.append(f"{len(table):,} rows; {'; '.join(f'{task}: {label.meaning}' for task, label in labels.items())}")
    columns, comments, above = _columns(found, table, given, labels, separator)
    if not given.in_place:
        used = [f"{', '.join(own)} ({role})" for role, own in columns.items() if role in TABLE_ROLES.values()]
        notes.append(f"columns: {'; '.join(used)}")
    comments[*_DATA, "train_file"] = f"{counted(len(table), 'row')}; file names start from the folder you are in"
    comments["model", "init_args", "dense", "kind"] = "also: quantile_normal, piecewise_linear, quantile, normalize"
    sizes = [len(pc.unique(plain(table.column(column)))) for column in columns.get("categorical", ())]
    size = Size(
        num_rows=round(num_rows * (1 - _SHARES["val"]) * (1 - _SHARES["test"])),
        has_ids=any(own > max(num_rows / 100, FEW_VALUES) for own in sizes),
        num_numbers=len(columns.get("continuous", ())) + len(columns.get("timestamps", ())),
        has_categories=any(role in columns for role in ("categorical", "multi_valued", "texts")),
        are_numbers=all(label.kind in NUMBERS for label in labels.values()),
    )
    if not size.by_label:
        columns.pop("numbers", None)
    made = _config({"train_file": path, "table": columns}, size, notes, given.in_place)
    if given.in_place:
        comments["model", "init_args", "blend"] = "boosted trees, mixed with the network; null: the network by itself"
        made = replace(made, verdict=verdict)
    return replace(made, comments=comments, above={**made.above, **above}, warnings=tuple(warnings))


def _with_plain_names(given: GivenData, table: pa.Table, targets: Sequence[str]) -> tuple[GivenData, pa.Table]:
    """Return options and features under their plain names, but for columns that share one."""
    num_of = Counter(map(plain_name, (*table.column_names, *targets)))
    plain_of = {own: plain_name(own) if num_of[plain_name(own)] == 1 else own for own in table.column_names}
    time, user = (own and plain_of[own] for own in (given.time, given.user))
    exclude = tuple(plain_of[own] for own in given.exclude)
    return replace(given, time=time, user=user, exclude=exclude), table.rename_columns(list(plain_of.values()))


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


def _ids(found: Mapping[str, Guess], table: pa.Table, labels: Mapping[str, Label]) -> dict[str, Guess]:
    """Return new guesses for columns of integers that turn out to be ids: each value says more than their order."""
    numbers = {column: floats_of(plain(table.column(column))) for column, own in found.items() if own.role in _NUMBERS}
    ids = ids_among_numbers(numbers, [label.values_N for label in labels.values()])
    return {column: Guess("category", f"{found[column].reason}, {why}") for column, why in ids.items()}


def _used(column: str, own: Guess, given: GivenData, table: pa.Table) -> Guess:
    """Return a guess, or why a column is not used after all."""
    if own.role == "id" and given.is_chosen and not is_text(plain(table.column(column)).type):
        return Guess("number", own.reason)
    if own.role not in TABLE_ROLES:
        return own
    if column == given.time and own.role != "date":
        return Guess("unused", "it orders the rows")
    if column == given.user and given.time is None:
        return Guess("unused", "each of its values is in one split")
    if "." in column or "/" in column or not column:
        return Guess("unused", "its name", advice="a name takes no dot and no slash, and with _ it is another column's")
    if own.role == "date" and (parts := [part for part in timestamp_columns(column) if part in table.column_names]):
        return Guess("unused", f"{some(parts)} is there already")
    if own.role == "text":
        try:
            encoder_folder(TextConfig(), column)
        except ValueError as error:
            return Guess("unused", f"text of {own.reason}", advice=str(error).partition(": ")[2])
    num_values = len(pc.unique(plain(table.column(column)).drop_null())) if own.role == "category" else 0
    if num_values and not given.is_chosen and is_outcome(column, num_values):
        return Guess("unused", "likely another label", advice=f"--target {column} makes it one; else {_KNOWN_BEFORE}")
    return own


def _without_leaks(
    found: Mapping[str, Guess], given: GivenData, table: pa.Table, labels: Mapping[str, Label]
) -> tuple[dict[str, Guess], list[str]]:
    """Return the guesses without columns that give a label away, and a line on rows that are there twice."""
    columns = {column: _values(table.column(column), own.role) for column, own in found.items()}
    dates = {c: own.number_N for c, own in columns.items() if own.number_N is not None and found[c].role == "date"}
    orders = {"the order of the rows": np.arange(len(table), dtype=np.float64), **dates}
    if given.time is not None:
        orders[given.time] = to_order([("the table", table.column(given.time))], given.time).astype(np.float64)
    ids = {c: columns[c].code_N for c, own in found.items() if own.role in ("id", "category") or c == given.user}
    groups = groups_of(ids)
    rows = np.random.default_rng(0).permutation(len(table))[:_LOOKED_AT]
    copies, kept = Copies(len(table)), dict(found)
    for task, label in labels.items():
        late = dict(later_dates(dates, label.values_N, label.is_number))
        copies.add(np.unique(label.values_N, return_inverse=True)[1])
        for column, own in kept.items():
            values = columns[column]
            if own.role not in TABLE_ROLES:
                continue
            why = leak(values.take(rows), label.values_N[rows], label.is_number) or late.get(column, "")
            if not why and values.number_N is not None and own.role != "date":
                others = {name: code_N for name, code_N in groups.items() if name != column}
                why = made_of_labels(values.number_N, label.values_N, others, orders)
            if why:
                kept[column] = Guess("unused", f"a leak? It {why.format(label=task)}", advice=_KNOWN_BEFORE)
    for column, own in found.items():
        if own.role in TABLE_ROLES:
            copies.add(columns[column].code_N)
    lines = []
    if num_copies := int(copies.rows().sum()):
        advice = "leave them out, or they are trained on and tested"
        lines = [f"{counted(num_copies, 'row')} of {len(table):,} repeat other rows, label included: {advice}"]
    return kept, lines


def _values(column: pa.ChunkedArray, role: Role) -> Column:
    """Return a column as the rules of leaks take it."""
    values = plain(column)
    missing_N = np.asarray(pc.is_null(values))
    if is_text(values.type):
        missing_N |= np.asarray(pc.fill_null(pc.equal(values, ""), fill_value=True))
    number_N = None
    if role == "date":
        number_N = to_seconds(values, "column", "the table")
    elif pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or role in ("number", "count", "money"):
        number_N = floats_of(values)
    flat = pa.chunked_array([list(map(str, values.to_pylist()))]) if pa.types.is_nested(values.type) else values
    if not pa.types.is_dictionary(flat.type):
        flat = flat.cast(pa.string()).fill_null("").combine_chunks().dictionary_encode()
    return Column(np.asarray(flat.indices, np.int64), missing_N, number_N, flat.dictionary.to_pylist())


def _words(own: Guess) -> str:
    role = "" if own.role == "unused" else f"{own.role}, "
    return f"{role}{own.reason}{own.advice and f' ({own.advice})'}"


def _columns(
    found: Mapping[str, Guess], table: pa.Table, given: GivenData, labels: Mapping[str, Label], separator: str
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
    if "continuous" in section or "timestamps" in section:
        section["numbers"] = "auto"
        comments[*_TABLE, "numbers"] = "bins or linear: by a short training, on validation rows"
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
    section["split"] = {"kind": kind, **_SHARES}
    rules = {"time": "the last rows test", "user": "all rows of a user are in one split", "random": "also: time, user"}
    comments[*_TABLE, "split", "kind"] = rules[kind]
    first = next(iter(labels))
    if kind == "random" and labels[first].kind not in NUMBERS:
        section["split"]["stratify"] = first
        comments[*_TABLE, "split", "stratify"] = "each split has its classes in the same shares"
    if kind == "time":
        above[*_TABLE, "split", "val"] = ("gap: 90d # out between splits: for labels that look 90 days ahead",)
    elif dates := section.get("timestamps"):
        above[*_TABLE, "split"] = (f"To test on the last rows: moesaic init {given.paths[0]} --time {dates[0]}",)
    return section, comments, above


def _config(data: Mapping[str, Any], size: Size, notes: Sequence[str], in_place: bool) -> GivenConfig:
    """Return two dense layers for a person who reads the configuration, with experts as a comment; else experts.

    Args:
        data: arguments of ``TableData`` that name files and columns.
        size: what the recipe depends on.
        notes: sentences on how the data were read.
        in_place: as in ``GivenData``.
    """
    named = {"dataset": "table", **data, "batch_size": size.batch_size}
    model = ("MultiTaskRecommender", network(size, sparse=not in_place))
    made = GivenConfig.of(notes, trainer(size), model=model, data=("TableData", named))
    if not in_place:
        return made
    lines = yaml.safe_dump({"shared": experts()}, sort_keys=False).splitlines()
    above: dict[tuple[str, ...], tuple[str, ...]] = {
        ("model", "init_args", "shared"): ("With 8 experts, of which a row takes 2:", *(f"  {own}" for own in lines))
    }
    return replace(made, above=above)
