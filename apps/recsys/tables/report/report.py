"""The test report of a multi-task recommender, and the checks of its training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

import core
from apps.base.checks import check_name
from apps.data.loader import batches_of_test
from apps.recsys.binary_metrics import Calibration, TaskMetrics
from apps.recsys.encoding.features import Features
from apps.recsys.kinds import Metrics
from apps.recsys.metrics import MultiTaskMetrics
from apps.recsys.tables.encode import checks
from apps.recsys.tables.report import gating
from apps.recsys.tables.report.gating import COLLAPSED, ExpertUse, Gate, GateReader
from apps.recsys.tables.report.importance import SAMPLE, SHUFFLES, Importance, importances
from apps.recsys.tables.rows.arrays import TableArrays, join
from apps.recsys.value_metrics import Bins, ValueMetrics
from apps.report.base import Report, ReportConfig, computed_metrics, first_batches
from apps.report.page import BarChart, HeatmapChart, Line, LineChart, Section, Table, Text, save_charts
from apps.report.page.charts import Chart
from apps.report.tables import write_csv
from apps.report.use import load_charts, row_names
from core.fields import Count, CountOrZero

_SHOWN = 20  # lines of a table; the CSV file has all


@core.register_config
@dataclass(frozen=True)
class RecommenderReportConfig(ReportConfig):
    """The tables and pictures that ``moesaic test`` adds to the metrics of a recommender.

    Attributes:
        gate_feature: column by whose values the gates are plotted; None: the one on which they depend most.
        gate_values: largest number of values that are plotted, the most frequent.
        importance_rows: test rows in which each column is shuffled to see what the tasks lose; 0: none.

    Raises:
        ValueError: a number is out of its range.
    """

    gate_feature: str | None = None
    gate_values: Count = 16
    importance_rows: CountOrZero = SAMPLE

    def brief(self) -> RecommenderReportConfig:
        return replace(self, importance_rows=0)


class TrainingChecks(Callback):
    """Prints the checks of the columns before a training, and of the validation's metrics after it.

    Args:
        rows: number of rows whose columns are checked.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._validated = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = False
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero and hasattr(data, "leaks"):
            self._print(data.leaks(max(self.rows, 1)), "checks of the columns")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The validation before the first step evaluates an untrained network.
        self._validated |= not trainer.sanity_checking

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics: Any = pl_module.stage_metrics("val")
        if trainer.is_global_zero and self._validated and isinstance(metrics, MultiTaskMetrics):
            self._print(checks.suspicious_metrics(metrics.by_task, "val"), "checks of the last validation")

    def _print(self, findings: Sequence[str], title: str) -> None:
        if findings:
            checks.print_checks(findings, title)


@dataclass(frozen=True)
class _Collected:
    """The metrics of a test, of all rows and of the rows with cold users and items, and its first rows with their
    gates; ``arrays`` is None if no row was read."""

    metrics: Mapping[str, Metrics]
    parts: Mapping[str, tuple[int, Mapping[str, Metrics]]]
    reader: GateReader
    arrays: TableArrays | None
    data: Any
    columns: Sequence[Importance]


class RecommenderReport(Report):
    """After a test: the tasks' metrics, the gates and the experts; the checks are printed.

    It writes ``tasks.csv``, ``cold.csv`` where users or items are cold, ``gates.csv``, ``experts.csv``,
    ``dependence.csv``, ``importance.csv``, ``calibration.png``, ``gates_by_task.png``, ``gates_by_value.png``,
    ``utilization.png``, ``polarization.png``.

    Args:
        config: the options.
    """

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        features: Any = getattr(pl_module, "features", None)
        if self.config.gate_feature is not None and features is not None:
            check_name("report.gate_feature", self.config.gate_feature, gating.coded_names(features))

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> _Collected | None:
        metrics = computed_metrics(pl_module, MultiTaskMetrics)
        if metrics is None:
            return None
        model: Any = pl_module
        reader, batches = GateReader(model), []
        for batch in first_batches(batches_of_test(trainer), self.config.routing_examples):
            on_device = trainer.strategy.batch_to_device(batch, model.device)
            with trainer.precision_plugin.forward_context(), reader.reading():
                model(*model.example_inputs(on_device))
            batches.append(batch)
        arrays = join(batches, model.features, "test") if batches else None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        num_rows = self.config.importance_rows if hasattr(data, "examples") else 0
        with trainer.precision_plugin.forward_context():
            columns = importances(model, data, num_rows) if num_rows else []
        return _Collected(metrics.by_task, metrics.by_part, reader, arrays, data, columns)

    def write(self, collected: _Collected, folder: Path) -> list[Section]:
        sections = [write_tasks(collected.metrics, folder, self.config.pictures)]
        if note := getattr(collected.data, "notes", {}).get("test"):
            sections.append(Section("Sampled negatives", (Text.of(note),)))
        if collected.parts:
            sections.append(write_parts(collected.parts, folder))
        if collected.columns:
            sections.append(write_importances(collected.columns, folder))
        findings = checks.suspicious_metrics(collected.metrics, "test")
        if collected.arrays is not None:
            findings += checks.label_among_features(collected.arrays)
            if collected.reader.weights:
                sections.append(write_gates(collected.reader, collected.arrays, collected.data, self.config, folder))
        # Users in both splits are among the table's own warnings.
        warnings = getattr(getattr(collected.data, "findings", None), "warnings", ())
        lines = tuple(dict.fromkeys([*findings, *warnings]))
        checks.print_checks(lines)
        return [*sections, Section("Checks", (Text(lines),))] if lines else sections


