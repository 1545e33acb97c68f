"""The local dispatcher: rows sorted by expert, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core import Routing, TokenChoice
from core.dispatch import LocalDispatcher, join_tasks, unique_pairs
from core.routing.selection import Capacity


def routing(token_index: list[int], expert_ids: list[int], gates: list[float], E: int, T: int, K: int | None = None):
    ids = torch.tensor(expert_ids, dtype=torch.int64)
    counts = torch.bincount(ids, minlength=E + 1)[:E]
    tokens = torch.tensor(token_index, dtype=torch.int64)
    return Routing(tokens, ids, torch.tensor(gates), counts, counts, T, K)


def test_rows_are_sorted_by_expert_then_token_and_uncomputed_pairs_come_last():
    # Tokens 0, 1, 2 with experts (1, 0), (2, dropped), (1, 2).
    r = routing([0, 0, 1, 1, 2, 2], [1, 0, 2, 3, 1, 2], [0.1, 0.2, 0.3, 0.0, 0.5, 0.6], E=3, T=3, K=2)
    x = torch.tensor([[10.0], [11.0], [12.0]])
    rows = LocalDispatcher().dispatch(x, r)
    assert rows.offsets_E.tolist() == [1, 3, 5]
    assert rows.row_index_R.tolist() == [0, 0, 2, 1, 2, 1]
    assert rows.gates_R.tolist() == pytest.approx([0.2, 0.1, 0.5, 0.3, 0.6, 0.0])
    assert rows.x is x  # indexed, not copied
    assert (rows.gathered, rows.weighted, rows.combined) == (False, False, False)


def test_combine_weights_and_sums_the_rows_of_each_token():
    r = routing([0, 0, 1, 1, 2, 2], [1, 0, 2, 3, 1, 2], [0.1, 0.2, 0.3, 0.0, 0.5, 0.6], E=3, T=3, K=2)
    rows = LocalDispatcher().dispatch(torch.zeros(3, 1), r)
    y = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [torch.nan]])  # the last row is past the last offset
    out = LocalDispatcher().combine(rows.with_output(y))
    # Token 0: 0.2 * 1 + 0.1 * 2; token 1: 0.3 * 4; token 2: 0.5 * 3 + 0.6 * 5.
    assert out.flatten().tolist() == pytest.approx([0.4, 1.2, 4.5])


def test_rows_weighted_already_are_summed_alone_and_combined_ones_are_passed_on():
    r = routing([0, 0], [0, 1], [0.25, 0.75], E=2, T=1, K=2)
    rows = LocalDispatcher().dispatch(torch.zeros(1, 1), r)
    y = torch.tensor([[1.0], [2.0]])
    assert LocalDispatcher().combine(rows.with_output(y, weighted=True)).item() == 3.0
    assert LocalDispatcher().combine(rows.with_output(y[:1], combined=True)).item() == 1.0


def test_a_token_may_have_any_number_of_rows():
    # As in expert choice: token 1 has three rows, token 0 one, token 2 none.
    r = routing([1, 1, 0, 1], [2, 0, 1, 1], [1.0, 2.0, 4.0, 8.0], E=3, T=3)
    rows = LocalDispatcher().dispatch(torch.zeros(3, 1), r)
    assert rows.row_index_R.tolist() == [1, 0, 1, 1]
    out = LocalDispatcher().combine(rows.with_output(torch.ones(4, 1)))
    assert out.flatten().tolist() == [4.0, 11.0, 0.0]


@pytest.mark.parametrize("tokens", [0, 1, 7, 100])
def test_permuting_and_back_is_the_identity(tokens):
    x = torch.randn(tokens, 3)
    chosen = TokenChoice(top_k=2).build(3, 5)(x[None])
    rows = LocalDispatcher().dispatch(x, chosen)
    assert sorted(rows.plan.order_R.tolist()) == list(range(2 * tokens))
    assert torch.equal(rows.plan.order_R[rows.plan.inverse_N], torch.arange(2 * tokens))
    # Experts that do nothing, gates that sum to 1: every token comes back.
    out = LocalDispatcher().combine(rows.with_output(rows.materialize()))
    torch.testing.assert_close(out, x)


def test_offsets_count_every_computed_pair_and_each_row_sits_with_its_expert():
    limit = Capacity(0.6)
    chosen = TokenChoice(top_k=3).build(4, 6, limit)(torch.randn(2, 20, 4))
    rows = LocalDispatcher().dispatch(torch.zeros(40, 4), chosen)
    assert (
        rows.offsets_E.diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist() == chosen.tokens_per_expert_E.tolist()
    )
    expert_R: Tensor = chosen.expert_ids_N[rows.plan.order_R]
    live = int(rows.offsets_E[-1])
    assert live < 120
    assert (expert_R.diff() >= 0).all()
    assert (expert_R[:live] < 6).all()
    assert (expert_R[live:] == 6).all()


def test_half_precision_rows_are_summed_in_float32():
    # 256 rows of 1 and one of 256 before them: in bfloat16 each 256 + 1 rounds back to 256.
    r = routing([0] * 257, [0] * 257, [1.0] * 257, E=1, T=1)
    rows = LocalDispatcher().dispatch(torch.zeros(1, 1, dtype=torch.bfloat16), r)
    y = torch.ones(257, 1, dtype=torch.bfloat16)
    y[0] = 256
    out = LocalDispatcher().combine(rows.with_output(y))
    assert out.item() == 512
    assert out.dtype == torch.bfloat16


def test_a_pair_that_two_tasks_chose_is_computed_once():
    # Tokens 0 and 1, experts 0 to 2, and 3 for a place without one. Both tasks chose expert 1 for token 0; expert 0 is
    # for token 1 in one task, and for token 0 in the other.
    first = routing([0, 0, 1, 1], [1, 2, 0, 3], [0.1, 0.2, 0.3, 0.0], E=3, T=2, K=2)
    second = routing([0, 0, 1, 1], [0, 1, 3, 2], [0.5, 0.6, 0.0, 0.8], E=3, T=2, K=2)
    pairs, first_N = unique_pairs(join_tasks([first, second]), 2)
    assert first_N.tolist() == [0, 1, 2, 3, 4, 0, 3, 7]
    assert pairs.expert_ids_N.tolist() == [1, 2, 0, 3, 0, 3, 3, 2]
    assert pairs.tokens_per_expert_E.tolist() == [2, 1, 2]
    rows = LocalDispatcher().dispatch(torch.tensor([[10.0], [11.0]]), pairs)
    out = LocalDispatcher().combine(rows.with_output(rows.x))
    assert out.flatten().tolist() == [10.0, 10.0, 11.0, 0.0, 10.0, 0.0, 0.0, 11.0]
