"""Files of an export, put in the place of earlier ones."""

from __future__ import annotations

from typing import Any

from apps.base.sealed import seal, weights_file
from apps.serve.export.command import write
from apps.train.publish.exported import Description
from apps.train.publish.exporting import Exported


def test_the_weights_of_an_earlier_export_go_with_it_and_no_others(tmp_path):
    path = tmp_path / "a.onnx"
    graphs: Any = (None,)
    exported = Exported("vision", graphs, {})
    description = Description("vision", "M", {}, {})

    def write_graph(graph: Any, file: Any, text: str, weights: bytes = b"") -> None:
        file.write_text("graph")
        if weights:
            weights_file(file).write_bytes(weights)
        seal(file)

    write(path, exported, description, lambda *args: write_graph(*args, weights=b"1"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    write(path, exported, description, write_graph)
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    weights_file(path).write_bytes(b"a file of someone else's")
    write(path, exported, description, write_graph)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
