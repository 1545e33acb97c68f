"""Runs of a model of transformers in the commands: trained, tested, quantized, swept, exported, on two processes."""

from __future__ import annotations

import csv
import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from divided_runs import as_rank
from families import PRELOAD
from hubs import CPU, IDS, command, data, data_flags, error, failing, fit, logits, rewritten
from places import ROOT
from safetensors.torch import load_file
from two_ranks import on_two_ranks

import apps
import core
from apps.cli import main
from apps.porting import config_of, save_pretrained
from apps.train.cost.quantizing import form_of, quantize_model

transformers = pytest.importorskip("transformers")


def logits_of(run, **options):
    return logits(apps.load(run, **options).model)


def read(folder):
    """Read a folder with transformers alone."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def column(run, name="val/loss"):
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def checkpoint(run, name):
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("config", ["lora", "qlora", "finetune"])
def test_fit_test_predict(config, folder):
    run = folder / config
    said = (run / "said.txt").read_text()
    # 0.02 of the model, 2 experts a token, 2 layers
    assert "balance losses of each of the 2 MoE layers: load_balancing_loss" in said
    assert "=0.02" in said
    losses = column(run)
    assert losses[-1] < losses[0] < 6.0
    assert main(["test", "--ckpt_path", str(run)]) == 0
    assert "test/perplexity" in (run / "test.json").read_text()
    assert main(["predict", "--ckpt_path", str(run), "--data.text", "What comes after 3?"]) == 0
    assert len(apps.load(run).predict(["What comes after 3?", "And 4?"], max_new_tokens=4)) == 2
    if config == "finetune":
        assert not (run / "adapter").exists()
        return
    peft = pytest.importorskip("peft")
    with_adapter = peft.PeftModel.from_pretrained(read(folder / "model"), run / "adapter").eval()
    close = 1e-5 if config == "lora" else 0.3  # its experts are rounded to 4 bits
    assert error(logits_of(run / "checkpoints" / "best.ckpt"), logits(with_adapter)) < close
    assert all(".lora." in name for name in checkpoint(run, "last"))


def test_a_run_finds_its_folder_from_anywhere_and_is_told_where_it_has_gone(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "model").symlink_to(folder / "model")
    (tmp_path / "text.txt").symlink_to(folder / "text.txt")
    monkeypatch.chdir(tmp_path)
    argv = ["fit", "--config", ROOT / "configs/hub/lora.yaml", "--data.folder", "model", "--run_dir", "run"]
    assert command(*argv, "--trainer.max_steps", "1", "--data.train_files", "text.txt") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert apps.load("../run").folder == str(tmp_path / "model")
    predict = ["predict", "--ckpt_path", "../run", "--data.text", "What", "--model.generate.max_new_tokens", "2"]
    assert main([*predict, "--output", "one.jsonl"]) == 0
    (tmp_path / "model").rename(tmp_path / "elsewhere" / "moved")
    two = [*predict, "--output", "two.jsonl"]
    assert f"{tmp_path / 'model'} is no folder of a model of transformers" in failing(capsys, *two)
    assert main([*two, "--data.folder", "moved"]) == 0
    assert Path("one.jsonl").read_text() == Path("two.jsonl").read_text()


def test_weights_of_a_folder_in_bfloat16_take_small_steps(folder, tmp_path, capsys):
    """In bfloat16 a step of 1e-5 is rounded away wherever a weight is larger than 0.005."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    for file in {*os.listdir(folder / "model")} - {*os.listdir(tmp_path / "model")}:  # of the tokenizer
        (tmp_path / "model" / file).symlink_to(folder / "model" / file)
    options = ["--trainer.max_steps", "3", "--model.optimizer.lr", "1e-5", "--data.folder", tmp_path / "model"]
    moved = {}
    for dtype in ("float32", "bfloat16"):
        run = tmp_path / dtype
        assert fit(folder, run, *options, "--model.dtype", dtype, config="finetune") == 0
        said = capsys.readouterr().err
        assert ("rounds small steps away: give model.dtype=float32" in said) == (dtype == "bfloat16")
        state = checkpoint(run, "last")
        pairs = [(state[f"model.{n}"], p) for n, p in model.named_parameters() if n.endswith("_proj.weight")]
        moved[dtype] = sum(int((a != b).sum()) for a, b in pairs) / sum(b.numel() for _, b in pairs)
    assert moved["float32"] > 0.9
    assert moved["bfloat16"] < 0.5


