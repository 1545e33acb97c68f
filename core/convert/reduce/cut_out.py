"""``cut_out`` takes the network of one task, one domain or one expert out of a sparse model, as a dense one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...adopted.shrink import set_counts
from ...layers import MoE, MoELayer
from ...routing.given.per_sequence import DomainRouter, TaskRouter
from ...routing.router import RouterConfig
from ..read.parts import check_all_here, replace_layers
from .merge import OneExpert, joined


@torch.no_grad()
def cut_out(
    model: nn.Module, *, task: int | None = None, domain: int | None = None, expert: int | None = None
) -> nn.Module:
    """Replace each MoE layer of a model by the dense layer that one task, domain or expert takes in it.

    If the gate decides only by the task or the domain, the dense model's output equals the sparse one's for it, for any
    tokens (Task-MoE, arXiv 2110.03742; DEMix, arXiv 2108.05036). A task's K experts become one FFN that is K times as
    wide, with the gates in its output's weights. ``expert`` takes one expert at a gate of 1, whatever the router is. An
    adopted block of transformers stays one, with that expert alone, at the gate that its router gives to it.

    Args:
        model: any module with MoE layers, changed in place, or one MoE layer. Copy it first to keep the sparse one.
        task: as in ``context.task_ids_B``; the routers are ``Task``.
        domain: as in ``context.domain_ids_B``; the routers are ``Domain``.
        expert: index of an expert of each layer.

    Returns:
        ``model``, or the dense layer (``OneExpert``) in the place of a layer that is not adopted.

    Raises:
        ValueError: not exactly one of task, domain and expert is given, or it is out of range; a router decides by
            something else; a capacity in evaluation, by which experts drop tokens; or no single expert can replace the
            K experts of a task.

    Example::

        english_german = core.cut_out(copy.deepcopy(model), task=1)
    """
    given = {name: v for name, v in (("task", task), ("domain", domain), ("expert", expert)) if v is not None}
    if len(given) != 1:
        raise ValueError(f"one of task, domain and expert is to be given, not {len(given)} of them")
    ((what, index),) = given.items()
    changes: list[Callable[[], None]] = []

    def dense(name: str, layer: MoELayer) -> nn.Module:
        if not isinstance(layer, MoE):
            raise ValueError(f"layer {name!r} is a {type(layer).__name__}: core.MoE and its subclasses are cut out of")
        expert_ids_K, gates_K = _experts_of(layer, what, index)
        if layer.is_adopted:
            check_all_here(layer.experts, "an expert is taken out")
            change = layer.shrunk(1, lambda stacked: stacked[[index]])
            assert change is not None
            changes.append(change)
            return layer
        return OneExpert.in_place_of(layer, joined(layer.experts, expert_ids_K, gates_K))

    made = replace_layers(model, dense)
    for change in changes:
        change()
    set_counts(made)
    return made


def _experts_of(layer: MoE, what: str, index: int) -> tuple[list[int], Tensor]:
    """Return the experts that compute every token of a task or domain, and their gates."""
    router, E = layer.router, layer.num_experts
    if what != "task" and not 0 <= index < E:
        raise ValueError(f"{what}={index} is not in range({E})")
    if what == "expert":
        return [index], torch.ones(1)
    if router.capacity.ratio(training=False) is not None:
        raise ValueError("with a capacity what an expert computes depends on the batch: set it to None before")
    if what == "domain" and isinstance(router, DomainRouter):
        return [index], torch.ones(1)
    if what == "task" and isinstance(router, TaskRouter):
        chosen = router.experts_of(index)
        return chosen.expert_ids_K.tolist(), chosen.gates_K
    config = getattr(router, "config", None)
    source = config.source() if isinstance(config, RouterConfig) else type(router).__name__
    raise ValueError(f"router {source} does not decide by the {what} alone, as {what.capitalize()} does")
