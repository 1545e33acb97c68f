"""Towers of published layouts: they begin as published, are trained, and converted between dense and sparse."""

import shutil

import pytest
import timm
import torch
import yaml
from converted import write_run
from made_clip import DEPTH, IMAGE_DIM, IMAGE_SIZE, LENGTH, OUT_DIM, PATCH, TEXT_DIM, VOCAB, write_clip
from made_encoder import DIM, HIDDEN, PIECES, write_encoder
from quiet_trainer import quiet_trainer
from refusals import refused
from safetensors.torch import load_file, save_file
from small_pairs import Pairs, pair_batch, retriever
from torch.nn.functional import normalize
from torch.testing import assert_close

import apps
import core
from apps.cli import main
from apps.multimodal.module import ImageTextRetriever
from apps.multimodal.towers.loss import SigmoidLoss
from apps.multimodal.towers.pretrained import BertTexts, ClipImages, ClipTexts, ViTImages
from apps.multimodal.towers.towers import Sizes
from apps.multimodal.towers.two_towers import TwoTowers
from apps.porting.open_clip import Clip, ClipImageConfig, ClipImageTower, ClipTextConfig, ClipTextTower
from apps.porting.sentences import BertConfig, SentenceEncoder
from apps.vision.model import ViTConfig

CLIP_MOE = core.MoEConfig(4, core.TokenChoice(2), core.FFN(bias=True))
BERT = BertConfig(DIM, HIDDEN, depth=2, num_heads=2, max_positions=16)
MOE = core.MoEConfig(4, core.TokenChoice(2), core.FFN(HIDDEN, bias=True))
IDS_BL = torch.tensor([[2, 4, 5, 6, 3], [2, 8, 3, 0, 0]])


def built(part, ffn=None, blocks=(1,), **options):
    sizes = {"image_size": IMAGE_SIZE, "in_chans": 3, "vocab_size": VOCAB, "max_tokens": LENGTH, **options}
    return part.build(Sizes(**sizes), ffn, () if ffn is None else blocks)


def bert(folder, ffn=MOE, **options):
    return built(BertTexts(str(folder), bert=BERT), ffn, vocab_size=len(PIECES), **options)


@pytest.mark.parametrize("ffn", [None, MOE])
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


def test_a_wider_dense_network_stays_as_it_was_drawn_and_routers_know_texts(tmp_path):
    tower = bert(write_encoder(tmp_path), core.DenseFFN(2 * HIDDEN))
    before = tower.network.layers[1].ffn.w_in.weight.clone()
    tower.load_start()
    published = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tower.network.layers[1].ffn.w_in.weight, before)
    assert torch.equal(tower.network.layers[0].ffn.w_in.weight, published["encoder.layer.0.intermediate.dense.weight"])
    assert torch.equal(tower.network.layers[1].query.weight, published["encoder.layer.1.attention.self.query.weight"])
    with core.record(tower := bert(write_encoder(tmp_path))) as tape:
        tower(IDS_BL)
    (entry,) = tape.entries
    assert entry.context.modality_BS.unique().tolist() == [1]
    assert torch.equal(entry.context.valid_BS, IDS_BL != 0)
    assert torch.equal(entry.context.token_ids_BS, IDS_BL)


@pytest.mark.parametrize("ffn", [None, CLIP_MOE])
def test_an_image_tower_begins_with_timms_weights(tmp_path, ffn):
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.models.VisionTransformer(**options).eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    vit = ViTConfig(embed_dim=12, depth=2, num_heads=2)
    tower = built(ViTImages(str(tmp_path / "vit.safetensors"), vit=vit), ffn).eval()
    assert tower.load_start() is None
    image = torch.randn(2, 3, 8, 8)
    features = model.forward_features(image)
    assert_close(tower(image), model.forward_head(features, pre_logits=True), rtol=1e-5, atol=1e-5)
    assert_close(tower.tokens(image), features, rtol=1e-5, atol=1e-5)
    assert (tower.num_patches, tower.dim) == (4, 12)


def clip_tower(folder):
    image = ClipImages(str(folder), clip=ClipImageConfig(IMAGE_DIM, DEPTH, 2, patch_size=PATCH))
    return TwoTowers(image, ClipTexts(str(folder), clip=ClipTextConfig(TEXT_DIM, DEPTH, 3, max_positions=LENGTH)))


def published(folder):
    """Return the towers of the published CLIP."""
    clip = Clip.of(folder)
    image_net, text_net = ClipImageTower(clip.image, 8, OUT_DIM), ClipTextTower(clip.text, VOCAB, OUT_DIM)
    image_net.load_state_dict(clip.weights().image)
    text_net.load_state_dict(clip.weights().text)
    return image_net, text_net


