"""MoEConfig: its formulas, its plain form, finer experts at the same cost (arXiv 2401.06066), and what it refuses."""

import json
from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
import torch
from torch import nn

import core
from core import FFN, GEGLU, MLP, Balance, Merge, MMoE, MoE, MoEConfig, SwiGLU, TokenChoice, Zero, active_params
from core.config import LAYERS
from core.flops import count_flops
from core.routing.router import Router
from core.routing.selection import Capacity

CONFIGS = [
    MoEConfig(1, TokenChoice(1)),
    MoEConfig(8),
    MoEConfig(8, TokenChoice(top_k=3, noise="learned"), FFN(20, "relu", bias=True)),
    MoEConfig(4, TokenChoice(1, jitter_eps=0.01), SwiGLU(20), capacity_factor=1.25, eval_capacity_factor=2.0),
    MoEConfig(4, expert=GEGLU(20, bias=True), num_shared_experts=2, priority="score", group="sequence"),
    MoEConfig(
        8,
        TokenChoice(2, score_func="sigmoid", expert_bias=True, num_groups=4, limited_groups=2, scale=2.5),
        group=16,
        balance=Balance(load_balancing_loss=0.0, router_z_loss=1e-4),
        backend="eager",
    ),
    MoEConfig(4, TokenChoice(noise="fixed"), balance=Balance(0.0, 0.0, importance=0.005, load=0.005)),
    MoEConfig(4, num_shared_experts=1, shared_gate="mix", shared_gate_dropout=0.2, balance=Balance(gate_budget=0.1)),
    MoEConfig(4, num_shared_experts=2, shared_gate="scale", expert_output_masking=0.2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_parameter_formulas_equal_numel_and_the_plain_form_comes_back_equal(config):
    assert MoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for out_dim in (None, 6):
        layer = config.build(12, out_dim)
        assert config.num_params(12, out_dim) == sum(p.numel() for p in layer.parameters())
        assert config.active_params(12, out_dim) == active_params(layer)


def test_parameters_by_hand():
    # Gate 12 * 8 = 96; an expert 12 * 20 + 20 * 12 = 480; one shared.
    config = MoEConfig(8, expert=FFN(20), num_shared_experts=1)
    assert (config.num_params(12), config.active_params(12)) == (96 + 9 * 480, 96 + 3 * 480)
    # Of a model too, the experts that a token does not take are left out.
    model = torch.nn.Sequential(torch.nn.Linear(12, 12), MoEConfig(8, expert=FFN(20)).build(12))
    assert active_params(model) == 12 * 12 + 12 + 96 + 2 * 480
    # Experts that layers share are counted once: a token takes 2 of the 8 in each layer, and never more than there are.
    config = MoEConfig(8, TokenChoice(2), FFN(20))
    for layers, touched in ((2, 4), (5, 8)):
        model = nn.ModuleList([config.build(12) for _ in range(layers)])
        for layer in model:
            layer.experts = model[0].experts
        assert active_params(model) == layers * 96 + touched * 480


def test_plain_form_is_the_yaml_schema():
    plain = MoEConfig(8, TokenChoice(1), SwiGLU(16)).to_dict()
    assert (plain["num_experts"], plain["router"]["class_path"]) == (8, "core.TokenChoice")
    assert plain["router"]["init_args"]["top_k"] == 1
    assert plain["expert"] == {
        "class_path": "core.SwiGLU",
        "init_args": {"hidden_dim": 16, "activation": "silu", "bias": False},
    }
    expected = {"load_balancing_loss": 0.01, "router_z_loss": 0.001, "importance": 0.0, "load": 0.0, "scope": "global"}
    assert expected.items() <= plain["balance"].items()
    assert plain["capacity_factor"] is None
    # It may be short and partial.
    config = MoEConfig.from_dict(
        {"num_experts": 4, "router": {"class_path": "TokenChoice", "init_args": {"top_k": 1}}, "expert": SwiGLU()}
    )
    assert config == MoEConfig(4, TokenChoice(1), SwiGLU())
    # It shares nothing with the config, nor is it changed.
    plain = MoEConfig(8).to_dict()
    before = json.dumps(plain)
    MoEConfig.from_dict(plain)
    assert json.dumps(plain) == before
    plain["router"]["init_args"]["top_k"] = 5
    assert MoEConfig(8).router.top_k == 2


class EveryOther(Router):
    """Token ``t`` goes to expert ``t mod E``."""

    def __init__(self, num_experts: int, offset: int) -> None:
        super().__init__()
        self.num_experts, self.offset = num_experts, offset

    def forward(self, x, context=None):
        from core import Routing

        T = x.shape[0] * x.shape[1]
        tokens = torch.arange(T)
        ids = (tokens + self.offset) % self.num_experts
        counts = torch.bincount(ids, minlength=self.num_experts)
        return Routing(tokens, ids, torch.ones(T), counts, counts, T, 1)


@dataclass(frozen=True)
class EveryOtherConfig(core.RouterConfig):
    """A user's own router, without parameters or balance terms."""

    offset: int = 0

    def build(self, dim: int, num_experts: int, capacity: Capacity = Capacity()) -> Router:
        return EveryOther(num_experts, self.offset)

    def pairs_per_token(self, num_experts: int) -> float:
        return 1.0


def test_a_router_of_a_users_own_round_trips_builds_and_runs():
    config = MoEConfig(3, EveryOtherConfig(offset=2), FFN(4))
    plain = config.to_dict()
    assert plain["router"] == {"class_path": f"{__name__}.EveryOtherConfig", "init_args": {"offset": 2}}
    again = MoEConfig.from_dict(plain)
    assert (again, again.num_params(2)) == (config, 3 * 16)
    layer, x = again.build(2), torch.randn(1, 4, 2)
    # Token 0 to expert 2, 1 to 0, 2 to 1, 3 to 2.
    for t, e in enumerate((2, 0, 1, 2)):
        w_in, w_out = layer.experts.w_in[e], layer.experts.w_out[e]
        torch.testing.assert_close(layer(x)[0, t], torch.nn.functional.gelu(x[0, t] @ w_in) @ w_out)


def test_a_capacity_group_is_the_routers_own_by_default_and_configs_are_frozen():
    assert (MoEConfig(4).capacity().group, MoEConfig(4, group="sequence").capacity().group) == ("batch", "sequence")
    with pytest.raises(FrozenInstanceError):
        MoEConfig(4).num_experts = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"router": TokenChoice(9)}, r"top_k=9 exceeds num_experts=8"),
        ({"router": TokenChoice(num_groups=3)}, r"num_groups=3 does not divide num_experts=8"),
        ({"balance": Balance(load=0.1)}, r"balance.load=0.1 does not apply to TokenChoice without noise"),
        (
            {"router": EveryOtherConfig(), "balance": Balance(importance=0.1)},
            r"balance.importance=0.1 does not apply to EveryOtherConfig",
        ),
    ],
)
def test_a_wrong_option_is_refused_with_its_value_and_the_rule(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{"num_experts": 8, **arguments})
    with pytest.raises(ValueError, match=message):
        replace(MoEConfig(8), **arguments)


