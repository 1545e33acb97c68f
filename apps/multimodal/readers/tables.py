"""``image_captions``: any folder of images with a table that has a row for each image or for each caption."""

from __future__ import annotations

from pathlib import Path

from apps.base.messages import excerpt
from apps.data.splits import Split
from apps.multimodal.pairs.images import ImageFiles
from apps.multimodal.pairs.pairs import PairCollector, RawPairs, ReadOptions
from apps.multimodal.readers.rows import as_text, as_texts, find_table, rows_of

SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
"""The split that each value of a column of splits means."""


def read_table(root: Path, options: ReadOptions) -> RawPairs:
    """Read a table and list its images.

    Args:
        root: folder that the table and the images lie below.
        options: name the columns.

    Raises:
        ValueError: a column is missing, a value is none of a split, a bad row, or two rows contradict each other.
    """
    roles = {options.image_column: "image_column", options.caption_column: "caption_column"}
    for column, role in ((options.id_column, "id_column"), (options.split_column, "split_column")):
        if column is not None:
            roles.setdefault(column, role)
    for column in () if options.optional else options.attributes:
        roles.setdefault(column, "attributes")
    collector = PairCollector(options.on_bad_row, options.attributes)
    for row, values in rows_of(find_table(root, options.table), roles, options.attributes):
        image = as_text(values[options.image_column], row, options.image_column)
        if not image:
            collector.refuse(f"{row}: column {options.image_column!r} is empty", "no image")
            continue
        collector.add(
            row,
            image if options.id_column is None else as_text(values[options.id_column], row, options.id_column),
            as_texts(values[options.caption_column], row, options.caption_column),
            {name: as_text(values.get(name), row, name) for name in options.attributes},
            _split(values, row, options.split_column),
            root / options.image_pattern.replace("{}", image),
        )
    return collector.pairs(ImageFiles(tuple(collector.paths)))


def _split(values: dict[str, object], row: str, column: str | None) -> Split | None:
    if column is None:
        return None
    name = as_text(values[column], row, column).strip().lower()
    if name not in SPLIT_NAMES:
        raise ValueError(f"{row}: {column!r} is {excerpt(values[column])}, which is none of {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[name]
