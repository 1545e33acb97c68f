"""The fast path on CPU: a loop over experts whose rows stay in cache, one custom op with its own backward.

Decisions, each measured at T=4096, D=512 on 2 cores with ``benchmarks/layer.py``:

- A loop of plain matmuls beats ``grouped_mm`` on CPU, the more the smaller the experts (1.2x against 1.6x of a dense
  FFN's time at E=64, K=8, F=256): gather, activation, gate and sum of a block run on rows still in cache.
- Blocks of about ``BLOCK`` rows in float32, twice as many in half precision. Smaller ones pay for kernel starts and for
  adding up the weight gradients, larger ones leave the cache. An expert's blocks are equal: a full block and a sliver
  are slower than two halves.
- In half precision oneDNN compiles a kernel for each new shape (0.8 ms, as long as two matmuls of 512 rows), and a
  dropless router makes new shapes every step: matmuls run on a multiple of ``TILE`` rows. The rows past a block's end
  are its neighbors'; their part of a weight gradient is set to zero, and the rest is never read.
- The gate's gradient comes from the activation side, ``<dy w_out^T, h> + <dy, b_out>`` (arXiv 2512.14080, section 3),
  so only ``x`` and the pre-activations are kept.
- With few rows, as in a step of decoding, kernel starts dominate: gather, activation, gate and sum are done once for
  all experts (``_few_rows``), which takes 3 to 9 % off a decoding of 32 sentences. Experts padded to equal counts in
  one ``bmm`` were slower, E=64, and slower than a loop if one expert takes half of the rows.
- A token's rows are summed in float32, block by block from cache; in half precision the gate rides on the conversion.
  Writing all rows out and summing them with ``embedding_bag`` was slower: 33 MB of fresh pages cost 20 ms.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ...torch_internals import is_watched
from .. import eager, grouped
from ..eager import ALL_ACTIVATIONS, FFNWeights, RowIndex, check_width
from ..quantized import QuantizedWeight, Weight
from .blocks import TILE, RowSum, WeightGrad, cut_in_blocks, is_half, row_tile
from .pages import new_empty
from .products import addmm_, expert_mm, mm

FEW = 2**18
"""Most numbers in the hidden layer of all rows for ``_few_rows``: 1 MB, which stays in cache."""


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu"


def _activation_backward(grad: Tensor, pre: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, pre)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_backward(grad, pre, approximate="tanh")
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, pre)
    if activation == "identity":
        return grad
    return torch.ops.aten.threshold_backward(grad, pre, 0)


def _kept_rows(num_rows: Any) -> Any:
    """Return the rows of the pre-activations. Not by ``row_tile``: a compiled graph may run on another machine."""
    return num_rows + TILE - 1


def _expert_ffn(
    x: Tensor,
    row_index_R: Tensor | None,
    offsets_E: Tensor,
    gates_R: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    w_gate: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = FFNWeights(w_in, w_out, b_in, b_out, w_gate)
    return _computed(x, row_index_R, offsets_E, gates_R, weights, activation, keep)


def _computed(
    x: Tensor,
    row_index_R: Tensor | None,
    offsets_E: Tensor,
    gates_R: Tensor,
    weights: FFNWeights,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens after their experts, and with ``keep`` the pre-activations of both halves."""
    w_in, w_out, b_in, b_out, w_gate = weights
    R, width, D_out = gates_R.shape[0], w_in.shape[-1], w_out.shape[-1]
    act, tile = ALL_ACTIVATIONS[activation], row_tile(x.dtype)
    ends = offsets_E.tolist()
    # Padding is among the pairs, but is not a row.
    if not keep and not is_half(x.dtype) and (not ends or ends[-1] * max(width, x.shape[-1]) <= FEW):
        y = _few_rows(x, row_index_R, ends, gates_R, weights, activation)
        return y, x.new_empty(0, width), x.new_empty(0, width)
    index_R = None if row_index_R is None else _past_the_end(row_index_R, tile)
    x_full = _past_the_end(x, tile) if index_R is None else x
    gates = gates_R.unsqueeze(-1)
    blocks = cut_in_blocks(ends, x.dtype)
    total = RowSum(x, D_out, blocks)
    kept = _kept_rows(R) if keep else 0
    pre = new_empty(x, (kept, width))
    pre_gate = new_empty(x, (kept if w_gate is not None else 0, width))
    pre[R:], pre_gate[R:] = 0, 0  # a block may end before them
    for e, start, end, stop, *_ in blocks:
        x_b = x_full[start:stop] if index_R is None else x.index_select(0, index_R[start:stop])
        # Blocks run in the order of their rows, so the next tile overwrites rows past a tile's end.
        a = expert_mm(x_b, w_in, e, out=pre[start:stop] if keep else None)
        if b_in is not None:
            a.add_(b_in[e])
        if w_gate is None:
            h = act(a)
        else:
            u = expert_mm(x_b, w_gate, e, out=pre_gate[start:stop] if keep else None)
            h = act(u).mul_(a)
        y_b = expert_mm(h, w_out, e, bias=None if b_out is None else b_out[e])
        total.add(index_R, start, end, y_b[: end - start], gates[start:end])
    return total.result(), pre, pre_gate


