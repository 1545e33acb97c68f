"""LanguageModeler: its loss, its metrics by hand, its baselines; and a model that learns which word follows which."""

import csv
import dataclasses
import json
import math
import pickle
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from copying import MOE, TRANSFORMER
from lightning.pytorch import Trainer
from predicted import printed, written
from quiet_trainer import quiet_trainer
from taught import kl, saved, taught
from torch.testing import assert_close

import core
from apps.compare.systems import find_systems
from apps.data.subwords import EOS_ID, PAD_ID, SubwordConfig
from apps.nets.depths import MixtureOfDepths
from apps.nets.universal import Universal
from apps.nlp.decode import DecodeConfig, generate_ids
from apps.nlp.language.corpora import TextCorpus
from apps.nlp.language.data import TextBatch, TextData, TextSize
from apps.nlp.language.module import Block, LanguageMetrics, LanguageModeler
from apps.nlp.language.report import LanguageReportConfig
from apps.train.checkpoint.checkpoints import AtomicCheckpointIO, BestAndLast
from apps.train.step.distilling import DistilConfig
from apps.train.step.growing import GrowConfig, grow_from
from apps.train.step.module import OptimizerConfig
from core.layers import FeedForward

DOCUMENTS = ["red blue green black", "one two three four", "north east south west", "spring summer autumn winter"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four documents, each many times."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text("\n".join(random.Random(0).choices(DOCUMENTS, k=120)) + "\n")
    (folder / "val.txt").write_text("\n".join(DOCUMENTS * 3) + "\n")
    return folder


@pytest.fixture
def data(folder) -> TextData:
    return text_data(folder)


def text_data(folder: Path, **options) -> TextData:
    given = {"root": str(folder), "cache_dir": str(folder / "cache"), "tokenizer": SubwordConfig(vocab_size=400)}
    given |= {"train_files": "train.txt", "val_files": "val.txt", "test_files": "val.txt"}
    return TextData(**({**given, "block_size": 40, "batch_size": 4, "seed": 0} | options))


def modeler(data: TextData, moe: core.MoEConfig | None = MOE, **options) -> LanguageModeler:
    torch.manual_seed(0)
    optimizer = OptimizerConfig(lr=6e-3, weight_decay=0.0, warmup_steps=5)
    given = {"transformer": TRANSFORMER, "moe_blocks": [1], "optimizer": optimizer}
    return LanguageModeler(data.subwords, moe=moe, **(given | options))


def trainer(folder: Path, **options) -> Trainer:
    kept = {"enable_checkpointing": True, "plugins": [AtomicCheckpointIO()], "num_sanity_val_steps": 0, "max_epochs": 1}
    return quiet_trainer(folder, callbacks=[BestAndLast(str(folder))], **(kept | options))


def test_a_teacher_says_each_token_but_padding(data, tmp_path):
    teacher = modeler(data).eval()
    module = modeler(data, None, distil=DistilConfig(saved(teacher, tmp_path / "t.ckpt"), 0.5))
    tokens_BL = torch.tensor([[5, 6, 7, 8], [9, 10, PAD_ID, PAD_ID]])
    one = TextBatch(tokens_BL, torch.arange(2))
    with torch.no_grad():
        given, own = (m(tokens_BL[:, :-1])[tokens_BL[:, 1:] != PAD_ID] for m in (teacher, module))
    assert len(own) == 4
    out = module.train().task_loss(one)
    soft = out.distribution.divergence(teacher.distribution(one), 2.0)
    assert_close(soft.detach(), kl(given, own, 2.0).float(), rtol=1e-4, atol=0)
    loss, out, *_ = taught(module).training_loss(one)
    mixed = (out.terms["label_loss"] + out.terms["teacher_loss"]) / 2
    assert_close(loss.detach(), mixed)
    other = dataclasses.replace(data.subwords, languages=("xx",))
    with pytest.raises(ValueError, match=rf"its subwords\.digest is '{data.subwords.digest}', and this run's is"):
        taught(LanguageModeler(other, TRANSFORMER, distil=module.distil))


def test_losses_and_metrics_are_means_over_the_tokens_after_the_first(data):
    module = modeler(data, label_smoothing=0.1)
    tokens = torch.tensor([[EOS_ID, 260, 261, 262], [262, 263, EOS_ID, PAD_ID]])
    batch = TextBatch(tokens, torch.arange(2))
    logits_BLV, said_BL = module(tokens[:, :-1]), tokens[:, 1:]
    expected = F.cross_entropy(logits_BLV.flatten(0, 1), said_BL.flatten(), ignore_index=PAD_ID, label_smoothing=0.1)
    assert_close(module.train().task_loss(batch).loss, expected)
    out = module.eval().task_loss(batch)
    nll_BL = F.cross_entropy(logits_BLV.transpose(1, 2), said_BL, ignore_index=PAD_ID, reduction="none")
    assert_close(out.loss, nll_BL.sum() / 5)
    assert [block.tokens for block in out.outputs] == [3, 2]
    assert [block.nll for block in out.outputs] == pytest.approx(nll_BL.sum(1).tolist(), rel=1e-5)
    # The values by example are the nats a token.
    values = module.comparison.example_values([out, out])
    assert (values.values_N.shape, values.higher_is_better) == ((4,), False)
    assert values.mean == pytest.approx(sum(block.nll for block in out.outputs) / 5, rel=1e-12)
    metrics = LanguageMetrics()
    metrics.update([Block(1, 3.0, 1, 4), Block(0, 5.0, 3, 4), Block(1, 3.0, 1, 4)])  # the last fills up a round
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert values == pytest.approx({"perplexity": math.e, "token_accuracy": 0.5})  # 8 nats, 8 tokens, 4 right
    metrics = LanguageMetrics()
    metrics.size = TextSize(documents=1, tokens=8, words=4, bytes=16)
    metrics.update([Block(0, 5.0, 3, 4), Block(1, 3.0, 1, 4)])
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert values["word_perplexity"] == pytest.approx(math.exp(2))
    assert values["bits_per_byte"] == pytest.approx(8 / math.log(2) / 16)
    # Of half the text: as if the other half were like it.
    metrics.reset()
    metrics.update([Block(0, 4.0, 3, 4)])
    assert float(metrics.compute()["word_perplexity"]) == pytest.approx(math.exp(2))


TASK = r"router Task \(.*\) needs context.task_ids_B, which"
AHEAD = "lets later tokens change earlier ones: not for a causal decoder"
ATTENTION = core.MoEConfig(
    4, core.TokenChoice(2), core.AttentionExperts(8, 2), balance=core.Balance(load_balancing_loss=0.01)
)


def heads(router: object) -> dict[str, core.MoEConfig]:
    return {"attention_moe": dataclasses.replace(ATTENTION, router=router, balance=core.Balance())}


@pytest.mark.parametrize(
    ("moe", "options", "message"),
    [
        (core.MoEConfig(4, core.ExpertChoice()), {}, AHEAD),
        (core.MoEConfig(4, core.Task(num_tasks=2)), {}, TASK),
        (
            core.MoEConfig(4, balance=core.Balance(mutual_information=0.01, num_tasks=3)), {},
            "moe.balance needs context.task_ids_B, which LanguageModeler does not give",
        ),
        (MOE, heads(core.Task(num_tasks=2)), TASK),
        (MOE, heads(core.ExpertChoice()), AHEAD),
        ([MOE, core.MoEConfig(2, core.ExpertChoice())], {"moe_blocks": "all"}, AHEAD),
        (MOE, {"depths": MixtureOfDepths(0.5)}, r"depths\.predictor=False lets later tokens change earlier ones"),
    ],
)  # fmt: skip
def test_what_a_text_has_not_and_what_sees_later_tokens_is_refused(data, moe, options, message):
    with pytest.raises(ValueError, match=message):
        modeler(data, moe, **options)


def test_data_that_do_not_fit_are_refused(data, tmp_path):
    learned = dataclasses.replace(TRANSFORMER, positions="learned", max_length=39)
    with pytest.raises(ValueError, match=r"data\.block_size=40 exceeds model\.transformer\.max_length=39"):
        trainer(tmp_path).validate(modeler(data, transformer=learned), data, verbose=False)
    enough = dataclasses.replace(learned, max_length=40)
    trainer(tmp_path, limit_val_batches=1).validate(modeler(data, transformer=enough), data, verbose=False)
    other = text_data(Path(data.root), tokenizer=SubwordConfig(vocab_size=300))
    with pytest.raises(ValueError, match=f"digest {data.subwords.digest}, the data's {other.subwords.digest}"):
        trainer(tmp_path).validate(modeler(data), other, verbose=False)
    domains = of_domains(tmp_path)
    for router, own, message in (
        (core.Domain(1), domains, "num_domains=1, which does not fit the domains colors, numbers: they have 2"),
        (core.DomainRandom(2, 400), data, r"needs context\.domain_ids_B, which LanguageModeler does not"),
        (core.Domain(2), data, "Domain needs context.domain_ids_B or domain_weights_BE in training"),
    ):
        moe = core.MoEConfig(router.num_domains, router)
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, limit_train_batches=1).fit(modeler(own, moe), own)


