"""Predictions of lines of text: what the models of text share, and what identifies the lines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from apps.nlp.decode import DecodeConfig
from apps.nlp.predict import Line
from apps.train.predicting import Prediction, PredictionStream
from core.config.plain import to_plain


class LinePredictor:
    """A module that predicts something of each line of text: it brings ``predict_lines``, and gets the rest.

    Attributes:
        decode: how a line's candidates are found.
        predicts: what a line's best candidate is called in a file.
    """

    decode: DecodeConfig
    predicts: ClassVar[str] = "text"

    def predict_lines(self, data: Any, start: int = 0) -> Iterator[Line] | None:
        """Yield the candidates of each line of ``data.text`` or ``data.predict_file``, in their order.

        Nothing is computed before the first line is asked for, and no more than is needed for the next one.

        Args:
            data: the app's data module.
            start: lines before this one are passed over; a multiple of ``chunk_of(data)``.

        Returns:
            The lines; None where the data have neither text nor file.
        """
        raise NotImplementedError

    def chunk_of(self, data: Any) -> int:
        """Return how many lines are computed together."""
        return 1

    def made_from(self, data: Any) -> dict[str, Any]:
        """Return plain values that a line's candidates depend on, beside the weights and ``decode``."""
        return {}

    def predict_stream(self, data: Any) -> PredictionStream | None:
        """Return the predictions of ``data.text`` or ``data.predict_file``; None where the data have neither."""
        if data.text is None and data.predict_file is None:
            return None

        def predictions(start: int) -> Iterator[Prediction]:
            return map(self._prediction, self.predict_lines(data, start) or ())

        made_of = {
            "input": identity_of(data),
            "decode": to_plain(self.decode, DecodeConfig),
            "bad_lines": data.bad_lines,
            **to_plain(self.made_from(data)),
        }
        # A run that takes bad lines for errors has met none so far.
        return PredictionStream(
            predictions, lambda: num_lines(data), made_of, self.chunk_of(data), harmless={"bad_lines": "error"}
        )

    def _prediction(self, line: Line) -> Prediction:
        texts, scores = [c.text for c in line.candidates], [c.score for c in line.candidates]
        row = {"index": line.index, "source": line.source, self.predicts: texts[0], "candidates": texts}
        return Prediction(line.index, {**row, "scores": scores}, as_text(line, self.decode.num_best))


def as_text(line: Line, num_best: int) -> list[str]:
    """Return a line's best candidate; of several, each after the line's number from 1 and its score, and tabs."""
    if num_best == 1:
        return [line.candidates[0].text]
    return [f"{line.index + 1}\t{score:.4f}\t{text}" for text, score in line.candidates]


def identity_of(data: Any) -> list[Any]:
    """Return which text is to be predicted: the file with its size and time, or a digest of the text."""
    if data.text is not None:
        return [hashlib.sha256(json.dumps(data.text).encode()).hexdigest()]
    path = Path(data.predict_file).expanduser()
    try:
        if data.predict_file == "-" or path.is_fifo():
            return ["-"]
        stat = path.stat()
    except OSError as error:
        raise ValueError(f"predict_file={data.predict_file!r} cannot be read: {error.strerror}") from error
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def num_lines(data: Any) -> int | None:
    """Return the lines of ``data.text`` or of the file ``data.predict_file``; None where they cannot be counted."""
    if data.text is not None:
        return 1 if isinstance(data.text, str) else len(data.text)
    path = Path(data.predict_file).expanduser()
    if data.predict_file == "-" or not path.is_file():
        return None
    count, last = 0, b"\n"
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            count, last = count + piece.count(b"\n"), piece
    return count + (not last.endswith(b"\n"))
