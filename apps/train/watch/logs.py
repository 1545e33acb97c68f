"""The logs of a run, which a resumed run continues: ``metrics.csv`` and TensorBoard's curves; and its profile."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities import rank_zero_only

from apps.base.files import naming, replacing

METRICS = "metrics.csv"
"""The name of a run's log."""


def profiler(name: str, folder: Path) -> Profiler:
    """Return Lightning's profiler of a name, which writes its tables and traces into ``folder``.

    Raises:
        ValueError: no profiler has this name.
    """
    options: dict[str, Any] = {"dirpath": str(folder), "filename": "profile"}
    if name == "simple":
        return SimpleProfiler(**options)
    if name == "advanced":
        return AdvancedProfiler(**options)
    if name == "pytorch":
        return PyTorchProfiler(**options, sort_by_key="cpu_time_total", row_limit=100)
    raise ValueError(f"trainer.profiler={name!r} is none of simple, advanced, pytorch")


def read_rows(metrics: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``metrics.csv`` but for one that a kill has cut; empty if the file does not exist."""
    if not metrics.is_file():
        return []
    with open(metrics, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]


def split_routing(metrics: Mapping[str, float], stage: str) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return a stage's logged values, without its name, and separately the figures of each layer's routing.

    Args:
        metrics: values by name, such as "test/top1", and "test/routing/model.blocks.1.mlp/entropy" of a layer.
        stage: such as "test".

    Returns:
        values by name; and figures by layer, where "" is the mean of all layers.
    """
    own: dict[str, float] = {}
    layers: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        name = key.removeprefix(f"{stage}/")
        if name.startswith("routing/"):
            layer, _, figure = name.removeprefix("routing/").rpartition("/")
            layers.setdefault(layer, {})[figure] = value
        else:
            own[name] = value
    return own, layers


class MetricsCSV(Logger):
    """Writes ``metrics.csv`` in a folder, a row for each set of values, at once.

    Resuming drops the rows of steps that the checkpoint had not reached, so that the file of a killed and resumed run
    equals an unbroken one's. (Lightning's CSVLogger deletes the file on resuming.)
    """

    name = version = ""  # type: ignore[assignment]

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self._keys: list[str] = []
        self._before: int | None = None

    @property
    def path(self) -> Path:
        return Path(self.folder) / METRICS

    def continue_from(self, step: int) -> None:
        """Keep the rows of the steps before ``step``."""
        self._before = step

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Write nothing: the run's ``config.yaml`` has the values."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step or 0, **{k: float(v) for k, v in metrics.items()}}
        if all(k in self._keys for k in row):
            with naming(self.path), open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self._keys).writerow(row)
            return
        rows = self._kept_rows()
        self._keys = list(dict.fromkeys([*self._keys, *(k for r in (*rows, row) for k in r)]))
        with naming(self.path), replacing(self.path, newline="") as file:
            writer = csv.DictWriter(file, self._keys)
            writer.writeheader()
            writer.writerows([*rows, row])

    def _kept_rows(self) -> list[dict[str, Any]]:
        """Return the rows for a file with more columns: at first those before the resumed step, then this run's."""
        first = not self._keys
        before = self._before if first else math.inf
        return [] if before is None else [row for row in read_rows(self.path) if int(row["step"]) < before]


class EventLog(TensorBoardLogger):
    """Writes TensorBoard's curves, and names the folder in an error of writing them.

    (TensorBoard writes in a thread of its own, whose error comes up at a later call as one of an unsupported value.)

    Args:
        monitor: the value that TensorBoard's table of hyper-parameters shows for each run.
        options: passed to ``TensorBoardLogger``.
    """

    def __init__(self, *args: Any, monitor: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self._unknown = {monitor: math.nan}

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        with naming(self.log_dir):
            super().log_hyperparams(params, self._unknown if metrics is None else metrics, step)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        with naming(self.log_dir):
            return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if metrics is not self._unknown:  # Lightning would log it as a point of the curve
            with naming(self.log_dir):
                super().log_metrics(metrics, step)

    @rank_zero_only
    def save(self) -> None:
        with naming(self.log_dir):
            super().save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        try:
            with naming(self.log_dir):
                super().finalize(status)
        except OSError:
            if status == "success":  # else the error that ended the run is reported
                raise
