"""A dense layer in the place of a sparse one: by hand, and equal to it where its experts are equal."""

from __future__ import annotations

import pytest
import torch
from shrinking import tokens
from torch import nn
from torch.testing import assert_close

import core
from core import MoEConfig, TokenChoice, densify

D = 8
LOADS = [1.0, 2.0, 0.0, 1.0]


def built(expert: core.ExpertConfig, router: core.RouterConfig | None = None, **options) -> core.MoE:
    return MoEConfig(4, router or TokenChoice(2), expert, **options).build(D).eval()


def made_equal(layer: core.MoE) -> core.MoE:
    """Give all experts the weights of the first."""
    with torch.no_grad():
        for e in range(1, 4):
            for name, weight in layer.experts.weights_of(e).items():
                weight.copy_(layer.experts.weights_of(0)[name])
    return layer


def scalar_experts(w_in: list[float], w_out: list[float]) -> core.MoE:
    """Return a layer of width 1, whose expert e is ``w_out[e] * relu(w_in[e] * x)``."""
    layer = MoEConfig(len(w_in), TokenChoice(1), core.FFN(1, activation="relu")).build(1)
    with torch.no_grad():
        layer.experts.w_in.copy_(torch.tensor(w_in).reshape(-1, 1, 1))
        layer.experts.w_out.copy_(torch.tensor(w_out).reshape(-1, 1, 1))
    return layer


@pytest.mark.parametrize(
    ("how", "loads", "expected"),
    [
        ("average", None, 2.0 * 5.0),  # the means of (1, 3) and (4, 6), at x = 1
        ("use", [3.0, 1.0], 1.5 * 4.5),  # three quarters of the first, a quarter of the second
        ("most_used", [3.0, 1.0], 1.0 * 4.0),
        ("most_used", torch.tensor([1, 3]), 3.0 * 6.0),
        ("sum", None, 4.0 * 10.0),
        ("svd", None, 4.0 * 10.0),  # a matrix of one number is its own approximation
    ],
)
def test_two_experts_of_one_unit(how, loads, expected):
    dense = densify(scalar_experts([1.0, 3.0], [4.0, 6.0]), how, loads)
    assert dense(torch.ones(1, 1)).item() == pytest.approx(expected, rel=1e-6)


