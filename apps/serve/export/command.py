"""The command ``moesaic export``: load a model, write its graphs, compare them with it, and say which files were
written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps import registry
from apps.base.files import delete, folder_beside, naming, put_folder
from apps.base.messages import some
from apps.base.quiet import quiet
from apps.base.sealed import seal, weights_beside
from apps.cli.configs import read_config
from apps.cli.errors import UsageError
from apps.registry import name_of
from apps.serve.export.options import ENDINGS, ExportOptions
from apps.train.checkpoint.contents import FOR_TRAINING
from apps.train.checkpoint.loading import check_beside, load
from apps.train.checkpoint.paths import find_checkpoint
from apps.train.cost.quantizing import quantize_model
from apps.train.publish.exported import DESCRIPTION, MANIFEST, Description, OnnxGraph
from apps.train.publish.exporting import Exported, Graph
from apps.train.step.module import SparseModule

Write = Callable[[Graph, Path, str], None]
"""Writes a graph to a file, with a JSON text in its metadata where the format has any."""


def check_output(output: Path, exported: Exported) -> None:
    """Reject a file for a model that needs a folder, and a folder that is not an earlier export.

    Raises:
        UsageError: naming the graphs that the model has.
    """
    if output.suffix and (len(exported.graphs) > 1 or exported.files):
        graphs = ", ".join(graph.name for graph in exported.graphs)
        beside = "".join(f", {name}" for name in exported.files)
        raise UsageError(f"--output {output} is one file, and this model has {graphs}{beside}: give a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise UsageError(f"--output {output} is a folder without {MANIFEST}, which moesaic export has not written")


def write(output: Path, exported: Exported, description: Description, write_graph: Write) -> list[Path]:
    """Write a model, and return its files.

    Args:
        output: a file if it has an ending, else a folder.
        exported: the model.
        description: its description in the file; its graphs and files are added here.
        write_graph: writes one graph.

    Raises:
        OSError: the output cannot be written; earlier files stay.
    """
    ending = ENDINGS[description.format]
    with naming(output), folder_beside(output) as folder:
        if output.suffix:
            text, replaced = description.to_json(), weights_beside(output) if output.is_file() else None
            write_graph(exported.graphs[0], folder / output.name, text)
            if description.format != "onnx":
                (folder / f"{output.name}.json").write_text(text, encoding="utf-8")
            names = sorted(path.name for path in folder.iterdir())
            # The file itself is the last one: if it is new, the others are there.
            for name in sorted(names, key=lambda name: name == output.name):
                os.replace(folder / name, output.parent / name)
            if replaced is not None and replaced.name not in names:
                delete(replaced)
            return [output.parent / name for name in names]
        graphs = {graph.name: f"{graph.name}{ending}" for graph in exported.graphs}
        description = replace(description, graphs=graphs, files=tuple(exported.files))
        for graph in exported.graphs:
            write_graph(graph, folder / graphs[graph.name], "")
        for name, content in exported.files.items():
            (folder / name).write_bytes(content)
        (folder / MANIFEST).write_text(description.to_json(indent=1) + "\n", encoding="utf-8")
        names = sorted(path.name for path in folder.iterdir())
        put_folder(folder, output)
        return [output / name for name in names]


TOLERANCE = 1e-4
"""Largest difference of a graph's outputs from the model's, relative to the largest of them."""
_FOR_TRAINING = (*FOR_TRAINING, "pretrained", "blend")
"""Arguments of a model that a graph does not need, or that name files of the training's machine."""
_PATHS = ("root", "cache_dir", "file", "images", "index", "predict_folder", "rank", "table")
"""Options of the apps' data that are paths, beside those that end in _file and _files."""


