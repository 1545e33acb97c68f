"""A diffusion transformer (DiT, arXiv 2212.09748) on timm's parts, whose FFNs may be mixtures of experts.

DiT-MoE (arXiv 2407.11633) has experts in every block, shared and routed ones. Class and noise level come in by
adaLN-Zero: they scale and shift the normed tokens, which the routers read too, and scale what each branch adds, from 0
at the start. As ids, they are also in the routers' context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention, PatchEmbed, build_sincos2d_pos_embed
from torch import Tensor, nn

import core
from apps.nets.blocks import FFNConfig, MoEs, feed, ffn_configs, resolve_blocks
from apps.vision.generation.diffusion import bands
from apps.vision.model import VariantSizes, build_ffn
from core.fields import Count, Depth
from core.kernels import cpu

# embed_dim, depth, num_heads. S/B/L/XL are DiT's; nano is ours, for images of about 28x28 on a CPU.
VARIANTS = {
    "nano": (128, 6, 4),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "xlarge": (1152, 28, 16),
}
_FREQUENCIES = 128


@core.register_config
@dataclass(frozen=True)
class DiTConfig(VariantSizes):
    """The transformer around the experts. A field left at None takes the variant's value."""

    prefix = "dit."
    variants = VARIANTS

    variant: Literal["nano", "small", "base", "large", "xlarge"] = "nano"
    """Size: embed_dim / depth / num_heads of 128/6/4, 384/12/6, 768/12/12, 1024/24/16, 1152/28/16."""
    patch_size: Count = 2
    """Height and width of a patch, in pixels or in places of a latent; must divide the image's."""
    embed_dim: Count | None = None
    """Model dim D, a multiple of 4."""
    depth: Depth | None = None
    """Number of blocks."""
    num_heads: Count | None = None
    """Attention heads; must divide ``embed_dim``."""
    hidden_dim: Count | None = None
    """FFN hidden dim F of the dense blocks; None: 4 * embed_dim."""
    fused_attn: bool | None = None
    """Use torch's fused attention; None: timm's choice. In bfloat16 on a CPU a step of 128 images of 49 tokens
    took 0.70 s with it and 0.41 s without."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.heads:
            raise ValueError(f"dit.embed_dim={self.dim} is not divisible by num_heads={self.heads}")
        if self.dim % 4:
            raise ValueError(f"dit.embed_dim={self.dim} is not divisible by 4, as sine positions in two axes need")

    @property
    def dense_ffn(self) -> core.DenseFFN:
        """FFN of the dense blocks."""
        return core.DenseFFN(self.dense_hidden_dim)


class LevelEmbedding(nn.Module):
    """Map noise levels (B,) to vectors (B, D), by sines of many frequencies and an MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, level_B: Tensor) -> Tensor:
        rate = torch.arange(_FREQUENCIES, device=level_B.device, dtype=torch.float32) / _FREQUENCIES
        # DiT's frequencies, for its 1,000 steps
        angle = 1000 * level_B.float()[:, None] * torch.exp(-math.log(10000) * rate)
        return self.mlp(torch.cat((angle.cos(), angle.sin()), -1).to(level_B.dtype))  # type: ignore[no-any-return]


