"""The dense model of equal cost: its widths by hand, its outputs at the start, what trains, and what is refused."""

from __future__ import annotations

import copy
from itertools import cycle, pairwise

import pytest
import torch
from torch import Tensor, nn

from core import MLP, DenseFFN, MoEConfig, SoftSlots, SwiGLU, TokenChoice, count_flops, dense_twin, sparsify
from core.convert import TwinWidth, affine, feed_forward_part, register_ffn, twin_widths
from core.convert.read import readers
from core.convert.read.hidden_units import hidden_units
from core.convert.read.readers import named_part

MOE = MoEConfig(3, TokenChoice(2))


def ffn(hidden: int = 6, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, hidden, bias), nn.ReLU(), nn.Linear(hidden, 4, bias))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(ffn(), ffn(), nn.Linear(4, 3))


def num_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def check_same(twin: nn.Module, dense: nn.Module, *inputs: Tensor) -> None:
    """Check that two models compute the same in evaluation, to 1e-6."""
    modes = twin.training, dense.training
    y, expected = twin.eval()(*inputs), dense.eval()(*inputs)
    assert (y - expected).norm() <= 1e-6 * expected.norm()
    twin.train(modes[0])
    dense.train(modes[1])


def test_widths_by_hand():
    dense = net()
    sparse = sparsify(dense, MOE, "1")
    # A unit costs 2 * (4 + 4) = 16 FLOPs and 4 + 1 + 4 = 9 parameters; the output has 4 biases.
    # Two experts of 6 units and the gate of 4 x 3 cost 2 * 96 + 24 = 216, which is 13.5 units: 13 are as near as 14.
    assert twin_widths(dense, sparse) == {"1": TwinWidth(before=6, width=13, target=216, cost=208)}
    # Three experts of 6 * 9 + 4 = 58 parameters and the gate's 12 are 186, and 20 units 20 * 9 + 4 = 184.
    assert twin_widths(dense, sparse, "params") == {"1": TwinWidth(before=6, width=20, target=186, cost=184)}
    x = torch.randn(5, 4)
    by_flops, by_params = dense_twin(dense, like=sparse), dense_twin(dense, like=sparse, cost="params")
    assert count_flops(sparse, x) - count_flops(by_flops, x) == 5 * 8
    assert num_params(sparse) - num_params(by_params) == 2
    for twin in (by_flops, by_params):
        check_same(twin, dense, x)
        assert str(twin[0]) == str(dense[0])  # it was not replaced
    assert str(by_flops[1][0]) == "Linear(in_features=4, out_features=13, bias=True)"
    assert str(by_flops[1][2]) == "Linear(in_features=13, out_features=4, bias=True)"


class Glu(nn.Module):
    """Two matrices side by side in one layer, the gate first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(4, 12), nn.SiLU(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fc1(x).chunk(2, -1)
        return self.fc2(self.act(gate) * up)


class Conv1D(nn.Module):
    """A linear layer of transformers' kind: (in, out)."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.nx, self.nf = into, out
        self.weight, self.bias = nn.Parameter(torch.randn(into, out)), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return (x.reshape(-1, self.weight.shape[0]) @ self.weight + self.bias).view(*x.shape[:-1], self.nf)


def stack(*dims: int) -> nn.Sequential:
    return nn.Sequential(*(module for a, b in pairwise(dims) for module in (nn.Linear(a, b), nn.ReLU())))


def normed(*dims: int) -> nn.Sequential:
    """Return layers as torch-rechub's MLP has them, with a bias before each norm."""
    layers = [(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Dropout(0.2)) for a, b in pairwise(dims)]
    model = nn.Sequential(*(module for layer in layers for module in layer))
    for tensor in (t for m in model if isinstance(m, nn.BatchNorm1d) for t in (*m.parameters(), *m.buffers())):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2)
    return model


