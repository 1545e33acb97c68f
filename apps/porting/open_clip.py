"""CLIP's two towers as open_clip publishes them (arXiv 2103.00020, 2212.07143), for use and for training.

A folder holds ``open_clip_config.json`` and ``open_clip_model.safetensors``. The towers are vision and text
transformers of one layout, in which the feed-forward networks of chosen layers may be mixtures of experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

import core
from apps.nets.blocks import FFNConfig, MoEs
from apps.porting import files
from apps.porting.encoder import EncoderTower, TextEncoder, init_encoder
from core.fields import Bounds, Checked, Count

CONFIG, WEIGHTS, TORCH_WEIGHTS = (
    "open_clip_config.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_EPS = 1e-5


@core.register_config
@dataclass(frozen=True)
class ClipConfig(Checked):
    """The sizes of one tower of CLIP; the defaults are as in ViT-B.

    Attributes:
        dim: D.
        depth: number of layers.
        num_heads: heads of the attention; must divide ``dim``.
        hidden_dim: F of the dense feed-forward networks; None: 4 * dim.
        activation: "gelu", or "quick_gelu" (OpenAI's weights, and those trained on from them).

    Raises:
        ValueError: a value out of its range.
    """

    dim: Count = 768
    depth: Count = 12
    num_heads: Count = 12
    hidden_dim: Count | None = None
    activation: str = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} is not divisible by num_heads={self.num_heads}")
        _ = self.dense_ffn  # checks the width and the activation

    @property
    def dense_ffn(self) -> core.DenseFFN:
        """The feed-forward network of a dense layer."""
        return core.DenseFFN(4 * self.dim if self.hidden_dim is None else self.hidden_dim, self.activation)


@core.register_config
@dataclass(frozen=True)
class ClipImageConfig(ClipConfig):
    """The sizes of CLIP's image tower.

    Attributes:
        patch_size: height and width of a patch in pixels; must divide the image's.
    """

    patch_size: Count = 32


@core.register_config
@dataclass(frozen=True)
class ClipTextConfig(ClipConfig):
    """The sizes of CLIP's text tower.

    Attributes:
        max_positions: largest number of tokens of a text, start and end among them.
    """

    dim: Count = 512
    num_heads: Count = 8
    max_positions: Annotated[int, Bounds(2)] = 77


class ClipTower(EncoderTower):
    """The common parts of both towers: layers that read normalized inputs, and a projection of the token that is read.

    Args:
        config: the sizes.
        out_dim: numbers of a vector; None: it is left at the width of the tokens, without a projection.
        causal: a token sees no later one.
        ffn, moe_blocks: as in ``EncoderTower``.
    """

    def __init__(
        self,
        config: ClipConfig,
        out_dim: int | None,
        causal: bool,
        ffn: FFNConfig | MoEs | None,
        moe_blocks: str | Sequence[int],
    ) -> None:
        super().__init__(config, ffn, moe_blocks)
        self.out_dim = config.dim if out_dim is None else out_dim
        self.layers = self.build_layers(_EPS, norm_first=True, causal=causal)
        self.norm = nn.LayerNorm(config.dim, _EPS)
        self.projection = nn.Identity() if out_dim is None else nn.Linear(config.dim, out_dim, bias=False)


class ClipImageTower(ClipTower):
    """CLIP's vision transformer: a class token and patches, normalized before the first layer.

    Args:
        config: the sizes.
        image_size: height and width of the images in pixels.
        out_dim: as in ``ClipTower``.
        in_chans: channels of an image.
        ffn, moe_blocks: as in ``ClipTower``.

    Raises:
        ValueError: a combination that cannot be built.
    """

    def __init__(
        self,
        config: ClipImageConfig,
        image_size: int,
        out_dim: int | None,
        in_chans: int = 3,
        ffn: FFNConfig | MoEs | None = None,
        moe_blocks: str | Sequence[int] = "every2",
    ) -> None:
        super().__init__(config, out_dim, False, ffn, moe_blocks)
        if image_size % config.patch_size:
            raise ValueError(f"image_size={image_size} is not divisible by patch_size={config.patch_size}")
        self.image_size = image_size
        self.patches = nn.Conv2d(in_chans, config.dim, config.patch_size, config.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.randn(config.dim) * config.dim**-0.5)
        self.num_patches, self.num_prefix_tokens = (image_size // config.patch_size) ** 2, 1
        self.places = nn.Embedding(1 + self.num_patches, config.dim)
        self.norm_before = nn.LayerNorm(config.dim, _EPS)
        init_encoder(self)

    def tokens(self, image: Tensor, context: core.RoutingContext | None = None) -> Tensor:
        """Return the normalized outputs (B, S, D) of the last layer, the class token first.

        Args:
            image: float (B, C, H, W).
            context: for the MoE layers; positions are filled in.
        """
        patches_BSD = self.patches(image).flatten(2).transpose(1, 2)
        first_B1D = self.class_token.expand(image.shape[0], 1, -1)
        x_BSD = self.norm_before(torch.cat((first_B1D, patches_BSD), 1) + self.places.weight)
        ids_BS = torch.arange(x_BSD.shape[1], device=image.device).expand(image.shape[0], -1)
        context = replace(context or core.RoutingContext(), token_ids_BS=ids_BS)
        return self.norm(self.through(x_BSD, None, context))

    def forward(self, image: Tensor, context: core.RoutingContext | None = None) -> Tensor:
        """Return the vectors (B, out_dim) of images; arguments as in ``tokens``."""
        return self.projection(self.tokens(image, context)[:, 0])


class ClipTextTower(ClipTower, TextEncoder):
    """CLIP's text transformer, which is causal and reads a text's vector at its end.

    The end is the piece of the largest id, so that padding may have any other.

    Args:
        config: the sizes.
        vocab_size: number of tokens.
        out_dim: as in ``ClipTower``.
        ffn, moe_blocks: as in ``ClipTower``.

    Raises:
        ValueError: a combination that cannot be built.
    """

    def __init__(
        self,
        config: ClipTextConfig,
        vocab_size: int,
        out_dim: int | None,
        ffn: FFNConfig | MoEs | None = None,
        moe_blocks: str | Sequence[int] = "every2",
    ) -> None:
        super().__init__(config, out_dim, True, ffn, moe_blocks)
        self.words = nn.Embedding(vocab_size, config.dim)
        self.places = nn.Embedding(config.max_positions, config.dim)
        init_encoder(self)

    def is_real(self, ids_BL: Tensor) -> Tensor:
        """Return bool (B, L), True up to each text's end."""
        place_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        return place_L <= ids_BL.argmax(1, keepdim=True)

    def tokens(self, ids_BL: Tensor, context: core.RoutingContext | None = None) -> Tensor:
        """Return the normalized outputs (B, L, D) of the last layer.

        Args:
            ids_BL: int64, token ids.
            context: for the MoE layers; None: they know padding and ids.

        Raises:
            ValueError: a text is longer than ``max_positions``.
        """
        context = self.known(ids_BL, context)
        x_BLD = self.words(ids_BL) + self.places(torch.arange(ids_BL.shape[1], device=ids_BL.device))
        return self.norm(self.through(x_BLD, None, context))

    def forward(self, ids_BL: Tensor, context: core.RoutingContext | None = None) -> Tensor:
        """Return the vectors (B, out_dim) of texts; arguments as in ``tokens``."""
        end_B = ids_BL.argmax(1)
        rows_B = torch.arange(ids_BL.shape[0], device=ids_BL.device)
        return self.projection(self.tokens(ids_BL, context)[rows_B, end_B])


@dataclass(frozen=True)
class Clip:
    """The contents of an open_clip folder for its two towers.

    Attributes:
        folder: the folder.
        image, text: the sizes of the towers.
        out_dim: numbers of a vector.
        image_size: height and width of the images in pixels.
        vocab_size: number of tokens.
        mean, std: constants of the three channels, pixels in [0, 1].
    """

    folder: Path
    image: ClipImageConfig
    text: ClipTextConfig
    out_dim: int
    image_size: int
    vocab_size: int
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def of(cls, folder: str | Path) -> Clip:
        """Read ``open_clip_config.json``.

        Raises:
            ValueError: it is missing, cannot be read, or has an option that these towers lack.
        """
        folder = Path(folder).expanduser()
        path = folder / CONFIG
        whole = files.read_json(path)
        model = whole.get("model_cfg", whole)
        try:
            vision, text = _known(model["vision_cfg"], _VISION, path), _known(model["text_cfg"], _TEXT, path)
            _known(model, _MODEL, path)
            activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
            width, text_width = int(vision["width"]), int(text["width"])
            image = ClipImageConfig(
                width,
                int(vision["layers"]),
                width // int(vision["head_width"]),
                _hidden(width, vision["mlp_ratio"]),
                activation,
                patch_size=int(vision["patch_size"]),
            )
            texts = ClipTextConfig(
                text_width,
                int(text["layers"]),
                int(text["heads"]),
                _hidden(text_width, text["mlp_ratio"]),
                activation,
                max_positions=int(text["context_length"]),
            )
            sizes = int(model["embed_dim"]), int(vision["image_size"]), int(text["vocab_size"])
        except KeyError as error:
            raise ValueError(f"{path} says no {error.args[0]}") from None
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{path} is of no CLIP of two transformers: {error!r}") from error
        pixels = whole.get("preprocess_cfg") or {}
        mean, std = (tuple(map(float, pixels.get(name) or getattr(cls, name))) for name in ("mean", "std"))
        return cls(folder, image, texts, *sizes, mean, std)

    def weights(self) -> ClipWeights:
        """Read the tensors of both towers, in float32.

        Raises:
            ValueError: a file is missing or cannot be read, a tensor is missing, or one has no place here.
        """
        tensors = files.Tensors(self.folder, WEIGHTS, TORCH_WEIGHTS)
        rest = {name: tensors[name].float() for name in tensors if not name.endswith("attn_mask")}
        beside = "" if "token_embedding.weight" in rest else "text."
        try:
            image = {
                "class_token": rest.pop("visual.class_embedding"),
                "places.weight": rest.pop("visual.positional_embedding"),
                "patches.weight": rest.pop("visual.conv1.weight"),
                "projection.weight": rest.pop("visual.proj").t(),
                **_norm(rest, "norm_before", "visual.ln_pre"),
                **_norm(rest, "norm", "visual.ln_post"),
                **_layers(rest, "visual.", self.image.depth),
            }
            text = {
                "words.weight": rest.pop(f"{beside}token_embedding.weight"),
                "places.weight": rest.pop(f"{beside}positional_embedding"),
                "projection.weight": rest.pop(f"{beside}text_projection").t(),
                **_norm(rest, "norm", f"{beside}ln_final"),
                **_layers(rest, beside, self.text.depth),
            }
            scale = float(rest.pop("logit_scale"))
        except KeyError as error:
            raise ValueError(f"{self.folder} lacks the tensor {error.args[0]!r}") from None
        bias = rest.pop("logit_bias", None)
        if rest:
            raise ValueError(f"{self.folder} has the tensor {next(iter(rest))!r}, which has no place in these towers")
        return ClipWeights(image, text, scale, None if bias is None else float(bias))


@dataclass(frozen=True)
class ClipWeights:
    """The tensors of CLIP's towers.

    Attributes:
        image, text: those of a dense ``ClipImageTower`` and a dense ``ClipTextTower``, by their parameters' names.
        log_scale: logarithm of the scale of the similarities.
        bias: added to the scaled similarities, in models of the sigmoid loss; None: there is none.
    """

    image: dict[str, Tensor]
    text: dict[str, Tensor]
    log_scale: float
    bias: float | None


def resampled(places_SD: Tensor, num_tokens: int) -> Tensor:
    """Return the position embeddings of an image tower for another number of patches, resampled as timm does.

    Args:
        places_SD: the positions of the class token and of a square of patches.
        num_tokens: number of tokens wanted, the class token among them.
    """
    if len(places_SD) == num_tokens:
        return places_SD
    from timm.layers import resample_abs_pos_embed

    side = math.isqrt(num_tokens - 1)
    return resample_abs_pos_embed(places_SD[None], [side, side], num_prefix_tokens=1)[0]


# Options of open_clip's configuration and their defaults; None: it must be given.
_MODEL: dict[str, Any] = {
    "embed_dim": None, "vision_cfg": None, "text_cfg": None, "quick_gelu": False, "custom_text": False,
    "init_logit_bias": None, "init_logit_scale": None, "nonscalar_logit_scale": False,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224,
    "patch_dropout": 0.0,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0,
    "pool_type": "argmax", "pad_id": 0, "hf_tokenizer_name": None, "tokenizer_kwargs": None,
}  # fmt: skip


def _known(given: Mapping[str, Any], defaults: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return options with the defaults filled in.

    Raises:
        ValueError: an option is set that these towers lack.
    """
    for name, value in given.items():
        if name not in defaults and value not in (None, False, 0, "", "linear"):
            raise ValueError(f"{path} says {name}={value!r}, which these towers do not have")
    options = {**defaults, **given}
    if options.get("pool_type", "argmax") != "argmax":
        raise ValueError(f"{path} says pool_type={options['pool_type']!r}: a text is read at its end, 'argmax'")
    return options


def _hidden(width: int, ratio: float) -> int | None:
    """Return the hidden width as ``ClipConfig`` has it: None if it is four times the width."""
    return None if ratio == 4 else int(width * ratio)


def _norm(rest: dict[str, Tensor], own: str, theirs: str) -> dict[str, Tensor]:
    return {f"{own}.{kind}": rest.pop(f"{theirs}.{kind}") for kind in ("weight", "bias")}


def _layers(rest: dict[str, Tensor], tower: str, depth: int) -> dict[str, Tensor]:
    """Take the tensors of a tower's layers out of ``rest``, by our names."""
    weights: dict[str, Tensor] = {}
    for i in range(depth):
        own, theirs = f"layers.{i}.", f"{tower}transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            thirds = rest.pop(f"{theirs}attn.in_proj_{kind}").chunk(3)
            weights |= {f"{own}{name}.{kind}": t for name, t in zip(("query", "key", "value"), thirds, strict=True)}
            for name, at in (("out", "attn.out_proj"), ("ffn.w_in", "mlp.c_fc"), ("ffn.w_out", "mlp.c_proj")):
                weights[f"{own}{name}.{kind}"] = rest.pop(f"{theirs}{at}.{kind}")
        weights |= _norm(rest, f"{own}norm_1", f"{theirs}ln_1") | _norm(rest, f"{own}norm_2", f"{theirs}ln_2")
    return weights