# ---- tasks


def write_tasks(by_task: Mapping[str, Metrics], folder: Path, with_pictures: bool = True) -> Section:
    """Write the metrics, one line per task, as ``tasks.csv`` and ``calibration.png``, and return a page's section."""
    binary = {task: f for task, f in by_task.items() if isinstance(f, TaskMetrics)}
    values = {task: f for task, f in by_task.items() if isinstance(f, ValueMetrics)}
    tables = [*_binary_tables(binary), *_value_tables(values)]
    write_csv(folder / "tasks.csv", [_csv_row(task, f) for task, f in by_task.items()])
    charts = [calibration_chart(task, f.calibration) for task, f in binary.items() if len(f.calibration.counts)]
    if with_pictures and charts:
        save_charts(charts, folder / "calibration.png", "Calibration")
    charts += [_value_chart(task, f.bins) for task, f in values.items() if f.bins is not None and not f.constant]
    return Section("Answers", (*tables, *charts))


def write_parts(by_part: Mapping[str, tuple[int, Mapping[str, Metrics]]], folder: Path) -> Section:
    """Write the metrics of users and items with and without rows in training as ``cold.csv``."""
    rows = [
        {"part": part, "part_rows": num_rows} | _csv_row(task, f)
        for part, (num_rows, by_task) in by_part.items()
        for task, f in by_task.items()
    ]
    write_csv(folder / "cold.csv", rows)
    lines = []
    for part, (num_rows, by_task) in by_part.items():
        for task, f in by_task.items():
            true, scale = (f.base_rate, 100) if isinstance(f, TaskMetrics) else (f.mean_label, 1)
            means = [f"{scale * mean:.4g}" for mean in (true, f.mean_prediction)]
            named = {name: value for name, value in f.values().items() if name in _PART_METRICS}
            words = ", ".join(f"{_NAMES.get(name, name.replace('_', ' '))} {_figure(v)}" for name, v in named.items())
            lines.append([part.replace("_", " "), f"{num_rows:,}", task, *means, words])
    columns = ("part", "rows", "task", "true", "pred.", "metrics")
    title = "Cold users and items have no row in training; true and predicted on average, % of a task of yes and no"
    return Section("Users and items that training lacks", (_table(title, columns, lines),))


def _binary_tables(by_task: Mapping[str, TaskMetrics]) -> list[Table]:
    lines, users = [], []
    for task, f in by_task.items():
        means = [f"{100 * f.base_rate:.2f}", f"{100 * f.mean_prediction:.2f}"]
        scores = [f"{f.auc:.4f}", f"{f.pr_auc:.4f}", f"{f.log_loss:.4f}", f"{100 * f.ece:.2f}"]
        lines.append([task, f"{f.num_examples:,}", *means, *scores])
        if f.gauc is not None:
            users.append([task, f"{f.gauc.value:.4f}", f"{f.gauc.num_groups:,}", f"{f.gauc.left_out:,}"])
    columns = ("task", "rows", "true, %", "pred., %", "AUC", "PR-AUC", "log loss", "ECE, %")
    tables = []
    if lines:
        tables.append(_table("Tasks: share of positive labels, true and predicted on average", columns, lines))
    if users:
        title = "AUC within users, weighted by their rows; users of one class are left out"
        tables.append(_table(title, ("task", "user AUC", "users", "left out"), users))
    return tables


