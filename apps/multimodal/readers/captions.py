"""COCO captions and Flickr30k in their published layouts, with several captions an image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.base.messages import one_line
from apps.data.splits import Split
from apps.data.text_files import text_lines
from apps.multimodal.pairs.images import ImageFiles
from apps.multimodal.pairs.pairs import PairCollector, RawPairs, ReadOptions

_KARPATHY: dict[str, Split] = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def read_coco(root: Path, options: ReadOptions) -> RawPairs:
    """Read COCO's captions of 2017 or 2014, or the split of Karpathy and Fei-Fei (arXiv 1412.2306).

    With ``dataset_coco.json`` that file says the captions and the splits. Else the training images are those of
    ``annotations/captions_train{year}.json``, and those of ``captions_val{year}.json`` are the test, for the captions
    of COCO's own test are not published.

    Raises:
        ValueError: a file is missing or not of that layout, or a bad row.
    """
    if (root / "dataset_coco.json").is_file():
        return _read_karpathy(root / "dataset_coco.json", lambda image: root / image["filepath"], options)
    year = next(year for year in ("2017", "2014") if (root / f"annotations/captions_train{year}.json").is_file())
    collector = PairCollector(options.on_bad_row, ())
    splits: dict[str, Split] = {"train": "train", "val": "test"}
    for folder, split in splits.items():
        path = root / f"annotations/captions_{folder}{year}.json"
        content = _read_json(path, ("images", "annotations"))
        try:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            for number, annotation in enumerate(content["annotations"], 1):
                name = names[annotation["image_id"]]
                row = f"{path}, annotation {number}"
                collector.add(row, name, [annotation["caption"]], {}, split, root / f"{folder}{year}" / name)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is corrupt: an image or annotation lacks {error}") from error
    return collector.pairs(ImageFiles(tuple(collector.paths)))


def read_flickr30k(root: Path, options: ReadOptions) -> RawPairs:
    """Read Flickr30k's ``results_20130124.token`` or ``results.csv``, or the split of Karpathy and Fei-Fei.

    Raises:
        ValueError: a file is missing or not of that layout, or a bad row.
    """
    folders = [root / name for name in ("flickr30k-images", "flickr30k_images/flickr30k_images", "flickr30k_images")]
    images = next((folder for folder in folders if folder.is_dir()), root)
    karpathy, token = root / "dataset_flickr30k.json", root / "results_20130124.token"
    if karpathy.is_file():
        return _read_karpathy(karpathy, lambda image: images, options)
    collector = PairCollector(options.on_bad_row, ())
    table = token
    if not token.is_file():
        table = next((f / "results.csv" for f in (root, *folders) if (f / "results.csv").is_file()), token)
    separator, parts = ("\t", 2) if table == token else ("|", 3)
    lines = text_lines(table)
    if table != token:
        next(lines)  # the header
    for number, line in enumerate(lines, 1):
        values = line.split(separator, parts - 1)
        name, row = values[0].partition("#")[0].strip(), f"{table}, row {number}"
        if len(values) < parts:
            collector.refuse(f"{row} has {len(values)} of {parts} values between {separator!r}", "no caption")
            continue
        collector.add(row, name, [values[-1]], {}, None, images / name)
    return collector.pairs(ImageFiles(tuple(collector.paths)))


def _read_karpathy(path: Path, folder: Any, options: ReadOptions) -> RawPairs:
    """Read a file of images with their sentences and their split."""
    collector = PairCollector(options.on_bad_row, ())
    for number, image in enumerate(_read_json(path, ("images",))["images"], 1):
        row = f"{path}, image {number}"
        try:
            texts, split = [sentence["raw"] for sentence in image["sentences"]], _KARPATHY[image["split"]]
            name, place = image["filename"], folder(image) / image["filename"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{row} has no known {error}") from error
        collector.add(row, name, texts, {}, split, place)
    return collector.pairs(ImageFiles(tuple(collector.paths)))


def _read_json(path: Path, keys: Sequence[str]) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is corrupt: it is no JSON ({one_line(str(error))})") from error
    if not isinstance(content, dict) or any(not isinstance(content.get(key), list) for key in keys):
        raise ValueError(f"{path} is corrupt: it has no lists {' and '.join(keys)}")
    return content
