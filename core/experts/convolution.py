"""Convolution experts: small convolutional networks, each over the patches that it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract import Rows
from ..fields import Count, CountOrZero, OneOf
from ..kernels import ACTIVATIONS, expert_linear
from .base import ExpertConfig, Experts
from .patch_grid import PatchGrid
from .products import autocast_together, init_linear_


class ConvolutionExperts(Experts):
    """E networks of two convolutions, ``conv(act(conv(x)))``, over rows that are patches.

    A row (p * p * D) is a patch, position after position; beyond its edge all is zero. Parameters: ``w_in``
    (E, k * k * D, F) and ``w_out`` (E, k * k * F, D_out), tap after tap, row by row; with bias ``b_in`` (E, F) and
    ``b_out`` (E, D_out). So ``w_in[e].T.unflatten(1, (k, k, D)).permute(0, 3, 1, 2)`` is the weight that ``F.conv2d``
    takes.
    """

    shown = ("patch_size", "kernel_size", "activation")

    def __init__(self, config: Convolution, num_experts: int, dim: int, out_dim: int) -> None:
        super().__init__()
        hidden, taps = config.hidden(dim), config.kernel_size**2
        self.num_experts, self.activation = num_experts, config.activation
        self.patch_size, self.kernel_size = config.patch_size, config.kernel_size
        self.w_in = nn.Parameter(torch.empty(num_experts, taps * dim, hidden))
        self.w_out = nn.Parameter(torch.empty(num_experts, taps * hidden, out_dim))
        self.b_in = nn.Parameter(torch.empty(num_experts, hidden)) if config.bias else None
        self.b_out = nn.Parameter(torch.empty(num_experts, out_dim)) if config.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start each expert as ``nn.Conv2d`` does: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), of k * k taps a channel."""
        for weight, bias in ((self.w_in, self.b_in), (self.w_out, self.b_out)):
            init_linear_(weight, bias)

    def biases(self) -> list[Tensor]:
        return [b for b in (self.b_in, self.b_out) if b is not None]

    def compute_rows(self, rows: Rows) -> Rows:
        weights = (self.w_in, self.w_out, self.b_in, self.b_out)
        x_RC, w_in, w_out, b_in, b_out = autocast_together(rows.x, *weights)
        h_RC = ACTIVATIONS[self.activation](self._convolved(x_RC, w_in, b_in, rows.offsets_E))
        return rows.with_output(self._convolved(h_RC, w_out, b_out, rows.offsets_E))

    def _convolved(self, x_RC: Tensor, w: Tensor, b: Tensor | None, offsets_E: Tensor) -> Tensor:
        """Return patches after one convolution of their experts, (R, p * p * D) to (R, p * p * F).

        All positions of an expert's patches are rows of one matmul, with the k * k positions around each side by side.
        """
        (R, C), area = x_RC.shape, self.patch_size**2
        D = C // area
        # A place after the last position holds the zeros that lie beyond the edge.
        x_RPD = F.pad(x_RC.reshape(R, area, D), (0, 0, 0, 1))
        x_RPK = x_RPD.index_select(1, self._neighbors(x_RC.device))
        x_QK = x_RPK.reshape(R * area, self.kernel_size**2 * D)
        y_QF = expert_linear(x_QK, w, offsets_E * area, b, backend=self.backend)
        return y_QF.reshape(R, area * w.shape[-1])

    def _neighbors(self, device: torch.device) -> Tensor:
        """Return the position under each tap of each position of a patch, int64 (p * p * k * k,); p * p beyond it."""
        p, k = self.patch_size, self.kernel_size
        at_pk = torch.arange(p, device=device)[:, None] + torch.arange(k, device=device) - k // 2
        row, column = at_pk[:, None, :, None], at_pk[None, :, None, :]
        inside = (row >= 0) & (row < p) & (column >= 0) & (column < p)
        return torch.where(inside, row * p + column, p * p).flatten()


@dataclass(frozen=True)
class Convolution(ExpertConfig):
    """A network of two convolutions over a patch of an image, ``conv(act(conv(x)))``, zero beyond the patch's edge. The
    router chooses by patch: with ``ExpertChoice`` each expert takes l of the n patches of an image (pMoE, arXiv
    2306.04073). ``MoEConfig`` builds a ``PatchMoE``, whose tokens are the positions of a grid.

    The router reads a flattened patch, p * p * D. A layer's costs per token are its costs per position.

    Attributes:
        hidden_dim: F, channels between the two convolutions; None: dim.
        patch_size: p, positions along a side of a patch.
        kernel_size: k, positions along a side of both kernels; odd, and at most 2 p - 1.
        activation: "relu", "gelu", "silu" or "gelu_tanh" (GELU's approximation).
        bias: with a bias of both convolutions.
        columns: positions in a row of the grid, if tokens come as a sequence; None: the grid is square.
        prefix_tokens: tokens of a sequence before its first position, such as a class token: no expert takes them.

    Raises:
        ValueError: a value is out of its range, an even kernel, or one with taps that see no position of any patch.

    Example::

        MoEConfig(8, ExpertChoice(capacity_factor=2.0), Convolution(64, patch_size=4)).build(dim=32)
    """

    layer_kind = "patches"
    is_causal = False

    hidden_dim: Count | None = None
    patch_size: Count = 2
    kernel_size: Count = 3
    activation: Annotated[str, OneOf(*ACTIVATIONS)] = "gelu"
    bias: bool = False
    columns: Count | None = None
    prefix_tokens: CountOrZero = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 2 * self.grid.patch_size - 1
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} is even: a kernel has a middle")
        if self.kernel_size > most:
            raise ValueError(
                f"kernel_size={self.kernel_size} exceeds {most}, beyond which a tap sees no position of a patch of "
                f"patch_size={self.patch_size}"
            )

    @property
    def grid(self) -> PatchGrid:
        """The grid that the tokens of a sequence are."""
        return PatchGrid(self.patch_size, self.columns, self.prefix_tokens)

    @property
    def tokens_per_row(self) -> int:
        return self.grid.area

    def rows_per_sequence(self, num_tokens: int) -> int:
        return self.grid.num_patches(num_tokens)

    def layer_arguments(self) -> dict[str, Any]:
        return {"grid": self.grid}

    def hidden(self, dim: int) -> int:
        """Return F for this dim, the default filled in."""
        return dim if self.hidden_dim is None else self.hidden_dim

    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> ConvolutionExperts:
        return ConvolutionExperts(self, num_experts, dim, dim if out_dim is None else out_dim)

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        biases = self.hidden(dim) + (dim if out_dim is None else out_dim) if self.bias else 0
        return self._weights(dim, out_dim) + biases

    def flops_per_row(self, dim: int, out_dim: int | None = None) -> int:
        """Return the forward FLOPs of one expert on one patch, including taps beyond its edge."""
        return 2 * self.grid.area * self._weights(dim, out_dim)

    def _weights(self, dim: int, out_dim: int | None) -> int:
        return self.kernel_size**2 * self.hidden(dim) * (dim + (dim if out_dim is None else out_dim))
