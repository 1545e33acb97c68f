"""``make demo``, cut to a few steps."""

from __future__ import annotations

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException
from made_page import Html

from apps import demo
from apps.compare import training
from apps.data import datasets
from apps.data.cache import DataError
from apps.report.page import html

FEW = ["--jobs", "1", "--seeds", "2", "--rounds", "0", "--learning_rates", "0.004", "--baselines",
       "dense_equal_flops", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2",
       "--trainer.limit_test_batches", "1"]  # fmt: skip


@pytest.fixture
def digits(monkeypatch) -> None:
    monkeypatch.setattr(demo, "PARTS", [p for p in demo.PARTS if p.dataset == "digits"])
    monkeypatch.setattr(demo, "slowness", lambda: 1.0)


def test_demo_ends_with_the_path_of_one_report_and_is_quick_again(tmp_path, monkeypatch, capsys, digits):
    monkeypatch.setattr(html, "script", lambda: "")
    argv = ["--output", str(tmp_path), *FEW]
    assert demo.main(argv) == 0
    out = capsys.readouterr().out
    assert "1,797 handwritten digits" in out
    assert "for 7 epochs with 3 seeds" in out
    assert "moesaic compare configs/vision/digits.yaml" in out
    assert "sparse minus it" in out
    assert out.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"
    page = Html((tmp_path / "report.html").read_text())
    for words in ("in 1 comparison on real data.", "Sparse and dense on digits. Against dense, equal FLOPs: ",
                  "What the experts are used for", "How to repeat it"):  # fmt: skip
        assert words in page.text, words
    (seen,) = page.attributes("alt")
    assert seen.startswith("6 test images (")
    assert "), and each again with its patches in the color of their expert, in group " in seen
    routing = tmp_path / "digits" / "report" / "routing.png"
    before = routing.stat().st_mtime_ns

    monkeypatch.setattr(training, "_fit", lambda *a: pytest.fail("trained again"))
    assert demo.main(argv) == 0
    assert routing.stat().st_mtime_ns == before
    assert "sparse minus it" in capsys.readouterr().out


def test_a_dataset_that_cannot_be_had_is_left_out(tmp_path, monkeypatch, capsys):
    def unreachable(name: str):
        raise DataError(f"{name}: no source could be reached")

    monkeypatch.setattr(datasets, "prepare", unreachable)
    assert demo.main(["--output", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "fashion_mnist is left out: fashion_mnist: no source could be reached" in captured.out
    assert captured.err == "error: none of the demo's datasets could be had\n"


def test_what_goes_wrong_is_one_line(tmp_path, capsys, digits):
    assert demo.main(["--output", str(tmp_path), *FEW, "--model.moe.num_experts", "1"]) == 1
    err = capsys.readouterr().err
    assert "top_k=2 exceeds num_experts=1" in err
    assert "Traceback" not in err
    assert demo.main(["--output"]) == 2


@pytest.mark.parametrize(
    "stop, code, how", [(KeyboardInterrupt, 130, "interrupted"), (SIGTERMException, 143, "terminated")]
)
def test_stopping_says_how_to_go_on(tmp_path, monkeypatch, capsys, digits, stop, code, how):
    def stopping(*args):
        raise stop

    monkeypatch.setattr(training, "_fit", stopping)
    assert demo.main(["--output", str(tmp_path), *FEW]) == code
    assert capsys.readouterr().err == f"\n{how}; make demo continues from here\n"


def part(fixed: float, scaled: float) -> demo.Part:
    """Return a part of so many seconds, which has 10 epochs."""
    return demo.Part("a", "a.yaml", "a", "", "", "", ("--trainer.max_epochs", 10, 2), (fixed, scaled))


def test_a_slow_machine_trains_less_so_that_all_parts_fit(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(demo.time, "monotonic", lambda: now[0])
    parts = [part(20.0, 80.0), part(10.0, 40.0)]  # 30 s whatever the training, 120 s of it
    # Of 290 s 10 have passed. Twice as slow, 140 of the planned seconds are left: 110 of 120 for training.
    now[0] += 10.0
    assert demo.Pace(1000.0, 2.0).share(parts) == pytest.approx(110 / 120)
    assert demo.Pace(1000.0, 1.0).share(parts) == 1
    pace = demo.Pace(1000.0, 20.0)
    assert pace.share(parts) == demo.LEAST_SHARE
    assert [parts[0].amount(share) for share in (1.0, 0.55, 0.01)] == [10, 6, 2]
    # With half of its training the first part is planned for 60 s, and takes 180: the machine is 3 times as slow.
    pace.took(parts[0], 0.5, 180.0)
    now[0] += 180.0
    assert pace.slow == 3
    assert pace.share(parts[1:]) == pytest.approx(((290 - 190) / 3 - 10) / 40)
    assert sum(part.expected(1.0) for part in demo.PARTS) < demo.MOST_SECONDS - 40


def test_every_part_is_a_comparison_that_parses(monkeypatch):
    from apps.compare.experiment import Experiment, arguments
    from apps.recsys.encoding.features import CategoricalFeature, Features
    from apps.recsys.tables.data import TableData

    made = Features(categorical=(CategoricalFeature("city", 5),), tasks=("income", "never_married"))
    monkeypatch.setattr(TableData, "features", made)  # the table is not fetched
    for part in demo.PARTS:
        words = [*part.arguments.split(), part.scaled[0], str(part.amount(0.5))]
        own = [w for i, word in enumerate(words) if word.startswith("--") and "." in word for w in words[i : i + 2]]
        assert Experiment(arguments(demo.CONFIGS / part.config, [], own)).replaced
