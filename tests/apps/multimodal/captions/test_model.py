"""The captioning model: its parts, step by step against the whole text, and its searches against slow loops."""

import naive_search as naive
import pytest
import torch
from captioned import DECODER, MOE, SIDE, VIT
from refusals import refused
from torch.testing import assert_close

import core
from apps.data.subwords import BOS_ID
from apps.multimodal.captions.model import CaptionModel
from apps.nets.config import TransformerConfig
from apps.nlp.decode import DecodeConfig, caption_ids, in_dtype

VOCAB = 30
ROUTERS = {"hard": core.TokenChoice(top_k=2), "soft": core.Dense(), "hash": core.Hash(vocab_size=64, top_k=2)}


def build(router=ROUTERS["hard"], **changed):
    torch.manual_seed(0)
    moe = core.MoEConfig(4, router, core.FFN(8, activation="relu"))
    arguments = {"ffn": moe, "encoder_moe_blocks": "last1", "decoder_moe_blocks": "all", **changed}
    vit, config = arguments.pop("vit", VIT), arguments.pop("config", DECODER)
    return CaptionModel(vit, config, image_size=SIDE, in_chans=3, vocab=VOCAB, **arguments).double().eval()


def images(count, seed=0):
    return torch.rand(count, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def texts(count, length):
    ids = torch.randint(4, VOCAB, (count, length), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = BOS_ID
    return ids


@pytest.mark.parametrize("router, positions", zip(ROUTERS, ["sinusoidal", "rotary", "learned"], strict=True))
def test_steps_are_those_of_the_whole_text(router, positions):
    config = TransformerConfig("nano", dim=16, hidden_dim=16, num_heads=2, positions=positions)
    model, image, text_BL = build(ROUTERS[router], config=config), images(3), texts(3, 6)
    whole_BLV, cache = model(image, text_BL), model.start(model.encode(image))
    steps = [model.step(text_BL[:, place], cache) for place in range(6)]
    assert_close(torch.stack(steps, 1), whole_BLV)


def test_later_words_change_no_earlier_one_and_bfloat16_is_that_of_the_copy():
    model, image, text_BL = build(), images(1), texts(1, 5)
    logits_BLV, later = model(image, text_BL), text_BL.clone()
    later[0, 3] = 4 + (later[0, 3] - 3) % (VOCAB - 4)
    assert_close(model(image, later)[:, :3], logits_BLV[:, :3], rtol=0, atol=1e-12)  # of float64
    assert (model(images(1, seed=2), text_BL) - logits_BLV).abs().amax(-1).min() > 1e-6
    model = build()
    weights = model.attention_to(model.encode(images(2)), texts(2, 3))
    assert weights.shape == (2, 2, 2, 3, 5)  # layers, images, heads, words, a class token and 4 patches
    assert_close(weights.sum(-1), torch.ones(2, 2, 2, 3, dtype=torch.float64))
    model = build().float()
    config = DecodeConfig(num_beams=2, dtype="bfloat16", max_length_ratio=1.0, max_length_extra=0)
    copy, found = in_dtype(model, "bfloat16"), caption_ids(model, images(2).float(), config, 5)
    assert found.ids == caption_ids(copy, images(2).bfloat16(), config, 5).ids
    assert next(model.parameters()).dtype == torch.float32
    assert caption_ids(build(), images(0), DecodeConfig(), 5).ids == []  # an empty batch


SHORT = {"max_length_ratio": 0.5, "max_length_extra": 2}
SEARCHES = {
    "greedy": DecodeConfig("greedy", max_length_ratio=1.0, max_length_extra=0),
    "beam": DecodeConfig(num_beams=3, num_return_sequences=3, max_length_ratio=1.0, max_length_extra=1),
    "sample": DecodeConfig("sample", num_return_sequences=2, top_k=7, temperature=1.5, **SHORT),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_are_those_of_slow_loops(name):
    model, image, numbers = build(), images(4), torch.tensor([3, 1, 8, 5])
    found = caption_ids(model, image, SEARCHES[name], 5, numbers)
    expected = naive.caption_ids(model, image, SEARCHES[name], 5, numbers)
    assert found.ids == expected.ids
    for own, of_loop in zip(found.scores, expected.scores, strict=True):
        assert own == pytest.approx(of_loop)
    # At most ratio * 5 + extra ids.
    most = {"greedy": 5, "beam": 6, "sample": 4}[name]
    assert max(len(ids) for own in found.ids for ids in own) <= most


def test_the_experts_are_where_they_are_said_to_be():
    model = build()
    assert list(core.moe_layers(model)) == ["decoder.layers.0.ffn", "decoder.layers.1.ffn", "encoder.blocks.1.mlp"]
    dense = build(ffn=core.DenseFFN(24), decoder_moe_blocks=[1])
    assert dense.decoder.layers[1].ffn.w_in.out_features == dense.encoder.blocks[1].mlp.fc1.out_features == 24
    assert dense.decoder.layers[0].ffn.w_in.out_features == DECODER.shape.hidden_dim
    # A list begins with the encoder's.
    layers = [core.MoEConfig(n, core.TokenChoice(1), core.FFN(8)) for n in (2, 3, 4)]
    model = build(ffn=layers)
    assert model.encoder.blocks[1].mlp.num_experts == 2
    assert [layer.ffn.num_experts for layer in model.decoder.layers] == [3, 4]
    assert model.decoder_moes == tuple(layers[1:])


def test_the_memory_is_normed_whatever_the_encoder_pools():
    # The norm of timm's pooled models stands behind the pooling: without it the memory would not be normed.
    from dataclasses import replace

    model = build(vit=replace(VIT, pool="avg"))
    model.connector.weight.data = torch.eye(16, dtype=torch.float64)
    model.connector.bias.data.zero_()
    x_BSD = model.encode(images(2)).x_BSD
    assert x_BSD.shape == (2, 4, 16)  # no class token
    assert_close(x_BSD.mean(-1), torch.zeros(2, 4, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("changed, message", [
    ({"vocab": 1}, "vocab=1 must be at least 2"),
    ({"encoder_moe_blocks": "none", "decoder_moe_blocks": "none"}, "name no block: leave moe out"),
    ({"decoder_moe_blocks": "last9"}, r"decoder_moe_blocks='last9' does not fit depth=2"),
    ({"config": TransformerConfig("nano")}, "vit has dim 16 and transformer 64"),
    ({"ffn": core.MoEConfig(4, core.TokenChoice(1), core.AttentionExperts(4, 1))}, "which is no FFN"),
    ({"ffn": [MOE]}, r"moe lists 1 layers for 3 sparse blocks, \[1\] and \[0, 1\]"),
])  # fmt: skip
def test_bad_combinations(changed, message):
    arguments = {"vocab": VOCAB, "ffn": MOE, "encoder_moe_blocks": "last1", "decoder_moe_blocks": "all", **changed}
    config = arguments.pop("config", DECODER)
    refused(message, CaptionModel, VIT, config, image_size=SIDE, in_chans=3, **arguments)