torch.manual_seed(0)
# Networks of 4 numbers a token, and the shape of an input.
NETWORKS = {
    "biases": (ffn(), (3, 4)),
    "no biases": (ffn(bias=False), (3, 4)),
    "maps": (nn.Sequential(nn.Conv2d(4, 6, 1), nn.GELU(), nn.Conv2d(6, 5, 1)), (2, 4, 3, 2)),
    "dropout": (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 5), nn.Dropout(0.1)), (3, 4)),
    "gated": (DenseFFN(6, "silu", gated=True, dropout=0.1).build(4), (2, 3, 4)),
    "packed": (Glu(), (2, 3, 4)),
    "conv1d": (nn.Sequential(Conv1D(4, 6), nn.ReLU(), Conv1D(6, 4)), (2, 3, 4)),
    "stack": (stack(4, 20, 15, 3), (5, 4)),
    "batch norm": (normed(4, 20, 15, 3), (5, 4)),
}


@pytest.mark.parametrize(("name", "cost"), zip(NETWORKS, cycle(("flops", "params")), strict=False))
def test_a_network_of_each_kind(name, cost):
    dense, shape = NETWORKS[name]
    x = torch.randn(shape)
    sparse = sparsify(dense, MoEConfig(4, TokenChoice(3)), "")
    twin = dense_twin(dense, like=sparse, cost=cost)
    check_same(twin, dense, x)
    assert [type(m) for m in twin.modules()] == [type(m) for m in dense.modules()]
    (width,) = twin_widths(dense, sparse, cost).values()
    assert width.before < width.width
    units = hidden_units(twin, named_part("twin", twin))
    assert units.width == width.width
    tokens = x.numel() // 4
    counted = num_params(twin) if cost == "params" else count_flops(twin.eval(), x) // tokens
    aimed = num_params(sparse) if cost == "params" else count_flops(sparse.eval(), x) / tokens
    assert (counted, aimed) == (width.cost, width.target)
    others = [units.num_params(w) if cost == "params" else units.flops_per_token(w) for w in range(1, 60)]
    assert abs(counted - aimed) == min(abs(other - aimed) for other in others)


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_of_torch(batch_first):
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, "gelu", batch_first=batch_first)
    dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    twin = dense_twin(dense, like=sparsify(dense, MoEConfig(4, TokenChoice(2)), "layers.*"))
    # Two experts of 12 units, 32 FLOPs each, and a gate of 8 x 4, 64: 26 units.
    assert [block.linear1.out_features for block in twin.layers] == [26, 26]
    check_same(twin, dense, torch.randn(3, 5, 8))  # by torch's fused block
    with torch.enable_grad():
        check_same(twin, dense, torch.randn(3, 5, 8, requires_grad=True))


def test_added_units_train_from_the_first_step():
    dense = net()
    twin = dense_twin(dense, like=sparsify(dense, MOE, "1"))
    twin[1](torch.randn(50, 4)).square().sum().backward()
    into, out = twin[1][0], twin[1][2]
    assert not out.weight[:, 6:].any()
    assert out.weight.grad[:, 6:].any(0).all()
    assert not into.weight.grad[6:].any()  # what they read begins to train with the second step
    # As large as the units that were there: the root mean square of 7 x 4 normal numbers is within 3 sigma, 0.4.
    ratio = into.weight[6:].square().mean().sqrt() / dense[1][0].weight.square().mean().sqrt()
    assert 0.6 < ratio < 1.4


def test_a_stack_grows_by_one_factor_and_its_added_units_train():
    dense = stack(4, 8, 6, 3)
    twin = dense_twin(dense, like=sparsify(dense, MoEConfig(4, TokenChoice(4)), ""))
    # 4 experts of 2 * (32 + 48 + 18) FLOPs and a gate of 32 cost 816. With 19 and round(19 * 6 / 8) = 14 units it is
    # 2 * (76 + 266 + 42) = 768, with 20 and 15 2 * (80 + 300 + 45) = 850.
    assert [twin[i].out_features for i in (0, 2, 4)] == [20, 15, 3]
    twin(torch.randn(400, 4)).square().sum().backward()
    assert twin[4].weight.grad[:, 6:].any()
    assert not twin[4].weight[:, 6:].any()


