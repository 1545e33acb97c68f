"""Several models as one: by hand, and equal to them where they are equal."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import core
from core import MoEConfig, TokenChoice, average_models, average_states, mix_models


def net(value: float, counted: int = 0) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    model[1].num_batches_tracked.fill_(counted)
    return model


@pytest.mark.parametrize(("weights", "mean"), [(None, 4.0), ([1, 0, 3], 6.25), ([2.0, 2.0, 0.0], 2.0)])
def test_parameters_are_means_by_weight(weights, mean):
    models = [net(1.0, 5), net(3.0, 9), net(8.0, 7)]
    # (1 + 3 + 8) / 3, then 1/4 * 1 + 3/4 * 8, then (1 + 3) / 2.
    merged = average_models([m.eval() for m in models], weights)
    assert all(p.detach().eq(mean).all() for p in merged.parameters())
    assert merged[1].num_batches_tracked == 9
    assert not merged.training
    assert models[0][0].weight[0, 0] == 1.0  # a copy


def test_equal_models_are_their_mean_and_half_precision_is_summed_in_float32():
    moe = core.MoEConfig(4).build(8)
    assert_close(average_models([moe, copy.deepcopy(moe), moe]).state_dict(), moe.state_dict(), rtol=1e-6, atol=1e-7)
    # 256 + 1 is 256 in bfloat16, so that the mean would be 64: it is 64.75, rounded once.
    states = [{"w": torch.tensor([value]).bfloat16()} for value in (256.0, 1.0, 1.0, 1.0)]
    assert average_states(states)["w"].item() == torch.tensor(64.75).bfloat16().item()


def test_tables_have_to_be_the_same():
    models = [core.MoEConfig(4, core.Hash(20, seed=seed)).build(8) for seed in (0, 0, 1)]
    table = models[0].router.table.clone()
    assert torch.equal(average_models(models[:2]).router.table, table)
    with pytest.raises(ValueError, match=r"router\.table holds integers that differ: they have no mean"):
        average_models(models)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def branches(n: int) -> list[nn.Module]:
    """Return models that differ in their feed-forward networks alone."""
    seed = nn.Sequential(Block(), nn.Linear(6, 6), Block()).eval()
    models = [copy.deepcopy(seed) for _ in range(n)]
    for model in models:
        for block in (model[0], model[2]):
            for parameter in block.mlp.parameters():
                nn.init.normal_(parameter)
    return models


def test_the_networks_of_three_models_become_the_experts_of_one():
    models, x = branches(3), torch.randn(2, 5, 6)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    sparse = mix_models(models, MoEConfig(3, TokenChoice(2)), "*.mlp")
    assert len(core.moe_layers(sparse)) == 2
    for e, model in enumerate(models):
        assert_close(core.cut_out(copy.deepcopy(sparse), expert=e)(x), model(x), rtol=1e-5, atol=1e-6)
        assert_close(model.state_dict(), before[e])
    assert sparse(x).isfinite().all()


def test_what_is_no_network_is_averaged_and_equal_models_stay_what_they_are():
    models = branches(2)
    nn.init.constant_(models[0][1].weight, 1.0)
    nn.init.constant_(models[1][1].weight, 4.0)
    moe = MoEConfig(2, TokenChoice(2))
    sparse = mix_models(models, moe, "*.mlp", weights=[2.0, 1.0])
    assert_close(sparse[1].weight, torch.full((6, 6), 2.0))
    one, x = models[0], torch.randn(2, 5, 6)
    assert_close(mix_models([one, copy.deepcopy(one)], moe, "*.mlp")(x), one(x), rtol=1e-5, atol=1e-5)
    again = mix_models(models, moe, "*.mlp", weights=[2.0, 1.0])  # the routers' start has a seed
    assert_close(again.state_dict(), sparse.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("moe", "modules", "message"),
    [
        (MoEConfig(3), "*.mlp", "num_experts=3 is not the number of models, 2"),
        (MoEConfig(2, expert=core.SwiGLU()), "*.mlp", r"expert=SwiGLU\(.*\): the experts are the models' networks"),
        (MoEConfig(2, num_shared_experts=1), "*.mlp", "num_shared_experts=1: the experts are the models' networks"),
        (MoEConfig(2, granularity=2), "*.mlp", "granularity=2: the experts are the models' networks"),
        (MoEConfig(2), "*.ffn", r"modules='\*.ffn' names no module"),
        (MoEConfig(2), "*.norm", "module '0.norm' is a LayerNorm, which is no feed-forward network"),
    ],
)
def test_models_that_do_not_mix_are_refused(moe, modules, message):
    with pytest.raises(ValueError, match=message):
        mix_models(branches(2), moe, modules)


@pytest.mark.parametrize(
    ("models", "weights", "message"),
    [
        ([], None, "there are no models to average"),
        ([net(1.0), nn.Linear(2, 3)], None, "model 1 lacks 0.bias, 0.weight, 1.bias, ..., which model 0 has"),
        ([nn.Linear(2, 3, bias=False), nn.Linear(2, 3)], None, "model 0 lacks bias, which model 1 has"),
        ([nn.Linear(2, 3), nn.Linear(2, 4)], None, r"weight has shape \(3, 2\) in model 0 and \(4, 2\) in model 1"),
        ([net(1.0), net(2.0)], [1.0], "weights has 1 numbers for 2 models"),
        ([net(1.0), net(2.0)], [1.0, -1.0], r"weights=\[1.0, -1.0\] are not finite, not negative and not all 0"),
        ([net(1.0), net(2.0)], [0.0, 0.0], "not all 0"),
    ],
)
def test_refused_in_one_line(models, weights, message):
    with pytest.raises(ValueError, match=message):
        average_models(models, weights)


class Doubled(nn.Module):
    """A network that sees twice its model's input."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(value)

    def forward(self, x):
        return self.mlp(2 * x)


def test_rows_of_gates_point_to_the_mean_input_of_their_examples():
    models = [Doubled(0.1), Doubled(0.3)]
    first = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 3.0]])]  # a sum of (3, 4), of norm 5
    gates = core.example_gates(core.average_models(models), "mlp", [first, [torch.tensor([[0.0, -0.5]])]])
    assert_close(gates["mlp"], torch.tensor([[0.6, 0.8], [0.0, -1.0]]))
    sparse = mix_models(models, MoEConfig(2, TokenChoice(1)), "mlp", gates=gates)
    assert_close(sparse.mlp.moe.router.gate.weight.detach(), gates["mlp"])
    # At 2 (1, 1) the logits are 2.8 and -2, so that expert 0 answers at a gate of 1.
    assert_close(sparse.mlp.moe.experts.w_in[0].detach(), torch.full((2, 3), 0.1))
    with pytest.raises(ValueError, match="expert 1 has no examples to make its rows of the gates of"):
        core.example_gates(models[0], "mlp", [first, []])
    with pytest.raises(ValueError, match=r"router Cosine .* has no linear gate that examples could give rows to"):
        mix_models(models, MoEConfig(2, core.Cosine(2)), "mlp", gates=gates)
