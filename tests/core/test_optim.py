"""``RowAdam`` moves the rows that have a gradient as Adam moves them, and no others."""

import copy

import pytest
import torch
from torch import Tensor

import core
from core import optim

E, D = 12, 3


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(optim, "ROWS", 2 * D)


def sparse(rows: list[int], seed: int) -> Tensor:
    values = torch.randn(len(rows), D, generator=torch.Generator().manual_seed(seed))
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (E, D), check_invariants=True)


STEPS = [[1, 4, 5, 7, 11], [4, 1, 4], [0], [], [11, 5, 1]]  # unsorted, and one row twice


def moved(make, steps: list[list[int]], dense: bool = False) -> Tensor:
    torch.manual_seed(0)
    table = torch.nn.Parameter(torch.randn(E, D))
    optimizer = make([table])
    for seed, rows in enumerate(steps):
        table.grad = sparse(rows, seed).to_dense() if dense else sparse(rows, seed)
        optimizer.step()
    return table.detach()


def test_it_is_sparse_adam():
    ours = moved(lambda p: core.RowAdam(p, lr=0.1), STEPS)
    torch.testing.assert_close(ours, moved(lambda p: torch.optim.SparseAdam(p, lr=0.1), STEPS), rtol=1e-5, atol=1e-6)
    # Dense gradients are moved as by AdamW.
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours = moved(lambda p: core.RowAdam(p, **options), STEPS, dense=True)
    torch.testing.assert_close(ours, moved(lambda p: torch.optim.AdamW(p, **options), STEPS, dense=True))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_rows_that_always_have_a_gradient_move_as_by_adamw_and_the_others_stay(decay):
    rows = [1, 4, 5, 7, 11]
    ours = moved(lambda p: core.RowAdam(p, lr=0.1, weight_decay=decay), [rows] * 4)
    theirs = moved(lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=decay), [rows] * 4, dense=True)
    torch.testing.assert_close(ours[rows], theirs[rows])
    others = [e for e in range(E) if e not in rows]
    assert torch.equal(ours[others], moved(lambda p: core.RowAdam(p), [])[others])


def test_one_step_by_hand():
    # The first step has m / (1 - b1) = g and v / (1 - b2) = g^2: each number moves by lr g / (|g| + eps) = lr sign(g).
    table = torch.nn.Parameter(torch.zeros(3, 2))
    table.grad = torch.sparse_coo_tensor(
        torch.tensor([[2]]), torch.tensor([[4.0, -0.5]]), (3, 2), check_invariants=True
    )
    core.RowAdam([table], lr=0.25).step()
    torch.testing.assert_close(table.detach(), torch.tensor([[0.0, 0.0], [0.0, 0.0], [-0.25, 0.25]]))


def test_state_is_saved_and_loaded():
    def run(save: bool) -> Tensor:
        table = torch.nn.Parameter(torch.ones(E, D))
        optimizer = core.RowAdam([table])
        for seed, rows in enumerate(STEPS):
            if save and seed == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = core.RowAdam([table], lr=0.7)
                optimizer.load_state_dict(state)
            table.grad = sparse(rows, seed)
            optimizer.step()
        return table.detach()

    assert torch.equal(run(save=True), run(save=False))


def test_a_layer_of_row_sparse_tables_learns_as_one_of_dense_gradients_where_all_rows_are_picked():
    layers = []
    for row_sparse in (False, True):
        torch.manual_seed(1)
        config = core.MoEConfig(4, core.ProductKeys(top_k=4, heads=1), core.PEER(row_sparse=row_sparse))
        layer = config.build(6)
        optimizer = core.RowAdam(layer.parameters(), lr=0.01)
        for _ in range(3):
            layer(torch.randn(2, 5, 6)).square().sum().backward()
            assert layer.experts.u.grad.is_sparse == row_sparse
            optimizer.step()
            optimizer.zero_grad()
        layers.append(layer)
    for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_bad_values_and_a_gradient_of_single_numbers_are_refused():
    table = torch.nn.Parameter(torch.zeros(2, 2))
    for options, message in (
        ({"lr": 0.0}, r"lr=0.0 is not above 0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0 is not in \[0, 1\)"),
        ({"weight_decay": -1.0}, r"weight_decay=-1.0 is not at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            core.RowAdam([table], **options)
    table.grad = torch.eye(2).to_sparse()
    with pytest.raises(ValueError, match="has 2 sparse dimensions"):
        core.RowAdam([table]).step()
