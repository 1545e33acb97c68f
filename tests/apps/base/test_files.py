"""Files that are written whole or not at all, held by one process, sealed by a digest, or unpacked."""

from __future__ import annotations

import gzip
import hashlib
import io

import pytest
from commands import full_disk

from apps.base.files import holding, replacing
from apps.base.inflate import Inflated, read_limited
from apps.base.sealed import DATA_KEY, KEY, check_seal, seal, weights_beside, weights_file


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")
    with full_disk(1000), pytest.raises(OSError, match=r"too large: '.*plan.json'"), replacing(path) as file:
        file.write("new" * 1000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_has_left_beside_a_file_goes_and_what_is_being_written_stays(tmp_path):
    path = tmp_path / "ladder.json"
    (tmp_path / ".ladder.json.0a1b2c3d.tmp").write_text("half")
    (tmp_path / ".ladder.json.mine.tmp").write_text("of a user")
    with replacing(path) as other:  # of a second process
        with replacing(path) as file:
            file.write("whole")
        other.write("later")
    assert path.read_text() == "later"
    assert {p.name for p in tmp_path.iterdir()} == {"ladder.json", ".ladder.json.mine.tmp"}


def test_a_lock_is_held_by_one_and_free_after_it(tmp_path):
    with (
        holding(tmp_path / ".lock", "held by none before"),
        pytest.raises(ValueError, match="it is busy"),
        holding(tmp_path / ".lock", "it is busy"),
    ):
        pass
    with holding(tmp_path / ".lock", "it is busy"):
        pass


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


def _zipped(data):
    """A stream that unpacks a gzip of ``data``, and the gzip's size."""
    packed = gzip.compress(data)
    return gzip.GzipFile(fileobj=io.BytesIO(packed)), len(packed)


def test_what_unpacks_to_little_or_within_the_limit_is_read_to_the_end():
    # Deflate shrinks zeros about 1,000 times.
    assert read_limited(*_zipped(bytes(1 << 20)), "zeros.gz") == bytes(1 << 20)
    data = bytes(range(256)) * 4096
    assert io.BufferedReader(Inflated(*_zipped(data), "x.gz", free=0, most=2000)).read() == data


def test_a_file_far_larger_than_it_explains_is_refused_while_it_is_read():
    stream = Inflated(*_zipped(bytes(10 << 20)), "zeros.gz", free=1 << 20, most=50)
    count = 0
    with pytest.raises(ValueError, match=r"^zeros\.gz is compressed over \d+ times .* at most 50 times is read"):
        while piece := stream.read(1 << 16):
            count += len(piece)
    # The limit is the larger of 1 MiB and 50 times some 10 KiB: far from the 10 MiB that the file holds.
    assert (1 << 20) - (1 << 16) <= count <= (1 << 20)
