"""Command lines that a dataclass declares: each field is an option, and parser and help follow from the class.

The type of a field says which values its option takes: ``bool`` is a switch, a tuple takes several, a ``Literal`` one
of its words. An option without a default must be given. The class's docstring is the help.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from apps.cli.configs import read_config, shipped
from apps.cli.errors import UsageError, unknown_option
from apps.cli.flags import given
from apps.train.checkpoint.paths import MEANING


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a ``UsageError`` for a wrong option, and does not exit."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(message)


@dataclass(frozen=True)
class Shown:
    """Details of an option that its field's type cannot express.

    Attributes:
        metavar: placeholder of a value in the help.
        meaning: its help, unless the docstring of the class has one.
        words: its words; none: the field's name behind two dashes. A word without dashes is an argument, not an option.
        read: function of a value that returns the one to keep, or raises an error.
        one_each: several values are given one by one, each behind the option's word.
        adds: an option that is given again adds its values to those before, instead of replacing them.
    """

    metavar: str = ""
    meaning: str = ""
    words: tuple[str, ...] = ()
    read: Callable[[Any], Any] | None = None
    one_each: bool = False
    adds: bool = False


def config_file(path: Path) -> Path:
    """Return the path of a configuration; a missing or wrong one is an error before anything heavy is imported."""
    read_config(shipped(path))
    return shipped(path)


def folder(path: Path) -> Path:
    """Return the path of a folder that is there or can be made, and whose name libraries can write as UTF-8."""
    try:
        os.fsencode(str(path).encode().decode())
    except UnicodeError:
        rule = f"is no name in {sys.getfilesystemencoding()}, the encoding of this locale"
        raise UsageError(f"{str(path)!a} {rule}: give another, or set LC_ALL=C.UTF-8") from None
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            where = "" if part == path else f", below which {path} would be"
            raise UsageError(f"{part} is a file, not a folder{where}")
    return path


Run = Annotated[Path, Shown("RUN", MEANING)]
Config = Annotated[Path, Shown("FILE", read=config_file)]
Configs = Annotated[tuple[Path, ...], Shown("FILE", words=("--config", "-c"), read=config_file, one_each=True)]
Folder = Annotated[Path, Shown("DIR", read=folder)]


@dataclass(frozen=True)
class CommandLine:
    """Base class of the options of a command.

    Attributes:
        rest: values of a configuration that were given too, ``--KEY.SUBKEY VALUE``.
    """

    prog: ClassVar[str]
    """The command as it is typed."""

    sections: ClassVar[tuple[str, ...]] = ()
    """Sections of a configuration of which values may be given too."""

    rest: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    @classmethod
    def read(cls, argv: Sequence[str]) -> Self:
        """Read the words after the command.

        Raises:
            UsageError: an unknown or missing option, a value of a wrong type, or a configuration that is not there.
            ValueError: a value out of its range.
        """
        return cls._of(*cls.parser().parse_known_args(list(argv)))

    @classmethod
    def read_one_of(cls, kinds: Mapping[str, type[CommandLine]], argv: Sequence[str]) -> Any:
        """Read the words after a command whose first word names one of ``kinds``; see ``read``."""
        parser = Parser(prog=cls.prog, description=_texts(cls)[0])
        parsers = parser.add_subparsers(dest="kind", required=True, metavar="|".join(kinds), parser_class=Parser)
        for word, kind in kinds.items():
            kind.declare(parsers.add_parser(word, help=_texts(kind)[0]))
        values, rest = parser.parse_known_args(list(argv))
        return kinds[vars(values).pop("kind")]._of(values, rest)

    @classmethod
    def parser(cls) -> Parser:
        """Return a parser of the options."""
        parser = Parser(prog=cls.prog)
        cls.declare(parser)
        return parser

    @classmethod
    def declare(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options to a parser, and the help of the class."""
        parser.description, parser.epilog, meanings = _texts(cls)
        for name, field, kinds, shown, many in cls._fields():
            words = shown.words or (f"--{name}",)
            settings: dict[str, Any] = {"dest": name} if words[0].startswith("-") else {}
            default = None if field.default is dataclasses.MISSING else field.default
            text = meanings.get(name, shown.meaning)
            if default not in (None, False, ()) and "default" not in text:
                text += f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
            settings["help"] = text.replace("%", "%%")
            if settings.get("dest"):
                settings["required"] = field.default is dataclasses.MISSING
            if kinds == [bool]:
                parser.add_argument(*words, action="store_true", **settings)
                continue
            if typing.get_origin(kinds[0]) is Literal:
                settings["choices"] = typing.get_args(kinds[0])
            else:
                settings |= {"type": _number_or_share if len(kinds) > 1 else kinds[0], "metavar": shown.metavar}
            if many:
                settings |= {"action": "append"} if shown.one_each else {"nargs": "+"}
                settings |= {"action": "extend"} if shown.adds else {}
            parser.add_argument(*words, default=None if many else default, **settings)

    @classmethod
    def described(cls) -> Iterator[tuple[str, Any, str]]:
        """Yield the name, the default and the meaning of each option."""
        meanings = _texts(cls)[2]
        for name, field, _, shown, _ in cls._fields():
            yield name, field.default, meanings.get(name, shown.meaning)

    @classmethod
    def unknown(cls, name: str) -> str:
        """Return the line on an option that does not exist."""
        words = [word for field in cls._fields() for word in field[3].words or (field[0],)]
        if name in words:
            return f"--{name} does not exist: write {cls.prog} {name.upper()}, without an option's name"
        return unknown_option(name, [*(word.lstrip("-") for word in words), *cls.sections])

    @classmethod
    def _fields(cls) -> list[tuple[str, dataclasses.Field[Any], list[Any], Shown, bool]]:
        hints = typing.get_type_hints(cls, include_extras=True)
        return [(f.name, f, *_taken(hints[f.name])) for f in dataclasses.fields(cls) if f.name != "rest"]

    @classmethod
    def _of(cls, values: argparse.Namespace, rest: list[str]) -> Self:
        for name, _ in given(rest):
            if name.partition(".")[0] not in cls.sections:
                raise UsageError(cls.unknown(name))
        read: dict[str, Any] = {}
        for name, _, _, shown, many in cls._fields():
            value = getattr(values, name)
            if value is not None:
                keep = shown.read or (lambda value: value)
                try:
                    read[name] = tuple(map(keep, value)) if many else keep(value)
                except ValueError as error:
                    raise UsageError(str(error)) from error
        return cls(**read, rest=tuple(rest))