def test_a_router_that_cannot_decode_trains_and_scores(data, tmp_path):
    module = modeler(data, core.MoEConfig(4, core.Merge("lory", segment_length=8)))
    made = trainer(tmp_path, limit_train_batches=1, limit_val_batches=1)
    made.fit(module, data)
    assert math.isfinite(made.callback_metrics["val/perplexity"])
    with pytest.raises(ValueError, match="trains and scores, but cannot decode step by step"):
        printed(module, text_data(Path(data.root), text="one"))


def test_attention_experts_train_beside_the_others_and_a_comparison_leaves_them(data, tmp_path):
    module = modeler(data, attention_moe=ATTENTION, decode=DecodeConfig("beam", num_beams=3, max_length_extra=4))
    heads = [f"model.decoder.layers.{i}.mixing.heads" for i in (0, 1)]
    assert list(core.moe_layers(module)) == [*heads, "model.decoder.layers.1.ffn"]
    assert module.comparison.moe_block_names == ("model.decoder.layers.1.ffn",)
    dense = module.comparison.baselines()["dense_equal_flops"].build()
    assert [type(layer) for layer in core.moe_layers(dense).values()] == [core.AttentionMoE] * 2
    made = trainer(tmp_path, limit_val_batches=1, limit_train_batches=2)
    before = module.model.decoder.layers[0].mixing.heads.experts.w_q.detach().clone()
    made.fit(module, data)
    assert math.isfinite(made.callback_metrics["val/perplexity"])
    assert not torch.equal(module.model.decoder.layers[0].mixing.heads.experts.w_q, before)
    again = LanguageModeler.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.attention_moe == ATTENTION
    assert again.predict(["one two", "spring"]) == module.eval().predict(["one two", "spring"])
    alone = modeler(data, None, attention_moe=ATTENTION)
    assert (alone.comparison.routed_layers(), alone.comparison.baselines()) == (None, {})


