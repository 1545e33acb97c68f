"""``summary`` lists the sparse parts of a model, and its cost before and after."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from ...experts import Constant, ExpertConfig, Mixed, expert_bytes, num_params
from ...experts.mixed import MixedExperts
from ...flops import count_flops
from ...layers import MoE, active_params
from ..build.sparse_ffn import SparseFFN
from ..read.calls import evaluating, hooked
from ..read.readers import recognized_ffns


@dataclass(frozen=True)
class Replaced:
    """One feed-forward network that was made an MoE layer.

    Attributes:
        name: dotted name of the ``SparseFFN``.
        replaced: class that was there.
        experts: number and kind of the experts.
        start: how they were initialized.
        flops_before, flops_after: forward FLOPs of a token, router included; ``flops_after`` is None if it depends
            on the length of a sequence.
        is_dense: ``densify`` has put one expert in the place of all.
    """

    name: str
    replaced: str
    experts: str
    start: str
    flops_before: int
    flops_after: int | None
    is_dense: bool = False


@dataclass(frozen=True)
class Summary:
    """The sparse parts of a model, and its cost; ``str`` of it is a table.

    Attributes:
        replaced: the networks that are MoE layers, in the model's order.
        recognized: number of the model's feed-forward networks, sparse and dense.
        params_before, params_after: parameters of the model.
        active_params: parameters that a token touches at most.
        expert_bytes: memory of the experts' parameters and buffers.
        flops_before, flops_after: forward FLOPs of the whole on the inputs that were given; None without inputs.
    """

    replaced: tuple[Replaced, ...]
    recognized: int
    params_before: int
    params_after: int
    active_params: int
    expert_bytes: int
    flops_before: int | None = None
    flops_after: int | None = None

    def __str__(self) -> str:
        sparse = sum(not layer.is_dense for layer in self.replaced)
        lines = [f"{sparse} of {self.recognized} feed-forward networks are sparse"]
        for layer in self.replaced:
            after = "by the sequence" if layer.flops_after is None else f"{layer.flops_after:,}"
            lines.append(
                f"  {layer.name or 'the model'}: {layer.experts} for a {layer.replaced}, start={layer.start!r}; "
                f"FLOPs a token {layer.flops_before:,} -> {after}"
            )
        lines.append(
            f"parameters {self.params_before:,} -> {self.params_after:,}, of which a token touches "
            f"{self.active_params:,}"
        )
        lines.append(f"bytes of the experts {self.expert_bytes:,}")
        if self.flops_before is not None:
            lines.append(f"FLOPs of these inputs {self.flops_before:,} -> {self.flops_after:,}")
        return "\n".join(lines)


def summary(model: nn.Module, *inputs: Any) -> Summary:
    """Return the networks of a model that ``core.sparsify`` replaced, with parameters and FLOPs before and after.

    Args:
        model: the sparse model, which stays as it is.
        inputs: arguments of one call of it, for the FLOPs of the whole: a forward in evaluation, without gradients.

    Raises:
        ValueError: no network of the model was replaced.

    Example::

        print(core.summary(sparse, torch.randn(1, 3, 224, 224)))
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseFFN)}
    dense = [name for name in recognized_ffns(model) if name not in layers]
    if not layers:
        some = ", ".join(dense[:4]) + (", ..." if len(dense) > 4 else "") if dense else "none"
        raise ValueError(f"no network of the model was made sparse; its feed-forward networks are {some}")
    after = num_params(model)
    added = sum(num_params(layer.moe) - layer.dense_params for layer in layers.values())
    flops = _flops(model, inputs, layers) if inputs else (None, None)
    return Summary(
        tuple(_replaced(name, layer) for name, layer in layers.items()),
        len(layers) + len(dense),
        after - added,
        after,
        active_params(model),
        expert_bytes(model),
        *flops,
    )


def _replaced(name: str, layer: SparseFFN) -> Replaced:
    if not isinstance(layer.moe, MoE):  # ``densify`` has put one expert in its place
        flops = count_flops(layer.moe, layer.weight.new_zeros(1, 1, layer.dim))
        return Replaced(name, layer.replaced, "a dense network", layer.start, layer.dense_flops, flops, True)
    # A layer that has grown or was pruned has other experts than it was built with.
    config = replace(layer.config.split(layer.dim), num_experts=layer.moe.num_experts)
    if isinstance(layer.moe.experts, MixedExperts) and not isinstance(config.expert, Mixed):
        kept = layer.moe.experts.bounds[1]
        config = replace(config, expert=Mixed((config.expert, Constant()), (kept, config.num_experts - kept)))
    try:
        flops = config.flops_per_token(layer.dim, layer.out_dim)
    except ValueError:  # soft slots and merged experts cost so much a sequence
        flops = None
    experts = f"{layer.moe.num_experts} {_short(config.expert)}"
    return Replaced(name, layer.replaced, experts, layer.start, layer.dense_flops, flops)


def _short(config: ExpertConfig) -> str:
    """Return a config with only the fields that are not at their defaults."""
    given = (f"{f.name}={getattr(config, f.name)!r}" for f in fields(config) if getattr(config, f.name) != f.default)
    return f"{type(config).__name__}({', '.join(given)})"


@torch.no_grad()
def _flops(model: nn.Module, inputs: tuple[Any, ...], layers: dict[str, SparseFFN]) -> tuple[int, int]:
    """Return the FLOPs of one forward of the dense model and of the sparse one.

    The dense model's are the sparse one's, with the networks' FLOPs instead of the layers'.
    """
    calls: list[tuple[SparseFFN, tuple[Any, ...]]] = []
    hooks = [m.register_forward_pre_hook(lambda m, args: calls.append((m, args))) for m in layers.values()]
    with evaluating(model), hooked(hooks):
        after = count_flops(model, *inputs)
        of_layers, of_networks = 0, 0
        for layer, args in calls:
            of_layers += count_flops(layer.forward, *args)
            axis = 1 if layer.layout == "channels_first" else -1
            of_networks += layer.dense_flops * (args[0].numel() // args[0].shape[axis])
    return after - of_layers + of_networks, after
