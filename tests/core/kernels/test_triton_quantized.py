"""Products by quantized matrices in Triton's interpreter, against those of the dequantized ones."""

from __future__ import annotations

import pytest
import torch

import core
from core.kernels import FFNWeights, QuantizedWeight, RowIndex, eager, expert_linear, fallback, quantize, triton_ops
from core.kernels.triton_ops import quantized

pytest.importorskip("triton")

STORED = [(8, None), (4, None), (8, 2), (4, 3)]


def weights_of(gated: bool, bias: bool, bits: int, group_size: int | None, dtype=torch.float32) -> FFNWeights:
    # 36 hidden numbers are two tiles of the interpreter's, and the last tile of 18 inputs is not whole.
    g = torch.Generator().manual_seed(0)
    D, F, N = 18, 36, 6
    w_in, w_gate, w_out = (torch.randn(4, a, b, generator=g).to(dtype) for a, b in ((D, F), (D, F), (F, N)))
    b_in, b_out = (torch.randn(4, width, generator=g).to(dtype) if bias else None for width in (F, N))
    own = [quantize(w, bits, group_size) for w in (w_in, w_out, w_gate)]
    return FFNWeights(own[0], own[1], b_in, b_out, own[2] if gated else None)


def plain(weights: FFNWeights) -> FFNWeights:
    floats = (w.dequantized() if isinstance(w, QuantizedWeight) else w for w in weights)
    return FFNWeights(*(None if w is None else w.double() for w in floats))


@pytest.mark.parametrize(
    ("bits", "group_size", "gated", "bias", "activation", "top_k", "dtype", "bound"),
    [
        (4, None, True, False, "silu", 1, torch.float32, 1e-5),
        (8, 2, False, True, "gelu", 2, torch.bfloat16, 3e-2),
    ],
)
@torch.no_grad()
def test_experts_equal_the_oracle(bits, group_size, gated, bias, activation, top_k, dtype, bound):
    weights = weights_of(gated, bias, bits, group_size, dtype)
    x = torch.randn(6, 18, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = core.MoEConfig(4, core.TokenChoice(top_k)).build(18)
    rows = layer.dispatcher.dispatch(x, layer.router(x[None].float()))
    index = RowIndex(rows.row_index_R, rows.offsets_E, rows.plan.inverse_N, rows.plan.top_k)
    y = triton_ops.expert_ffn(x, index, rows.gates_R, weights, activation)
    expected = eager.expert_ffn(x.double(), index, rows.gates_R.double(), plain(weights), activation)
    assert y.dtype == dtype
    assert float((y.double() - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize(("bits", "group_size"), STORED)
def test_a_product_equals_the_oracle(bits, group_size):
    g = torch.Generator().manual_seed(2)
    K = 15 if group_size == 3 else 18
    w, b = quantize(torch.randn(4, K, 33, generator=g), bits, group_size), torch.randn(4, 33, generator=g)
    x, offsets_E = torch.randn(11, K, generator=g), torch.tensor([3, 3, 7, 9], dtype=torch.int32)
    expected = eager.expert_linear(x.double(), w.dequantized().double(), offsets_E, b.double())
    y = expert_linear(x, w, offsets_E, b, backend="triton")
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert not y[9:].any()


def test_no_matrix_is_dequantized_as_a_whole(monkeypatch):
    weights, x = weights_of(True, False, 4, None), torch.randn(5, 18)
    monkeypatch.setattr("core.kernels.quantized.dequantize", None)
    rows = RowIndex(None, torch.tensor([1, 2, 4, 5], dtype=torch.int32))
    assert triton_ops.expert_ffn(x, rows, torch.ones(5), weights, "silu").shape == (5, 6)
    assert triton_ops.expert_ffn(x[:0], rows, torch.ones(0), weights, "silu").shape == (0, 6)


def test_beyond_the_kernels_limits_grouped_computes(monkeypatch):
    monkeypatch.setattr(quantized, "MAX_EXPERTS", 3)
    fallback._warn.cache_clear()  # another test may have had the warning
    weights, x = weights_of(False, False, 8, None), torch.randn(5, 18)
    rows = RowIndex(None, torch.tensor([1, 2, 4, 5], dtype=torch.int32))
    with pytest.warns(UserWarning, match="takes at most 3 experts, not 4"):
        y = triton_ops.expert_ffn(x, rows, torch.ones(5), weights, "relu")
    torch.testing.assert_close(y, eager.expert_ffn(x, rows, torch.ones(5), weights, "relu"))


def test_shapes_that_do_not_go_together_are_refused():
    weights, x = weights_of(False, False, 8, None), torch.randn(5, 18)
    rows, ones = RowIndex(None, torch.tensor([1, 2, 4, 5], dtype=torch.int32)), torch.ones(5)
    for args, message in (
        ((x[:, :17], rows, ones, weights, "relu"), "rows have width 17, the experts' matrices take 18"),
        ((x, rows, ones, weights._replace(w_out=weights.w_in), "relu"), "w_out has shape"),
        ((x, rows, ones, weights, "swish"), "activation='swish' is not one of"),
    ):
        with pytest.raises(ValueError, match=message):
            triton_ops.expert_ffn(*args)
    with pytest.raises(ValueError, match="offsets_E has shape"):
        triton_ops.expert_linear(x, weights.w_in, rows.offsets_E[:3])