_PART_METRICS = ("auc", "log_loss", "r2", "rmse")
_NAMES = {"r2": "R²", "rmse": "RMSE", "mae": "MAE", "spearman": "Spearman", "pcc": "PCC", "auc": "AUC"}


def _value_tables(by_task: Mapping[str, ValueMetrics]) -> list[Table]:
    """Return a table of the tasks of numbers, and one of the tasks of classes."""
    tables = []
    numbers = {task: f for task, f in by_task.items() if "r2" in f.by_name}
    classes = {task: f for task, f in by_task.items() if "r2" not in f.by_name}
    for own, title in ((numbers, "Tasks of numbers: mean label and prediction, and errors"), (classes, "Classes")):
        if not own:
            continue
        names = list(dict.fromkeys(name for f in own.values() for name in f.by_name))
        means = [[f"{f.mean_label:.4g}", f"{f.mean_prediction:.4g}"] if own is numbers else [] for f in own.values()]
        lines = [
            [task, f"{f.num_examples:,}", *mean, *(_figure(f.by_name.get(name)) for name in names)]
            for (task, f), mean in zip(own.items(), means, strict=True)
        ]
        head = ("task", "rows", *(("true", "pred.") if own is numbers else ()))
        tables.append(_table(title, (*head, *(_NAMES.get(name, name.replace("_", " ")) for name in names)), lines))
    return tables


