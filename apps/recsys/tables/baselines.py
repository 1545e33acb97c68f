"""What a multi-task recommender is compared with: bottoms of equal cost, and scikit-learn's models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import core
from apps.equal_cost.comparable import Baseline
from apps.equal_cost.twins import baselines_of
from apps.equal_cost.widths import SolvedWidth, solve_width, widened
from apps.recsys.encoding.features import Features
from apps.recsys.tables.bottoms import SharedBottom, SingleTask
from apps.recsys.tables.estimators import HistGradientBoosting, HistGradientBoostingUntuned, LogisticRegression
from apps.recsys.tables.weighting import WeightingConfig

BOTTOMS = {
    "shared_bottom": (SharedBottom, "one network of width {width} for all tasks"),
    "single_task": (SingleTask, "a model for each task, width {width}, nothing shared"),
}
"""Bottoms by the beginning of the baselines' names, and what is said of them."""

ESTIMATORS = {
    "hist_gradient_boosting": (HistGradientBoosting, "settings chosen on validation"),
    "hist_gradient_boosting_untuned": (HistGradientBoostingUntuned, "150 trees, scikit-learn's defaults"),
    "logistic_regression": (LogisticRegression, "strength chosen on validation"),
}
"""Classes by the name of the baseline, and what is said of them."""


def baselines(recommender: Any) -> Mapping[str, Baseline]:
    """Return a shared bottom and single-task models of equal FLOPs and of equal parameters, boosted trees, a linear
    model.

    Only the layer between the columns and the towers differs. Single-task models have tables, interaction and towers of
    their own for each task, and a plain head: in the others a task learns from another's label.

    Args:
        recommender: a ``MultiTaskRecommender``.
    """
    shared: core.MultiGateConfig = recommender.shared_config
    if isinstance(shared, SharedBottom):
        return {}
    found: dict[str, Baseline] = {}
    for prefix, (kind, says) in BOTTOMS.items():
        widths = bottom_widths(prefix, shared, recommender.input_dim, recommender.features)
        found |= baselines_of(widths, partial(_BottomTwin, recommender, kind), says)
    for name, (estimator, note) in ESTIMATORS.items():
        build = _Estimator(estimator, recommender.head.has_steps)
        found[name] = Baseline(build, f"scikit-learn's, one for each task; {note}")
    return found


def bottom(kind: type[SharedBottom], shared: core.MultiGateConfig, width: int) -> SharedBottom:
    """Return a bottom with the expert of ``shared`` at another first width, all layers wider by one factor; as many
    times the layers as ``shared`` has levels."""
    levels = getattr(shared, "num_levels", 1)
    return kind(expert=widened(shared.expert, width, levels), backend=shared.backend)


def bottom_widths(prefix: str, shared: core.MultiGateConfig, dim: int, features: Features) -> dict[str, SolvedWidth]:
    """Return the widths of the bottoms that cost what ``shared`` does.

    Args:
        prefix: a key of ``BOTTOMS``.
        shared: the multi-gate layer.
        dim: D.
        features: for the number of tasks and of domains.

    Returns:
        "<prefix>_equal_flops" and "<prefix>_equal_params".
    """
    kind, t, domains = BOTTOMS[prefix][0], len(features.tasks), features.num_domains

    def flops(width: int) -> int:
        return bottom(kind, shared, width).flops_per_token(dim, t)

    def params(width: int) -> int:
        return bottom(kind, shared, width).num_params(dim, t)

    found = {}
    for what, cost, target in (
        ("flops", flops, shared.flops_per_token(dim, t, domains)),
        ("params", params, shared.num_params(dim, t, domains)),
    ):
        try:
            found[f"{prefix}_equal_{what}"] = solve_width(cost, target, what)
        except ValueError as error:  # experts that cannot be wider
            found[f"{prefix}_equal_{what}"] = SolvedWidth(0, str(error))
    return found


@dataclass(frozen=True)
class _BottomTwin:
    """Makes ``recommender`` anew with a bottom. A class and not a closure: it pickles into another process."""

    recommender: Any
    kind: type[SharedBottom]
    width: int

    def __call__(self) -> Any:
        model, shared = self.recommender, bottom(self.kind, self.recommender.shared_config, self.width)
        if not isinstance(shared, SingleTask):
            return model.twin(shared=shared)
        # Nothing that joins tasks: no head that chains them, no weights learned from each other's losses.
        head = dataclasses.replace(model.head, kind="plain", steps=model.head.has_steps)
        return model.twin(shared=shared, head=head, weighting=WeightingConfig(weights=model.weighting_config.weights))


@dataclass(frozen=True)
class _Estimator:
    """Makes a scikit-learn baseline."""

    kind: type
    steps: bool

    def __call__(self) -> Any:
        made = self.kind()
        made.steps = self.steps
        return made