def costs(module) -> dict[str, float]:
    """Return what the baselines cost of what they replace."""
    tokens = F.pad(torch.randint(4, 290, (3, 17)), (0, 5))
    systems = {s.name: s for s in find_systems(module, TextBatch(tokens, torch.arange(3)))}
    assert systems["dense_equal_params"].params_ratio == pytest.approx(1, abs=0.05)
    return systems["dense_equal_flops"].replaced_ratio


def test_each_sparse_block_may_have_a_layer_of_its_own_and_baselines_cost_what_they_say(data):
    moe = [core.MoEConfig(2, core.TokenChoice(1), core.FFN(16)), core.MoEConfig(6, core.TokenChoice(1), core.FFN(16))]
    module = modeler(data, moe, moe_blocks="all")
    assert [layer.num_experts for layer in core.moe_layers(module).values()] == [2, 6]
    assert costs(module) == pytest.approx(1, abs=0.05)
    assert module.eval().predict(["one two"], max_length_extra=2)[0].startswith("one two")
    dense = pickle.loads(pickle.dumps(module.comparison.baselines()["dense_equal_flops"].build))()
    assert isinstance(dense.get_submodule("model.decoder.layers.0.ffn"), FeedForward)
    assert dense.comparison.baselines() == {}
    assert module.comparison.with_moe(core.MoEConfig(2)).moe.num_experts == 2


