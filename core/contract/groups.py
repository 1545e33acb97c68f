"""``TokenGroups``: how the tokens of a batch are parted into groups that are mixed, position by position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenGroups:
    """A partition of T tokens into N groups: token t is member ``t // N`` of group ``t % N``.

    N is a multiple of the sequences' length S, so the members of a group are at the same position of different
    sequences.

    Attributes:
        num_tokens: T.
        num_groups: N.
        size: places of a group, g: ``g * N`` is at least T, and the places past T are empty.
    """

    num_tokens: int
    num_groups: int
    size: int

    @classmethod
    def of(cls, num_sequences: int, length: int, most: int) -> TokenGroups:
        """Return the groups of B sequences: as few as have at most ``most`` members, of sizes that differ by one."""
        B, each = num_sequences, -(-num_sequences // most)
        # If the number is symbolic (export), a second division would depend on it: a group keeps all its places.
        size = -(-B // each) if isinstance(B, int) and each else most
        return cls(B * length, each * length, size)

    def part(self, value_T: Tensor) -> Tensor:
        """Return a (T, ...) value by place and group, (g, N, ...). Empty places repeat the last token."""
        # An index serves any number of tokens; ``torch.export`` would fix padding to one.
        index = torch.arange(self.size * self.num_groups, device=value_T.device).clamp_max(self.num_tokens - 1)
        return value_T.index_select(0, index).unflatten(0, (self.size, self.num_groups))

    def is_filled(self, device: torch.device) -> Tensor:
        """Return which places have a token, bool (g, N)."""
        place = torch.arange(self.size * self.num_groups, device=device)
        return (place < self.num_tokens).unflatten(0, (self.size, self.num_groups))

    def join(self, value_gN: Tensor) -> Tensor:
        """Return a (g, N, ...) value by token, (T, ...): the inverse of ``part``."""
        return value_gN.flatten(0, 1).narrow(0, 0, self.num_tokens)
