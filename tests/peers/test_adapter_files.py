"""Adapters in PEFT's files: read by peft, read from peft, for stacked experts and one expert at a time."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil

import pytest
import torch
from families import adapted, error, first_layer, logits, made, pair
from safetensors.torch import load_file, save_file

import core
from apps.hub import load_adapters, save_adapters

peft = pytest.importorskip("peft")
FUSED = ["Mixtral", "GptOss", "Olmoe", "Qwen2Moe", "DeepseekV3", "Phimoe", "Lfm2Moe"]
AB = {"A": (2, 16), "B": (24, 2)}


def check_same(own, expected, plain):
    """Check that two models compute the same, and not what the model without adapters does."""
    with torch.no_grad():
        assert error(logits(own), logits(expected)) < 1e-5
        assert error(logits(expected), logits(plain)) > 1e-2


@pytest.mark.parametrize("name", FUSED)
def test_peft_computes_what_was_saved_and_what_it_saved_is_read(name, tmp_path):
    plain, net = pair(name)
    save_adapters(adapted(net, "experts", "*.o_proj" if name == "DeepseekV3" else "*.q_proj"), tmp_path / "ours")
    check_same(net, peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval(), plain)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=name == "Olmoe",
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        target_modules=["q_proj"],
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    check_same(load_adapters(core.adopt(copy.deepcopy(plain)), tmp_path / "theirs"), theirs, plain)


@pytest.mark.parametrize("one_per_expert", [False, True], ids=["fused", "one per expert"])
@pytest.mark.parametrize("name", [*FUSED, "SwitchTransformers", "Llama4"])
def test_saved_adapters_come_back(name, one_per_expert, tmp_path):
    plain, net = pair(name)
    adapted(net, "experts", "router")
    if name in ("GptOss", "Llama4") and one_per_expert:
        with pytest.raises(ValueError, match="are fused in every file: one_per_expert is for others"):
            save_adapters(net, tmp_path, one_per_expert=True)
        return
    save_adapters(net, tmp_path, one_per_expert=one_per_expert)
    check_same(load_adapters(core.adopt(copy.deepcopy(plain)), tmp_path, "again"), net, plain)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.lora_embedding_A"),
        ({"trainable_token_indices": {"embed_tokens": [4, 5]}}, "embed_tokens.token_adapter.trainable_tokens_delta"),
        ({"bias": "lora_only"}, "layers.0.self_attn.q_proj.base_layer.bias"),
        ({"bias": "all"}, "layers.0.self_attn.k_proj.bias"),
        ({"target_modules": ["q_proj", "lm_head"]}, ""),
    ],
)
def test_what_peft_trains_beside_lora_is_named(options, key, tmp_path):
    plain = made("Qwen2Moe").eval()  # whose q_proj, k_proj and v_proj have biases
    config = peft.LoraConfig(r=2, **{"target_modules": ["q_proj"], **options})
    theirs = peft.get_peft_model(copy.deepcopy(plain), config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    net = core.adopt(plain)
    if not key:  # the file has lm_head's own weight beside its update
        assert any("lm_head.base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
        assert error(logits(load_adapters(net, tmp_path)), logits(theirs.eval())) < 1e-5
        return
    with pytest.raises(ValueError, match=f"has base_model.model.model.{key}.*, which is no LoRA of a matrix"):
        load_adapters(net, tmp_path)
    assert all(p.requires_grad for p in net.parameters())


def test_names_of_one_expert_are_those_of_the_hub(tmp_path):
    for name, gate in (("Mixtral", "block_sparse_moe.experts.3.w1"), ("Olmoe", "mlp.experts.3.gate_proj")):
        save_adapters(adapted(core.adopt(made(name)), "experts"), tmp_path / name, one_per_expert=True)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert tensors[f"base_model.model.model.layers.1.{gate}.lora_A.weight"].shape == (2, 16)
        assert len(tensors) == 2 * 4 * 3 * 2  # layers, experts, matrices, A and B


def test_ranks_of_gate_and_input_add_up(tmp_path):
    """Two updates of one expert, each with its own A, are one of twice the rank."""
    plain = made("Olmoe").eval()
    where, roles = "base_model.model.model.layers.0.mlp.experts.2", ("gate_proj", "up_proj")
    shapes = {f"{where}.{role}.lora_{k}.weight": shape for role in roles for k, shape in AB.items()}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    net = load_adapters(core.adopt(copy.deepcopy(plain)), tmp_path)
    core.merge_adapters(net)
    added = net.model.layers[0].mlp.experts.gate_up_proj - plain.model.layers[0].mlp.experts.gate_up_proj
    parts = [3 * tensors[f"{where}.{r}.lora_B.weight"] @ tensors[f"{where}.{r}.lora_A.weight"] for r in roles]
    assert error(added[2], torch.cat(parts)) < 1e-5
    assert not added[[0, 1, 3]].any()


@pytest.mark.parametrize("name", ["Mixtral", "Olmoe", "DeepseekV3"])
def test_an_adapter_of_one_expert_each_is_saved_for_all(name, tmp_path):
    """Read, gate and input share one update of twice the rank, and the output's has the rank."""
    plain, net = pair(name)
    save_adapters(adapted(net, "experts"), tmp_path / "each", one_per_expert=True)
    read = load_adapters(core.adopt(copy.deepcopy(plain)), tmp_path / "each")
    lora = first_layer(read).experts.lora["default"]
    assert [lora[key].rank for key in ("gate_up_proj", "down_proj")] == [4, 2]
    save_adapters(read, tmp_path / "all")
    check_same(load_adapters(core.adopt(copy.deepcopy(plain)), tmp_path / "all"), net, plain)
    check_same(peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "all").eval(), net, plain)


