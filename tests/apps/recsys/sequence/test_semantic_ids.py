"""Semantic ids: the codes of vectors, the vectors of items, a decoder that generates codes, and what is rejected."""

import math
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
from lightning.pytorch import Trainer
from pyarrow import parquet
from reexported import reexported
from safetensors.numpy import save_file
from torch.testing import assert_close

import apps
import core
from apps.recsys.sequence.data import HistoryBatch, HistoryData
from apps.recsys.sequence.model import HistoryModelConfig
from apps.recsys.sequence.module import NextItemRecommender
from apps.recsys.sequence.semantic_ids import (
    SemanticIdsConfig,
    cooccurrence,
    read_vectors,
    residual_kmeans,
    with_last_code,
)

TINY = HistoryModelConfig(
    dim=8, depth=1, num_heads=2, hidden_dim=16, mixing="attention", dropout=0.0, embed_dropout=0.0
)
IDS = SemanticIdsConfig(levels=2, codes=3, beam_size=9)


def build(**options):
    torch.manual_seed(0)
    given = {"num_items": 9, "max_length": 6, "sequence": TINY, "semantic_ids": IDS, **options}
    module = NextItemRecommender(**given)
    with torch.no_grad():
        module.model.item_embed.weight.normal_()
    return module


def batch(items, targets, seen=None):
    items, targets, n = torch.tensor(items), torch.tensor(targets), torch.arange(len(items))
    return HistoryBatch(items, targets, n, n, None if seen is None else torch.tensor(seen))


# ---- codes


def test_clusters_within_clusters_come_back():
    # Two far groups at 0 and 100, in each two near ones at -1 and +1: four places, each twice but for the last.
    vectors = np.array([[-1.0], [1.0], [99.0], [101.0], [-1.0], [1.0], [99.0]], np.float32)
    codes = residual_kmeans(vectors, 2, 2)
    assert codes[:, 0].tolist() in ([0, 0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 1, 0])
    # The rests are -1 and 1 in both groups, but for the center at 99.67 of the three.
    assert codes[:, 1].tolist() in ([0, 1, 0, 1, 0, 1, 0], [1, 0, 1, 0, 1, 0, 1])
    assert with_last_code(codes, 2)[:, 2].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_items_that_follow_each_other_have_like_vectors():
    # Users go through 0 1 2, or through 3 4 5; the last two places validate and test.
    item_N = np.array([1, 2, 3, 1, 2, 4, 5, 6, 1, 2, 2, 3, 1, 4, 1, 5, 6, 4, 2, 3], np.int32)
    histories = SimpleNamespace(item_N=item_N, length_U=np.array([5, 5, 5, 5]))
    in_training = np.tile([True, True, True, False, False], 4)
    vectors = cooccurrence(SimpleNamespace(histories=histories, in_training=in_training, num_items=6))
    like = vectors @ vectors.T
    assert_close(np.diag(like), np.ones(6, np.float32), rtol=0, atol=1e-5)
    assert like[:3, :3].min() > 0.4
    assert abs(like[:3, 3:]).max() < 0.1  # they meet in what validates only


@pytest.mark.parametrize("kind", ["safetensors", "npz", "parquet"])
def test_vectors_of_a_file_by_item(kind, tmp_path):
    vectors = {"7": np.array([1.0, 2.0], np.float32), "tea": np.array([3.0, 4.0], np.float32)}
    file = tmp_path / f"vectors.{kind}"
    if kind == "safetensors":
        save_file(vectors, file)
    elif kind == "npz":
        np.savez(file, **vectors)
    else:
        parquet.write_table(pa.table({"item": list(vectors), "vector": [v.tolist() for v in vectors.values()]}), file)
    assert read_vectors(file, ("tea", "7")).tolist() == [[3.0, 4.0], [1.0, 2.0]]
    with pytest.raises(ValueError, match=r"vectors\..*it has no vector of 2 items, first 'rye'$"):
        read_vectors(file, ("tea", "rye", "oat"))


