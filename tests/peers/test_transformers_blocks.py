"""transformers' blocks beside ours: the same output, and the same gradient of the tokens and of every weight."""

from __future__ import annotations

import pytest
import torch
from hugging import GATES, B, D, E, F, S, T, config_of, modeling, randomize, tensor_of
from hugging_blocks import BLOCKS, load


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


def test_gpt_oss_experts_fed_by_our_router_give_the_block():
    # Its clamped SwiGLU is no expert of ours: the experts stay theirs.
    module = modeling("gpt_oss")
    config = config_of("GptOssConfig", **GATES["gpt-oss"].options, intermediate_size=F)
    peer = randomize(module.GptOssMLP(config), std=0.3).eval()
    router = GATES["gpt-oss"].ours.build(D, E)
    router.gate.weight.data.copy_(peer.router.weight)
    router.gate.bias.data.copy_(peer.router.bias)
    x = torch.randn(B, S, D)
    routing = router(x)
    y = peer.experts(x.view(T, D), routing.expert_ids_N.view(T, 4), routing.gates_N.view(T, 4))
    torch.testing.assert_close(y.view(B, S, D), peer(x)[0], rtol=1e-5, atol=1e-5)
