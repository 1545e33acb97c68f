"""Towers from pixels and text tokens to a vector of each image and text: the interface, and LIMoE's single tower.

In LIMoE (Mustafa et al., arXiv 2206.02770, section 2) one transformer reads the patches of images or the tokens of
texts, and its MoE layers are shared by both. ``two_towers.py`` has a tower for each modality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import core
from apps.data.subwords import PAD_ID
from apps.multimodal.towers.stack import IMAGE, TEXT, Part, PartStack
from apps.nets.blocks import FFNConfig, MoEs, ffn_configs, moe_configs, resolve_blocks
from apps.nets.config import TransformerConfig
from apps.nets.packing import Packing
from core.fields import Count, Depth, Positive, ShareBelowOne
from core.kernels import cpu
from core.registry import OpenConfig


class Sizes(NamedTuple):
    """The shape of a model's input.

    Attributes:
        image_size: height and width of the images in pixels.
        in_chans: channels of an image.
        vocab_size: number of token ids, 0 for padding among them.
        max_tokens: tokens of the longest text.
    """

    image_size: int
    in_chans: int
    vocab_size: int
    max_tokens: int


class Published(NamedTuple):
    """Values of published weights in addition to the towers' weights.

    Attributes:
        projection: of the tower's vectors to those that are compared, (D_out, D).
        log_scale: logarithm of the scale of the dot products.
        bias: added to the scaled dot products; None: there is none.
    """

    projection: Tensor
    log_scale: float
    bias: float | None = None


@dataclass(frozen=True)
class TowerConfig(OpenConfig):
    """Base of the configs of towers: ``SingleTower`` and ``TwoTowers``."""

    def build(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: str | Sequence[int]) -> Towers:
        """Return the network.

        Args:
            sizes: of the input.
            ffn: FFN of ``moe_blocks``: MoE layers or another dense FFN; None: the same as in the other blocks.
            moe_blocks: which blocks; see ``apps.nets.blocks.resolve_blocks``.

        Raises:
            ValueError: the parts do not fit together.
        """
        raise NotImplementedError

    @property
    def dense_ffn(self) -> core.DenseFFN:
        """The FFN of the blocks without experts."""
        raise NotImplementedError

    @property
    def widths(self) -> tuple[int, ...]:
        """The different widths of the tokens that reach the MoE layers."""
        raise NotImplementedError


class Towers(nn.Module):
    """Base of the networks that make one vector of an image and one of a text.

    MoE layers are given ``context.modality_BS``: 0 for patches of images, 1 for tokens of texts.

    Attributes:
        sizes: of the input.
        image_dim, text_dim: widths of the vectors.
        moes: the different MoE layers, one for all sparse blocks or one for each; none in a dense network.
        num_patches: tokens of an image that are patches; they come last among its tokens.
        grad_checkpointing: recompute the blocks in the backward, to save memory.
    """

    sizes: Sizes
    image_dim: int
    text_dim: int
    moes: tuple[core.MoEConfig, ...]
    num_patches: int
    grad_checkpointing: bool = False

    def forward(self, image: Tensor | None, text_BL: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the vectors of images (B, image_dim) and of texts (U, text_dim); None if none are given.

        Args:
            image: (B, C, H, W), normalized.
            text_BL: int64 (U, L), token ids, 0 for padding, which comes after them.

        Raises:
            ValueError: images or texts of another shape than the towers are for.
        """
        raise NotImplementedError

    def image_tokens(self, image: Tensor) -> Tensor:
        """Return the output at each token of images, (B, S, D): the patches are the last, row by row."""
        raise NotImplementedError

    def text_tokens(self, text_BL: Tensor) -> Tensor:
        """Return the output at each token of texts, (B, L, D), with L of the longest; 0 at padding."""
        raise NotImplementedError

    def load_start(self) -> tuple[Published | None, Published | None]:
        """Load published weights, if the configuration names any, and return their values for images and for texts in
        addition to the towers. A training or test without a checkpoint calls this once."""
        return None, None

    def set_grad_checkpointing(self, on: bool) -> None:
        """Compute each block again in the backward, to save memory, or not."""
        self.grad_checkpointing = on

    def check_image(self, image: Tensor) -> None:
        """Raise a ValueError if images have another shape than the towers are for."""
        size, chans = self.sizes.image_size, self.sizes.in_chans
        if image.ndim != 4 or image.shape[1:] != (chans, size, size):
            raise ValueError(f"images have shape {tuple(image.shape)}: it must be (B, {chans}, {size}, {size})")

    def check_text(self, text_BL: Tensor) -> None:
        """Raise a ValueError where texts are not integers of two axes."""
        if text_BL.ndim != 2 or text_BL.is_floating_point():
            raise ValueError(f"texts are {text_BL.dtype} of shape {tuple(text_BL.shape)}: they must be ids (B, L)")


