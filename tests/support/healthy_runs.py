"""Fifty short trainings of images, tables and text across routers, in which nothing is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

import core
from apps.data.subwords import SubwordConfig
from apps.nets.config import TransformerConfig
from apps.nlp.language.data import TextData
from apps.nlp.language.module import LanguageModeler
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.module import MultiTaskRecommender
from apps.train.optim.optimizers import build_optimizer
from apps.train.step.module import OptimizerConfig, SparseModule
from apps.train.watch.doctor import classes_of
from apps.vision.batch import ImageBatch
from apps.vision.model import ViTConfig
from apps.vision.module import VisionClassifier

EXPERT = core.FFN(hidden_dim=32)
OPTIMIZER = OptimizerConfig(lr=3e-3, weight_decay=0.01, warmup_steps=5, schedule="constant")
ROUTERS: dict[str, core.RouterConfig] = {
    "top1": core.TokenChoice(top_k=1),
    "top2": core.TokenChoice(top_k=2),
    "normalized": core.TokenChoice(top_k=2, normalize=True),
    "sigmoid": core.TokenChoice(top_k=2, score_func="sigmoid", normalize=True),
    "bias": core.TokenChoice(top_k=2, score_func="sigmoid", normalize=True, bias_update_rate=1e-3),
    "noisy": core.TokenChoice(top_k=2, noise="learned"),
    "jitter": core.TokenChoice(top_k=1, jitter_eps=0.01),
    "cosine": core.Cosine(2),
    "attention": core.Attention(2),
    "null": core.NullExperts(),
    "relu": core.ReLURouting(),
    "mixer": core.SparseMixer(),
    "dense": core.Dense(),
    "dense_to_sparse": core.DenseToSparse(),
    "random": core.Random(2),
    "prototypes": core.Prototypes(),
}
LOOKS_AHEAD: dict[str, core.RouterConfig] = {
    "expert_choice": core.ExpertChoice(),
    "slots": core.SoftSlots(),
    "merge": core.Merge(),
    "base": core.Base(),
    "sinkhorn": core.Sinkhorn(),
}
TABLES: dict[str, core.MultiGateConfig] = {
    "mmoe": core.MMoE(8, core.MLP((16,))),
    "omoe": core.OMoE(8, core.MLP((16,))),
    "cgc": core.CGC(4, core.MLP((16,))),
    "ple": core.PLE(4, core.MLP((16,))),
    "dropout": core.MMoE(8, core.MLP((16,)), expert_dropout=0.1),
    "bias": core.MMoE(8, core.MLP((16,)), gate_bias=True),
    "hidden": core.MMoE(8, core.MLP((16,)), gate_hidden_dims=(16,)),
    "sparse": core.MMoE(8, core.MLP((16,)), router=core.TokenChoice(top_k=2)),
}
Run = Callable[[], list[core.Finding]]


def healthy_runs(cache: Path) -> dict[str, Run]:
    """Return 50 runs by name, each of which trains 60 steps and returns what a diagnosis finds.

    Args:
        cache: folder for the encoded text.
    """
    runs: dict[str, Run] = {}
    every = {**ROUTERS, **LOOKS_AHEAD}
    for seed in (0, 1):
        for name, router in every.items() if seed == 0 else itertools.islice(ROUTERS.items(), 5):
            runs[f"digits/{name}/{seed}"] = lambda router=router, seed=seed: digits(router, seed)
        for name, shared in TABLES.items() if seed == 0 else itertools.islice(TABLES.items(), 4):
            runs[f"adult/{name}/{seed}"] = lambda shared=shared, seed=seed: adult(shared, seed)
    for name, router in itertools.islice(ROUTERS.items(), 12):
        runs[f"text/{name}/0"] = lambda router=router: text(router, 0, cache)
    return runs


def digits(router: core.RouterConfig, seed: int) -> list[core.Finding]:
    torch.manual_seed(seed)
    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    images = ((images.float() - 4.9) / 6.0).view(-1, 1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))

    def batches(start: int, end: int) -> Iterable[ImageBatch]:
        for index in order[start:end].split(64):
            yield ImageBatch(images[index], labels[index].long(), index)

    vit = ViTConfig(patch_size=2, embed_dim=32, depth=2, num_heads=2, pool="avg", pos_embed_std=0.5)
    moe = core.MoEConfig(8, router, EXPERT)
    module = VisionClassifier(
        vit, moe, moe_blocks=[0, 1], num_classes=10, image_size=8, report=None, optimizer=OPTIMIZER
    )
    return trained(module, itertools.chain(*(batches(0, 1280) for _ in range(3))), batches(1280, 1797))


_adult: list[TableData] = []


def adult(shared: core.MultiGateConfig, seed: int) -> list[core.Finding]:
    if not _adult:
        _adult.append(TableData(dataset="adult", batch_size=256, eval_batch_size=256))
        _adult[0].setup("fit")
    data = _adult[0]
    torch.manual_seed(seed)
    module = MultiTaskRecommender(
        data.features, shared=shared, embedding=EmbeddingConfig(dim=8), report=None, optimizer=OPTIMIZER
    )
    return trained(module, data.train_dataloader(), data.val_dataloader())


def write_text(folder: Path) -> None:
    """Write sentences of a made language, 4,000 to learn from and 400 to validate, the same on every machine.

    Five kinds of words follow one another, 100 of each kind, made of syllables; the n-th word of a kind is chosen in
    proportion to 1 / (n + 2), as with the words of a language.
    """
    rng = np.random.RandomState(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = [["".join(rng.choice(syllables, rng.randint(1, 4))) for _ in range(100)] for _ in range(5)]
    chance = 1 / (np.arange(100) + 2)
    for name, count in (("train.txt", 4000), ("val.txt", 400)):
        lines = []
        for _ in range(count):
            kinds = (np.arange(rng.randint(4, 12)) + rng.randint(5)) % 5
            lines.append(" ".join(words[kind][rng.choice(100, p=chance / chance.sum())] for kind in kinds) + ".\n")
        (folder / name).write_text("".join(lines), encoding="utf-8")


def text(router: core.RouterConfig, seed: int, cache: Path) -> list[core.Finding]:
    if not (cache / "train.txt").exists():
        write_text(cache)
    data = TextData(
        root=str(cache), cache_dir=str(cache), train_files="train.txt", val_files="val.txt", test_files="val.txt",
        tokenizer=SubwordConfig(vocab_size=400), block_size=32, batch_size=16, eval_batch_size=16, seed=seed,
    )  # fmt: skip
    torch.manual_seed(seed)
    network = TransformerConfig("nano", dim=32, hidden_dim=32, decoder_layers=2, dropout=0.0)
    moe = core.MoEConfig(4, router, EXPERT)
    module = LanguageModeler(data.subwords, network, moe, moe_blocks=[0, 1], optimizer=OPTIMIZER)
    data.setup("fit")
    return trained(module, data.train_dataloader(), data.val_dataloader())


def trained(module: SparseModule, train: Iterable[Any], val: Iterable[Any], steps: int = 60) -> list[core.Finding]:
    """Train as ``moesaic fit`` does, and return the findings as ``RoutingDoctor`` makes them."""
    doctor = core.Doctor(module, core.TrainingStart(module))
    optimizer = build_optimizer(module, module.optimizer_config)
    module.train()
    for number, batch in enumerate(itertools.islice(train, steps)):
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * module.optimizer_config.factor(number, steps)
        optimizer.zero_grad()
        loss = module.training_loss(batch)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        core.update_expert_bias(module, loss.tape)
    module.eval()
    with torch.no_grad():
        for batch in itertools.islice(val, 8):
            with doctor.watching(batch, classes_of(module, batch)):
                module.task_loss(batch)
    doctor.look_at_step(batch, lambda m, b: m.training_loss(b).total)
    with torch.no_grad():
        module.eval()
        return doctor.findings()
