"""Tables on the screen and in files."""

from __future__ import annotations

from apps.report.tables import is_share, parts_that_fit, print_in_parts, print_table, write_csv


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


def test_a_wide_table_is_shown_in_parts_that_fit():
    rows = [["", "sparse", "dense, equal FLOPs", "trees"], ["test top1, %", "94.00 ± 12.71", "92.00 ± 0.00", "–"]]
    # First column 4 + 12; then 3 + 13, 3 + 12, 3 + 5.
    assert parts_that_fit(rows, 55) == [[0, 1, 2, 3]]
    assert parts_that_fit(rows, 54) == [[0, 1, 2], [0, 3]]
    assert parts_that_fit(rows, 10) == [[0, 1], [0, 2], [0, 3]]


def test_a_row_without_cells_of_a_part_is_left_out_of_it(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "26")
    print_in_parts(["layer", "load imbalance", "experts"], [["first", "1.250", "6.000"], ["second", "1.500", ""]])
    lines = [[cell.strip() for cell in line[1:-1].split("│")] for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if len(line) == 2] == [["first", "1.250"], ["second", "1.500"], ["first", "6.000"]]
