"""Texts and chats for a model of transformers: what is packed, learned and held out."""

from __future__ import annotations

import itertools
import json
import re
import shutil

import pyarrow as pa
import pytest
import torch
from hubs import HubTextData, data, fit, module_of, rows
from pyarrow import parquet

import core
from apps.cli import main
from apps.hub.data import IGNORED
from apps.hub.module import LoRAConfig
from apps.hub.packing import packed

transformers = pytest.importorskip("transformers")


def test_documents_are_packed_whole_and_each_token_once():
    assert packed([5, 3, 9, 2, 7], 8) == [[(2, 0, 8)], [(4, 0, 7), (2, 8, 9)], [(0, 0, 5), (1, 0, 3)], [(3, 0, 2)]]
    assert packed([], 4) == []
    lengths = torch.randint(1, 40, (200,)).tolist()
    found = packed(lengths, 32)
    assert all(sum(end - start for _, start, end in row) <= 32 for row in found)
    assert sorted((d, t) for row in found for d, a, b in row for t in range(a, b)) == [
        (d, t) for d, n in enumerate(lengths) for t in range(n)
    ]
    assert len(found) <= 1.1 * sum(lengths) / 32 + 1


def learned(own):
    """Return the text of each stretch of tokens with a label, of the first row."""
    batch = own.examples("train")[0]
    tokens_L, labels_L = batch.tokens_BL[0], batch.labels_BL[0]
    is_learned_L = labels_L != IGNORED
    assert torch.equal(labels_L[is_learned_L], tokens_L[is_learned_L])
    groups = itertools.groupby(zip(tokens_L.tolist(), is_learned_L.tolist(), strict=True), lambda pair: pair[1])
    return [own.tokenizer.decode([token for token, _ in group]) for has_label, group in groups if has_label]


def documents(own, split):
    ids, bounds = own.opened[f"{split}_ids"], own.opened[f"{split}_bounds"]
    return [own.tokenizer.decode(ids[a:b], skip_special_tokens=True) for a, b in itertools.pairwise(bounds)]


def test_the_loss_of_a_chat_is_on_its_answers(folder):
    own = data(folder, val_size=4)
    texts = learned(own)
    assert texts
    assert all(text.endswith(" does.</s>") and "What" not in text for text in texts)
    assert [len(own.examples(split).bounds) - 1 for split in ("train", "val")] == [36, 4]


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


def check_apart(module, theirs, batch):
    """Check that a packed row's loss is that of its documents, each by itself."""
    out, (expected, count) = module.eval().task_loss(batch), loss_of_documents(theirs.eval(), batch)
    assert (out.weight, float(out.loss.detach())) == (count, pytest.approx(expected, rel=1e-5))


@pytest.mark.parametrize("lora", [None, LoRAConfig(2)], ids=["whole", "lora"])
def test_documents_of_a_row_do_not_see_each_other(folder, lora):
    theirs = transformers.MixtralForCausalLM.from_pretrained(folder / "model")
    check_apart(module_of(folder, lora=lora), theirs, rows(folder))


NARROW = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 2}
GPT_OSS = {
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32, "num_local_experts": 4},
    **{"num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
}


@pytest.mark.parametrize(
    ("kind", "options", "is_apart"),
    [("GptOss", GPT_OSS, True), ("Mamba", {"state_size": 4}, False), ("Bloom", {"n_head": 4}, False)],
)
def test_a_model_whose_documents_would_see_each_other_takes_one_a_row(
    kind, options, is_apart, folder, tmp_path, capsys
):
    """GPT-OSS makes masks without the positions, and gets them; Mamba carries a state on; BLOOM takes no positions."""
    shutil.copytree(folder / "model", tmp_path / "model")
    own = getattr(transformers, f"{kind}Config")(**NARROW, **options)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(own)
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(tmp_path / "model")
    shutil.copyfile(folder / "chats.jsonl", tmp_path / "chats.jsonl")
    flags = ["--trainer.max_steps", "1", "--model.freeze", "[]"]
    assert fit(tmp_path, tmp_path / "run", *flags, config="finetune") == (0 if is_apart else 1)
    said = f"a {kind}ForCausalLM lets the documents of a row see each other: give data.packed=false"
    assert (said in capsys.readouterr().err) == (not is_apart)
    batches = data(tmp_path, packed=is_apart).examples("train")
    assert (len(batches) < 20) if is_apart else (len(batches) == 38)  # of 40 chats 2 are held out
    check_apart(module_of(tmp_path), theirs, batches[0])
    if not is_apart:
        assert batches.__getitems__([0, 1, 2]).tokens_BL.shape[1] < 30  # of 48
        assert fit(tmp_path, tmp_path / "run", *flags, "--data.packed", "false", config="finetune") == 0


def test_padding_of_a_row_is_in_no_count_and_no_loss(folder):
    """A document in a row of 48 tokens and of 96: what the experts count is the same, and the balance loss too."""
    module, found = module_of(folder), []
    for size in (48, 96):
        batch = rows(folder, train_files="one.txt", val_files="one.txt", block_size=size)
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
    ("answer", "expected"),
    [
        ("{% if loop.last %}thought {% endif %}{{ m['content'] }}</s>", ["4 does.</s>", "thought 5 does.</s>"]),
        ("{{ m['content'] }}{% if loop.last %}<pad>{% else %}</s>{% endif %}", ["4 does.</s>", "5 does.<pad>"]),
        ("{{ m['content'] }}{% if loop.last %} at last{% endif %}</s>", None),
    ],
    ids=["thoughts of the last answer alone", "another last token", "other words"],
)
def test_templates_that_show_the_last_answer_otherwise(answer, expected, folder, tmp_path):
    said = ("What comes after 3?", "4 does.", "And 4?", "5 does.")
    roles = itertools.cycle(("user", "assistant"))
    chat = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    (tmp_path / "turns.jsonl").write_text(json.dumps({"messages": chat}))
    name = str(tmp_path / "turns.jsonl")
    own = data(folder, train_files=name, val_files=name)
    own.tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'user' %}{{ m['content'] }}{% else %}"
        + f"{answer}{{% endif %}}{{% endfor %}}"
        + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    if expected is None:
        with pytest.raises(ValueError, match=r"turns.jsonl, line 1: .* changes what was said before"):
            own.examples("train")
    else:
        assert learned(own) == expected


