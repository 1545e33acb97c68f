"""Columns of sequences and of vectors: what is read and refused, and what the network makes of them."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_table import ragged
from quiet_trainer import quiet_trainer
from refusals import refused
from torch.testing import assert_close

import apps
import core
from apps.recsys.encoding.features import CategoricalFeature, Features, SequenceFeature, VectorFeature
from apps.recsys.encoding.numbers import to_vectors, vector_scale
from apps.recsys.schema import SequenceConfig, SplitConfig, TableConfig, TaskConfig
from apps.recsys.tables.columns.bottoms import SingleTask
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.columns.history import Dice, HistoryArch, HistoryConfig, segment_softmax
from apps.recsys.tables.columns.tables import sparse_arch
from apps.recsys.tables.columns.vectors import VectorArch
from apps.recsys.tables.data import TableData
from apps.recsys.tables.estimators import HistGradientBoostingUntuned, LogisticRegression
from apps.recsys.tables.model import InteractionConfig
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.rows.batch import TableBatch
from apps.recsys.tables.task import TASK

TRAIN = {
    "item": ["tea", "tea", "rye", "oat", "tea", "rye"],
    "last": ["tea|rye|oat", "", "rye", "tea|fig", "oat|oat", "oat"],
    "words": ["a b", "", "c", "a", "a c d", "b"],
    "click": [1, 0, 1, 0, 0, 1],
}
TEST = {"item": ["rye", "fig"], "last": ["fig|rye|tea", "fig"], "words": ["z a", "d"], "click": [1, 0]}
CONFIG = TableConfig(
    categorical=("item",),
    tasks={"click": TaskConfig("click")},
    split=SplitConfig("given", val=0),
    sequences={"last": SequenceConfig("item", length=2)},
)


def data_of(tmp_path, config=CONFIG, lists=False):
    for name, columns in (("train", TRAIN), ("test", TEST)):
        if lists:
            columns = {**columns, "last": [text.split("|") if text else [] for text in columns["last"]]}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    files = {"train_file": "train.parquet", "test_file": "test.parquet"}
    return TableData("table", str(tmp_path), str(tmp_path / "cache"), table=config, **files)


def sequences_of(batch):
    (own,) = batch.lists
    return [rows.tolist() for rows in own.values_N.split(own.length_B.tolist())]


@pytest.mark.parametrize("lists", [False, True])
def test_the_last_known_items_are_read(tmp_path, lists):
    # Rows of the items by their number: tea 1, rye 2, oat 3; "fig" is no item of the training rows.
    data = data_of(tmp_path, lists=lists)
    assert data.features.sequences == (SequenceFeature("last", 4, 2, "item"),)
    assert sequences_of(data.rows("train")[:]) == [[2, 3], [], [2], [1], [3, 3], [3]]
    assert sequences_of(data.rows("test")[:]) == [[2, 1], []]
    shuffled = data.rows("train").__getitems__([4, 1, 0])
    assert sequences_of(shuffled) == [[3, 3], [], [2, 3]]
    (warning,) = [w for w in data.findings.warnings if "length" in w]
    assert warning == "column 'last': 2 of 8 rows have more than length=2 values; the last ones are read"
    assert data.findings.missing["last"]["train"] == 1 / 6
    # Known values: tea rye oat [of which two are read], rye, tea fig, oat oat, oat.
    assert data.findings.unseen["last"] == {"train": 1 / 8, "val": 0.0, "test": 1 / 3}


def test_sequences_of_unknown_values_are_named(tmp_path, monkeypatch, caplog):
    """Items in capitals are no items of the training rows, neither in validation nor in rows to predict."""
    files = {"TRAIN": TRAIN, "TEST": TEST}
    for name, rows in files.items():
        monkeypatch.setitem(globals(), name, {**rows, "last": [text.upper() for text in rows["last"]]})
    (warning,) = [w for w in data_of(tmp_path).findings.warnings if "alike" in w]
    assert warning == "column 'last': 100% of the test values are not in training: are they written alike there?"
    monkeypatch.undo()
    data = data_of(tmp_path)
    assert not any("alike" in warning for warning in data.findings.warnings)
    model = MultiTaskRecommender(data.features)
    model.adopt_encoding({"encoding": data.encoding_state})
    model.predict({"item": ["tea", "rye"], "last": ["fig", "rye"]})  # half is not over half
    assert "alike" not in caplog.text
    model.predict({"item": ["tea"] * 5, "last": ["rye", "TEA|RYE", "fig", "", "OAT"]}, batch_size=1)
    assert "column 'last': most values, 4, are not in training: are they written alike there?" in caplog.text


def test_a_sequence_may_have_values_of_its_own(tmp_path):
    config = TableConfig(
        tasks=CONFIG.tasks, split=CONFIG.split, sequences={"words": SequenceConfig(length=9)}, separator=" "
    )
    data = data_of(tmp_path, config)
    # a three times, then by name b, c twice, d once.
    assert data.vocabulary("words") == (None, "a", "b", "c", "d")
    assert sequences_of(data.rows("train")[:]) == [[1, 2], [], [3], [1], [1, 3, 4], [2]]
    assert sequences_of(data.rows("test")[:]) == [[1], [4]]
    hashed = TableConfig(
        tasks=CONFIG.tasks, split=CONFIG.split, sequences=config.sequences, separator=" ", hash_rows={"words": 50}
    )
    (feature,) = data_of(tmp_path, hashed).features.sequences
    assert feature == SequenceFeature("words", 50, 9, None, hashed=True)


ITEM, KIND = CategoricalFeature("item", 6), CategoricalFeature("kind", 3)
LAST, WORDS = SequenceFeature("last", 6, 9, "item"), SequenceFeature("words", 5, 9)
SINGLE = torch.tensor([[2, 5, 1], [0, 2, 1]])  # item, kind
SEQUENCES = {"last": [[1, 2, 2], [], [4]], "words": [[4], [1, 3], []]}


def sparse(copies=1, **options):
    torch.manual_seed(0)
    return sparse_arch(EmbeddingConfig(dim=4, init_std=1.0, **options), (ITEM, KIND), copies, (LAST, WORDS))


@pytest.mark.parametrize("pooling", ["mean", "sum"])
@pytest.mark.parametrize("copies", [1, 2])
def test_sequences_are_averaged_whatever_the_kind(pooling, copies):
    weights = torch.arange(3 * 16.0).view(3, 16) / 10
    after = {}
    for kind in ("joined", "fused", "collection"):
        module = sparse(copies, kind=kind, pooling=pooling, fused_optimizer="sgd", fused_lr=0.5)
        assert list(module.tables()) == ["item", "kind", "words"]  # items and last items have one table
        tables = {name: weight.clone().unflatten(1, (copies, 4)) for name, weight in module.tables().items()}
        y = module(SINGLE, ragged(*SEQUENCES.values()))
        for k, y_BH in enumerate(y if copies > 1 else y[None]):
            for b in range(3):
                own = [tables["item"][SINGLE[0, b], k], tables["kind"][SINGLE[1, b], k]]
                for name, table in (("last", "item"), ("words", "words")):
                    rows = SEQUENCES[name][b]
                    own.append(sum(tables[table][r, k] for r in rows) / len(rows) if rows else torch.zeros(4))
                assert_close(y_BH[b], torch.cat(own))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        (y * weights).sum().backward()
        optimizer.step()
        after[kind] = module.tables()
    for name, weight in after["joined"].items():
        assert_close(after["fused"][name], weight)
        assert_close(after["collection"][name], weight)


@pytest.mark.parametrize(
    ("kind", "copies", "normalize"),
    [("joined", 1, True), ("joined", 2, False), ("collection", 1, False), ("collection", 2, True)],
)
def test_target_attention_is_a_loop_over_rows_and_items(kind, copies, normalize):
    torch.manual_seed(0)
    sparse = sparse_arch(EmbeddingConfig(kind=kind, dim=4, init_std=1.0), (KIND, ITEM), copies)
    history = HistoryArch((LAST,), sparse, HistoryConfig("din", (5, 3), normalize=normalize))
    item_B, last_B = [2, 5, 1], SEQUENCES["last"]
    embedded = sparse(torch.tensor([[0] * 3, item_B]))
    y = history(ragged(last_B), sparse, embedded)
    table = sparse.tables()["item"].unflatten(1, (copies, 4))
    for k, y_Bd in enumerate(y if copies > 1 else y[None]):
        for b, (item, last) in enumerate(zip(item_B, last_B, strict=True)):
            query, expected = table[item, k], torch.zeros(4)
            keys = [table[row, k] for row in last]
            weights = [history.units[0][k].mlp(torch.cat((query, key, query - key, query * key))) for key in keys]
            if normalize and weights:
                weights = list(torch.stack(weights).softmax(0))
            for weight, key in zip(weights, keys, strict=True):
                expected = expected + weight * key
            assert_close(y_Bd[b], expected)
    assert y[..., 1, :].eq(0).all()  # an empty history


def test_scores_of_a_segment_sum_to_one_and_dice_by_hand():
    share_N = segment_softmax(torch.tensor([1000.0, 0.0, 1000.0, 7.0]), torch.tensor([0, 2, 0, 2]), 4)
    assert_close(share_N, torch.tensor([0.5, 0.000911051, 0.5, 0.999088949]))  # 1 / (1 + e^7)
    # The column 1, 3 has the mean 2 and the variance 1: s = sigmoid(-1), sigmoid(1); a = 0.5.
    dice = Dice(1)
    dice.slope.data.fill_(0.5)
    s = torch.tensor([[-1.0], [1.0]]).sigmoid()
    x = torch.tensor([[1.0], [3.0]])
    assert_close(dice(x), s * x + (1 - s) * 0.5 * x, rtol=1e-4, atol=0)
    before = dice.norm.running_mean.clone()
    dice(x[:1])  # one row has no variance
    assert torch.equal(dice.norm.running_mean, before)
    assert dice(x[:0]).shape == (0, 1)
    alone = dice.eval()(x[:1])
    assert_close(alone, dice(x)[:1])


def features(**options):
    return Features((ITEM, KIND), tasks=("click", "buy"), positives=(0.5, 0.5), **options)


def batch(*sequences):
    return TableBatch(torch.zeros(3, 0), SINGLE, torch.zeros(3, 2), torch.arange(3), lists=ragged(*sequences))


@pytest.mark.parametrize("shared", [None, SingleTask()])
@pytest.mark.parametrize("kind", ["dot", "concat"])
def test_a_model_attends_to_items_and_averages_words(shared, kind):
    options = {"shared": shared, "interaction": InteractionConfig(kind), "history": HistoryConfig("din")}
    model = MultiTaskRecommender(features(sequences=(WORDS, LAST)), **options).eval()
    before = model(batch(SEQUENCES["words"], SEQUENCES["last"]))
    assert before.shape == (3, 2)
    # The order of a history is no part of it, and an example depends on its own alone.
    moved = model(batch(SEQUENCES["words"], [[2, 1, 2], [], [3]]))
    assert_close(moved[:2], before[:2])
    assert (moved[2] != before[2]).any()
    refused("the batch has 0 multi-valued columns and sequences, the model 2", lambda: model(batch()))
    with pytest.raises(ValueError, match=r"column 'item' has the row 6, and its table 6 rows"):
        model(batch(SEQUENCES["words"], [[6], [], []]))


def test_a_table_without_sequences_has_no_history():
    model = MultiTaskRecommender(features(), history=HistoryConfig("din"))
    assert model(batch()).shape == (3, 2)


def attends(sequence, **options):
    return MultiTaskRecommender(features(sequences=(sequence,)), history=HistoryConfig("din"), **options)


def described(column, **options):
    return TableConfig(("item",), tasks=CONFIG.tasks, sequences={column: SequenceConfig(**options)})


@pytest.mark.parametrize(
    ("make", "match"),
    [(lambda: attends(WORDS), "needs a sequence that names its items, and words names none"),
     (lambda: attends(LAST, embedding=EmbeddingConfig("fused")), "which embedding.kind='fused' cannot"),
     (lambda: HistoryConfig(normalize=True), r"history.normalize=True has no meaning with history.pooling='mean'"),
     (lambda: described("last", items="itm"), r"sequences\['last'\].items='itm' is no cat.*; did you mean 'item'"),
     (lambda: described("item"), r"column 'item' is listed twice: under categorical and sequences")],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(make, match):
    refused(match, make)


def made(tmp_path):
    """A click is likely where the item is in the history, which neither column tells alone."""
    generator = torch.Generator().manual_seed(0)
    item_N = torch.randint(0, 8, (600,), generator=generator)
    last = [torch.randint(0, 8, (n,), generator=generator).tolist() for n in (torch.arange(600) % 6).tolist()]
    click = [int(item in own) for item, own in zip(item_N.tolist(), last, strict=True)]
    rows = {"item": item_N.tolist(), "last": last, "click": click}
    pq.write_table(pa.table(rows), tmp_path / "table.parquet")
    config = TableConfig(
        ("item",), tasks={"click": TaskConfig("click")}, split=SplitConfig(val=0.2, test=0.2),
        sequences={"last": SequenceConfig("item", 4)},
    )  # fmt: skip
    return TableData("table", str(tmp_path), str(tmp_path / "cache"), train_file="table.parquet", table=config)


def test_a_checkpoint_keeps_how_sequences_are_read(tmp_path):
    data = made(tmp_path)
    model = MultiTaskRecommender(data.features, history=HistoryConfig("din", (16,)))
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = apps.load(tmp_path / "a.ckpt")
    rows = data.rows("test")
    with torch.inference_mode():
        expected = model.eval()(rows[:]).sigmoid()[:, 0]
    table = pq.read_table(tmp_path / "table.parquet").take(rows.index.numpy())
    frame = table.to_pandas()
    assert_close(torch.tensor(loaded.predict(frame)["probability_click"].to_numpy()), expected)
    lists = loaded.predict({"item": frame["item"].tolist(), "last": frame["last"].tolist()})
    assert_close(torch.tensor(lists["probability_click"]), expected)
    texts = loaded.predict({"item": frame["item"], "last": ["|".join(map(str, own)) for own in frame["last"]]})
    assert_close(torch.tensor(texts["probability_click"]), expected)


def test_a_page_has_a_field_for_a_sequence_and_estimators_read_its_values(tmp_path):
    data = made(tmp_path)
    model = MultiTaskRecommender(data.features, history=HistoryConfig("din"), shared=core.MMoE(num_experts=2))
    model.adopt_encoding({"encoding": data.encoding_state})
    page = TASK(model).exhibit(data, 3)
    assert [field.label for field in page.fields] == ["item", "last (the oldest first, with | between)"]
    item, last = page.examples[2].values
    row = data.rows("val").__getitems__([2 * (len(data.rows("val")) // 3)])
    assert last.split("|") == [data.vocabulary("item")[i] for i in row.lists[0].values_N]
    scores = model.predict({"item": [item], "last": [last]})
    assert dict(page.answer([item, last]).parts[0].rows) == {"click": float(scores["probability_click"][0])}
    data = made(tmp_path)
    for estimator in (HistGradientBoostingUntuned(), LogisticRegression()):
        estimator.fit(data, 0)
        assert estimator.evaluate(data, "test")["auc_click"] > 0.6  # by the number of items already


def column(*values, kind=None):
    return [("the training table", pa.chunked_array([pa.array(list(values), kind)]))]


def test_a_vector_is_mapped_as_it_is_scaled_and_a_missing_one_is_nan():
    vectors = to_vectors(column(None, [3.0, 4.0], [0.0, 0.0]), "title")
    np.testing.assert_array_equal(vectors, np.array([[np.nan, np.nan], [3, 4], [0, 0]], np.float32))
    assert vector_scale(vectors) == 2.5  # the root of (9 + 16 + 0 + 0) / 4
    fixed = to_vectors(column([1.0, 2.0], None, kind=pa.list_(pa.float32(), 2)), "title")
    np.testing.assert_array_equal(fixed, np.array([[1, 2], [np.nan, np.nan]], np.float32))
    assert vector_scale(np.full((2, 3), np.nan, np.float32)) == 1
    arch = VectorArch((VectorFeature("a", 2, scale=2.0), VectorFeature("b", 1)), dim=3, copies=2)
    x_BV = torch.tensor([[2.0, 4.0, 5.0], [torch.nan, torch.nan, 1.0]])
    with torch.no_grad():
        arch.missing[0].fill_(7.0)
        y_KBH = arch(x_BV)
    assert y_KBH.shape == (2, 2, 6)
    for k in range(2):
        assert_close(y_KBH[k, 0, :3], torch.tensor([1.0, 2.0]) @ arch.weight[0][k])
        assert_close(y_KBH[k, 0, 3:], 5 * arch.weight[1][k, 0])
        assert_close(y_KBH[k, 1, :3], torch.full((3,), 7.0))


@pytest.mark.parametrize(
    ("values", "match"),
    [((["a"],), "'title' of the training table holds lists of string, not of numbers"),
     ((1.5,), "'title' of the training table holds values of type double, not lists of numbers"),
     (("1 2",), "holds values of type string, not lists of numbers: a vector is a list, which"),
     (([1.0, 2.0], [1.0]), "the vector in row 1 has 1 numbers, and must have 2, as the others have"),
     (([1.0, None],), "the vector in row 0 holds a number that is missing or not finite"),
     (([1.0], [np.inf]), "the vector in row 1 holds a number that is missing or not finite"),
     (([],), "lists of null, not of numbers")],
)  # fmt: skip
def test_what_is_no_vector_is_refused(values, match):
    refused(re.escape(match), lambda: to_vectors(column(*values), "title"))
    if values == ("1 2",):  # repeated text is refused by its own type
        refused(re.escape(match), lambda: to_vectors([("a", column(*values)[0][1].dictionary_encode())], "title"))


def vectors_table(tmp_path):
    """The label is the sign of one direction of the vector; every tenth row has none."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 4)).astype(np.float32)
    rows = {
        "image": [None if i % 10 == 0 else v.tolist() for i, v in enumerate(vectors)],
        "shop": [f"shop{i % 3}" for i in range(300)],
        "bought": (vectors @ np.array([1.0, -1.0, 0.5, 0.0]) > 0).astype(int),
        "seen": rng.integers(0, 2, 300),
    }
    pq.write_table(pa.table(rows), tmp_path / "table.parquet")
    tasks = {"bought": TaskConfig("bought"), "seen": TaskConfig("seen")}
    config = TableConfig(("shop",), vectors=("image",), tasks=tasks, split=SplitConfig(val=0.2, test=0.2))
    return TableData("table", str(tmp_path), str(tmp_path / "cache"), train_file="table.parquet", table=config)


