"""The exact search, against numbers that one can check by hand."""

import pytest
import torch

from apps.nets.exact_search import exact_search, products

VECTORS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])


def test_the_best_come_first_in_full_precision():
    # Products of (1, 0): 1, 0, 0.6; of (0, 2): 0, 2, 1.6.
    best = exact_search(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), VECTORS, 2)
    assert best.place_BK.tolist() == [[0, 2], [1, 2]]
    assert best.score_BK.flatten().tolist() == pytest.approx([1.0, 0.6, 2.0, 1.6])
    query = torch.tensor([[3.0, 1.0]])  # products 3, 1, 2.6
    assert exact_search(query, VECTORS, 10).place_BK.tolist() == [[0, 2, 1]]
    assert [x.shape for x in exact_search(torch.ones(0, 2), VECTORS, 2)] == [(0, 2), (0, 2)]
    query, vectors = torch.full((1, 1), 1 + 2.0**-12), torch.ones(1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert exact_search(query, vectors, 1).score_BK.item() == 1 + 2.0**-12  # bfloat16 would say 1


@pytest.mark.parametrize("most, sizes", [(1, [1] * 5), (6, [2, 2, 1]), (100, [5])])
def test_products_come_some_queries_at_a_time(most, sizes):
    query = torch.arange(10.0).reshape(5, 2)
    chunks = list(products(query, VECTORS, most))
    assert [len(score) for score, _ in chunks] == sizes
    torch.testing.assert_close(torch.cat([score for score, _ in chunks]), query @ VECTORS.t())
    assert torch.equal(torch.cat([query[rows] for _, rows in chunks]), query)
