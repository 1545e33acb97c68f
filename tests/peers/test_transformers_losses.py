"""transformers' balance losses beside ours."""

from __future__ import annotations

import pytest
import torch
from hugging import B, D, E, S, T, modeling, skip_if_mended
from torch import Tensor, nn

from core import FFN, Balance, MoEConfig, RoutingContext, TokenChoice, aux_losses, record


def loss_terms(
    router: TokenChoice, x: Tensor, balance: Balance, valid: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """The unweighted terms of one pass, and its logits."""
    layer = MoEConfig(E, router, FFN(1), balance=balance).build(D)
    nn.init.normal_(layer.router.gate.weight)
    with record(layer) as tape:
        layer(x, None if valid is None else RoutingContext(valid_BS=valid))
    return aux_losses(tape).terms, tape.entries[0].routing.evidence.logits_TE


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("top_k", [2, 4])
@pytest.mark.parametrize("model", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "nllb_moe"])
def test_their_load_balancing_loss_is_top_k_times_ours(model, top_k, padded):
    # sum over e of (pairs of e / tokens) P_e * E; ours divides by the pairs, K times as many, and is 1 at balance.
    x = torch.randn(B, S, D)
    valid = torch.arange(S) < torch.tensor([S, 5, 9])[:, None] if padded else None
    terms, logits_TE = loss_terms(TokenChoice(top_k=top_k), x, Balance(), valid)
    mask = None if valid is None else valid.long()
    theirs = modeling(model).load_balancing_loss_func((logits_TE,), E, top_k, mask)
    assert terms["load_balancing_loss"] != 1
    torch.testing.assert_close(theirs, top_k * terms["load_balancing_loss"])


def test_their_load_balancing_loss_pools_the_layers_and_misses_a_collapse():
    # Two layers of two experts: the first sends all to expert 0, the second all to expert 1. Scores are 0.9 and 0.1.
    # Pooled: f = (1/2, 1/2), P = (1/2, 1/2), so 2 * (1/4 + 1/4) = 1, perfect balance, with gradients that cancel.
    # Ours, layer by layer: 2 * (1 * 0.9 + 0 * 0.1) = 1.8 in each.
    first_TE = torch.tensor([[0.9, 0.1]]).log().expand(10, 2)
    theirs = modeling("mixtral").load_balancing_loss_func((first_TE, first_TE.flip(1)), 2, 1)
    ours = []
    for logits_TE in (first_TE, first_TE.flip(1)):
        layer = MoEConfig(2, TokenChoice(top_k=1), FFN(1)).build(2)
        layer.router.gate.weight.data.copy_(torch.eye(2))
        with record(layer) as tape:
            layer(logits_TE)
        ours.append(aux_losses(tape).terms["load_balancing_loss"])
    assert torch.stack(ours).tolist() == pytest.approx([1.8, 1.8])
    skip_if_mended(theirs, torch.tensor(1.8), "loss of several layers")
    assert theirs.item() == pytest.approx(1.0)


def test_switch_losses():
    module, x = modeling("switch_transformers"), torch.randn(B, S, D)
    terms, logits_TE = loss_terms(TokenChoice(top_k=1), x, Balance(sequence_balance=1e-4))
    logits_BSE = logits_TE.view(B, S, E)
    torch.testing.assert_close(module.router_z_loss_func(logits_BSE), terms["router_z_loss"])
    # Theirs is a mean over sequences: of the batch it is our load_balancing_loss, by sequence our sequence_balance.
    scores_BSE, best_BS = logits_BSE.softmax(-1), logits_BSE.argmax(-1)
    whole = module.load_balancing_loss_func(scores_BSE.view(1, T, E), best_BS.view(1, T))
    by_sequence = module.load_balancing_loss_func(scores_BSE, best_BS)
    torch.testing.assert_close(whole, terms["load_balancing_loss"])
    torch.testing.assert_close(by_sequence, terms["sequence_balance"])
    assert by_sequence != whole
