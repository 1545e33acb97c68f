"""Two towers: training, published starts, and conversions between dense and sparse."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml
from converted import write_run
from made_clip import DEPTH, IMAGE_DIM, LENGTH, OUT_DIM, PATCH, TEXT_DIM, VOCAB, write_clip
from made_encoder import DIM, HIDDEN, write_encoder
from quiet_trainer import quiet_trainer
from small_pairs import Pairs, pair_batch, retriever
from torch.nn.functional import normalize
from torch.testing import assert_close

import apps
import core
from apps.cli import main
from apps.multimodal.module import ImageTextRetriever
from apps.multimodal.towers.loss import SigmoidLoss, SoftmaxLoss
from apps.multimodal.towers.pretrained import BertTexts, ClipImages, ClipTexts, ViTImages
from apps.multimodal.towers.two_towers import TwoTowers
from apps.porting.open_clip import Clip, ClipImageConfig, ClipImageTower, ClipTextConfig, ClipTextTower
from apps.porting.sentences import BertConfig
from apps.train.step.module import OptimizerConfig
from apps.vision.model import ViTConfig

VIT = ViTConfig(embed_dim=DIM, depth=2, num_heads=2, hidden_dim=HIDDEN, patch_size=4)
BERT = BertConfig(DIM, HIDDEN, depth=2, num_heads=2, max_positions=16)
TWO = TwoTowers(ViTImages(vit=VIT), BertTexts(bert=BERT))
MOE = core.MoEConfig(4, core.TokenChoice(2), core.FFN(HIDDEN, bias=True))
LAYERS = ["model.towers.image.network.blocks.1.mlp", "model.towers.text.network.layers.1.ffn"]


def two(**changed):
    return retriever(**{"tower": TWO, "moe": MOE, **changed})


@torch.no_grad()
def vectors(module):
    batch = pair_batch()
    return module.eval()(batch.image, batch.text_BL)[:2]


@pytest.mark.slow
def test_a_training_learns_its_pairs_and_is_read_again(tmp_path):
    module = two(optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0.0), grad_checkpointing=True)
    assert list(core.moe_layers(module)) == LAYERS
    trainer = quiet_trainer(tmp_path, max_epochs=15)
    trainer.fit(module, Pairs())
    assert trainer.callback_metrics["val/recall_1"] == 1.0
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    again = ImageTextRetriever.load_from_checkpoint(tmp_path / "best.ckpt")
    assert again.tower == TWO
    assert_close(vectors(again), vectors(module))


def test_recomputed_blocks_have_the_gradients_of_kept_ones():
    gradients = []
    for recompute in (False, True):
        module = two(grad_checkpointing=recompute)
        module.task_loss(pair_batch()).loss.backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    assert_close(*gradients)


def test_the_outputs_at_patches_and_pieces():
    towers, batch = two().model.towers, pair_batch()
    image_BSD, text_BLD = towers.image_tokens(batch.image), towers.text_tokens(batch.text_BL)
    assert (towers.num_patches, image_BSD.shape, text_BLD.shape) == (4, (4, 5, DIM), (4, 5, DIM))
    assert torch.equal(text_BLD.abs().sum(2) > 0, batch.text_BL != 0)


def clip_tower(folder):
    image = ClipImages(str(folder), clip=ClipImageConfig(IMAGE_DIM, DEPTH, 2, patch_size=PATCH))
    return TwoTowers(image, ClipTexts(str(folder), clip=ClipTextConfig(TEXT_DIM, DEPTH, 3, max_positions=LENGTH)))


@pytest.mark.parametrize("moe", [None, core.MoEConfig(4, core.TokenChoice(2), core.FFN(bias=True))])
def test_a_test_begins_as_the_published_clip(tmp_path, moe):
    folder = write_clip(tmp_path / "clip")
    module = two(tower=clip_tower(folder), moe=moe, dim=OUT_DIM, loss=SigmoidLoss())
    quiet_trainer(tmp_path).test(module, Pairs(), verbose=False)
    clip = Clip.of(folder)
    image_net, text_net = ClipImageTower(clip.image, 8, OUT_DIM), ClipTextTower(clip.text, VOCAB, OUT_DIM)
    image_net.load_state_dict(clip.weights().image)
    text_net.load_state_dict(clip.weights().text)
    batch = pair_batch()
    expected = normalize(image_net(batch.image), dim=1), normalize(text_net(batch.text_BL), dim=1)
    assert_close(vectors(module), expected, rtol=1e-5, atol=1e-5)
    assert module.loss.log_scale.item() == 2.5
    assert module.loss.bias.item() == -10.0  # the checkpoint says none


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
    with pytest.raises(ValueError, match=r"open_clip_config.json is missing"):
        quiet_trainer(tmp_path).test(again.twin(), Pairs(), verbose=False)


def test_a_temperature_that_is_not_learned_stays():
    loss = SoftmaxLoss(0.5, learn_temperature=False).build()
    loss.begin(2.5, None)
    assert loss.temperature.item() == pytest.approx(0.5)
    loss = SigmoidLoss().build()
    loss.begin(9.0, -3.0)
    assert (loss.temperature.item(), loss.bias.item()) == (pytest.approx(0.01), -3.0)  # the bound


def test_which_blocks_of_a_tower_are_sparse():
    text = BertTexts(bert=BERT, moe_blocks="none")
    assert list(core.moe_layers(two(tower=TwoTowers(TWO.image, text)))) == LAYERS[:1]
    image = ViTImages(vit=VIT, moe_blocks=[0, 1])
    other = core.MoEConfig(2, core.TokenChoice(1), core.FFN(4))
    module = two(tower=TwoTowers(image, TWO.text), moe=[MOE, MOE, other])
    assert [layer.num_experts for layer in core.moe_layers(module).values()] == [4, 4, 2]
    with pytest.raises(ValueError, match=r"moe lists 2 layers for 3 sparse blocks, \[0, 1\] and \[1\]"):
        two(tower=TwoTowers(image, TWO.text), moe=[MOE, MOE])
    with pytest.raises(ValueError, match=r"moe is given, and tower.image and tower.text both have moe_blocks='none'"):
        two(tower=TwoTowers(ViTImages(vit=VIT, moe_blocks="none"), text))


def test_what_does_not_fit_is_refused(tmp_path):
    module = two(tower=clip_tower(write_clip(tmp_path)), moe=None)
    with pytest.raises(ValueError, match="dim=8 is not 6, that of the pretrained vectors"):
        quiet_trainer(tmp_path).test(module, Pairs(), verbose=False)
    with pytest.raises(ValueError, match=r"tower.image=BertTexts\(.* is not of class ImagePart"):
        TwoTowers(TWO.text)


# ---- conversions


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
    assert list(core.moe_layers(sparse)) == LAYERS
    assert sparse.moe.expert == core.FFN(HIDDEN, bias=True)
    old = apps.load(dense)
    batch = pair_batch()
    text_BL = batch.text_BL.clamp(max=12)
    with torch.no_grad():
        expected = old(batch.image, text_BL)[:2]
        assert_close(sparse(batch.image, text_BL)[:2], expected, rtol=1e-5, atol=1e-5)
        again = convert("densify", tmp_path / "sparse", tmp_path / "again")
        assert again.moe is None
        assert_close(again(batch.image, text_BL)[:2], expected, rtol=1e-5, atol=1e-5)
