"""``prune_experts`` keeps the experts of a model that matter most; ``merge_experts`` merges similar experts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from ...adopted.shrink import set_counts
from ...contract.checks import at_most_experts
from ...experts import Constant, Experts, check_merges
from ...experts.mixed import MixedExperts
from ...fields import Count, OneOf, check_values
from ...layers import MoE, PatchMoE
from ...routing.given.per_sequence import DomainRouter
from ..measure.statistics import ExpertStatistics
from ..read.parts import (
    layers_with_experts,
    num_groups,
    parts_of,
    reseated,
    restack,
    set_num_experts,
    value_of_layer,
    weighted_rows,
    width_of,
)

SCORES: dict[str, Callable[[ExpertStatistics], Tensor]] = {
    "use": lambda s: s.loads_E,
    "reap": lambda s: s.gated_norms_E / s.loads_E.clamp_min(1),
    "man": lambda s: s.norms_E / s.loads_E.clamp_min(1),
    "msan": lambda s: s.squares_E / s.loads_E.clamp_min(1),
    "spread": lambda s: s.spread_E,
}

Picked = Callable[[Tensor], Tensor]
Statistics = Mapping[str, ExpertStatistics] | ExpertStatistics


def keep_experts(layer: MoE, experts: Collection[int]) -> None:
    """Keep these experts of a layer, in place, and take the others away with their rows of the gate.

    The layer then is as one that is built for so many experts, and its ``state_dict`` loads into such a one. A token
    chooses among the remaining experts. Parameters are new: make the optimizer after it.

    Args:
        layer: ``MoE`` or a subclass, whose router a ``RouterConfig`` has built.
        experts: indices in ``range(E)``, which are renumbered in their order.

    Raises:
        ValueError: an index is out of range or there is none; the router needs more experts, as by its ``top_k``, or
            has no logits that can be taken away; its groups would be unequal; or experts of several kinds, or split
            over ranks.
    """
    router, stacked = parts_of(layer, "shrink")
    for e in experts:
        if not 0 <= e < stacked.num_experts:
            raise ValueError(f"expert {e} is not in range({stacked.num_experts})")
    if not experts:
        raise ValueError("a layer keeps at least one expert, and none is named")
    index, size = sorted({*experts}), stacked.num_experts // num_groups(router)
    in_groups = [sum(e // size == g for e in index) for g in range(num_groups(router))]
    if len({*in_groups}) > 1:
        raise ValueError(f"groups of experts would keep {in_groups} of them: all groups keep as many")
    _changed(layer, len(index), _picked(index))()


@torch.no_grad()
def prune_experts(
    model: nn.Module,
    statistics: Statistics,
    keep: int | float,
    by: str = "reap",
    *,
    constants: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Keep the experts of the highest scores in each MoE layer of a model, in place, and take the others away.

    ========  ==========================================================================================================
    "use"     the number of rows that the expert computed
    "reap"    the mean of ``gate * ||f_e(x)||`` over its rows (REAP, arXiv 2510.13999)
    "man"     the mean of ``||f_e(x)||`` (MAN, arXiv 2606.15716)
    "msan"    the mean of ``||f_e(x)||^2`` (MSAN, arXiv 2606.15716)
    "spread"  the sum of ``||f_e(x) - mean||^2``, the error that a constant in its place makes: how often it is used
              times how much its output varies (as in MoNE, arXiv 2507.00390)
    ========  ==========================================================================================================

    If a router sees groups of experts, each group keeps as many. Parameters are new: make the optimizer after it.

    Args:
        model: any module with MoE layers, or one of them.
        statistics: from ``expert_statistics``, by the name of the layer, or of the one layer.
        keep: number of experts that a layer keeps; a float below 1: their share, rounded.
        by: the score.
        constants: put a constant, the mean of the expert's output, in the place of each expert that goes (MoNE). The
            gate keeps all its rows, in another order: the experts that stay come first. The layer then has the tensors
            of ``Mixed((kind, Constant()), (kept, E - kept))``.

    Returns:
        the experts that stay, by the name of the layer, as they were numbered before.

    Raises:
        ValueError: ``keep`` exceeds the number of experts, or is neither an integer of at least 1 nor a share;
            statistics lack a layer; two layers share their experts; with ``constants`` a router that sees groups; or as
            ``keep_experts``. The model is left as it was.

    Example::

        core.prune_experts(model, core.expert_statistics(model, batches), keep=0.5)
    """
    check_values(Annotated[str, OneOf(*SCORES)], by=by)
    kept: dict[str, tuple[int, ...]] = {}
    changes: list[Change] = []
    for request in _requests(model, statistics, keep):
        best_GK = (
            SCORES[by](request.statistics).unflatten(0, (request.num_groups, -1)).topk(request.keep_of_group).indices
        )
        kept[request.name] = tuple(
            sorted(request.in_layer(g, e) for g, ids in enumerate(best_GK.tolist()) for e in ids)
        )
        if constants:
            changes.append(_with_constants(request.layer, kept[request.name], request.statistics.mean_output_ED))
        else:
            changes.append(_changed(request.layer, len(kept[request.name]), _picked(kept[request.name])))
    _carry_out_all(model, changes)
    return kept


