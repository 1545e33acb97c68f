"""``Rows``, which go between dispatcher and experts: an index into the tokens, sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .groups import TokenGroups
from .routing import RoutingContext


@dataclass(frozen=True)
class RowPlan:
    """The local dispatcher's way back from rows to pairs.

    Attributes:
        order_R: int64 (R,), the pair each row came from.
        inverse_N: int64 (N,), the row of each pair.
        top_k: as in ``Routing``.
    """

    order_R: Tensor
    inverse_N: Tensor
    top_k: int | None


@dataclass(frozen=True)
class SlotPlan:
    """The slot dispatcher's way back from slots to tokens: ``combine_GSEP`` and ``across`` of ``SlotRouting``."""

    combine_GSEP: Tensor
    across: TokenGroups | None = None


@dataclass(frozen=True)
class Rows:
    """The experts' input and output: an index into the tokens, not necessarily a copy of them.

    Attributes:
        x: (T, D) tokens; (R, D) rows once ``gathered``; (T, D_out) once ``combined``.
        row_index_R: int64 (R,), the token of each row, rows sorted by expert.
        offsets_E: int32 (E,), inclusive cumulative count of rows; rows past the last one are not computed.
        gates_R: float32 (R,), combine weight of each row.
        num_tokens: T.
        plan: notes of the dispatcher for itself.
        gathered, weighted, combined: whether that step is done already.
        context: the layer's context, for experts that read it (``Experts.reads_context``).
    """

    x: Tensor
    row_index_R: Tensor
    offsets_E: Tensor
    gates_R: Tensor
    num_tokens: int
    plan: Any = None
    gathered: bool = False
    weighted: bool = False
    combined: bool = False
    context: RoutingContext | None = None

    def of_context(self, name: str) -> Tensor:
        """Return a field of the context for the token of each row, (R, ...).

        Raises:
            ValueError: the layer got no such field.
        """
        value: Tensor | None = None if self.context is None else getattr(self.context, name)
        if value is None:
            raise ValueError(f"the experts need context.{name}, which is None")
        if name.endswith("BS"):
            return value.flatten().index_select(0, self.row_index_R)
        tokens_per_sequence = self.num_tokens // max(value.shape[0], 1)
        return value.index_select(0, self.row_index_R // max(tokens_per_sequence, 1))

    def materialize(self) -> Tensor:
        """Return the rows themselves, (R, D), for simple experts and a user's own."""
        return self.x if self.gathered else self.x.index_select(0, self.row_index_R)

    def materialized(self) -> Rows:
        """Return these rows with ``x`` (R, D): a copy of the token of each row."""
        return self if self.gathered else replace(self, x=self.materialize(), gathered=True)

    def sampled(self, count: int) -> tuple[Rows, Tensor]:
        """Return at most ``count`` rows, evenly spaced in the order of the experts, with gates of 1, and bool (count,),
        False for copies of the row before and for rows that are not computed.

        Each expert has its share of them, without random numbers.
        """
        R = self.row_index_R.shape[0]
        live = self.offsets_E[-1].to(torch.int64)
        place_S = torch.arange(min(count, R), device=self.x.device)
        row_S = place_S * live // max(min(count, R), 1)
        kept_S = (row_S < live) & (row_S != torch.cat((row_S.new_full((1,), -1), row_S))[:-1])
        token_S = self.row_index_R.index_select(0, row_S)
        x_SD = self.x.index_select(0, row_S if self.gathered else token_S)
        offsets_E = torch.searchsorted(row_S, self.offsets_E.to(torch.int64)).to(torch.int32)
        gates_S = torch.ones_like(self.gates_R[: row_S.shape[0]])
        sample = replace(
            self, x=x_SD, row_index_R=token_S, offsets_E=offsets_E, gates_R=gates_S, plan=None, gathered=True
        )
        return sample, kept_S

    def weighted_input(self) -> Rows:
        """Return the rows times their gates, with gates of 1 from here on: ``f(g x)`` instead of ``g f(x)``."""
        x_RD = (self.materialize() * self.gates_R[:, None]).to(self.x.dtype)
        return replace(self, x=x_RD, gates_R=torch.ones_like(self.gates_R), gathered=True)

    def with_output(self, y: Tensor, *, weighted: bool = False, combined: bool = False) -> Rows:
        """Return the rows after the experts: ``y`` is (R, D_out), or (T, D_out) when ``combined``."""
        return replace(self, x=y, gathered=True, weighted=weighted or combined, combined=combined)