_cpu_expert_ffn = torch.library.custom_op("moesaic::cpu_expert_ffn", mutates_args=(), device_types="cpu")(_expert_ffn)


def _few_rows(
    x: Tensor,
    row_index_R: Tensor | None,
    ends: list[int],
    gates_R: Tensor,
    weights: FFNWeights,
    activation: str,
) -> Tensor:
    """Compute ``_expert_ffn`` with one gather, one activation and one sum for the rows of all experts."""
    w_in, w_out, b_in, b_out, w_gate = weights
    act, r = ALL_ACTIVATIONS[activation], ends[-1] if ends else 0

    def linear(rows: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        out = rows.new_empty(r, weight.shape[-1])
        for e, (start, end) in enumerate(itertools.pairwise((0, *ends))):
            if start < end:
                expert_mm(rows[start:end], weight, e, bias=None if bias is None else bias[e], out=out[start:end])
        return out

    rows = x[:r] if row_index_R is None else x.index_select(0, row_index_R[:r])
    a = linear(rows, w_in, b_in)
    h = act(a) if w_gate is None else act(linear(rows, w_gate, None)).mul_(a)
    y_rD = linear(h, w_out, b_out).mul_(gates_R[:r, None])
    y = y_rD.new_zeros(x.shape[0], y_rD.shape[-1])
    if row_index_R is None:
        y[:r] = y_rD
        return y
    return y.index_add_(0, row_index_R[:r], y_rD)


@_cpu_expert_ffn.register_fake
def _(x, row_index_R, offsets_E, gates_R, w_in, w_out, b_in, b_out, w_gate, activation, keep):
    kept, width = _kept_rows(gates_R.shape[0]) if keep else 0, w_in.shape[-1]
    return (
        x.new_empty(x.shape[0], w_out.shape[-1]),
        x.new_empty(kept, width),
        x.new_empty(kept if w_gate is not None else 0, width),
    )


def _past_the_end(rows: Tensor, tile: int) -> Tensor:
    """Append a tile of zeros, so that the last block can be read past its end."""
    return rows if tile == 1 else torch.cat((rows, rows.new_zeros(tile - 1, *rows.shape[1:])))


@torch.library.custom_op("moesaic::cpu_expert_ffn_backward", mutates_args=(), device_types="cpu")
def _cpu_expert_ffn_backward(
    dy: Tensor,
    x: Tensor,
    row_index_R: Tensor | None,
    offsets_E: Tensor,
    gates_R: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    w_gate: Tensor | None,
    pre: Tensor,
    pre_gate: Tensor,
    activation: str,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, gates, w_in, w_out, b_in, b_out and w_gate.

    ``wants`` has an entry for each of the last five; a gradient that is not wanted is empty.
    """
    act, tile = ALL_ACTIVATIONS[activation], row_tile(x.dtype)
    index_R = None if row_index_R is None else _past_the_end(row_index_R, tile)
    x_full, dy_full = (_past_the_end(t, tile) if index_R is None else t for t in (x, dy))
    gates = gates_R.unsqueeze(-1)
    # The weight gradients scale the narrower of their two factors.
    narrow = w_in.shape[-1] <= w_out.shape[-1]
    blocks = cut_in_blocks(offsets_E.tolist(), x.dtype)
    total = RowSum(x, x.shape[-1], blocks)
    dgates = torch.zeros_like(gates_R)
    wanted_in, wanted_out, wanted_b_in, wanted_b_out, wanted_gate = wants
    dw_in, dw_out, dw_gate = (
        WeightGrad(w if wanted else None, x.new_empty(0))
        for w, wanted in ((w_in, wanted_in), (w_out, wanted_out), (w_gate, wanted_gate))
    )
    db_in, db_out = (
        torch.zeros_like(b, dtype=total.y.dtype) if wanted and b is not None else x.new_empty(0)
        for b, wanted in ((b_in, wanted_b_in), (b_out, wanted_b_out))
    )
    for block in blocks:
        e, start, end, stop, *_ = block
        rows = end - start
        # Copies, for they are written to below.
        x_b = x_full[start:stop].clone() if index_R is None else x.index_select(0, index_R[start:stop])
        dy_b = dy_full[start:stop].clone() if index_R is None else dy.index_select(0, index_R[start:stop])
        a, g = pre[start:stop], gates[start:end].to(x.dtype)
        if w_gate is None:
            h = act(a)
        else:
            s = act(pre_gate[start:stop])
            h = s * a
        dh = mm(dy_b, w_out[e].t())
        dg = torch.sum(dh[:rows] * h[:rows], -1)
        if b_out is not None:
            dg += dy_b[:rows] @ b_out[e]
        if wanted_b_out:
            db_out[e] += (dy_b[:rows] * g).sum(0, dtype=db_out.dtype)
        dgates[start:end] = dg
        if w_gate is None:
            da, du = _activation_backward(dh, a, activation), None
            dx_b = mm(da, w_in[e].t())
        else:
            da, du = dh * s, _activation_backward(dh.mul_(a), pre_gate[start:stop], activation)
            dx_b = addmm_(mm(da, w_in[e].t()), du, w_gate[e].t())
        total.add(index_R, start, end, dx_b[:rows], gates[start:end])
        if wanted_b_in:
            db_in[e] += (da[:rows] * g).sum(0, dtype=db_in.dtype)
        if not (wanted_in or wanted_out or wanted_gate):
            continue
        if narrow:
            for t in (h, da) if du is None else (h, da, du):
                t[:rows].mul_(g)
        else:
            dy_b[:rows].mul_(g), x_b[:rows].mul_(g)
        # Rows past the block are another expert's, or padding that may hold NaN: they must not reach the sums over
        # rows. Both factors are cleared, for 0 * NaN is NaN.
        if stop > end:
            for t in (h, da, x_b, dy_b) if du is None else (h, da, du, x_b, dy_b):
                t[rows:].zero_()
        dw_out.add(block, h, dy_b)
        dw_in.add(block, x_b, da)
        if du is not None:
            dw_gate.add(block, x_b, du)
    return (
        total.result(),
        dgates,
        dw_in.result(),
        dw_out.result(),
        db_in.to(x.dtype),
        db_out.to(x.dtype),
        dw_gate.result(),
    )


@_cpu_expert_ffn_backward.register_fake
def _(dy, x, row_index_R, offsets_E, gates_R, w_in, w_out, b_in, b_out, w_gate, pre, pre_gate, activation, wants):
    weights = zip((w_in, w_out, b_in, b_out, w_gate), wants, strict=True)
    grads = (torch.empty_like(w) if wanted else x.new_empty(0) for w, wanted in weights)
    return (x.new_empty(x.shape), torch.empty_like(gates_R), *grads)


def _setup(ctx, inputs, output):
    *tensors, ctx.activation, _ = inputs
    _, pre, pre_gate = output
    ctx.mark_non_differentiable(pre, pre_gate)
    ctx.set_materialize_grads(False)  # or these two would be given zeros, as large as they are
    ctx.save_for_backward(*tensors, pre, pre_gate)


def _backward(ctx, dy, _dpre, _dpre_gate):
    if dy is None:
        return (None,) * 11
    saved = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[4:9])  # w_in, w_out, b_in, b_out, w_gate
    dx, dgates, *dweights = _cpu_expert_ffn_backward(dy.contiguous(), *saved, ctx.activation, wants)
    dweights = [dw if wanted else None for wanted, dw in zip(wants, dweights, strict=True)]
    return dx, None, None, dgates, *dweights, None, None


_cpu_expert_ffn.register_autograd(_backward, setup_context=_setup)


def _setup_second(ctx, inputs, output):
    *tensors, _pre, _pre_gate, ctx.activation, ctx.wants = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _second_backward(ctx, *grads):
    """Compute second derivatives by the oracle, whose graph holds the pre-activations too."""
    with torch.enable_grad():
        leaves: list[Any] = [
            t.detach().requires_grad_(t.is_floating_point()) if t is not None else None for t in ctx.saved_tensors
        ]
        dy, x, row_index_R, offsets_E, gates_R, *weights = leaves
        rows = RowIndex(row_index_R, offsets_E)
        y = eager.expert_ffn(x, rows, gates_R, FFNWeights(*weights), ctx.activation)
        outputs = zip((x, gates_R, *weights), grads, (True, True, *ctx.wants), strict=True)
        kept = [(t, g) for t, g, wanted in outputs if t is not None and g is not None and wanted]
        if not kept:  # a gradient that is None is zero
            return (None,) * len(ctx.needs_input_grad)
        first = torch.autograd.grad(y, [t for t, _ in kept], dy, create_graph=True, materialize_grads=True)
        wanted = [i for i, t in enumerate(leaves) if t is not None and ctx.needs_input_grad[i]]
        grads_of_first = torch.autograd.grad(
            first, [leaves[i] for i in wanted], [g for _, g in kept], materialize_grads=True
        )
    second = dict(zip(wanted, grads_of_first, strict=True))
    return tuple(second.get(i) for i in range(len(ctx.needs_input_grad)))


_cpu_expert_ffn_backward.register_autograd(_second_backward, setup_context=_setup_second)


def expert_ffn(x: Tensor, rows: RowIndex, gates_R: Tensor, weights: FFNWeights, activation: str) -> Tensor:
    """Compute ``eager.expert_ffn``. The backward keeps ``x`` and (R, F) pre-activations."""
    if isinstance(weights.w_in, QuantizedWeight):
        if _is_seen(x, gates_R, weights.b_in, weights.b_out):
            return grouped.expert_ffn(x, rows, gates_R, weights, activation)
        return _computed(x, rows.row_index_R, rows.offsets_E, gates_R, weights, activation, False)[0]
    plain: tuple[Any, ...] = weights
    w_in, w_out, b_in, b_out, w_gate = plain
    inputs = (x, gates_R, *plain)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    # Without a gradient and nobody to see the op, its start of 10 to 20 us is saved.
    run = _cpu_expert_ffn if keep or x.is_meta or is_watched(*inputs) else _expert_ffn
    index_R, offsets_E = rows.row_index_R, rows.offsets_E
    return run(x, index_R, offsets_E, gates_R, w_in, w_out, b_in, b_out, w_gate, activation, keep)[0]


def _is_seen(*inputs: Tensor | None) -> bool:
    """Return whether a custom op has to be seen: by a compiler, a counter, the meta device, or a gradient."""
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return wants_grad or is_watched(*inputs) or any(t is not None and t.is_meta for t in inputs)


def expert_linear(x_RD: Tensor, w: Weight, offsets_E: Tensor, b: Tensor | None = None) -> Tensor:
    """Compute ``eager.expert_linear``.

    One grouped matmul loops over the experts in C++: with hundreds of experts a few numbers wide a loop in Python costs
    as much as the matmuls. Rows padded to equal counts in one ``bmm`` are E times the work if one expert takes all.
    """
    if isinstance(w, QuantizedWeight):
        if _is_seen(x_RD, b):
            return grouped.expert_linear(x_RD, w, offsets_E, b)
        check_width(x_RD, w.fan_in)
        y_RF, start = x_RD.new_zeros(x_RD.shape[0], w.shape[-1]), 0
        for e, end in enumerate(offsets_E.tolist()):
            if start < end:
                expert_mm(x_RD[start:end], w, e, bias=None if b is None else b[e], out=y_RF[start:end])
            start = end
        return y_RF
    can_group = x_RD.is_meta or grouped.supports(x_RD.device, x_RD.dtype)
    return (grouped if can_group else eager).expert_linear(x_RD, w, offsets_E, b)
