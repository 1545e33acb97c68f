"""Rows of soft slots: each is a mean over the tokens of its group."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Rows, SlotPlan, SlotRouting
from .base import Dispatcher


class SlotDispatcher(Dispatcher):
    """Soft slots: the rows of an expert are its slots of all groups, G * P of them, each a mean over its group.

    Tokens come and go by group, (G, S, D). Sums over tokens and slots run in their dtype (autocast's, where it is on).
    """

    def dispatch(self, x: Tensor, routing: SlotRouting) -> Rows:
        dispatch_GSEP = routing.dispatch_GSEP
        G, S, E, P = dispatch_GSEP.shape
        if routing.valid_T is not None:
            # Padding has share 0 but may hold NaN.
            x = x.masked_fill(~routing.valid_T.unflatten(0, (G, S))[:, :, None], 0.0)
        slots_EGPD = torch.einsum("gsep,gsd->egpd", dispatch_GSEP.to(x.dtype), x)
        R, device = E * G * P, x.device
        return Rows(
            x=slots_EGPD.reshape(R, x.shape[-1]),
            row_index_R=torch.arange(R, device=device),
            offsets_E=torch.arange(1, E + 1, dtype=torch.int32, device=device) * (G * P),
            # The experts weight each row by its gate: here the combine weights do.
            gates_R=torch.ones(R, dtype=dispatch_GSEP.dtype, device=device),
            num_tokens=routing.num_tokens,
            plan=SlotPlan(routing.combine_GSEP),
            gathered=True,
        )

    def combine(self, rows: Rows) -> Tensor:
        combine_GSEP = rows.plan.combine_GSEP
        G, _, E, P = combine_GSEP.shape
        y_EGPD = rows.x.reshape(E, G, P, rows.x.shape[-1])
        return torch.einsum("gsep,egpd->gsd", combine_GSEP.to(rows.x.dtype), y_EGPD)
