"""Stacked experts against plain ``nn.Linear`` networks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import FFN, GEGLU, MLP, MoE, MoEConfig, SwiGLU, TokenChoice
from core.contract import Rows
from core.experts import Experts, FFNExperts

ACTIVATION = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
CONFIGS = [FFN(12, "relu"), FFN(12, "gelu", bias=True), FFN(12, "silu", bias=True), SwiGLU(12), GEGLU(12, bias=True)]


def linear_network(experts: FFNExperts, e: int, x: Tensor) -> Tensor:
    """Expert ``e`` with ``nn.Linear`` alone."""

    def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
        layer = nn.Linear(weight.shape[1], weight.shape[2], bias=bias is not None)
        with torch.no_grad():
            layer.weight.copy_(weight[e].t())
            if bias is not None:
                layer.bias.copy_(bias[e])
        return layer

    act = ACTIVATION[experts.activation]
    up = linear(experts.w_in, experts.b_in)(x)
    h = act(up) if experts.w_gate is None else act(linear(experts.w_gate, None)(x)) * up
    return linear(experts.w_out, experts.b_out)(h)


def rows_of(x: Tensor, counts: list[int], gates: Tensor | None = None) -> Rows:
    """Rows that are the tokens themselves, ``counts`` of them for each expert."""
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    gates = torch.ones(len(x)) if gates is None else gates
    return Rows(x, torch.arange(len(x)), offsets, gates, len(x))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_each_expert_equals_a_network_of_linear_layers(config):
    experts = config.build(3, 8, 10)
    x, gates = torch.randn(7, 8), torch.rand(7)
    out = experts(rows_of(x, [2, 0, 5], gates))
    assert out.combined
    expected = torch.cat((linear_network(experts, 0, x[:2]), linear_network(experts, 2, x[2:]))) * gates[:, None]
    torch.testing.assert_close(out.x, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "cpu", "grouped"])
def test_gathered_rows_are_weighted_and_left_for_the_dispatcher_to_sum(backend):
    experts = FFN(6).build(2, 4)
    experts.backend = backend
    x, gates = torch.randn(5, 4), torch.rand(5)
    index = torch.tensor([3, 1, 1, 0, 4])
    rows = Rows(x[index], index, torch.tensor([2, 5], dtype=torch.int32), gates, 5, gathered=True)
    out = experts(rows)
    assert (out.weighted, out.combined) == (True, False)
    expected = torch.cat((linear_network(experts, 0, x[index[:2]]), linear_network(experts, 1, x[index[2:]])))
    torch.testing.assert_close(out.x, expected * gates[:, None], rtol=1e-5, atol=1e-6)


class Halves(Experts):
    """A user's own experts: expert ``e`` divides by ``e + 2``. Knows nothing of gates."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def compute_rows(self, rows: Rows) -> Rows:
        x_RD = rows.materialize()
        y_RD, start = torch.full_like(x_RD, torch.nan), 0
        for e, end in enumerate(rows.offsets_E.tolist()):
            y_RD[start:end] = x_RD[start:end] / (e + 2)
            start = end
        return rows.with_output(y_RD)


def test_experts_of_a_users_own_are_weighted_and_summed_by_the_dispatcher_and_are_shared_experts_too():
    router = TokenChoice(top_k=2).build(2, 2)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(2))
    x = torch.tensor([[[math.log(3), 0.0]]])
    # Gates 3/4 and 1/4: the token times 0.75 / 2 + 0.25 / 3 = 0.458333.
    layer = MoE(router, Halves(2), pairs_per_token=2)
    assert layer(x)[0, 0, 0].item() == pytest.approx(math.log(3) * 0.4583333, rel=1e-6)
    # And 1 / 2 + 1 / 3 + 1 / 4 = 1.083333 of the token from the shared ones.
    layer = MoE(router, Halves(2), shared_experts=Halves(3), pairs_per_token=2)
    assert layer(x)[0, 0, 0].item() == pytest.approx(math.log(3) * (0.4583333 + 1.0833333), rel=1e-6)


