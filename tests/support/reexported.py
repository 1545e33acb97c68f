"""A model that runs its own graphs, as ``predict --onnx`` makes it from a folder of ``moesaic export``."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch_graphs import TorchGraph, folder_of

from apps import registry
from apps.serve.export.command import describe
from apps.train.publish.exported import Description, ExportedModel
from apps.train.publish.exporting import Exported
from apps.train.step.module import SparseModule


def reexported(model: SparseModule, folder: Path) -> tuple[Any, Exported]:
    """Return the model that is made of an export alone, and the export; torch runs the graphs."""
    exported = registry.exported_task(type(model))(model).exported()
    folder_of(exported, folder)
    said = replace(describe(model, exported), files=tuple(exported.files))
    graphs: Any = {graph.name: TorchGraph(graph) for graph in exported.graphs}
    return ExportedModel(folder, Description.from_json(said.to_json(), folder), graphs).load(), exported


def assert_alike(printed: str, expected: list[str]) -> None:
    """Compare lines of words and numbers such as "a=0.123456 b 0.5": numbers may differ in their last digit."""
    lines = [re.split(r"[ =]", line) for line in printed.splitlines()]
    assert len(lines) == len(expected)
    for own, line in zip(lines, expected, strict=True):
        words = re.split(r"[ =]", line)
        assert len(own) == len(words)
        for word, right in zip(own, words, strict=True):
            if "." in right:
                assert float(word) == pytest.approx(float(right), abs=2e-6)
            else:
                assert word == right
