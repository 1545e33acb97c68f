"""A configuration for two text files that a user names, line i of one translating line i of the other."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from apps.data.given import EXPERTS, GivenConfig, GivenData
from apps.data.text_files import COMPRESSED, text_lines
from apps.nlp.text.corpora import LANGUAGE

LEAST_LINES = 200
"""Least number of lines: a fifth of them, to test on, is 40."""

_EPOCHS = 20


def config_for(given: GivenData) -> GivenConfig | None:
    """Return the configuration of a small sparse translator for two text files; None: another kind of data.

    A file's language is its ending, as in ``train.en``; other names give the languages "source" and "target". The files
    are linked below ``given.folder`` under the names that the reader of parallel text knows.

    Raises:
        ValueError: files of different numbers of lines, of too few, or that are not text.
    """
    if len(given.paths) != 2 or not all(path.is_file() for path in given.paths):
        return None
    counts = [sum(1 for _ in text_lines(path)) for path in given.paths]
    names = " and ".join(map(str, given.paths))
    if counts[0] != counts[1]:
        raise ValueError(
            f"{names} have {counts[0]:,} and {counts[1]:,} lines: line i of one must translate line i of the other"
        )
    if counts[0] < LEAST_LINES:
        raise ValueError(f"{names} have {counts[0]} lines: {LEAST_LINES} are needed at least")
    if given.in_place:
        return _in_place(given.paths, counts[0])
    languages = [_language(path) for path in given.paths]
    if None in languages or languages[0] == languages[1]:
        languages = ["source", "target"]
    folder = given.folder / "text"
    folder.mkdir(parents=True, exist_ok=True)
    for path, language in zip(given.paths, languages, strict=True):
        link = folder / f"lines.{language}{path.suffix if path.suffix in COMPRESSED else ''}"
        if not link.is_symlink():
            os.symlink(path.resolve(), link)
    notes = (f"{counts[0]:,} pairs of lines, {languages[0]} to {languages[1]}; a tenth is held out for the test.",)
    return _config(folder, f"{languages[0]}-{languages[1]}", counts[0], notes)


def _in_place(paths: Sequence[Path], num_lines: int) -> GivenConfig:
    """Return the configuration that reads two files where they are.

    Raises:
        ValueError: no single word of their paths tells the languages.
    """
    words = [re.split(r"([./])", path.as_posix()) for path in paths]
    differ = [place for place, both in enumerate(zip(*words, strict=False)) if len(set(both)) > 1]
    languages = ["".join(own[place] for place in differ) for own in words]
    if len(words[0]) != len(words[1]) or len(differ) != 1 or not all(re.fullmatch(LANGUAGE, own) for own in languages):
        both = " and ".join(map(str, paths))
        raise ValueError(f"{both} must differ in one word, the language, such as train.en and train.de")
    pattern = "".join("{lang}" if place == differ[0] else own for place, own in enumerate(words[0]))
    for ending in COMPRESSED:
        pattern = pattern.removesuffix(ending)
    pair = "-".join(languages)
    notes = (f"{num_lines:,} pairs of lines, {languages[0]} to {languages[1]}; a tenth is held out for the test",)
    return _config(None, pair, num_lines, notes, pattern)


def _language(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    match = re.fullmatch(r"\.([A-Za-z]{2,3}(?:_[A-Z]{2})?)", suffixes[-1]) if suffixes else None
    return None if match is None or match[1].lower() == "txt" else match[1]


def _config(folder: Path | None, pair: str, num_lines: int, notes: Sequence[str], files: str = "lines") -> GivenConfig:
    """Return 2 + 2 layers of width 128; one of each stack has 8 experts, of which a token takes 2."""
    expert = {"class_path": "core.FFN", "init_args": {"hidden_dim": 128, "activation": "relu"}}
    model = {
        "transformer": {"size": "tiny", "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.1},
        "moe": {**EXPERTS, "expert": expert},
        "encoder_moe_blocks": "every2",
        "decoder_moe_blocks": "every2",
        "label_smoothing": 0.1,
        "optimizer": {"lr": 2.0e-3, "betas": [0.9, 0.98], "weight_decay": 0.01, "warmup_steps": 0.1},
    }
    data = {
        "dataset": "moses",
        **({} if folder is None else {"root": str(folder)}),
        "pairs": [pair],
        "train_files": files,
        "val_size": min(1000, num_lines // 20),
        "test_size": min(2000, num_lines // 10),
        "tokenizer": {"vocab_size": 1000 if num_lines < 5000 else 2000 if num_lines < 20000 else 4000},
        "max_length": 64,
        "tokens_per_batch": 1024,
    }
    trainer = {"max_epochs": _EPOCHS, "gradient_clip_val": 1.0}
    return GivenConfig.of(notes, trainer, model=("Translator", model), data=("TranslationData", data))
