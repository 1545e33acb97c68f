"""Zero, copy and constant experts, by numbers that one can check by hand."""

from __future__ import annotations

import pytest
import torch

from core import Constant, Experts, Hash, Identity, MoEConfig, RoutingContext, Rows, TokenChoice, Zero


def rows(gathered: bool) -> Rows:
    """Return three rows of two experts: tokens 0 and 1 take expert 0, token 0 takes expert 1; one place is empty."""
    x, index = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1, 0, 1])
    given = Rows(x, index, torch.tensor([2, 3], dtype=torch.int32), torch.tensor([0.5, 1.0, 0.25, 9.0]), 2)
    return given.materialized() if gathered else given


def summed(experts: Experts, gathered: bool) -> list[list[float]]:
    """Return the tokens after the experts, weighted and summed."""
    given = rows(gathered)
    out = experts(given)
    if out.combined:
        return out.x.tolist()
    y = torch.zeros(2, out.x.shape[1])
    for r in range(3):
        y[given.row_index_R[r]] += out.x[r] * (1.0 if out.weighted else out.gates_R[r])
    return y.tolist()


@pytest.mark.parametrize("gathered", [False, True])
def test_the_output_of_each(gathered):
    assert summed(Zero().build(2, 2), gathered) == [[0.0, 0.0], [0.0, 0.0]]
    # Token 0 has the gates 0.5 + 0.25, token 1 has 1.
    assert summed(Identity().build(2, 2), gathered) == [[0.75, 1.5], [3.0, 4.0]]
    constant = Constant().build(2, 2, out_dim=1)
    with torch.no_grad():
        constant.v.copy_(torch.tensor([[10.0], [100.0]]))
    # 0.5 * 10 + 0.25 * 100, and 1 * 10.
    assert summed(constant, gathered) == [[30.0], [10.0]]


def test_a_mixed_constant_is_shared_out_by_the_token():
    experts = Constant(mix=True).build(1, 2)
    with torch.no_grad():
        experts.v.copy_(torch.tensor([[8.0, 0.0]]))
        experts.w_mix[0, 0, 0] = torch.log(torch.tensor(3.0))
    # Logits (log 3, 0): shares 3/4 and 1/4 of (1, 4) and (8, 0).
    torch.testing.assert_close(experts(torch.tensor([[1.0, 4.0]]), "each")[:, 0], torch.tensor([[2.75, 3.0]]))


def test_what_goes_through_cannot_change_its_width():
    for expert in (Identity(), Constant(mix=True)):
        with pytest.raises(ValueError, match="out_dim=3 is not dim=2"):
            expert.build(2, 2, 3)


@pytest.mark.parametrize("backend", ["eager", "grouped", "cpu", "triton"])
def test_a_layer_of_zero_experts_has_gradients_of_zero(backend):
    layer = MoEConfig(4, TokenChoice(2), Zero()).build(8)
    layer.backend = backend
    x = torch.randn(5, 8, requires_grad=True)
    y = layer(x)
    assert not y.any()
    wanted = (x, *layer.parameters())
    assert [g.count_nonzero() for g in torch.autograd.grad(y.sum(), wanted)] == [0] * len(wanted)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("expert", [Zero(), Constant()])
def test_padding_of_any_value_leaves_zeros_and_constants_as_they_are(expert, gathered):
    given = rows(gathered)
    given.x[-1] = torch.nan
    assert not expert.build(2, 2)(given).x.isnan().any()


def test_constants_of_given_experts_give_their_input_a_gradient_of_zero():
    layer = MoEConfig(4, Hash(16), Constant()).build(8)
    x = torch.randn(5, 8, requires_grad=True)
    y = layer(x, context=RoutingContext(token_ids_BS=torch.arange(5)[None]))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert not gradient.any()