def _taken(hint: Any) -> tuple[list[Any], Shown, bool]:
    """Return the types of a value of an option, how it is shown, and whether it takes several."""
    if typing.get_origin(hint) is Annotated:
        kinds, _, many = _taken(hint.__origin__)
        return kinds, hint.__metadata__[-1], many
    inner = [_taken(arg) for arg in typing.get_args(hint) if arg not in (type(None), ...)]
    if typing.get_origin(hint) is tuple:
        return inner[0][0], inner[0][1], True
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for kinds, _, _ in inner for kind in kinds], inner[0][1], inner[0][2]
    return [hint], Shown({int: "N", float: "X", Path: "PATH"}.get(hint, "NAME")), False


def _number_or_share(text: str) -> int | float:
    """Return "4" as an integer and "0.5" as a share."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer nor a share such as 0.5") from None


def _texts(kind: type[CommandLine]) -> tuple[str, str, dict[str, str]]:
    """Return the head of a command's help, its end, and the meanings of options by name, as docstrings have them.

    The end may come from a base class, as for several kinds of one command.
    """
    import docstring_parser

    meanings: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        for item in docstring_parser.parse(vars(owner).get("__doc__") or "").params:
            meanings |= dict.fromkeys(item.arg_name.split(", "), " ".join((item.description or "").split()))
    heads = {
        owner: (inspect.cleandoc(vars(owner).get("__doc__") or "").partition("\n\nAttributes:")[0]).partition("\n\n")
        for owner in kind.__mro__[: kind.__mro__.index(CommandLine)]
    }
    more = next((text for _, _, text in heads.values() if text), "")
    return heads[kind][0], more, {name: text.rstrip(".") for name, text in meanings.items()}
