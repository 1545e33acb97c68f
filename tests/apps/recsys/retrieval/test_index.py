"""The exact search, against a slow loop."""

import math

import pytest
import torch
from torch.testing import assert_close

from apps.recsys.encoding.vocabulary import whole_numbers
from apps.recsys.retrieval import index as module
from apps.recsys.retrieval.index import ItemIndex
from apps.recsys.retrieval.metrics import RetrievalMetrics

USERS, ITEMS, DIM = 7, 23, 5


@pytest.fixture
def made():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(ITEMS, DIM, generator=generator)
    query = torch.randn(USERS, DIM, generator=generator)
    seen = torch.randint(0, ITEMS + 1, (USERS, 4), generator=generator)
    own = torch.randint(1, ITEMS + 1, (USERS,), generator=generator)
    own[2], own[3] = 0, seen[3].max()  # one that the catalog lacks, and one that is no candidate
    return ItemIndex([f"i{n}" for n in range(1, ITEMS + 1)], vectors), query, seen, own


def slow(index, query, seen):
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
def test_search_and_ranks_are_those_of_a_slow_loop(made, elements, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)  # a user, two users, and all users at a time
    index, query, seen, own = made
    items, scores = index.search(query, 6, seen)
    ranking = slow(index, query, seen)
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


def test_ties_go_against_the_item():
    index = ItemIndex("abcd", torch.tensor([[1.0], [2.0], [1.0], [0.0]]))
    query = torch.ones(4, 1)
    assert index.ranks(query, torch.tensor([1, 2, 3, 4])).tolist() == [3, 1, 3, 4]
    assert ItemIndex("abcd", torch.full((4, 1), torch.nan)).ranks(query, torch.tensor([1, 2, 3, 4])).tolist() == [5] * 4


def test_fewer_candidates_than_are_asked_for():
    index = ItemIndex("abc", torch.tensor([[1.0], [2.0], [3.0]]))
    items, scores = index.search(torch.ones(2, 1), 5, torch.tensor([[1, 3], [0, 0]]))
    assert items.tolist() == [[2, 0, 0], [3, 2, 1]]
    assert scores[0].tolist() == [2.0, -math.inf, -math.inf]
    assert [x.shape for x in index.search(torch.ones(0, 1), 2)] == [(0, 2), (0, 2)]


def test_values_are_numbers_where_all_are_written_so():
    assert whole_numbers(["7", "-1", "20"]) == (7, -1, 20)
    assert whole_numbers(["7", "007"]) == ("7", "007")
    assert ItemIndex(["7", "30"], torch.ones(2, 1)).named([2, 1, 2]) == [30, 7, 30]


def test_a_file_keeps_an_index(tmp_path):
    index = ItemIndex(["7", "30", "é"], torch.randn(3, 4), made_by="abc")
    index.save(tmp_path / "items.safetensors")
    again = ItemIndex.load(tmp_path / "items.safetensors")
    assert (again.values, again.made_by) == (("7", "30", "é"), "abc")
    assert torch.equal(again.vectors_ID, index.vectors_ID)
    with pytest.raises(FileNotFoundError, match=r"no item index .*none\.safetensors: a test of the retriever writes"):
        ItemIndex.load(tmp_path / "none.safetensors")
    (tmp_path / "cut").write_bytes((tmp_path / "items.safetensors").read_bytes()[:40])
    with pytest.raises(ValueError, match="cut holds no item index"):
        ItemIndex.load(tmp_path / "cut")
