"""``RawTables``, the tables that a dataset reader returns."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from apps.recsys.schema import TableConfig


@dataclass(frozen=True)
class RawTables:
    """A dataset as read, before anything is learned from it.

    Attributes:
        train: all rows, or the training rows where the files give a split.
        val, test: rows of those splits; None if the files do not give them.
        config: the dataset's own description of its columns, tasks and protocol.
    """

    train: pa.Table
    val: pa.Table | None
    test: pa.Table | None
    config: TableConfig