@pytest.mark.parametrize("moe", [None, CLIP_MOE])
def test_clips_towers_begin_as_published(tmp_path, moe):
    folder = write_clip(tmp_path)
    image_tower, text_tower = (built(part, moe) for part in (clip_tower(folder).image, clip_tower(folder).text))
    (image_proj, *_), (text_proj, log_scale, bias) = image_tower.load_start(), text_tower.load_start()
    assert (log_scale, bias) == (2.5, None)
    image_net, text_net = published(folder)
    image, ids_BL = torch.randn(2, 3, 8, 8), torch.tensor([[18, 3, 19, 0], [18, 4, 5, 19]])
    assert_close(image_tower(image) @ image_proj.T, image_net(image), rtol=1e-5, atol=1e-5)
    assert_close(text_tower(ids_BL) @ text_proj.T, text_net(ids_BL), rtol=1e-5, atol=1e-5)
    assert (text_tower.tokens(ids_BL)[0, 3].abs().sum(), image_tower.num_patches) == (0, 4)


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    write_encoder(tmp_path / "folder")
    write_clip(tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    deep, small = BertConfig(DIM, HIDDEN, 3, 2, 16), {"vocab_size": len(PIECES)}
    clip = ClipImages("clip", clip=ClipImageConfig(IMAGE_DIM, 3, 2, patch_size=PATCH))
    for part, options, rule in (
        (BertTexts("folder", bert=deep), small, r"tower.text.bert=.*depth=3.* is, in .*depth=2"),
        (BertTexts("folder", bert=BERT), {"vocab_size": 99}, "has 13 subwords, and the data 99: give the data its"),
        (BertTexts("nowhere", bert=BERT), small, "tower.text.pretrained='nowhere' is no folder of"),
        (clip, {}, r"tower.image.clip=.*depth=3.* is, in .*depth=2"),
    ):
        refused(rule, built(part, **options).load_start)
    thin = bert("folder", core.MoEConfig(4, core.TokenChoice(2), core.FFN(HIDDEN)))
    refused(r"layer 'layers.1.ffn' has experts FFN\(.*bias=False\), .*set moe.expert", thin.load_start)
    rule = "max_tokens=17 of the data exceeds max_positions=16 of the text tower"
    refused(rule, built, BertTexts(bert=BERT), max_tokens=17)
    refused(r"vit.patch_drop=0.5 leaves out patches", ViTImages, vit=ViTConfig(patch_drop=0.5))
    refused("start='copies' is not one of copy", BertTexts, start="copies")
    start = core.convert.SplitStart("coactivation")
    refused("reads inputs, which no configuration gives", BertTexts, start=start)
    module, rule = two(tower=clip_tower("clip"), moe=None), "dim=8 is not 6, that of the pretrained vectors"
    refused(rule, quiet_trainer(tmp_path).test, module, Pairs(), verbose=False)
    refused(r"tower.image=BertTexts\(.* is not of class ImagePart", TwoTowers, TWO.text)


def test_other_sizes_are_adapted_to_and_experts_are_by_default_as_the_network(tmp_path):
    moe = core.MoEConfig(4, core.TokenChoice(2))
    tower = bert(write_encoder(tmp_path / "bert"), [moe])
    tower.load_start()
    assert tower.moes[0].expert == core.FFN(HIDDEN, bias=True)
    folder = write_clip(tmp_path / "clip", quick_gelu=True)
    image = built(ClipImages(str(folder), clip=Clip.of(folder).image), moe, (0, 1))
    image.load_start()
    assert image.moes[0].expert == core.GeneralFFN(4 * IMAGE_DIM, "quick_gelu", bias_out=True)
    plain = built(ClipImages(str(folder), clip=Clip.of(folder).image))
    plain.load_start()
    pixels = torch.randn(2, 3, 8, 8)
    assert_close(image(pixels), plain(pixels), rtol=1e-5, atol=1e-5)
    tower = built(clip_tower(write_clip(tmp_path)).image, image_size=16, in_chans=1)
    tower.load_start()
    colour = Clip.of(tmp_path).weights().image["patches.weight"]
    assert_close(tower.network.patches.weight, colour.sum(1, keepdim=True))  # a grey image is one of equal channels
    assert tower(torch.randn(1, 1, 16, 16)).shape == (1, IMAGE_DIM)


VIT = ViTConfig(embed_dim=DIM, depth=2, num_heads=2, hidden_dim=HIDDEN, patch_size=4)
TWO = TwoTowers(ViTImages(vit=VIT), BertTexts(bert=BERT))
LAYERS = ["model.towers.image.network.blocks.1.mlp", "model.towers.text.network.layers.1.ffn"]


def two(**changed):
    return retriever(**{"tower": TWO, "moe": MOE, **changed})


@torch.no_grad()
def vectors(module):
    batch = pair_batch()
    return module.eval()(batch.image, batch.text_BL)[:2]


def test_the_outputs_at_patches_and_pieces_and_recomputed_gradients():
    towers, batch, gradients = two().model.towers, pair_batch(), []
    image_BSD, text_BLD = towers.image_tokens(batch.image), towers.text_tokens(batch.text_BL)
    assert (towers.num_patches, image_BSD.shape, text_BLD.shape) == (4, (4, 5, DIM), (4, 5, DIM))
    assert torch.equal(text_BLD.abs().sum(2) > 0, batch.text_BL != 0)
    for recompute in (False, True):
        module = two(grad_checkpointing=recompute)
        module.task_loss(batch).loss.backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    assert_close(*gradients)


@pytest.mark.parametrize("moe", [None, CLIP_MOE])
def test_a_test_begins_as_the_published_clip(tmp_path, moe):
    folder = write_clip(tmp_path / "clip")
    module = two(tower=clip_tower(folder), moe=moe, dim=OUT_DIM, loss=SigmoidLoss())
    quiet_trainer(tmp_path).test(module, Pairs(), verbose=False)
    (image_net, text_net), batch = published(folder), pair_batch()
    expected = normalize(image_net(batch.image), dim=1), normalize(text_net(batch.text_BL), dim=1)
    assert_close(vectors(module), expected, rtol=1e-5, atol=1e-5)
    assert (module.loss.log_scale.item(), module.loss.bias.item()) == (2.5, -10.0)  # the checkpoint says no bias


def test_a_trained_model_needs_no_published_files(tmp_path):
    folder = write_clip(tmp_path / "clip")
    module = two(tower=clip_tower(folder), moe=None, dim=OUT_DIM)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, Pairs())
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    shutil.rmtree(folder)
    again = ImageTextRetriever.load_from_checkpoint(tmp_path / "best.ckpt")
    quiet_trainer(tmp_path).test(again, Pairs(), ckpt_path=tmp_path / "best.ckpt", verbose=False)
    assert_close(vectors(again), vectors(module))
    refused(r"open_clip_config.json is missing", quiet_trainer(tmp_path).test, again.twin(), Pairs(), verbose=False)


