"""The sum over the rows of a token in Triton's interpreter, against the oracle."""

from __future__ import annotations

import pytest
import torch

import core
from core.kernels import RowIndex, eager, triton_ops
from core.kernels.triton_ops import sums

pytest.importorskip("triton")


@pytest.mark.parametrize("weighted, dtype", [(False, torch.bfloat16), (True, torch.float32), (True, torch.bfloat16)])
def test_combine_equals_the_oracle_where_tokens_have_any_number_of_rows(weighted, dtype):
    index, offsets = torch.tensor([3, 0, 3, 1, 3, 0, 2]), torch.tensor([2, 2, 5], dtype=torch.int32)
    rows = torch.randn(7, 40).to(dtype)
    rows[5:] = torch.nan  # past the last offset
    out = {}
    for name in ("eager", "triton"):
        y = rows.clone().requires_grad_()
        gates = torch.rand(7, generator=torch.Generator().manual_seed(1)).requires_grad_()
        total = core.kernels.BACKENDS[name].combine(y, RowIndex(index, offsets), gates if weighted else None, 5)
        total.backward(torch.ones(5, 40).cumsum(1).to(total.dtype))
        out[name] = {"y": total.detach(), "dy": y.grad[:5]} | ({"dgates": gates.grad} if weighted else {})
        assert (y.grad[5:] == 0).all()
        assert (total[4] == 0).all(), "a token without rows is zero"
    for key, expected in out["eager"].items():
        torch.testing.assert_close(out["triton"][key], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighted, top_k", [(False, 3), (True, 1), (True, 3)])
def test_combine_of_token_major_pairs_equals_the_oracle(weighted, top_k):
    T, D = 7, 40
    ids = torch.rand(T, 4).argsort(-1)[:, :top_k].masked_fill(torch.rand(T, top_k) < 0.2, 4).flatten()
    placed = eager.sort_pairs(ids, eager.count_experts(ids, 4))
    index, live = placed.order_R // top_k, int(placed.offsets_E[-1])
    rows, gates = torch.randn(T * top_k, D), torch.rand(T * top_k)
    rows[live:], gates[live:] = torch.nan, torch.nan  # past the last offset
    pairs = RowIndex(index, placed.offsets_E, placed.inverse_N, top_k)
    out = {}
    for name in ("eager", "triton"):
        y, g = rows.clone().requires_grad_(), gates.clone().requires_grad_()
        total = core.kernels.BACKENDS[name].combine(y, pairs, g if weighted else None, T)
        total.backward(torch.ones(T, D).cumsum(1))
        out[name] = {"y": total.detach(), "dy": y.grad[:live]} | ({"dgates": g.grad[:live]} if weighted else {})
    for key, expected in out["eager"].items():
        torch.testing.assert_close(out["triton"][key], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tasks", [0, 2])
def test_the_rows_of_a_token_are_found_without_a_sort(monkeypatch, tasks):
    router, expert = core.TokenChoice(top_k=2), core.MLP((6,))
    if tasks:
        moe = core.MMoE(4, expert, router, backend="triton").build(8, tasks)
    else:
        moe = core.MoEConfig(4, router, expert, backend="triton").build(8)

    def sorts(*_, **__):
        raise AssertionError("a general sort, and a search for what the pairs' own sort has found")

    monkeypatch.setattr(torch.Tensor, "argsort", sorts)
    monkeypatch.setattr(sums, "rows_by_token", sorts)
    moe(torch.randn(5, 8)).sum().backward()


def test_combine_keeps_the_rows_only_where_gates_learn_from_them():
    index, offsets = torch.tensor([0, 2, 0, 1]), torch.tensor([1, 3], dtype=torch.int32)
    y, gates = torch.randn(4, 100, requires_grad=True), torch.rand(4, requires_grad=True)
    for weights in (None, gates):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            triton_ops.combine(y, RowIndex(index, offsets), weights, 3)
        assert (max(kept) >= y.numel()) == (weights is not None)


def test_rows_by_token_are_in_order_and_those_of_a_general_sort(monkeypatch):
    rows, starts = sums.rows_by_token(torch.tensor([2, 0, 2, 0]), torch.tensor([1, 3], dtype=torch.int32), 3)
    assert starts.tolist() == [0, 1, 1, 3]
    assert rows.tolist()[:3] == [1, 0, 2]  # row 3 is past the last offset
    index, offsets = torch.randint(0, 9, (300,)), torch.tensor([100, 280], dtype=torch.int32)
    counted = sums.rows_by_token(index, offsets, 9)
    monkeypatch.setattr(sums, "MAX_BINS", 9)
    for a, b in zip(counted, sums.rows_by_token(index, offsets, 9), strict=True):
        assert torch.equal(a, b)
