"""Counts and shares of a table that its encoding collects: plain values, kept next to the array files."""

from __future__ import annotations

from dataclasses import dataclass, field

from apps.data.splits import SPLITS

_BySplit = dict[str, float]


@dataclass
class TableFindings:
    """Counts and shares of a table by split ("train", "val", "test").

    Attributes:
        rows: number of rows.
        missing: share of rows without a value, by column. NaN and infinite numbers are missing; so is an empty list.
        unseen: share of values that the training split lacks, or has less often than ``min_count``, by categorical
            column. They are in row 0, unless the column is hashed. In the training split these are the rare ones.
        labeled: number of rows with a label, by task.
        positives: share of positive labels among them, by binary task.
        means: mean of the labels, by task of numbers.
        classes: number of classes, by multiclass task.
        warnings: lines, each on a column that determines a label, a column of ids, a column whose values of validation
            or test training lacks, users in both splits, or a task with one class.
        added: number of values that got a row after the checkpoint's values, by column, if a training starts with its
            weights (``TableData.extend``).
        in_no_split: number of rows that a split by time leaves out, by where they are.
    """

    rows: dict[str, int] = field(default_factory=dict)
    missing: dict[str, _BySplit] = field(default_factory=dict)
    unseen: dict[str, _BySplit] = field(default_factory=dict)
    labeled: dict[str, dict[str, int]] = field(default_factory=dict)
    positives: dict[str, _BySplit] = field(default_factory=dict)
    means: dict[str, _BySplit] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    added: dict[str, int] = field(default_factory=dict)
    in_no_split: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = ["rows: " + ", ".join(f"{n:,} {split}" for split, n in self.rows.items())]
        lines += [f"rows {where}, in no split: {count:,}" for where, count in self.in_no_split.items()]
        for task, share in self.positives.items():
            labeled = self.labeled[task]
            by_split = (f"{s} {share[s]:.2%} of {labeled[s]:,}" for s in SPLITS if self.rows[s])
            lines.append(f"task {task}: positive in " + ", ".join(by_split))
        for task, mean in self.means.items():
            by_split = (f"{s} {mean[s]:.4g} of {self.labeled[task][s]:,}" for s in SPLITS if self.rows[s])
            lines.append(f"task {task}: mean in " + ", ".join(by_split))
        for task, count in self.classes.items():
            by_split = (f"{s} {self.labeled[task][s]:,}" for s in SPLITS if self.rows[s])
            lines.append(f"task {task}: {count} classes, labels in " + ", ".join(by_split))
        lines += [f"{what}: new values: {count:,}" for what, count in self.added.items()]
        for what, shares in (("missing", self.missing), ("unseen", self.unseen)):
            for column, share in shares.items():
                if any(share.values()):
                    by_split = (f"{share[s]:.2%} {s}" for s in SPLITS if self.rows[s])
                    lines.append(f"column {column}: {what} in " + ", ".join(by_split))
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])
