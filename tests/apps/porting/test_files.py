"""Files of a published checkpoint: shards, aliases, and those that cannot be read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import full_disk
from published_models import MODELS, checkpoint, same_weights, switch_model
from safetensors.torch import save_file
from torch import Tensor

from apps.porting import from_published, load_pretrained, to_published
from apps.porting.files import write_safetensors


def test_a_full_disk_names_the_file_and_leaves_the_earlier_one(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.zeros(3)})
    earlier = path.read_bytes()
    with full_disk(1000), pytest.raises(OSError, match=r"model.safetensors cannot be written: .*File too large"):
        write_safetensors(path, {"a": torch.zeros(3000)})
    assert path.read_bytes() == earlier
    assert [*tmp_path.iterdir()] == [path]


def test_shards_torch_files_and_aliases_are_read(tmp_path):
    tensors = checkpoint(tmp_path)
    whole, shared = load_pretrained(tmp_path), tensors["shared.weight"]
    left = {name: t for name, t in tensors.items() if name != "shared.weight"}
    for names in (("lm_head",), ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head", "shared")):
        save_file({**left, **{f"{n}.weight": shared.clone() for n in names}}, tmp_path / "model.safetensors")
        assert same_weights(load_pretrained(tmp_path), whole)
    (tmp_path / "model.safetensors").unlink()

    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert same_weights(load_pretrained(tmp_path), whole)
    (tmp_path / "pytorch_model.bin").unlink()

    names = sorted(tensors)
    halves = {"1": names[:7], "2": names[7:]}
    for kind, suffix, save in (("pytorch_model", "bin", torch.save), ("model", "safetensors", save_file)):
        for number, half in halves.items():
            save({name: tensors[name] for name in half}, tmp_path / f"{kind}-{number}.{suffix}")
        index = {name: f"{kind}-{number}.{suffix}" for number, half in halves.items() for name in half}
        (tmp_path / f"{kind}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
        assert same_weights(load_pretrained(tmp_path), whole)
        (tmp_path / f"{kind}.{suffix}.index.json").unlink()


def refusal(folder: Path, tensors: dict[str, Tensor] | None = None, config: dict[str, Any] | None = None) -> str:
    """Return the line that refuses a folder, called F, after its tensors and configuration are written."""
    if tensors is not None:
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(folder), "F")


def test_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = checkpoint(tmp_path)
    expert = "encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight"
    left = {name: tensor for name, tensor in tensors.items() if name != expert}
    assert refusal(tmp_path, left) == f"F: tensors that are missing: {expert}"
    narrow, more = {**left, expert: torch.zeros(127, 64)}, {f"lora.{name}": torch.zeros(1) for name in "ab"}
    assert refusal(tmp_path, narrow) == f"F: tensor {expert!r} is of shape (127, 64), not (128, 64)"
    assert refusal(tmp_path, tensors | more) == "F: tensors that have no place in this model: lora.a, lora.b"
    del tensors["shared.weight"]
    assert refusal(tmp_path, tensors) == "F: tensors that are missing: shared.weight"


def test_files_that_cannot_be_read(tmp_path):
    def message(**config: Any) -> str:
        return refusal(tmp_path, config=config or None)

    assert message() == "F/config.json is missing"
    assert message(model_type="t5") == "F/config.json says no vocab_size"
    assert message(model_type="bert", vocab_size=9).startswith("model_type='bert' is not one of t5, mt5, switch_")
    assert message(model_type="t5", vocab_size=9).startswith("F holds no weights: neither model.safetensors nor")
    assert message(model_type=["t5"]) == "F/config.json says model_type=['t5'], which is not a name"
    assert message(model_type="t5", vocab_size="abc") == "F/config.json says vocab_size='abc', which is not an integer"
    (tmp_path / "config.json").write_text("{")
    assert message().startswith("F/config.json cannot be read: Expecting property name")
    (tmp_path / "config.json").write_text("[]")
    assert message() == "F/config.json holds no JSON object"

    known = {"model_type": "t5", "vocab_size": 9, "num_layers": 2, "d_model": 8, "d_ff": 8, "num_heads": 2}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"shared.weight": "../secret.safetensors"}}))
    assert message(**known) == f"F/{index.name} names '../secret.safetensors', which is no file of its folder"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "1.safetensors", "shared.weight": "1.safetensors"}}))
    assert message(**known).startswith("config.json of a t5 says no d_kv")
    assert message(**known, d_kv=4).startswith("F/1.safetensors cannot be read: No such file")
    save_file({"lm_head.weight": torch.zeros(9, 8)}, tmp_path / "1.safetensors")
    assert message() == "F/1.safetensors does not hold tensor 'shared.weight', which the index says it does"
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    assert message().startswith("F/model.safetensors cannot be read: ")


def test_keys_that_are_missing_are_named_with_their_file(tmp_path):
    config, tensors = to_published(switch_model())
    for name in ("model_type", "vocab_size"):
        with pytest.raises(ValueError, match=f"^config.json says no {name}$"):
            from_published({key: value for key, value in config.items() if key != name}, tensors)
    # transformers 5 holds the experts of a layer in two tensors.
    config, tensors = to_published(MODELS["olmoe"]())
    up, down, gate = (f"model.layers.1.mlp.{n}" for n in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"))
    left = {name: t for name, t in tensors.items() if "layers.1.mlp.experts." not in name}
    left |= {up: torch.zeros(4, 48, 64), down: torch.zeros(3, 64, 24)}
    for name in (down, gate):
        without = {other: t for other, t in left.items() if other != name}
        assert refusal(tmp_path, without, config) == f"F: tensors that are missing: {name}"
    assert refusal(tmp_path, left).endswith("down_proj of (3, 64, 24) do not have the same number of experts")


class Sly:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this ran",))


def test_a_pickle_runs_no_code(tmp_path, capsys):
    config, _ = to_published(switch_model())
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "pytorch_model.bin"
    torch.save({"shared.weight": Sly()}, path)
    with pytest.raises(ValueError, match=r"pytorch_model.bin holds more than tensors, and is not read$"):
        load_pretrained(tmp_path)
    path.write_bytes(pickle.dumps(Sly(), protocol=2))
    with pytest.raises(ValueError, match=r"^[^\n]*pytorch_model.bin [^\n]*$"):
        load_pretrained(tmp_path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match=r"pytorch_model.bin holds no tensors by name$"):
        load_pretrained(tmp_path)
    assert capsys.readouterr().out == ""
