"""A training step that logs nothing never makes the host wait for a GPU: counted on a CPU, through the real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from copying import copy_data, translator
from healthy_runs import write_text
from lightning.pytorch import Callback, Trainer
from quiet_trainer import quiet_trainer
from tiny_app import TinyData, TinyModule
from waits import Waits

import core
from apps.data.subwords import SubwordConfig
from apps.nets import loss
from apps.nets.config import TransformerConfig
from apps.nlp.language.data import TextData
from apps.nlp.language.module import LanguageModeler
from apps.recsys.readers.synthetic import SyntheticConfig
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.module import MultiTaskRecommender
from apps.train.step import module as module_file
from apps.train.step.finite import NonFiniteError
from apps.vision.data import VisionData
from apps.vision.model import ViTConfig
from apps.vision.module import VisionClassifier

ROUTER = core.TokenChoice(top_k=2, score_func="sigmoid", bias_update_rate=1e-3)
MOE = core.MoEConfig(8, ROUTER, core.FFN(hidden_dim=16), capacity_factor=1.2)

ON_A_CPU = {
    ("_local_scalar_dense", "core/dispatch/local.py", "dispatch"),
    ("_local_scalar_dense", "apps/recsys/tables/columns/embedding.py", "_check_rows"),
}
"""Reads behind a check that the device is the CPU."""


def images(folder: Path) -> tuple[Any, Any]:
    vit = ViTConfig(patch_size=2, embed_dim=16, depth=2, num_heads=2, pool="avg")
    module = VisionClassifier(vit, MOE, moe_blocks=[1], num_classes=10, image_size=8, report=None, ema_decay=0.9)
    return module, VisionData("digits", batch_size=64, random_erasing=0.2, mixup_alpha=0.2)


def tables(folder: Path) -> tuple[Any, Any]:
    config = SyntheticConfig(num_rows=4000, num_ids=50)
    data = TableData("synthetic", cache_dir=str(folder), synthetic=config, batch_size=256)
    data.setup("fit")
    shared = core.MMoE(4, core.MLP((8,)), router=core.TokenChoice(top_k=2))
    return MultiTaskRecommender(data.features, shared=shared, embedding=EmbeddingConfig(dim=4), report=None), data


def texts(folder: Path) -> tuple[Any, Any]:
    write_text(folder)
    files = {f"{split}_files": "val.txt" for split in ("train", "val", "test")}
    tokenizer = SubwordConfig(vocab_size=300)
    data = TextData(root=str(folder), cache_dir=str(folder), tokenizer=tokenizer, block_size=32, batch_size=8, **files)
    data.setup("fit")
    network = TransformerConfig("nano", dim=16, hidden_dim=16, decoder_layers=2)
    return LanguageModeler(data.subwords, network, MOE, moe_blocks=[1]), data


def pairs_of_sentences(folder: Path) -> tuple[Any, Any]:
    data = copy_data(folder, tokens_per_batch=128)
    data.setup("fit")
    return translator(data), data


@pytest.mark.parametrize("make", [images, tables, texts, pairs_of_sentences])
def test_steps_between_logged_ones_wait_for_nothing(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (loss, module_file):
        monkeypatch.setattr(file, "host_waits_for", lambda device: True)
    module, data = make(tmp_path)
    for layer in core.moe_layers(module).values():
        layer.backend = "grouped"
    waits = Waits()
    options: dict[str, Any] = {"max_steps": 5, "limit_val_batches": 0, "gradient_clip_val": 1.0}
    quiet_trainer(tmp_path, callbacks=[waits], log_every_n_steps=50, **options).fit(module, data)
    assert waits.steps == 4
    found = {(name, *place.split(":")[::2]) for name, place in waits.found}
    assert found <= ON_A_CPU


def test_a_loss_that_is_nan_ends_a_training_on_a_gpu_at_the_next_logged_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_file, "host_waits_for", lambda device: True)
    trainer = quiet_trainer(tmp_path, log_every_n_steps=4, limit_val_batches=0)
    with pytest.raises(NonFiniteError, match="nan at step 4 "):
        trainer.fit(TinyModule(3, explode_at=1), TinyData())  # the second step of 9
    assert trainer.global_step == 3


class _Strict(Callback):
    """Makes torch raise an error where a training step waits for the GPU."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if batch_idx else "default")  # the first step measures tiles

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("make", [images, tables])
def test_steps_between_logged_ones_wait_for_nothing_on_a_card(make: Any, tmp_path: Path) -> None:
    module, data = make(tmp_path)
    options: dict[str, Any] = {"max_steps": 5, "limit_val_batches": 0, "gradient_clip_val": 1.0, "accelerator": "cuda"}
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[_Strict()], logger=False, devices=1, **options)
    trainer.fit(module, data)
    assert trainer.global_step == 5
