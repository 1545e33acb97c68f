"""A word or a path names a checkpoint. A missing one is reported before anything heavy is imported."""

from __future__ import annotations

import json
from pathlib import Path

NAMES = ("average", "best", "last")
"""Words for the checkpoints in a run's folder. The folder by itself means the first of them that is there."""
MEANING = "a run's folder (its average, else its best, else its last checkpoint) or a checkpoint"
"""What every command takes as a checkpoint, for its help."""
SHARDED_PART = "checkpoint.pt"
"""The file that makes a folder a sharded checkpoint; see ``apps/train/checkpoint/sharded.py``."""
PRETRAINED = "config.json"
"""The file that makes a folder a pretrained one; see ``apps/train/publish/pretrained.py``."""


def is_sharded(path: Path | str) -> bool:
    """Return whether ``path`` is the folder of a sharded checkpoint."""
    return Path(path, SHARDED_PART).is_file()


def is_pretrained(path: Path | str) -> bool:
    """Return whether ``path`` is a folder of ``save_pretrained``, or of another program with the same layout."""
    return Path(path, PRETRAINED).is_file()


def is_hub_folder(path: Path | str) -> bool:
    """Return whether ``path`` is a folder of a model in transformers' layout."""
    try:
        config = json.loads(Path(path, PRETRAINED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "model_type" in config and "format" not in config


def find_checkpoint(path: Path | str) -> Path:
    """Return the checkpoint that a path means: itself, or the one in a run's folder that the run's own test uses.

    That is the average of the last epochs if the run keeps one (``average_last``), else the best checkpoint, else the
    last. A pretrained folder is a checkpoint itself.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if path.is_file() or is_sharded(path):
        return path
    for folder in (path / "checkpoints", path):
        for name in NAMES:
            file = folder / f"{name}.ckpt"
            if file.is_file() or is_sharded(file):
                return file
    if is_pretrained(path):
        return path
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}")
    raise FileNotFoundError(f"{path} holds no checkpoint: a run has checkpoints/best.ckpt or checkpoints/last.ckpt")


def run_name(checkpoint: Path) -> str:
    """Return the name of a checkpoint's run, else the name of the file."""
    folder = checkpoint.parent
    return run_title(folder.resolve().parent) if folder.name == "checkpoints" else checkpoint.stem


def run_title(folder: Path) -> str:
    """Return the name of a run's folder; the title of an earlier run is, for example, "digits/earlier/2"."""
    parts = folder.resolve().parts
    return "/".join(parts[-3:]) if parts[-2:-1] == ("earlier",) else parts[-1]


def named_checkpoint(which: str, run_dir: Path) -> Path:
    """Return the checkpoint that ``--ckpt_path WHICH`` means: one of ``NAMES`` in the run's folder, or any path.

    Raises:
        FileNotFoundError: there is none.
    """
    return find_checkpoint(run_dir / "checkpoints" / f"{which}.ckpt" if which in NAMES else which)
