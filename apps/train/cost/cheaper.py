"""Cheaper forms of a trained model: fewer experts per token, less capacity, fewer experts, quantized ones.

Each is a change of the trained model in place, without training. ``moesaic test --sweep`` measures their cost and gain.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import core
from apps.train.cost.kinds import DENSE, kind_of_network
from apps.train.cost.quantizing import quantize_model
from apps.train.step.module import SparseModule
from core.convert.build.low_rank import adapted_modules
from core.routing.pairs.top_k import TopKConfig

TRAINED = "as trained"
FEWER_A_TOKEN, CAPACITY, PRUNED = "fewer experts a token", "less capacity", "fewer experts"
QUANTIZED, UNPRUNED_BATCH = "quantized experts", "no batch pruning"

CAPACITIES = (2.0, 1.25, 1.0, 0.75, 0.5)
SHARES = (0.75, 0.5, 0.25)
MOST_K = 8
"""The number of values of K that are tried at most."""


@dataclass(frozen=True)
class Cheaper:
    """A cheaper form of a model.

    Attributes:
        kind: the kind of saving: one of this module's names.
        name: how much, such as "top_k=1".
        short: the same for a picture, in which the kind is known: "K=1".
        change: makes a model such a form, in place. It raises a ``ValueError`` that says why it cannot.
    """

    kind: str
    name: str
    short: str
    change: Callable[[Any], None]


def cheaper_forms(model: Any, statistics: Mapping[str, core.ExpertStatistics] | str) -> list[Cheaper]:
    """Return the forms that may be made of a trained model, without the model as it is.

    Args:
        model: a module with MoE layers, which stays as it is.
        statistics: from ``core.expert_statistics``, by which experts are pruned; or why there are none.

    Raises:
        ValueError: the model has no experts.
    """
    if kind_of_network(model) == DENSE:
        raise ValueError(f"a {type(model).__name__} without MoE layers has no experts that could be made cheaper")
    return [
        *(Cheaper(FEWER_A_TOKEN, f"top_k={k}", f"K={k}", partial(take_fewer, top_k=k)) for k in _smaller_k(model)),
        *(
            Cheaper(CAPACITY, f"capacity {c:g}", f"c={c:g}", partial(limit, factor=c))
            for c in _smaller_capacities(model)
        ),
        *_pruned(model, statistics),
        *(Cheaper(QUANTIZED, name, name, partial(_quantize, name=name)) for name in ("int8", "int4")),
        *([Cheaper(UNPRUNED_BATCH, UNPRUNED_BATCH, "", _keep_finished)] if _prunes_batches(model) else []),
    ]


# ---- fewer experts per token


def _routers(model: Any) -> list[Any]:
    return [router for layer in core.moe_layers(model).values() for router in layer.routers().values()]


def _takers(model: Any) -> list[Any]:
    """Return the routers whose tokens take the best ``top_k`` of their logits."""
    return [router for router in _routers(model) if isinstance(getattr(router, "config", None), TopKConfig)]


def _adopted(model: Any) -> list[Any]:
    """Return the blocks of another library's model whose tokens take the best of their scores."""
    return [layer for layer in core.moe_layers(model).values() if getattr(layer, "can_take_fewer", False)]


def _smaller_k(model: Any) -> list[int]:
    """Return the numbers of experts below the largest that a token takes: all, or up to ``MOST_K`` at equal ratios."""
    adopted = (int(layer.pairs_per_token) for layer in _adopted(model))
    largest = max((*(router.config.top_k for router in _takers(model)), *adopted), default=1)
    if largest - 1 <= MOST_K:
        return list(range(1, largest))
    return sorted({round(largest ** (i / MOST_K)) for i in range(MOST_K)})


def take_fewer(model: Any, top_k: int) -> None:
    """Let tokens take at most ``top_k`` experts, in place. Gates that sum to 1 for a token still do.

    Raises:
        ValueError: an option of a router needs more of them. The model is left as it was.
    """
    routers = [router for router in _takers(model) if router.config.top_k > top_k]
    changed = []
    for router in routers:
        # One gate that is divided by itself is 1.
        unit = {"normalize": "unit"} if top_k == 1 and router.config.normalizes else {}
        changed.append(dataclasses.replace(router.config, top_k=top_k, **unit))
    for router, config in zip(routers, changed, strict=True):
        router.config = config
    for layer in _adopted(model):
        layer.take_fewer(top_k)


# ---- capacity


def _limited(model: Any) -> list[Any]:
    """Return the routers whose experts may have a limited load."""
    configs = ((router, getattr(router, "config", None)) for router in _routers(model))
    return [router for router, config in configs if "capacity_factor" in getattr(config, "layer_options", ())]


def _smaller_capacities(model: Any) -> list[float]:
    ratios = [router.capacity.ratio(training=False) for router in _limited(model)]
    largest = max((math.inf if ratio is None else ratio[0] / ratio[1] for ratio in ratios), default=0.0)
    return [factor for factor in CAPACITIES if factor < largest]


def limit(model: Any, factor: float) -> None:
    """Limit the experts' loads in evaluation to ``factor`` times the even load, in place, if they may have more."""
    for router in _limited(model):
        ratio = router.capacity.ratio(training=False)
        if ratio is None or ratio[0] / ratio[1] > factor:
            router.capacity = dataclasses.replace(router.capacity, eval_factor=factor)


# ---- fewer experts


def _pruned(model: Any, statistics: Mapping[str, core.ExpertStatistics] | str) -> Iterator[Cheaper]:
    """Yield the forms with a share of the experts, namely the ones that compute the most rows."""
    for share in SHARES:
        short = f"{100 * share:g} %"
        name = f"{short} of the experts"
        if isinstance(statistics, str):
            yield Cheaper(PRUNED, name, short, partial(_refuse, reason=statistics))
        else:
            yield Cheaper(PRUNED, name, short, partial(_prune, statistics=statistics, share=share))


def _prune(model: Any, statistics: Mapping[str, core.ExpertStatistics], share: float) -> None:
    if any(True for _ in adapted_modules(model)):
        core.merge_adapters(model)
    core.prune_experts(model, statistics, share, "use")


def _refuse(model: Any, reason: str) -> None:
    raise ValueError(reason)


# ---- quantized experts, and batches


def _quantize(model: Any, name: str) -> None:
    quantize_model(model, name)


def _prunes_batches(model: Any) -> bool:
    searches = type(model).infer is not SparseModule.infer
    return searches and bool(getattr(getattr(model, "decode", None), "prune", False))


def _keep_finished(model: Any) -> None:
    """Keep finished sentences in the batch of a search, in place."""
    model.decode = dataclasses.replace(model.decode, prune=False)
