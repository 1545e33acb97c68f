"""TextToTextData: files of one's own, what is rejected, what is held out, and what is to be predicted."""

import json
from pathlib import Path

import pytest
from tasked import WORDS, options_of, task_data

from apps.data.subwords import EOS_ID, SubwordConfig
from apps.nlp.text_to_text.data import TextToTextData

SMALL = SubwordConfig(vocab_size=300)


def make(folder: Path, dataset: str, **options) -> TextToTextData:
    return TextToTextData(dataset, str(folder), str(folder / "cache"), **{"tokenizer": SMALL, **options})


def json_file(folder: Path, name: str, rows: list[dict]) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def some(count: int, **more) -> list[dict]:
    words = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]
    return [{"source": words[i], "target": words[i].split()[0], **more} for i in range(count)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return tmp_path_factory.mktemp("tasks")


def test_columns_are_named_tasks_are_numbered_and_further_columns_are_kept(tasks):
    data = task_data(tasks)
    assert data.tasks == ("first", "last")
    assert {split: len(data.examples(split)) for split in ("train", "val", "test")} == {
        "train": 160, "val": 20, "test": 20
    }  # fmt: skip
    row = data.rows("val")[3]
    assert (row["task"], row["place"], row["references"]) == ("last", 3, [row["source"].split()[-1]])
    assert (data.sources("val")[3], data.references("val")[3]) == (row["source"], row["references"][0])
    assert data.pair_of("val")[:4] == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="split='train'"):
        data.rows("train")


def test_tables_and_files_of_lines_hold_the_same_texts_and_patterns_pair_them(tmp_path):
    rows = some(60)
    quoted = "source,target,note\n" + "".join(f'"{r["source"]}","{r["target"]}","a, ""b""\nc"\n' for r in rows)
    (tmp_path / "rows.csv").write_text(quoted)
    (tmp_path / "rows.tsv").write_text("target\tsource\n" + "".join(f"{r['target']}\t{r['source']}\n" for r in rows))
    (tmp_path / "rows.long").write_text("".join(f"{r['source']}\n" for r in rows))
    (tmp_path / "rows.short").write_text("".join(f"{r['target']}\n" for r in rows))
    files = json_file(tmp_path, "rows.jsonl", rows)
    made = {
        "jsonl": make(tmp_path, "jsonl", train_files=files),
        "csv": make(tmp_path, "csv", train_files="rows.csv"),
        "tsv": make(tmp_path, "csv", train_files="rows.tsv"),
        "lines": make(tmp_path, "lines", train_files="rows", source="long", target="short"),
    }
    for name, data in made.items():
        assert (len(data.examples("train")), data.sizes()["val"], data.sizes()["test"]) == (54, 3, 3)
        assert data.sources("test") == made["jsonl"].sources("test")
        assert data.tasks == ("csv" if name == "tsv" else name,)
    assert made["csv"].rows("val")[0]["note"] == 'a, "b"\nc'
    for i, name in enumerate("ab"):
        own = some(40)[20 * i : 20 * i + 20]
        for side in ("source", "target"):
            (tmp_path / f"part-{name}.{side}").write_text("".join(f"{row[side]}\n" for row in own))
    data = make(tmp_path, "lines", train_files="part-*", val_size=30, test_size=0)
    assert dict(zip(data.sources("val"), data.references("val"), strict=True)).items() <= {
        (row["source"], row["target"]) for row in some(40)
    }
    assert (len(data.examples("train")), len(data.sources("val"))) == (10, 30)
    (tmp_path / "part-b.target").rename(tmp_path / "part-c.target")
    with pytest.raises(ValueError, match=r"part-b must have both files, .source and .target: it has one"):
        _ = make(tmp_path, "lines", train_files="part-*").opened


