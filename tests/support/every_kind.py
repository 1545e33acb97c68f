"""A table with a task of each kind."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from apps.recsys.schema import TableConfig, TaskConfig
from apps.recsys.tables.data import TableData


def every_kind(tmp_path):
    """A table with a task of each kind, whose labels the columns decide, with noise where it can be."""
    rng = np.random.default_rng(0)
    x, shop = rng.normal(size=(600, 2)), rng.integers(0, 3, 600)
    strength = x[:, 0] + shop - 1
    columns = {
        "x": x[:, 0], "noise": x[:, 1], "shop": [f"shop{s}" for s in shop],
        "price": 20 + 5 * strength + rng.normal(size=600), "watched": np.exp(strength + 0.3 * rng.normal(size=600)),
        "visits": rng.poisson(np.exp(strength / 2)), "stars": np.digitize(strength, (-1, 0, 1)) + 1,
        "colour": np.array(["red", "tan", "blue"])[shop], "weight": rng.integers(1, 3, 600), "bought": strength > 0,
        "spent": np.where(strength > 0, np.exp(strength + 0.3 * rng.normal(size=600)), 0.0),
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    tasks = {
        "bought": TaskConfig("bought"),
        "price": TaskConfig("price", kind="regression"),
        "watched": TaskConfig("watched", kind="regression", loss="weighted_logistic"),
        "visits": TaskConfig("visits", kind="count"),
        "stars": TaskConfig("stars", kind="ordinal"),
        "colour": TaskConfig("colour", kind="multiclass"),
        "spent": TaskConfig("spent", kind="revenue"),
        "cost": TaskConfig("spent", kind="tweedie"),
        "delay": TaskConfig("price", kind="quantile"),
    }
    config = TableConfig(("shop",), continuous=("x", "noise"), tasks=tasks, weight="weight")
    return TableData("table", str(tmp_path), str(tmp_path), train_file="table.parquet", table=config)
