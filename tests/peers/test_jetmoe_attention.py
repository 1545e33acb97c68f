"""transformers' JetMoE attention beside attention experts: the same output, and the same gradients of every weight."""

from __future__ import annotations

import pytest
import torch
from hugging import B, D, E, S, config_of, modeling, randomize

import core
from apps.nets.attention import Mask
from apps.nets.config import TransformerConfig
from apps.nets.expert_attention import ExpertAttention
from apps.nets.positions import rotations

HEADS, WIDTH = 2, 6
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # their gates are float32 whatever the rest is
ATTENTION = core.MoEConfig(E, core.TokenChoice(3), core.AttentionExperts(WIDTH, HEADS))


@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_attention_gives_the_same_output_and_gradients(positions):
    options = {
        **{"hidden_size": D, "num_key_value_heads": HEADS, "kv_channels": WIDTH},
        **{"num_local_experts": E, "num_experts_per_tok": 3},
    }
    config = config_of("JetMoeConfig", **options)
    config._attn_implementation = "eager"
    peer = randomize(modeling("jetmoe").JetMoeAttention(config, layer_idx=0), std=0.3).double().eval()
    transformer = TransformerConfig("nano", dim=D, positions=positions)
    ours = ExpertAttention(transformer, ATTENTION, causal=True).double().eval()
    pairs = {
        "heads.router.gate.weight": ("experts.router.layer.weight", lambda w: w),
        "heads.kv.weight": ("kv_proj.weight", lambda w: w),
        "heads.experts.w_q": ("experts.input_linear.weight", lambda w: w.transpose(1, 2)),
        "heads.experts.w_out": ("experts.output_linear.weight", lambda w: w.transpose(1, 2)),
    }
    assert set(pairs) == {name for name, _ in ours.named_parameters()}
    with torch.no_grad():
        for name, (theirs, turned) in pairs.items():
            ours.get_parameter(name).copy_(turned(peer.get_parameter(theirs)))

    x = torch.randn(B, S, D).double()
    hidden = torch.full((S, S), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
    turns = rotations(0, S, WIDTH, 10000.0, x)
    if positions == "none":
        turns = torch.stack((torch.ones_like(turns[0]), torch.zeros_like(turns[1])))
    cos_sin = tuple(t.squeeze(1).repeat(1, 2)[None] for t in turns)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    y = ours(xs[0], Mask(hidden[None]), None if positions == "none" else turns, core.RoutingContext())
    their_y, _, _ = peer(xs[1], attention_mask=hidden[None, None], position_embeddings=cos_sin)
    # A bias of the layer's output is theirs alone.
    torch.testing.assert_close(y + peer.experts.bias, their_y, **CLOSE)
    if positions == "none":
        torch.testing.assert_close(ours.heads(x), y)  # the layer's own attention, which is causal too
    weights = torch.randn(B, S, D).double()
    (y * weights).sum().backward()
    (their_y * weights).sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, **CLOSE)
    for name, (theirs, turned) in pairs.items():
        wanted = turned(peer.get_parameter(theirs).grad)
        torch.testing.assert_close(ours.get_parameter(name).grad, wanted, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
