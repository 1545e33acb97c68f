"""Text in Moses form: a file for each language, line i of one being the translation of line i of another.

WMT, IWSLT and OPUS publish their corpora so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apps.data.text_files import AlignedText, expand, read_lines


def find(root: Path, name: str, pairs: Sequence[str]) -> list[dict[str, Path]]:
    """Return the files of each text, by language.

    Args:
        root: folder that the names start from.
        name: ``train`` for ``train.en`` and ``train.de``, or with the language where it is, ``{lang}/news.txt``. With
            ``{pair}`` in it, ``{pair}/train.{lang}``, each pair has files of its own, under its name or its reverse's.
        pairs: such as ``en-de``.

    Raises:
        ValueError: fewer than two languages have a file, or one has several.
    """
    pattern = name if "{lang}" in name else f"{name}.{{lang}}"
    if "{pair}" in pattern:
        both = [(source, target) for source, target in (pair.split("-") for pair in pairs)]
        names = dict.fromkeys("-".join(one) for source, target in both for one in ((source, target), (target, source)))
        texts = [_files(root, pattern.replace("{pair}", one), sorted(one.split("-"))) for one in names]
    else:
        languages = dict.fromkeys(language for pair in pairs for language in pair.split("-"))
        texts = [_files(root, pattern, list(languages))]
    complete = [files for i, files in enumerate(texts) if len(files) > 1 and files not in texts[:i]]
    if not complete:
        source, target = pairs[0].split("-")
        first = pattern.replace("{pair}", pairs[0])
        lacking = next(
            (n for n in (first.replace("{lang}", lang) for lang in (source, target)) if not expand(root, n)), first
        )
        raise ValueError(f"{root / lacking} is missing (and {lacking}.gz too)")
    return complete


def _files(root: Path, pattern: str, languages: Sequence[str]) -> dict[str, Path]:
    files = {language: expand(root, pattern.replace("{lang}", language)) for language in languages}
    if several := next((paths for paths in files.values() if len(paths) > 1), None):
        raise ValueError(f"{pattern!r} names {several[0]} and {several[1]}: of each language it must name one file")
    return {language: paths[0] for language, paths in files.items() if paths}


def read(files: dict[str, Path]) -> AlignedText:
    """Return the lines of the files of one text.

    Raises:
        ValueError: a file that cannot be read, or two with different numbers of lines.
    """
    text = {language: read_lines(path) for language, path in files.items()}
    (first, expected), *others = ((files[language], len(lines)) for language, lines in text.items())
    for path, count in others:
        if count != expected:
            raise ValueError(
                f"{first} has {expected:,} lines and {path} has {count:,}: line i of one translates line i of the other"
            )
    return AlignedText(text, str(first))
