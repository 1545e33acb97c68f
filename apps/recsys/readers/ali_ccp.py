"""Ali-CCP, clicks and purchases in Taobao (Ma et al., SIGIR 2018, arXiv 1804.07931), as released or as a wide table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from apps.recsys.readers.delimited import look_up, read_delimited, side_by_side
from apps.recsys.readers.raw import RawTables
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig

# Fields by the release's own numbers. User: 101 id, 121-129 profile. Item: 205 id, 206 category, 207 shop, 210
# intentions, 216 brand. 508, 509, 702, 853: what the user did with the item's category, shop, brand, intention. 301 is
# the position in the app.
_USER = ("101", "121", "122", "124", "125", "126", "127", "128", "129")
_ITEM = ("205", "206", "207", "216", "508", "509", "702", "853", "301")
_USER_LISTS = ("109_14", "110_14", "127_14", "150_14")  # categories, shops, brands, intentions of the last 14 days
_INTENTION = "210"
_WEIGHTS = ("508", "509", "702", "853")  # of these the wide table keeps the value as a column of its own, D508
_CONFIG = TableConfig(
    categorical=(*_USER, *_ITEM),
    multi_valued=(_INTENTION, *_USER_LISTS),
    continuous=tuple(f"D{field}" for field in _WEIGHTS),
    tasks={"click": TaskConfig("click"), "conversion": TaskConfig("purchase")},
    domain="301",
    user="101",
    split=SplitConfig("given", val=0.1, stratify="click", seed=0),
)


def read_ali_ccp(root: Path) -> RawTables:
    """Read items shown to users, with the tasks click and purchase over all items shown (CTCVR).

    The domain is field 301. Without a validation file 10 % of train validate, at random with seed 0, stratified by
    click. There are two layouts:

    - ``ali_ccp_{train,test}.csv`` and, if there is one, ``ali_ccp_val.csv``: the wide table that torch-rechub and
      others make, with a header, 23 columns of ids and 8 of values (``D109_14`` ... ``D853``).
    - ``sample_skeleton_{train,test}.csv`` with ``common_features_{train,test}.csv``, or the same below ``sample_train``
      and ``sample_test``, as released. A line of the first is
      ``sample, click, purchase, common id, number of features, features``, one of the second
      ``common id, number, features``. Features are cut by \\x01, and each is field \\x02 id \\x03 value. Fields of
      several ids become multi-valued columns, without their values. The values of 508, 509, 702 and 853 are the columns
      ``D508`` ...

    Args:
        root: folder with the files.

    Raises:
        ValueError: a file is missing, truncated or not of that layout, or a row's common features are missing.
    """
    if (root / "ali_ccp_train.csv").is_file():
        return _read_wide(root)
    return RawTables(_read_split(root, "train"), None, _read_split(root, "test"), _CONFIG)


def _read_wide(root: Path) -> RawTables:
    ids = (*_USER, *_ITEM, _INTENTION, *_USER_LISTS)
    weights = tuple(f"D{field}" for field in (*_USER_LISTS, *_WEIGHTS))
    types = {
        **dict.fromkeys(("click", "purchase"), pa.float32()),
        **dict.fromkeys(ids, pa.int32()),
        **dict.fromkeys(weights, pa.float32()),
    }
    config = replace(_CONFIG, categorical=ids, multi_valued=(), continuous=weights)
    val = root / "ali_ccp_val.csv"
    return RawTables(
        read_delimited(root / "ali_ccp_train.csv", types),
        read_delimited(val, types) if val.is_file() else None,
        read_delimited(root / "ali_ccp_test.csv", types),
        config,
    )


def _read_split(root: Path, name: str) -> pa.Table:
    folder = root / f"sample_{name}" if (root / f"sample_{name}").is_dir() else root
    common_path, path = folder / f"common_features_{name}.csv", folder / f"sample_skeleton_{name}.csv"
    text = dict.fromkeys(("common", "features"), pa.string())
    common = read_delimited(common_path, {**text, "count": pa.int64()}, columns=("common", "count", "features"))
    rows = read_delimited(
        path,
        {"click": pa.float32(), "purchase": pa.float32(), **text, "count": pa.int64()},
        columns=("sample", "click", "purchase", "common", "count", "features"),
    )
    of_user = _columns(common, common_path, _USER, _USER_LISTS, ())
    of_user = look_up(of_user.append_column("common", common["common"]), "common", rows["common"])
    if of_user["common"].null_count:
        lacking = rows["common"].filter(of_user["common"].is_null())[0].as_py()
        raise ValueError(f"{common_path} is truncated: it has no line {lacking!r}, which {path.name} refers to")
    of_row = _columns(rows, path, _ITEM, (_INTENTION,), _WEIGHTS)
    return side_by_side(rows.select(["click", "purchase"]), of_user.drop_columns("common"), of_row)


def _columns(
    table: pa.Table, path: Path, single: tuple[str, ...], several: tuple[str, ...], weighted: tuple[str, ...]
) -> pa.Table:
    """Return a column for each field of the texts in ``features``.

    A field of ``single`` gives its first id, one of ``several`` the list of its ids, and one of ``weighted`` also the
    value of its first id.
    """
    # The release has more than the 2 GiB that one array of pa.string() holds.
    lists = pc.split_pattern(table["features"].cast(pa.large_string()).combine_chunks(), "\x01")
    starts = lists.offsets.to_numpy()
    row_N = np.repeat(np.arange(len(lists)), np.diff(starts))
    if len(odd := np.flatnonzero(np.diff(starts) != table["count"].to_numpy())):
        num, expected = np.diff(starts)[odd[0]], table["count"][int(odd[0])].as_py()
        raise ValueError(f"{path} is corrupt: line {odd[0] + 1} has {num} features, not {expected}")
    parts = pc.extract_regex(lists.flatten(), "^(?P<field>[^\x02]+)\x02(?P<id>[^\x03]+)\x03(?P<value>.+)$")
    if parts.null_count:
        line = row_N[parts.is_null().to_numpy(zero_copy_only=False)][0] + 1
        raise ValueError(f"{path} is corrupt: line {line} holds a feature that is no field, id and value")
    fields, ids, values = (parts.field(name) for name in ("field", "id", "value"))
    columns: dict[str, pa.Array] = {}
    for field in (*single, *several):
        place_n = np.flatnonzero(pc.equal(fields, field).to_numpy(zero_copy_only=False))
        if field in several:
            bounds = np.searchsorted(row_N[place_n], np.arange(len(lists) + 1)).astype(np.int32)
            columns[field] = pa.ListArray.from_arrays(pa.array(bounds), ids.take(pa.array(place_n)))
            continue
        rows_n, first_n = np.unique(row_N[place_n], return_index=True)
        where = np.full(len(lists), -1)
        where[rows_n] = place_n[first_n]
        index = pa.array(where, mask=where < 0)  # a row without the field is null
        columns[field] = ids.take(index)
        if field in weighted:
            columns[f"D{field}"] = values.take(index).cast(pa.float32())
    return pa.table(columns)
