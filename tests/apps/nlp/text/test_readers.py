"""Parallel text as it lies on disk: lines, Moses files, columns, gettext catalogs, the table of verses."""

from __future__ import annotations

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
from apps.data.text_files import Rows, clean, expand, named_files, read_lines, text_lines
from apps.nlp.text.readers import bible, catalogs, moses, tsv


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# --- lines ---


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    # str.splitlines would see eight lines here
    text = "\ufeffone\u2028still one\r\n\ntwo\x0bstill\x85two\n three\tparts \x00\nfour"
    lines = read_lines(write(tmp_path / "a.en.gz", text))
    assert lines == ["one still one", "", "two still two", "three parts", "four"]
    assert read_lines(write(tmp_path / "b", "one\n\n")) == ["one", ""]
    assert clean("a\u00a0b") == "a\u00a0b"  # a space that a language means


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.de", b"gut\nauch gut\nschlecht \xe4 \n", r"a\.de, line 3: byte 0xe4 is not valid UTF-8"),
        ("a.de", b"", r"a\.de is empty"),
        ("a.de.gz", b"", r"a\.de\.gz is empty"),
    ],
)
def test_a_file_that_is_no_text_is_named_with_its_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_lines(write(tmp_path / name, content))


def test_a_missing_or_truncated_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.en is missing"):
        read_lines(tmp_path / "nowhere.en")
    path = write(tmp_path / "a.gz", "some text that is long enough to be cut\n")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"a\.gz is corrupt: it is truncated or no gzip file"):
        read_lines(path)


def test_each_name_of_a_list_must_be_a_file(tmp_path):
    for name in ("a-0.en", "a-1.en"):
        write(tmp_path / name, "x\n")
    assert named_files(str(tmp_path), ["a-1.en", "a-*"]) == [tmp_path / "a-1.en", tmp_path / "a-0.en"]
    for typo in ("b-0.en", "b-*"):
        with pytest.raises(ValueError, match=rf"{re.escape(typo)} is missing"):
            named_files(str(tmp_path), ["a-*", typo])


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_text_is_read_as_a_stream_and_not_past_what_text_shrinks(tmp_path, ending, pack, monkeypatch):
    path = tmp_path / f"a.en{ending}"
    path.write_bytes(pack("größer\nzwei\n".encode()))
    assert read_lines(expand(tmp_path, "a.en")[0]) == ["größer", "zwei"]
    path.write_bytes(pack(bytes(10)))  # other bytes than text are the text's matter
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(ValueError, match=rf"a\.en\{ending} is corrupt"):
        read_lines(path)
    path.write_bytes(b"no such format")
    with pytest.raises(ValueError, match=rf"a\.en\{ending} is corrupt"):
        read_lines(path)
    # 3 MiB in a few kilobytes: more than the 1 MiB that is free here, and over 200 times.
    monkeypatch.setattr(text_files, "Inflated", functools.partial(Inflated, free=1 << 20))
    path.write_bytes(pack(b"\n" * (3 << 20)))
    kept: list[str] = []
    with pytest.raises(ValueError, match=rf"a\.en\{ending} is compressed over \d+ times"):
        kept.extend(text_lines(path))
    assert not kept  # it was known before a line was kept


def test_a_zip_of_far_more_than_it_explains_is_refused_before_a_line_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "Inflated", functools.partial(Inflated, free=1 << 20))
    path = tmp_path / "corpus.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("corpus.txt", "w") as member:
        for _ in range(40):
            member.write(b"Hi.\tHallo!\n" * 100_000)  # 12 bytes each: 48 MB
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"corpus\.zip:corpus\.txt is compressed over \d+ times"):
        tsv.read([path], ["en", "de"])
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_rows_have_as_many_lines_in_each_language():
    assert len(Rows({"en": ["a"], "de": ["b"]}, "x")) == 1
    with pytest.raises(ValueError, match=r"x: line i .* there are 1 in en, 2 in de"):
        Rows({"en": ["a"], "de": ["b", "c"]}, "x")


# --- Moses ---


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


def test_a_pattern_of_several_moses_files_is_refused(tmp_path):
    for name in ("a-0.en", "a-0.de", "a-1.en", "a-1.de"):
        write(tmp_path / name, "x\n")
    assert moses.find(tmp_path, "a*1", ["en-de"]) == [{"en": tmp_path / "a-1.en", "de": tmp_path / "a-1.de"}]
    with pytest.raises(
        ValueError, match=r"'a-\*.\{lang\}' names .*a-0.en and .*a-1.en: of each language it must name one"
    ):
        moses.find(tmp_path, "a-*", ["en-de"])


