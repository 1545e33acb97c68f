"""V-MoE on timm: a VisionTransformer in which the FFN of chosen blocks is a mixture of experts.

Riquelme et al., "Scaling Vision with Sparse Mixture of Experts" (2106.05974), section 2. timm does the patches, the
attention, the position embeddings and the pretrained weights; ``core`` does the routing and the experts. Dense is the
same class, whose chosen blocks have another FFN: a comparison changes nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from timm.layers import HybridEmbed, Mlp, PatchEmbed, get_act_layer
from timm.layers.patch_dropout import patch_dropout_forward
from timm.models import checkpoint
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

import core
from apps.base.checks import check_at_least
from apps.nets import blocks
from apps.nets.blocks import FFNConfig, MoEs, feed, ffn_configs, moe_configs, resolve_blocks
from apps.nets.depths import DepthGate, MixtureOfDepths, depth_gates
from core.fields import Checked, Count, CountOrZero, Depth, Positive, ShareBelowOne
from core.kernels import cpu

# embed_dim, depth, num_heads. Ti/S/B/L are timm's; nano is ours, for images of about 28x28 on a CPU.
VARIANTS: Mapping[str, tuple[int, int, int]] = {
    "nano": (96, 6, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


@dataclass(frozen=True)  # jsonargparse nests plain dataclasses only
class VariantSizes(Checked):
    """The sizes of a config whose ``variant`` gives those that it leaves at None: ``variants`` has embed_dim, depth and
    num_heads of each."""

    if TYPE_CHECKING:  # jsonargparse would look these names up in the module of each subclass
        variants: ClassVar[Mapping[str, tuple[int, int, int]]]
        variant: str
        embed_dim: int | None
        depth: int | None
        num_heads: int | None
        hidden_dim: int | None

    @property
    def dim(self) -> int:
        """Model dim D, the variant's unless ``embed_dim`` is set."""
        return self.variants[self.variant][0] if self.embed_dim is None else self.embed_dim

    @property
    def num_blocks(self) -> int:
        """Number of blocks, the variant's unless ``depth`` is set."""
        return self.variants[self.variant][1] if self.depth is None else self.depth

    @property
    def heads(self) -> int:
        """Number of attention heads, the variant's unless ``num_heads`` is set."""
        return self.variants[self.variant][2] if self.num_heads is None else self.num_heads

    @property
    def dense_hidden_dim(self) -> int:
        """Hidden dim F of the dense FFNs, 4 * D unless ``hidden_dim`` is set."""
        return 4 * self.dim if self.hidden_dim is None else self.hidden_dim


