"""Software strings: gettext catalogs, ``.mo`` and ``.po``. Messages are English; a catalog translates them.

From plural forms the one for a single thing is taken, with the singular message: which message the others translate
depends on the language.
"""

from __future__ import annotations

import functools
import gettext
import itertools
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from apps.data.text_files import AlignedText, clean, expand, text_lines

SOURCE = "en"
"""The language of the messages."""

MARKS = ("_", "&", "~")
"""The marks before the letter that opens a menu entry: in GTK, Qt, LibreOffice."""
MNEMONICS = (*MARKS, "none")

_FORMAT = re.compile(
    r"%(?:\d+\$)?(?:\([^)]*\))?[-+ #0]*[\d*]*(?:\.[\d*]+)?(?:hh|h|ll|l|L|z|j|t|q)*[a-zA-Z<>'%]"
    r"|\{[^{}]*\}|\$\{?\w+\}?|<[^<>]*>|&\w+;"
)
_LETTER = re.compile(r"[^\W\d_]")


@functools.cache
def _mark(marker: str, inside: bool) -> re.Pattern[str]:
    """Return the pattern of a format code, or as group 1 the mark of a key.

    With ``inside`` the mark may be in a word too, but never as in "R&D".
    """
    where = "" if inside else r"(?<!\S)"
    return re.compile(rf"{_FORMAT.pattern}|({where}{marker}(?=[^\W\d_])(?!(?<=[A-Z]&)[A-Z]))")


def plain(message: str, translation: str, mnemonic: str | None = None) -> tuple[str, str]:
    """Return a message and its translation as sentences: without context and mark of a key, each on one line.

    A message with one mark outside its format codes has a key: that mark is taken out, and of its translation the one
    mark, or the key behind it, ``(_F)``. More marks than one are none.

    Args:
        message: in English, with its context and ``\\x04`` before it.
        translation: number of documents.
        mnemonic: the mark, one of `MNEMONICS`; None: whichever is at the beginning of a message's word, for within a
            word only who knows the program can tell ``E_xit`` from ``snake_case``.
    """
    source, target = clean(message.rpartition("\x04")[2]), clean(translation)
    for marker in MARKS:
        if mnemonic in (None, marker):
            unmarked = _without(_mark(marker, inside=mnemonic is not None), source)
            if unmarked != source:
                source, target = unmarked, re.sub(rf"\s?\({marker}\w\)", "", target)
                target = _without(_mark(marker, inside=True), target)
    return re.sub(" {2,}", " ", source), re.sub(" {2,}", " ", target)


def _without(mark: re.Pattern[str], text: str) -> str:
    """Return ``text`` without the mark, if it has exactly one."""
    marks = [match.start() for match in mark.finditer(text) if match[1]]
    return text[: marks[0]] + text[marks[0] + 1 :] if len(marks) == 1 else text


def has_words(message: str) -> bool:
    """Return whether anything but format codes, tags, numbers and signs is in a message."""
    return _LETTER.search(_FORMAT.sub("", message)) is not None


def find(root: Path, names: str, pairs: Sequence[str]) -> list[tuple[str, Path]]:
    """Return the catalogs of the languages of ``pairs``, with their languages.

    Args:
        root: folder that the names start from.
        names: a pattern such as ``*/LC_MESSAGES/*.mo`` or ``po/*.po``.
        pairs: such as ``en-de``.

    Raises:
        ValueError: no file, or one whose language cannot be told.
    """
    wanted = {language for pair in pairs for language in pair.split("-")}
    paths = expand(root, names)
    if not paths:
        raise ValueError(f"{root / names} matches no file")
    named = [(_language(path), path) for path in paths]
    return [(language, path) for language, path in named if language in wanted]


def _language(path: Path) -> str:
    """Return the language of a catalog: its folder above ``LC_MESSAGES``, or by its name, ``de.po``, ``app-de.po``."""
    if path.parent.name == "LC_MESSAGES":
        return path.parent.parent.name
    if match := re.search(r"(?:^|[-.])([a-z]{2,3}(?:[_@][A-Za-z]+)?)$", path.stem):
        return match[1]
    raise ValueError(f"{path}: its language cannot be told; call it LANGUAGE.po, or put it in LANGUAGE/LC_MESSAGES/")