@dataclass(frozen=True)
class SingleTower(TowerConfig):
    """One transformer for patches and text tokens alike (LIMoE, arXiv 2206.02770): pre-norm, each token sees all others
    of its image or text. Its output is normed and averaged over the tokens.

    Attributes:
        width: model dim D.
        depth: number of blocks.
        num_heads: attention heads; must divide ``width``.
        hidden_dim: FFN hidden dim of the dense blocks; None: 4 * width.
        patch_size: height and width of a patch in pixels; must divide the image's.
        dropout: of each block's output, and of the embeddings.
        pos_embed_std: standard deviation of the initial vectors of positions. The vectors of text tokens start at 1,
            and a patch is mapped to about as much.

    Raises:
        ValueError: a value out of its range.
    """

    width: Count = 128
    depth: Depth = 4
    num_heads: Count = 4
    hidden_dim: Count | None = None
    patch_size: Count = 8
    dropout: ShareBelowOne = 0.0
    pos_embed_std: Positive = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.transformer  # noqa: B018  # it checks the other fields

    @property
    def transformer(self) -> TransformerConfig:
        """The config of the blocks. The network adds positions itself."""
        return TransformerConfig(
            dim=self.width,
            hidden_dim=4 * self.width if self.hidden_dim is None else self.hidden_dim,
            num_heads=self.num_heads,
            encoder_layers=self.depth,
            positions="none",
            activation="gelu",
            scale_embeddings=False,
            dropout=self.dropout,
        )

    @property
    def dense_ffn(self) -> core.DenseFFN:
        return self.transformer.dense_ffn

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.width,)

    def build(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: str | Sequence[int]) -> SharedTransformer:
        return SharedTransformer(self, sizes, ffn, moe_blocks)


