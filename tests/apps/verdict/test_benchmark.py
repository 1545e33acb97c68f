"""The benchmark of verdicts: its agreement by hand, its made tables, and a queue that goes on."""

import json

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from benchmarks import verdict
from benchmarks.verdict import Agreement, Folders, agreement, made_loses, made_wins


def gave(*answers: tuple[str, float]) -> dict:
    both = [{"outcome": outcome, "mean": mean, "half_width": 0.01} for outcome, mean in answers]
    return {"answers": both, "quality": "auc"}


def test_agreement_counts_questions_and_signs():
    tasks = {
        # The tenth decides both; its "pays" is against the sign of the whole budget's mean.
        "a": {"20": gave(("pays", 0.02), ("undecided", -0.01)), "2": gave(("pays", 0.03), ("pays", 0.02))},
        "b": {"20": gave(("does not pay", -0.1), ("pays", 0.1)), "2": gave(("does not pay", -0.2), ("undecided", 0))},
        "c": {"20": gave(("pays", 0.02), ("pays", 0.02))},  # no tenth yet
    }
    assert agreement(tasks, 20) == Agreement(whole=3, tenth=3, agreed=2, asked=4)
    page = verdict.markdown({"tasks": {"cancer": tasks["a"], "wine": tasks["b"]}, "machine": "a machine"}, 20)
    assert "Of 4 questions 20 minutes decide 3 and a tenth of them 3; of these 2 (67%)" in page


def test_made_tables_ask_what_they_say():
    wins, loses = made_wins(Folders(None)), made_loses(Folders(None))
    label_N, group_N = wins["target"].to_numpy(zero_copy_only=False), np.array(wins["group"].to_pylist())
    shares = {group: label_N[group_N == group].mean().round(2) for group in set(group_N)}
    assert shares == {f"g{g}": 0.5 for g in range(8)}
    # Within a group near rows have equal labels, over all rows they have not.
    x_NC = np.stack([wins[f"x{c}"].to_numpy() for c in range(6)], 1)

    def near(x_NC, label_N):
        model = KNeighborsClassifier(15).fit(x_NC[:4000], label_N[:4000])
        return model.score(x_NC[4000:5000], label_N[4000:5000])

    assert near(x_NC[group_N == "g3"], label_N[group_N == "g3"]) > 0.8
    assert near(x_NC, label_N) < 0.65

    def right(x_NC, label_N):
        sign_N = np.where(label_N, 1.0, -1.0)
        return ((x_NC @ np.linalg.lstsq(x_NC, sign_N, rcond=None)[0] > 0) == label_N).mean()

    x_NC = np.stack([loses[f"x{c}"].to_numpy() for c in range(60)], 1)
    assert 0.7 < right(x_NC, loses["target"].to_numpy(zero_copy_only=False)) < 0.9


def test_the_queue_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(verdict, "NUMBERS", tmp_path / "verdict.json")
    monkeypatch.setitem(verdict.TASKS, "cancer", verdict.Task("table", lambda *_: ["t.csv"], "a table"))
    monkeypatch.setitem(verdict.TASKS, "wine", verdict.Task("table", lambda *_: None, "not there"))
    asked, stops = [], [False, True, False]

    def give(words, minutes, output):
        if stops.pop(0):
            raise RuntimeError("stopped")
        asked.append(minutes)
        return gave(("pays", 0.1), ("pays", 0.1))

    monkeypatch.setattr(verdict, "give_verdict", give)
    with pytest.raises(RuntimeError, match="stopped"):
        verdict.run_queue(["cancer", "wine"], (20.0, 2.0), Folders(tmp_path))
    assert list(json.loads((tmp_path / "verdict.json").read_text())["tasks"]["cancer"]) == ["20"]
    verdict.run_queue(["cancer", "wine"], (20.0, 2.0), Folders(tmp_path))
    assert (asked, list(json.loads((tmp_path / "verdict.json").read_text())["tasks"])) == ([20.0, 2.0], ["cancer"])
