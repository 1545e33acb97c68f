"""What the suite's own operators become outside it: torch's operators, or ONNX's.

A layer for export runs on the backend "grouped", whose products by expert are one custom operator,
``moesaic::grouped_mm``. Everything else of a layer is torch's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import core
from core.dispatch import Dispatcher
from core.kernels import QuantizedWeight, Weight
from core.layers.multi_gate import DenseGatesLayer


@contextlib.contextmanager
def prepared(network: nn.Module) -> Iterator[None]:
    """Let a network be exported inside the ``with`` block: in evaluation, its MoE layers on the backend "grouped"."""
    layers = list(core.moe_layers(network).values())
    training, backends = network.training, [layer.backend for layer in layers]
    network.eval()
    for layer in layers:
        layer.backend = "grouped"
    try:
        yield
    finally:
        network.train(training)
        for layer, backend in zip(layers, backends, strict=True):
            layer.backend = backend


@contextlib.contextmanager
def swapped(network: nn.Module, parts: Callable[[core.MoE], tuple[nn.Module, Dispatcher] | None]) -> Iterator[None]:
    """Let plain MoE layers have other experts and another dispatcher inside the ``with`` block.

    Args:
        network: a network that is exported.
        parts: returns them for a layer; None: the layer keeps its own.
    """
    before: list[tuple[core.MoE, core.Experts, Dispatcher]] = []
    try:
        plain = [m for m in core.moe_layers(network).values() if isinstance(m, core.MoE) and type(m) is core.MoE]
        for layer in plain:
            new = parts(layer)
            if new is not None:
                before.append((layer, layer.experts, layer.dispatcher))
                layer.experts, layer.dispatcher = new  # type: ignore[assignment]
        yield
    finally:
        for layer, experts, dispatcher in before:
            layer.experts, layer.dispatcher = experts, dispatcher


def computes_all(network: nn.Module) -> bool:
    """Return whether an MoE layer of the network computes more than chosen experts, by its method.

    Soft slots, merged experts and dense gates do: a time of theirs is none of sparse experts.
    """
    return any(_computes_all(layer) for layer in core.moe_layers(network).values())


def _computes_all(layer: core.MoELayer) -> bool:
    if isinstance(layer, (core.SoftMoE, core.MergedMoE, DenseGatesLayer)):
        return True
    return isinstance(layer, core.MoE) and layer.pairs_per_token >= layer.num_experts


def grouped_mm(x_RD: Tensor, w: Weight, offsets_E: Tensor) -> Tensor:
    """Compute ``core.kernels.grouped.grouped_mm`` by torch's operators alone: a product for each expert's rows."""
    rows, start, parts = x_RD.shape[0], 0, []
    for e, end in enumerate(offsets_E.tolist()):
        # What torch.export cannot know of numbers that lie in a tensor.
        torch._check(end >= start)
        torch._check(end <= rows)
        parts.append(torch.mm(x_RD[start:end], w[e]))
        start = end
    parts.append(x_RD.new_zeros(rows - start, w.shape[-1]))
    return torch.cat(parts)


def quantized_mm(x_RD: Tensor, values: Tensor, scales: Tensor, fan_in: int, offsets_E: Tensor) -> Tensor:
    """Compute ``core.kernels.grouped.quantized_mm`` as ``grouped_mm`` does, from matrices dequantised one by one."""
    return grouped_mm(x_RD, QuantizedWeight(values, scales, fan_in, x_RD.dtype), offsets_E)


def plain() -> dict[Any, Callable[..., Any]]:
    """Return the table of decompositions that leaves none of the suite's operators in an exported program."""
    table = torch.export.default_decompositions()
    table[torch.ops.moesaic.grouped_mm.default] = grouped_mm
    table[torch.ops.moesaic.quantized_mm.default] = quantized_mm
    return table
