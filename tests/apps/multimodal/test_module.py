"""``ImageTextRetriever``: its training, its attributes, its values for a comparison, and its baselines."""

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from quiet_trainer import quiet_trainer
from refusals import refused
from small_pairs import MOE, TOWER, Pairs, pair_batch, retriever
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import core
from apps.compare.systems import find_systems
from apps.multimodal.model import AttributeHead
from apps.multimodal.module import ImageTextRetriever
from apps.multimodal.pairs.pairs import PairBatch
from apps.multimodal.report.metrics import PairOutputs, PairTargets
from apps.multimodal.towers.loss import SigmoidLoss
from apps.multimodal.towers.random_init import PatchImages, PieceTexts
from apps.multimodal.towers.two_towers import TwoTowers
from apps.train.cost.flops import Cost
from apps.train.step.module import OptimizerConfig, TaskOutput
from core.config.plain import to_plain

HEAD = AttributeHead(core.MMoE(num_experts=2, expert=core.MLP((8,))), weight=0.5)


def test_a_training_learns_its_pairs_within_the_temperature_s_bound(tmp_path):
    module = retriever(optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0.0))
    trainer = quiet_trainer(tmp_path, max_epochs=15)
    trainer.fit(module, Pairs())
    logged = trainer.callback_metrics
    assert logged["val/recall_1"] == 1.0
    assert {"val/recall_10", "val/image_to_text_recall_5", "val/text_to_image_median_rank"} <= {*logged}
    assert logged["val/routing/drop_rate"] == 0.0
    assert trainer.test(module, Pairs(), verbose=False)[0]["test/recall_1"] == 1.0
    module = retriever(optimizer=OptimizerConfig(lr=1.0, warmup_steps=0.0, schedule="constant"))
    module.loss.log_scale.data.fill_(4.6)
    quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, Pairs())
    assert module.loss.temperature.item() >= 0.01 - 1e-8


def test_a_training_goes_on_from_its_checkpoint(tmp_path):
    data, steady = Pairs(attributes={"a": 3, "b": 2}), OptimizerConfig(warmup_steps=0.0, schedule="constant")
    whole = retriever(attribute_head=HEAD, attributes=data.attributes, loss=SigmoidLoss(), optimizer=steady)
    first = whole.twin()
    first.load_state_dict(whole.state_dict())
    quiet_trainer(tmp_path, max_epochs=4).fit(whole, data)
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(first, data)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = ImageTextRetriever.load_from_checkpoint(tmp_path / "half.ckpt")
    assert second.hparams == first.hparams
    quiet_trainer(tmp_path, max_epochs=4).fit(second, data, ckpt_path=tmp_path / "half.ckpt")
    assert_close(second.state_dict(), whole.state_dict())
    assert second.loss.bias.item() != -10.0


def test_the_attributes_loss_is_weighted_and_its_head_sees_the_image_alone():
    batch, module = pair_batch(6), retriever(attribute_head=HEAD, attributes={"colour": 3, "shape": 2}).eval()
    out = module.task_loss(batch)
    assert [tuple(logits.shape) for logits in out.outputs.logits] == [(6, 3), (6, 2)]
    assert_close(out.loss, out.terms["contrastive_loss"] + 0.5 * out.terms["attribute_loss"])
    assert (batch.label_BA >= 0).sum(0).tolist() == [6, 4]  # the others are of no known class
    each = [cross_entropy(y, batch.label_BA[:, a], ignore_index=-1) for a, y in enumerate(out.outputs.logits)]
    assert_close(out.terms["attribute_loss"], sum(each) / 2)
    other = batch._replace(text_BL=batch.text_BL.flip(0))
    assert_close(module.task_loss(other).outputs.logits, out.outputs.logits)
    assert_close(module.model.image_outputs(batch.image)[1:], out.outputs.logits)


def test_the_values_of_pairs_have_the_recall_as_their_mean():
    # 3 images and 24 texts. Image 0 has the texts 0 and 1, the others one each of the next; 20 texts more are of image
    # 2. Along one axis: the texts of image 0 are right at rank 1; those of image 1 are the last of all.
    image_BD = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]] + [[0.6, 0.8]] * 21)
    outputs = PairOutputs(image_BD, torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, -1.0]] + [[0.5, 0.9]] * 21))
    targets, module = PairTargets(torch.tensor([0, 0, 1] + [2] * 21), torch.arange(24)), retriever()
    expected = module.build_metrics()(outputs, targets)
    values = module.comparison.example_values([TaskOutput(torch.zeros(()), outputs, targets, 24)])
    assert (values.name, values.values_N.shape) == ("recall_10", (24,))
    assert values.mean == pytest.approx(float(expected["recall_10"]), rel=1e-12)
    # Image 1's text is the 24th of 24, and that text's image is the first of 3, with a product of -1 like image 0's.
    assert float(expected["image_to_text_recall_10"]) == pytest.approx(2 / 3)
    assert float(expected["text_to_image_recall_10"]) == 1.0
    # The pair of image 1: no hit of the image, and its text is one of 24 among 24 pairs.
    assert float(values.values_N[2]) == 0.5
    # A pair of image 0: half of its hit, of 3 images over 24 pairs, shared by 2.
    assert float(values.values_N[0]) == pytest.approx(24 / 3 / 2 / 2 + 0.5)


