"""The positions before a pass, as plain tensors: an exported decoder takes and returns them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Past:
    """Keys and values of P positions that a stack has read, to which it adds the L positions of one pass.

    The layers ask in their order. ``decode_cache.Cache`` is the faster form for a search in torch, a position at a
    time; this one takes several positions, has no state but tensors, and can be exported.

    Args:
        kept: keys and values of each self-attention, (B, Hkv, P, d) each; a universal stack has them of each step.
        hidden: bool (B, P), for each layer that few tokens enter: keys of the tokens that passed by.
        memory: keys and values of each cross-attention, (B, Hkv, S, d) each; none in a language model.

    Attributes:
        joined: after the pass, keys and values of P + L positions, in the order of ``kept``.
        joined_hidden: likewise, bool (B, P + L), in the order of ``hidden``.
    """

    def __init__(
        self,
        kept: Sequence[tuple[Tensor, Tensor]],
        hidden: Sequence[Tensor] = (),
        memory: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        self.length = kept[0][0].shape[2]
        self.joined: list[tuple[Tensor, Tensor]] = []
        self.joined_hidden: list[Tensor] = []
        self._kept, self._hidden, self._memory = iter(kept), iter(hidden), iter(memory)

    def join(self, k_BHLd: Tensor, v_BHLd: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the next self-attention, with these after its past's."""
        past_k, past_v = next(self._kept)
        joined = torch.cat((past_k, k_BHLd), 2), torch.cat((past_v, v_BHLd), 2)
        self.joined.append(joined)
        return joined

    def hide(self, hidden_BL: Tensor) -> Tensor:
        """Return which keys of the next layer that few tokens enter are hidden, bool (B, P + L)."""
        joined = torch.cat((next(self._hidden), hidden_BL), 1)
        self.joined_hidden.append(joined)
        return joined

    def of_memory(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the next cross-attention."""
        return next(self._memory)