def test_shared_experts_put_out_as_many_numbers_as_the_routed_ones_and_have_their_backend():
    config = MoEConfig(4, expert=FFN(20), num_shared_experts=1, shared_expert=MLP(hidden_dims=(16,)))
    with pytest.raises(ValueError, match=r"^shared_expert=MLP.* has outputs of width 16, the routed experts of 8$"):
        config.build(8)
    assert config.build(16)(torch.zeros(2, 3, 16)).shape == (2, 3, 16)
    layer = MoEConfig(4, num_shared_experts=1, backend="grouped").build(8)
    parts = (layer, layer.router, layer.experts, layer.shared_experts, layer.dispatcher)
    assert [part.backend for part in parts] == ["grouped"] * 5
    layer.backend = "eager"
    assert [part.backend for part in parts] == ["eager"] * 5
    with pytest.raises(ValueError, match="backend='gpu' is not one of auto, eager"):
        layer.backend = "gpu"


def test_experts_of_a_kind_of_their_own_name_their_layer(monkeypatch):
    class Waves(MoE):
        """The layer of experts that wave."""

    monkeypatch.setattr(FFN, "layer_kind", "waves")
    with pytest.raises(ValueError, match=r"^FFN computes waves: not with the pairs of TokenChoice"):
        MoEConfig(4)
    with pytest.raises(ValueError, match=r"^FFN computes waves: not in multi-gate layers$"):
        MMoE(4, FFN())
    monkeypatch.setitem(LAYERS, ("pairs", "waves"), Waves)
    assert type(MoEConfig(4).build(8)) is Waves
    with pytest.raises(ValueError, match=r"^FFN computes waves: not with the slots of SoftSlots"):
        MoEConfig(4, core.SoftSlots())