Cluster = tuple[int, ...]


@torch.no_grad()
def merge_experts(model: nn.Module, statistics: Statistics, keep: int | float) -> dict[str, tuple[Cluster, ...]]:
    """Merge the experts whose mean outputs are alike in each MoE layer, in place (HC-SMoE, arXiv 2410.08589).

    Experts are clustered from the bottom up by the Euclidean distance of their mean outputs, with average linkage. The
    parameters of a cluster's expert, and its row of the gate, are the means of its members', weighted by their loads.
    HC-SMoE keeps all rows of the gate; here the layer is one of fewer experts, and a token that chose a member goes to
    the merged expert as far as the members' rows are alike.

    Args:
        model: any module with MoE layers, or one of them.
        statistics: from ``expert_statistics(..., every_token=True)``, in which all experts' mean outputs cover the same
            tokens; without it the means of each expert's own tokens are compared.
        keep: as in ``prune_experts``.

    Returns:
        the clusters by the name of the layer: the experts, as they were numbered before, of each one that is left.

    Raises:
        ValueError: as ``prune_experts``; experts that cannot be merged; or one without tokens, whose mean is not known.
    """
    clusters: dict[str, tuple[Cluster, ...]] = {}
    changes: list[Change] = []
    for request in _requests(model, statistics, keep):
        check_merges(request.layer.experts)
        own, E = request.statistics, request.layer.num_experts
        mean_ED = own.every_output_ED
        if mean_ED is None:
            idle = [e for e, load in enumerate(own.loads_E.tolist()) if load == 0]
            if idle:
                raise ValueError(
                    f"expert {idle[0]} of layer {request.name!r} has no tokens: take statistics with every_token=True"
                )
            mean_ED = own.mean_output_ED
        clusters[request.name] = tuple(
            tuple(request.in_layer(g, e) for e in cluster)
            for g, mean_eD in enumerate(mean_ED.unflatten(0, (request.num_groups, -1)))
            for cluster in cluster_by_average(torch.cdist(mean_eD, mean_eD), request.keep_of_group)
        )
        weights_nE = torch.zeros(len(clusters[request.name]), E, dtype=torch.float64)
        for row_E, cluster in zip(weights_nE, clusters[request.name], strict=True):
            load = own.loads_E[list(cluster)].cpu()
            row_E[list(cluster)] = load / load.sum() if load.sum() > 0 else 1 / len(cluster)
        changes.append(_changed(request.layer, len(weights_nE), weighted_rows(weights_nE)))
    _carry_out_all(model, changes)
    return clusters


def cluster_by_average(distance_EE: Tensor, num_clusters: int) -> list[list[int]]:
    """Return clusters of items, joined from the bottom up, the closest pair first; by average linkage.

    Args:
        distance_EE: (E, E), symmetric.
        num_clusters: at least 1.

    Returns:
        the items of each cluster in their order; clusters by their first items.
    """
    clusters = [[e] for e in range(len(distance_EE))]
    between = distance_EE.double().cpu().clone()
    between.fill_diagonal_(float("inf"))
    while len(clusters) > num_clusters:
        i, j = divmod(int(between.argmin()), len(clusters))
        i, j = min(i, j), max(i, j)
        size_i, size_j = len(clusters[i]), len(clusters[j])
        # The mean over all pairs of items is the mean of both clusters', by their sizes.
        row = (size_i * between[i] + size_j * between[j]) / (size_i + size_j)
        between[i], between[:, i] = row, row
        between[i, i] = float("inf")
        rest = [k for k in range(len(clusters)) if k != j]
        between = between[rest][:, rest]
        clusters[i] = sorted(clusters[i] + clusters.pop(j))
    return clusters


