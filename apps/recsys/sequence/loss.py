"""Cross-entropy over all items, without all logits in memory at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits at a time: 4 MB in bfloat16, in rows enough for a product.
_CHUNK_ELEMENTS = 2**21


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of a chunk is worked out while its logits are there, so that no logit is kept or computed twice."""

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, weight_VD: Tensor, target_T: Tensor, dtype: torch.dtype) -> Tensor:
        T, V = len(h_TD), len(weight_VD)
        h_dtype, weight_dtype = h_TD.dtype, weight_VD.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        h_TD, weight_VD = h_TD.to(dtype), weight_VD.to(dtype)
        weight_DV = weight_VD.t().contiguous()
        wants_h, wants_weight = ctx.needs_input_grad[:2]
        dh_TD = torch.empty_like(h_TD) if wants_h else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=exact) if wants_weight else None
        total = torch.zeros((), dtype=exact, device=h_TD.device)
        rows = min(max(1, _CHUNK_ELEMENTS // max(V, 1)), max(T, 1))
        # One buffer for all chunks: fresh memory of this size costs more than what is computed in it.
        logits_rV, p_rV = (h_TD.new_empty(rows, V) for _ in range(2))
        for start in range(0, T, rows):
            h_tD, target_t1 = h_TD[start : start + rows], target_T[start : start + rows, None]
            logits_tV, p_tV = logits_rV[: len(h_tD)], p_rV[: len(h_tD)]
            torch.mm(h_tD, weight_DV, out=logits_tV)
            torch.softmax(logits_tV, -1, out=p_tV)  # float32 inside, whatever goes in and out
            total += _negative_log(logits_tV, p_tV, target_t1).sum(dtype=exact)
            if not (wants_h or wants_weight):
                continue
            d_tV = p_tV.scatter_add_(1, target_t1, torch.full_like(target_t1, -1.0, dtype=dtype))
            if dh_TD is not None:
                torch.mm(d_tV, weight_VD, out=dh_TD[start : start + rows])
            if dweight_VD is not None:
                dweight_VD += d_tV.t() @ h_tD
        count = max(T, 1)
        # The mean's denominator comes last: shares of 1 / T would lose digits in bfloat16.
        if dh_TD is not None:
            dh_TD = (dh_TD / count).to(h_dtype)
        if dweight_VD is not None:
            dweight_VD = (dweight_VD / count).to(weight_dtype)
        ctx.grads = dh_TD, dweight_VD
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        scaled = (None if g is None else g * grad.to(g.dtype) for g in ctx.grads)
        return *scaled, None, None  # type: ignore[return-value]


def _negative_log(logits_tV: Tensor, p_tV: Tensor, target_t1: Tensor) -> Tensor:
    """``-log p[target]``, (t, 1): ``logsumexp = max - log p[max]`` holds also where ``p[target]`` is 0 in its dtype."""
    exact = torch.promote_types(logits_tV.dtype, torch.float32)
    top_t1, p_top_t1 = (x.amax(1, keepdim=True).to(exact) for x in (logits_tV, p_tV))
    return top_t1 - p_top_t1.log() - logits_tV.gather(1, target_t1).to(exact)


def linear_cross_entropy(h: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Mean over the rows of ``-log softmax(h W^T)[target]``, in chunks of rows; 0 without rows.

    Under autocast the products are in its dtype and the softmax in float32. One backward, not differentiable twice.

    Args:
        h: (T, D).
        weight: (V, D).
        target: int64 (T,), in ``range(V)``.

    Returns:
        (), float32, or float64 where ``h`` is.
    """
    kind = h.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else torch.promote_types(h.dtype, weight.dtype)
    with torch.autocast(kind, enabled=False):
        return _LinearCrossEntropy.apply(h, weight, target, dtype)
