"""Translator: its loss, its tasks, its baselines, what it translates; and a model that learns to copy."""

import copy
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
from quiet_trainer import quiet_trainer
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
from core.layers import FeedForward


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("copies")


@pytest.fixture
def data(folder):
    return copy_data(folder)


@pytest.fixture
def two(folder):
    """Make data to German, which copies, and to French, which turns a sentence round."""
    (folder / "two").mkdir(exist_ok=True)
    return copy_data(folder / "two", ("de", "fr"))


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


def trainer(folder: Path, **options) -> Trainer:
    kept = {"enable_checkpointing": True, "plugins": [AtomicCheckpointIO()], "num_sanity_val_steps": 0, "max_epochs": 1}
    return quiet_trainer(folder, callbacks=[GeneratorState(), BestAndLast(str(folder))], **(kept | options))


def a_batch(data) -> TranslationBatch:
    return next(iter(data.test_dataloader()))


def padded(batch: TranslationBatch, source: int, target: int) -> TranslationBatch:
    source_BS, target_BL = F.pad(batch.source_BS, (0, source)), F.pad(batch.target_BL, (0, target))
    return TranslationBatch(source_BS, target_BL, batch.pair_B, batch.index_B)


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


@pytest.mark.parametrize("smoothing, logits_scale", [(0.0, 1.0), (0.1, 0.25)])
def test_the_loss_is_the_mean_over_the_target_tokens(data, smoothing, logits_scale):
    scaled = dataclasses.replace(TRANSFORMER, logits_scale=logits_scale)
    module, batch = translator(data, label_smoothing=smoothing, transformer=scaled), a_batch(data)
    logits_BLV, said_BL = module(*module.example_inputs(batch)), batch.target_BL[:, 1:]
    plain = {"ignore_index": PAD_ID, "label_smoothing": smoothing}
    expected = F.cross_entropy(logits_BLV.flatten(0, 1), said_BL.flatten(), **plain)
    assert_close(module.train().task_loss(batch).loss, expected)
    # In evaluation without smoothing, sentence by sentence.
    out = module.eval().task_loss(batch)
    nll_BL = F.cross_entropy(logits_BLV.transpose(1, 2), said_BL, ignore_index=PAD_ID, reduction="none")
    assert_close(out.loss, nll_BL.sum() / (said_BL != PAD_ID).sum())
    assert_close(out.outputs.nll_B.float(), nll_BL.sum(1))
    right_BL = (logits_BLV.argmax(-1) == said_BL) & (said_BL != PAD_ID)
    assert torch.equal(out.outputs.right_B, right_BL.sum(1))
    assert out.weight == int(out.outputs.tokens_B.sum()) == int((said_BL != PAD_ID).sum())
    exact = copy.deepcopy(module).double()
    for mode in (True, False):  # padding is in no loss
        losses = [exact.train(mode).task_loss(b).loss for b in (batch, padded(batch, 3, 2))]
        assert_close(losses[0], losses[1], rtol=0, atol=1e-12)
    # The values by example are the nats a token.
    with torch.no_grad():
        outs = [module.task_loss(batch) for batch in data.val_dataloader()]
    values = module.comparison.example_values(outs)
    assert values.values_N.shape == (20,)
    nats = sum(float(out.loss) * out.weight for out in outs)
    assert values.mean == pytest.approx(nats / sum(out.weight for out in outs), rel=1e-5)


def test_what_the_routers_see_is_what_is_said_and_decoding_does_not_count(data, tmp_path, monkeypatch):
    module = translator(data)
    seen = []
    monkeypatch.setattr(core.RoutingStats, "from_tape", lambda tape: seen.append(len(tape)) or None)
    monkeypatch.setattr(module.balance, "end_pass", lambda module, stage: None)
    trainer(tmp_path).validate(module, data, verbose=False)
    assert seen == [1] * len(data.val_dataloader())  # one layer, one pass a batch: that of the loss


def test_routers_are_told_the_task_and_the_domain_in_the_order_of_the_pairs(two):
    pairs = ("en-de", "en-fr", "de-en", "fr-en")
    assert task_numbers(pairs, "pair") == ([0, 1, 2, 3], [0, 1, 2, 2])
    assert task_numbers(pairs, "source") == ([0, 0, 1, 2], [0, 1, 2, 2])
    assert task_numbers(pairs, "target") == ([0, 1, 2, 2], [0, 1, 2, 2])
    with pytest.raises(ValueError, match="tasks='language' is not one of pair, source, target"):
        task_numbers(pairs, "language")
    with pytest.raises(ValueError, match="names no language pair"):
        task_numbers((), "pair")
    module, batch = translator(two, tasks="source"), a_batch(two)
    _, _, task_B, domain_B = module.example_inputs(batch)
    assert set(batch.pair_B.tolist()) == {0, 1}
    assert not task_B.any()  # both are from English
    assert torch.equal(domain_B, batch.pair_B)  # two pairs, two targets
    assert module.comparison.with_moe(core.MoEConfig(4, core.Task(num_tasks=1))).moe.router.num_tasks == 1
    with pytest.raises(ValueError, match="does not fit"):
        module.comparison.with_moe(core.MoEConfig(4, core.Task(num_tasks=10)))


