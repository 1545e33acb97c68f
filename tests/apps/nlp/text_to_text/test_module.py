"""TextToText: its loss with copies, its tasks, what it writes; runs by the command line."""

import contextlib
import dataclasses
import json
import math
import sqlite3
from pathlib import Path

import pytest
import torch
import yaml
from predicted import written
from quiet_trainer import quiet_trainer
from tasked import TRANSFORMER, options_of, task_data, text_to_text
from torch_graphs import TorchGraph

import core
from apps.cli import main
from apps.data.subwords import PAD_ID, SubwordConfig
from apps.nlp.decode import DecodeConfig, translate_ids
from apps.nlp.decode.exported import ExportedMemoryDecoder
from apps.nlp.text_to_text.metrics import METRICS
from apps.nlp.text_to_text.task import TextInText

TASK = core.MoEConfig(2, core.Task(num_tasks=2, top_k=1), core.FFN(hidden_dim=8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def data(folder):
    return task_data(folder)


def a_batch(data):
    return next(iter(data.val_dataloader()))


def test_the_loss_is_that_of_the_forward_and_tasks_are_numbers_and_tags(data):
    module, batch = text_to_text(data, label_smoothing=0.1), a_batch(data)
    log_p_BLV, target_BL = module(*module.example_inputs(batch)), batch.target_BL[:, 1:]
    real = target_BL != PAD_ID
    nll = -log_p_BLV.gather(2, target_BL[..., None])[..., 0][real]
    smooth = -log_p_BLV.mean(2)[real]
    module.train()
    torch.testing.assert_close(module.task_loss(batch).loss, (0.9 * nll + 0.1 * smooth).mean())
    module.eval()
    out = module.task_loss(batch)
    torch.testing.assert_close(out.loss.float(), nll.mean())
    assert out.outputs.tokens_B.tolist() == real.sum(1).tolist()
    module, batch = text_to_text(data, TASK), a_batch(data)
    assert module._ids(batch)[0].tolist() == batch.pair_B.tolist()
    first = [data.subwords.pieces(row[:1], "source") for row in batch.source_BS[:2].tolist()]
    assert first == [[f"<2{data.tasks[pair]}>"] for pair in batch.pair_B[:2].tolist()]
    part = module.part("last")
    assert (part.task, part.arguments, part.data) == (1, {"tasks": ("last",)}, {"tasks": ["last"]})
    assert set(part.select(batch).pair_B.tolist()) == {1}


TIED = dataclasses.replace(TRANSFORMER, tie="decoder")
THREE = dataclasses.replace(TASK, router=core.Task(num_tasks=3, top_k=1))


@pytest.mark.parametrize(
    "joint, options, message",
    [
        (True, {"metrics": ["rouge"]}, "metrics='rouge'|'rouge' is not"),
        (True, {"metrics": []}, r"metrics=\[\] names none of rouge_l"),
        (True, {"pretrained": "x", "transformer": TRANSFORMER}, "copy=True: pretrained='x' has no weights for it"),
        (True, {"moe": THREE}, "num_tasks=3, which does not fit the tasks first, last: they have 2"),
        (False, {"transformer": TIED}, r"copy=True .* data.tokenizer.joint=true"),
    ],
)
def test_what_does_not_fit_is_refused(folder, joint, options, message):
    data = task_data(folder, tokenizer=SubwordConfig(vocab_size=300, joint=joint))
    with pytest.raises(ValueError, match=message):
        text_to_text(data, **options)
    if not joint:
        assert text_to_text(data, copy=False, **options).model


def test_an_exported_model_copies_as_the_model_does(data):
    search = DecodeConfig("beam", num_beams=2, max_length_ratio=1.0, max_length_extra=2, min_new_tokens=2)
    module = text_to_text(data, TASK, decode=search).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in module.model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.5, generator=generator)
    exported, prefix = TextInText(module).exported(), [data.subwords.tag_id("last")]
    encoder, decoder = exported.graphs
    assert {"memory", "source"} <= set(decoder.inputs)
    assert exported.preprocessing["tasks"]["last"] == {"prefix": prefix, "task_ids": 1, "domain_ids": 1}
    batch, graphs = a_batch(data), ExportedMemoryDecoder(TorchGraph(encoder), TorchGraph(decoder), TRANSFORMER)
    own, expected = (translate_ids(m, batch.source_BS, search, batch.pair_B) for m in (graphs, module.model))
    assert own.ids == expected.ids
    assert len(set(map(str, own.ids))) > 3


def config_of(folder: Path, path: Path) -> str:
    ffn = {"class_path": "core.FFN", "init_args": {"hidden_dim": 16}}
    sizes = {"dim": 32, "hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
    model = {
        "transformer": {**sizes, "size": "nano", "dropout": 0.0},
        "moe": {
            "num_experts": 4,
            "router": {"class_path": "core.TokenChoice", "init_args": {"top_k": 2}},
            "expert": ffn,
        },
        **{"encoder_moe_blocks": "all", "decoder_moe_blocks": "none", "copy": True, "label_smoothing": 0.0},
        **{"metrics": ["exact_match", "rouge_l"], "optimizer": {"lr": 1e-2, "warmup_steps": 10}},
    }
    own = {**options_of(folder), "tokenizer": {"vocab_size": 300}}
    config = {
        "seed_everything": 0,
        "model": {"class_path": "TextToText", "init_args": model},
        "data": {"class_path": "TextToTextData", "init_args": own},
        "trainer": {"accelerator": "cpu", "max_epochs": 25, "check_val_every_n_epoch": 25},
    }
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.mark.slow
def test_two_tasks_are_learned_tested_and_used_by_the_command_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, run = config_of(folder, tmp_path / "tasks.yaml"), ["--run_dir", "run"]
    assert main(["fit", "--config", config, *run]) == 0
    assert main(["test", "--config", config, *run]) == 0
    tested = json.loads(Path("run/test.json").read_text())
    assert tested["test/exact_match"] == 1.0
    assert tested["test/exact_match_first"] == tested["test/exact_match_last"] == 1.0
    assert math.isfinite(tested["test/perplexity"])
    texts = [json.loads(line) for line in Path("run/report/texts.jsonl").read_text().splitlines()]
    assert len(texts) == 20
    assert (texts[0]["hypothesis"], texts[0]["exact_match"]) == (texts[0]["reference"], 1.0)
    capsys.readouterr()
    asked = ["predict", "--config", config, *run, "--data.text", "white black red green", "--data.predict_task"]
    assert main([*asked, "last"]) == 0
    assert capsys.readouterr().out == "green\n"
    assert main([*asked, "middle"]) == 1
    assert "middle" in capsys.readouterr().err


def test_a_stopped_run_is_gone_on_with_only_for_a_database_of_the_same_tables(folder, data, tmp_path):
    for name, column in (("one", "red"), ("same", "red"), ("other", "blue")):
        with contextlib.closing(sqlite3.connect(tmp_path / f"{name}.sqlite")) as connection:
            connection.execute(f"CREATE TABLE green ({column} TEXT)")
    (tmp_path / "in.txt").write_bytes(b"red\n\xff\n")
    module, path = text_to_text(data), tmp_path / "out.txt"

    def ask(name, bad_lines):
        given = {"database": str(tmp_path / f"{name}.sqlite"), "bad_lines": bad_lines, "predict_task": "first"}
        return written(module, task_data(folder, predict_file=str(tmp_path / "in.txt"), predict_lines=1, **given), path)

    with pytest.raises(ValueError, match="line 2: byte 0xff"):
        ask("one", "error")
    with pytest.raises(ValueError, match=r"out\.txt\.partial is of another run, whose database is not this one's"):
        ask("other", "skip")
    assert ask("same", "skip") == (2, 1)


def test_a_metric_of_ones_own_sees_the_text_and_its_row(data, monkeypatch, tmp_path):
    seen = []

    def place(prediction: str, row: dict) -> float:
        seen.append((prediction, row["place"], row["references"]))
        return float(row["place"] % 2)

    monkeypatch.setitem(METRICS, "place", place)
    module = text_to_text(data, metrics=["place"], decode=DecodeConfig("greedy"), report=None)
    (tested,) = quiet_trainer(tmp_path).test(module, data, verbose=False)
    assert module.monitor == "val/place"
    # The even places are the task "first", whose mean is 0, and the odd ones "last".
    assert (tested["test/place"], tested["test/place_first"], tested["test/place_last"]) == (0.5, 0.0, 1.0)
    assert sorted(p for _, p, _ in seen) == list(range(20))
    first = module.comparison.examples_of_test()
    better = [{**e, "scores": {"place": e["scores"]["place"] + 0.25}} for e in first]
    (difference,) = module.comparison.compare_examples(better, first)
    assert (difference.difference, difference.low, difference.high) == pytest.approx((0.25, 0.25, 0.25))
