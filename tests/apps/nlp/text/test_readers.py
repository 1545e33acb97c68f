"""Parallel text as it lies on disk: lines, Moses files, columns, gettext catalogs, the table of verses."""

import bz2
import functools
import gzip
import lzma
import re
import sqlite3
import struct
import tracemalloc
import zipfile

import pytest

from apps.base.inflate import Inflated
from apps.data import text_files
from apps.data.text_files import AlignedText, clean, expand, named_files, read_lines, text_lines
from apps.nlp.text.readers import bible, catalogs, moses, tsv


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    # str.splitlines would see eight lines here
    text = "\ufeffone\u2028still one\r\n\ntwo\x0bstill\x85two\n three\tparts \x00\nfour"
    lines = read_lines(write(tmp_path / "a.en.gz", text))
    assert lines == ["one still one", "", "two still two", "three parts", "four"]
    assert read_lines(write(tmp_path / "b", "one\n\n")) == ["one", ""]
    assert clean("a\u00a0b") == "a\u00a0b"  # a space that a language means


RULE = 'msgid ""\nmsgstr "Plural-Forms: plural=n !;"\n'
MANY = r"'t-\*.\{lang\}' names .*t-0.en and .*t-1.en: of each language it must name"


def pair(path):
    if path.suffix == ".tsv":
        return tsv.read([path], ["en", "de"])
    return moses.read(moses.find(path.parent, "t-*" if "-" in path.name else "t", ["en-de"])[0])


def catalog(path):
    return list(catalogs.read_catalog(path))


