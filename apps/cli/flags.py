"""The words of a command line: options with their values, before any parser sees them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.cli.configs import at, merge
from apps.cli.errors import UsageError, unknown_option

SECTIONS = ("seed_everything", "trainer", "model", "data", "sparsify", "optimizer", "lr_scheduler",
            "lr_scheduler_interval", "compile", "float32_matmul_precision", "ckpt_path", "weights_only")  # fmt: skip
"""The parts of a configuration, which are the first words of options."""
ASKING = ("print_config", "help", "h", "help_all")
"""Options that ask for a text and run nothing."""
NULLS = ("null", "Null", "NULL", "~")

_QUOTED_LIST = re.compile(
    r"""\[\s*(?:(?:"(?:[^"\\]|\\.)*"|'(?:[^']|'')*')\s*(?:,\s*|(?=\])))*\]""",
    re.DOTALL,
)
_ESCAPED_IN_YAML = re.compile("[\x7f-\x9f\ufeff\u2028\u2029]")


def given(flags: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return each flag's dotted name, without ``init_args``, and its value.

    Raises:
        UsageError: a word that belongs to no flag, or a flag without its value.
    """
    options: list[tuple[str, str | None]] = []
    words = iter(range(len(flags)))
    for i in words:
        flag = flags[i]
        if not flag.startswith("--"):
            if flag.startswith("-") and flag != "-h":
                raise UsageError(unknown_option(flag.lstrip("-").split("=")[0], SECTIONS))
            if flag != "-h":
                raise UsageError(_stray(flag))
            options.append(("h", None))
            continue
        key, equals, value = flag[2:].partition("=")
        name = ".".join(part for part in key.rstrip("+").split(".") if part != "init_args")
        if not equals and i + 1 < len(flags) and not flags[i + 1].startswith("--") and name not in ASKING[:3]:
            value, equals = flags[next(words)], "="
        if not equals and not _is_asking(name) and name.partition(".")[0] in SECTIONS:
            raise UsageError(f"--{key} needs a value")
        options.append((name, value if equals else None))
    return options


def _stray(word: str) -> str:
    if word.endswith((".yaml", ".yml")) or Path(word).is_file():
        return f"unexpected argument {word!r}: a configuration is given as --config {word}"
    return f"unexpected argument {word!r}: options are written --key value"


def asks(flags: Iterable[str], names: Sequence[str] = ASKING) -> bool:
    """Return whether the flags ask for the configuration or for help, and not for a run."""
    keys = (flag.lstrip("-").partition("=")[0] for flag in flags if flag.startswith("-"))
    return any(_is_asking(key, names) for key in keys)


def asks_for_help(flags: Iterable[str]) -> bool:
    """Return whether the flags ask for help, for which no checkpoint is needed."""
    return asks(flags, ASKING[1:])


def _is_asking(name: str, names: Sequence[str] = ASKING) -> bool:
    return name in names or name.endswith(".help")


def check_data_options(words: Sequence[str], command: str) -> None:
    """Raise a ``UsageError`` where the words that a command's own options leave are not ``--data.KEY VALUE`` alone."""
    for number, word in enumerate(words):
        is_value = bool(number) and not word.startswith("--") and "=" not in words[number - 1]
        if not (is_value or word.startswith("--data.")):
            raise UsageError(f"{word} is no option of moesaic {command} (--help lists them)")


def switch(argv: list[str], name: str) -> tuple[list[str], bool]:
    """Return ``argv`` without the switch called ``name``, and whether it is on; a value may follow, true or false."""
    rest: list[str] = []
    on = False
    items = iter(enumerate(argv))
    for i, item in items:
        key, equals, value = item.partition("=")
        if key != f"--{name}":
            rest.append(item)
            continue
        if not equals:
            value = "true"
            if argv[i + 1 : i + 2] in (["true"], ["false"]):
                value = next(items)[1]
        if value not in ("true", "false"):
            raise UsageError(f"{name}={value} is not one of true, false")
        on = value == "true"
    return rest, on


def take(argv: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Return ``argv`` without the options called ``names``, and their values."""
    rest: list[str] = []
    taken: dict[str, list[str]] = {name: [] for name in names}
    items = iter(argv)
    for item in items:
        key, equals, value = item.partition("=")
        name = key.lstrip("-")
        if not (key.startswith("-") and name in names and (len(name) == 1) == (not key.startswith("--"))):
            rest.append(item)
            continue
        if not equals:
            value = next(items, "")
        if not value or (not equals and value.startswith("--")):
            raise UsageError(f"{key} needs a value")
        taken[name].append(value)
    return rest, taken


def verbatim(flags: list[str], names: Sequence[str]) -> list[str]:
    """Return ``flags`` with the values of the options called ``names`` as lists of one text: they are not YAML.

    A list of texts in quotes stays as it is.

    Example::

        verbatim(["--data.text", "- Yes: no"], ("data.text",))     # ['--data.text=["- Yes: no"]']
    """
    out: list[str] = []
    items = iter(flags)
    for item in items:
        key, equals, value = item.partition("=")
        if not (key.startswith("--") and key[2:] in names):
            out.append(item)
            continue
        if not equals:
            value = next(items, "")
            if not value:
                raise UsageError(f"{key} needs a value")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise UsageError(f"the text of {key} is not valid UTF-8")
        if _QUOTED_LIST.fullmatch(value):
            out.append(f"{key}={value}")
            continue
        text = json.dumps([value], ensure_ascii=False)
        out.append(f"{key}=" + _ESCAPED_IN_YAML.sub(lambda c: f"\\u{ord(c[0]):04x}", text))
    return out


def with_nulls(config: Mapping[str, Any], flags: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return ``config`` with what the flags set to null two levels and more below a section, and the other flags.

    (jsonargparse passes such a null on as the text "None".) One that another flag sets too has that one's value.

    Example::

        with_nulls({"model": {"moe": {"top": 1}}}, ["--model.moe.top", "null"])
        # {"model": {"moe": {"top": None}}}, []
    """

    def is_null(merged: Mapping[str, Any], names: list[str], value: str) -> bool:
        return len(names) > 2 and value in NULLS and isinstance(at(merged, names[:-1]), Mapping)

    return with_flags(config, flags, is_null, lambda value: None)


def with_flags(
    config: Mapping[str, Any],
    flags: list[str],
    takes: Callable[[Mapping[str, Any], list[str], str], bool],
    plain: Callable[[str], Any],
) -> tuple[dict[str, Any], list[str]]:
    """Lay some flags over ``config``.

    Args:
        config: nested mappings.
        flags: ``--KEY.SUBKEY VALUE`` and ``--KEY.SUBKEY=VALUE``.
        takes: function of the mappings so far, the names of a flag's key, and its value: whether to take the flag.
        plain: function that turns the flag's text into the value to lay.

    Returns:
        The mappings, and the other flags.
    """
    merged, out = dict(config), list[str]()
    items = iter(flags)
    for item in items:
        key, equals, value = item.partition("=")
        words = [item, *([] if equals else itertools.islice(items, 1))] if key.startswith("--") else [item]
        value = value if equals else words[-1]
        names = [name for name in key.removeprefix("--").split(".") if name not in ("init_args", "class_path")]
        if not takes(merged, names, value):
            out += words
            continue
        over = plain(value)
        for name in reversed(names):
            over = {name: over}
        merged = merge(merged, over)
    return merged, out
