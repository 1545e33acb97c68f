"""Ali-CCP, on files of a few rows in its layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_sources import check_config, features, write, write_ali_ccp

from apps.recsys.readers.ali_ccp import read_ali_ccp


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
