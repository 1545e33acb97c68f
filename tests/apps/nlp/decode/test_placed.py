"""Searches over models whose experts lie elsewhere: on another rank, or offloaded."""

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from two_ranks import on_two_ranks

import core
from apps.data.subwords import EOS_ID, PAD_ID
from apps.nets.config import TransformerConfig
from apps.nets.transformer import LanguageModel, TranslationModel
from apps.nlp.decode import DecodeConfig, generate_ids, translate_ids
from core.offload import offloadable_bytes
from core.parallel import shard_experts

VOCAB = 29
SIZES = ([2, 3], [9])
"""Ids of each rank's sentences."""
GREEDY = DecodeConfig(method="greedy", max_length_ratio=1.0, max_length_extra=0)
BEAM = DecodeConfig(method="beam", num_beams=3, max_length_ratio=1.0, max_length_extra=1)


def sentences(sizes: list[int]) -> torch.Tensor:
    ids = torch.full((len(sizes), max(sizes)), PAD_ID)
    for row, size in zip(ids, sizes, strict=True):
        row[:size] = torch.arange(5, 5 + size)
        row[size - 1] = EOS_ID
    return ids


def results(rank: int, divide: bool) -> dict[str, list[list[list[int]]]]:
    """Return what a rank's sentences become, by the kind of the search."""
    config = TransformerConfig("nano", dim=16, num_heads=2, encoder_layers=1, decoder_layers=1, dropout=0.0)
    moe = core.MoEConfig(4, core.TokenChoice(top_k=2), core.FFN(hidden_dim=8))
    outcomes = {}
    for search in (GREEDY, BEAM):
        torch.manual_seed(0)
        blocks = {"encoder_moe_blocks": "all", "decoder_moe_blocks": "all"}
        translator = TranslationModel(config, source_vocab=VOCAB, ffn=moe, **blocks)
        writer = LanguageModel(config, vocab=VOCAB, ffn=moe)
        if divide:
            for model in (translator, writer):
                shard_experts(model, init_device_mesh("cpu", (2,)))
        outcomes[f"translation, {search.method}"] = translate_ids(translator, sentences(SIZES[rank]), search).ids
        outcomes[f"text, {search.method}"] = generate_ids(writer, sentences(SIZES[rank]), search).ids
    return outcomes


def divided(rank: int) -> dict[str, list[list[list[int]]]]:
    return results(rank, divide=True)


def test_each_rank_writes_what_it_writes_alone(tmp_path: Path):
    ranks = on_two_ranks(divided, tmp_path)
    assert ranks == [results(rank, divide=False) for rank in (0, 1)]
    for name in ranks[0]:
        first, second = (max(len(ids[0]) for ids in rank[name]) for rank in ranks)
        assert first != second  # the ranks write texts of other lengths


def network() -> TranslationModel:
    torch.manual_seed(0)
    config = TransformerConfig("nano", dim=64, hidden_dim=64, encoder_layers=2, decoder_layers=2)
    moe = core.MoEConfig(8, core.TokenChoice(2), core.FFN(64, "relu"))
    return TranslationModel(config, source_vocab=40, ffn=moe, encoder_moe_blocks="all", decoder_moe_blocks="all").eval()


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_the_texts_and_their_scores_are_those_of_the_resident_model(method: str, tmp_path: Path):
    source_BS, config = torch.randint(8, 40, (3, 7)), DecodeConfig(method, num_beams=3, min_new_tokens=8)
    expected, model = translate_ids(network(), source_BS, config), network()
    offloaded = core.offload_experts(model, offloadable_bytes(model) // 4, tmp_path / "experts.safetensors")
    searched = translate_ids(model, source_BS, config)
    assert (searched.ids, searched.scores) == (expected.ids, expected.scores)
    assert min(offloaded.statistics.hits, offloaded.statistics.misses) > 0
    with pytest.raises(ValueError, match="dtype=bfloat16 makes a copy of a model whose experts are offloaded"):
        translate_ids(model, source_BS, DecodeConfig(dtype="bfloat16"))
