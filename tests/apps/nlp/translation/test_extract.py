"""One task of a sparse model as a dense model of its own."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from copying import copy_data, translator
from lightning.pytorch import Trainer
from places import ROOT
from torch.testing import assert_close

import core
from apps.data.subwords import PAD_ID
from apps.nets.config import TransformerConfig
from apps.nets.transformer import TranslationModel
from apps.nlp.translation.extract import dense_of_pair, dense_of_task
from core.layers import FeedForward

DOCUMENT = ROOT / "docs" / "translation.md"
SOURCE = torch.tensor([[5, 6, 7, 3, 0], [8, 9, 10, 11, 3], [4, 3, 0, 0, 0]])
TARGET = torch.tensor([[2, 5, 6, 7], [2, 9, 9, 4], [2, 4, 0, 0]])
TASK = core.Task(num_tasks=3, top_k=2)
RELU = core.FFN(hidden_dim=12, activation="relu")


def build(moe=None, layers=("every2", "all"), options=None):
    """Return a model with gates and biases away from their initial values."""
    torch.manual_seed(0)
    config = TransformerConfig("nano", dim=16, hidden_dim=24, **(options or {}))
    model = TranslationModel(
        config, source_vocab=20, ffn=moe, encoder_moe_blocks=layers[0], decoder_moe_blocks=layers[1]
    )
    with torch.no_grad():
        for layer in core.moe_layers(model).values():
            for name, p in layer.named_parameters():
                if ".b_" in name or "router" in name:
                    p.normal_()
    return model.double().eval()


def task_model(expert=RELU, router=TASK, layers=("every2", "all"), options=None, **moe):
    return build(core.MoEConfig(4, router, expert, **moe), layers, options)


@pytest.mark.parametrize(
    ("given", "width"),
    [
        ({}, 24),
        ({"router": dataclasses.replace(TASK, top_k=1)}, 12),
        ({"expert": dataclasses.replace(RELU, bias=True), "num_shared_experts": 2}, 48),
        ({"router": dataclasses.replace(TASK, normalize=False), "options": {"tie": "none", "bias": False}}, 24),
        ({"expert": core.SwiGLU(hidden_dim=8), "options": {"gated": True, "activation": "silu"}}, 16),
        ({"granularity": 2, "num_shared_experts": 1}, 30),  # 4 of width 6, and a shared one
        # The other layers stay as they are: relu and no gate, or no bias.
        ({"expert": core.SwiGLU(hidden_dim=8)}, 16),
        ({"expert": dataclasses.replace(RELU, bias=True), "options": {"bias": False}}, 24),
        ({"expert": core.GEGLU(hidden_dim=8, bias=True), "layers": ("all", "all"), "num_shared_experts": 1}, 24),
    ],
)
def test_a_dense_model_says_what_the_sparse_one_says_of_a_task(given, width):
    model = task_model(**given)
    real_BL, logits = TARGET != PAD_ID, []
    for task in range(3):
        dense = dense_of_task(model, task)
        assert not core.moe_layers(dense)
        assert dense.decoder.layers[0].ffn.w_in.out_features == width
        logits.append(dense(SOURCE, TARGET)[real_BL])
        expected = model(SOURCE, TARGET, torch.full((3,), task))[real_BL]
        assert_close(logits[-1], expected, rtol=0, atol=1e-12)
        assert not dense.training
    assert not torch.allclose(logits[0], logits[1])
    assert (dense.output is None) == (model.output is None)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (build, "the model is dense already"),
        (lambda: task_model(router=core.Hash(vocab_size=20)), r"router Hash \(arXiv 2106.04426\) does not decide by"),
        (lambda: task_model(num_shared_experts=1, shared_gate="mix"), "shared_gate='mix' weights the experts token by"),
        (lambda: task_model(eval_capacity_factor=1.0), "with a capacity what an expert computes depends on the batch"),
        (lambda: task_model(core.MLP(hidden_dims=(16,))), "expert MLP is not a dense FFN"),
        (
            lambda: build([core.MoEConfig(4, TASK, RELU), core.MoEConfig(8, TASK, RELU)], ("all", "none")),
            "moe lists 2 layers: one dense FFN stands for layers that are alike",
        ),
        (lambda: task_model(output_bias=True), "output_bias=True is added beside the experts"),
    ],
)
def test_what_no_dense_model_says_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        dense_of_task(model(), 0)


def test_a_model_with_attention_experts_is_refused():
    heads = core.MoEConfig(4, expert=core.AttentionExperts(4))
    moe = core.MoEConfig(4, TASK, RELU)
    model = TranslationModel(TransformerConfig("nano", dim=16), source_vocab=20, ffn=moe, attention_moe=heads)
    with pytest.raises(ValueError, match=r"^attention_moe chooses heads token by token: no dense model does$"):
        dense_of_task(model, 0)


def test_a_task_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"task=3 is not in range\(3\)"):
        dense_of_task(task_model(), 3)


def test_the_translator_of_one_pair_as_the_document_takes_it_out(tmp_path, monkeypatch):
    data = copy_data(tmp_path, ("de", "fr"))
    torch.manual_seed(0)
    moe = core.MoEConfig(4, core.Task(num_tasks=2, top_k=2), core.FFN(hidden_dim=16, activation="relu"))
    sparse = translator(data, moe, encoder_moe_blocks="all", bleu_tokenize={"en-fr": "intl"})
    with torch.no_grad():
        for layer in core.moe_layers(sparse).values():
            layer.router.gate.weight.normal_()
    monkeypatch.chdir(tmp_path)
    made = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    made.strategy.connect(sparse)
    made.save_checkpoint("runs/pairs/checkpoints/best.ckpt")
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), flags=re.DOTALL | re.MULTILINE)
    (source,) = (block for block in blocks if "extract" in block)
    names: dict[str, Any] = {}
    exec(source, names)
    dense, sparse = names["dense"].double().eval(), sparse.double().eval()
    assert dense.pairs == ("en-fr",)
    assert dense.bleu_tokenizers == {"en-fr": "intl"}
    assert {m.w_in.out_features for m in dense.modules() if isinstance(m, FeedForward)} == {32}
    own = copy_data(tmp_path, ("fr",), subwords=sparse.subwords)
    (batch,) = own.test_dataloader()
    as_before = batch._replace(pair_B=torch.ones_like(batch.pair_B))  # en-fr is the second of two
    actual, expected = dense.predict_step(batch, 0), sparse.predict_step(as_before, 0)
    assert actual.translation == expected.translation
    assert_close(actual.score, expected.score)
    assert actual.translation != sparse.predict_step(batch, 0).translation
    with pytest.raises(ValueError, match="pair='fr-en' is not one of en-de, en-fr"):
        dense_of_pair(sparse, "fr-en")
