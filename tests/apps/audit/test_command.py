"""``moesaic audit`` on small folders with one planted fault each: what it names, its exit codes, and bad input."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from commands import fails
from safetensors.torch import load_file, save_file

import core
from apps.cli import main

E, D, F, LAYERS = 8, 32, 24, 3
CONFIG = {"model_type": "mixtral", "num_local_experts": E, "num_experts_per_tok": 2, "hidden_size": D,
          "intermediate_size": F, "num_hidden_layers": LAYERS, "initializer_range": 0.02,
          "tie_word_embeddings": True}  # fmt: skip
MOE = "model.layers.1.block_sparse_moe."


def trained(*shape):
    """Return a matrix of no initialization's standard deviation."""
    return torch.randn(*shape) * 0.06 * float(torch.empty(1).uniform_(0.9, 1.1))


def mixtral():
    """Return the tensors of a small decoder with a selection bias, by published names."""
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": trained(50, D)}
    for layer in range(LAYERS):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = trained(D, D)
        block = f"model.layers.{layer}.block_sparse_moe."
        tensors[f"{block}gate.weight"] = trained(E, D)
        tensors[f"{block}e_score_correction_bias"] = torch.rand(E) * 0.1
        for e in range(E):
            for name, shape in {"w1": (F, D), "w2": (D, F), "w3": (F, D)}.items():
                tensors[f"{block}experts.{e}.{name}.weight"] = trained(*shape)
    return tensors


def stacked():
    """Return the tensors of a small decoder whose experts are stacked."""
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": trained(50, D)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.mlp."
        tensors[f"{block}router.weight"] = trained(E, D)
        for name, shape in {"gate_up": (D, 2 * F), "down": (F, D)}.items():
            tensors[f"{block}experts.{name}_proj"] = torch.stack([trained(*shape) for _ in range(E)])
    return tensors


def write(folder, tensors, config=CONFIG):
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def audit(capsys, path, *argv):
    """Return the exit code, and the findings as (name, tensors)."""
    capsys.readouterr()
    code = main(["audit", str(path), *argv])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("sound: " if code == 0 else f"{len(lines) - 1} finding")
    return code, {line.split(": ")[1]: line.split(": ")[0] for line in lines[:-1]}


def change(name, value):
    return lambda tensors: tensors.update({name: value(tensors[name]) if callable(value) else value})


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def remove(start):
    return lambda tensors: [tensors.pop(name) for name in [*tensors] if name.startswith(start)]


def expert(new):
    """Exchange the matrices of expert 5 by what ``new`` makes of those of expert 2."""
    names = [f"{MOE}experts.{{}}.{matrix}.weight" for matrix in ("w1", "w2", "w3")]
    return lambda tensors: tensors.update({n.format(5): new(tensors[n.format(2)]) for n in names})


def row(e, value):
    def plant(tensors):
        tensors[f"{MOE}gate.weight"][e] = value(tensors[f"{MOE}gate.weight"]) if callable(value) else value

    return plant


def entry(value):
    return lambda t: t.index_put((torch.tensor(3),), torch.tensor(value))


def quantize(*left_out, scale=".weight_scale_inv", lacks=None):
    """Make the experts float8, with a scale each but for one that it ``lacks``."""

    def plant(tensors):
        for name in [name for name in tensors if ".experts." in name and name not in left_out]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", scale)] = torch.ones(1, 1)
        tensors.pop(lacks, None)

    return plant


