"""Parts of ``TwoTowers`` that begin with drawn weights: the blocks of ``SingleTower`` for one modality alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

import core
from apps.multimodal.parts import ImagePart, ImageTower, OneTower, TextPart, TextTower, TowerPart
from apps.multimodal.stack import IMAGE, TEXT
from apps.multimodal.towers import SharedTransformer, SingleTower, Sizes
from apps.nets.blocks import FFNConfig, MoEs

_BLOCKS = SingleTower()


@dataclass(frozen=True)
class _Drawn(TowerPart):
    """What ``PatchImages`` and ``PieceTexts`` have in common."""

    blocks_as: SingleTower = _BLOCKS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained is not None:
            raise ValueError(f"pretrained={self.pretrained}: there are no weights of a {type(self).__name__}")

    @property
    def dense_ffn(self) -> core.DenseFFN:
        return self.blocks_as.dense_ffn

    @property
    def width(self) -> int:
        return self.blocks_as.width

    @property
    def depth(self) -> int:
        return self.blocks_as.depth


@dataclass(frozen=True)
class PatchImages(_Drawn, ImagePart):
    """A tower of images with the patches and blocks of ``SingleTower``.

    Attributes:
        blocks_as: their sizes.
    """

    def build(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: Sequence[int]) -> ImageTower:
        return _PatchTower(self, sizes, ffn, moe_blocks)


@dataclass(frozen=True)
class PieceTexts(_Drawn, TextPart):
    """A tower of texts with the pieces and blocks of ``SingleTower``.

    Attributes:
        blocks_as: their sizes.
    """

    def build(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: Sequence[int]) -> TextTower:
        return _PieceTower(self, sizes, ffn, moe_blocks)


class _DrawnTower(OneTower):
    part: _Drawn
    modality: int
    ffn_place = "stack.layers.{}.ffn."

    def build(self, ffn: FFNConfig | MoEs | None) -> SharedTransformer:
        return SharedTransformer(self.part.blocks_as, self.sizes, ffn, self.moe_blocks, (self.modality,))


class _PatchTower(_DrawnTower, ImageTower):
    modality = IMAGE

    @property
    def num_patches(self) -> int:  # type: ignore[override]
        return int(self.network.num_patches)

    def tokens(self, image: Tensor) -> Tensor:
        x_BSD: Tensor = self.network.image_tokens(image)
        return x_BSD

    def forward(self, image: Tensor) -> Tensor:
        vector_BD: Tensor = self.network(image, None)[0]
        return vector_BD


class _PieceTower(_DrawnTower, TextTower):
    modality = TEXT

    def tokens(self, text_BL: Tensor) -> Tensor:
        x_BLD: Tensor = self.network.text_tokens(text_BL)
        return x_BLD

    def forward(self, text_BL: Tensor) -> Tensor:
        vector_BD: Tensor = self.network(None, text_BL)[1]
        return vector_BD
