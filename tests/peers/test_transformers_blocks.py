"""transformers' blocks beside ours: the same output, and the same gradient of the tokens and of every weight."""

from __future__ import annotations

import pytest
import torch
from hugging import B, D, E, F, S, T, config_of, modeling, randomize, tensor_of
from hugging_blocks import BLOCKS, load, swiglu

from core import ClampedSwiGLU, MoEConfig, TokenChoice


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_give_the_same_output_and_gradients(name):
    case = BLOCKS[name]
    peer = randomize(getattr(modeling(case.model), case.block)(config_of(case.config, **case.options)), std=0.3).eval()
    layer = case.ours.build(D).eval()
    load(layer, case.layout(peer, lambda p: p.detach()))
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.copy_(peer.gate.e_score_correction_bias)

    x = torch.randn(B, S, D)
    ours_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, their_y = layer(ours_x), peer(their_x)
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


def test_the_clamped_experts_of_deepseek_v4_are_ours():
    # With a router of ours: theirs scores by the root of a softplus.
    module = modeling("deepseek_v4")
    config = config_of("DeepseekV4Config", hidden_size=D, n_routed_experts=E, moe_intermediate_size=F, swiglu_limit=0.5)
    peer = randomize(module.DeepseekV4Experts(config), std=0.3).eval()
    layer = MoEConfig(E, TokenChoice(top_k=3), ClampedSwiGLU(F, limit=0.5)).build(D)
    weights = swiglu("experts", peer.gate_up_proj.detach(), peer.down_proj.detach())
    load(layer, {"router.gate.weight": layer.router.gate.weight.detach(), **weights})
    x = torch.randn(B, S, D)
    routing = layer.router(x)
    expected = peer(x.view(T, D), routing.expert_ids_N.view(T, 3), routing.gates_N.view(T, 3))
    torch.testing.assert_close(layer(x).view(T, D), expected, rtol=1e-5, atol=1e-5)
