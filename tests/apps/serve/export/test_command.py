"""``moesaic export`` and ``moesaic predict --onnx`` of an image classifier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from commands import fails
from converted import DIGITS, MOE, classifier, write_run
from doc_scripts import output, script
from PIL import ExifTags, Image

from apps import registry
from apps.base.sealed import seal, weights_file
from apps.cli import main
from apps.serve.export.command import _by_position, compare, data_section, write
from apps.train.checkpoint.loading import load
from apps.train.publish.exported import Description, ExportedModel
from apps.train.publish.exporting import Exported, Graph
from apps.vision.data import VisionData

SCRIPTS = "docs/reference/onnx_scripts.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a sparse classifier of digits, and its export ``digits.onnx`` in the same folder."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    module = classifier(MOE)
    module._encoding = VisionData("digits").encoding_state
    write_run(folder, module, {**DIGITS, "init_args": {**DIGITS["init_args"], "root": "/a/b", "val_size": 9}})
    assert main(["export", "--ckpt_path", str(folder), "--output", str(folder / "digits.onnx")]) == 0
    return folder


@pytest.fixture
def copies(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an export copy the graph of ``run``, which takes no time."""

    def to_onnx(graph: Graph, path: Path, form: str, metadata: dict[str, str]) -> None:
        model = onnx.load(run / "digits.onnx")
        onnx.helper.set_model_props(model, metadata)
        onnx.save(model, path)

    monkeypatch.setattr("apps.serve.export.onnx.to_onnx", to_onnx)


def test_the_rows_of_predict_are_those_of_the_checkpoint(run, tmp_path, capsys):
    config = tmp_path / "digits.yaml"  # the run's configuration has another root, which does not travel
    config.write_text(json.dumps({"data": DIGITS}))
    written = []
    for source in (["--onnx", str(run / "digits.onnx")], ["--ckpt_path", str(run), "--config", str(config)]):
        assert main(["predict", *source, "--output", str(tmp_path / "rows.jsonl")]) == 0
        written.append([json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()])
        (tmp_path / "rows.jsonl").unlink()
        assert "359 predictions in" in capsys.readouterr().out
    for own, expected in zip(*written, strict=True):
        assert own.pop("probability") == pytest.approx(expected.pop("probability"), abs=1e-6)
        assert own == expected


def test_the_file_alone_makes_the_module_and_its_answers(run):
    exported = ExportedModel.read(run / "digits.onnx")
    assert exported.description.data == {
        "class_path": "VisionData", "init_args": {"dataset": "digits", "batch_size": 32, "eval_batch_size": 32,
                                                  "val_size": 9},
    }  # fmt: skip
    model, trained = exported.load(), load(run)
    images = [(torch.rand(8, 8) * 255).byte().numpy() for _ in range(3)]
    for own, expected in zip(model.predict(images), trained.predict(images), strict=True):
        assert own.class_name == expected.class_name
        assert own.top == pytest.approx(expected.top, abs=2e-6)
    assert not list(model.parameters())
    assert not model.training
    assert "root" not in data_section(run)["init_args"]  # paths of the training do not travel
    with pytest.raises(ValueError, match="a Linear has no export"):
        registry.exported_task(torch.nn.Linear)


@pytest.mark.parametrize("kind", ["turned, 16 bits", "side 49"])
def test_the_documented_script_says_what_the_checkpoint_says(run, tmp_path, kind):
    path, turned = tmp_path / "three.png", Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    if kind == "side 49":  # in floating point, 49 * (8 / 49) is below 8
        Image.new("L", (60, 49), 255).save(path)
    else:
        noise = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(noise.astype(np.uint16) << 8).save(path, exif=turned)
    printed = output(script(SCRIPTS, "classify.py"), str(run / "digits.onnx"), str(path))
    (expected,) = load(run).predict([path])
    lines = [line.split() for line in printed.splitlines()]
    assert [label for label, _ in lines] == list(expected.top)
    assert [float(share) for _, share in lines] == pytest.approx(list(expected.top.values()), abs=2e-6)


@pytest.mark.parametrize("call", ["match.py", "python caption.py"])
def test_the_documented_scripts_read_images_alike(call):
    own, expected = (
        code.replace("encoding[", "given[").partition("ImageOps.exif_transpose")[2].partition("np.float32)")[0]
        for code in (script(SCRIPTS, call), script(SCRIPTS, "classify.py"))
    )
    assert own == expected != ""


