"""Zero, copy and constant experts, by numbers that one can check by hand."""

from __future__ import annotations

import pytest
import torch
from hand_rows import rows, summed

from core import Constant, Hash, Identity, MoEConfig, RoutingContext, TokenChoice, Zero


@pytest.mark.parametrize("gathered", [False, True])
def test_the_output_of_each(gathered):
    assert summed(Zero().build(2, 2), gathered).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    # Token 0 has the gates 0.5 + 0.25, token 1 has 1.
    assert summed(Identity().build(2, 2), gathered).tolist() == [[0.75, 1.5], [3.0, 4.0]]
    constant = Constant().build(2, 2, out_dim=1)
    with torch.no_grad():
        constant.v.copy_(torch.tensor([[10.0], [100.0]]))
    # 0.5 * 10 + 0.25 * 100, and 1 * 10.
    assert summed(constant, gathered).tolist() == [[30.0], [10.0]]


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


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("router, expert", [(TokenChoice(2), Zero()), (Hash(16), Constant())], ids=["zero", "constant"])
def test_a_layer_that_reads_no_token_has_gradients_of_zero(backend, router, expert):
    layer = MoEConfig(4, router, expert).build(8)
    layer.backend = backend
    x = torch.randn(5, 8, requires_grad=True)
    y = layer(x, RoutingContext(token_ids_BS=torch.arange(5)[None]))
    wanted = (x, *layer.router.parameters())
    assert [g.count_nonzero() for g in torch.autograd.grad(y.sum(), wanted)] == [0] * len(wanted)


@pytest.mark.parametrize("gathered", [False, True])
def test_padding_of_any_value_leaves_zeros_and_constants_as_they_are(gathered):
    for expert in (Zero(), Constant()):
        given = rows(gathered)
        given.x[-1] = torch.nan
        assert not expert.build(2, 2)(given).x.isnan().any()
