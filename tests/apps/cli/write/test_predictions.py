"""The notes of how far predictions are."""

import io
import itertools

from apps.cli.write import predictions
from apps.train.publish.predicting import Prediction, PredictionStream


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_said_each_minute_or_by_a_bar_on_a_terminal(monkeypatch):
    items = [Prediction(i, {}, []) for i in range(5)]
    now = itertools.count(0.0, 25.0)  # a line each 25 seconds
    monkeypatch.setattr(predictions.time, "monotonic", lambda: next(now))
    log = io.StringIO()
    assert list(predictions.watched(iter(items), 9, True, 4, log)) == items
    assert log.getvalue() == "7 of 9 predictions, 0.04 a second\n"  # 4 and 3 after 75 s
    shown = Terminal()
    assert list(predictions.watched(iter(items), 9, True, 4, shown)) == items
    assert "predictions" in shown.getvalue()
    assert "\x1b[2K" in shown.getvalue()[-24:]  # it is erased at the end
    quiet = Terminal()
    assert list(predictions.watched(iter(items), None, False, 0, quiet)) == items
    assert quiet.getvalue() == ""


def test_a_terminal_shows_texts_as_they_grow(monkeypatch):
    def predict(start, tell=None):
        for number, grown in enumerate((["a", "a b"], ["c"])):
            for text in grown if tell else ():
                tell(text)
                shown.append(out.getvalue())
            yield Prediction(number, {}, [grown[-1]])

    stream = PredictionStream(predict, lambda: 2, {}, tells=True)
    for out, expected in ((Terminal(), ["a", "a b", "a b\nc"]), (io.StringIO(), [])):
        shown: list[str] = []
        monkeypatch.setattr("sys.stdout", out)
        assert predictions.print_stream(stream) == 2
        assert out.getvalue() == "a b\nc\n"
        assert shown == expected
