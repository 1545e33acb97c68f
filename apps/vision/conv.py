"""A small convolutional network for small images and CPUs, whose groups may end in a feed-forward network a position.

A stem and groups of two convolutions, pooled between: nothing else is as good a minute on images of 8 to 64 pixels. As
in airbench (arXiv 2404.00498), convolutions have no bias, each is followed by batch norm and GELU, and the last grid is
pooled by its maximum. An FFN or an MoE layer, with a norm before it, may be added to the positions of a group's output:
there a position is a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import core
from apps.base.checks import check_at_least
from apps.nets import blocks
from apps.nets.blocks import FFNConfig, MoEs, feed, ffns_of, resolve_blocks
from core.fields import Checked, Count


@core.register_config
@dataclass(frozen=True)
class ConvConfig(Checked):
    """The convolutions around the experts.

    Attributes:
        widths: channels of each group; from one group to the next a pool halves height and width.
        stem_stride: pixels between the positions of the first convolution, in both directions; 1 for images below about
            20 pixels.
        hidden_dim: hidden dim F of a dense FFN that stands in place of experts, if no other is given; None: 4 times the
            last width.

    Raises:
        ValueError: a value out of its range, or no group.
    """

    widths: tuple[Count, ...] = (24, 48, 96)
    stem_stride: Literal[1, 2, 4] = 2
    hidden_dim: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths:
            raise ValueError("conv.widths=() has no group: give the channels of one at least")

    @property
    def dim(self) -> int:
        """Channels of the last group."""
        return self.widths[-1]

    @property
    def dense_ffn(self) -> core.DenseFFN:
        return core.DenseFFN(4 * self.dim if self.hidden_dim is None else self.hidden_dim)

    def grid(self, image_size: int, group: int = -1) -> int:
        """Return height and width of a group's output."""
        return image_size // self.stem_stride >> range(len(self.widths))[group]


class ConvNorm(nn.Sequential):
    """Convolution, pool where asked, batch norm, GELU."""

    def __init__(self, in_chans: int, out_chans: int, kernel: int = 3, stride: int = 1, pool: bool = False) -> None:
        padding = (kernel - 1) // 2 if stride == 1 else (kernel - stride) // 2
        conv = nn.Conv2d(in_chans, out_chans, kernel, stride, padding, bias=False)
        pooled = [nn.MaxPool2d(2)] if pool else []
        super().__init__(conv, *pooled, nn.BatchNorm2d(out_chans), nn.GELU())


class PositionFFN(nn.Module):
    """``x + ffn(norm(x))`` at each position of a grid, which is a token of an MoE layer."""

    def __init__(self, ffn: FFNConfig, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = ffn.build(dim)

    def forward(self, x: Tensor, context: core.RoutingContext | None = None) -> Tensor:
        """Map (B, C, H, W) to the same. Token ids are the positions, row by row."""
        tokens_BSD = x.permute(0, 2, 3, 1).flatten(1, 2)
        ids_BS = torch.arange(tokens_BSD.shape[1], device=x.device).expand(x.shape[0], -1)
        context = replace(context or core.RoutingContext(), token_ids_BS=ids_BS)
        y_BSD = feed(self.mlp, self.norm(tokens_BSD), context)
        return x + y_BSD.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Group(nn.Module):
    """Two convolutions, and an FFN a position if the group has one."""

    def __init__(self, in_chans: int, out_chans: int, pool: bool, ffn: FFNConfig | None) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvNorm(in_chans, out_chans, pool=pool), ConvNorm(out_chans, out_chans))
        self.ffn = None if ffn is None else PositionFFN(ffn, out_chans)

    def forward(self, x: Tensor, context: core.RoutingContext | None = None) -> Tensor:
        x = self.convs(x)
        return x if self.ffn is None else self.ffn(x, context)


class ConvNet(nn.Module):
    """A convolutional network with an FFN, dense or sparse, after chosen groups.

    Args:
        conv: the convolutions.
        image_size: height and width of the images in pixels.
        in_chans: channels of an image.
        num_classes: classes; 0 leaves the head out.
        ffn: FFN of ``moe_blocks``: an MoE layer, a list with one for each, or a dense FFN; None: no group has one.
        moe_blocks: which groups; see ``apps.nets.blocks.resolve_blocks``.
        share_experts: all MoE layers have one set of experts; see ``apps.nets.blocks.share_experts``.

    Raises:
        ValueError: a combination that cannot be built.

    Example::

        model = ConvNet(ConvConfig(), image_size=28, in_chans=1, num_classes=10)
        logits = model(torch.randn(2, 1, 28, 28))          # (2, 10)
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        conv: ConvConfig,
        *,
        image_size: int,
        in_chans: int,
        num_classes: int,
        ffn: FFNConfig | MoEs | None = None,
        moe_blocks: str | Sequence[int] = (-1,),
        share_experts: bool = False,
    ) -> None:
        super().__init__()
        check_at_least(1, image_size=image_size, in_chans=in_chans)
        check_at_least(0, num_classes=num_classes)
        if conv.grid(image_size) < 1:
            least = conv.stem_stride << len(conv.widths) - 1
            raise ValueError(f"image_size={image_size} is too small for conv, whose groups need {least} pixels")
        if share_experts and len(set(conv.widths)) > 1:
            raise ValueError(f"share_experts=True needs groups of one width, not conv.widths={list(conv.widths)}")
        self.conv, self.num_classes, self.shares_experts = conv, num_classes, share_experts
        self.moe_blocks = () if ffn is None else resolve_blocks(moe_blocks, len(conv.widths))
        own = dict(zip(self.moe_blocks, ffns_of(ffn, self.moe_blocks)[0], strict=True))
        for group, config in own.items():
            if isinstance(config, core.MoEConfig) and isinstance(config.expert, core.Convolution):
                config.expert.rows_per_sequence(conv.grid(image_size, group) ** 2)
        strided = conv.stem_stride > 1
        self.stem = ConvNorm(in_chans, conv.widths[0], 2 * conv.stem_stride if strided else 3, conv.stem_stride)
        before = (conv.widths[0], *conv.widths)
        self.groups = nn.ModuleList(
            Group(before[i], width, pool=i > 0, ffn=own.get(i)) for i, width in enumerate(conv.widths)
        )
        self.norm = nn.LayerNorm(conv.dim) if own else nn.Identity()
        self.head = nn.Linear(conv.dim, num_classes) if num_classes else nn.Identity()
        self.grad_checkpointing = False
        if share_experts:
            blocks.share_experts(self, ffn)
        # oneDNN's convolutions are about twice as fast so.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch lacks the type of this form

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the groups in the backward, or not."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor, context: core.RoutingContext | None = None) -> Tensor:
        """Map (B, C, H, W) images to (B, num_classes) logits; ``context`` as in ``forward_features``."""
        return self.forward_head(self.forward_features(x, context))

    def forward_features(self, x: Tensor, context: core.RoutingContext | None = None) -> Tensor:
        """Map (B, C, H, W) images to the last grid, (B, D, h, w); routers read ``context``."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for group in self.groups:
            if self.grad_checkpointing and self.training:
                x = checkpoint(group, x, context, use_reentrant=False)
            else:
                x = group(x, context)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map a grid to logits (B, num_classes), or with ``pre_logits`` to what the head reads, (B, D)."""
        pooled = self.norm(x.amax((2, 3)))
        return pooled if pre_logits else self.head(pooled)