def test_an_output_that_exists_stays_and_overwrite_replaces_it_a_folder_too(run, copies, tmp_path, capsys):
    path, folder, foreign = tmp_path / "m.onnx", tmp_path / "model", tmp_path / "foreign"

    def names(of: Path) -> list[str]:
        return sorted(p.name for p in of.iterdir())

    export = ["export", "--ckpt_path", str(run), "--output"]
    path.write_text("mine")
    assert "exists: --overwrite replaces it" in fails(capsys, 2, *export, str(path))
    assert path.read_text() == "mine"
    assert main([*export, str(path), "--overwrite"]) == 0
    assert ExportedModel.read(path).description.app == "vision"
    assert main([*export, str(folder)]) == 0
    assert names(folder) == ["export.json", "model.onnx"]
    assert ExportedModel.read(folder).load().predict([torch.zeros(8, 8).byte().numpy()])
    assert "give the folder" in fails(capsys, 1, "predict", "--onnx", str(folder / "model.onnx"))
    (folder / "other").write_text("x")
    assert main([*export, str(folder), "--overwrite"]) == 0
    assert names(folder) == ["export.json", "model.onnx"]
    foreign.mkdir()
    (foreign / "mine").write_text("x")
    assert "is a folder without export.json" in fails(capsys, 2, *export, str(foreign), "--overwrite")
    assert names(tmp_path) == ["foreign", "m.onnx", "model"]


def test_wrong_options_are_refused_in_a_line(run, tmp_path, capsys):
    export, onnx_file = ["export", "--ckpt_path", str(run), "--output"], str(run / "digits.onnx")
    for code, argv, message in (
        (2, [*export, "a.pt2"], "must end in .onnx"),
        (2, [*export, "a.onnx", "--format", "aoti"], "must end in .pt2"),
        (2, [*export, "a.pt2", "--format", "aoti", "--onnx_ops", "contrib"], "--onnx_ops contrib is of --format onnx"),
        (2, [*export, "a.onnx", "--quantize", "int5"], "quantize=int5 is not one of int8"),
        (2, ["test", "--onnx", onnx_file], "onnx is an option of predict, not of test"),
        (2, ["predict", "--onnx", onnx_file, "--ckpt_path", str(run)], "leave --ckpt_path"),
        (1, ["predict", "--onnx", str(tmp_path / "none.onnx")], "no exported model"),
    ):
        assert message in fails(capsys, code, *argv)


def test_files_of_others_and_damaged_ones_are_refused(run, tmp_path, capsys):
    def refusal(path: Path, content: bytes) -> str:
        path.write_bytes(content)
        return fails(capsys, 1, "predict", "--onnx", str(path.parent if path.name == "export.json" else path))

    whole = (run / "digits.onnx").read_bytes()
    for content, message in ((whole[:-9], "is cut"), (b"", "is cut"), (whole[:900] + b"\0" + whole[901:], "damaged")):
        assert message in refusal(tmp_path / "bad.onnx", content)
    assert "runs that of onnx" in refusal(tmp_path / "bad.pt2", whole)
    assert "holds no export.json" in fails(capsys, 1, "predict", "--onnx", str(tmp_path))
    of_others = b'{"app": 1, "module": 2, "arguments": {}, "preprocessing": {}}'
    for content in (b"{", b"[]", b'{"app": "vision"}', of_others):
        assert "is not a model that moesaic export has written" in refusal(tmp_path / "export.json", content)


def test_a_file_imports_nothing_and_reads_nothing_elsewhere(run, tmp_path, capsys):
    description = ExportedModel.read(run / "digits.onnx").description
    manifest = tmp_path / "export.json"

    def refusal(**changed: object) -> str:
        manifest.write_text(Description(**{**vars(description), **changed}).to_json())
        return fails(capsys, 1, "predict", "--onnx", str(tmp_path))

    assert "a checkpoint imports nothing" in refusal(module="antigravity.Model")
    assert "names '../digits.onnx', which is no file beside it" in refusal(graphs={"model": "../digits.onnx"})
    assert "names '/etc/passwd'" in refusal(files=["/etc/passwd"])
    assert "data='os.system' is neither" in refusal(data={"class_path": "os.system", "init_args": {}})


def test_a_graph_or_program_that_differs_is_no_export():
    class Twice(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    graph = Graph("model", Twice(), {"x": torch.ones(2, 3)}, ("y",), {"x": {0: "batch"}})
    compare(graph, lambda inputs: (2 * inputs["x"],))
    compare(graph, _by_position(lambda x: 2 * x))
    for differs in (
        lambda inputs: (2.001 * inputs["x"],),
        lambda inputs: (2 * torch.ones(2, 3),),  # the batch is not dynamic
        _by_position(lambda x: (2.002 * x,)),
    ):
        with pytest.raises(ValueError, match="gives another y than the model"):
            compare(graph, differs)


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
