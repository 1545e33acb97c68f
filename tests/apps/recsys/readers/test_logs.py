"""Logs of Criteo, Ali-CCP, AliExpress and KuaiRand, on files of a few rows in their layouts."""

import gzip
from pathlib import Path

import pyarrow as pa
import pytest
from made_sources import (
    check_config,
    criteo_line,
    features,
    write,
    write_ali_ccp,
    write_aliexpress,
    write_criteo,
    write_kuairand,
)
from refusals import refused

from apps.recsys.readers.ali_ccp import read_ali_ccp
from apps.recsys.readers.aliexpress import read_aliexpress
from apps.recsys.readers.criteo import read_criteo
from apps.recsys.readers.delimited import read_delimited
from apps.recsys.readers.kuairand import read_kuairand
from apps.recsys.tables.data import TableData


def test_the_week_of_kaggle_and_files_of_another_layout(tmp_path):
    raw = read_criteo(write_criteo(tmp_path, rows=3))
    check_config(raw)
    assert (len(raw.config.categorical), len(raw.config.continuous), raw.config.min_count) == (26, 13, 10)
    assert (raw.val, raw.test, raw.config.split.kind) == (None, None, "random")
    # nine tenths of which a ninth validates: 8 : 1 : 1
    assert (1 - raw.config.split.test) * raw.config.split.val == pytest.approx(0.1)
    assert raw.train.column_names == ["click", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
    assert pa.types.is_dictionary(raw.train.schema.field("C1").type)
    first, second, _ = raw.train.to_pylist()
    assert (first["click"], first["I1"], first["I2"], first["C1"], first["C26"]) == (0, 0, -1, "00000000", "ffffffff")
    assert (second["click"], second["I1"], second["I13"], second["C1"], second["C26"]) == (1, 1, None, "00000001", "")
    write_criteo(tmp_path)
    path = tmp_path / "train.txt"
    line = criteo_line(1, {1: "5"}, {1: "ab"})
    for bad, message in (
        (line.rpartition("\t")[0], r"train\.txt is corrupt: .*Expected 40 columns, got 39"),
        (criteo_line(1, {3: "many"}, {}), r"train\.txt is corrupt: In CSV column #3: .*invalid value 'many'"),
    ):
        write(path, line, bad)
        refused(message, lambda: read_criteo(tmp_path))
    write_criteo(tmp_path, "day_1")
    refused(r"holds both train\.txt and day_1: name the folder of one release", lambda: read_criteo(tmp_path))
    path.unlink()
    write_criteo(tmp_path, "day_x")
    refused(r"day_x is no day of Criteo's logs: their names are day_0 or day_0\.gz", lambda: read_criteo(tmp_path))
    refused(r"train\.txt is missing", lambda: read_criteo(tmp_path / "nowhere"))


def test_the_last_day_tests(tmp_path: Path) -> None:
    for day, rows in ((0, 2), (2, 3), (10, 4)):
        write_criteo(tmp_path, f"day_{day}", rows)
    packed = tmp_path / "day_2.gz"
    packed.write_bytes(gzip.compress((tmp_path / "day_2").read_bytes()))
    refused(r"holds both day_2 and day_2\.gz: keep one of them", lambda: read_criteo(tmp_path))
    (tmp_path / "day_2").unlink()
    raw = read_criteo(tmp_path)
    check_config(raw)
    assert raw.test is not None
    assert (raw.train.num_rows, raw.test.num_rows, raw.config.split.kind) == (5, 4, "given")
    for day in (0, 10):
        (tmp_path / f"day_{day}").unlink()
    alone = read_criteo(tmp_path)
    assert (alone.train.num_rows, alone.test, alone.config.split.kind) == (3, None, "random")


def test_rare_values_share_row_0(tmp_path: Path) -> None:
    write_criteo(tmp_path, rows=100)
    with open(tmp_path / "train.txt", "a") as file:
        file.writelines(criteo_line(i % 2, {1: "7"}, {1: "rare"}) + "\n" for i in range(9))
    data = TableData("criteo", str(tmp_path), str(tmp_path / "cache"))
    assert set(data.vocabulary("C1")) == {None, "00000000", "00000001"}
    assert data.features.categorical[1].num_rows == 1  # C2 has no value
    assert {split: len(data.rows(split)) for split in ("train", "val", "test")} == {"train": 87, "val": 11, "test": 11}


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
    assert (raw.config.domain, raw.config.tasks["conversion"].column) == ("301", "purchase")
    (tmp_path / "ali_ccp_val.csv").unlink()
    assert read_ali_ccp(tmp_path).val is None


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
    assert (table["click"].to_pylist(), table["purchase"].to_pylist()) == ([0.0, 1.0, 1.0], [0.0, 1.0, 0.0])
    # each row has the features of its user's line: bb, aa, aa
    assert (table["101"].to_pylist(), table["121"].to_pylist()) == (["8", "7", "7"], [None, "3", "3"])
    assert table["109_14"].to_pylist() == [[], ["40", "41"], ["40", "41"]]
    # and its own
    assert (table["205"].to_pylist(), table["301"].to_pylist()) == (["900", "901", "902"], ["2", None, "1"])
    assert (table["210"].to_pylist(), table["508"].to_pylist()) == ([[], ["60", "61"], []], ["5", None, None])
    assert (table["D508"].to_pylist(), table["D853"].to_pylist()) == ([0.25, None, None], [None, None, None])


def test_ali_ccp_truncated(tmp_path: Path) -> None:
    path = write_ali_ccp(tmp_path) / "sample_skeleton_train.csv"
    whole = path.read_text()
    path.write_text(whole[: whole.rindex("\x01")] + "\n")
    refused(r"sample_skeleton_train\.csv is corrupt: line 3 has 1 features, not 2", lambda: read_ali_ccp(tmp_path))
    path.write_text(whole.replace("\x03" + "0.25", ""))
    refused(r"sample_skeleton_train\.csv is corrupt: line 1 holds a feature that is no", lambda: read_ali_ccp(tmp_path))
    path.write_text(whole)
    write(tmp_path / "common_features_train.csv", "bb," + features(("101", "8", "1.0")))
    refused(r"common_features_train\.csv is truncated: it has no line 'aa'", lambda: read_ali_ccp(tmp_path))


def test_aliexpress_of_one_country_whole_and_truncated(tmp_path):
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
    write_aliexpress(tmp_path)
    path = tmp_path / "train.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    refused(r"train\.csv is corrupt: .*Expected 82 columns, got", lambda: read_aliexpress(tmp_path))
    path.write_bytes(whole.replace(b"numerical_63", b"numerical_64", 1))
    refused(r"train\.csv has no column 'numerical_63'; its header is 'search_id,", lambda: read_aliexpress(tmp_path))
    path.write_bytes(whole.split(b"\n")[0] + b"\n")
    refused(r"train\.csv is empty below its header", lambda: read_aliexpress(tmp_path))
    path.unlink()
    refused(r"train\.csv is missing", lambda: read_aliexpress(tmp_path))


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


@pytest.mark.parametrize(("folder", "size"), [(".", "1k"), ("data", "pure"), ("KuaiRand-Pure/data", "pure")])
def test_kuairand(tmp_path: Path, folder: str, size: str) -> None:
    write_kuairand(tmp_path / folder, size)
    raw = read_kuairand(tmp_path)
    check_config(raw)
    assert raw.test is None
    table = raw.train
    assert table["video_id"].to_pylist() == [10, 11, 99]  # both logs
    assert table["hour"].to_pylist() == [16, 9, 0]  # 1630, 900, 5
    assert (table["tab"].to_pylist(), table["is_click"].to_pylist()) == ([1, 14, 0], [1.0, 0.0, 1.0])
    assert table["long_view"].to_pylist() == [1.0, 0.0, 0.0]
    # joined by id, whatever the order of the files; video 99 is in no file
    assert table["user_active_degree"].to_pylist() == ["middle_active", "full_active", "middle_active"]
    assert table["register_days"].to_pylist() == [9.0, 107.0, 9.0]
    assert table["author_id"].to_pylist() == ["123", "456", None]
    assert table["tag"].to_pylist() == ["39,12", None, None]
    assert table["onehot_feat4"].to_pylist() == [None, None, None]
    config = raw.config
    assert (config.domain, config.user, config.time, config.split.kind) == ("tab", "user_id", "time_ms", "time")
    assert (list(config.tasks), config.separator) == (["click", "long_view", "like"], ",")
    # what is known only after the video was shown is no input
    later = {"play_time_ms", "profile_stay_time", "comment_stay_time", "is_follow", "is_hate", "time_ms"}
    assert not later & set(config.features)


def test_kuairand_of_two_releases_or_none_or_truncated(tmp_path: Path) -> None:
    refused(r"holds no log_standard_4_08_to_4_21_1k\.csv and no .*_pure\.csv", lambda: read_kuairand(tmp_path))
    path = write_kuairand(tmp_path) / "log_standard_4_22_to_5_08_pure.csv"
    path.write_bytes(path.read_bytes()[:-20])
    refused(r"log_standard_4_22_to_5_08_pure\.csv is corrupt: .*Expected 19 columns", lambda: read_kuairand(tmp_path))
    write_kuairand(tmp_path, "1k")
    refused("holds both 1k and pure", lambda: read_kuairand(tmp_path))


TYPES = {"a": pa.int64(), "b": pa.int64()}


@pytest.mark.parametrize("separator", [",", "::"])
def test_gzipped_text_is_read_within_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str) -> None:
    monkeypatch.setattr("apps.base.inflate.Inflated.__init__.__defaults__", (1 << 20, 50))
    path, line = tmp_path / "t.csv.gz", f"1{separator}2\n".encode()
    path.write_bytes(gzip.compress(line * 1000))
    table = read_delimited(path, TYPES, columns=("a", "b"), separator=separator)
    assert (table.num_rows, table["b"][999].as_py()) == (1000, 2)
    for many in (line * 1_000_000, bytes(4 << 20)):  # 4 or 5 MB of lines or one endless one; 1 MiB is allowed
        path.write_bytes(gzip.compress(many))
        with pytest.raises(ValueError, match=r"t\.csv\.gz is compressed over \d+ times .* no data shrinks so") as error:
            read_delimited(path, TYPES, columns=("a", "b"), separator=separator)
        assert "\n" not in str(error.value)
