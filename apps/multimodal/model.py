"""The network of ``ImageTextRetriever``: towers, linear maps to vectors of one length, and a head for attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core
from apps.multimodal.towers.towers import Published, Sizes, TowerConfig
from apps.nets.blocks import FFNConfig, MoEs
from core.fields import Checked, Positive
from core.kernels import cpu

_EXPERTS = core.MMoE(num_experts=4, expert=core.MLP((128,)))


@core.register_config
@dataclass(frozen=True)
class AttributeHead(Checked):
    """The head that predicts the attributes of images, each by a gate of its own over shared experts (MMoE, KDD 2018).

    Attributes:
        experts: the multi-gate layer between an image's vector and the attributes' linear maps.
        weight: of the attributes' loss relative to the contrastive one.

    Raises:
        ValueError: a weight that is not positive.
    """

    prefix = "attribute_head."

    experts: core.MultiGateConfig = _EXPERTS
    weight: Positive = 1.0


class AttributeClassifier(nn.Module):
    """The network of ``AttributeHead``.

    Args:
        config: of the experts.
        dim: width of an image's vector.
        attributes: number of classes of each attribute, by name.
    """

    def __init__(self, config: AttributeHead, dim: int, attributes: Mapping[str, int]) -> None:
        super().__init__()
        self.experts = config.experts.build(dim, len(attributes))
        width = config.experts.out_dim(dim)
        self.outputs = nn.ModuleList(cpu.Linear(width, max(count, 1)) for count in attributes.values())

    def forward(self, x_BD: Tensor) -> tuple[Tensor, ...]:
        """Return the logits (B, C) of each attribute."""
        return tuple(output(x) for output, x in zip(self.outputs, self.experts(x_BD), strict=True))


class PairModel(nn.Module):
    """Towers whose vectors are mapped to one space: the similarity of an image and a text is their dot product.

    Args:
        tower: config of the towers.
        sizes: of the input.
        dim: width of the space.
        ffn, moe_blocks: as ``TowerConfig.build`` has them.
        attributes: number of classes of each attribute, by name; none without a head.
        head: config of the head that predicts them; None: there is none.
    """

    def __init__(
        self,
        tower: TowerConfig,
        sizes: Sizes,
        dim: int,
        ffn: FFNConfig | MoEs | None = None,
        moe_blocks: str | Sequence[int] = "every2",
        attributes: Mapping[str, int] | None = None,
        head: AttributeHead | None = None,
    ) -> None:
        super().__init__()
        self.towers = tower.build(sizes, ffn, moe_blocks)
        self.image_proj = cpu.Linear(self.towers.image_dim, dim, bias=False)
        self.text_proj = cpu.Linear(self.towers.text_dim, dim, bias=False)
        for proj in (self.image_proj, self.text_proj):
            nn.init.xavier_uniform_(proj.weight)
        self.head = None if head is None else AttributeClassifier(head, self.towers.image_dim, attributes or {})

    def forward(self, image: Tensor, text_BL: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return the vectors of images and texts, float32 (B, dim) of length 1, and the logits of the attributes."""
        image_BD, text_BD = self.towers(image, text_BL)
        logits = () if self.head is None else self.head(image_BD)
        return _unit(self.image_proj(image_BD)), _unit(self.text_proj(text_BD)), logits

    def image_vectors(self, image: Tensor) -> Tensor:
        """Return the vectors of images only, float32 (B, dim) of length 1."""
        return _unit(self.image_proj(self.towers(image, None)[0]))

    def image_outputs(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the vectors of images only, and the logits (B, C) of each attribute, if there is a head."""
        image_BD, _ = self.towers(image, None)
        return _unit(self.image_proj(image_BD)), *(() if self.head is None else self.head(image_BD))

    def text_vectors(self, text_BL: Tensor) -> Tensor:
        """Return the vectors of texts only, float32 (B, dim) of length 1."""
        return _unit(self.text_proj(self.towers(None, text_BL)[1]))

    @torch.no_grad()
    def load_start(self) -> Published | None:
        """Load published weights, if the towers' config names any.

        Returns:
            the loss parameters of the texts' weights, or else of the images'; None: nothing.

        Raises:
            ValueError: files that are missing or cannot be read, or weights that do not fit.
        """
        image, text = self.towers.load_start()
        for proj, published in ((self.image_proj, image), (self.text_proj, text)):
            if published is not None:
                if published.projection.shape != proj.weight.shape:
                    raise ValueError(
                        f"dim={len(proj.weight)} is not {len(published.projection)}, that of the pretrained vectors"
                    )
                proj.weight.copy_(published.projection)
        return text or image


def _unit(x_BD: Tensor) -> Tensor:
    return F.normalize(x_BD.float(), dim=-1)
