"""What ``moesaic export`` writes: a file, or a folder of several, whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from apps.base.files import delete, naming, temporary_path
from apps.base.sealed import weights_beside
from apps.cli.errors import UsageError
from apps.serve.export.options import ENDINGS
from apps.train.publish.exported import MANIFEST, Description
from apps.train.publish.exporting import Exported, Graph

Write = Callable[[Graph, Path, str], None]
"""Writes a graph to a file, with a JSON text in its metadata where the format has any."""


def check_output(output: Path, exported: Exported) -> None:
    """Refuse a file for a model that needs a folder, and a folder that is not an earlier export.

    Raises:
        UsageError: naming what the model has.
    """
    if output.suffix and is_folder(exported):
        graphs = ", ".join(graph.name for graph in exported.graphs)
        beside = "".join(f", {name}" for name in exported.files)
        raise UsageError(f"--output {output} is one file, and this model has {graphs}{beside}: give a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise UsageError(f"--output {output} is a folder without {MANIFEST}, which moesaic export has not written")


def is_folder(exported: Exported) -> bool:
    """Return whether a model is a folder, and no single file: it has several graphs, or files beside its graph."""
    return len(exported.graphs) > 1 or bool(exported.files)


def write(output: Path, exported: Exported, description: Description, write_graph: Write) -> list[Path]:
    """Write a model, and return its files.

    Args:
        output: a file where it has an ending, else a folder.
        exported: the model.
        description: what the file says of it; its graphs and files are added here.
        write_graph: writes one graph.

    Raises:
        OSError: the output cannot be written; what was there before stays.
    """
    ending = ENDINGS[description.format]
    with naming(output), _beside(output) as folder:
        if output.suffix:
            text, replaced = description.to_json(), weights_beside(output) if output.is_file() else None
            write_graph(exported.graphs[0], folder / output.name, text)
            if description.format != "onnx":
                (folder / f"{output.name}.json").write_text(text, encoding="utf-8")
            names = sorted(path.name for path in folder.iterdir())
            # The file itself is the last one: where it is new, the others are there.
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
        _put(folder, output)
        return [output / name for name in names]


@contextlib.contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """Make an empty folder beside ``output``, and remove it in the end."""
    folder = temporary_path(output)
    delete(folder)  # a kill has left it
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            delete(folder)


def _put(folder: Path, output: Path) -> None:
    """Move ``folder`` to ``output``, in place of an earlier export."""
    earlier = output.with_name(f".{output.name}.earlier")
    delete(earlier)
    if output.exists():
        output.rename(earlier)
    try:
        folder.rename(output)
    except OSError:
        if earlier.exists():
            earlier.rename(output)
        raise
    delete(earlier)