def test_unequal_line_counts_name_both_files_and_counts(tmp_path):
    write(tmp_path / "t.en", "a\nb\nc\n")
    write(tmp_path / "t.de", "a\nb\n")
    (files,) = moses.find(tmp_path, "t", ["en-de"])
    with pytest.raises(ValueError, match=r"t\.en has 3 lines and .*t\.de has 2: line i of one translates line i"):
        moses.read(files)


def test_a_missing_side_is_named(tmp_path):
    write(tmp_path / "t.en", "a\n")
    with pytest.raises(ValueError, match=r"t\.de is missing \(and t\.de\.gz too\)"):
        moses.find(tmp_path, "t", ["en-de"])


# --- columns ---


def test_columns_are_taken_by_language_and_a_quote_is_a_character(tmp_path):
    write(tmp_path / "a.tsv", 'en\tid\tde\nA "dog\t7\tEin "Hund\nCats\t8\t\n')
    rows = tsv.read(tsv.find(tmp_path, "a.tsv"), ["en", "-", "de"])
    assert rows.text == {"en": ['A "dog', "Cats"], "de": ['Ein "Hund', ""]}
    write(tmp_path / "b.tsv", "en\tde\nHi.\tHallo!\n")
    assert tsv.read(tsv.find(tmp_path, "b.tsv"), ["en", "de"]).text == {"en": ["Hi."], "de": ["Hallo!"]}


def test_a_row_of_more_columns_is_skipped_and_counted(tmp_path, caplog):
    # Of 5 rows one has 4 columns; a tab at the end of a line, or where columns says "-", is no further column.
    write(tmp_path / "a.tsv", "Hi.\tHallo!\nI have\ta tab\tIch habe\tein Tab\n\nRun!\tLauf!\t\nGo.\tGeh.\t \t\n")
    rows = tsv.read([tmp_path / "a.tsv"], ["en", "de"], named=False)
    assert rows.text == {"en": ["Hi.", "", "Run!", "Go."], "de": ["Hallo!", "", "Lauf!", "Geh."]}
    assert rows.left_out == {"of 4 columns where 2 are expected": 1}
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning.endswith("a.tsv: 1 of 5 rows have 4 columns where 2 are expected (en, de): skipped")


def test_a_file_whose_rows_have_more_columns_asks_for_their_names(tmp_path):
    # As Tatoeba's files for Anki: English, German, attribution.
    write(tmp_path / "deu.txt", "Hi.\tHallo!\tCC-BY\nRun!\tLauf!\tCC-BY\nGo.\tGeh.\n")
    with pytest.raises(ValueError, match=r"2 of 3 rows have 3 columns where 2 are .* such as \[en, de, \"-\"\]$"):
        tsv.read([tmp_path / "deu.txt"], ["en", "de"], named=False)
    rows = tsv.read([tmp_path / "deu.txt"], ["en", "de", "-"])  # of the last row the attribution lacks
    assert rows.text == {"en": ["Hi.", "Run!", "Go."], "de": ["Hallo!", "Lauf!", "Geh."]}
    assert not rows.left_out


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


def test_an_empty_line_is_a_row_without_text(tmp_path, caplog):
    write(tmp_path / "a.tsv", "Hi.\tHallo!\n\r\nRun!\tLauf!\n\n")
    with caplog.at_level("INFO"):
        rows = tsv.read([tmp_path / "a.tsv"], ["en", "de"])
    assert rows.text == {"en": ["Hi.", "", "Run!", ""], "de": ["Hallo!", "", "Lauf!", ""]}
    assert "a.tsv: 2 of 4 lines are empty" in caplog.text


