"""Lines of translations, in order and as they come."""

from __future__ import annotations

import io
import itertools
from types import SimpleNamespace

import pytest

from apps.nlp import output
from apps.nlp.decode import DecodeConfig
from apps.nlp.language.data import TextData
from apps.nlp.predict import Candidate, Line, checked_texts, decoding, given_lines, in_order
from apps.nlp.translation.data import TranslationData


def test_a_line_comes_as_soon_as_all_before_it_are_there():
    asked = []

    def batches():
        for numbers, texts in (([2, 0], ["c", "a"]), ([1], ["b"]), ([3], ["d"])):
            asked.append(numbers)
            yield numbers, texts

    lines = in_order(batches())
    assert asked == []
    assert next(lines) == "a"
    assert asked == [[2, 0]]
    assert next(lines) == "b"
    assert next(lines) == "c"
    assert asked == [[2, 0], [1]]
    assert list(lines) == ["d"]


def test_no_line_is_lost_or_doubled():
    with pytest.raises(ValueError, match="line 2 is missing"):
        list(in_order([([0, 2], ["a", "c"])]))
    with pytest.raises(ValueError, match="line 1 comes twice"):
        list(in_order([([0, 1], ["a", "b"]), ([0], ["a"])]))
    with pytest.raises(ValueError, match="line 3 is missing"):
        list(in_order([([3], ["d"])], start=2))


def test_a_line_that_is_no_utf8_is_an_error_or_replaced_or_left_empty(tmp_path, caplog):
    path = tmp_path / "in.txt"
    path.write_bytes("\ufeffgrün\n".encode() + b"b\xffd\n" + b"\n" + b"\xfe\n")
    with pytest.raises(
        ValueError, match=r"in\.txt, line 2: byte 0xff .*; bad_lines \(--data\.bad_lines replace, or skip"
    ):
        list(given_lines(None, str(path)))
    assert list(given_lines(None, str(path), "replace")) == ["grün", "b\ufffdd", "", "\ufffd"]
    assert list(given_lines(None, str(path), "skip")) == ["grün", "", "", ""]
    first, second = (record.message for record in caplog.records)
    assert first.endswith("in.txt: 2 of 4 lines are not valid UTF-8 and have U+FFFD for each bad byte: line 2, 4")
    assert second.endswith("in.txt: 2 of 4 lines are not valid UTF-8 and are taken for empty ones: line 2, 4")
    with pytest.raises(ValueError, match="bad_lines='ignore' is not one of error, replace, skip"):
        TextData(train_files="a.txt", bad_lines="ignore")
    with pytest.raises(ValueError, match=r"bad_lines='repl' is not one of .*; did you mean 'replace'"):
        TranslationData(bad_lines="repl")


def test_texts_and_options_of_a_caller_are_checked():
    assert checked_texts(("a\tb ", "")) == ["a b", ""]
    with pytest.raises(ValueError, match=r"texts='abc' is one text, and not a list of texts: give \[text\]"):
        checked_texts("abc")
    with pytest.raises(ValueError, match=r"texts\[1\]=3 is a int, and not a text"):
        checked_texts(["a", 3])
    assert decoding(DecodeConfig(), {"beam_size": 2}).beam_size == 2
    with pytest.raises(ValueError, match=r"option='beam' is not one of .*did you mean 'beam_size'"):
        decoding(DecodeConfig(), {"beam": 2})


def test_progress_is_said_each_minute_or_each_second_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    lines = [Line(i, "", [Candidate("", 0.0)]) for i in range(5)]
    now = itertools.count(0.0, 25.0)  # a line each 25 seconds
    monkeypatch.setattr(output.time, "monotonic", lambda: next(now))
    log = io.StringIO()
    assert list(output.watched(iter(lines), 9, True, 4, log)) == lines
    assert log.getvalue() == "7 of 9 lines, 0.04 a second\n"  # 4 and 3 after 75 s
    now = itertools.count(0.0, 0.5)
    shown = Terminal()
    assert list(output.watched(iter(lines), None, True, 0, shown)) == lines
    # after 1.0 s and 2.0 s; the note is taken away at the end
    assert shown.getvalue() == "\r\x1b[K2 lines, 2 a second\r\x1b[K4 lines, 2 a second\r\x1b[K"
    quiet = Terminal()
    assert list(output.watched(iter(lines), None, False, 0, quiet)) == lines
    assert quiet.getvalue() == ""


def test_candidates_are_lines_of_number_score_and_text_or_an_object():
    line = Line(4, "größer", [Candidate("greater", -0.25), Candidate("bigger", -1.5)])
    assert output.as_text(line, 1) == ["greater"]
    assert output.as_text(line, 2) == ["5\t-0.2500\tgreater", "5\t-1.5000\tbigger"]
    assert output.as_json(line, "translation") == (
        '{"index": 4, "source": "größer", "translation": "greater", "candidates": ["greater", "bigger"], '
        '"scores": [-0.25, -1.5]}'
    )


def test_lines_of_a_text_or_a_file_are_counted(tmp_path):
    def data(text, path):
        return SimpleNamespace(text=text, predict_file=path)

    (tmp_path / "a.txt").write_bytes(b"a\n\nb")  # no line end after the last
    (tmp_path / "b.txt").write_bytes(b"")
    assert [output.num_lines(data(text, None)) for text in ("a", ["a", "b"])] == [1, 2]
    assert [output.num_lines(data(None, str(tmp_path / name))) for name in ("a.txt", "b.txt", "c")] == [3, 0, None]
    assert output.num_lines(data(None, "-")) is None
