"""What is read of a feed-forward network: the kind of its expert, its weights and its place, and what is refused."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import core
from core import FFN, GEGLU, MLP, DenseFFN, GeneralFFN, MoEConfig, SwiGLU, sparsify
from core.convert import activation_name, affine, feed_forward_part, read_ffn, recognized_ffns, register_ffn
from core.convert.read import readers
from core.convert.read.readers import named_part


class Gated(nn.Module):
    """A network with the names of Llama's."""

    def __init__(self, act, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 6, bias), nn.Linear(4, 6, bias)
        self.down_proj, self.act_fn = nn.Linear(6, 4, bias), act

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Named(nn.Module):
    """A network with the names of timm's ``Mlp``, whose ``norm`` and ``last`` follow the linear layers."""

    def __init__(self, act=None, width=6, norm=None, last=None, **more):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(4, width), nn.GELU() if act is None else act, nn.Linear(6, 4)
        self.norm, self.last = norm or nn.Identity(), last or nn.Identity()
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.last(self.fc2(self.norm(self.act(self.fc1(x)))))


class Reversed(Named):
    """The names of another network, and not what it computes."""

    def forward(self, x):
        return self.fc2(self.fc1(self.act(x)))


class Scaled(Named):
    """A network with a factor that is 1 at its start, a parameter or a buffer."""

    def forward(self, x):
        return self.gamma * super().forward(x)


class Dropping(Named):
    """A network that drops as its number says: hidden ones, or if it gives a module's name, what that gets."""

    def __init__(self, rate, at):
        super().__init__()
        self.rate, self.at = rate, at

    def forward(self, x):
        for layer in (self.fc1, self.act, self.fc2):
            x = F.dropout(x, self.rate, self.training) if layer is getattr(self, self.at) else x
            x = layer(x)
        return x


class Block(Named):
    """A block with the names of BART's, of which the network is only a part."""

    def __init__(self, act, **more):
        super().__init__(self_attn=nn.Identity(), activation_dropout=0.2, **more)
        self.activation_fn = act

    def forward(self, x):
        x = x + self.self_attn(x)
        return x + self.fc2(F.dropout(self.activation_fn(self.fc1(x)), self.activation_dropout, self.training))


def scaled(gamma: torch.Tensor, act=None) -> Scaled:
    module = Scaled(act)
    if isinstance(gamma, nn.Parameter):
        module.gamma = gamma
    else:
        module.register_buffer("gamma", gamma)
    return module


def sequence(*middle: nn.Module, last: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Linear(6, 5), *([] if last is None else [last]))


def normed(*sizes: int) -> nn.Sequential:
    """Return layers as torch-rechub's MLP has them."""
    layers = [(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Dropout(0.2)) for a, b in pairwise(sizes)]
    return nn.Sequential(*(module for layer in layers for module in layer))


@pytest.mark.parametrize(
    ("module", "expert"),
    [
        (sequence(nn.ReLU()), FFN(6, "relu", bias=True)),
        (sequence(nn.GELU(approximate="tanh"), nn.Identity()), FFN(6, "gelu_tanh", bias=True)),
        (sequence(nn.SiLU(), nn.Dropout(0.3)), GeneralFFN(6, "silu", dropout=0.3)),
        (sequence(nn.Mish()), GeneralFFN(6, "mish")),
        (nn.Sequential(nn.Linear(4, 6, False), nn.ReLU(), nn.Linear(6, 4)), GeneralFFN(6, "relu", bias_in=False)),
        (Gated(nn.SiLU()), SwiGLU(6)),
        (Gated(nn.GELU()), GEGLU(6)),
        (Gated(nn.ReLU()), SwiGLU(6, "relu")),
        (Gated(F.silu, bias=True), GeneralFFN(6, "silu", gated=True, bias_gate=True)),
        (Named(norm=nn.Dropout(0.0)), FFN(6, bias=True)),
        (Named(dropout=0.1, unused=nn.LayerNorm(6)), FFN(6, bias=True)),  # nothing of it is called
        (Dropping(0.1, "fc2"), GeneralFFN(6, dropout=0.1)),
        (DenseFFN(6, "relu", bias=False).build(4), FFN(6, "relu")),
        (DenseFFN(6, "silu", gated=True, dropout=0.1).build(4), GeneralFFN(6, "silu", True, True, True, dropout=0.1)),
        (normed(4, 6), MLP((6,), norm="batch", dropout=0.2)),
        (normed(4, 6, 3), MLP((6, 3), norm="batch", dropout=0.2)),
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.ReLU()), MLP((6, 3))),
    ],
)
def test_the_expert_is_of_the_network_s_kind(module, expert):
    part = named_part("net", module)
    assert part.expert == expert
    assert part.dim == 4
    x = torch.randn(7, 4)
    torch.testing.assert_close(part.build().eval()(x, "dense"), module.eval()(x), rtol=1e-5, atol=1e-6)
    assert part.num_params() == expert.num_params(4, part.out_dim)


