"""Experts of any number of layers, each with its activation: the small networks of multi-task models."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract import Rows
from ..fields import Count, Length, OneOf, ShareBelowOne
from ..kernels import ACTIVATIONS, expert_linear, expert_of_rows, is_full, outside_autocast
from .base import ExpertConfig, Experts, local_tensor
from .products import autocast_together, first_linear, init_linear_, next_linear, weighted_sum

EPS = 1e-5
MOMENTUM = 0.1


class MLPExperts(Experts):
    """E networks of layers ``h_i = dropout(act(norm(h_{i-1} w_i + b_i)))``; the last one's ``h`` is the output.

    With ``norm="batch"`` each expert has statistics of its own, over the tokens that it computes (the expert
    normalization of HoME, arXiv 2408.05430, there with ``activation="silu"``). They are taken as ``nn.BatchNorm1d``
    takes them: the batch's in training, running ones in evaluation, with momentum 0.1. An expert with fewer than two
    tokens in a training batch uses the running ones, which then stay: no variance is known.

    Parameters, with layer i from 0: ``w_i`` (E, in, out), ``b_i`` (E, out), which batch normalization makes useless and
    leaves out; ``norm_weight_i`` and ``norm_bias_i`` (E, out). Buffers: ``running_mean_i``, ``running_var_i`` (E, out).
    """

    shown = ("activation", "norm", "dropout")

    def __init__(self, config: MLP, num_experts: int, dim: int) -> None:
        super().__init__()
        self.num_experts, self.hidden_dims, self.activation = num_experts, config.hidden_dims, config.activation
        self.norm, self.dropout = config.norm, config.dropout
        for i, (fan_in, width) in enumerate(pairwise((dim, *self.hidden_dims))):
            self.register_parameter(f"w_{i}", nn.Parameter(torch.empty(num_experts, fan_in, width)))
            for name, used in (("b", self.norm != "batch"), ("norm_weight", self.norm), ("norm_bias", self.norm)):
                parameter = nn.Parameter(torch.empty(num_experts, width)) if used else None
                self.register_parameter(f"{name}_{i}", parameter)
            for name in ("running_mean", "running_var"):
                self.register_buffer(f"{name}_{i}", torch.empty(num_experts, width) if self.norm == "batch" else None)
        MLPExperts.reset_parameters(self)  # a subclass's own parameters are not there yet

    def reset_parameters(self) -> None:
        """Start each layer as ``nn.Linear`` does, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), and norms as torch's do."""
        for i in range(len(self.hidden_dims)):
            init_linear_(getattr(self, f"w_{i}"), getattr(self, f"b_{i}"))
            for name, start in (("norm_weight", 1.0), ("norm_bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                tensor = getattr(self, f"{name}_{i}")
                if tensor is not None:
                    nn.init.constant_(tensor, start)

    def biases(self) -> list[Tensor]:
        return [] if self.norm == "batch" else [self._get("b", i) for i in range(len(self.hidden_dims))]

    def _get(self, name: str, i: int) -> Any:
        """Return this process's part of a tensor of layer ``i``; None if there is none."""
        tensor = getattr(self, f"{name}_{i}")
        return None if tensor is None else local_tensor(tensor)

    def _linear(self, x: Tensor, i: int, n: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the layer's input and the first ``n`` experts' weights, in the dtype of the matmul."""
        b = self._get("b", i)
        x, w, b = autocast_together(x, self._get("w", i)[:n], None if b is None else b[:n])
        return x, w, b

    def compute_rows(self, rows: Rows) -> Rows:
        h_RF = rows.x
        expert_R = expert_of_rows(h_RF, rows.offsets_E)
        for i in range(len(self.hidden_dims)):
            h_RF, w, b = self._linear(h_RF, i)
            h_RF = expert_linear(h_RF, w, rows.offsets_E, b, backend=self.backend)
            h_RF = self._norm_rows(h_RF, i, expert_R)
            h_RF = F.dropout(ACTIVATIONS[self.activation](h_RF), self.dropout, self.training)
        if not is_full(h_RF, rows.offsets_E):
            h_RF = h_RF.masked_fill((expert_R == rows.offsets_E.shape[0])[:, None], 0)
        return rows.with_output(h_RF)

    def compute_each(self, x: Tensor, counts: tuple[int, ...] | None = None, real_T: Tensor | None = None) -> Tensor:
        counts = (self.num_experts,) if counts is None else counts
        n, h = sum(counts), x if x.ndim == 3 else x.unsqueeze(0)
        if self.backend == "eager":
            return super().compute_each(h, counts, real_T)
        for i in range(len(self.hidden_dims)):
            h, w, b = self._linear(h, i, n)
            h = first_linear(h, w, b, counts) if i == 0 else next_linear(h, w, b)
            h = self._norm_each(h, i, real_T)
            h = F.dropout(ACTIVATIONS[self.activation](h), self.dropout, self.training)
        return h

    def compute_merged(self, x: Tensor, weights: Tensor) -> Tensor:
        if self.norm == "batch":
            raise NotImplementedError("experts with norm='batch' cannot be merged: a mixture has no statistics")
        h = x
        for i in range(len(self.hidden_dims)):
            # As in ``FFNExperts``: the sum in the parameters' own dtype.
            with outside_autocast(x.device):
                names = ("w", "b", "norm_weight", "norm_bias")
                w, b, scale, shift = (weighted_sum(weights, self._get(name, i)) for name in names)
            h, w, b = autocast_together(h, w, b)
            h = torch.baddbmm(b.unsqueeze(1), h, w)
            if scale is not None and shift is not None:
                h = _layer_norm(h, scale.unsqueeze(1), shift.unsqueeze(1))
            h = F.dropout(ACTIVATIONS[self.activation](h), self.dropout, self.training)
        return h

    def _norm_each(self, h_TnF: Tensor, i: int, real_T: Tensor | None) -> Tensor:
        """Apply the norm of layer ``i`` to the first n experts' outputs for the same T tokens."""
        if self.norm is None:
            return h_TnF
        T, n, width = h_TnF.shape
        weight, bias = self._get("norm_weight", i)[:n], self._get("norm_bias", i)[:n]
        if self.norm == "layer":
            return _layer_norm(h_TnF, weight, bias)
        running = self._get("running_mean", i)[:n], self._get("running_var", i)[:n]
        if self.training and real_T is not None:
            x_TnF = _wide(h_TnF).masked_fill(~real_T[:, None, None], 0.0)
            count = real_T.sum().to(x_TnF.dtype)
            mean = x_TnF.sum(0) / count.clamp_min(1)
            centered = (x_TnF - mean).masked_fill(~real_T[:, None, None], 0.0)
            used = _statistics(running, count, mean, centered.square().sum(0))
            return _scaled(_wide(h_TnF), *used, weight, bias).to(h_TnF.dtype)
        # One channel for each expert and feature is what ``nn.BatchNorm1d`` computes.
        moves = self.training and T >= 2
        # Copies: autograd saves its arguments, and a second call in the same graph moves the buffers.
        mean, var = (r.flatten().clone() if self.training else r.flatten() for r in running)
        y_TC = F.batch_norm(
            h_TnF.reshape(T, n * width), mean, var, weight.flatten(), bias.flatten(), moves, MOMENTUM, EPS
        )
        if moves:
            for kept, new in zip(running, (mean, var), strict=True):
                kept.copy_(new.view(n, width))
        return y_TC.view(T, n, width)

    def _norm_rows(self, h_RF: Tensor, i: int, expert_R: Tensor) -> Tensor:
        """Apply the norm of layer ``i`` to rows, each by its expert. Rows past the last offset may hold anything."""
        if self.norm is None:
            return h_RF
        weight, bias = self._get("norm_weight", i), self._get("norm_bias", i)
        if self.norm == "layer":
            index_R = expert_R.clamp_max(weight.shape[0] - 1)
            return _layer_norm(h_RF, weight.index_select(0, index_R), bias.index_select(0, index_R))
        running = self._get("running_mean", i), self._get("running_var", i)
        return batch_norm_rows(h_RF, expert_R, running, weight, bias, self.training)


def batch_norm_rows(
    h_RF: Tensor, expert_R: Tensor, running: tuple[Tensor, Tensor], weight_EF: Tensor, bias_EF: Tensor, training: bool
) -> Tensor:
    """Return rows normalized over the rows of their expert, as ``MLPExperts`` with ``norm="batch"`` says.

    Args:
        h_RF: (R, F) rows.
        expert_R: int64 (R,), the expert of each row; E for a row of none, whose output may be anything.
        running: mean and variance (E, F) of evaluation; training moves them.
        weight_EF, bias_EF: (E, F), scale and shift of each expert.
        training: whether the statistics are the batch's.
    """
    E = weight_EF.shape[0]
    index_R = expert_R.clamp_max(E - 1)
    x_RF, used = _wide(h_RF), running
    if training:

        def total(value_RF: Tensor) -> Tensor:
            return value_RF.new_zeros(E + 1, value_RF.shape[1]).index_add(0, expert_R, value_RF)[:E]

        count_E1 = total(x_RF.new_ones(x_RF.shape[0], 1))
        mean_EF = total(x_RF) / count_E1.clamp_min(1)
        squares_EF = total((x_RF - mean_EF.index_select(0, index_R)).square())
        used = _statistics(running, count_E1, mean_EF, squares_EF)
    mean, var, weight, bias = (t.index_select(0, index_R) for t in (*used, weight_EF, bias_EF))
    return _scaled(x_RF, mean, var, weight, bias).to(h_RF.dtype)


def _statistics(running: tuple[Tensor, Tensor], count: Tensor, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of a training batch of two tokens or more, and update the running ones."""
    enough = count >= 2
    with torch.no_grad():
        # The running variance is the unbiased one, as in ``nn.BatchNorm1d``.
        for kept, new in zip(running, (mean, squares / (count - 1).clamp_min(1)), strict=True):
            kept.copy_(torch.where(enough, kept + MOMENTUM * (new - kept), kept))
    batch = mean, squares / count.clamp_min(1)
    before = (r.to(mean.dtype) for r in running)
    return tuple(torch.where(enough, b, r) for b, r in zip(batch, before, strict=True))  # type: ignore[return-value]


def _wide(h: Tensor) -> Tensor:
    """Return ``h`` in float32 at least, for sums over a batch."""
    return h if h.dtype == torch.float64 else h.float()


def _scaled(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x - mean) * (var + EPS).rsqrt() * weight + bias


def _layer_norm(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalize over the features, with weights that differ by expert or row."""
    return (F.layer_norm(_wide(h), h.shape[-1:], eps=EPS) * weight + bias).to(h.dtype)


@dataclass(frozen=True)
class MLP(ExpertConfig):
    """Layers ``h_i = dropout(act(norm(h_{i-1} w_i + b_i)))``, the last one too: the expert of MMoE and PLE.

    The output is ``hidden_dims[-1]`` wide, whatever the input. HoME's experts (arXiv 2408.05430) are
    ``MLP(activation="silu", norm="batch")``: outputs of one distribution, none of which is zero for most inputs.

    Attributes:
        hidden_dims: widths of the layers.
        activation: "relu", "gelu", "silu" (Swish) or "gelu_tanh" (GELU's approximation).
        norm: None; "batch": over the tokens that an expert computes, each expert by itself; "layer": over the features.
        dropout: probability that a feature of a layer is zero in training.

    Raises:
        ValueError: a value is out of its range.
    """

    hidden_dims: Annotated[tuple[Count, ...], Length(1)] = (16,)
    activation: Annotated[str, OneOf(*ACTIVATIONS)] = "relu"
    norm: Annotated[str, OneOf("batch", "layer")] | None = None
    dropout: ShareBelowOne = 0.0

    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> MLPExperts:
        self._check_width(out_dim)
        return MLPExperts(self, num_experts, dim)

    def out_dim(self, dim: int) -> int:
        return self.hidden_dims[-1]

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        self._check_width(out_dim)
        vectors = {None: 1, "batch": 2, "layer": 3}[self.norm]
        return sum((fan_in + vectors) * width for fan_in, width in pairwise((dim, *self.hidden_dims)))

    def flops_per_row(self, dim: int, out_dim: int | None = None) -> int:
        self._check_width(out_dim)
        return sum(2 * fan_in * width for fan_in, width in pairwise((dim, *self.hidden_dims)))

    def _check_width(self, out_dim: int | None) -> None:
        if out_dim is not None and out_dim != self.hidden_dims[-1]:
            raise ValueError(f"out_dim={out_dim} is not {self.hidden_dims[-1]}, the last of hidden_dims")
