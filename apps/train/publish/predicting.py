"""A model may predict by itself, one input after the other, instead of in Lightning's whole batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Prediction(NamedTuple):
    """The prediction for one input.

    Attributes:
        index: number of the input, from 0.
        row: plain values by column, for a file of rows.
        texts: lines of text, for a terminal or a text file.
    """

    index: int  # type: ignore[assignment]  # a prediction has no use for tuple.index
    row: dict[str, Any]
    texts: list[str]


@dataclass(frozen=True)
class PredictionStream:
    """Predictions in the order of their inputs, each computed when it is asked for.

    ``predict_stream(data)`` of a model returns one, or None if the data have nothing for it.

    Attributes:
        predict: ``predict(start)`` yields the predictions from input number ``start`` on, a multiple of ``chunk``.
        count: returns the number of inputs; None if it cannot be known beforehand.
        made_of: plain values that the predictions depend on in addition to the weights, by name: a stopped run
            continues if they are the same. "input" identifies the inputs; ``["-"]`` is standard input, which cannot be
            read twice.
        chunk: inputs that are computed together, so that a run may continue after so many with the same result.
        compatible_values: values of an earlier run that any other may follow, by name.
        file: name of a file that has the rows, in the run's folder and over an earlier one, if the user names none; "":
            they are only printed.
        page: ``page(path)`` writes a page that shows all predictions, once they are computed; None: there is none.
        tells: whether ``predict(start, tell)`` calls ``tell`` with each prediction's text as it grows.
    """

    predict: Callable[..., Iterator[Prediction]]
    count: Callable[[], int | None]
    made_of: Mapping[str, Any]
    chunk: int = 1
    compatible_values: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    page: Callable[[Path], None] | None = None
    tells: bool = False
