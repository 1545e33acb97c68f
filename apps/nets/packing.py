"""Sequences without their padding: matmuls run only on non-padding tokens, attention on padded ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """The places of the non-padding tokens in a batch. Padding takes no part in any matmul but the attention's.

    Attributes:
        slot_T: int64 (T,), ``row * length + position`` of each real token, ascending: row by row.
        position_T: int64 (T,), non-padding tokens before it in its row.
        last_B: int64 (B,), the place in T of each row's last token; -1 if it has none.
        num_rows: B.
        length: L, non-padding tokens of the longest row; 1 if there is none at all.
        kept_BL: bool (B, L), True for non-padding tokens, where padding stays in its place behind them: in a program
            for other runtimes, whose shapes cannot depend on values. Attention and routers leave it out. None: it is
            taken out.
    """

    slot_T: Tensor
    position_T: Tensor
    last_B: Tensor
    num_rows: int
    length: int
    kept_BL: Tensor | None = None

    @classmethod
    def of(cls, valid_BS: Tensor) -> tuple[Packing, Tensor]:
        """Return the packing, and int64 (T,) indices of the non-padding tokens in the flattened ``valid_BS``.

        On the meta device, where nobody knows which they are, all tokens count as real; ``torch.export`` keeps all.
        """
        B, S = valid_BS.shape
        if torch.compiler.is_exporting():
            return cls._of_all(valid_BS)
        if valid_BS.is_meta:
            index_T = torch.empty(B * S, dtype=torch.int64, device="meta")
            return cls(index_T, index_T, index_T[:B], B, S), index_T
        index_T = valid_BS.flatten().nonzero().squeeze(1)
        count_B = valid_BS.sum(1)
        length = max(int(count_B.max()), 1) if B else 1
        position_T = (valid_BS.cumsum(1) - 1).flatten()[index_T]
        row_T = index_T // max(S, 1)
        last_B = torch.where(count_B > 0, count_B.cumsum(0) - 1, -1)
        return cls(row_T * length + position_T, position_T, last_B, B, length), index_T

    @classmethod
    def _of_all(cls, valid_BS: Tensor) -> tuple[Packing, Tensor]:
        """Return the packing that keeps padding, and int64 (B * S,) indices: a row's non-padding tokens come first."""
        B, S = valid_BS.shape
        place_S = torch.arange(S, device=valid_BS.device)
        begin_B1 = torch.arange(B, device=valid_BS.device)[:, None] * S
        order_BS = torch.where(valid_BS, place_S, place_S + S).argsort(1)  # no two tokens of a row sort alike
        count_B1 = valid_BS.sum(1, keepdim=True)
        last_B = torch.where(count_B1 > 0, begin_B1 + count_B1 - 1, -1).squeeze(1)
        slot_T, position_T = (begin_B1 + place_S).flatten(), place_S.expand(B, S).flatten()
        return cls(slot_T, position_T, last_B, B, S, place_S < count_B1), (begin_B1 + order_BS).flatten()

    @classmethod
    def full(cls, num_rows: int, length: int, device: torch.device) -> Packing:
        """Return the packing of rows without padding."""
        slot_T = torch.arange(num_rows * length, device=device)
        position_T = torch.arange(length, device=device).expand(num_rows, length).flatten()
        last_B = torch.arange(1, num_rows + 1, device=device) * length - 1
        return cls(slot_T, position_T, last_B, num_rows, length)

    @property
    def is_full(self) -> bool:
        """No row is shorter than L, or padding is kept."""
        return self.kept_BL is not None or self.slot_T.shape[0] == self.num_rows * self.length

    def pad(self, x_TC: Tensor) -> Tensor:
        """Map (T, C) to (B, L, C), each row's tokens first and zeros after them."""
        if not self.is_full:
            flat = x_TC.new_zeros(self.num_rows * self.length, x_TC.shape[-1])
            x_TC = flat.index_copy(0, self.slot_T, x_TC)
        x_BLC = x_TC.view(self.num_rows, self.length, x_TC.shape[-1])
        return x_BLC if self.kept_BL is None else x_BLC.masked_fill(~self.kept_BL.unsqueeze(-1), 0)

    def pack(self, x_BLC: Tensor) -> Tensor:
        """Map (B, L, C) to (T, C)."""
        flat = x_BLC.flatten(0, 1)
        return flat if self.is_full else flat.index_select(0, self.slot_T)

    def valid_BL(self) -> Tensor | None:
        """Return bool (B, L), True for non-padding tokens; None if all are."""
        if self.kept_BL is not None:
            return self.kept_BL
        if self.is_full:
            return None
        flat = torch.zeros(self.num_rows * self.length, dtype=torch.bool, device=self.slot_T.device)
        return flat.index_fill(0, self.slot_T, True).view(self.num_rows, self.length)
