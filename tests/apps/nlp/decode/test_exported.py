"""Searches over graphs write what searches over the model write."""

import pytest
import torch
from captioned import captioner, images
from torch.testing import assert_close
from torch_graphs import TorchGraph

import core
from apps.data.subwords import EOS_ID, PAD_ID
from apps.multimodal.captions.task import Captioning
from apps.nets.config import TransformerConfig
from apps.nets.depths import MixtureOfDepths
from apps.nets.transformer import LanguageModel, TranslationModel
from apps.nlp.decode import DecodeConfig, caption_ids, generate_ids, translate_ids
from apps.nlp.decode.exported import ExportedLanguageModel, ExportedMemoryDecoder
from apps.nlp.decode.graphs import decoder_graph, graphs_with_memory

VOCAB = 20
CONFIG = TransformerConfig("nano", dim=16, hidden_dim=24, num_kv_heads=1, positions="rotary")
MOE = core.MoEConfig(4, core.TokenChoice(top_k=2), core.FFN(hidden_dim=12, activation="relu"))
SOURCE = torch.tensor([[5, 6, 7, EOS_ID, PAD_ID], [8, 9, 10, 11, EOS_ID], [4, EOS_ID, PAD_ID, PAD_ID, PAD_ID]])
PROMPTS = torch.tensor([[EOS_ID, 5, 6, 7], [EOS_ID, 8, PAD_ID, PAD_ID]])
SEARCHES = [
    DecodeConfig("greedy"),
    DecodeConfig("beam", num_beams=3, num_return_sequences=3),
    DecodeConfig("beam", num_beams=3, prune=False),
    DecodeConfig("sample", num_return_sequences=2, top_p=0.9),
]


def strong(model):
    """Return the model with weights so large that its texts are of many words."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.5, generator=generator)
    return model.eval()


def assert_equal(own, expected):
    assert own.ids == expected.ids
    assert any(len(set(ids)) > 2 for of_sentence in own.ids for ids in of_sentence)  # not one word again and again
    for scores, right in zip(own.scores, expected.scores, strict=True):
        assert scores == pytest.approx(right, rel=1e-5)


TASK = core.MoEConfig(4, core.Task(num_tasks=2, top_k=1))


def translator(moe):
    model = strong(TranslationModel(CONFIG, source_vocab=VOCAB, ffn=moe, encoder_moe_blocks="none"))
    encoder, decoder = graphs_with_memory(model, "source", SOURCE[:2], {0: "batch", 1: "source"}, "source")
    assert [name for name in decoder.inputs if name.endswith("_ids")] == (["task_ids"] if moe is TASK else [])
    assert list(encoder.inputs) == ["source"]
    with torch.no_grad():
        made, kept = encoder.network(SOURCE), decoder.network(*decoder.inputs.values())
    # A package of AOTInductor reads its inputs as if they were contiguous, and these go into the decoder.
    assert all(tensor.is_contiguous() for tensor in (*made[1:], *kept[1:]))
    return model, ExportedMemoryDecoder(TorchGraph(encoder), TorchGraph(decoder), CONFIG)


def test_translations():
    model, exported = translator(MOE)
    for search in SEARCHES:
        assert_equal(translate_ids(exported, SOURCE, search), translate_ids(model, SOURCE, search))
    model, exported = translator(TASK)
    search, tasks_B = SEARCHES[1], torch.tensor([0, 1, 0])
    own, expected = (translate_ids(m, SOURCE, search, tasks_B) for m in (exported, model))
    assert_equal(own, expected)
    assert own.ids != translate_ids(exported, SOURCE, search, 1 - tasks_B).ids


def test_continuations():
    model = strong(LanguageModel(CONFIG, vocab=VOCAB, ffn=MOE, depths=MixtureOfDepths(0.5, predictor=True)))
    graph = decoder_graph(model, "model")
    assert "past_hidden_0" in graph.inputs
    exported = ExportedLanguageModel(TorchGraph(graph), CONFIG)
    for search in SEARCHES:
        assert_equal(generate_ids(exported, PROMPTS, search), generate_ids(model, PROMPTS, search))
    lory = core.MoEConfig(4, core.Merge(kind="lory"))
    with pytest.raises(ValueError, match=r"Merge\(kind='lory'\) .* cannot decode step by step"):
        decoder_graph(LanguageModel(CONFIG, vocab=VOCAB, ffn=lory), "model")


def test_captions():
    module = captioner(transformer=CONFIG)
    strong(module.model)
    encoder, decoder = Captioning(module).exported().graphs
    assert encoder.outputs[:2] == ("memory", "memory_mask")
    assert 1 not in decoder.dynamic["memory_mask"]  # all images have as many tokens
    exported = ExportedMemoryDecoder(TorchGraph(encoder), TorchGraph(decoder), CONFIG)
    for search in SEARCHES[:2]:
        own, expected = (caption_ids(m, images("red", "blue"), search, 8) for m in (exported, module.model))
        assert_equal(own, expected)


def test_a_graph_has_the_limit_of_learned_positions_and_no_capacity_of_training():
    config = TransformerConfig("nano", dim=16, hidden_dim=24, positions="learned", max_length=6)
    model = strong(LanguageModel(config, vocab=VOCAB))
    exported = ExportedLanguageModel(TorchGraph(decoder_graph(model, "model")), config)
    own, expected = (generate_ids(m, PROMPTS, DecodeConfig("greedy", min_new_tokens=9)) for m in (exported, model))
    assert own.ids == expected.ids
    assert [len(ids) for ids in own.best] == [2, 4]  # with 4 and 2 of the prompts they are 6
    moe = core.MoEConfig(4, core.TokenChoice(top_k=1), core.FFN(hidden_dim=12), capacity_factor=0.25)
    model = strong(LanguageModel(CONFIG, vocab=VOCAB, ffn=moe))
    graph = TorchGraph(decoder_graph(model, "model"))

    def logits(text_BL):
        past = {name: torch.zeros(len(text_BL), 1, 0, 8) for name in graph.inputs[1:]}
        return graph({"tokens": text_BL, **past})[0]

    text_BL = torch.tensor([[EOS_ID, 5, 6, 7], [EOS_ID, 9, 9, 4]])
    assert_close(logits(text_BL), torch.cat([logits(text_BL[:1]), logits(text_BL[1:])]))
    with torch.no_grad():
        assert not torch.allclose(logits(text_BL), model(text_BL))  # 4 experts compute one of the 8 tokens each
