"""What a multi-task recommender is compared with: bottoms of equal cost, and scikit-learn's models."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import core
from apps.equal_cost.comparable import Baseline
from apps.equal_cost.widths import nearest_width, same_width, widened
from apps.recsys.encoding.features import Features
from apps.recsys.tables.bottoms import SharedBottom, SingleTask
from apps.recsys.tables.weighting import WeightingConfig

if TYPE_CHECKING:
    from apps.recsys.tables.module import MultiTaskRecommender

ESTIMATORS = {
    "hist_gradient_boosting": ("HistGradientBoosting", "settings chosen on validation"),
    "hist_gradient_boosting_untuned": ("HistGradientBoostingUntuned", "150 trees, scikit-learn's defaults"),
    "logistic_regression": ("LogisticRegression", "strength chosen on validation"),
}
"""Classes of ``apps.recsys.tables.estimators`` by the name of the baseline, and what is said of them."""


@dataclass(frozen=True)
class Solved:
    """A bottom that costs what the multi-gate layer does, and its first width; ``problem`` says why there is none."""

    config: SharedBottom | None
    width: int
    problem: str = ""


def baselines(module: MultiTaskRecommender) -> Mapping[str, Baseline]:
    """A shared bottom and single-task models of equal FLOPs and of equal parameters, boosted trees, a linear model.

    Only the layer between the columns and the towers differs. Single-task models have tables, interaction and towers of
    their own for each task, and a plain head: in the others a task learns from another's label.
    """
    if isinstance(module.shared_config, SharedBottom):
        return {}
    found: dict[str, Baseline] = {}
    for name, solved in solve(module.shared_config, module.input_dim, module.features).items():
        twin = next((n for n, b in found.items() if b.build and _same(b.build, solved)), None)
        if solved.config is None:
            found[name] = Baseline(None, solved.problem)
        elif twin is not None:
            found[name] = Baseline(None, f"coincides with {twin}: width {solved.width}")
        elif isinstance(solved.config, SingleTask):
            note = f"a model for each task, width {solved.width}, nothing shared"
            found[name] = Baseline(_Twin(module, solved.config, solved.width), note)
        else:
            note = f"one network of width {solved.width} for all tasks"
            found[name] = Baseline(_Twin(module, solved.config, solved.width), note)
    for name, (kind, note) in ESTIMATORS.items():
        found[name] = Baseline(_Estimator(kind, module.head.has_steps), f"scikit-learn's, one for each task; {note}")
    return found


def solve(shared: core.MultiGateConfig, dim: int, features: Features, tolerance: float = 0.05) -> dict[str, Solved]:
    """Bottoms that cost what ``shared`` does at width ``dim``: its expert, all layers wider by one factor.

    A multi-gate layer of several levels has a bottom of as many times the layers.

    Args:
        shared: the multi-gate layer.
        dim: D.
        features: for the number of tasks and of domains.
        tolerance: relative difference beyond which a width does not count as equal.

    Returns:
        "shared_bottom_equal_flops", "shared_bottom_equal_params" and the same of "single_task".
    """
    t, domains = len(features.tasks), features.num_domains
    targets = {"flops": shared.flops_per_token(dim, t, domains), "params": shared.num_params(dim, t, domains)}
    levels, found = getattr(shared, "num_levels", 1), {}
    for kind, prefix in ((SharedBottom, "shared_bottom"), (SingleTask, "single_task")):

        def at(width: int, kind: type[SharedBottom] = kind) -> SharedBottom:
            return kind(expert=widened(shared.expert, width, levels), backend=shared.backend)

        for what, target in targets.items():
            try:
                found[f"{prefix}_equal_{what}"] = _solve(at, what, target, dim, t, tolerance)
            except ValueError as error:
                found[f"{prefix}_equal_{what}"] = Solved(None, 0, str(error))
    return found


def _solve(
    at: Callable[[int], SharedBottom], what: str, target: int, dim: int, num_tasks: int, tolerance: float
) -> Solved:
    def cost(width: int) -> int:
        config = at(width)
        return config.flops_per_token(dim, num_tasks) if what == "flops" else config.num_params(dim, num_tasks)

    width = nearest_width(cost, target)
    if abs(cost(width) - target) > tolerance * target:
        return Solved(None, width, f"no whole width comes within {tolerance:.0%} of {target:,} {what}")
    return Solved(at(width), width)


def _same(build: Any, solved: Solved) -> bool:
    return same_width(build.width, solved.width) and type(build.shared) is type(solved.config)


@dataclass(frozen=True)
class _Twin:
    """Makes ``module`` anew with a bottom. A class and not a closure: it pickles into another process."""

    module: MultiTaskRecommender
    shared: SharedBottom
    width: int

    def __call__(self) -> MultiTaskRecommender:
        if not isinstance(self.shared, SingleTask):
            return self.module.twin(shared=self.shared)
        # Nothing that joins tasks: no head that chains them, no weights learned from each other's losses.
        head = dataclasses.replace(self.module.head, kind="plain", steps=self.module.head.has_steps)
        weighting = WeightingConfig(weights=self.module.weighting_config.weights)
        return self.module.twin(shared=self.shared, head=head, weighting=weighting)


@dataclass(frozen=True)
class _Estimator:
    """Makes a scikit-learn baseline, which is imported only then."""

    kind: str
    steps: bool

    def __call__(self) -> Any:
        made = getattr(importlib.import_module("apps.recsys.tables.estimators"), self.kind)()
        made.steps = self.steps
        return made
