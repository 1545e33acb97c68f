"""A sentence encoder of BERT's layout with random weights, small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "shoe", "##s", "blue", "hat", ",", "cafe", "un", "##known")
DIM, HIDDEN = 8, 12


def write_encoder(folder: Path, seed: int = 0, prefix: str = "") -> Path:
    """Write a BERT of two layers, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 2

    tensors = {
        "embeddings.word_embeddings.weight": draw(len(PIECES), DIM),
        "embeddings.position_embeddings.weight": draw(16, DIM),
        "embeddings.token_type_embeddings.weight": draw(2, DIM),
        "embeddings.LayerNorm.weight": 1 + draw(DIM),
        "embeddings.LayerNorm.bias": draw(DIM),
    }
    for layer in range(2):
        first = f"encoder.layer.{layer}."
        shapes = {f"attention.{name}": (DIM, DIM) for name in ("self.query", "self.key", "self.value", "output.dense")}
        shapes |= {"intermediate.dense": (HIDDEN, DIM), "output.dense": (DIM, HIDDEN)}
        for name, shape in shapes.items():
            tensors |= {f"{first}{name}.weight": draw(*shape), f"{first}{name}.bias": draw(shape[0])}
        for name in ("attention.output", "output"):
            tensors |= {f"{first}{name}.LayerNorm.weight": 1 + draw(DIM), f"{first}{name}.LayerNorm.bias": draw(DIM)}
    save_file({prefix + name: value for name, value in tensors.items()}, folder / "model.safetensors")
    config = {
        "model_type": "bert", "vocab_size": len(PIECES), "hidden_size": DIM, "intermediate_size": HIDDEN,
        "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 16, "type_vocab_size": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return folder
