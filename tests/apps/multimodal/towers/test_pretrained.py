"""Towers of published layouts: sparse ones begin with the outputs of the published dense ones."""

from __future__ import annotations

import pytest
import timm
import torch
from made_clip import DEPTH, IMAGE_DIM, IMAGE_SIZE, LENGTH, OUT_DIM, PATCH, TEXT_DIM, VOCAB, write_clip
from made_encoder import DIM, HIDDEN, PIECES, write_encoder
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import core
from apps.multimodal.towers.pretrained import BertTexts, ClipImages, ClipTexts, ViTImages
from apps.multimodal.towers.towers import Sizes
from apps.porting.open_clip import Clip, ClipImageConfig, ClipImageTower, ClipTextConfig, ClipTextTower
from apps.porting.sentences import BertConfig, SentenceEncoder
from apps.vision.model import ViTConfig

MOE = core.MoEConfig(4, core.TokenChoice(2), core.FFN(bias=True))
BERT = BertConfig(DIM, HIDDEN, depth=2, num_heads=2, max_positions=16)
BERT_MOE = core.MoEConfig(4, core.TokenChoice(2), core.FFN(HIDDEN, bias=True))
IDS_BL = torch.tensor([[2, 4, 5, 6, 3], [2, 8, 3, 0, 0]])


def sizes(image_size=IMAGE_SIZE, in_chans=3, vocab_size=VOCAB, max_tokens=LENGTH):
    return Sizes(image_size, in_chans, vocab_size, max_tokens)


def bert(folder, ffn=BERT_MOE, **options):
    part = BertTexts(str(folder), bert=BERT)
    return part.build(sizes(vocab_size=len(PIECES), **options), ffn, () if ffn is None else (1,))


@pytest.mark.parametrize("ffn", [None, BERT_MOE])
def test_a_text_tower_begins_as_the_sentence_encoder(tmp_path, ffn):
    folder = write_encoder(tmp_path)
    tower = bert(folder, ffn)
    assert tower.load_start() is None
    assert len(core.moe_layers(tower)) == (0 if ffn is None else 1)
    vectors = torch.nn.functional.normalize(tower(IDS_BL), dim=1)
    assert_close(vectors, SentenceEncoder(folder).encode(["red shoes", "hat"], 16), rtol=1e-5, atol=1e-5)
    tokens_BLD = tower.tokens(IDS_BL)
    assert tokens_BLD[1, 3:].abs().sum() == 0
    assert_close(tokens_BLD.sum(1) / torch.tensor([[5.0], [3.0]]), tower(IDS_BL))


def test_routers_know_what_a_text_is(tmp_path):
    with core.record(tower := bert(write_encoder(tmp_path))) as tape:
        tower(IDS_BL)
    (entry,) = tape.entries
    assert entry.context.modality_BS.unique().tolist() == [1]
    assert torch.equal(entry.context.valid_BS, IDS_BL != 0)
    assert torch.equal(entry.context.token_ids_BS, IDS_BL)


def test_a_wider_dense_network_stays_as_it_was_drawn(tmp_path):
    tower = bert(write_encoder(tmp_path), core.DenseFFN(2 * HIDDEN))
    before = tower.network.layers[1].ffn.w_in.weight.clone()
    tower.load_start()
    published = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tower.network.layers[1].ffn.w_in.weight, before)
    assert torch.equal(tower.network.layers[0].ffn.w_in.weight, published["encoder.layer.0.intermediate.dense.weight"])
    assert torch.equal(tower.network.layers[1].query.weight, published["encoder.layer.1.attention.self.query.weight"])


@pytest.mark.parametrize("ffn", [None, core.MoEConfig(4, core.TokenChoice(2), core.FFN(bias=True))])
def test_an_image_tower_begins_with_timms_weights(tmp_path, ffn):
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.models.VisionTransformer(**options).eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    vit = ViTConfig(embed_dim=12, depth=2, num_heads=2)
    tower = (
        ViTImages(str(tmp_path / "vit.safetensors"), vit=vit).build(sizes(), ffn, () if ffn is None else (1,)).eval()
    )
    assert tower.load_start() is None
    image = torch.randn(2, 3, 8, 8)
    assert_close(tower(image), model.forward_head(model.forward_features(image), pre_logits=True), rtol=1e-5, atol=1e-5)
    assert_close(tower.tokens(image), model.forward_features(image), rtol=1e-5, atol=1e-5)
    assert (tower.num_patches, tower.dim) == (4, 12)


def clip_towers(folder, moe=None, **options):
    image = ClipImages(str(folder), clip=ClipImageConfig(IMAGE_DIM, DEPTH, 2, patch_size=PATCH))
    text = ClipTexts(str(folder), clip=ClipTextConfig(TEXT_DIM, DEPTH, 3, max_positions=LENGTH))
    return image.build(sizes(**options), moe, () if moe is None else (1,)), text.build(
        sizes(**options), moe, () if moe is None else (1,)
    )


