"""Products by oneDNN: the same numbers and derivatives as torch's own, and only where they are wanted."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import core
from core.kernels import cpu
from core.kernels.cpu import products

BY_ONEDNN = "mkldnn::_linear_pointwise"
needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch is built without oneDNN"
)


class Names(TorchDispatchMode):
    """The operations that run inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op.name().removesuffix(".default"))
        return op(*args, **(kwargs or {}))


@pytest.fixture
def badly_served(monkeypatch) -> None:
    monkeypatch.setattr(products, "is_served_badly", lambda: True)


@pytest.fixture
def of_every_size(badly_served, monkeypatch) -> None:
    monkeypatch.setattr(products, "LEAST", 1)
    monkeypatch.setattr(products, "FEWEST_ROWS", 1)


def count(fn) -> int:
    with Names() as names:
        fn()
    return names.ops.count(BY_ONEDNN)


def derivatives(linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Output, gradients, and those of the gradients' squares."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = linear(*leaves)
    first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)
    return [y, *first, *second]


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (2, 3, 5), (0, 5), (64, 33)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_has_torchs_output_and_derivatives(of_every_size, shape, has_bias):
    x, weight = torch.randn(shape), torch.randn(9, shape[-1])
    bias = torch.randn(9) if has_bias else None
    actual = derivatives(cpu.linear, x, weight, bias)
    exact = derivatives(F.linear, *(None if t is None else t.double() for t in (x, weight, bias)))
    for value, expected in zip(actual, exact, strict=True):
        # Sums of 64 x 9 products of sums, each off by 6e-8, to the largest element.
        scale = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(value.double(), expected, rtol=0.0, atol=1e-5 * scale)


VIEWS = {
    "whole": lambda rows, columns: torch.randn(rows, columns),
    "transposed": lambda rows, columns: torch.randn(columns, rows).t(),
    "stepped": lambda rows, columns: torch.randn(2 * rows, 2 * columns)[::2, ::2],
    "one row": lambda rows, columns: torch.randn(1, columns).expand(rows, columns),
    "one column": lambda rows, columns: torch.randn(rows, 1).expand(rows, columns),
    "inside": lambda rows, columns: torch.randn(rows + 3, columns + 3)[1:-2, 2:-1],
}