def test_a_prompt_and_its_completion_are_a_chat(folder, tmp_path):
    chats = [json.loads(line)["messages"] for line in (folder / "chats.jsonl").read_text().splitlines()]
    lines = [json.dumps({"prompt": q["content"], "completion": a["content"]}) for q, a in chats]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    parquet.write_table(pa.Table.from_pylist([{"messages": chat} for chat in chats]), tmp_path / "chats.parquet")
    for name in ("pairs.jsonl", "chats.parquet"):
        for own, expected in zip(rows(folder, train_files=str(tmp_path / name)), rows(folder), strict=True):
            assert torch.equal(own, expected)


def test_a_prompt_and_its_completion_need_no_chat_template(folder, tmp_path):
    """Without one they are a text, whose loss is on the completion and the end alone."""
    lines = [json.dumps({"prompt": f"What comes after {i}?", "completion": f" {i + 1} does."}) for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    own = data(folder, train_files=str(tmp_path / "pairs.jsonl"), val_size=0, cache_dir=str(tmp_path / "cache"))
    own.tokenizer.chat_template = None
    texts, batch = learned(own), own.examples("train")[0]
    asked = own.tokenizer.decode(batch.tokens_BL[0, batch.valid_BL[0]])
    assert all(re.fullmatch(r" \d+ does\.</s>", text) for text in texts)
    assert len(texts) == asked.count("<s>What comes after ") > 0
    other = data(folder, cache_dir=str(tmp_path / "cache"))
    other.tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"chats.jsonl, line 1 has messages, and .*model no chat template$"):
        other.examples("train")


def test_a_part_of_one_file_of_text_is_held_out(folder, tmp_path, capsys):
    """A share holds out one document at least; of a single one its end, 5 of 100 numbers, so that there is a best."""
    numbers = [str(i) for i in range(100, 200)]
    files = {"lines": "\n".join(numbers), "words": " ".join(numbers), "few": "\n\n".join(numbers[:6])}
    for name, text in files.items():
        (tmp_path / f"{name}.txt").write_text(text)
        own = data(folder, train_files=str(tmp_path / f"{name}.txt"))
        train, held = ([text.split() for text in documents(own, split)] for split in ("train", "val"))
        assert sorted(itertools.chain(*train, *held)) == numbers[: 6 if name == "few" else 100]
        assert [len(text) for text in held] == [1 if name == "few" else 5]
        said = "1 of 6 documents are" if name == "few" else "the last 5.0% of the only document are"
        assert own.describe().endswith(f"; {said} held out to validate on")
    few = ["--data.train_files", tmp_path / "few.txt", "--data.block_size", "32"]
    assert fit(folder, tmp_path / "run", *few, config="finetune") == 0
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()
    capsys.readouterr()
    main(["doctor", "--ckpt_path", str(tmp_path / "run")])  # 1 where it finds something
    out, err = capsys.readouterr()
    assert "validation batches of" in out
    assert "error: " not in err


def test_the_same_text_is_in_one_split_only(folder, tmp_path):
    (tmp_path / "twice.txt").write_text("".join(f"text {i % 10}\n" for i in range(40)))
    own = data(folder, train_files=str(tmp_path / "twice.txt"), document="line", val_size=8)
    train, val = (documents(own, split) for split in ("train", "val"))
    assert [len(train), len(val)] == [32, 8]
    assert not set(train) & set(val)


def test_text_is_learned_as_it_is_written(folder, tmp_path):
    """Spaces at the beginnings of lines, tabs, and empty lines of a whole file; a line begins with the first token."""
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
    own = data(folder, train_files="text.txt", document="line", val_size=0.1)
    batch = own.examples("train")[0]
    assert batch.tokens_BL[0, 0] == own.tokenizer.bos_token_id
    assert int((batch.labels_BL != IGNORED).sum()) > 20


def test_another_vocabulary_makes_other_tokens(tmp_path):
    (tmp_path / "text.txt").write_text("ab ba\n" * 4)
    made = {"train_files": "text.txt", "val_files": "text.txt", "cache_dir": str(tmp_path / "cache"), "block_size": 16}
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    files = {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", **special}}
    files["config"] = {"model_type": "gpt2", "vocab_size": 3}
    for name, order in (("one", ("<|endoftext|>", "a", "b")), ("two", ("<|endoftext|>", "b", "a"))):
        (tmp_path / name).mkdir()
        for file, content in {**files, "vocab": {token: i for i, token in enumerate(order)}}.items():
            (tmp_path / name / f"{file}.json").write_text(json.dumps(content))
        (tmp_path / name / "merges.txt").write_text("#version: 0.2\n")
        own = HubTextData(str(tmp_path / name), root=str(tmp_path), **made)
        first = own.examples("val")[0].tokens_BL[0].tolist()
        assert [i for i in first if i][:2] == [order.index("a"), order.index("b")]
