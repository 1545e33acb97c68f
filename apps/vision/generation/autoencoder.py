"""The autoencoder of latent diffusion (arXiv 2112.10752) in the layout of diffusers' ``AutoencoderKL``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.base.files import read_json
from apps.base.messages import some

WEIGHTS = "diffusion_pytorch_model.safetensors"


def _parts(**parts: nn.Module | Sequence[nn.Module]) -> nn.ModuleDict:
    """Return modules by name, of which lists are numbered, as in diffusers' files."""
    return nn.ModuleDict({k: v if isinstance(v, nn.Module) else nn.ModuleList(v) for k, v in parts.items()})


class _Residual(nn.Module):
    def __init__(self, dim: int, out_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(groups, width, eps=1e-6) for width in (dim, out_dim))
        self.conv1, self.conv2 = nn.Conv2d(dim, out_dim, 3, padding=1), nn.Conv2d(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = nn.Identity() if dim == out_dim else nn.Conv2d(dim, out_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))  # type: ignore[no-any-return]


class _Attention(nn.Module):
    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        h = F.scaled_dot_product_attention(*(to(h)[:, None] for to in (self.to_q, self.to_k, self.to_v)))[:, 0]
        return x + self.to_out[0](h).transpose(1, 2).unflatten(2, x.shape[2:])  # type: ignore[no-any-return]


class _Coder(nn.Module):
    """The encoder, or the decoder, which has its blocks in the opposite order and one residual block more in each."""

    def __init__(self, widths: Sequence[int], layers: int, groups: int, in_dim: int, out_dim: int, up: bool) -> None:
        super().__init__()
        self.up, last = up, len(widths) - 1
        inner = widths[0] if up else widths[-1]
        self.conv_in = nn.Conv2d(in_dim, widths[0], 3, padding=1)
        blocks, before = [], widths[0]
        for number, width in enumerate(widths):
            residuals = [_Residual(before if i == 0 else width, width, groups) for i in range(layers)]
            resized = [] if number == last else [_parts(conv=nn.Conv2d(width, width, 3, 1 if up else 2, int(up)))]
            blocks.append(_parts(resnets=residuals, **{"upsamplers" if up else "downsamplers": resized}))
            before = width
        setattr(self, "up_blocks" if up else "down_blocks", nn.ModuleList(blocks))
        self.mid_block = _parts(
            resnets=[_Residual(inner, inner, groups) for _ in range(2)], attentions=[_Attention(inner, groups)]
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_dim, 3, padding=1)

    def _middle(self, x: Tensor) -> Tensor:
        parts: Any = self.mid_block
        first, second = parts["resnets"]
        return second(parts["attentions"][0](first(x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        x = self._middle(x) if self.up else x
        blocks: Any = self.up_blocks if self.up else self.down_blocks
        for block in blocks:
            for residual in block["resnets"]:
                x = residual(x)
            for resize in block["upsamplers" if self.up else "downsamplers"]:
                x = F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1))
                x = resize["conv"](x)
        x = x if self.up else self._middle(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # type: ignore[no-any-return]


class Autoencoder(nn.Module):
    """Maps images with values in -1..1 to latents of about unit variance, and back.

    Args:
        config: diffusers' ``config.json``.

    Raises:
        ValueError: the configuration lacks a value.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        try:
            widths, layers = list(config["block_out_channels"]), config["layers_per_block"]
            self.in_chans, self.latent_chans = config["in_channels"], config["latent_channels"]
        except KeyError as error:
            raise ValueError(f"config.json of the autoencoder has no {error}") from None
        groups, z = config.get("norm_num_groups", 32), self.latent_chans
        self.scale, self.shift = config.get("scaling_factor", 0.18215), config.get("shift_factor") or 0.0
        self.factor = 2 ** (len(widths) - 1)
        self.encoder = _Coder(widths, layers, groups, self.in_chans, 2 * z, up=False)
        self.decoder = _Coder(widths[::-1], layers + 1, groups, z, self.in_chans, up=True)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if config.get("use_quant_conv", True) else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z, z, 1) if config.get("use_post_quant_conv", True) else nn.Identity()

    @classmethod
    def read(cls, folder: str | Path) -> Autoencoder:
        """Return the autoencoder of a folder with ``config.json`` and ``diffusion_pytorch_model.safetensors``.

        Raises:
            ValueError: a file is missing or damaged, or the weights are of another shape than the configuration.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(folder).expanduser()
        config = read_json(path / "config.json")
        if not isinstance(config, dict) or not (path / WEIGHTS).is_file():
            raise ValueError(f"autoencoder={folder} is no folder of diffusers: it needs config.json and {WEIGHTS}")
        model = cls(config)
        try:
            weights = load_file(path / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path / WEIGHTS} cannot be read: {error}") from None
        own = model.state_dict()
        odd = sorted({*own} ^ {*weights}) or [name for name in own if own[name].shape != weights[name].shape]
        if odd:
            raise ValueError(f"autoencoder={folder} has another shape than its config.json: see {some(odd, 3)}")
        model.load_state_dict(weights)
        return model.eval().requires_grad_(False)

    def check(self, image_size: int, in_chans: int) -> None:
        """Raise a ``ValueError`` for images that the autoencoder does not take."""
        if in_chans != self.in_chans:
            raise ValueError(f"the autoencoder takes {self.in_chans} channels, and the images have {in_chans}")
        if image_size % self.factor:
            raise ValueError(f"image_size={image_size} is not divisible by {self.factor}, as the autoencoder needs")

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Return the mean latents (B, z, H / factor, W / factor) of images (B, C, H, W)."""
        mean = self.quant_conv(self.encoder(image)).chunk(2, 1)[0]
        return (mean - self.shift) * self.scale  # type: ignore[no-any-return]

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Return the images (B, C, H, W) of latents."""
        return self.decoder(self.post_quant_conv(latent / self.scale + self.shift))  # type: ignore[no-any-return]
