"""``moesaic init`` as a user calls it: the file it writes, which ``fit`` takes, and one line for each wrong input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml
from commands import fails
from PIL import Image

from apps.cli import main
from apps.cli.train import build
from apps.init.commented import commented

N = 200


def table():
    rng = np.random.default_rng(0)
    bought = rng.permutation([0, 1] * (N // 2))
    columns = {"order": range(N), "day": [f"2024-01-{1 + i % 28:02}" for i in range(N)]}
    columns |= {"town": rng.choice(["Oslo", "Rome"], N).tolist(), "price": [37 * i % N + 0.99 for i in range(N)]}
    return pa.table(columns | {"copy": (bought * 3 + 0.5).tolist(), "bought": bought.tolist()})


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def shop() -> str:
    pa.csv.write_csv(table(), "shop.csv")
    return "shop.csv"


def write_images(folder: str, count: int = 8) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (Path(folder) / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(Path(folder) / name / f"{i}.png")


def write_texts(*names: str) -> None:
    for name, word in zip(names, ("red", "rot"), strict=True):
        Path(name).write_text("".join(f"{word} {i} and {word} {i % 7}\n" for i in range(240)))


def is_trained_a_step(config: str) -> bool:
    words = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--run_dir", "run"]
    return main(["fit", "--config", config, *words]) == 0


def test_a_table_becomes_a_configuration_that_trains(shop, capsys):
    assert main(["init", shop]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "target: bought, by its name and its two values; --target names another one",
        "200 rows; bought: binary, 1 in 50.0%",
        "check: order is left out: id, it counts the rows",
        "check: copy is left out: a leak? It alone predicts bought with AUC 1.0000 (put it back if it is known before "
        "the label)",
        "written: shop.yaml; next:",
        "  moesaic fit --config shop.yaml",
        "  moesaic test --ckpt_path runs/shop",
        "  moesaic verdict shop.csv --target bought --minutes 30",
    ]
    text = Path("shop.yaml").read_text()
    assert text.startswith("# A first configuration, written by moesaic init.\n#\n#   moesaic fit --config shop.yaml\n")
    section = text[text.index("    table:\n") : text.index("    batch_size")]
    assert section.splitlines() == [
        "    table:",
        "      categorical:",
        "        - town                           # category, 2 texts, such as 'Oslo'",
        "      continuous:",
        "        - price                          # money, 0.99 to 199.99, two decimals",
        "      timestamps:",
        "        - day                            # date, 2024-01-01 to 2024-01-28",
        "      left_out:",
        "        - day_hour                       # the dates have no time",
        "      numbers: auto                      # bins or linear: by a short training, on validation rows",
        "      # Left out; a column that is wanted goes into a list above:",
        "      #   order: id, it counts the rows",
        "      #   copy: a leak? It alone predicts bought with AUC 1.0000 "
        "(put it back if it is known before the label)",
        "      tasks:",
        "        bought: {column: bought}         # binary, 1 in 50.0%",
        "      # To test on the last rows: moesaic init shop.csv --time day",
        "      split:",
        "        kind: random                     # also: time, user",
        "        val: 0.15",
        "        test: 0.25",
        "        stratify: bought                 # each split has its classes in the same shares",
    ]
    assert is_trained_a_step("shop.yaml")


def test_a_split_by_time_of_a_folder_of_parquet_files(capsys):
    Path("parts").mkdir()
    for part in range(2):
        pq.write_table(table(), f"parts/{part}.parquet")
    words = ["--target", "bought", "--target", "price", "--time", "day", "--user", "town", "--output", "mine.yml"]
    assert main(["init", "parts", *words]) == 0
    assert "check: day of 0.parquet and 1.parquet overlaps, 2024-01-01 to 2024-01-28" in capsys.readouterr().out
    text = Path("mine.yml").read_text()
    assert "\n        # gap: 90d # out between splits: for labels that look 90 days ahead\n        val: 0.15\n" in text
    made = yaml.safe_load(text)["data"]["init_args"]
    assert made["train_file"] == "parts/*.parquet"
    assert (made["table"]["time"], made["table"]["split"]["kind"]) == ("day", "time")
    assert list(made["table"]["tasks"]) == ["bought", "price"]
    build("fit", ["--config", "mine.yml", "--run_dir", "run"])  # its data are read, and its model is built


def test_images_of_two_classes(capsys):
    write_images("photos")
    assert main(["init", "photos/"]) == 0
    assert "written: photos.yaml, photos_split (links); next:" in capsys.readouterr().out
    assert len(list(Path("photos_split/images/test").glob("*/*"))) == 4  # a quarter of 8 images of each class
    data = build("fit", ["--config", "photos.yaml", "--run_dir", "run"]).datamodule
    assert [len(data.examples(split)) for split in ("train", "val", "test")] == [11, 1, 4]
    assert "# moesaic verdict photos --minutes 30\n" in Path("photos.yaml").read_text().replace("#   ", "# ")
    assert is_trained_a_step("photos.yaml")
    write_images("split/train")
    write_images("split/test", 2)
    assert main(["init", "split"]) == 0
    assert yaml.safe_load(Path("split.yaml").read_text())["data"]["init_args"]["root"] == "split"
    assert not Path("split_split").exists()


def test_two_files_of_text_are_read_where_they_are(capsys):
    write_texts("train.en", "train.de")
    assert main(["init", "train.en", "train.de"]) == 0
    assert "240 pairs of lines, en to de; a tenth is held out for the test" in capsys.readouterr().out
    assert is_trained_a_step("train.yaml")
    Path("texts").mkdir()
    write_texts("texts/english.txt", "texts/german.txt")
    assert main(["init", "texts/english.txt", "texts/german.txt", "--output", "own.yaml"]) == 0
    made = yaml.safe_load(Path("own.yaml").read_text())["data"]["init_args"]
    assert (made["train_files"], made["pairs"]) == ("texts/{lang}.txt", ["english-german"])


def test_nothing_is_overwritten_and_nothing_half_written(shop, capsys):
    Path("shop.yaml").write_text("mine")
    Path("other_split").mkdir()
    for code, words, line in (
        (2, (), "shop.yaml exists: --output FILE.yaml writes another file"),
        (2, ("--output", "other.yaml"), "other_split exists: --output FILE.yaml writes another file"),
        (1, ("--target", "x", "--output", "no/x.yaml"), "--target 'x' is not a column of shop.csv"),
    ):
        assert fails(capsys, code, "init", shop, *words) == line
    assert Path("shop.yaml").read_text() == "mine"
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["other_split", "shop.csv", "shop.yaml"]
    write_images("photos")
    line = "--target names a column, and photos is no table"
    assert fails(capsys, 1, "init", "photos", "--target", "x") == line
    assert not Path("photos_split").exists()
    write_texts("one_v2.en", "two.de")
    line = "one_v2.en and two.de must differ in one word, the language, such as train.en and train.de"
    assert fails(capsys, 1, "init", "one_v2.en", "two.de") == line


@pytest.mark.parametrize(
    ("name", "content", "words", "code", "line"),
    [
        ("a.csv", b"", (), 1, "'a.csv' cannot be read: Empty CSV file"),
        ("a.csv", b"x,y\n", (), 1, "a.csv has names of columns and no row"),
        ("a.csv", b"x;y\n1;2\n", (), 1, "a.csv has no column that is plainly the label: give --target, one of x;y:"),
        ("a.csv", b"x,y\n1,2\n1\n", (), 1, "'a.csv' cannot be read: CSV parse error: Expected 2 columns, got 1: 1"),
        ("a.csv", b"\x00\xff\xfe\x81,\n\xfe\n\xff,,\x00", (), 1, "'a.csv' cannot be read: "),
        ("a.csv", b"caf\xe9,y\n1,2\n", (), 1, "'a.csv' cannot be read: the names of its columns are no UTF-8 text"),
        ("a.parquet", b"\x00\xff\xfe\x81", (), 1, "'a.parquet' cannot be read: "),
        ("a.txt", b"hello", (), 1, "a.txt is no table (.csv, .parquet): give a folder of images, one with a table of"),
        ("a.csv", b"x,y\n1,2\n", ("--target", "z"), 1, "--target 'z' is not a column of a.csv"),
        ("a.csv", b"x,label\n1,2\n3,2\n", (), 1, "--target 'label' is 2 in every row that has one: there is nothing"),
        ("a.csv", b"x,y\n1,2\n", ("--output", "a.txt"), 2, "output=a.txt must end in .yaml"),
        ("a.csv", b"x,y\n1,2\n", ("b.csv",), 2, "no file or folder b.csv"),
    ],
)
def test_bad_input_is_one_line(capsys, name, content, words, code, line):
    Path(name).write_bytes(content)
    found = fails(capsys, code, "init", name, *words)
    assert found.startswith(line)
    assert found.isprintable()
    assert [path.name for path in Path.cwd().iterdir()] == [name]


def test_yaml_with_comments():
    value = {"a": {"b": [1, 2], "c": ["x", "no"], "d": {"e": 1}, "f": {"g": None}}, "h: i": "a # b"}
    text = commented(value, {("a", "c", "no"): "odd\nword", ("a", "d", "e"): "one"}, {("a", "f"): ("Two", "lines")})
    assert text.splitlines() == [
        "a:",
        "  b: [1, 2]",
        "  c:",
        "    - x",
        "    - 'no'                               # odd word",
        "  d:",
        "    e: 1                                 # one",
        "  # Two",
        "  # lines",
        "  f: {g: null}",
        "'h: i': 'a # b'",
    ]
    assert yaml.safe_load(text) == value