def test_what_files_are_rejected(tmp_path):
    (tmp_path / "v.npz").write_text("no archive")
    for name, message in (("v.npz", "v.npz"), ("w.npz", "No such file"), ("v.csv", "neither safetensors, npz nor")):
        with pytest.raises(ValueError, match=message) as raised:
            read_vectors(tmp_path / name, ("tea",))
        assert "\n" not in str(raised.value)
    np.savez(tmp_path / "n.npz", tea=[math.nan])
    with pytest.raises(ValueError, match="a vector is not finite"):
        read_vectors(tmp_path / "n.npz", ("tea",))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SemanticIdsConfig(levels=0), "semantic_ids.levels=0 is not at least 1"),
        (lambda: SemanticIdsConfig(codes=1), "semantic_ids.codes=1 is not at least 2"),
        (
            lambda: SemanticIdsConfig(codes=10).codes_of(SimpleNamespace(num_items=9)),
            "semantic_ids.codes=10 exceeds the 9 items",
        ),
        (lambda: with_last_code(torch.zeros(4, 2).long(), 3), "4 items have the same semantic id, and the last code"),
        (lambda: build(num_items=28, top_k=9), "semantic_ids.codes=3 in 2 levels do not tell 28 items apart"),
        (lambda: build(top_k=10), "top_k=10 exceeds semantic_ids.beam_size=9"),
        (lambda: build(top_k=9, exclude_seen=True, mask_seen_items=True), "does not go with semantic_ids"),
        (
            lambda: build(top_k=9, moe=core.MoEConfig(4, router=core.Hash(10))),
            r"needs context.token_ids_BS, which NextItemRecommender does not give",
        ),
        (lambda: build(top_k=9).distribution(None), "has no logits of all items to distil"),
    ],
)
def test_what_is_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- the decoder


@torch.no_grad()
def test_the_loss_is_log_p_of_the_item_and_all_items_have_p_of_one():
    module = build(top_k=9).eval()
    history, losses = [3, 1, 4], []
    for item in range(1, 10):
        losses.append(module.task_loss(batch([history], [[0, 0, item]])).loss)
    assert_close(torch.stack(losses).neg().exp().sum(), torch.tensor(1.0))
    # A beam of 9 keeps all items: the scores are the same, found code by code.
    scores = module(torch.tensor([history]))
    assert_close(scores[0, 1:], -torch.stack(losses), rtol=1e-4, atol=1e-5)
    assert scores[0, 0] == -math.inf


