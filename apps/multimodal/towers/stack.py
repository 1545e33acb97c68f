"""Blocks that read images and texts in one pass: each attends within itself, and the experts see them all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import core
from apps.nets.attention import Mask, SelfAttention, self_mask
from apps.nets.blocks import FFNConfig
from apps.nets.config import TransformerConfig
from apps.nets.layers import Layer, Pass
from apps.nets.norms import build_norm
from apps.nets.packing import Packing

IMAGE, TEXT = 0, 1
"""Numbers of the modalities in ``context.modality_BS``."""
MODALITIES = ("image", "text")
"""Names of the modalities, by number."""


class Part(NamedTuple):
    """Sequences of one modality, without their padding.

    Attributes:
        x_TD: the tokens.
        packing: their positions in the (B, L) layout.
        ids_T: int64 (T,), their ids for routers.
        modality: ``IMAGE`` or ``TEXT``.
    """

    x_TD: Tensor
    packing: Packing
    ids_T: Tensor
    modality: int

    def padded(self) -> Tensor:
        """Return the tokens as (B, L, D), zeros after a row's tokens."""
        return self.packing.pad(self.x_TD)

    def mean(self) -> Tensor:
        """Return the mean over each row's tokens, float32 (B, D); zeros where a row has none."""
        x_BLD = self.padded().float()
        valid_BL = self.packing.valid_BL()
        return x_BLD.mean(1) if valid_BL is None else x_BLD.sum(1) / valid_BL.sum(1, keepdim=True).clamp_min(1)


@dataclass(frozen=True)
class PartPacking(Packing):
    """The packing of several parts, one after the other, whose rows all count as of one batch.

    Attributes:
        parts: the packing of each part, in a layout as wide as its own longest row.
        masks: the mask of each part's attention.
    """

    parts: tuple[Packing, ...] = ()
    masks: tuple[Mask, ...] = ()

    @classmethod
    def join(cls, parts: Sequence[Packing], masks: Sequence[Mask]) -> PartPacking:
        """Return the packing of the rows of all parts, which keeps padding where the only part does."""
        length, rows, tokens = max(p.length for p in parts), 0, 0
        joined: dict[str, list[Tensor]] = {"slot_T": [], "position_T": [], "last_B": []}
        for part in parts:
            row_T = part.slot_T // part.length + rows
            joined["slot_T"].append(row_T * length + part.position_T)
            joined["position_T"].append(part.position_T)
            joined["last_B"].append(torch.where(part.last_B < 0, -1, part.last_B + tokens))
            rows, tokens = rows + part.num_rows, tokens + part.slot_T.shape[0]
        whole = {name: torch.cat(tensors) for name, tensors in joined.items()}
        kept_BL = parts[0].kept_BL if len(parts) == 1 else None
        return cls(**whole, num_rows=rows, length=length, kept_BL=kept_BL, parts=tuple(parts), masks=tuple(masks))


class PartAttention(SelfAttention):
    """Self-attention within the sequences of each part: short texts are not padded to the number of patches.

    Forward and backward of 128 images of 49 patches and 128 texts of 6 to 19 tokens (D=128, 4 heads) took 40 ms of one
    core of an AMD EPYC in bfloat16, padded to one length 52; in float32 76 and 100 ms.
    """

    def forward(
        self,
        x_TD: Tensor,
        mask: Mask,
        rotations: Any = None,
        packing: Any = None,
        seen: Any = None,
        past: Any = None,
    ) -> Tensor:
        """Map (T, D) to (T, D), under the interface of ``SelfAttention``; ``packing`` is a ``PartPacking``."""
        pieces = x_TD.split([part.slot_T.shape[0] for part in packing.parts])
        each = zip(pieces, packing.masks, packing.parts, strict=True)
        return torch.cat([super(PartAttention, self).forward(x, own, None, part) for x, own, part in each])


class PartStack(nn.Module):
    """Pre-norm blocks and a last norm over the tokens of one or several parts.

    Matmuls, norms and MoE layers see the tokens of all parts in one call, in which padding is not computed. The context
    of the MoE layers has ``valid_BS``, ``token_ids_BS`` and ``modality_BS``, each row being an image or a text.

    Args:
        config: of the blocks.
        ffns: FFN or MoE layer of each block.
    """

    def __init__(self, config: TransformerConfig, ffns: Sequence[FFNConfig]) -> None:
        super().__init__()
        self.num_heads, width = config.shape.num_heads, config.shape.dim
        self.layers = nn.ModuleList(Layer(config, ffn.build(width), mixing=PartAttention(config)) for ffn in ffns)
        self.norm = build_norm(config)
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize matrices Xavier-uniform, and each expert as the dense FFN it replaces."""
        inside = {id(module) for layer in core.moe_layers(self).values() for module in layer.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear) and id(module) not in inside:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.reset_heads()
            elif isinstance(module, core.Experts):
                module.init_each(nn.init.xavier_uniform_)

    def forward(self, parts: Sequence[Part], checkpointed: bool = False) -> tuple[Part, ...]:
        """Return the parts with the normed output as their tokens.

        Args:
            parts: the embedded tokens.
            checkpointed: recompute each block in the backward.
        """
        masks = [self._mask(part) for part in parts]
        packing = PartPacking.join([part.packing for part in parts], masks)
        given = Pass(Mask(), _context(parts, packing), packing=packing)
        x_TD = self.dropout(torch.cat([part.x_TD for part in parts]))
        for layer in self.layers:
            x_TD = checkpoint(layer, x_TD, given, use_reentrant=False) if checkpointed else layer(x_TD, given)
        pieces = self.norm(x_TD).split([part.x_TD.shape[0] for part in parts])
        return tuple(part._replace(x_TD=piece_TD) for part, piece_TD in zip(parts, pieces, strict=True))

    def _mask(self, part: Part) -> Mask:
        like_BL0 = part.x_TD.new_empty(part.packing.num_rows, part.packing.length, 0)
        return self_mask(like_BL0, self.num_heads, valid_BL=part.packing.valid_BL(), causal=False, relative_HLL=None)


def _context(parts: Sequence[Part], packing: Packing) -> core.RoutingContext:
    """Return the MoE layers' context of the tokens, in the layout of all rows."""
    ids_T = torch.cat([part.ids_T for part in parts])
    modality_B = torch.cat([part.ids_T.new_full((part.packing.num_rows,), part.modality) for part in parts])
    return core.RoutingContext(
        valid_BS=packing.valid_BL(),
        token_ids_BS=packing.pad(ids_T[:, None]).squeeze(-1),
        modality_BS=modality_B[:, None].expand(-1, packing.length),
    )