def test_a_random_start_draws_the_network_anew():
    dense = net()
    twin = dense_twin(dense, like=sparsify(dense, MoEConfig(3, TokenChoice(2), SwiGLU(9)), "1", start="random"))
    # The experts cost 2 * 2 * 3 * 4 * 9 and the gate 24: 456, 28.5 units of the network's own kind.
    assert [type(m) for m in twin[1]] == [nn.Linear, nn.ReLU, nn.Linear]
    into, out = twin[1][0], twin[1][2]
    assert into.out_features == 28
    for linear, bound in ((into, 4**-0.5), (out, 28**-0.5)):
        for tensor in linear.parameters():
            assert 0.6 * bound < tensor.abs().max() <= bound
    assert not torch.equal(into.weight[:6], dense[1][0].weight)
    assert torch.equal(twin[0][0].weight, dense[0][0].weight)
    norms = normed(4, 6, 3)
    fresh = dense_twin(norms, like=sparsify(norms, MOE, "", start="random"))
    assert [(m.weight == 1).all() and not m.running_mean.any() for m in (fresh[1], fresh[5])] == [True, True]


def test_where_a_layer_costs_less_the_largest_units_stay():
    dense = ffn(hidden=48, bias=False)
    with torch.no_grad():
        dense[0].weight.fill_(1.0)
        dense[2].weight.copy_(torch.arange(48.0).roll(5).expand(4, 48))  # the largest 17, 31 to 47, at 36 to 47, 0 to 4
    third = MoEConfig(3, TokenChoice(1, normalize="unit"))
    twin = dense_twin(dense, like=sparsify(dense, third, "", start="split"))
    # 16 units, 16 FLOPs each, and a gate of 4 x 3, 24: 17.5 units.
    assert twin[2].weight[0].tolist() == [*range(43, 48), *range(31, 43)]


def test_the_models_and_torch_s_random_state_stay():
    dense = net()
    sparse = sparsify(dense, MOE, ["0", "1"])
    before, state = copy.deepcopy((dense.state_dict(), sparse.state_dict())), torch.random.get_rng_state()
    first, again = dense_twin(dense, like=sparse, seed=1), dense_twin(dense, like=sparse, seed=1)
    other = dense_twin(dense, like=sparse, seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    for old, model in zip(before, (dense, sparse), strict=True):
        assert all(torch.equal(t, old[name]) for name, t in model.state_dict().items())
    assert torch.equal(first[0][0].weight, again[0][0].weight)
    assert not torch.equal(first[0][0].weight, other[0][0].weight)
    assert not torch.equal(first[0][0].weight[6:], first[1][0].weight[6:])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_twin_has_the_model_s_dtype_device_and_mode(device):
    dense = net().to(device, torch.bfloat16).eval()
    dense[1].train()
    twin = dense_twin(dense, like=sparsify(dense, MOE, "1"))
    assert {(p.dtype, p.device.type, p.requires_grad) for p in twin.parameters()} == {(torch.bfloat16, device, True)}
    assert [m.training for m in twin] == [False, True, False]


def test_a_model_with_a_sparse_network_stays_so():
    half = sparsify(net(), MOE, "0")
    twin = dense_twin(half, like=sparsify(half, MOE, "1"))
    assert (type(twin[0]).__name__, twin[1][0].out_features) == ("SparseFFN", 13)
    check_same(twin, half, torch.randn(5, 4))


def test_a_router_whose_cost_is_the_sequence_s():
    dense = net()
    sparse = sparsify(dense, MoEConfig(3, SoftSlots(2)), "1", start="random")
    with pytest.raises(ValueError, match=r"module '1': .*tokens_per_sequence"):
        dense_twin(dense, like=sparse)
    (width,) = twin_widths(dense, sparse, tokens_per_sequence=4).values()
    assert width.target == sparse[1].config.flops_per_token(4, tokens_per_sequence=4)
    assert dense_twin(dense, like=sparse, tokens_per_sequence=4)[1][0].out_features == width.width


class Own(nn.Module):
    """A network with its width in its forward, or with a weight that is computed."""

    def __init__(self, is_computed: bool) -> None:
        super().__init__()
        self.up, self.down, self.is_computed = nn.Linear(4, 6), nn.Linear(6, 4), is_computed

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().view(-1, 6).view(*x.shape[:-1], 6)) * (2 if self.is_computed else 1)


