"""Predictions line by line, as the command line prints and writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apps.cli.write.predictions import write_stream


def printed(module: Any, data: Any) -> list[str]:
    """Return the lines that ``moesaic predict`` prints."""
    return [text for prediction in module.predict_stream(data).predict(0) for text in prediction.texts]


def written(module: Any, data: Any, path: Path, overwrite: bool = False) -> tuple[int, int]:
    """Write the predictions to ``path``; return how many there are, and how many an earlier run had left."""
    file = write_stream(module, module.predict_stream(data), path, overwrite=overwrite)
    return file.num_rows, file.start