def test_it_learns_which_word_follows_which(data, tmp_path):
    module = modeler(data, decode=DecodeConfig("greedy", max_length_ratio=0.0, max_length_extra=8))
    made = trainer(tmp_path, max_epochs=35, limit_val_batches=0)
    made.fit(module, data)
    (values,) = made.test(module, data, ckpt_path=str(tmp_path / "last.ckpt"), verbose=False, weights_only=True)
    # A word tells the next one; of a document's 5 tokens, 4 words and the end, only the first is a choice of 4.
    assert values["test/perplexity"] == pytest.approx(math.exp(math.log(4) / 5), rel=0.05)
    _, tokens, words, size = data.size("test")
    assert values["test/word_perplexity"] == pytest.approx(values["test/perplexity"] ** (tokens / words), rel=1e-4)
    expected = math.log2(values["test/perplexity"]) * tokens / size
    assert values["test/bits_per_byte"] == pytest.approx(expected, rel=1e-4)
    lines = printed(module, text_data(Path(data.root), text=["one two", "spring", "north east south"]))
    assert lines == ["one two three four", "spring summer autumn winter", "north east south west"]
    assert module.predict_stream(data) is None
    assert LanguageModeler.load_from_checkpoint(tmp_path / "last.ckpt").subwords == data.subwords


def test_a_list_of_prompts_is_continued_as_the_command_continues_it(data, tmp_path):
    module, prompts = modeler(data).eval(), ["one two", "", "three", "one two"]
    given = text_data(Path(data.root), text=prompts)
    lines = printed(module, given)
    assert module.predict(prompts) == lines
    assert module.predict([]) == []
    assert module.predict(prompts, seed=7) != lines  # it draws, and each prompt by its number
    stream = module.predict_stream(given)
    assert list(stream.predict(1)) == list(stream.predict(0))[1:]
    with pytest.raises(ValueError, match=r"texts='one' is one text, and not a list of texts"):
        module.predict("one")
    assert written(module, given, tmp_path / "out.jsonl") == (4, 0)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["source"], row["text"]) for row in rows] == list(zip(prompts, lines, strict=True))


def test_alternatives_come_with_a_prediction_and_as_lines_of_their_own(data):
    search = {"num_beams": 3, "num_return_sequences": 2, "max_length_extra": 4}
    module, prompt = modeler(data, decode=DecodeConfig(**search)).eval(), text_data(Path(data.root), text="one two")
    (batch,) = prompt.predict_dataloader()
    continuations = module.predict_step(batch, 0)
    (best,), ((other,),) = continuations.text, continuations.alternatives
    assert best != other
    assert all(text.startswith("one two") for text in (best, other))
    assert [line.split("\t")[0::2] for line in printed(module, prompt)] == [["1", best], ["1", other]]
    (candidates,) = module.candidates(["one two"], **search)
    assert [own.text for own in candidates] == [best, other]
    assert module.predict(["one two"], **{**search, "num_return_sequences": 1}) == [best]


def test_a_stream_tells_each_text_as_it_grows(data):
    module = modeler(data).eval()
    stream = module.predict_stream(text_data(Path(data.root), text=["one two", "three"]))
    told = []
    lines = [text for prediction in stream.predict(0, told.append) for text in prediction.texts]
    assert stream.tells
    first = len(told) - told[::-1].index(lines[0])
    assert told[-1] == lines[1]
    for line, own in zip(lines, (told[:first], told[first:]), strict=True):
        assert len(own) > 1
        assert all(line.startswith(text) for text in own)
    several = modeler(data, decode=DecodeConfig("beam", num_beams=3, num_return_sequences=2))
    assert not several.predict_stream(text_data(Path(data.root), text=["one two"])).tells


UNIVERSAL, DEPTHS = Universal(threshold=0.9, depth_penalty=0.001), MixtureOfDepths(0.5, predictor=True)


@pytest.mark.parametrize(
    "options, replaced",
    [
        ({"depths": DEPTHS, "depth_blocks": [1]}, "model.decoder.layers.1.ffn"),
        ({"universal": UNIVERSAL, "moe_blocks": "all"}, "model.decoder.layers.0.ffn"),
    ],
    ids=["few tokens enter", "used again"],
)
def test_layers_that_tokens_enter_as_they_need_learn_and_continue_a_text(data, tmp_path, options, replaced):
    module = modeler(data, **options)
    # A comparison leaves the gates as they are, and counts a layer at each of its steps.
    assert module.comparison.moe_block_names == (replaced,)
    if "universal" in options:
        assert costs(module) == pytest.approx(1, abs=0.05)
    made = trainer(tmp_path, max_epochs=3, limit_val_batches=0)
    made.fit(module, data)
    batch, before = next(iter(data.val_dataloader())), modeler(data, **options)
    first, last = (float(own.eval().task_loss(batch).loss) for own in (before, module))
    assert last < first - 1
    again = LanguageModeler.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    assert (again.model.depths, again.model.universal) == (options.get("depths"), options.get("universal"))
    prompts, greedy = ["one two", "spring"], {"method": "greedy", "max_length_ratio": 0.0, "max_length_extra": 8}
    assert again.predict(prompts, **greedy) == module.predict(prompts, **greedy)


