"""Networks that share their weights, each with scales and biases of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract import Rows
from ..fields import Count, Length, OneOf, ShareBelowOne
from ..kernels import ACTIVATIONS, expert_linear, expert_of_rows, linear, outside_autocast
from .base import COMMON, ExpertConfig, Experts, local_tensor
from .products import autocast_together, init_linear_, weighted_sum


def _all(h: Tensor, w: Tensor) -> Tensor:
    return linear(h, w[0].t())


class BatchEnsembleExperts(Experts):
    """E networks of layers ``h_i = dropout(act(((h_{i-1} * r_i) w_i) * s_i + b_i))`` that share the matrices ``w_i``
    (BatchEnsemble, arXiv 2002.06715; TabM, arXiv 2410.24210).

    The first ``r`` starts as random signs, every other scale at 1, and all networks with the same biases: so they
    differ by the signs alone, as in TabM.

    Parameters, with layer i from 0: ``r_i`` (E, in), ``s_i`` and ``b_i`` (E, out), and ``common``, which holds ``w_i``
    (1, in, out).
    """

    starts_alike = True
    shown = ("activation", "dropout")

    def __init__(self, config: BatchEnsemble, num_experts: int, dim: int) -> None:
        super().__init__()
        self.num_experts, self.hidden_dims = num_experts, config.hidden_dims
        self.activation, self.dropout = config.activation, config.dropout
        self.common = nn.ParameterDict()
        for i, (fan_in, width) in enumerate(pairwise((dim, *self.hidden_dims))):
            for name, size in (("r", fan_in), ("s", width), ("b", width)):
                self.register_parameter(f"{name}_{i}", nn.Parameter(torch.empty(num_experts, size)))
            self.common[f"w_{i}"] = nn.Parameter(torch.empty(1, fan_in, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for i in range(len(self.hidden_dims)):
                r, s, b = (local_tensor(getattr(self, f"{name}_{i}")) for name in "rsb")
                init_linear_(self.common[f"w_{i}"], b[:1])
                b.copy_(b[:1].clone().expand_as(b))
                s.fill_(1.0)
                r.copy_(torch.randint_like(r, 0, 2).mul_(2).sub_(1)) if i == 0 else r.fill_(1.0)

    def no_weight_decay(self) -> set[str]:
        """Return the scales, which do not decay: they start at 1."""
        return {name for name, _ in self.named_parameters(recurse=False) if not name.startswith("b")}

    def biases(self) -> list[Tensor]:
        return [getattr(self, f"b_{i}") for i in range(len(self.hidden_dims))]

    def weights_of(self, e: int) -> dict[str, Tensor]:
        """Return the scales and biases of expert ``e`` as views, and the matrices that all share."""
        if not 0 <= e < self.num_local_experts:
            raise ValueError(f"expert {e} is not in range(num_local_experts={self.num_local_experts})")
        own = {name: local_tensor(p)[e] for name, p in self.named_parameters(recurse=False)}
        return own | {f"{COMMON}.{name}": p[0] for name, p in self.common.items()}

    def init_each(self, fn: Callable[[Tensor], Any]) -> None:
        """Start the shared matrices by ``fn``, the biases at zero and the scales as ever."""
        self.reset_parameters()
        with torch.no_grad():
            for w in self.common.values():
                fn(w[0])
            for bias in self.biases():
                local_tensor(bias).zero_()

    def compute_rows(self, rows: Rows) -> Rows:
        expert_R = expert_of_rows(rows.x, rows.offsets_E)
        is_none_R = expert_R == rows.offsets_E.shape[0]
        index_R = expert_R.clamp_max(rows.offsets_E.shape[0] - 1)
        x_RD = rows.x.masked_fill(is_none_R[:, None], 0)  # padding may be NaN, which would reach the scales' gradients
        matmul = partial(expert_linear, offsets_E=rows.offsets_E[-1:], backend=self.backend)
        h_RF = self._layers(x_RD, lambda scale_EF: scale_EF.index_select(0, index_R), matmul)
        return rows.with_output(h_RF.masked_fill(is_none_R[:, None], 0))

    def compute_each(self, x: Tensor, counts: tuple[int, ...] | None = None, real_T: Tensor | None = None) -> Tensor:
        counts = (self.num_experts,) if counts is None else counts
        x_GTD, n = x if x.ndim == 3 else x.unsqueeze(0), sum(counts)
        if len(counts) == 1:
            x_TnD = x_GTD[0][:, None]
        else:
            x_TnD = torch.cat([own[:, None].expand(-1, c, -1) for own, c in zip(x_GTD, counts, strict=True)], 1)
        return self._layers(x_TnD, lambda scale_EF: scale_EF[:n])

    def compute_merged(self, x: Tensor, weights: Tensor) -> Tensor:
        with outside_autocast(x.device):
            merged = {name: weighted_sum(weights, p) for name, p in self.named_parameters(recurse=False)}
        return self._layers(x, lambda scale_GF: scale_GF[:, None], own=merged)

    def _layers(
        self, h: Tensor, of_rows: Callable[[Tensor], Tensor], matmul: Callable[..., Tensor] = _all, own: Any = None
    ) -> Tensor:
        """Return the last layer's output of (..., D).

        Args:
            h: the input.
            of_rows: takes stacked scales to scales that multiply the input.
            matmul: multiplies the input by the shared matrix (1, in, out).
            own: scales and biases by name; None: the experts'.
        """
        own = dict(self.named_parameters(recurse=False)) if own is None else own
        for i in range(len(self.hidden_dims)):
            parts = (self.common[f"w_{i}"], *(own[f"{name}_{i}"] for name in "rsb"))
            h, w, r, s, b = autocast_together(h, *parts)
            h = matmul(h * of_rows(r), w) * of_rows(s) + of_rows(b)
            h = F.dropout(ACTIVATIONS[self.activation](h), self.dropout, self.training)
        return h


@dataclass(frozen=True)
class BatchEnsemble(ExpertConfig):
    """Members that share weights: ``h_i = dropout(act(((h_{i-1} * r_i) w_i) * s_i + b_i))`` with matrices w of all and
    scales and biases of each (BatchEnsemble, arXiv 2002.06715).

    With all tokens through all experts, and their predictions averaged, it is TabM (arXiv 2410.24210): several networks
    for little more memory than one. Under a router the experts are as cheap in memory. The output is
    ``hidden_dims[-1]`` wide, whatever the input.

    Attributes:
        hidden_dims: widths of the layers.
        activation: "relu", "gelu", "silu" (Swish) or "gelu_tanh" (GELU's approximation).
        dropout: probability that a feature of a layer is zero in training.

    Raises:
        ValueError: a value is out of its range.
    """

    hidden_dims: Annotated[tuple[Count, ...], Length(1)] = (16,)
    activation: Annotated[str, OneOf(*ACTIVATIONS)] = "relu"
    dropout: ShareBelowOne = 0.0

    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> BatchEnsembleExperts:
        self._check_width(out_dim)
        return BatchEnsembleExperts(self, num_experts, dim)

    def out_dim(self, dim: int) -> int:
        return self.hidden_dims[-1]

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        self._check_width(out_dim)
        return sum(fan_in + 2 * width for fan_in, width in pairwise((dim, *self.hidden_dims)))

    def layer_params(self, dim: int) -> int:
        return sum(fan_in * width for fan_in, width in pairwise((dim, *self.hidden_dims)))

    def flops_per_row(self, dim: int, out_dim: int | None = None) -> int:
        self._check_width(out_dim)
        return 2 * self.layer_params(dim)

    def _check_width(self, out_dim: int | None) -> None:
        if out_dim is not None and out_dim != self.hidden_dims[-1]:
            raise ValueError(f"out_dim={out_dim} is not {self.hidden_dims[-1]}, the last of hidden_dims")
