"""Parts of ``TwoTowers`` that begin with drawn weights: the blocks of ``SingleTower`` for one modality alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apps.multimodal.towers.parts import ImagePart, ImageTower, OneTower, TextPart, TextTower, TowerPart
from apps.multimodal.towers.stack import IMAGE, TEXT
from apps.multimodal.towers.towers import SharedTransformer, SingleTower
from apps.nets.blocks import FFNConfig, MoEs

_BLOCKS = SingleTower()


class _DrawnTower(OneTower):
    part: _Drawn
    modality: int
    ffn_place = "stack.layers.{}.ffn."

    def build(self, ffn: FFNConfig | MoEs | None) -> SharedTransformer:
        return SharedTransformer(self.part.blocks_as, self.sizes, ffn, self.moe_blocks, (self.modality,))


class _PatchTower(_DrawnTower, ImageTower):
    modality = IMAGE

    def tokens(self, image: Tensor) -> Tensor:
        return self.network.image_tokens(image)

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image, None)[0]


class _PieceTower(_DrawnTower, TextTower):
    modality = TEXT

    def tokens(self, text_BL: Tensor) -> Tensor:
        return self.network.text_tokens(text_BL)

    def forward(self, text_BL: Tensor) -> Tensor:
        return self.network(None, text_BL)[1]


@dataclass(frozen=True)
class _Drawn(TowerPart):
    """What ``PatchImages`` and ``PieceTexts`` have in common.

    Attributes:
        blocks_as: their sizes.
    """

    sized_by: ClassVar[tuple[str, str, str]] = ("blocks_as", "width", "depth")

    blocks_as: SingleTower = _BLOCKS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained is not None:
            raise ValueError(f"pretrained={self.pretrained}: there are no weights of a {type(self).__name__}")


@dataclass(frozen=True)
class PatchImages(_Drawn, ImagePart):
    """A tower of images with the patches and blocks of ``SingleTower``.

    Attributes:
        blocks_as: their sizes.
    """

    tower: ClassVar[type[OneTower]] = _PatchTower


@dataclass(frozen=True)
class PieceTexts(_Drawn, TextPart):
    """A tower of texts with the pieces and blocks of ``SingleTower``.

    Attributes:
        blocks_as: their sizes.
    """

    tower: ClassVar[type[OneTower]] = _PieceTower