@core.register_config
@dataclass(frozen=True)
class ViTConfig(VariantSizes):
    """The transformer around the experts. A field left at None takes the variant's value."""

    variants = VARIANTS

    variant: Literal["nano", "tiny", "small", "base", "large"] = "nano"
    """Size: embed_dim / depth / num_heads of 96/6/3, 192/12/3, 384/12/6, 768/12/12, 1024/24/16."""
    patch_size: Count = 4
    """Height and width of a patch in pixels; must divide the image's."""
    stem: Literal["patches", "convolutions"] = "patches"
    """How pixels become tokens: one linear map of each patch, or a convolution for each halving of the image, which
    learns small images sooner (arXiv 2106.14881)."""
    embed_dim: Count | None = None
    """Model dim D."""
    depth: Depth | None = None
    """Number of blocks."""
    num_heads: Count | None = None
    """Attention heads; must divide ``embed_dim``."""
    hidden_dim: Count | None = None
    """FFN hidden dim F of the dense blocks; None: 4 * embed_dim."""
    pool: Literal["token", "avg"] = "token"
    """What the head reads: the class token, or the mean of the patches."""
    class_token: bool | None = None
    """Prepend a class token; None: only where ``pool`` reads it."""
    reg_tokens: CountOrZero = 0
    """Register tokens."""
    no_embed_class: bool = False
    """Give class and register tokens no position embedding."""
    qkv_bias: bool = True
    """Bias of the query, key and value projections."""
    qk_norm: bool = False
    """Normalize queries and keys."""
    init_values: float | None = None
    """Initial scale of LayerScale; None leaves LayerScale out."""
    drop_path: ShareBelowOne = 0.0
    """Stochastic depth rate of the last block; it grows linearly from 0."""
    drop: ShareBelowOne = 0.0
    """Dropout before the head."""
    pos_drop: ShareBelowOne = 0.0
    """Dropout after the position embedding."""
    patch_drop: ShareBelowOne = 0.0
    """Share of the patches left out in training."""
    proj_drop: ShareBelowOne = 0.0
    """Dropout after the attention projection and in the dense FFNs; experts have none."""
    attn_drop: ShareBelowOne = 0.0
    """Dropout of the attention weights."""
    fused_attn: bool | None = None
    """Use torch's fused attention; None: timm's choice. With False its products are explicit: on a CPU a training step
    at 50 tokens was then 1.7 times as fast in bfloat16 (1.0 in float32), and 1.2 times at 16 tokens in float32."""
    weight_init: Literal["", "jax", "moco"] = ""
    """timm's scheme of initial weights."""
    pos_embed_std: Positive = 0.02
    """Standard deviation of the initial position embedding. timm's 0.02 is faint next to the patches of small images:
    in 12 epochs on digits 0.02 came to 90.5 % test top-1, 0.2 to 97.8 and 0.5 to 98.1 (mean of seeds 0 and 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.heads:
            raise ValueError(f"embed_dim={self.dim} is not divisible by num_heads={self.heads}")
        if self.pool == "token" and self.class_token is False:
            raise ValueError("pool='token' needs class_token=True")
        if self.stem == "convolutions" and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise ValueError(f"patch_size={self.patch_size} with stem='convolutions', which halve: a power of 2 fits")

    def embed_layer(self, img_size: int, in_chans: int, **options: Any) -> nn.Module:
        """Return timm's layer that turns images into tokens; ``options`` as timm hands them over."""
        if self.stem == "patches":
            return PatchEmbed(img_size, in_chans=in_chans, **options)
        halvings = self.patch_size.bit_length() - 1
        stem = ConvStem(in_chans, halvings, self.dim, stride=(2,) * halvings)
        return HybridEmbed(stem, img_size, in_chans=in_chans, proj=False, **{**options, "patch_size": 1})

    @property
    def dense_ffn(self) -> core.DenseFFN:
        return core.DenseFFN(self.dense_hidden_dim, dropout=self.proj_drop)

    @property
    def has_class_token(self) -> bool:
        return self.pool == "token" if self.class_token is None else self.class_token


class MoEBlock(Block):
    """timm's pre-norm block, whose ``mlp`` may be an MoE layer, which gets the routing context.

    Attributes:
        depth_gate: chooses the tokens that enter the block; None: all of them do.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.depth_gate: DepthGate | None = None

    def forward(self, x: Tensor, context: core.RoutingContext | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D). Without a context, token ids are the positions in ``x``."""
        if self.depth_gate is None:
            return self._whole(x, context)
        context = core.RoutingContext(token_ids_BS=_positions(x)) if context is None else context
        return self.depth_gate.enter(x, context, lambda x_BCD, entered: self._whole(x_BCD, entered.context))

    def _whole(self, x: Tensor, context: core.RoutingContext | None) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        h = self.norm2(x)
        h = feed(self.mlp, h, core.RoutingContext(token_ids_BS=_positions(h)) if context is None else context)
        return x + self.drop_path2(self.ls2(h))


