"""The words of a command line: options with their values, before any parser sees them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from apps.cli.configs import at, merge
from apps.cli.errors import UsageError
from apps.registry import TRAINER

SECTIONS = ("seed_everything", "trainer", "model", "data", "sparsify", "ladder", "optimizer", "lr_scheduler",
            "lr_scheduler_interval", "compile", "float32_matmul_precision", "threads",
            "ckpt_path", "weights_only")  # fmt: skip
"""The parts of a configuration, which are the first words of options."""
OF_LIGHTNING = ("verbose", "return_predictions")
"""Options of commands that Lightning's own parser has."""
ASKING = ("print_config", "help_all")
"""Options that ask for a text and run nothing."""
_CLASSES = (["model"], ["data"], ["optimizer"], ["lr_scheduler"])
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
    for key, value, _ in _pairs(flags):
        if not key.startswith("--"):
            is_file = key.endswith((".yaml", ".yml")) or Path(key).is_file()
            how = f"a configuration is given as --config {key}" if is_file else "options are written --key value"
            raise UsageError(f"unexpected argument {key!r}: {how}")
        name = ".".join(part for part in key[2:].rstrip("+").split(".") if part != "init_args")
        if value is None and not _is_asking(name) and name.partition(".")[0] in SECTIONS:
            raise UsageError(f"{key} needs a value")
        options.append((name, value))
    return options


def _pairs(flags: Sequence[str]) -> Iterator[tuple[str, str | None, Sequence[str]]]:
    """Yield each flag's key, its value if it has one, and the words that it is made of."""
    begin = 0
    while begin < len(flags):
        key, equals, value = flags[begin].partition("=")
        end = begin + 1
        if not equals and key.startswith("--") and key != "--print_config":
            end += end < len(flags) and not flags[end].startswith("--")
        yield key, value if equals else flags[end - 1] if end > begin + 1 else None, flags[begin:end]
        begin = end


def wants_text(flags: Iterable[str]) -> bool:
    """Return whether the flags ask for the configuration or for help, and not for a run."""
    return any(_is_asking(flag[2:].partition("=")[0]) for flag in flags if flag.startswith("--"))


def asks_for_help(flags: Iterable[str]) -> bool:
    """Return whether the flags ask for help, for which no checkpoint is needed."""
    return wants_text(flag for flag in flags if not flag.startswith("--print_config"))


def _is_asking(name: str) -> bool:
    return name in ASKING or name.endswith(".help")


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


def with_classes_and_nulls(config: Mapping[str, Any], flags: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Lay over ``config`` the public classes that flags name, and nulls below a class; return it and the other flags.

    A strategy may be a text to jsonargparse, and torchrec has optimizers of the names that torch's have; so classes are
    named in a mapping. jsonargparse passes a null two levels and more below a section on as the text "None".

    Example::

        with_classes_and_nulls({"model": {"moe": {"top": 1}}}, ["--model.moe.top", "null"])
        # {"model": {"moe": {"top": None}}}, []
    """

    def is_taken(merged: Mapping[str, Any], names: list[str], value: str) -> bool:
        is_class = names in _CLASSES or (value in TRAINER and names[0] == "trainer" and not names[-1].endswith("+"))
        return is_class or (len(names) > 2 and value in NULLS and isinstance(at(merged, names[:-1]), Mapping))

    return with_flags(config, flags, is_taken, yaml.safe_load)


def with_flags(
    config: Mapping[str, Any],
    flags: Sequence[str],
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
    for key, value, words in _pairs(flags):
        names = [name for name in key.removeprefix("--").split(".") if name not in ("init_args", "class_path")]
        if value is None or not takes(merged, names, value):
            out += words
            continue
        over = plain(value)
        for name in reversed(names):
            over = {name: over}
        merged = merge(merged, over)
    return merged, out