def test_several_right_texts_are_kept_and_rows_of_other_files_do_not_train(tmp_path):
    rows = [{**row, "target": [row["target"], "other"]} for row in some(40)]
    data = make(tmp_path, "jsonl", train_files=json_file(tmp_path, "rows.jsonl", rows), val_size=4, test_size=0)
    assert [row["references"] for row in data.rows("val")] == [[r, "other"] for r in data.references("val")]
    assert data.rows("test") == []
    rows = [{**row, "target": 0, "task": task} for row, task in zip(some(40), (0, 1, None, "") * 10, strict=True)]
    files = [json_file(tmp_path, f"{len(own)}.jsonl", own) for own in (rows[:36], rows[36:])]
    data = make(tmp_path, "jsonl", train_files=files[0], val_files=files[1], test_size=0)
    assert [row["task"] for row in data.rows("val")] == ["0", "1", "jsonl", "jsonl"]
    assert data.references("val") == ["0"] * 4
    rows = some(60)
    other = [{**rows[0], "target": "other"}, {**rows[1], "target": ["other", rows[1]["target"]]}]
    train = json_file(tmp_path, "train.jsonl", rows)
    files = {
        "val_files": json_file(tmp_path, "v.jsonl", other),
        "test_files": json_file(tmp_path, "t.jsonl", rows[50:]),
    }
    data = make(tmp_path, "jsonl", train_files=train, **files)
    # Row 1 and ten of test go; row 0 has another right text.
    assert (len(data.examples("train")), len(data.rows("val")), len(data.rows("test"))) == (49, 2, 10)
    assert "left out: 11 of validation or test (train)" in data.describe()
    drawn = make(tmp_path, "jsonl", train_files=train, test_files=files["test_files"], val_size=49)
    assert not {*drawn.sources("val")} & {*drawn.sources("test")}
    with pytest.raises(ValueError, match="jsonl: all training rows are in validation or test, and none is left"):
        _ = make(tmp_path, "jsonl", train_files=train, test_files=train, val_size=0).opened


def test_rows_of_one_source_are_never_in_two_splits_and_long_sides_are_cut_and_counted(tmp_path):
    rows = [row for row in some(100) for _ in range(2)]
    data = make(tmp_path, "jsonl", train_files=json_file(tmp_path, "r.jsonl", rows), val_size=20, test_size=0.1)
    held = [data.sources(split) for split in ("val", "test")]
    assert [len(own) for own in held] == [20, 20]
    assert all(own.count(text) == 2 for own in held for text in own)
    assert not {*held[0]} & {*held[1]}
    assert len(data.examples("train")) == 160
    again, other = (
        make(tmp_path, "jsonl", train_files="r.jsonl", val_size=20, test_size=0.1, split_seed=s) for s in (0, 1)
    )
    assert again.sources("val") == held[0] != other.sources("val")
    rows = [{"source": " ".join(WORDS * 9) + f" {i}", "target": "red"} for i in range(20)] + some(20)
    file = json_file(tmp_path, "rows.jsonl", rows)
    data = make(tmp_path, "jsonl", train_files=file, val_size=0, test_size=0, max_length=12)
    batch = data.examples("train").__getitems__(range(40))
    assert batch.source_BS.shape[1] == 12
    assert batch.source_BS[0, -1] == EOS_ID
    assert "20 of more than 12 tokens are cut (train)" in data.describe()
    assert len(data._plan(data.examples("train"))) >= 1


def test_rows_without_a_group_are_each_their_own_and_too_few_that_are_held_out_are_said(tmp_path, caplog):
    groups = [*(None, "") * 20, *["a"] * 30, *["b"] * 30]
    rows = [{**row, "group": group} for row, group in zip(some(100), groups, strict=True)]
    file = json_file(tmp_path, "rows.jsonl", rows)
    data = make(tmp_path, "jsonl", train_files=file, val_size=20, test_size=10)
    held = [row["group"] for split in ("val", "test") for row in data.rows(split)]
    assert (len(held), {*held}) == (30, {None, ""})  # no room for a group of 30
    assert not caplog.text
    file = json_file(tmp_path, "groups.jsonl", rows[40:])
    data = make(tmp_path, "jsonl", train_files=file, val_size=29, test_size=0)
    why = "val_size=29: 0 of jsonl's 60 rows can be held out: those of one source or group stay together; val_size=0"
    with pytest.raises(ValueError, match=why):
        _ = data.opened
    assert len(make(tmp_path, "jsonl", train_files=file, val_size=31, test_size=0).rows("val")) == 30
    assert "val_size=31: 30 of jsonl's 60 rows can be held out" in caplog.text


