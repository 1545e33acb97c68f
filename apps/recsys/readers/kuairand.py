"""KuaiRand, logs of short videos with fifteen domains (Gao et al., CIKM 2022, arXiv 2208.08696)."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from apps.recsys.readers.delimited import look_up, read_delimited, side_by_side
from apps.recsys.readers.raw import RawTables
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig

_FOLDERS = (".", "data", "KuaiRand-1K/data", "KuaiRand-Pure/data")
_LOGS = ("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08")
_RANGES = ("follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range")
_USER_CATEGORICAL = (
    "user_active_degree",
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    *_RANGES,
    *(f"onehot_feat{i}" for i in range(18)),
)
_USER_CONTINUOUS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
_VIDEO_CATEGORICAL = ("author_id", "video_type", "upload_type", "music_id", "music_type")
_TASKS = {"click": "is_click", "long_view": "long_view", "like": "is_like"}

CONFIG = TableConfig(
    categorical=("user_id", "video_id", "tab", "hour", *_USER_CATEGORICAL, *_VIDEO_CATEGORICAL),
    multi_valued=("tag",),
    continuous=("duration_ms", *_USER_CONTINUOUS),
    tasks={name: TaskConfig(column) for name, column in _TASKS.items()},
    domain="tab",
    user="user_id",
    time="time_ms",
    separator=",",
    split=SplitConfig("time", val=0.1, test=0.1),
)


def read_kuairand(root: Path) -> RawTables:
    """Read videos shown to users, with the tasks click, long view and like.

    The domain is ``tab``, the page of the app, 0 to 14. The two standard logs are split by time: the last 10 % test,
    the 10 % before validate. The log of randomly shown videos is left out, since it has another distribution, and so
    are the videos' statistics, which are sums over the whole month and hold the labels. Whatever follows the click in a
    row of the log (time played, comments, ...) is not input.

    Args:
        root: folder with ``log_standard_*``, ``user_features_*`` and ``video_features_basic_*`` of the 1K or the Pure
            release, or the folder into which one of them was unpacked.

    Raises:
        ValueError: a file is missing, truncated or not of that layout, or both releases are in one folder.
    """
    home, size = _find(root)
    log_types = {
        "user_id": pa.int64(),
        "video_id": pa.int64(),
        "hourmin": pa.int32(),
        "time_ms": pa.int64(),
        "duration_ms": pa.float32(),
        "tab": pa.int32(),
        **dict.fromkeys(_TASKS.values(), pa.float32()),
    }
    log = pa.concat_tables([read_delimited(home / f"{name}_{size}.csv", log_types) for name in _LOGS])
    hour = pc.divide(log["hourmin"], 100)  # 1630 is half past four
    log = log.drop_columns("hourmin").append_column("hour", hour)

    user_types = {
        "user_id": pa.int64(),
        **dict.fromkeys(_USER_CATEGORICAL, pa.string()),
        **dict.fromkeys(_USER_CONTINUOUS, pa.float32()),
    }
    video_types = {"video_id": pa.int64(), **dict.fromkeys((*_VIDEO_CATEGORICAL, "tag"), pa.string())}
    users = read_delimited(home / f"user_features_{size}.csv", user_types, quoted=True)
    videos = read_delimited(home / f"video_features_basic_{size}.csv", video_types, quoted=True)
    of_user = look_up(users, "user_id", log["user_id"]).drop_columns("user_id")
    of_video = look_up(videos, "video_id", log["video_id"]).drop_columns("video_id")
    return RawTables(side_by_side(log, of_user, of_video), None, None, CONFIG)


def _find(root: Path) -> tuple[Path, str]:
    """Return the folder of the files and the end of their names, 1k or pure."""
    homes = [(root / f, s) for f in _FOLDERS for s in ("1k", "pure") if (root / f / f"{_LOGS[0]}_{s}.csv").is_file()]
    if not homes:
        raise ValueError(f"{root} holds no {_LOGS[0]}_1k.csv and no {_LOGS[0]}_pure.csv")
    if len(homes) > 1:
        raise ValueError(f"{root} holds both {homes[0][1]} and {homes[1][1]}: name the folder of one release")
    return homes[0]
