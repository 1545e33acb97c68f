"""A grown layer computes what it did before where no new expert is chosen, and what is frozen stays."""

from __future__ import annotations

import io

import pytest
import torch
from shrinking import ROUTERS, D, built, tokens
from torch import nn

import core
from core import MoEConfig, TokenChoice


def out_of_reach(layer: core.MoE, new: tuple[int, ...]) -> None:
    """Give the new rows of a linear gate a bias that no token chooses."""
    with torch.no_grad():
        layer.router.gate.bias[list(new)] = -1e4


def test_two_experts_and_a_third():
    # Expert e multiplies by e + 1. A token (a, 0) has the logits a of expert 0 and -a of expert 1, so (1, 0) takes
    # expert 0 and (-1, 0) expert 1; the third expert's row is (0, 9), which no token with 0 there prefers to a = 1.
    class Times(core.Experts):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts = 2
            self.factor = nn.Parameter(torch.tensor([1.0, 2.0]))

        def compute_rows(self, rows: core.Rows) -> core.Rows:
            counts = torch.diff(rows.offsets_E, prepend=rows.offsets_E.new_zeros(1))
            return rows.with_output(rows.x * self.factor.repeat_interleave(counts)[:, None])

        def reset_parameters(self) -> None:
            nn.init.constant_(self.factor, 3.0)

    config = TokenChoice(1, score_func="sigmoid")
    layer = core.MoE(config.build(2, 2), Times(), pairs_per_token=1.0, dim=2)
    with torch.no_grad():
        layer.router.gate.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    x_TD = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    p = 1 / (1 + torch.tensor(-1.0).exp())  # sigmoid(1), the gate of both
    assert torch.allclose(layer(x_TD), torch.stack((p * x_TD[0], p * 2 * x_TD[1])))

    assert core.grow_experts(layer, 1) == (2,)
    with torch.no_grad():
        layer.router.gate.weight[2] = torch.tensor([0.0, 9.0])
    assert layer.experts.factor.tolist() == [1.0, 2.0, 3.0]
    assert torch.allclose(layer(x_TD), torch.stack((p * x_TD[0], p * 2 * x_TD[1])))
    assert torch.allclose(layer(torch.tensor([[0.0, 1.0]])), torch.tensor([[0.0, 3.0]]), atol=1e-3)  # sigmoid(9) * 3


GROWING = {
    "TokenChoice": (TokenChoice(2, gate_bias=True), 3),
    "learned noise, a selection bias": (TokenChoice(2, gate_bias=True, noise="learned", expert_bias=True), 2),
    "sigmoid": (TokenChoice(2, score_func="sigmoid", normalize=False, gate_bias=True), 1),
    "groups": (TokenChoice(2, gate_bias=True, num_groups=2, limited_groups=1), 2),
}


@pytest.mark.parametrize(("router", "n"), GROWING.values(), ids=GROWING)
@pytest.mark.parametrize("start", ["fresh", "copy"])
def test_tokens_that_choose_no_new_expert_come_out_as_before(router, n, start):
    layer = built(MoEConfig(4, router, core.FFN(6, bias=True), num_shared_experts=1)).eval()
    x, old = tokens(), [layer.experts.weights_of(e)["w_in"].clone() for e in range(4)]
    expected = layer(x)
    loads = [1.0, 9.0, 3.0, 4.0] if start == "copy" else None
    new = core.grow_experts(layer, n, start=start, loads_E=loads)
    kept = [e for e in range(4 + n) if e not in new]
    assert new == ((2, 5) if router.num_groups == 2 else tuple(range(4, 4 + n)))  # each group's end
    assert all(torch.equal(layer.experts.weights_of(e)["w_in"], w) for e, w in zip(kept, old, strict=True))
    out_of_reach(layer, new)
    torch.testing.assert_close(layer(x), expected)
    if start == "copy":  # of 1, the most used, then of 3; within groups (0, 1) and (2, 3): of 1 and of 3
        for e, source in zip(new, (1, 3, 2), strict=False):
            assert torch.equal(layer.experts.weights_of(e)["w_in"], old[source])


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_a_grown_layer_trains_and_loads_into_one_that_is_built_larger(router):
    config = MoEConfig(4, router, core.SwiGLU(6, bias=True))
    layer = built(config)
    x, context = tokens(), core.RoutingContext(token_ids_BS=torch.arange(24).view(2, 12) % 20)
    core.grow_experts(layer, 2, freeze=True)
    larger = built(MoEConfig(6, router, core.SwiGLU(6, bias=True)), seed=1)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    larger.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(larger.eval()(x, context), layer.eval()(x, context))
    assert (larger.num_experts, larger.pairs_per_token) == (layer.num_experts, layer.pairs_per_token)
    assert core.active_params(larger) == core.active_params(layer)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    layer.train()(x, context).square().sum().backward()
    optimizer.step()
    for e in range(6):
        is_new = e >= 4 if getattr(router, "num_groups", getattr(router, "num_prototypes", 1)) == 1 else e in (2, 5)
        if isinstance(router, core.Ensemble):
            is_new = e in (2, 5)
        for name, value in layer.experts.weights_of(e).items():
            assert is_new or torch.equal(value, state[f"experts.{name}"][e]), f"{name} of expert {e}"


