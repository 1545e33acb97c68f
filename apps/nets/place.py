"""The rules of whether a router can work where it is put, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

import core


@dataclass(frozen=True)
class Place:
    """The place of a model's routers: the inputs of its MoE layers, and the things they must not do.

    Attributes:
        owner: names the model in messages.
        context_fields: fields of ``core.RoutingContext`` that the layers get in addition to ``valid_BS``; None: any.
        is_causal: a later token must not change an earlier one.
        decodes_stepwise: a token is also routed by itself, after the earlier ones.
        num_tasks, num_domains: of the data; None: it is not known here.
        data: names the data in messages, such as "the pairs en-de, de-en by tasks='pair'".
    """

    owner: str
    context_fields: tuple[str, ...] | None = None
    is_causal: bool = False
    decodes_stepwise: bool = False
    num_tasks: int | None = None
    num_domains: int | None = None
    data: str = "the data"


def misfit(place: Place, router: core.RouterConfig, balance: core.Balance | None = None) -> str | None:
    """Return why a router, or its balance losses, cannot work in a place; None if they can."""
    return next(_misfits(place, router, balance), None)


def check_fits(place: Place, router: core.RouterConfig, balance: core.Balance | None = None) -> None:
    """Raise an error for a router that cannot work in a place.

    Raises:
        ValueError: see ``misfit``.
    """
    problem = misfit(place, router, balance)
    if problem is not None:
        raise ValueError(problem)


def check_layers(place: Place, model: nn.Module) -> None:
    """Raise an error for built layers that need more of the context than they get: some do only in training, or for one
    of several fields, which a config does not say.

    Raises:
        ValueError: naming the missing fields.
    """
    given = core.RoutingContext(**dict.fromkeys(place.context_fields or (), torch.zeros(1)))
    for layer in core.moe_layers(model).values():
        layer.router.check_context(given)


def _misfits(place: Place, router: core.RouterConfig, balance: core.Balance | None) -> Iterator[str]:
    name = f"router {router.source()}"
    if place.is_causal and not router.is_causal:
        yield f"{name} lets later tokens change earlier ones: not for a causal decoder"
    if place.decodes_stepwise and not router.decodes_stepwise:
        why = "its place" if router.depends_on == "token" else "other tokens"
        cannot = f"trains and scores, but cannot decode step by step: a token's experts depend on {why}"
        yield f"{name} {cannot}; take another router for the decoder"
    owners: list[tuple[str, core.RouterConfig | core.Balance]] = [(name, router)]
    if balance is not None:
        owners.append(("moe.balance", balance))
    for owner, part in owners:
        for field in part.needs:
            if place.context_fields is not None and field not in place.context_fields:
                yield f"{owner} needs context.{field}, which {place.owner} does not give"
        tasks = getattr(part, "num_tasks", None)
        if tasks and place.num_tasks is not None and tasks != place.num_tasks:
            yield f"{owner} has num_tasks={tasks}, which does not fit {place.data}: they have {place.num_tasks}"
    types = balance.num_types if balance is not None and balance.localized else None
    if types is not None and place.num_tasks is not None and types != place.num_tasks:
        unfit = f"does not fit {place.data}: they have {place.num_tasks}"
        yield f"moe.balance has expert_types of {types} tasks, which {unfit}"
    domains = getattr(router, "num_domains", None)
    if domains is not None and place.num_domains is not None and domains < place.num_domains:
        yield f"{name} has num_domains={domains}, which does not fit {place.data}: they have {place.num_domains}"
