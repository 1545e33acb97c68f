"""A folder of transformers trained, tested and used by the command line: texts, chats, LoRA and QLoRA."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from chats import TEMPLATE, write
from places import ROOT
from pyarrow import parquet
from safetensors.torch import load_file, save_file

import apps
import core
from apps.cli import main
from apps.hub.data import IGNORED, HubBatch, HubTextData
from apps.hub.folders import load_model
from apps.hub.module import HubCausalLM, LoRAConfig
from apps.hub.packing import packed

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    base = write(tmp_path_factory.mktemp("hub"))
    (base / "one.txt").write_text("What comes after 3?\n")
    return base


def data(folder, **options):
    given = {"train_files": "chats.jsonl", "block_size": 48, "batch_size": 4, "eval_batch_size": 4}
    return HubTextData(str(folder / "model"), root=str(folder), cache_dir=str(folder / "cache"), **{**given, **options})


def test_documents_are_packed_whole_and_each_token_once():
    rows = packed([5, 3, 9, 2, 7], 8)
    assert rows == [[(2, 0, 8)], [(4, 0, 7), (2, 8, 9)], [(0, 0, 5), (1, 0, 3)], [(3, 0, 2)]]
    assert packed([], 4) == []
    lengths = torch.randint(1, 40, (200,)).tolist()
    rows = packed(lengths, 32)
    assert all(sum(end - start for _, start, end in row) <= 32 for row in rows)
    assert sorted((d, t) for row in rows for d, a, b in row for t in range(a, b)) == [
        (d, t) for d, n in enumerate(lengths) for t in range(n)
    ]
    assert len(rows) <= 1.1 * sum(lengths) / 32 + 1


def test_the_loss_of_a_chat_is_on_its_answers(folder):
    own = data(folder, val_size=4)
    tokenizer = own.tokenizer
    batch = own.examples("train")[0]
    learned = [tokenizer.decode(run) for run in runs(batch)]
    assert learned
    assert all(text.endswith(" does.</s>") and "What" not in text for text in learned)
    assert len(own.examples("train").bounds) - 1 == 36
    assert len(own.examples("val").bounds) - 1 == 4


def runs(batch):
    """Return the ids of each stretch of tokens with a label, of the first row."""
    found, last = [], False
    for token, label in zip(batch.tokens_BL[0].tolist(), batch.labels_BL[0].tolist(), strict=True):
        if label != IGNORED:
            assert label == token
            found = [*found[:-1], [*found[-1], token]] if last else [*found, [token]]
        last = label != IGNORED
    return found


def loss_of_documents(model, batch):
    """Return transformers' mean loss of a row's documents, each by itself, and the number of tokens with a loss."""
    total = count = 0.0
    starts = [*(batch.positions_BL[0] == 0).nonzero().flatten().tolist(), batch.tokens_BL.shape[1]]
    for start, end in itertools.pairwise(starts):
        ids, labels = batch.tokens_BL[:, start:end], batch.labels_BL[:, start:end]
        number = int((labels[:, 1:] != IGNORED).sum())
        if number:
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=labels).loss) * number
            count += number
    return total / count, count


@pytest.mark.parametrize("lora", [None, LoRAConfig(2)], ids=["whole", "lora"])
def test_documents_of_a_row_do_not_see_each_other(folder, lora):
    """A packed row's loss is that of its documents, each by itself; the rest of the model is transformers'."""
    module = HubCausalLM(str(folder / "model"), lora=lora).eval()
    batch = data(folder).examples("train")[0]
    packed_loss = module.task_loss(batch)
    theirs = transformers.MixtralForCausalLM.from_pretrained(folder / "model").eval()
    expected, count = loss_of_documents(theirs, batch)
    assert packed_loss.weight == count
    assert float(packed_loss.loss.detach()) == pytest.approx(expected, rel=1e-5)


NARROW = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8}


@pytest.mark.parametrize(
    ("kind", "options", "is_apart"),
    [("GptOss", {**HEADS, **EXPERTS}, True), ("Mamba", {"state_size": 4}, False), ("Bloom", {"n_head": 4}, False)],
)
def test_a_model_whose_documents_would_see_each_other_takes_one_a_row(
    kind, options, is_apart, folder, tmp_path, capsys
):
    """GPT-OSS makes masks without the positions, and gets them; Mamba carries a state on; BLOOM takes no positions."""
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    torch.manual_seed(0)
    own = getattr(transformers, f"{kind}Config")(**NARROW, **options)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(own).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(model)
    shutil.copyfile(folder / "chats.jsonl", tmp_path / "chats.jsonl")
    flags = ["--trainer.max_steps", "1", "--model.freeze", "[]"]
    assert fit(tmp_path, tmp_path / "run", *flags, config="finetune") == (0 if is_apart else 1)
    said = f"a {kind}ForCausalLM lets the documents of a row see each other: give data.packed=false"
    assert (said in capsys.readouterr().err) == (not is_apart)
    module = HubCausalLM(str(model)).eval()
    rows = data(tmp_path, packed=is_apart).examples("train")
    assert (len(rows) < 20) if is_apart else (len(rows) == 38)  # of 40 chats 2 are held out
    out = module.task_loss(rows[0])
    expected, count = loss_of_documents(theirs, rows[0])
    assert (out.weight, float(out.loss.detach())) == (count, pytest.approx(expected, rel=1e-5))
    if not is_apart:
        assert rows.__getitems__([0, 1, 2]).tokens_BL.shape[1] < 30  # of 48
        assert fit(tmp_path, tmp_path / "run", *flags, "--data.packed", "false", config="finetune") == 0


def test_padding_of_a_row_is_in_no_count_and_no_loss(folder):
    """A document in a row of 48 tokens and of 96: what the experts count is the same, and the balance loss too."""
    module = HubCausalLM(str(folder / "model"))
    found = []
    for size in (48, 96):
        batch = data(folder, train_files="one.txt", val_files="one.txt", block_size=size).examples("train")[0]
        with core.record(module) as tape:
            loss = module.task_loss(batch).loss
        counts = [entry.routing.chosen_per_expert_E.tolist() for entry in tape.entries]
        found.append((int(batch.valid_BL.sum()), counts, float(core.aux_loss(tape).detach()), float(loss.detach())))
    (tokens, counts, *losses), (more_tokens, more_counts, *more_losses) = found
    assert tokens == more_tokens < 20
    assert [sum(layer) for layer in counts] == [2 * tokens, 2 * tokens]  # two experts a token
    assert counts == more_counts
    assert more_losses == pytest.approx(losses, rel=1e-5)
    assert losses[0] > 0


@pytest.mark.parametrize(
    ("answer", "learned"),
    [
        ("{% if loop.last %}thought {% endif %}{{ m['content'] }}</s>", ["4 does.</s>", "thought 5 does.</s>"]),
        ("{{ m['content'] }}{% if loop.last %}<pad>{% else %}</s>{% endif %}", ["4 does.</s>", "5 does.<pad>"]),
        ("{{ m['content'] }}{% if loop.last %} at last{% endif %}</s>", None),
    ],
    ids=["thoughts of the last answer alone", "another last token", "other words"],
)
def test_templates_that_show_the_last_answer_otherwise(answer, learned, folder, tmp_path):
    said = ("What comes after 3?", "4 does.", "And 4?", "5 does.")
    roles = itertools.cycle(("user", "assistant"))
    chat = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    (tmp_path / "turns.jsonl").write_text(json.dumps({"messages": chat}))
    name = str(tmp_path / "turns.jsonl")
    own = data(folder, train_files=name, val_files=name)
    question = "{{ m['content'] }}"
    own.tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'user' %}"
        + f"{question}{{% else %}}{answer}{{% endif %}}{{% endfor %}}"
        + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    if learned is None:
        with pytest.raises(ValueError, match=r"turns.jsonl, line 1: .* changes what was said before"):
            own.examples("train")
    else:
        assert [own.tokenizer.decode(run) for run in runs(own.examples("train")[0])] == learned


def test_a_prompt_and_its_completion_are_a_chat(folder, tmp_path):
    chats = [json.loads(line)["messages"] for line in (folder / "chats.jsonl").read_text().splitlines()]
    lines = [json.dumps({"prompt": q["content"], "completion": a["content"]}) for q, a in chats]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    parquet.write_table(pa.Table.from_pylist([{"messages": chat} for chat in chats]), tmp_path / "chats.parquet")
    for name in ("pairs.jsonl", "chats.parquet"):
        given = data(folder, train_files=str(tmp_path / name))
        for own, expected in zip(given.examples("train")[0], data(folder).examples("train")[0], strict=True):
            assert torch.equal(own, expected)


def test_a_prompt_and_its_completion_need_no_chat_template(folder, tmp_path):
    """Without one they are a text, whose loss is on the completion and the end alone."""
    shutil.copytree(folder / "model", tmp_path / "model")
    lines = [json.dumps({"prompt": f"What comes after {i}?", "completion": f" {i + 1} does."}) for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    own = data(tmp_path, train_files="pairs.jsonl", val_size=0)
    own.tokenizer.chat_template = None
    batch = own.examples("train")[0]
    learned = [own.tokenizer.decode(run) for run in runs(batch)]
    asked = own.tokenizer.decode(batch.tokens_BL[0, batch.valid_BL[0]])
    assert all(re.fullmatch(r" \d+ does\.</s>", text) for text in learned)
    assert len(learned) == asked.count("<s>What comes after ") > 0
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Who?"}]}))
    with pytest.raises(ValueError, match=r"chats.jsonl, line 1 has messages, and .*model no chat template$"):
        other = data(tmp_path)
        other.tokenizer.chat_template = None
        other.examples("train")


def test_a_part_of_one_file_of_text_is_held_out(folder, tmp_path, capsys):
    """A share holds out one document at least; of a single one its end, 5 of 100 numbers, so that there is a best."""
    numbers = [str(i) for i in range(100, 200)]
    files = {"lines": "\n".join(numbers), "words": " ".join(numbers), "few": "\n\n".join(numbers[:6])}
    held = {}
    for name, text in files.items():
        (tmp_path / f"{name}.txt").write_text(text)
        own = data(folder, train_files=str(tmp_path / f"{name}.txt"))
        texts = {}
        for split in ("train", "val"):
            ids, bounds = own.opened[f"{split}_ids"], own.opened[f"{split}_bounds"]
            texts[split] = [
                own.tokenizer.decode(ids[a:b], skip_special_tokens=True) for a, b in itertools.pairwise(bounds)
            ]
        assert sorted(" ".join([*texts["train"], *texts["val"]]).split()) == numbers[: 6 if name == "few" else 100]
        held[name] = [len(text.split()) for text in texts["val"]]
        said = "1 of 6 documents are" if name == "few" else "the last 5.0% of the only document are"
        assert own.describe().endswith(f"; {said} held out to validate on")
    assert held == {"lines": [5], "words": [5], "few": [1]}
    run = tmp_path / "run"
    flags = ["--data.folder", str(folder / "model"), "--data.train_files", str(tmp_path / "few.txt")]
    flags += ["--data.cache_dir", str(tmp_path / "cache"), "--data.block_size", "32", "--trainer.accelerator", "cpu"]
    assert main(["fit", "--config", "configs/hub/finetune.yaml", "--run_dir", str(run), *flags]) == 0
    assert (run / "checkpoints" / "best.ckpt").exists()
    capsys.readouterr()
    main(["doctor", "--ckpt_path", str(run)])  # 1 where it finds something
    out, err = capsys.readouterr()
    assert "validation batches of" in out
    assert "error: " not in err


def test_plain_text_and_lines(folder):
    own = data(folder, train_files="text.txt", document="line", val_size=0.1)
    batch = own.examples("train")[0]
    assert batch.tokens_BL[0, 0] == own.tokenizer.bos_token_id
    assert int((batch.labels_BL != IGNORED).sum()) > 20


def test_text_is_learned_as_it_is_written(folder, tmp_path):
    """Spaces at the beginnings of lines, tabs, and empty lines of a whole file."""
    code = "def f(x):\n    if x:\n\treturn  1\n\n    return 2"
    (tmp_path / "code.py").write_text(code + "\n")
    (tmp_path / "code.jsonl").write_text(json.dumps({"text": code}) + "\n")
    for name in ("code.py", "code.jsonl"):
        given = {"root": str(tmp_path), "cache_dir": str(tmp_path / "cache"), "document": "file", "block_size": 96}
        own = HubTextData(str(folder / "model"), name, val_files=name, **given)
        batch = own.examples("train")[0]
        assert own.tokenizer.decode(batch.tokens_BL[batch.valid_BL], skip_special_tokens=True) == code
    given |= {"document": "paragraph", "packed": False}
    assert len(HubTextData(str(folder / "model"), "code.py", val_files="code.py", **given).examples("train")) == 2


def test_prompts_of_a_file_are_answered_in_its_order(folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What comes after 3?\n  And 4?\n")
    words = ["--data.folder", str(folder / "model"), "--ckpt_path", "none", "--run_dir", str(tmp_path / "run")]
    words += ["--model.generate.max_new_tokens", "3", "--data.predict_file", str(prompts)]
    assert main(["predict", "--config", "configs/hub/finetune.yaml", *words]) == 0
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    module = HubCausalLM(str(folder / "model")).eval()
    expected = module.predict(["What comes after 3?", "  And 4?"], max_new_tokens=3)
    assert [json.loads(line)["output"] for line in lines] == expected
    prompts.write_text("What comes after 3?\n\nAnd 4?\n")
    assert main(["predict", "--config", "configs/hub/finetune.yaml", *words, "--overwrite"]) == 1
    assert "prompts.txt:2 is empty: each line is a prompt" in capsys.readouterr().err


def fit(folder, run, *flags, config="lora"):
    argv = ["fit", "--config", f"configs/hub/{config}.yaml", "--run_dir", str(run), "--data.folder"]
    argv += [str(folder / "model"), "--data.root", str(folder), "--data.train_files", "chats.jsonl"]
    argv += ["--data.cache_dir", str(folder / "cache"), "--data.block_size", "48", "--trainer.accelerator", "cpu"]
    return main([*argv, "--trainer.accumulate_grad_batches", "1", "--model.optimizer.lr", "0.005", *flags])


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_continuation_is_drawn_from_all_tokens_unless_the_folder_says_otherwise(top_k, folder):
    """At so high a temperature all tokens are alike; transformers would draw from its 50 best."""
    module = HubCausalLM(str(folder / "model")).eval()
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
    module = HubCausalLM(str(folder / "model"))  # in training, as it is made
    module.model.model.layers[0].self_attn.attention_dropout = 0.9
    answers = module.continued(["What comes"], max_new_tokens=12)
    assert module.model.training
    assert answers == module.eval().continued(["What comes"], max_new_tokens=12)


def test_another_vocabulary_makes_other_tokens(tmp_path):
    (tmp_path / "text.txt").write_text("ab ba\n" * 4)
    made = {"train_files": "text.txt", "val_files": "text.txt", "cache_dir": str(tmp_path / "cache"), "block_size": 16}
    for name, order in (("one", ("<|endoftext|>", "a", "b")), ("two", ("<|endoftext|>", "b", "a"))):
        (tmp_path / name).mkdir()
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
        options = {"tokenizer_class": "GPT2Tokenizer", **special}
        contents = {"tokenizer_config": options, "vocab": {token: i for i, token in enumerate(order)}}
        for file, content in {**contents, "config": {"model_type": "gpt2", "vocab_size": 3}}.items():
            (tmp_path / name / f"{file}.json").write_text(json.dumps(content))
        (tmp_path / name / "merges.txt").write_text("#version: 0.2\n")
        own = HubTextData(str(tmp_path / name), root=str(tmp_path), **made)
        first = own.examples("val")[0].tokens_BL[0].tolist()
        assert [i for i in first if i][:2] == [order.index("a"), order.index("b")]


@pytest.mark.parametrize("config", ["lora", "qlora", "finetune"])
def test_fit_test_predict(config, folder, tmp_path, capsys):
    assert fit(folder, tmp_path, "--trainer.max_epochs", "3", config=config) == 0
    said = capsys.readouterr().err
    # 0.02 of the model, 2 experts a token, 2 layers
    assert "balance losses of each of the 2 MoE layers: load_balancing_loss" in said
    assert "=0.02" in said
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    losses = [float(row[rows[0].index("val/loss")]) for row in rows[1:] if row[rows[0].index("val/loss")]]
    assert losses[-1] < losses[0] < 6.0
    assert main(["test", "--ckpt_path", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "test.json").read_text())
    assert json.dumps(figures).count("test/perplexity")
    assert main(["predict", "--ckpt_path", str(tmp_path), "--data.text", "What comes after 3?"]) == 0
    model = apps.load(tmp_path)
    assert len(model.predict(["What comes after 3?", "And 4?"], max_new_tokens=4)) == 2
    if config == "finetune":
        assert not (tmp_path / "adapter").exists()
        return
    peft = pytest.importorskip("peft")
    base = transformers.MixtralForCausalLM.from_pretrained(folder / "model")
    with_adapter = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    best = apps.load(tmp_path / "checkpoints" / "best.ckpt").eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        own, theirs = best.model(input_ids=ids).logits, with_adapter(input_ids=ids).logits
    close = 1e-5 if config == "lora" else 0.3  # its experts are rounded to 4 bits
    assert float((own - theirs).norm() / theirs.norm()) < close
    held = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(".lora." in name for name in held)


def test_a_run_finds_its_folder_from_anywhere_and_is_told_where_it_has_gone(folder, tmp_path, monkeypatch, capsys):
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    config, flags = str(ROOT / "configs/hub/lora.yaml"), ["--trainer.max_steps", "1", "--data.train_files", "text.txt"]
    assert main(["fit", "--config", config, "--data.folder", "model", "--run_dir", "run", *flags]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert apps.load("../run").folder == str(tmp_path / "model")
    predict = ["predict", "--ckpt_path", "../run", "--data.text", "What", "--model.generate.max_new_tokens", "2"]
    assert main([*predict, "--output", "one.jsonl"]) == 0
    (tmp_path / "model").rename(tmp_path / "elsewhere" / "moved")
    assert main([*predict, "--output", "two.jsonl"]) == 1
    assert f"{tmp_path / 'model'} is no folder of a model of transformers" in capsys.readouterr().err
    assert main([*predict, "--output", "two.jsonl", "--data.folder", "moved"]) == 0
    assert Path("one.jsonl").read_text() == Path("two.jsonl").read_text()


def test_a_tuned_model_is_written_for_transformers(folder, tmp_path):
    module = HubCausalLM(str(folder / "model"), lora=LoRAConfig(2, modules=("experts", "router")))
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = module.eval().model(input_ids=ids).logits
        copy.deepcopy(module).save_folder(tmp_path / "out")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert float((again(input_ids=ids).logits - expected).norm() / expected.norm()) < 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == TEMPLATE
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(
        load_file(folder / "model" / "model.safetensors")
    )


def test_the_routers_stay_and_the_rest_trains(folder):
    module = HubCausalLM(str(folder / "model"), freeze=["router", "lm_head*"])
    module.train()
    batch = data(folder).examples("train")[0]
    loss = module.training_loss(HubBatch(*batch))
    loss.total.backward()
    trained = {name for name, p in module.model.named_parameters() if p.grad is not None}
    assert trained
    assert not any("gate.weight" in name or "lm_head" in name for name in trained)
    assert len(loss.aux.terms) == 1


def test_a_dense_model_has_no_experts_and_trains(folder, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    module = HubCausalLM(str(tmp_path / "dense"), lora=LoRAConfig(2))
    assert not core.moe_layers(module)
    assert all(".self_attn." in n for n, p in module.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"freeze='router' names no parameter of .*, which is dense \(--model.freeze"):
        HubCausalLM(str(tmp_path / "dense"), freeze=["router"])
    for options, rule in (
        ({"quantize": "int8"}, "quantize='int8': the model of .* is dense"),
        ({"lora": LoRAConfig(2, modules=("router",))}, r"lora.modules=\['router'\]: the model of .* is dense"),
    ):
        with pytest.raises(ValueError, match=rule):
            HubCausalLM(str(tmp_path / "dense"), **{"lora": LoRAConfig(2), **options})


def test_bad_input_is_one_line(folder, tmp_path, capsys):
    def failing(*flags):
        argv = ["--run_dir", str(tmp_path / "run"), "--data.root", str(folder)]
        argv += ["--data.cache_dir", str(tmp_path / "cache"), *flags]
        assert main(["fit", "--config", "configs/hub/lora.yaml", *argv]) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    model = str(folder / "model")
    assert "none is no folder of a model of transformers" in failing(
        "--data.folder", str(tmp_path / "none"), "--data.train_files", "chats.jsonl"
    )
    shutil.copytree(model, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    assert "has no weights" in failing("--data.folder", str(tmp_path / "empty"), "--data.train_files", "chats.jsonl")
    shutil.copytree(model, tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / name).unlink()
    assert "has no tokenizer" in failing("--data.folder", str(tmp_path / "mute"), "--data.train_files", "chats.jsonl")
    shutil.copytree(model, tmp_path / "cut")
    content = (Path(model) / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(content[:-50])
    assert "cut/model.safetensors cannot be read" in failing(
        "--data.folder", str(tmp_path / "cut"), "--data.train_files", "chats.jsonl"
    )
    (folder / "odd.jsonl").write_text('{"message": []}\n')
    assert 'odd.jsonl, line 1 has no "text", no "prompt" and "completion", no "messages"' in failing(
        "--data.folder", model, "--data.train_files", "odd.jsonl"
    )
    assert "missing.txt is missing" in failing("--data.folder", model, "--data.train_files", "missing.txt")
    assert "rank=4000 exceeds" in failing(
        "--data.folder", model, "--data.train_files", "chats.jsonl", "--model.lora.rank", "4000"
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="quantize='int8' without lora: quantized experts are frozen"):
        HubCausalLM(model, quantize="int8")
    with pytest.raises(ValueError, match=r"freeze='\*\.nothing' names no parameter"):
        HubCausalLM(model, freeze=["*.nothing"])


def test_a_folder_lacks_no_tensor_but_a_tied_one(folder, tmp_path):
    def written(name, config, change):
        shutil.copytree(folder / "model", tmp_path / name)
        values = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(values | config))
        tensors = load_file(folder / "model" / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
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
    module = HubCausalLM(str(folder / "model"), lora=LoRAConfig(2))
    ways = module.baselines()
    assert list(ways) == ["full", "full_router_frozen", "lora_of_router_too", "qlora"]
    assert module.heading == "LoRA"
    frozen, qlora = ways["full_router_frozen"].build(), ways["qlora"].build()
    assert frozen.heading == "full, router frozen"
    assert not any(p.requires_grad for layer in core.moe_layers(frozen).values() for p in layer.router.parameters())
    assert qlora.heading == "QLoRA"
    assert all(layer.experts.is_quantized for layer in core.moe_layers(qlora).values())
    wide = HubCausalLM(str(folder / "model"), lora=LoRAConfig(8)).baselines()["lora_of_router_too"]
    assert wide.build is None
    assert wide.note == "rank=8 exceeds the router's 4 experts"


def test_weights_of_a_folder_in_bfloat16_take_small_steps(folder, tmp_path, capsys):
    """In bfloat16 a step of 1e-5 is rounded away wherever a weight is larger than 0.005."""
    base, moved = tmp_path / "base", {}
    shutil.copytree(folder, base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.bfloat16)
    model.save_pretrained(base / "model")
    options = ["--trainer.max_steps", "3", "--model.optimizer.lr", "1e-5"]
    for name, config, flags in (("float32", "finetune", []), ("half", "finetune", ["--model.dtype", "bfloat16"])):
        run = tmp_path / name
        assert fit(base, run, *options, *flags, config=config) == 0, capsys.readouterr().err
        said = capsys.readouterr().err
        assert ("rounds small steps away: give model.dtype=float32" in said) == (name == "half")
        state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        pairs = [(state[f"model.{n}"], p) for n, p in model.named_parameters() if n.endswith("_proj.weight")]
        moved[name] = sum(int((a != b).sum()) for a, b in pairs) / sum(b.numel() for _, b in pairs)
    assert moved["float32"] > 0.9
    assert moved["half"] < 0.5


def test_the_whole_model_is_compared_in_float32(folder, tmp_path):
    transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).save_pretrained(tmp_path)
    module = HubCausalLM(str(tmp_path), lora=LoRAConfig(2))
    assert {p.dtype for n, p in module.named_parameters() if ".lora." in n} == {torch.float32}
    assert module.model.dtype == torch.bfloat16
    full = module.baselines()["full"].build()
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert list(full.baselines()) == ["full_router_frozen", "lora", "lora_of_router_too", "qlora"]


def test_values_of_rows_have_the_mean_loss(folder):
    module = HubCausalLM(str(folder / "model")).eval()
    outs = [module.task_loss(batch) for batch in data(folder).val_dataloader()]
    values = module.example_values(outs)
    total = sum(float(out.loss) * out.weight for out in outs) / sum(out.weight for out in outs)
    assert values.mean == pytest.approx(total, rel=1e-5)


def test_a_service_answers_and_a_page_shows_the_experts_of_each_token(folder):
    module = HubCausalLM(str(folder / "model")).eval()
    service = module.task.service()
    values = service.read({"text": "What comes after 3?", "tokens": 5})
    (answer,) = service.predict([values])
    assert answer["text"] == module.predict(["What comes after 3?"], max_new_tokens=5)[0]
    (own,) = module.task.answers([values])
    layers = module.task.layers(core.Tape(), values, own)
    assert len(layers) == 2
    with pytest.raises(ValueError, match="at most 8192 are read"):
        service.read({"text": "word " * 9000})


def test_doctor_prune_merge_and_densify_take_the_folder(folder, tmp_path, capsys):
    model = ["--ckpt_path", str(folder / "model")]
    own = [*model, "--data.val_files", "chats.jsonl", "--data.root", str(folder)]
    own += ["--data.block_size", "48", "--data.cache_dir", str(folder / "cache")]
    assert main(["doctor", *own]) in (0, 1)
    assert "2 routers on at most 8 validation batches" in capsys.readouterr().out
    for kind, experts in (("prune", 3), ("merge", 2), ("densify", 1)):
        words = [] if kind == "densify" else ["--keep", str(experts)]
        words += ["--merge"] if kind == "merge" else []
        argv = ["convert", "densify" if kind == "densify" else "prune", *own, "--output", str(tmp_path / kind)]
        assert main([*argv, *words]) == 0
        assert "val/loss" in capsys.readouterr().out
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        assert again.config.num_local_experts == experts
        assert again.model.layers[1].mlp.experts.down_proj.shape[0] == experts
        assert (tmp_path / kind / "tokenizer.json").is_file()

    def failing(*argv):
        assert main([*argv]) == 1
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        return line

    prune = ("convert", "prune", *own, "--output", str(tmp_path / "new"))
    assert "a token takes 2 experts" not in failing(*prune, "--keep", "9")
    assert "leaves no statistics" in failing(*prune, "--keep", "2", "--batches", "0")
    assert "prune, densify take one, not merge" in failing(
        "convert", "merge", *model, "--output", str(tmp_path / "new")
    )
    assert not (tmp_path / "new").exists()


def test_the_same_text_is_in_one_split_only(folder):
    (folder / "twice.txt").write_text("".join(f"text {i % 10}\n" for i in range(40)))
    own = data(folder, train_files="twice.txt", document="line", val_size=8)
    texts = {}
    for split in ("train", "val"):
        rows = own.examples(split)
        ids = own.opened[f"{split}_ids"].tolist()
        texts[split] = [tuple(ids[a:b]) for a, b in itertools.pairwise(rows.bounds)]
    assert [len(texts["train"]), len(texts["val"])] == [32, 8]
    assert not set(texts["train"]) & set(texts["val"])
