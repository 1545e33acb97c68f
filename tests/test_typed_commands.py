"""Every command that README, docs/ and the comments of configs/ tell to type is read by its command line; none is run.

What stands there for something of the reader's: what is in brackets is optional, and read once without and once with
it; a single capital is a number, A the first; KIND is densify. Files, folders and runs that a command names are made.
In prose a command without its options is only named, so that those with a configuration or run count.
"""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from made_boards import make_tables
from places import ROOT

from apps.bench import FOLDER as BENCHMARKS
from apps.cli import data
from apps.cli.command import _OTHERS
from apps.cli.configs import shipped
from apps.cli.flags import given
from apps.cli.options import COMMANDS
from apps.compare.ladder.options import Ladder
from apps.compare.options import Command as Compare
from apps.compare.suite.file import Command as Suite
from apps.serve.service import options as service
from apps.train.checkpoint.paths import NAMES

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
STARTS = re.compile(r"(?:\d\. )?(?:\S*\.venv/bin/)?moesaic |torchrun .*-m apps\.cli ")
ENDS = re.compile(r"[|&;<>]+")


def commands_of(path: Path) -> list[str]:
    """Return the commands in a page's blocks and in its prose, or in the comments of a configuration."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        blocks = re.findall(r"^```(?:sh|bash|text|)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        inline = [" ".join(line.split()) for line in re.findall(r"`(moesaic [^`]+)`", prose)]
        inline = [
            line for line in inline if re.search(r" configs/| --ckpt_path |--config ", line) and "..." not in line
        ]
    else:
        blocks, inline = [re.sub(r"^ *#+ *", "", text, flags=re.MULTILINE)], []
    lines = [line.strip() for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    return [line for line in lines if STARTS.match(line)] + inline


def typed(line: str) -> list[list[str]]:
    """Return the words after ``moesaic`` of a line, for each of its readings."""
    optional = re.compile(r"(?<= )\[(--[^\]]+|options)\]")
    lines = [optional.sub("", line), optional.sub(lambda match: match[1].replace("options", ""), line)]
    readings = []
    for line in dict.fromkeys(lines):
        lexer = shlex.shlex(STARTS.sub("", line, count=1), posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split, words = True, []
        for word in lexer:
            if ENDS.fullmatch(word):
                break
            words.append(str(ord(word) - 64) if re.fullmatch("[A-Z]", word) else word)
        readings.append(["densify" if word == "KIND" else word for word in words])
    return readings


def read(words: list[str]) -> None:
    """Read a command as the program does."""
    command, *rest = (word for word in words if word != "--traceback")
    if command in COMMANDS:
        given(COMMANDS[command].read(rest).rest)
    elif command == "compare":
        kind = next((k for word, k in (("--suite", Suite), ("--ladder", Ladder)) if word in rest), Compare)
        kind.read(rest)
    elif command == "data":
        data.DataOptions.read_one_of({"list": data.List, "prepare": data.Prepare}, rest)
    elif command == "bench":
        assert (BENCHMARKS / f"{rest[0]}.py").is_file(), rest[0]
    else:
        importlib.import_module(f"{_OTHERS[command][0]}.options").OPTIONS.read(rest)


def values_of(words: list[str], *options: str) -> list[str]:
    """Return the values of options, or the arguments before the first option if none is named."""
    found, at = [], not options
    for word in words[1:]:
        at = word in options if word.startswith("-") else at
        found += [word] if at and not word.startswith("-") else []
    return found


def make(words: list[str]) -> None:
    """Make the files that a command names, in this folder."""
    for run in values_of(words, "--ckpt_path", "--weights"):
        if run not in (*NAMES, "none"):
            path = Path(run) if run.endswith(".ckpt") else Path(run, "checkpoints", "best.ckpt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    configurations = [word for word in values_of(words) if word.endswith(".yaml")]
    for word in [*configurations, *values_of(words, "--config", "-c", "--overlay", "--moe", "--routers")]:
        if not shipped(Path(word)).is_file() and (word.endswith(".yaml") or word.isupper()):
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            Path(word).write_text("{}")
    for word in values_of(words, "--suite"):
        make_tables(shipped(Path(word)), Path())
    if words[0] in ("init", "verdict"):
        for word in values_of(words):
            if not shipped(Path(word)).exists():
                Path(word).mkdir(parents=True)
    for word in values_of(words, "--token_file"):
        Path(word).write_text("0123456789abcdef")


LINES = {path: commands_of(path) for path in [*PAGES, *sorted((ROOT / "configs").rglob("*.yaml"))]}


@pytest.mark.parametrize(
    "path", [path for path, lines in LINES.items() if lines], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_what_is_to_be_typed_is_read(path, tmp_path, monkeypatch):
    monkeypatch.setattr(service, "check_port", lambda *_: None)  # it may be in use here
    monkeypatch.setattr("apps.demonstrate.options.check_port", lambda *_: None)
    monkeypatch.setenv(service.VARIABLE, "0123456789abcdef")
    wrong = []
    for number, words in enumerate(words for line in LINES[path] for words in typed(line)):
        if words[0] in ("COMMAND", "--version"):
            continue
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        try:
            make(words)
            read(words)
        except (ValueError, FileNotFoundError, AssertionError, KeyError, SystemExit) as error:
            wrong.append((shlex.join(words), f"{type(error).__name__}: {error}"))
    assert wrong == []


def test_commands_are_found_and_read_with_their_placeholders(tmp_path):
    page, config = tmp_path / "a.md", tmp_path / "a.yaml"
    page.write_text(
        "Type `moesaic data` or `moesaic test\n--ckpt_path run`.\n"
        "```sh\nmoesaic fit -c a.yaml \\\n  --x.y 1  # so\nls\n```\n"
    )
    config.write_text("# 2. moesaic test\n#  torchrun --n 2 -m apps.cli fit --config a.yaml\nmodel: {}\n")
    assert commands_of(page) == ["moesaic fit -c a.yaml    --x.y 1  # so", "moesaic test --ckpt_path run"]
    assert commands_of(config) == ["2. moesaic test", "torchrun --n 2 -m apps.cli fit --config a.yaml"]
    assert typed("torchrun --n 2 -m apps.cli fit --config a.yaml") == [["fit", "--config", "a.yaml"]]
    assert typed("2. moesaic fit -c a.yaml   --x.y '1 2'  # so") == [["fit", "-c", "a.yaml", "--x.y", "1 2"]]
    assert typed("moesaic init D [--target A] > log 2>&1") == [["init", "4"], ["init", "4", "--target", "1"]]
    assert typed("moesaic convert KIND [options]") == [["convert", "densify"]]