def test_the_recall_that_counts_may_be_another():
    module = retriever(recall_at=1)
    assert (module.monitor, module.shown_metrics) == ("val/recall_1", ("recall_5", "recall_10"))
    assert retriever().monitor == "val/recall_10"
    with torch.no_grad():
        out = module.eval().task_loss(pair_batch(6))
    values = module.comparison.example_values([out])
    assert values.name == "recall_1"
    assert values.mean == pytest.approx(float(module.build_metrics()(out.outputs, out.targets)["recall_1"]))
    refused("recall_at=3 is none of 1, 5, 10", retriever, recall_at=3)


def test_configs_may_be_plain_and_a_comparison_replaces_the_towers_layers(tmp_path):
    tower = {"class_path": "SingleTower", "init_args": {"width": 16, "depth": 2, "num_heads": 2, "patch_size": 4}}
    head = {"attribute_head": to_plain(HEAD, AttributeHead), "attributes": {"a": 3}}
    module = retriever(tower=tower, loss={"class_path": "SigmoidLoss"}, **head)
    assert (module.loss.config, module.attribute_head) == (SigmoidLoss(), HEAD)
    refused("dim=0 must be at least 1", retriever, dim=0)
    rule = "attribute_head predicts the attributes of the data, and the data have none"
    refused(rule, retriever, attribute_head=HEAD)
    refused("dense_ffn", retriever, dense_ffn=core.DenseFFN(8))
    module, other = retriever(attributes={}), Pairs(attributes={"a": 3})
    rule = r"model.attributes=\{\} does not fit the data, whose attributes is"
    refused(rule, quiet_trainer(tmp_path, max_epochs=1).fit, module, other)
    module = retriever(attribute_head=HEAD, attributes={"a": 3})
    assert (module.comparison.moe_block_names, module.comparison.routed_layers().config) == (
        ("model.towers.stack.layers.1.ffn",),
        MOE,
    )
    assert module.comparison.with_moe(core.MoEConfig(2, core.TokenChoice(1), core.FFN(8))).moe.num_experts == 2
    assert retriever(moe=None).comparison.routed_layers() is None


def test_vectors_are_predicted_in_the_data_s_order(tmp_path):
    module, data = retriever(), Pairs(4)
    (prediction,) = quiet_trainer(tmp_path).predict(module, data)
    assert list(prediction) == ["index", "image_vector", "text_vector"]  # these data name neither images nor texts
    assert prediction["index"].tolist() == [0, 1, 2, 3]
    assert_close(prediction["image_vector"], module.eval().image_vectors(data.batch.image), rtol=1e-4, atol=1e-5)
    assert isinstance(data.batch, PairBatch)


BATCH = pair_batch(6)
WIDER = replace(TOWER, width=24)


def built(module: Any) -> tuple[Cost, dict[str, tuple[Any, Cost]]]:
    """Return the model's cost, and its baselines with theirs; none is refused."""
    sparse, *others = find_systems(module, BATCH)
    assert not any(system.refused for system in others)
    baselines = module.comparison.baselines()
    return sparse.cost, {system.name: (baselines[system.name].build(), system.cost) for system in others}


def test_a_single_tower_is_compared_with_one_and_with_two():
    cost, twins = built(retriever(moe_blocks="all"))
    assert list(twins) == ["dense_equal_flops", "dense_equal_params", "two_towers"]
    dense, of_one = twins["dense_equal_flops"]
    assert of_one.flops_per_example == pytest.approx(cost.flops_per_example, rel=0.02)
    assert twins["dense_equal_params"][1].num_params == pytest.approx(cost.num_params, rel=0.02)
    two, of_two = twins["two_towers"]
    assert of_two.flops_per_example == of_one.flops_per_example
    blocks = sum(p.numel() for p in dense.model.towers.stack.parameters())
    assert (two.moe, of_two.num_params) == (None, of_one.num_params + blocks)


def test_two_towers_of_different_widths_have_an_ffn_for_each():
    module = retriever(tower=TwoTowers(PatchImages(blocks_as=WIDER), PieceTexts(blocks_as=TOWER)), moe_blocks="all")
    cost, twins = built(module)
    assert list(twins) == ["dense_equal_flops", "dense_equal_params"]
    dense, of_dense = twins["dense_equal_flops"]
    assert of_dense.flops_per_example == pytest.approx(cost.flops_per_example, rel=0.02)
    assert twins["dense_equal_params"][1].num_params == pytest.approx(cost.num_params, rel=0.02)
    # A token of width D takes 2 experts, 2 products of D x 16 each, and a router of 4 D: a hidden dim of 32 + 2.
    assert (dense.dense_ffn.hidden_dim, dense.tower.text_ffn.hidden_dim) == (34, 34)
    assert pickle.loads(pickle.dumps(module.comparison.baselines()["dense_equal_flops"].build))().tower == dense.tower
    tower = TwoTowers(PatchImages(blocks_as=WIDER, moe_blocks="none"), PieceTexts(blocks_as=TOWER))
    towers = retriever(tower=tower).comparison.baselines()["dense_equal_flops"].build().model.towers
    widths = [part.network.stack.layers[1].ffn.w_in.weight.shape[0] for part in (towers.image, towers.text)]
    assert widths == [TOWER.hidden_dim, 34]
    moe = core.MoEConfig(2, core.TokenChoice(top_k=2), core.FFN(hidden_dim=512, bias=True))
    tower = TwoTowers(PatchImages(blocks_as=WIDER), PieceTexts(blocks_as=TOWER))
    note = retriever(tower=tower, moe=moe).comparison.baselines()["dense_equal_params"].note
    assert note.startswith("coincides with dense_equal_flops")
    assert retriever(moe=None).comparison.baselines() == {}
