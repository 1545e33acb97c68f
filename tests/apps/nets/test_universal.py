"""The Sparse Universal Transformer: sticks by hand, a loop over tokens and steps, decoding, costs and refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import core
from apps.data.subwords import PAD_ID
from apps.nets import transformer
from apps.nets.config import TransformerConfig
from apps.nets.depths import MixtureOfDepths, by_capacity
from apps.nets.transformer import LanguageModel
from apps.nets.universal import LOSS, Universal

VOCAB, STEPS = 20, 4
TEXT = torch.tensor([[2, 5, 6, 7, 9, 4, 11, 8], [2, 9, 9, 4, 12, 13, 3, 0], [2, 4, 7, 7, 0, 0, 0, 0]])
REAL = TEXT != PAD_ID
MOE = core.MoEConfig(4, core.TokenChoice(top_k=2), core.FFN(hidden_dim=12))
HEADS = core.MoEConfig(4, core.TokenChoice(top_k=2), core.AttentionExperts(head_dim=8, heads_per_expert=2))
PARTS = {"dense": {}, "experts": {"ffn": MOE}, "all experts": {"ffn": MOE, "attention_moe": HEADS}}


def language_model(universal: Universal | None, seed: int = 0, **options: object) -> LanguageModel:
    """Return a model in float64 whose tokens halt with probabilities of about 0.1 to 0.9 after each step."""
    parts = {name: options.pop(name) for name in ("ffn", "attention_moe") if name in options}
    small = {"dim": 16, "hidden_dim": 24, "relative_buckets": 8, "relative_max_distance": 16, "dropout": 0.0}
    torch.manual_seed(seed)
    config = TransformerConfig("nano", **{**small, "decoder_layers": STEPS, **options})
    model = LanguageModel(config, vocab=VOCAB, universal=universal, **parts).double().eval()
    if universal is not None:
        torch.nn.init.normal_(model.decoder.halting.router.weight, std=2.0)
    return model


def depths_of(model: LanguageModel) -> list[int]:
    """Return how many real tokens take each step after the first."""
    with core.record(model) as tape, torch.no_grad():
        model(TEXT)
    return [e.routing.tokens_per_expert_E.item() for e in tape.entries if e.name == "decoder.halting"]


def test_a_stick_by_hand():
    # Untrained, a token halts with 1/2 of what is left: 1/2, 1/4. A threshold of 0.7 is passed by 1/2 + 1/4.
    gate = Universal(threshold=0.7).build(2).eval()
    first, second = torch.tensor([[[4.0, 8.0]]]), torch.tensor([[[16.0, 0.0]]])
    context = core.RoutingContext()
    sticks = gate(first, gate.start(first, context), context)
    assert [x.tolist() for x in (sticks.left_BL, sticks.halted_BLD, sticks.runs_BL)] == [[[0.5]], [[[2, 4]]], [[True]]]
    sticks = gate(second, sticks, context)
    halted = [[[6.0, 4.0]]]  # 2 + 16 / 4
    assert [x.tolist() for x in (sticks.left_BL, sticks.halted_BLD, sticks.runs_BL)] == [[[0.25]], halted, [[False]]]
    assert gate.train()(second, sticks, context).left_BL.tolist() == [[0.125]]


def naive(model: LanguageModel, text: list[int], threshold: float | None) -> Tensor:
    """Return the output of one text, token by token and step by step: (L, D). Positions are not encoded."""
    layer, router = model.decoder.layers[0], model.decoder.halting.router
    h = [x * math.sqrt(16) for x in model.embed(torch.tensor(text))]
    states, expected = [h], [h]  # by step, then by token: what was computed, and what is seen of it
    sums, left, done = [0.0] * len(h), [1.0] * len(h), [False] * len(h)
    for step in range(STEPS):
        new_h, new_s = [], []
        for t, x in enumerate(states[-1]):
            if step > 0 and not done[t]:
                hidden = F.gelu(router.hidden(x))
                halts = left[t] * torch.sigmoid(router.weight[0] @ hidden)
                sums[t], left[t] = sums[t] + halts * x, left[t] - halts
                done[t] = threshold is not None and bool(left[t] < 1 - threshold)
            if done[t]:
                new_h.append(x)
                new_s.append(expected[-1][t])
                continue
            query, seen = layer.mixing_norm(x), layer.mixing_norm(torch.stack(expected[-1][: t + 1]))
            y = x + attended(layer.mixing, query, seen)
            y = y + layer.ffn(layer.ffn_norm(y)[None, None])[0, 0]
            new_h.append(y)
            new_s.append(y if step == 0 else sums[t] + left[t] * y)
        states.append(new_h)
        expected.append(new_s)
    return model.decoder.norm(torch.stack(expected[-1]))


def attended(mixing: torch.nn.Module, query: Tensor, seen: Tensor) -> Tensor:
    """Return what one query sees in (S, D) states, by heads or by the experts of heads that it chooses."""
    if not hasattr(mixing, "heads"):
        H, d = mixing.num_heads, mixing.head_dim
        bias = torch.zeros(3 * H * d) if mixing.qkv.bias is None else mixing.qkv.bias
        q = (mixing.qkv.weight[: H * d] @ query + bias[: H * d]).view(H, d)
        k, v = (seen @ mixing.qkv.weight[H * d :].T + bias[H * d :]).view(-1, 2, H, d).unbind(1)
        weights = torch.einsum("hd,shd->hs", q, k).div(math.sqrt(d)).softmax(-1)
        return mixing.out(torch.einsum("hs,shd->hd", weights, v).flatten())
    heads = mixing.heads
    routing = heads.router(query[None, None])
    k, v = heads.kv(seen).view(-1, 2, 2, 8).unbind(1)
    y = torch.zeros_like(query)
    for e, gate in zip(routing.expert_ids_N.tolist(), routing.gates_N, strict=True):
        q = (query @ heads.experts.w_q[e]).view(2, 8)
        weights = torch.einsum("hd,shd->hs", q, k).div(math.sqrt(8)).softmax(-1)
        y = y + gate * torch.einsum("hs,shd->hd", weights, v).flatten() @ heads.experts.w_out[e]
    return y


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_it_equals_the_loop_over_tokens_and_steps(parts):
    model = language_model(Universal(threshold=0.8), positions="none", **parts)
    steps = depths_of(model)
    assert REAL.sum() > steps[0] > steps[-1] > 0  # some halt early, some go on to the end
    for row, text in enumerate(TEXT.tolist()):
        length = int(REAL[row].sum())
        assert_close(model.hidden(TEXT)[row, :length], naive(model, text[:length], 0.8))
    with core.record(model) as tape:
        model(TEXT)
    loads = [e.routing.tokens_per_expert_E.sum().item() for e in tape.entries if e.name.endswith("ffn")]
    assert loads == ([2 * n for n in (int(REAL.sum()), *steps)] if "ffn" in parts else [])
    # In training no token stops, and the gradient is that of the loop.
    model.train()
    gradients = []
    for run in (lambda: model.hidden(TEXT[:1])[0], lambda: naive(model, TEXT[0].tolist(), None)):
        model.zero_grad()
        y = run()
        y.sin().sum().backward()
        gradients.append([y, *(p.grad for p in model.decoder.parameters())])
    for actual, expected in zip(*gradients, strict=True):
        assert_close(actual, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.float().eval()(TEXT).isfinite().all()
    assert model.bfloat16()(TEXT).isfinite().all()


@pytest.mark.parametrize(
    ("positions", "parts"),
    [("sinusoidal", "dense"), ("rotary", "experts"), ("relative", "dense"), ("rotary", "all experts")],
)
def test_decoding_equals_the_sequence(positions, parts, monkeypatch):
    monkeypatch.setattr(transformer, "SLOTS", 1)
    model = language_model(Universal(threshold=0.8), positions=positions, **PARTS[parts])
    logits_BLV = model(TEXT)
    cache = model.start(3).expand(2)
    for t in range(TEXT.shape[1]):
        logits_RV = model.step(TEXT[:, t].repeat_interleave(2), cache).view(3, 2, VOCAB)
        for k in range(2):
            assert_close(logits_RV[REAL[:, t], k], logits_BLV[REAL[:, t], t])


def test_penalties_and_costs_are_those_of_all_steps_and_parameters_those_of_one_layer():
    # A token takes l steps with probability p_l: 1/2, 1/4, 1/8 and the rest 1/8, in all 1/2 + 2/4 + 3/8 + 4/8 = 15/8.
    model = language_model(Universal(depth_penalty=0.25)).train()
    torch.nn.init.zeros_(model.decoder.halting.router.weight)
    with core.record(model) as tape:
        model(TEXT)
    losses = core.aux_losses(tape)
    assert_close(losses.total, torch.tensor(0.25 * (15 / 8 - 1), dtype=losses.total.dtype))
    assert_close(losses.terms[LOSS], torch.tensor((15 / 8 - 1) / 3, dtype=losses.terms[LOSS].dtype))  # of each step
    losses.total.backward()
    assert model.decoder.halting.router.weight.grad.abs().max() > 0
    with core.record(language_model(Universal()).train()) as tape:
        assert core.aux_losses(tape).terms == {}
    universal = Universal()
    one, all_steps = language_model(None, decoder_layers=1), language_model(universal)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (one, all_steps)]
    assert sizes[1] - sizes[0] == universal.num_params(16) == 16 * 17 + 16
    assert core.active_params(all_steps) == sizes[1]
    four = language_model(None)
    with by_capacity(all_steps):
        more = core.count_flops(all_steps, TEXT) - core.count_flops(four, TEXT)
    assert more == (STEPS - 1) * TEXT.numel() * universal.flops_per_token(16)


def test_tokens_that_all_halt_end_the_steps():
    # Untrained, half of the stick is gone after the first step: at a threshold of 0.4 nobody goes on.
    model = language_model(Universal(threshold=0.4), ffn=MOE)
    torch.nn.init.zeros_(model.decoder.halting.router.weight)
    plain = language_model(None, ffn=MOE, decoder_layers=1)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "halting" not in k})
    with core.record(model) as tape:
        assert_close(model(TEXT), plain(TEXT))
    assert [e.name for e in tape.entries] == ["decoder.layers.0.ffn", "decoder.halting"]
    cache = model.start(3)
    for t in range(3):
        assert_close(model.step(TEXT[:, t], cache), plain(TEXT)[:, t])
    with by_capacity(model), core.record(model) as tape:
        model(TEXT)
    assert len(tape.entries) == STEPS + STEPS - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_layers": 1}, r"^decoder_layers=1 is one step: universal uses a layer again"),
        ({"depths": MixtureOfDepths()}, r"^universal and depths do not go together"),
        ({"ffn": [MOE, MOE]}, r"^universal has one layer for all steps: moe lists 2$"),
        ({"ffn": MOE, "share_experts": True}, r"^share_experts=True has no meaning with universal"),
        ({"ffn": MOE, "moe_blocks": [1]}, r"^moe_blocks index 1 is out of range for depth=1$"),
    ],
)
def test_refused_in_one_line(options, message):
    config = TransformerConfig("nano", decoder_layers=options.pop("decoder_layers", None))
    with pytest.raises(ValueError, match=message):
        LanguageModel(config, vocab=9, universal=Universal(), **options)
