"""ONNX files of a network, for onnxruntime: in standard operators, or with onnxruntime's own for MoE layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch

import core
from apps.train.publish.exporting import Graph

from .contrib import by_blocks, goes_by_blocks, misfit, parts_of
from .programs import capture, computes_all, swapped
from .standard import chain_of, expand, translations

Form = Literal["standard", "contrib", "fastest"]
LARGEST = 2_000_000_000
"""Bytes of weights from which they go into a file beside the graph: protobuf holds no more than 2 GB."""

LEAST_OPSET = 20
"""The first version of ONNX's operators that has GELU."""


def to_onnx(
    graph: Graph,
    path: Path,
    form: Form = "fastest",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a network as an ONNX file, whose inputs and outputs have the graph's names.

    Args:
        graph: the network with its example inputs.
        path: the file, ``*.onnx``. Weights of 2 GB and more go into ``*.onnx.data`` beside it.
        form: "standard": ONNX's operators alone; "contrib": onnxruntime's for the MoE layers that they fit, and for
            matmuls with matrices of 4 bits; "fastest": the one that is faster on onnxruntime.
        metadata: texts that go into the file's metadata, beside ``moesaic.form`` and ``moesaic.computes``.

    Raises:
        ValueError: an operator of the network has no ONNX equivalent, named with its layer; or as in ``capture``.
    """
    quantized = any(isinstance(m, core.Experts) and m.is_quantized for m in graph.network.modules())
    computes = "all" if computes_all(graph.network) else "chosen"
    form = _fastest(graph) if form == "fastest" else form
    by_onnxruntime = form == "contrib"
    if by_onnxruntime:
        _check_fits(graph)
    with swapped(graph.network, partial(parts_of, by_step=_goes_by_step(graph)) if by_onnxruntime else chain_of):
        program = capture(graph)
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=21 if quantized else LEAST_OPSET,  # 21 is the first with integers of 4 bits
            custom_translation_table=translations(),
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(_refusal(graph, program, error)) from error
    assert exported is not None
    model = exported.model
    expand(model, by_blocks if by_onnxruntime else None)
    _name_axes(model, graph)
    model.producer_name, model.graph.name = "moesaic", graph.name
    model.metadata_props.update(metadata or {})
    model.metadata_props.update({"moesaic.form": form, "moesaic.computes": computes})
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    exported.save(str(path), external_data=size >= LARGEST)


def _fastest(graph: Graph) -> Form:
    """Return the form that is faster on a processor, by the figures of docs/results/serving.md.

    onnxruntime's operators of a layer start faster, which counts in a step of decoding. They pack no matrix and compute
    GELU and SiLU number by number, which is up to 2 times as slow as the standard form with 49 tokens a call and more.
    Its matmul with a matrix of 4 bits is faster than one that dequantizes the matrix, whatever the number of tokens.
    """
    layers = core.moe_layers(graph.network).values()
    fits = any(misfit(layer) is None for layer in layers) if _goes_by_step(graph) else any(map(goes_by_blocks, layers))
    return "contrib" if fits else "standard"


def _goes_by_step(graph: Graph) -> bool:
    """Return whether a graph continues from a past step by step, as decoders do."""
    return any("past" in axes.values() for axes in graph.dynamic.values())


def _check_fits(graph: Graph) -> None:
    """Raise a ``ValueError`` if onnxruntime's operators fit none of the layers, with the reason of each."""
    reasons = {name: misfit(layer) for name, layer in core.moe_layers(graph.network).items()}
    if None not in reasons.values():
        listed = "; ".join(f"layer {name!r}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"form contrib fits no layer of graph {graph.name!r}: {listed or 'it has no MoE layer'}")


def _refusal(graph: Graph, program: torch.export.ExportedProgram, error: BaseException) -> str:
    """Return one line that names the operator without a form in ONNX, and the layer that has it."""
    texts = [str(e) for e in _causes(error)]
    operator = next((m.group(1) for text in texts if (m := re.search(r"OpOverload\(op='([^']+)'", text))), None)
    if operator is None:
        return f"graph {graph.name!r} cannot be written as ONNX: {texts[-1].splitlines()[0]}"
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    # torch may have broken an operator up on its way: aten.special_bessel_j0 becomes prims.bessel_j0.
    for part in (operator, operator.partition(".")[2]):
        node = next((node for node in calls if part in str(node.target)), None)
        if node is not None:
            return f"operator {node.target} of {layer_of(node)} has no form in ONNX"
    return f"operator {operator} of graph {graph.name!r} has no form in ONNX"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def layer_of(node: torch.fx.Node) -> str:
    """Return the dotted name of the module that a node of an exported program belongs to, and its class."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "the network"
    name, kind = list(stack.values())[-1]
    label = kind if isinstance(kind, str) else kind.__name__
    return f"layer {name or 'the network'!r} ({label.rpartition('.')[-1]})"


def _name_axes(model: Any, graph: Graph) -> None:
    """Give the axes of any length the names that the graph has for them, in inputs and outputs."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, meaning in graph.dynamic.get(value.name, {}).items():
            symbol = value.shape[axis]
            if isinstance(symbol, ir.SymbolicDim) and symbol.value is not None:
                names[str(symbol.value)] = meaning
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None:
            continue
        sizes = [
            re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m.group(), m.group()), str(d.value))
            if isinstance(d, ir.SymbolicDim) and d.value is not None
            else d
            for d in value.shape
        ]
        value.shape = ir.Shape(sizes)
