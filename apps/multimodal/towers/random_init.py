"""Parts of ``TwoTowers`` that start with random weights: the blocks of ``SingleTower`` for only one modality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apps.multimodal.towers.parts import ImagePart, OneTower, TextPart, TowerPart
from apps.multimodal.towers.stack import IMAGE, TEXT
from apps.multimodal.towers.towers import SharedTransformer, SingleTower, Sizes
from apps.nets.blocks import FFNConfig, MoEs

_BLOCKS = SingleTower()


class _DrawnTower(OneTower):
    """The tower of ``PatchImages`` or ``PieceTexts``: blocks that read one modality."""

    part: _Drawn
    ffn_place = "stack.layers.{}.ffn."

    @property
    def num_patches(self) -> int:
        return int(self.network.num_patches)

    def tokens(self, x: Tensor) -> Tensor:
        return self.network.image_tokens(x) if self.part.modality == IMAGE else self.network.text_tokens(x)

    def forward(self, x: Tensor) -> Tensor:
        given = (x, None) if self.part.modality == IMAGE else (None, x)
        return self.network(*given)[self.part.modality]


@dataclass(frozen=True)
class _Drawn(TowerPart):
    """What ``PatchImages`` and ``PieceTexts`` have in common.

    Attributes:
        blocks_as: their sizes.
    """

    sized_by: ClassVar[tuple[str, str, str]] = ("blocks_as", "width", "depth")
    tower: ClassVar[type[OneTower]] = _DrawnTower
    modality: ClassVar[int]

    blocks_as: SingleTower = _BLOCKS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained is not None:
            raise ValueError(f"pretrained={self.pretrained}: there are no weights of a {type(self).__name__}")

    def network(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: Sequence[int]) -> SharedTransformer:
        return SharedTransformer(self.blocks_as, sizes, ffn, moe_blocks, (self.modality,))


@dataclass(frozen=True)
class PatchImages(_Drawn, ImagePart):
    """A tower of images with the patches and blocks of ``SingleTower``.

    Attributes:
        blocks_as: their sizes.
    """

    modality: ClassVar[int] = IMAGE


@dataclass(frozen=True)
class PieceTexts(_Drawn, TextPart):
    """A tower of texts with the token embeddings and blocks of ``SingleTower``.

    Attributes:
        blocks_as: their sizes.
    """

    modality: ClassVar[int] = TEXT
