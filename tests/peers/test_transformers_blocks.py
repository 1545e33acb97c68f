"""transformers' blocks beside ours: the same output, and the same gradient of the tokens and of every weight."""

from __future__ import annotations

import pytest
import torch
from beside import check_same
from hugging import B, D, E, S
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

    def theirs(x_BSD):
        y = peer(x_BSD, *asked)
        return (y[0] if isinstance(y, tuple) else y).view(B, S, D)

    x = torch.randn(B, S, D)
    check_same(layer, peer, case.layout, x, lambda x: layer(x, context), theirs, rtol=1e-5, atol=1e-5)
