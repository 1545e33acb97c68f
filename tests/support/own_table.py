"""A table of every kind of column, by hand, and how its batches are read."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig

NAN = float("nan")


# Rows 0 to 5 train; rows 6 and 7 come from a test file.
TRAIN = {
    "city": ["Rome", "Rome", "NA", "Oslo", "", "Rome"],
    "tags": ["x|y", "", "y", "x", "y|z", "y"],
    "user": [1, 1, 2, 2, 3, 3],
    "age": ["10", "20", "", "40", "inf", "50"],
    "shop": ["de", "fr", "de", "de", "fr", "de"],
    "click": [1, 0, 1, 0, 0, 1],
    "stars": ["5", "4", "", "1", "3", "2"],
    "other": ["is", "not", "read", "at", "all", "x"],
}


TEST = {
    "city": ["Paris", "Rome"],
    "tags": ["w|x", "z"],
    "user": [1, 9],
    "age": ["30", "nan"],
    "shop": ["fr", "de"],
    "click": [1, 0],
    "stars": ["4", "1"],
    "other": ["", ""],
}


CONFIG = TableConfig(
    categorical=("city", "user"),
    multi_valued=("tags",),
    continuous=("age",),
    tasks={"click": TaskConfig("click"), "like": TaskConfig("stars", at_least=4)},
    domain="shop",
    user="user",
    hash_rows={"user": 100},
    split=SplitConfig("given", val=0),
)


def write(folder, kind="csv", train=TRAIN, test=TEST):
    for name, columns in (("train", train), ("test", test)):
        table = pa.table(columns)
        if kind == "parquet":
            pa.parquet.write_table(table, folder / f"{name}.parquet")
        else:
            pa.csv.write_csv(table, folder / f"{name}.csv")


def changed(**columns):
    return {**TRAIN, **columns}


def config_of(**options):
    roles = {"categorical": ("city",), "tasks": {"click": TaskConfig("click")}, "split": SplitConfig("given", val=0)}
    return TableConfig(**{**roles, **options})


def by_row(batch, features):
    """Return a batch as plain values, a dict for each example; a categorical column has a list of rows."""
    names = [f.name for f in (*features.single, *features.several)]
    lists = [own.values_N.split(own.length_B.tolist()) for own in batch.lists]
    columns = [*batch.single_FB[:, :, None], *lists]
    return [
        {
            "index": int(batch.index_B[b]),
            "dense": batch.dense_BC[b].tolist(),
            "label": batch.label_Bt[b].tolist(),
            "domain": None if batch.domain_B is None else int(batch.domain_B[b]),
            "group": None if batch.group_B is None else int(batch.group_B[b]),
            **{name: rows[b].tolist() for name, rows in zip(names, columns, strict=True)},
        }
        for b in range(len(batch))
    ]


def same(a, b):
    # NaN differs from itself; its text does not
    return repr(a) == repr(b)
