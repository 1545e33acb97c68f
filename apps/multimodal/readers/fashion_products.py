"""``fashion_products``: product photos with titles and labels, in one table and one array of JPEG files."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from apps.multimodal.pairs.images import PackedImages
from apps.multimodal.pairs.pairs import PairCollector, RawPairs, ReadOptions
from apps.multimodal.readers.rows import separated

TABLE, IMAGES = "products.csv", "images112.npz"
ATTRIBUTES = ("gender", "masterCategory", "subCategory", "articleType", "baseColour", "season", "usage")
"""The columns of labels."""


def read_fashion_products(root: Path, options: ReadOptions) -> RawPairs:
    """Read ``products.csv`` (``id``, the labels, ``title``) and ``images112.npz`` (``jpeg``, ``offset``, ``id``).

    Raises:
        ValueError: a file is missing or corrupt, a column is missing, a bad row, or one product has two titles.
    """
    path = root / IMAGES
    try:
        with np.load(path, allow_pickle=False) as arrays:
            jpeg, offset, ids = (arrays[name] for name in ("jpeg", "offset", "id"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (KeyError, ValueError, OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is corrupt: it does not hold the arrays jpeg, offset and id ({error})") from error
    is_whole = jpeg.dtype == np.uint8 and len(offset) == len(ids) + 1 and offset[0] == 0 and offset[-1] == len(jpeg)
    if not is_whole or (np.diff(offset) < 0).any():
        raise ValueError(f"{path} is corrupt: offset must bound the {len(ids):,} files in the {len(jpeg):,} bytes")
    place = {str(name): number for number, name in enumerate(ids.tolist())}
    if len(place) < len(ids):
        raise ValueError(f"{path} is corrupt: {len(ids):,} images have {len(place):,} different ids")
    roles = {"id": "id", "title": "title"}
    if not options.optional:
        roles |= dict.fromkeys(options.attributes, "attributes")
    collector = PairCollector(options.on_bad_row, options.attributes, one_caption=True)
    for row, values in separated(root / TABLE, roles, ","):
        product = values["id"]
        if product not in place:
            collector.refuse(f"{row}: {path} has no image of {product!r}", "a missing image")
            continue
        collector.add(row, product, [values["title"]], {name: values.get(name, "") for name in options.attributes})
    at = np.array([place[key] for key in collector.keys], np.int64)
    return collector.pairs(PackedImages(path, jpeg, offset[at], offset[at + 1], tuple(collector.keys)))
