"""The parts of ``TwoTowers``: the tower of images and the tower of texts, and how they start with given weights.

Where blocks of a tower are MoE layers, their experts start as copies of the dense network that they replace (sparse
upcycling, arXiv 2212.05055), or as another start of ``core.sparsify``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import core
from apps.multimodal.towers.stack import IMAGE, TEXT
from apps.multimodal.towers.towers import Published, Sizes
from apps.nets.blocks import FFNConfig, MoEs, moe_configs, resolve_blocks
from apps.nets.upcycling import begin_as
from core.convert import Start, read_ffn
from core.convert.build.starts import start_of
from core.kernels import cpu
from core.registry import OpenConfig

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TowerPart(OpenConfig):
    """Base of the configs of one of ``TwoTowers``, with a published layout.

    Attributes:
        pretrained: weights loaded at the first training or test unless a checkpoint provides them; None: random
            initialization.
        start: what experts start as if ``pretrained`` is set, a name of ``core.convert.STARTS`` or a start with
            options.
        moe_blocks: which blocks of this tower have the model's MoE layers, named as there, or "none"; None: those that
            the model says.

    Raises:
        ValueError: a start that is unknown, or reads an argument that no configuration gives.
    """

    sized_by: ClassVar[tuple[str, str, str]]
    """Name of the field with the sizes and ``dense_ffn`` of the blocks, and names of their width and number in it."""
    tower: ClassVar[type[OneTower]]
    """The network."""

    pretrained: str | None = None
    start: str | Start = "copy"
    moe_blocks: str | list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        reads = start_of(self.start).reads
        if reads:
            raise ValueError(f"start={self.start} reads {reads}, which no configuration gives")

    @property
    def dense_ffn(self) -> core.DenseFFN:
        """The FFN of the blocks without experts."""
        return getattr(self, self.sized_by[0]).dense_ffn

    @property
    def width(self) -> int:
        """D, the width of the tokens that reach the MoE layers, and of a vector."""
        return int(getattr(getattr(self, self.sized_by[0]), self.sized_by[1]))

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return int(getattr(getattr(self, self.sized_by[0]), self.sized_by[2]))

    def build(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: Sequence[int]) -> Any:
        """Return the tower.

        Args:
            sizes: of the input.
            ffn: FFN of ``moe_blocks``: MoE layers or another dense FFN; None: the same as in the other blocks.
            moe_blocks: numbers of blocks.

        Raises:
            ValueError: the parts do not fit together.
        """
        return self.tower(self, sizes, ffn, moe_blocks)

    def network(self, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: Sequence[int]) -> Any:
        """Return what computes in the tower, with this FFN in ``moe_blocks``; None: it is dense."""
        raise NotImplementedError

    def blocks(self, moe_blocks: str | Sequence[int]) -> tuple[int, ...]:
        """Return the numbers of this tower's blocks that have the model's MoE layers.

        Args:
            moe_blocks: the model's.

        Raises:
            ValueError: as ``apps.nets.blocks.resolve_blocks``.
        """
        if self.moe_blocks is None:
            return resolve_blocks(moe_blocks, self.depth)
        return resolve_blocks(self.moe_blocks, self.depth, optional=True)


@dataclass(frozen=True)
class ImagePart(TowerPart):
    """Base of the configs of a tower of images."""


@dataclass(frozen=True)
class TextPart(TowerPart):
    """Base of the configs of a tower of texts."""

    def check_length(self, sizes: Sizes, max_positions: int) -> None:
        """Raise a ``ValueError`` if the data's texts may be longer than those that the tower reads."""
        if (most := sizes.max_tokens) > max_positions:
            raise ValueError(f"max_tokens={most} of the data exceeds max_positions={max_positions} of the text tower")


def experts_as(dense: core.DenseFFN, dim: int, ffn: FFNConfig | MoEs | None) -> FFNConfig | MoEs | None:
    """Return MoE layers whose experts, if they are left at their default, have the form of a dense network: its width,
    biases and activation, as ``core.sparsify`` gives them. Others, and a dense FFN, stay as they are.

    Args:
        dense: the network.
        dim: width of its tokens.
        ffn: the MoE layers, or another FFN.
    """
    if not moe_configs(ffn):
        return ffn
    with torch.device("meta"):
        part = read_ffn(dense.build(dim))
    assert part is not None
    moes = [replace(one, expert=part.expert) if one.expert == core.FFN() else one for one in moe_configs(ffn)]
    return moes if isinstance(ffn, Sequence) else moes[0]


