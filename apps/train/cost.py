"""What a model costs: its parameters, and the FLOPs of one forward, counted alike in every command.

Padding is not counted, for a dense layer computes it and experts do not; and every pair that a router chooses is, under
no capacity but that of the training. So the figure follows from the network and from the lengths in the batch, which is
the first one of the validation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import core


@dataclass(frozen=True)
class Cost:
    """What a torch system costs, as measured.

    Attributes:
        num_params: parameters.
        active_params: parameters that one token touches.
        flops_per_example: forward FLOPs of the whole model, products alone, two a multiply-add.
        replaced_flops_per_example: of the blocks that a baseline of equal cost replaces; None where there are none.
        replaced_params: parameters of those blocks; None where there are none.
        unit: what the FLOPs are of, such as "an image" or "a pair of 12 + 14 tokens".
    """

    num_params: int
    active_params: int
    flops_per_example: float
    replaced_flops_per_example: float | None = None
    replaced_params: int | None = None
    unit: str = "an example"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_cost(module: Any, batch: Any, replaced: Sequence[str] = (), as_evaluated: bool = False) -> Cost:
    """Count parameters, and FLOPs of one forward of ``batch``, as in training or as in evaluation.

    Args:
        module: a ``SparseModule``, for its ``cost_inputs`` and ``cost_unit``; it is left as it was, and the generators
            too.
        batch: of the data module, on the module's device.
        replaced: dotted names of the blocks that a baseline replaces: the MoE layers, or what holds them.
        as_evaluated: count what is computed under the module's evaluation capacity. Else as in training, by the rule of
            ``MoEConfig.flops_per_token``: every chosen pair, times the training's capacity factor where that is below
            1. What an untrained router drops, or leaves empty, says nothing of the model.

    Raises:
        ValueError: a name in ``replaced`` is not a submodule.
    """
    inputs = module.cost_inputs(batch)
    examples = num_examples(inputs)
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
    hooks += [
        modules[name].experts.register_forward_pre_hook(lambda _, a, name=name: rows.append((name, a)))
        for name in dropped
    ]
    training = module.training
    module.eval()
    try:
        limits = contextlib.nullcontext() if as_evaluated else core.set_capacity_factor(module, None)
        # A table on other ranks leaves an empty weight; its empty rows need a gradient, which the counter looks for.
        empty = any(p.numel() == 0 for p in module.parameters())
        with torch.set_grad_enabled(empty), torch.random.fork_rng(devices=cuda_devices(module)), limits:
            total: float = core.count_flops(module, *inputs)
            for hook in hooks:
                hook.remove()
            inside: float = sum(core.count_flops(m, *args, **kwargs) for m, args, kwargs in calls)
            for name, args in rows:
                less = dropped[name] * core.count_flops(modules[name].experts, *args)
                total -= less
                inside -= less * any(f"{name}.".startswith(f"{block}.") for block in replaced)
    finally:
        for hook in hooks:
            hook.remove()
        module.train(training)
    return Cost(
        num_params=sum(p.numel() for p in module.parameters()),
        active_params=core.active_params(module),
        flops_per_example=total / examples,
        replaced_flops_per_example=inside / examples if replaced else None,
        replaced_params=sum(p.numel() for name in replaced for p in modules[name].parameters()) if replaced else None,
        unit=module.cost_unit(batch),
    )


def _shares_dropped(module: nn.Module) -> dict[str, float]:
    """Return by layer the part of the routed pairs that its training's capacity drops even under equal loads."""
    shares = {}
    for name, layer in core.moe_layers(module).items():
        factors = [router.capacity.factor for router in layer.routers().values()]
        least = min((f for f in factors if f is not None), default=1.0)
        if least < 1:
            shares[name] = 1 - least
    return shares


def megaflops(flops: float) -> str:
    """Return FLOPs in millions, as they are shown: two decimals, or three digits of less than one."""
    millions = flops / 1e6
    return f"{millions:,.2f}" if millions >= 1 or not millions else f"{millions:.3g}"


def num_examples(inputs: tuple[Any, ...]) -> int:
    """Return B of the arguments of a forward: the length of the first that has one, a tensor or an object of a batch.

    Raises:
        ValueError: none has a length.
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
