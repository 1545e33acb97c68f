"""The encoding of arrow tables as array files: split the rows, learn from the training rows, encode each column.

Besides the arrow tables, one column at a time is in memory; encoded columns go to mapped files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from apps.base.checks import check_name
from apps.base.progress import bar
from apps.data.array_files import ArrayWriter
from apps.data.splits import SPLITS
from apps.recsys.binary_metrics import COLD_ITEM, COLD_USER
from apps.recsys.encoding.categories import (
    MISSING,
    CategoryRows,
    Codes,
    factorize,
    to_extended,
    to_given,
    to_hashed,
    to_known,
    to_vocabulary,
)
from apps.recsys.encoding.features import (
    CategoricalFeature,
    ContinuousFeature,
    Features,
    SequenceFeature,
    Target,
    VectorFeature,
)
from apps.recsys.encoding.numbers import Part, statistics, to_numbers, to_order, vector_scale
from apps.recsys.encoding.profiles import Profile
from apps.recsys.encoding.table_encoding import Encoding, TimeRange
from apps.recsys.encoding.targets import learn_target, of_mean_one, place_labels, read_labels, to_weights
from apps.recsys.encoding.texts import text_encodings, with_vectors
from apps.recsys.encoding.thresholds import thresholds
from apps.recsys.encoding.timestamps import HOURS, WEEKDAYS, with_parts
from apps.recsys.encoding.vocabulary import Vocabulary
from apps.recsys.readers.raw import RawTables
from apps.recsys.schema import NegativesConfig, TableConfig, TaskConfig, nearest, timestamp_columns
from apps.recsys.tables.encode.checks import shared_groups
from apps.recsys.tables.encode.fits import differences
from apps.recsys.tables.encode.new_rows import ColumnWriter, Written, domain_numbers
from apps.recsys.tables.encode.notes import Notes
from apps.recsys.tables.encode.splits import Splits, split_rows
from apps.recsys.tables.rows.arrays import MultiValued

_ALL_ROWS = "(all rows)"
"""Column of ones, the label of a table whose rows are all positive."""

_WHERE = {"train": "the training table", "val": "the validation table", "test": "the test table"}


def build(
    raw: RawTables,
    config: TableConfig,
    writer: ArrayWriter,
    given: Encoding | None = None,
    extends: bool = False,
    drawn: NegativesConfig | None = None,
) -> None:
    """Encode ``raw`` by ``config``, which is its own or the user's, and finish ``writer``.

    Args:
        raw: the rows.
        config: roles of the columns, and the split.
        writer: writer of the array files.
        given: encoding of the values; None: it is learned from the training rows of ``raw``.
        extends: whether values and domains that ``given`` lacks get rows of their own after its rows, as the training
            rows of ``raw`` teach. All else is as ``given`` has it.
        drawn: rule of the items that training samples as negatives, where all rows are positives.

    Raises:
        ValueError: a column is missing or holds a value of a wrong type, a split is empty, a task has one class in
            training, training lacks a domain, a user or time is missing where rows are split by them, or the columns
            differ from ``given``. With ``drawn``: a task that is not binary, a label of 0, or no such column.
    """
    if drawn is not None:
        raw, config = _of_positives(raw, config, drawn)
    _Build(raw, config, writer, given, extends, drawn).run()


class _Build(ColumnWriter):
    """One run of ``build``: it splits the rows when it is made, and encodes them with ``run``."""

    def __init__(
        self,
        raw: RawTables,
        config: TableConfig,
        writer: ArrayWriter,
        given: Encoding | None,
        extends: bool,
        drawn: NegativesConfig | None,
    ) -> None:
        self.config, self.writer, self.given, self.extends, self.drawn = config, writer, given, extends, drawn
        files = {"train": raw.train, "val": raw.val, "test": raw.test}
        self.tables = {name: table for name, table in files.items() if table is not None}
        self._check_columns()
        self.known: dict[str, Vocabulary] = {}
        self.fixed: dict[str, Vocabulary] = {}
        self._read_parts()
        config = self.config
        self.separator = config.separator
        if given is not None:
            parts = {"timestamps": self.timestamps, "texts": tuple(self.texts)}
            if difference := next(differences(config, given, parts), None):
                raise ValueError(f"the table does not fit the checkpoint: {difference}")
        self.num_rows = sum(len(table) for table in self.tables.values())
        raw_labels = {
            name: read_labels(self.parts(task.column), name, task, None if task.mask is None else self.parts(task.mask))
            for name, task in config.tasks.items()
        }
        self.user = None if config.user is None else self._groups(config.user, "users")
        self.group = self.user if config.split.column is None else self._groups(config.split.column, "groups")
        stratify = config.split.stratify
        splits = self._split(None if stratify is None else raw_labels[stratify].values_N)
        self.masks: dict[str, NDArray[np.bool_]] = {}
        for name in SPLITS:
            self.masks[name] = np.zeros(self.num_rows, dtype=bool)
            self.masks[name][getattr(splits, name)] = True
            writer.save(name, getattr(splits, name))
        dates = {name: to_numbers(self.parts(timestamp_columns(name)[2]), name) for name in self.timestamps}
        self.notes = Notes(config, self.masks, drawn is not None, self.user, dates)
        if config.time is not None:
            with contextlib.suppress(ValueError):  # a split that needs times has rejected those without an order
                self.notes.orders[config.time] = to_order(self.parts(config.time), config.time).astype(np.float64)
        in_no_split = {f"in the gap of {config.split.gap}": splits.in_gap, "after the test window": splits.later}
        self.notes.findings.in_no_split = {where: count for where, count in in_no_split.items() if count}
        known = dict(zip(config.tasks, given.features.target_of_task, strict=True)) if given is not None else {}
        self.targets: dict[str, Target] = {
            name: known.get(name) or learn_target(name, config.tasks[name], labels, self.masks["train"])
            for name, labels in raw_labels.items()
        }
        self.labels = {name: place_labels(self.targets[name], labels) for name, labels in raw_labels.items()}
        self.unknown = {
            name: ~np.isnan(labels.values_N) & np.isnan(self.labels[name]) for name, labels in raw_labels.items()
        }
        self.vocabularies: dict[str, int] = {}
        self.profiles: dict[str, Profile] = {}
        self.num_texts = 0
        self.domain_texts: int | None = None

    def run(self) -> None:
        config = self.config
        columns = (*config.categorical, *config.multi_valued, *config.continuous, *config.sequences)
        with bar("columns of the table", len(columns)) as self._shown:
            self._run(config)

    def _run(self, config: TableConfig) -> None:
        positives = self._write_labels()
        self.notes.later_dates()
        self._write_weights()
        targets = tuple(self.targets.values())
        if self.user is not None:
            self.writer.save("group", self.user)
        if self.group is not None and config.split.kind in ("user", "group"):
            groups = {name: self.group[mask] for name, mask in self.masks.items()}
            self.notes.warnings += shared_groups(groups, config.split.kind)
        self._write_cold()
        num_domains = 0 if config.domain is None else self._write_domain(config.domain)
        categorical = tuple(self._write_categorical())
        if self.drawn is not None:
            (num_items,) = (f.num_rows - 1 for f in categorical if f.name == self.drawn.column)
            positives = (self.drawn.start(num_items),) * len(positives)
        features = Features(
            categorical=categorical,
            continuous=tuple(self._write_continuous()),
            vectors=tuple(self._write_vectors()),
            sequences=tuple(self._write_sequences()),
            tasks=tuple(config.tasks),
            positives=positives,
            num_domains=num_domains,
            targets=() if all(target.kind == "binary" for target in targets) else targets,
        )
        self.notes.repeated()
        if self.given is None and config.numbers is not None:
            features = replace(features, numbers=self._encoding_of_numbers(config.numbers, features))
        if self.given is not None:
            own, features = features, self.given.features
            if self.extends:
                features = replace(
                    features, categorical=own.categorical, sequences=own.sequences, num_domains=num_domains
                )
        self.writer.finish(
            {
                "features": asdict(features),
                "findings": asdict(self.notes.findings),
                "vocabularies": self.vocabularies,
                "domain": {"column": config.domain, "texts": self.domain_texts},
                "separator": config.separator,
                "timestamps": self._times(),
                "texts": {column: asdict(text) for column, text in self.texts.items()},
                "profiles": {column: asdict(profile) for column, profile in self.profiles.items()},
                "split_seed": config.split.seed,
            }
        )

    # ---- before the split

    def _check_columns(self) -> None:
        for split, table in self.tables.items():
            for column, role in self.config.roles.items():
                if column not in table.column_names:
                    raise ValueError(
                        f"column {column!r} ({role}) is not in {_WHERE[split]}{nearest(column, table.column_names)}"
                    )
            if not len(table):
                raise ValueError(f"{_WHERE[split]} has no rows")

    def _read_parts(self) -> None:
        """Put the parts of timestamps and the vectors of texts into the tables and the description."""
        self.timestamps, texts = self.config.timestamps, self.config.texts
        self.times = {} if self.given is None else self.given.timestamps
        self.texts = (
            text_encodings(texts) if self.given is None or {*self.given.texts} != {*texts} else self.given.texts
        )
        self.tables = {s: with_vectors(table, self.texts, _WHERE[s]) for s, table in self.tables.items()}
        times = {column: self.times.get(column) for column in self.timestamps}
        for split, table in self.tables.items():  # training comes first: its dates and seconds are those of all
            self.tables[split] = own = with_parts(table, times, _WHERE[split])
            times = {c: times[c] or _range(own[timestamp_columns(c)[2]].to_numpy()) for c in times}
        self.config = self.config.with_parts()
        for hour, weekday, _ in map(timestamp_columns, self.timestamps):
            self.fixed |= {hour: Vocabulary.of(pa.array(HOURS)), weekday: Vocabulary.of(pa.array(WEEKDAYS))}

    def parts(self, column: str) -> list[Part]:
        return [(_WHERE[name], table.column(column)) for name, table in self.tables.items()]

    def _groups(self, column: str, what: str) -> NDArray[np.int64]:
        codes = factorize(self.parts(column), column).codes
        if (codes == MISSING).any():
            row = int(np.argmax(codes == MISSING))
            raise ValueError(f"column {column!r} names the {what}, but has no value in row {row}")
        return codes

    def _split(self, label: NDArray[np.float64] | None) -> Splits:
        config = self.config.split
        time = None
        if config.kind in ("time", "leave_last_out") and self.config.time is not None:
            parts = self.parts(self.config.time)
            time = to_order(parts if config.gap is not None else parts[:1], self.config.time)
        num = {name: len(table) for name, table in self.tables.items()}
        first = slice(0, num["train"])
        return split_rows(
            config,
            num["train"],
            num.get("val"),
            num.get("test"),
            group=None if self.group is None else self.group[first],
            time=time,
            label=None if label is None else label[first],
            time_name=self.config.time or "",
        )

    # ---- after it

    def _write_labels(self) -> tuple[float, ...]:
        """Write the labels, and return each task's share of positive ones in training; 0.5 where it is not binary."""
        matrix = self.writer.create("label", (self.num_rows, len(self.labels)), np.float32)
        positives = []
        for t, (name, label) in enumerate(self.labels.items()):
            matrix[:, t] = label
            positives.append(self.notes.labels(name, self.targets[name], label, self.unknown[name]))
        return tuple(positives)

    def _times(self) -> Mapping[str, TimeRange]:
        """Return the earliest and the latest time of the training rows by column, in days since 1970."""
        if self.given is not None and not self.extends:
            return self.times
        times: dict[str, TimeRange] = {}
        for column in self.timestamps:
            days_N = to_numbers(self.parts(timestamp_columns(column)[2]), column)[self.masks["train"]]
            times[column] = _range(np.append(self.times.get(column) or [], days_N))
        return times

    def _write_weights(self) -> None:
        """Write the weights of the rows by task, of mean 1 over a task's labeled training rows."""
        columns = {name: task.weight or self.config.weight for name, task in self.config.tasks.items()}
        if not any(columns.values()):
            return
        matrix = self.writer.create("weight", (self.num_rows, len(columns)), np.float32)
        for t, (name, column) in enumerate(columns.items()):
            matrix[:, t] = 1.0
            if column is not None:
                labeled = self.masks["train"] & ~np.isnan(self.labels[name])
                matrix[:, t] = of_mean_one(to_weights(self.parts(column), column), column, name, labeled)

    def _write_cold(self) -> None:
        """Write the sum, for each row, of the flags of what has no row in training: its user, its item."""
        cold_N = np.zeros(self.num_rows, np.uint8)
        item = self.config.item
        items = None if item is None else factorize(self.parts(item), item).codes
        for flag, codes in ((COLD_USER, self.user), (COLD_ITEM, items)):
            if codes is not None:
                has_row = np.zeros(codes.max(initial=0) + 2, dtype=bool)
                has_row[codes[self.masks["train"]]] = True
                has_row[MISSING] = True  # nobody is not a new user
                cold_N[~has_row[codes]] += flag
        if cold_N.any():
            self.writer.save("cold", cold_N)

    def _write_domain(self, column: str) -> int:
        codes = factorize(self.parts(column), column)
        known = None if self.given is None else self.given.domains
        encoded, domains = self._encode_by(known, codes, f"domain {column}", self.masks["train"])
        self.writer.save("domain", domain_numbers(codes, encoded.rows, column))
        self.domain_texts = self._write_texts(domains)
        return encoded.num_rows - 1

    def _write_categorical(self) -> Iterator[CategoricalFeature]:
        config = self.config
        for own in self.write_single(config.categorical):
            self.notes.single(own.column, own.codes.codes, own.rows.unseen)
            self.profiles[own.column] = Profile.of_categories(*own.categories(self.masks["train"]))
            self._shown.advance()
            yield CategoricalFeature(own.column, own.rows.num_rows, False, own.column in config.hash_rows)
        for own in self.write_lists(dict.fromkeys(config.multi_valued)):
            self._note_lists(own)
            yield CategoricalFeature(own.column, own.rows.num_rows, True, own.column in config.hash_rows)

    def _write_sequences(self) -> Iterator[SequenceFeature]:
        for own in self.write_lists(self.config.sequences):
            sequence = self.config.sequences[own.column]
            if own.num_longer:
                self.notes.warnings.append(
                    f"column {own.column!r}: {own.num_longer:,} of {self.num_rows:,} rows have more than "
                    f"length={sequence.length} values; the last ones are read"
                )
            self._note_lists(own)
            hashed = (sequence.items or own.column) in self.config.hash_rows
            yield SequenceFeature(own.column, own.rows.num_rows, sequence.length, sequence.items, hashed)

    def _note_lists(self, own: Written) -> None:
        assert own.lengths is not None
        self.notes.column(own.column, own.lengths == 0, own.rows.unseen, own.lengths)
        self.notes.leak(own.column, MultiValued(own.codes.codes, own.lengths).sets_N())
        self.profiles[own.column] = Profile.of_categories(*own.categories(self.masks["train"]))
        self._shown.advance()

    def rows_of(self, column: str, items: str, codes: Codes, lengths: NDArray[np.int64] | None) -> CategoryRows:
        config, train, row = self.config, self.masks["train"], np.arange(self.num_rows)
        if lengths is not None:
            train, row = np.repeat(train, lengths), np.repeat(row, lengths)
        if items in self.known:  # a sequence of a column's items
            return to_known(codes, self.known[items])
        if items in config.num_rows:
            return to_given(codes, train, config.num_rows[items], column, row)
        if items in config.hash_rows:
            return to_hashed(codes, train, config.hash_rows[items])
        known = self.fixed.get(items) if self.given is None else self.given.vocabularies[items]
        encoded, vocabulary = self._encode_by(known, codes, f"column {items}", train, config.min_count)
        self.vocabularies[items], self.known[items] = self._write_texts(vocabulary), vocabulary
        return encoded

    def _encode_by(
        self, known: Vocabulary | None, codes: Codes, what: str, train: NDArray[np.bool_], min_count: int = 1
    ) -> tuple[CategoryRows, Vocabulary]:
        """Return the rows of a column's values and its vocabulary: ``known``, learned, or extended."""
        if known is None:
            encoded = to_vocabulary(codes, train, min_count)
            return encoded, Vocabulary.of(encoded.values)
        if not self.extends:
            return to_known(codes, known), known
        encoded = to_extended(codes, train, known, min_count)
        if added := encoded.num_rows - 1 - len(known):
            self.notes.findings.added[what] = added
        return encoded, known.extended(encoded.values)

    def _write_texts(self, values: Vocabulary) -> int:
        """Write the text of each row from 1 on, which is read without arrow, and return the number of its files."""
        number, self.num_texts = self.num_texts, self.num_texts + 1
        self.writer.save(f"vocabulary{number}_offsets", values.offsets.numpy())
        self.writer.save(f"vocabulary{number}_bytes", values.content.numpy())
        return number

    def _write_continuous(self) -> Iterator[ContinuousFeature]:
        for column, values in self.write_numbers(self.config.continuous):
            self.notes.number(column, values)
            self._shown.advance()
            train_N = self.masks["train"]
            self.profiles[column] = Profile.of_numbers(values[train_N])
            feature = statistics(column, values[train_N])
            if self.given is None and self.config.numbers is not None:
                labels = ((target, self.labels[name][train_N]) for name, target in self.targets.items())
                feature = replace(feature, thresholds=thresholds(values[train_N], labels))
            yield feature

    def _encoding_of_numbers(self, numbers: str, features: Features) -> str:
        """Return what ``Features.numbers`` is for what ``TableConfig.numbers`` asks."""
        if numbers != "auto" or not features.continuous:
            return numbers.replace("auto", "bins")
        from apps.recsys.tables.encode.trial import better_kind  # TorchRec is not everywhere, and slow to import

        # Sampled negatives come later: before, all labels are positive. A retriever's table may have none.
        val_N = self.masks["val"] & (self.drawn is None and bool(self.targets))
        return better_kind(features, self.writer, self.masks["train"], val_N)

    def _write_vectors(self) -> Iterator[VectorFeature]:
        known = {} if self.given is None else {f.name: f.size for f in self.given.features.vectors}
        for column, vectors in self.write_vectors({c: known.get(c) for c in self.config.vectors}).items():
            self.notes.column(column, missing := np.isnan(vectors[:, 0]))
            self.notes.leak(column, np.where(missing, MISSING, 0))
            yield VectorFeature(column, vectors.shape[1], vector_scale(vectors[self.masks["train"]]))


