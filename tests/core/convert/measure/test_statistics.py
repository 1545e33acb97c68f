"""Statistics of experts: by hand, and against a loop over tokens and experts."""

from __future__ import annotations

import pytest
import torch
from shrinking import D, built, tokens
from torch import nn
from torch.testing import assert_close

import core
from core import MoEConfig, TokenChoice, expert_statistics
from core.convert.measure import statistics as room


def test_three_tokens_of_two_experts():
    # A token (a, b) has the logits a of expert 0 and -a of expert 1; expert e multiplies by e + 1.
    layer = MoEConfig(2, TokenChoice(1, score_func="sigmoid"), core.IA3()).build(2)
    with torch.no_grad():
        layer.router.gate.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        layer.experts.v.copy_(torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    batch = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [-3.0, -4.0]]])
    own = expert_statistics(layer, [batch], every_token=True)[""]
    three, one = (1 / (1 + torch.tensor(-a).exp().item()) for a in (3.0, 1.0))  # the gates
    assert own.loads_E.tolist() == [2, 1]
    assert own.norms_E.tolist() == [6, 10]  # 5 + 1, and 2 * 5
    assert own.squares_E.tolist() == [26, 100]
    assert own.gated_norms_E.tolist() == pytest.approx([5 * three + one, 10 * three])
    assert own.mean_output_ED.tolist() == [[2, 2], [-6, -8]]
    assert own.spread_E.tolist() == [10, 0]  # (1, 2) and (-1, -2) from the mean, 5 each
    assert own.every_output_ED.flatten().tolist() == pytest.approx([1 / 3, 0, 2 / 3, 0])


@pytest.mark.parametrize(
    ("router", "expert", "options"),
    [
        (TokenChoice(2), core.FFN(6, bias=True), {}),
        (TokenChoice(2, gates_on="input"), core.SwiGLU(6), {}),
        (TokenChoice(2), core.MLP((6, D)), {"capacity_factor": 0.5}),
        (core.ExpertChoice(), core.LoRA(2), {}),
        (TokenChoice(1), core.Mixed((core.FFN(6), core.Constant()), (3, 1)), {}),
    ],
    ids=["FFN", "gates on the input", "capacity", "ExpertChoice", "Mixed"],
)
def test_sums_of_two_batches_are_those_of_a_loop(router, expert, options, monkeypatch):
    monkeypatch.setattr(room, "CHUNK", 5)
    layer = built(MoEConfig(4, router, expert, **options)).train()
    if isinstance(expert, core.LoRA):
        nn.init.normal_(layer.experts.w_b)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, 9:] = False
    batches = [(tokens(), core.RoutingContext(valid)), (tokens() * 2, core.RoutingContext(valid))]
    own = expert_statistics(layer, batches, every_token=True)[""]
    assert layer.training
    layer.eval()
    loads, gated, norms, squares = torch.zeros(4, 4, dtype=torch.float64)
    outputs, every, count = torch.zeros(4, D, dtype=torch.float64), torch.zeros(4, D, dtype=torch.float64), 0
    for x, context in batches:
        routing, x_TD, computed = layer.router(x, context), x.flatten(0, 1), {}
        pairs = [v.tolist() for v in (routing.token_index_N, routing.expert_ids_N, routing.gates_N)]
        for t, e, g in zip(*pairs, strict=True):
            if e == 4:
                continue
            scale = g if layer.router.gates_on == "input" else 1.0
            computed[t] = scale
            y = core.cut_out(layer, expert=e)(scale * x_TD[t : t + 1])[0].double().detach()
            loads[e] += 1
            norms[e] += y.norm()
            gated[e] += y.norm() * (g if scale == 1.0 else 1.0)
            squares[e] += y.square().sum()
            outputs[e] += y
        count += len(computed)
        for e in range(4):
            every[e] += sum(core.cut_out(layer, expert=e)(x_TD[t : t + 1])[0].double().detach() for t in computed)
    assert_close(own.loads_E, loads)
    assert_close(own.norms_E, norms, rtol=1e-5, atol=1e-6)
    assert_close(own.gated_norms_E, gated, rtol=1e-5, atol=1e-6)
    assert_close(own.squares_E, squares, rtol=1e-5, atol=1e-6)
    assert_close(own.outputs_ED, outputs, rtol=1e-5, atol=1e-5)
    if layer.router.gates_on == "output":
        assert_close(own.every_output_ED, every / count, rtol=1e-5, atol=1e-6)


def test_a_model_is_run_as_it_asks_and_left_as_it_was():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe, self.dropout = built(MoEConfig(4)), nn.Dropout(0.5)

        def forward(self, x, scale):
            return self.moe(self.dropout(x * scale))

    net, x = Net(), tokens()
    net.dropout.eval()
    modes = [m.training for m in net.modules()]
    own = expert_statistics(net, [{"x": x, "scale": 2.0}], lambda model, batch: model(**batch))
    again = expert_statistics(net, [(x, 2.0)])
    assert_close(own["moe"].norms_E, again["moe"].norms_E)
    assert own["moe"].loads_E.sum() == 2 * 24
    assert [m.training for m in net.modules()] == modes
    assert not net.moe.experts._forward_pre_hooks


def test_slots_are_rows_too():
    own = expert_statistics(built(MoEConfig(4, core.SoftSlots(2))), [tokens()], every_token=True)[""]
    assert own.loads_E.tolist() == [4] * 4  # two slots of two sequences
    assert own.every_output_ED.shape == (4, D)


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (lambda: nn.Linear(2, 2), [], "a Linear without MoE layers has no experts"),
        (lambda: built(MoEConfig(4)), [], "layer '' computed no rows of experts in these batches"),
        (lambda: built(MoEConfig(4, core.Merge())), [tokens()], "layer '' computed no rows"),
        (lambda: built(MoEConfig(4, expert=core.AttentionExperts(4))), [tokens()], "layer '' computed no rows"),
        (lambda: built(MoEConfig(4, expert=core.PEER())), [tokens()], "layer '' computed no rows"),
    ],
)
def test_what_has_no_statistics_is_refused(model, batches, message):
    with pytest.raises(ValueError, match=message):
        expert_statistics(model(), batches)
