"""Data that a user names without a configuration: each app says whether they have its kind, and makes one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

TargetKind = Literal[
    "binary", "regression", "count", "poisson", "tweedie", "revenue", "quantile", "ordinal", "multiclass"
]
"""Kinds of a column that is to be predicted."""

NUMBERS: tuple[TargetKind, ...] = ("regression", "count", "poisson", "tweedie", "revenue", "quantile")
"""Kinds that are numbers, without levels or classes."""

EXPERTS = {"num_experts": 8, "router": {"class_path": "core.TokenChoice", "init_args": {"top_k": 2}}}
"""The experts of a model of given data: each token takes 2 of 8."""


@dataclass(frozen=True)
class GivenData:
    """Files or folders of a user's own.

    Attributes:
        paths: one path, or two that belong together; all exist.
        target: column that is to be predicted; None if none is named.
        folder: folder for files that are made of the data; it may not exist yet.
        kind: kind of the target, such as "regression"; None: as its values are.
        exclude: columns of a table that are not features.
        time: column of a table by which rows are split: the last ones test; None: not by time.
        user: column of a table by which rows are split: all rows of a value fall on one side; None: not by it.
        in_place: whether a person reads the configuration next: it reads texts from the user's own files, which are
            else linked below ``folder``, and a table may have no ``target``.
        more_targets: further columns to predict with the same model.
        categorical: columns of a table that are categories, whatever they look like.
        is_chosen: whether a program has chosen the columns: none is left out as a likely leak, label or number of rows,
            and a target may have few rows.
    """

    paths: tuple[Path, ...]
    target: str | None
    folder: Path
    kind: TargetKind | None = None
    exclude: tuple[str, ...] = ()
    time: str | None = None
    user: str | None = None
    in_place: bool = False
    more_targets: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    is_chosen: bool = False


@dataclass(frozen=True)
class GivenConfig:
    """The configuration of a small model of given data: the best a minute for a person who reads it (``in_place``), a
    sparse one to compare for others.

    Attributes:
        config: sections ``model``, ``data`` and ``trainer``, in plain values.
        notes: sentences on how the data were read.
        comments: remarks by the keys that lead to a value; those of a key in ``above`` are lines of their own.
        warnings: what is wrong with the data, a line each.
        verdict: options of a verdict on the data, of a model without experts; None: a verdict takes the configuration.
    """

    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    comments: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    above: Mapping[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    verdict: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls, notes: Iterable[str], trainer: Mapping[str, Any], **sections: tuple[str, Mapping[str, Any]]
    ) -> GivenConfig:
        """Return the configuration of a ``model`` and ``data``, each a class and its arguments."""
        named = {name: {"class_path": kind, "init_args": own} for name, (kind, own) in sections.items()}
        return cls({**named, "trainer": trainer}, tuple(notes))
