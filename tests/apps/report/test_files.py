"""Files of reports, whole or not there: tables, images, the whole of a report, and the logs of a training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_app import TinyModule
from trainings import fit, rows

import core
from apps.report.base import Report, first_batches
from apps.report.images import NO_EXPERT, Tile, heated, save_images, tinted
from apps.report.live import RoutingDetail, load_map, show_loads
from apps.report.tables import is_share, parts_that_fit, print_in_parts, print_table, write_csv
from apps.train.watch.logs import MetricsCSV

DETAILED = {"max_violation", "load_variation", "load_p5", "load_p25", "load_p50", "load_p75", "load_p95"}


class Lines(Report):
    """Writes a file for each line, and fails at an empty one."""

    def __init__(self, lines: Any) -> None:
        self.lines = lines

    def collect(self, trainer: Any, pl_module: Any) -> Any:
        return self.lines

    def write(self, collected: Any, folder: Path) -> None:
        for name, line in collected.items():
            if not line:
                raise OSError("no space left on device")
            (folder / name).write_text(line)


def run(lines: Any, folder: Path, rank: int = 0) -> None:
    trainer: Any = SimpleNamespace(default_root_dir=str(folder), is_global_zero=rank == 0)
    Lines(lines).on_test_epoch_end(trainer, SimpleNamespace())  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_report_is_written_whole_or_not_at_all(tmp_path, caplog):
    with caplog.at_level("INFO"):
        run({"b.csv": "1", "a.csv": "2"}, tmp_path)
    assert contents(tmp_path) == {"report/a.csv": "2", "report/b.csv": "1"}
    assert caplog.messages == [f"{tmp_path / 'report'}: a.csv, b.csv"]
    (tmp_path / ".report.tmp").mkdir()
    (tmp_path / ".report.tmp" / "left.csv").write_text("by a kill")
    (tmp_path / "report" / "notes.txt").write_text("not ours")
    with pytest.raises(OSError, match="no space"):
        run({"a.csv": "3", "b.csv": ""}, tmp_path)
    assert contents(tmp_path) == {"report/a.csv": "2", "report/b.csv": "1", "report/notes.txt": "not ours"}
    run({"a.csv": "3"}, tmp_path)
    assert contents(tmp_path) == {"report/a.csv": "3", "report/b.csv": "1", "report/notes.txt": "not ours"}


def test_nothing_is_written_without_files_or_by_another_process(tmp_path):
    for lines, rank in ((None, 0), ({}, 0), ({"a.csv": "1"}, 1)):
        run(lines, tmp_path, rank)
        assert not list(tmp_path.iterdir())
    # The first batches of a report end with the one that completes them.
    batches = [[1, 2], [3, 4], [5, 6]]
    assert [list(first_batches(batches, most)) for most in (3, 2, 0, 100)] == [batches[:2], batches[:1], [], batches]
    assert list(first_batches(batches, 1, size=lambda batch: 0)) == batches


# ---- tables


def test_rows_may_have_different_keys_and_what_looks_like_markup_is_text(tmp_path, capsys):
    path = write_csv(tmp_path / "deeper" / "a.csv", [{"name": "x", "a": 1}, {"name": "y, z", "b": 2}])
    assert path.read_text().splitlines() == ["name,a,b", "x,1,", '"y, z",,2']
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


def test_a_wide_table_is_shown_in_parts_that_fit_without_rows_that_have_no_cells_there(monkeypatch, capsys):
    rows = [["", "sparse", "dense, equal FLOPs", "trees"], ["test top1, %", "94.00 ± 12.71", "92.00 ± 0.00", "–"]]
    # First column 4 + 12; then 3 + 13, 3 + 12, 3 + 5.
    parts = {55: [[0, 1, 2, 3]], 54: [[0, 1, 2], [0, 3]], 10: [[0, 1], [0, 2], [0, 3]]}
    assert {width: parts_that_fit(rows, width) for width in parts} == parts
    monkeypatch.setenv("COLUMNS", "26")
    print_in_parts(["layer", "load imbalance", "experts"], [["first", "1.250", "6.000"], ["second", "1.500", ""]])
    lines = [[cell.strip() for cell in line[1:-1].split("│")] for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if len(line) == 2] == [["first", "1.250"], ["second", "1.500"], ["first", "6.000"]]


# ---- images


def test_patches_have_the_color_and_number_of_their_expert_and_the_largest_weight_is_the_brightest():
    tile = tinted(np.zeros((4, 4)), np.array([[0, 1], [2, 3]]), 3, "block 1")  # no expert computed the last patch
    assert tile.over.shape == (2, 2, 4)
    assert list(tile.over[0, 0]) == pytest.approx([0x00 / 255, 0x72 / 255, 0xB2 / 255, 0.6])
    assert tile.over[1, 1, 3] == 0
    assert tile.texts == (("0", "1"), ("2", NO_EXPERT))
    assert tinted(np.zeros((64, 64)), np.zeros((16, 16), int), 3).texts == ()
    over = heated(np.ones((4, 4, 3)), np.array([[0.1, 0.2]]), "word").over
    assert over[0, 1, :3].sum() > over[0, 0, :3].sum()


def test_an_image_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    rows = [[Tile(np.ones((8, 8, 3)), "image"), None], [Tile(np.zeros((8, 8, 1)), is_framed=True)]]
    path = save_images(rows, tmp_path / "new" / "a.png", "A $title$", ["a name", "$b$"], num_experts=4)
    with Image.open(path) as image:
        assert image.mode in ("RGB", "RGBA")
    before = path.read_bytes()

    def full(figure, file, **kwargs):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="no space"):
        save_images(rows, path, "title")
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    assert path.read_bytes() == before


# ---- logs


def layer_stats(*chosen):
    chosen_E = torch.tensor(chosen)
    return core.telemetry.LayerStats(chosen_E, chosen_E, torch.tensor(0.0), chosen_E.sum())


def test_a_training_logs_the_detailed_figures_and_draws_after_each_validation(tmp_path):
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    module = TinyModule(3, moe=core.MoEConfig(4, core.TokenChoice(2)))
    fit(module, tmp_path, RoutingDetail(), max_epochs=2, logger=[MetricsCSV(str(tmp_path)), logger])
    logged = {name for row in rows(tmp_path) for name, value in row.items() if value}
    (layer,) = {name.split("/")[2] for name in logged if name.startswith("val/routing/") and name.count("/") == 3}
    assert {f"{prefix}/{layer}/{name}" for prefix in ("routing", "val/routing") for name in DETAILED} <= logged
    events = EventAccumulator(str(tmp_path), {"images": 0, "histograms": 0}).Reload()
    assert len(events.Images("val/routing/loads")) == len(events.Histograms(f"val/routing/{layer}/load")) == 2
    assert (module.balance.detailed, module.balance.on_routing) == (False, None)  # a later test is brief again


def test_the_histogram_has_each_expert_s_load_over_the_mean_and_the_map_its_share(tmp_path):
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    show_loads([logger], core.RoutingStats({"a": layer_stats(6, 1, 1, 0), "b": layer_stats(2, 2)}), step=7)
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path), {"histograms": 0}).Reload()
    (of_a,) = events.Histograms("val/routing/a/load")
    # Loads 6, 1, 1, 0 over their mean 2 are 3, 0.5, 0.5, 0.
    assert (of_a.step, of_a.histogram_value.num, of_a.histogram_value.sum) == (7, 4, 4.0)
    assert of_a.histogram_value.sum_squares == pytest.approx(9.5)
    (of_b,) = events.Histograms("val/routing/b/load")
    assert (of_b.histogram_value.min, of_b.histogram_value.max) == (1.0, 1.0)
    chart = load_map({"a": np.array([3.0, 0.5, 0.5, 0.0]), "b": np.array([1.0, 1.0])})
    assert chart.rows == ("a", "b")
    np.testing.assert_allclose(chart.values, [[75.0, 12.5, 12.5, 0.0], [50.0, 50.0, np.nan, np.nan]])
    with pytest.raises(ValueError, match="not a LightningModule"):
        RoutingDetail().setup(None, LightningModule(), "fit")
