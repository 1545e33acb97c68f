"""Translator: its loss, its tasks, its baselines, what it translates; and a model that learns to copy."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from copying import MOE, TRANSFORMER, copy_data, translator
from lightning.pytorch import Trainer
from predicted import printed
from resuming import Stop, differences
from taught import kl, saved, taught
from torch.testing import assert_close

import apps.nlp.pairs.module as module_file
import core
from apps.cli import main as moesaic
from apps.cli.train import build, quiet
from apps.compare.systems import find_systems
from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from apps.nlp.decode import DecodeConfig, writing
from apps.nlp.text.batches import TranslationBatch
from apps.nlp.text.scores import corpus_score
from apps.nlp.translation.module import Translator, task_numbers
from apps.nlp.translation.report import TranslationReportConfig
from apps.report.page import load_sections
from apps.train.checkpoint.checkpoints import AtomicCheckpointIO, BestAndLast
from apps.train.checkpoint.resume import GeneratorState
from apps.train.step.distilling import DistilConfig
from apps.train.step.finite import NonFiniteError
from apps.train.step.module import OptimizerConfig
from core.layers import FeedForward

DROPPING = dataclasses.replace(TRANSFORMER, dropout=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("copies")


@pytest.fixture(scope="module")
def two_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture
def data(folder):
    return copy_data(folder)


@pytest.fixture
def two(two_folder):
    """Make data to German, which copies, and to French, which turns a sentence round."""
    return copy_data(two_folder, ("de", "fr"))


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


def trainer(folder: Path, **options) -> Trainer:
    return Trainer(
        **{"max_epochs": 1, "accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0, **options},
        callbacks=[GeneratorState(), BestAndLast(str(folder))],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@torch.no_grad()
def test_the_values_by_example_are_the_nats_a_token(data):
    module = translator(data).eval()
    batches = list(data.val_dataloader())
    outs = [module.task_loss(batch) for batch in batches]
    nats = sum(float(out.loss) * out.weight for out in outs)
    values = module.example_values(outs)
    assert values.values_N.shape == (sum(len(batch.index_B) for batch in batches),)
    assert values.mean == pytest.approx(nats / sum(out.weight for out in outs), rel=1e-5)


def test_a_teacher_says_each_token_but_padding(data, tmp_path):
    teacher = translator(data).eval()
    module = translator(data, None, distil=DistilConfig(saved(teacher, tmp_path / "t.ckpt"), 0.5))
    data.setup("fit")
    one = next(iter(data.train_dataloader()))
    real_BL = one.target_BL[:, 1:] != PAD_ID
    with torch.no_grad():
        given, own = (m(*module.example_inputs(one))[real_BL] for m in (teacher, module))
    soft = module.train().task_loss(one).distribution.divergence(teacher.distribution(one), 1.0)
    assert_close(soft.detach(), kl(given, own, 1.0).float(), rtol=1e-4, atol=0)
    loss, out, *_ = taught(module).training_loss(one)
    mixed = (out.terms["label_loss"] + out.terms["teacher_loss"]) / 2
    assert_close(loss.detach(), mixed)


def a_batch(data) -> TranslationBatch:
    return next(iter(data.test_dataloader()))


def padded(batch: TranslationBatch, source: int, target: int) -> TranslationBatch:
    source_BS, target_BL = F.pad(batch.source_BS, (0, source)), F.pad(batch.target_BL, (0, target))
    return TranslationBatch(source_BS, target_BL, batch.pair_B, batch.index_B)


# ---- the loss


def test_costs_are_of_a_pair_of_mean_length(data):
    # Sources of 2 and 5 tokens: the mean 3.5 is rounded to 4. Read are 3 and 1: 2.
    source_BS = torch.tensor([[7, EOS_ID, PAD_ID, PAD_ID, PAD_ID], [7, 8, 9, 7, EOS_ID]])
    target_BL = torch.tensor([[BOS_ID, 7, 8, EOS_ID], [BOS_ID, EOS_ID, PAD_ID, PAD_ID]])
    batch = TranslationBatch(source_BS, target_BL, torch.zeros(2, dtype=torch.long), torch.arange(2))
    module = translator(data)
    source, read, *_ = module.cost_inputs(batch)
    assert source.tolist() == [[7, EOS_ID, UNK_ID, UNK_ID], [7, 8, 9, 7]]
    assert read.tolist() == [[BOS_ID, 7], [BOS_ID, UNK_ID]]
    assert module.cost_unit(batch) == "a pair of 4 + 2 tokens"
    assert module.cost_unit(padded(batch, 3, 2)) == "a pair of 4 + 2 tokens"


@pytest.mark.parametrize("logits_scale", [1.0, 0.25])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_the_target_tokens(data, smoothing, logits_scale):
    scaled = dataclasses.replace(TRANSFORMER, logits_scale=logits_scale)
    module = translator(data, label_smoothing=smoothing, transformer=scaled)
    batch = a_batch(data)
    logits_BLV = module(*module.example_inputs(batch))
    said_BL = batch.target_BL[:, 1:]
    plain = {"ignore_index": PAD_ID, "reduction": "mean"}
    of_training = module.train().task_loss(batch)
    expected = F.cross_entropy(logits_BLV.flatten(0, 1), said_BL.flatten(), label_smoothing=smoothing, **plain)
    assert_close(of_training.loss, expected)
    # In evaluation without smoothing, sentence by sentence.
    out = module.eval().task_loss(batch)
    nll_BL = F.cross_entropy(logits_BLV.transpose(1, 2), said_BL, ignore_index=PAD_ID, reduction="none")
    assert_close(out.loss, nll_BL.sum() / (said_BL != PAD_ID).sum())
    assert_close(out.outputs.nll_B.float(), nll_BL.sum(1))
    right_BL = (logits_BLV.argmax(-1) == said_BL) & (said_BL != PAD_ID)
    assert torch.equal(out.outputs.right_B, right_BL.sum(1))
    assert out.weight == int(out.outputs.tokens_B.sum()) == int((said_BL != PAD_ID).sum())


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "sparse"])
def test_padding_is_in_no_loss(data, moe):
    module, batch = translator(data, moe).double(), a_batch(data)
    for mode in (True, False):
        losses = [module.train(mode).task_loss(b).loss for b in (batch, padded(batch, 3, 2))]
        assert_close(losses[0], losses[1], rtol=0, atol=1e-12)


def test_what_the_routers_see_is_what_is_said_and_decoding_does_not_count(data, tmp_path, monkeypatch):
    module = translator(data)
    seen = []
    monkeypatch.setattr(core.RoutingStats, "from_tape", lambda tape: seen.append(len(tape)) or None)
    monkeypatch.setattr(Translator, "log_routing", lambda self, stage: None)
    trainer(tmp_path).validate(module, data, verbose=False)
    assert seen == [1] * len(data.val_dataloader())  # one layer, one pass a batch: that of the loss


# ---- tasks


def test_tasks_are_numbered_in_the_order_of_the_pairs():
    pairs = ("en-de", "en-fr", "de-en", "fr-en")
    assert task_numbers(pairs, "pair") == ([0, 1, 2, 3], [0, 1, 2, 2])
    assert task_numbers(pairs, "source") == ([0, 0, 1, 2], [0, 1, 2, 2])
    assert task_numbers(pairs, "target") == ([0, 1, 2, 2], [0, 1, 2, 2])
    with pytest.raises(ValueError, match="tasks='language' is not one of pair, source, target"):
        task_numbers(pairs, "language")
    with pytest.raises(ValueError, match="names no language pair"):
        task_numbers((), "pair")


def test_routers_are_told_the_task_and_the_domain(two):
    module = translator(two, tasks="source")
    batch = a_batch(two)
    _, _, task_B, domain_B = module.example_inputs(batch)
    assert set(batch.pair_B.tolist()) == {0, 1}
    assert not task_B.any()  # both are from English
    assert torch.equal(domain_B, batch.pair_B)  # two pairs, two targets


@pytest.mark.parametrize(
    "moe, message",
    [
        (
            core.MoEConfig(4, router=core.Task(num_tasks=4)),
            r"router Task .* has num_tasks=4, which does not fit the pairs en-de, en-fr by tasks='pair': they have 2",
        ),
        (
            core.MoEConfig(4, balance=core.Balance(mutual_information=0.01, num_tasks=3)),
            "moe.balance has num_tasks=3, which does not fit the pairs en-de, en-fr by tasks='pair': they have 2",
        ),
        (
            core.MoEConfig(4, router=core.DomainRandom(num_domains=1, vocab_size=300)),
            r"router DomainRandom .* has num_domains=1, which does not fit the pairs .* they have 2",
        ),
    ],
)
def test_routers_of_other_numbers_of_tasks_are_refused(two, moe, message):
    with pytest.raises(ValueError, match=message):
        translator(two, moe)


def test_data_of_other_subwords_or_pairs_are_refused(data, two, tmp_path):
    module = translator(data)
    own, other = data.subwords.digest, two.subwords.digest
    with pytest.raises(ValueError, match=f"the model's subwords have digest {own}, the data's {other}"):
        trainer(tmp_path).validate(module, two, verbose=False)
    turned = copy_data(Path(data.corpora[0].root), subwords=data.subwords, pairs=["de-en"])
    with pytest.raises(ValueError, match=r"the model knows the pairs en-de, .* whose pairs are de-en"):
        trainer(tmp_path).validate(module, turned, verbose=False)


def test_sentences_longer_than_learned_positions_are_refused(data, tmp_path):
    module = translator(data, transformer=dataclasses.replace(TRANSFORMER, positions="learned", max_length=255))
    message = r"data\.max_length=256 exceeds model\.transformer\.max_length=255, the positions that positions='learned'"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).validate(module, data, verbose=False)
    with pytest.raises(ValueError, match=message):
        printed(module, copy_data(Path(data.corpora[0].root), text="red"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"label_smoothing": 1.0}, r"label_smoothing=1\.0 is not in \[0, 1\)"),
        ({"val_decode": "beam"}, "val_decode='beam' is not one of greedy, as_test"),
        ({"bleu_tokenize": "moses"}, "bleu_tokenize='moses' is not one of"),
    ],
)
def test_wrong_options(data, options, message):
    with pytest.raises(ValueError, match=message):
        translator(data, **options)


def test_a_router_that_cannot_decode_is_refused_before_validation_would(data):
    lory = core.MoEConfig(4, router=core.Merge("lory", segment_length=4))
    with pytest.raises(ValueError, match=r"Merge\(kind='lory'\) .* cannot decode step by step"):
        translator(data, lory)
    assert translator(data, lory, encoder_moe_blocks="all", decoder_moe_blocks="none").moe is lory


# ---- training


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", "relative", "none"])
def test_every_kind_of_positions_trains(data, tmp_path, positions):
    module = translator(data, transformer=dataclasses.replace(TRANSFORMER, positions=positions))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data)
    still = {name for name, p in module.named_parameters() if torch.equal(p, before[name])}
    assert not {name for name in still if "positions" in name or "relative" in name}
    assert len(still) < len(before) / 2


# ---- baselines


def test_baselines_cost_what_they_say_whatever_is_padding(data):
    module = translator(data, encoder_moe_blocks="all", decoder_moe_blocks="all")
    systems = {s.name: s for s in find_systems(module, padded(a_batch(data), 4, 6))}
    assert list(systems) == ["sparse", "dense_equal_flops", "dense_equal_params"]
    assert systems["dense_equal_flops"].replaced_ratio == pytest.approx(1, abs=0.05)
    assert systems["dense_equal_params"].params_ratio == pytest.approx(1, abs=0.05)
    assert not any(s.refused for s in systems.values())


def test_a_baseline_pickles_and_has_the_rest_of_the_sparse_model(data):
    sparse = translator(data, tasks="target", bleu_tokenize="char", average_last=3, report=None)
    dense = pickle.loads(pickle.dumps(sparse.baselines()["dense_equal_flops"].build))()
    assert dense.moe is None
    assert (dense.tasks, dense.bleu_tokenize, dense.average_last, dense.report) == ("target", "char", 3, None)
    assert dense.label_smoothing == sparse.label_smoothing
    assert dense.baselines() == {}
    assert isinstance(dense.get_submodule("model.decoder.layers.1.ffn"), FeedForward)
    assert sparse.moe_block_names == ("model.decoder.layers.1.ffn",)


def test_a_list_of_layers_runs_through_the_encoder_and_then_the_decoder(data):
    # The encoder's router may see later tokens.
    moe = [core.MoEConfig(4, core.ExpertChoice(), core.FFN(16)), core.MoEConfig(8, core.TokenChoice(1), core.FFN(16))]
    module = translator(data, moe, encoder_moe_blocks=[0])
    layers = core.moe_layers(module)
    assert {name: layer.num_experts for name, layer in layers.items()} == {
        "model.encoder.layers.0.ffn": 4,
        "model.decoder.layers.1.ffn": 8,
    }
    batch = a_batch(data)
    assert len(module.eval().translate(batch, module.decode).ids) == len(batch.index_B)
    assert "dense_equal_flops" in module.baselines()
    with pytest.raises(ValueError, match=r"router ExpertChoice .* lets later tokens change earlier ones"):
        translator(data, moe[::-1], encoder_moe_blocks=[0])
    with pytest.raises(ValueError, match=r"^moe lists 1 layers for 2 sparse blocks, \[0\] and \[1\]: it needs one"):
        translator(data, moe[:1], encoder_moe_blocks=[0])


def test_a_router_in_place_of_the_config_s(two):
    module = translator(two)
    assert module.with_moe(core.MoEConfig(4, router=core.Task(num_tasks=2))).moe.router.num_tasks == 2
    with pytest.raises(ValueError, match="does not fit"):
        module.with_moe(core.MoEConfig(4, router=core.Task(num_tasks=10)))


def test_only_a_decoder_must_be_causal(data):
    ahead = core.MoEConfig(4, router=core.ExpertChoice(), expert=core.FFN(hidden_dim=16))
    with pytest.raises(ValueError, match="causal"):
        translator(data, ahead)
    assert translator(data).place.is_causal
    assert not translator(data, ahead, encoder_moe_blocks="all", decoder_moe_blocks="none").place.is_causal


# ---- a step


@pytest.mark.parametrize(
    "moe",
    [
        None,
        MOE,
        core.MoEConfig(4, router=core.Task(num_tasks=2), expert=core.FFN(hidden_dim=16)),
        core.MoEConfig(4, router=core.TokenChoice(top_k=1), expert=core.SwiGLU(hidden_dim=16), capacity_factor=1.0),
    ],
    ids=["dense", "sparse", "task", "switch"],
)
def test_a_training_step_and_a_validation(two, tmp_path, moe):
    module = translator(two, moe, encoder_moe_blocks="all")
    before = module.model.source_embed.weight.detach().clone()
    made = trainer(tmp_path, limit_train_batches=1, limit_val_batches=1)
    made.fit(module, two)
    assert not torch.equal(module.model.source_embed.weight, before)
    logged = made.callback_metrics
    for name in ("val/bleu", "val/bleu_en-de", "val/chrf_en-fr", "val/token_accuracy", "val/loss", "train/loss"):
        assert math.isfinite(float(logged[name])), name
    assert float(logged["val/bleu"]) == pytest.approx(float(logged["val/bleu_en-de"] + logged["val/bleu_en-fr"]) / 2)
    # The batches' means are weighted by their tokens: the perplexity of all is that of the mean.
    assert math.log(float(logged["val/perplexity"])) == pytest.approx(float(logged["val/loss"]), rel=1e-5)


def test_bfloat16_weights_are_copied_once_a_pass_and_follow_the_training(data, tmp_path, monkeypatch):
    module = translator(data, decode=DecodeConfig(dtype="bfloat16", beam_size=2))
    seen = []

    def copied(model, dtype):
        seen.append(model.source_embed.weight.detach().clone())
        return original(model, dtype)

    original = writing.in_dtype
    monkeypatch.setattr(writing, "in_dtype", copied)
    made = trainer(tmp_path, max_epochs=2, limit_train_batches=1, limit_val_batches=3)
    made.fit(module, data)
    assert len(seen) == 2
    assert not torch.equal(*seen)
    made.test(module, data, verbose=False)
    assert len(seen) == 3
    assert not any("_copies" in name for name in module.state_dict())
    assert module.translate(a_batch(data), module.decode).ids  # outside a pass: of the weights as they are
    assert len(seen) == 3


def test_a_loss_that_is_nan_stops_the_training(data, tmp_path, monkeypatch):
    module = translator(data)
    with torch.no_grad():
        module.model.source_embed.weight[10:] = float("nan")
    with pytest.raises(NonFiniteError, match="nan at step 1"):
        trainer(tmp_path).fit(module, data)
    assert not (tmp_path / "last.ckpt").exists()


CONFIG = """
model:
  class_path: apps.nlp.translation.module.Translator
  init_args:
    transformer: {{size: nano, dim: 32, hidden_dim: 32, encoder_layers: 1, decoder_layers: 2, dropout: 0.1}}
    moe:
      num_experts: 4
      router: {{class_path: core.TokenChoice, init_args: {{top_k: 2, noise: fixed}}}}
      expert: {{class_path: core.FFN, init_args: {{hidden_dim: 16}}}}
    encoder_moe_blocks: all
    decoder_moe_blocks: last1
    optimizer: {{lr: 6.0e-3}}
