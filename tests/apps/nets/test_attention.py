"""Attention against a loop over its equation."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

import core
from apps.nets.attention import (
    CrossAttention,
    Mask,
    SelfAttention,
    _is_fused,
    attend,
    key_bias,
    padding_mask,
    self_mask,
)
from apps.nets.config import TransformerConfig
from apps.nets.decode_cache import Cache, Step
from apps.nets.positions import RelativeBias, rotate, rotations


def config(**options):
    return TransformerConfig(**{"dim": 8, "num_heads": 4, "positions": "none", **options})


def looped(q, k, v, scale, allowed, bias=None):
    """One query at a time, over the keys it may see: (B, H, L, d). ``allowed`` is (B, L, S), ``bias`` (H, L, S)."""
    y = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = allowed[b, i].nonzero().flatten()
                scores = k[b, h, keys] @ q[b, h, i] * scale + (0 if bias is None else bias[h, i, keys])
                weights = scores.exp() / scores.exp().sum()
                y[b, h, i] = weights @ v[b, h, keys]
    return y


@pytest.mark.parametrize("learned", [False, True], ids=["fused", "explicit"])
@pytest.mark.parametrize("padded, causal, relative", [*itertools.product([False, True], repeat=3)])
def test_output_and_gradients_are_those_of_the_equation(padded, causal, relative, learned):
    torch.manual_seed(0)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 4, 5, 3, dtype=torch.float64))
    valid_BL = torch.tensor([[True] * 5, [True, True, True, False, False]]) if padded else None
    bias_HLL = torch.randn(4, 5, 5, dtype=torch.float64) if relative else None
    if learned:
        # A bias that trains takes the explicit path.
        bias_HLL = (torch.zeros(4, 5, 5, dtype=torch.float64) if bias_HLL is None else bias_HLL).requires_grad_()
    mask = self_mask(torch.empty(2, 5, 8).double(), 4, valid_BL=valid_BL, causal=causal, relative_HLL=bias_HLL)
    allowed = torch.ones(2, 5, 5, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    allowed = allowed & valid_BL[:, None] if padded else allowed
    expected, y = looped(q, k, v, 0.7, allowed, bias_HLL), attend(q, k, v, mask, 0.7)
    assert_close(y, expected)
    leaves, dy = (q, k, v, bias_HLL) if learned else (q, k, v), torch.randn_like(y)
    assert_close(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_causal_mask_without_a_bias_is_the_same(dtype):
    # What a GPU takes: its kernels leave the hidden half out.
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=dtype)
    mask = self_mask(torch.empty(2, 5, 8, dtype=dtype), 4, valid_BL=None, causal=True, relative_HLL=None)
    assert_close(attend(q, k, v, Mask(causal=True), 0.3), attend(q, k, v, mask, 0.3))


@pytest.mark.parametrize("bias, own", [*itertools.product([False, True], [None, False, True])])
def test_bias_of_queries_keys_and_values_is_an_option_of_its_own(bias, own):
    attention, has = CrossAttention(config(bias=bias, qkv_bias=own)), bias if own is None else own
    assert [part.bias is not None for part in (attention.q, attention.kv, attention.out)] == [has, has, bias]


def test_padding_alone_stays_finite_and_few_scores_without_gradients_are_explicit_products():
    valid_BS = torch.zeros(1, 3, dtype=torch.bool)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = torch.randn(3, 1, 2, 3, 4, dtype=dtype)
        assert attend(q, k, v, padding_mask(valid_BS, 2, q), 1.0).isfinite().all()
    assert key_bias(~valid_BS, 2, torch.zeros(())) is None
    assert key_bias(valid_BS, 2, torch.zeros(())).shape == (2, 1, 3)
    q, k = torch.randn(2, 4, 8, 3), torch.randn(2, 4, 2048, 3)
    assert _is_fused(q, k, Mask(), 0.0)
    with torch.no_grad():
        assert not _is_fused(q, k, Mask(), 0.0)  # 2 * 4 * 8 * 2048 = 2 ** 17
        assert _is_fused(q, torch.randn(2, 4, 2049, 3), Mask(), 0.0)
        y = attend(q, k, k, Mask(), 0.7)
    assert_close(y, attend(q, k, k, Mask(), 0.7))


@pytest.mark.parametrize(
    "kv_heads, qk_norm, rotary", [(4, "none", False), (2, "head", True), (2, "all", False), (1, "none", True)]
)
def test_a_step_is_the_last_position_of_the_sequence(kv_heads, qk_norm, rotary):
    torch.manual_seed(0)
    relatives = {"positions": "relative", "relative_buckets": 4, "relative_max_distance": 3}
    options = config(num_kv_heads=kv_heads, qk_norm=qk_norm, **relatives)
    attention, relative = SelfAttention(options).double(), RelativeBias(options, causal=True).double()
    torch.nn.init.normal_(relative.weight)
    x_BLD = torch.randn(3, 5, 8, dtype=torch.float64)
    turns = rotations(0, 5, 2, 10.0, x_BLD) if rotary else None
    mask = self_mask(x_BLD, 4, valid_BL=None, causal=True, relative_HLL=relative(5))
    expected = attention(x_BLD, mask, turns)
    store = torch.full((2, 2, 3 * kv_heads, 5, 2), math.nan, dtype=torch.float64)
    cache = Cache(store, kv_heads, 4 // kv_heads)
    for t in range(5):
        cache.append()
        bias = relative.last(t + 1).unflatten(0, (kv_heads, -1)).repeat(3, 1, 1)
        given = Step(cache, core.RoutingContext(), bias, None if turns is None else turns[:, t : t + 1])
        assert_close(attention.step(x_BLD[:, t], 1, given), expected[:, t])
        cache.length += 1
    assert store[0].isnan().all()  # another layer's


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_step_reads_each_sentences_memory_once_for_all_its_copies(kv_heads):
    torch.manual_seed(0)
    attention = CrossAttention(config(num_kv_heads=kv_heads)).double()
    memory_BSD, x_RD = torch.randn(2, 4, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    valid_BS = torch.tensor([[True] * 4, [True, True, False, False]])
    store = attention.keys_and_values(memory_BSD)
    assert store.shape == (2, 2, kv_heads, 4, 8 // 4)
    y_RD = attention.step(x_RD, store.contiguous(), 3, key_bias(valid_BS, kv_heads, x_RD))
    mask = padding_mask(valid_BS, 4, x_RD)
    assert_close(y_RD.view(2, 3, 8), attention(x_RD.view(2, 3, 8), memory_BSD, mask))
    # Heads that share keys equal heads with copies of them.
    copied, (q, kv) = CrossAttention(config()).double(), (attention.q, attention.kv)
    shared = {"q": q.state_dict(), "out": attention.out.state_dict()}
    for name, state in shared.items():
        getattr(copied, name).load_state_dict(state)
    for name, own in kv.state_dict().items():
        copies = own.unflatten(0, (2, kv_heads, 2)).repeat_interleave(4 // kv_heads, 1).flatten(0, 2)
        copied.kv.state_dict()[name].copy_(copies)
    assert_close(copied(x_RD.view(2, 3, 8), memory_BSD, mask), y_RD.view(2, 3, 8))


def test_autocast_computes_as_half_precision_does():
    torch.manual_seed(0)
    attention, x_BLD = SelfAttention(config(qk_norm="head")), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mask = self_mask(x_BLD, 4, valid_BL=None, causal=True, relative_HLL=None)
        y = attention(x_BLD, mask)
    assert mask.bias.dtype == y.dtype == torch.bfloat16
    expected = attention(x_BLD, self_mask(x_BLD, 4, valid_BL=None, causal=True, relative_HLL=None))
    assert_close(y.float(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("qk_norm, numbers", [("head", 2), ("all", 8), ("none", 0)])
def test_queries_and_keys_alone_are_normed_and_then_rotated(qk_norm, numbers):
    # Over the 2 numbers of each head, or the 8 of all four; keys of one head have 2 either way.
    torch.manual_seed(0)
    attention = SelfAttention(config(num_kv_heads=1, qk_norm=qk_norm, norm_eps=0.01)).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    turns = rotations(0, 3, 2, 10.0, x)
    q, k, v = attention.qkv(x).split((8, 2, 2), -1)

    def normed(z, width, norm):
        assert norm.weight.shape == (width,)
        torch.nn.init.normal_(norm.weight)
        z = z.unflatten(-1, (-1, width))
        return (z / (z.square().mean(-1, keepdim=True) + 0.01).sqrt() * norm.weight).flatten(-2)

    if numbers:
        q, k = normed(q, numbers, attention.q_norm), normed(k, 2, attention.k_norm)
    q, k, v = q.unflatten(-1, (4, 2)), k.unflatten(-1, (1, 2)), v.unflatten(-1, (1, 2)).expand(-1, -1, 4, -1)
    q, k = rotate(q, turns), rotate(k, turns).expand(-1, -1, 4, -1)
    y = attend(*(z.transpose(1, 2) for z in (q, k, v)), Mask(), 2**-0.5)
    assert_close(attention(x, Mask(), turns), attention.out(y.transpose(1, 2).flatten(2)))
