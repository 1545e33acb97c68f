"""``PatchMoE``: a layer whose experts take patches of an image, which the router chooses among as wholes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..contract import RoutingContext
from ..contract.checks import check_tensor
from ..experts.patch_grid import PatchGrid
from .base import check_valid
from .moe import MoE


class PatchMoE(MoE):
    """Mixture of convolution experts over patches (pMoE, arXiv 2306.04073).

        y_j = sum over the experts of patch j of g_e(j) f_e(x_j)

    The grid of positions is cut into n patches x_j of p x p positions. The router decides once for all positions of a
    patch, by the flattened patch (p * p * D); its routing, and so the tape, counts patches. A position that no expert
    computes comes out zero, and so does a token of the prefix. ``MoEConfig`` builds the layer from ``Convolution``.

    Args:
        router: a router of rows of width p * p * D.
        experts, balance, dispatcher, expert_output_masking, bias_dim, pairs_per_token: as in ``MoE``.
        shared_experts, shared_gate: None.
        dim: D, width of a position.
        grid: layout of the positions in a sequence, and their patches.
    """

    dim: int

    def __init__(self, *args: Any, dim: int, grid: PatchGrid, **options: Any) -> None:
        super().__init__(*args, dim=dim, **options)
        self.grid = grid

    @property
    def row_dim(self) -> int:
        return self.grid.area * self.dim

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        """Run the layer.

        Args:
            x: tokens (B, S, D), or one sequence of them (S, D): the prefix, then the positions row by row. Or a map (B,
                D, h, w), channels first, which has no prefix and may be of any size that p divides.
            context: routing context of the tokens; its (B, S) fields have S = h * w for a map. A patch is real if one
                of its positions is, and has the ids of its first real position. Padding within it is zero to the
                convolutions, and comes out zero.

        Returns:
            (B, S, D_out), (S, D_out) or (B, D_out, h, w).

        Raises:
            ValueError: ``x`` has another number of dimensions or another width, its positions make no grid of whole
                patches, or a field of the context has another shape.
        """
        is_map = x.ndim == 4
        x_BSD, (height, width) = self._of_map(x) if is_map else self._of_tokens(x)
        prefix = 0 if is_map else self.grid.prefix_tokens
        valid_BS, own = None, None
        if context is not None:
            own = self._context_of_patches(context, x_BSD, prefix, height, width)
            valid_BS = context.valid_BS
        if valid_BS is not None:
            # Padding may hold NaN; and it is zero to the convolutions, as what lies beyond the edge is.
            x_BSD = x_BSD.masked_fill(~valid_BS[..., None], 0.0)
        x_BnC = self._cut(x_BSD[:, prefix:], height, width)
        routing = self.router(x_BnC, own)
        self.record_pass(routing, own)
        y_BhwD = self.grid.join(self._compute(x_BnC, routing, own), height, width)
        y_BSD = F.pad(y_BhwD.flatten(1, 2), (0, 0, prefix, 0))
        if valid_BS is not None:
            y_BSD = y_BSD.masked_fill(~valid_BS[..., None], 0.0)
        if self.output_bias is not None:
            y_BSD = y_BSD + self.output_bias.to(y_BSD.dtype)
        if is_map:
            return y_BSD.transpose(1, 2).unflatten(2, (height, width))
        return y_BSD if x.ndim == 3 else y_BSD.squeeze(0)

    def _of_map(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the positions of a map as tokens (B, h * w, D), and the size of the grid."""
        (_, channels, height, width) = x.shape
        if channels != self.dim:
            raise ValueError(f"x is a map of {channels} channels, the layer is for dim={self.dim}: (B, D, h, w)")
        self.grid.check_size(height, width)
        return x.flatten(2).transpose(1, 2), (height, width)

    def _of_tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens as (B, S, D), and the size of the grid."""
        if x.ndim not in (2, 3):
            raise ValueError(f"x has shape {tuple(x.shape)}: patches are of tokens (B, S, D) or a map (B, D, h, w)")
        self._check_width(x)
        return x if x.ndim == 3 else x.unsqueeze(0), self.grid.size(x.shape[-2])

    def _cut(self, x_BSD: Tensor, height: int, width: int) -> Tensor:
        return self.grid.cut(x_BSD.unflatten(1, (height, width)))

    def _context_of_patches(
        self, context: RoutingContext, x_BSD: Tensor, prefix: int, height: int, width: int
    ) -> RoutingContext:
        """Return the context with a value for each patch in its fields of tokens; the other fields stay."""
        values = {f.name: getattr(context, f.name) for f in fields(context)}
        of_tokens = {name: value for name, value in values.items() if value is not None and name.endswith("_BS")}
        if context.valid_BS is not None:
            check_valid(context.valid_BS, (x_BSD.shape[:2],), "tokens")
        for name, value in of_tokens.items():
            check_tensor(f"context.{name}", value)
            if value.shape != x_BSD.shape[:2]:
                shapes = f"{tuple(value.shape)}, the tokens {tuple(x_BSD.shape[:2])}"
                raise ValueError(f"context.{name} has shape {shapes}")
        cut = {name: self._cut(value[:, prefix:, None], height, width) for name, value in of_tokens.items()}
        real_BnP = cut.pop("valid_BS", None)
        if real_BnP is None:
            return RoutingContext(**values | {name: value[..., 0] for name, value in cut.items()})
        first_Bn1 = real_BnP.float().argmax(-1, keepdim=True)
        ids = {name: value.gather(-1, first_Bn1).squeeze(-1) for name, value in cut.items()}
        return RoutingContext(**values | ids | {"valid_BS": real_BnP.any(-1)})
