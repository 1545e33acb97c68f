"""Semantic ids: codes of vectors, the trie of those that exist and its search, a decoder, and what is rejected."""

import math
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from quiet_trainer import quiet_trainer
from reexported import reexported
from refusals import refused
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
from apps.recsys.sequence.trie import Trie, masked_log_softmax, trie_search

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


def test_vectors_of_items_and_their_codes_by_hand():
    # Two far groups at 0 and 100, in each two near ones at -1 and +1: four places, each twice but for the last.
    vectors = np.array([[-1.0], [1.0], [99.0], [101.0], [-1.0], [1.0], [99.0]], np.float32)
    codes = residual_kmeans(vectors, 2, 2)
    assert codes[:, 0].tolist() in ([0, 0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 1, 0])
    # The rests are -1 and 1 in both groups, but for the center at 99.67 of the three.
    assert codes[:, 1].tolist() in ([0, 1, 0, 1, 0, 1, 0], [1, 0, 1, 0, 1, 0, 1])
    assert with_last_code(codes, 2)[:, 2].tolist() == [0, 0, 0, 0, 1, 1, 1]
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
    refused(r"vectors\..*it has no vector of 2 items, first 'rye'$", lambda: read_vectors(file, ("tea", "rye", "oat")))


def test_what_files_are_rejected(tmp_path):
    (tmp_path / "v.npz").write_text("no archive")
    for name, message in (("v.npz", "v.npz"), ("w.npz", "No such file"), ("v.csv", "neither safetensors, npz nor")):
        with pytest.raises(ValueError, match=message) as raised:
            read_vectors(tmp_path / name, ("tea",))
        assert "\n" not in str(raised.value)
    np.savez(tmp_path / "n.npz", tea=[math.nan])
    refused("a vector is not finite", lambda: read_vectors(tmp_path / "n.npz", ("tea",)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SemanticIdsConfig(codes=10).codes_of(SimpleNamespace(num_items=9)),
         "semantic_ids.codes=10 exceeds the 9 items"),
        (lambda: with_last_code(torch.zeros(4, 2).long(), 3), "4 items have the same semantic id, and the last code"),
        (lambda: build(num_items=28, top_k=9), "semantic_ids.codes=3 in 2 levels do not tell 28 items apart"),
        (lambda: build(top_k=10), "top_k=10 exceeds semantic_ids.beam_size=9"),
        (lambda: build(top_k=9, exclude_seen=True, mask_seen_items=True), "does not go with semantic_ids"),
        (lambda: build(top_k=9, moe=core.MoEConfig(4, router=core.Hash(10))),
         r"needs context.token_ids_BS, which NextItemRecommender does not give"),
        (lambda: build(top_k=9).distribution(None), "has no logits of all items to distil"),
    ],
)  # fmt: skip
def test_what_is_rejected(make, message):
    refused(message, make)


@torch.no_grad()
def test_the_loss_is_log_p_of_the_item_among_all_and_seen_items_are_not_found():
    module = build(top_k=9).eval()
    history, losses = [3, 1, 4], []
    for item in range(1, 10):
        losses.append(module.task_loss(batch([history], [[0, 0, item]])).loss)
    assert_close(torch.stack(losses).neg().exp().sum(), torch.tensor(1.0))
    # A beam of 9 keeps all items: the scores are the same, found code by code.
    scores = module(torch.tensor([history]))
    assert_close(scores[0, 1:], -torch.stack(losses), rtol=1e-4, atol=1e-5)
    assert scores[0, 0] == -math.inf
    module = build(top_k=4, exclude_seen=True, semantic_ids=SemanticIdsConfig(levels=2, codes=3, beam_size=4)).eval()
    every = module(torch.tensor([[3, 1, 4]]))
    seen = torch.tensor([[3, 1, 4, 2, 5, 0]])
    scores = module(torch.tensor([[3, 1, 4]]), None, seen)
    assert (every > -math.inf).sum() == (scores > -math.inf).sum() == 4  # 6, 7, 8 and 9 are left
    assert scores[0, :6].tolist() == [-math.inf] * 6
    out = module.task_loss(batch([[3, 1, 4]], [[0, 0, 8]], seen.tolist()))
    assert_close(out.outputs, scores)


