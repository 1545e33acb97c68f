"""What the finished runs of a suite have shown: a small JSON file a board, which is kept with the source.

A row has the figures of each seed, the cost of the model, and its speed. They count for the configuration that they
were made with: figures of another one under the same name are those of no run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apps.base.files import read_json, write_json
from apps.compare.suite.file import Entry, slug
from apps.runner.folder import differences

_DIGITS = 7


class Figures:
    """The figures of a suite's finished runs.

    Args:
        folder: folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, board: str) -> Path:
        return self.folder / f"{slug(board)}.json"

    def row(self, entry: Entry) -> dict[str, Any]:
        """Return the figures of a row; empty where there are none of its configuration.

        The keys are those that the queue has given to ``add``, and "runs": the figures of each run, by its seed.

        Raises:
            ValueError: the file is not one of figures.
        """
        row = self._saved(entry.board).get(entry.name)
        if row is None or self.changes(entry):
            return {"runs": {}}
        return {**row, "runs": {int(seed): run for seed, run in row["runs"].items()}}

    def changes(self, entry: Entry) -> list[str]:
        """Return how the configuration differs from the one of the saved figures; empty where it does not."""
        row = self._saved(entry.board).get(entry.name)
        return [] if row is None else differences(_identity(row, entry), _identity_now(entry))

    def add(self, entry: Entry, **facts: Any) -> None:
        """Save facts of a row; figures of another configuration under its name go."""
        row = {**self.row(entry), **facts}
        saved = {**self._saved(entry.board), entry.name: _plain({**_identity_now(entry), **row})}
        write_json(self.path(entry.board), {"board": entry.board, "rows": saved})

    def add_run(self, entry: Entry, seed: int, run: Mapping[str, Any]) -> None:
        """Save the figures of a finished run."""
        self.add(entry, runs=dict(sorted({**self.row(entry)["runs"], seed: run}.items())))

    def _saved(self, board: str) -> dict[str, Any]:
        path = self.path(board)
        saved = read_json(path)
        if saved is None:
            return {}
        rows = saved.get("rows") if isinstance(saved, dict) else None
        if not isinstance(rows, dict) or not all(
            isinstance(r, dict) and isinstance(r.get("runs"), dict) for r in rows.values()
        ):
            raise ValueError(f"{path} holds no figures of a suite: delete it to have them made again")
        return rows


def _identity_now(entry: Entry) -> dict[str, Any]:
    return {**entry.identity, **({"baseline_minutes": entry.baseline_minutes} if entry.baseline else {})}


def _identity(row: Mapping[str, Any], entry: Entry) -> dict[str, Any]:
    """Return the part of a saved row that says what its figures depend on; only a search depends on minutes."""
    identity = {name: row.get(name) for name in _identity_now(entry)}
    if entry.baseline and not row.get("tunes"):
        identity["baseline_minutes"] = entry.baseline_minutes
    return identity


def _plain(value: Any) -> Any:
    """Return plain values with numbers to so many digits that a file stays small."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
