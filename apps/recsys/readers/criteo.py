"""Criteo's display advertising logs: Kaggle's week (2014) and the 24 days of the click logs, in their own layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from apps.recsys.readers.delimited import read_delimited
from apps.recsys.readers.raw import RawTables
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig

_INTEGERS = tuple(f"I{i}" for i in range(1, 14))
_CATEGORIES = tuple(f"C{i}" for i in range(1, 27))

CONFIG = TableConfig(
    categorical=_CATEGORIES,
    continuous=_INTEGERS,
    tasks={"click": TaskConfig("click")},
    min_count=10,
    split=SplitConfig("random", val=1 / 9, test=0.1, seed=0),
)


def read_criteo(root: Path) -> RawTables:
    """Read ads shown to users, with the task click.

    There are 13 columns of integers, mostly counts, and 26 of categories, which Criteo has hashed to 32 bits. A line
    is ``label, I1 ... I13, C1 ... C26``, cut by tabs, without a header; an empty field is missing. Values that training
    has fewer than 10 times share row 0, as is usual for the Kaggle set (Criteo_x4 of BARS).

    One file is split 8:1:1 at random. Of several days the last one tests, and 10 % of the others validate.

    Args:
        root: folder with Kaggle's ``train.txt``, or with days, ``day_0`` ... ``day_23`` or ``day_0.gz`` ...; the ones
            that are there are read. Kaggle's ``test.txt`` has no labels, and is not read.

    Raises:
        ValueError: a file is missing, truncated or not of that layout, or both are in one folder.
    """
    week, days = root / "train.txt", _days(root)
    if week.is_file() and days:
        raise ValueError(f"{root} holds both train.txt and {days[0].name}: name the folder of one release")
    if not days:
        return RawTables(_read(week), None, None, CONFIG)
    if len(days) == 1:
        return RawTables(_read(days[0]), None, None, CONFIG)
    train = pa.concat_tables([_read(day) for day in days[:-1]])
    return RawTables(train, None, _read(days[-1]), replace(CONFIG, split=SplitConfig("given", val=0.1, seed=0)))


def _days(root: Path) -> list[Path]:
    """Return the files of days in their order.

    Raises:
        ValueError: a day is there twice, or a name has no number of a day.
    """
    by_number: dict[int, Path] = {}
    for path in sorted(root.glob("day_*")):
        number = path.name.removeprefix("day_").removesuffix(".gz")
        if not number.isdecimal():
            raise ValueError(f"{path} is no day of Criteo's logs: their names are day_0 or day_0.gz, and so on")
        if int(number) in by_number:
            raise ValueError(f"{root} holds both {by_number[int(number)].name} and {path.name}: keep one of them")
        by_number[int(number)] = path
    return [by_number[number] for number in sorted(by_number)]


def _read(path: Path) -> pa.Table:
    # Categories as places in a dictionary: of the text of 26 columns each value is held once.
    types = {
        "click": pa.float32(),
        **dict.fromkeys(_INTEGERS, pa.float32()),
        **dict.fromkeys(_CATEGORIES, pa.dictionary(pa.int32(), pa.string())),
    }
    return read_delimited(path, types, columns=list(types), separator="\t")
