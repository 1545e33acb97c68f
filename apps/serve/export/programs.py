"""``torch.export`` programs and AOTInductor packages of a network, which need nothing of this suite to run.

A layer for export runs on the backend "grouped", whose matmuls by expert are one custom operator,
``moesaic::grouped_mm``; everything else of a layer is torch's own.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import core
from apps.train.publish.exporting import Graph
from apps.train.torch_internals import find_cpp_compiler
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
    """Compute ``core.kernels.grouped.grouped_mm`` by torch's operators alone: a matmul for each expert's rows."""
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
    """Compute ``core.kernels.grouped.quantized_mm`` as ``grouped_mm`` does, from matrices dequantized one by one."""
    return grouped_mm(x_RD, QuantizedWeight(values, scales, fan_in, x_RD.dtype), offsets_E)


def plain() -> dict[Any, Callable[..., Any]]:
    """Return the table of decompositions that leaves none of the suite's operators in an exported program."""
    table = torch.export.default_decompositions()
    table[torch.ops.moesaic.grouped_mm.default] = grouped_mm
    table[torch.ops.moesaic.quantized_mm.default] = quantized_mm
    return table


UNBOUNDED = 2**48
"""A bound on a length from which it is none."""


def capture(graph: Graph, table: Mapping[Any, Callable[..., Any]] | None = None) -> torch.export.ExportedProgram:
    """Return a network as a program of ``torch.export``.

    Args:
        graph: the network with its example inputs.
        table: decompositions of operators; None: none are decomposed, and the suite's own stay.

    Raises:
        ValueError: an example has one element along an axis of any length, which torch would take for a fixed one; or
            the network has a size or a decision that depends on the values of its inputs. The message names the layer.
    """
    examples = tuple(graph.inputs.values())
    for name, axes in graph.dynamic.items():
        for axis, meaning in axes.items():
            if graph.inputs[name].shape[axis] < 2:
                raise ValueError(
                    f"input {name!r} of graph {graph.name!r} has length {graph.inputs[name].shape[axis]} along axis "
                    f"{axis} ({meaning}): an example needs at least 2 along an axis of any length"
                )
    any_length = torch.export.Dim.DYNAMIC
    shapes = _by_parameter(graph, [dict.fromkeys(graph.dynamic.get(n, {}), any_length) for n in graph.inputs])
    with prepared(graph.network), torch.no_grad():
        try:
            program = torch.export.export(graph.network, examples, dynamic_shapes=shapes)
        except Exception as error:
            raise ValueError(f"graph {graph.name!r} has no static form: {_first_line(error)}") from error
        _check_lengths(graph, program)
        return program if table is None else program.run_decompositions(dict(table))


def _check_lengths(graph: Graph, program: torch.export.ExportedProgram) -> None:
    """Raise a ``ValueError`` if an axis of any length may in truth not be longer than some bound.

    torch takes a number that is 1 in the example for a constant, such as the capacity of an expert of few tokens.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    for name, user_input in zip(graph.inputs, program.graph_signature.user_inputs, strict=True):
        for axis, meaning in graph.dynamic.get(name, {}).items():
            size = nodes[str(user_input)].meta["val"].shape[axis]
            most = program.range_constraints[size.node.expr].upper if isinstance(size, torch.SymInt) else size
            if most < UNBOUNDED:
                raise ValueError(
                    f"graph {graph.name!r} is right up to {meaning} {most} alone, by input {name!r}: torch took a "
                    f"number that is 1 in the example for a constant; give an example of more than {most}"
                )


def _by_parameter(graph: Graph, values: list[Any]) -> tuple[Any, ...]:
    """Return one value for each input as torch.export takes them: the values of ``*args`` are a tuple."""
    kinds = [p.kind for p in inspect.signature(graph.network.forward).parameters.values()]
    rest = inspect.Parameter.VAR_POSITIONAL
    named = kinds.index(rest) if rest in kinds else len(values)
    return tuple(values) if named >= len(values) else (*values[:named], tuple(values[named:]))


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def to_torch_export(graph: Graph, path: Path) -> Path:
    """Write a program that ``torch.export.load`` reads, in torch's own operators: this suite need not be installed.

    Args:
        graph: the network with its example inputs.
        path: the file, ``*.pt2``.

    Raises:
        ValueError: as in ``capture``.
    """
    program, whole = capture(graph, plain()), io.BytesIO()  # torch aborts the process if it cannot finish a file
    torch.export.save(program, whole)
    path.write_bytes(whole.getbuffer())
    return path


def to_aoti(graph: Graph, path: Path) -> Path:
    """Write a package of machine code that ``torch._inductor.aoti_load_package`` runs, also from C++.

    It takes contiguous inputs, and does not look: others give wrong numbers, or an error where the environment has
    ``AOTI_RUNTIME_CHECK_INPUTS=1``.

    Args:
        graph: the network with its example inputs.
        path: the file, ``*.pt2``.

    Raises:
        ValueError: a C++ compiler is missing; or as in ``capture``.
    """
    from torch._inductor import aoti_compile_and_package

    try:
        find_cpp_compiler()
    except Exception as error:
        raise ValueError(f"format aoti needs a C++ compiler such as g++, and there is none: {error}") from error
    whole = io.BytesIO()
    aoti_compile_and_package(capture(graph, plain()), package_path=whole)
    path.write_bytes(whole.getbuffer())
    return path
