"""AliExpress search logs of several countries (Li et al., CIKM 2020), in the layout of the processed copies."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from apps.recsys.readers.delimited import read_delimited
from apps.recsys.readers.raw import RawTables
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig

COUNTRIES = ("NL", "ES", "FR", "US")
_CATEGORICAL = tuple(f"categorical_{i}" for i in range(1, 17))
_CONTINUOUS = tuple(f"numerical_{i}" for i in range(1, 64))
_TASKS = ("click", "conversion")


def read_aliexpress(root: Path) -> RawTables:
    """Read items on result pages, with the tasks click and conversion over all items shown (CTCVR).

    There are 16 categorical and 63 continuous inputs. The split is the files' own, by time; 10 % of train validate, at
    random with seed 0, stratified by click. Rows of one ``search_id`` are one result page: metrics by user are by page.
    Several countries make a table with the country as the domain; whether an id means the same in two countries is not
    known.

    Args:
        root: folder with ``train.csv`` and ``test.csv`` of one country, or with folders ``AliExpress_{NL,ES,FR,US}`` of
            them; the ones that are there are read. Their header is search_id, categorical_1..16, numerical_1..63,
            click, conversion.

    Raises:
        ValueError: a file is missing, truncated or not of that layout.
    """
    folders = {c: root / f"AliExpress_{c}" for c in COUNTRIES if (root / f"AliExpress_{c}").is_dir()}
    domain = "country" if folders else None
    config = TableConfig(
        categorical=_CATEGORICAL if domain is None else (*_CATEGORICAL, domain),
        continuous=_CONTINUOUS,
        tasks={task: TaskConfig(task) for task in _TASKS},
        domain=domain,
        user="search_id",
        split=SplitConfig("given", val=0.1, stratify="click", seed=0),
    )
    types = {
        "search_id": pa.int64(),
        **dict.fromkeys(_CATEGORICAL, pa.int32()),
        **dict.fromkeys(_CONTINUOUS, pa.float32()),
        **dict.fromkeys(_TASKS, pa.float32()),
    }

    def split(name: str) -> pa.Table:
        if not folders:
            return read_delimited(root / name, types)
        parts = []
        for country, folder in folders.items():
            part = read_delimited(folder / name, types)
            parts.append(part.append_column("country", pa.array([country] * part.num_rows)))
        return pa.concat_tables(parts)

    return RawTables(split("train.csv"), None, split("test.csv"), config)
