"""The cost of a model, counted alike in every command: its parameters, and the FLOPs of one forward.

Padding is not counted, for a dense layer computes it and experts do not. Every pair that a router chooses is counted,
with only the capacity of the training. So the figure follows from the network and from the lengths in the batch, which
is the first one of the validation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import core
from apps.nets.depths import by_capacity
from core.convert.read.calls import evaluating
from core.layers import SparseMultiGateMoE


@dataclass(frozen=True)
class Cost:
    """The measured cost of a torch model.

    Attributes:
        num_params: number of parameters.
        active_params: number of parameters that one token touches.
        flops_per_example: forward FLOPs of the whole model, matmuls only, two per multiply-add.
        replaced_flops_per_example: FLOPs of the blocks that a baseline of equal cost replaces; None without any.
        replaced_params: parameters of those blocks; None without any.
        unit: unit that the FLOPs are counted for, such as "an image" or "a pair of 12 + 14 tokens".
    """

    num_params: int
    active_params: int
    flops_per_example: float
    replaced_flops_per_example: float | None = None
    replaced_params: int | None = None
    unit: str = "an example"


def measure_cost(module: Any, batch: Any, replaced: Sequence[str] = (), as_evaluated: bool = False) -> Cost:
    """Count parameters, and FLOPs of one forward of ``batch``, as in training or as in evaluation.

    Args:
        module: ``SparseModule``, or another callable with ``cost_inputs``, ``cost_unit`` and the ``module`` that it
            runs; it and the generators are left as they were. In the context ``as_trained()`` of one that has it, an
            evaluation computes no more than training does.
        batch: batch of the data module, on the module's device.
        replaced: dotted names of the blocks that a baseline replaces: the MoE layers, or the blocks around them.
        as_evaluated: count the matmuls under the module's evaluation capacity. Else count as in training, by the rule
            of ``flops_per_token`` of the layer's config: every chosen pair, times the training's capacity factor if
            that is below 1, whatever an untrained router drops or leaves empty; tasks choose independently, though
            untrained ones may agree.

    Raises:
        ValueError: a name in ``replaced`` is not a submodule.
    """
    inputs = module.cost_inputs(batch)
    examples = num_examples(inputs)
    forward, unit, module = module, module.cost_unit(batch), module.module
    modules = dict(module.named_modules())
    missing = [name for name in replaced if name not in modules]
    if missing:
        raise ValueError(f"it has no module {missing[0]!r}, which is a replaced block of the sparse model")
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    hooks = [
        modules[name].register_forward_pre_hook(lambda m, a, k: calls.append((m, a, k)), with_kwargs=True)
        for name in replaced
    ]
    dropped = {} if as_evaluated else _shares_dropped(module)
    rows: list[tuple[str, Any]] = []
    # Layers may share experts: then a call is of the one whose forward began last.
    owner: dict[nn.Module, str] = {modules[name].experts: name for name in dropped}
    hooks += [m.register_forward_pre_hook(lambda m, a: rows.append((owner[m], a))) for m in owner]
    hooks += [
        layer.register_forward_pre_hook(lambda m, _, name=name: owner.update({m.experts: name}))
        for name, layer in core.moe_layers(module).items()
    ]
    try:
        generators = torch.random.fork_rng(devices=cuda_devices(module))
        with contextlib.ExitStack() as as_trained, evaluating(module), torch.no_grad(), generators:
            if not as_evaluated:
                as_trained.enter_context(core.set_capacity_factor(module, None))
                as_trained.enter_context(by_capacity(module))
                as_trained.enter_context(getattr(forward, "as_trained", contextlib.nullcontext)())
            total: float = core.count_flops(forward, *inputs)
            for hook in hooks:
                hook.remove()
            inside: float = sum(core.count_flops(m, *args, **kwargs) for m, args, kwargs in calls)
            for name, args in rows:
                share = _share_of_rule(modules[name], dropped.get(name, 0.0), *args)
                less = (1 - share) * core.count_flops(modules[name].experts, *args)
                total -= less
                inside -= less * any(f"{name}.".startswith(f"{block}.") for block in replaced)
    finally:
        for hook in hooks:
            hook.remove()
    return Cost(
        num_params=core.num_params(module),
        active_params=core.active_params(module),
        flops_per_example=total / examples,
        replaced_flops_per_example=inside / examples if replaced else None,
        # Experts that several blocks share are there once.
        replaced_params=sum({id(p): p.numel() for name in replaced for p in modules[name].parameters()}.values())
        if replaced
        else None,
        unit=unit,
    )


def _shares_dropped(module: nn.Module) -> dict[str, float]:
    """Return the part of the routed pairs that the training's capacity drops even under equal loads, by the names of
    the layers whose cost depends on what their routers choose."""
    shares = {}
    for name, layer in core.moe_layers(module).items():
        factors = [router.capacity.factor for router in layer.routers().values()]
        least = min((f for f in factors if f is not None), default=1.0)
        if least < 1 or isinstance(layer, SparseMultiGateMoE):
            shares[name] = max(1 - least, 0.0)
    return shares


def _share_of_rule(layer: nn.Module, dropped: float, rows: Any, *_: Any) -> float:
    """Return the FLOPs of experts by the training's rule, over those that they compute of these rows."""
    once = layer.share_computed if isinstance(layer, SparseMultiGateMoE) else None
    if once is None:
        return 1 - dropped
    pairs, computed = rows.num_tokens, int(rows.offsets_E[-1])
    return once * pairs / max(computed, 1)


def megaflops(flops: float) -> str:
    """Return FLOPs in millions as text, with two decimals, or three digits of less than one."""
    millions = flops / 1e6
    return f"{millions:,.2f}" if millions >= 1 or not millions else f"{millions:.3g}"


def num_examples(inputs: tuple[Any, ...]) -> int:
    """Return the batch size of a forward's arguments: the length of the first tensor or batch object among them.

    Raises:
        ValueError: no argument has a length.
    """
    for value in inputs:
        if isinstance(value, Tensor):
            if value.ndim:
                return len(value)
        elif hasattr(value, "__len__") and not isinstance(value, (Mapping, list, tuple, str)):
            return len(value)
    kinds = ", ".join(type(value).__name__ for value in inputs) or "nothing"
    raise ValueError(f"example_inputs gives {kinds}, which has no length to count examples by")


def cuda_devices(model: nn.Module) -> list[int]:
    """Return the CUDA devices that ``model`` is on, for ``torch.random.fork_rng``."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    return sorted(device.index or 0 for device in devices)
