"""Searches on two ranks that share experts: each has sentences of other lengths, and as many steps as the other."""

from __future__ import annotations

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
        translator = TranslationModel(
            config, source_vocab=VOCAB, ffn=moe, encoder_moe_blocks="all", decoder_moe_blocks="all"
        )
        writer = LanguageModel(config, vocab=VOCAB, ffn=moe)
        if divide:
            for model in (translator, writer):
                shard_experts(model, init_device_mesh("cpu", (2,)))
        outcomes[f"translation, {search.method}"] = translate_ids(translator, sentences(SIZES[rank]), search).ids
        outcomes[f"text, {search.method}"] = generate_ids(writer, sentences(SIZES[rank]), search).ids
    return outcomes


def divided(rank: int) -> dict[str, list[list[list[int]]]]:
    return results(rank, divide=True)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[list[list[int]]]]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return on_two_ranks(divided, folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_writes_what_it_writes_alone(ranks, rank):
    assert ranks[rank] == results(rank, divide=False)


def test_the_ranks_write_texts_of_other_lengths(ranks):
    for name in ranks[0]:
        lengths = [max(len(ids[0]) for ids in rank[name]) for rank in ranks]
        assert lengths[0] != lengths[1]
