"""Towers of CLIP and of BERT's sentence encoders, computed head by head and token by token; and what is refused."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
import torch
from made_clip import IMAGE_DIM, IMAGE_SIZE, LENGTH, OUT_DIM, PATCH, TEXT_DIM, VOCAB, write_clip
from made_encoder import DIM, HIDDEN, PIECES, write_encoder
from refusals import refused
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import core
from apps.porting.open_clip import Clip, ClipImageTower, ClipTextTower, resampled
from apps.porting.sentences import BertConfig, SentenceEncoder, SentenceTower, sentence_weights

END = VOCAB - 1


class Slow:
    """What both published layouts compute, one image or text at a time, in float64."""

    def __init__(self, file, eps):
        self.w, self.eps = {k: v.double() for k, v in load_file(file).items()}, eps

    def norm(self, x, name):
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def linear(self, x, name, dot="."):
        return x @ self.w[f"{name}{dot}weight"].T + self.w[f"{name}{dot}bias"]

    @staticmethod
    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    @staticmethod
    def attention(q, k, v, heads, causal=False):
        (S, D), rows = q.shape, torch.zeros_like(q)
        for part in (slice(i * D // heads, (i + 1) * D // heads) for i in range(heads)):
            for s in range(S):
                seen = s + 1 if causal else S
                rows[s, part] = (q[s, part] @ k[:seen, part].T / math.sqrt(D // heads)).softmax(0) @ v[:seen, part]
        return rows


class SlowClip(Slow):
    def __init__(self, folder, quick_gelu):
        super().__init__(folder / "open_clip_model.safetensors", 1e-5)
        self.act = (lambda x: x / (1 + (-1.702 * x).exp())) if quick_gelu else self.gelu

    def layer(self, x, name, heads, causal):
        q, k, v = self.linear(self.norm(x, f"{name}.ln_1"), f"{name}.attn.in_proj", "_").chunk(3, 1)
        x = x + self.linear(self.attention(q, k, v, heads, causal), f"{name}.attn.out_proj")
        h = self.act(self.linear(self.norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"))
        return x + self.linear(h, f"{name}.mlp.c_proj")

    def image(self, pixels):
        rows = [self.w["visual.class_embedding"]]
        for top in range(0, IMAGE_SIZE, PATCH):
            for left in range(0, IMAGE_SIZE, PATCH):
                patch = pixels[:, top : top + PATCH, left : left + PATCH].double()
                rows.append((self.w["visual.conv1.weight"] * patch).sum((1, 2, 3)))
        x = self.norm(torch.stack(rows) + self.w["visual.positional_embedding"], "visual.ln_pre")
        for i in range(2):
            x = self.layer(x, f"visual.transformer.resblocks.{i}", 2, causal=False)
        return self.norm(x[0], "visual.ln_post") @ self.w["visual.proj"]

    def text(self, ids):
        x = self.w["token_embedding.weight"][ids] + self.w["positional_embedding"][: len(ids)]
        for i in range(2):
            x = self.layer(x, f"transformer.resblocks.{i}", 3, causal=True)
        return self.norm(x[-1], "ln_final") @ self.w["text_projection"]


class SlowSentence(Slow):
    def text(self, ids):
        w, e = self.w, "embeddings."
        x = w[f"{e}word_embeddings.weight"][ids] + w[f"{e}position_embeddings.weight"][: len(ids)]
        x = self.norm(x + w[f"{e}token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for first in ("encoder.layer.0.", "encoder.layer.1."):
            heads = self.attention(
                *(self.linear(x, f"{first}attention.self.{n}") for n in ("query", "key", "value")), 2
            )
            x = x + self.linear(heads, f"{first}attention.output.dense")
            x = self.norm(x, f"{first}attention.output.LayerNorm")
            up = self.gelu(self.linear(x, f"{first}intermediate.dense"))
            x = self.norm(x + self.linear(up, f"{first}output.dense"), f"{first}output.LayerNorm")
        mean = x.mean(0)
        return mean / mean.square().sum().sqrt()


# ---- CLIP


def towers(clip, **options):
    image = ClipImageTower(clip.image, clip.image_size, clip.out_dim, **options)
    return image, ClipTextTower(clip.text, clip.vocab_size, clip.out_dim, **options)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_both_towers_are_the_published_layout(tmp_path, quick_gelu):
    folder = write_clip(tmp_path, quick_gelu=quick_gelu)
    clip, slow = Clip.of(folder), SlowClip(folder, quick_gelu)
    image_tower, text_tower = towers(clip)
    weights = clip.weights()
    image_tower.load_state_dict(weights.image)
    text_tower.load_state_dict(weights.text)
    image = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE)
    expected = torch.stack([slow.image(one) for one in image]).float()
    assert_close(image_tower(image), expected, rtol=1e-5, atol=1e-5)
    texts = [[18, 3, 5, END], [18, END], [18, 1, 2, 3, 4, 7, END]]
    ids_BL = torch.tensor([text + [0] * (LENGTH - len(text)) for text in texts])
    expected = torch.stack([slow.text(text) for text in texts]).float()
    assert_close(text_tower(ids_BL), expected, rtol=1e-5, atol=1e-5)
    assert (weights.log_scale, weights.bias, clip.mean) == (2.5, None, (0.5, 0.4, 0.3))
    other = Clip.of(write_clip(tmp_path / "b", prefix="text.")).weights()  # a text tower of its own name is read too
    assert all(torch.equal(other.text[name], value) for name, value in weights.text.items())


def test_padding_of_a_text_is_not_routed_and_sizes_are_those_of_the_file(tmp_path):
    clip = Clip.of(write_clip(tmp_path))
    image_tower, tower = towers(clip, ffn=core.MoEConfig(4, core.TokenChoice(2), core.FFN(bias=True)))
    with core.record(tower) as tape:
        tower(torch.tensor([[18, 3, 5, END, 0], [18, END, 0, 0, 0]]))
    (recorded,) = tape.entries
    assert recorded.routing.tokens_per_expert_E.sum() == 2 * (4 + 2)
    assert image_tower.tokens(torch.zeros(1, 3, 8, 8)).shape == (1, 5, IMAGE_DIM)
    assert tower.tokens(torch.ones(1, 4, dtype=torch.long)).shape == (1, 4, TEXT_DIM)
    assert image_tower.out_dim == tower.out_dim == OUT_DIM
    with pytest.raises(ValueError, match="a text of 8 subwords exceeds max_positions=7"):
        tower(torch.ones(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="image_size=10 is not divisible by patch_size=4"):
        ClipImageTower(image_tower.config, 10, OUT_DIM)
    # Places are resampled for larger images: four patches of equal places stay so, the class token's is left alone.
    places_SD = torch.cat((torch.full((1, 3), 7.0), torch.full((4, 3), 2.0)))
    assert_close(resampled(places_SD, 1 + 9), torch.cat((torch.full((1, 3), 7.0), torch.full((9, 3), 2.0))))
    assert resampled(places_SD, 5) is places_SD


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"vision_cfg": {"attentional_pool": True}}, "attentional_pool=True, which these towers do not have"),
        ({"vision_cfg": {"timm_model_name": "vit"}}, "timm_model_name='vit', which these towers do not have"),
        ({"text_cfg": {"hf_model_name": "bert"}}, "hf_model_name='bert', which these towers do not have"),
        ({"text_cfg": {"no_causal_mask": True}}, "no_causal_mask=True, which these towers do not have"),
        ({"text_cfg": {"pool_type": "last"}}, "pool_type='last': a text is read at its end"),
        ({"text_cfg": {"heads": 5}}, "dim=12 is not divisible by num_heads=5"),
    ],
)
def test_another_layout_is_refused(tmp_path, changed, match):
    with pytest.raises(ValueError, match=match):
        Clip.of(write_clip(tmp_path, **changed))


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    folder = write_clip(tmp_path)
    config, path = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
    text, tensors = config.read_text(), load_file(path)

    def weights():
        return Clip.of(folder).weights()

    config.write_text(text.replace('"vision_cfg"', '"text_cfg"'))
    refused(r"open_clip_config.json says no vision_cfg$", weights)
    config.write_text(text)
    save_file({**tensors, "visual.more": torch.zeros(1)}, path)
    refused(r"has the tensor 'visual.more', which has no place", weights)
    save_file({name: t for name, t in tensors.items() if name != "visual.ln_pre.bias"}, path)
    refused(r"lacks the tensor 'visual.ln_pre.bias'", weights)
    path.unlink()
    refused(r"neither open_clip_model\.safetensors nor open_clip_pytorch_model\.bin", weights)
    config.unlink()
    refused(r"open_clip_config.json is missing", weights)


# ---- sentence encoders


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_vector_is_the_mean_of_the_pieces_at_unit_length(tmp_path, prefix):
    slow = SlowSentence(write_encoder(tmp_path / "plain") / "model.safetensors", 1e-12)
    encoder = SentenceEncoder(write_encoder(tmp_path / "own", prefix=prefix))
    texts = ["red shoes", "", "blue hat, red hat, blue shoes", "unknown"]
    for text, vector in zip(texts, encoder.encode(texts, 64), strict=True):
        assert_close(vector, slow.text(encoder.pieces.encode(text, 16)).float(), rtol=1e-5, atol=1e-6)
    # The first 6 pieces of the third text: [CLS] blue hat , red [SEP].
    assert_close(encoder.encode(texts[2:3], 6), encoder.encode(["blue hat, red"], 64))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"model_type": "mpnet"}, r"holds a model of type 'mpnet' \(None\): a sentence encoder is read where"),
        ({"hidden_act": "relu"}, r"of type 'bert' \(relu\)"),
        ({"num_hidden_layers": 3}, r"lacks the tensor 'encoder.layer.2.attention.self.query.weight'"),
        ({"hidden_size": None}, r"^{folder}/config.json says no hidden_size$"),
    ],
)
def test_another_model_is_refused(tmp_path, changed, match):
    path = write_encoder(tmp_path) / "config.json"
    config = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    with pytest.raises(ValueError, match=match.replace("{folder}", str(tmp_path))):
        SentenceEncoder(tmp_path)


def test_another_pooling_and_sizes_out_of_range_are_refused(tmp_path):
    folder = write_encoder(tmp_path)
    (folder / "1_Pooling").mkdir()
    for name in ("mean_tokens", "cls_token"):
        modes = {f"pooling_mode_{mode}": mode == name for mode in ("cls_token", "mean_tokens")}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
        refused = pytest.raises(ValueError, match="takes pooling_mode_cls_token: a text's vector is the mean")
        with contextlib.nullcontext() if name == "mean_tokens" else refused:
            SentenceEncoder(folder)
    with pytest.raises(ValueError, match="dim=10 is not divisible by num_heads=4"):
        BertConfig(dim=10, num_heads=4)


def test_a_tower_for_training_is_the_frozen_encoder(tmp_path):
    folder = write_encoder(tmp_path)
    config = BertConfig.of(folder)
    assert config == BertConfig(DIM, HIDDEN, depth=2, num_heads=2, max_positions=16)
    tower = SentenceTower(config, len(PIECES))
    tower.load_state_dict(sentence_weights(folder, tower.state_dict()))
    ids_BL = torch.tensor([[2, 4, 5, 6, 3], [2, 8, 3, 0, 0]])  # [CLS] red shoe ##s [SEP]; [CLS] hat [SEP]
    vectors = torch.nn.functional.normalize(tower(ids_BL), dim=1)
    assert_close(vectors, SentenceEncoder(folder).encode(["red shoes", "hat"], 16), rtol=1e-6, atol=1e-7)
    vectors[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.layers.parameters() if p.ndim == 2)


def test_a_mixture_in_the_tower_routes_no_padding():
    moe = core.MoEConfig(4, core.TokenChoice(2), core.FFN(HIDDEN, bias=True))
    tower = SentenceTower(BertConfig(DIM, HIDDEN, 2, 2, 16, dropout=0.5), len(PIECES), moe).eval()
    assert list(core.moe_layers(tower)) == ["layers.1.ffn"]
    ids_BL = torch.tensor([[2, 4, 5, 6, 3], [2, 8, 3, 0, 0]])
    with core.record(tower) as tape:
        both = tower(ids_BL)
    (recorded,) = tape.entries
    assert recorded.routing.tokens_per_expert_E.sum() == 2 * (5 + 3)  # two experts for each of 8 pieces
    assert_close(both[1:], tower(ids_BL[1:, :3]))
    assert not torch.equal(tower.train()(ids_BL), both)  # dropout
    with pytest.raises(ValueError, match="a text of 17 subwords exceeds max_positions=16"):
        tower(torch.ones(1, 17, dtype=torch.long))
