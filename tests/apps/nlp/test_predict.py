"""Lines of translations, in order and as they come."""

from types import SimpleNamespace

import pytest

from apps.nlp.decode import Candidate, DecodeConfig, decoding
from apps.nlp.language.data import TextData
from apps.nlp.predict import Line, as_text, checked_texts, given_lines, in_order, num_lines
from apps.nlp.translation.data import TranslationData


def test_a_line_comes_as_soon_as_all_before_it_are_there_and_none_is_lost_or_doubled():
    asked = []

    def batches():
        for numbers, texts in (([2, 0], ["c", "a"]), ([1], ["b"]), ([3], ["d"])):
            asked.append(numbers)
            yield numbers, texts

    lines = in_order(batches())
    assert asked == []
    assert (next(lines), asked) == ("a", [[2, 0]])
    assert (next(lines), next(lines), asked) == ("b", "c", [[2, 0], [1]])
    assert list(lines) == ["d"]
    for given, start, message in (
        ([([0, 2], ["a", "c"])], 0, "line 2 is missing"),
        ([([0, 1], ["a", "b"]), ([0], ["a"])], 0, "line 1 comes twice"),
        ([([3], ["d"])], 2, "line 3 is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            list(in_order(given, start=start))


def test_a_line_that_is_no_utf8_is_an_error_or_replaced_or_left_empty(tmp_path, caplog):
    path = tmp_path / "in.txt"
    path.write_bytes("\ufeffgrün\n".encode() + b"b\xffd\n" + b"\n" + b"\xfe\n")
    with pytest.raises(
        ValueError, match=r"in\.txt, line 2: byte 0xff .*; bad_lines \(--data\.bad_lines replace, or sk"
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


def test_lines_are_counted_and_texts_and_options_of_a_caller_checked(tmp_path):
    assert checked_texts(("a\tb ", "")) == ["a b", ""]
    with pytest.raises(ValueError, match=r"texts='abc' is one text, and not a list of texts: give \[text\]"):
        checked_texts("abc")
    with pytest.raises(ValueError, match=r"texts\[1\]=3 is a int, and not a text"):
        checked_texts(["a", 3])
    assert decoding(DecodeConfig(), {"num_beams": 2}).num_beams == 2
    with pytest.raises(ValueError, match=r"option='beam' is not one of .*did you mean 'num_beams'"):
        decoding(DecodeConfig(), {"beam": 2})
    # Candidates are lines of number, score and text.
    line = Line(4, "größer", [Candidate("greater", -0.25), Candidate("bigger", -1.5)])
    assert as_text(line, 1) == ["greater"]
    assert as_text(line, 2) == ["5\t-0.2500\tgreater", "5\t-1.5000\tbigger"]

    def data(text, path):
        return SimpleNamespace(text=text, predict_file=path)

    (tmp_path / "a.txt").write_bytes(b"a\n\nb")  # no line end after the last
    (tmp_path / "b.txt").write_bytes(b"")
    assert [num_lines(data(text, None)) for text in ("a", ["a", "b"])] == [1, 2]
    assert [num_lines(data(None, str(tmp_path / name))) for name in ("a.txt", "b.txt", "c")] == [3, 0, None]
    assert num_lines(data(None, "-")) is None
