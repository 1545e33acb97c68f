"""transformers' JetMoE attention beside attention experts: the same output, and the same gradients of every weight."""

from __future__ import annotations

import pytest
import torch
from beside import check_same, load
from hugging import LOCAL, B, D, E, S, config_of, modeling, randomize

import core
from apps.nets.attention import Mask
from apps.nets.config import TransformerConfig
from apps.nets.expert_attention import ExpertAttention
from apps.nets.positions import rotations

HEADS, WIDTH = 2, 6
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # their gates are float32 whatever the rest is
ATTENTION = core.MoEConfig(E, core.TokenChoice(3), core.AttentionExperts(WIDTH, HEADS))


def layout(peer, read):
    return {
        "heads.router.gate.weight": read(peer.experts.router.layer.weight),
        "heads.kv.weight": read(peer.kv_proj.weight),
        "heads.experts.w_q": read(peer.experts.input_linear.weight).mT,
        "heads.experts.w_out": read(peer.experts.output_linear.weight).mT,
    }


@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_attention_gives_the_same_output_and_gradients(positions):
    options = {"num_key_value_heads": HEADS, "kv_channels": WIDTH, "num_experts_per_tok": 3}
    config = config_of("JetMoeConfig", **LOCAL, **options)
    config._attn_implementation = "eager"
    peer = randomize(modeling("jetmoe").JetMoeAttention(config, layer_idx=0), std=0.3).double().eval()
    transformer = TransformerConfig("nano", dim=D, positions=positions)
    ours = ExpertAttention(transformer, ATTENTION, causal=True).double().eval()
    load(ours, layout(peer, lambda p: p.detach()))
    x = torch.randn(B, S, D).double()
    hidden = torch.full((S, S), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
    turns = rotations(0, S, WIDTH, 10000.0, x)
    if positions == "none":
        turns = torch.stack((torch.ones_like(turns[0]), torch.zeros_like(turns[1])))
    cos_sin = tuple(t.squeeze(1).repeat(1, 2)[None] for t in turns)
    rotated = None if positions == "none" else turns

    def theirs(x):
        y, _, _ = peer(x, attention_mask=hidden[None, None], position_embeddings=cos_sin)
        return y - peer.experts.bias.detach()  # a bias of the layer's output is theirs alone

    def own(x):
        return ours(x, Mask(hidden[None]), rotated, core.RoutingContext())

    check_same(ours, peer, layout, x, own, theirs, **CLOSE)
    if positions == "none":
        torch.testing.assert_close(ours.heads(x), own(x))  # the layer's own attention, which is causal too