class OneTower(nn.Module):
    """Base of the towers of one modality. Experts at their default are as the dense networks of the tower.

    Args:
        part: the config.
        sizes: of the input.
        ffn, moe_blocks: as ``TowerPart.build`` has them.

    Attributes:
        dim: width of a vector.
        moes: the different MoE layers' configs.
        network: the module that computes the vectors.
    """

    ffn_place: ClassVar[str] = "layers.{}.ffn."
    """Names of the tensors of a block's FFN start so."""

    def __init__(self, part: TowerPart, sizes: Sizes, ffn: FFNConfig | MoEs | None, moe_blocks: Sequence[int]) -> None:
        super().__init__()
        self.part, self.sizes, self.dim = part, sizes, part.width
        self.ffn = experts_as(part.dense_ffn, part.width, ffn)
        self.moes, self.moe_blocks = moe_configs(self.ffn), tuple(moe_blocks)
        self.network = part.network(sizes, self.ffn, self.moe_blocks)
        cpu.convert_linear(self)

    def fill(self, dense: Any, source: str) -> Published | None:
        """Give a dense network the published weights.

        Args:
            dense: a network of ``TowerPart.network`` without experts.
            source: the config's ``pretrained``.

        Returns:
            what else they say; None: nothing.

        Raises:
            ValueError: files that are missing or cannot be read, or weights that do not fit.
        """
        raise NotImplementedError

    def set_grad_checkpointing(self, on: bool) -> None:
        """Compute each block again in the backward, to save memory, or not."""
        self.network.grad_checkpointing = on

    @torch.no_grad()
    def load_start(self) -> Published | None:
        """Load the published weights, if the config names any.

        Experts start as the networks that they replace. Another dense FFN, as baselines have, stays as it was
        initialized.

        Returns:
            as ``fill``.

        Raises:
            ValueError: as ``fill``, or experts that cannot start as the published networks.
        """
        source = self.part.pretrained
        if source is None:
            return None
        dense = self.part.network(self.sizes, None, self.moe_blocks)
        published = self.fill(dense, source)
        if self.ffn is not None and not self.moes:
            kept = tuple(self.ffn_place.format(i) for i in self.moe_blocks)
            weights = dense.state_dict() | {n: v for n, v in self.network.state_dict().items() if n.startswith(kept)}
            weights = {n: v for n, v in weights.items() if n in self.network.state_dict()}
            self.network.load_state_dict(weights)
            _logger.info("pretrained %s: the FFNs of blocks %s are randomly initialized", source, list(self.moe_blocks))
            return published
        moe = None if not self.moes else self.moes[0] if len(self.moes) == 1 else list(self.moes)
        begin_as(self.network, dense, moe, self.part.start, seed=int(torch.randint(2**31, ())))
        return published


class ImageTower(OneTower):
    """Base of the towers of images, whose MoE layers are given ``context.modality_BS`` of 0.

    Attributes:
        num_patches: tokens of an image that are patches; they come last among its tokens.
    """

    @property
    def num_patches(self) -> int:
        return int(self.network.num_patches)

    def tokens(self, image: Tensor) -> Tensor:
        """Return the outputs (B, S, D) at the tokens of images (B, C, H, W)."""
        return self.network.tokens(image, self.context(image))

    def forward(self, image: Tensor) -> Tensor:
        """Return the vectors (B, D) of images (B, C, H, W)."""
        return self.network(image, self.context(image))

    def context(self, image: Tensor) -> core.RoutingContext:
        """Return the routers' context of images in addition to positions."""
        shape = (image.shape[0], self.num_patches + self.network.num_prefix_tokens)
        return core.RoutingContext(modality_BS=torch.full(shape, IMAGE, device=image.device, dtype=torch.int64))


class TextTower(OneTower):
    """Base of the towers of texts, whose MoE layers are given padding, ids and ``context.modality_BS`` of 1."""

    def is_real(self, text_BL: Tensor) -> Tensor:
        """Return bool (B, L), False for padding."""
        return self.network.is_real(text_BL)

    def tokens(self, text_BL: Tensor) -> Tensor:
        """Return the outputs (B, L, D) at the tokens of texts, int64 (B, L), and 0 at padding."""
        x_BLD: Tensor = self.network.tokens(text_BL, self.context(text_BL))
        return x_BLD * self.is_real(text_BL)[..., None]

    def forward(self, text_BL: Tensor) -> Tensor:
        """Return the vectors (B, D) of texts, int64 (B, L)."""
        return self.network(text_BL, self.context(text_BL))

    def context(self, text_BL: Tensor) -> core.RoutingContext:
        """Return the routers' context of texts."""
        return core.RoutingContext(
            valid_BS=self.is_real(text_BL), token_ids_BS=text_BL, modality_BS=torch.full_like(text_BL, TEXT)
        )

    def check_vocabulary(self, there: int, source: str) -> None:
        """Raise a ``ValueError`` if published weights have another vocabulary."""
        if there != self.sizes.vocab_size:
            raise ValueError(
                f"pretrained={source} has {there:,} subwords, and the data {self.sizes.vocab_size:,}: give the data "
                "its vocabulary by data.tokenizer.path"
            )
