"""Permutation importance: how much of a task's test metric is lost when the values of a column are shuffled."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.base.progress import bar
from apps.recsys.encoding.features import Features
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.schema import timestamp_columns
from apps.recsys.tables.outputs import values_by_task
from apps.recsys.tables.rows.batch import Ragged, TableBatch
from apps.report.intervals import mean_interval
from core.convert.read.calls import evaluating

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
        importance: the metric of the rows as they are, minus that with the column shuffled; the mean of the shuffles.
        ci95: half the width of its 95 % interval over the shuffles.
        rows: number of rows in which values are shuffled.
    """

    column: str
    task: str
    metric: str
    importance: float
    ci95: float | None
    rows: int


def importances(model: Any, data: Any, most: int = SAMPLE) -> list[Importance]:
    """Return the importance of each column for each task, the most important columns (over all tasks) first.

    Tasks whose metric a sample cannot determine are left out.

    Args:
        model: a trained ``MultiTaskRecommender``.
        data: its data, which are set up; rows at equal steps over the test split are used.
        most: number of these rows at most.
    """
    rows = data.examples("test")
    places = np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)
    batch = rows.__getitems__(places.tolist()).to(model.device)
    with torch.no_grad(), evaluating(model):  # the kernels of sharded tables have no inference mode
        return shuffled_importances(model, batch, columns_of(model.encoding))


def columns_of(encoding: Encoding) -> dict[str, set[str]]:
    """Return the features that come from each column of the table."""
    features, columns = encoding.features, dict[str, set[str]]()
    part_of = {part: column for column in encoding.timestamps for part in timestamp_columns(column)}
    names = [f.name for f in (*features.single, *features.several)] + [f.name for f in features.continuous]
    for name in (*names, *(f.name for f in features.vectors)):
        columns.setdefault(part_of.get(name, name), set()).add(name)
    if encoding.domain is not None:
        columns.setdefault(encoding.domain, set()).add(_DOMAIN)
    return columns


def shuffled_importances(model: Any, batch: TableBatch, columns: Mapping[str, Collection[str]]) -> list[Importance]:
    """Return the importance of ``columns``, given by the features that come from each, in the rows of a batch."""
    generator = torch.Generator().manual_seed(0)  # the same run says the same
    whole = {key: score for key, score in _scores(model, batch).items() if not math.isnan(score)}
    found = dict[str, list[Importance]]()
    with bar("importance of the columns", len(columns)) as shown:
        for column, names in columns.items():
            orders = [torch.randperm(len(batch), generator=generator).to(model.device) for _ in range(SHUFFLES)]
            scores = [_scores(model, shuffled(batch, model.features, names, order)) for order in orders]
            losses = {key: mean_interval([score - own[key] for own in scores]) for key, score in whole.items()}
            found[column] = [Importance(column, *k, x.mean, x.half_width, len(batch)) for k, x in losses.items()]
            shown.advance()
    by_column = sorted(found.values(), key=lambda own: -sum(one.importance for one in own))
    return [one for own in by_column for one in own]


def _scores(model: Any, batch: TableBatch) -> dict[tuple[str, str], float]:
    """Return the main metric of each task, by its name and the metric's."""
    out = model.task_loss(batch)
    z_BZ, label_Bt = out.outputs.float().cpu(), out.targets.cpu().numpy()
    values = values_by_task(model.features.tasks, model.outputs, z_BZ, label_Bt)
    return {(task, metric): float(values_B.mean()) for task, (metric, values_B) in values.items()}


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
