"""Tables on the screen and in files."""

from __future__ import annotations

from apps.report.tables import is_share, print_table, write_csv


def test_rows_may_have_different_keys(tmp_path):
    path = write_csv(tmp_path / "deeper" / "a.csv", [{"name": "x", "a": 1}, {"name": "y, z", "b": 2}])
    assert path.read_text().splitlines() == ["name,a,b", "x,1,", '"y, z",,2']


def test_what_looks_like_markup_is_text(capsys):
    print_table("[bold]scores", ("name of the system", "value"), [("[red]", "1")])
    out = capsys.readouterr().out
    assert "[bold]scores" in out
    assert "[red]" in out


def test_errors_and_correlations_are_no_shares():
    for metric, is_percent in (("test/top1", True), ("test/auc_click", True), ("test/r2_price", False)):
        assert is_share(metric, [[0.25, 0.5]]) == is_percent, metric
    assert not is_share("test/rmse", [[0.25]])
    assert not is_share("test/image_to_text_median_rank", [[1.0]])
    assert not is_share("test/top1", [[0.25, 2.0]])
