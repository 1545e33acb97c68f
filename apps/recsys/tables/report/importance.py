"""Permutation importance: how much of a task's test metric is lost when the values of a column are shuffled."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.base.evaluation import in_evaluation
from apps.base.progress import bar
from apps.recsys.encoding.features import Features
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.schema import timestamp_columns
from apps.recsys.tables.rows.batch import Ragged, TableBatch
from apps.report.intervals import Interval, mean_interval

SHUFFLES, SAMPLE = 5, 2_000
"""Shuffles of each column, and rows in which they are done. The interval is about the shuffles alone."""
_DOMAIN = ""  # no feature has this name


@dataclass(frozen=True)
class Importance:
    """What one task loses without a column.

    Attributes:
        column: the column, as the table has it: the parts of a timestamp are shuffled together.
        task: the task.
        metric: its main metric, such as "auc".
        loss: the metric of the rows as they are, minus that with the column shuffled; its interval over the shuffles.
        num_rows: rows in which values are shuffled.
    """

    column: str
    task: str
    metric: str
    loss: Interval
    num_rows: int

    def row(self) -> dict[str, Any]:
        """Return a line of a CSV file."""
        own = {"column": self.column, "task": self.task, "metric": self.metric}
        return own | {"importance": self.loss.mean, "ci95": self.loss.half_width, "rows": self.num_rows}


def importances(model: Any, data: Any, most: int = SAMPLE) -> list[Importance]:
    """Return the importance of each column for each task, the most important columns (over all tasks) first.

    Tasks whose metric a sample cannot determine are left out.

    Args:
        model: a trained ``MultiTaskRecommender``.
        data: its data, which are set up; rows at equal steps over the test split are used.
        most: number of these rows at most.

    Raises:
        ValueError: the test split has no row.
    """
    rows = data.examples("test")
    if not len(rows):
        raise ValueError("the test split has no rows whose columns could be shuffled")
    places = np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)
    batch = rows.__getitems__(places.tolist()).to(model.device)
    with torch.inference_mode(), in_evaluation(model):
        return shuffled_importances(model, batch, columns_of(model.features, getattr(data, "encoding", None)))


def columns_of(features: Features, encoding: Encoding | None = None) -> dict[str, set[str]]:
    """Return the features that come from each column of the table."""
    part_of, domain = dict[str, str](), "domain"
    if encoding is not None:
        part_of = {part: column for column in encoding.timestamps for part in timestamp_columns(column)}
        domain = encoding.domain or domain
    of_kinds = ([f.name for f in kind] for kind in (features.single, features.several, features.continuous))
    columns = dict[str, set[str]]()
    for name in (*itertools.chain.from_iterable(of_kinds), *(f.name for f in features.vectors)):
        columns.setdefault(part_of.get(name, name), set()).add(name)
    if features.num_domains:
        columns.setdefault(domain, set()).add(_DOMAIN)
    return columns


def shuffled_importances(model: Any, batch: TableBatch, columns: Mapping[str, Collection[str]]) -> list[Importance]:
    """Return the importance of ``columns``, given by the features that come from each, in the rows of a batch."""
    generator = torch.Generator().manual_seed(0)  # the same run says the same
    whole = dict(_scores(model, batch))
    found: dict[str, list[Importance]] = {}
    with bar("importance of the columns", len(columns)) as shown:
        for column, names in columns.items():
            orders = [torch.randperm(len(batch), generator=generator).to(model.device) for _ in range(SHUFFLES)]
            scores = [dict(_scores(model, shuffled(batch, model.features, names, order))) for order in orders]
            found[column] = [
                Importance(column, task, metric, mean_interval([score - s[task, metric] for s in scores]), len(batch))
                for (task, metric), score in whole.items()
            ]
            shown.advance()
    by_column = sorted(found.values(), key=lambda own: -sum(one.loss.mean for one in own))
    return [one for own in by_column for one in own]


def _scores(model: Any, batch: TableBatch) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield the main metric of each task, by its name and the metric's."""
    out = model.task_loss(batch)
    parts = zip(model.features.tasks, model.outputs.kinds, model.outputs.split(out.outputs.float().cpu()), strict=True)
    for place, (task, kind, z_Bw) in enumerate(parts):
        values_B = kind.example_values(z_Bw.numpy(), out.targets[:, place].cpu().numpy())
        if not np.isnan(values_B).any():
            yield (task, kind.main_metric), float(values_B.mean())


def shuffled(batch: TableBatch, features: Features, names: Collection[str], order_B: Tensor) -> TableBatch:
    """Return a batch in which some features have the values of other rows, of row ``order_B[b]`` in row b."""

    def columns(x: Tensor, owners: Sequence[str], dim: int) -> Tensor:
        mine = torch.tensor([name in names for name in owners], device=x.device, dtype=torch.bool)
        return torch.where(mine.unsqueeze(1 - dim), x.index_select(1 - dim, order_B), x)

    vectors = [feature.name for feature in features.vectors for _ in range(feature.size)]
    of_lists = zip(features.several, batch.lists, strict=True)
    return replace(
        batch,
        dense_BC=columns(batch.dense_BC, [f.name for f in features.continuous], 1),
        single_FB=columns(batch.single_FB, [f.name for f in features.single], 0),
        vector_BV=None if batch.vector_BV is None else columns(batch.vector_BV, vectors, 1),
        lists=tuple(_reordered(own, order_B) if f.name in names else own for f, own in of_lists),
        domain_B=batch.domain_B[order_B] if batch.domain_B is not None and _DOMAIN in names else batch.domain_B,
    )


def _reordered(own: Ragged, order_B: Tensor) -> Ragged:
    rows = own.values_N.split(own.length_B.tolist())
    return Ragged(torch.cat([rows[b] for b in order_B.tolist()]), own.length_B[order_B])