def _figure(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def _csv_row(task: str, f: Metrics) -> dict[str, Any]:
    row: dict[str, Any] = {"task": task, "rows": f.num_examples}
    if isinstance(f, ValueMetrics):
        return row | {"label": f.mean_label, "predicted": f.mean_prediction} | f.values()
    row |= {"positive": f.base_rate, "predicted": f.mean_prediction} | f.values()
    return row if f.gauc is None else row | {"users": f.gauc.num_groups, "users_left_out": f.gauc.left_out}


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    return Table(title, tuple(columns), tuple(map(tuple, lines)))


def calibration_chart(task: str, bins: Calibration) -> LineChart:
    line = Line("test", tuple(100 * bins.prediction), tuple(100 * bins.positives))
    summary = f"Positive labels by the mean prediction, in {len(bins.counts)} bins; ECE {100 * bins.error:.2f} %."
    title, axes = f"Calibration, {task}", ("mean prediction, %", "positive, %")
    # Where most predictions are small, what matters would lie in one corner.
    rare = bool(np.average(bins.prediction < 0.05, weights=bins.counts) > 0.5 and bins.prediction.min() > 0)
    return LineChart(title, summary, *axes, (line,), diagonal=True, log_x=rare, log_y=rare)


def _value_chart(task: str, bins: Bins) -> LineChart:
    line = Line("test", tuple(bins.prediction), tuple(bins.label))
    summary = f"Mean label by the mean prediction, in {len(bins.counts)} bins of about equal numbers of rows."
    return LineChart(f"Calibration, {task}", summary, "mean prediction", "mean label", (line,), diagonal=True)


def write_importances(columns: Sequence[Importance], folder: Path) -> Section:
    """Write the importance of each column for each task as ``importance.csv``."""
    write_csv(folder / "importance.csv", [asdict(one) for one in columns])
    tasks = {one.task: one.metric for one in columns}
    lines: dict[str, list[str]] = {}
    for one in columns:
        lines.setdefault(one.column, [one.column]).append(f"{one.importance:.4f} ± {one.ci95:.4f}")
    heads = ("column", *(f"{task}, {_NAMES.get(metric, metric)}" for task, metric in tasks.items()))
    what = f"a column is shuffled among {columns[0].rows:,} test rows"
    title = f"What the metric loses when {what}, with the 95 % interval of {SHUFFLES} shuffles"
    note = "Columns that say the same share their importance: each of them may look as if it did not matter."
    return Section("What the columns are worth", (_table(title, heads, [*lines.values()][:_SHOWN]), Text.of(note)))


# ---- gates and experts

_WEIGHT = "mean gate weight, %"


def write_gates(
    reader: GateReader, arrays: TableArrays, data: Any, config: RecommenderReportConfig, folder: Path
) -> Section:
    """Write the gates, the columns they depend on, and the experts, as CSV files and pictures.

    Returns:
        The section for the page.
    """
    gates = reader.gates()
    use = gating.expert_use(gates, reader.zero_share())
    depends = gating.dependence(gates, arrays)
    tables = [_gate_table(gates, folder), *_expert_tables(use, folder)]
    if depends:
        tables.append(_dependence_table(depends, arrays.features, gates, folder))
    blocks = list(dict.fromkeys(g.block for g in gates))
    files: dict[str, tuple[str, Sequence[Chart]]] = {
        "gates_by_task.png": ("Gate weights by task", [_by_task(block, use, gates) for block in blocks]),
        "utilization.png": ("Expert utilization", load_charts(**_utilization(gates))),
    }
    if config.gate_feature is not None or depends:
        column = config.gate_feature or max(depends, key=lambda c: sum(depends[c].values()))
        by_value = _by_value(column, gates, arrays, data, config.gate_values)
        title = f"Gate weights by {column}{f', {gates[-1].block}' if gates[-1].block else ''} (share of the rows)"
        files["gates_by_value.png"] = (title, by_value)
    polarized = [chart for block in blocks for chart in polarization(block, use, gates)]
    files["polarization.png"] = ("Expert polarization", polarized)
    for name, (title, charts) in files.items():
        if config.pictures and charts:
            save_charts(charts, folder / name, title)
    shown = [chart for _, charts in files.values() for chart in charts]
    return Section("What the experts are used for", (*shown, *tables))


def _utilization(gates: Sequence[Gate]) -> dict[str, Any]:
    """Return for each gate the examples that each expert computes where some are left out, else its weight, as
    arguments of ``load_charts``."""
    sparse = any((g.weights_NE == 0).any() for g in gates)
    return {
        "tokens_per_expert": {g.name: ((g.weights_NE > 0) if sparse else g.weights_NE).sum(0) for g in gates},
        "share_of": "computed pairs" if sparse else "gate weight",
        "names": {g.name: g.expert_labels for g in gates},
    }


def _gate_table(gates: Sequence[Gate], folder: Path) -> Table:
    lines, rows = [], []
    for gate in gates:
        first = int(np.argmax(gate.mean_E))
        expert, share = gate.expert_labels[first], float(gate.mean_E[first])
        own, mean = gate.entropy, gate.mean_entropy
        numbers = [f"{value:.3f}" for value in (own, mean, max(mean - own, 0))]
        lines.append([gate.name, *numbers, f"{expert} ({100 * share:.0f} %)"])
        rows.append(
            {"gate": gate.name, "entropy": own, "mean_entropy": mean, "largest": expert, "largest_share": share}
        )
    columns = ("gate", "an example's", "of the mean", "difference", "largest expert")
    write_csv(folder / "gates.csv", rows)
    return _table(
        "Gates: entropy of the weights over log E (0 one expert, 1 all alike); the difference is owed to the example",
        columns,
        lines,
    )


def _expert_tables(use: Sequence[ExpertUse], folder: Path) -> list[Table]:
    """Write ``experts.csv``, and return a table for each block."""
    tables = []
    for block in dict.fromkeys(u.block for u in use):
        own = [u for u in use if u.block == block]
        gates = list(own[0].weights)
        # A cut table shows the experts with problems first, then the heaviest.
        order = sorted(own, key=lambda u: (not u.problem, -np.nansum(list(u.weights.values()))))
        shown = order[:_SHOWN] if len(own) > _SHOWN else own
        left = f"; {len(own) - len(shown)} more in experts.csv" if len(own) > len(shown) else ""
        tables.append(
            _table(
                f"Experts{f' of {block}' if block else ''}: outputs that are zero and mean weights, %; polarization as "
                f"in HoME, arXiv 2408.05430{left}",
                ("expert", "zero", *gates, "remark"),
                [
                    (u.label, _percent(u.zero_share), *(_percent(u.weights[g]) for g in gates), u.problem or "–")
                    for u in shown
                ],
            )
        )
    rows = [
        {"block": u.block, "expert": u.label, "zero_share": u.zero_share}
        | {f"weight_{g.replace(' ', '_')}": value for g, value in u.weights.items()}
        | {"remark": u.problem}
        for u in use
    ]
    write_csv(folder / "experts.csv", rows)
    return tables


def _dependence_table(
    depends: Mapping[str, Mapping[str, float]], features: Features, gates: Sequence[Gate], folder: Path
) -> Table:
    """Write the columns on which the gates depend, and return those on which the last block's depend most."""
    known = [g for g in gates if any(g.name in values for values in depends.values())]
    order = sorted(depends, key=lambda c: -sum(depends[c].values()))
    last = [g for g in known if g.block == known[-1].block]
    where = f" of {last[0].block}" if last[0].block else ""
    coded = gating.coded_names(features)
    names = [*(f.name for f in features.categorical), *(c.name for c in features.continuous)]
    left_out = [name for name in names if name not in coded]
    without = f"; not measured (many values, several in a row, or one): {', '.join(left_out)}" if left_out else ""
    rows = [{"column": c, **{g.name: depends[c].get(g.name, math.nan) for g in known}} for c in order]
    write_csv(folder / "dependence.csv", rows)
    return _table(
        f"What the gates{where} depend on: share of their variance that a column explains, %{without}",
        ("column", *(g.label for g in last)),
        [(c, *(_percent(depends[c].get(g.name, math.nan), 1) for g in last)) for c in order[:8]],
    )


def _percent(value: float, digits: int = 0) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.{digits}f}"


