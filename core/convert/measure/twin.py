"""``dense_twin`` makes the dense model that costs as much as a sparse one."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from ...fields import OneOf, check_values
from ..build.sparse_ffn import SparseFFN
from ..build.sparsify import matching_parts
from ..build.starts import RandomStart
from ..read.calls import naming_module
from ..read.feed_forward import FeedForwardPart
from ..read.hidden_units import HiddenUnits, hidden_units
from ..read.readers import named_part, read_ffn
from ..read.structure import Seen
from .widths import solve_width

COSTS = ("flops", "params")


@dataclass(frozen=True)
class TwinWidth:
    """The hidden width of one feed-forward network in a dense baseline; of a stack of layers the first one.

    Attributes:
        before: width in the dense model.
        width: width in the twin, the one whose cost comes nearest.
        target: forward FLOPs of a token in the sparse layer, router included, or its parameters.
        cost: the network's at ``width``.
    """

    before: int
    width: int
    target: int
    cost: int


def dense_twin(
    model: nn.Module,
    like: nn.Module,
    cost: str = "flops",
    *,
    tokens_per_sequence: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a dense baseline that costs as much as a sparse model: a copy of the dense model in which the replaced
    networks have another hidden width.

    Each network keeps its modules: linear layers, and the batch norms between them, have other sizes. Its hidden width
    is the integer whose cost comes nearest to the layer's, router included. ``core.convert.twin_widths`` tells the
    widths.

    The twin starts as the sparse model does. If that copied weights, the network's units stay; added units have random
    input weights and zero output weights, so that the twin starts with the model's outputs. If a sparse layer costs
    less than the network, the units with the largest weights stay. With ``start="random"`` the network is
    reinitialized. A size that the model keeps elsewhere, as transformers' ``model.config`` does, stays.

    Args:
        model: the dense model, which stays as it is.
        like: what ``core.sparsify`` made of it. It may have been trained.
        cost: the matched cost: "flops", the forward FLOPs of a token, or "params".
        tokens_per_sequence: S, for routers whose FLOPs depend on it, such as soft slots.
        seed: seed of the random weights. torch's own random state is not touched.

    Raises:
        ValueError: ``like`` has no layer of ``core.sparsify``'s, or other modules than ``model``; ``cost`` is neither;
            a router needs ``tokens_per_sequence``; no whole width comes within 5 % of the cost; a network is tied,
            frozen, has no hidden units, or does not run with another number of them.

    Example::

        sparse = core.sparsify(model, core.MoEConfig(8, core.TokenChoice(2)), modules="blocks.*.mlp")
        twin = core.dense_twin(model, like=sparse)
    """
    check_values(int, seed=seed)
    replaced = _replaced(model, like)
    # All widths are solved before the copy: an error costs no memory.
    widths = {
        name: _solved(name, layer, units, cost, tokens_per_sequence).width for name, (layer, units) in replaced.items()
    }
    generator = torch.Generator().manual_seed(seed)
    seen: Seen = {}
    result = copy.deepcopy(model)
    for name, (layer, units) in replaced.items():
        width = widths[name]
        units.resize(result.get_submodule(name), width, layer.start == RandomStart.name, generator)
        try:
            named_part(name, result.get_submodule(name), seen)
        except ValueError as error:  # a forward that has the old width in it
            raise ValueError(
                f"module {name!r} does not run with {width} hidden units: {error.__cause__ or error}"
            ) from None
    return result


def twin_widths(
    model: nn.Module, like: nn.Module, cost: str = "flops", *, tokens_per_sequence: int | None = None
) -> dict[str, TwinWidth]:
    """Return the widths of ``core.dense_twin``, by the dotted names of the networks in the model's order.

    Raises:
        ValueError: as ``core.dense_twin``.
    """
    return {
        name: _solved(name, layer, units, cost, tokens_per_sequence)
        for name, (layer, units) in _replaced(model, like).items()
    }


def _solved(name: str, layer: SparseFFN, units: HiddenUnits, cost: str, tokens_per_sequence: int | None) -> TwinWidth:
    """Return the width at which a network costs as much as a sparse layer."""
    check_values(Annotated[str, OneOf(*COSTS)], cost=cost)
    cost_at = units.flops_per_token if cost == "flops" else units.num_params
    with naming_module(name):
        target = sum(p.numel() for p in layer.parameters())
        if cost == "flops":
            target = layer.config.flops_per_token(layer.dim, layer.out_dim, tokens_per_sequence=tokens_per_sequence)
        width, problem = solve_width(cost_at, target, "flops a token" if cost == "flops" else "params")
        if problem:
            raise ValueError(problem)
    return TwinWidth(units.width, width, target, cost_at(width))


def _replaced(model: nn.Module, like: nn.Module) -> dict[str, tuple[SparseFFN, HiddenUnits]]:
    """Return the layers of the sparse model and the networks whose places they took, by the networks' names.

    Raises:
        ValueError: no layer was replaced, or the models differ in something else.
    """
    dense = dict(model.named_modules())
    layers = {
        place: m
        for place, m in like.named_modules()
        if isinstance(m, SparseFFN) and not isinstance(dense.get(place), SparseFFN)
    }
    if not layers:
        raise ValueError("like has no layer that core.sparsify put in the place of a network of model")
    by_name = {_owner(model, place, layer): layer for place, layer in layers.items()}
    parts = matching_parts(model, list(by_name))
    _check_rest(model, like, parts)
    replaced = {}
    for name, part in parts.items():
        layer = by_name[name]
        if (layer.dense_flops, layer.dim, layer.out_dim) != (part.flops_per_token(), part.dim, part.out_dim):
            raise ValueError(f"module {name!r} of model is {part.expert}, and like replaced a network of another size")
        with naming_module(name):
            replaced[name] = layer, hidden_units(model.get_submodule(name), part)
    return replaced


def _owner(model: nn.Module, place: str, layer: SparseFFN) -> str:
    """Return the name of the network that a layer replaced: the layer's own place, or a block around it."""
    modules, parts = dict(model.named_modules()), place.split(".") if place else []
    for n in range(len(parts), -1, -1):
        name, at = ".".join(parts[:n]), ".".join(parts[n:])
        if type(modules.get(name)).__name__ != layer.replaced:
            continue
        with contextlib.suppress(ValueError):
            part = read_ffn(modules[name])
            if part is not None and part.at == at:
                return name
    raise ValueError(
        f"like has experts at {place!r} in the place of a {layer.replaced}, which model does not have there"
    )


def _check_rest(model: nn.Module, like: nn.Module, parts: dict[str, FeedForwardPart]) -> None:
    """Raise a ``ValueError`` if two models differ in tensors, by name or shape, outside the replaced networks."""
    replaced = [
        ".".join(filter(None, (name, child))) for name, part in parts.items() for child in (part.at, *part.emptied)
    ]

    def shapes(m: nn.Module) -> dict[str, tuple[int, ...]]:
        tensors = (*m.named_parameters(remove_duplicate=False), *m.named_buffers(remove_duplicate=False))
        return {
            name: tuple(t.shape)
            for name, t in tensors
            if not any(not inner or name.startswith(f"{inner}.") for inner in replaced)
        }

    here, there = shapes(model), shapes(like)
    for name in {**here, **there}:
        if here.get(name) != there.get(name):
            sizes = [f"of shape {m[name]}" if name in m else "missing" for m in (here, there)]
            raise ValueError(f"like is not made of model: {name!r} is {sizes[0]} in model, and {sizes[1]} in like")
