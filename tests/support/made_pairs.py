"""A table of users and the films that they rated, small enough to count by hand, and a model of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import torch

import core

# Each user's last row tests and the one before validates. Training has 9 rows, of which 6 are liked:
# ann Alien, ann Brazil, bob Alien, bob Dune, cy Dune, cy Casablanca. The years are those of the films' rows.
ROWS = [
    ("ann", 30, "Alien", "sci-fi|horror", 1979, 5),
    ("ann", 30, "Brazil", "sci-fi", 1985, 4),
    ("ann", 31, "Casablanca", "drama", 1942, 1),
    ("ann", 31, "Dune", "sci-fi", 1984, 5),  # validates
    ("ann", 31, "Eraserhead", "horror", 1977, 4),  # tests; training lacks the film
    ("bob", 40, "Alien", "sci-fi|horror", 1979, 4),
    ("bob", 40, "Dune", "sci-fi", 1984, 5),
    ("bob", 40, "Brazil", "sci-fi", 1985, 2),
    ("bob", 40, "Casablanca", "drama", 1942, 2),  # validates, and is not liked
    ("bob", 40, "Casablanca", "drama", 1942, 4),  # tests
    ("cy", 50, "Dune", "sci-fi", 1984, 4),
    ("cy", 50, "Casablanca", "drama", 1943, 5),
    ("cy", 50, "Fargo", "", 1996, 3),
    ("cy", 50, "Brazil", "sci-fi", 1985, 5),  # validates
    ("cy", 50, "Alien", "sci-fi|horror", 1979, 5),  # tests
]
NAMES = ("user", "age", "film", "genres", "year", "stars")
TABLE: dict[str, Any] = {
    "categorical": ["user", "film"],
    "multi_valued": ["genres"],
    "continuous": ["age", "year"],
    "tasks": {"like": {"column": "stars", "at_least": 4}},
    "user": "user",
    "split": {"kind": "leave_last_out"},
}
SIDES: dict[str, Any] = {"item_column": "film", "item_columns": ["film", "genres", "year"], "positive": "like"}
FILMS = ("Alien", "Brazil", "Casablanca", "Dune", "Fargo")
"""The catalog, in the order of the table's rows."""
MOE = core.MoEConfig(num_experts=4, router=core.TokenChoice(top_k=2), expert=core.FFN(hidden_dim=8))


def columns(rows: list[tuple[Any, ...]] = ROWS) -> dict[str, list[Any]]:
    """Return rows as columns."""
    return {name: list(values) for name, values in zip(NAMES, zip(*rows, strict=True), strict=True)}


def options(folder: Path, **changed: Any) -> dict[str, Any]:
    """Write the table, and return the arguments of a ``RetrievalData`` of it."""
    pa.csv.write_csv(pa.table(columns()), folder / "rated.csv")
    files = {"dataset": "table", "train_file": str(folder / "rated.csv"), "cache_dir": str(folder / "cache")}
    return {**files, "table": TABLE, **SIDES, "batch_size": 4, **changed}


def made_pairs(folder: Path, **changed: Any) -> Any:
    """Return the table's data."""
    from apps.recsys.retrieval.data import RetrievalData

    return RetrievalData(**options(folder, **changed))


def retriever(data: Any, moe: core.MoEConfig | None = MOE, **changed: Any) -> Any:
    """Return an untrained model of the data, the same each time."""
    from apps.recsys.retrieval.model import TowerConfig
    from apps.recsys.retrieval.module import TwoTowerRetriever
    from apps.recsys.tables.columns.embedding import EmbeddingConfig

    torch.manual_seed(0)
    sizes = {"tower": TowerConfig(dim=4, width=8, hidden_dim=16), "embedding": EmbeddingConfig(dim=4, init_std=1.0)}
    described = (data.user_features, data.item_features, data.num_items)
    return TwoTowerRetriever(*described, **{**sizes, "moe": moe, "ks": (1, 3), **changed})
