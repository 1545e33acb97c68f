"""CLIP's towers: the layout of open_clip computed head by head and token by token, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from made_clip import IMAGE_DIM, IMAGE_SIZE, LENGTH, OUT_DIM, PATCH, TEXT_DIM, VOCAB, write_clip
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import core
from apps.porting.open_clip import Clip, ClipImageTower, ClipTextTower, resampled

END = VOCAB - 1


class Slow:
    """The published layout, one image or text at a time, in float64."""

    def __init__(self, folder, quick_gelu):
        self.w = {k: v.double() for k, v in load_file(folder / "open_clip_model.safetensors").items()}
        self.quick_gelu = quick_gelu

    def norm(self, x, name):
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def act(self, x):
        return x / (1 + (-1.702 * x).exp()) if self.quick_gelu else x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def layer(self, x, name, heads, causal):
        S, D = x.shape
        h = self.norm(x, f"{name}.ln_1")
        q, k, v = (h @ self.w[f"{name}.attn.in_proj_weight"].T + self.w[f"{name}.attn.in_proj_bias"]).chunk(3, 1)
        rows = torch.zeros(S, D, dtype=torch.float64)
        for i in range(heads):
            part = slice(i * D // heads, (i + 1) * D // heads)
            for s in range(S):
                seen = s + 1 if causal else S
                weight = (q[s, part] @ k[:seen, part].T / math.sqrt(D // heads)).softmax(0)
                rows[s, part] = weight @ v[:seen, part]
        x = x + rows @ self.w[f"{name}.attn.out_proj.weight"].T + self.w[f"{name}.attn.out_proj.bias"]
        h = self.act(
            self.norm(x, f"{name}.ln_2") @ self.w[f"{name}.mlp.c_fc.weight"].T + self.w[f"{name}.mlp.c_fc.bias"]
        )
        return x + h @ self.w[f"{name}.mlp.c_proj.weight"].T + self.w[f"{name}.mlp.c_proj.bias"]

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


def towers(clip, **options):
    image = ClipImageTower(clip.image, clip.image_size, clip.out_dim, **options)
    return image, ClipTextTower(clip.text, clip.vocab_size, clip.out_dim, **options)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_both_towers_are_the_published_layout(tmp_path, quick_gelu):
    folder = write_clip(tmp_path, quick_gelu=quick_gelu)
    clip, slow = Clip.of(folder), Slow(folder, quick_gelu)
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
    assert weights.log_scale == 2.5
    assert weights.bias is None
    assert clip.mean == (0.5, 0.4, 0.3)


def test_a_text_tower_of_its_own_name_is_read_too(tmp_path):
    clip, other = Clip.of(write_clip(tmp_path / "a")), Clip.of(write_clip(tmp_path / "b", prefix="text."))
    for name, value in clip.weights().text.items():
        assert torch.equal(other.weights().text[name], value)


def test_padding_of_a_text_is_not_routed(tmp_path):
    clip = Clip.of(write_clip(tmp_path))
    moe = core.MoEConfig(4, core.TokenChoice(2), core.FFN(bias=True))
    _, tower = towers(clip, ffn=moe)
    ids_BL = torch.tensor([[18, 3, 5, END, 0], [18, END, 0, 0, 0]])
    with core.record(tower) as tape:
        tower(ids_BL)
    (recorded,) = tape.entries
    assert recorded.routing.tokens_per_expert_E.sum() == 2 * (4 + 2)


def test_places_are_resampled_for_larger_images():
    # Four patches whose places are equal stay so, and the class token's is left alone.
    places_SD = torch.cat((torch.full((1, 3), 7.0), torch.full((4, 3), 2.0)))
    larger_SD = resampled(places_SD, 1 + 9)
    assert_close(larger_SD, torch.cat((torch.full((1, 3), 7.0), torch.full((9, 3), 2.0))))
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
    config = folder / "open_clip_config.json"
    text = config.read_text()
    config.write_text(text.replace('"vision_cfg"', '"text_cfg"'))
    with pytest.raises(ValueError, match=r"open_clip_config.json says no vision_cfg$"):
        Clip.of(folder)
    config.write_text(text)
    path = folder / "open_clip_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "visual.more": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"has the tensor 'visual.more', which has no place"):
        Clip.of(folder).weights()
    save_file({name: t for name, t in tensors.items() if name != "visual.ln_pre.bias"}, path)
    with pytest.raises(ValueError, match=r"lacks the tensor 'visual.ln_pre.bias'"):
        Clip.of(folder).weights()
    path.unlink()
    with pytest.raises(ValueError, match=r"neither open_clip_model\.safetensors nor open_clip_pytorch_model\.bin"):
        Clip.of(folder).weights()
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(ValueError, match=r"open_clip_config.json is missing"):
        Clip.of(folder)


def test_sizes(tmp_path):
    image_tower, text_tower = towers(Clip.of(write_clip(tmp_path)))
    assert image_tower.tokens(torch.zeros(1, 3, 8, 8)).shape == (1, 5, IMAGE_DIM)
    assert text_tower.tokens(torch.ones(1, 4, dtype=torch.long)).shape == (1, 4, TEXT_DIM)
    assert image_tower.out_dim == text_tower.out_dim == OUT_DIM
    with pytest.raises(ValueError, match="a text of 8 subwords exceeds max_positions=7"):
        text_tower(torch.ones(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="image_size=10 is not divisible by patch_size=4"):
        ClipImageTower(image_tower.config, 10, OUT_DIM)
