"""A trained retriever answers a script, orders by a ranking model, and has a page and graphs."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from doc_scripts import script
from made_pairs import FILMS, TABLE, made_pairs, options, retriever
from reexported import assert_alike, reexported
from refusals import refused
from shown_runs import answered, best_experts, retrieval_run, shown
from torch_graphs import output_in_torch

import core
from apps.recsys.retrieval import export as export_module
from apps.recsys.retrieval.scoring import Ranking, Retrieved
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.module import MultiTaskRecommender

USERS = {"user": ["cy", "ann", "zoe"], "age": [50, 30, 25], "stars": [1, 2, 3]}


def ranker(folder, tasks=TABLE["tasks"], **changed):
    """Return an untrained ranking model of the same table that knows the table's values."""
    own = options(folder)
    table = {**TABLE, "tasks": tasks, **changed}
    data = TableData("table", train_file=own["train_file"], cache_dir=own["cache_dir"], table=table)
    torch.manual_seed(1)
    shared = core.MMoE(num_experts=2, expert=core.MLP(hidden_dims=(8,)))
    module = MultiTaskRecommender(data.features, shared, EmbeddingConfig(dim=4, init_std=1.0))
    module.adopt_encoding({"encoding": data.encoding_state})
    return module.eval()


@pytest.fixture
def model(tmp_path):
    data = made_pairs(tmp_path, user_column="user", exclude_seen=True)
    module = retriever(data)
    module.adopt_encoding({"encoding": data.encoding_state})
    return module.eval()


def by_user(predicted, column):
    return [[v for row, v in zip(predicted["row"], predicted[column], strict=True) if row == user] for user in range(3)]


def test_the_items_are_those_of_the_largest_products(model):
    predicted = model.predict(USERS, top=2, include_seen=True)
    assert list(predicted) == ["row", "user", "film", "score"]
    assert [list(x) for x in (predicted["row"], predicted["user"])] == [
        [0, 0, 1, 1, 2, 2],
        ["cy", "cy", "ann", "ann", "zoe", "zoe"],
    ]
    whole = model.predict(USERS, top=9, include_seen=True)
    for films, scores, best in zip(
        *(by_user(whole, c) for c in ("film", "score")), by_user(predicted, "film"), strict=True
    ):
        assert (sorted(films), scores, best) == (list(FILMS), sorted(scores, reverse=True), films[:2])
    without = model.predict(USERS, top=9)
    assert [sorted(films) for films in by_user(without, "film")] == [
        ["Alien", "Brazil"], ["Dune", "Fargo"], list(FILMS),
    ]  # fmt: skip


def test_users_come_in_many_kinds(model, tmp_path):
    pandas = pytest.importorskip("pandas")
    pa.csv.write_csv(pa.table(USERS), tmp_path / "users.csv")
    frame = model.predict(pandas.DataFrame(USERS, index=[7, 8, 9]), top=3, batch_size=2)
    want = {name: list(values) for name, values in frame.items()}
    views = pa.table({**USERS, "user": pa.array(USERS["user"], pa.string_view())})
    for users in (USERS, pa.table(USERS), views, tmp_path / "users.csv"):
        given = model.predict(users, top=3)
        got = given.to_pydict() if isinstance(given, pa.Table) else {name: list(v) for name, v in given.items()}
        assert got.pop("score") == pytest.approx(want["score"], rel=1e-5)
        assert got == {name: want[name] for name in got}
    nobody = model.predict({"user": [], "age": []})
    assert {name: len(values) for name, values in nobody.items()} == {"row": 0, "user": 0, "film": 0, "score": 0}


def test_a_ranking_model_orders_what_is_retrieved_and_equal_predictions_keep_their_order(model, tmp_path):
    ranking = ranker(tmp_path)
    predicted = model.predict(USERS, top=2, include_seen=True, rank=ranking, candidates=3)
    retrieved = by_user(model.predict(USERS, top=3, include_seen=True), "film")
    # the slow way: each retrieved pair as a row of a table of its own
    genres = {"Alien": "sci-fi|horror", "Brazil": "sci-fi", "Casablanca": "drama", "Dune": "sci-fi", "Fargo": ""}
    years = {"Alien": 1979, "Brazil": 1985, "Casablanca": 1943, "Dune": 1984, "Fargo": 1996}
    for user, films in enumerate(retrieved):
        pairs = {
            "user": [USERS["user"][user]] * 3, "age": [USERS["age"][user]] * 3, "film": films,
            "genres": [genres[film] for film in films], "year": [years[film] for film in films],
        }  # fmt: skip
        like = ranking.predict(pairs)["probability_like"]
        best = np.argsort(-like)[:2]
        assert by_user(predicted, "film")[user] == [films[i] for i in best]
        np.testing.assert_allclose(by_user(predicted, "probability_like")[user], like[best], rtol=1e-6)
    assert list(predicted) == ["row", "user", "film", "score", "probability_like"]
    ranking = ranker(tmp_path)
    with torch.no_grad():
        for p in ranking.parameters():
            p.zero_()
    plain = model.predict(USERS, top=3, include_seen=True)
    ranked = model.predict(USERS, top=3, include_seen=True, rank=ranking, candidates=5)
    assert list(ranked["film"]) == list(plain["film"])
    retrieved = Retrieved(np.array([0, 0, 2]), np.array([5, 6, 7]), np.zeros(3, np.float32))
    assert retrieved.by_user(["a", "b", "c"], 4) == [["a", "b"], [], ["c"], []]


