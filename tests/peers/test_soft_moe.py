"""soft-moe-pytorch's layer (Soft MoE, arXiv 2308.00951) beside our ``SoftSlots``. Version seen: 0.1.9."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside import check_same, load
from torch import Tensor

from core import FFN, MoEConfig, RoutingContext
from core.routing.soft.soft import SoftSlots

soft_moe = pytest.importorskip("soft_moe_pytorch")

D, F, E, P = 16, 32, 4, 3
B, S = 2, 10


def layout(peer: Any, read: Any) -> dict[str, Tensor]:
    fc1, fc2 = ([f[i] for f in peer.experts.experts] for i in (0, 3))
    return {
        "router.phi": read(peer.slot_embeds),
        "experts.w_in": torch.stack([read(f.weight).mT for f in fc1]),
        "experts.b_in": torch.stack([read(f.bias) for f in fc1]),
        "experts.w_out": torch.stack([read(f.weight).mT for f in fc2]),
        "experts.b_out": torch.stack([read(f.bias) for f in fc2]),
    }


def pair_of_layers() -> tuple[Any, Any]:
    """Their layer and ours with the same weights.

    Their logits are ``(sqrt(D) l2(x)) . (sqrt(D) l2(phi))`` while the learned factors of both norms are 1: ours with a
    scale of D.
    """
    peer = soft_moe.SoftMoE(D, num_experts=E, num_slots=P, expert_mult=F // D)
    layer = MoEConfig(E, SoftSlots(P), FFN(F, "gelu", bias=True)).build(D)
    load(layer, {"router.scale": torch.tensor(float(D)), **layout(peer, lambda p: p.detach())})
    return peer, layer


def test_layers_give_the_same_output_and_gradients_for_normalized_tokens():
    peer, layer = pair_of_layers()
    x = peer.norm(torch.randn(B, S, D)).detach()  # whose norm is themselves
    torch.testing.assert_close(layer(x), peer(x), rtol=1e-5, atol=1e-5)
    # Through the norm in both, so that the gradients of the tokens are of the same function.
    check_same(layer, peer, layout, x, lambda x: layer(peer.norm(x)), peer, rtol=1e-5, atol=1e-5)


def test_dispatch_and_combine_weights_are_the_softmaxes_of_their_logits():
    peer, layer = pair_of_layers()
    x = torch.randn(B, S, D)
    logits_BSEP = torch.einsum("bsd,epd->bsep", peer.norm(x), peer.slot_norm(peer.slot_embeds))
    routing = layer.router(x)
    torch.testing.assert_close(routing.dispatch_GSEP, logits_BSEP.softmax(1), rtol=1e-5, atol=1e-6)
    combine_BSEP = logits_BSEP.flatten(2).softmax(-1).view(B, S, E, P)
    torch.testing.assert_close(routing.combine_GSEP, combine_BSEP, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_their_slots_are_means_of_normalized_tokens():
    # Algorithm 1 of the paper normalizes for the logits alone and averages the tokens themselves: tokens ten times as
    # long make slots ten times as long. The peer averages what it normalized, so its output stays the same.
    peer, layer = pair_of_layers()
    x = torch.randn(B, S, D)
    assert not torch.allclose(layer(10 * x), layer(x), rtol=1e-3)
    torch.testing.assert_close(layer(peer.norm(x)), peer(x), rtol=1e-5, atol=1e-5)
    if torch.allclose(peer(x), layer(x), rtol=1e-4, atol=1e-5):
        pytest.skip("soft-moe-pytorch slots: the installed version averages the tokens themselves")
    torch.testing.assert_close(peer(10 * x), peer(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_their_masked_tokens_come_out_as_the_mean_of_all_slots():
    # Masked logits are all the lowest number, and a softmax over the slots of equal numbers is uniform. Ours are zero.
    peer, layer = pair_of_layers()
    x = peer.norm(torch.randn(B, S, D))
    valid = torch.arange(S) < torch.tensor([S, 6])[:, None]
    ours, theirs = layer(x, RoutingContext(valid_BS=valid)), peer(x, mask=valid)
    torch.testing.assert_close(ours[valid], theirs[valid], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1, :6], layer(x[1:, :6])[0], rtol=1e-5, atol=1e-5)  # as if the rest were not there
    assert torch.equal(ours[~valid], torch.zeros(4, D))
    if torch.allclose(theirs[~valid], ours[~valid], atol=1e-5):
        pytest.skip("soft-moe-pytorch mask: the installed version gives masked tokens zero")
    slots_EPD = torch.einsum("sd,sep->epd", x[1, :6], layer.router(x[1:, :6]).dispatch_GSEP[0])
    outputs_EPD = torch.stack([expert(slots) for expert, slots in zip(peer.experts.experts, slots_EPD, strict=True)])
    mean_D = outputs_EPD.flatten(0, 1).mean(0)
    torch.testing.assert_close(theirs[~valid], mean_D.expand(4, D), rtol=1e-5, atol=1e-5)
