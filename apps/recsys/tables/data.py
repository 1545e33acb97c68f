"""``TableData``: the standard tables, your own CSV or Parquet file, and synthetic tasks of a chosen correlation.

A table is read and encoded once, into memory-mapped array files in the cache; a batch is an indexed read of them, so no
worker process is needed. The order of an epoch depends only on (seed, epoch): `apps.data.loader.ResumableLoader`
restores it in mid-epoch. pyarrow is imported where it is used.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from apps.base.checks import check_at_least, check_name
from apps.base.messages import unknown_name
from apps.data.array_files import ArrayFiles, ArrayWriter
from apps.data.datasets import prepare
from apps.data.loader import as_it_is
from apps.data.splits import SPLITS, Split
from apps.data.store import EncodedStore, identity
from apps.data.suite_data import SuiteData
from apps.recsys.datasets import RECSYS_DATASETS
from apps.recsys.encoding.features import Features
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.readers.synthetic import SyntheticConfig, generate
from apps.recsys.schema import NegativesConfig, SplitConfig, TableConfig
from apps.recsys.tables.encode.findings import TableFindings
from apps.recsys.tables.negatives.sampled_items import FixedDraws, Items, RowsWithItems
from apps.recsys.tables.negatives.sampled_rows import SampledPlan, SampledRows
from apps.recsys.tables.rows.rows import TableRows
from apps.report.base import Report
from core.config.plain import from_plain

if TYPE_CHECKING:
    from apps.recsys.readers.raw import RawTables
    from apps.recsys.tables.rows.streaming import FileRows

log = logging.getLogger(__name__)

_STORE = EncodedStore("tables", version=2)
_FILE_OPTIONS = ("train_file", "val_file", "test_file")


class TableData(SuiteData):
    """A table in train, validation and test batches of `TableBatch`.

    ``table``, ``split`` and ``synthetic`` may also be given as mappings, as in YAML.

    Args:
        dataset: census_income, movielens_1m, ... (`moesaic data list`); table: your own file; synthetic: synthetic
            tasks.
        root: folder with your own copy of the dataset's files; nothing is downloaded then. With "table": the folder
            from which the file names start, by default the one you are in.
        cache_dir: folder for downloads and encoded tables; default ~/.cache/moesaic.
        train_file: file of your table: .parquet, .csv or .tsv; a pattern such as "part-*.parquet" takes all that match.
        val_file: file of validation rows, if they have a file of their own.
        test_file: file of test rows, likewise.
        predict_file: file of rows to predict instead of the test rows; it needs only the features' columns. They are
            encoded with the checkpoint's encoding, and no other file is read.
        predict_columns: columns of ``predict_file``, or else of the table, that each prediction repeats, such as a key.
        table: columns, tasks and split of your table, or of a standard dataset instead of its own description.
        split: rule for which rows train, validate and test, instead of the description's.
        exclude: features to leave out.
        synthetic: sizes and distributions of the synthetic tasks.
        batch_size: training rows per step and process.
        eval_batch_size: rows per step and process in validation and test.
        subset: number of training rows to use, sampled by split.seed. Values with a row, means and the like are still
            learned from all of them.
        negatives: how many of a task's negative rows train in an epoch, resampled for each; or, for a table of
            positives only, how many other items are sampled for each row. None: all rows train as they are.
        domain: column of the domain, instead of the description's.
        kwargs: ``drop_last``, ``num_workers`` and ``seed`` of ``SuiteData``. ``num_workers`` of 0 is best: a batch
            takes a fraction of a millisecond.

    Raises:
        ValueError: the dataset is unknown (the message has the nearest name), or an option is out of its range or for
            another dataset. When the table is first needed: a column is missing or holds a value of a wrong type, a
            split is empty, a task has one class, or a file cannot be read.

    Example::

        data = TableData("census_income", batch_size=1024)
        data.features.categorical[0]    # CategoricalFeature(name='class_of_worker', num_rows=10, ...)
        batch = next(iter(data.train_dataloader()))
        batch.dense_BC, batch.single_FB, batch.label_Bt     # (1024, 7), (32, 1024), (1024, 2)
    """

    unit = "rows"
    needs_labels: ClassVar[bool] = True
    """Whether a table without tasks is rejected."""
    hold_out = "{split}_file (--data.{split}_file) or a share split.{split} (--data.split.{split}) gives it some"

    @classmethod
    def defaults_of_none(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configs that stand in for arguments that are None, as ``SparseModule.defaults_of_none`` does."""
        return {"synthetic": SyntheticConfig()} if arguments.get("dataset") == "synthetic" else {}

    def __init__(
        self,
        dataset: str = "census_income",
        root: str | None = None,
        cache_dir: str | None = None,
        train_file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        predict_columns: Sequence[str] = (),
        table: TableConfig | None = None,
        split: SplitConfig | None = None,
        exclude: Sequence[str] = (),
        synthetic: SyntheticConfig | None = None,
        batch_size: int = 1024,
        eval_batch_size: int = 4096,
        subset: int | None = None,
        negatives: NegativesConfig | None = None,
        domain: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_name("dataset", dataset, sorted([*RECSYS_DATASETS, "table", "synthetic"]))
        super().__init__(dataset, root, cache_dir, batch_size=batch_size, eval_batch_size=eval_batch_size, **kwargs)
        self.train_file, self.val_file, self.test_file = train_file, val_file, test_file
        self.predict_file, self.predict_columns = predict_file, tuple(predict_columns)
        self.table = from_plain(table, TableConfig, "table")
        self.split = from_plain(split, SplitConfig, "split")
        self.exclude = tuple(exclude)
        self.synthetic = from_plain(synthetic, SyntheticConfig, "synthetic")
        self.negatives = from_plain(negatives, NegativesConfig, "negatives")
        self.subset, self.domain = subset, domain
        self._items: Items | None = None
        self._check_options()

    # ---- for models and readers of results

    @property
    def features(self) -> Features:
        """The columns as a model needs them. The first use reads the table, or its encoding in the cache."""
        return self.encoding.features

    @property
    def encoding(self) -> Encoding:
        """The encoding of the checkpoint, or else the one learned from the training rows."""
        return self._learned if self._adopted is None else self._adopted

    @cached_property
    def _learned(self) -> Encoding:
        return Encoding.of(self.opened)

    @classmethod
    def encoding_of(cls, state: Mapping[str, Any]) -> Encoding:
        return Encoding.from_state(state)

    def extend(self, encoding_state: Mapping[str, Any]) -> None:
        """Use a checkpoint's encoding, with further rows for the values and domains that the training rows add to it.

        Means, bins, the encoding of numbers, levels and classes stay the checkpoint's.
        """
        self._extend(encoding_state)

    @property
    def findings(self) -> TableFindings:
        """Counts of the table: rows, missing and unseen values, positive shares, warnings."""
        return TableFindings(**self.opened.info["findings"])

    def vocabulary(self, column: str) -> tuple[str | None, ...]:
        """Return the value of each row of a column's table; None for row 0, which is for unseen and missing values.

        For the domain's column, if it is not a feature, return ``domain_values``.

        Raises:
            ValueError: the column has no vocabulary: it is hashed, given as row numbers, or not categorical.
        """
        vocabularies = self.encoding.vocabularies
        if column in vocabularies:
            return (None, *vocabularies[column].texts())
        if column == self.encoding.domain and all(f.name != column for f in self.features.categorical):
            return self.domain_values
        raise ValueError(unknown_name("vocabulary of column", column, list(vocabularies)))

    @property
    def domain_values(self) -> tuple[str, ...]:
        """The value of each domain, from 0 on; none where the table has one domain."""
        domains = self.encoding.domains
        return () if domains is None else domains.texts()

    def leaks(self, most: int = 20_000) -> list[str]:
        """Return findings on columns that may give a label away, in about ``most`` rows from all over the training."""
        from apps.recsys.tables.encode.checks import label_among_features
        from apps.recsys.tables.rows.arrays import join

        # Training rows of a table of positives have one label; validation rows have sampled negatives.
        rows = self.rows("train") if self._drawn is None else self.examples("val")
        return label_among_features(join([rows[:: -(-len(rows) // most)]], self.features)) if len(rows) else []

    def warnings(self) -> list[str]:
        return [*self.findings.warnings, *self.leaks()]

    def rows(self, split: str) -> TableRows:
        """Return the rows of a split in the table's order; ``rows(split)[:]`` is one batch of them all."""
        check_name("split", split, SPLITS)
        index = self.opened[split]
        if split == "train" and self.subset is not None:
            index = self._subset(index, self.subset)
        return TableRows(self.opened, self.features, index)

    # ---- Lightning

    @property
    def needs_no_dataset(self) -> bool:
        return self._adopted is not None and self.predict_file is not None

    def check(self, stage: str | None) -> None:
        """Reject files of rows to predict that lack a column."""
        if stage == "predict" and self.predict_file is not None:
            self._rows_to_predict(self.predict_file, self.encoding).check()

    def examples(self, split: Split) -> TableRows | SampledRows | RowsWithItems | FixedDraws:
        rows = self.rows(split)
        if self._drawn is not None:
            return RowsWithItems(rows, self.items) if split == "train" else self._fixed_draws(split)
        if split != "train" or self.negatives is None:
            return rows
        return SampledRows(rows, self.negatives)

    @property
    def _drawn(self) -> NegativesConfig | None:
        """The rule for sampling items as negatives; None: no items are sampled."""
        return self.negatives if self.negatives is not None and self.negatives.kind == "items" else None

    @property
    def items(self) -> Items:
        """The items that are sampled as negatives.

        Raises:
            ValueError: see ``Items``.
        """
        assert self._drawn is not None
        if self._items is None:
            self._items = Items(self.opened, self.encoding, self._drawn)
        return self._items

    def _fixed_draws(self, split: Split) -> FixedDraws:
        return FixedDraws(self.rows(split), self.items, split, self.opened.info["split_seed"])

    def forget(self) -> None:
        super().forget()
        self._items = None

    def batching(self, examples: Any) -> dict[str, Any]:
        if self.negatives is None:
            return super().batching(examples)
        assert self.batch_size is not None
        num_processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        plan = SampledPlan(examples, self.batch_size, self.drop_last, num_processes)
        return {"plan": plan, "collate_fn": as_it_is, "draws": False}

    def sizes(self) -> dict[Split, int]:
        sizes = {split: len(self.opened[split]) for split in SPLITS}
        return sizes if self.subset is None else {**sizes, "train": self.subset}

    def announce(self) -> None:
        super().announce()
        for line in str(dataclasses.replace(self.findings, warnings=[])).splitlines()[1:]:  # the first one has the rows
            log.info("%s", line)
        if self.negatives is not None:
            log.info("%s", self.examples("train"))
        for line in self.notes.values():
            log.info("%s", line)
        if self._drawn is not None:
            for column in self.items.kept_by_positives():
                log.warning(
                    "column %r has one value for each %s and is not in negatives.item_features: a sampled row "
                    "keeps the positive's, which gives it away",
                    column,
                    self._drawn.column,
                )
        trainer = self.trainer
        if trainer is None or not trainer.testing or not any(isinstance(c, Report) for c in trainer.callbacks):
            for warning in self.findings.warnings:  # a report of the test repeats them
                log.warning("%s", warning)

    @property
    def notes(self) -> dict[str, str]:
        """A line on the rows that judge a model, by split, where these are not the table's own."""
        if self._drawn is None:
            return {}
        drawn = {split: self._fixed_draws(split) for split in ("val", "test")}
        return {split: f"{split}: {rows}" for split, rows in drawn.items() if len(rows)}

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the batches of ``predict_file``, else the test's, without items sampled for them."""
        if self.predict_file is None:
            rows = self.rows("test")
            if not len(rows):
                return self.test_dataloader()
            rows.kept = self._kept() if self.predict_columns else None
            return self.eval_loader(rows)
        new_rows = self._rows_to_predict(self.predict_file, self.encoding)
        return DataLoader(new_rows, batch_size=None, collate_fn=as_it_is)

    def _kept(self) -> dict[str, Any]:
        """Return ``predict_columns`` of all rows of the table as arrow arrays."""
        from apps.recsys.tables.rows.streaming import kept_of

        return kept_of(self._source()[1](), self.predict_columns)

    def _rows_to_predict(
        self, pattern: str, encoding: Encoding, further: Mapping[str, str] = MappingProxyType({})
    ) -> FileRows:
        """Return the rows of the files of a pattern, which carry ``predict_columns`` along, and ``further`` columns."""
        from apps.recsys.readers.user_tables import find_files
        from apps.recsys.tables.rows.streaming import FileRows

        assert self.eval_batch_size is not None
        files = find_files(self.root if self.dataset == "table" else None, pattern, "predict_file")
        place = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        kept = {**further, **dict.fromkeys(self.predict_columns, "predict_columns")}
        return FileRows(files, encoding, self.eval_batch_size, kept, *place)

    def train_eval_dataloader(self) -> DataLoader[Any]:
        """Return the training batches in the table's order, with sampled items as an evaluation has them."""
        return self.eval_loader(self.rows("train") if self._drawn is None else self._fixed_draws("train"))

    # ---- the encoded table

    def read(self) -> ArrayFiles:
        source, read = self._source()
        drawn, texts = self._drawn, {} if self.table is None else self.table.texts
        encoders: list[list[Any]] = []
        if texts:
            from apps.recsys.encoding.texts import files_of_encoders

            encoders = identity(files_of_encoders(texts))
        options: dict[str, Any] = {
            "encoders": encoders,
            "table": None if self.table is None else dataclasses.asdict(self.table),
            "split": None if self.split is None else dataclasses.asdict(self.split),
            "exclude": self.exclude,
            # others keep the names of their files
            **({} if self.domain is None else {"domain": self.domain}),
        }
        if drawn is not None:  # the rest of the rule is not a part of the encoding
            options["drawn"] = [drawn.column, drawn.task, None if drawn.correct else drawn.per_positive]

        def write(writer: ArrayWriter) -> None:
            import pyarrow as pa

            from apps.recsys.tables.encode.build import build

            raw = read()
            given = self._adopted or self._extended
            build(raw, self._config(raw.config), writer, given, given is self._extended, drawn)
            del raw
            pa.default_memory_pool().release_unused()  # arrow would keep as much as the table took

        return _STORE.open(
            self.cache,
            self.dataset,
            [source, options],
            write,
            given=self.digest_of_given,
            digest_of=lambda files: Encoding.of(files).digest,
        )

    def _source(self) -> tuple[Any, Callable[[], RawTables]]:
        """Return plain values that distinguish this table from others, and a function that reads it."""
        if self.dataset == "synthetic":
            config = self.synthetic or SyntheticConfig()
            return dataclasses.asdict(config), lambda: generate(config).tables()
        if self.dataset == "table":
            from apps.recsys.readers.user_tables import source_of

            self._check_given("train_file")
            assert self.table is not None
            files = {option: getattr(self, option) for option in _FILE_OPTIONS}
            kept = self.predict_columns if self.predict_file is None else ()
            return source_of(self.root, files, self._config(self.table), kept)
        known = RECSYS_DATASETS[self.dataset]
        root = prepare(self.dataset, self.root, self.cache_dir)
        return identity(known.files(root)), lambda: known.read(root)

    def _config(self, own: TableConfig) -> TableConfig:
        """Return the user's description, else the dataset's own, with the user's split and domain and without
        ``exclude``."""
        config = self.table or own
        if self.domain is not None:
            config = dataclasses.replace(config, domain=self.domain)
        if self.split is not None:
            config = dataclasses.replace(config, split=self.split)
        return config.without(self.exclude) if self.exclude else config

    def _subset(self, index: Tensor, size: int) -> Tensor:
        if size > len(index):
            raise ValueError(f"subset={size} exceeds the {len(index)} training rows")
        seed = self.opened.info["split_seed"]
        chosen = np.sort(np.random.RandomState(seed).permutation(len(index))[:size])
        index = index[torch.from_numpy(chosen)]
        label = self.opened["label"].index_select(0, index)
        if self._drawn is not None:  # all labels are positive
            return index
        for task, of_task in zip(self.features.tasks, label.T, strict=True):
            if len(of_task[~of_task.isnan()].unique()) < 2:
                raise ValueError(f"subset={size} leaves task {task!r} one class in the training split")
        return index

    def _check_given(self, name: str) -> None:
        if getattr(self, name) is None:
            raise ValueError(f"dataset='table' needs {name} (--data.{name})")

    def _check_options(self) -> None:
        check_at_least(1, subset=self.subset)
        if self.needs_labels and self._drawn is None and self.table is not None and not self.table.tasks:
            raise ValueError(
                "table.tasks names no label; where all rows are positives, negatives.kind 'items' draws others"
            )
        if self.dataset == "table":
            # A trained model scores only predict_file; everything else needs train_file.
            for name in ("train_file", "table") if self.predict_file is None else ("table",):
                self._check_given(name)
        else:
            for name in _FILE_OPTIONS:
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)!r} is for dataset='table', not {self.dataset!r}")
        own = ("probability_", "value_", *(() if self.predict_file is not None else ("label_",)))
        for column in self.predict_columns:
            if column == "index" or column.startswith(own):
                raise ValueError(f"predict_columns names {column!r}, which each prediction has of its own")
        if self.dataset != "synthetic" and self.synthetic is not None:
            raise ValueError(f"synthetic is for dataset='synthetic', not {self.dataset!r}")
        if self.dataset == "synthetic" and self.root is not None:
            raise ValueError(f"root={self.root!r}: dataset='synthetic' has no files")