def _modulated(x: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    return x * (1 + scale_BD[:, None]) + shift_BD[:, None]


class DiTBlock(nn.Module):
    """Attention and an FFN, or experts, between modulations by the condition (adaLN-Zero)."""

    def __init__(self, dim: int, num_heads: int, ffn: FFNConfig) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, dim, elementwise_affine=False, eps=1e-6)
        self.norm1, self.norm2 = norm(), norm()
        self.attn = Attention(dim, num_heads=num_heads, qkv_bias=True)
        self.mlp = build_ffn(ffn, dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, condition_BD: Tensor, context: core.RoutingContext) -> Tensor:
        """Map tokens (B, S, D) to tokens, given the condition of each image, (B, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition_BD)).chunk(6, -1)
        x = x + gate1[:, None] * self.attn(_modulated(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * feed(self.mlp, _modulated(self.norm2(x), shift2, scale2), context)


class DiT(nn.Module):
    """A diffusion transformer with MoE layers in chosen blocks.

    Args:
        dit: the transformer.
        size: height and width of what it draws, an image or a latent.
        in_chans: its channels C.
        num_classes: classes; the number after the last stands for no class.
        ffn: FFN of ``moe_blocks``: an MoE layer, a list with one for each block, or another dense FFN; None: the same
            as in the other blocks.
        moe_blocks: which blocks; see ``apps.nets.blocks.resolve_blocks``.

    Routers get the positions of the patches as ``token_ids_BS``, the band of the noise level as ``task_ids_B`` and the
    class as ``domain_ids_B``.

    Raises:
        ValueError: a combination that cannot be built.
    """

    num_prefix_tokens = 0  # as timm's transformers say it

    def __init__(
        self,
        dit: DiTConfig,
        *,
        size: int,
        in_chans: int,
        num_classes: int,
        ffn: FFNConfig | MoEs | None = None,
        moe_blocks: str | Sequence[int] = "every2",
    ) -> None:
        super().__init__()
        if size % dit.patch_size:
            raise ValueError(f"dit.patch_size={dit.patch_size} does not divide {size}, the height and width to draw")
        self.dit, self.num_classes, self.out_chans = dit, num_classes, in_chans
        self.moe_blocks = () if ffn is None else resolve_blocks(moe_blocks, dit.num_blocks)
        self.patch_embed = PatchEmbed(size, dit.patch_size, in_chans, dit.dim)
        places_SD = build_sincos2d_pos_embed(
            list(self.patch_embed.grid_size), dit.dim, device=self.patch_embed.proj.weight.device
        )
        self.register_buffer("pos_embed", places_SD, persistent=False)
        self.level_embed = LevelEmbedding(dit.dim)
        self.class_embed = nn.Embedding(num_classes + 1, dit.dim)
        configs = ffn_configs(dit.dense_ffn, dit.num_blocks, ffn, self.moe_blocks)
        self.blocks = nn.ModuleList(DiTBlock(dit.dim, dit.heads, config) for config in configs)
        self.norm = nn.LayerNorm(dit.dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dit.dim, 2 * dit.dim)
        self.head = nn.Linear(dit.dim, dit.patch_size**2 * in_chans)
        if dit.fused_attn is not None:
            for part in self.modules():
                if isinstance(part, Attention):
                    part.fused_attn = dit.fused_attn
        self.reset_parameters()
        cpu.convert_linear(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights as DiT does; an expert gets those of a dense FFN."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, core.Experts):
                module.init_each(nn.init.xavier_uniform_)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.class_embed.weight, std=0.02)
        for layer in self.level_embed.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        zero = ("modulation", "head")  # each block adds nothing at first, and the prediction is 0
        for name, module in self.named_modules():
            if name.endswith(zero) and isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)

    def forward(self, image: Tensor, level: Tensor, label: Tensor) -> Tensor:
        """Map noisy images (B, C, H, W), noise levels (B,) and classes (B,) to predictions (B, C, H, W)."""
        x = self.patch_embed(image) + self.pos_embed
        condition_BD = self.level_embed(level) + self.class_embed(label)
        places_BS = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        context = core.RoutingContext(token_ids_BS=places_BS, task_ids_B=bands(level), domain_ids_B=label)
        for block in self.blocks:
            x = block(x, condition_BD, context)
        shift_BD, scale_BD = self.modulation(F.silu(condition_BD)).chunk(2, -1)
        x = self.head(_modulated(self.norm(x), shift_BD, scale_BD))
        (rows, columns), size = self.patch_embed.grid_size, self.dit.patch_size
        return x.unflatten(1, (rows, columns)).unflatten(-1, (size, size, -1)).permute(0, 5, 1, 3, 2, 4).reshape(
            -1, self.out_chans, rows * size, columns * size
        )  # fmt: skip
