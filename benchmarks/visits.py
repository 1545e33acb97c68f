"""What a model that was trained beside drawn items gives all items of some test rows.

    moesaic fit --config configs/recsys/movielens_1m_visits.yaml
    python benchmarks/visits.py runs/movielens_1m_visits

It prints the AUC among the test's drawn rows of the number of an item's training rows as a score; then, for ``--rows``
test rows at equal steps, the sum of the model's probabilities over all items, which is 1 for a model whose
probabilities are right, and the recall of the row's own item by the model and by these numbers. Items that the row's
user has in training are no candidates; ties go against the row's own item.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import apps
from apps.base.machine import machine_line
from apps.demonstrate.command import data_of
from apps.recsys.binary_metrics import auc
from apps.recsys.retrieval.columns import column_of
from apps.report.base import spread_places


def rank_among(scores_I: Tensor, own: int, seen: Tensor) -> int:
    """Return the rank of an item by scores of all items, without those of ``seen``; ties stand before it."""
    candidate_I = torch.ones(len(scores_I), dtype=torch.bool)
    candidate_I[seen] = False
    candidate_I[own] = True
    return int((scores_I[candidate_I] >= scores_I[own]).sum())


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run of a MultiTaskRecommender with data.negatives.kind: items")
    parser.add_argument("--rows", type=int, default=400)
    args = parser.parse_args(argv)
    model = apps.load(args.run)
    data: Any = data_of(args.run / "config.yaml", model)
    items, test = data.items, data.rows("test")
    count_I = items.count_I.double()
    drawn = data.examples("test")[:]
    print(machine_line())
    popularity = count_I[column_of(drawn, data.features, items.column)]
    print(f"AUC of the number of training rows: {auc(popularity.numpy(), drawn.label_Bt[:, 0].numpy()):.4f}")

    index = test.index[torch.tensor(spread_places(len(test), args.rows))]
    rows, known = items.table_rows(test, index), (items.count_I > 0).nonzero()[:, 0]
    train = data.opened["train"]
    user_N, item_N = data.opened["group"][train], items.of_rows(train)
    sums, ranks = [], {"model": [], "training rows": []}
    for row, own in zip(index, items.of_rows(index).tolist(), strict=True):
        z = model(rows.batch(row.expand(len(known)), items.row_I[known]))[:, 0]
        sums.append(float(z.double().sigmoid().sum()))
        score_I = torch.full((len(count_I),), -torch.inf, dtype=torch.float64)
        score_I[known] = z.double()
        seen = item_N[user_N == data.opened["group"][row]]
        for name, own_I in (("model", score_I), ("training rows", count_I)):
            ranks[name].append(rank_among(own_I, own, seen))
    low, high = np.quantile(sums, [0.1, 0.9])
    what = f"sum of the probabilities of {len(known):,} items"
    print(f"{what}: mean {np.mean(sums):.3f}, 10 to 90 % {low:.3f} to {high:.3f}")
    for name, of_rows in ranks.items():
        recalls = ", ".join(f"recall@{k} {np.mean(np.array(of_rows) <= k):.3f}" for k in (10, 50, 100))
        print(f"{name}: {recalls}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
