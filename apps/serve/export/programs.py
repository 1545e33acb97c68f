"""``torch.export`` programs and AOTInductor packages of a network, which need nothing of this suite to run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from apps.train.publish.exporting import Graph
from apps.train.torch_internals import find_cpp_compiler

from .operators import plain, prepared

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
    """Raise a ``ValueError`` where an axis of any length may in truth not be longer than some bound.

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
    """Return one value for each input as torch.export takes them: those of ``*args`` are a tuple."""
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
    program = capture(graph, plain())
    torch.export.save(program, path)
    return path


def to_aoti(graph: Graph, path: Path) -> Path:
    """Write a package of machine code that ``torch._inductor.aoti_load_package`` runs, also from C++.

    It takes contiguous inputs, and does not look: others give wrong numbers, or an error where the environment has
    ``AOTI_RUNTIME_CHECK_INPUTS=1``.

    Args:
        graph: the network with its example inputs.
        path: the file, ``*.pt2``.

    Raises:
        ValueError: there is no C++ compiler; or as in ``capture``.
    """
    from torch._inductor import aoti_compile_and_package

    try:
        find_cpp_compiler()
    except Exception as error:
        raise ValueError(f"format aoti needs a C++ compiler such as g++, and there is none: {error}") from error
    aoti_compile_and_package(capture(graph, plain()), package_path=str(path))
    return path