def of_domains(folder: Path, **options) -> TextData:
    """Return text of two domains, colors and numbers."""
    domains = {}
    for name, text in zip(("colors", "numbers"), DOCUMENTS, strict=False):
        (folder / f"{name}.txt").write_text(f"{text}\n" * 60)
        files = dict.fromkeys(("train_files", "val_files", "test_files"), f"{name}.txt")
        domains[name] = TextCorpus(root=str(folder), **files)
    own = {"root": None, "train_files": None, "val_files": None, "test_files": None, "domains": domains}
    return text_data(folder, **{**own, "block_size": 12, "batch_size": 8, **options})


DEMIX = core.MoEConfig(2, core.Domain(2))


def test_demix_learns_each_domain_by_its_expert_and_guesses_the_domain(tmp_path):
    data = of_domains(tmp_path)
    module = modeler(data, DEMIX, report=LanguageReportConfig(pictures=False))
    made = trainer(tmp_path, max_epochs=3)
    made.fit(module, data)
    (metrics,) = made.test(module, data, verbose=False)
    module.eval()
    outs = [(batch, module.task_loss(batch).outputs) for batch in data.test_dataloader()]
    for number, name in enumerate(data.domains):
        own = [b for batch, blocks in outs for b, d in zip(blocks, batch.domain_B, strict=True) if d == number]
        expected = math.exp(sum(b.nll for b in own) / sum(b.tokens for b in own))
        assert metrics[f"test/perplexity_{name}"] == pytest.approx(expected, rel=1e-6)
    batch = data.examples("test").__getitems__(torch.arange(len(data.examples("test"))))
    nll_BE, second = module.domain_nll(batch), batch.domain_B == 1
    assert torch.equal(nll_BE.argmin(1), batch.domain_B)  # its own expert knows a text best
    assert_close(nll_BE[second, 1], module.domain_nll(batch._replace(domain_B=None))[second, 1])
    domains, about = (
        list(csv.DictReader((tmp_path / "report" / f"{name}.csv").open())) for name in ("domains", "specialization")
    )
    assert [row["domain"] for row in domains] == ["colors", "numbers"]
    assert float(domains[0]["perplexity"]) == pytest.approx(metrics["test/perplexity_colors"], rel=1e-6)
    assert 1 < float(domains[0]["perplexity_guessed"]) < 2 * float(domains[0]["perplexity"])
    share = {row["about"]: float(row["share"]) for row in about}
    assert share["domain"] == pytest.approx(1)  # an expert tells the domain
    # A prompt of no known domain is continued by the experts that its words are likely under.
    greedy = {"method": "greedy", "max_length_extra": 2}
    assert module.predict(["one two", "red blue"], **greedy) == ["one two three four", "red blue green black"]
    # A new domain copies no expert.
    three = modeler(data, core.MoEConfig(3, core.Domain(3)))
    with pytest.raises(ValueError, match=r"copies the expert in most use, but with core\.Domain the data choose"):
        grow_from(three, GrowConfig(str(tmp_path / "last.ckpt"), start="copy"), data.val_dataloader())


def test_a_mixture_of_domains_is_decoded_as_it_is_scored(data):
    network = modeler(data, DEMIX).model.eval()
    weights_BE, tokens_BL = torch.tensor([[0.3, 0.7], [1.0, 0.0]]), torch.tensor([[EOS_ID, 260, 261], [EOS_ID, 262, 5]])
    whole_BLV = network(tokens_BL, None, weights_BE)
    config = DecodeConfig("beam", num_beams=2, num_return_sequences=1, max_length_ratio=0.0, max_length_extra=1)
    found = generate_ids(network, tokens_BL, config, None, weights_BE)
    best_B = whole_BLV[:, -1].log_softmax(-1).max(-1)
    assert [ids[0] for ids in found.best] == best_B.indices.tolist()
    assert_close(network(tokens_BL[1:], None, torch.tensor([0])), whole_BLV[1:])  # all weight on one is that one
