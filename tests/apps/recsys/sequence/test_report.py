"""The report of a next-item model: groups by hand, the experts' items, and what a test leaves."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from quiet_trainer import quiet_trainer

import core
from apps.recsys.ranks import popularity_groups
from apps.recsys.sequence.data import HistoryBatch, HistoryData
from apps.recsys.sequence.model import HistoryModelConfig
from apps.recsys.sequence.module import NextItemRecommender
from apps.recsys.sequence.report import (
    BACK,
    NextItemReportConfig,
    NextItemUse,
    User,
    users_table,
    write_ranks,
)
from apps.report.page import HeatmapChart, Table, load_sections

SASREC = HistoryModelConfig(dim=8, depth=2, num_heads=2, hidden_dim=16, dropout=0.0, mixing="attention")
MOE = core.MoEConfig(num_experts=4, router=core.TokenChoice(top_k=2), expert=core.FFN(hidden_dim=8))


def recommender(num_items=9, max_length=6, moe=MOE, **options):
    torch.manual_seed(0)
    return NextItemRecommender(num_items, max_length, SASREC, moe, **options)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def made_use(ranks, targets, lengths, group_V=None):
    users = [User(i, (1, 2), t, r, (3,)) for i, (r, t) in enumerate(zip(ranks, targets, strict=True))]
    return NextItemUse(group_V, None, users, list(lengths))


def test_items_are_grouped_by_their_share_and_the_metrics_of_groups_are_by_hand(tmp_path):
    # Item 2 makes up half of 8 interactions, item 1 a quarter, items 3 and 4 an eighth; item 5 trains never.
    assert popularity_groups(np.array([0, 2, 4, 1, 1, 0])).tolist() == [4, 2, 0, 3, 3, 4]
    use = made_use([1, 2, 11], [1, 1, 2], [3, 3, 9], group_V=np.array([4, 0, 3]))
    section = write_ranks(use, (5,), tmp_path)
    popular, least = rows(tmp_path / "popularity.csv")
    assert (popular["popularity"], popular["users"], float(popular["recall_10"])) == ("most popular", "2", 1)
    assert float(popular["ndcg_10"]) == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert float(popular["mrr"]) == pytest.approx(0.75)
    assert (least["popularity"], float(least["recall_10"]), float(least["median_rank"])) == ("least popular", 0.0, 11.0)
    assert [row["items"] for row in rows(tmp_path / "lengths.csv")] == ["1-5", "over 5"]
    by_popularity, bars, *_ = section.parts
    assert by_popularity.rows[1] == ("least popular", "1", "0.00", "0.00", "9.09", "11")
    assert bars.summary == ("Recall@10 is highest for most popular, 100.0 %, and lowest for least popular, 0.0 %.")


def test_each_expert_s_items_are_counted_by_popularity_and_by_place():
    module = recommender().eval()
    items = torch.tensor([[3, 1, 4, 1, 5, 6], [9, 2, 6, 0, 0, 0], [7, 0, 0, 0, 0, 0]])
    targets = torch.zeros_like(items)
    targets[[0, 1], [5, 2]] = torch.tensor([9, 5])
    use = NextItemUse.of(module, np.array([0, 1, 1, 1, 1, 1, 1, 1, 1, 1]))
    use.add(module, HistoryBatch(items, targets, torch.arange(3), torch.arange(3)))
    assert list(use.use.counts["popularity"]) == ["block 0", "block 1"]
    # The quarters are items 1 to 3, 4 and 5, 6 and 7, 8 and 9. Two experts an item; 3 last items, and 6 before them.
    for counts in use.use.counts["popularity"].values():
        assert counts.sum(1).tolist() == [2 * n for n in (4, 2, 3, 1, 0)]
    for counts in use.use.counts["place in the history"].values():
        assert counts.sum(1).tolist() == [2 * n for n in (3, 6, 1, 0, 0)]
    assert len(BACK) == 4
    # The third history has no next item.
    assert [(u.user, u.history, u.target) for u in use.users] == [(0, (3, 1, 4, 1, 5, 6), 9), (1, (9, 2, 6), 5)]
    with torch.no_grad():
        scores_BI = module(items[:2])
    assert [u.best[0] for u in use.users] == scores_BI.argmax(1).tolist()


def test_a_user_is_shown_by_name_and_no_item_that_it_had():
    module = recommender(exclude_seen=True).eval()
    use = NextItemUse.of(module, None)
    items, targets = torch.tensor([[3, 1, 4, 2, 5, 6]]), torch.tensor([[0, 0, 0, 0, 0, 9]])
    use.add(module, HistoryBatch(items, targets, torch.tensor([0]), torch.tensor([0])))
    assert sorted(use.users[0].best) == [7, 8, 9]

    class Named:
        item_names = ("", "tea", "rye", "fig")
        user_names = ("ann", "bob")

    (row,) = users_table([User(1, (1, 2), 3, 4, (3, 1))], Named()).rows
    assert row == ("bob", "tea · rye", "fig", "4", "fig · tea")
    assert users_table([User(1, (1, 2), 3, 4, (3, 1))], None).rows[0][:2] == ("1", "1 · 2")


@pytest.fixture
def clicks(tmp_path) -> HistoryData:
    """Twelve users with four to nine clicks among ten items."""
    draw = np.random.RandomState(0)
    lines = [
        f"u{user},i{item},{time}"
        for user in range(12)
        for time, item in enumerate(np.minimum(draw.geometric(0.3, 4 + user % 6), 10))
    ]
    (tmp_path / "clicks.csv").write_text("user,item,time\n" + "\n".join(lines) + "\n")
    return HistoryData("table", file=str(tmp_path / "clicks.csv"), max_length=8)


def test_training_counts_leave_out_what_is_held_out(clicks):
    counts = clicks.training_counts
    assert counts.sum() == sum(2 + user % 6 for user in range(12))  # all but two clicks of each user
    assert counts[0] == 0
    # A user's training examples have each item but the first as a target.
    targets = torch.cat([clicks.examples("train")[i].targets_BS.flatten() for i in range(12)])
    first = [int(clicks.histories.item_N[start]) for start in clicks.histories.offsets[:-1]]
    assert (
        np.bincount(targets[targets > 0], minlength=len(counts)).tolist()
        == (counts - np.bincount(first, minlength=len(counts))).tolist()
    )


def test_a_test_leaves_ranks_experts_and_users_and_a_dense_model_no_experts(clicks, tmp_path):
    module = recommender(clicks.num_items, 8, report=NextItemReportConfig(samples=2))
    trainer = quiet_trainer(tmp_path)
    (metrics,) = trainer.test(module, clicks, verbose=False)
    folder = tmp_path / "report"
    for name in ("popularity", "lengths"):
        own = rows(folder / f"{name}.csv")
        assert sum(int(row["users"]) for row in own) == 12
        mean = sum(int(row["users"]) * float(row["ndcg_10"]) for row in own) / 12
        assert mean == pytest.approx(metrics["test/ndcg_10"], rel=1e-5)
    assert {p.name for p in folder.iterdir()} == {
        "popularity.csv", "lengths.csv", "expert_popularity.png", "expert_place.png", "sections.json"
    }  # fmt: skip
    ranks, experts, users = load_sections(folder)
    assert [s.title for s in (ranks, experts, users)] == [
        "Ranks of the next items", "What the experts are used for", "Users"
    ]  # fmt: skip
    maps = [part for part in experts.parts if isinstance(part, HeatmapChart)]
    assert [m.row_title for m in maps] == ["popularity"] * 2 + ["place in the history"] * 2
    (table,) = users.parts
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == [clicks.user_names[place] for place in (3, 9)]
    module = recommender(clicks.num_items, 8, moe=None, report=NextItemReportConfig(samples=0, routing_examples=5))
    quiet_trainer(tmp_path).test(module, clicks, verbose=False)
    assert [s.title for s in load_sections(tmp_path / "report")] == ["Ranks of the next items"]
