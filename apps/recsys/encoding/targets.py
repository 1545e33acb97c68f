"""Labels of tasks of any kind from columns, the facts that a model needs about them, and the weights of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from apps.data.given import NUMBERS
from apps.recsys.encoding.categories import MISSING, factorize
from apps.recsys.encoding.features import Target
from apps.recsys.encoding.labels import to_labels
from apps.recsys.encoding.numbers import Part, to_numbers
from apps.recsys.schema import TaskConfig

MOST_LEVELS, MOST_CLASSES = 100, 10_000
"""Levels of an ordinal task and classes of a multiclass one at most."""


@dataclass(frozen=True)
class RawLabels:
    """The labels of a task over all tables, before anything is learned of them.

    Attributes:
        values_N: float64 (N,); 0 and 1 of a binary task, a place in ``texts`` of a multiclass one, else the numbers
            themselves; NaN for no label.
        texts: the values of a multiclass task.
    """

    values_N: NDArray[np.float64]
    texts: tuple[str, ...] = ()


def read_labels(parts: Sequence[Part], name: str, task: TaskConfig, mask: Sequence[Part] | None = None) -> RawLabels:
    """Return a task's labels.

    Args:
        parts: the label's column in each table.
        name: name of the task in messages.
        task: description of the task.
        mask: the column ``task.mask`` in each table.

    Raises:
        ValueError: a value is not a label of the task's kind, or the mask holds another number than 0 and 1.
    """
    texts: tuple[str, ...] = ()
    if task.kind == "binary":
        values_N = to_labels(parts, name, task).astype(np.float64)
    elif task.kind == "multiclass":
        codes = factorize(parts, task.column)
        texts = tuple(codes.values.to_pylist())
        values_N = np.where(codes.codes == MISSING, np.nan, codes.codes)
    else:
        values_N = to_numbers(parts, task.column)
        _check_numbers(values_N, name, task)
    if mask is not None:
        mask_N = to_numbers(mask, str(task.mask))
        odd_N = ~np.isin(mask_N, (0.0, 1.0)) & ~np.isnan(mask_N)
        if odd_N.any():
            row = int(np.argmax(odd_N))
            raise ValueError(
                f"task {name!r}: mask column {task.mask!r} must hold 0 and 1, but row {row} holds {mask_N[row]:g}"
            )
        values_N = np.where(mask_N == 1, values_N, np.nan)
    return RawLabels(values_N, texts)


def _check_numbers(values_N: NDArray[np.float64], name: str, task: TaskConfig) -> None:
    what, bad_N = "finite numbers", np.isinf(values_N)
    if task.kind == "count":
        what, bad_N = "integers of at least 0", bad_N | (values_N < 0) | (np.floor(values_N) < values_N)
    elif task.loss == "weighted_logistic" or task.kind in ("poisson", "tweedie", "revenue"):
        option = f"kind {task.kind!r}" if task.loss is None else f"loss {task.loss!r}"
        what, bad_N = f"numbers of at least 0 for {option}", bad_N | (values_N < 0)
    if bad_N.any():
        row = int(np.argmax(bad_N))
        raise ValueError(
            f"task {name!r}: column {task.column!r} must hold {what}, but row {row} holds {values_N[row]:g}"
        )


def learn_target(name: str, task: TaskConfig, labels: RawLabels, train_N: NDArray[np.bool_]) -> Target:
    """Return the facts that a model needs about a task's labels.

    Args:
        name: name of the task in messages.
        task: description of the task.
        labels: labels of all rows.
        train_N: (N,), the training rows.

    Raises:
        ValueError: training has no label or only one value, or a number of levels or classes is too large.
    """
    if task.kind == "binary":
        return Target()
    known = labels.values_N[train_N]
    known = known[~np.isnan(known)]
    values, counts = np.unique(known, return_counts=True)
    if len(values) < 2:
        which = f"the value {values[0]:g} alone" if len(values) and not labels.texts else "one class alone"
        raise ValueError(
            f"task {name!r} has {which if len(values) else 'no label'} in the train split: there is nothing to learn"
        )
    if task.kind in NUMBERS:
        mean, std, least, most = (float(value) for value in (known.mean(), known.std(), known.min(), known.max()))
        target = Target(task.kind, task.loss or "squared", mean, std, least=least, most=most)
        return _with_logs(name, target, known) if task.kind == "revenue" else target
    most = MOST_LEVELS if task.kind == "ordinal" else MOST_CLASSES
    if len(values) > most:
        advice = "; take kind 'regression'" if task.kind == "ordinal" else ""
        raise ValueError(
            f"task {name!r}: column {task.column!r} has {len(values):,} values in training, of which kind "
            f"{task.kind!r} takes at most {most:,}{advice}"
        )
    shares = counts / counts.sum()
    if task.kind == "ordinal":
        return Target("ordinal", levels=tuple(values.tolist()), shares=tuple(shares.tolist()))
    texts = [labels.texts[int(value)] for value in values]
    order = sorted(range(len(texts)), key=texts.__getitem__)
    return Target("multiclass", classes=tuple(texts[i] for i in order), shares=tuple(float(shares[i]) for i in order))


def _with_logs(name: str, target: Target, known: NDArray[np.float64]) -> Target:
    """Return the target of amounts, with the share of positive ones and their logarithms' mean and deviation.

    Raises:
        ValueError: all amounts are positive, or fewer than two different ones are.
    """
    logs = np.log(known[known > 0])
    positive = len(logs) / len(known)
    if positive == 1 or not len(logs) or not np.ptp(logs):
        why = "no amount of 0" if positive == 1 else "fewer than two different positive amounts"
        raise ValueError(f"task {name!r} has {why} in the train split: kind 'revenue' needs both; take 'tweedie'")
    shares = (1 - positive, positive)
    return replace(target, shares=shares, log_mean=float(logs.mean()), log_std=float(logs.std()))


def place_labels(target: Target, labels: RawLabels) -> NDArray[np.float32]:
    """Return labels as batches have them; a level or a class that ``target`` lacks is NaN."""
    if target.kind == "ordinal":
        places_L: NDArray[np.float64] = np.arange(len(target.levels), dtype=np.float64)
        at_N = np.searchsorted(target.levels, labels.values_N).clip(max=len(places_L) - 1)
        is_known_N = np.asarray(target.levels)[at_N] == labels.values_N
        return np.where(is_known_N, places_L[at_N], np.nan).astype(np.float32)
    if target.kind == "multiclass":
        place_of = {text: float(place) for place, text in enumerate(target.classes)}
        places_T = np.array([*(place_of.get(text, np.nan) for text in labels.texts), np.nan], np.float32)
        code_N = np.where(np.isnan(labels.values_N), len(labels.texts), labels.values_N).astype(np.int64)
        return places_T[code_N]
    return labels.values_N.astype(np.float32)


def to_weights(parts: Sequence[Part], column: str) -> NDArray[np.float64]:
    """Return the weights of all rows.

    Raises:
        ValueError: a weight is missing, negative or infinite.
    """
    weight_N = to_numbers(parts, column, missing="each row needs a weight")
    bad_N = ~(weight_N >= 0) | np.isinf(weight_N)
    if bad_N.any():
        row = int(np.argmax(bad_N))
        odd = "none" if np.isnan(weight_N[row]) else f"{weight_N[row]:g}"
        raise ValueError(f"column {column!r} must hold finite weights of at least 0, but row {row} holds {odd}")
    return weight_N


def of_mean_one(
    weight_N: NDArray[np.float64], column: str, name: str, rows_N: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Return weights whose mean over some rows is 1, so that they change no learning rate.

    Args:
        weight_N: weights of all rows.
        column, name: names of the column and the task in messages.
        rows_N: (N,), the task's labeled training rows.

    Raises:
        ValueError: the weights of these rows are all 0.
    """
    mean = weight_N[rows_N].mean()
    if mean == 0:
        raise ValueError(f"the weights of column {column!r} sum to 0 over the training rows of task {name!r}")
    return (weight_N / mean).astype(np.float32)