@pytest.mark.parametrize(
    ("files", "read", "message"),
    [
        ({"a": b"gut\nauch gut\nschlecht \xe4 \n"}, read_lines, r"a, line 3: byte 0xe4 is not valid UTF-8"),
        ({"a.de": b""}, read_lines, r"a\.de is empty"),
        ({"a.de.gz": b""}, read_lines, r"a\.de\.gz is empty"),
        ({"a": None}, read_lines, r"a is missing"),
        (
            {"a": None},
            lambda _: AlignedText({"en": ["a"], "de": ["b", "c"]}, "x"),
            r"x: line i .* there are 1 in en, 2 in de",
        ),
        ({"t.en": "a\n"}, pair, r"t\.de is missing \(and t\.de\.gz too"),
        ({"t.en": "a\nb\nc\n", "t.de": "a\nb\n"}, pair, r"t\.en has 3 lines and .*t\.de has 2: line i of one transla"),
        ({"t-0.en": "x\n", "t-0.de": "x\n", "t-1.en": "x\n", "t-1.de": "x\n"}, pair, MANY),
        ({"a.tsv": "Hi.\tHallo!\nRun!\n"}, pair, r"a\.tsv, line 2: 1 columns, not 2 \(en, de\)"),
        ({"a": None}, lambda path: tsv.find(path.parent, "b*.tsv"), r"b\*\.tsv is missing"),
        ({"de.po": 'msgid "a"\nmsgstr "b"\nnonsense\n'}, catalog, r"de\.po, line 3: 'nonsense' is none of a catalog's"),
        ({"de.po": RULE}, catalog, r"de\.po: 'plural=n !;' is no rule for plural forms"),
        ({"de.po": b'msgid "a"\nmsgstr "\xff"\n'}, catalog, r"de\.po, line 2: byte 0xff is not valid UTF-8"),
        ({"de/LC_MESSAGES/a.mo": b"1234 no catalog at all ...."}, catalog, r"a\.mo is not a gettext catalog"),
        ({"App.po": ""}, lambda path: catalogs.find(path.parent, "App.po", ["en-de"]), "language cannot be told"),
        ({"a": None}, lambda path: catalogs.find(path.parent, "x*.po", ["en-de"]), r"x\*\.po matches no file"),
        ({"no.db": "no table"}, lambda path: bible.read(path, ["en"]), r"no\.db is not the table of verses"),
        ({"a.db": None}, lambda path: bible.read(path, ["en"]), r"a\.db is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_read_is_named(tmp_path, files, read, message):
    for name, content in files.items():
        if content is not None:
            write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_text_is_read_as_a_stream_and_not_past_what_text_shrinks(tmp_path, ending, pack, monkeypatch):
    path = tmp_path / f"a.en{ending}"
    path.write_bytes(pack("größer\nzwei\n".encode()))
    assert read_lines(expand(tmp_path, "a.en")[0]) == ["größer", "zwei"]
    for content in (pack(b"a text that is cut at its end")[:-6], b"no such format"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.en\{ending} is corrupt"):
            read_lines(path)
    # 3 MiB in a few kilobytes: more than the 1 MiB that is free here, and over 200 times.
    monkeypatch.setattr(text_files, "Inflated", functools.partial(Inflated, free=1 << 20))
    path.write_bytes(pack(b"\n" * (3 << 20)))
    kept: list[str] = []
    with pytest.raises(ValueError, match=rf"a\.en\{ending} is compressed over \d+ times"):
        kept.extend(text_lines(path))
    assert not kept  # it was known before a line was kept


def test_moses_files_by_stem_by_language_and_by_pair(tmp_path):
    for name in ("train.en", "train.de.gz", "train.fr", "news/de/x.txt", "news/en/x.txt"):
        write(tmp_path / name, f"{name}\n")
    pairs = ["en-de", "de-en", "en-fr"]
    (files,) = moses.find(tmp_path, "train", pairs)
    assert moses.read(files).text == {"en": ["train.en"], "de": ["train.de.gz"], "fr": ["train.fr"]}
    (files,) = moses.find(tmp_path, "news/{lang}/x.txt", pairs)
    assert moses.read(files).text == {"en": ["news/en/x.txt"], "de": ["news/de/x.txt"]}
    # OPUS: each pair has files of its own, under its name or that of its reverse, here with other English lines
    write(tmp_path / "de-en/a.de", "eins\nzwei\n")
    write(tmp_path / "de-en/a.en", "one\ntwo\n")
    write(tmp_path / "en-fr/a.en", "three\n")
    write(tmp_path / "en-fr/a.fr", "trois\n")
    texts = [moses.read(files).text for files in moses.find(tmp_path, "{pair}/a", pairs)]
    assert texts == [{"de": ["eins", "zwei"], "en": ["one", "two"]}, {"en": ["three"], "fr": ["trois"]}]


def test_columns_are_taken_by_language_and_a_quote_is_a_character(tmp_path):
    write(tmp_path / "a.tsv", 'en\tid\tde\nA "dog\t7\tEin "Hund\nCats\t8\t\n')
    rows = tsv.read(tsv.find(tmp_path, "a.tsv"), ["en", "-", "de"])
    assert rows.text == {"en": ['A "dog', "Cats"], "de": ['Ein "Hund', ""]}
    # A file whose rows have more columns asks for their names, as Tatoeba's for Anki: English, German, attribution.
    write(tmp_path / "deu.txt", "Hi.\tHallo!\tCC-BY\nRun!\tLauf!\tCC-BY\nGo.\tGeh.\n")
    with pytest.raises(ValueError, match=r"2 of 3 rows have 3 columns where 2 are .* such as \[en, de, \"-\"\]$"):
        tsv.read([tmp_path / "deu.txt"], ["en", "de"], named=False)
    rows = tsv.read([tmp_path / "deu.txt"], ["en", "de", "-"])  # of the last row the attribution lacks
    assert rows.text == {"en": ["Hi.", "Run!", "Go."], "de": ["Hallo!", "Lauf!", "Geh."]}
    assert not rows.left_out


def test_a_row_of_more_columns_is_skipped_and_counted_and_an_empty_line_is_a_row_without_text(tmp_path, caplog):
    # Of 5 rows one has 4 columns; a tab at the end of a line, or where columns says "-", is no further column.
    write(tmp_path / "a.tsv", "Hi.\tHallo!\nI have\ta tab\tIch habe\tein Tab\n\nRun!\tLauf!\t\nGo.\tGeh.\t \t\n")
    with caplog.at_level("INFO"):
        rows = tsv.read([tmp_path / "a.tsv"], ["en", "de"], named=False)
    assert rows.text == {"en": ["Hi.", "", "Run!", "Go."], "de": ["Hallo!", "", "Lauf!", "Geh."]}
    assert rows.left_out == {"of 4 columns where 2 are expected": 1}
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning.endswith("a.tsv: 1 of 5 rows have 4 columns where 2 are expected (en, de): skipped")
    assert "a.tsv: 1 of 5 lines are empty" in caplog.text


def test_a_header_names_the_columns_and_must_not_contradict_them(tmp_path):
    write(tmp_path / "a.tsv", "id\tde\ten\n7\tHallo!\tHi.\n")
    expected = {"en": ["Hi."], "de": ["Hallo!"]}
    assert tsv.read([tmp_path / "a.tsv"], ["en", "de"], named=False).text == expected
    assert tsv.read([tmp_path / "a.tsv"], ["-", "de", "en"]).text == expected
    with pytest.raises(ValueError, match=r"line 1: the header says id, de, en, and columns=.* must be \[-, de, en\]"):
        tsv.read([tmp_path / "a.tsv"], ["-", "en", "de"])
    write(tmp_path / "b.tsv", "en\tde\ten\nHi.\tHallo!\tHi.\n")
    with pytest.raises(ValueError, match="names a language twice"):
        tsv.read([tmp_path / "b.tsv"], ["en", "de"], named=False)


def test_columns_inside_an_archive(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "deu-eng.zip", "w") as archive:
        archive.writestr("_about.txt", "** Info **\nno columns here\n")
        archive.writestr("deu.txt", "Hi.\tHallo!\nRun!\tLauf!\n")
    rows = tsv.read(tsv.find(tmp_path, "deu-eng.zip"), ["en", "de"])
    assert rows.text == {"en": ["Hi.", "Run!"], "de": ["Hallo!", "Lauf!"]}
    (tmp_path / "cut.zip").write_bytes((tmp_path / "deu-eng.zip").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut\.zip is corrupt"):
        tsv.read([tmp_path / "cut.zip"], ["en", "de"])
    # One of far more than it explains is refused before a line is kept.
    monkeypatch.setattr(text_files, "Inflated", functools.partial(Inflated, free=1 << 20))
    with zipfile.ZipFile(tmp_path / "corpus.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("corpus.txt", b"Hi.\tHallo!\n" * 1_000_000)  # 12 bytes each: 12 MB
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"corpus\.zip:corpus\.txt is compressed over \d+ times"):
        tsv.read([tmp_path / "corpus.zip"], ["en", "de"])
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_files_are_found_by_names_and_patterns_and_brackets_of_a_folder_or_a_file_are_none(tmp_path):
    root = tmp_path / "corpus [2024] ?"
    path = write(root / "news[1].txt", "x\n")
    assert expand(root, "*.txt") == expand(root, "news[1].txt") == expand(tmp_path, str(tmp_path / "*/*.txt")) == [path]
    assert expand(root / "below", "../*.txt") == []  # there is no such folder
    assert [p.resolve() for p in expand(write(root / "a/b.txt", "x").parent, "../*.txt")] == [path]
    first, second, packed = (write(tmp_path / name, "x\n") for name in ("a-0.en", "a-1.en", "c.tsv.gz"))
    assert named_files(str(tmp_path), ["a-1.en", "a-*"]) == [second, first]
    assert expand(tmp_path, "a-[01].en") == [first, second]
    assert (expand(tmp_path, "c.tsv"), expand(tmp_path, str(first))) == ([packed], [first])
    for typo in ("b-0.en", "b-*"):  # each name of a list must be a file
        with pytest.raises(ValueError, match=rf"{re.escape(typo)} is missing"):
            named_files(str(tmp_path), ["a-*", typo])


KEPT = [  # what is no mark of a key
    *((None, text) for text in ("reinterpret_cast", "see snake_case", r"C:\new_dir", "about ~100 files", "R&D")),
    (None, "Cut & Paste"),
    *(("~", "about ~100 files"), ("&", "R&D department"), ("&", "fish &amp; chips"), ("&", "<a href='x?a=1&b=2'>")),
    *(("_", "%(event_name)s of %(family)s"), ("_", "{event_name}, $file_name or <file_name>")),
]


@pytest.mark.parametrize(
    ("mnemonic", "message", "translation", "expected"),
    [
        (None, "menu\x04_Open", "Ö_ffnen", ("Open", "Öffnen")),  # a context; GTK
        (None, "&File", "&Datei", ("File", "Datei")),  # Qt
        (None, "~Save As...", "Speichern ~unter", ("Save As...", "Speichern unter")),  # LibreOffice
        (None, "_File", "ファイル(_F)", ("File", "ファイル")),
        (None, "Save _as %(file_name)s", "%(file_name)s _sichern", ("Save as %(file_name)s", "%(file_name)s sichern")),
        (None, "one\n  line\t", "eine\nZeile", ("one line", "eine Zeile")),
        # Within a word only where the program is known to write keys so.
        ("_", "E_xit", "B_eenden", ("Exit", "Beenden")),
        ("&", "E&xit", "&Beenden", ("Exit", "Beenden")),
        ("_", "Undo ~ and &redo", "Zurück ~ und &vor", ("Undo ~ and &redo", "Zurück ~ und &vor")),
        ("none", "_Open", "_Öffnen", ("_Open", "_Öffnen")),
        # A message without a key has none in its translation either, nor has one with more marks than one.
        (None, "invalid reinterpret_cast", "_cast ungültig", ("invalid reinterpret_cast", "_cast ungültig")),
        ("_", "use max_len of my_list", "_nutze", ("use max_len of my_list", "_nutze")),
        ("_", "Show _max_len", "max_len _zeigen", ("Show _max_len", "max_len _zeigen")),
        *((mnemonic, text, text, (text, text)) for mnemonic, text in KEPT),
    ],
)
def test_a_message_loses_the_mark_of_its_key_and_its_translation_too(mnemonic, message, translation, expected):
    assert catalogs.plain(message, translation, mnemonic) == expected
    # A message of format codes alone has no words.
    assert all(map(catalogs.has_words, ("%d files", "日本")))
    codes = ("%(name)s", "%s: %5.2f%% %1$s", "{0} / {count}", "$HOME <br> 12", "3 + 4")
    assert not any(map(catalogs.has_words, codes))


PO = r"""
# a comment
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\n"
"Plural-Forms: nplurals=2; plural=n==1;\n"

#: src/a.c:3
msgctxt "menu"
msgid "_Open"
msgstr "_Öffnen"

msgid "Say \"two\" "
"words"
msgstr "Sag \"zwei\" "
"Wörter"

#, c-format
msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d Dateien"
msgstr[1] "%d Datei"

#, fuzzy, c-format
msgid "Close"
msgstr "Geschlossen?"

msgid "Untranslated"
msgstr ""
#, fuzzy
#~ msgid "Old"
#~ msgstr "Alt"
msgid "Name"
msgstr "Name"
msgid "%s"
msgstr "%s!"
"""


def mo(entries):
    """Return a catalog in its binary form, from a dict of message (plural forms after \\0) to translation."""
    items = sorted((k.encode(), v.encode()) for k, v in entries.items())
    keys, values = b"".join(k + b"\0" for k, _ in items), b"".join(v + b"\0" for _, v in items)
    start, tables = 28 + 16 * len(items), [b"", b""]
    for side, base in ((0, start), (1, start + len(keys))):
        for item in items:
            tables[side] += struct.pack("<II", len(item[side]), base)
            base += len(item[side]) + 1
    head = struct.pack("<7I", 0x950412DE, 0, len(items), 28, 28 + 8 * len(items), 0, 0)
    return head + tables[0] + tables[1] + keys + values


def test_po_and_mo_give_the_checked_translations(tmp_path):
    write(tmp_path / "po/de.po", PO)
    # The singular is form 1 here, not 0: the header's plural=n==1 gives 1 for n=1.
    header = {"": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n==1;\n"}
    plain = {"%s": "%s!", "Name": "Name", 'Say "two" words': 'Sag "zwei" Wörter', "menu\x04_Open": "_Öffnen"}
    write(tmp_path / "de/LC_MESSAGES/app.mo", mo({**header, **plain, "%d file\0%d files": "%d Dateien\0%d Datei"}))
    expected = [("%d file", "%d Datei"), *plain.items()]
    assert sorted(catalogs.read_catalog(tmp_path / "po/de.po")) == expected
    assert sorted(catalogs.read_catalog(tmp_path / "de/LC_MESSAGES/app.mo")) == expected
    (catalog,) = catalogs.find(tmp_path, "po/*.po", ["en-de"])
    rows = catalogs.read([catalog], "app")
    # no header, no repetition of the message, no format code alone
    assert sorted(rows.text["en"]) == ["%d file", "Open", 'Say "two" words']
    assert rows.text["de"][rows.text["en"].index("Open")] == "Öffnen"


def test_catalogs_of_several_languages_are_aligned_by_message_and_tell_their_language(tmp_path):
    header = {"": "Content-Type: text/plain; charset=UTF-8\n"}
    write(tmp_path / "de/LC_MESSAGES/a.mo", mo({**header, "Open": "Öffnen", "ui\x04Open": "Öffnen", "Close": "Zu"}))
    write(tmp_path / "fr/LC_MESSAGES/a.mo", mo({**header, "Open": "Ouvrir", "ui\x04Open": "Ouvrir", "New": "Nouveau"}))
    write(tmp_path / "cs/LC_MESSAGES/a.mo", b"not read: no pair wants it")
    named = catalogs.find(tmp_path, "*/LC_MESSAGES/*.mo", ["en-de", "fr-en"])
    rows = catalogs.read(named, "app")
    table = sorted(zip(*(rows.text[language] for language in ("en", "de", "fr")), strict=True))
    assert table == [("Close", "Zu", ""), ("New", "", "Nouveau"), ("Open", "Öffnen", "Ouvrir")]
    own, _ = write(tmp_path / "app-pt_BR.po", ""), write(tmp_path / "de.po", "")
    assert catalogs.find(tmp_path, "[ad]*.po", ["en-pt_BR"]) == [("pt_BR", own)]


def test_verses_are_split_by_book_and_freed_of_marks_and_must_be_complete(tmp_path, monkeypatch):
    english = ["In the beginning", "the days of Ruth", "of Esther", "a psalm"]
    french = ["(1:1) Au [commen]cement", "(4:3) Ruth\xad", "Esther * * *", "(ADDED FROM KJV: a psalm)"]
    both = (("4", english), ("l", french))
    rows = [(code, b, 1, 1, text) for code, texts in both for b, text in zip((1, 8, 17, 19), texts, strict=True)]
    with sqlite3.connect(tmp_path / "bible.db") as connection:
        connection.execute("CREATE TABLE bible (bbName, bNumber, cNumber, vNumber, vText)")
        rows = [*rows, ("9", 1, 1, 1, "a text that is not free")]
        connection.executemany("INSERT INTO bible VALUES (?, ?, ?, ?, ?)", rows)
    with pytest.raises(ValueError, match=r"bible\.db is truncated: 4 verses in en, not 31,102"):
        bible.read(tmp_path / "bible.db", ["en"])
    monkeypatch.setattr(bible, "_VERSES", 4)
    splits = bible.read(tmp_path / "bible.db", ["en", "fr"])
    assert {name: parts[0].text for name, parts in splits.items()} == {
        "train": {"en": ["In the beginning", "a psalm"], "fr": ["Au commencement", ""]},
        "val": {"en": ["of Esther"], "fr": ["Esther"]},
        "test": {"en": ["the days of Ruth"], "fr": ["Ruth"]},
    }
    assert not set(bible.VAL_BOOKS) & set(bible.TEST_BOOKS)
