"""Experts of several kinds in one layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import Rows
from ..fields import Count
from ..kernels import RowIndex, combine
from .base import ExpertConfig, Experts


class MixedExperts(Experts):
    """Groups of experts of one kind each: the first ``counts[0]`` experts come from ``parts[0]``, and so on.

    Rows are sorted by expert, so a group's rows lie together. On a CPU they are a slice. Elsewhere, and in compiled
    code, the host does not know where they start: the index is rolled until they come first, and the group's kernels
    skip the rest.
    """

    takes_index = True

    def __init__(self, parts: list[Experts]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.num_experts = sum(part.num_experts for part in parts)
        self.bounds = tuple(accumulate((part.num_experts for part in parts), initial=0))

    def weights_of(self, e: int) -> dict[str, Tensor]:
        if not 0 <= e < self.num_experts:
            raise ValueError(f"expert {e} is not in range(num_local_experts={self.num_experts})")
        i = next(i for i, end in enumerate(self.bounds[1:]) if e < end)
        return self._kinds()[i].weights_of(e - self.bounds[i])

    def init_each(self, fn: Callable[[Tensor], Any]) -> None:
        for part in self._kinds():
            part.init_each(fn)

    def _kinds(self) -> list[Experts]:
        return [part for part in self.parts if isinstance(part, Experts)]

    def compute_rows(self, rows: Rows) -> Rows:
        """Return the rows computed: (T, D_out) if they came as an index, else (R, D_out) and weighted."""
        y: Tensor | None = None
        for part, (first, end) in zip(self._kinds(), pairwise(self.bounds), strict=True):
            own, place_R = _rows_of(rows, first, end)
            out = part(own)
            if rows.gathered:
                y_RD = out.x if out.weighted else (out.x * out.gates_R[:, None]).to(out.x.dtype)
                live_R = torch.arange(y_RD.shape[0], device=y_RD.device) < own.offsets_E[-1]
                y_RD = torch.where(live_R[:, None], y_RD, 0)
                y_part = y_RD.new_zeros(rows.x.shape[0], y_RD.shape[1]).index_copy(0, place_R, y_RD)
            elif out.combined:
                y_part = out.x
            else:
                index = RowIndex(own.row_index_R, own.offsets_E)
                gates_R = None if out.weighted else own.gates_R
                y_part = combine(out.x, index, gates_R, rows.num_tokens, backend=self.backend).to(out.x.dtype)
            y = y_part if y is None else y + y_part
        assert y is not None
        return rows.with_output(y, weighted=True, combined=not rows.gathered)


def _rows_of(rows: Rows, first: int, end: int) -> tuple[Rows, Tensor]:
    """Return the rows of the experts from ``first`` to before ``end``, and the place of each among all rows.

    Rows past the last offset of the result belong to other experts.
    """
    start = rows.offsets_E[first - 1] if first else rows.offsets_E.new_zeros(())
    R, device = rows.gates_R.shape[0], rows.x.device
    if device.type == "cpu" and not torch.compiler.is_compiling():
        place_R = torch.arange(int(start), int(rows.offsets_E[end - 1]), device=device)
    else:
        place_R = (torch.arange(R, device=device) + start) % max(R, 1)
    own = replace(
        rows,
        x=rows.x.index_select(0, place_R) if rows.gathered else rows.x,
        row_index_R=rows.row_index_R.index_select(0, place_R),
        offsets_E=rows.offsets_E[first:end] - start,
        gates_R=rows.gates_R.index_select(0, place_R),
        plan=None,
    )
    return own, place_R


@dataclass(frozen=True)
class Mixed(ExpertConfig):
    """Experts of several kinds in one layer, such as FFNs of two widths beside ``Zero``, ``Identity`` and ``Constant``
    (MoE++, arXiv 2410.07348). The router chooses among all of them.

    A layer's costs are counted at balance, when each expert takes as many tokens as any other.

    Attributes:
        experts: the kinds.
        counts: how many experts there are of each kind; their sum is the layer's ``num_experts``.

    Raises:
        ValueError: no kind, another number of counts than of kinds, or a kind that is itself mixed.

    Example::

        MoEConfig(8, TokenChoice(2), Mixed((FFN(256), Zero(), Identity()), (6, 1, 1)))
    """

    experts: tuple[ExpertConfig, ...]
    counts: tuple[Count, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.experts or len(self.experts) != len(self.counts):
            raise ValueError(f"counts={self.counts} has {len(self.counts)} numbers for {len(self.experts)} experts")
        for expert in self.experts:
            if isinstance(expert, Mixed) or expert.layer_kind != "rows":
                raise ValueError(f"experts has {type(expert).__name__}, which cannot be one of several kinds")

    def check(self, num_experts: int) -> None:
        if sum(self.counts) != num_experts:
            raise ValueError(f"counts={self.counts} sum to {sum(self.counts)}, not to num_experts={num_experts}")

    def of_each(self, num_experts: int) -> tuple[ExpertConfig, ...]:
        pairs = zip(self.experts, self.counts, strict=True)
        return tuple(expert for expert, count in pairs for _ in range(count))

    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> MixedExperts:
        self.check(num_experts)
        out_dim = self.out_dim(dim) if out_dim is None else out_dim
        pairs = zip(self.experts, self.counts, strict=True)
        return MixedExperts([expert.build(count, dim, out_dim) for expert, count in pairs])

    def out_dim(self, dim: int) -> int:
        widths = {expert.out_dim(dim) for expert in self.experts}
        if len(widths) > 1:
            raise ValueError(f"experts put out widths {', '.join(map(str, sorted(widths)))}: they must agree")
        return widths.pop()

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        """Return the mean of all experts, rounded."""
        return self._mean([expert.num_params(dim, out_dim) for expert in self.experts])

    def flops_per_row(self, dim: int, out_dim: int | None = None) -> int:
        """Return the mean of all experts, rounded."""
        return self._mean([expert.flops_per_row(dim, out_dim) for expert in self.experts])

    def _mean(self, costs: list[int]) -> int:
        return round(sum(c * n for c, n in zip(costs, self.counts, strict=True)) / sum(self.counts))
