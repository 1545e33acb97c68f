"""Descriptions of a table's columns as plain values: all that a network knows of its data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import core
from core.fields import Checked


@core.register_config
@dataclass(frozen=True)
class CategoricalFeature:
    """One embedded column.

    Attributes:
        name: name of the column.
        num_rows: rows of its table. Row 0 is for values not seen in training, and for missing ones.
        multi_valued: whether an example may have any number of values; else it has exactly one.
        hashed: whether ids are hashed into the rows 1 to num_rows - 1; else each seen value has a row of its own.
    """

    name: str
    num_rows: int
    multi_valued: bool = False
    hashed: bool = False


@core.register_config
@dataclass(frozen=True)
class ContinuousFeature(Checked):
    """One column of numbers, as the training split has it. NaN and infinities are missing, and not in the figures.

    Attributes:
        name: name of the column.
        mean, std: mean and standard deviation of the training split; std is 1 if the column is constant.
        quantiles: at most 255 distinct, ascending boundaries between bins of about equal count, with a bin of its own
            for a frequent value: x is in bin i if ``quantiles[i - 1] < x <= quantiles[i]``, as in ``torch.bucketize``.
            Empty where the column is constant.
        missing: share of the training split that is missing.
        least, most: smallest and largest value; None: they were not kept.
        thresholds: boundaries chosen by the labels too, read like ``quantiles``; empty unless ``table.numbers`` asks.
    """

    name: str
    mean: float = 0.0
    std: float = 1.0
    quantiles: tuple[float, ...] = ()
    missing: float = 0.0
    least: float | None = None
    most: float | None = None
    thresholds: tuple[float, ...] = ()


@core.register_config
@dataclass(frozen=True)
class VectorFeature:
    """One column of vectors.

    Attributes:
        name: name of the column.
        size: numbers in a vector.
        scale: root mean square of the training rows' numbers; 1 if all are 0.
    """

    name: str
    size: int
    scale: float = 1.0


@core.register_config
@dataclass(frozen=True)
class SequenceFeature:
    """One column of sequences, the oldest value first. Values without a row of their own are left out.

    Attributes:
        name: name of the column.
        num_rows: rows of the table in which its values are looked up.
        length: largest number of values.
        items: categorical column whose table that is; None: the sequence has one of its own.
        hashed: whether ids are hashed into the rows 1 to num_rows - 1.
    """

    name: str
    num_rows: int
    length: int
    items: str | None = None
    hashed: bool = False


@core.register_config
@dataclass(frozen=True)
class Target(Checked):
    """The target of a task, as found in the training split.

    Attributes:
        kind: kind of the label, as in ``TaskConfig``.
        loss: loss of "regression"; "squared" for the others.
        mean, std: mean and standard deviation of the labels that are numbers; std is 1 if they are constant.
        levels: the numbers of "ordinal", ascending. A label is the place of its number.
        classes: the values of "multiclass" as text, sorted. A label is the place of its value.
        shares: share of the labels that each level or class has; of "revenue", of 0 and of positive amounts.
        least, most: smallest and largest label that is a number; None: they were not kept.
        log_mean, log_std: mean and standard deviation of the logarithms of positive amounts, of "revenue".
    """

    kind: str = "binary"
    loss: str = "squared"
    mean: float = 0.0
    std: float = 1.0
    levels: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()
    least: float | None = None
    most: float | None = None
    log_mean: float = 0.0
    log_std: float = 1.0

    def numbers_of(self, label_N: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the numbers of an ordinal task's labels, float64 (N,); NaN for none."""
        numbers = np.array([*self.levels, np.nan])
        return numbers[np.where(np.isnan(label_N), -1, label_N).astype(np.int64)]


@core.register_config
@dataclass(frozen=True)
class Features(Checked):
    """All columns of a table, as a model needs them. They are saved in the checkpoint.

    Attributes:
        categorical, continuous: features in the order of the batches' columns.
        tasks: names of the labels, in the order of the batches' columns.
        positives: share of positive labels of each task in the training split; 0.5 for a task that is not binary.
        num_domains: number of domains; 0 if the table is not cut into domains.
        targets: the target of each task; empty if all are binary.
        vectors: columns of vectors, in the order of the batches' columns.
        sequences: columns of sequences, in the order of the batches' columns.
        numbers: encoding of the numbers by their thresholds, "bins" or "linear"; empty: no thresholds were learned.
    """

    categorical: tuple[CategoricalFeature, ...] = ()
    continuous: tuple[ContinuousFeature, ...] = ()
    tasks: tuple[str, ...] = ()
    positives: tuple[float, ...] = ()
    num_domains: int = 0
    targets: tuple[Target, ...] = ()
    vectors: tuple[VectorFeature, ...] = ()
    sequences: tuple[SequenceFeature, ...] = ()
    numbers: str = ""

    @property
    def target_of_task(self) -> tuple[Target, ...]:
        """The target of each task, one entry per task."""
        return self.targets or (Target(),) * len(self.tasks)

    @property
    def single(self) -> tuple[CategoricalFeature, ...]:
        """The categorical columns of one value per row."""
        return tuple(f for f in self.categorical if not f.multi_valued)

    @property
    def several(self) -> tuple[CategoricalFeature, ...]:
        """The columns with any number of values per row: multi-valued ones, then sequences, whose order is left out."""
        sequences = (CategoricalFeature(s.name, s.num_rows, True, s.hashed) for s in self.sequences)
        return (*(f for f in self.categorical if f.multi_valued), *sequences)
