"""A script asks a model alone for the next items: ``model.predict(histories)``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
from lightning.pytorch import Trainer

from apps.recsys.sequence.data import HistoryData
from apps.recsys.sequence.histories import Items
from apps.recsys.sequence.model import HistoryModelConfig
from apps.recsys.sequence.module import NextItemRecommender

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}

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
    trainer = Trainer(default_root_dir=folder, max_epochs=1, enable_checkpointing=False, **QUIET)  # type: ignore[arg-type]
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


def assert_same(actual: list[tuple[Any, float]], expected: list[tuple[Any, float]]) -> None:
    assert [str(item) for item, _ in actual] == [str(item) for item, _ in expected]
    np.testing.assert_allclose([score for _, score in actual], [score for _, score in expected], rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_lists_have_the_items_that_the_command_line_predicts(tmp_path: Path) -> None:
    model, written = trained(tmp_path)
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


@pytest.mark.filterwarnings("ignore")
def test_events_have_the_same_in_every_form(tmp_path: Path) -> None:
    model, _ = trained(tmp_path)
    users, items, scores = zip(
        *((u, i, s) for u, best in zip(USERS, model.predict(LISTS, top=3), strict=True) for i, s in best),
        strict=True,
    )
    pa.csv.write_csv(pa.table(EVENTS), tmp_path / "new.csv")
    views = {"who": pa.array(EVENTS["who"], pa.string_view())}
    for rows in (EVENTS, pa.table(EVENTS), pa.table({**EVENTS, **views}), tmp_path / "new.csv"):
        result = model.predict(rows, top=3)
        columns = result.column_names if isinstance(result, pa.Table) else list(result)
        assert columns == ["who", "what", "score"]
        assert np.asarray(result["who"]).tolist() == list(users)
        wanted = list(map(str, items)) if isinstance(rows, Path) else list(items)
        assert np.asarray(result["what"]).tolist() == wanted
        np.testing.assert_allclose(np.asarray(result["score"]), scores, rtol=1e-5)
    pandas = pytest.importorskip("pandas")
    frame = model.predict(pandas.DataFrame(EVENTS), top=3)
    assert frame["who"].tolist() == list(users)
    assert frame["what"].tolist() == list(items)


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


@pytest.mark.filterwarnings("ignore")
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


@pytest.mark.filterwarnings("ignore")
def test_items_that_the_model_does_not_know_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = trained(tmp_path)
    expected = model.predict(LISTS)
    caplog.clear()
    best = model.predict([[*LISTS[0], 60], LISTS[1], [60], [30, 61, 20], []])
    for i in (0, 1, 3):
        assert_same(best[i], expected[i])
    assert (best[2], best[4]) == ([], [])
    message = "items left out, for the model does not know them: 3; histories of no others, which get no items: 2"
    assert caplog.messages == [message]
    assert model.predict([[60]]) == [[]]
    assert model.predict([]) == []


@pytest.mark.filterwarnings("ignore")
def test_low_ratings_are_left_out_as_in_training_and_names_stand_beside_the_items(tmp_path: Path) -> None:
    events = {**EVENTS, "stars": [5, 4, 4, 2, 4, 5, 4, 3, 5, 4, 4], "title": [f"film {i}" for i in EVENTS["what"]]}
    options = {"rating_column": "stars", "min_rating": 3, "name_column": "title"}
    model, written = trained(tmp_path, events, **options)
    result = model.predict({k: v for k, v in events.items() if k != "title"}, top=5, include_seen=True)
    of_ann = [(i, s) for u, i, s in zip(result["who"], result["what"], result["score"], strict=True) if u == "ann"]
    assert_same(of_ann, written["ann"])  # of 10 30 40 50: 20 has 2 stars
    assert result["name"].tolist() == [f"film {i}" for i in result["what"]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ([10, 20], r"^histories\[0\]=10 is not a list of items: give a list of histories$"),
        ([[10], [20, None]], r"^histories\[1\] has no value at place 1$"),
        ({"who": ["ann"], "what": [10]}, r"^column 'when' \(time\) is not in the rows to predict$"),
        ({**EVENTS, "what": [None, *EVENTS["what"][1:]]}, r"^column 'what' has no value in row 0$"),
        ({**EVENTS, "when": ["x", *EVENTS["when"][1:]]}, r"^column 'when' of the rows to predict is no column of one"),
        (7, r"^rows=7 are none that can be scored: give a DataFrame"),
    ],
)
def test_histories_that_are_none_are_named(tmp_path: Path, histories: Any, message: str) -> None:
    model, _ = trained(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        model.predict(histories)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="top=0 must be at least 1"):
        model.predict(LISTS, top=0)
