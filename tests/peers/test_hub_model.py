"""``HubCausalLM``: what trains, what it writes for transformers, and what it says to prompts."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from chats import TEMPLATE
from hubs import command, data, data_flags, error, failing, logits, module_of, rewritten, rows, tensors_of

import core
from apps.hub.data import HubBatch
from apps.hub.folders import load_model
from apps.hub.module import HubCausalLM, LoRAConfig, RowMetrics
from apps.train.step.pieces import Block

transformers = pytest.importorskip("transformers")
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def test_prompts_of_a_file_are_answered_in_its_order(folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What comes after 3?\n  And 4?\n")
    words = ["predict", "--config", "configs/hub/finetune.yaml", "--data.folder", folder / "model"]
    words += ["--ckpt_path", "none", "--run_dir", tmp_path / "run", "--model.generate.max_new_tokens", "3"]
    words += ["--data.predict_file", prompts]
    assert command(*words) == 0
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    expected = module_of(folder).eval().predict(["What comes after 3?", "  And 4?"], max_new_tokens=3)
    assert [json.loads(line)["output"] for line in lines] == expected
    prompts.write_text("What comes after 3?\n\nAnd 4?\n")
    assert "prompts.txt:2 is empty: each line is a prompt" in failing(capsys, *words, "--overwrite")


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_continuation_is_drawn_from_all_tokens_unless_the_folder_says_otherwise(top_k, folder):
    """At so high a temperature all tokens are alike; transformers would draw from its 50 best."""
    module = module_of(folder).eval()
    module.model.generation_config.top_k = top_k
    ((read, written),) = module.continued(["What"], temperature=1e6, max_new_tokens=40, seed=1)
    tokens_1S = torch.tensor([[*read, *written]])
    with torch.no_grad():
        logits_SV = module.model(tokens_1S).logits[0, len(read) - 1 : -1]
    own_S1 = logits_SV.gather(1, torch.tensor(written)[:, None])
    rank_S = (logits_SV > own_S1).sum(1)
    assert len(written) == 40
    assert (rank_S.max() < 3) if top_k else (rank_S >= 50).sum() > 20


def test_a_continuation_is_of_the_model_in_evaluation(folder):
    module = module_of(folder)  # in training, as it is made
    module.model.model.layers[0].self_attn.attention_dropout = 0.9
    answers = module.continued(["What comes"], max_new_tokens=12)
    assert module.model.training
    assert answers == module.eval().continued(["What comes"], max_new_tokens=12)


def test_a_service_answers_and_a_page_shows_the_experts_of_each_token(folder):
    module = module_of(folder).eval()
    service = module.task.service()
    values = service.read({"text": "What comes after 3?", "tokens": 5})
    (answer,) = service.predict([values])
    assert answer["text"] == module.predict(["What comes after 3?"], max_new_tokens=5)[0]
    (own,) = module.task.answers([values])
    assert len(module.task.layers(core.Tape(), values, own)) == 2
    with pytest.raises(ValueError, match="at most 8192 are read"):
        service.read({"text": "word " * 9000})


def test_a_tuned_model_is_written_for_transformers(folder, tmp_path):
    module = module_of(folder, lora=LoRAConfig(2, modules=("experts", "router")))
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    copy.deepcopy(module.eval()).save_folder(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert error(logits(again), logits(module.model)) < 1e-5
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template == TEMPLATE
    assert set(tensors_of(tmp_path)) == set(tensors_of(folder / "model"))


def test_the_routers_stay_and_the_rest_trains(folder):
    module = module_of(folder, freeze=["router", "lm_head*"]).train()
    loss = module.training_loss(HubBatch(*rows(folder)))
    loss.total.backward()
    trained = {name for name, p in module.model.named_parameters() if p.grad is not None}
    assert trained
    assert not any("gate.weight" in name or "lm_head" in name for name in trained)
    assert len(loss.aux.terms) == 1


def test_a_dense_model_has_no_experts_and_trains(tmp_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, **LLAMA)).save_pretrained(tmp_path)
    module = HubCausalLM(str(tmp_path), lora=LoRAConfig(2))
    assert not core.moe_layers(module)
    assert all(".self_attn." in n for n, p in module.named_parameters() if p.requires_grad)
    for options, rule in (
        ({"freeze": ["router"]}, r"freeze='router' names no parameter of .*, which is dense \(--model.freeze"),
        ({"lora": LoRAConfig(2), "quantize": "int8"}, "quantize='int8': the model of .* is dense"),
        ({"lora": LoRAConfig(2, modules=("router",))}, r"lora.modules=\['router'\]: the model of .* is dense"),
    ):
        with pytest.raises(ValueError, match=rule):
            HubCausalLM(str(tmp_path), **options)


def test_bad_input_is_one_line(folder, tmp_path, capsys):
    for name in ("empty", "mute", "cut", "unknown"):
        shutil.copytree(folder / "model", tmp_path / name)
    (tmp_path / "empty" / "model.safetensors").unlink()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / file).unlink()
    content = (folder / "model" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(content[:-50])
    (tmp_path / "odd.jsonl").write_text('{"message": []}\n')
    fit = ["fit", "--config", "configs/hub/lora.yaml", "--run_dir", tmp_path / "run", *data_flags(folder)]
    fit += ["--data.cache_dir", tmp_path / "cache"]
    for option, value, said in (
        ("data.folder", tmp_path / "none", "none is no folder of a model of transformers"),
        ("data.folder", tmp_path / "empty", "has no weights"),
        ("data.folder", tmp_path / "mute", "has no tokenizer"),
        ("data.folder", tmp_path / "cut", "cut/model.safetensors cannot be read"),
        (
            *("data.train_files", tmp_path / "odd.jsonl"),
            'odd.jsonl, line 1 has no "text", no "prompt" and "completion", no "messages"',
        ),
        ("data.train_files", "missing.txt", "missing.txt is missing"),
        ("model.lora.rank", "4000", "rank=4000 exceeds"),
    ):
        assert said in failing(capsys, *fit, f"--{option}", value)
    assert not (tmp_path / "run").exists()
    rewritten(tmp_path / "unknown", {"model_type": "foo_moe"})
    for name, said in (
        ("unknown", f"transformers {transformers.__version__} knows no model_type 'foo_moe'"),
        ("mute", "mute has no tokenizer: no tokenizer.json"),
    ):
        assert said in failing(capsys, "serve", "--ckpt_path", tmp_path / name)
    for options, rule in (
        ({"quantize": "int8"}, "quantize='int8' without lora: quantized experts are frozen"),
        ({"freeze": ["*.nothing"]}, r"freeze='\*\.nothing' names no parameter"),
    ):
        with pytest.raises(ValueError, match=rule):
            module_of(folder, **options)


def test_a_folder_lacks_no_tensor_but_a_tied_one(folder, tmp_path):
    def written(name, config, change):
        shutil.copytree(folder / "model", tmp_path / name)
        tensors = tensors_of(folder / "model")
        change(tensors)
        rewritten(tmp_path / name, config, tensors)
        return tmp_path / name

    q, k = (f"model.layers.1.self_attn.{letter}_proj.weight" for letter in "qk")
    tied = load_model(written("tied", {"tie_word_embeddings": True}, lambda t: t.pop("lm_head.weight")))
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    for name, change, rule in (
        ("head", lambda t: t.pop("lm_head.weight"), r"lm_head\.weight is missing or has another shape, the first of 1"),
        ("two", lambda t: [t.pop(q), t.pop(k)], f"{k} is missing or has another shape, the first of 2"),
        ("other", lambda t: t.update({q: t[q][1:]}), f"{q} is missing or has another shape, the first of 1"),
    ):
        with pytest.raises(ValueError, match=f"{name} is damaged: {rule}"):
            load_model(written(name, {}, change))


def test_a_comparison_has_the_other_ways_of_tuning(folder):
    module = module_of(folder, lora=LoRAConfig(2))
    ways = module.comparison.baselines()
    assert list(ways) == ["full", "full_router_frozen", "lora_of_router_too", "qlora"]
    assert module.comparison.heading == "LoRA"
    frozen, qlora = ways["full_router_frozen"].build(), ways["qlora"].build()
    assert frozen.comparison.heading == "full, router frozen"
    assert not any(p.requires_grad for layer in core.moe_layers(frozen).values() for p in layer.router.parameters())
    assert qlora.comparison.heading == "QLoRA"
    assert all(layer.experts.is_quantized for layer in core.moe_layers(qlora).values())
    wide = module_of(folder, lora=LoRAConfig(8)).comparison.baselines()["lora_of_router_too"]
    assert wide.build is None
    assert wide.note == "rank=8 exceeds the router's 4 experts"


def test_the_whole_model_is_compared_in_float32(folder, tmp_path):
    transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).save_pretrained(tmp_path)
    module = HubCausalLM(str(tmp_path), lora=LoRAConfig(2))
    assert {p.dtype for n, p in module.named_parameters() if ".lora." in n} == {torch.float32}
    assert module.model.dtype == torch.bfloat16
    full = module.comparison.baselines()["full"].build()
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert list(full.comparison.baselines()) == ["full_router_frozen", "lora", "lora_of_router_too", "qlora"]


def test_values_of_rows_have_the_mean_loss(folder):
    module = module_of(folder).eval()
    outs = [module.task_loss(batch) for batch in data(folder).val_dataloader()]
    total = sum(float(out.loss) * out.weight for out in outs) / sum(out.weight for out in outs)
    assert module.comparison.example_values(outs).mean == pytest.approx(total, rel=1e-5)


def test_each_row_counts_once():
    metrics = RowMetrics()
    metrics.update([Block(1, 3.0, 1, 4), Block(0, 5.0, 3, 4), Block(1, 3.0, 1, 4)])  # the last fills up a round
    assert float(metrics.compute()["loss"]) == 1.0
