"""The parallel texts that are known by name, in each layout a user may have them in."""

import gzip
import shutil
import sqlite3
import sys
import zipfile
from pathlib import Path

import pytest

from apps.data import datasets
from apps.data.sources import PythonPackage
from apps.data.subwords import SubwordConfig
from apps.nlp.text.datasets import NLP_DATASETS, OWN, Corpus, find_corpus
from apps.nlp.text.readers import bible
from apps.nlp.text_to_text.datasets import TASK_DATASETS
from apps.nlp.translation.data import TranslationData

SMALL = SubwordConfig(vocab_size=400)


def make(root: Path, dataset: str, **options) -> TranslationData:
    cache = str(root.parent / "cache")
    return TranslationData(dataset, root=str(root), cache_dir=cache, tokenizer=SMALL, **options)


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_every_dataset_is_listed_and_a_wheel_s_files_below_the_prefix_are_found(tmp_path, monkeypatch):
    rows = {row.name: row for row in datasets.list_datasets() if row.app == "nlp"}
    assert set(rows) == {*NLP_DATASETS, *TASK_DATASETS}
    assert not set(OWN) & set(rows)
    for name, dataset in NLP_DATASETS.items():
        TranslationData(name)  # its own pairs are among its languages
        assert rows[name].license
        assert dataset.sources
    package = NLP_DATASETS["gramps"].sources[0]
    assert isinstance(package, PythonPackage)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert package.installed() == tmp_path / "share/locale"
    assert not datasets.available("gramps", tmp_path / "cache")
    (tmp_path / "share/locale/de/LC_MESSAGES").mkdir(parents=True)
    shutil.copy(__file__, tmp_path / "share/locale/de/LC_MESSAGES/gramps.mo")
    assert datasets.prepare("gramps", cache_dir=tmp_path / "cache") == tmp_path / "share/locale"


@pytest.mark.parametrize("folder, end", [("", ".gz"), ("data/task1/raw/", "")])
def test_multi30k_in_its_repository_s_layout_or_in_one_folder(tmp_path, folder, end):
    root = tmp_path / "multi30k"
    counts = {"train": 4, "val": 2, "test_2016_flickr": 3, "test_2017_flickr": 1}
    for split, count in counts.items():
        for language in ("en", "de", "fr") + (("cs",) if split != "test_2017_flickr" else ()):
            write(root / f"{folder}{split}.{language}{end}", *(f"{split} {language} {i}" for i in range(count)))
    data = make(root, "multi30k")
    assert data.pairs == ("en-de",)
    assert data.sources("val") == ["val en 0", "val en 1"]
    assert data.references("test")[2] == "test_2016_flickr de 2"
    assert make(root, "multi30k", pairs=["fr-cs"]).references("test")[0] == "test_2016_flickr cs 0"
    assert make(root, "multi30k", test_files="test_2017_flickr").sources("test") == ["test_2017_flickr en 0"]
    with pytest.raises(ValueError, match=r"test_2017_flickr\.cs is missing"):
        make(root, "multi30k", pairs=["en-cs"], test_files="test_2017_flickr").setup()
    (root / f"{folder}val.de{end}").unlink()
    with pytest.raises(ValueError, match=r"val\.de is missing"):
        make(root, "multi30k").setup()
    for path in root.glob(f"{folder}val.*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no (data/task1/raw/)?val\.\*: multi30k expects data/task1/raw/train\.\*"):
        make(root, "multi30k").setup()


@pytest.mark.parametrize("packed", [True, False])
def test_tatoeba_is_split_by_sentence(tmp_path, packed):
    root = tmp_path / "anki"
    rows = [f"e{i // 2}\td{i}\tCC-BY" for i in range(100)]  # each English sentence has two translations
    if packed:
        root.mkdir()
        with zipfile.ZipFile(root / "deu-eng.zip", "w") as archive:
            archive.writestr("_about.txt", "about")
            archive.writestr("deu.txt", "\n".join(rows))
    else:
        write(root / "deu.txt", *rows)
    data = make(root, "tatoeba_en_de", val_size=10, test_size=0.2)
    assert [len(data.sources(split)) for split in ("val", "test")] == [10, 20]
    assert not set(data.sources("val")) & set(data.sources("test"))
    assert len(set(data.sources("test"))) == 10  # both translations of each
    swapped = make(root, "tatoeba_en_de", pairs=["de-en"], val_size=10, test_size=0.2)
    assert swapped.sources("test") == data.references("test")


def test_the_bible_is_split_by_book(tmp_path, monkeypatch):
    monkeypatch.setattr(bible, "_VERSES", 66)
    (tmp_path / "bible").mkdir()
    with sqlite3.connect(tmp_path / "bible/bible.db") as connection:
        connection.execute("CREATE TABLE bible (bbName, bNumber, cNumber, vNumber, vText)")
        for code in bible.CODES.values():
            for book in range(1, 67):
                text = f"book {'i' * book} in {code}"
                connection.execute("INSERT INTO bible VALUES (?, ?, 1, 1, ?)", (code, book, text))
    data = make(tmp_path / "bible", "bible", pairs=["en-de", "de-en", "en-ru"])
    assert data.sources("test") == [f"book {'i' * book} in {code}" for code in "4e4" for book in bible.TEST_BOOKS]
    counts = [len(data._pairs("train")), len(data.sources("val")), len(data.sources("test"))]
    assert counts == [3 * (66 - 7 - 6), 3 * 7, 3 * 6]
    few = make(tmp_path / "bible", "bible", pairs=["en-de"], val_size=3)
    assert len(few.sources("val")) == 3


def test_software_strings_lie_in_a_folder_a_language(tmp_path):
    header = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"'
    for language, word in (("de", "Datei"), ("fr", "fichier"), ("cs", "soubor")):
        entries = [f'msgid "file {"i" * i}"\nmsgstr "{word} {"i" * i}"' for i in range(1, 41)]
        write(tmp_path / f"own/{language}.po", header, *entries)
    options = {"pairs": ["en-de", "fr-en"], "train_files": "*.po"}
    data = make(tmp_path / "own", "gettext", **options)
    assert sum(len(batch.index_B) for batch in data.train_dataloader()) == 2 * 36
    assert len(data.sources("val")) == len(data.sources("test")) == 2 * 2
    assert {line.split()[0] for line in data.references("test")} == {"Datei", "file"}
    (tmp_path / "own/de.po").write_text(f'{header}\nmsgid "E_xit now"\nmsgstr "Jetzt b_eenden"\n', "utf-8")
    for mnemonic, source in ((None, "E_xit now"), ("_", "Exit now")):
        corpus = Corpus("gettext", str(tmp_path / "own"), "de.po", mnemonic=mnemonic)
        _, read = find_corpus(corpus, ["en-de"], None)
        assert read()["train"][0].text["en"] == [source]
    for dataset, mnemonic, message in (
        ("gettext", "%", "mnemonic='%' is not one of _, &, ~, none"),
        ("moses", "_", "mnemonic='_' is for dataset='gettext', not 'moses'"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tmp_path / "own", dataset, **{**options, "mnemonic": mnemonic})
    with pytest.raises(ValueError, match=r"root='.*' holds no \*/LC_MESSAGES/gramps\.mo: gramps expects"):
        make(tmp_path / "own", "gramps").setup()
