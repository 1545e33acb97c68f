"""Draws of items by weight, beside a loop over a list in which each item stands as often as its weight."""

from __future__ import annotations

import torch

from apps.recsys.tables.negatives.draws import ItemDraws


def test_a_draw_is_a_place_on_the_line_of_what_is_left():
    # Weights 2, 0, 1, 3: the line is 0 0 2 3 3 3. Key 0 excludes item 0, key 1 items 1 and 2, key 2 none.
    draws = ItemDraws(torch.tensor([2, 0, 1, 3]), torch.tensor([1, 0, 1, 1]), torch.tensor([2, 0, 1, 2]), 3)
    assert (draws.total, draws.left_K.tolist()) == (6, [4, 5, 6])
    uniform_3n = torch.tensor([[0.0, 0.24, 0.26, 0.99], [0.0, 0.39, 0.41, 0.99], [0.0, 0.34, 0.49, 0.51]]).double()
    assert draws.items(uniform_3n, torch.arange(3)).tolist() == [[2, 2, 3, 3], [0, 0, 3, 3], [0, 2, 2, 3]]


def test_draws_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    weight_I = torch.randint(0, 5, (30,), generator=generator)
    key_M, item_M = torch.randint(0, 8, (90,), generator=generator), torch.randint(0, 30, (90,), generator=generator)
    draws = ItemDraws(weight_I, key_M, item_M, 9)  # key 8 excludes nothing
    key_N = torch.randint(0, 9, (200,), generator=generator)
    uniform_Nn = torch.rand(200, 5, dtype=torch.float64, generator=generator)
    uniform_Nn[0] = torch.tensor([0.0, 0.5, 1 - 2**-53, 1 - 2**-53, 0.0])
    excluded = [{int(i) for k, i in zip(key_M, item_M, strict=True) if k == key} for key in range(9)]
    expected = []
    for key, row in zip(key_N.tolist(), uniform_Nn.tolist(), strict=True):
        line = [i for i, weight in enumerate(weight_I.tolist()) if i not in excluded[key] for _ in range(weight)]
        assert int(draws.left_K[key]) == len(line)
        expected.append([line[min(int(u * len(line)), len(line) - 1)] for u in row])  # a product may round up
    assert draws.items(uniform_Nn, key_N).tolist() == expected
