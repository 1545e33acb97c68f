"""Sentences of a few words and their copies, and a model as small as can copy them."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import core
from apps.data.subwords import SubwordConfig
from apps.nets.config import TransformerConfig
from apps.nlp.translation.data import TranslationData
from apps.nlp.translation.module import Translator
from apps.train.step.module import OptimizerConfig

WORDS = ("red", "blue", "green", "black")
SIZES = {"train": 200, "val": 20, "test": 20}
TRANSFORMER = TransformerConfig("nano", dim=32, hidden_dim=32, encoder_layers=1, decoder_layers=2, dropout=0.0)
MOE = core.MoEConfig(num_experts=4, router=core.TokenChoice(top_k=2), expert=core.FFN(hidden_dim=16, activation="relu"))


def write_copies(folder: Path, targets: tuple[str, ...] = ("de",)) -> Path:
    """Write Moses files of sentences of 4 words in English and their copies; the splits are parts of all 256."""
    sentences = [" ".join(words) for words in itertools.product(WORDS, repeat=4)]
    random.Random(0).shuffle(sentences)
    start = 0
    for split, size in SIZES.items():
        own = sentences[start : start + size]
        start += size
        for language in ("en", *targets):
            # Each target language says it in its own way.
            lines = own if language in ("en", "de") else [" ".join(reversed(s.split())) for s in own]
            (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n")
    return folder


def copy_data(folder: Path, targets: tuple[str, ...] = ("de",), **options: Any) -> TranslationData:
    """Return the data module of these files, which are written where they are not there yet."""
    if not (folder / "train.en").exists():
        write_copies(folder, targets)
    given: dict[str, Any] = {
        "root": str(folder),
        "cache_dir": str(folder / "cache"),
        "pairs": [f"en-{target}" for target in targets],
        "train_files": "train",
        "val_files": "val",
        "test_files": "test",
        "tokenizer": SubwordConfig(vocab_size=300),
        "tokens_per_batch": 256,
        "seed": 0,
    }
    return TranslationData("moses", **(given | options))


def translator(data: TranslationData, moe: core.MoEConfig | None = MOE, **options: Any) -> Translator:
    """Return an untrained model for ``data``."""
    given: dict[str, Any] = {
        "transformer": TRANSFORMER,
        "encoder_moe_blocks": "none",
        "decoder_moe_blocks": [1],
        "label_smoothing": 0.0,
        "optimizer": OptimizerConfig(lr=6e-3, weight_decay=0.0, warmup_steps=10),
    }
    return Translator(data.subwords, data.pairs, moe=moe, **(given | options))
