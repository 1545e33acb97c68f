"""Quantized weights: the numbers bit by bit, the errors that they are held to, and the products of every backend."""

from __future__ import annotations

import pytest
import torch

from core.kernels import FFNWeights, QuantizedWeight, RowIndex, expert_ffn, expert_linear
from core.kernels.quantized import dequantize, pack, quantize, whole_numbers

BACKENDS = ("eager", "cpu", "grouped")


def test_four_bits_are_packed_two_to_a_byte():
    # Rows in pairs, the even one in the lower half, each number plus 8: -7 is 1, 0 is 8, 7 is 15.
    q_KN = torch.tensor([[-7, 0], [7, 1], [3, -1]], dtype=torch.int8)
    assert pack(q_KN).tolist() == [[0xF1, 0x98], [0x8B, 0x87]]  # the row past the last is zero: 8
    assert pack(q_KN).dtype == torch.uint8


def test_every_pair_of_numbers_comes_back():
    q_KN = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).T.to(torch.int8)
    assert pack(q_KN).flatten().unique().numel() == 256
    assert torch.equal(whole_numbers(pack(q_KN), 2), q_KN)
    odd = torch.cat((q_KN, q_KN[:1]))
    assert torch.equal(whole_numbers(pack(odd), 3), odd)


def test_a_matrix_by_hand():
    w = torch.tensor([[[12.7, -7.0], [-6.3, 0.0], [0.04, 3.4]]])  # E=1, K=3, N=2
    in_8 = quantize(w, 8)
    torch.testing.assert_close(in_8.scales, torch.tensor([[[0.1, 7 / 127]]]))
    # 3.4 * 127 / 7 = 61.7
    assert in_8.values.tolist() == [[[127, -127], [-63, 0], [0, 62]]]
    in_4 = quantize(w, 4)
    # 12.7 / 7 = 1.814, of which -6.3 is -3.47; 7 / 7 = 1.
    assert whole_numbers(in_4.values, 3).tolist() == [[[7, -7], [-3, 0], [0, 3]]]
    torch.testing.assert_close(in_4[0], torch.tensor([[12.7, -7.0], [-3 * 12.7 / 7, 0.0], [0.0, 3.0]]))


def test_groups_have_scales_of_their_own():
    w = torch.tensor([[[7.0], [3.5], [0.07], [-0.035]]])
    by_two = quantize(w, 4, group_size=2)
    torch.testing.assert_close(by_two.scales, torch.tensor([[[1.0], [0.01]]]))
    # 3.5 is 4, as -3.5 is -4: halves go to the even number. By channel the small numbers would be 0.
    assert whole_numbers(by_two.values, 4).flatten().tolist() == [7, 4, 7, -4]
    torch.testing.assert_close(by_two[0].flatten(), torch.tensor([7.0, 4.0, 0.07, -0.04]))
    assert quantize(w, 4)[0].flatten().tolist() == [7.0, 4.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "bits, group_size, dtype", [(8, None, torch.float32), (4, 8, torch.float64), (4, None, torch.bfloat16)]
)
def test_no_number_is_off_by_more_than_half_a_scale(bits, group_size, dtype):
    w = torch.randn(3, 24, 10, generator=torch.Generator().manual_seed(bits)).to(dtype)
    w[0, :, 0] = 0  # a channel of zeros has no scale
    weight = quantize(w, bits, group_size)
    assert weight.scales.dtype == dtype
    assert weight.bits == bits
    exact = dequantize(weight.values, weight.scales.double(), 24, torch.float64)
    half = (weight.scales.double() / 2).repeat_interleave(24 // weight.scales.shape[1], 1)
    assert bool(((w.double() - exact).abs() <= half * (1 + 1e-6)).all())
    assert not exact[0, :, 0].any()


def test_what_is_refused():
    for bits, group_size, rule in (
        (3, None, "bits=3 is not one of 4, 8"),
        (8, 5, r"group_size=5 does not divide the 24 inputs of the matrices"),
        (4, 0, "group_size=0 does not divide"),
        (4, 48, "group_size=48 does not divide"),
    ):
        with pytest.raises(ValueError, match=rule):
            quantize(torch.randn(2, 24, 10), bits, group_size)
    for value in (torch.nan, torch.inf):
        w = torch.randn(2, 4, 3)
        w[1, 2, 0] = value
        with pytest.raises(ValueError, match="expert 1 has weights that are not finite"):
            quantize(w, 8)
    x, w, offsets_E = problem()
    for backend in ("cpu", "grouped"):
        with pytest.raises(ValueError, match="rows have width 12, the experts' matrices take 13"):
            expert_linear(x[:, :12], quantize(w, 4), offsets_E, backend=backend)


def problem(dtype=torch.float32, K=13, N=9):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(4, K, N, generator=generator).to(dtype)
    x = torch.randn(11, K, generator=generator).to(dtype)
    return x, w, torch.tensor([3, 3, 7, 9], dtype=torch.int32)  # expert 1 has no rows, two rows no expert


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, None), (8, 1), (4, 13)])
def test_a_product_is_that_of_the_dequantized_matrix(backend, bits, group_size):
    x, w, offsets_E = problem(torch.float64)
    b = torch.randn(4, 9, dtype=torch.float64)
    weight = quantize(w, bits, group_size)
    y = expert_linear(x, weight, offsets_E, b, backend=backend)
    torch.testing.assert_close(y, expert_linear(x, weight.dequantized(), offsets_E, b, backend="eager"))
    assert not y[9:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("many", [False, True])  # the cpu's two ways
def test_an_ffn_is_that_of_the_dequantized_matrices(backend, bits, gated, many, monkeypatch):
    if many:
        monkeypatch.setattr("core.kernels.cpu.experts.FEW", 0)
    x, w, offsets_E = problem()
    generator = torch.Generator().manual_seed(1)
    w_out, w_gate = (torch.randn(4, a, b, generator=generator) for a, b in ((9, 5), (13, 9)))
    weights = FFNWeights(
        quantize(w, bits), quantize(w_out, bits), w[:, 0], w_out[:, 0], quantize(w_gate, bits) if gated else None
    )
    rows = RowIndex(torch.tensor([0, 4, 2, 2, 4, 1, 0, 3, 1, 0, 0]), offsets_E)
    gates_R = torch.rand(11, generator=generator)
    floats = FFNWeights(*(t.dequantized() if isinstance(t, QuantizedWeight) else t for t in weights))
    expected = expert_ffn(x[:5].double(), rows, gates_R.double(), _double(floats), "gelu", backend="eager")
    y = expert_ffn(x[:5], rows, gates_R, weights, "gelu", backend=backend)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def _double(weights: FFNWeights) -> FFNWeights:
    return FFNWeights(*(None if t is None else t.double() for t in weights))


def test_one_expert_is_dequantized_at_a_time(monkeypatch):
    x, w, offsets_E = problem()
    seen, write = [], QuantizedWeight.write_whole_numbers
    monkeypatch.setattr(
        QuantizedWeight, "write_whole_numbers", lambda w, e, out: seen.append((e, *out.shape)) or write(w, e, out)
    )
    monkeypatch.setattr("core.kernels.quantized.dequantize", None)
    expert_linear(x, quantize(w, 4), offsets_E, backend="cpu")
    assert seen == [(0, 13, 9), (2, 13, 9), (3, 13, 9)]  # not of expert 1, which has no rows
