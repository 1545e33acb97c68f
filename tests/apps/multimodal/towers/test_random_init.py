"""Two towers with the blocks of a single tower: they compute what it does, each for its modality."""

from __future__ import annotations

import pytest
from small_pairs import MOE, TOWER, pair_batch, retriever
from torch.testing import assert_close

import core
from apps.multimodal.towers.random_init import PatchImages, PieceTexts
from apps.multimodal.towers.stack import IMAGE, TEXT
from apps.multimodal.towers.two_towers import TwoTowers

TWO = TwoTowers(PatchImages(blocks_as=TOWER), PieceTexts(blocks_as=TOWER))


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "sparse"])
def test_with_the_weights_of_a_single_tower_they_have_its_vectors(moe):
    single, two, batch = retriever(moe=moe).eval(), retriever(moe=moe, tower=TWO).eval(), pair_batch(5)
    weights = single.model.towers.state_dict()
    for part in (two.model.towers.image, two.model.towers.text):
        own = part.network.state_dict()
        part.network.load_state_dict({name: weights[name] for name in own})
        assert own.keys() < weights.keys()
    for kind in ("image_proj", "text_proj"):
        getattr(two.model, kind).load_state_dict(getattr(single.model, kind).state_dict())
    assert_close(two(batch.image, batch.text_BL), single(batch.image, batch.text_BL))
    assert_close(two.model.towers.image_tokens(batch.image), single.model.towers.image_tokens(batch.image))
    assert_close(two.model.towers.text_tokens(batch.text_BL), single.model.towers.text_tokens(batch.text_BL))


def test_each_tower_s_experts_see_one_modality():
    module, batch = retriever(tower=TWO).eval(), pair_batch(3)
    with core.record(module) as tape:
        module(batch.image, batch.text_BL)
    names = [entry.name for entry in tape.entries]
    assert names == [f"model.towers.{part}.network.stack.layers.1.ffn" for part in ("image", "text")]
    assert names == list(module.moe_block_names)
    for entry, kind in zip(tape.entries, (IMAGE, TEXT), strict=True):
        assert entry.context.modality_BS.unique().tolist() == [kind]
    figures = core.RoutingStats.from_tape(tape).layers[names[TEXT]].figures()
    assert "modality1_experts" in figures
    assert "modality0_experts" not in figures


def test_recomputed_blocks_have_the_same_gradients():
    batch, gradients = pair_batch(4), []
    for checkpointed in (False, True):
        module = retriever(tower=TWO, grad_checkpointing=checkpointed).train()
        module.training_loss(batch).total.backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    assert_close(gradients[0], gradients[1])


def test_no_weights_are_published_for_them():
    with pytest.raises(ValueError, match="pretrained=minilm: there are no weights of a PieceTexts"):
        PieceTexts(pretrained="minilm")