def test_columns_inside_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "deu-eng.zip", "w") as archive:
        archive.writestr("_about.txt", "** Info **\nno columns here\n")
        archive.writestr("deu.txt", "Hi.\tHallo!\nRun!\tLauf!\n")
    rows = tsv.read(tsv.find(tmp_path, "deu-eng.zip"), ["en", "de"])
    assert rows.text == {"en": ["Hi.", "Run!"], "de": ["Hallo!", "Lauf!"]}
    (tmp_path / "cut.zip").write_bytes((tmp_path / "deu-eng.zip").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut\.zip is corrupt"):
        tsv.read([tmp_path / "cut.zip"], ["en", "de"])


def test_too_few_columns_name_file_and_line(tmp_path):
    write(tmp_path / "a.tsv", "Hi.\tHallo!\nRun!\n")
    with pytest.raises(ValueError, match=r"a\.tsv, line 2: 1 columns, not 2 \(en, de\)"):
        tsv.read([tmp_path / "a.tsv"], ["en", "de"])
    with pytest.raises(ValueError, match=r"b\*\.tsv is missing"):
        tsv.find(tmp_path, "b*.tsv")


def test_a_name_is_also_found_gzipped_and_a_pattern_in_order(tmp_path):
    for name in ("b.tsv", "a.tsv", "c.tsv.gz"):
        write(tmp_path / name, "x\n")
    assert [p.name for p in expand(tmp_path, "[ab].tsv")] == ["a.tsv", "b.tsv"]
    assert [p.name for p in expand(tmp_path, "c.tsv")] == ["c.tsv.gz"]
    assert expand(tmp_path, str(tmp_path / "a.tsv")) == [tmp_path / "a.tsv"]


def test_brackets_of_a_folder_or_a_file_are_no_pattern(tmp_path):
    root = tmp_path / "corpus [2024] ?"
    path = write(root / "news[1].txt", "x\n")
    assert expand(root, "*.txt") == [path]
    assert expand(root, "news[1].txt") == [path]
    assert expand(root / "below", "../*.txt") == []  # there is no such folder
    assert [p.resolve() for p in expand(write(root / "a/b.txt", "x").parent, "../*.txt")] == [path]
    assert expand(tmp_path, str(tmp_path / "*/*.txt")) == [path]


# --- catalogs ---


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
    ],
)
def test_a_message_loses_the_mark_of_its_key_and_its_translation_too(mnemonic, message, translation, expected):
    assert catalogs.plain(message, translation, mnemonic) == expected


@pytest.mark.parametrize(
    ("mnemonic", "message"),
    [
        (None, "reinterpret_cast"),
        (None, "see snake_case"),
        (None, r"C:\new_dir"),
        (None, "about ~100 files"),
        ("~", "about ~100 files"),
        (None, "R&D department"),
        ("&", "R&D department"),
        (None, "Cut & Paste"),
        ("&", "fish &amp; chips"),
        ("_", "%(event_name)s of %(family)s"),
        ("_", "{event_name}, $file_name or <file_name>"),
        ("&", "<a href='x?a=1&b=2'>"),
    ],
)
def test_what_is_no_mark_of_a_key_stays(mnemonic, message):
    assert catalogs.plain(message, message, mnemonic) == (message, message)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("%d files", True),
        ("%(name)s", False),
        ("%s: %5.2f%% %1$s", False),
        ("{0} / {count}", False),
        ("$HOME <br> 12", False),
        ("3 + 4", False),
        ("日本", True),
    ],
)
def test_a_message_of_format_codes_alone_has_no_words(message, expected):
    assert catalogs.has_words(message) is expected


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
    header = "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n==1;\n"
    entries = {
        "": header,
        "menu\x04_Open": "_Öffnen",
        'Say "two" words': 'Sag "zwei" Wörter',
        "%d file\0%d files": "%d Dateien\0%d Datei",
        "Name": "Name",
        "%s": "%s!",
    }
    write(tmp_path / "de/LC_MESSAGES/app.mo", mo(entries))
    expected = [
        ("%d file", "%d Datei"),
        ("%s", "%s!"),
        ("Name", "Name"),
        ('Say "two" words', 'Sag "zwei" Wörter'),
        ("menu\x04_Open", "_Öffnen"),
    ]
    assert sorted(catalogs.read_catalog(tmp_path / "po/de.po")) == expected
    assert sorted(catalogs.read_catalog(tmp_path / "de/LC_MESSAGES/app.mo")) == expected
    (catalog,) = catalogs.find(tmp_path, "po/*.po", ["en-de"])
    rows = catalogs.read([catalog], "app")
    # no header, no repetition of the message, no format code alone
    assert sorted(rows.text["en"]) == ["%d file", "Open", 'Say "two" words']
    assert rows.text["de"][rows.text["en"].index("Open")] == "Öffnen"


