"""The words of a command line: options with their values, before any parser sees them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from apps.cli.configs import merge
from apps.cli.errors import UsageError

SECTIONS = ("seed_everything", "trainer", "model", "data", "sparsify", "ladder", "optimizer", "lr_scheduler",
            "lr_scheduler_interval", "compile", "float32_matmul_precision", "threads",
            "ckpt_path")  # fmt: skip
"""The parts of a configuration, which are the first words of options."""
ASKING = ("print_config", "help_all")
"""Options that ask for a text and run nothing."""
NULLS = ("null", "Null", "NULL", "~")

_QUOTED_LIST = re.compile(
    r"""\[\s*(?:(?:"(?:[^"\\]|\\.)*"|'(?:[^']|'')*')\s*(?:,\s*|(?=\])))*\]""",
    re.DOTALL,
)
_ESCAPED_IN_YAML = re.compile("[\x7f-\x9f\ufeff\u2028\u2029]")


class Word(str):
    """A value as a command line has it, which its place reads as YAML or as a text."""

    __slots__ = ()


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


def with_classes(config: Mapping[str, Any], flags: Sequence[str]) -> dict[str, Any]:
    """Return ``config`` with the classes of model and data that flags name, before their other values are known."""
    return with_flags(config, flags, only=(["model"], ["data"]))


def with_flags(
    config: Mapping[str, Any],
    flags: Sequence[str],
    read: Callable[[str], Any] = Word,
    only: Sequence[Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Lay flags over ``config``, in their order.

    Args:
        config: nested mappings.
        flags: ``--KEY.SUBKEY VALUE`` and ``--KEY.SUBKEY=VALUE``; a ``+`` behind the key adds to a list.
        read: function that makes a flag's text the value, unless it is a mapping in YAML.
        only: names of the flags that are laid; None: all but those that ask for a text.

    Example::

        with_flags({"model": {"moe": {"top": 1}}}, ["--model.moe.top", "null"])     # {"model": {"moe": {"top": None}}}
    """
    merged: Any = dict(config)
    for key, value, _ in _pairs(flags):
        names = [name for name in key[2:].rstrip("+").split(".") if name not in ("init_args", "class_path")]
        if value is not None and not _is_asking(key[2:]) and (only is None or names in only):
            laid = yaml.safe_load(value) if value.lstrip().startswith("{") else None if value in NULLS else read(value)
            merged = _laid(merged, names, laid, key.endswith("+"))
    return merged  # type: ignore[no-any-return]


def _laid(old: Any, names: Sequence[str], value: Any, adds: bool) -> Any:
    """Return ``old`` with a value at dotted names below it; in a list of objects the last one is meant."""
    if isinstance(old, Word) and old.startswith("["):
        old = yaml.safe_load(old)
    if not names:
        if adds and value.startswith("["):
            value = yaml.safe_load(value)
        if adds:
            more = value if isinstance(value, list) else [value]
            return [*(old if isinstance(old, list) else [] if old is None else [old]), *more]
        return merge({"": old}, {"": value})[""]
    if isinstance(old, list) and old:
        return [*old[:-1], _laid(old[-1], names, value, adds)]
    if isinstance(old, str):
        old = {"class_path": old}
    if not isinstance(old, Mapping):
        old = {}
    if "class_path" in old and names[0] != "dict_kwargs":
        inner = old.get("init_args") or {}
        return {**old, "init_args": {**inner, names[0]: _laid(inner.get(names[0]), names[1:], value, adds)}}
    return {**old, names[0]: _laid(old.get(names[0]), names[1:], value, adds)}
