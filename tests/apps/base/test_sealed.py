"""Files that end in a digest of what stands before it."""

from __future__ import annotations

import hashlib

import pytest

from apps.base.sealed import DATA_KEY, KEY, check_seal, seal, weights_beside, weights_file


def test_a_sealed_file_is_still_a_model_whose_last_metadata_are_the_digests(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import helper

    path = tmp_path / "a.onnx"
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [], [])
    model = helper.make_model(graph)
    helper.set_model_props(model, {"first": "1"})
    path.write_bytes(model.SerializeToString())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    seal(path)
    assert check_seal(path) == digest
    assert weights_beside(path) is None
    props = [(entry.key, entry.value) for entry in onnx.load(path).metadata_props]
    assert props == [("first", "1"), (KEY, digest)]
    path.write_bytes(model.SerializeToString())
    weights_file(path).write_bytes(b"abc")
    seal(path)
    props = [(entry.key, entry.value) for entry in onnx.load(path, load_external_data=False).metadata_props]
    of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert props == [("first", "1"), (DATA_KEY, of_abc), (KEY, check_seal(path))]
    assert weights_beside(path) == weights_file(path)


def test_a_file_that_is_cut_or_changed_is_refused(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(bytes(range(200)))
    seal(path)
    whole = path.read_bytes()
    for damaged, message in (
        (whole[:-1], "is cut, or moesaic export has not written it"),
        (bytes(200), "is cut, or moesaic export has not written it"),
        (b"", "is cut, or moesaic export has not written it"),
        (whole[:7] + b"\xff" + whole[8:], "is damaged"),
        (whole[:-1] + b"x", "is damaged"),
        (whole[100:], "is damaged"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            check_seal(path)
