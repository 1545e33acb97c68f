"""What ``moesaic test`` says of a multi-task recommender beside its metrics: tables, checks, gates, pictures."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

import core
from apps.data.loader import batches_of_test
from apps.recsys.binary_metrics import TaskMetrics
from apps.recsys.metrics import MultiTaskMetrics
from apps.recsys.tables import checks, gating, pictures
from apps.recsys.tables.arrays import TableArrays, join
from apps.recsys.tables.checks import Check
from apps.recsys.tables.gating import ExpertUse, Gate, GateReader
from apps.report import plots
from apps.report.tables import print_table, write_csv

_logger = logging.getLogger(__name__)

_SHOWN = 20  # lines of a printed table; the CSV file has all


@core.register_config
@dataclass(frozen=True)
class ReportConfig:
    """What ``moesaic test`` adds to the metrics of a recommender.

    Attributes:
        gate_rows: test rows whose gates are read, at least one batch; 0 reads none.
        gate_feature: column whose values the gates are drawn by; None: the one on which they depend most.
        gate_values: values drawn at most, the most frequent.
        pictures: write pictures.

    Raises:
        ValueError: a number out of its range.
    """

    gate_rows: int = 20_000
    gate_feature: str | None = None
    gate_values: int = 16
    pictures: bool = True

    def __post_init__(self) -> None:
        for name, least in (("gate_rows", 0), ("gate_values", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"report.{name}={getattr(self, name)} must be at least {least}")


class RecommenderReport(Callback):
    """The checks of a training, and the report of a test.

    ``fit`` prints what the checks find in the validation split, in its columns at the start and in its metrics at the
    end, if it came to a validation. ``test`` prints the tasks' metrics, the gates, the experts and the checks, and
    writes into ``<run folder>/report``: ``tasks.csv``, ``gates.csv``, ``experts.csv``, ``dependence.csv``,
    ``calibration.png``, ``gates_by_task.png``, ``gates_by_value.png``, ``utilisation.png``, ``polarisation.png``.

    Args:
        config: what to do.
    """

    only_reports: ClassVar[bool] = True
    """A comparison leaves it out."""

    def __init__(self, config: ReportConfig) -> None:
        self.config = config
        self._validated = False

    # ---- fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = False
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero or not hasattr(data, "rows"):
            return
        rows = data.rows("val")
        if len(rows):
            found = checks.label_among_features(join([rows[: max(self.config.gate_rows, 1)]], data.features, "val"))
            checks.print_checks(found, "checks of the columns", quiet_when_clean=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The metrics of the check before the first step are of an untrained network.
        self._validated |= not trainer.sanity_checking

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics: Any = pl_module.stage_metrics("val")
        if trainer.is_global_zero and self._validated and isinstance(metrics, MultiTaskMetrics):
            found = checks.suspicious_metrics(metrics.by_task, "val")
            checks.print_checks(found, "checks of the last validation", quiet_when_clean=True)

    # ---- test

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        features: Any = getattr(pl_module, "features", None)
        if self.config.gate_feature is not None and features is not None:
            gating.check_column(features, self.config.gate_feature)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics: Any = pl_module.stage_metrics("test")
        if not isinstance(metrics, MultiTaskMetrics):
            return
        metrics.compute()  # on every rank: it gathers. The module's own call finds the result
        read = self._read(trainer, pl_module)  # on every rank: a sharded model needs them all
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "report"
        written = task_report(metrics.by_task, folder, self.config.pictures)
        found = checks.suspicious_metrics(metrics.by_task, "test")
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if read is not None:
            reader, arrays = read
            found += checks.label_among_features(arrays)
            if reader.weights:
                written += gate_report(reader, arrays, data, self.config, folder)
        # What was found in the table when it was encoded, users in both splits among it.
        found += [Check("table", warning) for warning in getattr(getattr(data, "findings", None), "warnings", ())]
        checks.print_checks(checks.distinct(found))
        _logger.info(f"{folder}: {', '.join(p.name for p in written)}")

    def _read(self, trainer: Trainer, pl_module: LightningModule) -> tuple[GateReader, TableArrays] | None:
        """The gates on the first test rows, and those rows."""
        if not self.config.gate_rows:
            return None
        model: Any = pl_module
        reader, kept = GateReader(model), []
        for batch in _limited(batches_of_test(trainer), self.config.gate_rows):
            on_device = trainer.strategy.batch_to_device(batch, model.device)
            with trainer.precision_plugin.forward_context(), reader.reading():
                model(*model.example_inputs(on_device))
            kept.append(batch)
        return (reader, join(kept, model.features, "test")) if kept else None


def _limited(batches: Iterable[Any], rows: int) -> Iterator[Any]:
    """Whole batches until ``rows`` were seen."""
    seen = 0
    for batch in batches:
        if seen >= rows:
            return
        yield batch
        seen += len(batch)


# ---- tasks


def task_report(by_task: Mapping[str, TaskMetrics], folder: Path, with_pictures: bool = True) -> list[Path]:
    """Print the metrics, a line a task, and write ``tasks.csv`` and ``calibration.png``."""
    lines, users, rows = [], [], []
    for task, f in by_task.items():
        means = [f"{100 * f.base_rate:.2f}", f"{100 * f.mean_prediction:.2f}"]
        scores = [f"{f.auc:.4f}", f"{f.pr_auc:.4f}", f"{f.log_loss:.4f}", f"{100 * f.ece:.2f}"]
        lines.append([task, f"{f.num_examples:,}", *means, *scores])
        row = {"task": task, "rows": f.num_examples, "positive": f.base_rate, "predicted": f.mean_prediction}
        row |= f.values()
        if f.gauc is not None:
            users.append([task, f"{f.gauc.value:.4f}", f"{f.gauc.num_groups:,}", f"{f.gauc.left_out:,}"])
            row |= {"users": f.gauc.num_groups, "users_left_out": f.gauc.left_out}
        rows.append(row)
    columns = ("task", "rows", "true, %", "pred., %", "AUC", "PR-AUC", "log loss", "ECE, %")
    print_table("Tasks: share of positive labels, true and predicted on average", columns, lines)
    if users:
        title = "AUC within users, weighted by their rows; users of one class are left out"
        print_table(title, ("task", "user AUC", "users", "left out"), users)
    written = [write_csv(folder / "tasks.csv", rows)]
    curves = {task: f.calibration for task, f in by_task.items() if len(f.calibration.counts)}
    if with_pictures and curves:
        written.append(plots.save_picture(pictures.calibration_curves(curves), folder / "calibration.png"))
    return written


# ---- gates and experts


def gate_report(reader: GateReader, arrays: TableArrays, data: Any, config: ReportConfig, folder: Path) -> list[Path]:
    """Print the gates, what they depend on, and the experts; write the CSV files and the pictures."""
    tasks, gates = arrays.features.tasks, reader.gates()
    use = gating.expert_use(gates, reader.zero_share(), tasks)
    depends = gating.dependence(gates, arrays)
    written = [*_gate_tables(gates, tasks, folder), *_expert_tables(use, tasks, folder)]
    if depends:
        written += _dependence_table(depends, gating.left_out(arrays), gates, tasks, folder)
    if not config.pictures:
        return written
    blocks = list(dict.fromkeys(g.block for g in gates))
    maps = [_by_task(block, gates, tasks) for block in blocks]
    drawn = {
        "gates_by_task": pictures.heatmaps(maps, "Mean gate weights by task and expert"),
        "gates_by_value": _by_value(gates, arrays, data, config, depends),
        "utilisation": _utilisation(gates, tasks),
        "polarisation": pictures.polarisation([_block_use(b, use, gates, tasks) for b in blocks], gating.COLLAPSED),
    }
    some = ((name, picture) for name, picture in drawn.items() if picture is not None)
    return [*written, *(plots.save_picture(picture, folder / f"{name}.png") for name, picture in some)]


def _utilisation(gates: Sequence[Gate], tasks: Sequence[str]) -> Any:
    """Bars a gate: the examples that each expert computes where some are left out, else its weight."""
    sparse = any((g.weights_NE == 0).any() for g in gates)
    loads = {_gate_name(g, gates, tasks): ((g.weights_NE > 0) if sparse else g.weights_NE).sum(0) for g in gates}
    picture = plots.load_bars(loads, title="Expert utilisation", share_of="computed pairs" if sparse else "gate weight")
    for axis, gate in zip(picture.axes, gates, strict=True):
        if not gate.experts[0].isdigit():
            pictures.name_columns(axis, [gating.expert_label(name, tasks) for name in gate.experts])
            axis.set_xlabel("")
    return picture


def _gate_name(gate: Gate, gates: Sequence[Gate], tasks: Sequence[str]) -> str:
    """Of a gate among all: with its block where there are several."""
    name = gating.label(gate, tasks)
    return f"{gate.block}: {name}" if gate.block and len({g.block for g in gates}) > 1 else name


def _gate_tables(gates: Sequence[Gate], tasks: Sequence[str], folder: Path) -> list[Path]:
    lines, rows = [], []
    for gate in gates:
        first = int(np.argmax(gate.mean_E))
        expert = gating.expert_label(gate.experts[first], tasks)
        own, mean = gate.entropy, gate.mean_entropy
        name = _gate_name(gate, gates, tasks)
        share = float(gate.mean_E[first])
        lines.append(
            (name, f"{own:.3f}", f"{mean:.3f}", f"{max(mean - own, 0):.3f}", f"{expert} ({100 * share:.0f} %)")
        )
        rows.append({"gate": name, "entropy": own, "mean_entropy": mean, "largest": expert, "largest_share": share})
    columns = ("gate", "an example's", "of the mean", "difference", "largest expert")
    print_table(
        "Gates: entropy of the weights over log E (0 one expert, 1 all alike); the difference is owed to the example",
        columns,
        lines,
    )
    return [write_csv(folder / "gates.csv", rows)]


def _expert_tables(use: Sequence[ExpertUse], tasks: Sequence[str], folder: Path) -> list[Path]:
    """A table a block."""
    for block in dict.fromkeys(u.block for u in use):
        own = [u for u in use if u.block == block]
        gates = list(own[0].weights)
        # Of many, what is wrong first, then the heaviest.
        order = sorted(own, key=lambda u: (not u.problem, -np.nansum(list(u.weights.values()))))
        shown = order[:_SHOWN] if len(own) > _SHOWN else own
        left = f"; {len(own) - len(shown)} more in experts.csv" if len(own) > len(shown) else ""
        print_table(
            f"Experts{f' of {block}' if block else ''}: outputs that are zero and mean weights, %; polarisation as in "
            f"HoME, arXiv 2408.05430{left}",
            ("expert", "zero", *gates, "remark"),
            [
                (
                    gating.expert_label(u.name, tasks),
                    _percent(u.zero_share),
                    *(_percent(u.weights[g]) for g in gates),
                    u.problem or "–",
                )
                for u in shown
            ],
        )
    rows = [
        {"block": u.block, "expert": gating.expert_label(u.name, tasks), "zero_share": u.zero_share}
        | {f"weight_{g.replace(' ', '_')}": value for g, value in u.weights.items()}
        | {"remark": u.problem}
        for u in use
    ]
    return [write_csv(folder / "experts.csv", rows)]


def _dependence_table(
    depends: Mapping[str, Mapping[str, float]],
    left_out: Sequence[str],
    gates: Sequence[Gate],
    tasks: Sequence[str],
    folder: Path,
) -> list[Path]:
    """The columns on which the gates depend most, those of the last block on the screen."""
    known = [g for g in gates if any(g.key in values for values in depends.values())]
    order = sorted(depends, key=lambda c: -sum(depends[c].values()))
    last = [g for g in known if g.block == known[-1].block]
    where = f" of {last[0].block}" if last[0].block else ""
    without = f"; not measured (many values, several in a row, or one): {', '.join(left_out)}" if left_out else ""
    print_table(
        f"What the gates{where} depend on: share of their variance that a column explains, %{without}",
        ("column", *(gating.label(g, tasks) for g in last)),
        [(c, *(_percent(depends[c].get(g.key, math.nan), 1) for g in last)) for c in order[:8]],
    )
    rows = [
        {"column": c, **{_gate_name(g, gates, tasks): depends[c].get(g.key, math.nan) for g in known}} for c in order
    ]
    return [write_csv(folder / "dependence.csv", rows)]


def _percent(value: float, digits: int = 0) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.{digits}f}"


def _by_task(block: str, gates: Sequence[Gate], tasks: Sequence[str]) -> pictures.Heatmap:
    """The mean weights of a block: gates by experts, nothing where a gate does not reach."""
    own = [g for g in gates if g.block == block]
    experts = list(dict.fromkeys(name for g in own for name in g.experts))
    values = np.full((len(own), len(experts)), np.nan)
    for row, gate in enumerate(own):
        values[row, [experts.index(name) for name in gate.experts]] = gate.mean_E
    labels = tuple(gating.expert_label(name, tasks) for name in experts)
    return pictures.Heatmap(block, tuple(gating.label(g, tasks) for g in own), labels, values)


def _by_value(
    gates: Sequence[Gate],
    arrays: TableArrays,
    data: Any,
    config: ReportConfig,
    depends: Mapping[str, Mapping[str, float]],
) -> Any:
    """Weights by the values of a column, a map a gate of the last block; None where no column can be taken."""
    columns = {name: (codes_N, words) for name, codes_N, words in gating.coded_columns(arrays)}
    wanted = config.gate_feature
    if wanted is None:
        if not depends:
            return None
        wanted = max(depends, key=lambda column: sum(depends[column].values()))
    codes_N, words = columns[wanted]
    if wanted == gating.domain_column(arrays.features):
        words = getattr(data, "domain_values", None) or None
    counts_V = np.bincount(codes_N)
    most = np.sort(np.argsort(-counts_V, kind="stable")[: config.gate_values])
    values = [int(v) for v in most if counts_V[v]]
    last = [g for g in gates if g.block == gates[-1].block and g.end != "selection"]
    rows = tuple(f"{_word(v, wanted, words, data)} ({_small_percent(counts_V[v] / len(codes_N))})" for v in values)
    maps = [
        pictures.Heatmap(
            gating.label(gate, arrays.features.tasks),
            rows,
            tuple(gating.expert_label(name, arrays.features.tasks) for name in gate.experts),
            gating.weights_by_value(gate, codes_N, values),
        )
        for gate in last[:4]
    ]
    level = f", {last[0].block}" if last and last[0].block else ""
    below = len(maps[0].columns) > 16
    return pictures.heatmaps(maps, f"Mean gate weights by {wanted}{level} (share of the rows)", below=below)


def _small_percent(share: float) -> str:
    return "<1 %" if share < 0.01 else f"{100 * share:.0f} %"


def _word(value: int, column: str, words: Sequence[str] | None, data: Any) -> str:
    """A value of a column as it stands in the table."""
    vocabulary = getattr(data, "vocabulary", None)
    known: Sequence[str | None] = words or ()
    if words is None and vocabulary is not None:
        with contextlib.suppress(ValueError):  # hashed, or the scenario of other data
            known = vocabulary(column)
    text = known[value] if value < len(known) else str(value)
    text = "(unseen)" if text is None else text
    return text if len(text) <= 28 else f"{text[:26]}…"


def _block_use(block: str, use: Sequence[ExpertUse], gates: Sequence[Gate], tasks: Sequence[str]) -> pictures.BlockUse:
    mine = [u for u in use if u.block == block]
    own = [g for g in gates if g.block == block]
    names = [gating.label(g, tasks) for g in own]
    return pictures.BlockUse(
        block,
        tuple(gating.expert_label(u.name, tasks) for u in mine),
        np.array([u.zero_share for u in mine]),
        {n: np.array([u.weights.get(n, math.nan) for u in mine]) for n in names},
        {n: (g.entropy, g.mean_entropy) for n, g in zip(names, own, strict=True)},
    )
