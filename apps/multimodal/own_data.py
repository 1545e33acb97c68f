"""A configuration for a catalog of images with titles that a user names."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.data.given import EXPERTS, GivenConfig, GivenData
from apps.multimodal.datasets import PAIR_DATASETS
from apps.multimodal.readers.rows import as_texts, kind_of, rows_of, tables_in
from apps.multimodal.readers.tables import SPLIT_NAMES
from apps.vision.own_data import images_in, size_for

LEAST_PAIRS = 200
"""Least number of rows: a tenth of them are 20 to test on."""

_LOOKED_AT = 100
_STEPS = 1500
_NAMES = ("caption", "captions", "title", "text", "sentence", "description", "productDisplayName", "name")
"""Names of columns of captions; the first one that there is counts."""


@dataclass(frozen=True)
class _Columns:
    """The contents of a table's columns.

    Attributes:
        image: column that names the image.
        pattern: where the image lies, ``{}`` being what the column holds.
        caption: column of the caption.
        split: column of train, val and test; None: there is none.
    """

    image: str
    pattern: str
    caption: str
    split: str | None


def config_for(given: GivenData) -> GivenConfig | None:
    """Return the configuration of a small sparse model for a catalog; None: another kind of data.

    A catalog is a table, or a folder with one, in which one column names image files below its folder, with or without
    their folder and ending, and another one holds texts of two words or more; or a folder in the layout of a dataset of
    `ImageTextData`. A target that is named is predicted from the table by another app.

    Raises:
        ValueError: too few rows, or an image that cannot be read.
    """
    if len(given.paths) != 1 or given.target is not None:
        return None
    path = given.paths[0]
    for name, dataset in PAIR_DATASETS.items():
        if path.is_dir() and not dataset.is_table and not dataset.made and dataset.missing(path) is None:
            options = {"dataset": name, "root": str(path), "image_size": 64}
            return _config(options, 64, 10_000, f"The folder holds {name}: {dataset.title}.")
    table = _table(path)
    if table is None:
        return None
    files = [p.relative_to(table.parent) for p in sorted(images_in(table.parent))]
    columns = _columns(_first_rows(table), files) if files else None
    if columns is None:
        return None
    num_rows = sum(1 for _ in rows_of(table, {columns.image: "image", columns.caption: "caption"}))
    if num_rows < LEAST_PAIRS:
        raise ValueError(f"{table} has {num_rows} rows with images: {LEAST_PAIRS} are needed at least")
    size = size_for([table.parent / file for file in files])
    options = {
        "dataset": "image_captions",
        "root": str(table.parent),
        "table": table.name,
        "image_column": columns.image,
        "image_pattern": columns.pattern,
        "caption_column": columns.caption,
        "split_column": columns.split,
        "image_size": size,
    }
    split = f"column {columns.split!r} says the split" if columns.split else "no caption is in two splits"
    note = f"{num_rows:,} rows of images ({columns.image!r}) and texts ({columns.caption!r}); {split}."
    return _config(options, size, num_rows, note)


def _table(path: Path) -> Path | None:
    """Return the table that a path is, or the only one in it."""
    if path.is_dir():
        tables = tables_in(path)
        return tables[0] if len(tables) == 1 else None
    return path if kind_of(path) is not None else None


def _first_rows(table: Path) -> list[Mapping[str, Any]]:
    """Return the first rows of a table; none where it is not of a form that `ImageTextData` reads."""
    try:
        return [values for _, values in itertools.islice(rows_of(table, {}, None), _LOOKED_AT)]
    except ValueError:  # another app may read it, or reports the error in it
        return []


def _columns(rows: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> _Columns | None:
    """Return the contents of the columns, inferred from the first rows; None if they have no images or no texts."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = {name: [text for row in rows for text in _texts(row.get(name))] for name in names}
    patterns = {name: _pattern(texts, files) for name, texts in values.items()}
    image = max(patterns, key=lambda name: patterns[name][1], default=None)
    words = {name: statistics.mean(len(text.split()) for text in texts) for name, texts in values.items() if texts}
    captions = [name for name in words if name != image and words[name] >= 2]
    if image is None or patterns[image][1] == 0 or not captions:
        return None
    named = [name for name in _NAMES if name in captions]
    caption = named[0] if named else max(captions, key=words.__getitem__)
    split = next((name for name in names if name not in (image, caption) and _splits(name, values)), None)
    return _Columns(image, patterns[image][0], caption, split)


def _texts(value: Any) -> list[str]:
    try:
        return [text for text in as_texts(value, "", "") if text]
    except ValueError:  # a nested value, which is not text
        return []


def _splits(name: str, values: Mapping[str, Sequence[str]]) -> bool:
    return name.lower() in ("split", "set", "partition") and {v.strip().lower() for v in values[name]} <= set(
        SPLIT_NAMES
    )


def _pattern(values: Sequence[str], files: Sequence[Path]) -> tuple[str, int]:
    """Return how values name files, such as ``images/{}.jpg``, and how many files they name so.

    The pattern is the one that finds most files; if it finds no file for a tenth of the values, the number is 0.
    """
    places = Counter((file.parent.as_posix(), file.suffix) for file in files)
    known = {file.as_posix() for file in files}
    best = ("{}", 0)
    for (folder, suffix), _ in [((".", ""), 0), *places.most_common(20)]:
        for ending in dict.fromkeys(("", suffix)):
            pattern = "{}" + ending if folder == "." else f"{folder}/{{}}{ending}"
            named = [file for value in values if (file := pattern.replace("{}", value)) in known]
            num_files = len(set(named))
            # An image may have several captions; a column of few numbers names no images, though 1.png may lie there.
            if len(named) >= 0.9 * len(values) and 10 * num_files >= len(named) and num_files > best[1]:
                best = (pattern, num_files)
    return best


def _config(own: Mapping[str, Any], size: int, num_rows: int, *notes: str) -> GivenConfig:
    """Return four blocks of width 96 over 64 patches; two of them have 8 experts, of which a token takes 2."""
    steps = math.ceil(0.8 * num_rows / 128)
    model = {
        "tower": {
            "class_path": "SingleTower",
            "init_args": {"width": 96, "depth": 4, "num_heads": 4, "hidden_dim": 192, "patch_size": size // 8},
        },
        "dim": 96,
        "moe": {
            **EXPERTS,
            "expert": {"class_path": "core.FFN", "init_args": {"hidden_dim": 192}},
            "balance": {
                "num_modalities": 2,
                "local_entropy": 0.01,
                "local_entropy_modality": 1,
                "global_entropy": 0.02,
            },
        },
        "moe_blocks": "every2",
        "optimizer": {"name": "muon", "lr": 5.0e-3, "weight_decay": 0.05, "warmup_steps": 0.1},
    }
    data = {
        **{name: value for name, value in own.items() if value is not None},
        "tokenizer": {"vocab_size": 1000 if num_rows < 5000 else 2000},
        "attributes": [],
        "batch_size": 128,
        "random_resized_crop": 0.7,
    }
    trainer = {"max_epochs": min(max(math.ceil(_STEPS / steps), 10), 60), "gradient_clip_val": 1.0}
    return GivenConfig.of(notes, trainer, model=("ImageTextRetriever", model), data=("ImageTextData", data))
