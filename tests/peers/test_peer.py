"""PEER-pytorch beside ours: the same weights give the same experts, scores and output.

pip install --target peers --no-deps PEER-pytorch einx frozendict einops
"""

from __future__ import annotations

import pytest
import torch

import core

pytest.importorskip("einx")
peer_pytorch = pytest.importorskip("PEER_pytorch")

D, H, K, E = 16, 3, 4, 49


def pair(**options):
    """Return the peer's layer, and ours with its weights: its query is laid out (half, head, key), ours (head, half,
    key), and each of its heads has keys of its own."""
    peer = peer_pytorch.PEER(D, heads=H, num_experts=E, num_experts_per_head=K, **options).double().eval()
    config = core.MoEConfig(E, core.ProductKeys(K, H, query_dim=D, shared_keys=False), core.PEER())
    ours = config.build(D).double().eval()
    with torch.no_grad():
        peer.keys.normal_()  # its own are so small that all gates are nearly equal
        ours.experts.u.copy_(peer.weight_down_embed.weight)
        ours.experts.v.copy_(peer.weight_up_embed.weight)
        ours.router.keys.copy_(peer.keys.permute(2, 0, 1, 3))
        w = peer.to_queries[0].weight.unflatten(0, (2, H, D // 2))
        ours.router.w_query.copy_(w.transpose(0, 1).flatten(0, 2))
    return peer, ours


def retrieved(peer, x):
    """Return the ids and the scores of a pass, and its output."""
    seen = {}
    peer.weight_down_embed.register_forward_pre_hook(lambda _, args: seen.update(ids=args[0]))
    peer.score_activation.register_forward_hook(lambda _, args, out: seen.update(scores=out))
    return seen, peer(x)


def test_output_ids_and_scores_are_the_peer_s():
    peer, ours = pair(non_competing_scores=False)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    (seen, y), routing = retrieved(peer, x), ours.router(x)
    torch.testing.assert_close(ours(x), y)
    assert torch.equal(routing.expert_ids_N.view(2, 5, H, K), seen["ids"])
    torch.testing.assert_close(routing.gates_N.view(2, 5, H, K), seen["scores"])


def test_its_default_retrieves_one_expert_a_head():
    peer, _ = pair()
    seen, _ = retrieved(peer, torch.randn(2, 5, D, dtype=torch.float64))
    if seen["ids"].shape[-1] == K:
        pytest.skip("the peer retrieves num_experts_per_head by now")
    assert seen["ids"].shape[-1] == 1