def _positions(x: Tensor) -> Tensor:
    """Return the position of each token of ``x`` (B, S, D), int64 (B, S)."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)


def build_ffn(ffn: FFNConfig, dim: int) -> nn.Module:
    """Return an MoE layer, or timm's FFN, whose parameters have the names of published weights.

    Raises:
        ValueError: a gated dense FFN, which timm's blocks do not have.
    """
    if isinstance(ffn, core.MoEConfig):
        return ffn.build(dim)
    if ffn.gated:
        raise ValueError("dense_ffn.gated=True does not fit a vision transformer, whose dense FFNs have no gate")
    act = get_act_layer(ffn.activation)
    return Mlp(dim, ffn.hidden(dim), act_layer=act, bias=ffn.bias, drop=ffn.dropout)


def _check_grid(ffn: FFNConfig, vit: ViTConfig, image_size: int, *, enters_all: bool) -> None:
    """Reject convolution experts of a block whose tokens are not a whole image.

    Args:
        ffn: FFN of the block.
        vit: the transformer.
        image_size: height and width of the images in pixels.
        enters_all: whether all tokens enter the block.

    Raises:
        ValueError: naming what does not go together.
    """
    if not (isinstance(ffn, core.MoEConfig) and isinstance(ffn.expert, core.Convolution)):
        return
    given, prefix = ffn.expert.prefix_tokens, vit.has_class_token + vit.reg_tokens
    if given != prefix:
        raise ValueError(f"prefix_tokens={given} of Convolution is not {prefix}, the class and register tokens of vit")
    if vit.patch_drop:
        raise ValueError(f"vit.patch_drop={vit.patch_drop} with Convolution, which needs all patches of an image")
    if not enters_all:
        raise ValueError("depth_blocks names a block with Convolution experts, which need all patches of an image")
    ffn.expert.rows_per_sequence(prefix + (image_size // vit.patch_size) ** 2)


class VMoE(VisionTransformer):
    """timm's VisionTransformer with MoE layers in chosen blocks.

    Args:
        vit: the transformer.
        image_size: height and width of the images in pixels.
        in_chans: channels of an image.
        num_classes: classes; 0 leaves the head out.
        ffn: FFN of ``moe_blocks``: an MoE layer, a list with one for each block, or another dense FFN; None: the same
            as in the other blocks.
        moe_blocks: which blocks; see ``apps.nets.blocks.resolve_blocks``. "last2" is V-MoE's Last-2.
        depths: gates of the blocks that few tokens enter; None: all tokens enter all blocks.
        depth_blocks: which blocks those are.
        share_experts: all MoE layers have one set of experts; see ``apps.nets.blocks.share_experts``.

    Token ids in the context are positions in the full sequence: prefix tokens first, then the patches row by row.

    Raises:
        ValueError: a combination that cannot be built.

    Example::

        model = VMoE(ViTConfig(variant="small", patch_size=32), image_size=224, in_chans=3, num_classes=1000,
                     ffn=core.MoEConfig(num_experts=8), moe_blocks="last2")
        logits = model(torch.randn(2, 3, 224, 224))          # (2, 1000)
    """

    def __init__(
        self,
        vit: ViTConfig,
        *,
        image_size: int,
        in_chans: int,
        num_classes: int,
        ffn: FFNConfig | MoEs | None = None,
        moe_blocks: str | Sequence[int] = "last2",
        depths: MixtureOfDepths | None = None,
        depth_blocks: str | Sequence[int] = "every2",
        share_experts: bool = False,
    ) -> None:
        if depths is not None and depths.predictor:
            raise ValueError("depths.predictor=True is for causal decoders: a vision transformer sees whole images")
        check_at_least(1, image_size=image_size, in_chans=in_chans)
        check_at_least(0, num_classes=num_classes)
        if image_size % vit.patch_size:
            raise ValueError(f"image_size={image_size} is not divisible by patch_size={vit.patch_size}")
        sparse = () if ffn is None else resolve_blocks(moe_blocks, vit.num_blocks)
        configs = ffn_configs(vit.dense_ffn, vit.num_blocks, ffn, sparse)
        gates = depth_gates(depths, depth_blocks, vit.num_blocks, vit.dim)
        for config, gate in zip(configs, gates, strict=True):
            _check_grid(config, vit, image_size, enters_all=gate is None)

        def block_fn(*, mlp_layer: Any, depth: int, **kwargs: Any) -> MoEBlock:
            # timm hands every block the same FFN and mlp_ratio; each block's own is bound here instead.
            return MoEBlock(
                mlp_layer=lambda in_features, **_: build_ffn(configs[depth], in_features), depth=depth, **kwargs
            )

        super().__init__(
            img_size=image_size,
            patch_size=vit.patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=vit.pool,
            embed_dim=vit.dim,
            depth=vit.num_blocks,
            num_heads=vit.heads,
            qkv_bias=vit.qkv_bias,
            qk_norm=vit.qk_norm,
            init_values=vit.init_values,
            class_token=vit.has_class_token,
            no_embed_class=vit.no_embed_class,
            reg_tokens=vit.reg_tokens,
            drop_rate=vit.drop,
            pos_drop_rate=vit.pos_drop,
            patch_drop_rate=vit.patch_drop,
            proj_drop_rate=vit.proj_drop,
            attn_drop_rate=vit.attn_drop,
            drop_path_rate=vit.drop_path,
            weight_init=vit.weight_init,
            embed_layer=vit.embed_layer,
            block_fn=block_fn,
        )
        if vit.fused_attn is not None:
            for block in self.blocks:
                block.attn.fused_attn = vit.fused_attn
        for block, gate in zip(self.blocks, gates, strict=True):
            block.depth_gate = gate
        self.shares_experts = share_experts
        if share_experts:
            blocks.share_experts(self, ffn)
        cpu.convert_linear(self)
        self.vit = vit
        self.moes = moe_configs(ffn)
        self.moe_blocks = sparse
        self._scale_pos_embed()

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Apply timm's scheme to the whole model, and give each expert the distribution of a dense FFN.

        With ``nn.Linear``'s default an expert would start at about twice the scale of the FFN it replaces (D = 192).
        """
        super().init_weights(mode, needs_reset)
        if "vit" in self.__dict__:  # not yet while timm's constructor runs
            self._scale_pos_embed()
        mode = mode or self.weight_init_mode
        if mode == "reset":
            return
        fill = nn.init.xavier_uniform_ if mode else partial(nn.init.trunc_normal_, std=0.02)
        for module in self.modules():
            if isinstance(module, core.Experts):
                module.init_each(fill)

    @torch.no_grad()
    def _scale_pos_embed(self) -> None:
        if self.pos_embed is not None:
            self.pos_embed.mul_(self.vit.pos_embed_std / 0.02)  # timm's own deviation is 0.02

    def forward(self, x: Tensor, context: core.RoutingContext | None = None) -> Tensor:
        """Map (B, C, H, W) images to (B, num_classes) logits; ``context`` as in ``forward_features``."""
        return self.forward_head(self.forward_features(x, context))

    def forward_features(self, x: Tensor, context: core.RoutingContext | None = None) -> Tensor:
        """Map (B, C, H, W) images to (B, S, D) normalized tokens.

        Args:
            x: images.
            context: facts about the images, such as ``task_ids_B`` and ``domain_ids_B``; positions are filled in.
        """
        x = self._pos_embed(self.patch_embed(x))
        ids_BS = _positions(x)
        if self.training and not isinstance(self.patch_drop, nn.Identity):
            num_prefix = self.num_prefix_tokens
            x, kept = patch_dropout_forward(x, self.patch_drop.prob, num_prefix, self.patch_drop.ordered, True)
            if kept is not None:
                ids_BS = torch.cat((ids_BS[:, :num_prefix], ids_BS[:, num_prefix:].gather(1, kept)), dim=1)
        context = replace(context or core.RoutingContext(), token_ids_BS=ids_BS)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = checkpoint(block, x, context) if self.grad_checkpointing and self.training else block(x, context)
        return self.norm(x)