def _of_block(title: str, block: str) -> str:
    return f"{title}, {block}" if block else title


def polarization(block: str, use: Sequence[ExpertUse], gates: Sequence[Gate]) -> list[BarChart]:
    """Return a block's zero outputs by expert, the gates' weights by expert, and how decided the gates are."""
    own, of_gates = [u for u in use if u.block == block], [g for g in gates if g.block == block]
    experts, names = tuple(u.label for u in own), tuple(g.label for g in of_gates)
    weights = {name: tuple(100 * float(np.nan_to_num(u.weights[name])) for u in own) for name in names}
    entropies = {
        "of an example": tuple(g.entropy for g in of_gates),
        "of the mean weights": tuple(g.mean_entropy for g in of_gates),
    }
    zeros = tuple(100 * u.zero_share for u in own)
    bars = []
    if not all(map(math.isnan, zeros)):
        seen, line = f"An expert above the line, {100 * COLLAPSED:.0f} %, has collapsed.", 100 * COLLAPSED
        title = _of_block("Outputs that are zero", block)
        bars.append(BarChart(title, seen, "expert", "zero, %", experts, {"zero": zeros}, line))
    seen = "How much weight each gate gives each expert."
    bars.append(BarChart(_of_block("Weight of the gates", block), seen, "expert", "weight, %", experts, weights))
    seen = "0: one expert has all weight; 1: all are alike."
    title = _of_block("Entropy of the gates", block)
    return [*bars, BarChart(title, seen, "gate", "entropy / log E", names, entropies)]


def _by_task(block: str, use: Sequence[ExpertUse], gates: Sequence[Gate]) -> HeatmapChart:
    """Return the mean weights of a block, gates by experts, with nothing where a gate does not reach."""
    labels = tuple(g.label for g in gates if g.block == block)
    reached = [u for u in use if u.block == block and not all(map(math.isnan, u.weights.values()))]
    values = np.array([[u.weights[label] for u in reached] for label in labels])
    columns, title = [u.label for u in reached], _of_block("Gate weights by task", block)
    return HeatmapChart.of(values, labels, columns, title=title, row_title="gate", value_title=_WEIGHT)


def _by_value(column: str, gates: Sequence[Gate], arrays: TableArrays, data: Any, most: int) -> list[HeatmapChart]:
    """Return the weights by the ``most`` frequent values of a column and over all rows, for the last block's gates."""
    codes_N, words = {name: (codes, words) for name, codes, words in gating.coded_columns(arrays)}[column]
    if column == gating.domain_column(arrays.features):
        words = getattr(data, "domain_values", None) or None
    counts_V = np.bincount(codes_N)
    values = [int(v) for v in np.sort(np.argsort(-counts_V, kind="stable")[:most]) if counts_V[v]]
    rows = row_names([_word(v, column, words, data) for v in values], counts_V[values] / len(codes_N))
    last = [g for g in gates if g.block == gates[-1].block and g.end != "selection"]
    maps = []
    for gate in last[:4]:
        by_value = [gate.weights_NE[codes_N == v].mean(0, dtype=np.float64) for v in values]
        shares, how = np.stack([*by_value, gate.mean_E]), {"row_title": column, "value_title": _WEIGHT}
        maps.append(
            HeatmapChart.of(shares, rows, gate.expert_labels, title=f"Gate weights by {column}, {gate.label}", **how)
        )
    return maps


def _word(value: int, column: str, words: Sequence[str] | None, data: Any) -> str:
    """Return a value of a column as it is in the table."""
    vocabulary = getattr(data, "vocabulary", None)
    known: Sequence[str | None] = words or ()
    if words is None and vocabulary is not None:
        with contextlib.suppress(ValueError):  # hashed, or the domain of other data
            known = vocabulary(column)
    text = known[value] if value < len(known) else str(value)
    text = "(unseen)" if text is None else text
    return text if len(text) <= 28 else f"{text[:26]}…"