data:
  class_path: apps.nlp.translation.data.TranslationData
  init_args:
    dataset: moses
    root: {folder}
    cache_dir: {folder}/cache
    pairs: [en-de]
    train_files: train
    val_files: val
    test_files: test
    tokenizer: {{vocab_size: 300}}
    tokens_per_batch: 256
trainer: {{accelerator: cpu, max_epochs: 2}}
"""


@pytest.fixture
def config(data, folder, tmp_path) -> str:
    path = tmp_path / "copies.yaml"
    path.write_text(CONFIG.format(folder=folder))
    return str(path)


def test_a_stopped_run_resumes_exactly(config, tmp_path):
    def fit(name: str, stop_at: int | None = None) -> None:
        with quiet():
            cli = build("fit", ["--config", config, "--run_dir", str(tmp_path / name), "--ckpt_path", "last",
                                "--trainer.callbacks", "[{class_path: BestAndLast, init_args: "
                                "{every_n_steps: 2}}]"])  # fmt: skip
            original, steps = cli.model.task_loss, iter(range(99 if stop_at is None else stop_at))

            def task_loss(batch):
                if cli.model.training and next(steps, None) is None:
                    raise Stop
                return original(batch)

            cli.model.task_loss = task_loss
            cli.execute()

    fit("unbroken")
    with pytest.raises(Stop):
        fit("broken", stop_at=9)  # of 6 batches an epoch: in the second one
    fit("broken")
    saved = [torch.load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("unbroken", "broken")]
    for checkpoint in saved:
        del checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    assert differences(*saved) == []
    assert "tok:13a" in json.loads((tmp_path / "broken" / "signatures.json").read_text())["bleu"]


@pytest.mark.slow
def test_compare_says_whether_the_difference_is_significant(config, tmp_path, capsys):
    output = tmp_path / "compared"
    argv = ["compare", config, "--seeds", "1", "--learning_rates", "6e-3", "--rounds", "0", "--output", str(output)]
    few = ["--trainer.max_epochs", "1", "--model.average_last", "1", "--model.decode.method", "greedy"]
    assert moesaic([*argv, "--baselines", "dense_equal_flops", *few]) == 0
    page = (output / "table.md").read_text()
    assert "Against dense, equal FLOPs, seed 0: BLEU difference " in page
    assert "(paired bootstrap, 1,000 draws)" in page
    assert "- bleu: nrefs:1|case:mixed" in page
    examples = json.loads(next(output.rglob("sparse/*/examples.json")).read_text())
    assert len(examples) == 20
    assert set(examples[0]) == {"index", "pair", "source", "reference", "hypothesis"}


# ---- evaluation


def test_the_signature_stands_beside_the_score(config, tmp_path, capsys):
    argv = ["test", "--config", config, "--run_dir", str(tmp_path / "run"), "--ckpt_path", "none"]
    assert moesaic([*argv, "--trainer.limit_test_batches", "1", "--model.decode.method", "greedy"]) == 0
    signature = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:"
    written = json.loads((tmp_path / "run" / "test.json").read_text())
    assert written["signatures"]["bleu"].startswith(signature)
    assert f"bleu: {signature}" in capsys.readouterr().out
    assert signature in (tmp_path / "run" / "report" / "signatures.txt").read_text()


@pytest.mark.parametrize("val_decode, methods", [("greedy", ["greedy", "beam"]), ("as_test", ["beam", "beam"])])
def test_how_validation_and_test_are_translated(data, tmp_path, monkeypatch, val_decode, methods):
    module = translator(
        data, val_decode=val_decode, decode=DecodeConfig(beam_size=2, num_return_sequences=2), report=None
    )
    asked = []
    real = module_file.translate_ids

    def translate(model, source_BS, config, *args, **kwargs):
        asked.append(config)
        return real(model, source_BS, config, *args, **kwargs)

    monkeypatch.setattr(module_file, "translate_ids", translate)
    made = trainer(tmp_path, limit_val_batches=1, limit_test_batches=1)
    made.validate(module, data, verbose=False)
    made.test(module, data, verbose=False)
    assert [c.method for c in asked] == methods


def test_without_references_in_the_data_those_of_the_batch_are_taken(data, tmp_path):
    module = translator(data, report=None)
    made = trainer(tmp_path)
    loader = data.test_dataloader()
    made.test(module, loader, verbose=False)
    assert [e["reference"] for e in module.examples_of_test()] == data.references("test")
    assert "source" not in module.examples_of_test()[0]


def test_a_prediction_keeps_empty_lines_and_names_alternatives(data):
    module = translator(data, decode=DecodeConfig(beam_size=2, num_return_sequences=2)).eval()
    ((batch, _),) = data.given_batches(["red blue green black", "", "blue"])
    rows = module.predict_step(batch, 0)
    columns = (rows.translation, rows.score.tolist(), rows.alternatives)
    by_line = dict(zip(rows.index.tolist(), zip(*columns, strict=True), strict=True))
    assert by_line[1] == ("", 0.0, [])
    assert [len(by_line[i][2]) for i in (0, 2)] == [1, 1]
    assert by_line[0][1] < 0
    assert rows.pair == ["en-de"] * 3
    assert dict(zip(rows.index.tolist(), rows.source, strict=True)) == {0: "red blue green black", 1: "", 2: "blue"}


def test_alternatives_are_lines_of_their_own_with_number_and_score(data):
    module = translator(data, decode=DecodeConfig(beam_size=2, num_return_sequences=2)).eval()
    lines = printed(module, copy_data(Path(data.corpora[0].root), text=["red", ""]))
    assert [line.split("\t")[0] for line in lines] == ["1", "1", "2"]
    assert module.predict_stream(data) is None


def test_a_checkpoint_brings_its_subwords_along(data, tmp_path):
    module = translator(data, decode=DecodeConfig(beam_size=3))
    trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(module, data)
    again = Translator.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.subwords == data.subwords
    assert (again.pairs, again.decode.beam_size, again.report) == (("en-de",), 3, TranslationReportConfig())
    assert torch.equal(again.model.source_embed.weight, module.model.source_embed.weight)


def test_attention_experts_train_translate_and_are_in_the_report(data, tmp_path):
    attention = core.MoEConfig(4, core.TokenChoice(2), core.AttentionExperts(8, 2))
    module = translator(data, attention_moe=attention)
    made = Trainer(
        max_steps=3,
        limit_val_batches=1,
        limit_test_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )
    made.fit(module, data)
    made.test(module, data, verbose=False)
    assert 0 <= made.callback_metrics["test/bleu"] <= 100
    assert len(module.predict(["red blue", "green"], beam_size=3)) == 2
    with pytest.raises(ValueError, match="a token's experts depend on its place; take another router for the decoder"):
        translator(data, attention_moe=dataclasses.replace(attention, router=core.Random()))
    with pytest.raises(ValueError, match=r"^pretrained='nowhere' has no weights for the heads of attention_moe$"):
        translator(data, attention_moe=attention, transformer=TRANSFORMER, pretrained="nowhere")


def test_it_learns_to_copy(data, tmp_path):
    # The whole path: files, subwords, training, validation, test, report, a prediction in order.
    module = translator(data, decode=DecodeConfig(beam_size=2), average_last=2)
    made = trainer(tmp_path, max_epochs=45, check_val_every_n_epoch=15)
    made.fit(module, data)
    (scores,) = made.test(module, data, ckpt_path=str(tmp_path / "average.ckpt"), verbose=False, weights_only=True)
    assert scores["test/bleu"] == pytest.approx(100)
    assert scores["test/token_accuracy"] == 1
    sentences = [json.loads(line) for line in (tmp_path / "report" / "sentences.jsonl").read_text().splitlines()]
    assert [s["source"] for s in sentences] == data.sources("test")
    hypotheses, references = ([s[k] for s in sentences] for k in ("hypothesis", "reference"))
    assert references == data.references("test")
    assert corpus_score("bleu", hypotheses, references) == pytest.approx(scores["test/bleu"])
    asked = [*data.sources("test")[:3], ""]
    random.Random(1).shuffle(asked)
    assert printed(module, copy_data(Path(data.corpora[0].root), text=asked)) == asked
    assert module.predict_stream(data) is None
    assert "sacreBLEU nrefs:1|case:mixed|eff:no|tok:13a" in repr(load_sections(tmp_path / "report"))


@pytest.mark.slow
def test_it_learns_two_languages_by_their_tags(two, tmp_path):
    # German copies and French turns round, so the tag decides.
    task = core.MoEConfig(4, router=core.Task(num_tasks=2, top_k=2), expert=core.FFN(hidden_dim=16, activation="relu"))
    module = translator(two, task, report=None, decode=DecodeConfig("greedy"), optimizer=OptimizerConfig(lr=6e-3))
    made = trainer(tmp_path, max_epochs=30, limit_val_batches=0)
    made.fit(module, two)
    (scores,) = made.test(module, two, verbose=False)
    assert min(scores["test/bleu_en-de"], scores["test/bleu_en-fr"]) > 60
