"""The base of the reports: all files of a report or none, and what its options refuse."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apps.report.base import Report, first_batches


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


@pytest.mark.parametrize("lines, rank", [(None, 0), ({}, 0), ({"a.csv": "1"}, 1)])
def test_nothing_is_written_without_files_or_by_another_process(lines, rank, tmp_path):
    run(lines, tmp_path, rank)
    assert not list(tmp_path.iterdir())


def test_first_batches_end_with_the_batch_that_completes_them():
    batches = [[1, 2], [3, 4], [5, 6]]
    assert list(first_batches(batches, 3)) == [[1, 2], [3, 4]]
    assert list(first_batches(batches, 2)) == [[1, 2]]
    assert list(first_batches(batches, 0)) == []
    assert list(first_batches(batches, 100)) == batches
    assert list(first_batches(batches, 1, size=lambda batch: 0)) == batches
