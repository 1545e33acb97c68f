"""The layer in other forms: under autocast, in half precision, copied, saved, and what memory it keeps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from layered import BACKENDS, EVERY_TERM
from torch.testing import assert_close

from core import FFN, MoE, MoEConfig, RoutingContext, SwiGLU, TokenChoice, record


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_equals_a_bfloat16_copy_of_the_experts(backend):
    layer = MoEConfig(4, expert=SwiGLU(16, bias=True), num_shared_experts=1, backend=backend).build(8)
    copied = copy.deepcopy(layer)
    copied.experts.bfloat16(), copied.shared_experts.bfloat16()
    x = torch.randn(2, 6, 8).bfloat16()  # exact in both
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())
    assert torch.equal(copied(x), y)
    y.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())


def full_layer() -> MoE:
    router = TokenChoice(2, noise="learned", expert_bias=True)
    layer = MoEConfig(4, router, SwiGLU(12, bias=True), num_shared_experts=1, balance=EVERY_TERM).build(8)
    layer.router.expert_bias = torch.tensor([0.1, -0.2, 0.3001, 0.0])
    return layer.eval()


def test_state_dict_has_the_documented_names_and_shapes():
    shapes = {name: tuple(t.shape) for name, t in full_layer().state_dict().items()}
    of_router = {"expert_bias": (4,), "gate.weight": (4, 8), "gate.noise_weight": (4, 8)}
    of_expert = {"w_in": (8, 12), "w_gate": (8, 12), "w_out": (12, 8), "b_in": (12,), "b_out": (8,)}
    assert shapes == {
        **{f"router.{name}": shape for name, shape in of_router.items()},
        **{f"experts.{name}": (4, *shape) for name, shape in of_expert.items()},
        **{f"shared_experts.{name}": (1, *shape) for name, shape in of_expert.items()},
    }
    assert set(MoEConfig(4).build(8).state_dict()) == {"router.gate.weight", "experts.w_in", "experts.w_out"}


def test_a_cast_model_keeps_its_expert_bias_in_float32_to_the_last_bit():
    layer = full_layer()
    before = layer.router.expert_bias.clone()
    for cast in (torch.bfloat16, torch.half, torch.double):
        layer.to(cast)
        assert layer.experts.w_in.dtype == cast
        assert layer.router.expert_bias.dtype == torch.float32
        assert torch.equal(layer.router.expert_bias, before)


@pytest.mark.parametrize(
    "dtype, padded, shared_gate",
    [(torch.bfloat16, False, None), (torch.float16, True, "mix"), (torch.bfloat16, True, None)],
)
def test_a_gate_keeps_half_precision_tokens_as_they_are_and_computes_in_float32(dtype, padded, shared_gate):
    shared = {} if shared_gate is None else {"num_shared_experts": 1, "shared_gate": shared_gate}
    layer = MoEConfig(4, TokenChoice(top_k=2, gate_bias=True), FFN(16), backend="cpu", **shared).build(8).to(dtype)
    x = torch.randn(3, 5, 8, dtype=dtype, requires_grad=True)
    context = RoutingContext(valid_BS=torch.arange(5) < torch.tensor([[5], [2], [4]])) if padded else None
    kept: list[torch.dtype] = []

    def pack(t):
        if t.ndim == 2 and t.shape == (15, 8):
            kept.append(t.dtype)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), record(layer) as tape:
        y = layer(x, context)
    assert set(kept) == {dtype}
    logits_TE = tape.entries[0].routing.evidence.logits_TE
    # The same from float32 copies: the logits bit by bit, the gradients but for the rounding of each.
    wide = [t.detach().float().requires_grad_() for t in (x, layer.router.gate.weight, layer.router.gate.bias)]
    tokens = wide[0].flatten(0, 1)
    if padded:
        tokens = tokens.masked_fill(~context.valid_BS.flatten()[:, None], 0.0)
    expected = F.linear(tokens, wide[1], wide[2])
    assert logits_TE.dtype == torch.float32
    assert torch.equal(logits_TE, expected)
    weights = torch.randn_like(expected)
    actual = torch.autograd.grad((logits_TE * weights).sum(), (x, *layer.router.gate.parameters()), retain_graph=True)
    for gradient, exact in zip(actual, torch.autograd.grad((expected * weights).sum(), wide), strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient.float(), exact, atol=1e-6, rtol=torch.finfo(dtype).eps)
    y.float().sum().backward()


def kept_floats(num_experts: int, tokens: int, top_k: int) -> int:
    """Numbers of hidden width that a forward of the cpu backend keeps for its backward: (rows, F) tensors."""
    dim, hidden = 8, 24
    layer = MoEConfig(num_experts, router=TokenChoice(top_k=top_k), expert=FFN(hidden), backend="cpu").build(dim)
    seen: dict[int, int] = {}

    def pack(t):
        if t.ndim == 2 and t.shape[-1] == hidden:
            seen[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(torch.randn(1, tokens, dim, requires_grad=True))
    assert y.requires_grad
    return sum(seen.values())


def test_memory_kept_grows_with_tokens_times_top_k_and_not_with_experts():
    # One pre-activation a routed pair, T * K * F; and of the 31 rows that the last tile of 32 may run over.
    assert kept_floats(4, tokens=100, top_k=2) == (100 * 2 + 31) * 24
    assert kept_floats(64, tokens=100, top_k=2) == (100 * 2 + 31) * 24
    assert kept_floats(64, tokens=300, top_k=8) == (300 * 8 + 31) * 24