LORY = core.MoEConfig(4, core.Merge("lory", segment_length=4))
AHEAD = core.MoEConfig(4, core.ExpertChoice(), core.FFN(hidden_dim=16))
PAIRS = "which does not fit the pairs en-de, en-fr by tasks='pair': they have 2"
ATTENTION = core.MoEConfig(4, core.TokenChoice(2), core.AttentionExperts(8, 2))
OF_PLACE = dataclasses.replace(ATTENTION, router=core.Random())
THREE = core.Balance(mutual_information=0.01, num_tasks=3)
NOWHERE = {"attention_moe": ATTENTION, "transformer": TRANSFORMER, "pretrained": "nowhere"}


@pytest.mark.parametrize(
    "moe, options, message",
    [
        (core.MoEConfig(4, core.Task(num_tasks=4)), {}, f"router Task .* has num_tasks=4, {PAIRS}"),
        (core.MoEConfig(4, balance=THREE), {}, f"moe.balance has num_tasks=3, {PAIRS}"),
        (core.MoEConfig(4, core.DomainRandom(1, 300)), {}, "router DomainRandom .* has num_domains=1, .* they have 2"),
        (LORY, {}, r"Merge\(kind='lory'\) .* cannot decode step by step"),
        (AHEAD, {}, r"router ExpertChoice .* lets later tokens change earlier ones: not for a causal decoder"),
        ([MOE, AHEAD], {"encoder_moe_blocks": [0]}, r"router ExpertChoice .* lets later tokens change earlier ones"),
        ([MOE], {"encoder_moe_blocks": [0]}, r"^moe lists 1 layers for 2 sparse blocks, \[0\] and \[1\]: it needs one"),
        (MOE, {"attention_moe": OF_PLACE}, "a token's experts depend on its place; take another router for"),
        (MOE, NOWHERE, r"^pretrained='nowhere' has no weights for the heads of attention_moe$"),
        (MOE, {"label_smoothing": 1.0}, r"label_smoothing=1\.0 is not in \[0, 1\)"),
        (MOE, {"val_decode": "beam"}, "val_decode='beam' is not one of greedy, as_test"),
        (MOE, {"bleu_tokenize": "moses"}, "bleu_tokenize='moses' is not one of"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_does_not_fit_is_refused(two, moe, options, message):
    with pytest.raises(ValueError, match=message):
        translator(two, moe, **options)


def test_data_that_do_not_fit_are_refused(data, two, tmp_path):
    module, corpus = translator(data), Path(data.corpora[0].root)
    turned = copy_data(corpus, subwords=data.subwords, pairs=["de-en"])
    learned = translator(data, transformer=dataclasses.replace(TRANSFORMER, positions="learned", max_length=255))
    long = r"data\.max_length=256 exceeds model\.transformer\.max_length=255, the positions that positions='learned'"
    own, other = data.subwords.digest, two.subwords.digest
    for model, given, message in (
        (module, two, f"the model's subwords have digest {own}, the data's {other}"),
        (module, turned, r"the model knows the pairs en-de, .* whose pairs are de-en"),
        (learned, data, long),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path).validate(model, given, verbose=False)
    with pytest.raises(ValueError, match=long):
        printed(learned, copy_data(corpus, text="red"))


def test_baselines_cost_what_they_say_and_have_the_rest_of_the_sparse_model(data):
    options = {"tasks": "target", "bleu_tokenize": "char", "average_last": 3, "report": None}
    module = translator(data, encoder_moe_blocks="all", decoder_moe_blocks="all", **options)
    systems = {s.name: s for s in find_systems(module, padded(a_batch(data), 4, 6))}
    assert list(systems) == ["sparse", "dense_equal_flops", "dense_equal_params"]
    assert systems["dense_equal_flops"].replaced_ratio == pytest.approx(1, abs=0.05)
    assert systems["dense_equal_params"].params_ratio == pytest.approx(1, abs=0.05)
    assert not any(s.refused for s in systems.values())
    dense = pickle.loads(pickle.dumps(module.comparison.baselines()["dense_equal_flops"].build))()
    assert (dense.moe, dense.comparison.baselines(), dense.label_smoothing) == (None, {}, module.label_smoothing)
    assert {name: getattr(dense, name) for name in options} == options
    assert isinstance(dense.get_submodule("model.decoder.layers.1.ffn"), FeedForward)
    assert translator(data).comparison.moe_block_names == ("model.decoder.layers.1.ffn",)


def test_a_list_of_layers_runs_through_the_encoder_and_then_the_decoder(data):
    # The encoder's router may see later tokens, and none of the decoder's.
    moe = [core.MoEConfig(4, core.ExpertChoice(), core.FFN(16)), core.MoEConfig(8, core.TokenChoice(1), core.FFN(16))]
    module, batch = translator(data, moe, encoder_moe_blocks=[0]), a_batch(data)
    numbers = {name: layer.num_experts for name, layer in core.moe_layers(module).items()}
    assert numbers == {"model.encoder.layers.0.ffn": 4, "model.decoder.layers.1.ffn": 8}
    assert len(module.eval().translate(batch, module.decode).ids) == len(batch.index_B)
    assert "dense_equal_flops" in module.comparison.baselines()
    assert module.place.is_causal
    for ahead in (AHEAD, LORY):
        encoder = translator(data, ahead, encoder_moe_blocks="all", decoder_moe_blocks="none")
        assert (encoder.moe, encoder.place.is_causal) == (ahead, False)


TASK = core.MoEConfig(4, core.Task(num_tasks=2), core.FFN(hidden_dim=16))
SWITCH = core.MoEConfig(4, core.TokenChoice(top_k=1), core.SwiGLU(hidden_dim=16), capacity_factor=1.0)
STEPS = {
    "dense": (None, {}),
    "task": (TASK, {}),
    "switch": (SWITCH, {}),
    "attention": (MOE, {"attention_moe": ATTENTION}),
}


@pytest.mark.parametrize("positions, kind", [*zip(("learned", "relative", "rotary", "none"), STEPS, strict=True)])
def test_a_training_step_and_a_validation(two, tmp_path, positions, kind):
    moe, options = STEPS[kind]
    placed = dataclasses.replace(TRANSFORMER, positions=positions)
    module = translator(two, moe, encoder_moe_blocks="all", transformer=placed, **options)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    made = trainer(tmp_path, limit_train_batches=1, limit_val_batches=1)
    made.fit(module, two)
    still = {name for name, p in module.named_parameters() if torch.equal(p, before[name])}
    assert not {name for name in still if "positions" in name or "relative" in name or "source_embed" in name}
    assert len(still) < len(before) / 2
    logged = made.callback_metrics
    for name in ("val/bleu", "val/bleu_en-de", "val/chrf_en-fr", "val/token_accuracy", "val/loss", "train/loss"):
        assert math.isfinite(float(logged[name])), name
    assert float(logged["val/bleu"]) == pytest.approx(float(logged["val/bleu_en-de"] + logged["val/bleu_en-fr"]) / 2)
    # The batches' means are weighted by their tokens: the perplexity of all is that of the mean.
    assert math.log(float(logged["val/perplexity"])) == pytest.approx(float(logged["val/loss"]), rel=1e-5)
    again = Translator.load_from_checkpoint(tmp_path / "last.ckpt")
    assert (again.subwords, again.pairs, again.report) == (two.subwords, two.pairs, TranslationReportConfig())
    assert torch.equal(again.model.source_embed.weight, module.model.source_embed.weight)
    if kind == "attention":
        assert len(module.predict(["red blue", "green"], "en-fr", num_beams=3)) == 2


def test_bfloat16_weights_are_copied_once_a_pass_and_follow_the_training_that_nan_stops(data, tmp_path, monkeypatch):
    module, seen, original = translator(data, decode=DecodeConfig(dtype="bfloat16", num_beams=2)), [], writing.in_dtype

    def copied(model, dtype):
        seen.append(model.source_embed.weight.detach().clone())
        return original(model, dtype)

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
    with torch.no_grad():
        module.model.source_embed.weight[10:] = float("nan")
    with pytest.raises(NonFiniteError, match="nan at step 1"):
        trainer(tmp_path / "nan").fit(module, data)
    assert not (tmp_path / "nan" / "last.ckpt").exists()


CONFIG = """
model:
  class_path: Translator
  init_args:
    transformer: {{size: nano, dim: 32, hidden_dim: 32, encoder_layers: 1, decoder_layers: 2, dropout: 0.1}}
    moe: {{num_experts: 4, router: {{class_path: core.TokenChoice, init_args: {{top_k: 2, noise: fixed}}}},
           expert: {{class_path: core.FFN, init_args: {{hidden_dim: 16}}}}}}
    encoder_moe_blocks: all
    decoder_moe_blocks: last1
    optimizer: {{lr: 6.0e-3}}
data:
  class_path: TranslationData
  init_args: {{dataset: moses, root: {folder}, cache_dir: {folder}/cache, pairs: [en-de],
              tokenizer: {{vocab_size: 300}}, train_files: train, val_files: val, test_files: test,
              tokens_per_batch: 256}}
trainer: {{accelerator: cpu, max_epochs: 2}}
"""


@pytest.mark.slow
def test_a_stopped_run_resumes_exactly_and_its_signature_stands_beside_the_score(data, folder, tmp_path, capsys):
    (tmp_path / "copies.yaml").write_text(CONFIG.format(folder=folder))
    asked = ["--config", str(tmp_path / "copies.yaml"), "--run_dir"]
    saving = "[{class_path: BestAndLast, init_args: {every_n_steps: 2}}]"

    def fit(name: str, stop_at: int = 99) -> None:
        with quiet():
            more = ["--ckpt_path", "last", "--trainer.callbacks", saving]
            cli = build("fit", [*asked, str(tmp_path / name), *more])
            original, steps = cli.model.task_loss, iter(range(stop_at))

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
    signature, run = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:", tmp_path / "broken"
    assert json.loads((run / "signatures.json").read_text())["bleu"].startswith(signature)
    # It stands beside the score of a test.
    few = ["--trainer.limit_test_batches", "1", "--model.decode.method", "greedy"]
    assert moesaic(["test", *asked, str(run), *few]) == 0
    assert json.loads((run / "test.json").read_text())["signatures"]["bleu"].startswith(signature)
    assert f"bleu: {signature}" in capsys.readouterr().out
    assert signature in (run / "report" / "signatures.txt").read_text()


@pytest.mark.parametrize("val_decode, methods", [("greedy", ["greedy", "beam"]), ("as_test", ["beam", "beam"])])
def test_how_validation_and_test_are_translated(data, tmp_path, monkeypatch, val_decode, methods):
    search = DecodeConfig(num_beams=2, num_return_sequences=2)
    module, asked, real = (
        translator(data, val_decode=val_decode, decode=search, report=None),
        [],
        module_file.translate_ids,
    )

    def translate(model, source_BS, config, *args, **kwargs):
        asked.append(config)
        return real(model, source_BS, config, *args, **kwargs)

    monkeypatch.setattr(module_file, "translate_ids", translate)
    made = trainer(tmp_path, limit_val_batches=1, limit_test_batches=1)
    made.validate(module, data, verbose=False)
    made.test(module, data, verbose=False)
    assert [c.method for c in asked] == methods
    if val_decode == "as_test":  # Without references in the data those of the batch are taken.
        made = trainer(tmp_path)
        made.test(module, data.test_dataloader(), verbose=False)
        assert [e["reference"] for e in module.comparison.examples_of_test()] == data.references("test")
        assert "source" not in module.comparison.examples_of_test()[0]


def test_a_prediction_keeps_empty_lines_and_names_alternatives(data):
    module = translator(data, decode=DecodeConfig(num_beams=2, num_return_sequences=2)).eval()
    ((batch, _),) = data.given_batches(["red blue green black", "", "blue"])
    rows = module.predict_step(batch, 0)
    columns = (rows.translation, rows.score.tolist(), rows.alternatives)
    by_line = dict(zip(rows.index.tolist(), zip(*columns, strict=True), strict=True))
    assert by_line[1] == ("", 0.0, [])
    assert [len(by_line[i][2]) for i in (0, 2)] == [1, 1]
    assert by_line[0][1] < 0
    assert rows.pair == ["en-de"] * 3
    assert dict(zip(rows.index.tolist(), rows.source, strict=True)) == {0: "red blue green black", 1: "", 2: "blue"}
    # As lines of their own with number and score.
    lines = printed(module, copy_data(Path(data.corpora[0].root), text=["red", ""]))
    assert [line.split("\t")[0] for line in lines] == ["1", "1", "2"]
    assert module.predict_stream(data) is None


def test_it_learns_to_copy(data, tmp_path):
    # The whole path: files, subwords, training, validation, test, report, a prediction in order.
    module = translator(data, decode=DecodeConfig(num_beams=2), average_last=2)
    made = trainer(tmp_path, max_epochs=30, check_val_every_n_epoch=15)
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
    assert "sacreBLEU nrefs:1|case:mixed|eff:no|tok:13a" in repr(load_sections(tmp_path / "report"))
    assert Translator.load_from_checkpoint(tmp_path / "last.ckpt").decode.num_beams == 2