def test_the_largest_units_stand_side_by_side():
    layer = MoEConfig(2, TokenChoice(1), core.FFN(2, activation="relu", bias=True)).build(1)
    with torch.no_grad():
        layer.experts.w_in.copy_(torch.tensor([[[1.0, -2.0]], [[5.0, 1.0]]]))
        layer.experts.w_out.copy_(torch.tensor([[[3.0], [4.0]], [[1.0], [9.0]]]))
        layer.experts.b_in.copy_(torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
        layer.experts.b_out.copy_(torch.tensor([[1.0], [3.0]]))
    # Products of norms: 1 * 3 and 2 * 4 in expert 0, 5 * 1 and 1 * 9 in expert 1: the second unit of each.
    one = densify(layer, "top_k").expert.weights_of(0)
    assert one["w_in"].tolist() == [[-2.0, 1.0]]
    assert one["w_out"].tolist() == [[4.0], [9.0]]
    assert one["b_in"].tolist() == pytest.approx([0.2, 0.4])
    assert one["b_out"].tolist() == [2.0]  # the mean


def test_singular_values_sum_the_best_approximations():
    layer = built(core.FFN(8, bias=True))
    one = densify(layer, "svd").expert.weights_of(0)
    expected = torch.zeros(D, 8, dtype=torch.float64)
    for e in range(4):  # rank 8 / 4 = 2
        u, s, v = torch.linalg.svd(layer.experts.w_in[e].detach().double())
        expected += s[0] * u[:, :1] @ v[:1] + s[1] * u[:, 1:2] @ v[1:2]
    assert_close(one["w_in"].double(), expected, rtol=1e-5, atol=1e-6)
    assert_close(one["b_out"], layer.experts.b_out.mean(0))


@pytest.mark.parametrize(
    ("expert", "how"),
    [
        *((core.FFN(12, bias=True), how) for how in ("average", "use", "most_used")),
        *((core.SwiGLU(6), "use"), (core.ClampedSwiGLU(6, bias=True), "average")),
        *((core.MLP((6, D)), "most_used"), (core.LoRA(2), "use")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_equal_experts_become_themselves(expert, how):
    layer = made_equal(built(expert, num_shared_experts=1, shared_gate="mix", output_bias=True))
    nn.init.normal_(layer.output_bias)
    x = torch.randn(2, 5, D)
    dense = densify(layer, how, LOADS if how != "average" else None)
    assert_close(dense(x), layer(x), rtol=1e-6, atol=1e-6)
    assert dense(x, core.RoutingContext()).shape == x.shape  # called as a MoE layer is


def test_a_model_becomes_dense_in_place_and_may_use_a_layer_twice():
    block = nn.Sequential(built(core.FFN(6)))
    model = nn.ModuleDict({"first": block, "again": block, "last": built(core.FFN(4))})
    assert densify(model, "use", {"first.0": LOADS, "last": LOADS}) is model
    assert not core.moe_layers(model)
    assert model["first"][0] is model["again"][0]
    assert isinstance(model["last"], core.OneExpert)


def test_it_trains_in_the_dtype_and_mode_of_the_layer():
    dense = densify(built(core.FFN(6)).double().train(), "svd")
    dense(torch.randn(2, 3, D, dtype=torch.float64)).sum().backward()
    assert dense.training
    assert all(p.grad is not None for p in dense.parameters())


@pytest.mark.parametrize("kind", [core.FFN(6, bias=True), core.FFN(6), core.GEGLU(6, bias=True)], ids=str)
def test_one_feed_forward_network_computes_the_same(kind):
    dense = densify(built(kind, num_shared_experts=2))
    x = torch.randn(2, 5, D)
    ffn = dense.feed_forward()
    assert isinstance(ffn, core.layers.FeedForward)
    assert ffn.w_in.out_features == 18
    assert_close(ffn(x), dense(x), rtol=1e-5, atol=1e-6)


def test_a_dense_model_made_sparse_is_dense_again():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(D)
            self.mlp = nn.Sequential(nn.Linear(D, 12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, D))

        def forward(self, x):
            return x + self.mlp(self.norm(x))

    dense, x = nn.Sequential(Block(), nn.TransformerEncoderLayer(D, 2, 16, batch_first=True)).eval(), tokens()
    sparse = core.sparsify(dense, MoEConfig(4, TokenChoice(2)), ["0.mlp", "1"]).eval()
    names = core.moe_layers(sparse)
    again = densify(sparse, "use", dict.fromkeys(names, LOADS))
    assert len(names) == 2
    assert not core.moe_layers(again)
    with torch.no_grad():
        assert_close(again(x), dense(x), rtol=1e-5, atol=1e-6)


def twins() -> nn.Module:
    model = nn.Sequential(built(core.FFN(6)), built(core.FFN(6)))
    model[1].experts = model[0].experts
    return model


REFUSED = {
    "twins": (lambda: densify(twins()), "layers '0' and '1' share their experts"),
    "no layer": (lambda: densify(nn.Linear(2, 2)), "a Linear without MoE layers has no experts"),
    "how": (lambda: densify(built(core.FFN(6)), "mean"), "how='mean' is not one of average, use, most_used"),
    "no loads": (lambda: densify(built(core.FFN(6)), "use"), "loads are needed"),
    "idle loads": (lambda: densify(built(core.FFN(6)), "sum", LOADS), "loads are for how='use'"),
    "few loads": (lambda: densify(built(core.FFN(6)), "use", [1.0]), "have shape (1,) for 4 experts"),
    "no use": (lambda: densify(built(core.FFN(6)), "use", [0.0] * 4), "not finite, not negative and not all 0"),
    "a name": (
        lambda: densify(nn.Sequential(built(core.FFN(6))), "use", {"1": LOADS}),
        "loads have no layer '0'; they have '1'",
    ),
    "no mean": (lambda: densify(built(core.Identity())), "IdentityExperts cannot be merged"),
    "no units": (lambda: densify(built(core.MLP((D,))), "top_k"), "MLPExperts have no hidden units"),
    "tasks": (lambda: densify(core.MMoE(4).build(D, 2)), "is a MultiGateMoE: core.MoE and its subclasses become dense"),
    "a gate": (
        lambda: densify(built(core.FFN(6), num_shared_experts=1, shared_gate="mix")).feed_forward(),
        "a shared_gate weights the experts token by token",
    ),
    "a bias": (lambda: densify(built(core.FFN(6), output_bias=True)).feed_forward(), "output_bias is added beside"),
    "no FFN": (lambda: densify(built(core.MLP((D,)))).feed_forward(), "MLPExperts are no dense FFN"),
    "unlike": (
        lambda: densify(
            built(core.FFN(6), num_shared_experts=1, shared_expert=core.FFN(6, activation="relu"))
        ).feed_forward(),
        "another activation, gate or bias",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    model = nn.Sequential(built(core.FFN(6)), built(core.Identity()))
    with pytest.raises(ValueError, match="IdentityExperts cannot be merged"):
        densify(model)
    assert len(core.moe_layers(model)) == 2  # a refusal leaves it as it was