def test_batch_norm_is_read_with_its_statistics_which_stay_as_they_are():
    module = normed(4, 6)
    with torch.no_grad():
        for tensor in (*module[1].parameters(), module[1].running_mean, module[1].running_var):
            tensor.uniform_(0.5, 2)
    module[1].eval()
    before = module[1].running_mean.clone()
    part = named_part("net", module)
    # The norm takes the bias before it away, as it takes any constant.
    torch.testing.assert_close(part.weights["running_mean_0"], module[1].running_mean - module[0].bias)
    assert "b_0" not in part.weights
    assert [m.training for m in module] == [True, False, True, True]
    assert torch.equal(module[1].running_mean, before)


def test_dropout_is_read_by_its_place():
    inner = named_part("net", sequence(nn.ReLU(), nn.Dropout(0.3), last=nn.Dropout(0.2)))
    assert (inner.expert.dropout, inner.output_dropout) == (0.3, 0.2)
    outer = named_part("net", sequence(nn.ReLU(), last=nn.Dropout(0.2)))
    assert (outer.expert, outer.output_dropout) == (FFN(6, "relu", bias=True), 0.2)


def test_maps_are_read_of_convolutions_over_single_positions():
    part = named_part("net", nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 1)))
    assert (part.layout, part.dim, part.hidden_dim, part.out_dim) == ("channels_first", 4, 6, 5)
    assert read_ffn(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 1))) is None


def test_a_container_whose_names_are_asked_for_stays():
    module = nn.Sequential(OrderedDict(c_fc=nn.Linear(4, 6), gelu=nn.GELU(), c_proj=nn.Linear(6, 4)))
    part = named_part("mlp", module)
    assert (part.at, part.emptied) == ("c_fc", ("gelu", "c_proj"))


def test_blocks_of_torch_s_transformer_are_read_whole():
    encoder, decoder = nn.TransformerEncoderLayer(8, 2, 12, 0.1), nn.TransformerDecoderLayer(8, 2, 12, 0.0, F.gelu)
    part = named_part("net", encoder)
    assert (part.expert, part.layout) == (GeneralFFN(12, "relu", dropout=0.1), "sequence_first")
    assert (part.at, part.emptied) == ("linear1", ("dropout", "linear2"))
    assert named_part("net", decoder).expert == FFN(12, bias=True)


@pytest.mark.parametrize("act", [nn.GELU(), F.gelu])
def test_a_block_with_a_network_s_layers_beside_its_attention_is_read_whole(act):
    block, x = Block(act), torch.randn(3, 4)
    part = named_part("net", block)
    assert (part.expert, part.at) == (GeneralFFN(6, "gelu", dropout=0.2), "fc1")
    assert part.emptied == ("activation_fn", "fc2")
    sparse = sparsify(block, MoEConfig(2), "")
    assert sparse.activation_dropout == 0.0
    torch.testing.assert_close(sparse.eval()(x), block.eval()(x))
    assert read_ffn(Block(nn.Softmax(0), third=nn.Linear(4, 4))) is None  # a third layer is another network


def test_networks_of_a_model_are_listed_by_name():
    model = nn.ModuleDict(
        {
            "block": nn.ModuleDict({"mlp": Named(), "attn": nn.Linear(4, 4)}),
            "normed": Named(norm=nn.LayerNorm(6)),  # no expert has a norm
            "wrapped": sequence(nn.ReLU()),
            "layer": nn.TransformerEncoderLayer(4, 2, 6),
            "sparse": MoEConfig(2).build(4),
            "pair": nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
            "lazy": nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 4)),  # without its sizes
        }
    )
    assert list(recognized_ffns(model)) == ["block.mlp", "wrapped", "layer"]
    assert list(recognized_ffns(Named())) == [""]


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.ReLU(inplace=True), "relu"),
        (torch.relu, "relu"),
        (nn.GELU(), "gelu"),
        (lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), "gelu"),
        (lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))), "gelu_tanh"),
        (lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu"),
        (nn.LeakyReLU(0.2), None),
        (nn.PReLU(), None),
        (nn.Softmax(-1), None),
        (nn.Flatten(0), None),
        (nn.LSTM(4, 4), None),
        (3, None),
    ],
)
def test_activations_are_recognized_by_what_they_compute(act, name):
    assert activation_name(act) == name