def test_an_index_of_the_same_model_stands_for_its_items(model, tmp_path):
    model.index().save(tmp_path / "items.safetensors")
    want = model.predict(USERS, top=3)
    for index in (tmp_path / "items.safetensors", model.index()):
        assert list(model.predict(USERS, top=3, index=index)["film"]) == list(want["film"])
    with torch.no_grad():
        model.item_tower.leave.weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"items\.safetensors was made by another model, or by other weights"):
        model.predict(USERS, index=tmp_path / "items.safetensors")
    with pytest.raises(FileNotFoundError, match="no item index"):
        model.predict(USERS, index=tmp_path / "none.safetensors")


def test_bad_rankings_and_a_damaged_catalog_are_refused(model, tmp_path):
    refused("rank is a TwoTowerRetriever: a MultiTaskRecommender ranks pairs", lambda: model.predict(USERS, rank=model))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        model.predict(USERS, rank=tmp_path / "none")
    refused("rank_task='buy'", lambda: model.predict(USERS, rank=ranker(tmp_path), rank_task="buy"))
    with pytest.raises(ValueError, match="candidates=5 are fewer than the 10 items"):
        model.predict(USERS, rank=ranker(tmp_path), candidates=5)
    with pytest.raises(ValueError, match="column 'age' \\(continuous\\) is not in the rows to predict"):
        model.predict({"user": ["ann"]}, rank=ranker(tmp_path))
    with pytest.raises(ValueError, match="rank_task='film kind' is of kind 'multiclass'"):
        kinds = {"film kind": {"column": "genres", "kind": "multiclass"}}
        Ranking(ranker(tmp_path, tasks=kinds, multi_valued=[]), pa.table({"film": list(FILMS)}))
    refused(r"catalogue\.npz is damaged", lambda: export_module._catalog(b"PK\x03\x04 and no more"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return shown(retrieval_run(tmp_path_factory.mktemp("retrieval")))


def test_examples_are_users_as_they_stand_in_the_table_and_others_are_refused(made):
    _, page = made
    assert [example.values for example in page.examples] == [("ann", "31"), ("cy", "50")]
    assert page.examples[0].label == "user ann, age 31"
    _, page = made
    with pytest.raises(ValueError, match="user='an' is none of the 3 values that the model knows; did you mean 'ann'"):
        answered(page, "an", "3")
    refused("age='old' is not a number", lambda: answered(page, "ann", "old"))


@torch.no_grad()
def test_the_answer_is_the_models_and_the_experts_are_of_its_passes(made):
    model, page = made
    answer = answered(page, "cy", "50")
    best = model.predict({"user": ["cy"], "age": [50]}, top=2)
    rows = [
        (f"{n}. {film}", f"{score:.3f}")
        for n, (film, score) in enumerate(zip(best["film"], best["score"], strict=True), 1)
    ]
    assert answer.parts[0].rows == tuple(rows)
    assert set(best["film"]) == {"Alien", "Brazil"}  # cy has rated the other three
    assert list(answer.layers) == ["user block 0", "item block 0"]
    (words,) = answer.layers["item block 0"]
    assert words.words == tuple((film,) for film in best["film"])
    state = model.encoding_state["catalogue"]
    from apps.recsys.retrieval.catalog import Catalog

    films = ["Alien", "Brazil"]
    items = Catalog.from_state(state).rows(model.item_features).__getitems__([films.index(f) for f in best["film"]])
    with core.record(model) as tape:
        model.item_tower(items)
    assert words.experts.tolist() == best_experts(tape.entries[0].routing)


USERS = {"user": ["cy", "ann", "zoe"], "age": [50, 30, 25], "stars": [1, 2, 3]}


def test_the_items_of_a_script_and_of_the_model_are_those_of_the_weights(tmp_path):
    data = made_pairs(tmp_path, user_column="user", exclude_seen=True)
    model = retriever(data).eval()
    model.adopt_encoding({"encoding": data.encoding_state})
    exported, export = reexported(model, tmp_path)
    for seen in (False, True):
        expected = model.predict(USERS, top=9, include_seen=seen)
        found = exported.predict(USERS, top=9, include_seen=seen)
        assert list(found["film"]) == list(expected["film"])
        np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-5)
    lines = [",".join(USERS), *(",".join(map(str, row)) for row in zip(*USERS.values(), strict=True))]
    (tmp_path / "users.csv").write_text("\n".join(lines) + "\n")
    printed = output_in_torch(
        script("docs/reference/onnx_scripts.md", "retrieve.py"), export, str(tmp_path), str(tmp_path / "users.csv")
    )
    pairs = zip(expected["row"], expected["film"], expected["score"], strict=True)
    by_user: list[list[str]] = [[], [], []]
    for row, film, score in pairs:
        by_user[row].append(f"{film}={score:.6f}")
    assert_alike(printed, [" ".join(films) for films in by_user])