def run(options: ExportOptions) -> int:
    """Export the model and print the written files."""
    with quiet():
        checkpoint = find_checkpoint(options.ckpt_path)
        model = load(checkpoint)
        if options.quantize is not None:
            quantize_model(model, options.quantize)
        exported = registry.exported_task(type(model))(model).exported()
        check_output(options.output, exported)
        files = export(model, exported, options)
    print(f"checkpoint: {checkpoint}")
    for path in files:
        print(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
    for graph in exported.graphs:
        inputs = [f"{name} {_shape(value, graph.dynamic.get(name, {}))}" for name, value in graph.inputs.items()]
        print(f"{graph.name}: {some(inputs)} -> {some(graph.outputs)}")
    if exported.note:
        print(exported.note)
    if options.format == "onnx" and exported.app != "own":
        print(f"moesaic predict --onnx {options.output} runs it, docs/reference/onnx_scripts.md without this suite")
    return 0


def export(model: SparseModule, exported: Exported, options: ExportOptions) -> list[Path]:
    """Write a model, and return its files.

    Raises:
        OSError: the output cannot be written.
        ValueError: an operator has no export, or a graph's outputs are not the model's. Nothing is written.
    """
    description = describe(model, exported, data_section(options.ckpt_path), options.format)

    def write_graph(graph: Graph, path: Path, text: str) -> None:
        from apps.serve.export.programs import to_aoti, to_torch_export

        if options.format == "onnx":
            from apps.serve.export.onnx import to_onnx

            to_onnx(graph, path, form=options.onnx_ops, metadata={"moesaic.app": exported.app, DESCRIPTION: text})
            seal(path)
            compare(graph, OnnxGraph(path))
        elif options.format == "torch_export":
            compare(graph, _by_position(torch.export.load(to_torch_export(graph, path)).module()))
        else:
            compare(graph, _by_position(torch._inductor.aoti_load_package(str(to_aoti(graph, path)))))

    with torch.inference_mode(False), torch.no_grad():
        return write(options.output, exported, description, write_graph)


def describe(
    model: SparseModule, exported: Exported, data: Mapping[str, Any] | None = None, format: str = "onnx"
) -> Description:
    """Return the description of a model for its file, without its graphs and files."""
    arguments = {name: None if name in _FOR_TRAINING else value for name, value in dict(model.hparams).items()}
    scalars = {
        name: value.item() for name, value in (*model.named_parameters(), *model.named_buffers()) if value.numel() == 1
    }
    kind = name_of(type(model))
    return Description(exported.app, kind, arguments, exported.preprocessing, data, format, scalars=scalars)


def _by_position(run: Callable[..., Any]) -> Callable[[Mapping[str, Tensor]], Sequence[Tensor]]:
    """Return a program that takes its inputs by name and always returns several outputs."""

    def named(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        outputs = run(*inputs.values())
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    return named


def compare(graph: Graph, exported: Callable[[Mapping[str, Tensor]], Sequence[Tensor]]) -> None:
    """Run a graph on its example, and on the first row of it, and compare with the network.

    Raises:
        ValueError: the outputs differ.
    """
    whole = dict(graph.inputs)
    batch = {name: axes[0] for name, axes in graph.dynamic.items() if 0 in axes}
    one = {name: value[:1] if name in batch else value for name, value in whole.items()}
    for inputs in (whole, one):
        expected = graph.network(*inputs.values())
        expected = (expected,) if isinstance(expected, Tensor) else tuple(expected)
        for name, own, other in zip(graph.outputs, exported(inputs), expected, strict=True):
            distance = difference(own, other)
            if not distance <= TOLERANCE:
                raise ValueError(
                    f"the graph {graph.name} gives another {name} than the model: they differ by {distance:.2g} of "
                    f"the largest, and may by {TOLERANCE}"
                )


def difference(own: Tensor, other: Tensor) -> float:
    """Return the largest difference of two outputs relative to the largest finite number; inf where shapes differ."""
    if own.shape != other.shape:
        return float("inf")
    own, other = own.double(), other.double()
    finite = other.isfinite()
    if not torch.equal(own[~finite], other[~finite]):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = max(float(other[finite].abs().max()), 1e-6)
    return float((own - other)[finite].abs().max()) / scale


def data_section(run: Path) -> dict[str, Any] | None:
    """Return the section "data" of the configuration that lies next to a checkpoint, without paths of its machine.

    Raises:
        ValueError: the configuration names classes that are not registered.
    """
    path = find_checkpoint(run).parent.parent / "config.yaml"
    if not path.is_file():
        return None
    config = read_config(path)
    check_beside(config, path)
    data = config.get("data")
    if not isinstance(data, Mapping):
        return None
    arguments = {name: value for name, value in (data.get("init_args") or {}).items() if not _is_path(name, value)}
    return {"class_path": name_of(data["class_path"]), "init_args": arguments}


def _is_path(name: str, value: Any) -> bool:
    return isinstance(value, str) and (name in _PATHS or name.endswith(("_file", "_files")))


def _shape(value: Tensor, dynamic: Mapping[int, str]) -> str:
    sizes = ", ".join(dynamic.get(axis, str(size)) for axis, size in enumerate(value.shape))
    return f"{str(value.dtype).removeprefix('torch.')} ({sizes})"