def read_own(module: Own):
    w, b = affine(module.down)
    out = (2 * w, 2 * b) if module.is_computed else (w, b)
    return feed_forward_part(affine(module.up), out, activation="relu")


@pytest.mark.parametrize(
    ("is_computed", "message"),
    [
        (False, r"module '' does not run with 13 hidden units: shape"),
        (True, r"module '': w_out of a Own is no matrix of a linear layer in it, which could be wider"),
    ],
)
def test_a_network_that_cannot_be_wider_is_refused(is_computed, message, monkeypatch):
    monkeypatch.setattr(readers, "_READERS", dict(readers._READERS))
    register_ffn(Own, read_own)
    dense = Own(is_computed)
    with pytest.raises(ValueError, match=message):
        dense_twin(dense, like=sparsify(dense, MOE, ""))


def changed(change=lambda model: None) -> tuple[nn.Module, nn.Module]:
    """Return a model and what was made sparse of it, and change the model afterwards."""
    dense = net()
    sparse = sparsify(dense, MOE, "1")
    change(dense)
    return dense, sparse


def made_sparse(dense: nn.Module, moe: MoEConfig, start: str = "copy") -> tuple[nn.Module, nn.Module]:
    return dense, sparsify(dense, moe, "", start=start)


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (lambda: (net(), net()), {}, r"like has no layer that core.sparsify put in the place of a network of model"),
        (lambda: (sparsify(net(), MOE, "1"),) * 2, {}, r"like has no layer that core.sparsify put"),
        (changed, {"cost": "time"}, r"cost='time' is not one of flops, params"),
        (changed, {"seed": 0.5}, r"seed=0.5"),
        (
            # An expert of one unit and a gate of 4 x 1 cost 16 + 8: one and a half units.
            lambda: made_sparse(ffn(hidden=1), MoEConfig(1, TokenChoice(1))),
            {},
            r"module '': no whole width comes within 5% of 24 flops a token",
        ),
        (
            lambda: made_sparse(normed(4, 6), MoEConfig(3, TokenChoice(2), MLP((6,))), "random"),
            {},
            r"module '': it is one linear layer, which has no hidden units",
        ),
        (
            lambda: changed(lambda m: m.pop(1)),
            {},
            r"like has experts at '1' in the place of a Sequential, which model does not have there",
        ),
        (
            lambda: changed(lambda m: m.__setitem__(1, ffn(7))),
            {},
            r"module '1' of model is FFN\(hidden_dim=7.*, and like replaced a network of another size",
        ),
        (
            lambda: changed(lambda m: m.__setitem__(2, nn.Linear(4, 5))),
            {},
            r"like is not made of model: '2.weight' is of shape \(5, 4\) in model, and of shape \(3, 4\) in like",
        ),
        (
            lambda: changed(lambda m: m.append(nn.Linear(3, 3))),
            {},
            r"like is not made of model: '3.weight' is of shape \(3, 3\) in model, and missing in like",
        ),
        (lambda: changed(lambda m: m[1].requires_grad_(False)), {}, r"module '1': its weight 1.0.weight is frozen"),
    ],
)
def test_bad_input(models, options, message):
    dense, sparse = models()
    with pytest.raises(ValueError, match=message):
        dense_twin(dense, like=sparse, **options)
