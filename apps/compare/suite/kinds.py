"""What a model is, derived from the model itself: sparse, dense-gated, dense, trees, linear."""

from __future__ import annotations

from typing import Any

from apps.train import kinds

MEANINGS = {**kinds.MEANINGS, "trees": "boosted decision trees", "linear": "a linear model"}


def kind_of(model: Any) -> str:
    """Return what a model is, such as "sparse".

    Args:
        model: a module with its ``module``, the torch model, or an ``Estimator``, whose attribute ``kind`` says it.
    """
    module = getattr(model, "module", None)
    return str(getattr(model, "kind", "no network")) if module is None else kinds.kind_of_network(module)
