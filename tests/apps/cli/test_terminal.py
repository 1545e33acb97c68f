"""Tests of a terminal's text after a command: the bars gone, each line once and at the start of a line."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import sys
import threading
from collections.abc import Callable

import pytest
from tiny_app import CONFIG

from apps.cli import main


def screen(data: bytes) -> list[str]:
    """Return the lines that a wide terminal shows in the end, without colours.

    Carriage return, line feed, cursor up and erasing a line are all that a progress bar moves by.
    """
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", data.decode()):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token.startswith("\x1b["):
            if token.endswith("A"):
                row -= int(token[2:-1] or 1)
            elif token == "\x1b[2K":
                lines[row] = ""
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + token + line[column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines if line.strip()]


@pytest.fixture
def terminal(config: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Run a command with a terminal as stdout and stderr; returns what it shows."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv: str) -> list[str]:
        leader, follower = pty.openpty()
        seen = io.BytesIO()

        def read() -> None:
            try:
                while data := os.read(leader, 65536):
                    seen.write(data)
            except OSError:  # the other end is closed
                pass

        reader = threading.Thread(target=read)
        reader.start()
        with open(follower, "w", buffering=1) as out, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", out)
            assert main(list(argv)) == 0
        reader.join()
        os.close(leader)
        return screen(seen.getvalue())

    return run


LOUD = """
import logging
from tiny_app import TinyModule

logging.basicConfig(level=logging.INFO)  # as FBGEMM has it: the root logger then repeats every note


class Loud(TinyModule):
    pass
"""


def test_a_note_is_printed_once_where_a_library_logs_as_well(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(logging.root, "handlers", [])  # without those of pytest, as in a process of its own
    (tmp_path / "loud.py").write_text(LOUD)
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("tiny_app.TinyModule", "loud.Loud"))
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Loud: ")


def test_a_line_over_a_line_is_seen_as_a_terminal_shows_it():
    # "ab", back, "c" over the a; a line below, up again, erased and written anew.
    assert screen(b"ab\rc\r\nnext\x1b[1A\r\x1b[2Knew\r\n") == ["new", "next"]


def test_a_training_leaves_no_bar_and_no_line_glued_to_one(terminal):
    shown = terminal("fit", "--config", "tiny.yaml", "--trainer.max_epochs", "2")
    expected = [
        "fit tiny.yaml -> runs/tiny",
        "device cpu .*: precision 32-true, threads [0-9]+, experts by cpu",
        "TinyModule: [0-9,]+ parameters, [0-9,]+ active, [0-9.]+ MFLOPs an example .forward.",
        "epoch 1/2  train/loss .*",
        "epoch 2/2  train/loss .*",
        "trained 2 epochs, 6 steps, in [0-9.]+ s",
        "checkpoints: runs/tiny/checkpoints; best val/loss .*",
    ]
    assert len(shown) == len(expected), shown
    for line, pattern in zip(shown, expected, strict=True):
        assert re.fullmatch(pattern, line)
    verdict = (
        "test loss [0-9.]+ in the test of runs/tiny/checkpoints/best.ckpt; "
        "a single run gives no estimate of the spread over seeds."
    )
    for command, title in (("test", verdict), ("validate", "validate of .*")):
        shown = terminal(command, "--config", "tiny.yaml")
        assert shown[0] == f"{command} tiny.yaml -> runs/tiny"
        assert re.fullmatch(title, shown[2])
    _, checkpoint, device, first, *_ = terminal("predict", "--config", "tiny.yaml")
    assert checkpoint == "checkpoint: runs/tiny/checkpoints/best.ckpt"
    assert device.startswith("device cpu")
    assert first.startswith('{"output": [')