def _range(days_N: NDArray[np.float64]) -> TimeRange:
    days_n = days_N[~np.isnan(days_N)]
    return [float(days_n.min()), float(days_n.max())] if len(days_n) else None


def _of_positives(raw: RawTables, config: TableConfig, drawn: NegativesConfig) -> tuple[RawTables, TableConfig]:
    """Return a table of positives only with its description; one without a task gets the task that all rows are.

    Raises:
        ValueError: a task that is not of yes and no, a name for the task of a table that has tasks, or the items'
            column is not a categorical column with a row for each value.
    """
    column = drawn.column or ""
    check_name("negatives.column", column, config.categorical)
    for option in ("hash_rows", "num_rows"):
        if column in getattr(config, option):
            raise ValueError(f"negatives.column={column!r} is in {option}: each item must have a row of its own")
    for name, task in config.tasks.items():
        if task.kind != "binary":
            raise ValueError(
                f"negatives.kind='items' needs tasks of yes and no, and task {name!r} is of kind {task.kind!r}"
            )
    if config.tasks:
        if drawn.task is not None:
            raise ValueError(
                f"negatives.task={drawn.task!r} names the task of a table without one, and this has "
                f"{', '.join(config.tasks)}: items are sampled for all"
            )
        return raw, config

    def labeled(table: pa.Table) -> pa.Table:
        return table.append_column(_ALL_ROWS, pa.array(np.ones(len(table), np.int8)))

    val, test = (None if table is None else labeled(table) for table in (raw.val, raw.test))
    config = replace(config, tasks={drawn.task or "positive": TaskConfig(_ALL_ROWS)})
    return RawTables(labeled(raw.train), val, test, config), config