@needs_onednn
@pytest.mark.parametrize(
    "left, right", [("whole", "whole"), *((view, "whole") for view in VIEWS), *(("transposed", view) for view in VIEWS)]
)
def test_views_of_any_strides_are_multiplied_as_they_are(of_every_size, left, right):
    a, b, total = VIEWS[left](6, 5), VIEWS[right](5, 8), torch.randn(6, 8)
    expected = a.double() @ b.double()
    out = torch.empty(8, 6).t()
    assert products.mm(a, b, out=out) is out
    for actual in (products.mm(a, b), out, products.addmm_(total.clone(), a, b) - total):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    for bias in (torch.randn(8), torch.randn(16)[::2], torch.randn(1).expand(8), torch.randn(9)[1:]):
        actual = products.mm(a, b, bias=bias)
        torch.testing.assert_close(actual.double(), expected + bias.double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cpu.linear(a, b.t(), bias), actual, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_forward_and_both_gradients_are_onednns(of_every_size):
    x, weight = torch.randn(4, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    assert count(lambda: cpu.linear(x, weight).sum().backward()) == 3
    assert count(lambda: cpu.linear(x.detach(), weight).sum().backward()) == 2
    with torch.no_grad():
        assert count(lambda: cpu.linear(x, weight)) == 1


@needs_onednn
def test_small_products_stay_with_torch(badly_served):
    x, weight = torch.randn(128, 64), torch.randn(128, 64)  # 2 ** 20 multiplications
    assert count(lambda: cpu.linear(x, weight)) == count(lambda: products.mm(x, weight.t())) == 1
    assert count(lambda: cpu.linear(x[:-1], weight)) == count(lambda: products.mm(x[:-1], weight.t())) == 0


@needs_onednn
def test_products_of_few_rows_do_not_copy_the_weight(badly_served):
    # oneDNN copies 1024 x 1024 numbers to its own layout before it reads them for one row.
    x, weight = torch.randn(4, 1024), torch.randn(1024, 1024)
    assert count(lambda: cpu.linear(x, weight)) == 1
    assert count(lambda: cpu.linear(x[:3], weight)) == 0
    layer = core.MoEConfig(2, core.TokenChoice(1), core.FFN(1024)).build(1024).requires_grad_(False)
    assert count(lambda: layer(x[None, :1])) == 0
    with torch.no_grad(), cpu.packed(weight):
        assert count(lambda: cpu.linear(x[:1], weight)) == 1


def test_other_dtypes_stay_with_torch_and_so_does_all_where_its_switch_is_off(of_every_size):
    x, weight = torch.randn(4, 5), torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu.linear(x, weight).dtype == torch.bfloat16
    before = torch._C._get_mkldnn_enabled()
    for dtype, is_on in ((torch.bfloat16, True), (torch.float64, True), (torch.float32, False)):
        a, w = x.to(dtype), weight.to(dtype)
        torch._C._set_mkldnn_enabled(is_on)
        try:
            assert count(lambda a=a, w=w: cpu.linear(a, w)) == count(lambda a=a, w=w: products.mm(a, w.t())) == 0
        finally:
            torch._C._set_mkldnn_enabled(before)


def test_shapes_that_do_not_fit_have_torchs_error_and_biases_that_spread_its_result(of_every_size):
    x, weight = torch.randn(4, 5), torch.randn(3, 5)
    for wrong in (torch.randn(3, 6), torch.randn(6)):
        with pytest.raises(RuntimeError, match=r"\(4x5 and 6x3\)|size mismatch"):
            cpu.linear(x, wrong)
    for bias in (torch.randn(1), torch.randn(4, 3)):
        torch.testing.assert_close(cpu.linear(x, weight, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(cpu.linear(x[0], weight), weight @ x[0])
    torch.testing.assert_close(cpu.linear(x, weight[0]), x @ weight[0])


def test_transforms_and_tangents_see_torchs_product(of_every_size):
    x, weight = torch.randn(4, 5), torch.randn(3, 5)
    tangent = torch.randn(4, 5)
    _, actual = torch.func.jvp(lambda t: cpu.linear(t, weight), (x,), (tangent,))
    torch.testing.assert_close(actual, tangent @ weight.t())
    mapped = torch.func.vmap(cpu.linear, in_dims=(None, 0))(x, torch.stack((weight, 2 * weight)))
    torch.testing.assert_close(mapped[1], 2 * mapped[0])


def test_a_compiled_product_is_the_same_without_a_graph_break(of_every_size):
    layer, x = cpu.Linear(5, 3), torch.randn(4, 5)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@needs_onednn
def test_flops_are_counted_alike(badly_served, monkeypatch):
    x, weight = torch.randn(128, 64, requires_grad=True), torch.randn(256, 64, requires_grad=True)
    by_onednn = core.count_flops(lambda: cpu.linear(x, weight).sum().backward())
    monkeypatch.setattr(products, "is_served_badly", lambda: False)
    assert by_onednn == core.count_flops(lambda: cpu.linear(x, weight).sum().backward()) == 3 * 2 * 128 * 64 * 256


@needs_onednn
def test_a_packed_weight_gives_the_same_products(badly_served, monkeypatch):
    monkeypatch.setattr(products, "LEAST_WEIGHT", 100 * 60)
    monkeypatch.setattr(products, "LEAST_PACKED", 1)
    layer, small, other = cpu.Linear(60, 100), torch.randn(99, 60), torch.randn(100, 60)
    x = torch.randn(7, 60)
    with torch.no_grad(), cpu.packed(layer.weight, layer.weight, small, other.double()):
        assert list(products._packed) == [id(layer.weight)]
        assert count(lambda: layer(x)) == 1  # too small for it where it is not packed
        assert count(lambda: cpu.linear(x, small)) == 0
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        with cpu.packed(layer.weight, other):
            assert list(products._packed) == [id(layer.weight), id(other)]
        assert list(products._packed) == [id(layer.weight)]  # who packed it unpacks it
        torch.testing.assert_close(layer(x[:0]), torch.empty(0, 100))
    assert not products._packed
    assert count(lambda: layer(x)) == 0
    with cpu.packed(layer.weight):  # with gradients, an optimizer may write to it
        assert not products._packed


@needs_onednn
def test_what_is_packed_is_plain_and_bounded_and_stays_until_the_last_thread_is_out(badly_served, monkeypatch):
    class Own(Tensor):
        pass

    monkeypatch.setattr(products, "LEAST_WEIGHT", 1)
    shared, own = torch.randn(6, 10), torch.randn(6, 10)
    first, second = cpu.packed(shared), cpu.packed(shared, own)
    with torch.no_grad():
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert list(products._packed) == [id(shared), id(own)]
        second.__exit__(None, None, None)
        assert not products._packed
        with cpu.packed(torch.randn(6, 10).as_subclass(Own), torch.randn(10), torch.randn(2, 3, 4)):
            assert not products._packed
        monkeypatch.setattr(products, "MOST_PACKED", 100)
        weights = [torch.randn(rows, 10) for rows in (6, 5, 4)]
        with cpu.packed(*weights):
            assert list(products._packed) == [id(weights[0]), id(weights[2])]
            with cpu.packed(torch.randn(1, 10)):
                assert len(products._packed) == 2


def test_converted_layers_keep_parameters_and_names():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 2, bias=False)))
    state, x = copy.deepcopy(model.state_dict()), torch.randn(5, 4)
    weight, y = model[0].weight, model(x)
    cpu.convert_linear(model)
    assert [type(m) for m in (model[0], model[1], model[2][0])] == [cpu.Linear, nn.ReLU, cpu.Linear]
    assert model[0].weight is weight
    assert model.state_dict().keys() == state.keys()
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize(
    "vendor, capability, expected",
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_only_amd_with_avx512_is_served_badly(monkeypatch, vendor, capability, expected):
    monkeypatch.setattr(products, "cpu_field", lambda name: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    assert products.is_served_badly.__wrapped__() == (expected and known)
