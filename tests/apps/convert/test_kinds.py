"""What a conversion changes, with statistics of a few random images."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import pytest
import torch
import yaml
from converted import EXPERT, IMAGES, MOE, write_run
from copying import TRANSFORMER, copy_data, translator
from torch.testing import assert_close

import apps
import core
from apps.cli import main
from apps.convert.kinds import pruned
from apps.convert.runs import ConversionRequest, TrainedRun
from apps.data.subwords import SubwordConfig
from apps.nlp.language.corpora import TextCorpus
from apps.nlp.language.data import TextData
from apps.nlp.language.module import LanguageModeler
from apps.nlp.translation.module import Translator

LAYER = "model.blocks.1.mlp"
OPTIONS = {"keep": 2, "by": "use", "constants": False, "merge": False}


def request(runs, **options):
    """Return the request to prune the sparse run."""
    run = TrainedRun.read(runs / "sparse")
    model = apps.load(runs / "sparse")
    statistics = core.expert_statistics(model, [IMAGES], every_token=True)
    return ConversionRequest(run, run.mapped(), argparse.Namespace(**{**OPTIONS, **options}), statistics)


def test_the_experts_of_most_rows_stay(runs):
    asked = request(runs)
    conversion = pruned(asked)
    assert asked.statistics is not None
    kept = asked.statistics[LAYER].loads_E.topk(2).indices.sort().values
    old = asked.run.state
    new = dict(conversion.values(old))
    assert conversion.arguments["moe"].num_experts == 2
    for name in ("experts.w_in", "experts.b_out", "router.gate.weight"):
        assert_close(new[f"{LAYER}.{name}"], old[f"{LAYER}.{name}"][kept], rtol=0, atol=0)
    assert all(torch.equal(old[name], new[name]) for name in old if not name.startswith(LAYER))
    layout = conversion.layout(asked.run, asked.run.outline(conversion.arguments))
    assert {name: value.shape for name, value in layout.items()} == {name: value.shape for name, value in new.items()}


def test_constants_are_experts_of_the_config_and_like_experts_are_merged(runs):
    asked = request(runs, keep=3, constants=True)
    conversion = pruned(asked)
    assert conversion.arguments["moe"].expert == core.Mixed((EXPERT, core.Constant()), (3, 1))
    layout = conversion.layout(asked.run, asked.run.outline(conversion.arguments))
    assert dict(conversion.values(asked.run.state)).keys() == layout.keys()
    conversion = pruned(request(runs, keep=0.5, merge=True))
    assert conversion.arguments["moe"] == core.MoEConfig(2, MOE.router, EXPERT)
    too_many, no_share = "keep=5 exceeds num_experts=4", "keep=1.5 is neither an integer nor a share between 0 and 1"
    for keep, message in ((5, too_many), (1.5, no_share)):
        with pytest.raises(ValueError, match=message):
            pruned(request(runs, keep=keep))
    assert dict(conversion.values(asked.run.state))[f"{LAYER}.experts.w_in"].shape == (2, 8, 16)


def words(kind, folder):
    return ["convert", kind, "--ckpt_path", str(folder / "old"), "--output", str(folder / "new")]


def test_one_pair_of_a_translator_is_the_dense_model_of_the_pair(tmp_path):
    data = copy_data(tmp_path, ("de", "fr"))
    torch.manual_seed(0)
    moe = core.MoEConfig(4, core.Task(num_tasks=2, top_k=2), core.FFN(hidden_dim=16, activation="relu"))
    sparse = translator(data, moe, encoder_moe_blocks="all", bleu_tokenize={"en-fr": "intl"})
    with torch.no_grad():
        for layer in core.moe_layers(sparse).values():
            layer.router.gate.weight.normal_()
    write_run(tmp_path / "old", sparse, {})
    assert main([*words("specialize", tmp_path), "--batches", "0", "--pair", "en-fr"]) == 0
    dense = apps.load(tmp_path / "new")
    assert isinstance(dense, Translator)
    assert dense.pairs == ("en-fr",)
    assert dense.bleu_tokenizers == {"en-fr": "intl"}
    assert not core.moe_layers(dense)
    (batch,) = copy_data(tmp_path, ("fr",), subwords=sparse.subwords).test_dataloader()
    as_before = batch._replace(pair_B=torch.ones_like(batch.pair_B))  # en-fr is the second of two
    dense, sparse = dense.double().eval(), sparse.double().eval()
    actual, expected = dense.predict_step(batch, 0), sparse.predict_step(as_before, 0)
    assert actual.translation == expected.translation
    assert_close(actual.score, expected.score)
    assert actual.translation != sparse.predict_step(batch, 0).translation
    with pytest.raises(ValueError, match="pair='fr-en' is not one of en-de, en-fr"):
        sparse.part("fr-en")
    part, (batch, *_) = sparse.part("en-fr"), data.val_dataloader()
    assert part.task == 1
    assert part.select(batch).pair_B.tolist() == [1] * int((batch.pair_B == 1).sum())
    assert part.select(batch._replace(pair_B=torch.zeros_like(batch.pair_B))) is None


def test_a_domain_is_opted_out_with_its_expert_and_its_text(tmp_path):
    domains = {}
    for name in ("law", "sea", "sky"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {i} {name}" for i in range(60)))
        domains[name] = TextCorpus(root=str(tmp_path), train_files=f"{name}.txt", val_size=10)
    data = TextData(domains=domains, cache_dir=str(tmp_path / "cache"), tokenizer=SubwordConfig(vocab_size=290))
    torch.manual_seed(0)
    moe = core.MoEConfig(3, core.Domain(3), core.FFN(hidden_dim=16, activation="relu"))
    module = LanguageModeler(data.subwords, TRANSFORMER, moe)
    own = {"domains": {name: asdict(own) for name, own in domains.items()}, "cache_dir": str(tmp_path / "cache")}
    own["weights"] = {"law": 0, "sea": 1, "sky": 0}
    write_run(tmp_path / "old", module, {"class_path": "TextData", "init_args": {**own, "block_size": 8}})
    with pytest.raises(ValueError, match="--without='lake' is not one of 0, 1, 2, law, sea, sky"):
        pruned(
            ConversionRequest(
                run := TrainedRun.read(tmp_path / "old"), run.mapped(), argparse.Namespace(without=("lake",))
            )
        )
    assert main([*words("prune", tmp_path), "--batches", "1", "--without", "sea"]) == 0
    new, old = apps.load(tmp_path / "new"), module.state_dict()
    for name, value in new.state_dict().items():
        assert torch.equal(value, old[name] if value.shape == old[name].shape else old[name][[0, 2]])
    assert new.moe == core.MoEConfig(2, core.Domain(2), moe.expert)
    config = yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())["data"]["init_args"]
    assert list(config["domains"]) == ["law", "sky"]
    assert config["weights"] is None
