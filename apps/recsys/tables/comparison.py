"""What ``MultiTaskRecommender`` is compared with: bottoms of equal cost, and models of other libraries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

import core
from apps.base.checks import INSTALL
from apps.equal_cost.comparison import Baseline, Comparison, ExampleValues, RoutedLayers, baselines_of
from apps.nets.place import Place
from apps.recsys.encoding.features import Features
from apps.recsys.tables.blend.default import DefaultBlend
from apps.recsys.tables.columns.bottoms import SharedBottom, SingleTask
from apps.recsys.tables.estimators import (
    CatBoost,
    HistGradientBoosting,
    HistGradientBoostingUntuned,
    LightGBM,
    LogisticRegression,
)
from apps.recsys.tables.negatives.weighting import WeightingConfig
from apps.recsys.tables.outputs import values_by_task
from apps.train.step.module import TaskOutput
from core.convert import SolvedWidth, solve_width, widened

BOTTOMS = {
    "shared_bottom": (SharedBottom, "one network of width {width} for all tasks"),
    "single_task": (SingleTask, "a model for each task, width {width}, nothing shared"),
}
"""Bottoms, each with its description, by the beginning of the baselines' names."""

ESTIMATORS = {
    "hist_gradient_boosting": (HistGradientBoosting, "settings chosen on validation"),
    "hist_gradient_boosting_untuned": (HistGradientBoostingUntuned, "150 trees, scikit-learn's defaults"),
    "logistic_regression": (LogisticRegression, "strength chosen on validation"),
}
"""Classes, each with its description, by the name of the baseline."""

LIBRARIES = {"lightgbm": LightGBM, "catboost": CatBoost}
"""Boosted trees of other libraries, by the name of the baseline."""


class TableComparison(Comparison):
    """A ``MultiTaskRecommender`` as a comparison sees it."""

    @property
    def task_metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        shown: tuple[str, ...] = self.module.shown_metrics
        return shown if len(shown) > 1 else ()

    @property
    def heading(self) -> str:
        if isinstance(self.module.shared_config, core.STAR):
            return "STAR"
        return f"{type(self.module.shared_config).__name__}, dense gates" if self.note else super().heading

    @property
    def note(self) -> str:  # type: ignore[override]
        """Say that the gates are dense, if they are."""
        if self.module.shared_config.is_sparse:
            return ""
        return f"{type(self.module.shared_config).__name__} with dense gates: every expert computes every example"

    @property
    def moe_block_names(self) -> tuple[str, ...]:
        """The shared layer of each network; none where it is a bottom itself."""
        if isinstance(self.module.shared_config, SharedBottom):
            return ()
        return tuple(
            n for n, m in self.module.named_modules() if any(m is network.shared for network in self.module.members)
        )

    def baselines(self) -> Mapping[str, Baseline]:
        """Return a shared bottom and single-task models of equal FLOPs and of equal parameters, boosted trees, a linear
        model.

        Only the layer between the columns and the towers differs. Single-task models have tables, interaction and
        towers of their own for each task, and a plain head: in the others a task learns from another's label.
        """
        recommender = self.module
        shared: core.MultiGateConfig = recommender.shared_config
        if isinstance(shared, SharedBottom):
            return {}
        by_name: dict[str, Baseline] = {}
        for prefix, (kind, says) in BOTTOMS.items():
            widths = bottom_widths(prefix, shared, recommender.input_dim, recommender.features)
            by_name |= baselines_of(widths, partial(_BottomTwin, recommender, kind), says)
        for name, (estimator, note) in ESTIMATORS.items():
            build = partial(estimator, steps=recommender.head.has_steps)
            by_name[name] = Baseline(build, f"scikit-learn's, one for each task; {note}")
        for name, library in LIBRARIES.items():
            if library.is_installed():
                build = partial(library, steps=recommender.head.has_steps)
                by_name[name] = Baseline(
                    build, f"{library.__name__}'s, one for each task; settings chosen on validation"
                )
            else:
                by_name[name] = Baseline(None, f"{library.package} is not installed: {INSTALL.format('baselines')}")
        by_name["default_blend"] = Baseline(
            partial(DefaultBlend, type(recommender), steps=recommender.head.has_steps),
            "what moesaic init writes: two dense layers and trees",
        )
        return by_name

    def example_values(self, outs: Sequence[TaskOutput]) -> ExampleValues:
        """Return the values by row whose mean is ``monitor``; NaN if a split cannot determine it."""
        values_tN = [values_N for _, values_N in self.task_values(outs).values()]
        name = self.module.monitor.replace("val/", "mean " if len(values_tN) > 1 else "")
        return ExampleValues(name, torch.from_numpy(np.mean(values_tN, axis=0)))

    def task_values(self, outs: Sequence[TaskOutput]) -> dict[str, tuple[str, np.ndarray]]:
        """Return, by task, the name of its main metric and values by row whose mean it is."""
        z_NZ = torch.cat([out.outputs for out in outs]).double().cpu()
        y_Nt = torch.cat([out.targets for out in outs]).double().cpu().numpy()
        return values_by_task(self.module.features.tasks, self.module.outputs, z_NZ, y_Nt)

    def routed_layers(self) -> RoutedLayers | None:
        if isinstance(self.module.shared_config, SharedBottom):
            return None
        arguments = {"num_tasks": len(self.module.features.tasks), "num_domains": self.module.features.num_domains}
        place = Place(type(self.module).__name__, ("domain_ids_B",))
        return RoutedLayers(self.module.shared_config, self.module.input_dim, place, arguments)

    def with_moe(self, moe: core.MultiGateConfig) -> Any:
        return self.module.twin(shared=moe)


