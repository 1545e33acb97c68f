"""A model's routed experts, divided among the ranks of a group."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..experts import Experts
from ..layers import MoELayer, moe_layers
from .all_to_all import AllToAllDispatcher


def shard_experts(model: nn.Module, mesh: DeviceMesh, *, static: bool = False) -> dict[str, str]:
    """Divide the routed experts of each MoE layer among the ranks of a mesh, in place: rank r keeps the r-th part.

    The stacked parameters become ``DTensor`` sharded along the experts' axis, and the layer's dispatcher an
    ``AllToAllDispatcher``. Every rank then calls the layers together, with tokens of its own. The gradient of an expert
    is the sum over the tokens of all ranks of the mesh, each of which adds its loss; that of all other parameters is of
    the rank's own tokens.

    Args:
        model: any module with MoE layers, the same one on each rank, with the same parameters.
        mesh: of one axis.
        static: as in ``AllToAllDispatcher``.

    Returns:
        What is where, by the layer's name, such as "4 of 8 experts on each of 2 ranks".

    Raises:
        ValueError: there is no MoE layer, one has experts that the ranks do not divide, or its experts cannot be split
            (soft slots, merged experts, dense gates, one-neuron experts, attention experts, experts that read the
            context or gather statistics); no layer is changed then.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer whose experts could be divided among ranks")
    for name, layer in layers.items():
        _check(name, layer, mesh.size())
    where = {}
    for name, layer in layers.items():
        dispatcher = AllToAllDispatcher(mesh.get_group(), static)
        dispatcher.backend = layer.backend
        layer.dispatcher = dispatcher
        for part in _parts(layer):
            for key, whole in list(part.named_parameters(recurse=False)):
                if isinstance(whole, DTensor):  # of experts that several layers share
                    continue
                local = whole.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
                sharded = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)]), whole.requires_grad)
                setattr(part, key, sharded)
        total = layer.experts.num_experts
        where[name] = f"{total // mesh.size()} of {total} experts on each of {mesh.size()} ranks"
    return where


def _parts(layer: MoELayer) -> Iterator[Experts]:
    """Yield the modules of a layer's routed experts that hold parameters."""
    return (part for part in layer.experts.modules() if isinstance(part, Experts))


def _check(name: str, layer: MoELayer, ranks: int) -> None:
    """Raise a ``ValueError`` where the experts of a layer cannot be divided among so many ranks."""
    where = f"layer {name!r}" if name else "the layer"
    if not layer.splits_experts:
        raise ValueError(f"{where} is a {type(layer).__name__}, whose experts cannot be divided among ranks")
    for part in _parts(layer):
        kind = type(part).__name__
        if part.num_experts % ranks:
            raise ValueError(f"{where} has {part.num_experts} experts ({kind}), which {ranks} ranks do not divide")
        if part.num_local_experts != part.num_experts:
            raise ValueError(
                f"{where} has {part.num_local_experts} of {part.num_experts} experts here: divided already"
            )
        if next(part.parameters(recurse=False), None) is None:
            raise ValueError(f"{where} has {kind}, without parameters of their own: there is nothing to divide")
        if part.reads_context:
            raise ValueError(f"{where} has {kind}, which read the context of each token: it does not go to other ranks")
        if any(True for _ in part.buffers(recurse=False)):
            raise ValueError(f"{where} has {kind} with statistics of their tokens, which ranks do not share")
