"""Rows of soft slots: each is a mean over the tokens of its group."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Rows, SlotPlan, SlotRouting, span
from .base import Dispatcher


class SlotDispatcher(Dispatcher):
    """Soft slots: the rows of an expert are its slots of all groups, each a mean over its group.

    Tokens come and go by sequence, (G, S, D). Sums over tokens and slots run in their dtype (autocast's, if it is on).
    An expert has G * P slots, or N * P with N groups of tokens across the sequences.
    """

    @span("moe.dispatch")
    def dispatch(self, x: Tensor, routing: SlotRouting) -> Rows:
        dispatch_GSEP = routing.dispatch_GSEP
        G, S, E, _ = dispatch_GSEP.shape
        if routing.valid_T is not None:
            # Padding has share 0 but may hold NaN.
            x = x.masked_fill(~routing.valid_T.unflatten(0, (G, S))[:, :, None], 0.0)
        shares, groups = dispatch_GSEP.to(x.dtype), routing.across
        if groups is None:
            slots = torch.einsum("gsep,gsd->egpd", shares, x)
        else:
            is_empty_gN11 = ~groups.is_filled(x.device)[:, :, None, None]
            shares_gNEP = groups.part(shares.flatten(0, 1)).masked_fill(is_empty_gN11, 0.0)
            slots = torch.einsum("gnep,gnd->enpd", shares_gNEP, groups.part(x.flatten(0, 1)))
        slots_ECD = slots.flatten(1, 2)
        C, device = slots_ECD.shape[1], x.device
        return Rows(
            x=slots_ECD.flatten(0, 1),
            row_index_R=torch.arange(E * C, device=device),
            offsets_E=torch.arange(1, E + 1, dtype=torch.int32, device=device) * C,
            # The experts weight each row by its gate: here the combine weights do.
            gates_R=torch.ones(E * C, dtype=dispatch_GSEP.dtype, device=device),
            num_tokens=routing.num_tokens,
            plan=SlotPlan(routing.combine_GSEP, groups),
            gathered=True,
        )

    @span("moe.combine")
    def combine(self, rows: Rows) -> Tensor:
        combine_GSEP, groups = rows.plan.combine_GSEP, rows.plan.across
        G, S, E, P = combine_GSEP.shape
        shares = combine_GSEP.to(rows.x.dtype)
        if groups is None:
            return torch.einsum("gsep,egpd->gsd", shares, rows.x.reshape(E, G, P, rows.x.shape[-1]))
        y_ENPD = rows.x.reshape(E, groups.num_groups, P, rows.x.shape[-1])
        y_gND = torch.einsum("gnep,enpd->gnd", groups.part(shares.flatten(0, 1)), y_ENPD)
        return groups.join(y_gND).unflatten(0, (G, S))