@torch.no_grad()
def test_codes_give_an_item_its_vector_and_its_targets():
    module = build(top_k=9)
    table = module.model.item_embed
    # Item 8 has the number 7, whose digits by 3 are 1, 2 and 0, the lowest first.
    assert table.codes[8].tolist() == [1, 2, 0]
    assert_close(table(torch.tensor([8]))[0], table.weight[0, 1] + table.weight[1, 2] + table.weight[2, 0])
    table.set_codes(torch.tensor([[i % 3, i // 3, 2] for i in range(9)]))
    assert table.codes[8].tolist() == [1, 2, 2]


@torch.no_grad()
def test_seen_items_are_not_found_and_leave_no_gap():
    module = build(top_k=4, exclude_seen=True, semantic_ids=SemanticIdsConfig(levels=2, codes=3, beam_size=4)).eval()
    every = module(torch.tensor([[3, 1, 4]]))
    seen = torch.tensor([[3, 1, 4, 2, 5, 0]])
    scores = module(torch.tensor([[3, 1, 4]]), None, seen)
    assert (every > -math.inf).sum() == (scores > -math.inf).sum() == 4  # 6, 7, 8 and 9 are left
    assert scores[0, :6].tolist() == [-math.inf] * 6
    out = module.task_loss(batch([[3, 1, 4]], [[0, 0, 8]], seen.tolist()))
    assert_close(out.outputs, scores)


def test_experts_in_the_decoder_too():
    moe = core.MoEConfig(num_experts=4, router=core.TokenChoice(top_k=2), expert=core.FFN(hidden_dim=8))
    module = build(moe=moe, top_k=9)
    with core.record(module) as tape:
        loss = module.train().task_loss(batch([[3, 1, 4]], [[1, 4, 5]])).loss
    (loss + core.aux_loss(tape)).backward()
    assert [entry.routing.num_tokens for entry in tape.entries] == [3, 9]  # three codes of each item
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    names = dict(module.named_modules())
    assert module.moe_block_names == ("model.blocks.0.ffn", "model.generator.stack.layers.0.ffn")
    assert all(name in names for name in module.moe_block_names)
    assert set(module.baselines()) == {"tiger_equal_flops", "tiger_equal_params"}
    twin = module.baselines()["tiger_equal_flops"].build()
    assert twin.model.generator.stack.layers[0].ffn.w_in.weight.shape == twin.model.blocks[0].ffn.w_in.weight.shape


# ---- a run


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    """30 users go round a circle of 12 items."""
    file = tmp_path_factory.mktemp("clicks") / "clicks.csv"
    rows = [f"u{u},i{(u + t) % 12},{t}" for u in range(30) for t in range(10)]
    file.write_text("\n".join(["user,item,time", *rows]))
    return file


def test_a_trained_model_knows_what_follows(clicks, tmp_path):
    data = HistoryData("table", file=str(clicks), cache_dir=str(tmp_path), batch_size=10, max_length=8)
    torch.manual_seed(0)
    module = NextItemRecommender(
        12,
        8,
        TINY,
        semantic_ids=SemanticIdsConfig(levels=2, codes=4, beam_size=10),
        optimizer={"lr": 2e-2},
        report=None,
    )
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=40, default_root_dir=tmp_path, enable_checkpointing=False, **quiet)
    trainer.fit(module, data)
    # By chance the item is among the first 10 of 12 in 83 % of the tests, with a mean NDCG of 0.38.
    assert trainer.test(module, data, verbose=False)[0]["test/ndcg_10"] > 0.9
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = apps.load(tmp_path / "last.ckpt")
    assert torch.equal(loaded.model.item_embed.codes, module.model.item_embed.codes)
    assert len(loaded.model.item_embed.codes.unique(dim=0)) == 12
    assert [best[0][0] for best in loaded.predict([["i3", "i4"], ["i10", "i11"]], top=1)] == ["i5", "i0"]
    assert len(loaded.predict([["i3", "i4"]], top=20)[0]) == 10  # the items that the search finds


def test_a_graph_of_it_finds_the_same_items(tmp_path):
    pa.csv.write_csv(
        pa.table({"user": [1, 1, 2, 2, 2], "item": [3, 1, 5, 4, 2], "time": [1, 2, 1, 2, 3]}), tmp_path / "c.csv"
    )
    data = HistoryData("table", file=str(tmp_path / "c.csv"), cache_dir=str(tmp_path), max_length=4)
    model = build(num_items=data.num_items, max_length=4, top_k=5, report=None).eval()
    model.adopt_encoding({"encoding": data.encoding_state})
    exported, _ = reexported(model, tmp_path)
    histories = [[3, 1], [5]]
    expected = model.predict(histories, include_seen=True)
    for own, best in zip(exported.predict(histories, include_seen=True), expected, strict=True):
        assert [item for item, _ in own] == [item for item, _ in best]
        assert [score for _, score in own] == pytest.approx([score for _, score in best], rel=1e-4)


def test_new_items_are_rejected():
    checkpoint = {"state_dict": build(num_items=7, top_k=9).state_dict()}
    with pytest.raises(ValueError, match=r"^semantic ids of 7 items are trained, and the data have 9$"):
        build(top_k=9).widened(checkpoint, {})
    assert build(num_items=7, top_k=9).widened(checkpoint, {}) is checkpoint
