"""A retriever's exact search against a slow loop, its loss by hand, and its report."""

import csv
import math

import numpy as np
import pytest
import torch
from made_pairs import made_pairs, retriever
from quiet_trainer import quiet_trainer
from refusals import refused
from torch.testing import assert_close

from apps.recsys.encoding.vocabulary import whole_numbers
from apps.recsys.retrieval import index as module
from apps.recsys.retrieval.index import ItemIndex
from apps.recsys.retrieval.loss import log_probability, sampled_softmax
from apps.recsys.retrieval.metrics import RetrievalMetrics
from apps.recsys.retrieval.report import RetrievalUse, pairs_table, write_ranks
from apps.report.page import load_sections

USERS, ITEMS, DIM = 7, 23, 5


@pytest.fixture
def made_index():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(ITEMS, DIM, generator=generator)
    query = torch.randn(USERS, DIM, generator=generator)
    seen = torch.randint(0, ITEMS + 1, (USERS, 4), generator=generator)
    own = torch.randint(1, ITEMS + 1, (USERS,), generator=generator)
    own[2], own[3] = 0, seen[3].max()  # one that the catalog lacks, and one that is no candidate
    return ItemIndex([f"i{n}" for n in range(1, ITEMS + 1)], vectors), query, seen, own


def slow_search(index, query, seen):
    """Return the candidates of each user with their products, the best first."""
    ranking = []
    for vector, not_these in zip(query.tolist(), seen.tolist(), strict=True):
        pairs = []
        for number, item in enumerate(index.vectors_ID.tolist(), 1):
            if number not in not_these:
                pairs.append((sum(a * b for a, b in zip(vector, item, strict=True)), number))
        ranking.append(sorted(pairs, reverse=True))
    return ranking


@pytest.mark.parametrize("elements", [1, 50, 10**6])
def test_search_and_ranks_are_those_of_a_slow_loop(made_index, elements, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)  # a user, two users, and all users at a time
    index, query, seen, own = made_index
    items, scores = index.search(query, 6, seen)
    ranking = slow_search(index, query, seen)
    assert items.tolist() == [[number for _, number in row[:6]] for row in ranking]
    assert_close(scores, torch.tensor([[score for score, _ in row[:6]] for row in ranking]))
    orders = [[number for _, number in row] for row in ranking]
    ranks = [row.index(n) + 1 if n in row else ITEMS + 1 for row, n in zip(orders, own.tolist(), strict=True)]
    assert index.ranks(query, own, seen).tolist() == ranks
    assert ranks[2] == ranks[3] == ITEMS + 1
    metric = RetrievalMetrics((2, 5))
    metric.update(index.ranks(query[:3], own[:3], seen[:3]), own[:3])
    metric.update(index.ranks(query[3:], own[3:], seen[3:]), own[3:])
    gain = sum(1 / math.log2(1 + rank) for rank in ranks if rank <= 2) / USERS
    want = {f"recall_{k}": sum(rank <= k for rank in ranks) / USERS for k in (2, 5)}
    want |= {"ndcg_2": gain, "mrr": sum(1 / rank for rank in ranks) / USERS}
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(want, rel=1e-12)


def test_ties_go_against_the_item_and_candidates_may_be_few():
    index = ItemIndex("abcd", torch.tensor([[1.0], [2.0], [1.0], [0.0]]))
    query = torch.ones(4, 1)
    assert index.ranks(query, torch.tensor([1, 2, 3, 4])).tolist() == [3, 1, 3, 4]
    assert ItemIndex("abcd", torch.full((4, 1), torch.nan)).ranks(query, torch.tensor([1, 2, 3, 4])).tolist() == [5] * 4
    index = ItemIndex("abc", torch.tensor([[1.0], [2.0], [3.0]]))
    items, scores = index.search(torch.ones(2, 1), 5, torch.tensor([[1, 3], [0, 0]]))
    assert (items.tolist(), scores[0].tolist()) == ([[2, 0, 0], [3, 2, 1]], [2.0, -math.inf, -math.inf])
    assert [x.shape for x in index.search(torch.ones(0, 1), 2)] == [(0, 2), (0, 2)]


def test_a_file_keeps_an_index_and_its_numbers(tmp_path):
    assert (whole_numbers(["7", "-1", "20"]), whole_numbers(["7", "007"])) == ((7, -1, 20), ("7", "007"))
    assert ItemIndex(["7", "30"], torch.ones(2, 1)).named([2, 1, 2]) == [30, 7, 30]
    index = ItemIndex(["7", "30", "é"], torch.randn(3, 4), made_by="abc")
    index.save(tmp_path / "items.safetensors")
    again = ItemIndex.load(tmp_path / "items.safetensors")
    assert (again.values, again.made_by) == (("7", "30", "é"), "abc")
    assert torch.equal(again.vectors_ID, index.vectors_ID)
    with pytest.raises(FileNotFoundError, match=r"no item index .*none\.safetensors: a test of the retriever writes"):
        ItemIndex.load(tmp_path / "none.safetensors")
    (tmp_path / "cut").write_bytes((tmp_path / "items.safetensors").read_bytes()[:40])
    refused("cut holds no item index", lambda: ItemIndex.load(tmp_path / "cut"))


