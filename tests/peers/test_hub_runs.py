"""A run of a model of transformers in the other commands: quantized, swept, exported, on two processes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from shutil import copytree, ignore_patterns

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_hub_training import data as sampled, fit, folder

import apps
import core
from apps.cli import main
from apps.hub import load_adapters
from apps.hub.module import RowMetrics
from apps.porting import config_of, save_pretrained
from apps.train.cost.quantizing import form_of, quantize_model
from apps.train.step.pieces import Block

transformers = pytest.importorskip("transformers")
__all__ = ["folder"]
IDS = torch.arange(5, 25).view(2, 10)


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """The runs ``finetune`` and ``lora``, of two epochs."""
    base = tmp_path_factory.mktemp("runs")
    for config in ("finetune", "lora"):
        assert fit(folder, base / config, "--trainer.max_epochs", "2", config=config) == 0
    return base


@torch.no_grad()
def logits(model):
    return model.model(input_ids=IDS).logits


def close(own, other):
    return float((own - other).norm() / other.norm())


def failing(capsys, *argv):
    assert main([*map(str, argv)]) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


def test_quantize_writes_a_run(runs, folder, tmp_path, capsys):
    for config, form in (("finetune", "int8"), ("lora", "int4:32")):
        new = tmp_path / config
        argv = ["convert", "quantize", "--ckpt_path", str(runs / config), "--how", form, "--output", str(new)]
        assert main(argv) == 0
        assert "val/loss" in capsys.readouterr().out
        model = apps.load(new)
        assert form_of(model) == form
        assert close(logits(model), logits(quantize_model(apps.load(runs / config), form))) < 1e-6
        assert main(["test", "--ckpt_path", str(new)]) == 0
    state = torch.load(tmp_path / "finetune" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    # 4 experts of 64 x 64 in each of 3 matrices and 2 layers, a byte a number
    assert sum(t.numel() for t in state.values() if t.dtype == torch.int8) == 4 * 64 * 64 * 3 * 2
    assert model.hparams["quantize"] == "int4:32"
    capsys.readouterr()
    quantize = ("convert", "quantize", "--output", tmp_path / "no", "--ckpt_path")
    assert "has experts in int4:32 already" in failing(capsys, *quantize, tmp_path / "lora")
    assert "whose layout has no experts in int8: serve and export take --quantize int8" in failing(
        capsys, *quantize, folder / "model"
    )
    assert not (tmp_path / "no").exists()


def test_a_run_with_adapters_becomes_a_folder(runs, tmp_path, capsys):
    expected = logits(apps.load(runs / "lora"))
    for kind, *words in (("merge",), ("prune", "--keep", "3"), ("densify",)):
        new = str(tmp_path / kind)
        assert main(["convert", kind, "--ckpt_path", str(runs / "lora"), "--output", new, *words]) == 0
        model = transformers.AutoModelForCausalLM.from_pretrained(new).eval()
        assert model.config.num_local_experts == {"merge": 4, "prune": 3, "densify": 1}[kind]
        with torch.no_grad():
            theirs = model(input_ids=IDS).logits
        assert close(theirs, expected) < 1e-5 if kind == "merge" else 1e-3 < close(theirs, expected) < 1
        assert close(logits(apps.load(new)), theirs) < 1e-5  # the folder itself is loaded


def test_a_whole_training_becomes_a_folder(runs, tmp_path):
    assert main(["convert", "merge", "--ckpt_path", str(runs / "finetune"), "--output", str(tmp_path / "new")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    with torch.no_grad():
        assert close(model(input_ids=IDS).logits, logits(apps.load(runs / "finetune"))) < 1e-5


def test_a_sweep_takes_fewer_experts_a_token(runs, folder):
    assert main(["test", "--ckpt_path", str(runs / "lora"), "--sweep", "--rounds", "2"]) == 0
    swept = json.loads((runs / "lora" / "sweep.json").read_text())["forms"]
    forms = {form["name"]: form["metrics"]["test/loss"] for form in swept}
    shares = [f"{share} % of the experts" for share in (75, 50, 25)]
    assert list(forms) == ["as trained", "top_k=1", *shares, "int8", "int4"]
    model = apps.load(runs / "lora")
    core.merge_adapters(model.model)
    model.lora = None
    model.save_folder(runs / "merged")
    config = json.loads((runs / "merged" / "config.json").read_text())
    (runs / "merged" / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 1}))
    flags = ["--model", "HubCausalLM", "--data", "HubTextData", "--data.folder", str(runs / "merged")]
    flags += ["--data.root", str(folder), "--data.train_files", "chats.jsonl", "--data.block_size", "48"]
    flags += ["--data.cache_dir", str(folder / "cache"), "--run_dir", str(runs / "one")]
    assert main(["test", "--ckpt_path", "none", *flags]) == 0
    of_one = json.loads((runs / "one" / "test.json").read_text())["test/loss"]
    assert of_one == pytest.approx(forms["top_k=1"], rel=1e-5)
    assert of_one != pytest.approx(forms["as trained"], rel=1e-5)


@pytest.mark.parametrize("form", [None, "int8"])
def test_the_graph_of_an_export_has_the_logits(runs, tmp_path, form, capsys):
    runtime = pytest.importorskip("onnxruntime")
    words = [] if form is None else ["--quantize", form]
    file = tmp_path / "model.onnx"
    assert main(["export", "--ckpt_path", str(runs / "lora"), "--output", str(file), *words]) == 0
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    model = apps.load(runs / "lora", quantize=form)
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
    files = [tmp_path / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
    best, last = (torch.load(file, weights_only=True)["state_dict"] for file in files)
    name = next(name for name in best if "self_attn.q_proj" in name and name.endswith(".a"))
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    own = written["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert torch.equal(own, best[name].t())
    assert not torch.equal(own, last[name].t())
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    score = min(float(row["val/loss"]) for row in rows if row["val/loss"])
    assert f"the adapter of the best val/loss ({score:.4g}) is in {tmp_path / 'adapter'}" in said


def test_files_that_are_cut_or_missing_are_named(runs, folder, tmp_path, capsys):
    apps.load(runs / "finetune", quantize="int4").save_pretrained(tmp_path / "int4")
    model = apps.load(tmp_path / "int4")
    assert form_of(model) == "int4"
    os.truncate(tmp_path / "int4" / "model.safetensors", 100_000)
    copytree(folder / "model", tmp_path / "unknown")
    config = json.loads((folder / "model" / "config.json").read_text())
    (tmp_path / "unknown" / "config.json").write_text(json.dumps({**config, "model_type": "foo_moe"}))
    copytree(folder / "model", tmp_path / "mute", ignore=ignore_patterns("token*"))
    for name, said in (
        ("int4", "int4/model.safetensors cannot be read"),
        ("unknown", f"transformers {transformers.__version__} knows no model_type 'foo_moe'"),
        ("mute", "mute has no tokenizer: no tokenizer.json"),
    ):
        assert said in failing(capsys, "serve", "--ckpt_path", tmp_path / name)
    copytree(runs / "lora" / "adapter", tmp_path / "adapter")
    os.truncate(tmp_path / "adapter" / "adapter_model.safetensors", 5_000)
    plain = core.adopt(transformers.AutoModelForCausalLM.from_pretrained(folder / "model"))
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read"):
        load_adapters(plain, tmp_path / "adapter")


def test_each_row_counts_once():
    metrics = RowMetrics()
    metrics.update([Block(1, 3.0, 1, 4), Block(0, 5.0, 3, 4), Block(1, 3.0, 1, 4)])  # the last fills up a round
    assert float(metrics.compute()["loss"]) == 1.0


def test_two_processes_train_evaluate_and_write_a_whole_adapter(folder, tmp_path):
    """An odd number of validation rows, so that one of them is repeated."""
    base = [sys.executable, "-m", "apps.cli"]
    data = ["--data.folder", folder / "model", "--data.root", folder, "--data.train_files", "chats.jsonl"]
    data += ["--data.block_size", "24", "--data.val_size", "7", "--data.eval_batch_size", "2"]
    data += ["--data.cache_dir", folder / "cache"]
    cpu = ["--trainer.accelerator", "cpu"]
    two = ["--config", "configs/parallel/expert_parallel.yaml", "--trainer.devices", "2", *cpu]
    assert len(sampled(folder, block_size=24, val_size=7).examples("val")) == 7

    def run(command, name, *words):
        config = ["--config", "configs/hub/lora.yaml", "--run_dir", tmp_path / name]
        argv = [*base, command, *config, *words, *data]
        done = subprocess.run([*map(str, argv)], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done

    trains = ["--trainer.max_epochs", "2", "--trainer.accumulate_grad_batches", "1"]
    run("fit", "two", *two, *trains)
    assert fit(folder, tmp_path / "one", *trains) == 0
    own, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("two", "one"))
    assert {name: t.shape for name, t in own.items()} == {name: t.shape for name, t in other.items()}
    assert len(own) == 2 * 2 * (4 + 2)  # A and B of 2 layers' 4 attention matrices, and 2 matrices of all experts
    assert any(float(t.abs().max()) > 0 for name, t in own.items() if "lora_B" in name and "experts" in name)
    saved = tmp_path / "two" / "checkpoints" / "best.ckpt"
    losses = []
    for name, words in (("alone", cpu), ("together", two)):
        run("validate", name, *words, "--ckpt_path", saved)
        losses.append(json.loads((tmp_path / name / "validate.json").read_text())["val/loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    rows = list(csv.DictReader((tmp_path / "two" / "metrics.csv").open()))
    trained = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert trained[-1] < trained[0]
    assert min(trained) == pytest.approx(losses[0], abs=1e-6)


def test_a_model_trained_here_becomes_mixtral_and_is_tuned_pruned_and_served(folder, tmp_path):
    text = ["--data.train_files", "text.txt", "--data.root", str(folder), "--data.cache_dir", str(folder / "cache")]
    steps = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]
    own = ["--config", "configs/nlp/text_mixtral_like.yaml", "--run_dir", str(tmp_path / "own")]
    own += ["--data.dataset", "text", "--data.tokenizer.vocab_size", "300", "--data.block_size", "32"]
    own += ["--data.val_size", "4", "--data.test_size", "4"]
    assert main(["fit", *own, *text, *steps]) == 0
    module = apps.load(tmp_path / "own")
    save_pretrained(module.model, tmp_path / "mixtral", subwords=module.subwords)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral").eval()
    prompt = "What comes after 3?"
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "mixtral")(prompt, return_tensors="pt")["input_ids"]
    vocabulary = config_of(tmp_path / "mixtral").vocabulary
    read = torch.tensor(module.subwords.encode([prompt], "target"))
    assert torch.equal(torch.as_tensor(vocabulary.theirs)[read], ids)
    with torch.no_grad():
        assert close(theirs(input_ids=ids).logits, module(read)[..., torch.as_tensor(vocabulary.ours)]) < 1e-5
    tuned = ["--config", "configs/hub/lora.yaml", "--data.folder", str(tmp_path / "mixtral"), "--data.block_size", "32"]
    tuned += ["--trainer.accumulate_grad_batches", "1", "--model.optimizer.lr", "0.005"]
    assert main(["fit", *tuned, *text, *steps, "--run_dir", str(tmp_path / "lora")]) == 0
    rest = ["--data.train_files", "text.txt", "--data.root", str(folder)]
    argv = ["convert", "prune", "--ckpt_path", str(tmp_path / "lora"), "--keep", "6", *rest]
    assert main([*argv, "--output", str(tmp_path / "pruned")]) == 0
    pruned = apps.load(tmp_path / "pruned")
    service = pruned.task.service()
    (answer,) = service.predict([service.read({"text": prompt, "tokens": 6})])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert model.config.num_local_experts == 6
    written = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert answer["text"] == pruned.tokenizer.decode(written, skip_special_tokens=True)
