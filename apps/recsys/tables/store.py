"""Encoded tables in the cache: found by what they were made from, else made, once, whatever asks at the same time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.data.array_files import ArrayFiles, ArrayWriter, open_or_write, open_whole
from apps.recsys.encoding.learnt import Encoding

if TYPE_CHECKING:
    import pyarrow as pa

    from apps.recsys.readers import RawTables
    from apps.recsys.schema import TableConfig

FORMAT = 1
"""Of the column files; a new number makes every table be encoded anew."""

# What reads and encodes a table: a change there makes the files of the old code stale.
_CODE = (
    "build.py", "../columns.py", "encode.py", "encoding.py", "features.py", "files.py", "report.py", "splits.py",
    "synthetic.py", "readers/*.py",
)  # fmt: skip


def identity(files: Iterable[Path]) -> list[list[Any]]:
    """Path, size and time of the last change of each file, by which an exchanged one is noticed."""
    stats = [(path.resolve(), path.stat()) for path in files]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def open_table(
    name: str,
    source: Any,
    options: Any,
    read: Callable[[], tuple[RawTables, TableConfig]],
    cache: Path,
    given: Encoding | None = None,
) -> ArrayFiles:
    """The encoded table in ``cache/tables``, made if it is not there or is damaged.

    Args:
        name: of the dataset, for people who look into the folder.
        source: plain values that change when the files do.
        options: plain values: what the user says about the table.
        read: the table, and the description that it is encoded by.
        cache: the cache's folder.
        given: what to encode by; None: by what the training rows teach.

    Raises:
        ValueError: the table does not fit its description, or the columns of ``given``.
        DataError: the cache cannot be written, or the disk is full.
    """
    made_of = [FORMAT, name, source, options, _code()]
    folder = cache / "tables" / f"{name}-{_key(made_of)}"
    if given is not None:
        own = open_whole(folder)
        if own is not None and Encoding.of(own).digest == given.digest:
            return own
        folder = cache / "tables" / f"{name}-{_key([*made_of, given.digest])}"

    def write(writer: ArrayWriter) -> None:
        import pyarrow as pa

        from apps.recsys.tables.build import build

        raw, config = read()
        build(raw, config, writer, given)
        del raw
        pa.default_memory_pool().release_unused()  # arrow would keep as much as the table took while training runs

    return open_or_write(folder, cache, write)


def open_rows(source: Any, read: Callable[[], pa.Table], cache: Path, given: Encoding) -> ArrayFiles:
    """Rows to predict, encoded by ``given``, in ``cache/tables``; the arguments are those of `open_table`.

    Raises:
        ValueError: no rows, a column that is missing or of a wrong type, or a scenario that ``given`` lacks.
        DataError: the cache cannot be written, or the disk is full.
    """
    folder = cache / "tables" / f"predict-{_key([FORMAT, source, _code(), given.digest])}"

    def write(writer: ArrayWriter) -> None:
        from apps.recsys.tables.build import build_rows

        table = read()
        if not len(table):
            raise ValueError("the rows to predict: there are none")
        build_rows(table, given, writer)

    return open_or_write(folder, cache, write)


def _key(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _code() -> str:
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for pattern in _CODE for p in here.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()