def test_bad_files_are_rejected_and_the_model_stays(tmp_path):
    good = tmp_path / "good"
    save_adapters(adapted(core.adopt(made("Mixtral")), "experts", "router", "attention"), good)

    def config(**options):
        def change(folder):
            values = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps(values | options))

        return change

    def cut(folder):
        os.truncate(folder / "adapter_model.safetensors", 5_000)

    def without_b(folder):
        tensors = load_file(good / "adapter_model.safetensors")
        tensors.pop(next(key for key in tensors if "q_proj.lora_B" in key))
        save_file(tensors, folder / "adapter_model.safetensors")

    for change, rule in (
        (config(peft_type="IA3"), "peft_type='IA3' is not LORA"),
        (config(use_dora=True), "use_dora=True is not LoRA as core.add_adapters has it"),
        (config(lora_alpha=None), r"adapter_config\.json is damaged: no factor of .* follows from it \(TypeError"),
        (config(alpha_pattern={"(": 1}), r"adapter_config\.json is damaged: no factor of .* follows from it \(error"),
        (cut, "cannot be read"),
        (without_b, r"q_proj\.lora_A\.weight has no lora_B beside it"),
        (lambda folder: (folder / "adapter_config.json").unlink(), r"has no adapter_config\.json"),
    ):
        net, folder = core.adopt(made("Mixtral")), tmp_path / "bad"
        shutil.copytree(good, folder)
        change(folder)
        with pytest.raises(ValueError, match=rule):
            load_adapters(net, folder)
        assert all(p.requires_grad for p in net.parameters())
        shutil.rmtree(folder)
    for other in ("Qwen3Moe", "GptOss"):
        with pytest.raises(ValueError, match=f"{re.escape(str(good))} is for another model"):
            load_adapters(core.adopt(made(other)), good)
    with pytest.raises(ValueError, match="no adapter 'third'"):
        save_adapters(core.adopt(made("Mixtral")), tmp_path / "none", "third")
    assert not (tmp_path / "none").exists()
