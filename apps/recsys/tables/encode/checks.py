"""Checks of data and metrics for signs that a good metric is worthless, such as a leaked label.

Each function returns its findings, a line of text each; ``print_checks`` prints them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from apps.recsys import binary_metrics
from apps.recsys.binary_metrics import TaskMetrics
from apps.recsys.kinds import Metrics
from apps.recsys.tables.rows.arrays import TableArrays
from apps.recsys.value_metrics import ValueMetrics, correlation

SUSPICIOUS_AUC = 0.9999
"""Above it an AUC is more likely a leak than a success."""

LEAK_AUC = 0.99
"""Above it the AUC of a single column is: a copy of the label may differ from it in a few rows."""

EVERY_CHECK = (
    "a label among the features",
    "users in both splits",
    "tasks of equal AUC",
    f"AUC below 0.5 or above {SUSPICIOUS_AUC}",
    "a split with one class",
    "constant or invalid predictions",
    "a mean prediction far from the base rate",
)


def label_among_features(arrays: TableArrays) -> list[str]:
    """Find columns that by themselves rank the examples of a task almost without error, or that have a task's name.

    A column of numbers is evaluated by its own AUC, in either direction; a categorical one by the AUC, in every second
    row, of its values' mean label in the others, so that a column of ids is not taken for a label. All values of a row
    together are one value of a multi-valued column. For a task of numbers, a column of numbers is evaluated by its rank
    correlation with the labels, and one of two values by the AUC of the labels as a score for it.
    """
    features = arrays.features
    numbers = {f.name: values_N for f, values_N in zip(features.continuous, arrays.dense_NC.T, strict=True)}
    single = [f.name for f in features.single]
    categories = dict(zip(single, arrays.ids_NF.T, strict=True))
    ordered = numbers | {name: np.where(ids_N > 0, ids_N, np.nan) for name, ids_N in categories.items()}
    categories |= {name: column.sets_N() for name, column in arrays.multi.items()}
    names = [*(f.name for f in features.categorical), *numbers]
    findings = [
        f"column {name!r} has the name of a task: is the label among the features?"
        for name in names
        if name in features.tasks
    ]
    for task, target, label_N in zip(features.tasks, features.target_of_task, arrays.label_Nt.T, strict=True):
        kept_N = ~np.isnan(label_N)
        y_N = label_N[kept_N]
        if target.kind != "binary":
            if target.kind != "multiclass":
                findings += _numbers_like(task, y_N, {name: values_N[kept_N] for name, values_N in ordered.items()})
            continue
        aucs = {name: column_auc(values_N[kept_N], y_N) for name, values_N in numbers.items()}
        aucs |= {name: category_auc(ids_N[kept_N], y_N) for name, ids_N in categories.items()}
        findings += [
            f"column {name!r} alone predicts task {task!r} with AUC {auc:.5f}: {_advice(name)}"
            for name, auc in aucs.items()
            if auc > LEAK_AUC and name not in features.tasks
        ]
    return findings


def _numbers_like(task: str, y_N: np.ndarray, numbers: Mapping[str, np.ndarray]) -> list[str]:
    """Find columns whose ranks equal the ranks of a task's labels, in either direction, or whose two values do."""
    from scipy.stats import rankdata

    findings = []
    for name, values_N in numbers.items():
        both_N = ~np.isnan(values_N)
        if 2 * both_N.sum() < len(y_N) or len(y_N) < 3 or name == task:
            continue
        value_n, y_n = values_N[both_N], y_N[both_N]
        rank = abs(correlation(rankdata(value_n), rankdata(y_n)))
        auc = column_auc(y_n, value_n == value_n.max()) if len(np.unique(value_n)) == 2 else 0.0
        if auc > LEAK_AUC:
            how = f"alone tells small labels of task {task!r} from large ones, AUC {auc:.5f}"
            findings.append(f"column {name!r} {how}: {_advice(name)}")
        elif rank > SUSPICIOUS_AUC:
            findings.append(
                f"column {name!r} has the order of task {task!r}, rank correlation {rank:.5f}: {_advice(name)}"
            )
    return findings


def _advice(column: str) -> str:
    return f"is it known before the label is? Else leave it out (exclude: [{column}])"


