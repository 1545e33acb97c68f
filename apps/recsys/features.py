"""What a table's columns are to a model: the seam between the data and the network. Plain values, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CategoricalFeature:
    """One embedded column.

    Attributes:
        name: of the column.
        num_rows: rows of its table. Row 0 is for values not seen in training, and for missing ones.
        multi_valued: an example has any number of values, none too; else exactly one.
        hashed: ids are hashed into the rows 1 to num_rows - 1; else each seen value has a row of its own.
    """

    name: str
    num_rows: int
    multi_valued: bool = False
    hashed: bool = False


@dataclass(frozen=True)
class ContinuousFeature:
    """One column of numbers, as the training split has it. NaN and infinities are missing values and not in the figures.

    Attributes:
        name: of the column.
        mean, std: of the training split; std is 1 where the column is constant.
        quantiles: distinct, ascending boundaries between bins of about equal count; empty where the column is constant.
        missing: share of the training split that is missing.
    """

    name: str
    mean: float = 0.0
    std: float = 1.0
    quantiles: tuple[float, ...] = ()
    missing: float = 0.0


@dataclass(frozen=True)
class Features:
    """All columns of a table, as a model needs them. It is saved in the checkpoint.

    Attributes:
        categorical, continuous: in the order of the batches' columns.
        tasks: names of the labels, in the order of the batches' columns.
        positives: share of positive labels of each task in the training split.
        num_domains: scenarios, for tables that have several; 0: none.
    """

    categorical: tuple[CategoricalFeature, ...] = ()
    continuous: tuple[ContinuousFeature, ...] = ()
    tasks: tuple[str, ...] = ()
    positives: tuple[float, ...] = ()
    num_domains: int = 0