class _Request(NamedTuple):
    """A request for one layer.

    Attributes:
        name, layer, statistics: the layer, by its name, and its statistics.
        num_groups: equal groups of experts that the router sees.
        keep_of_group: number of experts that each of them keeps.
    """

    name: str
    layer: MoE
    statistics: ExpertStatistics
    num_groups: int
    keep_of_group: int

    def in_layer(self, group: int, expert: int) -> int:
        """Return the index in the layer of an expert of a group."""
        return group * (self.layer.num_experts // self.num_groups) + expert


def _requests(model: nn.Module, statistics: Statistics, keep: int | float) -> Iterator[_Request]:
    """Yield the request for each layer, or raise the ``ValueError`` that says why it cannot be done."""
    for name, layer in layers_with_experts(model).items():
        router, experts = parts_of(layer, "shrink")
        assert isinstance(layer, MoE)
        if isinstance(router, DomainRouter):
            raise ValueError(
                f"router {router.config.source()} cannot shrink by scores: core.keep_experts names experts"
            )
        own, E, groups = value_of_layer(statistics, name, "statistics"), experts.num_experts, num_groups(router)
        if not isinstance(own, ExpertStatistics):
            raise ValueError(f"statistics of layer {name!r} are a {type(own).__name__}, not of core.expert_statistics")
        if len(own.loads_E) != E:
            raise ValueError(f"statistics of layer {name!r} are of {len(own.loads_E)} experts, and it has {E}")
        number = number_to_keep(keep, E)
        if number % groups:
            raise ValueError(f"keep={number} is not the same number for each of {groups} groups of experts")
        yield _Request(name, layer, own, groups, number // groups)


def number_to_keep(keep: int | float, num_experts: int) -> int:
    """Return the number of experts that ``keep``, a number or a share, leaves of so many.

    Raises:
        ValueError: as ``prune_experts``.
    """
    if isinstance(keep, float):
        if not 0 < keep < 1:
            raise ValueError(f"keep={keep} is neither an integer nor a share between 0 and 1")
        return max(1, round(keep * num_experts))
    check_values(Count, keep=keep)
    at_most_experts("keep", keep, num_experts)
    return keep


Change = Callable[[], None]
"""Carries out what is known to be possible."""


def _changed(layer: MoE, num_experts: int, rows: Picked) -> Change:
    """Return the change of a layer to fewer experts, whose tensors are ``rows`` of those before."""
    router, experts = parts_of(layer, "shrink")
    if (own := layer.shrunk(num_experts, rows)) is not None:
        return own
    other = router.config.resized(num_experts).build(width_of(layer), num_experts, router.capacity)
    tensors = reseated(router, other, rows)
    return partial(_carry_out, layer, lambda: restack(experts, num_experts, rows), tensors, num_experts)


@torch.no_grad()
def _carry_out(
    layer: MoE, experts: Callable[[], Experts], tensors: list[tuple[nn.Module, str, Tensor]], num_experts: int
) -> None:
    """Give a layer new experts, made of the old ones' tensors, and the router's new tensors, by module and name."""
    layer.experts = experts()
    for module, name, value in tensors:
        setattr(module, name, value)
    set_num_experts(layer, num_experts)


def _carry_out_all(model: nn.Module, changes: Sequence[Change]) -> None:
    for change in changes:
        change()
    set_counts(model)


def _with_constants(layer: MoE, kept: tuple[int, ...], mean_ED: Tensor) -> Change:
    """Return the change of a layer to some of its experts and a constant for each other one."""
    router, experts = parts_of(layer, "shrink")
    if layer.is_adopted:
        raise ValueError(f"an adopted {type(layer).__name__} has experts of one kind: constants have no place in it")
    E, groups = experts.num_experts, num_groups(router)
    if groups > 1:
        raise ValueError(f"router {router.config.source()} sees {groups} groups of experts: constants would mix them")
    if isinstance(layer, PatchMoE):
        raise ValueError("experts on patches cannot stand beside constants: Mixed has experts of rows")
    gone = [e for e in range(E) if e not in kept]
    if not gone:
        return partial(_carry_out, layer, lambda: experts, [], E)

    def mixed() -> Experts:
        like = next(experts.parameters(), mean_ED.float())
        constants = Constant().build(len(gone), width_of(layer), mean_ED.shape[1]).to(like.device, like.dtype)
        constants.v.copy_(mean_ED[gone])
        made = MixedExperts([restack(experts, len(kept), _picked(kept)), constants]).train(experts.training)
        made.backend = constants.backend = experts.backend
        return made

    other = router.config.resized(E + 1).build(width_of(layer), E + 1, router.capacity)
    return partial(_carry_out, layer, mixed, reseated(router, other, _picked([*kept, *gone])), E)


def _picked(index: Sequence[int]) -> Picked:
    """Return a function that picks rows of a tensor by its first axis."""
    return lambda stacked: stacked.index_select(0, torch.tensor(index, device=stacked.device))
