"""A tower: a network from the columns of users, or of items, to vectors of length 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

import core
from apps.nets.blocks import FFNConfig, ffn_configs
from apps.recsys.encoding.features import Features
from apps.recsys.tables.columns.dense import DenseConfig
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.model import InteractionConfig, TableColumns
from apps.recsys.tables.rows.batch import TableBatch
from core.fields import Checked, Count, Depth, ShareBelowOne
from core.kernels import cpu


@core.register_config
@dataclass(frozen=True)
class TowerConfig(Checked):
    """Sizes of both towers.

    Attributes:
        dim: width of the vectors that are compared.
        width: width D of the blocks.
        depth: number of blocks, each ``x + ffn(norm(x))``.
        hidden_dim: hidden dim of a dense block's FFN; None: 4 * width.
        dropout: dropout of the joined columns and of each block's output.

    Raises:
        ValueError: a value out of its range.
    """

    prefix = "tower."

    dim: Count = 64
    width: Count = 64
    depth: Depth = 1
    hidden_dim: Count | None = None
    dropout: ShareBelowOne = 0.0

    @property
    def dense_ffn(self) -> core.DenseFFN:
        """The FFN of a block without experts."""
        return core.DenseFFN(self.hidden_dim)


class Tower(TableColumns):
    """The columns of a row, a linear map to width D, blocks of FFNs or experts, and a linear map to a unit vector.

    Args:
        features: the columns.
        config: sizes.
        embedding, dense, interaction: configs of the parts that read the columns.
        ffn: FFN or experts of ``moe_blocks``; None: all blocks are as ``config`` says.
        moe_blocks: indices of these blocks.
    """

    def __init__(
        self,
        features: Features,
        config: TowerConfig,
        embedding: EmbeddingConfig,
        dense: DenseConfig,
        interaction: InteractionConfig,
        ffn: FFNConfig | None = None,
        moe_blocks: Sequence[int] = (),
    ) -> None:
        super().__init__(features, embedding, dense, interaction, config.dropout)
        ffns = ffn_configs(config.dense_ffn, config.depth, ffn, moe_blocks)
        self.enter = cpu.Linear(self.input_dim, config.width)
        self.blocks = nn.ModuleList([Block(config, own) for own in ffns])
        self.norm = nn.LayerNorm(config.width)
        self.leave = cpu.Linear(config.width, config.dim)

    def forward(self, batch: TableBatch, plain: bool = False) -> Tensor:
        """Return the vectors, float32 (B, dim), of length 1; ``plain`` as for ``read``."""
        return self.compute(*self.read(batch, plain))

    def compute(self, dense: Tensor | None, sparse: Tensor | None) -> Tensor:
        """Return the vectors of encoded columns, as ``read`` returns them."""
        x_BD = self.enter(self.join(dense, sparse))
        for block in self.blocks:
            x_BD = block(x_BD)
        return F.normalize(self.leave(self.norm(x_BD)).float(), dim=-1)


class Block(nn.Module):
    """``x + dropout(ffn(norm(x)))``, in which each row is a sequence of its own to a router."""

    def __init__(self, config: TowerConfig, ffn: FFNConfig) -> None:
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(config.width), ffn.build(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Map (B, D) to (B, D)."""
        return x_BD + self.dropout(self.ffn(self.norm(x_BD)[:, None])[:, 0])
