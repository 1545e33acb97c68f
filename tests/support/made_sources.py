"""Files of a few rows in the layouts of the standard tables' sources."""

from __future__ import annotations

from pathlib import Path

from apps.recsys.readers.census import COLUMNS as CENSUS_COLUMNS
from apps.recsys.readers.raw import RawTables


def write(path: Path, *lines: str, encoding: str = "utf8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + "\n" for line in lines).encode(encoding))
    return path


def check_config(raw: RawTables) -> None:
    """Check that the tables have every column of the description, and that no label is a feature."""
    for table in (raw.train, raw.val, raw.test):
        if table is not None:
            assert set(raw.config.roles) <= set(table.column_names)
    assert not {t.column for t in raw.config.tasks.values()} & set(raw.config.features)


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


# user, film by title, rating, seconds; the file's order is not that of time
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


ALIEXPRESS = ("search_id", *(f"categorical_{i}" for i in range(1, 17)), *(f"numerical_{i}" for i in range(1, 64)),
              "click", "conversion")  # fmt: skip


def aliexpress_row(search: int, click: int, conversion: int) -> str:
    return ",".join(map(str, (search, *range(16), *(0.5 * i for i in range(63)), click, conversion)))


def write_aliexpress(folder: Path, train: int = 2, test: int = 1) -> None:
    write(folder / "train.csv", ",".join(ALIEXPRESS), *(aliexpress_row(81 + i, 1, i % 2) for i in range(train)))
    write(folder / "test.csv", ",".join(ALIEXPRESS), *(aliexpress_row(7, 0, 0) for i in range(test)))


def criteo_line(label: int, integers: dict[int, str], categories: dict[int, str]) -> str:
    """Return a line of Criteo's logs; fields that are not given are empty."""
    numbers = (integers.get(i, "") for i in range(1, 14))
    return "\t".join([str(label), *numbers, *(categories.get(i, "") for i in range(1, 27))])


def write_criteo(root: Path, name: str = "train.txt", rows: int = 3) -> Path:
    """Write lines with I1 = the row, I2 = -1, C1 of two values and C26 of a value in every other row."""
    lines = (
        criteo_line(i % 2, {1: str(i), 2: "-1"}, {1: f"{i % 2:08x}", 26: "" if i % 2 else "ffffffff"})
        for i in range(rows)
    )
    write(root / name, *lines)
    return root


def features(*triples: tuple[str, str, str]) -> str:
    """Return the number of features and their text, as Ali-CCP writes them."""
    return f"{len(triples)}," + "\x01".join(f"{field}\x02{id}\x03{value}" for field, id, value in triples)


def write_ali_ccp(root: Path) -> Path:
    user = (("101", "7", "1.0"), ("121", "3", "1.0"), ("109_14", "40", "2.1"), ("109_14", "41", "0.7"))
    for name in ("train", "test"):
        write(root / f"common_features_{name}.csv", "aa," + features(*user), "bb," + features(("101", "8", "1.0")))
        write(
            root / f"sample_skeleton_{name}.csv",
            "1,0,0,bb," + features(("205", "900", "1.0"), ("301", "2", "1.0"), ("508", "5", "0.25")),
            "2,1,1,aa," + features(("205", "901", "1.0"), ("210", "60", "1.0"), ("210", "61", "1.0")),
            "3,1,0,aa," + features(("301", "1", "1.0"), ("205", "902", "1.0")),
        )
    return root


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