def test_the_loss_by_hand_its_probabilities_and_its_gradients_are_those_of_a_column_for_each_place():
    # exp of the logits is [[2, 3], [1, 4]], and the items are drawn with probabilities 1/2 and 1/4. Divided by them:
    # [[4, 12], [2, 16]]. The own items' shares are 4 / 16 and 16 / 18.
    logits = torch.tensor([[2.0, 3.0], [1.0, 4.0]]).log()
    own, once, log_q = torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([0.5, 0.25]).log()
    loss = sampled_softmax(logits, own, once, log_q)
    assert float(loss) == pytest.approx(-(math.log(1 / 4) + math.log(8 / 9)) / 2)
    # without a correction they are 2 / 5 and 4 / 5
    loss = sampled_softmax(logits, own, once, None)
    assert float(loss) == pytest.approx(-(math.log(2 / 5) + math.log(4 / 5)) / 2)
    # Three rows have the items 0, 1 and 0, and item 0 was drawn once more. Row 0 is compared with one item 1 alone:
    # 1 / (1 + 2); row 1 with three items 0: 3 / (3 + 3 * 1); row 2: 6 / (6 + 5).
    logits = torch.tensor([[1.0, 2.0], [1.0, 3.0], [6.0, 5.0]]).log()
    loss = sampled_softmax(logits, torch.tensor([0, 1, 0]), torch.tensor([3, 1]), None)
    assert float(loss) == pytest.approx(-(math.log(1 / 3) + math.log(3 / 6) + math.log(6 / 11)) / 3)
    torch.manual_seed(0)
    item_C = torch.tensor([2, 0, 2, 5, 0, 2, 1, 0, 5, 3])  # six pairs and four draws
    users = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    items = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    log_q = torch.rand(6, dtype=torch.float64).log()
    item_U, place_C, count_U = item_C.unique(return_inverse=True, return_counts=True)
    fast = sampled_softmax(users @ items[item_U].t(), place_C[:6], count_U, log_q[item_U])
    reference = slow_loss(users, items[item_C], item_C.tolist(), log_q[item_C])
    assert_close(fast, reference, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(loss, (users, items)) for loss in (fast, reference)), strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-14)
    # Of 8 pairs 5 have the first item and 2 the second; the third has none, and counts as 1.
    count = torch.tensor([5, 2, 0])
    assert_close(log_probability(count).exp(), torch.tensor([5 / 8, 2 / 8, 1 / 8]))
    # 6 places of pairs and 2 of uniform draws: (6 * 5/8 + 2/3) / 8, and so on.
    mixed = torch.tensor([(6 * n / 8 + 2 / 3) / 8 for n in (5, 2, 1)])
    assert_close(log_probability(count, 6, 2).exp(), mixed)
    assert float(mixed.sum()) == pytest.approx(1)


def slow_loss(user_BD, item_CD, item_C, log_q_C):
    """Return the loss with a column for each place of the sample: that of row b is column b."""
    losses = []
    for b, user_D in enumerate(user_BD):
        kept = [c for c in range(len(item_C)) if c == b or item_C[c] != item_C[b]]
        logits = torch.stack([user_D @ item_CD[c] - log_q_C[c] for c in kept])
        losses.append(logits.logsumexp(0) - logits[kept.index(b)])
    return torch.stack(losses).mean()


def made_use(**changed):
    # Items 1 and 2 are of the first and the last quarter; item 0 is in no catalog.
    values = {
        "ks": (2, 5), "group_V": np.array([4, 0, 3]), "item_N": np.array([1, 1, 2, 0]),
        "rank_N": np.array([1, 4, 9, 3]), "best_Nk": np.array([[1, 2], [2, 1], [1, 0], [2, 1]]),
        "users": ["ann", "bob", "cy", "dot"], "index": ItemIndex(["tea", "rye"], torch.ones(2, 1)), "use": None,
    }  # fmt: skip
    return RetrievalUse(**{**values, **changed})


def test_the_metrics_of_groups_by_hand_and_pairs_by_name(tmp_path):
    section = write_ranks(made_use(), tmp_path)
    with open(tmp_path / "popularity.csv", newline="") as file:
        popular, least, unknown = csv.DictReader(file)
    assert popular == {
        "popularity": "most popular", "pairs": "2", "recall_2": "0.5", "recall_5": "1.0", "mrr": "0.625",
        "median_rank": "2.5",
    }  # fmt: skip
    assert (least["popularity"], least["recall_5"]) == ("least popular", "0.0")
    assert (unknown["popularity"], float(unknown["mrr"])) == ("not in training", pytest.approx(1 / 3))
    table, chart = section.parts
    assert table.rows[0] == ("most popular", "2", "50.00", "100.00", "62.50", "2")
    assert chart.summary == "Recall@5 is highest for most popular, 100.0 %, and lowest for least popular, 0.0 %."
    assert pairs_table(made_use(), [2, 3]).rows == (
        ("cy", "rye", "9", "tea"),
        ("dot", "not in the catalog", "3", "rye · tea"),
    )


@pytest.mark.filterwarnings("ignore")
def test_a_test_leaves_the_report(tmp_path):
    data = made_pairs(tmp_path, user_column="user")
    module = retriever(data)
    run = quiet_trainer(tmp_path, callbacks=module.report_callbacks())
    run.test(module, datamodule=data, verbose=False)
    assert {"popularity.csv", "expert_popularity.png", "items.safetensors"} <= {
        path.name for path in (tmp_path / "report").iterdir()
    }
    titles = [section.title for section in load_sections(tmp_path / "report")]
    assert titles == ["What is retrieved", "What the experts are used for", "Pairs"]
    use = RetrievalUse.of(module, [data.examples("test").__getitems__([0, 1, 2])])
    assert use.users == ["ann", "bob", "cy"]
    ((layer, counts),) = use.use.counts["popularity"].items()
    assert layer == "item block 0"
    # Alien and Dune have 2 of 6 pairs each: Alien is the first quarter, Dune begins in the second; two experts an item
    assert counts.sum(1).tolist() == [2, 2, 2, 2, 2]