def read(catalogs: Sequence[tuple[str, Path]], name: str, mnemonic: str | None = None) -> AlignedText:
    """Return the messages of all catalogs and their translations, a row for each.

    Left out are messages without words, translations that repeat the message, and rows that come again.

    Args:
        catalogs: each one's language and file.
        name: of the whole, for messages.
        mnemonic: see `plain`.

    Raises:
        ValueError: a file that cannot be read.
    """
    languages = list(dict.fromkeys(language for language, _ in catalogs if language != SOURCE))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for language, path in catalogs:
        if language == SOURCE:
            continue  # a catalog from English to English mends typing errors
        domain = path.stem if path.parent.name == "LC_MESSAGES" else ""
        for message, translation in read_catalog(path):
            source, target = plain(message, translation, mnemonic)
            if source != target and has_words(source) and has_words(target):
                rows.setdefault((domain, message), {SOURCE: source})[language] = target
    distinct = dict.fromkeys(tuple(row.get(language, "") for language in (SOURCE, *languages)) for row in rows.values())
    columns = list(zip(*distinct, strict=True)) or [()] * (1 + len(languages))
    return AlignedText({lang: list(lines) for lang, lines in zip((SOURCE, *languages), columns, strict=True)}, name)


def read_catalog(path: Path) -> Iterator[tuple[str, str]]:
    """Yield message, with its context and ``\\x04`` before it, and translation of each entry that has one.

    Raises:
        ValueError: a file that is not a catalog, or not UTF-8.
    """
    return _read_mo(path) if path.suffix == ".mo" else _read_po(path)


def _read_mo(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with open(path, "rb") as file:
            catalog = gettext.GNUTranslations(file)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (OSError, struct.error, UnicodeDecodeError, ValueError, LookupError, IndexError) as error:
        raise ValueError(f"{path} is not a gettext catalog: {' '.join(str(error).split())}") from error
    singular = catalog.plural(1)  # type: ignore[attr-defined]  # set by the catalog's header
    for key, translation in catalog._catalog.items():  # type: ignore[attr-defined]
        message, form = key if isinstance(key, tuple) else (key, singular)
        if message and form == singular and translation:
            yield message, translation


_KEYWORD = re.compile(r'(msgctxt|msgid|msgid_plural|msgstr(?:\[\d+\])?)\s+(".*")$')
_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|x([0-9a-fA-F]{2})|(.))")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


def _read_po(path: Path) -> Iterator[tuple[str, str]]:
    """Yield message and translation of each entry but fuzzy ones, which nobody has checked, and obsolete ones."""
    singular = 0
    for entry in _entries(path):
        message, translation = entry.get("msgid"), entry.get("msgstr") or entry.get(f"msgstr[{singular}]")
        if message == "" and translation and (match := re.search(r"plural=([^;]+);", translation)):
            try:
                singular = gettext.c2py(match[1])(1)  # type: ignore[attr-defined]  # not in its stubs
            except ValueError as error:
                raise ValueError(f"{path}: {match[0]!r} is no rule for plural forms") from error
        elif message and translation:
            yield (f"{entry['msgctxt']}\x04" if "msgctxt" in entry else "") + message, translation


def _entries(path: Path) -> Iterator[dict[str, str]]:
    """Yield the strings of each entry by keyword; fuzzy ones have none."""
    entry: dict[str, str] = {}
    fuzzy, last = False, ""
    for number, raw in enumerate(itertools.chain(text_lines(path), [""]), 1):
        line = raw.strip()
        match = _KEYWORD.match(line)
        starts = match is not None and match[1] in ("msgctxt", "msgid")
        if (starts or line.startswith("#") or not line) and any(key.startswith("msgstr") for key in entry):
            yield {} if fuzzy else entry
            entry, fuzzy, last = {}, False, ""
        if line.startswith("#~"):
            fuzzy = False  # it was this obsolete entry's, which is only comments
        if match is not None:
            last = match[1]
            entry[last] = _unquote(match[2])
        elif line.startswith('"') and line.endswith('"') and len(line) > 1 and last:
            entry[last] += _unquote(line)
        elif line.startswith("#"):
            fuzzy = fuzzy or (line.startswith("#,") and "fuzzy" in line)
        elif line:
            raise ValueError(f"{path}, line {number}: {line[:40]!r} is none of a catalog's lines")


def _unquote(quoted: str) -> str:
    def one(match: re.Match[str]) -> str:
        if match[3] is not None:
            return _ESCAPED.get(match[3], match[3])
        return chr(int(match[1], 8) if match[1] else int(match[2], 16))

    return _ESCAPE.sub(one, quoted[1:-1])
