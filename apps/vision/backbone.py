"""Any classifier of timm by name, whose MLPs of chosen blocks are MoE layers: ``core.sparsify`` finds them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn

import core
from apps.base.messages import first_line, message
from apps.nets.blocks import MoEs, moe_configs, resolve_blocks
from core.convert import recognized_ffns
from core.fields import Checked

_logger = logging.getLogger(__name__)

_MLPS = ("mlp", "mlp1", "mlp2", "mlp_channels", "ffn")
"""Names of a block's MLP in timm. Squeeze-and-excite and mixing of tokens are two linear layers too, and no MLP."""


@core.register_config
@dataclass(frozen=True)
class TimmConfig(Checked):
    """A classifier of timm.

    Attributes:
        name: of a model of timm, such as "convnext_atto" or "swin_tiny_patch4_window7_224".
        pretrained: weights to begin with: a file, safetensors or torch's; or True, those that timm fetches. Experts
            begin as copies of the MLP that they replace. False: all weights are random.
        args: further arguments of ``timm.create_model``, such as ``{"drop_path_rate": 0.1}``.
        twin: build the dense network that costs as much as the sparse one, in FLOPs or in parameters: its MLPs in place
            of experts are wider. A comparison sets it.

    Raises:
        ValueError: timm has no model of this name, or ``args`` has an argument that the data or ``pretrained`` decide.
    """

    name: str
    pretrained: str | bool = False
    args: dict[str, Any] = field(default_factory=dict)
    twin: Literal["flops", "params"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not timm.is_model(self.name):
            nearest = get_close_matches(self.name, timm.list_models(), 5, 0)
            raise ValueError(f"backbone.name={self.name!r} is no model of timm; the nearest are {', '.join(nearest)}")
        for name in ("pretrained", "num_classes", "in_chans", "img_size"):
            if name in self.args:
                raise ValueError(f"backbone.args has {name}, which backbone.pretrained or the data decide")
        if isinstance(self.pretrained, str) and not Path(self.pretrained).expanduser().is_file():
            raise ValueError(f"backbone.pretrained={self.pretrained!r} is no file")


def build_backbone(
    config: TimmConfig,
    moe: MoEs | None,
    moe_blocks: str | Sequence[int],
    *,
    image_size: int,
    in_chans: int,
    num_classes: int,
    pretrained: bool = False,
) -> nn.Module:
    """Return the network, whose MLPs of ``moe_blocks`` are MoE layers, each a ``core.convert.SparseFFN``.

    Args:
        config: which network.
        moe: the MoE layer of these blocks, or a list with one for each. An expert at its default is like the MLP that
            it replaces.
        moe_blocks: which of the network's MLPs, in its order; see ``apps.nets.blocks.resolve_blocks``.
        image_size: height and width of the images in pixels.
        in_chans: channels of an image.
        num_classes: number of classes.
        pretrained: load the weights of ``config.pretrained``, of which experts become copies.

    Raises:
        ValueError: the network cannot be built so, or its weights do not fit.
    """
    dense = _create(config, image_size, in_chans, num_classes, pretrained)
    if moe is None:
        return dense
    names = [name for name in recognized_ffns(dense) if name.rpartition(".")[2] in _MLPS]
    if not names:
        _logger.warning("%s has no MLP that experts could replace: it trains dense", config.name)
        return dense
    chosen = [names[i] for i in resolve_blocks(moe_blocks, len(names))]
    layers = moe_configs(moe)
    if len(layers) not in (1, len(chosen)):
        raise ValueError(f"moe lists {len(layers)} layers for {len(chosen)} sparse blocks, {chosen}: it needs one each")
    sparse, copies = dense, config.pretrained is not False
    for i, name in enumerate(chosen):
        # Seeded by torch's own state, as any new layer is.
        seed = int(torch.randint(2**31, (), device="cpu"))
        sparse = core.sparsify(sparse, layers[i % len(layers)], name, "copy" if copies else "random", seed=seed)
    if config.twin is None:
        return sparse
    return core.dense_twin(dense, like=sparse, cost=config.twin, seed=int(torch.randint(2**31, (), device="cpu")))


def _create(config: TimmConfig, image_size: int, in_chans: int, num_classes: int, pretrained: bool) -> nn.Module:
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans, **config.args}
    known = timm.get_pretrained_cfg(config.name)
    if known is not None and known.fixed_input_size:
        options["img_size"] = image_size
    if pretrained:
        options["pretrained"] = True
        if isinstance(config.pretrained, str):
            file = str(Path(config.pretrained).expanduser())
            options["pretrained_cfg_overlay"] = {"file": file, "num_classes": num_classes}
    try:
        model: nn.Module = timm.create_model(config.name, **options)
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # Of tensors that do not fit torch lists all, each on a line.
        lines = message(error).split("\n")
        why = lines[1].strip() if "in loading state_dict" in lines[0] and len(lines) > 1 else first_line(error)
        verb = "takes no weights" if pretrained else f"cannot be built for image_size={image_size}"
        raise ValueError(f"backbone {config.name} {verb}: {why}") from error
    return model
