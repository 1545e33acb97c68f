"""Small networks of the overlays in ``configs/routing`` and ``configs/experts``, as graphs for export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import core
from apps.nets.config import TransformerConfig
from apps.nets.depths import MixtureOfDepths
from apps.nets.transformer import LanguageModel
from apps.nets.universal import Universal
from apps.train.publish.exporting import Graph
from apps.vision.model import ViTConfig
from apps.vision.module import VisionClassifier

CONFIGS = Path(__file__).parents[2] / "configs"
OVERLAYS = sorted([*(CONFIGS / "routing").glob("*.yaml"), *(CONFIGS / "experts").glob("*.yaml")])
DIM, LENGTH, VOCAB = 16, 16, 1024
MOE = {"num_experts": 8, "router": {"class_path": "core.TokenChoice", "init_args": {"top_k": 2}}}
MOE |= {"expert": {"class_path": "core.FFN", "init_args": {"hidden_dim": 32}}}
FIELDS: dict[str, Callable[[int, int], Tensor]] = {
    "token_ids_BS": lambda B, S: torch.randint(0, VOCAB, (B, S)),
    "task_ids_B": lambda B, S: torch.randint(0, 4, (B,)),
    "domain_ids_B": lambda B, S: torch.randint(0, 4, (B,)),
}
AXES = {0: "batch", 1: "length"}


class Layers(nn.Module):
    """Layers side by side, which get the same tokens and the same facts about them: one output each."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        needed = set().union(*(layer.router.needs for layer in layers))
        self.names = [name for name in FIELDS if name in needed]

    def forward(self, x: Tensor, valid_BS: Tensor, *fields: Tensor) -> tuple[Tensor, ...]:
        context = core.RoutingContext(valid_BS=valid_BS, **dict(zip(self.names, fields, strict=True)))
        return tuple(layer(x, context) for layer in self.layers)


def settings(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["model"]["init_args"]


def layers_of(path: Path) -> list[nn.Module]:
    """Build the layers that an overlay describes: one, or those of several blocks."""
    given = settings(path)
    parts = given.get("moe", {})
    parts = [*(parts if isinstance(parts, list) else [parts])] + [given[n] for n in ("attention_moe",) if n in given]
    return [core.MoEConfig.from_dict({**MOE, **part}).build(DIM) for part in parts]


def example(layers: Layers, B: int, S: int) -> dict[str, Tensor]:
    """Return tokens of B sequences, of which all but the first have some padding, and the facts that routers need."""
    valid_BS = torch.arange(S) < torch.arange(S, S - B, -1).clamp_min(1)[:, None]
    return {"x": torch.randn(B, S, DIM), "valid_BS": valid_BS, **{n: FIELDS[n](B, S) for n in layers.names}}


def graph_of_layers(layers: Layers) -> Graph:
    """Return layers as a graph."""
    inputs = example(layers, 3, LENGTH)
    patches = any(isinstance(layer, core.PatchMoE) for layer in layers.layers)
    dynamic = {name: {0: "batch"} if patches or name.endswith("B") else AXES for name in inputs}
    outputs = tuple(f"y_{i}" for i in range(len(layers.layers)))
    return Graph("model", layers, inputs, outputs, dynamic)


def model_of(path: Path) -> Graph | None:
    """Return the graph of a small model for overlays that are about more than one layer; None for the others."""
    given = settings(path)
    moe = (
        core.MoEConfig.from_dict({**MOE, **(given.get("moe") or {})})
        if not isinstance(given.get("moe"), list)
        else None
    )
    if "universal" in given:
        attention = core.MoEConfig.from_dict({**MOE, **given["attention_moe"]})
        transformer = TransformerConfig(size="nano", dim=DIM, num_heads=2, decoder_layers=3, hidden_dim=32)
        model = LanguageModel(
            transformer,
            vocab=VOCAB,
            ffn=moe,
            moe_blocks="all",
            attention_moe=attention,
            universal=Universal(**given["universal"]),
        )
        tokens = {"tokens": torch.randint(4, VOCAB, (3, LENGTH))}
        return Graph("model", model, tokens, ("logits",), {"tokens": AXES})
    if "depths" in given or "share_experts" in given:
        options = {"depths": MixtureOfDepths(**given["depths"]), "depth_blocks": "every2"} if "depths" in given else {}
        vit = ViTConfig(variant="nano", patch_size=2, embed_dim=DIM, depth=2, num_heads=2, fused_attn=False)
        model = VisionClassifier(
            vit=vit,
            moe=moe,
            moe_blocks="all",
            share_experts=given.get("share_experts", False),
            image_size=8,
            in_chans=1,
            num_classes=10,
            **options,
        )
        return Graph("model", model, {"image": torch.randn(3, 1, 8, 8)}, ("logits",), {"image": {0: "batch"}})
    return None


def spread(network: nn.Module) -> None:
    """Give small weights and biases a size at which they matter, so that no gate is nearly even."""
    for parameter in network.parameters():
        if parameter.ndim == 1 or parameter.abs().max() < 0.3:
            nn.init.normal_(parameter, std=0.3)
