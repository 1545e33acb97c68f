"""Matmuls of stacked weights, with tokens shared by all experts or each expert's own; initialization."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import AdaptedWeight, QuantizedWeight, Weight, linear
from .base import local_tensor


def init_linear_(weight: Tensor, bias: Tensor | None = None) -> None:
    """Start each expert's part of (E, fan_in, F) weights and of their bias as ``nn.Linear`` does, U(-1/sqrt(fan_in),
    1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(weight.shape[1])
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        nn.init.uniform_(bias, -bound, bound)


def floats(w: Any) -> Any:
    """Return a stacked tensor as it is, quantized matrices dequantized and adapted ones merged, for matmuls that take
    all of them."""
    w = local_tensor(w)
    if isinstance(w, AdaptedWeight):
        return w.merged()
    return w.dequantized() if isinstance(w, QuantizedWeight) else w


def first_linear(x_GTD: Tensor, stacked: Weight, b: Tensor | None, counts: tuple[int, ...]) -> Tensor:
    """``x_g w_e + b_e`` of every token and expert, each with its group's input: one matmul if the inputs allow it.

    Args:
        x_GTD: (G, T, D) inputs.
        stacked: (n, D, F); b: (n, F).
        counts: experts of each input, n in all.

    Returns:
        (T, n, F).
    """
    w: Tensor = floats(stacked)
    if len(set(counts)) > 1:
        weights, biases = w.split(counts), [None] * len(counts) if b is None else b.split(counts)
        parts = zip(x_GTD.split(1), weights, biases, counts, strict=True)
        return torch.cat([first_linear(x, w_g, b_g, (c,)) for x, w_g, b_g, c in parts if c], 1)
    (G, _, D), (n, _, F_), count = x_GTD.shape, w.shape, counts[0]
    w_GDF = w.unflatten(0, (G, count)).transpose(1, 2).reshape(G, D, count * F_)
    if G == 1:
        y_TF = linear(x_GTD[0], w_GDF[0].t(), None if b is None else b.reshape(-1))
        return y_TF.unflatten(1, (n, F_))
    y_GTF = torch.bmm(x_GTD, w_GDF) if b is None else torch.baddbmm(b.reshape(G, 1, count * F_), x_GTD, w_GDF)
    return y_GTF.unflatten(2, (count, F_)).transpose(0, 1).flatten(1, 2)


def next_linear(h_TnF: Tensor, stacked: Weight, b: Tensor | None) -> Tensor:
    """``h_e w_e + b_e`` of every token and expert, (T, n, F) to (T, n, F')."""
    w: Tensor = floats(stacked)
    h_nTF = h_TnF.transpose(0, 1)
    y_nTF = torch.bmm(h_nTF, w) if b is None else torch.baddbmm(b.unsqueeze(1), h_nTF, w)
    return y_nTF.transpose(0, 1)


def merged_linear(x_GSD: Tensor, w_GDF: Tensor, b_GF: Tensor | None) -> Tensor:
    """``x_g w_g + b_g`` of each group of tokens, with weights of its own: (G, S, D) to (G, S, F)."""
    return x_GSD @ w_GDF if b_GF is None else x_GSD @ w_GDF + b_GF[:, None]


def weighted_sum(weights_GE: Tensor, w: Tensor | None) -> Tensor | None:
    """Return the weighted sums of the experts' tensors (E, ...), in their own dtype: (G, ...)."""
    w = floats(w)
    return None if w is None else (weights_GE.to(w.dtype) @ w.flatten(1)).unflatten(1, w.shape[1:])


def autocast_together(x: Tensor, *weights: Tensor | None) -> tuple[Any, ...]:
    """Return tokens and this process's part of the weights in the matmuls' dtype: autocast knows no custom ops."""
    weights = tuple(local_tensor(w) for w in weights)
    kind = x.device.type
    is_on = kind != "meta" and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if is_on else None
    if dtype is None or x.dtype == torch.float64:
        wrong = next((w for w in weights if w is not None and w.dtype != x.dtype), None)
        if wrong is not None:
            raise ValueError(f"tokens are {x.dtype} and expert weights {wrong.dtype}: they must agree outside autocast")
        return x, *weights
    return x.to(dtype), *(None if w is None else w.to(dtype) for w in weights)
