"""The stages of MoE-LLaVA: a dense captioner becomes a sparse one that writes the same, and its experts train alone."""

from __future__ import annotations

import pytest
import torch
import yaml
from captioned import COLOURS, TEXTS, captioner, images, pairs
from converted import write_run
from torch.testing import assert_close

import core
from apps.cli import main
from apps.train.checkpoint.loading import load

ALL = pairs(*zip(COLOURS, TEXTS, strict=True))


@pytest.mark.slow
def test_an_upcycled_captioner_begins_as_the_dense_one_and_trains_its_experts_alone(tmp_path):
    dense = captioner(moe=None)
    write_run(tmp_path / "dense", dense, {"class_path": "ImageTextData", "init_args": {}})
    moe = {"num_experts": 4, "router": {"class_path": "core.TokenChoice", "init_args": {"top_k": 2}}}
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"moe": moe}}}))
    argv = ["convert", "upcycle", "--ckpt_path", str(tmp_path / "dense"), "--moe", str(tmp_path / "moe.yaml")]
    assert main([*argv, "--output", str(tmp_path / "sparse")]) == 0

    sparse = load(tmp_path / "sparse")
    assert list(core.moe_layers(sparse)) == ["model.decoder.layers.1.ffn"]
    assert sparse.moe.expert == core.FFN(16, activation="relu", bias=True)  # as the dense network
    sparse.eval(), dense.eval()
    assert_close(sparse(ALL.image, ALL.text_BL), dense(ALL.image, ALL.text_BL))
    image = images("red", "blue")
    assert sparse.hypotheses_of(image, sparse.decode).ids == dense.hypotheses_of(image, dense.decode).ids

    tuned = type(sparse).load_from_checkpoint(tmp_path / "sparse" / "checkpoints" / "best.ckpt", trained="experts")
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    optimizer = tuned.configure_optimizers()["optimizer"]
    tuned.train().training_loss(ALL).total.backward()
    optimizer.step()
    moved = {name for name, value in tuned.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("model.decoder.layers.1.ffn.") for name in moved)
