"""torch-rechub's HSTU layer beside ours: with the same weights and biases the same outputs and gradients.

Version seen: 0.9.0. pip install --target peers --no-deps torch-rechub
"""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from apps.nets.config import TransformerConfig
from apps.nets.packing import Packing
from apps.nets.pair_bias import PairBias
from apps.nets.pointwise import PointwiseAttention

layers = pytest.importorskip("torch_rechub.basic.layers")

D, HEADS, LONGEST = 12, 3, 9


def test_a_layer_and_its_biases_by_distance() -> None:
    torch.manual_seed(0)
    peer = layers.HSTULayer(D, HEADS, D // HEADS, D // HEADS, dropout=0.0, max_seq_len=LONGEST).double()
    ours = PointwiseAttention(TransformerConfig(dim=D, num_heads=HEADS, positions="none"), LONGEST).double()
    bias = PairBias(HEADS, LONGEST).double()
    with torch.no_grad():
        for tensor in (peer.norm_attn.weight, peer.norm_attn.bias, peer.proj1.bias, peer.rab.pos_w):
            tensor.normal_()
        for own, other in zip(ours.uvqk.parameters(), peer.proj1.parameters(), strict=True):
            q, k, u, v = other.chunk(4)  # theirs are in this order
            own.copy_(torch.cat((u, v, q, k)))
        ours.norm.load_state_dict(peer.norm_attn.state_dict())
        ours.out.load_state_dict(peer.proj2.state_dict())
        bias.distance_bias.copy_(peer.rab.pos_w[:LONGEST].flip(0))  # the rest of theirs is for keys to come
    ours.norm.eps = peer.norm_attn.eps
    valid_BL = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    packing, _ = Packing.of(valid_BL)
    x_BLD = torch.randn(3, 7, D, dtype=torch.float64, requires_grad=True)
    theirs = peer(x_BLD, padding_mask=valid_BL)[valid_BL]
    y_TD = ours(peer.norm_in(x_BLD)[valid_BL], bias.mask(x_BLD, None), packing=packing)
    assert_close(y_TD, theirs, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(y_TD)
    grads = [
        torch.autograd.grad((y * weight).sum(), (x_BLD, table), retain_graph=True)
        for y, table in ((y_TD, bias.distance_bias), (theirs, peer.rab.pos_w))
    ]
    assert_close(grads[0][0], grads[1][0], rtol=1e-9, atol=1e-11)
    assert_close(grads[0][1], grads[1][1][:LONGEST].flip(0), rtol=1e-9, atol=1e-11)