@pytest.mark.parametrize("gamma", [torch.ones(4), nn.Parameter(torch.ones(4))])
def test_what_follows_a_network_s_layers_stays_behind_the_experts(gamma):
    module = scaled(gamma)
    part = named_part("net", module)
    assert (part.at, part.emptied) == ("fc1", ("act", "norm", "fc2"))
    sparse = sparsify(module, MoEConfig(2), "")
    sparse.gamma.data *= 3
    x = torch.randn(5, 4)
    torch.testing.assert_close(sparse(x), 3 * module(x))
    with pytest.raises(ValueError, match=r"it does more than a feed-forward network"):  # a function cannot be taken out
        named_part("net", scaled(gamma, F.gelu))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Named(norm=nn.LayerNorm(6)), r"^module 'net' is a Named.*: what is between its linear layers is none of relu"),
        (Named(F.gelu, last=nn.AlphaDropout(0.1)), r"^module 'net' .*or drops other numbers in training"),
        (Named(norm=nn.AlphaDropout(0.1)), r"its hidden layer is changed in training, and not by dropout"),
        (Dropping(0.1, "act"), r"its hidden layer is changed in training, and not by dropout behind the activation"),
        (Named(act=nn.PReLU()), r"what is between its linear layers is none of relu, gelu, silu"),
        (Reversed(width=6), r"is a Reversed.*: what is between its linear layers is none of relu"),
        (
            nn.Linear(4, 4),
            r"^module 'net' is a Linear, which is no feed-forward network: it has no two linear layers.*$",
        ),
        (Named(width=8), r"module 'net' is a Named.* called with a tensor of shape .*32x8 and 6x4"),
        (nn.ModuleList([Named()]), r"is a ModuleList, which is no feed-forward network; there are net.0 in it"),
        (sequence(nn.Linear(6, 6)), r"is a Sequential, which is no feed-forward network"),
        (
            nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, eps=0.1), nn.ReLU()),
            r"a batch norm of an expert has weights, running statistics, eps=1e-5 and momentum=0.1",
        ),
        (
            nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.SiLU()),
            r"layers of a stack have one activation of relu, gelu",
        ),
    ],
)
def test_what_no_expert_computes_is_refused(module, message):
    if isinstance(module, Reversed):
        module.fc1, module.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
    with pytest.raises(ValueError, match=message):
        named_part("net", module)


class Own(nn.Module):
    """A network that is not called with tokens alone."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x, times):
        return times * self.down(self.up(x).relu())


class OwnBelow(Own):
    pass


def read_own(module):
    up, down = affine(module.up), affine(module.down)
    return feed_forward_part(up, down, activation="relu", dense=lambda x: module(x, 1))


@pytest.mark.parametrize("kind", [Own, f"{Own.__module__}.Own"])
def test_a_class_of_one_s_own_is_registered(kind, monkeypatch):
    monkeypatch.setattr(readers, "_READERS", dict(readers._READERS))
    assert read_ffn(Own()) is None
    register_ffn(kind, read_own)
    assert named_part("net", OwnBelow()).expert == FFN(6, "relu", bias=True)


class Transposed(nn.Module):
    """A network whose matrices no linear layer holds."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return F.gelu(x @ self.up) @ self.down


class Bypassing(Named):
    """A network that does not call its linear layers."""

    def forward(self, x):
        return F.linear(F.gelu(F.linear(x, self.fc1.weight, self.fc1.bias)), self.fc2.weight, self.fc2.bias)


class BypassingGated(nn.Module):
    """Llama's names, in whose order the last layer is second."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x):
        w1, w2, w3 = (lambda y, m=m: F.linear(y, m.weight, m.bias) for m in (self.w1, self.w2, self.w3))
        return w2(F.gelu(w1(x)) * w3(x))


@pytest.mark.parametrize("kind", [Transposed, Bypassing, BypassingGated])
def test_an_error_prints_three_lines_that_register_the_class(kind, monkeypatch):
    monkeypatch.setattr(readers, "_READERS", dict(readers._READERS))
    dense, x = nn.Sequential(kind(), kind()), torch.randn(5, 4)
    with pytest.raises(ValueError, match=f"module '0' is a {kind.__name__}, which is no feed-forward") as error:
        sparsify(dense, MoEConfig(4), "*")
    _, _, *lines = str(error.value).splitlines()
    assert len(lines) == 3
    exec("\n".join(lines), {"core": core})
    torch.testing.assert_close(sparsify(dense, MoEConfig(4), "*")(x), dense(x))


def test_what_is_no_class_and_no_weight_of_a_network_is_refused():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    into, out, narrow, gate = ((torch.zeros(shape), None) for shape in ((4, 6), (6, 4), (5, 4), (4, 5)))
    no_class = "is neither a class of modules nor the path of one"
    for make, message in (
        (lambda: feed_forward_part(into, narrow, activation="relu"), "w_out takes 5 numbers, and w_in gives 6"),
        (
            lambda: feed_forward_part(into, out, gate, activation="relu"),
            r"w_gate .* \(4, 5\), and w_in \(4, 6\)",
        ),
        (lambda: affine(linear), "a Linear has no weight of floating-point numbers"),
        *((lambda kind=kind: register_ffn(kind, read_own), no_class) for kind in ("Own", int, 3)),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_compiled_network_is_read_without_being_compiled():
    compiled = []
    backend = lambda graph, inputs: compiled.append(graph) or graph.forward  # noqa: E731
    module, x = torch.compile(sequence(nn.ReLU()), backend=backend), torch.randn(3, 4)
    assert named_part("net", module).expert == FFN(6, "relu", bias=True)
    assert compiled == []
    module(x)
    assert len(compiled) == 1