def test_frozen_experts_and_rows_of_the_gate_stay_and_new_ones_learn():
    layer = built(MoEConfig(3, TokenChoice(2), core.FFN(6)))
    new = core.grow_experts(layer, 2, freeze=True)
    layer.load_state_dict(layer.state_dict())  # hooks are not of the state, and stay
    layer.double().float()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        layer(tokens()).square().sum().backward()
        optimizer.step()
    for name, value in layer.state_dict().items():
        assert torch.equal(value[:3], before[name][:3]), name
        assert all(not torch.equal(value[e], before[name][e]) for e in new), name
    again = built(MoEConfig(5, TokenChoice(2), core.FFN(6)))
    again.load_state_dict(layer.state_dict())
    core.freeze_experts(again, range(3))  # a state has no hooks: they are put on the layer that is loaded into
    again(tokens()).square().sum().backward()
    assert not again.experts.w_in.grad[:3].any()
    assert again.experts.w_in.grad[3:].any()


def momentum_from_before(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def decay(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)


class Twice(torch.optim.SGD):
    """A step within a step."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, lr=0.1, weight_decay=0.5)

    def step(self, closure=None):
        super().step(closure)
        return super().step()


@pytest.mark.parametrize("make", [momentum_from_before, decay, Twice])
def test_held_experts_stay_under_any_optimizer_and_new_ones_are_decayed(make):
    layer = built(MoEConfig(5, core.NullExperts(2, 2), core.FFN(6)))
    optimizer, frozen = make(layer.parameters()), (0, 2)

    def steps() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            layer(tokens()).square().sum().backward()
            optimizer.step()

    steps()  # the optimizer has a state of all experts
    core.freeze_experts(layer, frozen)
    core.hold_experts(optimizer, layer, frozen)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    steps()
    for name, value in layer.state_dict().items():
        assert all(torch.equal(value[e], before[name][e]) for e in frozen), name
        assert all(not torch.equal(value[e], before[name][e]) for e in (1, 3, 4)), name
    gate = next(n for n, v in before.items() if v.shape[0] == 7)
    assert torch.equal(layer.state_dict()[gate][5:], before[gate][5:])  # null experts are as old


def test_what_a_gate_has_for_all_experts_is_frozen_as_a_whole():
    layer = built(MoEConfig(4, core.Cosine(2, proj_dim=3), core.FFN(6)))
    core.grow_experts(layer, 1, freeze=True)
    assert [n for n, p in layer.router.named_parameters() if p.requires_grad] == ["gate.weight"]


def test_a_new_selection_bias_is_the_mean_and_nothing_is_drawn_twice():
    layer = built(MoEConfig(2, TokenChoice(1, expert_bias=True), core.FFN(6)))
    layer.router.expert_bias.copy_(torch.tensor([1.0, 3.0]))
    core.grow_experts(layer, 3, init=nn.init.ones_)
    assert layer.router.expert_bias.tolist() == [1.0, 3.0, 2.0, 2.0, 2.0]
    assert bool((layer.experts.w_in[2:] == 1).all())
    fresh = built(MoEConfig(2, TokenChoice(1), core.FFN(6)))
    core.grow_experts(fresh, 3)
    assert len({w.sum().item() for w in fresh.experts.w_in.detach()}) == 5


def test_batch_statistics_half_precision_and_experts_without_parameters_grow():
    layer = built(MoEConfig(2, TokenChoice(1), core.MLP((6, D), norm="batch"))).bfloat16()
    core.grow_experts(layer, 1)
    assert layer.experts.running_var_0[2].eq(1).all()
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(tokens().bfloat16()).isfinite().all()
    layer = built(MoEConfig(2, TokenChoice(1), core.Identity()))
    core.grow_experts(layer, 2)
    assert layer(tokens()).shape == (2, 12, D)


@pytest.mark.parametrize("init", [None, nn.init.ones_])
def test_a_fresh_expert_has_an_adapter_that_changes_nothing(init):
    layer = core.add_adapters(built(MoEConfig(2, TokenChoice(1), core.FFN(6))), core.LoRA(2), modules="experts")
    update = layer.experts.lora["default"]["w_in"]
    nn.init.ones_(update.a)
    nn.init.ones_(update.b)
    core.grow_experts(layer, 1, init=init)
    assert update.b.amax((1, 2)).tolist() == [1.0, 1.0, 0.0]
    assert 0 < update.a[2].abs().max() <= D**-0.5  # U(-1/sqrt(D), 1/sqrt(D))


REFUSED = {
    "hash": (MoEConfig(4, core.Hash(20)), {}, "router Hash (arXiv 2106.04426) cannot grow"),
    "task": (MoEConfig(4, core.Task(3)), {}, "router Task (arXiv 2110.03742) cannot grow"),
    "random": (MoEConfig(4, core.Random()), {}, "cannot grow"),
    "codes": (MoEConfig(4, core.DSelectK()), {}, "cannot grow"),
    "logits of all": (MoEConfig(4, TokenChoice(logit_norm=1.0)), {}, "router TokenChoice cannot grow"),
    "groups": (MoEConfig(4, core.Prototypes(2)), {"n": 1}, "num_prototypes=2 does not divide num_experts=5"),
    "a default": (MoEConfig(4, core.Cosine(2)), {}, "gate.projection would grow from (2, 8) to (3, 8)"),
    "several kinds": (MoEConfig(2, expert=core.Mixed((core.FFN(4), core.Zero()), (1, 1))), {}, "several kinds"),
    "none": (MoEConfig(4), {"n": 0}, "n=0 is not at least 1"),
    "a start": (MoEConfig(4), {"start": "warm"}, "start='warm'"),
    "no loads": (MoEConfig(4), {"start": "copy"}, "start='copy' needs loads_E"),
    "loads": (MoEConfig(4), {"start": "copy", "loads_E": [1.0]}, "loads_E has 1 numbers for 4 experts"),
    "idle loads": (MoEConfig(4), {"loads_E": [1.0] * 4}, "loads_E is for start='copy'"),
}


@pytest.mark.parametrize(("config", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line_and_left_as_it_was(config, options, message):
    layer = built(config)
    shapes = {k: v.shape for k, v in layer.state_dict().items()}
    with pytest.raises(ValueError) as error:
        core.grow_experts(layer, **{"n": 2, **options})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert {k: v.shape for k, v in layer.state_dict().items()} == shapes
    assert layer.experts.num_experts == config.num_experts


def test_other_layers_and_routers_are_refused():
    with pytest.raises(ValueError, match=r"does not grow: core\.MoE and its subclasses do"):
        core.grow_experts(core.MMoE(4).build(D, 2), 1)

    class Mine(core.Router):
        num_experts = 4

    with pytest.raises(ValueError, match="router Mine cannot grow: it has no RouterConfig"):
        core.grow_experts(core.MoE(Mine(), core.FFN(4).build(4, D), pairs_per_token=1.0, dim=D), 1)
    with pytest.raises(ValueError, match=r"expert 4 is not in range\(4\)"):
        core.freeze_experts(built(MoEConfig(4)), [4])


def test_a_domain_is_added_with_its_expert_and_taken_away_again():
    layer, x = built(MoEConfig(2, core.Domain(2, top_k=2))).eval(), torch.randn(2, 3, 8)
    layer.router.set_prior([1.0, 0.0])
    of = [core.RoutingContext(domain_ids_B=torch.tensor([e, e])) for e in range(3)]
    before, unknown = [layer(x, own) for own in of[:2]], layer(x)
    assert core.grow_experts(layer, 1) == (2,)
    assert layer.router.config == core.Domain(3, top_k=2)
    assert [torch.equal(layer(x, own), y) for own, y in zip(of, before, strict=False)] == [True, True]
    core.keep_experts(layer, [1, 2])  # the old domain 1 is 0 now
    assert layer.router.config == core.Domain(2, top_k=2)
    assert torch.equal(layer(x, of[0]), before[1])
    core.keep_experts(layer, [0])
    layer.router.prior.zero_()  # only the domain that went had a weight
    assert torch.equal(layer(x), before[1])
    assert not torch.equal(unknown, before[1])