class PatchEmbedding(nn.Module):
    """A linear map of each patch of an image, with a learned vector for its position.

    Args:
        sizes: of the input.
        patch_size: height and width of a patch.
        width: D.
        pos_embed_std: standard deviation of the initial vectors of positions.

    Raises:
        ValueError: patches do not divide the image.
    """

    def __init__(self, sizes: Sizes, patch_size: int, width: int, pos_embed_std: float) -> None:
        super().__init__()
        if sizes.image_size % patch_size:
            raise ValueError(f"image_size={sizes.image_size} is not divisible by patch_size={patch_size}")
        self.patch_size = patch_size
        self.num_patches = (sizes.image_size // patch_size) ** 2
        self.proj = cpu.Linear(sizes.in_chans * patch_size**2, width)
        self.pos_embed = nn.Embedding(self.num_patches, width)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        nn.init.normal_(self.pos_embed.weight, std=pos_embed_std)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, H, W) images to (B, S, D), row by row."""
        p = self.patch_size
        patches = image.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, rows, p, columns, p)
        x_BSD = self.proj(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        return x_BSD + self.pos_embed.weight


class PieceEmbedding(nn.Module):
    """A learned vector for each token of a text, and one for its position.

    Args:
        sizes: of the input.
        width: D.
        pos_embed_std: standard deviation of the initial vectors of positions.
    """

    def __init__(self, sizes: Sizes, width: int, pos_embed_std: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocab_size, width)
        self.pos_embed = nn.Embedding(sizes.max_tokens, width)
        nn.init.normal_(self.embed.weight)
        nn.init.normal_(self.pos_embed.weight, std=pos_embed_std)

    def forward(self, text_BL: Tensor) -> Part:
        """Return the non-padding tokens of (B, L) ids.

        Raises:
            ValueError: a text of more tokens than there are positions.
        """
        packing, index_T = Packing.of(text_BL != PAD_ID)
        known = not (text_BL.is_meta or torch.compiler.is_exporting())  # a runtime stops where a place is missing
        if known and packing.length > self.pos_embed.num_embeddings:
            most = self.pos_embed.num_embeddings
            raise ValueError(f"a text of {packing.length} subwords is longer than max_tokens={most}")
        ids_T = text_BL.flatten()[index_T]
        return Part(self.embed(ids_T) + self.pos_embed(packing.position_T), packing, ids_T, TEXT)


class SharedTransformer(Towers):
    """The network of ``SingleTower``. Both modalities go through its blocks in one call.

    Token ids in the context are the text's token ids, and ``vocab_size + p`` for the p-th patch.

    Args:
        config: sizes.
        sizes: of the input.
        ffn, moe_blocks: as ``TowerConfig.build`` has them.
        modalities: modalities that it reads, ``IMAGE``, ``TEXT`` or both.
    """

    def __init__(
        self,
        config: SingleTower,
        sizes: Sizes,
        ffn: FFNConfig | MoEs | None,
        moe_blocks: str | Sequence[int],
        modalities: Sequence[int] = (IMAGE, TEXT),
    ) -> None:
        super().__init__()
        self.sizes, self.image_dim, self.text_dim = sizes, config.width, config.width
        self.moes = moe_configs(ffn)
        self.moe_blocks = () if ffn is None else resolve_blocks(moe_blocks, config.depth)
        if IMAGE in modalities:
            self.patches = PatchEmbedding(sizes, config.patch_size, config.width, config.pos_embed_std)
            self.num_patches = self.patches.num_patches
        if TEXT in modalities:
            self.pieces = PieceEmbedding(sizes, config.width, config.pos_embed_std)
        ffns = ffn_configs(config.dense_ffn, config.depth, ffn, self.moe_blocks)
        self.stack = PartStack(config.transformer, ffns)

    def forward(self, image: Tensor | None, text_BL: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        given: dict[int, Part] = {}
        if image is not None:
            given[IMAGE] = self._image_part(image)
        if text_BL is not None:
            given[TEXT] = self._text_part(text_BL)
        done = dict(zip(given, self._through(tuple(given.values())), strict=True))
        image_BD, text_BD = (done[kind].mean() if kind in done else None for kind in (IMAGE, TEXT))
        return image_BD, text_BD

    def image_tokens(self, image: Tensor) -> Tensor:
        return self._through((self._image_part(image),))[0].padded()

    def text_tokens(self, text_BL: Tensor) -> Tensor:
        return self._through((self._text_part(text_BL),))[0].padded()

    def _through(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        return self.stack(parts, self.grad_checkpointing and self.training)

    def _image_part(self, image: Tensor) -> Part:
        self.check_image(image)
        x_BSD = self.patches(image)
        packing = Packing.full(x_BSD.shape[0], self.num_patches, image.device)
        ids_T = self.sizes.vocab_size + packing.position_T
        return Part(x_BSD.flatten(0, 1), packing, ids_T, IMAGE)

    def _text_part(self, text_BL: Tensor) -> Part:
        self.check_text(text_BL)
        return self.pieces(text_BL)
