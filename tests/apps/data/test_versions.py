"""What is encoded for the cache is as its version says: a change without a new version would read old entries."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apps.data.array_files import ArrayFiles
from apps.data.subwords import SubwordConfig
from apps.nlp.language.data import TextData
from apps.nlp.text import encoded_pairs
from apps.recsys.sequence import data as sequence_data
from apps.recsys.sequence.data import HistoryData
from apps.recsys.tables import data as table_data
from apps.recsys.tables.data import TableData

STORES = {"tables": table_data._STORE, "histories": sequence_data._STORE, "text": encoded_pairs.STORE}
ENCODED = {"tables": (1, "9205538aae64"), "histories": (1, "973856241f6f"), "text": (1, "0e6609af760a")}
"""Version and digest by store. If a digest differs, raise the version in ``EncodedStore(...)``, and put both here."""


def table(folder, num_rows: int = 40):
    i = range(num_rows)
    columns: dict[str, Any] = {
        "user": [f"u{k % 7}" for k in i],
        "item": [k * k % 11 for k in i],
        "time": [f"2024-01-{1 + k % 28:02}" for k in i],
        "price": [None if k % 9 == 0 else k / 8 for k in i],
        "tags": ["a|b" if k % 3 else "c" for k in i],
        "seen": [[k % 5, k % 3] for k in i],
        "vector": [[k / 4, -1.5] for k in i],
        "bought": [k % 2 for k in i],
        "spent": [k % 4 * 2.5 for k in i],
    }
    pq.write_table(pa.table(columns), folder / "t.parquet")
    return str(folder / "t.parquet")


def encode_table(folder) -> None:
    columns = {
        "categorical": ["user", "item"],
        "multi_valued": ["tags"],
        "continuous": ["price"],
        "vectors": ["vector"],
    }
    columns |= {"timestamps": ["time"], "sequences": {"seen": {"items": "item", "length": 2}}, "user": "user"}
    columns["tasks"] = {"bought": {"column": "bought"}, "spent": {"column": "spent", "kind": "revenue"}}
    TableData("table", train_file=table(folder), table=columns, cache_dir=str(folder / "cache")).sizes()


def encode_histories(folder) -> None:
    HistoryData("table", file=table(folder), max_length=4, cache_dir=str(folder / "cache")).setup("fit")


def encode_text(folder) -> None:
    (folder / "a.txt").write_text("the dog runs\nthe cat sleeps\n\na bird sings and sings\n" * 3)
    files = dict.fromkeys(("train_files", "val_files", "test_files"), "a.txt")
    subwords = SubwordConfig(vocab_size=290)
    TextData(**files, tokenizer=subwords, root=str(folder), cache_dir=str(folder / "cache"), block_size=8).setup("fit")


def described(value: Any, has_numbers: bool) -> Any:
    """Return plain values with floats of four digits, as their last ones may differ between processors.

    Without numbers: only their types, for what a library of subwords decides.
    """
    if isinstance(value, dict):
        return {key: described(own, has_numbers) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [described(own, has_numbers) for own in value]
    if not has_numbers:
        return type(value).__name__
    return f"{value:.4g}" if isinstance(value, float) else value


@pytest.mark.parametrize(
    ("kind", "encode"), [("tables", encode_table), ("histories", encode_histories), ("text", encode_text)]
)
def test_what_is_encoded_changes_with_the_version(kind, encode, tmp_path):
    encode(tmp_path)
    (folder,) = (own for own in (tmp_path / "cache" / kind).iterdir() if own.is_dir())
    files, has_numbers = ArrayFiles(folder), kind != "text"
    found: list[Any] = [described(files.info, has_numbers)]
    for path in sorted(folder.glob("*.npy")):
        array = files[path.stem]
        found.append([path.stem, str(array.dtype), array.ndim])
        if has_numbers:
            found.append(described(array.tolist(), has_numbers))
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]
    assert (STORES[kind].version, digest) == ENCODED[kind], "raise the version, and put both into ENCODED"
