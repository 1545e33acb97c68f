"""A model's routed experts, sharded among the ranks of a group."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..experts import Experts
from ..experts.adapters import LowRankUpdate
from ..experts.base import COMMON, HIDDEN
from ..layers import MoELayer, moe_layers
from ..torch_internals import local_place
from .all_to_all import AllToAllDispatcher
from .mesh import hidden_ranks


def shard_experts(model: nn.Module, mesh: DeviceMesh, *, static: bool = False) -> dict[str, str]:
    """Divide the routed experts of each MoE layer among the ranks of a mesh, in place: part r keeps the r-th experts.

    The stacked parameters become ``DTensor`` sharded along the experts' axis, and the layer's dispatcher an
    ``AllToAllDispatcher``. Every rank then calls the layers together, with tokens of its own. The gradient of an expert
    is the sum over the tokens of all ranks of the mesh, each of which adds its loss; the gradient of all other
    parameters covers the rank's own tokens.

    Args:
        model: any module with MoE layers, the same one on each rank, with the same parameters.
        mesh: one axis; or axes "node" and "expert" of ranks that share out experts, with an all-to-all within nodes
            first, and "hidden" of ranks that share out the hidden units of each expert.
        static: as in ``AllToAllDispatcher``.

    Returns:
        The placement, by the layer's name, such as "4 of 8 experts on each of 2 ranks".

    Raises:
        ValueError: there is no MoE layer, one has experts that the ranks do not split evenly, or its experts cannot be
            split (soft slots, merged experts, dense gates, one-neuron experts, experts of several kinds, experts that
            read the context or gather statistics; among ranks of "hidden": experts that are not a sum over hidden
            units, or have output biases); no layer is changed then.
    """
    layers = layers_of_experts(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer whose experts could be sharded over ranks")
    hidden = hidden_ranks(mesh)
    ranks = mesh.size() // hidden
    for name, layer in layers.items():
        _check(f"layer {name!r}" if name else "the layer", layer, ranks, hidden)
    where = {}
    for name, layer in layers.items():
        dispatcher = AllToAllDispatcher(mesh, static)
        dispatcher.backend = layer.backend
        layer.dispatcher = dispatcher
        for part in _parts(layer):
            holders = [part, *(m for m in part.modules() if isinstance(m, LowRankUpdate))]
            for holder, key, whole in [(h, *own) for h in holders for own in h.named_parameters(recurse=False)]:
                if isinstance(whole, DTensor):  # of experts that several layers share
                    continue
                axis = part.hidden_axes.get(key, 0)
                placements = [Shard(axis if is_hidden else 0) for is_hidden in _hidden_axes(mesh, hidden)]
                local = whole.detach()[local_place(whole.shape, mesh, placements)].clone()
                sharded = DTensor.from_local(local, mesh, placements, run_check=False)
                setattr(holder, key, nn.Parameter(sharded, whole.requires_grad))
        total, units = layer.experts.num_experts, "" if hidden == 1 else f", 1/{hidden} of their hidden units"
        where[name] = f"{total // ranks} of {total} experts{units} on each of {mesh.size()} ranks"
    return where


def layers_of_experts(model: nn.Module) -> dict[str, MoELayer]:
    """Return the MoE layers that have routed experts, by name: gates before blocks, and layers whose experts are
    modules of other kinds, have none, and are copied or sharded as all else."""
    return {name: layer for name, layer in moe_layers(model).items() if any(_parts(layer))}


def refusal(layer: MoELayer, ranks: int, hidden: int = 1) -> str | None:
    """Return why a layer's experts cannot be sharded among so many ranks; None if they can be.

    Args:
        layer: an MoE layer.
        ranks: ranks that share out the experts.
        hidden: ranks that share out the hidden units of each expert.
    """
    try:
        _check("the layer", layer, ranks, hidden)
    except ValueError as error:
        return str(error)
    return None


def _hidden_axes(mesh: DeviceMesh, hidden: int) -> list[bool]:
    """Return for each axis of the mesh whether it divides hidden units."""
    names = mesh.mesh_dim_names or ()
    return [hidden > 1 and names[i] == HIDDEN for i in range(mesh.ndim)]


def _parts(layer: MoELayer) -> Iterator[Experts]:
    """Yield the modules of a layer's routed experts that hold parameters."""
    return (part for part in layer.experts.modules() if isinstance(part, Experts))


def _check(where: str, layer: MoELayer, ranks: int, hidden: int) -> None:
    """Raise a ``ValueError`` if the experts of a layer cannot be sharded among so many ranks, and the hidden units of
    each among so many."""
    if not layer.splits_experts:
        raise ValueError(f"{where}, {type(layer).__name__}, has experts that cannot be sharded over ranks")
    for part in _parts(layer):
        kind = type(part).__name__
        if part.num_experts % ranks:
            raise ValueError(f"{where} has {part.num_experts} experts ({kind}), which {ranks} ranks do not divide")
        if part.num_local_experts != part.num_experts:
            raise ValueError(
                f"{where} has {part.num_local_experts} of {part.num_experts} experts here: sharded already"
            )
        if any(isinstance(other, Experts) for other in part.modules() if other is not part):
            raise ValueError(f"{where} has experts of several kinds ({kind}), which are not sharded over ranks")
        if next(part.parameters(recurse=False), None) is None:
            raise ValueError(f"{where} has {kind}, without parameters of their own: there is nothing to shard")
        if COMMON in part._modules:
            raise ValueError(f"{where} has {kind}, whose matrices all experts share: they stay on one rank")
        if part.reads_context:
            raise ValueError(f"{where} has {kind}, which read the context of each token: it does not go to other ranks")
        if any(True for _ in part.buffers(recurse=False)):
            raise ValueError(f"{where} has {kind} with statistics of their tokens, which ranks do not share")
        if hidden == 1:
            continue
        if any(isinstance(m, LowRankUpdate) for m in part.modules()):
            raise ValueError(
                f"{where} has adapters, whose hidden units are not divided: core.merge_adapters merges them"
            )
        for key, tensor in part.named_parameters(recurse=False):
            axis = part.hidden_axes.get(key)
            if axis is None:
                raise ValueError(f"{where} has {kind} with {key}, which has no hidden units to shard over ranks")
            if tensor.shape[axis] % hidden:
                units = f"{tensor.shape[axis]} hidden units ({kind}.{key})"
                raise ValueError(f"{where} has experts of {units}, which {hidden} ranks do not divide")
