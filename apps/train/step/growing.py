"""Growing in a training (Lifelong-MoE, arXiv 2305.12281): a run starts from the weights of a model of fewer experts."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

import core
from apps.train.checkpoint.contents import check_class, read_checkpoint, unlike
from apps.train.checkpoint.linked import LinkedModule
from apps.train.checkpoint.paths import find_checkpoint
from core.fields import Checked

_logger = logging.getLogger(__name__)

LOAD_BATCHES = 8
"""Batches of the validation over which the use of the experts is counted, for ``start="copy"``."""


@core.register_config
@dataclass(frozen=True)
class GrowConfig(Checked):
    """The trained model of fewer experts that a run starts from. The run's own ``num_experts`` is the new number.

    Attributes:
        checkpoint: a run's folder or a checkpoint, as ``find_checkpoint`` takes it. It is read when a training starts
            that resumes none.
        freeze: the old experts and their rows of the gate stay as they are, under weight decay too.
        start: how the new experts are initialized: "fresh", as the model makes experts; "copy", copies of the experts
            that the first validation batches choose most.

    Raises:
        ValueError: an unknown start.
    """

    prefix = "grow."

    checkpoint: str
    freeze: bool = True
    start: Literal["fresh", "copy"] = "fresh"


def grow_from(module: LinkedModule, config: GrowConfig, batches: Any) -> dict[str, list[int]]:
    """Load the weights of a trained model of fewer experts into a module that has just been made.

    Args:
        module: the model with the new number of experts; it adopts the encoding of the data as well.
        config: location of the trained model, and how the new experts are initialized.
        batches: iterable of validation batches, for ``start="copy"``; None: there are none.

    Returns:
        the old experts of each layer that has grown, by the layer's name.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: the checkpoint has another kind of model, its layers are not smaller, or cannot grow, or tensors
            other than the experts' and gates' differ in shape.
    """
    file = find_checkpoint(config.checkpoint)
    checkpoint = read_checkpoint(file)
    check_class(checkpoint, module, f"model.grow.checkpoint={file}")
    trained = type(module).restored(checkpoint, str(file)).eval()
    old, new = core.moe_layers(trained), core.moe_layers(module)
    added = _added(old, new, str(file))
    if config.start == "copy" and any(isinstance(getattr(old[n].router, "config", None), core.Domain) for n in added):
        raise ValueError("model.grow.start='copy' copies the expert in most use, but with core.Domain the data choose")
    loads = _loads(trained, added, batches) if config.start == "copy" else {}
    fresh = {
        name: core.grow_experts(cast(core.MoE, old[name]), n, start=config.start, loads_E=loads.get(name))
        for name, n in added.items()
    }
    if problem := unlike(trained.state_dict(), module):
        raise ValueError(f"model.grow.checkpoint={file} does not fit: {problem}; only num_experts may be another")
    if config.start == "fresh":  # the model's own initialization, which may differ from the experts' class
        for name, experts in fresh.items():
            _copy_experts(new[name].experts, old[name].experts, experts)
    module.load_state_dict(trained.state_dict())
    module.adopt_encoding(checkpoint)
    kept = {name: [e for e in range(new[name].experts.num_experts) if e not in fresh[name]] for name in added}
    counts = ", ".join(f"{name} from {len(kept[name])} to {len(kept[name]) + n} experts" for name, n in added.items())
    _logger.info("grown from %s: %s", file, counts)
    return kept


def freeze(module: LinkedModule, frozen: Mapping[str, Sequence[int]]) -> None:
    """Freeze experts of a module's layers, by the layers' names."""
    layers: Any = core.moe_layers(module)
    for name, experts in frozen.items():
        core.freeze_experts(layers[name], experts)


def hold(optimizer: torch.optim.Optimizer, module: LinkedModule, frozen: Mapping[str, Sequence[int]]) -> None:
    """Put frozen experts back after each step of the optimizer."""
    layers: Any = core.moe_layers(module)
    for name, experts in frozen.items():
        core.hold_experts(optimizer, layers[name], experts)


def _added(old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> dict[str, int]:
    """Return how many experts each layer gets that grows."""
    if old.keys() != new.keys():
        name = min(old.keys() ^ new.keys())
        place = "the checkpoint alone" if name in old else "this run's model alone"
        raise ValueError(f"model.grow.checkpoint={path} does not fit: {name} is an MoE layer of {place}")
    added: dict[str, int] = {}
    for name, layer in new.items():
        if not (isinstance(layer, core.MoE) and isinstance(old[name], core.MoE)):
            continue  # it does not grow, and its tensors have to match the checkpoint's
        there, here = old[name].num_experts, layer.num_experts
        if here < there:
            raise ValueError(f"num_experts={here} of {name} is below the {there} of model.grow.checkpoint={path}")
        if here > there:
            routers = [getattr(part.router, "config", None) for part in (old[name], layer)]
            if routers[0] is not None and routers[0].resized(here) != routers[1]:
                raise ValueError(f"router={routers[1]} of {name} is {routers[0]} in model.grow.checkpoint={path}")
            added[name] = here - there
    if not added:
        raise ValueError(f"model.grow adds no expert: num_experts is that of model.grow.checkpoint={path}")
    experts = [id(new[name].experts) for name in added]
    if len(set(experts)) < len(experts):
        raise ValueError("model.grow is for layers with experts of their own: share_experts=True has one set for all")
    return added


def _loads(trained: LinkedModule, names: Mapping[str, int], batches: Any) -> dict[str, Tensor]:
    """Return how often each expert is chosen in the first batches, (E,) by layer."""
    if batches is None:
        raise ValueError("model.grow.start='copy' counts the use of experts over validation data, and there are none")
    loads: dict[str, Tensor] = {}
    inputs: Any = trained
    for batch in itertools.islice(batches, LOAD_BATCHES):
        with torch.no_grad(), core.record(trained) as tape:
            inputs(*inputs.example_inputs(batch))
        for entry in tape.entries:
            if entry.name in names:
                chosen_E = entry.routing.chosen_per_expert_E
                loads[entry.name] = loads.get(entry.name, 0) + chosen_E
    return loads


@torch.no_grad()
def _copy_experts(source: core.Experts, target: core.Experts, experts: Sequence[int]) -> None:
    for e in experts:
        values = source.weights_of(e)
        for name, value in target.weights_of(e).items():
            value.copy_(values[name])
