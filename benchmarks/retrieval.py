"""Recall of two towers, of a ranking model that scores all items, and of both, one after the other.

    moesaic fit --config configs/recsys/movielens_1m_retrieval.yaml
    moesaic fit --config configs/recsys/movielens_1m.yaml
    python benchmarks/retrieval.py runs/movielens_1m_retrieval runs/movielens_1m

All systems rank the same pairs of the test among the same candidates: all items of the catalog, without those of the
user's training rows. "most popular" ranks them by the training pairs that have them. The ranking model scores each user
with each item, which takes most of the time: ``--pairs`` is the number of test pairs, taken at equal steps.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import apps
from apps.base.machine import machine_line
from apps.demonstrate.command import data_of
from apps.recsys.metrics import target_ranks
from apps.recsys.retrieval.catalog import Catalog
from apps.recsys.retrieval.metrics import RetrievalMetrics
from apps.recsys.retrieval.scoring import Ranking, Retrieved
from apps.recsys.tables.rows.scoring import encoding_of
from apps.report.base import spread_places


def ranks_by(scores_BI: Tensor, item_B: Tensor, seen_BH: Tensor) -> Tensor:
    """Return the rank of each pair's item by given scores of all items, as ``ItemIndex.ranks`` does."""
    scores_BV = F.pad(scores_BI, (1, 0), value=-torch.inf)  # number 0 stands for no item
    return target_ranks(scores_BV.scatter(1, seen_BH, -torch.inf), item_B)


def place_of(found: Retrieved, item_B: Tensor, rank_B: Tensor, candidates: int) -> Tensor:
    """Return the rank of each pair's item after its user's candidates were ordered anew; beyond them it stays."""
    by_user = found.by_user(found.item_N, len(item_B))
    places = [
        items.index(item) + 1 if item in items else 0 for items, item in zip(by_user, item_B.tolist(), strict=True)
    ]
    return torch.where(rank_B <= candidates, torch.tensor(places), rank_B)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("retriever", type=Path, help="run of a TwoTowerRetriever")
    parser.add_argument("ranker", type=Path, help="run of a MultiTaskRecommender")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--candidates", type=int, default=100)
    args = parser.parse_args(argv)
    model = apps.load(args.retriever)
    data: Any = data_of(args.retriever / "config.yaml", model)
    examples = data.examples("test")
    batch = examples.__getitems__(spread_places(len(examples), args.pairs))
    catalog, index = Catalog.from_state(encoding_of(model)["catalogue"]), model.index()
    ranking, item_B, seen_BH = Ranking.load(model, args.ranker), batch.item_B, batch.seen_BH
    if seen_BH is None:
        seen_BH = torch.zeros(len(batch), 1, dtype=torch.int64)
    users = data.users(batch, ranking.user_roles)

    begun = time.perf_counter()
    vectors = model.user_tower(batch.user)
    rank_B = index.ranks(vectors, item_B, seen_BH)
    seconds = {"two towers": time.perf_counter() - begun}
    ranks = {"two towers": rank_B}
    ranks["most popular"] = ranks_by(catalog.count_I.float().expand(len(batch), -1), item_B, seen_BH)

    begun = time.perf_counter()
    found = ranking.order(users, Retrieved.of(index, vectors, args.candidates, seen_BH), args.candidates)
    seconds["two towers, then the ranking model"] = time.perf_counter() - begun
    ranks["two towers, then the ranking model"] = place_of(found, item_B, rank_B, args.candidates)

    begun = time.perf_counter()
    everything = np.tile(np.arange(1, len(catalog) + 1), len(batch))
    whole = Retrieved(np.repeat(np.arange(len(batch)), len(catalog)), everything, np.zeros(len(everything), np.float32))
    ordered = ranking.order(users, whole, len(catalog))
    scores_BI = torch.empty(len(batch), len(catalog))
    scores_BI[ordered.user_N, ordered.item_N - 1] = torch.from_numpy(ordered.ranked[ranking.key].astype(np.float32))
    ranks["ranking model, all items"] = ranks_by(scores_BI, item_B, seen_BH)
    seconds["ranking model, all items"] = time.perf_counter() - begun

    print(f"{len(batch)} test pairs, {len(catalog):,} items; {machine_line()}")
    for name, rank in ranks.items():
        metric = RetrievalMetrics(model.ks)
        metric.update(rank, item_B)
        values = {key: round(float(value), 4) for key, value in metric.compute().items()}
        print(json.dumps({"system": name, **values, "seconds": round(seconds.get(name, 0.0), 2)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
