"""A trained next-item model answers a script, a page and a graph, and takes further items."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from doc_scripts import script
from quiet_trainer import quiet_trainer
from reexported import assert_alike, reexported
from refusals import refused
from shown_runs import answered, best_experts, history_run, shown
from torch_graphs import output_in_torch

import core
from apps.recsys.sequence.data import HistoryData
from apps.recsys.sequence.histories import Items
from apps.recsys.sequence.model import HistoryModelConfig
from apps.recsys.sequence.module import NextItemRecommender
from apps.recsys.sequence.task import NextItem, different_names

pytestmark = pytest.mark.filterwarnings("ignore")

# By time: ann 10 20 30 40 50, bob 50 10 (the same second, in this order) 20, cy 30 20, dot 40.
EVENTS = {
    "who": ["ann", "ann", "bob", "ann", "bob", "ann", "dot", "ann", "bob", "cy", "cy"],
    "what": [30, 10, 50, 20, 10, 40, 40, 50, 20, 20, 30],
    "when": [3, 1, 9, 2, 9, 4, 1, 5, 10, 8, 7],
    "other": list(range(11)),
}
COLUMNS: dict[str, Any] = {"user_column": "who", "item_column": "what", "time_column": "when"}
LISTS = [[10, 20, 30, 40, 50], [50, 10, 20], [40], [30, 20]]  # in the order in which the users first occur
USERS = ["ann", "bob", "dot", "cy"]


def trained(
    folder: Path, events: dict[str, Any] = EVENTS, sequence: HistoryModelConfig | None = None, **options: Any
) -> tuple[Any, dict[str, list[Any]]]:
    """The model of a checkpoint whose file is gone, and what it predicted for each user before."""
    pa.csv.write_csv(pa.table(events), folder / "clicks.csv")
    data = HistoryData("table", file=str(folder / "clicks.csv"), max_length=4, **{**COLUMNS, **options})
    torch.manual_seed(0)
    model = NextItemRecommender(data.num_items, data.max_length, sequence, top_k=5)
    trainer = quiet_trainer(folder, max_epochs=1)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(folder / "it.ckpt")
    predicted: Any = trainer.predict(model, datamodule=data)
    (folder / "clicks.csv").unlink()
    by_user = {
        user: list(zip(items, scores, strict=True))
        for batch in predicted
        for user, items, scores in zip(batch.user_name, batch.item, batch.score, strict=True)
    }
    return NextItemRecommender.load_from_checkpoint(folder / "it.ckpt"), by_user


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("plain")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return trained(folder)


def assert_same(actual: list[tuple[Any, float]], expected: list[tuple[Any, float]]) -> None:
    assert [str(item) for item, _ in actual] == [str(item) for item, _ in expected]
    np.testing.assert_allclose([score for _, score in actual], [score for _, score in expected], rtol=1e-4)


def test_lists_have_the_items_that_the_command_line_predicts(plain) -> None:
    model, written = plain
    for best, user in zip(model.predict(LISTS, include_seen=True, batch_size=3), USERS, strict=True):
        assert_same(best, written[user])
    for best, history, user in zip(model.predict(LISTS, top=2), LISTS, USERS, strict=True):
        unseen = [(item, score) for item, score in written[user] if int(item) not in history]
        assert_same(best, unseen[:2])  # ann has seen all five, the first too, which the model does not look at
        assert all(isinstance(item, int) for item, _ in best)
    pandas = pytest.importorskip("pandas")
    assert model.predict(pandas.Series(LISTS, index=USERS), top=2) == model.predict(LISTS, top=2)
    texts = [[str(item) for item in history] for history in LISTS]
    assert [item for item, _ in model.predict(texts)[2]] == [str(item) for item, _ in model.predict(LISTS)[2]]


def test_events_have_the_same_in_every_form(plain, tmp_path: Path) -> None:
    model, _ = plain
    users, items, scores = zip(
        *((u, i, s) for u, best in zip(USERS, model.predict(LISTS, top=3), strict=True) for i, s in best),
        strict=True,
    )
    pa.csv.write_csv(pa.table(EVENTS), tmp_path / "new.csv")
    views = {"who": pa.array(EVENTS["who"], pa.string_view())}
    for rows in (EVENTS, pa.table(EVENTS), pa.table({**EVENTS, **views}), tmp_path / "new.csv"):
        result = model.predict(rows, top=3)
        columns = result.column_names if isinstance(result, pa.Table) else list(result)
        assert (columns, np.asarray(result["who"]).tolist()) == (["who", "what", "score"], list(users))
        wanted = list(map(str, items)) if isinstance(rows, Path) else list(items)
        assert np.asarray(result["what"]).tolist() == wanted
        np.testing.assert_allclose(np.asarray(result["score"]), scores, rtol=1e-5)
    pandas = pytest.importorskip("pandas")
    frame = model.predict(pandas.DataFrame(EVENTS), top=3)
    assert (frame["who"].tolist(), frame["what"].tolist()) == (list(users), list(items))


@pytest.mark.parametrize(
    ("values", "kind", "of_lists", "of_events"),
    [
        (["0012", "12", "7"], pa.int16(), ["0012", "12", "7"], pa.array(["0012", "12", "7"])),  # not 12, 12, 7
        (["12", "7", "x"], pa.int16(), ["12", "7", "x"], pa.array(["12", "7", "x"])),
        (["12", "300", "7"], pa.int16(), [12, 300, 7], pa.array([12, 300, 7], pa.int16())),
        (["-1", "300", "7"], pa.uint8(), [-1, 300, 7], pa.array([-1, 300, 7])),
        (["12", "9" * 20, "7"], pa.int16(), [12, int("9" * 20), 7], pa.array(["12", "9" * 20, "7"])),
    ],
)
def test_items_are_integers_where_all_of_the_model_s_are(
    values: list[str], kind: pa.DataType, of_lists: list[Any], of_events: pa.Array
) -> None:
    model = NextItemRecommender(3, 4).eval()
    model.adopt_encoding({"encoding": Items(("", *values), ("", *values)).state()})
    model.model.forward = lambda *_: torch.tensor([[-torch.inf, 3.0, 2.0, 1.0]])  # the items in their order
    assert model.predict([[7]], top=2, include_seen=True) == [list(zip(of_lists[:2], [3.0, 2.0], strict=True))]
    events = pa.table({"user": [1], "item": pa.array([7], kind), "time": [0]})
    assert model.predict(events, include_seen=True)["item"].combine_chunks() == of_events


def test_events_have_their_times_and_lists_are_of_one_time(tmp_path: Path) -> None:
    days = {**EVENTS, "when": [86_400 * time for time in EVENTS["when"]]}
    config = HistoryModelConfig(dim=8, depth=1, mixing="hstu", time_buckets=64)
    model, _ = trained(tmp_path, days, config)
    with torch.no_grad():  # one step has taught it little of times
        model.model.pair_bias.time_bias.normal_(std=5.0)
    table = model.predict(pa.table(days), top=5, include_seen=True).to_pylist()
    place_V = {value: i for i, value in enumerate([0, 10, 20, 30, 40, 50])}
    for user, history in zip(USERS, LISTS, strict=True):
        of_user = [(row["what"], row["score"]) for row in table if row["who"] == user]
        times = sorted(t for t, who in zip(days["when"], days["who"], strict=True) if who == user)
        with torch.inference_mode():
            items = torch.tensor([[place_V[item] for item in history]])[:, -4:]
            scores = model.eval()(items, torch.tensor([times])[:, -4:])[0]
            once = model(items)[0]
        np.testing.assert_allclose([s for _, s in of_user], [float(scores[place_V[i]]) for i, _ in of_user], rtol=1e-4)
        (best,) = model.predict([history], top=5, include_seen=True)
        np.testing.assert_allclose([s for _, s in best], [float(once[place_V[i]]) for i, _ in best], rtol=1e-4)
        assert len(history) == 1 or not torch.allclose(scores[1:], once[1:])


def test_items_that_the_model_does_not_know_are_left_out_and_counted(plain, caplog) -> None:
    model, _ = plain
    expected = model.predict(LISTS)
    caplog.clear()
    best = model.predict([[*LISTS[0], 60], LISTS[1], [60], [30, 61, 20], []])
    for i in (0, 1, 3):
        assert_same(best[i], expected[i])
    assert (best[2], best[4]) == ([], [])
    message = "items left out, for the model does not know them: 3; histories of no others, which get no items: 2"
    assert (caplog.messages, model.predict([[60]]), model.predict([])) == ([message], [[]], [])


def test_low_ratings_are_left_out_as_in_training_and_names_stand_beside_the_items(tmp_path: Path) -> None:
    events = {**EVENTS, "stars": [5, 4, 4, 2, 4, 5, 4, 3, 5, 4, 4], "title": [f"film {i}" for i in EVENTS["what"]]}
    options = {"rating_column": "stars", "min_rating": 3, "name_column": "title"}
    model, written = trained(tmp_path, events, **options)
    result = model.predict({k: v for k, v in events.items() if k != "title"}, top=5, include_seen=True)
    of_ann = [(i, s) for u, i, s in zip(result["who"], result["what"], result["score"], strict=True) if u == "ann"]
    assert_same(of_ann, written["ann"])  # of 10 30 40 50: 20 has 2 stars
    assert result["name"].tolist() == [f"film {i}" for i in result["what"]]


def test_histories_that_are_none_are_named(plain) -> None:
    for histories, message in (
        ([10, 20], r"^histories\[0\]=10 is not a list of items: give a list of histories$"),
        ([[10], [20, None]], r"^histories\[1\] has no value at place 1$"),
        ({"who": ["ann"], "what": [10]}, r"^column 'when' \(time\) is not in the rows to predict$"),
        ({**EVENTS, "what": [None, *EVENTS["what"][1:]]}, r"^column 'what' has no value in row 0$"),
        ({**EVENTS, "when": ["x", *EVENTS["when"][1:]]}, r"^column 'when' of the rows to predict is no column of one"),
        (7, r"^rows=7 are none that can be scored: give a DataFrame"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            plain[0].predict(histories)
        assert "\n" not in str(error.value)
    refused("top=0 must be at least 1", lambda: plain[0].predict(LISTS, top=0))


def test_the_items_are_the_models_and_the_experts_are_of_its_pass(tmp_path):
    model, exhibit = shown(history_run(tmp_path))
    assert [example.label for example in exhibit.examples] == [
        "Alien, Brazil, Casablanca", "Brazil, Casablanca, Dune", "Casablanca, Dune, Eraserhead",
    ]  # fmt: skip
    names = ["Brazil", "Dune", "Alien"]
    answer = answered(exhibit, names)
    films = {"0": "Alien", "1": "Brazil", "2": "Casablanca", "3": "Dune", "4": "Eraserhead"}
    (best,) = model.predict([["1", "3", "0"]], top=3, include_seen=True)
    rows = tuple((f"{i}. {films[item]}", f"{score:.2f}") for i, (item, score) in enumerate(best, 1))
    assert (answer.parts[0].rows, list(answer.layers)) == (rows, ["block 0 mixing", "block 0 ffn"])
    with core.record(model.model) as tape:
        model(torch.tensor([[2, 4, 1]]))  # items count from 1
    (words,) = answer.layers["block 0 ffn"]
    assert words.words == (("Brazil",), ("Dune",), ("Alien",))
    assert words.experts.tolist() == best_experts(tape.entries[-1].routing)
    (mixing,) = answer.layers["block 0 mixing"]
    assert mixing.names == ("convolution", "attention")
    # A history longer than the model's six items is cut to its last ones.
    (words,) = answered(exhibit, ["Alien", *names, *names]).layers["block 0 ffn"]
    assert [word for (word,) in words.words] == [*names, *names]
    refused(r"is empty: choose an item first$", lambda: answered(exhibit, []))


def test_a_page_shows_as_many_items_as_predict_with_names_that_differ(tmp_path):
    model, page = shown(history_run(tmp_path))
    assert page.fields[0].value == page.examples[0].values[0] == ("Alien", "Brazil", "Casablanca")
    for exclude_seen, items in ((False, 3), (True, 2)):
        model.exclude_seen = exclude_seen
        task = NextItem(model)
        assert len(answered(task.exhibit(None, 0), ["Alien", "Brazil", "Dune"]).parts[0].rows) == items
        service = task.service()
        asked = [{"history": [0, " 1 ", "99"]}, {"history": ["0", "1", "3"], "top": 1}]
        first, second = service.predict([service.read(one) for one in asked])
        assert {row["name"] for row in first["items"]} == {"Casablanca", "Dune", "Eraserhead"}
        assert (first["unknown"], second["unknown"], len(second["items"])) == (1, 0, 1)
    refused(r"^history\[1\] is empty$", lambda: task.read({"history": ["0", " "]}))
    items = Items(("", "1", "2", "3"), ("", "Emma", "Persuasion", "Emma"))
    assert different_names(items) == ("Emma (1)", "Persuasion", "Emma (3)")


SHOP_EVENTS = {
    "user": ["ann", "ann", "bob", "ann", "bob", "ann", "dot", "ann"],
    "item": [30, 10, 50, 20, 10, 40, 60, 50],
    "time": [3, 1, 9, 2, 9, 4, 1, 5],
}
HISTORIES = [[10, 20, 30, 40, 50], [50], [99], [30, 20]]


@pytest.mark.parametrize("times", [0, 8])
def test_the_items_of_a_script_and_of_the_model_are_those_of_the_weights(tmp_path, times):
    pa.csv.write_csv(pa.table(SHOP_EVENTS), tmp_path / "clicks.csv")
    data = HistoryData("table", file=str(tmp_path / "clicks.csv"), cache_dir=str(tmp_path), max_length=4)
    torch.manual_seed(0)
    config = HistoryModelConfig(dim=8, depth=1, mixing="hstu" if times else "mixture", time_buckets=times)
    model = NextItemRecommender(data.num_items, data.max_length, config, report=None).eval()
    torch.nn.init.normal_(model.model.item_embed.weight)
    model.adopt_encoding({"encoding": data.encoding_state})
    exported, export = reexported(model, tmp_path)
    expected = model.predict(HISTORIES)
    for own, best in zip(exported.predict(HISTORIES), expected, strict=True):
        assert [item for item, _ in own] == [item for item, _ in best]
        assert [score for _, score in own] == pytest.approx([score for _, score in best], rel=1e-5)
    for own, best in zip(exported.predict(SHOP_EVENTS)["score"], model.predict(SHOP_EVENTS)["score"], strict=True):
        assert own == pytest.approx(best, rel=1e-5)
    if not times:
        own = script("docs/reference/onnx_scripts.md", "next_items.py")
        printed = output_in_torch(own, export, "model.onnx", "30", "99", "20")
        assert_alike(printed, [f"{item} {score:.6f}" for item, score in expected[3]])


OLD = {"user": ["u"] * 4 + ["v"] * 3, "item": ["tea", "fig", "rye", "fig", "tea", "rye", "tea"], "time": range(7)}
NEW = {
    "user": ["u"] * 5 + ["w"] * 3,
    "item": ["ale", "fig", "oat", "ale", "tea", "rye", "bun", "tea"],
    "time": range(8),
}


def grown_data(folder, columns, **options):
    path = folder / "events.csv"
    pa.csv.write_csv(pa.table({name: list(values) for name, values in columns.items()}), path)
    return HistoryData("table", file=str(path), cache_dir=str(folder / "cache"), max_length=4, **options)


def model_of(data, seed):
    torch.manual_seed(seed)
    return NextItemRecommender(data.num_items, 4, HistoryModelConfig(dim=8, depth=1, num_heads=2)).eval()


@pytest.mark.parametrize(("min_count", "added"), [(1, ["ale", "bun", "oat"]), (2, ["ale"])])
def test_new_items_get_the_ids_after_the_old_ones_and_no_score_changes(tmp_path, min_count, added):
    first = grown_data(tmp_path, OLD)
    before = model_of(first, 0)
    checkpoint = {"encoding": first.encoding_state, "state_dict": before.state_dict()}
    data = grown_data(tmp_path, NEW, min_item_count=min_count)
    data.extend(checkpoint["encoding"])
    assert data.item_values == ("", "fig", "rye", "tea", *added)
    assert data.histories.num_unknown == (0 if min_count == 1 else 2)
    after = model_of(data, 1)
    fresh = after.model.item_embed.weight[4:].clone()
    wide = after.widened(checkpoint, data.encoding_state)
    after.load_state_dict(wide["state_dict"])
    items_BS = torch.tensor([[1, 2, 3], [3, 0, 0]])
    # Not always to the bit: a product with more items may be summed in another order.
    torch.testing.assert_close(after(items_BS)[:, :4], before(items_BS), rtol=1e-5, atol=0)
    assert torch.equal(after.model.item_embed.weight[4:], fresh)  # as the model draws them
    assert Items.from_state(wide["encoding"]) == data.encoding
    # The grown items are adopted as any others.
    again = grown_data(tmp_path, NEW)
    again.adopt(data.encoding_state)
    assert again.item_values == data.item_values


def test_new_items_have_names_of_their_own(tmp_path):
    names = {"fig": "Fig", "rye": "Rye", "tea": "Tea", "ale": "Ale", "oat": "Oat", "bun": "Bun"}
    state = grown_data(tmp_path, OLD | {"label": [names[i] for i in OLD["item"]]}, name_column="label").encoding_state
    new = NEW | {"label": [names[i].upper() for i in NEW["item"]]}
    data = grown_data(tmp_path, new, name_column="label")
    data.extend(state)
    assert data.item_names == ("", "Fig", "Rye", "Tea", "ALE", "BUN", "OAT")