def test_parts_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match=r"^Own overrides forward, which has .*: write compute_rows instead"):
        type("Own", (Experts,), {"forward": lambda self, rows: rows})
    for choosing, there in ((8, 4), (8, 16), (4, 8)):
        with pytest.raises(ValueError, match=f"^the router chooses among {choosing} experts, and there are {there}$"):
            MoE(TokenChoice(2).build(6, choosing), FFN(4).build(there, 6), pairs_per_token=2)
    with pytest.raises(ValueError, match=r"tokens are torch.bfloat16 and expert weights torch.float32"):
        MoEConfig(2).build(4)(torch.randn(1, 3, 4).bfloat16())


@pytest.mark.parametrize(
    "config, dim, hidden", [(FFN(), 6, 24), (SwiGLU(), 6, 16), (GEGLU(), 96, 256), (SwiGLU(), 3, 8)]
)
def test_default_hidden_dim(config, dim, hidden):
    # FFN 4 * dim; gated 8/3 * dim up to the next multiple of 8: 16, 256, 8.
    assert config.build(2, dim).w_in.shape == (2, dim, hidden)


def test_parameters_and_flops_by_hand():
    # 8 * 12 + 12 * 8 weights; biases 12 + 8. Two FLOPs a weight and row.
    assert FFN(12).num_params(8) == 192
    assert FFN(12, bias=True).num_params(8) == 212
    assert FFN(12, bias=True).flops_per_row(8) == 384
    assert SwiGLU(12).num_params(8) == 288
    assert SwiGLU(12).flops_per_row(8) == 576
    assert FFN(12).num_params(8, 5) == 156  # 8 * 12 + 12 * 5


def test_weights_start_within_the_bounds_of_a_linear_layer():
    experts = FFN(64, bias=True).build(4, 16)
    for tensor, fan_in in ((experts.w_in, 16), (experts.b_in, 16), (experts.w_out, 64), (experts.b_out, 64)):
        bound = 1 / math.sqrt(fan_in)
        assert 0.9 * bound < tensor.abs().max() <= bound
    assert not torch.equal(experts.w_in[0], experts.w_in[1])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_init_each_draws_matrix_by_matrix_and_expert_by_expert(config):
    experts = config.build(3, 8)
    torch.manual_seed(1)
    experts.init_each(nn.init.xavier_uniform_)
    torch.manual_seed(1)
    for weight in (experts.w_in, experts.w_out, experts.w_gate):
        for e in range(0 if weight is None else 3):
            assert torch.equal(weight[e], nn.init.xavier_uniform_(torch.empty(weight.shape[1:])))
    assert all(not b.any() for b in (experts.b_in, experts.b_out) if b is not None)


def test_init_each_reaches_the_shared_experts_of_a_layer_and_all_layers_of_an_mlp():
    layer = MoEConfig(4, TokenChoice(1), FFN(6), num_shared_experts=1).build(3)
    sizes = []
    for module in layer.modules():
        if isinstance(module, Experts):
            module.init_each(lambda matrix: sizes.append(tuple(matrix.shape)))
    assert sizes == [*[(3, 6)] * 4, *[(6, 3)] * 4, (3, 6), (6, 3)]

    mlp, sizes = MLP((5, 2), norm="layer").build(2, 3), []
    mlp.init_each(lambda matrix: sizes.append(tuple(matrix.shape)))
    assert sizes == [(3, 5), (3, 5), (5, 2), (5, 2)]
    assert not mlp.b_0.any()
    assert mlp.norm_weight_0.eq(1).all()


def test_weights_of_is_one_experts_tensors_and_writing_to_one_changes_it():
    experts = FFN(6, bias=True).build(3, 4)
    weights = experts.weights_of(2)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert shapes == {"w_in": (4, 6), "w_out": (6, 4), "b_in": (6,), "b_out": (4,)}
    weights["b_in"].data.fill_(7.0)
    assert experts.b_in.eq(7).sum(1).tolist() == [0, 0, 6]
    assert set(MLP((5,), norm="batch").build(2, 3).weights_of(1)) == {
        "w_0", "norm_weight_0", "norm_bias_0", "running_mean_0", "running_var_0"
    }  # fmt: skip
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=rf"expert {wrong} is not in range\(num_local_experts=3\)"):
            experts.weights_of(wrong)