BAD = [
    ({"source": "a", "target": ""}, "the target is empty"),
    ({"source": " ", "target": "b"}, "the source is empty"),
    ({"source": None, "target": "b"}, "the source is empty"),
    ({"source": "a", "target": []}, "the target is empty"),
    ({"source": "a", "target": {"b": 1}}, "the target is a dict, and not a text"),
    ({"source": "a", "target": {}}, "the target is a dict, and not a text"),
    ({"source": "a"}, r"no column 'target' \(target\), only source"),
    ({"source": "a", "target": "b", "task": "x y"}, "task='x y' has spaces or angle brackets"),
]
GOOD = '{"source": "a", "target": "b"}\n'
FILES = [
    ("jsonl", {"rows.jsonl": GOOD + '["a", "b"]'}, r"rows.jsonl, line 2 is \[.a., .b.\], not an object"),
    ("jsonl", {"rows.jsonl": GOOD + '{"source": '}, "rows.jsonl, line 2 is no JSON"),
    ("csv", {"rows.csv": "source,target\na,b\na,b,c\n"}, "rows.csv, line 3: not the 2 columns of line 1"),
    ("lines", {"rows.source": "a\nb\n", "rows.target": "a\n"}, r"rows.source and .*rows.target have 2 and 1 lines"),
    ("jsonl", {}, "rows.jsonl is missing"),
    *(("jsonl", {"rows.jsonl": GOOD + json.dumps(row)}, f"rows.jsonl, line 2: {message}") for row, message in BAD),
]


@pytest.mark.parametrize("kind, files, message", FILES, ids=[message for _, _, message in FILES])
def test_a_bad_row_is_named_by_its_line(tmp_path, kind, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        _ = make(tmp_path, kind, train_files="rows" if kind == "lines" else f"rows.{kind}").opened
    assert not [*tmp_path.rglob("manifest.json")]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dataset": "xsun"}, "dataset='xsun'"),
        ({"dataset": "jsonl"}, "dataset='jsonl' needs train_files"),
        ({"dataset": "squad", "val_files": "x"}, "val_files='x' is for files of yours, not for squad"),
        ({"language": "nl"}, "language='nl'"),
        ({"max_length": 3}, "max_length=3"),
        ({"subset": 0}, "subset=0"),
        ({"dataset": "xsum", "language": "de"}, "language='de'"),
        ({"val_size": 1.5}, "val_size=1.5 is neither"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        TextToTextData(**options)


def test_tasks_are_chosen_and_unknown_ones_are_named(tasks, tmp_path):
    alone = task_data(tasks, tasks=["last"])
    assert {row["task"] for row in alone.rows("test")} == {"last"}
    assert "80 of other tasks (train)" in alone.describe()
    assert alone.subwords.languages == ()
    with pytest.raises(ValueError, match="task 'middle' has no training rows: there are first, last"):
        _ = task_data(tasks, tasks=["last", "middle"]).opened
    train, test = (json_file(tmp_path, f"{name}.jsonl", some(40, task=name)) for name in "ab")
    with pytest.raises(ValueError, match=r"task 'b' \(test\) is none of training's: a"):
        _ = make(tmp_path, "jsonl", train_files=train, test_files=test).opened
    for given, message in ((None, "predict_task .* must name one of first, last"), ("middle", "predict_task='middle'")):
        with pytest.raises(ValueError, match=message):
            next(task_data(tasks, text="red", predict_task=given).given_batches())


def test_given_texts_need_the_subwords_and_the_tasks_alone(tasks):
    known = task_data(tasks)
    given = {**options_of(tasks), "root": "/nowhere", "subwords": known.subwords, "tasks": known.tasks}
    data = TextToTextData(**given, text=["red blue", "", "green"], predict_task="last")
    ((batch, lines),) = data.given_batches()
    assert sorted(lines) == ["", "green", "red blue"]
    assert set(batch.pair_B.tolist()) == {1}
    tag = known.subwords.tag_id("last")
    assert [row[0] for row in batch.source_BS.tolist()] == [EOS_ID, tag, tag]