@pytest.mark.parametrize("moe", [None, MOE])
def test_clips_towers_begin_as_published(tmp_path, moe):
    folder = write_clip(tmp_path)
    image_tower, text_tower = clip_towers(folder, moe)
    (image_proj, *_), (text_proj, log_scale, bias) = image_tower.load_start(), text_tower.load_start()
    assert (log_scale, bias) == (2.5, None)
    clip = Clip.of(folder)
    weights = clip.weights()
    image_net, text_net = ClipImageTower(clip.image, 8, OUT_DIM), ClipTextTower(clip.text, VOCAB, OUT_DIM)
    image_net.load_state_dict(weights.image)
    text_net.load_state_dict(weights.text)
    image, ids_BL = torch.randn(2, 3, 8, 8), torch.tensor([[18, 3, 19, 0], [18, 4, 5, 19]])
    assert_close(image_tower(image) @ image_proj.T, image_net(image), rtol=1e-5, atol=1e-5)
    assert_close(text_tower(ids_BL) @ text_proj.T, text_net(ids_BL), rtol=1e-5, atol=1e-5)
    assert text_tower.tokens(ids_BL)[0, 3].abs().sum() == 0
    assert image_tower.num_patches == 4


def test_images_of_another_size_and_grey_ones_are_adapted_to(tmp_path):
    tower, _ = clip_towers(write_clip(tmp_path), image_size=16, in_chans=1)
    tower.load_start()
    colour = Clip.of(tmp_path).weights().image["patches.weight"]
    assert_close(tower.network.patches.weight, colour.sum(1, keepdim=True))  # a grey image is one of equal channels
    assert tower(torch.randn(1, 1, 16, 16)).shape == (1, IMAGE_DIM)


@pytest.mark.parametrize(
    ("part", "options", "match"),
    [
        (
            BertTexts("folder", bert=BertConfig(DIM, HIDDEN, 3, 2, 16)),
            {},
            r"tower.text.bert=.*depth=3.* is, in .*depth=2",
        ),
        (BertTexts("folder", bert=BERT), {"vocab_size": 99}, "has 13 subwords, and the data 99: give the data its"),
        (BertTexts("nowhere", bert=BERT), {}, "tower.text.pretrained='nowhere' is no folder of"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, monkeypatch, part, options, match):
    write_encoder(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    tower = part.build(sizes(**{"vocab_size": len(PIECES), **options}), None, ())
    with pytest.raises(ValueError, match=match):
        tower.load_start()


def test_experts_of_another_form_are_refused(tmp_path):
    moe = core.MoEConfig(4, core.TokenChoice(2), core.FFN(HIDDEN))
    with pytest.raises(ValueError, match=r"layer 'layers.1.ffn' has experts FFN\(.*bias=False\), .*set moe.expert"):
        bert(write_encoder(tmp_path), moe).load_start()


def test_experts_at_their_default_are_as_the_network(tmp_path):
    moe = core.MoEConfig(4, core.TokenChoice(2))
    tower = bert(write_encoder(tmp_path / "bert"), [moe])
    tower.load_start()
    assert tower.moes[0].expert == core.FFN(HIDDEN, bias=True)
    folder = write_clip(tmp_path / "clip", quick_gelu=True)
    image = ClipImages(str(folder), clip=Clip.of(folder).image).build(sizes(), moe, (0, 1))
    image.load_start()
    assert image.moes[0].expert == core.GeneralFFN(4 * IMAGE_DIM, "quick_gelu", bias_out=True)
    plain = ClipImages(str(folder), clip=Clip.of(folder).image).build(sizes(), None, ())
    plain.load_start()
    pixels = torch.randn(2, 3, 8, 8)
    assert_close(image(pixels), plain(pixels), rtol=1e-5, atol=1e-5)


def test_parts_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match="max_tokens=17 of the data exceeds max_positions=16 of the text tower"):
        BertTexts(bert=BERT).build(sizes(max_tokens=17), None, ())
    with pytest.raises(ValueError, match=r"vit.patch_drop=0.5 leaves out patches"):
        ViTImages(vit=ViTConfig(patch_drop=0.5))
    with pytest.raises(ValueError, match="start='copies' is not one of copy"):
        BertTexts(start="copies")
    with pytest.raises(ValueError, match="reads inputs, which no configuration gives"):
        BertTexts(start=core.convert.SplitStart("coactivation"))


def test_a_clip_of_other_sizes_is_refused(tmp_path):
    folder = write_clip(tmp_path)
    tower = ClipImages(str(folder), clip=ClipImageConfig(IMAGE_DIM, 3, 2, patch_size=PATCH)).build(sizes(), None, ())
    with pytest.raises(ValueError, match=r"tower.image.clip=.*depth=3.* is, in .*depth=2"):
        tower.load_start()