def test_catalogs_of_several_languages_are_aligned_by_message(tmp_path):
    header = {"": "Content-Type: text/plain; charset=UTF-8\n"}
    write(tmp_path / "de/LC_MESSAGES/a.mo", mo({**header, "Open": "Öffnen", "ui\x04Open": "Öffnen", "Close": "Zu"}))
    write(tmp_path / "fr/LC_MESSAGES/a.mo", mo({**header, "Open": "Ouvrir", "ui\x04Open": "Ouvrir", "New": "Nouveau"}))
    write(tmp_path / "cs/LC_MESSAGES/a.mo", b"not read: no pair wants it")
    named = catalogs.find(tmp_path, "*/LC_MESSAGES/*.mo", ["en-de", "fr-en"])
    rows = catalogs.read(named, "app")
    table = sorted(zip(*(rows.text[language] for language in ("en", "de", "fr")), strict=True))
    assert table == [("Close", "Zu", ""), ("New", "", "Nouveau"), ("Open", "Öffnen", "Ouvrir")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("de.po", 'msgid "a"\nmsgstr "b"\nnonsense\n', r"de\.po, line 3: 'nonsense' is none of a catalog's lines"),
        (
            "de.po",
            'msgid ""\nmsgstr "Plural-Forms: plural=n !;"\n',
            r"de\.po: 'plural=n !;' is no rule for plural forms",
        ),
        ("de.po", b'msgid "a"\nmsgstr "\xff"\n', r"de\.po, line 2: byte 0xff is not valid UTF-8"),
        ("de/LC_MESSAGES/a.mo", b"1234 no catalog at all ....", r"a\.mo is not a gettext catalog"),
    ],
)
def test_a_broken_catalog_is_named(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        list(catalogs.read_catalog(path))


def test_a_catalog_tells_its_language_by_its_name_or_folder(tmp_path):
    for name in ("app-pt_BR.po", "de.po", "fr/LC_MESSAGES/x.po", "App.po"):
        write(tmp_path / name, "")
    assert catalogs.find(tmp_path, "[ad]*.po", ["en-pt_BR"]) == [("pt_BR", tmp_path / "app-pt_BR.po")]
    assert catalogs.find(tmp_path, "fr/*/x.po", ["en-fr"])[0][0] == "fr"
    with pytest.raises(ValueError, match=r"App\.po: its language cannot be told"):
        catalogs.find(tmp_path, "App.po", ["en-de"])
    with pytest.raises(ValueError, match=r"x\*\.po matches no file"):
        catalogs.find(tmp_path, "x*.po", ["en-de"])


# --- verses ---


def verses(path, rows):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE bible (bbName, bNumber, cNumber, vNumber, vText)")
        connection.executemany("INSERT INTO bible VALUES (?, ?, ?, ?, ?)", rows)


def test_verses_are_split_by_book_and_freed_of_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(bible, "_VERSES", 4)
    english = ["In the beginning", "the days of Ruth", "of Esther", "a psalm"]
    french = ["(1:1) Au [commen]cement", "(4:3) Ruth\xad", "Esther * * *", "(ADDED FROM KJV: a psalm)"]
    books = [1, 8, 17, 19]
    rows = [
        (c, b, 1, 1, text) for c, texts in (("4", english), ("l", french)) for b, text in zip(books, texts, strict=True)
    ]
    verses(tmp_path / "bible.db", [*rows, ("9", 1, 1, 1, "a text that is not free")])
    splits = bible.read(tmp_path / "bible.db", ["en", "fr"])
    assert {name: parts[0].text for name, parts in splits.items()} == {
        "train": {"en": ["In the beginning", "a psalm"], "fr": ["Au commencement", ""]},
        "val": {"en": ["of Esther"], "fr": ["Esther"]},
        "test": {"en": ["the days of Ruth"], "fr": ["Ruth"]},
    }
    assert not set(bible.VAL_BOOKS) & set(bible.TEST_BOOKS)


def test_a_table_of_verses_that_is_none_or_not_complete_is_refused(tmp_path):
    verses(tmp_path / "short.db", [("4", 1, 1, 1, "In the beginning")])
    with pytest.raises(ValueError, match=r"short\.db is truncated: 1 verses in en, not 31,102"):
        bible.read(tmp_path / "short.db", ["en"])
    write(tmp_path / "no.db", "no table")
    with pytest.raises(ValueError, match=r"no\.db is not the table of verses"):
        bible.read(tmp_path / "no.db", ["en"])
    with pytest.raises(ValueError, match=r"nowhere\.db is missing"):
        bible.read(tmp_path / "nowhere.db", ["en"])


def test_flores_is_text_in_moses_form(tmp_path):
    (tmp_path / "dev").mkdir()
    for language, line in (("eng_Latn", "A dog."), ("deu_Latn", "Ein Hund."), ("zho_Hans", "一只狗。")):
        (tmp_path / "dev" / f"{language}.dev").write_text(f"{line}\n")
    (found,) = moses.find(tmp_path, "dev/{lang}.dev", ["eng_Latn-deu_Latn"])
    assert moses.read(found).text == {"eng_Latn": ["A dog."], "deu_Latn": ["Ein Hund."]}