@torch.no_grad()
def test_codes_give_an_item_its_vector_and_new_items_are_rejected():
    module = build(top_k=9)
    table = module.model.item_embed
    # Item 8 has the number 7, whose digits by 3 are 1, 2 and 0, the lowest first.
    assert table.codes[8].tolist() == [1, 2, 0]
    assert_close(table(torch.tensor([8]))[0], table.weight[0, 1] + table.weight[1, 2] + table.weight[2, 0])
    table.set_codes(torch.tensor([[i % 3, i // 3, 2] for i in range(9)]))
    assert table.codes[8].tolist() == [1, 2, 2]
    checkpoint = {"state_dict": build(num_items=7, top_k=9).state_dict()}
    with pytest.raises(ValueError, match=r"^semantic ids of 7 items are trained, and the data have 9$"):
        build(top_k=9).widened(checkpoint, {})
    assert build(num_items=7, top_k=9).widened(checkpoint, {}) is checkpoint


def test_experts_in_the_decoder_too():
    moe = core.MoEConfig(num_experts=4, router=core.TokenChoice(top_k=2), expert=core.FFN(hidden_dim=8))
    module = build(moe=moe, top_k=9)
    with core.record(module) as tape:
        loss = module.train().task_loss(batch([[3, 1, 4]], [[1, 4, 5]])).loss
    (loss + core.aux_loss(tape)).backward()
    assert [entry.routing.num_tokens for entry in tape.entries] == [3, 9]  # three codes of each item
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    names = dict(module.named_modules())
    assert module.comparison.moe_block_names == ("model.blocks.0.ffn", "model.generator.stack.layers.0.ffn")
    assert all(name in names for name in module.comparison.moe_block_names)
    assert set(module.comparison.baselines()) == {"tiger_equal_flops", "tiger_equal_params"}
    twin = module.comparison.baselines()["tiger_equal_flops"].build()
    assert twin.model.generator.stack.layers[0].ffn.w_in.weight.shape == twin.model.blocks[0].ffn.w_in.weight.shape


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
    ids = SemanticIdsConfig(levels=2, codes=4, beam_size=10)
    module = NextItemRecommender(12, 8, TINY, semantic_ids=ids, optimizer={"lr": 2e-2}, report=None)
    trainer = quiet_trainer(tmp_path, max_epochs=40)
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


SEQUENCES = torch.tensor([[2, 0], [0, 1], [2, 1], [0, 0], [2, 2]])
"""Under node 0 are the ids 0 and 2, nodes 1 and 2; below node 1 the nodes 3 and 4, below node 2 the nodes 5 to 7."""


def test_nodes_count_level_by_level_and_are_empty_if_all_below_is_left_out():
    trie = Trie(SEQUENCES, 3)
    assert (trie.num_nodes, trie.path_NL.tolist()) == (8, [[2, 5], [1, 4], [2, 6], [1, 3], [2, 7]])
    assert trie.next_nodes(torch.tensor([0, 1, 2, 6])).tolist() == [[1, 0, 2], [3, 4, 0], [5, 6, 7], [0, 0, 0]]
    assert trie.sequences(torch.tensor([5, 4, 6, 3, 7, 0, 1])).tolist() == [0, 1, 2, 3, 4, -1, -1]
    trie = Trie(torch.tensor([[1, -1, -1], [1, 0, -1], [1, 0, 2]]), 3)
    assert trie.path_NL.tolist() == [[1, -1, -1], [1, 2, -1], [1, 2, 3]]
    assert trie.sequences(torch.arange(4)).tolist() == [-1, 0, 1, 2]
    trie = Trie(SEQUENCES, 3)
    emptied = trie.emptied(torch.tensor([[1, 3, 3], [0, -1, -1], [-1, -1, -1]]))
    # Sequences 1 and 3 are all that begins with id 0: node 1 and the two below it. Sequence 0 is node 5.
    assert [row.nonzero().flatten().tolist() for row in emptied] == [[1, 3, 4], [5], []]


def logits_of(table_LV):
    """Return logits that depend on the ids so far: those of the level, moved by the sum of the ids."""
    return lambda ids_Bkl: table_LV[ids_Bkl.shape[2]] * (1 + ids_Bkl.sum(-1, keepdim=True))


def test_a_search_finds_what_scoring_each_sequence_does_and_a_narrow_beam_the_best_prefixes():
    torch.manual_seed(0)
    ids = torch.cartesian_prod(*[torch.arange(5)] * 3)
    ids = ids[torch.randperm(125)[:40]]
    trie, table = Trie(ids, 5), torch.randn(3, 5)
    given, scores = logits_of(table), []
    for row in ids:
        node, score = torch.zeros((), dtype=torch.int64), 0.0
        for level in range(3):
            children = trie.next_nodes(node)
            score += masked_log_softmax(given(row[None, None, :level])[0, 0], children)[row[level]].item()
            node = children[row[level]].long()
        scores.append(score)
    scores = torch.tensor(scores)
    assert_close(scores.exp().sum(), torch.tensor(1.0))  # all that exists, and nothing else
    found, score = trie_search(trie, given, num_rows=2, width=40)
    assert_close(score[0], scores.sort(descending=True).values)
    assert found[0].tolist() == found[1].tolist() == scores.argsort(descending=True).tolist()
    # Left out: the best two of the first row.
    left_out = torch.stack((found[0, :2], torch.tensor([-1, -1])))
    without, _ = trie_search(trie, given, 2, 40, trie.emptied(left_out))
    assert (without[0].tolist(), without[1].tolist()) == ([*found[0, 2:].tolist(), -1, -1], found[1].tolist())
    # The first id is 0 with p = 0.9, of which each of two sequences has a half; id 2 leads to one sequence alone.
    trie = Trie(torch.tensor([[0, 0], [0, 1], [2, 0]]), 3)
    table = torch.tensor([[math.log(0.9), 5.0, math.log(0.1)], [0.0, 0.0, 0.0]])
    found, score = trie_search(trie, lambda ids: table[ids.shape[2]].expand(1, ids.shape[1], 3), 1, 2)
    assert sorted(found[0].tolist()) == [0, 1]
    assert_close(score.exp(), torch.tensor([[0.45, 0.45]]))


@pytest.mark.parametrize(
    ("ids", "message"),
    [([[0, 3]], "ids in 0 to 2, and one at least"), ([[-1, 0]], "ids in 0 to 2, and one at least"),
     ([[0, 1], [1, 1], [0, 1]], "two of the 3 sequences of a trie are equal")],
)  # fmt: skip
def test_what_is_no_trie_is_rejected(ids, message):
    refused(message, lambda: Trie(torch.tensor(ids), 3))
