"""Searches over a model whose experts are offloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import core
from apps.nets.config import TransformerConfig
from apps.nets.transformer import TranslationModel
from apps.nlp.decode import DecodeConfig, translate_ids
from core.offload import offloadable_bytes


def network() -> TranslationModel:
    torch.manual_seed(0)
    config = TransformerConfig("nano", dim=64, hidden_dim=64, encoder_layers=2, decoder_layers=2)
    moe = core.MoEConfig(8, core.TokenChoice(2), core.FFN(64, "relu"))
    return TranslationModel(config, source_vocab=40, ffn=moe, encoder_moe_blocks="all", decoder_moe_blocks="all").eval()


@pytest.mark.parametrize("options", [{"method": "greedy"}, {"method": "beam", "num_beams": 3}], ids=["greedy", "beam"])
def test_the_texts_and_their_scores_are_those_of_the_resident_model(options: dict[str, Any], tmp_path: Path):
    source_BS = torch.randint(8, 40, (3, 7))
    config = DecodeConfig(**options, min_new_tokens=8)
    expected = translate_ids(network(), source_BS, config)
    model = network()
    offloaded = core.offload_experts(model, offloadable_bytes(model) // 4, tmp_path / "experts.safetensors")
    searched = translate_ids(model, source_BS, config)
    assert searched.ids == expected.ids
    assert searched.scores == expected.scores
    assert offloaded.statistics.hits > 0
    assert offloaded.statistics.misses > 0


def test_another_dtype_is_refused():
    model = network()
    core.offload_experts(model, offloadable_bytes(model))
    with pytest.raises(ValueError, match="dtype=bfloat16 makes a copy of a model whose experts are offloaded"):
        translate_ids(model, torch.randint(8, 40, (1, 7)), DecodeConfig(dtype="bfloat16"))
