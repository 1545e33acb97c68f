"""KuaiRand, on files of a few rows in its layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_sources import check_config, write_kuairand

from apps.recsys.readers.kuairand import read_kuairand


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