def test_costs_of_finer_experts_by_hand():
    coarse = MoEConfig(4, TokenChoice(2), FFN(24))
    fine = replace(coarse, granularity=3)
    layer = fine.build(8)
    # 12 experts of width 8, 6 a token. An expert has 2 * 8 * 8 = 128 parameters; the gate has 8 * 12 in place of 8 * 4.
    assert (layer.experts.w_in.shape, len(layer.router(torch.randn(1, 5, 8)).gates_N)) == ((12, 8, 8), 5 * 6)
    assert fine.num_params(8) == sum(p.numel() for p in layer.parameters()) == 12 * 128 + 96
    assert fine.active_params(8) == active_params(layer) == 6 * 128 + 96
    assert fine.flops_per_token(8) == 2 * (6 * 128 + 96)
    # But for the gate, all of it is as before.
    assert fine.num_params(8) - coarse.num_params(8) == 8 * (12 - 4)
    assert fine.flops_per_token(8) - coarse.flops_per_token(8) == 2 * 8 * (12 - 4)


GRANULAR = {
    "SwiGLU, default width": MoEConfig(4, expert=SwiGLU(), granularity=2),
    "GEGLU with bias": MoEConfig(4, TokenChoice(1), GEGLU(12, bias=True), granularity=4),
    "shared experts": MoEConfig(4, expert=FFN(12), num_shared_experts=1, granularity=2),
    "shared experts of their own width": MoEConfig(
        4, expert=FFN(12), num_shared_experts=1, shared_expert=FFN(12), granularity=2
    ),
    "hierarchical": MoEConfig(4, core.Hierarchical(2, 1, top_k=1), FFN(12), granularity=2),
    "capacity": MoEConfig(4, expert=FFN(12), capacity_factor=0.5, granularity=2),
}


@pytest.mark.parametrize("config", GRANULAR.values(), ids=GRANULAR)
def test_costs_are_those_of_the_built_layer(config):
    layer = config.build(12).eval()
    assert config.num_params(12) == sum(p.numel() for p in layer.parameters())
    assert config.active_params(12) == active_params(layer)
    if config.capacity_factor is None:
        assert count_flops(layer, torch.randn(2, 8, 12)) == 16 * config.flops_per_token(12)
    assert MoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    # Shared experts are as fine as the routed ones, unless they have a kind of their own.
    if config.num_shared_experts:
        assert layer.shared_experts.w_in.shape == ((1, 12, 6) if config.shared_expert is None else (1, 12, 12))


def test_a_granularity_is_the_layer_that_it_means():
    config = GRANULAR["GEGLU with bias"]
    assert config.split(12) == MoEConfig(16, TokenChoice(4), GEGLU(3, bias=True))
    assert config.split(12).split(12) == config.split(12)
    layers = []
    for c in (config, config.split(12)):
        torch.manual_seed(0)
        layers.append(c.build(12))
    x = torch.randn(2, 5, 12)
    assert torch.equal(layers[0](x), layers[1](x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoEConfig(4, expert=FFN(10), granularity=3), "^granularity=3 does not divide hidden_dim=10 of FFN$"),
        (lambda: MoEConfig(4, granularity=3).build(8), "^granularity=3 does not divide hidden_dim=32 of FFN$"),
        (lambda: MoEConfig(4, granularity=3).num_params(8), "^granularity=3 does not divide hidden_dim=32 of FFN$"),
        (lambda: MoEConfig(4, core.ExpertChoice(), granularity=2),
         r"^granularity=2 multiplies top_k, which ExpertChoice \(arXiv 2202.09368\) does not have$"),
        (lambda: MoEConfig(4, Merge(kind="meo", top_k=2), granularity=2), "^granularity=2 multiplies top_k, which M"),
        (lambda: MoEConfig(4, expert=MLP((8,)), granularity=2), "^granularity=2 divides hidden_dim, which MLP does"),
        (lambda: MoEConfig(4, expert=Zero(), granularity=2), "^granularity=2 divides hidden_dim, which Zero does not"),
        (lambda: MoEConfig(4, TokenChoice(5), granularity=2), "^top_k=10 exceeds num_experts=8"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_one_line(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
