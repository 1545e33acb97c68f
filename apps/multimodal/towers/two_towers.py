"""A tower for each modality (CLIP, arXiv 2103.00020), dense or sparse, from scratch or with published weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

import core
from apps.multimodal.towers.parts import ImagePart, TextPart
from apps.multimodal.towers.pretrained import BertTexts, ViTImages
from apps.multimodal.towers.towers import Published, Sizes, TowerConfig, Towers
from apps.nets.blocks import FFNConfig, MoEs, ffns_of, moe_configs

_IMAGES, _TEXTS = ViTImages(), BertTexts()


@dataclass(frozen=True)
class TwoTowers(TowerConfig):
    """A tower that reads images and one that reads texts. No expert sees both.

    ``moe`` and ``moe_blocks`` count for both: "every2" names every second block of each. A list of MoE layers has the
    images' layers first. Experts at their default, ``core.FFN()``, are as the dense networks of the tower that they are
    in: of the same width, biases and activation.

    Attributes:
        image: the tower of the images.
        text: the tower of the texts.
        text_ffn: FFN of the blocks of the texts instead of experts in a dense model, as in baselines of towers of
            different widths; None: the images' FFN.

    Raises:
        ValueError: a part that is none.
    """

    prefix = "tower."

    image: ImagePart = _IMAGES
    text: TextPart = _TEXTS
    text_ffn: core.DenseFFN | None = None

    @property
    def dense_ffn(self) -> core.DenseFFN:
        """The FFN of the image tower's blocks without experts."""
        return self.image.dense_ffn

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self.image.width, self.text.width)))

    def build(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: str | Sequence[int]) -> PairOfTowers:
        return PairOfTowers(self, sizes, ffn, moe_blocks)


class PairOfTowers(Towers):
    """The network of ``TwoTowers``.

    Args:
        config: the parts.
        sizes: of the input.
        ffn, moe_blocks: as ``TowerConfig.build`` has them.

    Raises:
        ValueError: parts that do not fit together, or MoE layers that no block is for.
    """

    def __init__(
        self, config: TwoTowers, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: str | Sequence[int]
    ) -> None:
        super().__init__()
        parts = (config.image, config.text)
        blocks = [() if ffn is None else part.blocks(moe_blocks) for part in parts]
        if ffn is not None and not any(blocks):
            raise ValueError("moe is given, and tower.image and tower.text both have moe_blocks='none'")
        self.sizes, self.moes = sizes, moe_configs(ffn)
        own: list[FFNConfig | MoEs | None] = [ffn if at else None for at in blocks]
        if isinstance(ffn, core.DenseFFN) and config.text_ffn is not None and blocks[1]:
            own[1] = config.text_ffn
        if len(self.moes) > 1:
            ffns_of(ffn, *blocks)  # checks their number
            own = [self.moes[: len(blocks[0])] or None, self.moes[len(blocks[0]) :] or None]
        self.image = config.image.build(sizes, own[0], blocks[0])
        self.text = config.text.build(sizes, own[1], blocks[1])
        self.image_dim, self.text_dim, self.num_patches = self.image.dim, self.text.dim, self.image.num_patches

    def forward(self, image: Tensor | None, text_BL: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (
            None if image is None else self.image(self._checked_image(image)),
            None if text_BL is None else self.text(self._checked_text(text_BL)),
        )

    def image_tokens(self, image: Tensor) -> Tensor:
        return self.image.tokens(self._checked_image(image))

    def text_tokens(self, text_BL: Tensor) -> Tensor:
        return self.text.tokens(self._checked_text(text_BL))

    def load_start(self) -> tuple[Published | None, Published | None]:
        return self.image.load_start(), self.text.load_start()

    def set_grad_checkpointing(self, on: bool) -> None:
        self.image.set_grad_checkpointing(on)
        self.text.set_grad_checkpointing(on)

    def _checked_image(self, image: Tensor) -> Tensor:
        self.check_image(image)
        return image

    def _checked_text(self, text_BL: Tensor) -> Tensor:
        self.check_text(text_BL)
        return text_BL
