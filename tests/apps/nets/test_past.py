"""A decoder that goes on from the keys and values of what it has read says what it says of the whole text."""

import pytest
import torch
from torch.testing import assert_close

import core
from apps.nets.config import TransformerConfig
from apps.nets.depths import MixtureOfDepths
from apps.nets.past import Past
from apps.nets.transformer import LanguageModel, TranslationModel
from apps.nets.universal import Universal

VOCAB = 20
TEXT = torch.tensor([[2, 5, 6, 7, 9, 9, 4, 8], [2, 9, 9, 4, 5, 6, 11, 3]])
MOE = core.MoEConfig(4, core.TokenChoice(top_k=2), core.FFN(hidden_dim=12, activation="relu"))
HEADS = core.MoEConfig(4, core.TokenChoice(top_k=2), core.AttentionExperts(head_dim=8, heads_per_expert=2))


def config(**options):
    small = {"dim": 16, "hidden_dim": 24, "relative_buckets": 8, "relative_max_distance": 16}
    return TransformerConfig("nano", **small, **options)


def language_model(positions="rotary", **parts):
    torch.manual_seed(0)
    shared = {"num_kv_heads": 1} if "attention_moe" not in parts else {}
    model = LanguageModel(config(positions=positions, **shared), vocab=VOCAB, ffn=MOE, **parts).double().eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)  # gates and predictors that start at zero choose nothing
    return model


def in_parts(model, text_BL, lengths, hidden=0, memory=(), **more):
    """Return the logits of a text that is read a few ids at a time."""
    heads, width = model.kept_heads
    none = torch.zeros(len(text_BL), heads, 0, width).double()
    kept = [(none, none)] * model.config.shape.decoder_layers
    gone = [torch.zeros(len(text_BL), 0, dtype=torch.bool)] * hidden
    logits = []
    for ids_BL in text_BL.split(lengths, 1):
        past = Past(kept, gone, memory)
        logits.append(model.go_on(ids_BL, past, **more))
        kept, gone = past.joined, past.joined_hidden
    assert kept[0][0].shape[2] == text_BL.shape[1]
    return torch.cat(logits, 1)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", "relative", "none"])
def test_a_text_in_parts_equals_the_whole_text(positions):
    model = language_model(positions)
    for lengths in ([8], [5, 3], [1] * 8):
        assert_close(in_parts(model, TEXT, lengths), model(TEXT))


DEPTHS = MixtureOfDepths(0.5, predictor=True)


@pytest.mark.parametrize(
    ("parts", "hidden"),
    [
        ({"attention_moe": HEADS}, 0),
        ({"depths": DEPTHS}, 1),
        ({"depths": DEPTHS, "positions": "relative"}, 1),
        ({"attention_moe": HEADS, "universal": Universal(0.6)}, 0),
    ],
    ids=["attention experts", "depths", "depths, relative", "universal"],
)
def test_a_text_in_parts_equals_the_whole_text_where_tokens_choose_heads_and_layers(parts, hidden):
    model = language_model(**parts)
    for lengths in ([5, 3], [1] * 8):
        assert_close(in_parts(model, TEXT, lengths, hidden), model(TEXT))


def test_a_decoder_reads_the_keys_and_values_of_a_memory_with_padding():
    torch.manual_seed(0)
    moe = core.MoEConfig(4, core.Task(num_tasks=2, top_k=1))  # the sentences' tasks reach the decoder's routers
    model = TranslationModel(config(), source_vocab=VOCAB, ffn=moe).double().eval()
    source_BS, task_B = torch.tensor([[5, 6, 7, 3, 0], [8, 9, 10, 11, 3]]), torch.tensor([1, 0])
    memory = model.encode(source_BS, task_B)
    pairs = [layer.keys_and_values(memory.x_BSD) for layer in model.decoder.layers]
    whole_BLV = model(source_BS, TEXT, task_B)
    read = in_parts(model, TEXT, [1, 4, 3], memory=pairs, task_ids_B=task_B, memory_valid_BS=memory.valid_BS)
    assert_close(read, whole_BLV)