def test_networks_and_estimators_read_vectors_and_predictions_need_the_same_length(tmp_path):
    data = vectors_table(tmp_path)
    assert data.features.vectors[0].size == 4
    batch = data.rows("test")[:]
    assert batch.vector_BV.shape == (60, 4)
    for options in ({}, {"interaction": InteractionConfig("dot")}, {"shared": SingleTask()}):
        model = MultiTaskRecommender(data.features, **options).eval()
        before = model(batch)
        assert before.shape == (60, 2)
        moved = model(type(batch)(**{**vars(batch), "vector_BV": batch.vector_BV + 1}))
        is_there = ~batch.vector_BV[:, 0].isnan()
        assert ((before != moved).any(1) == is_there).all()  # a missing vector is the same whatever is added
    for estimator in (HistGradientBoostingUntuned(), LogisticRegression()):
        estimator.fit(data, 0)
        assert estimator.evaluate(data, "test")["auc_bought"] > 0.85
    data = vectors_table(tmp_path)
    model = MultiTaskRecommender(data.features)
    quiet_trainer(tmp_path, max_steps=1).fit(model, data)
    shops = ["shop0", "shop1"]
    by_array = model.predict({"image": np.ones((2, 4), np.float32), "shop": shops})
    by_lists = model.predict({"image": [[1.0] * 4] * 2, "shop": shops})
    assert_close(by_array["probability_bought"], by_lists["probability_bought"])
    with pytest.raises(ValueError, match=r"the rows to predict: the vector in row 0 has 3 numbers, and must have 4"):
        model.predict({"image": np.ones((2, 3)), "shop": shops})