def test_which_blocks_of_a_tower_are_sparse():
    text = BertTexts(bert=BERT, moe_blocks="none")
    assert list(core.moe_layers(two(tower=TwoTowers(TWO.image, text)))) == LAYERS[:1]
    image, other = ViTImages(vit=VIT, moe_blocks=[0, 1]), core.MoEConfig(2, core.TokenChoice(1), core.FFN(4))
    module = two(tower=TwoTowers(image, TWO.text), moe=[MOE, MOE, other])
    assert [layer.num_experts for layer in core.moe_layers(module).values()] == [4, 4, 2]
    with pytest.raises(ValueError, match=r"moe lists 2 layers for 3 sparse blocks, \[0, 1\] and \[1\]"):
        two(tower=TwoTowers(image, TWO.text), moe=[MOE, MOE])
    with pytest.raises(ValueError, match=r"moe is given, and tower.image and tower.text both have moe_blocks='none'"):
        two(tower=TwoTowers(ViTImages(vit=VIT, moe_blocks="none"), text))


def convert(kind, run, output, *words):
    assert main(["convert", kind, "--ckpt_path", str(run), "--output", str(output), "--batches", "0", *words]) == 0
    return apps.load(output)


@pytest.fixture
def dense(tmp_path):
    """A dense run whose text tower began as a sentence encoder that is not there any more."""
    text = BertTexts(str(write_encoder(tmp_path / "bert")), bert=BERT)
    module = two(tower=TwoTowers(TWO.image, text), moe=None, vocab_size=13)
    module.model.load_start()
    shutil.rmtree(tmp_path / "bert")
    write_run(tmp_path / "dense", module, {})
    return tmp_path / "dense"


def test_a_dense_run_becomes_sparse_and_dense_again(dense, tmp_path):
    overlay = {"model": {"init_args": {"moe": {"num_experts": 4, "router": {"class_path": "core.TokenChoice"}}}}}
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump(overlay))
    sparse = convert("upcycle", dense, tmp_path / "sparse", "--moe", str(tmp_path / "moe.yaml"))
    assert (list(core.moe_layers(sparse)), sparse.moe.expert) == (LAYERS, core.FFN(HIDDEN, bias=True))
    old, batch = apps.load(dense), pair_batch()
    text_BL = batch.text_BL.clamp(max=12)
    with torch.no_grad():
        expected = old(batch.image, text_BL)[:2]
        assert_close(sparse(batch.image, text_BL)[:2], expected, rtol=1e-5, atol=1e-5)
        again = convert("densify", tmp_path / "sparse", tmp_path / "again")
        assert again.moe is None
        assert_close(again(batch.image, text_BL)[:2], expected, rtol=1e-5, atol=1e-5)
