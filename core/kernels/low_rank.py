"""``AdaptedWeight``: matrices of experts with low-rank updates, which are multiplied apart and never merged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .quantized import QuantizedWeight, Weight


@dataclass(frozen=True)
class AdaptedWeight:
    """The matrices ``base[e] + sum of scale * a[e] b[e]`` of E experts; ``w[e]`` is one of them, merged.

    Attributes:
        base: (E, K, N), plain or quantized.
        updates: ``a`` (E, K, r), ``b`` (E, r, N) and ``scale`` of each adapter.
    """

    base: Weight
    updates: tuple[tuple[Tensor, Tensor, float], ...]

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.base.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def to(self, dtype: torch.dtype) -> AdaptedWeight:
        """Return the same numbers, to be computed with in another dtype."""
        return AdaptedWeight(self.base.to(dtype), tuple((a.to(dtype), b.to(dtype), s) for a, b, s in self.updates))

    def __getitem__(self, experts: int | slice) -> Any:
        of_experts = replace(
            self, base=self.base[experts], updates=tuple((a[experts], b[experts], s) for a, b, s in self.updates)
        )
        return of_experts if isinstance(experts, slice) else of_experts.merged()

    def merged(self) -> Tensor:
        """Return the merged matrices."""
        w = self.base.dequantized() if isinstance(self.base, QuantizedWeight) else self.base
        for a, b, scale in self.updates:
            w = w + scale * (a @ b)
        return w


class ThroughQuantized(torch.autograd.Function):
    """A matmul with frozen quantized matrices, which passes the gradient on to the rows."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, w: QuantizedWeight, offsets_E: Tensor, multiply: Any) -> Tensor:
        ctx.w, ctx.multiply = w, multiply
        ctx.save_for_backward(offsets_E)
        y_RF: Tensor = multiply(x_RD, w, offsets_E)
        return y_RF

    @staticmethod
    def backward(ctx: Any, dy_RF: Tensor) -> tuple[Tensor | None, ...]:
        (offsets_E,) = ctx.saved_tensors
        w, dy_RF = ctx.w.to(dy_RF.dtype), dy_RF.contiguous()
        if dy_RF.device.type != "cpu":  # the host does not wait for the counts
            return ctx.multiply(dy_RF, w.dequantized().transpose(1, 2), offsets_E), None, None, None
        dx_RD, start = dy_RF.new_zeros(dy_RF.shape[0], w.fan_in), 0
        for e, end in enumerate(offsets_E.tolist()):
            if start < end:  # one matrix at a time in floating point
                torch.mm(dy_RF[start:end], w[e].t(), out=dx_RD[start:end])
            start = end
        return dx_RD, None, None, None
