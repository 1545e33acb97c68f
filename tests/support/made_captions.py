"""Images with captions and labels, made on the spot in the layouts that `ImageTextData` reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from apps.multimodal.data import ImageTextData

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def picture(number: int, side: int = 8) -> Image.Image:
    """Return a picture in the colour of its number, a little darker where the number is larger."""
    paint = np.array(list(COLOURS.values()), np.uint8)[number % 3] - number // 3
    return Image.fromarray(np.broadcast_to(paint.astype(np.uint8), (side, side, 3)).copy())


def colour(number: int) -> str:
    return list(COLOURS)[number % 3]


def write_pictures(folder: Path, count: int, side: int = 8) -> list[str]:
    """Write ``0.png``, ``1.png`` ... and return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number, side).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(count)]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_shop(folder: Path, count: int = 30) -> Path:
    """Write ``titles.csv`` and its pictures; every third picture has one colour, and every title its number."""
    names = write_pictures(folder, count)
    rows = [
        {"image": name, "caption": f"picture {n} in {colour(n)}", "colour": colour(n)} for n, name in enumerate(names)
    ]
    write_csv(folder / "titles.csv", rows)
    return folder


def write_products(folder: Path, titles: Sequence[str], **columns: Sequence[str]) -> Path:
    """Write ``products.csv`` and ``images112.npz`` with one picture a title."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(len(titles)):
        content = io.BytesIO()
        picture(number).save(content, "JPEG")
        files.append(content.getvalue())
    ids = np.arange(100, 100 + len(titles))
    bounds = np.cumsum([0, *map(len, files)], dtype=np.int64)
    np.savez(folder / "images112.npz", jpeg=np.frombuffer(b"".join(files), np.uint8), offset=bounds, id=ids)
    rows = [
        {"id": ids[n], **{name: values[n] for name, values in columns.items()}, "title": title}
        for n, title in enumerate(titles)
    ]
    write_csv(folder / "products.csv", rows)
    return folder


def data_of(root: Path, dataset: str = "image_captions", **options: Any) -> ImageTextData:
    """Return the data of a folder, with a small vocabulary and small images."""
    from apps.data.subwords import SubwordConfig

    small = {"tokenizer": SubwordConfig(vocab_size=300), "image_size": 8, "cache_dir": str(root.parent / "cache")}
    return ImageTextData(dataset, root=str(root), **{"seed": 0, **small, **options})