def test_quantize_writes_a_run(folder, tmp_path, capsys):
    for config, form in (("finetune", "int8"), ("lora", "int4:32")):
        new, old = tmp_path / config, folder / config
        assert command("convert", "quantize", "--ckpt_path", old, "--how", form, "--output", new) == 0
        assert "val/loss" in capsys.readouterr().out
        model = apps.load(new)
        assert form_of(model) == form
        assert error(logits(model.model), logits(quantize_model(apps.load(old), form).model)) < 1e-6
    assert main(["test", "--ckpt_path", str(new)]) == 0
    quantized = [t for t in checkpoint(tmp_path / "finetune", "best").values() if t.dtype == torch.int8]
    # 4 experts of 64 x 64 in each of 3 matrices and 2 layers, a byte a number
    assert sum(t.numel() for t in quantized) == 4 * 64 * 64 * 3 * 2
    assert model.hparams["quantize"] == "int4:32"
    for path, said in (
        (tmp_path / "lora", "has experts in int4:32 already"),
        (folder / "model", "whose layout has no experts in int8: serve and export take --quantize int8"),
    ):
        assert said in failing(capsys, "convert", "quantize", "--output", tmp_path / "no", "--ckpt_path", path)
    assert not (tmp_path / "no").exists()
    apps.load(folder / "finetune", quantize="int4").save_pretrained(tmp_path / "int4")
    assert form_of(apps.load(tmp_path / "int4")) == "int4"
    os.truncate(tmp_path / "int4" / "model.safetensors", 100_000)
    assert "int4/model.safetensors cannot be read" in failing(capsys, "serve", "--ckpt_path", tmp_path / "int4")


@pytest.mark.parametrize(
    ("config", "kind", "options", "experts"),
    [
        ("lora", "merge", (), 4),
        ("finetune", "merge", (), 4),
        ("lora", "prune", ("--keep", "3"), 3),
        ("lora", "densify", (), 1),
    ],
)
def test_a_run_becomes_a_folder(config, kind, options, experts, folder, tmp_path):
    assert command("convert", kind, "--ckpt_path", folder / config, "--output", tmp_path / "new", *options) == 0
    model = read(tmp_path / "new")
    assert model.config.num_local_experts == experts
    difference = error(logits(model), logits_of(folder / config))
    assert difference < 1e-5 if kind == "merge" else 1e-3 < difference < 1
    if config == "lora":
        assert error(logits_of(tmp_path / "new"), logits(model)) < 1e-5  # the folder itself is loaded


def test_doctor_prune_merge_and_densify_take_the_folder(folder, tmp_path, capsys):
    model = ["--ckpt_path", folder / "model"]
    own = [*model, "--data.val_files", "chats.jsonl", "--data.root", folder]
    own += ["--data.block_size", "48", "--data.cache_dir", folder / "cache"]
    assert command("doctor", *own) in (0, 1)
    assert "2 routers on at most 8 validation batches" in capsys.readouterr().out
    for kind, experts, words in (("prune", 2, ["--keep", "2", "--merge"]), ("densify", 1, [])):
        assert command("convert", kind, *own, "--output", tmp_path / kind, *words) == 0
        assert "val/loss" in capsys.readouterr().out
        again = read(tmp_path / kind)
        assert again.config.num_local_experts == experts
        assert again.model.layers[1].mlp.experts.down_proj.shape[0] == experts
        assert (tmp_path / kind / "tokenizer.json").is_file()
    prune = ("convert", "prune", *own, "--output", tmp_path / "new")
    assert "a token takes 2 experts" not in failing(capsys, *prune, "--keep", "9")
    assert "leaves no statistics" in failing(capsys, *prune, "--keep", "2", "--batches", "0")
    merge = ("convert", "merge", *model, "--output", tmp_path / "new")
    assert "prune, densify take one, not merge" in failing(capsys, *merge)
    assert not (tmp_path / "new").exists()


def test_a_sweep_takes_fewer_experts_a_token(folder, tmp_path):
    shutil.copytree(folder / "lora", tmp_path / "lora")  # another test writes into that one
    assert command("test", "--ckpt_path", tmp_path / "lora", "--sweep", "--rounds", "1") == 0
    swept = json.loads((tmp_path / "lora" / "sweep.json").read_text())["forms"]
    forms = {form["name"]: form["metrics"]["test/loss"] for form in swept}
    shares = [f"{share} % of the experts" for share in (75, 50, 25)]
    assert list(forms) == ["as trained", "top_k=1", *shares, "int8", "int4"]
    model = apps.load(folder / "lora")
    core.merge_adapters(model.model)
    model.lora = None
    model.save_folder(tmp_path / "merged")
    rewritten(tmp_path / "merged", {"num_experts_per_tok": 1})
    flags = ["--model", "HubCausalLM", "--data", "HubTextData", *data_flags(folder), "--run_dir", tmp_path / "one"]
    assert command("test", "--ckpt_path", "none", *flags, "--data.folder", tmp_path / "merged") == 0
    of_one = json.loads((tmp_path / "one" / "test.json").read_text())["test/loss"]
    assert of_one == pytest.approx(forms["top_k=1"], rel=1e-5)
    assert of_one != pytest.approx(forms["as trained"], rel=1e-5)


@pytest.mark.parametrize("form", [pytest.param(None, marks=pytest.mark.slow), "int8"])
def test_the_graph_of_an_export_has_the_logits(folder, tmp_path, form, capsys):
    runtime = pytest.importorskip("onnxruntime")
    words, file = [] if form is None else ["--quantize", form], tmp_path / "model.onnx"
    assert command("export", "--ckpt_path", folder / "lora", "--output", file, *words) == 0
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    model = apps.load(folder / "lora", quantize=form)
    for ids in (IDS, IDS[:1, :3]):
        with torch.no_grad():
            expected = model.model(input_ids=ids).logits.numpy()
        (own,) = session.run(None, {"token_ids": ids.numpy()})
        assert own.shape == expected.shape
        assert np.abs(own - expected).max() < 1e-4 * np.abs(expected).max()
    assert "has logits only: predict takes the run" in failing(capsys, "predict", "--onnx", file, "--data.text", "hi")


