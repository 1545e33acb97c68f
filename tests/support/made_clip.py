"""A small open_clip checkpoint with random weights: its folder, as published, and no package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

IMAGE_DIM, TEXT_DIM, OUT_DIM, VOCAB, LENGTH, PATCH, IMAGE_SIZE, DEPTH = 8, 12, 6, 20, 7, 4, 8, 2


def write_clip(folder: Path, *, quick_gelu: bool = False, prefix: str = "", **changed: Any) -> Path:
    """Write a CLIP of two layers a tower, and return its folder.

    Args:
        folder: is made.
        quick_gelu: the activation.
        prefix: "text." where the text tower is a module of its own.
        changed: further options of the configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 2

    def norm(name: str, dim: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + draw(dim), f"{name}.bias": draw(dim)}

    def layers(tower: str, dim: int) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for i in range(DEPTH):
            first = f"{tower}transformer.resblocks.{i}."
            tensors |= norm(f"{first}ln_1", dim) | norm(f"{first}ln_2", dim)
            tensors |= {f"{first}attn.in_proj_weight": draw(3 * dim, dim), f"{first}attn.in_proj_bias": draw(3 * dim)}
            for name, out, into in (
                ("attn.out_proj", dim, dim),
                ("mlp.c_fc", 4 * dim, dim),
                ("mlp.c_proj", dim, 4 * dim),
            ):
                tensors |= {f"{first}{name}.weight": draw(out, into), f"{first}{name}.bias": draw(out)}
        return tensors

    tensors = {
        "logit_scale": torch.tensor(2.5),
        "visual.class_embedding": draw(IMAGE_DIM),
        "visual.positional_embedding": draw(1 + (IMAGE_SIZE // PATCH) ** 2, IMAGE_DIM),
        "visual.conv1.weight": draw(IMAGE_DIM, 3, PATCH, PATCH),
        "visual.proj": draw(IMAGE_DIM, OUT_DIM),
        **norm("visual.ln_pre", IMAGE_DIM),
        **norm("visual.ln_post", IMAGE_DIM),
        **layers("visual.", IMAGE_DIM),
        f"{prefix}token_embedding.weight": draw(VOCAB, TEXT_DIM),
        f"{prefix}positional_embedding": draw(LENGTH, TEXT_DIM),
        f"{prefix}text_projection": draw(TEXT_DIM, OUT_DIM),
        **norm(f"{prefix}ln_final", TEXT_DIM),
        **layers(prefix, TEXT_DIM),
    }
    save_file(tensors, folder / "open_clip_model.safetensors")
    vision = {"image_size": IMAGE_SIZE, "layers": DEPTH, "width": IMAGE_DIM, "head_width": 4, "patch_size": PATCH}
    text = {"context_length": LENGTH, "vocab_size": VOCAB, "width": TEXT_DIM, "heads": 3, "layers": DEPTH}
    model = {
        "embed_dim": OUT_DIM,
        "quick_gelu": quick_gelu,
        "vision_cfg": {**vision, **changed.get("vision_cfg", {})},
        "text_cfg": {**text, **changed.get("text_cfg", {})},
    }
    config = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder
