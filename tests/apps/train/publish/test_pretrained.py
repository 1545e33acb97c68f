"""Pretrained folders hold plain values and tensors, are written whole, and are refused where they are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apps.train.checkpoint.contents import read_checkpoint
from apps.train.checkpoint.paths import find_checkpoint, is_pretrained
from apps.train.publish import pretrained


def write(folder: Path, contents=None, state=None) -> Path:
    with pretrained.new_folder(folder, overwrite=False) as temporary:
        pretrained.write(temporary, {**(contents or {}), "state_dict": state or {"w": torch.arange(3.0)}})
    return folder


def test_plain_values_and_tensors_return_as_they_were(tmp_path):
    contents = {
        "numbers": [1, 2.5, 0.1 + 0.2, -0.0, True, None, "ä"],
        "tuple": ((1, 2), [3], ()),
        "bytes": b"\x00\xff",
        "not finite": [float("inf"), float("-inf")],
        "keys": {0: "a", 1.5: "b", (1, 2): "c", None: "d"},
        "marks": {"$tensor": "a text", "$more": {"$pairs": 1}},
        "one mark": [{"$tuple": [1]}, {"$tensor": {"$bytes": "x"}}],
        "vocabulary": {"content": torch.tensor([3, 1, 2]), "offsets": (torch.zeros(0, dtype=torch.int32),)},
    }
    written = read_checkpoint(write(tmp_path / "folder", contents))
    for key, value in contents.items():
        if key != "vocabulary":
            assert written[key] == value
            assert repr(written[key]) == repr(value)  # a tuple is no list, -0.0 is no 0.0
    words = written["vocabulary"]
    assert words["content"].tolist() == [3, 1, 2]
    assert words["offsets"][0].dtype == torch.int32
    assert isinstance(words["offsets"], tuple)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        "config.json", "encoding.safetensors", "model.safetensors",
    ]  # fmt: skip


def test_the_weights_are_the_state_dict_and_nothing_else(tmp_path):
    own = torch.arange(6.0).reshape(2, 3)
    state = {"w": own, "tied": own, "turned": own.T, "row": own[1], "count": torch.tensor(3), "extra": {"steps": (1,)}}
    folder = write(tmp_path / "folder", state=state)
    weights = load_file(folder / "model.safetensors")
    assert sorted(weights) == ["count", "row", "turned", "w"]
    read = read_checkpoint(folder)["state_dict"]
    assert read["extra"] == {"steps": (1,)}
    assert read["tied"].tolist() == own.tolist()
    for name in weights:
        assert read[name].dtype == state[name].dtype
        assert torch.equal(read[name], state[name])
    assert json.loads((folder / "config.json").read_text())["shared_tensors"] == {"tied": "w"}


@pytest.mark.parametrize(
    "contents, state, reason",
    [
        ({"a": {"b": object()}}, None, r"a\.b is a object: a pretrained folder keeps plain values and tensors"),
        ({}, {"w": torch.empty(2, device="meta")}, "w has a shape and no values"),
    ],
)
def test_what_cannot_be_kept_leaves_nothing(tmp_path, contents, state, reason):
    with pytest.raises(ValueError, match=reason):
        write(tmp_path / "folder", contents, state)
    assert list(tmp_path.iterdir()) == []


def test_other_folders_stay_as_they_are(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert"}')
    for overwrite in (False, True):
        with (
            pytest.raises(ValueError, match=r"foreign holds config\.json, and save_pretrained has not made it"),
            pretrained.new_folder(foreign, overwrite),
        ):
            raise AssertionError
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"), pretrained.new_folder(tmp_path / "file", True):
        raise AssertionError
    assert (foreign / "config.json").read_text() == '{"model_type": "bert"}'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "foreign"]


def test_an_earlier_model_is_replaced_on_demand_and_as_a_whole(tmp_path):
    folder = write(tmp_path / "folder")
    (folder / "README.md").write_text("my card")
    with pytest.raises(ValueError, match="folder holds a model: it stays as it is"):
        write(folder)
    assert (folder / "README.md").exists()
    with pytest.raises(KeyError), pretrained.new_folder(folder, overwrite=True) as temporary:
        pretrained.write(temporary, {"state_dict": {}})
        raise KeyError  # a kill half-way
    assert (folder / "README.md").read_text() == "my card"
    with pretrained.new_folder(folder, overwrite=True) as temporary:
        pretrained.write(temporary, {"state_dict": {"v": torch.ones(1)}})
    assert list(read_checkpoint(folder)["state_dict"]) == ["v"]
    assert list(tmp_path.iterdir()) == [folder]


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def changed(**values):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


@pytest.mark.parametrize(
    "damage, reason",
    [
        (cut, r"model\.safetensors cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors cannot be read: No such file"),
        (lambda f: (f / "config.json").write_text('{"format": '), r"config\.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), r"config\.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json holds no JSON object"),
        (lambda f: (f / "config.json").write_text("{}"), r"config\.json is of no model that save_pretrained wrote"),
        (changed(format_version=2), r"format_version=2, and this version of the suite reads 1"),
        (changed(shared_tensors=[]), "it has no shared_tensors"),
        (changed(shared_tensors={"v": "u"}), r"config\.json is damaged: KeyError: 'u'"),
        (changed(model={"encoding": {"$tensor": "words"}}), r"config\.json is damaged: KeyError: 'words'"),
        (changed(model=[]), r"config\.json is damaged"),
        (changed(model={"other_state": {}, "x": {"$bytes": "?"}}), r"config\.json is damaged"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(tmp_path, damage, reason):
    folder = write(tmp_path / "folder")
    damage(folder)
    with pytest.raises(ValueError, match=reason) as error:
        read_checkpoint(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_a_folder_is_a_checkpoint_by_its_path(tmp_path):
    folder = write(tmp_path / "run" / "folder")
    assert is_pretrained(folder)
    assert find_checkpoint(folder) == folder
    assert not is_pretrained(folder.parent)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "best.ckpt").touch()  # a run's folder, in which a stray file lies
    assert find_checkpoint(folder) == folder / "checkpoints" / "best.ckpt"
