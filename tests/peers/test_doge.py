"""transformers' Doge (CDMoE) beside ``PEER`` and ``ProductKeys`` with a shared FFN: the same output and gradients.

Its gate gives the scores of the sub-keys themselves, 2 n numbers a token. They are our queries where each sub-key is a
unit vector.
"""

from __future__ import annotations

import pytest
import torch
from beside import check_same, load
from hugging import B, D, F, S, T, config_of, modeling, randomize, skip_if_mended
from hugging_blocks import shared_swiglu

import core

KEYS, K = 6, 5
ROUTER = core.ProductKeys(top_k=K, heads=1, query_dim=2 * KEYS)
LAYER = core.MoEConfig(KEYS**2, ROUTER, core.PEER("silu"), num_shared_experts=1, shared_expert=core.SwiGLU(F))


def layout(peer, read):
    return {
        "router.w_query": read(peer.router_gate.weight),
        "experts.u": read(peer.down_embed.weight),
        "experts.v": read(peer.up_embed.weight),
        **shared_swiglu(peer, 1, read),
    }


def config(num_experts):
    sizes = {"hidden_size": D, "intermediate_size": F, "num_experts_per_tok": K, "is_moe": True}
    return config_of("DogeConfig", num_experts=num_experts, **sizes)


def pair():
    peer = randomize(modeling("doge").DogeCDMoE(config(KEYS**2)), std=0.3).double().eval()
    layer = LAYER.build(D, causal=True).double().eval()
    unit_keys = torch.eye(KEYS).expand(2, 1, KEYS, KEYS)
    load(layer, {"router.keys": unit_keys, **layout(peer, lambda p: p.detach())})
    return peer, layer


def by_token(peer, x_BSD):
    """Return what it gives for each token alone, as it does in decoding."""
    return torch.stack([peer(x_D.view(1, 1, D))[0].view(D) for x_D in x_BSD.flatten(0, 1)]).view_as(x_BSD)


def test_token_by_token_output_and_gradients_are_equal():
    peer, layer = pair()
    check_same(layer, peer, layout, torch.randn(B, S, D).double(), layer, lambda x: by_token(peer, x))


@torch.no_grad()
def test_in_a_batch_it_takes_the_scores_of_other_tokens():
    # Its (T, 2 n) scores are viewed as (2, T, n): token t gets, for its first half, half t % 2 of token t // 2, and for
    # its second one half (T + t) % 2 of token (T + t) // 2. Token 0 of 42 takes scores of token 21, of another text.
    peer, layer = pair()
    x = torch.randn(B, S, D).double()
    theirs, scores_2Tn = peer(x)
    skip_if_mended(theirs, layer(x), "Doge: scores of other tokens")
    own_T2n = peer.router_gate(x).view(T, 2, KEYS)
    for half in (0, 1):
        for t in range(T):
            place = half * T + t
            assert torch.equal(scores_2Tn[half, t], own_T2n[place // 2, place % 2])
    changed = x.clone()
    changed.view(T, D)[T // 2] += 1.0
    assert not torch.allclose(peer(changed)[0][0, 0], theirs[0, 0])
    torch.testing.assert_close(layer(changed)[0], layer(x)[0])


def test_of_a_number_that_is_no_square_it_leaves_experts_out():
    # 37 experts have floor(sqrt(37)) = 6 sub-keys a half: expert 36 is never retrieved. Ours refuses the number.
    num_experts = KEYS**2 + 1
    assert modeling("doge").DogeCDMoE(config(num_experts)).num_keys ** 2 < num_experts
    with pytest.raises(ValueError, match=f"^num_experts={num_experts} is no square"):
        core.MoEConfig(num_experts, LAYER.router, LAYER.expert)