def bottom(kind: type[SharedBottom], shared: core.MultiGateConfig, width: int) -> SharedBottom:
    """Return a bottom with the expert of ``shared`` at another first width, all layers wider by one factor.

    It has as many times the expert's layers as ``shared`` has levels.
    """
    levels = getattr(shared, "num_levels", 1)
    return kind(expert=widened(shared.expert, width, levels), backend=shared.backend)


def bottom_widths(prefix: str, shared: core.MultiGateConfig, dim: int, features: Features) -> dict[str, SolvedWidth]:
    """Return the widths of the bottoms that cost what ``shared`` does.

    Args:
        prefix: a key of ``BOTTOMS``.
        shared: the multi-gate layer.
        dim: width D of its input.
        features: columns and tasks, of which the numbers of tasks and domains are read.

    Returns:
        "<prefix>_equal_flops" and "<prefix>_equal_params".
    """
    kind, t = BOTTOMS[prefix][0], len(features.tasks)
    flops = shared.flops_per_token(dim, t, features.num_domains)
    params = shared.num_params(dim, t, features.num_domains)
    try:
        by_flops = solve_width(lambda width: bottom(kind, shared, width).flops_per_token(dim, t), flops, "flops")
        by_params = solve_width(lambda width: bottom(kind, shared, width).num_params(dim, t), params, "params")
    except ValueError as error:  # experts that cannot be wider
        by_flops = by_params = SolvedWidth(0, str(error))
    return {f"{prefix}_equal_flops": by_flops, f"{prefix}_equal_params": by_params}


@dataclass(frozen=True)
class _BottomTwin:
    """Makes ``recommender`` again with a bottom. Unlike a closure it can be pickled into another process."""

    recommender: Any
    kind: type[SharedBottom]
    width: int

    def __call__(self) -> Any:
        model, shared = self.recommender, bottom(self.kind, self.recommender.shared_config, self.width)
        if not isinstance(shared, SingleTask):
            return model.twin(shared=shared)
        # Nothing that joins tasks: no head that chains them, no weights learned from each other's losses.
        head = dataclasses.replace(model.head, kind="plain", steps=model.head.has_steps, personal=(), domain_dim=0)
        weighting = WeightingConfig(weights=model.weighting_config.weights)
        return model.twin(shared=shared, head=head, weighting=weighting, gate_embeddings=0)


COMPARISON = TableComparison
