"""Whether files are whole, and whether two folders hold the same."""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from pyarrow import parquet
from resuming import differences
from safetensors.torch import load_file

from apps.train.checkpoint.contents import read_checkpoint

MEASURED = re.compile(
    "seconds|minutes|memory|_mib|date|machine|commit|per_second|rounds|speed|[Cc]urve|equal_time|measured|"
    "cheaper|sentences|came$"  # the last of a ladder, in seconds too
)
"""Names of values that the clock decides, in JSON files and in logs."""

SHOWN = re.compile(r"\.(html|md|png|log|lock)$|report\.json$")
"""Names of files that show times beside results: they need to be there, and whole."""

LEFT_OUT = re.compile(r"tfevents|/Microsoft/|/earlier/")
"""Names of TensorBoard's files, which hold the time, of what onnxruntime notes of a machine, and of what a training
that was broken off before its first checkpoint has logged."""


def _exported(path: Path) -> Any:
    program = torch.export.load(path)  # the file itself has ids of the process
    return [dict(program.state_dict), program.graph_module.code]


def _tensors(path: Path) -> Any:
    saved = read_checkpoint(path) if path.is_dir() else torch.load(path, weights_only=True)
    if "loops" in saved:
        # On resuming it is not counted from the run's start.
        saved["loops"]["fit_loop"].pop("epoch_loop.val_loop.batch_progress", None)
        saved.get("sharded", {}).pop("folder", None)  # a random name
    return saved


READERS: dict[str, Callable[[Path], Any]] = {
    **dict.fromkeys((".ckpt", ".pt"), _tensors),
    ".pt2": _exported,
    ".json": lambda path: json.loads(path.read_text()),
    ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
    ".safetensors": load_file,
    ".yaml": lambda path: yaml.safe_load(path.read_text()),
    ".parquet": lambda path: parquet.read_table(path).to_pydict(),
    ".onnx": lambda path: importlib.import_module("onnx").load(path).SerializeToString(),
    ".html": lambda path: path.read_text().index("</html>"),
}


def files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by their path in it; a sharded checkpoint counts as one."""
    sharded = [path for path in folder.rglob("*.ckpt") if path.is_dir()]
    single = (path for path in folder.rglob("*") if path.is_file() and not set(path.parents) & set(sharded))
    found = (path for path in (*sharded, *single) if not LEFT_OUT.search(str(path)))
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def broken(folder: Path) -> str:
    """Return the first file under its final name that cannot be read; "": all can."""
    for name, path in files(folder).items():
        if path.suffix in READERS and not any(part.startswith(".") for part in Path(name).parts):
            try:
                READERS[path.suffix](path)
            except Exception as error:  # whatever a reader says of a cut file
                return f"{name} is not whole: {type(error).__name__}: {str(error)[:120]}"
    return ""


def unlike(expected: Path, found: Path) -> str:
    """Return where two folders differ but for values that the clock decides; "": nowhere."""
    a, b = files(expected), files(found)
    if a.keys() != b.keys():
        lacks, has = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
        return f"lacks {lacks[:4]}, has {has[:4]} besides"
    for name in a:
        if not SHOWN.search(name) and (places := differences(_values(a[name]), _values(b[name]))):
            return f"{name} differs in {places[:3]}"
    return broken(found)


def _values(path: Path) -> Any:
    if path.name == "metrics.csv":
        return _unmeasured(list(csv.DictReader(path.read_text().splitlines())))
    return _unmeasured(READERS.get(path.suffix, Path.read_bytes)(path))


def _unmeasured(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _unmeasured(v) for k, v in value.items() if not MEASURED.search(str(k))}
    return [_unmeasured(v) for v in value] if isinstance(value, list) else value
