"""The network of one task, domain or expert alone puts out what the sparse model does for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import core
from core import FFN, Domain, MoEConfig, RoutingContext, Task, TokenChoice, cut_out
from core.experts import GeneralFFN

D = 8


def built(router: core.RouterConfig, expert: core.ExpertConfig, **options) -> core.MoE:
    layer = MoEConfig(4, router, expert, **options).build(D).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


@pytest.mark.parametrize(
    ("expert", "top_k"),
    [
        *((FFN(6, bias=True), top_k) for top_k in (1, 2, 4)),
        (core.SwiGLU(6), 1),
        (core.ClampedSwiGLU(6, bias=True), 2),
        (GeneralFFN(6, "tanh", gated=True, bias_gate=True, dropout=0.5), 4),
        (core.LoRA(2), 2),
    ],
    ids=str,
)
def test_a_task_is_a_dense_layer(expert, top_k):
    layer = built(Task(3, top_k), expert, num_shared_experts=1, output_bias=True)
    x, state = torch.randn(2, 5, D, dtype=torch.float64), {k: v.clone() for k, v in layer.state_dict().items()}
    for task in range(3):
        dense = cut_out(layer, task=task)
        expected = layer(x, RoutingContext(task_ids_B=torch.full((2,), task)))
        assert_close(dense(x), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


def test_two_experts_of_a_task_by_hand():
    layer = MoEConfig(2, Task(1, 2), FFN(1, activation="relu")).build(1)
    with torch.no_grad():
        layer.router.gate.weight.copy_(torch.tensor([[0.0, 3.0]]).log1p())  # gates of 1/5 and 4/5
        layer.experts.w_in.copy_(torch.tensor([1.0, 2.0]).reshape(2, 1, 1))
        layer.experts.w_out.copy_(torch.tensor([10.0, 20.0]).reshape(2, 1, 1))
    one = cut_out(layer, task=0).expert.weights_of(0)
    assert one["w_in"].tolist() == [[2.0, 1.0]]  # the best first
    assert one["w_out"].flatten().tolist() == pytest.approx([16.0, 2.0])


@pytest.mark.parametrize("expert", [FFN(6), core.MLP((6, D), norm="layer"), core.Constant(mix=True)], ids=str)
def test_a_domain_is_its_expert_of_any_kind(expert):
    layer = built(Domain(4), expert)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    for domain in range(4):
        expected = layer(x, RoutingContext(domain_ids_B=torch.full((2,), domain)))
        assert_close(cut_out(layer, domain=domain)(x), expected, rtol=1e-12, atol=1e-12)


def test_an_expert_of_several_kinds():
    layer = built(TokenChoice(1), core.Mixed((FFN(6), core.Zero(), core.Identity()), (2, 1, 1)))
    x = torch.randn(2, 5, D, dtype=torch.float64)
    assert_close(
        cut_out(layer, expert=1)(x), layer.experts.parts[0](x.flatten(0, 1), "each")[:, 1].unflatten(0, (2, 5))
    )
    assert not cut_out(layer, expert=2)(x).any()
    assert_close(cut_out(layer, expert=3)(x), x)


def test_all_layers_of_a_model_in_place():
    model = nn.ModuleList([built(Task(2, 2), FFN(6)), built(Task(2, 1), FFN(4))])
    assert cut_out(model, task=1) is model
    assert [layer.expert.w_in.shape for layer in model] == [(1, D, 12), (1, D, 4)]


ROUTED = (TokenChoice(), FFN(6))
REFUSED = {
    "nothing": (lambda: built(*ROUTED), {}, "one of task, domain and expert is to be given, not 0"),
    "two": (lambda: built(*ROUTED), {"task": 0, "expert": 1}, "is to be given, not 2"),
    "tokens": (lambda: built(*ROUTED), {"task": 0}, "router TokenChoice does not decide by the task alone"),
    "a domain": (
        lambda: built(Task(2), FFN(6)),
        {"domain": 0},
        "router Task (arXiv 2110.03742) does not decide by the domain alone",
    ),
    "a task": (lambda: built(Task(2), FFN(6)), {"task": 2}, "task=2 is not in range(2)"),
    "an expert": (lambda: built(*ROUTED), {"expert": 4}, "expert=4 is not in range(4)"),
    "a kind": (
        lambda: built(Task(2, 2), core.MLP((D,))),
        {"task": 0},
        "MLPExperts cannot be joined into one expert: 2 of them",
    ),
    "a scale": (
        lambda: built(Task(2, 1), core.Identity()),
        {"task": 0},
        "IdentityExperts cannot be joined into one expert: one at a gate",
    ),
    "a capacity": (
        lambda: built(Task(2), FFN(6), capacity_factor=1.0),
        {"task": 0},
        "with a capacity what an expert computes depends on the batch",
    ),
    "patches": (
        lambda: built(TokenChoice(1), core.Convolution(5, columns=4)),
        {"expert": 0},
        "no layer of one expert takes the place of a PatchMoE",
    ),
    "gates": (
        lambda: core.MMoE(4).build(D, 2),
        {"expert": 0},
        "is a MultiGateMoE: core.MoE and its subclasses are cut out of",
    ),
}


@pytest.mark.parametrize(("make", "given", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(make, given, message):
    with pytest.raises(ValueError) as error:
        cut_out(make(), **given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