EXPERT, BIAS, ROW = (f"{MOE}{name}" for name in ("experts.5.", "e_score_correction_bias", "gate.weight"))
W1 = f"{EXPERT}w1.weight"
FAULTS = {
    "an expert that no file holds": (remove(EXPERT), "missing tensor", f"{EXPERT}w1.weight"),
    "a matrix that no file holds": (remove(W1), "missing tensor", W1),
    "the last expert": (remove(f"{MOE}experts.7."), "missing tensor", f"{MOE}experts.7.w1.weight"),
    "a layer without experts": (remove(f"{MOE}experts"), "missing tensor", f"{MOE}experts.0.w1.weight"),
    "a layer without anything": (remove("model.layers.1.block"), "missing tensor", f"{MOE}experts.0.w1.weight"),
    "the last layer": (remove("model.layers.2."), "missing tensor", "model.layers.2.block_sparse_moe.experts.0.w1"),
    "a suffix": (rename(W1, f"{W1}_orig"), "skipped tensor", f"{W1}_orig"),
    "a prefix": (rename(W1, f"module.{W1}"), "skipped tensor", f"module.{W1}"),
    "no prefix": (rename(W1, W1.removeprefix("model.")), "skipped tensor", W1.removeprefix("model.")),
    "a word": (rename(W1, W1.replace("experts", "expert")), "skipped tensor", W1.replace("experts", "expert")),
    "an expert too many": (change(W1.replace("5", "8"), trained(F, D)), "skipped tensor", W1.replace("5", "8")),
    "a shape": (change(W1, lambda t: t[:-1]), "wrong shape", W1),
    "an untrained expert": (expert(lambda t: torch.randn(t.shape) * 0.02), "untrained", W1),
    "equal experts": (expert(torch.clone), "equal experts", f"{MOE}experts.2.w1.weight, {W1}"),
    "zeros": (change(W1, torch.zeros_like), "constant", W1),
    "NaN": (change(W1, lambda t: t.index_put((torch.tensor(0),), torch.tensor(float("nan")))), "not finite", W1),
    "infinity": (change(W1, lambda t: t.clone().index_fill_(0, torch.tensor(3), float("inf"))), "not finite", W1),
    "a scale": (change(W1, lambda t: t * 100), "other scale", W1),
    "a zero row": (row(3, 0.0), "constant", f"{ROW}[3]"),
    "a short row": (row(3, lambda t: t[3] * 1e-3), "other scale", f"{ROW}[3]"),
    "a row of NaN": (row(3, float("nan")), "not finite", f"{ROW}[3]"),
    "equal rows": (row(3, lambda t: t[1]), "equal experts", f"{ROW}[1], {ROW}[3]"),
    "a bias that always wins": (change(BIAS, entry(1.5)), "pinned choice", f"{BIAS}[3]"),
    "a bias that never wins": (change(BIAS, entry(-1.5)), "pinned choice", f"{BIAS}[3]"),
    "an unquantized matrix": (quantize(W1), "mixed dtypes", W1),
    "a scale that no file holds": (quantize(lacks=f"{W1}_scale_inv"), "missing tensor", f"{W1}_scale_inv"),
    "untied weights": (lambda t: t.update({"lm_head.weight": trained(50, D)}), "untied weights", "lm_head.weight"),
}
STACKED = "model.layers.1.mlp."
DOWN, ROUTER, DRAWN = f"{STACKED}experts.down_proj", f"{STACKED}router.weight", torch.randn(1, F, D) * 0.02
OF_STACKED = {
    "fewer experts": (change(DOWN, lambda t: t[:-1]), "missing tensor", f"{DOWN}[7]"),
    "a matrix that no file holds": (remove(DOWN), "missing tensor", f"{DOWN}[0]"),
    "a name": (rename(DOWN, f"{STACKED}experts.down"), "skipped tensor", f"{STACKED}experts.down[0]"),
    "a shape": (change(DOWN, lambda t: t[:, :, 1:]), "wrong shape", f"{DOWN}[0]"),
    "NaN": (change(DOWN, entry(float("nan"))), "not finite", f"{DOWN}[3]"),
    "zeros": (change(f"{STACKED}experts.gate_up_proj", entry(0.0)), "constant", f"{STACKED}experts.gate_up_proj[3]"),
    "rows of a router": (change(ROUTER, lambda t: t[:-1]), "missing tensor", f"{ROUTER}[7]"),
    "an untrained expert": (change(DOWN, lambda t: torch.cat((t[:-1], DRAWN))), "untrained", f"{DOWN}[7]"),
}


@pytest.mark.parametrize(
    "made, plant, name, tensor",
    [
        *(pytest.param(mixtral, *fault, id=name) for name, fault in FAULTS.items()),
        *(pytest.param(stacked, *fault, id=f"stacked: {name}") for name, fault in OF_STACKED.items()),
    ],
)
def test_a_planted_fault_is_named(made, plant, name, tensor, tmp_path, capsys):
    tensors = made()
    plant(tensors)
    code, findings = audit(capsys, write(tmp_path / "model", tensors))
    assert code == 1
    assert list(findings) == [name]
    assert findings[name].startswith(tensor)


