"""transformers' blocks beside ours: the same output, and the same gradient of the tokens and of every weight."""

from __future__ import annotations

import pytest
import torch
from hugging import B, D, E, S, tensor_of
from hugging_blocks import BLOCKS, VOCAB

from core import Hash, RoutingContext


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_give_the_same_output_and_gradients(name):
    case = BLOCKS[name]
    peer, layer = case.pair()
    asked, context = (), RoutingContext()
    if isinstance(case.ours.router, Hash):
        ids_BS = torch.randint(VOCAB, (B, S))
        peer.gate.tid2eid.copy_(torch.rand(VOCAB, E).topk(3).indices)
        layer.router.table.copy_(peer.gate.tid2eid)
        asked, context = (ids_BS,), RoutingContext(token_ids_BS=ids_BS)

    x = torch.randn(B, S, D)
    ours_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, their_y = layer(ours_x, context), peer(their_x, *asked)
    their_y = (their_y[0] if isinstance(their_y, tuple) else their_y).view(B, S, D)
    torch.testing.assert_close(y, their_y, rtol=1e-5, atol=1e-5)
    weights = torch.randn(B, S, D)
    (y * weights).sum().backward()
    (their_y * weights).sum().backward()
    torch.testing.assert_close(ours_x.grad, their_x.grad, rtol=1e-5, atol=1e-5)
    for parameter, wanted in case.layout(peer, lambda p: p.grad).items():
        torch.testing.assert_close(
            tensor_of(layer, parameter).grad, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, p=parameter: f"{p}: {m}"
        )
