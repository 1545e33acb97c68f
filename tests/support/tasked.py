"""Texts of two tasks, to keep the first word and to keep the last one, and a model as small as can learn them."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import core
from apps.data.subwords import SubwordConfig
from apps.nets.config import TransformerConfig
from apps.nlp.text_to_text.data import TextToTextData
from apps.nlp.text_to_text.module import TextToText
from apps.train.step.module import OptimizerConfig

WORDS = ("red", "blue", "green", "black", "white")
SIZES = {"train": 160, "val": 20, "test": 20}
TRANSFORMER = TransformerConfig("nano", dim=32, hidden_dim=32, encoder_layers=1, decoder_layers=1, dropout=0.0)
MOE = core.MoEConfig(4, core.TokenChoice(top_k=2), core.FFN(hidden_dim=16, activation="relu"))


def write_tasks(folder: Path) -> Path:
    """Write JSON lines of texts of 4 words; "first" and "last" take turns. A column ``place`` is further."""
    texts = [" ".join(words) for words in itertools.product(WORDS, repeat=4)]
    random.Random(0).shuffle(texts)
    rows = iter(texts)
    for split, size in SIZES.items():
        lines = []
        for place, (text, task) in enumerate(zip(rows, itertools.cycle(("first", "last")))):
            lines.append(
                {"body": text, "gold": text.split()[0 if task == "first" else -1], "kind": task, "place": place}
            )
            if len(lines) == size:
                break
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def options_of(folder: Path) -> dict[str, Any]:
    """Return the arguments of the data module of these files, which are written where they are not there yet."""
    if not (folder / "train.jsonl").exists():
        write_tasks(folder)
    return {
        "dataset": "jsonl",
        "root": str(folder),
        "cache_dir": str(folder / "cache"),
        **{f"{split}_files": f"{split}.jsonl" for split in SIZES},
        **{"source": "body", "target": "gold", "task": "kind"},
        "tokenizer": SubwordConfig(vocab_size=300),
        "tokens_per_batch": 256,
        "seed": 0,
    }


def task_data(folder: Path, **options: Any) -> TextToTextData:
    return TextToTextData(**(options_of(folder) | options))


def text_to_text(data: TextToTextData, moe: core.MoEConfig | None = MOE, **options: Any) -> TextToText:
    """Return an untrained model for ``data``."""
    given: dict[str, Any] = {
        "transformer": TRANSFORMER,
        "encoder_moe_blocks": "all",
        "decoder_moe_blocks": "none",
        "label_smoothing": 0.0,
        "copy": True,
        "optimizer": OptimizerConfig(lr=6e-3, weight_decay=0.0, warmup_steps=10),
    }
    return TextToText(data.subwords, data.tasks, moe=moe, **(given | options))
