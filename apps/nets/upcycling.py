"""A network with mixtures of experts starts from the weights of a dense one: sparse upcycling (arXiv 2212.05055)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

import core
from apps.base.messages import some
from apps.nets.blocks import MoEs, moe_configs
from core.convert import SparseFFN, Start


@torch.no_grad()
def begin_as(
    model: nn.Module, dense: nn.Module, moe: MoEs | None, start: str | Start = "copy", *, seed: int = 0
) -> None:
    """Give a network the weights of a dense one, in place; each MoE layer starts from the network that it replaces.

    Its gates are reinitialized. Without dropped pairs the outputs are then the dense network's: see ``core.sparsify``.

    Args:
        model: the network.
        dense: the same without MoE layers.
        moe: the config of all MoE layers of ``model``, or a list with one for each; None: there are none.
        start: how the experts are initialized, a name of ``core.convert.STARTS`` or a start with options.
        seed: of the gates.

    Raises:
        ValueError: as ``core.sparsify``; ``dense`` is not the same but for the MoE layers, or their experts are not as
            its networks.
    """
    state = dict(dense.state_dict())
    layers = core.moe_layers(model)
    configs = moe_configs(moe)
    each = configs * len(layers) if len(configs) == 1 else configs
    for i, ((name, layer), config) in enumerate(zip(layers.items(), each, strict=True)):
        for inner in [n for n in state if n.startswith(f"{name}.")]:
            del state[inner]
        plain = replace(config, expert=core.FFN(), shared_expert=None)
        try:
            begun: Any = core.sparsify(dense.get_submodule(name), plain, "", start, seed=seed + i)
        except ValueError as error:
            raise ValueError(f"layer {name!r} cannot begin as the dense network: {error}") from None
        assert isinstance(begun, SparseFFN)
        if _form(begun.moe) != _form(layer):
            raise ValueError(
                f"layer {name!r} has experts {config.expert}, and the network that they begin as is "
                f"{begun.config.expert}: set moe.expert to that kind and width"
            )
        state |= {f"{name}.{inner}": value for inner, value in begun.moe.state_dict().items()}
    own = {name: value.shape for name, value in model.state_dict().items()}
    unfit = [
        name for name in {**own, **state} if name not in own or name not in state or own[name] != state[name].shape
    ]
    if unfit:
        raise ValueError(f"the dense network differs outside its MoE layers: {some(unfit, 3)}")
    model.load_state_dict(state)


def _form(layer: nn.Module) -> tuple[Any, ...]:
    """Return what two layers have alike that compute the same with the same tensors."""
    experts = getattr(layer, "experts", None)
    shapes = {name: value.shape for name, value in layer.state_dict().items()}
    return shapes, getattr(experts, "activation", None)