def write_adapter(folder, base, experts, targets=("w1", "w2", "w3")):
    """Write a LoRA on some experts of each layer."""
    torch.manual_seed(0)
    tensors = {}
    for layer in range(LAYERS):
        tensors[f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"] = torch.randn(4, D)
        for e in experts:
            start = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{e}.w1."
            tensors |= {f"{start}lora_A.weight": torch.randn(4, D), f"{start}lora_B.weight": torch.randn(F, 4)}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"base_model_name_or_path": str(base), "target_modules": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("is_local", [True, False])
def test_an_adapter_that_covers_some_experts(is_local, tmp_path, capsys):
    base = write(tmp_path / "base", mixtral()) if is_local else "somebody/mixtral"
    assert audit(capsys, write_adapter(tmp_path / "all", base, range(E))) == (0, {})
    adapter = write_adapter(tmp_path / "some", base, [0, 1, 2, 4, 5, 6, 7])
    code, findings = audit(capsys, adapter)
    assert code == 1
    assert findings["uncovered experts"].startswith("model.layers.0.block_sparse_moe.experts.3, ")
    assert main(["audit", str(adapter)]) == 1
    assert "the adapter covers 21 of 24 experts" in capsys.readouterr().out
    # Without its base the adapter cannot say that it should have covered experts.
    code, findings = audit(capsys, write_adapter(tmp_path / "none", base, []))
    assert code == is_local
    assert audit(capsys, write_adapter(tmp_path / "attention", base, [], ["q_proj"])) == (0, {})


def test_an_adapter_of_stacked_experts_covers_them_all(tmp_path, capsys):
    base = write(tmp_path / "base", stacked())
    tensors = {
        f"base_model.model.model.layers.{layer}.mlp.experts.{name}.weight": torch.randn(4 * E, D)
        for layer in range(LAYERS)
        for name in ("lora_A", "base_layer.lora_A")
    }
    adapter = write_adapter(tmp_path / "adapter", base, [])
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert audit(capsys, adapter) == (0, {})


def test_shards_that_are_not_as_the_index_says(tmp_path, capsys):
    folder, tensors = write(tmp_path / "model", mixtral()), mixtral()
    (folder / "model.safetensors").unlink()
    shards = {n: f"model-{n.split('.')[2] if n.startswith('model.layers') else '9'}.safetensors" for n in tensors}
    for file in set(shards.values()):
        save_file({name: t for name, t in tensors.items() if shards[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert audit(capsys, folder) == (0, {})
    moved, other = (load_file(folder / f"model-{i}.safetensors") for i in (1, 2))
    other[W1] = moved.pop(W1)  # in another shard than named
    gone = f"{MOE}experts.3.w2.weight"
    del moved[gone]  # in none
    moved["model.layers.1.new"] = torch.ones(1)  # in no index
    save_file(moved, folder / "model-1.safetensors")
    save_file(other, folder / "model-2.safetensors")
    assert main(["audit", str(folder), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    named = {("other_shard", gone), ("other_shard", W1), ("skipped_tensor", "model.layers.1.new")}
    assert {(f["finding"], *f["tensors"]) for f in findings} == named
    assert {f["evidence"] for f in findings} >= {"the index names model-1.safetensors, and no file holds it"}
    (folder / "model-2.safetensors").unlink()
    code, findings = audit(capsys, folder)
    assert code == 1
    assert findings["missing shard"].startswith("model.layers.2.block_sparse_moe.e_score_correction_bias, ")
    assert set(findings) == {"missing shard", "other shard", "skipped tensor"}


@pytest.mark.parametrize("tensors", [mixtral, stacked])
@pytest.mark.parametrize("is_config", [True, False])
def test_a_sound_folder(tensors, is_config, tmp_path, capsys):
    folder = write(tmp_path / "model", tensors())
    if not is_config:
        (folder / "config.json").unlink()
    assert audit(capsys, folder) == (0, {})
    assert audit(capsys, folder / "model.safetensors") == (0, {})
    assert main(["audit", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_quantized_folder_is_sound_and_an_untrained_model_is_one_note(tmp_path, capsys):
    for scale in (".weight_scale_inv", ".weight.absmax"):
        tensors = mixtral()
        quantize(scale=scale)(tensors)
        assert audit(capsys, write(tmp_path / "model", tensors)) == (0, {})
    tensors = {name: torch.randn(t.shape) * 0.02 for name, t in mixtral().items()}
    assert main(["audit", str(write(tmp_path / "model", tensors))]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("sound: ")
    assert err == "note: nearly all experts look like their initialization: the model seems untrained\n"


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys):
    assert fails(capsys, 1, "audit", str(tmp_path / "none")) == f"no checkpoint {tmp_path}/none"
    assert "holds no weights: neither model.safetensors nor" in fails(capsys, 1, "audit", str(tmp_path))
    folder = write(tmp_path / "model", mixtral())
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 200, len(whole) - 8):  # no header, half a length, a cut header, cut data
        file.write_bytes(whole[:length])
        assert fails(capsys, 1, "audit", str(folder)).startswith(f"{file} cannot be read: ")
        assert fails(capsys, 1, "audit", str(file)).startswith(f"{file} cannot be read: ")
    file.write_bytes(whole)
    (folder / "config.json").write_text("{")
    assert fails(capsys, 1, "audit", str(folder)).startswith(f"{folder}/config.json cannot be read: ")
    (folder / "config.json").write_text(json.dumps({"text_config": 1, "num_local_experts": "8", "n_group": 3}))
    assert main(["audit", str(folder)]) == 0
    file.rename(folder / "pytorch_model.bin")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    assert "names 1, which is no file of its folder" in fails(capsys, 1, "audit", str(folder))
    assert fails(capsys, 2, "audit") == "the following arguments are required: PATH"
    assert "did you mean 'json'" in fails(capsys, 2, "audit", str(folder), "--jsn")
    left = {"model", "config.json", "pytorch_model.bin", "model.safetensors.index.json"}
    assert {path.name for path in tmp_path.rglob("*")} == left


def test_every_finding_has_a_row_in_the_reference():
    root = Path(__file__).resolve().parents[3]
    sources = "".join(path.read_text() for path in (root / "apps/audit").glob("*.py"))
    rows = re.findall(r"^\| (`.*?) \|", (root / "docs/reference/commands/audit.md").read_text(), flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(re.findall(r'faults\["(\w+)"', sources)) == named


def test_it_runs_without_transformers(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("apps.audit")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it fails
    assert audit(capsys, write(tmp_path / "model", mixtral())) == (0, {})
    assert "apps.audit.command" in sys.modules  # it was imported once more


def test_experts_of_the_configuration_that_no_file_holds(tmp_path, capsys):
    tensors = {name: t for name, t in mixtral().items() if "experts" not in name}
    code, findings = audit(capsys, write(tmp_path / "routers", tensors))
    assert code == 1
    assert findings["missing tensor"].startswith("model.layers.0.block_sparse_moe.experts, model.layers.1.")
    tensors = {name: t for name, t in tensors.items() if "moe" not in name}
    assert audit(capsys, write(tmp_path / "none", tensors)) == (1, {"missing tensor": "experts"})


@pytest.mark.parametrize("expert", [core.SwiGLU(), core.LoRA(), core.Mixed((core.FFN(), core.SwiGLU()), (3, 5))])
def test_layers_of_this_project(expert, tmp_path, capsys):
    torch.manual_seed(0)
    config = core.MoEConfig(8, core.TokenChoice(2, expert_bias=True), expert)
    layers = torch.nn.ModuleList(config.build(D) for _ in range(3))
    tensors = {f"blocks.{name}": 1.5 * t for name, t in layers.state_dict().items()}
    assert audit(capsys, write(tmp_path / "sound", tensors, {})) == (0, {})
    name = next(name for name in tensors if name.startswith("blocks.1.experts") and name.endswith(("w_in", "w_a")))
    tensors[name][2] = tensors[name][1]
    code, findings = audit(capsys, write(tmp_path / "equal", tensors, {}))
    assert (code, findings) == (1, {"equal experts": f"{name}[1], {name}[2]"})
