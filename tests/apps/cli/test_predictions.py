"""The notes of how far predictions are."""

import io
import itertools

from apps.cli import predictions
from apps.train.predicting import Prediction


def test_progress_is_said_each_minute_or_each_second_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    items = [Prediction(i, {}, []) for i in range(5)]
    now = itertools.count(0.0, 25.0)  # a line each 25 seconds
    monkeypatch.setattr(predictions.time, "monotonic", lambda: next(now))
    log = io.StringIO()
    assert list(predictions.watched(iter(items), 9, True, 4, log)) == items
    assert log.getvalue() == "7 of 9 predictions, 0.04 a second\n"  # 4 and 3 after 75 s
    now = itertools.count(0.0, 0.5)
    shown = Terminal()
    assert list(predictions.watched(iter(items), None, True, 0, shown)) == items
    # after 1.0 s and 2.0 s; the note is taken away at the end
    assert shown.getvalue() == "\r\x1b[K2 predictions, 2 a second\r\x1b[K4 predictions, 2 a second\r\x1b[K"
    quiet = Terminal()
    assert list(predictions.watched(iter(items), None, False, 0, quiet)) == items
    assert quiet.getvalue() == ""