def column_auc(values_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Return the AUC of numbers as a score, or of their negative where that is more; missing ones are the lowest."""
    auc = binary_metrics.auc(np.where(np.isnan(values_N), -np.inf, values_N), labels_N)
    return max(auc, 1 - auc)


def category_auc(ids_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Return the AUC, in every second row, of the mean label that a value has in the other rows."""
    # Numbered again: a few thousand rows may hold ids of a table of a billion.
    ids, code_N = np.unique(ids_N, return_inverse=True)
    code, y = code_N[::2], labels_N[::2]
    counts = np.bincount(code, minlength=len(ids))
    rate = y.mean() if len(y) else 0.0
    means = (np.bincount(code, weights=y, minlength=len(ids)) + rate) / (counts + 1)
    return binary_metrics.auc(means[code_N[1::2]], labels_N[1::2])


def shared_groups(groups: Mapping[str, np.ndarray], what: str = "user") -> list[str]:
    """Find users, or other groups, that are in several splits, if the split is by them.

    Args:
        groups: the ids of each split's rows, by the name of the split.
        what: name of one of them in the findings.
    """
    findings = []
    sets = {split: np.unique(ids) for split, ids in groups.items()}
    for (first, a), (second, b) in itertools.combinations(sets.items(), 2):
        if both := len(np.intersect1d(a, b, assume_unique=True)):
            findings.append(
                f"{both} of {len(b)} {what}s of {second} are in {first} too, although the split is by {what}"
            )
    return findings


def suspicious_metrics(by_task: Mapping[str, Metrics], split: str) -> list[str]:
    """Find metrics of a split that are not credible.

    They are two tasks of equal AUC to 6 digits, an AUC below 0.5 or above 0.9999, a split with one class, constant or
    invalid predictions, and a mean prediction off the base rate by a quarter of it (or of the negatives' share, where
    that is smaller) and by more than 5 standard errors. Of tasks of numbers and classes they are an R^2 below 0, worse
    than the mean label, one above 0.9999, and constant or invalid predictions.
    """
    findings: list[str] = []
    binary = {task: f for task, f in by_task.items() if isinstance(f, TaskMetrics)}
    for (a, x), (b, y) in itertools.combinations(binary.items(), 2):
        if round(x.auc, 6) == round(y.auc, 6) and not (x.constant or y.constant):
            findings.append(f"tasks {a!r} and {b!r} have the same AUC, {x.auc:.6f}: are they the same label?")
    for task, f in by_task.items():
        if not f.num_examples:
            findings.append(f"task {task!r} has no labels: it has no metrics")
        elif f.invalid:
            findings.append(f"{f.invalid} of {f.num_examples} predictions of task {task!r} are NaN")
        elif isinstance(f, ValueMetrics):
            findings += _suspicious_values(task, f)
        elif f.base_rate in (0.0, 1.0):
            which = "positive" if f.base_rate else "negative"
            findings.append(f"task {task!r} has {which} labels alone: its AUC does not exist")
        elif f.constant:
            findings.append(f"all {f.num_examples} predictions of task {task!r} are {f.mean_prediction:.4g}")
        elif f.auc < 0.5:
            findings.append(f"AUC {f.auc:.4f} of task {task!r} is below 0.5: worse than chance")
        elif f.auc > SUSPICIOUS_AUC:
            findings.append(f"AUC {f.auc:.6f} of task {task!r} is above {SUSPICIOUS_AUC}: is a label leaked?")
        if isinstance(f, ValueMetrics) or f.invalid or not 0 < f.base_rate < 1:
            continue
        if far_from(f.mean_prediction, f.base_rate, f.num_examples):
            findings.append(
                f"the mean prediction of task {task!r} is {f.mean_prediction:.2%}, and {f.base_rate:.2%} are positive"
            )
    return [f"{split}: {finding}" for finding in findings]


def _suspicious_values(task: str, metrics: ValueMetrics) -> list[str]:
    r2 = metrics.by_name.get("r2", math.nan)
    if metrics.constant:
        return [f"all {metrics.num_examples} predictions of task {task!r} are equal"]
    if r2 < 0:
        return [f"R^2 {r2:.4f} of task {task!r} is below 0: worse than the mean label"]
    if r2 > SUSPICIOUS_AUC:
        return [f"R^2 {r2:.6f} of task {task!r} is above {SUSPICIOUS_AUC}: is a label leaked?"]
    return []


def far_from(mean_prediction: float, base_rate: float, n: int) -> bool:
    """Tell whether a mean of ``n`` predictions is off the base rate by more than chance and by more than matters."""
    off = abs(mean_prediction - base_rate)
    rarer = min(base_rate, 1 - base_rate)
    error = math.sqrt(max(base_rate * (1 - base_rate), 1 / n) / n)
    return off > 0.25 * rarer and off > 5 * error


def print_checks(findings: Sequence[str], title: str = "checks") -> None:
    """Print a block with a line for each finding, or one that says what was checked if there is none."""
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    console.print(f"[bold]{escape(title)}[/bold]", highlight=False)
    if not findings:
        console.print(f"  nothing found ({'; '.join(EVERY_CHECK)})", highlight=False, soft_wrap=True)
    for finding in findings:
        console.print(f"  [bold red]![/bold red] {escape(finding)}", highlight=False, soft_wrap=True)