def test_the_adapter_is_the_best_checkpoint_s(folder, tmp_path, capsys):
    # At such a rate a later epoch is worse than the first.
    assert fit(folder, tmp_path, "--trainer.max_epochs", "4", "--model.optimizer.lr", "30") == 0
    said = capsys.readouterr().err
    best, last = (checkpoint(tmp_path, name) for name in ("best", "last"))
    name = next(name for name in best if "self_attn.q_proj" in name and name.endswith(".a"))
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    own = written["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert torch.equal(own, best[name].t())
    assert not torch.equal(own, last[name].t())
    assert f"the adapter of the best val/loss ({min(column(tmp_path)):.4g}) is in {tmp_path / 'adapter'}" in said


def commands_of_rank(rank, commands):
    as_rank(rank)
    return [command(*argv) for argv in commands]


def test_two_processes_train_evaluate_and_write_a_whole_adapter(folder, tmp_path):
    """An odd number of validation rows, so that one of them is repeated."""
    odd = ["--data.val_size", "7", "--data.eval_batch_size", "2"]
    assert len(data(folder, block_size=24, val_size=7).examples("val")) == 7
    own = ["--config", "configs/hub/lora.yaml", *data_flags(folder, block_size=24), *odd, *CPU]
    two = ["--config", "configs/parallel/expert_parallel.yaml", "--trainer.devices", "2"]
    trains = ["--trainer.max_epochs", "2", "--trainer.accumulate_grad_batches", "1"]
    validate = ["validate", *own, "--ckpt_path", tmp_path / "two" / "checkpoints" / "best.ckpt", "--run_dir"]
    commands = [["fit", *own, *two, *trains, "--run_dir", tmp_path / "two"], [*validate, tmp_path / "together", *two]]
    work = functools.partial(commands_of_rank, commands=commands)
    assert on_two_ranks(work, tmp_path, preload=PRELOAD) == [
        [0, 0],
        [0, 0],
    ]
    assert command(*validate, tmp_path / "alone") == 0
    found, other = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (tmp_path / "two", folder / "lora")
    )
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in other.items()}
    assert len(found) == 2 * 2 * (4 + 2)  # A and B of 2 layers' 4 attention matrices, and 2 matrices of all experts
    assert any(float(t.abs().max()) > 0 for name, t in found.items() if "lora_B" in name and "experts" in name)
    alone, together = (
        json.loads((tmp_path / name / "validate.json").read_text())["val/loss"] for name in ("alone", "together")
    )
    assert alone == pytest.approx(together, abs=1e-6)
    trained = column(tmp_path / "two")
    assert trained[-1] < trained[0]
    assert min(trained) == pytest.approx(alone, abs=1e-6)


def test_a_model_trained_here_becomes_mixtral_and_is_tuned_and_served(folder, tmp_path):
    text = ["--data.train_files", "text.txt", "--data.root", folder, "--data.block_size", "32", *CPU]
    text += ["--data.cache_dir", folder / "cache", "--trainer.max_steps", "2"]
    own = ["--config", "configs/nlp/text_mixtral_like.yaml", "--run_dir", tmp_path / "own", "--data.dataset", "text"]
    own += ["--data.tokenizer.vocab_size", "300", "--data.val_size", "4", "--data.test_size", "4"]
    assert command("fit", *own, *text) == 0
    module = apps.load(tmp_path / "own")
    save_pretrained(module.model, tmp_path / "mixtral", subwords=module.subwords)
    theirs, prompt = read(tmp_path / "mixtral"), "What comes after 3?"
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "mixtral")(prompt, return_tensors="pt")["input_ids"]
    vocabulary = config_of(tmp_path / "mixtral").vocabulary
    known = torch.tensor(module.subwords.encode([prompt], "target"))
    assert torch.equal(torch.as_tensor(vocabulary.theirs)[known], ids)
    with torch.no_grad():
        assert error(theirs(input_ids=ids).logits, module(known)[..., torch.as_tensor(vocabulary.ours)]) < 1e-5
    tuned = ["--config", "configs/hub/lora.yaml", "--data.folder", tmp_path / "mixtral", "--run_dir", tmp_path / "lora"]
    assert command("fit", *tuned, *text) == 0
    assert command("convert", "merge", "--ckpt_path", tmp_path / "lora", "--output", tmp_path / "merged") == 0
    merged, model = apps.load(tmp_path / "merged"), read(tmp_path / "merged")
    service = merged.task.service()
    (answer,) = service.predict([service.read({"text": prompt, "tokens": 6})])
    written = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert answer["text"] == merged.tokenizer.decode(written, skip_special_tokens=True)
